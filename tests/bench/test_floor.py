"""The floor is measured, in processes and in this one."""

from __future__ import annotations

import sys

import pytest

from tensorkv.bench import floor
from tensorkv.bench.steps import Plan, read_result


@pytest.mark.parametrize("way", ["shm", "tcp"])
def test_in_processes(way: str) -> None:
    assert len(floor.measure(way, Plan(warmup=1, steps=3), num_workers=3, num_servers=2)) == 3


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["floor", "--way=local", "--set=4KB", "--steps=2"])
    floor.main()
    assert len(read_result(capsys.readouterr().out)["local"]) == 2


@pytest.mark.parametrize("option", ["--updater=sgd", "--devices=2", "--dtype=float64"])
def test_what_a_floor_does_not_do_is_refused(monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    monkeypatch.setattr(sys, "argv", ["floor", "--way=shm", option])
    with pytest.raises(SystemExit):
        floor.main()
