"""Every waiting call ends at the deadline that the launcher was told, and says whom it waited for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import tensorkv
from tensorkv.config import JobConfig
from tensorkv.errors import InvalidArgument, WaitTimeout
from tensorkv.launch.cluster import LocalCluster
from tensorkv.peer import deadlines
from tensorkv.scheduler.loop import SchedulerServer
from tensorkv.stores import dist
from tensorkv.stores.dist import DistStore
from tensorkv.wire import messages as m
from tensorkv.worker.session import Session

CONFIGURED_S = 4321.0
"""No test waits so long: the clock jumps when a call waits."""

ONE = torch.ones(4)


class Clock:
    """The real time, and what has been added to it."""

    def __init__(self) -> None:
        self.added_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.added_s


class Pair:
    """Two workers of a job, `me` and one that is asked for nothing more once a test has begun."""

    def __init__(self, cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cluster = cluster
        self._monkeypatch = monkeypatch
        self.jobs: list[Session] = []
        self.stores = [self.open(rank) for rank in range(2)]

    def open(self, rank: int, **options: Any) -> DistStore:
        """Open a store as a process does which the launcher has started."""
        for name, value in self.cluster.config("worker", rank).to_env().items():
            self._monkeypatch.setenv(name, value)
        self._monkeypatch.setattr(dist, "join", self._join)  # which asks for a process per rank
        kv = tensorkv.create("dist_sync", **options)
        assert isinstance(kv, DistStore)
        return kv

    def _join(self, config: JobConfig) -> Session:
        if config.rank == len(self.jobs):
            self.jobs.append(Session(config))
        return self.jobs[config.rank]

    def run(self, verb: Callable[[DistStore], object]) -> None:
        """Do something as both at once."""
        threads = [threading.Thread(target=verb, args=(kv,)) for kv in self.stores]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(deadlines, "time", clock)  # all that it takes from that module is `monotonic`
    return clock


@pytest.fixture
def pair(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    cluster = LocalCluster(2, 2, timeout_s=CONFIGURED_S)
    made: Pair | None = None
    try:
        made = Pair(cluster, monkeypatch)
        made.run(lambda kv: kv.init("w", ONE))
        yield made
    finally:
        for job in made.jobs if made else ():
            job.close(m.Abandon("the test is over"))
        cluster.stop()


@pytest.fixture
def jumps(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, the deadline of each call comes as soon as that waits."""
    monkeypatch.setattr(deadlines, "ASK_GRACE_S", 60.0)  # who is asked at the deadline may be slow to answer
    note = deadlines.Wait._note

    def note_and_jump(wait: deadlines.Wait) -> None:
        note(wait)
        clock.added_s += CONFIGURED_S

    return lambda: monkeypatch.setattr(deadlines.Wait, "_note", note_and_jump)


def push_twice(kv: DistStore) -> None:
    kv.push("w", ONE)
    kv.push("w", ONE)


def pull(kv: DistStore) -> None:
    kv.push("w", ONE)
    kv.pull("w")


def save_alone(kv: DistStore) -> None:
    kv.push("w", ONE)
    kv.save("/nowhere", alone=True)


def commit(kv: DistStore) -> None:
    kv.push("w", ONE, apply=False)
    kv.commit()


def push_behind(kv: DistStore) -> None:
    kv.push("w", ONE)
    work = kv.push("w", ONE, async_op=True)
    assert work is not None
    work.wait()


def pushpull_behind(kv: DistStore) -> None:
    kv.push("w", ONE)
    kv.pushpull("w", ONE, async_op=True).result()


def barrier_behind(kv: DistStore) -> None:
    kv.push("w", ONE)
    kv.barrier()


Calls = dict[str, Callable[[DistStore], object]]

OF_WORKER_0: Calls = {
    "push of 'w'": push_twice,
    "pull of 'w'": pull,
    "pushpull of 'w'": lambda kv: kv.pushpull("w", ONE),
    "commit": commit,
    "barrier": lambda kv: kv.barrier(),
    "save('/nowhere')": lambda kv: kv.save("/nowhere"),
    "save('/nowhere', alone=True)": save_alone,
    "load('/nowhere')": lambda kv: kv.load("/nowhere"),
    "state_dict()": lambda kv: kv.state_dict(),
    "load_state_dict()": lambda kv: kv.load_state_dict({}),
    "push of 'w' (wait)": push_behind,
    "pushpull of 'w' (result)": pushpull_behind,
}
"""Calls of worker 0 that wait for worker 1, by how their error begins."""

OF_WORKER_1: Calls = {
    "init of 'new'": lambda kv: kv.init("new", ONE),
    "init of 'new' (broadcast)": lambda kv: kv.broadcast("new", ONE.clone()),
    "a setting (updater)": lambda kv: kv.set_updater("add"),
    "a setting (optimizer)": lambda kv: kv.set_optimizer("sgd", lr=0.1),
}
"""Calls of worker 1 that wait for worker 0, which leads."""

