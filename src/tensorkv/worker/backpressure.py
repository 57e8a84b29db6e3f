"""Backpressure: learns of the merge of this worker's last pushes as it happens.

A worker may push a key again only after that. The servers report each slice; a value is free when all its
slices are merged.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, final

from tensorkv.errors import ProtocolError, TensorKVError, from_wire
from tensorkv.transport.base import TICK_S
from tensorkv.wire import messages as m
from tensorkv.worker.link import Exchange, ServerLink
from tensorkv.worker.plans import Plan, ServerPart
from tensorkv.worker.session import Session


@final
class _MergeExchange(Exchange):
    """One server's answers: the positions of slices, as they merge."""

    def __init__(self, part: ServerPart, merged: Callable[[list[int] | TensorKVError], None]) -> None:
        self._part = part
        self._merged = merged
        self._missing = set(range(len(part.values)))

    def place(self, message: m.Data, payload_bytes: int) -> list[memoryview]:
        raise ProtocolError("a payload where none belongs")

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
    """Watches the values of a plan, which the servers know, until each is merged."""

    def __init__(self, job: Session, store: int, plan: Plan, timeout_s: float, what: str) -> None:
        self._job = job
        self._store = store
        self._plan = plan
        self._changed = threading.Condition()
        self._slices_left = [len(state.entry.slices) for state in plan.states]
        self._free: list[int] = []
        self._error: TensorKVError | None = None
        self._numbers: list[tuple[ServerLink, int]] = []
        self._wait = job.wait(what, timeout_s, self._ask_waiting, store, self._whom)

    def ask(self) -> None:
        """Queue the question to each server. Called with the job's order held."""
        for part in self._plan.parts:
            link = self._job.links[part.server]
            number = link.open(_MergeExchange(part, self._merged))
            self._numbers.append((link, number))
            link.put(m.WaitMerged(self._plan.number, number))

    def ready(self) -> Iterator[list[int]]:
        """Yield the numbers of values as they become free, until all are.

        Raises:
            WaitTimeout, PeerLostError, KeyDeleted.
        """
        for link, number in self._numbers:
            link.pump()
            link.watch(number, self._wait)
        left = len(self._plan.states)
        while left:
            with self._changed:
                self._changed.wait_for(lambda: self._free or self._error, TICK_S)
                free, self._free = self._free, []
                error = self._error
            if free:
                left -= len(free)
                yield sorted(free)
            elif error is not None:
                raise error
            else:
                self._wait.tick()

    def close(self) -> None:
        """Give up the exchanges that are still open."""
        for link, number in self._numbers:
            link.drop(number)

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

    def _whom(self) -> str:
        return ", ".join(link.name for link, _ in self._numbers)

    def _ask_waiting(self) -> None:
        for link, number in self._numbers:
            self._job.ask_waiting(link, number, self._store)
