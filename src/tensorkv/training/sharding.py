"""shard: the part of a data set that is this worker's."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler, Subset

from tensorkv.arguments import flag
from tensorkv.errors import InvalidArgument
from tensorkv.launch.place import num_workers, rank

_NO_DATA = (Mapping, Set, str, bytes, torch.nn.Module)


def shard(data: Any, *, even: bool = False, seed: int = 0) -> Any:
    """Return this worker's part of a data set: every n-th element, where n is the number of workers.

    Parts differ in length by one at most. Outside a job it returns everything. The data set itself must be
    the same on all workers, in the same order: seed what shuffles or splits it before.

    Args:
        data: one of these. What is returned is of the same kind.
            - a map-style Dataset of torch, or anything else with a length that is indexed by number, for a
              `torch.utils.data.Subset`; a list, tuple, tensor, NumPy array or range for one of its own type;
            - a `datasets.Dataset` of Hugging Face; of one of its streams each worker takes whole files, if
              their number allows it;
            - an IterableDataset or any other iterable: each worker reads all of it and skips the others'
              elements;
            - a Sampler: every worker must go through the same order. Torch's generator, and one that the
              sampler has, are seeded alike on all workers for each pass; other sources of random numbers are
              yours to seed.
        even: leave out the last elements, fewer than n, so that all parts are equally long: where workers
            meet after each epoch, as in `average`, they must have made the same number of steps. Not for
            streams of Hugging Face.
        seed: with a sampler: of the generators. The same on all workers.

    Raises:
        InvalidArgument: a DataLoader, whose batches are made already; a mapping; a set, which has another
            order in each process; or nothing that can be gone through.

    Example:
        ```python
        data = torch.utils.data.TensorDataset(torch.arange(10.0))
        loader = torch.utils.data.DataLoader(tensorkv.shard(data), batch_size=4, shuffle=True)
        print(len(loader.dataset))  # 10
        ```
    """
    mine, of_all, even = rank(), num_workers(), flag("even", even)
    if isinstance(data, DataLoader):
        raise InvalidArgument(
            "shard of a DataLoader would make the batches smaller or fewer: shard its data set, as in "
            "DataLoader(tensorkv.shard(data), batch_size=...)"
        )
    indexed = hasattr(data, "__getitem__")
    is_number = isinstance(data, (torch.Tensor, np.ndarray)) and data.ndim == 0
    if isinstance(data, _NO_DATA) or is_number or not (indexed or hasattr(data, "__iter__")):
        raise InvalidArgument(
            f"shard of a {type(data).__name__}: pass a data set, a sampler or an iterable, in one order"
        )
    if isinstance(data, Sampler):
        return _ShardedSampler(data, mine, of_all, even, seed)
    datasets = sys.modules.get("datasets")  # of Hugging Face, if the script has loaded it
    if datasets is not None and isinstance(data, datasets.Dataset):
        return data.select(_indices(len(data), mine, of_all, even))
    if datasets is not None and isinstance(data, datasets.IterableDataset):
        return datasets.distributed.split_dataset_by_node(data, rank=mine, world_size=of_all)
    if isinstance(data, (list, tuple, range, torch.Tensor, np.ndarray)):
        chosen = _indices(len(data), mine, of_all, even)
        return data[chosen.start : chosen.stop : chosen.step]
    if isinstance(data, IterableDataset) or not (indexed and hasattr(data, "__len__")):
        return _ShardedIterable(data, mine, of_all, even)
    return Subset(data, _indices(len(data), mine, of_all, even))


def _indices(length: int, rank: int, num_workers: int, even: bool) -> range:
    return range(rank, length - length % num_workers if even else length, num_workers)


def _every_nth(data: Iterable[Any], rank: int, num_workers: int, even: bool) -> Iterator[Any]:
    """Yield a worker's elements. For even parts, one is yielded when all workers have theirs."""
    elements = iter(data)
    while group := list(itertools.islice(elements, num_workers)):
        if len(group) > rank and not (even and len(group) < num_workers):
            yield group[rank]


class _ShardedIterable(IterableDataset[Any]):
    """Every n-th element of an iterable."""

    def __init__(self, data: Iterable[Any], rank: int, num_workers: int, even: bool) -> None:
        self.data = data
        self._part = (rank, num_workers, even)

    def __iter__(self) -> Iterator[Any]:
        return _every_nth(self.data, *self._part)

    def __len__(self) -> int:
        return len(_indices(len(self.data), *self._part))  # type: ignore[arg-type]  # a TypeError if it has none


class _ShardedSampler(Sampler[Any]):
    """Every n-th index of a sampler that goes through the same order on all workers."""

    def __init__(self, sampler: Sampler[Any], rank: int, num_workers: int, even: bool, seed: int) -> None:
        self.sampler = sampler
        self._part = (rank, num_workers, even)
        self._seed = seed
        self._num_passes = 0

    def __iter__(self) -> Iterator[Any]:
        self._num_passes += 1
        return _every_nth(self._in_order(self._seed + self._num_passes), *self._part)

    def _in_order(self, seed: int) -> Iterator[Any]:
        """Yield all indices. Whenever the sampler runs, torch's generator is that of this pass."""
        for generator in _generators_of(self.sampler):
            generator.manual_seed(seed)
        indices: Iterator[Any] | None = None
        state = torch.Generator().manual_seed(seed).get_state()
        while True:
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(state)
                indices = iter(self.sampler) if indices is None else indices
                try:
                    index = next(indices)
                except StopIteration:
                    return
                state = torch.get_rng_state()
            yield index

    def __len__(self) -> int:
        num_indices = len(self.sampler)  # type: ignore[arg-type]  # if it has one
        return len(_indices(num_indices, *self._part))


def _generators_of(sampler: Any) -> Iterator[torch.Generator]:
    """Yield the generators of a sampler, and of those that it takes its indices from."""
    while sampler is not None:
        generator = getattr(sampler, "generator", None)
        if isinstance(generator, torch.Generator):
            yield generator
        sampler = getattr(sampler, "sampler", None)