OF_ONE: Calls = {
    "put of 'w'": lambda kv: kv.put("w", ONE),
    "pull of 'w'": lambda kv: kv.pull("w"),
    "info of 'w'": lambda kv: kv.info("w"),
    "delete of 'w'": lambda kv: kv.delete("w"),
    "barrier": barrier_behind,
    "close": lambda kv: kv.close(),
    "init of 'new'": lambda kv: kv.init("new", ONE),
    "a setting": lambda kv: kv.set_updater("add"),
}
"""Calls that wait for a server."""

OF_SCHEDULER: Calls = {
    "keys": lambda kv: kv.keys(),
    "lookup of 'other'": lambda kv: kv.pull("other"),
    "close": lambda kv: kv.close(),
}


@pytest.mark.parametrize(
    ("rank", "call"), [*((0, call) for call in OF_WORKER_0), *((1, call) for call in OF_WORKER_1)]
)
def test_a_call_that_waits_for_a_worker(pair: Pair, jumps: Callable[[], None], rank: int, call: str) -> None:
    verb = (OF_WORKER_0, OF_WORKER_1)[rank][call]
    jumps()
    with pytest.raises(WaitTimeout) as caught:
        verb(pair.stores[rank])
    what = call.partition(" (")[0]
    text = f"{what} did not finish within {CONFIGURED_S:g} s: waiting for worker {1 - rank}, "
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize("call", OF_ONE)
def test_a_call_that_waits_for_a_server(
    pair: Pair, jumps: Callable[[], None], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    for link in pair.jobs[0].links:  # nothing arrives there
        monkeypatch.setattr(link._sender, "put", lambda buffers, on_sent=None: None)
    monkeypatch.setattr(deadlines, "ASK_GRACE_S", 0.0)
    jumps()
    with pytest.raises(WaitTimeout) as caught:
        OF_ONE[call](pair.stores[0])
    text = f"{call} did not finish within {CONFIGURED_S:g} s: waiting for server "
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize("call", OF_SCHEDULER)
def test_a_call_that_waits_for_the_scheduler(
    pair: Pair, jumps: Callable[[], None], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(pair.jobs[0].control._sender, "put", lambda buffers, on_sent=None: None)
    monkeypatch.setattr(deadlines, "ASK_GRACE_S", 0.0)
    jumps()
    with pytest.raises(WaitTimeout) as caught:
        OF_SCHEDULER[call](pair.stores[0])
    text = f"within {CONFIGURED_S:g} s: waiting for the scheduler, which does not answer"
    assert str(caught.value).endswith(text)


def test_a_pull_with_async_op_is_waited_for_as_long_as_a_pull(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv = pair.stores[0]
    kv.push("w", ONE)
    work = kv.pull("w", async_op=True)
    assert work._timeout_s == CONFIGURED_S
    monkeypatch.setattr(work, "_timeout_s", 0.1)
    for wait in (work.wait, work.result):
        with pytest.raises(
            WaitTimeout, match="pull of 'w' is not complete after 0.1 s: waiting for worker 1, round 1 of 'w'"
        ):
            wait()


@pytest.mark.parametrize(("options", "seconds"), [({}, "4321"), ({"timeout_s": 99}, "99")])
def test_create_waits_for_servers_that_do_not_come(
    jumps: Callable[[], None], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], seconds: str
) -> None:
    scheduler = SchedulerServer(num_workers=1, num_servers=1, token="t", host="inproc")
    scheduler.start()
    config = JobConfig(
        role="worker",
        rank=0,
        num_workers=1,
        num_servers=1,
        scheduler_host=scheduler.address[0],
        scheduler_port=scheduler.address[1],
        token="t",
        timeout_s=CONFIGURED_S,
    )
    for name, value in config.to_env().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "join", Session)
    jumps()
    text = f"joining the job did not finish within {seconds} s: waiting for all servers to join it"
    try:
        with pytest.raises(WaitTimeout, match=text):
            tensorkv.create("dist_sync", **options)
    finally:
        scheduler.stop()


def test_what_a_call_is_told_overrides_the_configuration(pair: Pair, jumps: Callable[[], None]) -> None:
    kv = pair.open(0, store="hasty", timeout_s=99.0)
    jumps()
    with pytest.raises(WaitTimeout, match="barrier did not finish within 99 s: waiting for worker 1"):
        kv.barrier()
    with pytest.raises(WaitTimeout, match="barrier did not finish within 7 s: waiting for worker 1"):
        pair.stores[0].barrier(timeout_s=7)


@pytest.mark.parametrize("kind", ["local", "device"])
def test_a_store_without_servers_is_told_the_same(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv("TENSORKV_TIMEOUT_S", "4321")
    with tensorkv.create(kind) as kv, tensorkv.create("dist_sync", embedded=True) as embedded:
        assert kv._timeout_s == embedded._timeout_s == CONFIGURED_S


def test_a_deadline_in_the_environment_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORKV_TIMEOUT_S", "-1")
    with pytest.raises(InvalidArgument, match="TENSORKV_TIMEOUT_S=-1"):
        tensorkv.create("local")
    tensorkv.create("local", timeout_s=1).close()
