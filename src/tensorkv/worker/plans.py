"""Plans: what a list of keys means on the wire, computed once and used in every step.

A plan says for each server which slices of which keys travel in which chunk; a chunk is one frame. Both ends
keep it under its number. A chunk holds whole slices of one dtype, up to `MAX_SLICE_BYTES` together.
"""

from __future__ import annotations

import functools
import math
import operator
import weakref
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter
from typing import Any, final

import numpy as np
import torch

from tensorkv.arrays import addresses_of, bytes_of, dtype_from_name, dtype_name
from tensorkv.config import MAX_SLICE_BYTES
from tensorkv.plain import Key
from tensorkv.wire import messages as m
from tensorkv.worker import nontemporal

COALESCE_BYTES = 32 << 10
"""Maximum size of pieces that are gathered into one buffer before they travel."""

Span = tuple[int, int, int]
"""A part of shared memory: segment, offset and length in bytes."""

_shape_of, _dtype_of = attrgetter("shape"), attrgetter("dtype")
_TENSORS = {torch.Tensor}


@final
@dataclass(slots=True, eq=False)
class KeyState:
    """An initialised key as a worker knows it, until it is `retired`: deleted by this worker, or replaced."""

    entry: m.KeyEntry
    shape: torch.Size
    dtype: torch.dtype
    num_elems: int
    retired: bool = False

    @property
    def key(self) -> Key:
        """The name."""
        return self.entry.key

    @property
    def key_id(self) -> int:
        """Its number, which no later key of the name has."""
        return self.entry.key_id

    @classmethod
    def of(cls, entry: m.KeyEntry) -> KeyState:
        """Build it from the scheduler's entry."""
        shape = torch.Size(entry.shape)
        return cls(entry, shape, dtype_from_name(entry.dtype), math.prod(shape))


@final
@dataclass(slots=True)
class Piece:
    """A slice in a chunk: elements [start, stop) of the plan's value number `value`.

    `low` is where it begins in the chunk, in elements. A `small` piece travels through a buffer.
    """

    value: int
    start: int
    stop: int
    low: int
    whole: bool
    small: bool


class Pieces:
    """The pieces of a chunk in memory of a server, or of our own: tensors, and their bytes."""

    __slots__ = ("__dict__", "views")

    def __init__(self, views: list[torch.Tensor]) -> None:
        self.views = views

    @functools.cached_property
    def parts(self) -> list[memoryview]:
        """The bytes of each."""
        return list(map(bytes_of, self.views))


@final
class Staging(Pieces):
    """Memory that receives the small pieces of a chunk, with a view for each, in its shape."""

    __slots__ = ("bytes",)

    def __init__(self, chunk: PlanChunk, states: Sequence[KeyState]) -> None:
        small = [piece for piece in chunk.pieces if piece.small]
        num_elems = sum(piece.stop - piece.start for piece in small)
        buffer = torch.empty(num_elems, dtype=chunk.stored_dtype, device="cpu")
        self.bytes = bytes_of(buffer)
        super().__init__([])
        low = 0
        for piece in small:
            high = low + piece.stop - piece.start
            view = buffer[low:high]
            self.views.append(view.view(states[piece.value].shape) if piece.whole else view)
            low = high


@final
@dataclass(slots=True)
class PlanChunk:
    """A chunk: its pieces in order, in the dtype that is pushed (when pulled, in the stored dtype).

    If all pieces are small and whole, `pick` selects their values from those of the plan, and `one_dim` tells
    whether all of these have one dimension. `lends` tells whether a piece travels from the caller's memory,
    `streams` whether copies from and to shared memory are non-temporal (see `nontemporal`). `stagings` are
    free for reuse. `sources` are the places that the server named in its shared memory, and the pieces there.
    """

    pieces: list[Piece]
    dtype: torch.dtype
    stored_dtype: torch.dtype
    absent: bool
    num_elems: int
    pick: Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, ...] | list[torch.Tensor]] | None = None
    one_dim: bool = False
    lends: bool = False
    streams: bool = False
    stagings: list[Staging] = field(default_factory=list)
    sources: tuple[list[tuple[int, int, int]], Pieces] | None = None

    @property
    def size_bytes(self) -> int:
        """Size of the payload of a push."""
        return 0 if self.absent else self.num_elems * self.dtype.itemsize


