"""A loss ends every call that waits at that moment, and every later one, with one short error."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tensorkv.errors import PeerLostError, StoreClosed
from tensorkv.launch.cluster import LocalCluster
from tensorkv.peer import deadlines
from tensorkv.stores.dist import DistStore
from tensorkv.wire import messages as m
from tensorkv.worker.session import Session

DEADLINE_S = 60.0
LOSS_DEADLINE_S = 3.0  # what is promised

ONE = torch.ones(4)


@dataclass
class Pair:
    """Two workers of a job. Worker 1 calls; it is the others that are lost."""

    cluster: LocalCluster
    jobs: list[Session]
    stores: list[DistStore]


@pytest.fixture(params=["shm", "tcp", "inproc"])
def pair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    monkeypatch.setattr(deadlines, "_noted", type(deadlines._noted)())
    way: dict[str, Any] = {"host": "127.0.0.1", "transport": request.param}
    cluster = LocalCluster(2, 2, timeout_s=DEADLINE_S, **({} if request.param == "inproc" else way))
    jobs = [cluster.join(rank) for rank in range(2)]
    stores = [
        DistStore("dist_sync", job, store="default", reduction="sum", timeout_s=DEADLINE_S) for job in jobs
    ]
    for store in stores:
        store.init("w", ONE)
    yield Pair(cluster, jobs, stores)
    for job in jobs:
        job.close(m.Abandon("the test is over"))
    cluster.stop()


def push(kv: DistStore) -> None:
    kv.push("w", ONE)
    kv.push("w", ONE)


def pull(kv: DistStore) -> None:
    kv.push("w", ONE)
    kv.pull("w")


def pull_async(kv: DistStore) -> None:
    kv.push("w", ONE)
    kv.pull("w", async_op=True).wait()


def commit(kv: DistStore) -> None:
    kv.push("w", ONE, apply=False)
    kv.commit()


def close(kv: DistStore) -> None:
    kv.push("w", ONE)
    kv.push("w", ONE, async_op=True)
    kv.close()


CALLS: dict[str, Callable[[DistStore], None]] = {
    "push": push,
    "pull": pull,
    "pull_async": pull_async,
    "pushpull": lambda kv: kv.pushpull("w", ONE) and None,
    "barrier": lambda kv: kv.barrier(),
    "init": lambda kv: kv.init("new", ONE),
    "setting": lambda kv: kv.set_updater("add"),
    "commit": commit,
    "close": close,
}

LATER: dict[str, Callable[[DistStore], object]] = {
    "push": lambda kv: kv.push("w", ONE),
    "pull": lambda kv: kv.pull("w"),
    "barrier": lambda kv: kv.barrier(),
    "keys": lambda kv: kv.keys(),
}


def kill_worker(pair: Pair) -> None:
    """What the system does for a process that is killed: its connections end."""
    pair.jobs[0].control._connection.shutdown()
    for link in pair.jobs[0].links:
        link.shutdown()


def raise_in_with(pair: Pair) -> None:
    error = ArithmeticError("a nan")
    pair.stores[0].__exit__(type(error), error, None)


def kill_server(pair: Pair) -> None:
    pair.cluster.servers[1].stop()


def kill_scheduler(pair: Pair) -> None:
    pair.cluster.scheduler.stop()


KILLED = "its connection ended without a goodbye"
LOSSES: dict[str, tuple[Callable[[Pair], None], str]] = {
    "worker": (kill_worker, f"^worker 0 on host .+ was lost: {KILLED}"),
    "exception": (raise_in_with, "^worker 0 on host .+ was lost: ArithmeticError: a nan$"),
    "server": (kill_server, f"^server 1 on host .+ was lost: {KILLED}"),
    "scheduler": (kill_scheduler, f"^the scheduler on host (127.0.0.1|inproc) is gone: {KILLED}"),
}


def until_it_waits() -> None:
    end = time.monotonic() + DEADLINE_S
    while not deadlines.waiting_calls():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("call", CALLS)
def test_a_loss_ends_what_waits_and_what_comes_later(pair: Pair, call: str, loss: str) -> None:
    lose, text = LOSSES[loss]
    kv = pair.stores[1]
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(CALLS[call], kv)
        if call != "pull_async":  # its thread waits in no call; also a loss that comes first must raise
            until_it_waits()
        began = time.monotonic()
        losing = pool.submit(lose, pair)
        with pytest.raises(PeerLostError, match=text) as caught:
            waiting.result(DEADLINE_S)
        if call not in ("commit", "close"):  # a push that waits for its commit is told so first
            for later in LATER:
                with pytest.raises(PeerLostError, match=text):
                    LATER[later](kv)
        assert time.monotonic() - began < LOSS_DEADLINE_S
        losing.result(DEADLINE_S)
    shown = "".join(traceback.format_exception(caught.value))
    assert "During handling" not in shown
    assert "direct cause" not in shown


# ---- closing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["barrier", "init", "setting", "save"])
def test_a_close_ends_what_another_thread_waits_for(pair: Pair, call: str, tmp_path: Path) -> None:
    kv = pair.stores[1]
    with ThreadPoolExecutor(1) as pool:
        if call == "save":
            waiting = pool.submit(kv.save, str(tmp_path / "save"))
        else:
            waiting = pool.submit(CALLS[call], kv)
        until_it_waits()
        kv.close()
        with pytest.raises(StoreClosed, match="during the call"):
            waiting.result(DEADLINE_S)
