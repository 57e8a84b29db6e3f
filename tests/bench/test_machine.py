"""What a machine tells of itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensorkv.bench import machine
from tensorkv.bench.machine import this_machine


def test_this_machine_is_told_in_one_line() -> None:
    found = this_machine()
    text = found.text()
    assert found.num_cores >= 1
    assert f"{found.num_cores} cores" in text
    assert found.date in text
    assert "\n" not in text


def test_a_processor_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda path: "processor : 0\n")
    assert machine._cpu_model() == machine.platform.machine()
