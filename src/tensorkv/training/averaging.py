"""average: the mean of a tree of arrays over all workers."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, final

import numpy as np
import torch

from tensorkv.arrays import to_tensor
from tensorkv.errors import InvalidArgument
from tensorkv.launch.place import find_place
from tensorkv.store import KVStore
from tensorkv.stores.registry import create

STORE = "tensorkv.average"
"""Name of the store in which the workers of a job meet."""

_lock = threading.Lock()
_averagers: dict[int, Averager] = {}  # by process id; the first call opens it


def average(tree: Any) -> Any:
    """Return the mean over all workers of every array of a tree.

    It serves training loops of frameworks that have no processes of their own, JAX with optax for example,
    and numbers such as a validation loss. It changes nothing in place, and outside a job returns copies.

    Args:
        tree: a tensor, a NumPy or JAX array, a number, or dicts, lists and tuples of these; with JAX loaded,
            whatever is a tree to JAX. All workers pass the same structure, shapes and dtypes.

    Returns:
        A tree of the same structure, with arrays of the same kinds, dtypes and devices. None stays None.

    Raises:
        InvalidArgument: there is something in it that is no array.
        InvalidValue: a tensor that a store does not take: see `KVStore.init`.
        DtypeMismatch: an array of integers, whose mean is none.
        SettingMismatch: shapes or dtypes differ between the workers.
        WaitTimeout, PeerLostError.

    Blocks until all workers that have not left have made the call. Sums are taken in rank order, so the
    result is the same on all workers, bit for bit.

    Example:
        ```python
        grads = {"w": torch.ones(2), "b": [torch.zeros(1), 3.0]}
        print(tensorkv.average(grads))  # {'w': tensor([1., 1.]), 'b': [tensor([0.]), 3.0]}
        ```
    """
    with _lock:
        found = _averagers.get(os.getpid())
        if found is None:
            kind = "local" if find_place() is None else "dist_sync"
            found = _averagers[os.getpid()] = Averager(create(kind, store=STORE, reduction="mean"))
        return found.average(tree)


@final
class Averager:
    """Averages trees over the workers of a store, which takes means and serves nothing else."""

    def __init__(self, kv: KVStore) -> None:
        self._kv = kv
        self._keys: dict[tuple[Any, ...], list[str]] = {}

    def average(self, tree: Any) -> Any:
        """Return the mean of a tree. Every worker makes the same calls in the same order."""
        leaves, rebuild = _flatten(tree)
        tensors = [_to_tensor(number, each) for number, each in enumerate(leaves)]
        if not tensors:
            return rebuild([])
        means = [torch.empty_like(each) for each in tensors]
        self._kv.pushpull(self._keys_of(tensors), tensors, out=means)
        return rebuild([_like(leaf, mean) for leaf, mean in zip(leaves, means, strict=True)])

    def _keys_of(self, tensors: Sequence[torch.Tensor]) -> list[str]:
        """Return the keys of a kind of tree, the gradients of each step say; the first of its kind makes
        them."""
        kind = tuple((each.shape, each.dtype) for each in tensors)
        keys = self._keys.get(kind)
        if keys is None:
            keys = [f"{len(self._keys)}.{number}" for number in range(len(tensors))]
            self._kv.init(keys, [torch.zeros_like(each, device="cpu") for each in tensors])
            self._keys[kind] = keys
        return keys


def _flatten(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Return the leaves of a tree, and a function that makes the same tree of other leaves."""
    jax = sys.modules.get("jax")
    if jax is not None:
        leaves, structure = jax.tree_util.tree_flatten(tree)
        return leaves, lambda found: jax.tree_util.tree_unflatten(structure, found)
    leaves = []
    place = _places(tree, leaves)
    return leaves, lambda found: place(found)


def _places(tree: Any, leaves: list[Any]) -> Callable[[Sequence[Any]], Any]:
    """Append the leaves of a tree to a list; return a function that builds it of a list like that."""
    if tree is None:
        return lambda _: None
    if isinstance(tree, dict):
        parts = {name: _places(each, leaves) for name, each in tree.items()}
        return lambda found: {name: part(found) for name, part in parts.items()}
    if isinstance(tree, (list, tuple)):
        items = [_places(each, leaves) for each in tree]
        make = type(tree)._make if hasattr(tree, "_make") else type(tree)
        return lambda found: make(item(found) for item in items)
    number = len(leaves)
    leaves.append(tree)
    return lambda found: found[number]


def _to_tensor(number: int, leaf: Any) -> torch.Tensor:
    if isinstance(leaf, (float, complex)) and not isinstance(leaf, np.generic):
        return torch.tensor(
            leaf, dtype=torch.complex128 if isinstance(leaf, complex) else torch.float64, device="cpu"
        )
    if isinstance(leaf, np.generic):
        leaf = np.asarray(leaf)
    if not isinstance(leaf, (torch.Tensor, np.ndarray)) and not hasattr(leaf, "__dlpack__"):
        raise InvalidArgument(
            f"average: leaf {number} of the tree is a {type(leaf).__name__}; pass tensors, arrays and floats"
        )
    return to_tensor(leaf, f"leaf {number}").contiguous()


def _like(leaf: Any, mean: torch.Tensor) -> Any:
    """Return a mean as an array of the kind that was given."""
    if isinstance(leaf, torch.Tensor):
        return mean
    if isinstance(leaf, (float, complex, np.generic)):
        return type(leaf)(mean.item())
    if isinstance(leaf, np.ndarray):
        return mean.numpy()
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(leaf, jax.Array):
        return jax.device_put(jax.numpy.from_dlpack(mean), leaf.sharding)
    return type(leaf)(mean)
