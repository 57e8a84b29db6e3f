"""StoreShard: one store's slices on one server. Messages of workers in, messages to workers out.

THEORY OF OPERATION
A push leaves a contribution with each slice of its chunk (`_holder` tells which). When the last worker's
has come the round is merged; the contributions are then added in rank order, the updater runs, and pulls
that waited for the round are answered. A push with apply=False is added up only at the commit, when the
servers have told each other, through the scheduler, the norms.

Everything here runs in one thread, the loop of its server, so without a lock, and never waits. Rounds are
counted in `rounds.py`; from which round a setting holds stands in `settings.py`; sums are taken in `sums.py`.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, final
from weakref import WeakValueDictionary

import numpy as np
import torch

from tensorkv.checkpoint.slices import state_bytes
from tensorkv.errors import (
    CommitMismatch,
    KeyDeleted,
    MemoryLimitReached,
    ProtocolError,
    TensorKVError,
    UpdaterError,
    to_wire,
)
from tensorkv.norms import clip_factor
from tensorkv.peer.code import LoadUpdater
from tensorkv.plain import Key
from tensorkv.server.commits import CommitGather, all_finite, norms_of, scale, unscalable
from tensorkv.server.layouts import Chunk, Contribution, Layout, Run, Slice
from tensorkv.server.lockstep import MIN_ROUNDS, Lockstep, is_at_rest
from tensorkv.server.memory import BufferPool, Memory, NoMemory, no_memory, short_of
from tensorkv.server.rounds import Index, Rounds
from tensorkv.server.roundwaits import RoundWaits
from tensorkv.server.settings import SettingSchedule
from tensorkv.server.slots import Allocate, Lease, Slot, SlotAllocator, allocate_private
from tensorkv.server.sums import add_up, weigh
from tensorkv.store import MAX_WEIGHT, MIN_WEIGHT
from tensorkv.updaters.base import Update
from tensorkv.updaters.settings import Setting, SettingsTable, apply_all
from tensorkv.wire import messages as m
from tensorkv.wire.validate import sent_dtype

MAX_TOMBSTONES = 4096
MAX_REPORTED = 50
"""So many open rounds of a store are told of one by one."""
MAX_PLANNED = 1 << 24
PLAN_WEIGHT = 1024
CHUNK_WEIGHT = 16
"""The plans of one worker in one store may name so many slices together; a plan counts as so many, too,
and each chunk of it."""

MAX_WAITS = 1 << 18
"""Chunks of one store that one worker may wait for."""

MAX_COUNT = (1 << 31) - 1
"""So often may a value count in a mean."""


@final
@dataclass(slots=True)
class Outgoing:
    """A message to a worker, or to the scheduler (worker -1), with the memory of its payload.

    The leases are held until the payload is sent.
    """

    worker: int
    message: Any
    payload: list[Memory] = field(default_factory=list)
    leases: list[Lease] = field(default_factory=list)


SCHEDULER = -1

_Part = tuple[Chunk | Contribution, Memory]
"""What somebody has pushed, not absent: what knows its dtype and counts, and its memory."""


@final
@dataclass(slots=True)
class _PendingPull:
    """A chunk that a worker waits for: its slices, each with the round it must have reached."""

    worker: int
    request: int
    chunk: int
    layout: Layout
    need: Index


@final
@dataclass(slots=True)
class _PendingPut:
    """Values that wait until their worker's last round of these slices is applied."""

    worker: int
    request: int
    chunk: Chunk
    layout: Layout
    need: Index
    payload: Memory


@final
@dataclass(slots=True)
class _PendingMerge:
    """Slices whose merging a worker waits for; `numbers` are their positions in the worker's plan."""

    worker: int
    request: int
    index: Index
    numbers: Index
    need: Index


