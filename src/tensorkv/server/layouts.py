"""Layouts: how the slices of a chunk lie in a frame, and where they are stored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import msgspec
import torch

from tensorkv.checkpoint.slices import SliceState
from tensorkv.plain import Key
from tensorkv.server.cohorts import FIRST_PATIENCE, Cohort, cohorts_of
from tensorkv.server.memory import Memory
from tensorkv.server.slots import Slot
from tensorkv.updaters.base import Assign
from tensorkv.updaters.settings import Setting


@final
@dataclass(slots=True, eq=False)
class Slice:
    """One slice of a value: elements [start, stop) of `key`, kept in `slot` from `offset` on.

    `shape` is the value's own where the slice is all of it, else (stop - start,). Rounds and updates are
    counted by the cohort, from the two offsets on. `restored` is what a load under way has brought.
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
    restored: SliceState | None = None

    @property
    def applied(self) -> int:
        """The number of rounds that were applied, also empty and failed ones."""
        return self.cohort.applied + self.round_offset

    @property
    def version(self) -> int:
        """The number of updates that succeeded, and of puts."""
        return self.cohort.updates + self.version_offset

    @property
    def num_elems(self) -> int:
        """Elements of the slice."""
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
    """Elements [low, high) of a chunk that lie together in one slot, from `offset` on."""

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
        """Whether nothing else lies in the slot."""
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
    """Slices as they lie in a chunk: where each begins and ends there, and which runs of memory they make.

    Workers that push the same slices in the same order share one layout object, so that their
    contributions can be added as whole runs. A slice that was deleted leaves a gap.
    """

    def __init__(self, slices: list[Slice], lows: list[int]) -> None:
        self.slices = slices
        self.lows = lows
        self.position = {each: number for number, each in enumerate(slices)}
        self.runs = self._find_runs()
        self.patience = FIRST_PATIENCE
        self.found_at_rest = 0  # how often in a row `join_for` has found its cohorts so
        self._cohorts: list[Cohort] = []
        self._cohorts_epoch = -1
        self._settings_epoch = -1
        self._all_assign = False
        self._only_setting: Setting | None = None

    def bounds(self, position: int) -> tuple[int, int]:
        """Return where the slice at `position` begins and ends in the chunk, in elements."""
        low = self.lows[position]
        return low, low + self.slices[position].num_elems

    def slices_in(self, run: Run) -> list[Slice]:
        """Return the slices that lie in a run."""
        starts = zip(self.lows, self.slices, strict=True)
        return [each for low, each in starts if run.low <= low and low + each.num_elems <= run.high]

    def cohorts(self, epoch: int) -> list[Cohort]:
        """Return the cohorts of the slices; looked up anew when `epoch` has changed."""
        if self._cohorts_epoch != epoch:
            self._cohorts = cohorts_of(self.slices)
            self._cohorts_epoch = epoch
        return self._cohorts

    def all_assign(self, settings_epoch: int) -> bool:
        """Whether ASSIGN holds for every slice; looked up anew when `settings_epoch` has changed."""
        if self._settings_epoch != settings_epoch:
            self._look_up_settings(settings_epoch)
        return self._all_assign

    def only_setting(self, settings_epoch: int) -> Setting | None:
        """Return the setting that holds for every slice, None if there are several; as `all_assign`."""
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
                last.high = high  # nobody has asked for `stored` yet
            else:
                runs.append(Run(low, high, each.slot, each.offset))
        return runs


@final
@dataclass(slots=True)
class Chunk:
    """A chunk of a worker's plan: a layout, and how the worker's bytes for it are to be read.

    `slice_ids` and `lengths` are those the worker named; the layout holds what still exists of them.
    `dtype` is the pushed one, `absent` means that no bytes come. `counts` and `numbers` (positions in the
    whole plan) stand per slice of the layout; `alike` tells that all counts are equal, `whole` that no
    slice is gone. A push carries `payload_bytes` bytes.
    """

    slice_ids: list[int]
    lengths: list[int]
    named_counts: list[int]
    dtype: torch.dtype
    absent: bool
    first: int
    layout: Layout
    counts: list[int]
    numbers: list[int]
    alike: bool = True
    whole: bool = True
    payload_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.payload_bytes = 0 if self.absent else sum(self.lengths) * self.dtype.itemsize

    def gone(self) -> list[int]:
        """Return the ids of its slices that do not exist any more."""
        if self.whole:
            return []
        there = set(self.numbers)
        return [each for number, each in enumerate(self.slice_ids, self.first) if number not in there]


@final
class Contribution(msgspec.Struct, eq=False):  # made in a third of the time of a dataclass
    """What one peer pushed for a chunk, until each of its slices is applied or dropped.

    In a mean a slice counts as `weight`, or as `counts` says if that is None; `alike` tells that all counts
    are equal. `live` counts the slices that are left; at 0 the buffer goes back to its pool, and a push that
    asked for the values gets them: `request` is that of the pull, 0 for none, `number` the chunk's.
    """

    peer: int
    layout: Layout
    dtype: torch.dtype
    absent: bool
    counts: list[int]
    alike: bool
    buffer: Memory
    apply: bool
    weight: float | None
    live: int
    request: int = 0
    number: int = 0
