"""Changes of options on one server: those of all workers, compared with those of the setting rank.

Options travel with pushes, not through the scheduler: a learning rate that changes in every step must cost no
round trip. So each worker sends its changes to all servers, and each server finds out for itself.

RULES
1. The setting rank is the lowest rank that has not left. Its changes hold; those of others are compared.
2. A worker's k-th change is compared with the k-th that holds. One that differs changes nothing; its worker
   is told.
3. A change of a rank that is ahead of the setting rank waits. If the setting rank leaves, the changes of the
   next one that were waiting hold, as of the moment they came.
4. At most the newest `MAX_REMEMBERED_CHANGES` are kept to compare with, and as many wait per rank. Those
   beyond are not compared.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal, final

from tensorkv.plain import Key

MAX_REMEMBERED_CHANGES = 1024


@final
@dataclass(slots=True)
class Change:
    """A change of options, by one rank, for some keys or all (None). Its rank's first has number 1.

    `from_round` has the first round of each slice for which it holds, by slice id, for a change that waits.
    """

    rank: int
    keys: tuple[Key, ...] | None
    options: dict[str, Any]
    from_round: dict[int, int] = field(default_factory=dict)
    number: int = 0

    def agrees_with(self, other: Change) -> bool:
        """Whether both ask for the same."""
        return self.keys == other.keys and self.options == other.options

    def __str__(self) -> str:
        keys = "all keys" if self.keys is None else f"keys {list(self.keys)}"
        return f"options {self.options} for {keys}"


@final
class OptionLog:
    """The changes of options that hold, and those that wait for the setting rank's.

    `differing` gathers each change that differs, with a text that says so.
    """

    def __init__(self, members: set[int]) -> None:
        self._members = members
        self._kept: deque[Change] = deque(maxlen=MAX_REMEMBERED_CHANGES)
        self._num_held = 0  # changes that ever held; `_kept` has the last of them
        self._num_made: dict[int, int] = {}  # by rank
        self._waiting: dict[int, deque[Change]] = {}  # by rank
        self.differing: list[tuple[Change, str]] = []

    def add(self, change: Change) -> Literal["holds", "compared", "waits"]:
        """Number a rank's next change, and take it; return what has become of it."""
        rank = change.rank
        change.number = self._num_made[rank] = self._num_made.get(rank, 0) + 1
        if change.number <= self._num_held:
            self._compare(change)
            return "compared"
        if rank == min(self._members, default=rank):
            self._hold(change)
            return "holds"
        self._waiting.setdefault(rank, deque(maxlen=MAX_REMEMBERED_CHANGES)).append(change)
        return "waits"

    def leave(self, rank: int) -> list[Change]:
        """Forget a rank, which is no member any more; return the changes that hold from now on, in order."""
        self._num_made.pop(rank, None)
        self._waiting.pop(rank, None)
        found = list(self._waiting.pop(min(self._members, default=rank), ()))
        for change in found:
            self._hold(change)
        return found

    def clear(self) -> None:
        """Begin anew: all ranks have loaded a save."""
        self._kept.clear()
        self._num_made.clear()
        self._waiting.clear()
        self._num_held = 0

    def _hold(self, change: Change) -> None:
        self._kept.append(change)
        self._num_held += 1
        for rank, waiting in list(self._waiting.items()):
            while waiting and waiting[0].number <= self._num_held:
                self._compare(waiting.popleft())
            if not waiting:
                del self._waiting[rank]

    def _compare(self, change: Change) -> None:
        place = change.number - 1 - (self._num_held - len(self._kept))
        if place >= 0 and not change.agrees_with(self._kept[place]):
            held = self._kept[place]
            text = (
                f"change of options number {change.number} of rank {change.rank} is {change}, but that of "
                f"rank {held.rank} is {held}; all ranks that change options must agree"
            )
            self.differing.append((change, text))
