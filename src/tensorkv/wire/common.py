"""What several conversations have in common: the base of messages, keys, settings, general answers."""

from __future__ import annotations

from typing import Literal

import msgspec

from tensorkv.plain import Key
from tensorkv.updaters.functions import CodeRef
from tensorkv.updaters.spec import UpdaterSpec

WorkerLossPolicy = Literal["fail", "continue"]
Late = Literal["drop", "carry"]
EPOCH = 0
"""The epoch of every placement so far: keys do not move yet."""


class Message(msgspec.Struct, array_like=True, tag_field="type", forbid_unknown_fields=True):
    """Base of all messages."""


class StorePolicy(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """When the rounds of a store merge, and what a pull may see. All workers of a store pass the same.

    `staleness` is for "async", the others for "sync": see `tensorkv.create`. None is no bound.
    """

    name: Literal["sync", "async"]
    staleness: int | None = None
    quorum: int | None = None
    grace_s: float = 0.0
    late: Late = "drop"

    @property
    def rounds_wait(self) -> bool:
        """Whether a round waits for other workers; else each push is a round of its own."""
        return self.name == "sync"

    @property
    def settings_wait(self) -> bool:
        """Whether a setting holds from the setting rank's next push on; else it holds when it arrives."""
        return self.name == "sync" and self.quorum is None

    @property
    def allows_commit(self) -> bool:
        """Whether pushes may wait for a commit: a round must then have a push of every worker."""
        return self.name == "sync" and self.quorum is None

    @property
    def saves_alone(self) -> bool:
        """Whether one worker can save: nothing but a put may change a slice until it pushes again."""
        return self.name == "sync" and self.quorum is None

    def __str__(self) -> str:
        """Describe it for error texts, without what does not apply."""
        more = "" if self.staleness is None else f", staleness {self.staleness}"
        if self.quorum is not None:
            more += f", quorum {self.quorum}, grace_s {self.grace_s}, late {self.late!r}"
        return f"kind {self.name!r}{more}"


class Done(Message, tag=10):
    """The request succeeded."""

    request: int


class Failed(Message, tag=11):
    """The request was refused, with the class name and text of the error."""

    request: int
    name: str
    text: str


class AskWaiting(Message, tag=12):
    """Ask what request `request` of a store is waiting for."""

    request: int
    store: int


class Waiting(Message, tag=13):
    """Answer to AskWaiting: the ranks that are missing, and where, such as "round 812 of 'w'"."""

    request: int
    ranks: list[int]
    where: str


class SliceEntry(msgspec.Struct, frozen=True, array_like=True):
    """A slice: elements [start, stop) of the flattened value, its id, and the server that holds it."""

    slice_id: int
    server: int
    start: int
    stop: int


class KeySpec(msgspec.Struct, frozen=True, array_like=True):
    """A key as init describes it."""

    key: Key
    shape: tuple[int, ...]
    dtype: str
    itemsize_bytes: int
    whole: bool


class KeyEntry(msgspec.Struct, frozen=True, array_like=True):
    """An initialised key: its id, which no later key has, shape, dtype and slices; `whole` as in its init."""

    key: Key
    key_id: int
    shape: tuple[int, ...]
    dtype: str
    epoch: int
    slices: list[SliceEntry]
    whole: bool = False


class SettingRecord(msgspec.Struct, frozen=True):
    """A setting on the wire: an updater, with the code it names, for some keys or all (None)."""

    keys: tuple[Key, ...] | None
    updater: UpdaterSpec
    code: CodeRef | None = None
