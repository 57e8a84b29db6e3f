"""PlanBook: the numbered lists of slices that workers push, pull and put, cut into chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import final
from weakref import WeakValueDictionary

import torch

from tensorkv.errors import ProtocolError
from tensorkv.server.layouts import Chunk, Layout, Slice
from tensorkv.wire import messages as m
from tensorkv.wire.validate import sent_dtype

MAX_PLANNED = 1 << 24
"""Maximum number of slices that the plans of one worker in one store name together. Each plan counts as
PLAN_WEIGHT slices more, and each of its chunks as CHUNK_WEIGHT."""

PLAN_WEIGHT = 1024
CHUNK_WEIGHT = 16

MAX_COUNT = (1 << 31) - 1
"""Maximum count of a value in a mean."""


@final
class PlanBook:
    """The plans of all workers in one store. `find` returns the slice with an id, None if there is none."""

    def __init__(self, find: Callable[[int], Slice | None], max_payload_bytes: int) -> None:
        self._find = find
        self._max_payload_bytes = max_payload_bytes
        self._plans: dict[tuple[int, int], list[Chunk]] = {}
        self._planned: dict[int, int] = {}  # by worker: weight of its plans, in slices
        self._layouts: WeakValueDictionary[tuple[int, ...], Layout] = WeakValueDictionary()

    def define(self, worker: int, message: m.DefinePlan) -> None:
        """Add a worker's list of slices under its number."""
        planned = self._planned.get(worker, 0) + _weight(entry.slice_ids for entry in message.chunks)
        if planned > MAX_PLANNED:
            raise ProtocolError(f"worker {worker} has defined too many plans and dropped too few")
        chunks: list[Chunk] = []
        first = 0
        for entry in message.chunks:
            dtype = sent_dtype(entry.payload.dtype)
            self._check_chunk(entry, dtype)
            layout = self._layout(worker, entry, dtype)
            chunks.append(Chunk(layout, entry.counts, dtype, entry.payload.kind == "absent", first))
            first += len(entry.slice_ids)
        self._plans[worker, message.plan] = chunks
        self._planned[worker] = planned

    def chunk(self, worker: int, plan: int, number: int) -> Chunk:
        """Return a chunk of a worker's plan.

        Raises:
            ProtocolError: there is none.
        """
        chunks = self._plans.get((worker, plan))
        if chunks is None or not 0 <= number < len(chunks):
            raise ProtocolError(f"there is no chunk {number} of plan {plan}")
        return chunks[number]

    def chunks(self, worker: int, plan: int) -> list[Chunk] | None:
        """Return the chunks of a plan, None if there is none."""
        return self._plans.get((worker, plan))

    def layouts_of(self, slices: Iterable[Slice]) -> list[Layout]:
        """Return the layouts that name any of these slices, each once."""
        named = dict.fromkeys(slices).keys()
        layouts = dict.fromkeys(chunk.layout for chunks in self._plans.values() for chunk in chunks)
        return [each for each in layouts if not named.isdisjoint(each.position.keys())]

    def drop(self, worker: int, plan: int) -> None:
        """Forget a plan."""
        chunks = self._plans.pop((worker, plan))
        self._planned[worker] -= _weight(chunk.layout.slices for chunk in chunks)

    def drop_worker(self, worker: int) -> list[tuple[int, int]]:
        """Forget all plans of a worker; return their names."""
        names = [name for name in self._plans if name[0] == worker]
        for name in names:
            del self._plans[name]
        self._planned.pop(worker, None)
        return names

    def names_any(self, slices: Iterable[Slice], worker: int | None = None) -> bool:
        """Whether a plan of a worker, or of any, names one of these slices."""
        named = dict.fromkeys(slices).keys()
        return any(
            not named.isdisjoint(chunk.layout.position.keys())
            for (owner, _), chunks in self._plans.items()
            if worker in (None, owner)
            for chunk in chunks
        )

    def _check_chunk(self, entry: m.ChunkEntry, dtype: torch.dtype) -> None:
        """Check everything about a chunk that its pushes then need not check."""
        if not 0 < len(entry.slice_ids) == len(entry.lengths) == len(entry.counts):
            raise ProtocolError("a chunk without slices, or its lengths and counts differ in number")
        if len(set(entry.slice_ids)) != len(entry.slice_ids):
            raise ProtocolError("a chunk names a slice twice")
        if min(entry.lengths) < 0 or min(entry.counts) < 0 or max(entry.counts) > MAX_COUNT:
            raise ProtocolError("a chunk has a length or a count that cannot be")
        size_bytes = sum(entry.lengths) * dtype.itemsize
        if size_bytes > self._max_payload_bytes:
            raise ProtocolError(
                f"a chunk of {size_bytes} bytes is over the {self._max_payload_bytes} that this server has"
            )

    def _layout(self, worker: int, entry: m.ChunkEntry, dtype: torch.dtype) -> Layout:
        """Return where the slices of a chunk are. The worker must not have deleted any."""
        slices: list[Slice] = []
        for slice_id, length in zip(entry.slice_ids, entry.lengths, strict=True):
            each = self._find(slice_id)
            if each is None or worker not in each.cohort.members:
                raise ProtocolError(f"there is no slice {slice_id}, or worker {worker} has deleted it")
            if each.num_elems != length:
                raise ProtocolError(f"slice {slice_id} has {each.num_elems} elements, not {length}")
            if not _is_cast(dtype, each.dtype) or (slices and slices[0].dtype != each.dtype):
                raise ProtocolError(f"slice {slice_id} is {each.dtype}, which the chunk is not")
            slices.append(each)
        name = tuple(entry.slice_ids)
        layout = self._layouts.get(name)
        if layout is None or layout.slices != slices:  # a slice with the id of a deleted one is another
            layout = self._layouts[name] = Layout(slices)
        return layout


def _is_cast(pushed: torch.dtype, stored: torch.dtype) -> bool:
    """Whether pushed values may be added to stored ones: floats are cast, other dtypes must be equal."""
    return pushed == stored or (pushed.is_floating_point and stored.is_floating_point)


def _weight(chunks: Iterable[Sequence[object]]) -> int:
    """Return the weight of a plan, in slices; `chunks` has the slices of each chunk."""
    return PLAN_WEIGHT + sum(CHUNK_WEIGHT + len(slices) for slices in chunks)
