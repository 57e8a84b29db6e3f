"""Settings of one store at the scheduler, in the order of the setting rank, while others may still make them.

RULES
1. A rank's k-th setting is matched with the k-th that was made, and must agree with it.
2. What every member has made is forgotten. A rank that makes none holds back all others' settings: of those
   at most the newest `MAX_REMEMBERED_SETTINGS` are kept. What is forgotten agrees with anything.
3. Of a setting that is forgotten only stays for which keys its updater works element by element.

So a job that sets an option in every step takes no more memory the longer it runs.
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
    """A setting of the setting rank: under way (`done` False), made, or refused with `error`."""

    record: SettingRecord
    leader: int
    done: bool = False
    names: frozenset[Key] | None = None  # `record.keys`
    error: tuple[str, str] | None = None


@final
class SettingLog:
    """All settings that were made or are under way, as far as somebody may still have to agree with them."""

    def __init__(self) -> None:
        self._kept: deque[Attempt] = deque()
        self._first = 0  # the number of the first that is kept
        self._made: dict[int, int] = {}  # by rank: how many settings it has made
        self._elementwise: dict[Key | None, bool] = {None: True}  # of those forgotten; None: all other keys

    @property
    def num_begun(self) -> int:
        """How many settings were ever made, with those under way."""
        return self._first + len(self._kept)

    def num_made(self, rank: int) -> int:
        """Return how many settings a rank has made: the number of its next one."""
        return self._made.get(rank, 0)

    def begin(self, rank: int, record: SettingRecord) -> int:
        """The setting rank makes a new setting; return its number."""
        names = None if record.keys is None else frozenset(record.keys)
        self._kept.append(Attempt(record, rank, names=names))
        self._made[rank] = self.num_begun
        return self.num_begun - 1

    def match(self, rank: int, record: SettingRecord) -> Attempt | None:
        """Return what a rank's next setting is matched with, None if that is forgotten.

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
        """A rank has made its next setting, after `match`."""
        self._made[rank] = self.num_made(rank) + 1
        self.tidy(members)

    def conclude(self, rank: int, number: int, error: tuple[str, str] | None, members: Iterable[int]) -> None:
        """The rank that makes a setting has made it, or was refused. Passed over if it is not its to make."""
        if self._first <= number < self.num_begun:
            attempt = self._kept[number - self._first]
            if attempt.leader == rank and not attempt.done:  # else its own was withdrawn when it left
                attempt.done, attempt.error = True, error
                self.tidy(members)

    def replace(self, records: Iterable[SettingRecord], num_workers: int) -> None:
        """A load has brought these settings. From here on those of all ranks are counted anew."""
        self._first = self.num_begun
        self._kept.clear()
        self._made = dict.fromkeys(range(num_workers), self._first)
        for record in records:
            self._remember_elementwise(record)

    def leave(self, rank: int, members: Iterable[int]) -> None:
        """A rank has left: what it has under way is withdrawn, and nobody waits for it to agree."""
        while self._kept and not self._kept[-1].done and self._kept[-1].leader == rank:
            self._kept.pop()
        self._made.pop(rank, None)
        self.tidy(members)

    def is_elementwise(self, key: Key) -> bool:
        """Whether the updater that holds for a key allows it to be sliced. ASSIGN does."""
        for attempt in reversed(self._kept):
            updater, keys = attempt.record.updater, attempt.names
            if updater is not None and attempt.error is None and (keys is None or key in keys):
                return updater.elementwise
        return self._elementwise.get(key, self._elementwise[None])

    def tidy(self, members: Iterable[int]) -> None:
        """Forget what every member has made, and what is too old."""
        made_by_all = min((self.num_made(rank) for rank in members), default=self.num_begun)
        while self._kept and self._kept[0].done:
            if self._first >= made_by_all and len(self._kept) <= MAX_REMEMBERED_SETTINGS:
                break
            attempt = self._kept.popleft()
            self._first += 1
            if attempt.error is None:
                self._remember_elementwise(attempt.record)

    def _remember_elementwise(self, record: SettingRecord) -> None:
        if record.updater is None:
            return
        if record.keys is None:
            self._elementwise = {None: record.updater.elementwise}
        else:
            self._elementwise |= dict.fromkeys(record.keys, record.updater.elementwise)


def _describe(record: SettingRecord) -> str:
    keys = "all keys" if record.keys is None else f"keys {list(record.keys)}"
    if record.updater is not None:
        options = f" with {record.updater.options}" if record.updater.options else ""
        return f"updater {record.updater.name!r}{options} for {keys}"
    return f"options {record.options} for {keys}"
