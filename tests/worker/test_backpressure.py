"""News of merged slices become news of free values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ports import Port

from tensorkv.errors import KeyDeleted, PeerLostError, ProtocolError, to_wire
from tensorkv.wire import messages as m
from tensorkv.worker.backpressure import Backpressure
from tensorkv.worker.plans import KeyState, build_plan


class Bench:
    """Key 0 on both of two servers, key 1 on the first, key 2 on the second."""

    def __init__(self) -> None:
        places = [[(0, 0, 2), (1, 2, 4)], [(0, 0, 4)], [(1, 0, 4)]]
        states = [
            KeyState.of(
                m.KeyEntry(
                    i, i + 1, (4,), "float32", m.EPOCH, [m.SliceEntry(10 * i + p[0], *p) for p in place]
                )
            )
            for i, place in enumerate(places)
        ]
        self.asked: list[list[Any]] = [[], []]
        self.ports = [Port(lambda message, data, told=told: told.append(message)) for told in self.asked]
        self.watch = Backpressure(build_plan(7, states, [torch.float32] * 3, [1] * 3, 2), up_to=4)
        self.watch.ask(self.ports)

    def exchange(self, server: int) -> Any:
        return self.ports[server].requests.exchanges[1]

    def merged(self, server: int, *positions: int) -> bool:
        self.ports[server].take(m.Merged(1, list(positions)))
        return 1 not in self.ports[server].requests.exchanges


def test_a_value_is_free_when_all_its_slices_are() -> None:
    bench = Bench()
    assert bench.asked == [[m.WaitMerged(7, 1)]] * 2
    assert bench.watch.asked == [(0, 1), (1, 1)]
    assert not bench.watch.has_news
    assert bench.watch.news() == []
    assert not bench.merged(0, 1)
    assert bench.watch.has_news
    assert bench.watch.news() == [1]
    assert bench.merged(0, 0)
    assert not bench.merged(1, 1)
    assert bench.watch.news() == [2]
    assert not bench.watch.is_over
    assert bench.merged(1, 0)
    assert bench.watch.news() == [0]
    assert bench.watch.is_over


def test_a_watch_that_is_closed_gives_up_what_is_open() -> None:
    bench = Bench()
    assert bench.merged(1, 0, 1)
    bench.watch.close()
    assert [port.requests.exchanges for port in bench.ports] == [{}, {}]


def test_what_is_free_comes_before_an_error() -> None:
    bench = Bench()
    bench.merged(0, 1)
    bench.ports[1].take(m.Failed(1, *to_wire(KeyDeleted("deleted by rank 2"))))
    assert bench.watch.news() == [1]
    with pytest.raises(KeyDeleted, match="deleted by rank 2"):
        bench.watch.news()


def test_the_end_of_a_link() -> None:
    bench = Bench()
    bench.ports[0].requests.end_all(PeerLostError("server 0 has ended its connection"))
    with pytest.raises(PeerLostError, match="server 0"):
        bench.watch.news()


@pytest.mark.parametrize("positions", [[0, 0], [-1], [99]])
def test_slices_that_cannot_merge(positions: list[int]) -> None:
    exchange = Bench().exchange(0)
    with pytest.raises(ProtocolError, match="of which some cannot"):
        exchange.take(m.Merged(1, positions))
    assert not exchange.take(m.Merged(1, [0]))
    with pytest.raises(ProtocolError, match="of which some cannot"):
        exchange.take(m.Merged(1, [0]))


@pytest.mark.parametrize("message", [m.Done(1), m.Data(1, 0)])
def test_replies_that_are_none(message: Any) -> None:
    exchange = Bench().exchange(0)
    with pytest.raises(ProtocolError, match="is no answer to WaitMerged"):
        exchange.take(message)
    with pytest.raises(ProtocolError, match="a payload where none belongs"):
        exchange.place(m.Data(1, 0), 4)
