"""The processes of a floor end whatever happens."""

from __future__ import annotations

import itertools
import os
import signal
from multiprocessing.synchronize import Barrier

import pytest

from tensorkv.bench.floorjob import Floor, FloorError, run_job


def test_cuts_cover_everything_and_are_worth_a_message() -> None:
    floor = Floor(shapes=[(5000,), (), (7,)], num_servers=3)
    edges = floor.cuts()
    assert (edges[0][0], edges[-1][1]) == (0, 5008)
    assert all(high == low for (_, high), (low, _) in itertools.pairwise(edges))
    assert len(Floor(shapes=[(3,)], num_servers=3).cuts()) == 1


def test_a_process_that_fails_ends_the_others() -> None:
    def wait(barrier: Barrier) -> list[float]:
        barrier.wait(60)
        return []

    def fail(barrier: Barrier) -> list[float]:
        os.kill(os.getpid(), signal.SIGKILL)
        return []

    with pytest.raises(FloorError, match="ended with -9"):
        run_job(Floor(shapes=[(3,)]), [], [wait, fail])


def test_a_process_that_does_not_end_is_ended() -> None:
    def wait(barrier: Barrier) -> list[float]:
        signal.pause()
        return []

    with pytest.raises(FloorError, match="1 processes of the floor still run"):
        run_job(Floor(shapes=[(3,)], timeout_s=0.2), [], [wait])
