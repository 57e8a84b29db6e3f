"""The mean of trees of arrays over workers: same structure, same kinds, same bits everywhere."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv.errors import DtypeMismatch, InvalidArgument, SettingMismatch
from tensorkv.store import KVStore
from tensorkv.testing.cluster import run_job
from tensorkv.training.averaging import Averager

Pair = namedtuple("Pair", "first second")


def as_workers(fn: Any, num_workers: int = 2) -> list[Any]:
    return run_job(fn, num_workers=num_workers, num_servers=1, reduction="mean", timeout_s=30.0)


def test_every_leaf_is_the_mean_and_of_its_kind() -> None:
    def work(kv: KVStore) -> Any:
        mine = float(kv.rank)
        tree = {
            "w": torch.full((2,), mine),
            "rest": [np.full((1, 2), mine, np.float64), (mine, None)],
            "pair": Pair(torch.tensor(mine, dtype=torch.bfloat16), np.float32(mine)),
            "view": torch.arange(4.0).reshape(2, 2).T + mine,
        }
        found = Averager(kv).average(tree)
        assert tree["w"].tolist() == [mine] * 2
        return found

    for found in as_workers(work, 3):
        assert list(found) == ["w", "rest", "pair", "view"]
        assert found["w"].tolist() == [1.0, 1.0]
        array, (number, nothing) = found["rest"]
        assert (type(array), array.dtype, array.tolist()) == (np.ndarray, np.float64, [[1.0, 1.0]])
        assert (type(number), number, nothing) == (float, 1.0, None)
        assert isinstance(found["pair"], Pair)
        assert found["pair"].first.dtype == torch.bfloat16
        assert (type(found["pair"].second), float(found["pair"].second)) == (np.float32, 1.0)
        assert found["view"].tolist() == [[1.0, 3.0], [2.0, 4.0]]


def test_other_trees_may_follow_and_the_same_again() -> None:
    def work(kv: KVStore) -> list[float]:
        found = []
        averager = Averager(kv)
        for step in range(4):
            found.append(averager.average(torch.tensor(float(step + kv.rank))).item())
            found.append(averager.average([torch.tensor([1.0]), torch.tensor(2.0 * kv.rank)])[1].item())
        assert len(kv) == 4
        return found

    for found in as_workers(work):
        assert found == [0.5, 1.0, 1.5, 1.0, 2.5, 1.0, 3.5, 1.0]


@pytest.mark.parametrize(
    "trees",
    [
        (torch.zeros(2), torch.zeros(3)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        ({"a": 1.0, "b": 2.0}, {"a": 1.0, "c": 2.0}),
        ([1.0, 2.0], [1.0]),
        ((), 1.0),
    ],
)
def test_trees_that_differ_are_an_error_on_all(trees: tuple[Any, Any]) -> None:
    def work(kv: KVStore) -> list[float]:
        averager = Averager(kv)
        for number in range(2):
            averager.average(trees[0])
            if number:
                with pytest.raises(SettingMismatch, match="trees differ"):
                    averager.average(trees[kv.rank])
        return averager.average([1.0 + kv.rank])  # and they may go on

    assert as_workers(work) == [[1.5], [1.5]]


def test_dicts_are_alike_in_any_order_and_keep_theirs() -> None:
    def work(kv: KVStore) -> Any:
        pairs = [("a", 1.0), ("b", 100.0), (3, 0.0)]
        found = Averager(kv).average(OrderedDict(pairs if kv.rank else reversed(pairs)))
        assert type(found) is OrderedDict
        return list(found.items())

    first, second = as_workers(work)
    assert first == [(3, 0.0), ("b", 100.0), ("a", 1.0)]
    assert second == first[::-1]


def test_reversed_arrays_are_taken() -> None:
    assert tensorkv.average(np.arange(3.0)[::-1]).tolist() == [2.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("leaf", "error"), [(torch.tensor(1), DtypeMismatch), ("text", InvalidArgument), (3, InvalidArgument)]
)
def test_what_has_no_mean_is_refused(leaf: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"leaf '\[1\]' of the tree"):
        tensorkv.average([torch.zeros(1), leaf])


def test_outside_a_job_it_returns_copies() -> None:
    mine = {"w": torch.ones(2), "empty": [], "none": None}
    found = tensorkv.average(mine)
    assert found["w"].tolist() == [1.0, 1.0]
    assert found["w"] is not mine["w"]
    assert (found["empty"], found["none"]) == ([], None)
    assert tensorkv.average(()) == ()
