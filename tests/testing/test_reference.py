"""The reference, on examples small enough to check by hand. Random programs: tests/conformance."""

from __future__ import annotations

import pytest
import torch

from tensorkv import ABSENT
from tensorkv.errors import (
    KeyAlreadyInitialized,
    KeyNotInitialized,
    ShapeMismatch,
    UncommittedPush,
    UpdaterError,
)
from tensorkv.store import CommitResult
from tensorkv.testing.reference import ReferenceStore, WouldWait
from tensorkv.testing.suite import refuse_negative


def vector(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float32)


def store(workers: int, reduction: str = "sum", *, is_async: bool = False) -> ReferenceStore:
    made = ReferenceStore(workers, reduction, is_async)
    made.init(0, "w", vector(0, 0))
    return made


def test_a_round_waits_for_every_worker() -> None:
    kv = store(2)
    kv.push(1, "w", [vector(1, 2), vector(1, 1)])
    with pytest.raises(WouldWait):
        kv.pull(1, "w")
    with pytest.raises(WouldWait):
        kv.push(1, "w", [vector(9, 9)])
    assert kv.pull(0, "w").tolist() == [0, 0]
    assert kv.info(0, "w") == (0, 0)
    kv.push(0, "w", [vector(10, 10)])
    assert kv.pull(0, "w").tolist() == kv.pull(1, "w").tolist() == [12, 13]
    assert kv.info(0, "w") == (1, 1)


def test_ranks_are_added_in_order() -> None:
    kv = store(3)
    for rank, value in ((2, 1.0), (0, 1e8), (1, -1e8)):
        kv.push(rank, "w", [vector(value, value)])
    assert kv.pull(0, "w").tolist() == [1, 1]


def test_the_updater_is_that_of_rank_0s_push() -> None:
    kv = store(2)
    kv.push(0, "w", [vector(1, 1)])
    kv.set_updater(0, "add")
    kv.push(1, "w", [vector(1, 1)])
    assert kv.pull(0, "w").tolist() == [2, 2]
    for rank in (1, 0):
        kv.push(rank, "w", [vector(1, 1)])
    assert kv.pull(0, "w").tolist() == [4, 4]


def test_mean_and_absent() -> None:
    kv = store(2, "mean")
    kv.push(0, "w", [vector(1, 1), vector(2, 2)])
    kv.push(1, "w", [vector(6, 6)])
    assert kv.pull(0, "w").tolist() == [3, 3]
    kv.push(0, "w", ABSENT)
    kv.push(1, "w", [vector(5, 5)])
    assert kv.pull(0, "w").tolist() == [5, 5]
    for rank in (0, 1):
        kv.push(rank, "w", ABSENT)
    assert kv.pull(0, "w").tolist() == [5, 5]
    assert kv.info(0, "w") == (3, 2)


def test_leaving() -> None:
    kv = store(3)
    kv.push(2, "w", [vector(100, 100)])
    kv.leave(2)
    kv.push(0, "w", [vector(1, 1)])
    with pytest.raises(WouldWait):
        kv.pull(0, "w")
    kv.leave(1)
    assert kv.pull(0, "w").tolist() == [101, 101]
    kv.push(0, "w", [vector(1, 1)])
    assert kv.pull(0, "w").tolist() == [1, 1]


def test_commit_clips_and_skips() -> None:
    kv = store(2)
    for rank in (0, 1):
        kv.push(rank, "w", [vector(1.5, 2)], apply=False)
    with pytest.raises(UncommittedPush):
        kv.pull(0, "w")
    assert kv.commit(0, apply=False) is None
    assert kv.commit(1, apply=False) == CommitResult(applied=False, norm=5.0)
    assert kv.commit(0, max_norm=2.5) is None
    assert kv.commit(1, max_norm=2.5) == CommitResult(applied=True, norm=5.0)
    assert torch.allclose(kv.pull(0, "w"), vector(1.5, 2))
    for rank in (0, 1):
        kv.push(rank, "w", [vector(9, 9)], apply=False)
    kv.commit(0, skip=True)
    assert kv.commit(1) == CommitResult(applied=False, norm=None)
    for rank in (0, 1):
        kv.push(rank, "w", [vector(9, float("nan"))], apply=False)
        last = kv.commit(rank, check_finite=True)
    assert last is not None
    assert not last.applied
    assert torch.allclose(kv.pull(0, "w"), vector(1.5, 2))
    assert kv.info(0, "w") == (3, 1)


