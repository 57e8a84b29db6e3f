"""Layouts: how the slices of a chunk lie in a frame, and where they are stored."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import final

import msgspec
import torch

from tensorkv.checkpoint.slices import SliceState
from tensorkv.plain import Key
from tensorkv.server.cohorts import FIRST_PATIENCE, Cohort, cohorts_of
from tensorkv.server.memory import Memory
from tensorkv.server.slots import Lease, Slot
from tensorkv.updaters.base import Assign
from tensorkv.updaters.settings import Setting
from tensorkv.wire.messages import Push


@final
@dataclass(slots=True, eq=False)
class Slice:
    """One slice of a value: elements [start, stop) of `key`, stored in `slot` from `offset` on.

    `shape` is the shape of the value if the slice is all of it, otherwise (stop - start,). The cohort counts
    rounds, updates and late pushes; the slice adds its offsets. `restored` is the state that a load in
    progress has brought.
    """

    slice_id: int
    key: Key
    start: int
    stop: int
    shape: tuple[int, ...]
    slot: Slot
    offset: int
    setting: Setting
    cohort: Cohort
    round_offset: int = 0
    version_offset: int = 0
    late_offset: int = 0
    restored: SliceState | None = None

    @property
    def applied(self) -> int:
        """Number of applied rounds, including empty and failed ones."""
        return self.cohort.applied + self.round_offset

    @property
    def version(self) -> int:
        """Number of successful updates and of puts."""
        return self.cohort.updates + self.version_offset

    @property
    def num_late(self) -> int:
        """Number of pushes that came after their round had merged."""
        return self.cohort.num_late + self.late_offset

    @property
    def num_elems(self) -> int:
        """Number of elements of the slice."""
        return self.stop - self.start

    @property
    def dtype(self) -> torch.dtype:
        """The stored dtype."""
        return self.slot.tensor.dtype

    @property
    def value(self) -> torch.Tensor:
        """The stored elements, in `shape`, sharing the slot's memory."""
        return self.slot.tensor[self.offset : self.offset + self.num_elems].view(self.shape)


@final
@dataclass(slots=True)
class Run:
    """Elements [low, high) of a chunk that are contiguous in one slot, from `offset` on."""

    low: int
    high: int
    slot: Slot
    offset: int
    _whole: torch.Tensor | None = None  # the slot's memory that `_stored` is a view of
    _stored: Memory | None = None

    @property
    def stop_offset(self) -> int:
        """Where the run ends in its slot."""
        return self.offset + self.high - self.low

    @property
    def is_whole_slot(self) -> bool:
        """Whether the run fills its slot."""
        return self.offset == 0 and self.stop_offset == self.slot.tensor.numel()

    @property
    def stored(self) -> Memory:
        """The stored elements of the run, flat."""
        if self._stored is None or self._whole is not self.slot.tensor:
            self._whole = self.slot.tensor
            self._stored = Memory(self._whole[self.offset : self.stop_offset])
        return self._stored


