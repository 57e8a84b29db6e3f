"""Each element of a data set is exactly one worker's, whatever the data set is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)

import tensorkv
from tensorkv.errors import InvalidArgument
from tensorkv.training import sharding

NUM_WORKERS = 3


def shards(monkeypatch: pytest.MonkeyPatch, make: Any, seed: int = 0, even: bool = False) -> list[Any]:
    """Return the part of each worker; each has data of its own."""
    found = []
    monkeypatch.setattr(sharding, "num_workers", lambda: NUM_WORKERS)  # as a launcher would have said
    for rank in range(NUM_WORKERS):
        monkeypatch.setattr(sharding, "rank", lambda rank=rank: rank)
        found.append(tensorkv.shard(make(), seed=seed, even=even))
    return found


class Squares(Dataset[int]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < 10:
            raise IndexError(index)
        return index * index


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(10))


class Stream10(Stream):
    def __len__(self) -> int:
        return 10


@pytest.mark.parametrize(
    "data",
    [list(range(10)), tuple(range(10)), range(10), torch.arange(10), np.arange(10)],
    ids=lambda each: type(each).__name__,
)
def test_sequences_stay_what_they_are(monkeypatch: pytest.MonkeyPatch, data: Any) -> None:
    parts = shards(monkeypatch, lambda: data)
    assert {type(each) for each in parts} == {type(data)}
    assert [len(each) for each in parts] == [4, 3, 3]
    assert sorted(int(each) for part in parts for each in part) == list(range(10))


def test_a_data_set_becomes_a_subset(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = shards(monkeypatch, Squares)
    assert all(isinstance(each, Subset) for each in parts)
    assert [list(each) for each in parts] == [[0, 9, 36, 81], [1, 16, 49], [4, 25, 64]]
    loader = DataLoader(parts[0], batch_size=2, shuffle=True)
    assert sorted(int(each) for batch in loader for each in batch) == [0, 9, 36, 81]


@pytest.mark.parametrize("make", [Stream, lambda: (each for each in range(10))], ids=["dataset", "generator"])
def test_of_a_stream_each_worker_takes_its_elements(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    parts = shards(monkeypatch, make)
    assert [[int(each) for each in DataLoader(part, batch_size=None)] for part in parts] == [
        [0, 3, 6, 9],
        [1, 4, 7],
        [2, 5, 8],
    ]


def test_a_random_sampler_is_in_the_same_order_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = shards(monkeypatch, lambda: RandomSampler(range(10)))
    state = torch.get_rng_state()
    passes = []
    for _ in range(2):
        torch.manual_seed(torch.seed() % 1000)  # workers draw numbers of their own
        found = [list(each) for each in parts]
        assert [len(each) for each in found] == [len(each) for each in parts] == [4, 3, 3]
        assert sorted(index for each in found for index in each) == list(range(10))
        passes.append(found)
    assert passes[0] != passes[1]
    torch.set_rng_state(state)
    before = torch.get_rng_state()
    list(parts[0])
    assert torch.equal(torch.get_rng_state(), before)  # it leaves the script's numbers alone


def test_a_batch_sampler_deals_out_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = shards(monkeypatch, lambda: BatchSampler(SequentialSampler(range(10)), 3, drop_last=False))
    assert [list(each) for each in parts] == [[[0, 1, 2], [9]], [[3, 4, 5]], [[6, 7, 8]]]


def test_outside_a_job_it_is_everything() -> None:
    assert tensorkv.shard([1, 2, 3]) == [1, 2, 3]
    assert len(tensorkv.shard(TensorDataset(torch.zeros(5)))) == 5


@pytest.mark.parametrize(
    "data",
    [
        DataLoader([1]),
        {"a": 1},
        "text",
        3,
        None,
        torch.nn.Linear(1, 1),
        {"a", "b"},
        torch.tensor(1.0),
        np.array(1.0),
    ],
    ids=lambda each: type(each).__name__,
)
def test_what_is_no_data_set_is_refused(data: Any) -> None:
    with pytest.raises(InvalidArgument, match="shard"):
        tensorkv.shard(data)


@pytest.mark.parametrize(
    "make",
    [
        lambda: list(range(11)),
        Stream10,
        lambda: iter(range(11)),
        lambda: SequentialSampler(range(11)),
        Squares,
    ],
    ids=["list", "dataset", "iterator", "sampler", "map"],
)
def test_even_parts_are_equally_long(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    parts = [list(each) for each in shards(monkeypatch, make, even=True)]
    assert [len(each) for each in parts] == [3, 3, 3]
    assert len({each for part in parts for each in part}) == 9


def test_a_generator_of_the_sampler_is_seeded_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> BatchSampler:
        generator = torch.Generator().manual_seed(torch.seed() % 1000)  # another on each worker
        return BatchSampler(RandomSampler(range(12), generator=generator), 2, drop_last=False)

    parts = shards(monkeypatch, make)
    found = [sorted(index for part in parts for batch in part for index in batch) for _ in range(2)]
    assert found == [list(range(12))] * 2


def test_a_sampler_may_have_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            while True:
                yield int(torch.randint(1000, ()))

    parts = [iter(each) for each in shards(monkeypatch, Endless)]
    in_turn = [next(parts[number % 3]) for number in range(30)]
    torch.manual_seed(1)  # of seed 0, pass 1
    assert in_turn == [int(torch.randint(1000, ())) for _ in range(30)]


def test_a_stream_with_a_length_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [len(each) for each in shards(monkeypatch, Stream10)] == [4, 3, 3]
    with pytest.raises(TypeError):
        len(shards(monkeypatch, Stream)[0])
