"""Rank and number of workers, as the launcher has told them."""

from __future__ import annotations

import pytest

import tensorkv
from tensorkv.config import JobConfig, Role
from tensorkv.errors import NotInJob
from tensorkv.launch.place import find_place


def environment_of(role: Role) -> dict[str, str]:
    config = JobConfig(
        role=role,
        rank=2,
        num_workers=3,
        num_servers=1,
        scheduler_host="127.0.0.1",
        scheduler_port=1,
        token="",
    )
    return config.to_env()


def test_outside_a_job_there_is_one_worker() -> None:
    assert find_place() is None
    assert (tensorkv.rank(), tensorkv.num_workers()) == (0, 1)


def test_a_worker_has_the_place_that_its_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment_of("worker").items():
        monkeypatch.setenv(name, value)
    assert (tensorkv.rank(), tensorkv.num_workers()) == (2, 3)


def test_a_server_has_no_place_among_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment_of("server").items():
        monkeypatch.setenv(name, value)
    assert find_place() is None


def test_torchruns_variables_count_where_ours_are_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 1}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert (tensorkv.rank(), tensorkv.num_workers()) == (3, 4)
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(NotInJob, match="LOCAL_RANK"):
        tensorkv.rank()
