"""run_job: results by rank, the first error, and no worker that hangs."""

from __future__ import annotations

import pytest
import torch

from tensorkv.errors import ShapeMismatch
from tensorkv.store import KVStore
from tensorkv.testing.cluster import run_job

DEADLINE_S = 20.0


@pytest.mark.parametrize("host", ["inproc", "127.0.0.1"])
def test_results_come_by_rank(host: str) -> None:
    results = run_job(
        lambda kv: (kv.rank, kv.num_workers), num_workers=3, num_servers=2, host=host, timeout_s=DEADLINE_S
    )
    assert results == [(0, 3), (1, 3), (2, 3)]


@pytest.mark.parametrize("rank", [0, 2])
def test_the_cause_is_raised_and_not_what_follows_from_it(rank: int) -> None:
    def work(kv: KVStore) -> None:
        kv.init("w", torch.ones(2))
        if kv.rank == rank:
            kv.push("w", torch.ones(3))
        kv.push("w", torch.ones(2))
        kv.barrier()

    with pytest.raises(ShapeMismatch):
        run_job(work, num_workers=3, num_servers=1, timeout_s=DEADLINE_S)


def test_a_worker_that_fails_before_the_others_have_joined() -> None:
    def work(kv: KVStore) -> None:
        if kv.rank == 0:
            raise ArithmeticError("at once")
        kv.barrier()

    for _ in range(20):
        with pytest.raises(ArithmeticError, match="at once"):
            run_job(work, num_workers=3, num_servers=1, timeout_s=DEADLINE_S)


def test_a_store_may_be_closed_by_the_function() -> None:
    run_job(lambda kv: kv.close(), num_workers=2, num_servers=1, timeout_s=DEADLINE_S)
