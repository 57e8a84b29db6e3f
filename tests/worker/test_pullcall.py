"""The end of a pull: by replies of several links in any order, by an error, by nobody waiting."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tensorkv.errors import KeyDeleted
from tensorkv.wire import messages as m
from tensorkv.worker.plans import KeyState, build_plan
from tensorkv.worker.pullcall import PullCall
from tensorkv.worker.transfers import Destinations

DEADLINE_S = 20.0


class Link:
    """Keeps the exchanges that are opened with it, for the test to answer."""

    def __init__(self) -> None:
        self.exchanges: list[Any] = []
        self.watched: list[int] = []
        self.asked: list[Any] = []
        self.put = self.asked.append
        self.watch = self.watched.append

    def open(self, exchange: Any) -> int:
        self.exchanges.append(exchange)
        return len(self.exchanges)

    def pump(self) -> None:
        """Nothing to send."""

    def answer(self, value: float) -> None:
        (exchange,) = self.exchanges
        for view in exchange.place(m.Data(1, 0), 8):
            view[:] = torch.full((len(view) // 4,), value).numpy().tobytes()
        assert exchange.take(m.Data(1, 0))


class Bench:
    """A pull of one value in two slices."""

    def __init__(self) -> None:
        slices = [m.SliceEntry(i + 1, i, 2 * i, 2 * i + 2) for i in range(2)]
        state = KeyState.of(m.KeyEntry("w", 1, (4,), "float32", m.EPOCH, slices))
        self.out = torch.zeros(4)
        self.links = [Link(), Link()]
        self.finished: list[Exception | None] = []
        plan = build_plan(7, [state], [torch.float32], [1], 2)
        self.call = PullCall(plan, Destinations.per_device(plan.states, [[self.out]]), self._finish)

    def ask(self) -> None:
        from contextlib import nullcontext

        job: Any = SimpleNamespace(
            links=self.links,
            order=nullcontext(),
            whole=nullcontext(),
            num_changes_queued=0,
        )
        core: Any = SimpleNamespace(tell=lambda plan: None, count=5)
        self.call.ask(job, core)

    def _finish(self, call: PullCall, error: Exception | None) -> Any:
        self.finished.append(error)
        if error is not None:
            raise error
        call.destinations.finish()
        return self.out.tolist()


@pytest.fixture
def without_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def test_it_ends_with_the_last_reply() -> None:
    bench = Bench()
    bench.ask()
    assert bench.call.up_to == 5
    assert [link.asked for link in bench.links] == [[m.Pull(7, 1)], [m.Pull(7, 1)]]
    bench.links[1].answer(2.0)
    assert bench.finished == []
    bench.links[0].answer(1.0)
    assert bench.call.result() == [1.0, 1.0, 2.0, 2.0]
    assert bench.finished == [None]


def test_the_first_error_is_raised_when_all_have_ended() -> None:
    bench = Bench()
    bench.ask()
    bench.links[0].exchanges[0].take(KeyDeleted("first"))
    assert bench.finished == []
    bench.links[1].exchanges[0].take(KeyDeleted("second"))
    with pytest.raises(KeyDeleted, match="first"):
        bench.call.result()
    assert len(bench.finished) == 1


def test_a_call_that_has_failed_is_freed_with_its_error(without_collector: None) -> None:
    bench = Bench()
    bench.ask()
    for link in bench.links:
        link.exchanges.pop().take(KeyDeleted("gone"))
    call = bench.call
    del bench.call
    still = weakref.ref(call)
    with pytest.raises(KeyDeleted):
        call.result()
    bench.finished.clear()
    del call
    assert still() is None


@pytest.mark.parametrize("answered_before", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_a_future_may_be_asked_for_before_or_after_the_end(answered_before: bool, fails: bool) -> None:
    bench = Bench()
    bench.ask()

    def answer() -> None:
        bench.links[0].answer(1.0)
        if fails:
            bench.links[1].exchanges[0].take(KeyDeleted("gone"))
        else:
            bench.links[1].answer(2.0)

    if answered_before:
        answer()
    future = bench.call.watch()
    if not answered_before:
        assert not future.done()
        answer()
    assert [link.watched for link in bench.links] == [[1], [1]]
    if fails:
        with pytest.raises(KeyDeleted):
            future.result(0)
    else:
        assert future.result(0) == [1.0, 1.0, 2.0, 2.0]


def test_replies_of_two_links_at_once() -> None:
    with ThreadPoolExecutor(3) as pool:
        for _ in range(200):
            bench = Bench()
            bench.ask()
            done = [
                pool.submit(link.answer, value) for link, value in zip(bench.links, (1.0, 2.0), strict=True)
            ]
            future = pool.submit(bench.call.watch).result(DEADLINE_S)
            for each in done:
                each.result(DEADLINE_S)
            assert future.result(DEADLINE_S) == [1.0, 1.0, 2.0, 2.0]
            assert bench.finished == [None]
