"""News of merged slices become news of free values."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tensorkv.errors import KeyDeleted, PeerLostError, ProtocolError, WaitTimeout, to_wire
from tensorkv.peer.deadlines import Wait
from tensorkv.wire import messages as m
from tensorkv.worker.backpressure import Backpressure
from tensorkv.worker.plans import KeyState, build_plan


class Link:
    """Keeps its exchange, for the test to answer."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.dropped: list[int] = []
        self.put = self.asked.append
        self.drop = self.dropped.append

    def open(self, exchange: Any) -> int:
        self.exchange = exchange
        return 1

    def pump(self) -> None:
        """Nothing to send."""

    def watch(self, number: int, wait: Wait) -> None:
        self.wait = wait


class Bench:
    """Key 0 on both of two servers, key 1 on the first, key 2 on the second."""

    def __init__(self, timeout_s: float = 20.0) -> None:
        places = [[(0, 0, 2), (1, 2, 4)], [(0, 0, 4)], [(1, 0, 4)]]
        states = [
            KeyState.of(
                m.KeyEntry(
                    i, i + 1, (4,), "float32", m.EPOCH, [m.SliceEntry(10 * i + p[0], *p) for p in place]
                )
            )
            for i, place in enumerate(places)
        ]
        self.links = [Link(), Link()]
        self.asked_waiting: list[int] = []
        self.failure: PeerLostError | None = None
        job: Any = SimpleNamespace(links=self.links, wait=self._wait, ask_waiting=self._ask_waiting)
        self.watch = Backpressure(
            job, 1, build_plan(7, states, [torch.float32] * 3, [1] * 3, 2), timeout_s, "push of 0"
        )
        self.watch.ask()

    def _wait(self, what: str, timeout_s: float, ask: Any, store: int, whom: Any) -> Wait:
        assert store == 1
        return Wait(what, timeout_s, lambda: self.failure, ask, whom)

    def _ask_waiting(self, link: Link, number: int, store: int) -> None:
        server = self.links.index(link)
        self.asked_waiting.append(server)
        link.wait.answered(m.Waiting(number, [3] if server == 0 else [], "round 2 of 0"))

    def merged(self, server: int, *positions: int) -> bool:
        last: bool = self.links[server].exchange.take(m.Merged(1, list(positions)))
        return last


def test_a_value_is_free_when_all_its_slices_are() -> None:
    bench = Bench()
    assert [link.asked for link in bench.links] == [[m.WaitMerged(7, 1)]] * 2
    ready = bench.watch.ready()
    assert not bench.merged(0, 1)
    assert next(ready) == [1]
    assert bench.merged(0, 0)
    assert not bench.merged(1, 1)
    assert next(ready) == [2]
    assert bench.merged(1, 0)
    assert list(ready) == [[0]]
    bench.watch.close()
    assert [link.dropped for link in bench.links] == [[1], [1]]


def test_what_is_free_comes_before_an_error() -> None:
    bench = Bench()
    bench.merged(0, 1)
    bench.links[1].exchange.take(m.Failed(1, *to_wire(KeyDeleted("deleted by rank 2"))))
    ready = bench.watch.ready()
    assert next(ready) == [1]
    with pytest.raises(KeyDeleted, match="deleted by rank 2"):
        next(ready)


def test_the_end_of_a_link() -> None:
    bench = Bench()
    bench.links[0].exchange.take(PeerLostError("server 0 has ended its connection"))
    with pytest.raises(PeerLostError, match="server 0"):
        next(bench.watch.ready())


def test_a_deadline_asks_every_server_who_is_missing() -> None:
    bench = Bench(timeout_s=0.01)
    with pytest.raises(WaitTimeout, match="push of 0 .*waiting for worker 3, round 2 of 0"):
        next(bench.watch.ready())
    assert bench.asked_waiting == [0, 1]


def test_a_broken_job_ends_it() -> None:
    bench = Bench()
    bench.failure = PeerLostError("worker 1 was lost")
    with pytest.raises(PeerLostError, match="worker 1"):
        next(bench.watch.ready())


@pytest.mark.parametrize("positions", [[0, 0], [-1], [99]])
def test_slices_that_cannot_merge(positions: list[int]) -> None:
    exchange = Bench().links[0].exchange
    with pytest.raises(ProtocolError, match="of which some cannot"):
        exchange.take(m.Merged(1, positions))
    assert not exchange.take(m.Merged(1, [0]))
    with pytest.raises(ProtocolError, match="of which some cannot"):
        exchange.take(m.Merged(1, [0]))


@pytest.mark.parametrize("message", [m.Done(1), m.Data(1, 0)])
def test_replies_that_are_none(message: Any) -> None:
    exchange = Bench().links[0].exchange
    with pytest.raises(ProtocolError, match="is no answer to WaitMerged"):
        exchange.take(message)
    with pytest.raises(ProtocolError, match="a payload where none belongs"):
        exchange.place(m.Data(1, 0), 4)
