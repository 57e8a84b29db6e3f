"""shard: the part of a data set that is this worker's."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler, Subset

from tensorkv.errors import InvalidArgument
from tensorkv.launch.place import num_workers, rank

_NO_DATA = (Mapping, str, bytes, torch.nn.Module)


def shard(data: Any, *, seed: int = 0) -> Any:
    """Return this worker's part of a data set: every n-th element, where n is the number of workers.

    Parts differ in length by one at most, and need not be equally long: a worker that has no more data may
    leave (`DistributedOptimizer.close`). Outside a job it returns everything.

    Args:
        data: one of these. What is returned is of the same kind.
            - a map-style Dataset of torch, or anything else with a length that is indexed by number, for a
              `torch.utils.data.Subset`; a list, tuple, tensor, NumPy array or range for one of its own type;
            - a `datasets.Dataset` of Hugging Face; of one of its streams each worker takes whole files, if
              their number allows it;
            - an IterableDataset or any other iterable: each worker reads all of it and skips the others'
              elements;
            - a Sampler: every worker must go through the same order, so a random sampler is run with torch's
              generator seeded alike on all workers; it yields another order each time that it is gone
              through.
        seed: with a sampler: of the generator. The same on all workers.

    Raises:
        InvalidArgument: a DataLoader, whose batches are made already, a mapping, or nothing that can be gone
            through.

    Example:
        ```python
        data = torch.utils.data.TensorDataset(torch.arange(10.0))
        loader = torch.utils.data.DataLoader(tensorkv.shard(data), batch_size=4, shuffle=True)
        print(len(loader.dataset))  # 10
        ```
    """
    mine, of_all = rank(), num_workers()
    if isinstance(data, DataLoader):
        raise InvalidArgument(
            "shard of a DataLoader would make the batches smaller or fewer: shard its data set, as in "
            "DataLoader(tensorkv.shard(data), batch_size=...)"
        )
    if isinstance(data, _NO_DATA) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise InvalidArgument(f"shard of a {type(data).__name__}: pass a data set, a sampler or an iterable")
    if isinstance(data, Sampler):
        return _ShardedSampler(data, mine, of_all, seed)
    datasets = sys.modules.get("datasets")  # of Hugging Face, if the script has loaded it
    if datasets is not None and isinstance(data, datasets.Dataset):
        return data.shard(num_shards=of_all, index=mine, contiguous=False)
    if datasets is not None and isinstance(data, datasets.IterableDataset):
        return datasets.distributed.split_dataset_by_node(data, rank=mine, world_size=of_all)
    if isinstance(data, (list, tuple, range, torch.Tensor, np.ndarray)):
        return data[mine::of_all]
    if isinstance(data, IterableDataset) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        return _ShardedIterable(data, mine, of_all)
    return Subset(data, range(mine, len(data), of_all))


class _ShardedIterable(IterableDataset[Any]):
    """Every n-th element of an iterable."""

    def __init__(self, data: Iterable[Any], rank: int, num_workers: int) -> None:
        self.data = data
        self._rank = rank
        self._num_workers = num_workers

    def __iter__(self) -> Iterator[Any]:
        return islice(self.data, self._rank, None, self._num_workers)


class _ShardedSampler(Sampler[Any]):
    """Every n-th index of a sampler that goes through the same order on all workers."""

    def __init__(self, sampler: Sampler[Any], rank: int, num_workers: int, seed: int) -> None:
        self.sampler = sampler
        self._rank = rank
        self._num_workers = num_workers
        self._seed = seed
        self._num_passes = 0

    def __iter__(self) -> Iterator[Any]:
        self._num_passes += 1
        with torch.random.fork_rng(
            devices=[]
        ):  # random samplers draw from torch's generator, when they begin
            torch.manual_seed(self._seed + self._num_passes)
            chosen = list(islice(self.sampler, self._rank, None, self._num_workers))
        return iter(chosen)

    def __len__(self) -> int:
        num_indices = len(self.sampler)  # type: ignore[arg-type]  # if it has one
        return len(range(self._rank, num_indices, self._num_workers))
