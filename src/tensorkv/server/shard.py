"""StoreShard: one store's slices on one server. It takes messages of workers and returns messages to them.

THEORY OF OPERATION
A push leaves a contribution in the inbox of each cohort that its chunk names. When the policy finds the round
complete, the contributions are added in rank order, the updaters run, and the pulls that waited for the round
are answered. A push with apply=False is added up only at the commit, and applied when the servers have
exchanged the norms through the scheduler.

All of this runs in one thread, the loop of its server, so it needs no lock. It never blocks. Cohorts hold the
rounds (`cohorts.py`), policies say when one is merged (`policy.py`), `updates.py` adds up and runs updaters,
and `settings.py` knows from which round a setting holds.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, final

import msgspec
import torch

from tensorkv.checkpoint.slices import state_bytes
from tensorkv.errors import (
    CommitMismatch,
    InvalidOption,
    KeyDeleted,
    MemoryLimitReached,
    ProtocolError,
    SettingMismatch,
    TensorKVError,
    UpdaterError,
    to_wire,
)
from tensorkv.norms import clip_factor
from tensorkv.peer.code import LoadUpdater
from tensorkv.plain import Key
from tensorkv.server.cohorts import Cohort, MergeWait, Wait, cohorts_of, join_for, split_for
from tensorkv.server.commits import CommitGather, all_finite, norms_of, scale, unscalable
from tensorkv.server.layouts import Chunk, Contribution, Layout, Slice
from tensorkv.server.memory import BufferPool, Memory, NoMemory, no_memory, short_of
from tensorkv.server.options import Change, OptionLog
from tensorkv.server.planbook import PlanBook
from tensorkv.server.policy import Policy, make_policy
from tensorkv.server.settings import SettingSchedule
from tensorkv.server.slots import Allocate, Lease, Slot, SlotAllocator, allocate_private
from tensorkv.server.updates import Failed, Sum, Updates, run_updaters
from tensorkv.store import MAX_WEIGHT, MIN_WEIGHT
from tensorkv.updaters.settings import SettingsTable
from tensorkv.wire import messages as m
from tensorkv.wire.validate import sent_dtype

MAX_REPORTED = 50
"""Maximum number of open rounds of a store that a report lists one by one."""
MANY_DEADLINES = 64
"""Number of deadlines from which on those of merged rounds are looked for and dropped."""
MAX_WAITS = 1 << 18
"""Maximum number of chunks of one store that one worker may wait for, in pulls, puts and pushes together."""


@final
class Outgoing(msgspec.Struct, eq=False):
    """A message to a worker, or to the scheduler (worker -1), with the memory of its payload.

    The leases are held until the payload is sent.
    """

    worker: int
    message: Any
    payload: list[Memory] = []
    leases: list[Lease] = []


SCHEDULER = -1

_Pull = tuple[Layout, int, int, int]
"""A pull to answer: the layout of its chunk, the worker, the request, and the number of the chunk."""


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
        self.opened = opened
        self.schedule = SettingSchedule(load_updater)
        self.out: list[Outgoing] = []
        self._members = set(range(num_workers))  # workers that have not left
        self._policy = make_policy(opened.policy)
        self._pool = pool
        self._no_memory = error_of
        self._max_payload_bytes = max_payload_bytes
        self._slots = SlotAllocator(allocate)
        self._slices: dict[int, Slice] = {}  # by id
        self._slices_of: dict[Key, dict[Slice, None]] = {}
        self.plans = PlanBook(self._slices.get, max_payload_bytes)
        self._updates = Updates(opened.mean, pool, error_of)
        self._newborn = Cohort(self._members)  # of slices that were never pushed
        self._cohorts_epoch = 0  # changes when the slices of a cohort do
        self._settings_epoch = 0
        self._option_log = OptionLog(self._members)
        self._saves: dict[int, SettingsTable] = {}  # by worker that saves alone: what holds in its next round
        self._untimed: dict[Cohort, None] = {}  # pushed since the last tick, if the policy has deadlines
        self._deadlines: list[tuple[float, int, Cohort]] = []  # a heap; its ties are numbered
        self._ties = itertools.count()
        self._many_deadlines = MANY_DEADLINES
        self._to_commit: dict[Contribution, None] = {}  # pushed with apply=False
        self._refused: dict[Contribution, MemoryLimitReached] = {}  # for lack of memory
        self._replies: dict[Contribution, None] = {}  # pushes that ask for the values
        self._waits: dict[Wait, None] = {}  # pulls and puts, in order of arrival
        self._merge_waits: dict[MergeWait, None] = {}
        self._kept_puts: dict[Slice, torch.Tensor] = {}  # flat, of slices that workers map
        self._commit: CommitGather = CommitGather(1)
        self._flushes: list[tuple[int, int]] = []  # worker and request; wait for its decision

    @property
    def is_timed(self) -> bool:
        """Whether rounds may merge because time has passed, so that `tick` is needed."""
        return self._policy.has_deadlines

    def has_left(self, worker: int) -> bool:
        """Whether a worker has left the store."""
        return worker not in self._members

    @property
    def is_over(self) -> bool:
        """Whether all workers have left."""
        return not self._members

    # ---- keys ------------------------------------------------------------------------------------

    def init_slices(self, worker: int, message: m.InitSlices, payload: Memory) -> None:
        """Create slices with the values in `payload`, which is uint8."""
        dtype = sent_dtype(message.dtype)
        ids = {entry.slice_id for entry in message.slices}
        if len(ids) < len(message.slices) or any(each in self._slices for each in ids):
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
        """Create one slice with this flat value and this version."""
        if entry.slice_id in self._slices or value.numel() != entry.stop - entry.start:
            raise ProtocolError(f"slice {entry.slice_id} exists already, or has not {value.numel()} elements")
        ((slot, offset),) = self._allocate(key, [entry], value.dtype)
        each = self._add_slice(entry, key, shape, slot, offset, value)
        each.version_offset += version - each.version
        return each

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
    ) -> Slice:
        length = entry.stop - entry.start
        slot.make_writable()
        slot.tensor[offset : offset + length].copy_(value)
        shape = shape if length == math.prod(shape) else (length,)
        setting = self.schedule.newest(key)
        if not self._newborn.is_new or self._newborn.members is not self._members:
            self._newborn = Cohort(self._members)
        each = Slice(
            entry.slice_id, key, entry.start, entry.stop, shape, slot, offset, setting, self._newborn
        )
        self._newborn.add(each)
        self._cohorts_epoch += 1
        self._slices[each.slice_id] = each
        self._slices_of.setdefault(key, {})[each] = None
        return each

    def place_slices(self, worker: int, message: m.PlaceSlices, memory: Memory) -> None:
        """Move slices to memory that workers map, uint8, each to its place. They never move again.

        Raises:
            KeyDeleted: a slice does not exist; none has moved.
        """
        found = [self.find(slice_id) for slice_id in message.slice_ids]
        stop = 0
        for each, offset in zip(found, message.offsets_bytes, strict=False):
            if offset < stop or offset % each.dtype.itemsize:
                raise ProtocolError(f"slice {each.slice_id} cannot lie at byte {offset}")
            stop = offset + each.num_elems * each.dtype.itemsize
        if stop > len(memory.bytes) or len(found) != len(message.offsets_bytes):
            raise ProtocolError(
                f"{len(found)} slices do not fit in {len(memory.bytes)} bytes at these places"
            )
        slots: dict[torch.dtype, Slot] = {}
        for each, offset in zip(found, message.offsets_bytes, strict=True):
            dtype, value = each.dtype, each.value
            if dtype not in slots:
                whole = memory.tensor[: len(memory.bytes) // dtype.itemsize * dtype.itemsize]
                slots[dtype] = Slot(whole.view(dtype), fixed=True)
            each.slot, each.offset = slots[dtype], offset // dtype.itemsize
            each.value.copy_(value)
        for layout in self.plans.layouts_of(found):
            layout.find_runs()
        self._reply(worker, m.Done(message.request))

    def find(self, slice_id: int) -> Slice:
        """Return a slice.

        Raises:
            KeyDeleted: there is none, any more at least.
        """
        each = self._slices.get(slice_id)
        if each is None:
            raise KeyDeleted(f"slice {slice_id} was deleted")
        return each

    @property
    def slices(self) -> Iterable[Slice]:
        """All slices of this store on this server."""
        return self._slices.values()

    def delete_slices(self, worker: int, message: m.DeleteSlices) -> None:
        """Handle that a worker has deleted slices: for them it has left."""
        slices = [self._slices.get(slice_id) for slice_id in message.slice_ids]
        found = [each for each in slices if each is not None and worker in each.cohort.members]
        if len(set(found)) < len(message.slice_ids):
            raise ProtocolError(f"worker {worker} deletes slices that do not exist, or that it has deleted")
        if self.plans.names_any(found, worker):
            raise ProtocolError(f"worker {worker} deletes slices that a plan of it names")
        cohorts = self._split_off(found)
        for cohort in cohorts:
            cohort.members = cohort.members - {worker}
        self._go_on_without(worker, cohorts)
        self._reply(worker, m.Done(message.request))

    def drop_slices(self, worker: int, message: m.DropSlices) -> None:
        """Drop slices of an init or a load that has failed, as far as they have been created."""
        self.drop(message.slice_ids)
        self._reply(worker, m.Done(message.request))

    def drop(self, slice_ids: Iterable[int]) -> None:
        """Drop those of these slices that exist. No other worker knows them, if all keep to the protocol."""
        found = [self._slices[slice_id] for slice_id in slice_ids if slice_id in self._slices]
        if self.plans.names_any(found):
            return
        cohorts = self._split_off(found)
        for cohort in cohorts:
            cohort.members = set()
        self._drop_unneeded(cohorts)

    def _split_off(self, slices: Iterable[Slice]) -> list[Cohort]:
        """Return cohorts that have just these slices."""
        self._cohorts_epoch += 1
        return split_for(slices)

    def _go_on_without(self, worker: int, cohorts: list[Cohort]) -> None:
        """Go on as these cohorts do not need a worker any more, which has left or deleted them.

        What it has pushed counts, except what it has not asked to commit. Rounds that waited only for it are
        merged, and slices that no worker needs are dropped.
        """
        self._drop_uncommitted(worker, cohorts)
        complete = [cohort for cohort in cohorts if not cohort.held and self._policy.merges(cohort)]
        if complete:
            self._merge(complete)
        if self._policy.pulls_wait_for_others:
            self._answer_waits(cohorts, [])
        self._drop_unneeded(cohorts)

    def _drop_unneeded(self, cohorts: Iterable[Cohort]) -> None:
        """Drop the slices that no worker needs. A round of theirs may be left that was to be committed."""
        unneeded = [cohort for cohort in cohorts if not cohort.members]
        if not unneeded:
            return
        self._finish([cohort for cohort in unneeded if cohort.inbox])
        for cohort in unneeded:
            for each in cohort.slices:
                self._forget_slice(each)
            cohort.end()
        self._cohorts_epoch += 1

    def _forget_slice(self, each: Slice) -> None:
        del self._slices[each.slice_id]
        self._kept_puts.pop(each, None)
        others = self._slices_of[each.key]
        del others[each]
        if not others:
            del self._slices_of[each.key]
        each.setting.updater.forget(each.slice_id)
        self.schedule.forget(each.slice_id)

    def _drop_replies(self, has_ended: Callable[[Contribution], bool]) -> None:
        for pushed in [each for each in self._replies if has_ended(each)]:
            pushed.request = 0
            del self._replies[pushed]

    def _drop_waits(self, has_ended: Callable[[Wait | MergeWait], bool]) -> None:
        """Remove the waits of calls that have ended otherwise."""
        waits: list[Wait | MergeWait] = [*self._waits, *self._merge_waits]
        ended = [wait for wait in waits if has_ended(wait)]
        self._waits = {wait: None for wait in self._waits if not has_ended(wait)}
        self._merge_waits = {wait: None for wait in self._merge_waits if not has_ended(wait)}
        for cohort in cohorts_of(each for wait in ended for each in wait.layout.slices):
            cohort.waits = [(need, wait) for need, wait in cohort.waits if wait in self._waits]
            cohort.merge_waits = [wait for wait in cohort.merge_waits if wait in self._merge_waits]

    # ---- push ------------------------------------------------------------------------------------

    def push(
        self,
        worker: int,
        message: m.Push,
        chunk: Chunk,
        payload: Memory,
        refused: MemoryLimitReached | None = None,
    ) -> None:
        """Add a worker's contribution. `payload` is uint8, from the pool or borrowed; the shard owns it now.

        `chunk` is the one that the message names. `refused` says that there was no memory for the payload:
        the round then fails for all its contributors.
        """
        layout = chunk.layout
        cohorts = layout.cohorts(self._cohorts_epoch)
        request = message.reply
        if message.weight is not None or not message.apply:
            self._check_push(worker, message)
        if request and len(self._replies) + len(self._waits) >= MAX_WAITS:
            self._check_waits(worker)
        for cohort in cohorts:
            if worker in cohort.inbox:
                what = "awaits its commit" if cohort.held else "is not merged"
                raise ProtocolError(f"worker {worker} pushed a slice whose last push {what}")
        pushed = Contribution(worker, message, chunk, layout, payload, len(layout.slices), request)
        if request:
            self._replies[pushed] = None
        if refused is not None:
            self._refused[pushed] = refused
        if not message.apply:
            self._to_commit[pushed] = None
        if len(cohorts) > 1 or not layout.covers_cohorts:
            cohorts = self._covered_by(layout, cohorts)
        policy, complete = self._policy, []
        if policy.counts_pushes:
            cohorts = self._count_push(pushed, cohorts)
        for cohort in cohorts:
            cohort.inbox[worker] = pushed
            if policy.merges(cohort):
                complete.append(cohort)
        if complete:
            self._merge(complete)
        if policy.carries and pushed.request and any(worker in each.carried for each in cohorts):
            request, pushed.request = pushed.request, 0  # it need not wait for the rounds that it is late for
            del self._replies[pushed]
            self._pull_chunk(worker, request, message.chunk, layout)

    def _count_push(self, pushed: Contribution, cohorts: list[Cohort]) -> list[Cohort]:
        """Return the cohorts in which a push counts; of the others drop it."""
        if self._policy.has_deadlines:
            self._untimed.update(dict.fromkeys(cohorts))  # also those that it is late for
        counting: list[Cohort] = []
        for cohort in cohorts:
            if self._policy.count_push(cohort, pushed.peer):
                counting.append(cohort)
            else:
                self._send_chunks(self._use_up([pushed], len(cohort.slices)))
        return counting

    def tick(self, now_s: float) -> float | None:
        """Merge the rounds whose deadline has passed; return the next deadline, None if there is none."""
        untimed, self._untimed = self._untimed, {}
        for cohort in untimed:
            due_s = self._policy.deadline_s(cohort, now_s)
            if due_s is not None:
                heapq.heappush(self._deadlines, (due_s, next(self._ties), cohort))
        if len(self._deadlines) > self._many_deadlines:  # most may be of rounds that have merged already
            self._deadlines = [each for each in self._deadlines if each[2].due_s == each[0]]
            heapq.heapify(self._deadlines)
            self._many_deadlines = 2 * len(self._deadlines) + MANY_DEADLINES
        due: dict[Cohort, None] = {}
        while self._deadlines:
            due_s, _, cohort = self._deadlines[0]
            if cohort.due_s == due_s:  # else that round has merged already
                if due_s > now_s:
                    break
                due[cohort] = None
            heapq.heappop(self._deadlines)
        if due:
            self._merge(list(due))
        return self._deadlines[0][0] if self._deadlines else None

    def _check_push(self, worker: int, message: m.Push) -> None:
        weight = message.weight
        if weight is not None:
            if not self.opened.mean:
                raise ProtocolError(f"worker {worker} pushed with a weight, and the store takes no mean")
            if not MIN_WEIGHT <= weight <= MAX_WEIGHT:
                raise ProtocolError(f"worker {worker} pushed with weight {weight}")
        if not message.apply and not self._policy.allows_commit:
            raise ProtocolError(f"worker {worker} pushed for a commit, which this store has not")

    def _covered_by(self, layout: Layout, cohorts: list[Cohort]) -> list[Cohort]:
        """Return cohorts that have just the slices of a layout: its `cohorts`, split or joined."""
        if not layout.covers_cohorts:
            cohorts = split_for(layout.slices)
        elif joined := join_for(layout, cohorts, self._policy.alike):
            cohorts = [joined]
        else:
            return cohorts
        self._cohorts_epoch += 1
        return cohorts

    # ---- merge and apply -------------------------------------------------------------------------

    def _merge(self, cohorts: list[Cohort]) -> None:
        """Apply the complete rounds of these cohorts, or hold them for the commit.

        To apply a round is to add up its contributions, run the updaters, and answer the waiting calls.
        """
        applying = self._hold(cohorts) if self._to_commit else cohorts
        if applying:
            if self.schedule.pending:
                self._take_due_settings(_slices_in(applying))
            if self._kept_puts:
                self._make_kept_puts(applying)
            updating = self._blame_refused(applying) if self._refused else applying
            try:
                failed = self._update(updating) if updating else {}
            except Exception as exc:  # noqa: BLE001  # any error fails the round, not one peer
                self._blame_all(updating, exc)
            else:
                for each, error in failed.items():
                    self._blame(each, error)
            self._finish(applying)
        if self._merge_waits:
            self._answer_merge_waits(cohorts)

    def _hold(self, cohorts: list[Cohort]) -> list[Cohort]:
        """Hold the rounds that were pushed for a commit; return the cohorts to apply now."""
        applying: list[Cohort] = []
        mixed: list[Cohort] = []
        for cohort in cohorts:
            flags = {pushed.message.apply for pushed in cohort.inbox.values()}
            if len(flags) > 1:
                mixed.append(cohort)
            elif flags.pop():
                applying.append(cohort)
            else:
                cohort.held = True
        if mixed:
            self._refuse_mixed(mixed)
        return applying

    def _refuse_mixed(self, cohorts: list[Cohort]) -> None:
        for each in _slices_in(cohorts):
            error = CommitMismatch(
                f"round {each.applied + 1} of key {each.key!r}: some workers pushed with "
                "apply=False and some without; the round is dropped"
            )
            self._blame(each, error)
        self._finish(cohorts)

    def _blame_refused(self, cohorts: list[Cohort]) -> list[Cohort]:
        """Fail rounds that lack a contribution since there was no memory; return the other cohorts."""
        updating: list[Cohort] = []
        for cohort in cohorts:
            refused = [pushed for pushed in cohort.contributions() if pushed in self._refused]
            if refused:
                self._blame_all([cohort], self._refused[refused[0]])
            else:
                updating.append(cohort)
        return updating

    def _update(self, cohorts: list[Cohort]) -> Failed:
        """Run the updaters on the sums of contributions, and count updates; return what failed."""
        parts = _parts_of_one_layout(cohorts)
        if parts is not None:
            if not parts:
                return {}
            failed = self._updates.of_layout(parts[0].layout, parts, self._settings_epoch)
            for cohort in cohorts:
                cohort.updates += 1
            for each in failed:
                each.version_offset -= 1
            return failed
        sums: list[Sum] = []
        for cohort in cohorts:
            contributions = cohort.contributions()
            found = (self._updates.sum_of(each, contributions) for each in cohort.slices)
            sums += [each for each in found if each is not None]
        return self._update_each(sums)

    def _update_each(self, sums: list[Sum]) -> Failed:
        """Run the updater of each slice on its sum, and count updates; return what failed."""
        failed = run_updaters(sums)
        for each, *_ in sums:
            if each not in failed:
                each.version_offset += 1
        return failed

    def _finish(self, cohorts: list[Cohort]) -> None:
        """Finish the applied rounds of these cohorts, whatever their outcome; answer waiting calls."""
        pulls: list[_Pull] = []
        for cohort in cohorts:
            inbox = cohort.inbox
            cohort.finish_round()
            pulls += self._use_up(inbox.values(), len(cohort.slices))
        if self._policy.pulls_wait_for_others:
            for layout, worker, request, number in pulls:
                self._pull_chunk(worker, request, number, layout)
            pulls = []
        if self._waits:
            self._answer_waits(cohorts, pulls)
        elif pulls:
            self._send_chunks(pulls)

    def _use_up(self, used: Iterable[Contribution], count: int) -> list[_Pull]:
        """Mark `count` slices of each contribution as done; release its buffer when all are.

        Returns the pulls of those that are done, and whose workers have asked for the values.
        """
        pulls: list[_Pull] = []
        for pushed in used:
            pushed.live -= count
            if pushed.live:
                continue
            if not pushed.message.apply:
                del self._to_commit[pushed]
            if not self._refused or self._refused.pop(pushed, None) is None:
                self._pool.give(pushed.buffer)
            if pushed.request:
                del self._replies[pushed]
                pulls.append((pushed.layout, pushed.peer, pushed.request, pushed.message.chunk))
        return pulls

    # ---- blame -----------------------------------------------------------------------------------

    def _blame(self, each: Slice, error: Exception) -> None:
        """Tell every contributor that the round of a slice that is being applied failed."""
        error = short_of(error, f"an update of key {each.key!r}", self._no_memory) or error
        for worker in sorted(each.cohort.inbox):
            fault = m.Fault(self.opened.store, [each.slice_id], each.applied + 1, *to_wire(error))
            self._reply(worker, fault)

    def _blame_all(self, cohorts: Iterable[Cohort], exc: Exception) -> None:
        """Tell every contributor that the round of these cohorts failed as a whole."""
        by_round: dict[tuple[int, int], list[int]] = {}
        for cohort in cohorts:
            for worker in cohort.inbox:
                for each in cohort.slices:
                    by_round.setdefault((worker, each.applied + 1), []).append(each.slice_id)
        error = to_wire(self._updates.sum_error(exc))
        for (worker, round_number), slice_ids in sorted(by_round.items()):
            self._reply(worker, m.Fault(self.opened.store, slice_ids, round_number, *error))

    # ---- pull, put, and waits --------------------------------------------------------------------

    def pull(self, worker: int, message: m.Pull) -> None:
        """Answer each chunk as soon as the policy allows: in sync after this worker's last round."""
        chunks = self.plans.chunks(worker, message.plan)
        if chunks is None:
            raise ProtocolError(f"there is no plan {message.plan}")
        for number, chunk in enumerate(chunks):
            self._pull_chunk(worker, message.request, number, chunk.layout)

    def _pull_chunk(self, worker: int, request: int, number: int, layout: Layout) -> None:
        if not self._must_wait(Wait(worker, request, layout, number)):
            self._send_chunks([(layout, worker, request, number)])

    def put(self, worker: int, message: m.Put, payload: Memory) -> None:
        """Replace the values of a chunk, as soon as this worker's last round is applied."""
        chunk = self.plans.chunk(worker, message.plan, message.chunk)
        if chunk.absent:
            raise ProtocolError(f"a put of chunk {message.chunk}, which has no values")
        if chunk.layout.is_fixed:
            self._keep_put(worker, message, chunk, payload)
            return
        waiting = (wait.put for wait in self._waits if wait.worker == worker)
        held_bytes = sum(len(put[1].bytes) for put in waiting if put is not None)
        if held_bytes + len(payload.bytes) > self._max_payload_bytes:
            raise ProtocolError(f"worker {worker} has puts of {held_bytes} bytes that wait already")
        wait = Wait(worker, message.request, chunk.layout, message.chunk, put=(chunk, payload))
        if self._policy.pulls_wait_for_others or not self._must_wait(wait):
            self._make_put(wait)

    def _keep_put(self, worker: int, message: m.Put, chunk: Chunk, payload: Memory) -> None:
        """Keep values for slices that workers map until their next round, when nobody computes with them."""
        layout = chunk.layout
        values = payload.elements(chunk.dtype, 0, sum(each.num_elems for each in layout.slices))
        for each, low in zip(layout.slices, layout.lows, strict=True):
            self._kept_puts[each] = values[low : low + each.num_elems]
        self._reply(worker, m.Done(message.request))

    def _make_kept_puts(self, cohorts: Iterable[Cohort]) -> None:
        """Make the puts to slices whose round is complete, before it is applied."""
        for each in _slices_in(cohorts):
            value = self._kept_puts.pop(each, None)
            if value is not None:
                each.value.view(-1).copy_(value)
                each.version_offset += 1

    def _must_wait(self, wait: Wait) -> bool:
        """Make a call wait if it needs more than its cohorts have reached; return whether it waits."""
        policy, worker = self._policy, wait.worker
        for cohort in wait.layout.cohorts(self._cohorts_epoch):
            needed = policy.needed(cohort, worker)
            if needed is not None:
                if not wait.late:
                    self._check_waits(worker)
                    self._waits[wait] = None
                wait.late += 1
                cohort.waits.append((needed, wait))
        return wait.late > 0

    def _check_waits(self, worker: int) -> None:
        """Refuse a call that may have to wait if this worker waits for too many chunks."""
        if len(self._replies) + len(self._waits) + len(self._merge_waits) < MAX_WAITS:
            return
        waits: list[Wait | MergeWait] = [*self._waits, *self._merge_waits]
        waiting = [wait.worker for wait in waits] + [pushed.peer for pushed in self._replies]
        if waiting.count(worker) >= MAX_WAITS:
            raise ProtocolError(f"worker {worker} waits for {MAX_WAITS} chunks already")

    def _answer_waits(self, cohorts: Iterable[Cohort], pulls: list[_Pull]) -> None:
        """Answer these pulls, and those that need no more of these cohorts; then make such puts."""
        puts: list[Wait] = []
        for wait in _ready(cohorts, self._policy):
            del self._waits[wait]
            if wait.put is None:
                pulls.append((wait.layout, wait.worker, wait.request, wait.chunk))
            else:
                puts.append(wait)
        self._send_chunks(pulls)
        for put in puts:
            self._make_put(put)

    def _send_chunks(self, pulls: Iterable[_Pull]) -> None:
        """Send the present values of layouts to pulls. Pulls of one layout in a row share the payload."""
        last: Layout | None = None
        for layout, worker, request, number in pulls:
            if layout is not last:
                payload, leases = layout.stored()
                last = layout
            for lease in leases:
                lease.readers += 1
            data = m.Data(request, number)
            if self._policy.carries:
                data.unmerged = any(worker in each.carried for each in layout.cohorts(self._cohorts_epoch))
            self.out.append(Outgoing(worker, data, payload, leases))

    def _make_put(self, wait: Wait) -> None:
        assert wait.put is not None
        (chunk, payload), layout = wait.put, wait.layout
        pushed = payload.elements(chunk.dtype, 0, sum(each.num_elems for each in layout.slices))
        try:
            for run in layout.runs:
                run.slot.make_writable()
        except Exception as exc:
            short = short_of(exc, "a put", self._no_memory)
            if short is None:
                raise
            self._reply(wait.worker, m.Failed(wait.request, *to_wire(short)))
            return
        for run in layout.runs:
            run.stored.tensor.copy_(pushed[run.low : run.high])
        for each in layout.slices:
            each.version_offset += 1
        self._reply(wait.worker, m.Done(wait.request))

    def wait_merged(self, worker: int, message: m.WaitMerged) -> None:
        """Report the slices of a plan as soon as this worker's last push of them is merged."""
        chunks = self.plans.chunks(worker, message.plan) or []
        for chunk in chunks:
            self._check_waits(worker)
            numbers = {each: number for number, each in enumerate(chunk.layout.slices, chunk.first)}
            wait = MergeWait(worker, message.request, chunk.layout, numbers)
            merged: list[Cohort] = []
            for cohort in chunk.layout.cohorts(self._cohorts_epoch):
                if self._policy.last_round(cohort, worker) > cohort.merged:
                    cohort.merge_waits.append(wait)
                else:
                    merged.append(cohort)
            self._merge_waits[wait] = None
            self._tell_merged(wait, merged)

    def _answer_merge_waits(self, cohorts: list[Cohort]) -> None:
        found: dict[MergeWait, list[Cohort]] = {}
        for cohort in cohorts:
            for wait in cohort.merge_waits:
                found.setdefault(wait, []).append(cohort)
            cohort.merge_waits = []
        for wait, merged in found.items():
            self._tell_merged(wait, merged)

    def _tell_merged(self, wait: MergeWait, cohorts: list[Cohort]) -> None:
        """Report to a call its merged slices in these cohorts, and end it when it waits for no other."""
        merged = [each for each in wait.numbers if each.cohort in cohorts]
        numbers = [wait.numbers.pop(each) for each in merged]
        if numbers:
            self._reply(wait.worker, m.Merged(wait.request, sorted(numbers)))
        if not wait.numbers:
            del self._merge_waits[wait]

    # ---- settings --------------------------------------------------------------------------------

    def prepare_setting(self, worker: int, message: m.PrepareSetting) -> None:
        """Load a setting; raises if it is invalid, also for values that other workers have created."""
        self.schedule.prepare(message.number, message.record)
        for each in self._slices_of_keys(self.schedule.keys_of(message.number)):
            setting = self.schedule.prepared(message.number, each.key)
            if setting is not each.setting:
                setting.check_value(each.key, each.shape, each.dtype)
        self._reply(worker, m.Done(message.request))

    def activate_setting(self, worker: int, message: m.ActivateSetting) -> None:
        """Make the prepared setting hold from this worker's next push of each key on, or at once.

        The policy says which.
        """
        found = self._slices_of_keys(self.schedule.keys_of(message.number))
        first = self._next_rounds(worker, found)
        self.schedule.activate(message.number, first, {each.slice_id: each.key for each in found})
        self._take_settings_now(each for each in found if first[each.slice_id] == each.applied + 1)

    def change_options(self, worker: int, message: m.ChangeOptions) -> None:
        """Change options from the setting rank's next push of each key on, or at once; compare other ranks'.

        A change that differs, or that an optimizer refuses, is told to its worker and changes nothing.
        """
        change = Change(worker, message.keys, message.options)
        came = self._option_log.add(change)
        if came == "waits":
            change.from_round = self._next_rounds(worker, self._slices_of_keys(message.keys))
        elif came == "holds":
            self._change_options(change)
        if self._option_log.differing:
            self._tell_differing()

    def _next_rounds(self, worker: int, slices: Iterable[Slice]) -> dict[int, int]:
        """Return the first round of each slice for which a setting of this worker holds, by slice id."""
        rounds_of = self._policy.last_round if self._policy.settings_wait else _applied
        return {each.slice_id: rounds_of(each.cohort, worker) + each.round_offset + 1 for each in slices}

    def _change_options(self, change: Change) -> None:
        found = self._slices_of_keys(change.keys)
        table = self.schedule.table().copy()
        try:
            table.set_options(change.options, change.keys, checked=True)
        except InvalidOption as error:
            self._option_log.differing.append((change, str(error)))
            self._tell_differing()
            return
        rounds_of = self._policy.last_round if self._policy.settings_wait else _applied
        at_once = not self.schedule.pending and not change.from_round
        if at_once and all(rounds_of(each, change.rank) == each.applied for each in cohorts_of(found)):
            self.schedule.replace(table, {}, {})  # the usual case: nothing of the setting rank is open
            for each in found:
                each.setting = table.setting(each.key)
            self._settings_epoch += 1
            return
        first = change.from_round or self._next_rounds(change.rank, found)
        first = {each.slice_id: first.get(each.slice_id, each.applied + 1) for each in found}
        self.schedule.replace(table, first, {each.slice_id: each.key for each in found})
        self._take_settings_now(each for each in found if first[each.slice_id] <= each.applied + 1)

    def _take_settings_now(self, slices: Iterable[Slice]) -> None:
        """Take settings of open rounds now, unless a save needs the states that this would drop."""
        if not self._saves:
            self._take_due_settings(slices)

    def _tell_differing(self) -> None:
        differing, self._option_log.differing = self._option_log.differing, []
        for change, text in differing:
            error = to_wire(SettingMismatch(text))
            self._reply(change.rank, m.Fault(self.opened.store, [], change.number, *error))

    def _slices_of_keys(self, keys: Sequence[Key] | None) -> list[Slice]:
        """Return the slices of these keys, of all keys if `keys` is None."""
        if keys is None:
            return list(self._slices.values())
        return [each for key in keys for each in self._slices_of.get(key, ())]

    def install_settings(self, table: SettingsTable) -> None:
        """Make these settings hold for every slice from now on."""
        self.schedule.install(table)
        for each in self._slices.values():
            setting = table.setting(each.key)
            if setting.updater is not each.setting.updater:
                each.setting.updater.forget(each.slice_id)
            each.setting = setting
        self._settings_epoch += 1
        self._option_log.clear()

    def _take_due_settings(self, slices: Iterable[Slice]) -> None:
        if not self.schedule.pending:
            return
        for each in slices:
            setting = self.schedule.due(each.slice_id, each.key, each.applied + 1)
            if setting is not None and setting is not each.setting:
                if setting.updater is not each.setting.updater:
                    each.setting.updater.forget(each.slice_id)
                each.setting = setting
        self._settings_epoch += 1
        self.schedule.tidy()

    # ---- a save by one worker --------------------------------------------------------------------

    def begin_save(self, worker: int) -> tuple[int, int, SettingsTable]:
        """Keep what a worker saves alone until `end_save`, if each round that it has pushed is applied.

        Those slices change no more, but for puts: their next round lacks this worker's push. Settings may
        still come that hold from that round on, and drop the state of another optimizer; they now wait until
        the round is applied.

        Returns the number of slices whose last round by this worker is not applied, and what
        `SettingSchedule.due_in_open_rounds` does.
        """
        if not self._policy.saves_alone:
            raise ProtocolError(f"worker {worker} saves alone, but rounds go on without it")
        last_round = self._policy.last_round
        cohorts = cohorts_of(self._slices.values())
        num_open = sum(len(each.slices) for each in cohorts if last_round(each, worker) > each.applied)
        up_to, table = self.schedule.due_in_open_rounds(self._slices.values())
        if not num_open:
            self._saves[worker] = table
        return num_open, up_to, table

    def settings_of_save(self, worker: int) -> SettingsTable:
        """Return the settings with which a worker has begun to save alone."""
        if worker not in self._saves:
            raise ProtocolError(f"worker {worker} saves alone, but has not begun to")
        return self._saves[worker]

    def end_save(self, worker: int) -> None:
        """Keep nothing more for a worker's save."""
        if self._saves.pop(worker, None) is not None:
            self._take_settings_now(self._slices.values())

    # ---- commit ----------------------------------------------------------------------------------

    def commit(self, worker: int, message: m.Commit) -> None:
        """Record that a worker asks to commit what it pushed with apply=False."""
        self._commit.add(worker, message, self._uncommitted(worker))
        self._check_commit()

    def _uncommitted(self, worker: int) -> dict[Slice, Contribution]:
        """Return what a worker has pushed for a commit."""
        return {
            each: pushed
            for pushed in self._to_commit
            if pushed.peer == worker
            for each in pushed.layout.slices
            if self._exists(each) and each.cohort.inbox.get(worker) is pushed
        }

    def _exists(self, each: Slice) -> bool:
        return self._slices.get(each.slice_id) is each

    def _check_commit(self) -> None:
        """Report to the scheduler when every member has asked."""
        gather = self._commit
        if gather.reported or not gather.asked or not self._members <= gather.asked.keys():
            return
        gather.reported = True
        gather.forget_dropped(self._exists)
        error = gather.disagreement()
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
                    self.opened.store,
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
        """Take the sums of what all workers have asked to commit, in the same order in every run."""
        pushed = {each for pushes in gather.pushes.values() for each in pushes}
        gather.slices = sorted(pushed, key=lambda each: each.slice_id)
        for each in gather.slices:
            contributions = each.cohort.contributions()
            refused = [pushed for pushed in contributions if pushed in self._refused]
            if refused and gather.skip:
                continue  # its sum is not needed
            if refused:
                raise self._refused[refused[0]]
            found = self._updates.sum_of(each, contributions, may_overwrite=False)
            if found is not None:
                _, total, borrowed = found
                gather.totals.append((each, total.clone() if borrowed else total))  # it may be scaled

    def decide_commit(self, decision: m.CommitDecision) -> None:
        """Apply, skip, measure or refuse the commit: all servers are ready."""
        gather = self._commit
        if decision.number != gather.number or not gather.reported:
            raise ProtocolError(f"commit {decision.number} was decided, but {gather.number} is under way")
        self._commit = CommitGather(gather.number + 1)
        if decision.error is not None or not gather.applies:  # what was pushed stays for the next one
            for worker, asked in sorted(gather.asked.items()):
                refusal = None if decision.error is None else m.Failed(asked.request, *decision.error)
                self._reply(worker, refusal or m.Committed(asked.request, False, decision.norm))
                cohorts = cohorts_of(self._uncommitted(worker))
                self._drop_uncommitted(worker, [each for each in cohorts if worker not in each.members])
            self._answer_flushes()
            return
        cohorts = cohorts_of(filter(self._exists, gather.slices))
        self._take_due_settings(_slices_in(cohorts))
        self._make_kept_puts(cohorts)
        if decision.apply:
            try:
                self._apply_totals(gather, decision)
            except Exception as exc:  # noqa: BLE001  # as in `_apply`
                self._blame_all(cohorts, exc)
        norm = decision.norm if gather.wants_norm else None
        for worker, asked in sorted(gather.asked.items()):
            self._reply(worker, m.Committed(asked.request, decision.apply, norm))
        self._finish(cohorts)
        self._answer_flushes()

    def flush(self, worker: int, message: m.Flush) -> None:
        """Confirm that all earlier messages are processed; wait for the decision of a reported commit."""
        self._flushes.append((worker, message.request))
        if not self._commit.reported:
            self._answer_flushes()

    def _answer_flushes(self) -> None:
        flushes, self._flushes = self._flushes, []
        for worker, request in flushes:
            self._reply(worker, m.Done(request))

    def _apply_totals(self, gather: CommitGather, decision: m.CommitDecision) -> None:
        factor = clip_factor(decision.norm, gather.max_norm)
        alive = [(each, total) for each, total in gather.totals if self._exists(each)]
        if factor != 1.0:
            for _, total in alive:
                scale(total, factor)
        for each, error in self._update_each([(each, total, False) for each, total in alive]).items():
            self._blame(each, error)

    # ---- the rest --------------------------------------------------------------------------------

    def info(self, worker: int, message: m.AskInfo) -> None:
        """Report rounds, versions, and the sizes of optimizer states."""
        found = [self.find(slice_id) for slice_id in message.slice_ids]
        rounds = [each.applied for each in found]
        versions = [each.version for each in found]
        late = [each.num_late for each in found]
        sizes = [state_bytes(each.setting.updater.state(each.slice_id)) for each in found]
        name = self.schedule.newest(found[0].key).updater.spec.name if found else ""
        self._reply(worker, m.Info(message.request, rounds, versions, late, sizes, name))

    def leave(self, worker: int) -> list[tuple[int, int]]:
        """Remove a worker for good: its pushes count, but what it has not asked to commit is dropped.

        Returns its dropped plans, each by worker and number.
        """
        self._drop_replies(lambda pushed: pushed.peer == worker)
        self._drop_waits(lambda wait: wait.worker == worker)
        self._flushes = [flush for flush in self._flushes if flush[0] != worker]
        plans = self.plans.drop_worker(worker)
        self._members.discard(worker)
        self.end_save(worker)
        for change in self._option_log.leave(worker):
            self._change_options(change)
        self._tell_differing()
        cohorts = cohorts_of(self._slices.values())
        for cohort in cohorts:
            cohort.members.discard(worker)
        self._go_on_without(worker, cohorts)
        self._check_commit()
        return plans

    def _drop_uncommitted(self, worker: int, cohorts: Iterable[Cohort]) -> None:
        """Drop what a worker has pushed to these cohorts for a commit that it has not asked for."""
        asked = self._commit.pushes.get(worker, {})
        for cohort in cohorts if self._to_commit else ():
            pushed = cohort.inbox.get(worker)
            if pushed is not None and pushed in self._to_commit and asked.keys().isdisjoint(cohort.slices):
                del cohort.inbox[worker]
                self._send_chunks(self._use_up([pushed], len(cohort.slices)))

    def waiting(self, worker: int, message: m.AskWaiting) -> None:
        """Report which workers a request of this worker waits for."""
        ranks, where = self._missing(worker, message.request)
        self._reply(worker, m.Waiting(message.request, ranks, where))

    def _missing(self, worker: int, request: int) -> tuple[list[int], str]:
        for wait in self._waits:
            if (wait.worker, wait.request) == (worker, request):
                return self._missing_pushes(*_first_late(wait))
        for pushed in self._replies:
            if (pushed.peer, pushed.request) == (worker, request):
                return self._missing_round(
                    next(each for each in pushed.layout.slices if each.cohort.inbox.get(worker) is pushed)
                )
        for merge_wait in self._merge_waits:
            if (merge_wait.worker, merge_wait.request) == (worker, request):
                return self._missing_round(next(iter(merge_wait.numbers)))
        asked = self._commit.asked.get(worker)
        if asked is not None and asked.request == request:
            return self._not_asked(), f"commit {self._commit.number}"
        return [], ""

    def _missing_pushes(self, each: Slice, needed: int) -> tuple[list[int], str]:
        if not self._policy.pulls_wait_for_others:
            return self._missing_round(each)
        return self._policy.missing(each.cohort, needed), f"push {needed} of {each.key!r}"

    def _missing_round(self, each: Slice) -> tuple[list[int], str]:
        where = f"round {each.applied + 1} of {each.key!r}"
        if each.cohort.held:
            return self._not_asked(), f"{where}, to be committed"
        return self._policy.missing(each.cohort, each.cohort.applied + 1), where

    def _not_asked(self) -> list[int]:
        """Return the workers that the commit waits for, by rank."""
        return sorted(self._members - self._commit.asked.keys())

    def report(self) -> list[str]:
        """Return which workers each open round, one line per key and round, and the commit wait for."""
        lines: dict[str, None] = {}
        for each in self._slices.values():
            if each.cohort.held or each.cohort.inbox:
                ranks, where = self._missing_round(each)
                lines[f"{where} waits for {_workers(ranks)}"] = None
        if self._policy.pulls_wait_for_others:
            for wait in self._waits:
                ranks, where = self._missing_pushes(*_first_late(wait))
                lines[f"worker {wait.worker} waits for {where} by {_workers(ranks)}"] = None
        if self._commit.asked:
            lines[f"commit {self._commit.number} waits for {_workers(self._not_asked())}"] = None
        more = [f"and {len(lines) - MAX_REPORTED} more"] if len(lines) > MAX_REPORTED else []
        return [*list(lines)[:MAX_REPORTED], *more]

    def _reply(self, worker: int, message: Any) -> None:
        if not self.has_left(worker) or isinstance(message, m.Done):
            self.out.append(Outgoing(worker, message))


