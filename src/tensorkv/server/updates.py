"""Updates: adds up contributions to slices, and runs the updaters on the sums.

If all workers pushed one layout, whole runs of memory are added up. Slices that came in different chunks are
added up one by one. Both return the errors by slice; a slice that failed keeps its value.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import final

import torch

from tensorkv.arrays import accumulate_dtype
from tensorkv.errors import TensorKVError, UpdaterError
from tensorkv.server.layouts import Contribution, Layout, Slice
from tensorkv.server.memory import BufferPool, NoMemory, short_of
from tensorkv.server.sums import add_up, weigh
from tensorkv.updaters.base import Update
from tensorkv.updaters.settings import Setting, apply_all

Failed = dict[Slice, Exception]
"""Errors of slices that failed, by slice."""

Sum = tuple[Slice, torch.Tensor, bool]
"""A slice, the sum of its contributions, and whether that memory is borrowed."""


@final
class Updates:
    """Sums and updates of one store; if the store takes means, sums are divided."""

    def __init__(self, mean: bool, pool: BufferPool, error_of: NoMemory) -> None:
        self._mean = mean
        self._pool = pool
        self._no_memory = error_of

    def of_layout(self, layout: Layout, parts: Sequence[Contribution], settings_epoch: int) -> Failed:
        """Add up whole runs of memory, and update all slices of a layout in one call.

        `parts` are the contributions that are not absent, at least one, in rank order. All have this layout,
        and the counts of each are equal.
        """
        divisor, factors = (
            weigh([(each.message.weight, each.chunk.counts[0]) for each in parts])
            if self._mean
            else (1, None)
        )
        if layout.all_assign(settings_epoch):
            return self._assign_runs(layout, parts, divisor, factors)
        stop = layout.bounds(len(layout.slices) - 1)[1]
        found = [each.buffer.elements(each.chunk.dtype, 0, stop) for each in parts]
        dtype, borrowed = layout.slices[0].dtype, parts[0].buffer.borrowed
        room = None
        if borrowed and len(parts) > 1 and accumulate_dtype(dtype) == dtype:
            room = self._pool.take(stop * dtype.itemsize)
        try:
            out = None if room is None else room.elements(dtype, 0, stop)
            total = add_up(found, dtype, divisor, out, may_overwrite=not borrowed, factors=factors)
            borrowed = borrowed and total is found[0]
            sums = [
                (each, total[low : low + each.num_elems], borrowed)
                for low, each in zip(layout.lows, layout.slices, strict=True)
            ]
            return run_updaters(sums, layout.only_setting(settings_epoch))
        finally:
            if room is not None:
                self._pool.give(room)

    def sum_of(
        self, each: Slice, contributions: Iterable[Contribution], may_overwrite: bool = True
    ) -> Sum | None:
        """Return the sum of one slice's contributions, which are in rank order; None if all are absent."""
        parts: list[torch.Tensor] = []
        shares: list[tuple[float | None, int]] = []
        borrowed = False
        for pushed in contributions:
            if not pushed.chunk.absent:
                position = pushed.layout.position[each]
                borrowed = borrowed if parts else pushed.buffer.borrowed
                low, high = pushed.layout.bounds(position)
                parts.append(pushed.buffer.elements(pushed.chunk.dtype, low, high))
                shares.append((pushed.message.weight, pushed.chunk.counts[position]))
        if not parts:
            return None
        may_overwrite = may_overwrite and not borrowed
        divisor, factors = weigh(shares) if self._mean else (1, None)
        total = add_up(parts, each.dtype, divisor, may_overwrite=may_overwrite, factors=factors)
        return each, total, borrowed and total is parts[0]

    def sum_error(self, exc: Exception) -> TensorKVError:
        """Return the error to report for a failed sum."""
        short = short_of(exc, "a round of what was pushed", self._no_memory)
        text = f"what was pushed could not be added up or applied: {type(exc).__name__}: {exc}"
        return short or UpdaterError(text)

    def _assign_runs(
        self, layout: Layout, parts: Sequence[Contribution], divisor: float, factors: Sequence[float] | None
    ) -> Failed:
        """Add whole runs directly into the stored values."""
        failed: Failed = {}
        dtype, may_overwrite = layout.slices[0].dtype, not parts[0].buffer.borrowed
        for run in layout.runs:
            try:
                found = [each.buffer.elements(each.chunk.dtype, run.low, run.high) for each in parts]
                slot, fresh = run.slot, None
                if slot.lease.readers:
                    if run.is_whole_slot:  # the old value is not needed
                        fresh = slot.fresh()
                    else:
                        slot.make_writable()
                target = run.stored.tensor if fresh is None else fresh
                add_up(found, dtype, divisor, target, may_overwrite=may_overwrite, factors=factors)
                if fresh is not None:
                    slot.replace(fresh)
            except Exception as exc:  # noqa: BLE001  # any error; the other runs are assigned
                error = self.sum_error(exc)
                failed.update(dict.fromkeys(layout.slices_in(run), error))
        return failed


def run_updaters(sums: Sequence[Sum], only: Setting | None = None) -> Failed:
    """Run the updater of each slice on its sum. `only` is the setting of all slices, if known."""
    for each, _, _ in sums:
        each.slot.make_writable()
    updates = [Update(each.slice_id, each.key, total.view(each.shape), each.value) for each, total, _ in sums]
    if only is not None:
        failures = only.updater.apply(updates, only.options)
    else:
        failures = apply_all(
            [(each.setting, update) for (each, *_), update in zip(sums, updates, strict=True)]
        )
    return {each: failure for (each, *_), failure in zip(sums, failures, strict=True) if failure is not None}
