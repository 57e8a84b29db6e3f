"""Layouts: where slices lie in a chunk, and which of them make one run of memory."""

from __future__ import annotations

import torch

from tensorkv.server.cohorts import Cohort
from tensorkv.server.layouts import Chunk, Layout, Slice
from tensorkv.server.slots import Slot
from tensorkv.updaters.base import Add, Assign
from tensorkv.updaters.settings import Setting


def a_slice(number: int, slot: Slot, offset: int, length: int, shape: tuple[int, ...] = ()) -> Slice:
    cohort = Cohort({0})
    made = Slice(
        100 + number, f"k{number}", 0, length, shape or (length,), slot, offset, Setting(Assign()), cohort
    )
    cohort.add(made)
    return made


def test_neighbours_in_chunk_and_slot_are_one_run() -> None:
    one, other = Slot(torch.arange(20.0)), Slot(torch.arange(10.0))
    slices = [a_slice(0, one, 2, 3), a_slice(1, one, 5, 4), a_slice(2, one, 10, 1), a_slice(3, other, 0, 2)]
    layout = Layout(slices)
    assert [(run.low, run.high, run.offset) for run in layout.runs] == [(0, 7, 2), (7, 8, 10), (8, 10, 0)]
    assert layout.runs[0].stored.tensor.tolist() == [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    assert layout.bounds(1) == (3, 7)
    assert [layout.position[each] for each in slices] == [0, 1, 2, 3]
    assert layout.slices_in(layout.runs[0]) == slices[:2]


def test_empty_slices_make_no_difference() -> None:
    slot = Slot(torch.arange(4.0))
    layout = Layout([a_slice(0, slot, 0, 2), a_slice(1, slot, 2, 0), a_slice(2, slot, 2, 2)])
    assert [(run.low, run.high) for run in layout.runs] == [(0, 4)]


def test_a_value_has_its_shape_and_follows_its_slot() -> None:
    slot = Slot(torch.arange(8.0))
    each = a_slice(0, slot, 2, 6, (2, 3))
    slot.lease.readers = 1
    slot.make_writable()
    each.value.zero_()
    assert each.value.shape == (2, 3)
    assert slot.tensor.tolist() == [0.0, 1.0] + [0.0] * 6
    assert (each.num_elems, each.dtype) == (6, torch.float32)


def test_all_assign_is_looked_up_when_settings_change() -> None:
    slot = Slot(torch.zeros(4))
    layout = Layout([a_slice(0, slot, 0, 2), a_slice(1, slot, 2, 2)])
    assert layout.all_assign(0)
    layout.slices[1].setting = Setting(Add())
    assert layout.all_assign(0)
    assert not layout.all_assign(1)


def test_a_slice_counts_rounds_and_updates_from_its_own_offsets_on() -> None:
    each = a_slice(0, Slot(torch.zeros(2)), 0, 2)
    each.cohort.applied, each.cohort.updates = 5, 3
    each.round_offset, each.version_offset = 2, -1
    assert (each.applied, each.version) == (7, 2)


def test_cohorts_are_looked_up_when_the_epoch_changes() -> None:
    slot = Slot(torch.zeros(4))
    layout = Layout([a_slice(0, slot, 0, 2), a_slice(1, slot, 2, 2)])
    first, second = (each.cohort for each in layout.slices)
    assert layout.cohorts(1) == [first, second]
    first.join(second)
    assert layout.cohorts(1) == [first, second]
    assert layout.cohorts(2) == [first]


def test_a_chunk_knows_its_bytes_and_whether_its_counts_are_alike() -> None:
    slot = Slot(torch.zeros(8))
    layout = Layout([a_slice(0, slot, 0, 2), a_slice(1, slot, 2, 3)])
    assert layout.lows == [0, 2]
    chunk = Chunk(layout, [1, 1], torch.float16, False, 5)
    assert (chunk.payload_bytes, chunk.alike) == (10, True)
    absent = Chunk(layout, [0, 2], torch.float16, True, 5)
    assert (absent.payload_bytes, absent.alike) == (0, False)