def _applied(cohort: Cohort, worker: int) -> int:
    return cohort.applied


def _slices_in(cohorts: Iterable[Cohort]) -> list[Slice]:
    return [each for cohort in cohorts for each in cohort.slices]


def _parts_of_one_layout(cohorts: Sequence[Cohort]) -> list[Contribution] | None:
    """Return the contributions that are not absent, by rank, if they can be added up as whole runs.

    They can if all cohorts have the same ones, of one layout and equal counts, and all its slices.
    """
    first = cohorts[0]
    num_slices, layout = len(first.slices), None
    if len(cohorts) > 1:
        if any(cohort.inbox != first.inbox for cohort in cohorts):
            return None
        num_slices = sum(len(cohort.slices) for cohort in cohorts)
    parts: list[Contribution] = []
    for pushed in first.contributions():
        chunk = pushed.chunk
        layout = layout or pushed.layout
        if pushed.layout is not layout or not chunk.alike or len(layout.slices) != num_slices:
            return None
        if not chunk.absent:
            parts.append(pushed)
    return parts


def _ready(cohorts: Iterable[Cohort], policy: Policy) -> list[Wait]:
    """Remove from these cohorts the calls that need no more of them; return those that wait for no other."""
    ready: list[Wait] = []
    for cohort in cohorts:
        waits, cohort.waits = cohort.waits, []
        reached = policy.reached(cohort)
        for needed, wait in waits:
            if reached < needed:
                cohort.waits.append((needed, wait))
                continue
            wait.late -= 1
            if not wait.late:
                ready.append(wait)
    return ready


def _first_late(wait: Wait) -> tuple[Slice, int]:
    """Return the first slice that a call waits for, and the number that its policy must reach."""
    return next(
        (each, needed) for each in wait.layout.slices for needed, other in each.cohort.waits if other is wait
    )


def _workers(ranks: list[int]) -> str:
    if not ranks:
        return "the scheduler"
    return f"worker{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
