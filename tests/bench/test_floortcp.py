"""The floor through TCP: its sums are checked."""

from __future__ import annotations

import pytest

from tensorkv.bench import floortcp
from tensorkv.bench.floorjob import Floor, FloorError
from tensorkv.bench.floortcp import measure_tcp


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_any_number_of_workers(num_workers: int) -> None:
    floor = Floor(shapes=[(3000, 2), (7,), ()], num_workers=num_workers, num_servers=2, warmup=1, steps=2)
    assert len(measure_tcp(floor)) == 2


def test_a_wrong_sum_is_found(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Worker 1 pushes what nobody expects of it."""
    value = floortcp.gradient_value
    monkeypatch.setattr(
        floortcp, "gradient_value", lambda rank, *rest: value(rank, *rest) + (0.5 if rank == 1 else 0.0)
    )
    with pytest.raises(FloorError, match="a process of the floor ended with 1"):
        measure_tcp(Floor(shapes=[(3000,)], num_workers=2, warmup=1, steps=2))
    assert "WrongResult: tensor 0 holds values from 3.5 to 3.5, expected 3" in capfd.readouterr().err
