"""PlanBook: numbered lists of slices, which name no slice that their worker has deleted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tensorkv.errors import ProtocolError
from tensorkv.server.cohorts import Cohort
from tensorkv.server.layouts import Slice
from tensorkv.server.planbook import PlanBook
from tensorkv.server.slots import Slot
from tensorkv.updaters.base import Assign
from tensorkv.updaters.settings import Setting
from tensorkv.wire import messages as m


def book() -> tuple[PlanBook, dict[int, Slice]]:
    """A book of slices 1 to 3, of two elements each."""
    slot, cohort = Slot(torch.zeros(6)), Cohort({0, 1})
    slices = {
        number: Slice(number, f"k{number}", 0, 2, (2,), slot, 2 * number - 2, Setting(Assign()), cohort)
        for number in (1, 2, 3)
    }
    return PlanBook(slices.get, 1000), slices


def test_workers_that_list_the_same_slices_share_a_layout(t: Any) -> None:
    plans, slices = book()
    plans.define(0, m.DefinePlan(1, 1, [t.dense([1, 2], [2, 2]), t.dense([3], [2])]))
    plans.define(1, m.DefinePlan(1, 1, [t.dense([1, 2], [2, 2], "float64")]))
    mine, theirs = plans.chunks(0, 1), plans.chunks(1, 1)
    assert mine is not None
    assert theirs is not None
    assert mine[0].layout is theirs[0].layout
    assert mine[0].layout.slices == [slices[1], slices[2]]
    assert (mine[1].first, mine[0].payload_bytes, theirs[0].payload_bytes) == (2, 16, 32)
    assert plans.chunks(0, 2) is None


def test_slices_that_a_plan_names_are_in_use(t: Any) -> None:
    plans, slices = book()
    plans.define(0, m.DefinePlan(1, 7, [t.dense([1], [2]), t.dense([2], [2])]))
    assert not plans.names_any([slices[2]], 1)
    assert not plans.names_any([slices[3]])
    assert plans.names_any([slices[3], slices[2]], 0)
    assert plans.names_any([slices[1]])


def test_a_plan_names_no_slice_that_its_worker_has_deleted(t: Any) -> None:
    plans, slices = book()
    slices[1].cohort.members = {1}
    with pytest.raises(ProtocolError, match="no slice 2, or worker 0 has deleted it"):
        plans.define(0, m.DefinePlan(1, 7, [t.dense([2], [2])]))
    plans.define(1, m.DefinePlan(1, 7, [t.dense([2], [2])]))
    with pytest.raises(ProtocolError, match="no slice 4"):
        plans.define(1, m.DefinePlan(1, 8, [t.dense([4], [2])]))


def test_plans_of_a_worker_that_left_are_dropped(t: Any) -> None:
    plans, _ = book()
    for worker in (0, 1):
        plans.define(worker, m.DefinePlan(1, 7, [t.dense([1], [2])]))
    assert plans.drop_worker(0) == [(0, 7)]
    assert plans.chunks(0, 7) is None
    assert plans.chunks(1, 7) is not None
    plans.drop(1, 7)
    assert plans.chunks(1, 7) is None


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (([1, 1], [2, 2]), "names a slice twice"),
        (([], []), "without slices"),
        (([1], [2, 2]), "differ in number"),
        (([1], [-1]), "cannot be"),
        (([1], [300]), "of 1200 bytes is over the 1000"),
        (([1], [3]), "has 2 elements, not 3"),
    ],
)
def test_a_chunk_that_cannot_be_is_refused(t: Any, entry: tuple[list[int], list[int]], text: str) -> None:
    plans, _ = book()
    with pytest.raises(ProtocolError, match=text):
        plans.define(0, m.DefinePlan(1, 1, [t.dense(*entry)]))
    assert plans.chunks(0, 1) is None