@final
@dataclass(slots=True)
class ServerPart:
    """The part of a plan for one server. `values[i]` is the value that slice i of the part belongs to."""

    server: int
    chunks: list[PlanChunk]
    entries: list[m.ChunkEntry]
    values: list[int]


@final
@dataclass(slots=True, eq=False)
class Known:
    """Tensors that an earlier call checked one by one, and their addresses. None is kept alive."""

    tensors: list[weakref.ref[torch.Tensor]]
    addresses: list[int]

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor]) -> Known:
        """Remember these tensors, which have memory."""
        return cls(list(map(weakref.ref, tensors)), list(map(torch.Tensor.data_ptr, tensors)))

    def are(self, tensors: Sequence[Any]) -> bool:
        """Whether these are the same tensors at the same addresses."""
        return (
            len(tensors) == len(self.tensors)
            and all(map(operator.is_, map(operator.call, self.tensors), tensors))
            and addresses_of(tensors) == self.addresses  # also not if one is None, as a dead reference is
        )


@final
@dataclass(slots=True, eq=False)
class Lent:
    """Values that were pushed, and where each frame lies in the window; None if it has to be copied."""

    values: Known
    spans: list[Span | None]


@final
@dataclass(slots=True, eq=False)
class Plan:
    """A list of keys, each with the dtype, presence and count of what is pushed."""

    number: int
    states: list[KeyState]
    shapes: list[torch.Size]
    dtypes: list[torch.dtype]
    counts: list[int]
    parts: list[ServerPart]
    frames: list[tuple[int, int, PlanChunk]]  # server, number of the chunk there, chunk; in order
    key_ids: frozenset[int]
    num_lending: int  # chunks that lend the caller's memory
    sizes_bytes: np.ndarray[Any, Any]  # of the stored values
    total_bytes: int  # of them all
    sent_bytes: dict[int, int]  # of a push, by server
    known_to: set[int] = field(default_factory=set)  # servers that know it
    pushed_as: set[tuple[Key, ...]] = field(default_factory=set)  # keys that the cache maps to it
    pulled_as: set[tuple[Key, ...]] = field(default_factory=set)
    dropped: bool = False  # from the cache; it may still be sent, but must not be remembered

    outs: Known | None = None  # of the last pull
    lent: Lent | None = None  # in the last push

    def fits(self, values: Sequence[Any]) -> bool:
        """Whether these are tensors, one per key, of exactly the dtypes and shapes of the plan.

        A few vector operations for a thousand keys, without building lists: see `PushBatch`.
        """
        if len(values) != len(self.shapes) or not _TENSORS.issuperset(map(type, values)):
            return False
        try:
            return all(map(operator.eq, map(_shape_of, values), self.shapes)) and all(
                map(operator.is_, map(_dtype_of, values), self.dtypes)
            )
        except RuntimeError:  # a nested tensor has no shape
            return False

    def fits_outs(self, outs: Sequence[Any]) -> bool:
        """Whether these are the tensors of the last pull, with the same addresses and shapes."""
        known = self.outs
        return (
            known is not None and known.are(outs) and all(map(operator.eq, map(_shape_of, outs), self.shapes))
        )

    def remember_outs(self, outs: Sequence[torch.Tensor]) -> None:
        """Remember these checked tensors, one per key: they may be written, and none shares memory."""
        self.outs = Known.of(outs)


