"""The floor in one process."""

from __future__ import annotations

import pytest

from tensorkv.bench.floorlocal import measure_local
from tensorkv.bench.steps import Plan


@pytest.mark.parametrize("updater", ["assign", "sgd"])
@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_it_is_measured(updater: str, num_devices: int) -> None:
    plan = Plan(updater=updater, num_devices=num_devices, warmup=1, steps=3)
    assert len(measure_local(plan)) == 3
