"""Backpressure: learns of the merge of this worker's last pushes as it happens.

A worker may push a key again only after that. The servers report each slice; a value is free when all its
slices are merged.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, final

from tensorkv.errors import ProtocolError, TensorKVError, from_wire
from tensorkv.peer.deadlines import Wait
from tensorkv.wire import messages as m
from tensorkv.worker.core import WorkerCore
from tensorkv.worker.plans import KeyState, Plan, ServerPart
from tensorkv.worker.requests import Exchange, ServerPort


@final
class _MergeExchange(Exchange):
    """One server's answers: the positions of slices, as they merge."""

    def __init__(self, part: ServerPart, merged: Callable[[list[int] | TensorKVError], None]) -> None:
        self._part = part
        self._merged = merged
        self._missing = set(range(len(part.values)))

    def take(self, message: Any) -> bool:
        if isinstance(message, TensorKVError):
            self._merged(message)
            return True
        if isinstance(message, m.Failed):
            self._merged(from_wire(message.name, message.text))
            return True
        if not isinstance(message, m.Merged):
            raise ProtocolError(f"{type(message).__name__} is no answer to WaitMerged")
        news = set(message.positions)
        if len(news) < len(message.positions) or not news <= self._missing:
            raise ProtocolError(f"{len(message.positions)} slices have merged, of which some cannot")
        self._missing -= news
        self._merged([self._part.values[position] for position in message.positions])
        return not self._missing


@final
class Backpressure:
    """Watches the values of a plan, which the servers know, until each is merged.

    `up_to` is the number of this worker's pushes that the answers vouch for, `asked` are the requests, each
    with the rank of its server, and `wait` is the deadline of the thread that waits for news.
    """

    def __init__(self, plan: Plan, up_to: int = 0) -> None:
        self.plan = plan
        self.up_to = up_to
        self.asked: list[tuple[int, int]] = []
        self.wait: Wait | None = None
        self._servers: Sequence[ServerPort] = ()
        self._changed = threading.Condition()
        self._slices_left = [len(state.entry.slices) for state in plan.states]
        self._num_left = len(plan.states)
        self._free: list[int] = []
        self._error: TensorKVError | None = None

    @property
    def is_over(self) -> bool:
        """Whether all values were free."""
        return self._num_left == 0

    @property
    def has_news(self) -> bool:
        """Whether `news` has something to return, or to raise."""
        return bool(self._free or self._error)

    def ask(self, servers: Sequence[ServerPort]) -> None:
        """Queue the question to each server."""
        self._servers = servers
        for part in self.plan.parts:
            number = servers[part.server].open(_MergeExchange(part, self._merged))
            self.asked.append((part.server, number))
            servers[part.server].put(m.WaitMerged(self.plan.number, number))

    def news(self, timeout_s: float = 0.0) -> list[int]:
        """Wait up to `timeout_s` seconds; return the numbers of values that are free since the last call.

        Raises:
            KeyDeleted, PeerLostError: a server refuses or has ended its connection, and none is free.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.has_news, timeout_s)
            free, self._free = self._free, []
            if not free and self._error is not None:
                raise self._error
        self._num_left -= len(free)
        return sorted(free)

    def close(self) -> None:
        """Give up the requests that are still open."""
        for server, number in self.asked:
            self._servers[server].drop(number)

    def _merged(self, news: list[int] | TensorKVError) -> None:
        with self._changed:
            if isinstance(news, TensorKVError):
                self._error = news
            else:
                for value in news:
                    self._slices_left[value] -= 1
                    if self._slices_left[value] == 0:
                        self._free.append(value)
            self._changed.notify_all()


def watch_merged(core: WorkerCore, states: Sequence[KeyState]) -> Backpressure:
    """Ask the servers to report the merge of the last pushes of these keys. The caller holds the lock."""
    plan = core.plans.plan_to_pull(states)
    core.tell(plan)
    watch = Backpressure(plan, core.count)
    watch.ask(core.servers)
    return watch
