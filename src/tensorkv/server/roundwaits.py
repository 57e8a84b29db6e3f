"""RoundWaits: calls that wait until rounds of slices are applied, found by the slices that they wait for.

A worker may have as many pulls under way as there are keys. Each waits in the list of one slice that it still
needs: an update looks at the lists of the slices that it concerns, and at no others.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar, final

from tensorkv.server.layouts import Layout
from tensorkv.server.rounds import Index


class RoundWait(Protocol):
    """A call that waits: its slices, each with the round it must have reached."""

    layout: Layout
    need: Index


Wait = TypeVar("Wait", bound=RoundWait)


@final
class RoundWaits(Generic[Wait]):
    """Calls that wait, in the order in which they came."""

    def __init__(self) -> None:
        self._waits: dict[int, Wait] = {}  # by arrival
        self._at: dict[int, list[int]] = {}  # slice index -> those that need it, by arrival
        self._arrivals = itertools.count()

    def __len__(self) -> int:
        return len(self._waits)

    def __iter__(self) -> Iterator[Wait]:
        return iter(self._waits.values())

    def add(self, wait: Wait, applied: Index) -> None:
        """Let a call wait, which is not ready."""
        arrival = next(self._arrivals)
        self._waits[arrival] = wait
        self._at.setdefault(_first_late(wait, applied), []).append(arrival)

    def take_ready(self, slices: Index, applied: Index) -> list[Wait]:
        """A round of these slices was applied: take out the calls that wait for nothing more."""
        ready: list[int] = []
        for index in self._at.keys() & set(slices.tolist()):
            for arrival in self._at.pop(index):
                wait = self._waits.get(arrival)
                if wait is None:
                    continue
                late = _first_late(wait, applied)
                if late < 0:
                    ready.append(arrival)
                else:
                    self._at.setdefault(late, []).append(arrival)
        return [self._waits.pop(arrival) for arrival in sorted(ready)]

    def drop(self, ended: Callable[[Wait], bool]) -> None:
        """Drop the calls that have ended otherwise."""
        gone = {arrival for arrival, wait in self._waits.items() if ended(wait)}
        if gone:
            for arrival in gone:
                del self._waits[arrival]
            rest = {index: [each for each in found if each not in gone] for index, found in self._at.items()}
            self._at = {index: found for index, found in rest.items() if found}


def _first_late(wait: RoundWait, applied: Index) -> int:
    """Return a slice that has not reached the round it must have, -1 if there is none."""
    index = wait.layout.index
    late = index[applied[index] < wait.need]
    return int(late[0]) if len(late) else -1
