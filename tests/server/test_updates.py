"""Updates: whole layouts and single slices are added up alike, and what fails keeps its value."""

from __future__ import annotations

import pytest
import torch

from tensorkv.errors import UpdaterError
from tensorkv.server.cohorts import Cohort
from tensorkv.server.layouts import Chunk, Contribution, Layout, Slice
from tensorkv.server.memory import BufferPool, Memory, no_memory
from tensorkv.server.slots import Slot
from tensorkv.server.updates import Updates, run_updaters
from tensorkv.updaters.base import Add, Assign, Updater
from tensorkv.updaters.settings import Setting
from tensorkv.wire.messages import Push


def layout_of(updater: Updater, dtype: torch.dtype = torch.float32) -> Layout:
    """Three slices of two elements, the last one in memory of its own."""
    shared, own, setting = (
        Slot(torch.zeros(4, dtype=dtype)),
        Slot(torch.zeros(2, dtype=dtype)),
        Setting(updater),
    )
    places = [(shared, 0), (shared, 2), (own, 0)]
    cohort = Cohort({0})
    slices = [
        Slice(number, f"k{number}", 0, 2, (2,), slot, offset, setting, cohort)
        for number, (slot, offset) in enumerate(places)
    ]
    return Layout(slices)


def pushed(
    layout: Layout,
    values: torch.Tensor,
    peer: int = 0,
    *,
    count: int = 1,
    weight: float | None = None,
    absent: bool = False,
) -> Contribution:
    counts = [count] * len(layout.slices)
    chunk = Chunk(layout, counts, values.dtype, absent, 0)
    message = Push(1, 0, True, 0, None, weight)
    return Contribution(peer, message, chunk, layout, Memory(values.clone()), len(layout.slices), 0)


def stored(layout: Layout) -> torch.Tensor:
    return torch.cat([each.value for each in layout.slices])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("updater", [Assign, Add])
@pytest.mark.parametrize("weights", [(None, None), (2.0, None), (0.5, 3.0)])
def test_a_layout_is_added_up_as_its_slices_are(
    dtype: torch.dtype, updater: type[Updater], weights: tuple[float | None, float | None]
) -> None:
    generator = torch.Generator().manual_seed(8)
    values = [torch.randn(6, generator=generator).to(dtype) for _ in weights]
    updates = Updates(True, BufferPool(), no_memory)
    whole, single = layout_of(updater(), dtype), layout_of(updater(), dtype)
    parts = [pushed(whole, each, count=2, weight=w) for each, w in zip(values, weights, strict=True)]
    assert updates.of_layout(whole, parts, 0) == {}
    parts = [pushed(single, each, count=2, weight=w) for each, w in zip(values, weights, strict=True)]
    sums = [updates.sum_of(each, parts) for each in single.slices]
    assert run_updaters([each for each in sums if each is not None]) == {}
    assert torch.equal(stored(whole), stored(single))
    assert bool((stored(whole) != 0).all())


def test_a_slice_that_nobody_has_values_for_has_no_sum() -> None:
    layout = layout_of(Add())
    nothing = pushed(layout, torch.ones(6), absent=True)
    assert Updates(False, BufferPool(), no_memory).sum_of(layout.slices[0], [nothing]) is None
    found = Updates(False, BufferPool(), no_memory).sum_of(
        layout.slices[1], [nothing, pushed(layout, torch.ones(6), 1)]
    )
    assert found is not None
    assert found[1].tolist() == [1.0, 1.0]


def test_a_commit_leaves_what_was_pushed_as_it_is() -> None:
    layout = layout_of(Add())
    parts = [pushed(layout, torch.ones(6)), pushed(layout, torch.ones(6), 1)]
    found = Updates(False, BufferPool(), no_memory).sum_of(layout.slices[0], parts, may_overwrite=False)
    assert found is not None
    assert found[1].tolist() == [2.0, 2.0]
    assert all(each.buffer.tensor.tolist() == [1.0] * 6 for each in parts)


def test_a_run_that_cannot_be_assigned_fails_for_its_slices_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of(Assign())
    first = layout.slices[0].slot
    first.lease.readers = 1  # the first run has to move, which needs memory

    def refuse(self: Slot) -> torch.Tensor:
        raise RuntimeError("no place")

    with monkeypatch.context() as patch:
        patch.setattr(Slot, "fresh", refuse)
        failed = Updates(False, BufferPool(), no_memory).of_layout(layout, [pushed(layout, torch.ones(6))], 0)
    assert list(failed) == layout.slices[:2]
    assert all(isinstance(error, UpdaterError) and "no place" in str(error) for error in failed.values())
    assert stored(layout).tolist() == [0.0] * 4 + [1.0] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_of_borrowed_memory_is_taken_in_the_pool(dtype: torch.dtype) -> None:
    """So that no step needs fresh pages for it. Narrow floats are added up in another dtype first."""
    layout, pool = layout_of(Add(), dtype), BufferPool()
    parts = [pushed(layout, torch.ones(6, dtype=dtype), peer) for peer in range(2)]
    for each in parts:
        each.buffer = Memory(each.buffer.tensor, lambda: None)
    for number in range(1, 4):
        assert not Updates(False, pool, no_memory).of_layout(layout, parts, 0)
        assert stored(layout).tolist() == [2.0 * number] * 6
    assert all(each.buffer.tensor.tolist() == [1.0] * 6 for each in parts)
    assert [len(free) for free in pool._free.values()] == ([1] if dtype == torch.float32 else [])
