"""Workers that meet: they compare what they have, and take over what rank 0 has."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tensorkv
from tensorkv.errors import SettingMismatch
from tensorkv.store import KVStore
from tensorkv.testing.cluster import run_job
from tensorkv.training import start
from tensorkv.training.start import describe, meeting


def as_workers(fn: Any, num_workers: int = 3) -> list[Any]:
    return run_job(fn, num_workers=num_workers, num_servers=2, timeout_s=30.0)


def test_equal_lines_pass_and_workers_may_meet_again() -> None:
    def work(kv: KVStore) -> list[str]:
        for number in range(3):
            with meeting(kv) as others:
                others.check_alike("list", ["one", "größer"])
                others.check_alike("list", [str(number)])
        return kv.keys()

    assert as_workers(work) == [[]] * 3  # the workers' own store has nothing of it


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (["a", "B"], "the list of worker 1 is not that of rank 0: part 1 is 'B' there, and 'b' on rank 0"),
        (["a"], "it has 1 parts, and 2 on rank 0; the first that only one has is 'b'"),
        (["a", "b", "x" * 10_000], "it has 3 parts, and 2 on rank 0; the first that only one has is 'xxx"),
    ],
)
def test_a_difference_is_one_error_with_one_text(lines: list[str], text: str) -> None:
    def work(kv: KVStore) -> str:
        mine = lines if kv.rank else ["a", "b"]
        with pytest.raises(SettingMismatch) as caught, meeting(kv) as others:
            others.check_alike("list", mine)
        kv.barrier()  # the job goes on
        return str(caught.value)

    first, *others = as_workers(work)
    assert text in first
    assert others == [first] * 2


def test_values_become_those_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "BATCH_BYTES", 16)  # so that several batches are needed

    def work(kv: KVStore) -> list[Any]:
        mine = {
            "floats": torch.full((3,), float(kv.rank)),
            "parameter": torch.nn.Parameter(torch.full((2, 4), kv.rank + 1.0)),
            "count": torch.tensor(kv.rank + 5),
            "flags": torch.tensor([kv.rank == 0, True]),
            "half": torch.full((5,), kv.rank + 0.5, dtype=torch.bfloat16),
            "none": torch.zeros(0, 2),
        }
        with meeting(kv) as others:
            others.share(mine)
        return [each.tolist() for each in mine.values()]

    first, *others = as_workers(work)
    assert first == [[0.0] * 3, [[1.0] * 4] * 2, 5, [True, True], [0.5] * 5, []]
    assert others == [first] * 2


def test_a_single_worker_asks_nobody() -> None:
    with tensorkv.create("local") as kv, meeting(kv) as others:
        value = torch.ones(1)
        others.check_alike("list", ["a"])
        others.share({"value": value})
        assert value == 1


def test_a_line_tells_what_must_be_alike() -> None:
    assert describe("w", torch.zeros(2, 3)) == "w: 2x3 of torch.float32, requires_grad=False"
    assert describe("n", torch.tensor(1)) == "n: a number of torch.int64, requires_grad=False"
