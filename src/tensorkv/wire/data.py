"""Messages between a worker and a server, but those of saving and loading (`checkpoint`)."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from tensorkv.plain import Key
from tensorkv.wire.common import Message, SettingRecord, SliceEntry, StorePolicy

PayloadKind = Literal["dense", "absent"]


class PayloadDescriptor(msgspec.Struct, frozen=True, array_like=True):
    """How to read the bytes of a chunk.

    `kind` is that of the value ("dense", or "absent" without bytes), `codec` how it was packed.
    """

    kind: PayloadKind
    dtype: str
    codec: Literal["plain"] = "plain"


class ChunkEntry(msgspec.Struct, frozen=True, array_like=True):
    """A chunk of a plan: slices that travel in one frame, one after the other.

    `lengths` are their numbers of elements, `counts` how often each counts in a mean.
    """

    slice_ids: list[int]
    lengths: list[int]
    payload: PayloadDescriptor
    counts: list[int]


PLACED_BYTES = 16 << 10
"""Minimum size of a payload that stays in shared memory; smaller ones travel in their frame."""


class Placed(msgspec.Struct, frozen=True, array_like=True):
    """A payload in the sender's shared memory, in `spans`: segment, offset and length in bytes.

    In a push `number` is that of its loan, which the server returns when it has used the memory. In a reply
    it is the reply's; the worker counts the replies that it has copied.
    """

    number: int
    spans: list[tuple[int, int, int]]


class ShareSegment(Message, tag=45):
    """Share a segment of memory: its descriptor comes with this frame.

    A worker's first one, number 0, is the control segment; see `peer.shm`.
    """

    segment: int
    size_bytes: int


class DropSegment(Message, tag=46):
    """Nothing in this segment of the sender is in use any more."""

    segment: int


# ---- worker to server -----------------------------------------------------------------------------


class OpenStore(Message, tag=20):
    """Announce the store on this connection."""

    store: int
    name: str
    policy: StorePolicy
    mean: bool


class InitSlices(Message, tag=21):
    """Create slices. Payload: their values, one after the other, each `stop - start` elements."""

    request: int
    store: int
    key: Key
    shape: tuple[int, ...]
    dtype: str
    slices: list[SliceEntry]


class PlaceSlices(Message, tag=37):
    """Move slices to shared memory that workers of this host map: from now on they never move.

    `path` names the memory in /proc, and `offsets_bytes` the place of each slice in it.
    """

    request: int
    store: int
    path: str
    size_bytes: int
    slice_ids: list[int]
    offsets_bytes: list[int]


class DefinePlan(Message, tag=22):
    """Name a list of slices that will be pushed or pulled together, so that a step need not repeat it."""

    store: int
    plan: int
    chunks: list[ChunkEntry]


class DropPlan(Message, tag=23):
    """The plan will not be used again."""

    plan: int


class Push(Message, tag=24):
    """A contribution to the current round of the slices of a chunk. Payload: their elements, or `placed`.

    If `reply` is not 0, the server sends the values back as `Data` of that request, as after a pull. In a
    mean each slice counts as `weight` or, without one, as the chunk says.
    """

    plan: int
    chunk: int
    apply: bool
    reply: int
    placed: Placed | None = None
    weight: float | None = None


class Pull(Message, tag=25):
    """Send the values of a plan, chunk by chunk, each as soon as the store's policy allows.

    In sync that is when this worker's last round is applied.
    """

    plan: int
    request: int


class WaitMerged(Message, tag=26):
    """Ask to be told, by Merged, when this worker's last push of each slice of a plan is merged."""

    plan: int
    request: int


class Commit(Message, tag=27):
    """Apply the values pushed with apply=False, or only measure them if `apply` is false."""

    request: int
    store: int
    max_norm: float | None
    skip: bool
    check_finite: bool
    apply: bool


class PrepareSetting(Message, tag=28):
    """Load the code of a setting, and keep the setting ready."""

    request: int
    store: int
    number: int
    record: SettingRecord


class ActivateSetting(Message, tag=29):
    """Apply the prepared setting from this worker's next push of each key on."""

    store: int
    number: int


class ChangeOptions(Message, tag=35):
    """Change options of the optimizers of some keys or all (None), from this worker's next push of each on.

    Every worker may send it; that of the lowest rank holds, and others are compared with it.
    """

    store: int
    keys: tuple[Key, ...] | None
    options: dict[str, Any]


class DeleteSlices(Message, tag=30):
    """This worker has deleted the keys of these slices, and names them in no plan any more.

    The server drops a slice when every worker has deleted it or left.
    """

    request: int
    store: int
    slice_ids: list[int]


class DropSlices(Message, tag=36):
    """Drop slices of an init or a load that has failed: no other worker knows them."""

    request: int
    store: int
    slice_ids: list[int]


class Flush(Message, tag=31):
    """Answer when everything sent before on this connection has been processed.

    A commit that was completed by it has then been decided.
    """

    request: int
    store: int


class AskInfo(Message, tag=32):
    """Ask for rounds and versions of slices."""

    request: int
    store: int
    slice_ids: list[int]


class Leave(Message, tag=33):
    """This worker leaves the store."""

    request: int
    store: int


class Put(Message, tag=34):
    """Replace the values of a chunk once this worker's last push of them is applied. Payload: as of Push."""

    plan: int
    chunk: int
    request: int


# ---- server to worker -----------------------------------------------------------------------------


class Data(Message, tag=40):
    """Values of a chunk. Payload: the elements of its slices, in the stored dtype, or `placed`.

    With `unmerged` the last push of them by this worker was late, and is not merged yet.
    """

    request: int
    chunk: int
    placed: Placed | None = None
    unmerged: bool = False


class Merged(Message, tag=41):
    """These positions of the plan (counted over all its chunks) are merged."""

    request: int
    positions: list[int]


class Committed(Message, tag=42):
    """The commit is done."""

    request: int
    applied: bool
    norm: float | None


class Info(Message, tag=43):
    """Rounds, versions, late pushes and sizes of the optimizer's state, in the order asked.

    `updater` is the updater's name.
    """

    request: int
    rounds: list[int]
    versions: list[int]
    late: list[int]
    state_bytes: list[int]
    updater: str


class Fault(Message, tag=44):
    """A round this worker contributed to failed for these slices. Its next call on the key raises this.

    Without slices, change of options number `round` of this worker differs from that of the setting rank:
    its next call on any key raises this.
    """

    store: int
    slice_ids: list[int]
    round: int
    name: str
    text: str
