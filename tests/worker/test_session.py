"""A worker's place in a job: joining, asking, leaving, and the stores it has left."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tensorkv.config import JobConfig
from tensorkv.errors import (
    NotInJob,
    PeerLostError,
    ProtocolError,
    StoreClosed,
    UnknownUpdater,
    UpdaterError,
    WaitTimeout,
)
from tensorkv.launch.cluster import LocalCluster
from tensorkv.peer import deadlines
from tensorkv.updaters.spec import UpdaterSpec
from tensorkv.wire import messages as m
from tensorkv.worker import session
from tensorkv.worker.session import Session, join, leave

DEADLINE_S = 20.0


@pytest.fixture(params=["inproc", "127.0.0.1"])
def cluster(request: pytest.FixtureRequest) -> Iterator[LocalCluster]:
    made = LocalCluster(2, 2, host=request.param, timeout_s=DEADLINE_S)
    yield made
    made.stop()


@pytest.fixture
def job(cluster: LocalCluster) -> Iterator[Session]:
    made = cluster.join(0)
    yield made
    made.close(m.Goodbye())


def open_store(job: Session, name: str = "default") -> int:
    joined = job.control.request(
        lambda n: m.JoinStore(n, name, m.StorePolicy("sync"), "sum", "fail"), "opening", DEADLINE_S
    )
    number: int = joined.store
    with job.order:
        for link in job.links:
            link.put(m.OpenStore(number, name, m.StorePolicy("sync"), False))
    return number


def test_every_server_is_asked_and_answers_in_order(job: Session) -> None:
    store = open_store(job)
    replies = job.ask_all(lambda n: m.Flush(n, store), "a flush", DEADLINE_S, store)
    assert len(replies) == 2
    assert len(job.ask_all(lambda n: m.Flush(n, store), "a flush", DEADLINE_S, store, [1])) == 1


def test_a_refusal_of_one_server_is_raised(job: Session) -> None:
    store = open_store(job)
    record = m.SettingRecord(None, UpdaterSpec(type="named", name="no such"))
    with pytest.raises(UnknownUpdater, match="no such"):
        job.ask_all(lambda n: m.PrepareSetting(n, store, 0, record), "a setting", DEADLINE_S, store)


def test_one_deadline_for_all_servers(job: Session) -> None:
    store = open_store(job)
    with pytest.raises(
        WaitTimeout, match="commit did not finish within 0.1 s: waiting for worker 1, commit 1"
    ):
        job.ask_all(lambda n: m.Commit(n, store, None, False, False, True), "commit", 0.1, store)
    job.ask_all(lambda n: m.Flush(n, store), "a flush", DEADLINE_S, store)


def test_after_leave_nothing_is_sent_for_a_store(job: Session) -> None:
    store, other = open_store(job), open_store(job, "other")
    job.ask_all(lambda n: m.Leave(n, store), "close", DEADLINE_S, store)
    job.left.add(store)
    with pytest.raises(StoreClosed, match="closed by another thread"):
        job.ask_all(lambda n: m.Flush(n, store), "a flush", DEADLINE_S, store)
    job.ask_waiting(job.links[0], 1, store)
    with pytest.raises(StoreClosed):
        job.wait("pull of 'w'", DEADLINE_S, store=store).tick()
    job.wait("pull of 'w'", DEADLINE_S, store=other).tick()
    job.ask_all(lambda n: m.Flush(n, other), "a flush", DEADLINE_S, other)


def test_after_close_everything_is_refused(job: Session) -> None:
    store = open_store(job)
    job.close(m.Goodbye())
    job.close(m.Abandon("a second close does nothing"))
    with pytest.raises(PeerLostError, match="this worker has left the job"):
        job.control.request(lambda n: m.Barrier(n, store), "barrier", DEADLINE_S, store)
    with pytest.raises(PeerLostError):
        job.ask_all(lambda n: m.Flush(n, store), "a flush", DEADLINE_S, store)


def test_joining_that_fails_half_way_leaves_nothing(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second server does not let the worker in; the scheduler is told, and no socket is left."""
    real = session.connect_to_server

    def connect(config: JobConfig, rank: int, *args: Any) -> object:
        if rank == 1:
            raise ProtocolError("not today")
        return real(config, rank, *args)

    monkeypatch.setattr(session, "connect_to_server", connect)
    with pytest.raises(ProtocolError, match="not today"):
        cluster.join(0)
    for server in cluster.servers:
        assert "it could not connect to all servers" in str(server.wait())