@final
class Layout:
    """How slices lie in a chunk: where each begins and ends, and which runs of memory they form.

    `is_fixed` tells whether any of it is memory that workers map.

    Workers that push the same slices in the same order share one layout object, so that their
    contributions can be added as whole runs.
    """

    def __init__(self, slices: list[Slice]) -> None:
        self.slices = slices
        self.lows = [0, *itertools.accumulate(each.num_elems for each in slices)][: len(slices)]
        self.position = {each: number for number, each in enumerate(slices)}
        self.find_runs()
        self.patience = FIRST_PATIENCE
        self.found_at_rest = 0  # how often `join_for` has found its cohorts at rest since it last joined
        self.covers_cohorts = False  # whether its cohorts, as last returned, have no other slices
        self._cohorts: list[Cohort] = []
        self._cohorts_epoch = -1
        self._settings_epoch = -1
        self._all_assign = False
        self._only_setting: Setting | None = None

    def stored(self) -> tuple[list[Memory], list[Lease]]:
        """Return the stored elements, in runs of memory, and a lease for each."""
        if self.is_fixed:
            copies = [Memory(run.stored.tensor.clone()) for run in self.runs]
            return copies, [Lease() for _ in copies]
        if len(self.runs) == 1:  # of small values most are
            run = self.runs[0]
            return [run.stored], [run.slot.lease]
        return [run.stored for run in self.runs], [run.slot.lease for run in self.runs]

    def find_runs(self) -> None:
        """Look up where the slices lie: they may have moved to other slots."""
        self.runs = self._find_runs()
        self.is_fixed = any(run.slot.fixed for run in self.runs)

    def bounds(self, position: int) -> tuple[int, int]:
        """Return where the slice at `position` begins and ends in the chunk, in elements."""
        low = self.lows[position]
        return low, low + self.slices[position].num_elems

    def slices_in(self, run: Run) -> list[Slice]:
        """Return the slices that lie in a run."""
        starts = zip(self.lows, self.slices, strict=True)
        return [each for low, each in starts if run.low <= low and low + each.num_elems <= run.high]

    def cohorts(self, epoch: int) -> list[Cohort]:
        """Return the cohorts of the slices; cached until `epoch` changes."""
        if self._cohorts_epoch != epoch:
            self._cohorts = cohorts_of(self.slices)
            self._cohorts_epoch = epoch
            self.covers_cohorts = sum(len(each.slices) for each in self._cohorts) == len(self.slices)
        return self._cohorts

    def all_assign(self, settings_epoch: int) -> bool:
        """Whether every slice has the updater ASSIGN; cached until `settings_epoch` changes."""
        if self._settings_epoch != settings_epoch:
            self._look_up_settings(settings_epoch)
        return self._all_assign

    def only_setting(self, settings_epoch: int) -> Setting | None:
        """Return the setting of all slices, None if there are several; cached as in `all_assign`."""
        if self._settings_epoch != settings_epoch:
            self._look_up_settings(settings_epoch)
        return self._only_setting

    def _look_up_settings(self, settings_epoch: int) -> None:
        settings = {id(each.setting): each.setting for each in self.slices}
        self._all_assign = all(isinstance(each.updater, Assign) for each in settings.values())
        self._only_setting = next(iter(settings.values())) if len(settings) == 1 else None
        self._settings_epoch = settings_epoch

    def _find_runs(self) -> list[Run]:
        runs: list[Run] = []
        for number, each in enumerate(self.slices):
            low, high = self.bounds(number)
            last = runs[-1] if runs else None
            if last and last.slot is each.slot and last.high == low and last.stop_offset == each.offset:
                last.high = high  # `stored` is not cached yet
            else:
                runs.append(Run(low, high, each.slot, each.offset))
        return runs


@final
@dataclass(slots=True)
class Chunk:
    """A chunk of a worker's plan: a layout, and how to read the worker's bytes for it.

    `dtype` is the pushed one; `absent` means that no bytes come. `counts` has an entry for each slice;
    `alike` says that all are equal. `first` is the position of the first slice in the whole plan. A push
    carries `payload_bytes` bytes.
    """

    layout: Layout
    counts: list[int]
    dtype: torch.dtype
    absent: bool
    first: int
    alike: bool = field(init=False)
    payload_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.alike = len(set(self.counts)) <= 1
        num_elems = sum(each.num_elems for each in self.layout.slices)
        self.payload_bytes = 0 if self.absent else num_elems * self.dtype.itemsize


@final
class Contribution(msgspec.Struct, eq=False):  # created in a third of the time of a dataclass
    """One peer's push of a chunk, until each of its slices is applied or dropped.

    In a mean a slice counts as the weight of `message`, or as `chunk` says if that is None. `live` counts the
    remaining slices; at 0 the buffer returns to its pool, and a push that asked for the values pulls them:
    `request` is the number of that pull, 0 for none.
    """

    peer: int
    message: Push
    chunk: Chunk
    layout: Layout
    buffer: Memory
    live: int
    request: int
