"""PlanBook: the numbered lists of slices that workers push, pull and put, cut into chunks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Sequence
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
        self._outdated: set[tuple[int, int]] = set()  # to be laid out again, since slices were deleted
        self._planned: dict[int, int] = {}  # by worker: weight of its plans, in slices
        self._layouts: WeakValueDictionary[tuple[tuple[int, ...], tuple[int, ...]], Layout] = (
            WeakValueDictionary()
        )

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
            absent = entry.payload.kind == "absent"
            chunk = Chunk(
                entry.slice_ids, entry.lengths, entry.counts, dtype, absent, first, Layout([], []), [], []
            )
            self._lay_out(chunk)
            chunks.append(chunk)
            first += len(entry.slice_ids)
        self._plans[worker, message.plan] = chunks
        self._planned[worker] = planned

    def chunk(self, worker: int, plan: int, number: int) -> Chunk:
        """Return a chunk of a worker's plan.

        Raises:
            ProtocolError: there is none.
        """
        chunks = self._plans.get((worker, plan)) if not self._outdated else self.chunks(worker, plan)
        if chunks is None or not 0 <= number < len(chunks):
            raise ProtocolError(f"there is no chunk {number} of plan {plan}")
        return chunks[number]

    def chunks(self, worker: int, plan: int) -> list[Chunk] | None:
        """Return the chunks of a plan, None if there is none."""
        if self._outdated and (worker, plan) in self._outdated:
            self._lay_out_anew((worker, plan))
        return self._plans.get((worker, plan))

    def drop(self, worker: int, plan: int) -> None:
        """Forget a plan."""
        chunks = self._plans.pop((worker, plan))
        self._outdated.discard((worker, plan))
        self._planned[worker] -= _weight(chunk.slice_ids for chunk in chunks)

    def drop_worker(self, worker: int) -> list[tuple[int, int]]:
        """Forget all plans of a worker; return their names."""
        names = [name for name in self._plans if name[0] == worker]
        for name in names:
            del self._plans[name]
            self._outdated.discard(name)
        self._planned.pop(worker, None)
        return names

    def forget(self, gone: Collection[Slice]) -> None:
        """Mark the plans of deleted slices: they are laid out again when they are next used."""
        deleted = dict.fromkeys(gone).keys()
        for name, chunks in self._plans.items():
            if name not in self._outdated and not all(
                deleted.isdisjoint(chunk.layout.position.keys()) for chunk in chunks
            ):
                self._outdated.add(name)

    def _lay_out_anew(self, name: tuple[int, int]) -> None:
        """Remove deleted slices from a plan. Called at its next use, so that many deletes cost it once."""
        self._outdated.discard(name)
        for chunk in self._plans[name]:
            if any(self._find(each.slice_id) is not each for each in chunk.layout.slices):
                self._lay_out(chunk, set(chunk.layout.slices))

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

    def _lay_out(self, chunk: Chunk, among: Container[Slice] | None = None) -> None:
        """Find where a chunk's slices are; those that are deleted, or not in `among`, leave a gap."""
        slices: list[Slice] = []
        lows: list[int] = []
        chunk.counts, chunk.numbers = [], []
        low = 0
        for number, (slice_id, length) in enumerate(zip(chunk.slice_ids, chunk.lengths, strict=True)):
            each = self._find(slice_id)
            if each is not None and (among is None or each in among):
                if each.num_elems != length:
                    raise ProtocolError(f"slice {slice_id} has {each.num_elems} elements, not {length}")
                if not _is_cast(chunk.dtype, each.dtype) or (slices and slices[0].dtype != each.dtype):
                    raise ProtocolError(f"slice {slice_id} is {each.dtype}, which the chunk is not")
                slices.append(each)
                lows.append(low)
                chunk.counts.append(chunk.named_counts[number])
                chunk.numbers.append(chunk.first + number)
            low += length
        name = (tuple(each.slice_id for each in slices), tuple(lows))
        layout = self._layouts.get(name)
        if layout is None or layout.slices != slices:  # a slice with the id of a deleted one is another
            layout = self._layouts[name] = Layout(slices, lows)
        chunk.layout = layout
        chunk.alike = len(set(chunk.counts)) <= 1
        chunk.whole = len(slices) == len(chunk.slice_ids)


def _is_cast(pushed: torch.dtype, stored: torch.dtype) -> bool:
    """Whether pushed values may be added to stored ones: floats are cast, other dtypes must be equal."""
    return pushed == stored or (pushed.is_floating_point and stored.is_floating_point)


def _weight(slice_ids: Iterable[Sequence[int]]) -> int:
    """Return the weight of a plan with these chunks, in slices."""
    return PLAN_WEIGHT + sum(CHUNK_WEIGHT + len(each) for each in slice_ids)