def test_leaving_drops_what_was_not_committed() -> None:
    kv = store(2)
    kv.push(1, "w", [vector(9, 9)], apply=False)
    kv.leave(1)
    kv.push(0, "w", [vector(1, 1)])
    assert kv.pull(0, "w").tolist() == [1, 1]


def test_a_key_that_is_deleted_and_made_anew() -> None:
    kv = store(1)
    with pytest.raises(KeyAlreadyInitialized):
        kv.init(0, "w", vector(1))
    kv.push(0, "w", [vector(1, 1)])
    kv.delete(0, "w")
    with pytest.raises(KeyNotInitialized):
        kv.pull(0, "w")
    kv.init(0, "w", vector(1))
    assert kv.info(0, "w") == (0, 0)
    with pytest.raises(ShapeMismatch):
        kv.push(0, "w", [vector(1, 1)])


def test_a_pull_before_a_delete_reads_no_later_round() -> None:
    kv = store(2)
    kv.push(1, "w", [vector(1, 1)])
    entry = kv.entry(1, "w")
    kv.delete(1, "w")
    with pytest.raises(WouldWait):
        kv.read(1, "w", entry)
    for _ in range(2):
        kv.push(0, "w", [vector(2, 2)])
    assert kv.pull(0, "w").tolist() == [2, 2]
    assert kv.read(1, "w", entry).tolist() == [3, 3]
    kv = store(2)
    kv.delete(1, "w")
    kv.push(0, "w", [vector(2, 2)])
    assert kv.read(1, "w", kv.entries["w"]).tolist() == [0, 0]


def test_a_key_is_there_until_all_have_deleted_it() -> None:
    kv = store(2)
    kv.push(0, "w", [vector(1, 1)])
    with pytest.raises(WouldWait):
        kv.pull(0, "w")
    kv.push(1, "w", [vector(2, 2)])
    kv.delete(1, "w")
    assert (kv.keys(0), kv.keys(1)) == (["w"], [])
    with pytest.raises(KeyNotInitialized):
        kv.delete(1, "w")
    assert kv.pull(0, "w").tolist() == [3, 3]
    kv.push(0, "w", [vector(1, 1)])
    assert kv.pull(0, "w").tolist() == [1, 1]
    kv.delete(0, "w")
    kv.init(0, "w", vector(5, 5))
    kv.delete(0, "w")
    with pytest.raises(WouldWait):
        kv.init(0, "w", vector(7, 7))
    kv.leave(1)
    kv.init(0, "w", vector(7, 7))
    assert kv.pull(0, "w").tolist() == [7, 7]


def test_an_updater_that_raises() -> None:
    kv = store(2)
    kv.set_updater(0, refuse_negative)
    for rank in (0, 1):
        kv.push(rank, "w", [vector(-1, 1)])
    for rank in (0, 1):
        with pytest.raises(UpdaterError, match="negative gradient"):
            kv.pull(rank, "w")
        assert kv.pull(rank, "w").tolist() == [0, 0]
    assert kv.info(0, "w") == (1, 0)


def test_asynchronous() -> None:
    kv = store(2, is_async=True)
    kv.set_updater(0, "add")
    for rank in (1, 1, 0, 1):
        kv.push(rank, "w", [vector(1, 1)])
    assert kv.pull(0, "w").tolist() == [4, 4]
    assert kv.info(1, "w") == (4, 4)