def build_plan(
    number: int,
    states: Sequence[KeyState],
    dtypes: Sequence[torch.dtype],
    counts: Sequence[int],
    num_servers: int,
    alone: Container[int] = (),
    max_chunk_bytes: int = MAX_SLICE_BYTES,
) -> Plan:
    """Return the plan of pushing values of `dtypes` to `states`; a count of 0 stands for absent.

    Slices of the keys in `alone`, given by id, make chunks of their own, after all others. A chunk of several
    slices has at most `max_chunk_bytes`.
    """
    sizes_bytes = np.array([state.num_elems * state.dtype.itemsize for state in states], np.int64)
    builders = [_PartBuilder(server, max_chunk_bytes) for server in range(num_servers)]
    apart = [state.key_id in alone for state in states]
    for value in sorted(range(len(states)), key=apart.__getitem__):
        for entry in states[value].entry.slices:
            builder = builders[entry.server]
            builder.add(value, states[value], entry, dtypes[value], counts[value], apart[value])
    parts = [each.finish(states, int(sizes_bytes.sum())) for each in builders if each.chunks]
    frames = [(part.server, place, chunk) for part in parts for place, chunk in enumerate(part.chunks)]
    return Plan(
        number=number,
        states=list(states),
        shapes=[state.shape for state in states],
        dtypes=list(dtypes),
        counts=list(counts),
        parts=parts,
        frames=frames,
        key_ids=frozenset(state.key_id for state in states),
        num_lending=sum(chunk.lends for _, _, chunk in frames),
        sent_bytes={part.server: sum(chunk.size_bytes for chunk in part.chunks) for part in parts},
        sizes_bytes=sizes_bytes,
        total_bytes=int(sizes_bytes.sum()),
    )


class _PartBuilder:
    """Packs the slices of one server into chunks."""

    def __init__(self, server: int, max_chunk_bytes: int) -> None:
        self._server = server
        self._max_chunk_bytes = max_chunk_bytes
        self.chunks: list[PlanChunk] = []
        self._entries: list[m.ChunkEntry] = []
        self._values: list[int] = []

    def add(
        self,
        value: int,
        state: KeyState,
        entry: m.SliceEntry,
        dtype: torch.dtype,
        count: int,
        alone: bool,
    ) -> None:
        length = entry.stop - entry.start
        size_bytes = length * max(dtype.itemsize, state.dtype.itemsize)
        if alone or not self.chunks or not self._fits(size_bytes, dtype, state.dtype, count == 0):
            self.chunks.append(PlanChunk([], dtype, state.dtype, count == 0, 0))
            kind: m.PayloadKind = "dense" if count else "absent"
            self._entries.append(m.ChunkEntry([], [], m.PayloadDescriptor(kind, dtype_name(dtype)), []))
        chunk, names = self.chunks[-1], self._entries[-1]
        small = size_bytes <= COALESCE_BYTES
        whole = length == state.num_elems
        chunk.pieces.append(Piece(value, entry.start, entry.stop, chunk.num_elems, whole, small))
        chunk.num_elems += length
        names.slice_ids.append(entry.slice_id)
        names.lengths.append(length)
        names.counts.append(count)
        self._values.append(value)

    def _fits(self, size_bytes: int, dtype: torch.dtype, stored: torch.dtype, absent: bool) -> bool:
        last = self.chunks[-1]
        if (last.dtype, last.stored_dtype, last.absent) != (dtype, stored, absent):
            return False
        return last.num_elems * max(dtype.itemsize, stored.itemsize) + size_bytes <= self._max_chunk_bytes

    def finish(self, states: Sequence[KeyState], list_bytes: int) -> ServerPart:
        for chunk in self.chunks:
            longest_bytes = max(piece.stop - piece.start for piece in chunk.pieces) * chunk.dtype.itemsize
            chunk.streams = nontemporal.pays(list_bytes, (chunk.dtype, chunk.stored_dtype), longest_bytes)
            chunk.lends = not chunk.absent and not all(piece.small for piece in chunk.pieces)
            if all(piece.small and piece.whole for piece in chunk.pieces):
                values = [piece.value for piece in chunk.pieces]
                one = slice(values[0], values[0] + 1)  # picked as a list of one
                chunk.pick = itemgetter(*values) if len(values) > 1 else itemgetter(one)
                chunk.one_dim = all(len(states[value].shape) == 1 for value in values)
        return ServerPart(self._server, self.chunks, self._entries, self._values)
