"""Plans: what a list of keys means on the wire, computed once and used in every step.

A plan says for each server which slices of which keys travel in which chunk; a chunk is one frame. Both ends
keep it under its number. A chunk holds whole slices of one dtype, up to `MAX_SLICE_BYTES` together.
"""

from __future__ import annotations

import math
import operator
import weakref
from collections.abc import Callable, Sequence
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

Origins = tuple[int, ...] | None
"""Relative layout of the values of a push in the window: two values are adjacent if the origin of one is the
end of the other. 0 for a value outside the window; None if all are outside."""

_shape_of, _dtype_of = attrgetter("shape"), attrgetter("dtype")
_TENSORS = {torch.Tensor}


@final
@dataclass(slots=True, eq=False)
class KeyState:
    """An initialised key as a worker knows it."""

    entry: m.KeyEntry
    shape: torch.Size
    dtype: torch.dtype
    num_elems: int

    @property
    def key(self) -> Key:
        """The name."""
        return self.entry.key

    @property
    def key_id(self) -> int:
        """The number of this generation of the key."""
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


@final
class Staging:
    """Memory that receives the small pieces of a chunk, with a view for each, in its shape."""

    __slots__ = ("bytes", "views")

    def __init__(self, chunk: PlanChunk, states: Sequence[KeyState]) -> None:
        small = [piece for piece in chunk.pieces if piece.small]
        num_elems = sum(piece.stop - piece.start for piece in small)
        buffer = torch.empty(num_elems, dtype=chunk.stored_dtype, device="cpu")
        self.bytes = bytes_of(buffer)
        self.views: list[torch.Tensor] = []
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
    sources: tuple[list[tuple[int, int, int]], list[torch.Tensor]] | None = None

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
    origins: Origins = None  # by which its chunks are cut
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
    origins: Origins = None,
) -> Plan:
    """Return the plan of pushing values of `dtypes` to `states`; a count of 0 stands for absent.

    With `origins`, values that are adjacent in the window make chunks of their own.
    """
    sizes_bytes = np.array([state.num_elems * state.dtype.itemsize for state in states], np.int64)
    slices: list[list[_SliceOf]] = [[] for _ in range(num_servers)]
    for value, state in enumerate(states):
        for entry in state.entry.slices:
            slices[entry.server].append((value, entry))
    parts: list[ServerPart] = []
    for server, found in enumerate(slices):
        builder = _PartBuilder(server)
        for group in [found] if origins is None else _together(found, dtypes, origins):
            builder.begin_chunk()
            for value, entry in group:
                builder.add(value, states[value], entry, dtypes[value], counts[value])
        if found:
            parts.append(builder.finish(states, int(sizes_bytes.sum())))
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
        origins=origins,
    )


_SliceOf = tuple[int, m.SliceEntry]
"""The number of a value, and one of its slices."""


def _together(
    slices: Sequence[_SliceOf], dtypes: Sequence[torch.dtype], origins: tuple[int, ...]
) -> list[list[_SliceOf]]:
    """Return runs of slices that are adjacent in the window, and last, in list order, the rest.

    Runs too short to travel in shared memory join the rest: a chunk for each would cost more than a copy.
    """

    def place_of(number: int) -> tuple[int, int]:
        value, entry = slices[number]
        itemsize = dtypes[value].itemsize
        return origins[value] + entry.start * itemsize, origins[value] + entry.stop * itemsize

    runs: list[list[int]] = []
    end = -1
    rest = {number for number, (value, _) in enumerate(slices) if not origins[value]}
    for number in sorted(set(range(len(slices))) - rest, key=place_of):
        start, stop = place_of(number)
        if start != end:
            runs.append([])
        runs[-1].append(number)
        end = stop
    for run in runs:
        if place_of(run[-1])[1] - place_of(run[0])[0] < m.PLACED_BYTES:
            rest.update(run)
    kept = [run for run in runs if run[0] not in rest]
    return [[slices[number] for number in run] for run in [*kept, sorted(rest)] if run]


class _PartBuilder:
    """Packs the slices of one server into chunks."""

    def __init__(self, server: int) -> None:
        self._server = server
        self.chunks: list[PlanChunk] = []
        self._entries: list[m.ChunkEntry] = []
        self._values: list[int] = []
        self._begins = False  # whether the next slice is the first of a chunk

    def begin_chunk(self) -> None:
        """Let the next slice begin a chunk."""
        self._begins = True

    def add(self, value: int, state: KeyState, entry: m.SliceEntry, dtype: torch.dtype, count: int) -> None:
        length = entry.stop - entry.start
        size_bytes = length * max(dtype.itemsize, state.dtype.itemsize)
        if not self._fits(size_bytes, dtype, state.dtype, count == 0):
            self._begins = False
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
        if self._begins:
            return False
        last = self.chunks[-1]
        if (last.dtype, last.stored_dtype, last.absent) != (dtype, stored, absent):
            return False
        return last.num_elems * max(dtype.itemsize, stored.itemsize) + size_bytes <= MAX_SLICE_BYTES

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
