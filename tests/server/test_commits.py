"""Commits on one server: who agrees, what was dropped meanwhile, and norms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tensorkv.errors import CommitMismatch, DtypeMismatch
from tensorkv.server.cohorts import Cohort
from tensorkv.server.commits import CommitGather, all_finite, norms_of, scale, unscalable
from tensorkv.server.layouts import Chunk, Contribution, Layout, Slice
from tensorkv.server.memory import EMPTY
from tensorkv.server.slots import Slot
from tensorkv.updaters.base import Assign
from tensorkv.updaters.settings import Setting
from tensorkv.wire.messages import Commit, Push


def a_slice(key: str) -> Slice:
    cohort = Cohort({0, 1, 2})
    made = Slice(ord(key), key, 0, 2, (2,), Slot(torch.zeros(2)), 0, Setting(Assign()), cohort)
    cohort.add(made)
    return made


SLICES = [a_slice(key) for key in "abc"]


def contribution(worker: int) -> Contribution:
    layout = Layout([])
    chunk = Chunk(layout, [], torch.float32, False, 0)
    return Contribution(worker, Push(1, 0, False, 0), chunk, layout, EMPTY, 1, 0)


def gather(*asked: tuple[dict[str, Any], set[int]]) -> CommitGather:
    made = CommitGather(1)
    for worker, (arguments, slices) in enumerate(asked):
        every = {"max_norm": None, "skip": False, "check_finite": False, "apply": True, **arguments}
        made.add(worker, Commit(worker + 1, 1, **every), {SLICES[i]: contribution(worker) for i in slices})
    return made


def test_equal_commits_agree_and_one_skip_is_enough() -> None:
    made = gather(({"max_norm": 2.0}, {0, 1}), ({"max_norm": 2.0, "skip": True}, {1, 0}))
    assert made.disagreement() is None
    assert (made.skip, made.max_norm, made.check_finite, made.wants_norm) == (True, 2.0, False, True)
    made = gather(({}, set()))
    assert made.disagreement() is None
    assert (made.skip, made.wants_norm) == (False, False)
    assert gather(({"check_finite": True}, set())).wants_norm
    made = gather(({"apply": False}, set()))
    assert (made.applies, made.wants_norm) == (False, True)


@pytest.mark.parametrize("other", [{"max_norm": 3.0}, {"check_finite": True}, {"apply": False}])
def test_other_arguments_are_a_mismatch(other: dict[str, Any]) -> None:
    error = gather(({}, {0}), ({}, {0}), (other, {0})).disagreement()
    assert isinstance(error, CommitMismatch)
    assert "rank 2" in str(error)
    assert str(next(iter(other.values()))) in str(error)


def test_other_keys_are_a_mismatch_that_names_them() -> None:
    error = gather(({}, {0, 1}), ({}, {1, 2})).disagreement()
    assert isinstance(error, CommitMismatch)
    assert "only one of them has pushed 'a', 'c'" in str(error)


def test_what_was_dropped_since_is_left_out() -> None:
    made = gather(({}, {0, 1}), ({}, {0}))
    kept = [made.pushes[worker][SLICES[0]] for worker in range(2)]
    SLICES[0].cohort.inbox = dict(enumerate(kept))
    SLICES[1].cohort.inbox = {0: contribution(0)}  # of a later round
    made.forget_dropped(lambda each: True)
    assert made.pushes == {0: {SLICES[0]: kept[0]}, 1: {SLICES[0]: kept[1]}}
    assert made.disagreement() is None
    made.forget_dropped(lambda each: each is not SLICES[0])  # it was deleted
    assert made.pushes == {0: {}, 1: {}}


def test_norms_are_taken_of_every_dtype() -> None:
    tensors = [
        torch.tensor([3.0, 4.0]),
        torch.tensor([3.0, 4.0], dtype=torch.float16),
        torch.tensor([3 + 4j]),
        torch.tensor([3, 4]),
        torch.empty(0),
        torch.tensor([60000.0], dtype=torch.float16),
    ]
    assert norms_of(tensors) == pytest.approx([5.0, 5.0, 5.0, 5.0, 0.0, 59968.0], rel=1e-3)
    huge = torch.full((4,), 1e300, dtype=torch.float64)
    assert norms_of([huge, huge * 1e-300 * 1e-300]) == pytest.approx([2e300, 2e-300])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows(bad: float) -> None:
    tensor = torch.tensor([1.0, bad])
    assert not math.isfinite(norms_of([tensor])[0])
    assert not all_finite([torch.ones(2), tensor])
    assert all_finite([torch.ones(2), torch.tensor([1, 2])])


def test_only_floats_can_be_scaled() -> None:
    assert unscalable("w", torch.complex64) is None
    assert isinstance(unscalable("w", torch.int32), DtypeMismatch)
    tensor = torch.tensor([2.0, 4.0])
    scale(tensor, 0.5)
    assert tensor.tolist() == [1.0, 2.0]