@pytest.mark.parametrize("known", [True, False])
def test_who_cannot_reach_a_server_hears_from_the_scheduler_who_was_lost(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """Else it would itself be named as the first that was lost: so the chaos run found it."""
    real = session.connect_to_server

    def connect(config: JobConfig, rank: int, *args: Any) -> object:
        if (config.rank, rank) == (0, 1):
            if known:
                cluster.join(1).close(m.Abandon("it fell over"))
            raise PeerLostError("server 1 cannot be reached")
        return real(config, rank, *args)

    monkeypatch.setattr(session, "connect_to_server", connect)
    monkeypatch.setattr(deadlines, "LOST_GRACE_S", DEADLINE_S if known else 0.0)
    with pytest.raises(PeerLostError, match="worker 1 .*it fell over" if known else "server 1 cannot"):
        cluster.join(0)
    lost = "it fell over" if known else "worker 0 .*it could not connect to all servers"
    for server in cluster.servers:
        assert re.search(lost, str(server.wait()))


def test_a_loss_wakes_a_call_that_waits(cluster: LocalCluster, job: Session) -> None:
    store = open_store(job)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(
            job.ask_all, lambda n: m.Commit(n, store, None, False, False, True), "commit", DEADLINE_S, store
        )
        cluster.join(1).close(m.Abandon("it fell over"))
        with pytest.raises(PeerLostError, match="worker 1 .*it fell over"):
            waiting.result(DEADLINE_S)


# ---- the process -------------------------------------------------------------------------------------


class Store:
    """A store as a job knows it."""

    def __init__(self, job: Session, error: Exception | None = None) -> None:
        self.closed = False
        self.error = error
        job.enter(id(self), self)

    def on_fault(self, fault: m.Fault) -> None:
        raise AssertionError("no faults here")

    def close(self) -> None:
        self.closed = True
        if self.error is not None:
            raise self.error


@pytest.fixture
def joined(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    monkeypatch.setattr(session, "_joined", {})
    monkeypatch.setattr("atexit.register", lambda function, *arguments: None)
    monkeypatch.setattr(session, "_watch_end", lambda who: None)  # those of pytest stay as they are
    config = cluster.config("worker", 0)
    made = join(config)
    assert join(config) is made
    yield made
    made.close(m.Goodbye())


def test_the_exit_of_the_interpreter_closes_stores(
    cluster: LocalCluster, joined: Session, caplog: pytest.LogCaptureFixture
) -> None:
    stores = [Store(joined, UpdaterError("it raised")), Store(joined)]
    leave(joined)
    assert all(store.closed for store in stores)
    assert "while leaving the job: it raised" in caplog.text
    assert joined.closed
    leave(joined)
    other = cluster.join(1)
    assert cluster.scheduler.lost is None
    other.close(m.Goodbye())


def test_an_uncaught_exception_is_a_loss(
    cluster: LocalCluster, joined: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "last_value", ArithmeticError("a nan"), raising=False)
    store = Store(joined)
    leave(joined)
    assert not store.closed
    assert "it ended with ArithmeticError: a nan" in str(cluster.servers[0].wait())


def test_a_forked_child_is_told_what_to_do(
    cluster: LocalCluster, joined: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = os.getpid()
    with monkeypatch.context() as patch:
        patch.setattr("os.getpid", lambda: 4711)
        with pytest.raises(NotInJob, match=f"4711 was forked from worker 0 .process {parent}.*hand tensors"):
            join(cluster.config("worker", 0))
    assert join(cluster.config("worker", 0)) is joined


def test_a_forked_child_leaves_nothing(joined: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(joined)
    with monkeypatch.context() as patch:
        patch.setattr("os.getpid", lambda: -1)
        leave(joined)
    assert not store.closed
    assert not joined.closed
