"""Chaos in a short form, and that its checks would notice what they look for."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import chaos
import chaosworker
import pytest

GOING_ON = chaos.Draw(
    number=1,
    kind="dist_async",
    on_worker_loss="continue",
    num_workers=2,
    num_servers=1,
    steps=10,
    victims=(("worker", 1),),
    at=(3,),
)


@pytest.fixture
def job(tmp_path: Path) -> chaos.ChaosJob:
    """A job that has ended: worker 0 did 10 steps, worker 1 was killed with 3 acknowledged of 5."""
    made = chaos.ChaosJob(GOING_ON, tmp_path, 7)
    (tmp_path / "output").write_text("the last words")
    (tmp_path / "ledger-0").write_bytes(chaosworker.LEDGER.pack(10, 10))
    (tmp_path / "ledger-1").write_bytes(chaosworker.LEDGER.pack(5, 3))
    return made


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(300)  # five jobs, each of which starts torch in up to six processes
def test_six_kills(capsys: pytest.CaptureFixture[str]) -> None:
    seed = 8956  # of those that draw every case in few processes
    summary = chaos.run(6, seed)
    assert summary.texts == [], f"seed {seed}"
    assert summary.kills.total() >= 6
    drawn = capsys.readouterr().out
    for kind in ("dist_sync", "dist_async"):
        for policy in ("fail", "continue"):
            assert f"{kind}, {policy}" in drawn
    for victims in ("worker", "server", "launcher", "at -1", ", worker"):
        assert victims in drawn


def test_the_same_seed_draws_the_same_jobs() -> None:
    drawn = [
        [chaos.draw_job(chance, number, 100) for number in range(30)]
        for chance in (random.Random(5), random.Random(5))
    ]
    assert drawn[0] == drawn[1]
    assert {each.goes_on for each in drawn[0]} == {True, False}


@pytest.mark.parametrize(
    ("first", "second", "right"),
    [
        ([10, 10], [3, 5], True),
        ([10, 10], [4, 4], True),
        ([9, 10], [4, 4], False),  # a push of one that lives is missing in some element
        ([10, 11], [4, 4], False),  # or counts twice
        ([10, 10], [2, 5], False),  # an acknowledged push is missing
        ([10, 10], [3, 6], False),  # one that was never made is there
    ],
)
def test_ledgers_are_compared(job: chaos.ChaosJob, first: list[int], second: list[int], right: bool) -> None:
    found = {"counts": {"small": [first, second]}}
    (job.folder / "result-0.json").write_text(json.dumps(found))
    summary = chaos.Summary()
    chaos.check_ledgers(job, {1}, summary)
    assert (summary.faults.total() == 0) is right
    assert summary.faults["wrong value"] == (0 if right else 1)


def test_who_lives_must_have_a_result(job: chaos.ChaosJob) -> None:
    summary = chaos.Summary()
    chaos.check_ledgers(job, {1}, summary)
    assert summary.faults["wrong end"] == 1
    assert "the last words" in summary.texts[0]


@pytest.mark.parametrize(
    ("text", "status", "faults"),
    [
        ("worker 1 on host h was lost: its connection ended", 1, 0),
        ("worker 2 on host h was lost: its connection ended", 1, 1),
        ("worker 1 on host h was lost: its connection ended", 0, 1),
    ],
)
def test_survivors_must_name_the_victim(job: chaos.ChaosJob, text: str, status: int, faults: int) -> None:
    (job.folder / "result-0.json").write_text(json.dumps({"lost": text}))
    summary = chaos.Summary()
    chaos.check_end(job, {("worker", 1): time.monotonic()}, status, summary)
    assert summary.faults["wrong end"] == faults


def test_a_file_that_is_left_is_found(job: chaos.ChaosJob) -> None:
    assert job.leftovers() == []
    (job.folder / "tmp" / "forgotten").touch()
    assert job.leftovers() == ["file forgotten"]


def test_counts_are_those_of_the_pushes() -> None:
    torch = pytest.importorskip("torch")
    value = torch.full((3,), 4 * 1 + 2 * (1 << chaosworker.BITS))
    value[1] += 1
    assert chaosworker.counts({"k": value}, 2) == {"k": [[4, 5], [2, 2]]}
