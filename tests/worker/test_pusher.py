"""What may go at once, what waits, and in which order: one worker of a job of two."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tensorkv.errors import KeyDeleted, PeerLostError, WaitTimeout
from tensorkv.launch.cluster import LocalCluster
from tensorkv.stores.dist import DistStore
from tensorkv.wire import messages as m
from tensorkv.worker.conversations import AwaitMerged, Step, WatchMerged
from tensorkv.worker.plans import Plan
from tensorkv.worker.pullcall import PullCall
from tensorkv.worker.pusher import Pusher
from tensorkv.worker.transfers import Destinations

DEADLINE_S = 20.0
KEYS = ["a", "b", "c"]


class Bench:
    """Two workers that have initialised `KEYS`; rank 0's parts can be looked at, rank 1 just pushes."""

    def __init__(self, kind: str = "dist_sync") -> None:
        self.cluster = LocalCluster(2, 2, timeout_s=DEADLINE_S)
        self.jobs = [self.cluster.join(rank) for rank in range(2)]
        self.stores = [
            DistStore(kind, job, store="default", reduction="sum", timeout_s=DEADLINE_S) for job in self.jobs
        ]
        for kv in self.stores:
            kv.init(KEYS, [torch.zeros(2) for _ in KEYS])
        self.job, self.kv, self.other = self.jobs[0], self.stores[0], self.stores[1]
        self.pusher: Pusher = self.kv._pusher

    def plan(self, *keys: str) -> Plan:
        return self.kv._plans.plan_to_pull(self.kv._known(keys))

    def send(self, *keys: str, apply: bool = True) -> Any:
        plan = self.plan(*keys)
        return self.pusher.send(plan, [torch.ones(2) for _ in keys], apply)

    def busy(self, *keys: str) -> list[str]:
        plan = self.plan(*keys)
        ids = self.kv._core.busy(plan)
        assert self.pusher.busy(plan) == bool(ids)
        return [str(state.key) for state in plan.states if state.key_id in ids]

    def merged(self, *keys: str) -> list[list[int]]:
        """Wait until the last push of these keys is merged; return the steps in which they were."""
        plan = self.plan(*keys)

        def watch() -> Generator[Step, Any, list[list[int]]]:
            steps, watch = [], (yield WatchMerged(plan.states))
            while not watch.is_over:
                steps.append((yield AwaitMerged(watch)))
            return steps

        return self.kv._driver.converse(watch(), "a test")

    def close(self) -> None:
        for kv, job in zip(self.stores, self.jobs, strict=True):
            kv.close()
            job.close(m.Goodbye())
        self.cluster.stop()


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


def test_keys_are_busy_until_their_push_is_merged(bench: Bench) -> None:
    assert bench.send("a", "b").wait(DEADLINE_S)
    assert bench.busy("a", "b", "c") == ["a", "b"]
    assert bench.send("a", "c") is None  # and nothing of it has gone
    assert bench.busy("c") == []
    bench.other.push(["a"], [torch.ones(2)])
    assert bench.merged("a") == [[0]]
    bench.kv._core.merged(bench.plan("a").key_ids, bench.kv._core.count)
    assert bench.busy("a", "b") == ["b"]
    assert bench.send("a").wait(DEADLINE_S)


def test_what_is_merged_says_nothing_of_later_pushes(bench: Bench) -> None:
    up_to = bench.kv._core.count
    bench.send("a")
    bench.kv._core.merged(bench.plan("a").key_ids, up_to)
    assert bench.busy("a") == ["a"]


def test_only_what_was_pushed_up_to_then_is_merged(bench: Bench) -> None:
    bench.send("a", "b")
    up_to = bench.kv._core.count
    bench.send("c")
    bench.kv._core.merged(bench.plan("b", "c").key_ids, up_to)
    assert bench.busy(*KEYS) == ["a", "c"]
    bench.kv._core.merged(bench.plan(*KEYS).key_ids, bench.kv._core.count)
    assert bench.busy(*KEYS) == []
    assert bench.kv._core.settled


def test_a_key_that_is_deleted_is_not_waited_for(bench: Bench) -> None:
    bench.send("a", "b")
    bench.kv.delete("a")
    assert bench.busy("b") == ["b"]
    bench.kv._core.merged({bench.plan("b").states[0].key_id}, bench.kv._core.count)
    assert bench.kv._core.settled


def test_a_push_that_another_thread_delays_until_its_key_is_deleted_is_refused(bench: Bench) -> None:
    plan = bench.plan("a", "b")
    bench.kv.delete("a")
    count = bench.kv._core.count
    with pytest.raises(KeyDeleted, match="'a' was deleted by another thread"):
        bench.pusher.send(plan, [torch.ones(2)] * 2, True)
    assert bench.kv._core.count == count
    assert bench.send("b").wait(DEADLINE_S)


def test_free_keys_go_around_busy_ones(bench: Bench) -> None:
    bench.send("b")
    plan = bench.plan(*KEYS)
    sent, late = bench.pusher.push_around(plan, [torch.ones(2)] * 3, True)
    assert [latch.wait(DEADLINE_S) for latch in sent] == [True]
    assert late == [1]
    assert bench.pusher.push_around(plan, [torch.ones(2)] * 3, True) == ([], [0, 1, 2])