class _Waits(Protocol):
    """Calls that wait, each with the worker that made it."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


@final
class StoreShard:
    """The slices that one server holds of one store."""

    def __init__(
        self,
        opened: m.OpenStore,
        num_workers: int,
        pool: BufferPool,
        load_updater: LoadUpdater,
        max_payload_bytes: int = 1 << 62,
        allocate: Allocate = allocate_private,
        error_of: NoMemory = no_memory,
    ) -> None:
        self.store = opened.store
        self.name = opened.name
        self.is_async = opened.is_async
        self.mean = opened.mean
        self.rounds = Rounds(num_workers)
        self.schedule = SettingSchedule(load_updater)
        self.out: list[Outgoing] = []
        self._pool = pool
        self._no_memory = error_of
        self._max_payload_bytes = max_payload_bytes
        self._slots = SlotAllocator(allocate)
        self._slices: dict[int, Slice] = {}  # by index
        self._index_of: dict[int, int] = {}  # slice id -> index
        self._indices_of: dict[Key, set[int]] = {}
        self._tombstones: dict[int, str] = {}
        self._plans: dict[tuple[int, int], list[Chunk]] = {}
        self._outdated: set[tuple[int, int]] = set()  # plans to be laid out anew: slices were deleted
        self._planned: dict[int, int] = {}  # by worker: how many slices its plans name
        self._layouts: WeakValueDictionary[tuple[tuple[int, ...], tuple[int, ...]], Layout] = (
            WeakValueDictionary()
        )
        self._contributions: dict[int, Contribution] = {}
        self._refused: dict[int, MemoryLimitReached] = {}  # by number: those for which there was no memory
        self._to_commit: dict[int, Contribution] = {}  # those of them with apply=False
        self._next_contribution = 1
        self._holder: Index = np.zeros((num_workers, 0), np.int64)  # which contribution, 0 for none
        self._held: set[int] = set()  # merged, but to be applied by a commit
        self._pulls: RoundWaits[_PendingPull] = RoundWaits()
        self._puts: list[_PendingPut] = []
        self._merge_waits: list[_PendingMerge] = []
        self._commit: CommitGather = CommitGather(1)
        self._flushes: list[tuple[int, int]] = []  # worker and request that wait for its decision
        self._settings_epoch = 0
        self._locksteps: dict[int, Lockstep] = {}  # by slice index

    # ---- keys ------------------------------------------------------------------------------------

    def init_slices(self, worker: int, message: m.InitSlices, payload: Memory) -> None:
        """Create slices with the values in `payload`, which is uint8."""
        dtype = sent_dtype(message.dtype)
        ids = {entry.slice_id for entry in message.slices}
        if len(ids) < len(message.slices) or any(each in self._index_of for each in ids):
            raise ProtocolError(f"a slice of key {message.key!r} exists already")
        self.schedule.newest(message.key).check_value(message.key, message.shape, dtype)
        values, low = payload.tensor.view(dtype), 0
        places = self._allocate(message.key, message.slices, dtype)
        for entry, (slot, offset) in zip(message.slices, places, strict=True):
            length = entry.stop - entry.start
            self._add_slice(entry, message.key, message.shape, slot, offset, values[low : low + length])
            low += length
        self._reply(worker, m.Done(message.request))

    def create(
        self, entry: m.SliceEntry, key: Key, shape: tuple[int, ...], value: torch.Tensor, version: int
    ) -> Slice:
        """Create one slice with this value, which is flat, and this version."""
        if entry.slice_id in self._index_of or value.numel() != entry.stop - entry.start:
            raise ProtocolError(f"slice {entry.slice_id} exists already, or has not {value.numel()} elements")
        ((slot, offset),) = self._allocate(key, [entry], value.dtype)
        index = self._add_slice(entry, key, shape, slot, offset, value)
        self.rounds.version[index] = version
        return self._slices[index]

    def _allocate(
        self, key: Key, slices: Sequence[m.SliceEntry], dtype: torch.dtype
    ) -> list[tuple[Slot, int]]:
        try:
            return [self._slots.allocate(each.stop - each.start, dtype) for each in slices]
        except (RuntimeError, MemoryError, OSError) as exc:
            size_bytes = sum(each.stop - each.start for each in slices) * dtype.itemsize
            raise self._no_memory(f"key {key!r}", size_bytes) from exc

    def _add_slice(
        self,
        entry: m.SliceEntry,
        key: Key,
        shape: tuple[int, ...],
        slot: Slot,
        offset: int,
        value: torch.Tensor,
    ) -> int:
        index = self.rounds.add()
        capacity = self.rounds.merged.shape[0]
        if self._holder.shape[1] < capacity:
            grown = np.zeros((self.rounds.num_workers, capacity), np.int64)
            grown[:, : self._holder.shape[1]] = self._holder
            self._holder = grown
        length = entry.stop - entry.start
        slot.make_writable()
        slot.tensor[offset : offset + length].copy_(value)
        shape = shape if length == math.prod(shape) else (length,)
        setting = self.schedule.newest(key)
        self._index_of[entry.slice_id] = index
        self._indices_of.setdefault(key, set()).add(index)
        self._slices[index] = Slice(
            entry.slice_id, index, key, entry.start, entry.stop, shape, slot, offset, setting
        )
        return index

    def find(self, slice_id: int) -> Slice:
        """Return a slice.

        Raises:
            KeyDeleted: it is gone.
        """
        index = self._index_of.get(slice_id)
        if index is None:
            text = self._tombstones.get(slice_id, f"slice {slice_id} was deleted")
            raise KeyDeleted(text)
        return self._slices[index]

    @property
    def slices(self) -> Iterable[Slice]:
        """All slices of this store on this server."""
        return self._slices.values()

    def delete_slices(self, worker: int, message: m.DeleteSlices) -> None:
        """Drop slices, their open rounds, and the calls that wait for them."""
        self.drop_keys(message.rank, message.keys)
        self._reply(worker, m.Done(message.request))

    def drop_keys(self, rank: int, keys: Sequence[tuple[Key, list[int]]]) -> None:
        """Drop slices of keys that `rank` has deleted; those that are gone are passed over."""
        self.general()
        gone: dict[int, str] = {}  # by index: what to tell who waits
        for key, slice_ids in keys:
            text = f"key {key!r} was deleted by rank {rank}"
            for slice_id in slice_ids:
                index = self._index_of.pop(slice_id, None)
                if index is not None:
                    gone[index] = self._tombstones[slice_id] = text
                    self._remove_slice(index)
        while len(self._tombstones) > MAX_TOMBSTONES:
            del self._tombstones[next(iter(self._tombstones))]
        if gone:
            self._end_waits_for(gone)
            for name, chunks in self._plans.items():
                if name not in self._outdated and not all(
                    gone.keys().isdisjoint(chunk.layout.position.keys()) for chunk in chunks
                ):
                    self._outdated.add(name)

    def _remove_slice(self, index: int) -> None:
        each = self._slices.pop(index)
        others = self._indices_of[each.key]
        others.discard(index)
        if not others:
            del self._indices_of[each.key]
        each.setting.updater.forget(each.slice_id)
        self.schedule.forget(index)
        self._held.discard(index)
        self._release(np.array([index], np.int64))
        self.rounds.remove(index)

    def _end_waits_for(self, gone: dict[int, str]) -> None:
        """End the calls that wait for slices that are gone; `gone` has the text of their error."""
        ended: dict[tuple[int, int], str] = {}
        waits = [(pull.worker, pull.request, pull.layout.index) for pull in self._pulls]
        waits += [(put.worker, put.request, put.layout.index) for put in self._puts]
        waits += [(wait.worker, wait.request, wait.index) for wait in self._merge_waits]
        for worker, request, index in waits:
            text = next((gone[each] for each in index.tolist() if each in gone), None)
            if text is not None:
                ended.setdefault((worker, request), text)
        self._pulls.drop(lambda pull: (pull.worker, pull.request) in ended)
        self._puts = [put for put in self._puts if (put.worker, put.request) not in ended]
        self._merge_waits = [w for w in self._merge_waits if (w.worker, w.request) not in ended]
        for (worker, request), text in sorted(ended.items()):
            self._reply(worker, m.Failed(request, *to_wire(KeyDeleted(text))))

    # ---- plans -----------------------------------------------------------------------------------

    def define_plan(self, worker: int, message: m.DefinePlan) -> None:
        """Remember a worker's list of slices under its number."""
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

    def _chunks(self, worker: int, plan: int) -> list[Chunk] | None:
        """Return the chunks of a plan, None if there is none."""
        if self._outdated and (worker, plan) in self._outdated:
            self._lay_out_anew((worker, plan))
        return self._plans.get((worker, plan))

    def _lay_out_anew(self, name: tuple[int, int]) -> None:
        """Take out of a plan what has been deleted. Only when it is used: many deletes cost it once."""
        self._outdated.discard(name)
        for chunk in self._plans[name]:
            if any(each.slice_id not in self._index_of for each in chunk.layout.slices):
                self._lay_out(chunk, {each.slice_id for each in chunk.layout.slices})

    def _check_chunk(self, entry: m.ChunkEntry, dtype: torch.dtype) -> None:
        """Everything about a chunk that a push of it need not look at any more."""
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

    def _lay_out(self, chunk: Chunk, among: Container[int] | None = None) -> None:
        """Find where the chunk's slices are; those that are gone, or not in `among` (ids), leave a gap."""
        slices: list[Slice] = []
        lows: list[int] = []
        chunk.counts, chunk.numbers = [], []
        low = 0
        for number, (slice_id, length) in enumerate(zip(chunk.slice_ids, chunk.lengths, strict=True)):
            index = self._index_of.get(slice_id)
            if index is not None and (among is None or slice_id in among):
                each = self._slices[index]
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
        if layout is None:
            layout = self._layouts[name] = Layout(slices, lows)
        chunk.layout = layout
        chunk.plain = len(set(chunk.counts)) <= 1 and len(slices) == len(chunk.slice_ids)

    def drop_plan(self, worker: int, message: m.DropPlan) -> None:
        """Forget a plan."""
        chunks = self._plans.pop((worker, message.plan))
        self._outdated.discard((worker, message.plan))
        self._planned[worker] -= _weight(chunk.slice_ids for chunk in chunks)

    def chunk(self, worker: int, plan: int, number: int) -> Chunk:
        """Return a chunk of a worker's plan.

        Raises:
            ProtocolError: there is none.
        """
        chunks = self._chunks(worker, plan) if self._outdated else self._plans.get((worker, plan))
        if chunks is None or not 0 <= number < len(chunks):
            raise ProtocolError(f"there is no chunk {number} of plan {plan}")
        return chunks[number]

    # ---- push ------------------------------------------------------------------------------------

    def push(
        self,
        worker: int,
        message: m.Push,
        chunk: Chunk,
        payload: Memory,
        refused: MemoryLimitReached | None = None,
    ) -> None:
        """Take in a worker's contribution; `payload` is uint8, from the pool, and now the shard's.

        `chunk` is the one that the message names. `refused` tells that there was no memory for the payload:
        the round then fails for all who contribute to it.
        """
        layout = chunk.layout
        weight = message.weight
        if weight is not None:
            self._check_weight(worker, weight)
        lockstep = layout.lockstep or self._begin_lockstep(layout)
        if lockstep is not None:
            plain = message.apply and chunk.plain and weight is None and refused is None
            if plain and lockstep.open[worker] is None:
                if message.reply:
                    lockstep.pulls.append((worker, message.reply, message.chunk))
                if lockstep.add(worker, chunk, payload):
                    self._finish_in_lockstep(lockstep, layout)
                return
            self._end_lockstep(lockstep)
        if not self.is_async:
            self._check_may_push(worker, layout)
        if not message.reply:  # else the reply tells
            self._tell_gone(worker, chunk)
        if len(layout.slices) == 0:
            if refused is None:
                self._pool.give(payload)
            self._answer_push(worker, message, chunk)
            return
        self._contribute(worker, chunk, payload, message.apply, weight)
        if refused is not None:
            self._refused[self._next_contribution] = refused
        if self.is_async:
            self.rounds.push_alone(worker, layout.index)
            self._apply(layout.index, [worker])
        else:
            self._merge(self.rounds.push(worker, layout.index))
        self._answer_push(worker, message, chunk)

    def _contribute(
        self, worker: int, chunk: Chunk, payload: Memory, apply: bool, weight: float | None = None
    ) -> None:
        """Leave a contribution with each slice of a chunk."""
        self._next_contribution += 1
        contribution = Contribution(
            number=self._next_contribution,
            worker=worker,
            layout=chunk.layout,
            dtype=chunk.dtype,
            absent=chunk.absent,
            counts=chunk.counts,
            buffer=payload,
            apply=apply,
            live=len(chunk.layout.slices),
            weight=weight,
        )
        self._contributions[contribution.number] = contribution
        if not apply:
            self._to_commit[contribution.number] = contribution
        self._holder[worker, chunk.layout.index] = contribution.number

    def _check_weight(self, worker: int, weight: float) -> None:
        if not self.mean:
            raise ProtocolError(f"worker {worker} pushed with a weight, and the store takes no mean")
        if not MIN_WEIGHT <= weight <= MAX_WEIGHT:
            raise ProtocolError(f"worker {worker} pushed with weight {weight}")

    def _check_may_push(self, worker: int, layout: Layout) -> None:
        if not self.rounds.may_push(worker, layout.index).all():
            raise ProtocolError(f"worker {worker} pushed a slice whose last push is not merged")
        if self._held and self._holder[worker, layout.index].any():
            raise ProtocolError(f"worker {worker} pushed a slice whose last push awaits its commit")

    def _tell_gone(self, worker: int, chunk: Chunk) -> None:
        """Tell a worker that slices it pushed are deleted: it learns so by its next call on the key."""
        for slice_id in chunk.gone():
            text = self._tombstones.get(slice_id, "the key was deleted")
            self._reply(worker, m.Fault(self.store, [slice_id], 0, *to_wire(KeyDeleted(text))))

    def _answer_push(self, worker: int, message: m.Push, chunk: Chunk) -> None:
        if message.reply and not self._refuse_gone(worker, message.reply, [chunk]):
            self._pull_chunk(worker, message.reply, message.chunk, chunk.layout)

    def _refuse_gone(self, worker: int, request: int, chunks: Sequence[Chunk]) -> bool:
        """Refuse a request for chunks of which slices are deleted; return whether some are."""
        gone = [slice_id for chunk in chunks for slice_id in chunk.gone()]
        if gone:
            text = self._tombstones.get(gone[0], "the key was deleted")
            self._reply(worker, m.Failed(request, *to_wire(KeyDeleted(text))))
        return bool(gone)

    def _merge(self, slices: Index) -> None:
        """The last contribution has come to these slices: apply them, or hold them for the commit."""
        if not len(slices):
            return
        self.rounds.merge(slices)
        applying, holding, mixed = self._sort_by_commit(slices)
        self._held.update(holding.tolist())
        if len(mixed):
            self._refuse_mixed(mixed)
        if len(applying):
            self._apply(applying, list(range(self.rounds.num_workers)))
        self._answer_merge_waits()

    def _sort_by_commit(self, slices: Index) -> tuple[Index, Index, Index]:
        """Split slices into those to apply now, those to hold, and those where workers disagree."""
        none = slices[:0]
        if not self._to_commit:  # nothing at all waits for a commit
            return slices, none, none
        numbers = np.unique(self._holder[:, slices])
        flags = {number: self._contributions[number].apply for number in numbers.tolist() if number}
        if all(flags.values()):
            return slices, none, none
        if not any(flags.values()):
            return none, slices, none
        apply_now = np.array([flags.get(n, True) for n in numbers.tolist()])
        hold = np.array([not flags.get(n, False) for n in numbers.tolist()])
        where = np.searchsorted(numbers, self._holder[:, slices])
        all_apply, all_hold = apply_now[where].all(axis=0), (hold[where] | (self._holder[:, slices] == 0))
        holding = all_hold.all(axis=0) & ~all_apply
        return slices[all_apply], slices[holding], slices[~all_apply & ~holding]

    def _refuse_mixed(self, slices: Index) -> None:
        for index in slices.tolist():
            each = self._slices[index]
            error = CommitMismatch(
                f"round {self.rounds.applied[index] + 1} of key {each.key!r}: some workers pushed with "
                "apply=False and some without; the round is dropped"
            )
            self._blame_holders(index, error)
        self.rounds.apply(slices)
        self._release(slices)
        self._answer_pulls(slices)

    # ---- lockstep --------------------------------------------------------------------------------

    def _begin_lockstep(self, layout: Layout) -> Lockstep | None:
        """Take up lockstep for a layout that is at rest, if it may."""
        if (
            self.is_async
            or not layout.may_lockstep
            or not layout.slices
            or self.schedule.has_pending
            or self._locksteps.keys() & layout.position.keys()
            or not is_at_rest(layout, self.rounds)
        ):
            self._end_locksteps_of(layout)
            return None
        lockstep = layout.lockstep = Lockstep(layout, self.rounds.num_workers)
        self._locksteps.update(dict.fromkeys(layout.position, lockstep))
        return lockstep

    def _finish_in_lockstep(self, lockstep: Lockstep, layout: Layout) -> None:
        """All have pushed: update, and answer those who wait for the round."""
        pushed, pulls = lockstep.take()
        workers = range(len(pushed))
        round_number = int(self.rounds.applied[layout.index[0]]) + lockstep.round
        try:
            present = [each for each in pushed if not each[0].absent]
            failed = self._update_layout(layout, present) if present else {}
            lockstep.version += bool(present)
        except Exception as exc:  # noqa: BLE001  # as in `_apply`
            ids = [each.slice_id for each in layout.slices]
            for worker in workers:
                self._reply(worker, self._sum_fault(ids, round_number, exc))
        else:
            if failed:
                self._end_lockstep(lockstep)
                for index, error in failed.items():
                    self.rounds.version[index] -= 1
                    self._blame(index, round_number, workers, error)
        for _, memory in pushed:
            self._pool.give(memory)
        if pulls:
            self._send_chunks(pulls, layout)

    def _end_lockstep(self, lockstep: Lockstep) -> None:
        """Write a lockstep back to the arrays; what follows takes the general way."""
        layout = lockstep.layout
        layout.lockstep = None
        for index in layout.position:
            del self._locksteps[index]
        lockstep.write_back(self.rounds)
        for worker, pushed in enumerate(lockstep.open):
            if pushed is not None:
                self.rounds.pushed[worker, layout.index] += 1
                self._contribute(worker, *pushed, apply=True)
        for worker, request, number in lockstep.pulls:
            need = self.rounds.pushed[worker, layout.index]
            self._pulls.add(_PendingPull(worker, request, number, layout, need), self.rounds.applied)

    def _end_locksteps_of(self, layout: Layout) -> None:
        """End the locksteps that share slices with a layout: another list of keys has come."""
        if self._locksteps:
            for index in layout.position:
                lockstep = self._locksteps.get(index)
                if lockstep is not None:
                    if lockstep.round < MIN_ROUNDS:
                        lockstep.layout.may_lockstep = False
                    self._end_lockstep(lockstep)

    def general(self) -> None:
        """End all locksteps, before anything but a push or a pull of a whole plan."""
        while self._locksteps:
            self._end_lockstep(next(iter(self._locksteps.values())))

    # ---- apply -----------------------------------------------------------------------------------

    def _apply(self, slices: Index, workers: Sequence[int]) -> None:
        """Add up the contributions of merged slices, run the updater, and answer who waits."""
        self._take_due_settings(slices)
        if self._refused:
            slices = self._drop_refused(slices, workers)
            if not len(slices):
                return
        together = self._common_layout(slices, workers)
        try:
            if together is not None:
                self._apply_chunk(*together)
            else:
                self._apply_each(slices, workers)
        except Exception as exc:  # noqa: BLE001  # whatever torch refuses is the round's fault, not one peer's
            self._blame_all(slices, exc)
        if together is not None:
            self.rounds.apply(slices)
            self._holder[:, slices] = 0
            for each in together[1]:
                self._use_up(each, len(slices))
        else:
            self.rounds.apply(slices)
            self._release(slices, workers)
        self._answer_pulls(slices)

    def _drop_refused(self, slices: Index, workers: Sequence[int]) -> Index:
        """Fail the rounds that lack a contribution for which there was no memory; return the other slices."""
        lacking = np.isin(self._holder[:, slices], list(self._refused))
        failed = slices[lacking.any(axis=0)]
        if not len(failed):
            return slices
        number = int(self._holder[:, slices][lacking][0])
        self._blame_all(failed, self._refused[number])
        self.rounds.apply(failed)
        self._release(failed, workers)
        self._answer_pulls(failed)
        return slices[~lacking.any(axis=0)]

    def _common_layout(
        self, slices: Index, workers: Sequence[int]
    ) -> tuple[Layout, list[Contribution]] | None:
        """Return layout and contributions if all workers pushed just these slices in one chunk alike."""
        found: list[Contribution] = []
        for worker in workers:
            row = self._holder[worker, slices]
            first = int(row[0])
            if (row != first).any():
                return None
            if first:
                found.append(self._contributions[first])
        if any(
            each.layout is not found[0].layout
            or len(each.layout.slices) != len(slices)
            or len(set(each.counts)) > 1
            for each in found
        ):
            return None
        return found[0].layout, found

    def _apply_chunk(self, layout: Layout, contributions: list[Contribution]) -> None:
        """The common case: all slices of a layout together."""
        parts = [(each, each.buffer) for each in contributions if not each.absent]
        if parts:
            mean = weigh([(each.weight, each.counts[0]) for each, _ in parts]) if self.mean else None
            self._count_updates(layout.index, self._update_layout(layout, parts, mean))

    def _update_layout(
        self,
        layout: Layout,
        parts: Sequence[_Part],
        mean: tuple[float, Sequence[float] | None] | None = None,
    ) -> dict[int, Exception]:
        """Add up whole runs of memory, and update all slices in one call; return by index what failed.

        `parts` are the contributions that are not absent, at least one, in rank order; `mean` is what `weigh`
        says of them, None if none has a weight.
        """
        if mean is not None:
            divisor, factors = mean
        else:
            divisor, factors = sum(pushed.counts[0] for pushed, _ in parts) if self.mean else 1, None
        if layout.all_assign(self._settings_epoch):
            return self._assign_runs(layout, parts, divisor, factors)
        stop = layout.bounds(len(layout.slices) - 1)[1]
        found = [memory.elements(pushed.dtype, 0, stop) for pushed, memory in parts]
        borrowed = parts[0][1].borrowed
        dtype = layout.slices[0].dtype
        total = add_up(found, dtype, divisor, may_overwrite=not borrowed, factors=factors)
        borrowed = borrowed and total is found[0]
        sums = [
            (each, total[low : low + each.num_elems], borrowed)
            for low, each in zip(layout.lows, layout.slices, strict=True)
        ]
        return self._run_updaters(sums, layout.only_setting(self._settings_epoch))

    def _assign_runs(
        self, layout: Layout, parts: Sequence[_Part], divisor: float, factors: Sequence[float] | None
    ) -> dict[int, Exception]:
        """Add whole runs straight into the stored values; return by index what failed, and kept its value."""
        failed: dict[int, Exception] = {}
        for run in layout.runs:
            try:
                self._assign_run(run, layout.slices[0].dtype, parts, divisor, factors)
            except Exception as exc:  # noqa: BLE001  # as in `_apply`; the other runs are assigned
                error = self._sum_error(exc)
                failed.update(dict.fromkeys(layout.indices_in(run), error))
        return failed

    def _assign_run(
        self,
        run: Run,
        dtype: torch.dtype,
        parts: Sequence[_Part],
        divisor: float,
        factors: Sequence[float] | None,
    ) -> None:
        may_overwrite = not parts[0][1].borrowed
        found = [memory.elements(pushed.dtype, run.low, run.high) for pushed, memory in parts]
        if run.slot.lease.readers:
            if run.is_whole_slot:  # nothing of the old value is needed
                fresh = run.slot.fresh()
                add_up(found, dtype, divisor, fresh, may_overwrite=may_overwrite, factors=factors)
                run.slot.replace(fresh)
                return
            run.slot.make_writable()
        stored = run.stored.tensor
        add_up(found, dtype, divisor, stored, may_overwrite=may_overwrite, factors=factors)

    def _apply_each(self, slices: Index, workers: Sequence[int]) -> None:
        """The general case: every slice on its own, whatever chunks its contributions came in."""
        sums = [(self._slices[index], self._sum(index, workers)) for index in slices.tolist()]
        self._update([(each, *total) for each, total in sums if total is not None])

    def _sum(
        self, index: int, workers: Sequence[int], may_overwrite: bool = True
    ) -> tuple[torch.Tensor, bool] | None:
        """Return the sum of one slice's contributions, and whether it is borrowed; None if all are absent."""
        parts: list[torch.Tensor] = []
        shares: list[tuple[float | None, int]] = []
        borrowed = False
        for worker in workers:
            number = int(self._holder[worker, index])
            contribution = self._contributions[number] if number else None
            if contribution is not None and not contribution.absent:
                position = contribution.layout.position[index]
                borrowed = borrowed if parts else contribution.buffer.borrowed
                parts.append(contribution.elements(*contribution.layout.bounds(position)))
                shares.append((contribution.weight, contribution.counts[position]))
        if not parts:
            return None
        dtype = self._slices[index].dtype
        may_overwrite = may_overwrite and not borrowed
        divisor, factors = weigh(shares) if self.mean else (1, None)
        total = add_up(parts, dtype, divisor, may_overwrite=may_overwrite, factors=factors)
        return total, borrowed and total is parts[0]

    def _update(self, sums: list[tuple[Slice, torch.Tensor, bool]]) -> None:
        """Run the updater of each slice on its sum; a failed one keeps its value and blames its pushers."""
        self._count_updates([each.index for each, *_ in sums], self._run_updaters(sums))

    def _count_updates(self, indices: Index | list[int], failed: dict[int, Exception]) -> None:
        self.rounds.version[indices] += 1
        for index, error in failed.items():
            self.rounds.version[index] -= 1
            self._blame_holders(index, error)

    def _run_updaters(
        self, sums: list[tuple[Slice, torch.Tensor, bool]], only: Setting | None = None
    ) -> dict[int, Exception]:
        """Run the updater of each slice on its sum; return by index what failed, and kept its value.

        The last of each tells whether the sum is borrowed. `only` is the setting of them all, if known.
        """
        for each, _, _ in sums:
            each.slot.make_writable()
        updates = [
            Update(each.slice_id, each.key, total.view(each.shape), each.value, borrowed)
            for each, total, borrowed in sums
        ]
        if only is not None:
            failures = only.updater.apply(updates, only.options)
        else:
            failures = apply_all(
                [(each.setting, update) for (each, *_), update in zip(sums, updates, strict=True)]
            )
        return {
            each.index: failure
            for (each, *_), failure in zip(sums, failures, strict=True)
            if failure is not None
        }

    def _blame_holders(self, index: int, error: Exception) -> None:
        """The round of a slice that is being applied failed: tell every contributor."""
        workers = np.flatnonzero(self._holder[:, index]).tolist()
        self._blame(index, int(self.rounds.applied[index]) + 1, workers, error)

    def _blame(self, index: int, round_number: int, workers: Iterable[int], error: Exception) -> None:
        """Tell workers that a round of a slice failed."""
        key = self._slices[index].key
        error = short_of(error, f"an update of key {key!r}", self._no_memory) or error
        for worker in workers:
            fault = m.Fault(self.store, [self._slices[index].slice_id], round_number, *to_wire(error))
            self._reply(worker, fault)

    def _blame_all(self, slices: Index, exc: Exception) -> None:
        """The round of these slices failed in a way that nobody has foreseen: tell every contributor."""
        for worker in range(self.rounds.num_workers):
            by_round: dict[int, list[int]] = {}
            for index in slices[self._holder[worker, slices] > 0].tolist():
                by_round.setdefault(int(self.rounds.applied[index]) + 1, []).append(
                    self._slices[index].slice_id
                )
            for round_number, slice_ids in by_round.items():
                self._reply(worker, self._sum_fault(slice_ids, round_number, exc))

    def _sum_fault(self, slice_ids: list[int], round_number: int, exc: Exception) -> m.Fault:
        return m.Fault(self.store, slice_ids, round_number, *to_wire(self._sum_error(exc)))

    def _sum_error(self, exc: Exception) -> TensorKVError:
        short = short_of(exc, "a round of what was pushed", self._no_memory)
        text = f"what was pushed could not be added up or applied: {type(exc).__name__}: {exc}"
        return short or UpdaterError(text)

    def _release(self, slices: Index, workers: Sequence[int] | None = None) -> None:
        """The contributions to these slices are used up; buffers of which nothing is left go back."""
        rows = range(self.rounds.num_workers) if workers is None else workers
        for worker in rows:
            numbers, counts = np.unique(self._holder[worker, slices], return_counts=True)
            for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
                if number:
                    self._use_up(self._contributions[number], count)
            self._holder[worker, slices] = 0

    def _use_up(self, contribution: Contribution, count: int) -> None:
        contribution.live -= count
        if not contribution.live:
            del self._contributions[contribution.number]
            self._to_commit.pop(contribution.number, None)
            if self._refused.pop(contribution.number, None) is None:
                self._pool.give(contribution.buffer)

    # ---- pull ------------------------------------------------------------------------------------

    def pull(self, worker: int, message: m.Pull) -> None:
        """Answer chunk by chunk, each as soon as this worker's last round of its slices is applied."""
        chunks = self._chunks(worker, message.plan)
        if chunks is None:
            raise ProtocolError(f"there is no plan {message.plan}")
        if self._refuse_gone(worker, message.request, chunks):
            return
        for number, chunk in enumerate(chunks):
            self._pull_chunk(worker, message.request, number, chunk.layout)

    def _pull_chunk(self, worker: int, request: int, number: int, layout: Layout) -> None:
        lockstep = layout.lockstep
        if lockstep is not None:
            if lockstep.open[worker] is None:
                self._send_chunks([(worker, request, number)], layout)
            else:
                if len(lockstep.pulls) >= MAX_WAITS:
                    raise ProtocolError(f"worker {worker} waits for too many chunks")
                lockstep.pulls.append((worker, request, number))
            return
        self._end_locksteps_of(layout)
        need = self.rounds.pushed[worker, layout.index]
        pull = _PendingPull(worker, request, number, layout, need)
        if self.is_async or self._is_ready(pull):
            self._send_chunks([(worker, request, number)], layout)
        else:
            self._check_waits(worker, self._pulls)
            self._pulls.add(pull, self.rounds.applied)

    def _check_waits(self, worker: int, waits: _Waits) -> None:
        if len(waits) >= MAX_WAITS and sum(each.worker == worker for each in waits) >= MAX_WAITS:
            raise ProtocolError(f"worker {worker} waits for {MAX_WAITS} chunks already")

    def _is_ready(self, pull: _PendingPull) -> bool:
        return bool((self.rounds.applied[pull.layout.index] >= pull.need).all())

    def _answer_pulls(self, slices: Index) -> None:
        """Rounds of these were applied: answer the pulls that waited for them, and make the puts that did."""
        if self._pulls:
            for pull in self._pulls.take_ready(slices, self.rounds.applied):
                self._send_chunks([(pull.worker, pull.request, pull.chunk)], pull.layout)
        if self._puts:
            self._make_puts()

    def _send_chunks(self, pulls: Sequence[tuple[int, int, int]], layout: Layout) -> None:
        """Send the present values of a layout to these pulls: worker, request, number of its chunk."""
        leases = [run.slot.lease for run in layout.runs]
        payload = [run.stored for run in layout.runs]
        for worker, request, number in pulls:
            for lease in leases:
                lease.readers += 1
            self.out.append(Outgoing(worker, m.Data(request, number), payload, leases))

    def put(self, worker: int, message: m.Put, payload: Memory) -> None:
        """Replace the values of a chunk, or remember to when this worker's last round is applied."""
        self.general()
        chunk = self.chunk(worker, message.plan, message.chunk)
        if chunk.absent:
            raise ProtocolError(f"a put of chunk {message.chunk}, which has no values")
        if self._refuse_gone(worker, message.request, [chunk]):
            return
        layout = chunk.layout
        need = self.rounds.pushed[worker, layout.index]
        held_bytes = sum(len(put.payload.bytes) for put in self._puts if put.worker == worker)
        if held_bytes + len(payload.bytes) > self._max_payload_bytes:
            raise ProtocolError(f"worker {worker} has puts of {held_bytes} bytes that wait already")
        self._check_waits(worker, self._puts)
        self._puts.append(_PendingPut(worker, message.request, chunk, layout, need, payload))
        self._make_puts()

    def _make_puts(self) -> None:
        """Make the puts that have waited long enough, in the order in which they came."""
        waiting, self._puts = self._puts, []
        for put in waiting:
            if not (self.rounds.applied[put.layout.index] >= put.need).all():
                self._puts.append(put)
                continue
            pushed = put.payload.elements(put.chunk.dtype, 0, sum(put.chunk.lengths))
            try:
                for run in put.layout.runs:
                    run.slot.make_writable()
            except Exception as exc:
                short = short_of(exc, "a put", self._no_memory)
                if short is None:
                    raise
                self._reply(put.worker, m.Failed(put.request, *to_wire(short)))
                continue
            for run in put.layout.runs:
                run.stored.tensor.copy_(pushed[run.low : run.high])
            self.rounds.version[put.layout.index] += 1
            self._reply(put.worker, m.Done(put.request))

    def wait_merged(self, worker: int, message: m.WaitMerged) -> None:
        """Tell, as it happens, which slices of a plan have this worker's last push merged."""
        self.general()
        chunks = self._chunks(worker, message.plan) or []
        if self._refuse_gone(worker, message.request, chunks):
            return
        for chunk in chunks:
            index = chunk.layout.index
            wait = _PendingMerge(
                worker,
                message.request,
                index,
                np.array(chunk.numbers, np.int64),
                self.rounds.pushed[worker, index],
            )
            self._check_waits(worker, self._merge_waits)
            self._merge_waits.append(wait)
        self._answer_merge_waits()

    def _answer_merge_waits(self) -> None:
        for wait in self._merge_waits:
            merged = self.rounds.merged[wait.index] >= wait.need
            if merged.any():
                self._reply(wait.worker, m.Merged(wait.request, wait.numbers[merged].tolist()))
                wait.index, wait.numbers = wait.index[~merged], wait.numbers[~merged]
                wait.need = wait.need[~merged]
        self._merge_waits = [wait for wait in self._merge_waits if len(wait.index)]

    # ---- settings --------------------------------------------------------------------------------

    def prepare_setting(self, worker: int, message: m.PrepareSetting) -> None:
        """Load a setting; raises what is wrong with it, also for values that other workers have made."""
        self.schedule.prepare(message.number, message.record)
        keys = self.schedule.keys_of(message.number)
        found = self._slices if keys is None else [i for key in keys for i in self._indices_of.get(key, ())]
        for each in map(self._slices.__getitem__, found):
            setting = self.schedule.prepared(message.number, each.key)
            if setting is not each.setting:
                setting.check_value(each.key, each.shape, each.dtype)
        self._reply(worker, m.Done(message.request))

    def activate_setting(self, worker: int, message: m.ActivateSetting) -> None:
        """From this worker's next push of each key on the prepared setting holds."""
        self.general()
        pushed = self.rounds.applied if self.is_async else self.rounds.pushed[worker]
        keys = self.schedule.keys_of(message.number)
        found = self._slices if keys is None else [i for key in keys for i in self._indices_of.get(key, ())]
        self.schedule.activate(
            message.number,
            {index: int(pushed[index]) + 1 for index in found},
            {index: self._slices[index].key for index in found},
        )
        idle = [i for i in found if self.is_async or self.rounds.applied[i] == pushed[i]]
        self._take_due_settings(np.array(idle, np.int64))

    def install_settings(self, table: SettingsTable) -> None:
        """Let these settings hold for every slice from now on."""
        self.general()
        self.schedule.install(table)
        for each in self._slices.values():
            setting = table.setting(each.key)
            if setting.updater is not each.setting.updater:
                each.setting.updater.forget(each.slice_id)
            each.setting = setting
        self._settings_epoch += 1

    def _take_due_settings(self, slices: Index) -> None:
        if not self.schedule.has_pending:
            return
        for index in slices.tolist():
            each = self._slices[index]
            setting = self.schedule.due(index, each.key, int(self.rounds.applied[index]) + 1)
            if setting is not None and setting is not each.setting:
                if setting.updater is not each.setting.updater:
                    each.setting.updater.forget(each.slice_id)
                each.setting = setting
        self._settings_epoch += 1
        self.schedule.tidy()

    # ---- commit ----------------------------------------------------------------------------------

    def commit(self, worker: int, message: m.Commit) -> None:
        """A worker asks to commit what it pushed with apply=False."""
        self.general()
        self._commit.add(worker, message, self._uncommitted(worker))
        self._check_commit()

    def _uncommitted(self, worker: int) -> dict[int, int]:
        """Return what a worker has pushed for a commit: by slice index the number of the contribution."""
        found: dict[int, int] = {}
        for each in self._to_commit.values():
            if each.worker == worker:
                index = each.layout.index
                mine = index[self._holder[worker, index] == each.number]
                found.update(dict.fromkeys(mine.tolist(), each.number))
        return found

    def _check_commit(self) -> None:
        """When every member has asked, tell the scheduler what this server has."""
        gather = self._commit
        members = set(np.flatnonzero(~self.rounds.left).tolist())
        if gather.reported or not gather.asked or not members <= set(gather.asked):
            return
        gather.reported = True
        gather.forget_dropped(self._holder)
        error = gather.disagreement(lambda index: repr(self._slices[index].key))
        norms: list[float] = []
        if error is None:
            try:
                self._add_up_commit(gather)
                error = self._unscalable(gather)
                if gather.wants_norm:
                    norms = norms_of(total for _, total in gather.totals)
            except Exception as exc:  # noqa: BLE001  # as in `_apply`: every rank is told
                gather.totals.clear()
                error = short_of(exc, "the sums of a commit", self._no_memory) or UpdaterError(
                    f"what was pushed could not be added up: {type(exc).__name__}: {exc}"
                )
        finite = all(map(math.isfinite, norms)) or all_finite(total for _, total in gather.totals)
        self.out.append(
            Outgoing(
                SCHEDULER,
                m.CommitReady(
                    self.store,
                    gather.number,
                    norms,
                    not gather.check_finite or finite,
                    gather.skip,
                    None if error is None else to_wire(error),
                ),
            )
        )

    def _unscalable(self, gather: CommitGather) -> TensorKVError | None:
        if gather.max_norm is None:
            return None
        found = (unscalable(each.key, each.dtype) for each, _ in gather.totals)
        return next((error for error in found if error is not None), None)

    def _add_up_commit(self, gather: CommitGather) -> None:
        """Take the sums of what all have asked for, in an order that is the same in every run."""
        agreed = next(iter(gather.pushes.values()))
        gather.slices = sorted((self._slices[index] for index in agreed), key=lambda each: each.slice_id)
        workers = range(self.rounds.num_workers)
        for each in gather.slices:
            refused = [self._refused[n] for n in self._holder[:, each.index].tolist() if n in self._refused]
            if refused and gather.skip:
                continue  # nothing of it is needed
            if refused:
                raise refused[0]
            found = self._sum(each.index, workers, may_overwrite=False)
            if found is not None:
                total, borrowed = found
                gather.totals.append((each, total.clone() if borrowed else total))  # it may be scaled

    def decide_commit(self, decision: m.CommitDecision) -> None:
        """All servers are ready: apply, skip, or refuse."""
        self.general()
        gather = self._commit
        if decision.number != gather.number or not gather.reported:
            raise ProtocolError(f"commit {decision.number} was decided, but {gather.number} is under way")
        self._commit = CommitGather(gather.number + 1)
        if decision.error is not None:
            for worker, asked in sorted(gather.asked.items()):
                self._reply(worker, m.Failed(asked.request, *decision.error))
                if self.rounds.left[worker]:
                    self._drop_uncommitted(worker)
            self._answer_flushes()
            return
        alive = [each.index for each in gather.slices if self._slices.get(each.index) is each]
        slices = np.array(alive, np.int64)
        self._take_due_settings(slices)
        if decision.apply:
            try:
                self._apply_totals(gather, decision)
            except Exception as exc:  # noqa: BLE001  # as in `_apply`
                self._blame_all(slices, exc)
        self._held.difference_update(alive)
        self.rounds.apply(slices)
        self._release(slices)
        norm = decision.norm if gather.wants_norm else None
        for worker, asked in sorted(gather.asked.items()):
            self._reply(worker, m.Committed(asked.request, decision.apply, norm))
        self._answer_pulls(slices)
        self._answer_flushes()

    def flush(self, worker: int, message: m.Flush) -> None:
        """Tell that all that came before is taken in; a commit that was reported, when it is decided."""
        self._flushes.append((worker, message.request))
        if not self._commit.reported:
            self._answer_flushes()

    def _answer_flushes(self) -> None:
        flushes, self._flushes = self._flushes, []
        for worker, request in flushes:
            self._reply(worker, m.Done(request))

    def _apply_totals(self, gather: CommitGather, decision: m.CommitDecision) -> None:
        factor = clip_factor(decision.norm, gather.max_norm)
        alive = [(each, total) for each, total in gather.totals if self._slices.get(each.index) is each]
        if factor != 1.0:
            for _, total in alive:
                scale(total, factor)
        self._update([(each, total, False) for each, total in alive])

    # ---- the rest --------------------------------------------------------------------------------

    def info(self, worker: int, message: m.AskInfo) -> None:
        """Tell rounds, versions, and the size of what optimizers keep."""
        self.general()
        found = [self._index_of.get(slice_id, -1) for slice_id in message.slice_ids]
        rounds = [int(self.rounds.applied[i]) if i >= 0 else -1 for i in found]
        versions = [int(self.rounds.version[i]) if i >= 0 else -1 for i in found]
        alive = [self._slices[i] for i in found if i >= 0]
        name = self.schedule.newest(alive[0].key).updater.spec.name if alive else ""
        sizes = [self._state_bytes(i) if i >= 0 else 0 for i in found]
        self._reply(worker, m.Info(message.request, rounds, versions, sizes, name))

    def _state_bytes(self, index: int) -> int:
        each = self._slices[index]
        return state_bytes(each.setting.updater.state(each.slice_id))

    def leave(self, worker: int) -> list[tuple[int, int]]:
        """A worker is gone for good: its pushes count, but what it has not asked to commit is dropped.

        Returns its plans, each by worker and number, which are no more.
        """
        self.general()
        self._pulls.drop(lambda pull: pull.worker == worker)
        self._puts = [put for put in self._puts if put.worker != worker]
        self._merge_waits = [wait for wait in self._merge_waits if wait.worker != worker]
        self._flushes = [flush for flush in self._flushes if flush[0] != worker]
        plans = [name for name in self._plans if name[0] == worker]
        for name in plans:
            del self._plans[name]
            self._outdated.discard(name)
        self._planned.pop(worker, None)
        self._drop_uncommitted(worker)
        self.rounds.left[worker] = True
        if not self.is_async and self._slices:
            everything = np.fromiter(self._slices, np.int64, len(self._slices))
            waiting = everything[(self.rounds.applied == self.rounds.merged)[everything]]
            self._merge(self.rounds.mergeable(waiting))
        self._check_commit()
        return plans

    def _drop_uncommitted(self, worker: int) -> None:
        asked = self._commit.pushes.get(worker, {})
        dropped = np.array([i for i in self._uncommitted(worker) if i not in asked], np.int64)
        if len(dropped):
            unmerged = dropped[[i not in self._held for i in dropped.tolist()]]
            self.rounds.withdraw(worker, unmerged)
            self._release(dropped, [worker])

    def end(self) -> None:
        """All have left: give back what is still here."""
        self.general()
        self._release(np.fromiter(self._slices, np.int64, len(self._slices)))

    def waiting(self, worker: int, message: m.AskWaiting) -> None:
        """Tell whom a request of this worker waits for."""
        self.general()
        ranks, where = self._missing(worker, message.request)
        self._reply(worker, m.Waiting(message.request, ranks, where))

    def _missing(self, worker: int, request: int) -> tuple[list[int], str]:
        waits: list[_PendingPull | _PendingPut] = [*self._pulls, *self._puts]
        for each in waits:
            if (each.worker, each.request) == (worker, request):
                late = each.layout.index[self.rounds.applied[each.layout.index] < each.need]
                return self._missing_round(int(late[0]))
        for wait in self._merge_waits:
            if (wait.worker, wait.request) == (worker, request):
                return self._missing_round(int(wait.index[0]))
        if any(asked.request == request for w, asked in self._commit.asked.items() if w == worker):
            members = np.flatnonzero(~self.rounds.left).tolist()
            return [w for w in members if w not in self._commit.asked], f"commit {self._commit.number}"
        return [], ""

    def _missing_round(self, index: int) -> tuple[list[int], str]:
        where = f"round {int(self.rounds.applied[index]) + 1} of {self._slices[index].key!r}"
        if index in self._held:
            members = np.flatnonzero(~self.rounds.left).tolist()
            return [w for w in members if w not in self._commit.asked], f"{where}, to be committed"
        return self.rounds.missing(index), where

    def report(self) -> list[str]:
        """Say whom each open round waits for, one line per key and round; and whom the commit."""
        self.general()
        lines: dict[str, None] = {}
        for index in sorted(self._slices):
            if index in self._held or (self.rounds.pushed[:, index] > self.rounds.merged[index]).any():
                ranks, where = self._missing_round(index)
                lines[f"{where} waits for {_workers(ranks)}"] = None
        if self._commit.asked:
            members = np.flatnonzero(~self.rounds.left).tolist()
            ranks = [worker for worker in members if worker not in self._commit.asked]
            lines[f"commit {self._commit.number} waits for {_workers(ranks)}"] = None
        more = [f"and {len(lines) - MAX_REPORTED} more"] if len(lines) > MAX_REPORTED else []
        return [*list(lines)[:MAX_REPORTED], *more]

    def _reply(self, worker: int, message: Any) -> None:
        if not self.rounds.left[worker] or isinstance(message, m.Done):
            self.out.append(Outgoing(worker, message))


def _workers(ranks: list[int]) -> str:
    if not ranks:
        return "the scheduler"
    return f"worker{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _is_cast(pushed: torch.dtype, stored: torch.dtype) -> bool:
    """Whether what is pushed may be added to what is stored: floats are cast, others must be equal."""
    return pushed == stored or (pushed.is_floating_point and stored.is_floating_point)


def _weight(slice_ids: Iterable[Sequence[int]]) -> int:
    """Return what a plan with these chunks counts as, in slices."""
    return PLAN_WEIGHT + sum(CHUNK_WEIGHT + len(each) for each in slice_ids)
