"""How the steps of a conversation are carried out: with deadlines, and with errors where they belong."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tensorkv.errors import InvalidOption, KeyNotInitialized, PeerLostError, WaitTimeout
from tensorkv.launch.cluster import LocalCluster
from tensorkv.stores.dist import DistStore
from tensorkv.wire import messages as m
from tensorkv.worker.conversations import (
    AskScheduler,
    AskServers,
    AwaitMerged,
    Change,
    Conversation,
    Lead,
    Push,
    TellServers,
    WatchMerged,
)

DEADLINE_S = 20.0


class Bench:
    """Two workers that have initialised "a" and "b"; rank 0 converses, rank 1 just pushes."""

    def __init__(self) -> None:
        self.cluster = LocalCluster(2, 2, timeout_s=DEADLINE_S)
        self.jobs = [self.cluster.join(rank) for rank in range(2)]
        self.stores = [
            DistStore("dist_sync", job, store="default", reduction="sum", timeout_s=DEADLINE_S)
            for job in self.jobs
        ]
        for kv in self.stores:
            kv.init(["a", "b"], [torch.zeros(2), torch.zeros(2)])
        self.kv, self.other = self.stores
        self.store = self.kv._store

    def converse(self, conversation: Conversation[Any], act: Callable[..., Any] | None = None) -> Any:
        return self.kv._driver.converse(conversation, "a test", act)

    def close(self) -> None:
        for kv in self.stores:
            kv.close()
        for job in self.jobs:
            job.close(m.Goodbye())
        self.cluster.stop()


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


def steps(*each: Any) -> Conversation[list[Any]]:
    """Make these steps, and return what came of each, an exception as itself."""
    found = []
    for step in each:
        try:
            found.append((yield step))
        except Exception as exc:  # noqa: BLE001
            found.append(exc)
    return found


def test_each_step_is_carried_out(bench: Bench) -> None:
    store = bench.store
    scheduler, servers, told, changed, pushed, led = bench.converse(
        steps(
            AskScheduler(lambda n: m.CountKeys(n, store)),
            AskServers(lambda n: m.Flush(n, store)),
            TellServers(m.EndSave(store)),
            Change(lambda: bench.kv._job.order.locked(), in_turn=True),
            Push([1, 2]),
            Lead(),
        ),
        lambda *arguments: arguments,
    )
    assert scheduler.number == 2
    assert [type(each) for each in servers] == [m.Done, m.Done]
    assert told is None
    assert changed is True
    assert (pushed, led) == (([1, 2],), ())


def test_an_error_of_a_step_is_the_conversations(bench: Bench) -> None:
    def fail(*places: Any) -> None:
        raise InvalidOption("of the call")

    found = bench.converse(
        steps(AskScheduler(lambda n: m.Lookup(n, bench.store, ["c"])), Push([0]), Change(fail)), fail
    )
    assert [type(each) for each in found] == [KeyNotInitialized, InvalidOption, InvalidOption]
    assert not bench.kv._job.order.locked()


def test_an_error_that_it_does_not_handle_is_the_callers(bench: Bench) -> None:
    def only() -> Conversation[None]:
        yield AskScheduler(lambda n: m.Lookup(n, bench.store, ["c"]))

    with pytest.raises(KeyNotInitialized):
        bench.converse(only())


def test_a_wait_for_a_merge_ends_with_it_or_with_the_deadline(bench: Bench) -> None:
    bench.kv.push(["a", "b"], [torch.ones(2)] * 2)
    states = bench.kv._known(["a", "b"])

    def watch() -> Conversation[list[Any]]:
        watch = yield WatchMerged(states)
        found = yield from steps(AwaitMerged(watch))
        watch.close()
        return found

    bench.other.push("b", torch.ones(2))
    assert bench.converse(watch()) == [[1]]
    bench.kv._driver.timeout_s = 0.1

    def late() -> Conversation[list[Any]]:
        watch = yield WatchMerged(states[:1])
        found = yield from steps(AwaitMerged(watch))
        watch.close()
        return found

    (error,) = bench.converse(late())
    assert isinstance(error, WaitTimeout)
    assert "waiting for worker 1, round 1 of 'a'" in str(error)
    bench.kv._driver.timeout_s = DEADLINE_S


def test_a_watch_that_finds_no_thread_leaves_no_request(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    bench.kv.push(["a", "b"], [torch.ones(2)] * 2)
    before = [len(link._exchanges) for link in bench.kv._job.links]
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)  # what a limit on threads does
        (error,) = bench.converse(steps(WatchMerged(bench.kv._known(["a", "b"]))))
    assert isinstance(error, RuntimeError)
    assert [len(link._exchanges) for link in bench.kv._job.links] == before
    bench.other.push(["a", "b"], [torch.ones(2)] * 2)
    assert torch.equal(bench.kv.pull("a"), torch.full((2,), 2.0))


def test_a_conversation_in_a_broken_job_is_ended_where_it_is(bench: Bench) -> None:
    ended = []

    def talk() -> Conversation[None]:
        try:
            yield Lead()
        except BaseException as exc:
            ended.append(type(exc))
            raise

    def fail() -> None:
        bench.kv._abandon("a test")
        raise ArithmeticError("of the call")

    with pytest.raises(ArithmeticError):
        bench.converse(talk(), fail)
    assert ended == [GeneratorExit]
    assert isinstance(bench.kv._job.failure(), PeerLostError)
    bench.kv._closed = True
    bench.stores.remove(bench.kv)
    bench.other._abandon("a test")
    bench.stores.remove(bench.other)