def test_late_keys_go_when_they_are_merged(bench: Bench) -> None:
    bench.send("a", "b")
    plan = bench.plan("a", "b")
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(bench.pusher.push_late, plan, [0, 1], [torch.ones(2)] * 2, True, "a push")
        for key in ("b", "a"):
            for _ in range(2):
                bench.other.push(key, torch.ones(2))
            assert bench.kv.pull(key).tolist() == [2.0, 2.0]
        done.result(DEADLINE_S)


def test_calls_that_run_later_run_in_order(bench: Bench) -> None:
    states = bench.plan("a", "b").states
    ran: list[int] = []

    def call(number: int) -> int:
        ran.append(number)
        return number

    bench.send("a")
    plan = bench.plan("a")

    def late() -> int:
        bench.pusher.push_late(plan, [0], [torch.ones(2)], True, "a push")
        return call(0)

    works = [bench.pusher.run_later(states[:1], late, "first")]
    works += [bench.pusher.run_later(states, lambda n=n: call(n), "next") for n in (1, 2)]
    assert bench.busy("a", "b", "c") == ["a", "b"]
    assert bench.pusher.deferred(states)
    assert ran == []
    for _ in range(2):
        bench.other.push("a", torch.ones(2))
    bench.pusher.await_deferred(states, "a test")
    assert [work.result(DEADLINE_S) for work in works] == [0, 1, 2]
    assert ran == [0, 1, 2]
    assert not bench.pusher.deferred(states)


def test_an_error_of_a_late_call_is_its_own(bench: Bench) -> None:
    states = bench.plan("a").states

    def fail() -> None:
        raise ArithmeticError("a nan")

    failed = bench.pusher.run_later(states, fail, "first")
    after = bench.pusher.run_later(states, lambda: "fine", "next")
    assert after.result(DEADLINE_S) == "fine"
    with pytest.raises(ArithmeticError, match="a nan"):
        failed.result(DEADLINE_S)


def test_a_late_push_has_a_deadline_that_names_who_is_missing(bench: Bench) -> None:
    bench.send("a")
    bench.kv._driver.timeout_s = 0.1
    with pytest.raises(WaitTimeout, match="waiting for worker 1, round 1 of 'a'"):
        bench.pusher.push_late(bench.plan("a"), [0], [torch.ones(2)], True, "a push")
    bench.kv._driver.timeout_s = DEADLINE_S


def test_without_rounds_no_key_is_busy() -> None:
    bench = Bench("dist_async")
    for _ in range(3):
        assert bench.send("a").wait(DEADLINE_S)
    assert bench.busy("a") == []
    bench.close()


def test_a_pull_that_pushes_does_nothing_while_a_key_is_busy(bench: Bench) -> None:
    plan = bench.plan("a", "b")
    outs = [[torch.zeros(2)], [torch.zeros(2)]]

    def call() -> PullCall:
        return PullCall(plan, Destinations.per_device(plan.states, outs), lambda call, error: error or "done")

    bench.send("a")
    refused = call()
    assert not refused.push(bench.job, bench.pusher, [torch.ones(2)] * 2)
    assert refused.numbers == []
    for _ in range(2):
        bench.other.push(["a", "b"], [torch.ones(2)] * 2, async_op=True)
    bench.merged("a")
    bench.kv._core.merged(bench.plan("a").key_ids, bench.kv._core.count)
    going = call()
    assert going.push(bench.job, bench.pusher, [torch.full((2,), 3.0)] * 2)
    assert going.up_to == bench.kv._core.count
    assert going.watch().result(DEADLINE_S) == "done"
    assert [out[0].tolist() for out in outs] == [[4.0, 4.0], [4.0, 4.0]]


@pytest.mark.parametrize(("kind", "waits"), [("dist_sync", False), ("dist_async", True)])
def test_in_async_mode_the_connection_holds_back_who_pushes(kind: str, waits: bool) -> None:
    """In sync mode a key has one unmerged push; in async mode frames could pile up without end."""
    bench = Bench(kind)
    try:
        senders = [link._sender for link in bench.job.links]
        for sender in senders:
            assert sender._sending.acquire(timeout=DEADLINE_S)  # nobody can send: the server does not read
        try:
            sent = bench.send("a")
            assert sent.open is not waits
        finally:
            for sender in senders:
                sender._sending.release()
        for sender in senders:
            sender.pump()
        assert sent.wait(DEADLINE_S)
    finally:
        bench.close()


def test_a_push_that_was_dropped_is_not_done() -> None:
    """Its frame waits for the connection, which then fails: the memory is free, but nothing was sent."""
    cluster = LocalCluster(1, 1, timeout_s=DEADLINE_S)
    job = cluster.join(0)
    kv = DistStore("dist_async", job, store="default", reduction="sum", timeout_s=DEADLINE_S)
    kv.init("a", torch.zeros(2))
    sender = job.links[0]._sender
    with sender._sending:
        work = kv.push("a", torch.ones(2), async_op=True)
        assert work is not None
        assert not work.is_completed()
        sender._fail(ConnectionError("cut off"))
    with pytest.raises(PeerLostError, match="the connection to server 0 has ended"):
        work.wait(DEADLINE_S)
    job.close(m.Abandon("its connection was cut off"))
    cluster.stop()


def test_a_call_for_which_there_is_no_thread_is_not_waited_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = bench.plan("a").states

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            bench.pusher.run_later(states, lambda: "never", "first")
    assert not bench.pusher.deferred(states)
    assert bench.pusher.run_later(states, lambda: "fine", "next").result(DEADLINE_S) == "fine"
