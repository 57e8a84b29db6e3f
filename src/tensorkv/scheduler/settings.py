"""Log of a store's settings at the scheduler, in the setting rank's order, until all ranks have made them.

RULES
1. The log matches a rank's k-th setting with the k-th that was made; they must agree.
2. The log evicts a setting once every member has made it. A rank that makes none keeps all others' settings
   in the log, of which at most the newest `MAX_REMEMBERED_SETTINGS` stay. An evicted setting agrees with
   any.
3. Of an evicted setting, the log keeps only whether its updater is elementwise, by key.

So a job that sets an option in every step runs in constant memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

from tensorkv.errors import SettingMismatch
from tensorkv.plain import Key
from tensorkv.wire.messages import SettingRecord

MAX_REMEMBERED_SETTINGS = 1024


@final
@dataclass(slots=True)
class Attempt:
    """A setting of the setting rank: in flight (`done` False), made, or refused with `error`."""

    record: SettingRecord
    leader: int
    done: bool = False
    names: frozenset[Key] | None = None  # `record.keys`
    error: tuple[str, str] | None = None


@final
class SettingLog:
    """Settings, made or in flight, that another rank may still have to agree with."""

    def __init__(self) -> None:
        self._kept: deque[Attempt] = deque()
        self._first = 0  # the number of the first setting in `_kept`
        self._made: dict[int, int] = {}  # by rank: number of settings it has made
        self._elementwise: dict[Key | None, bool] = {None: True}  # of evicted ones; None: all other keys

    @property
    def num_begun(self) -> int:
        """Number of settings ever made, including those in flight."""
        return self._first + len(self._kept)

    def num_made(self, rank: int) -> int:
        """Return the number of settings a rank has made, which is the index of its next one."""
        return self._made.get(rank, 0)

    def begin(self, rank: int, record: SettingRecord) -> int:
        """Add a new setting of the setting rank; return its number."""
        names = None if record.keys is None else frozenset(record.keys)
        self._kept.append(Attempt(record, rank, names=names))
        self._made[rank] = self.num_begun
        return self.num_begun - 1

    def match(self, rank: int, record: SettingRecord) -> Attempt | None:
        """Return the setting that a rank's next one must agree with, None if that is evicted.

        Raises:
            SettingMismatch: they do not agree.
        """
        number = self.num_made(rank)
        if number < self._first:
            return None
        attempt = self._kept[number - self._first]
        if attempt.record != record:
            raise SettingMismatch(
                f"setting number {number + 1} of rank {rank} is {_describe(record)}, but that of rank "
                f"{attempt.leader} is {_describe(attempt.record)}; all ranks that make a setting must agree"
            )
        return attempt

    def agreed(self, rank: int, members: Iterable[int]) -> None:
        """Count a rank's next setting as made. Call it after `match`."""
        self._made[rank] = self.num_made(rank) + 1
        self.tidy(members)

    def conclude(self, rank: int, number: int, error: tuple[str, str] | None, members: Iterable[int]) -> None:
        """Note that a rank has made a setting, or was refused. Ignored if the rank does not lead it."""
        if self._first <= number < self.num_begun:
            attempt = self._kept[number - self._first]
            if attempt.leader == rank and not attempt.done:  # else the rank left, and its own was withdrawn
                attempt.done, attempt.error = True, error
                self.tidy(members)

    def replace(self, records: Iterable[SettingRecord], num_workers: int) -> None:
        """Replace the log by the settings of a load, and restart the count for all ranks."""
        self._first = self.num_begun
        self._kept.clear()
        self._made = dict.fromkeys(range(num_workers), self._first)
        for record in records:
            self._remember_elementwise(record)

    def leave(self, rank: int, members: Iterable[int]) -> None:
        """Remove a rank that has left: withdraw its settings in flight, and no longer wait for it."""
        while self._kept and not self._kept[-1].done and self._kept[-1].leader == rank:
            self._kept.pop()
        self._made.pop(rank, None)
        self.tidy(members)

    def is_elementwise(self, key: Key) -> bool:
        """Whether the updater of a key is elementwise, so that the key may be sliced. ASSIGN is."""
        for attempt in reversed(self._kept):
            updater, keys = attempt.record.updater, attempt.names
            if attempt.error is None and (keys is None or key in keys):
                return updater.elementwise
        return self._elementwise.get(key, self._elementwise[None])

    def tidy(self, members: Iterable[int]) -> None:
        """Evict settings that every member has made, or that are too old."""
        made_by_all = min((self.num_made(rank) for rank in members), default=self.num_begun)
        while self._kept and self._kept[0].done:
            if self._first >= made_by_all and len(self._kept) <= MAX_REMEMBERED_SETTINGS:
                break
            attempt = self._kept.popleft()
            self._first += 1
            if attempt.error is None:
                self._remember_elementwise(attempt.record)

    def _remember_elementwise(self, record: SettingRecord) -> None:
        if record.keys is None:
            self._elementwise = {None: record.updater.elementwise}
        else:
            self._elementwise |= dict.fromkeys(record.keys, record.updater.elementwise)


def _describe(record: SettingRecord) -> str:
    keys = "all keys" if record.keys is None else f"keys {list(record.keys)}"
    options = f" with {record.updater.options}" if record.updater.options else ""
    return f"updater {record.updater.name!r}{options} for {keys}"
