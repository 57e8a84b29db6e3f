"""average: the mean of a tree of arrays over all workers."""

from __future__ import annotations

import copy
import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, final

import numpy as np
import torch

from tensorkv.arrays import to_tensor
from tensorkv.errors import DtypeMismatch, InvalidArgument, SettingMismatch
from tensorkv.launch.place import find_place
from tensorkv.store import KVStore
from tensorkv.stores.registry import create
from tensorkv.training.start import NUM_DIGESTS, digests

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
    """Averages trees over the workers of a store, which takes means and serves nothing else.

    In each call the workers first compare what their trees are like, in a round of its own: a worker that
    began to exchange leaves of its own would wait for the others for ever.
    """

    def __init__(self, kv: KVStore) -> None:
        self._kv = kv
        self._keys: dict[str, list[str]] = {}

    def average(self, tree: Any) -> Any:
        """Return the mean of a tree. Every worker makes the same calls in the same order."""
        names, leaves, rebuild = _flatten(tree)
        tensors = [_to_tensor(name, each) for name, each in zip(names, leaves, strict=True)]
        kind = ", ".join(
            f"{name} {tuple(each.shape)} {each.dtype}" for name, each in zip(names, tensors, strict=True)
        )
        if self._kv.num_workers > 1:
            self._check_alike(kind)
        if not tensors:
            return rebuild([])
        means = [torch.empty_like(each) for each in tensors]
        self._kv.pushpull(self._keys_of(kind, tensors), tensors, out=means)
        return rebuild([_like(leaf, mean) for leaf, mean in zip(leaves, means, strict=True)])

    def _check_alike(self, kind: str) -> None:
        if not self._keys:
            self._kv.init(_KIND, torch.zeros(NUM_DIGESTS, dtype=torch.float64, device="cpu"))
            self._keys[_KIND] = []
        mine = digests(kind)
        if not torch.equal(self._kv.pushpull(_KIND, mine), mine):
            shown = kind if len(kind) <= _MAX_SHOWN else f"{kind[:_MAX_SHOWN]}..."
            raise SettingMismatch(
                f"average: the workers' trees differ in structure, shapes or dtypes; that of worker "
                f"{self._kv.rank} is: {shown or 'empty'}"
            )

    def _keys_of(self, kind: str, tensors: Sequence[torch.Tensor]) -> list[str]:
        """Return the keys of a kind of tree, the gradients of each step say; its first call makes them."""
        keys = self._keys.get(kind)
        if keys is None:
            keys = [f"{len(self._keys)}.{number}" for number in range(len(tensors))]
            self._kv.init(keys, [torch.zeros_like(each, device="cpu") for each in tensors])
            self._keys[kind] = keys
        return keys


_KIND = "kind"
"""Key of the digests of what a tree is like."""

_MAX_SHOWN = 1000
"""Maximum length of a description in an error."""


def _flatten(tree: Any) -> tuple[list[str], list[Any], Callable[[list[Any]], Any]]:
    """Return the names and values of a tree's leaves, and a function that makes the same tree of others."""
    jax = sys.modules.get("jax")
    if jax is not None:
        named, structure = jax.tree_util.tree_flatten_with_path(tree)
        names = [jax.tree_util.keystr(path) for path, _ in named]
        return (
            names,
            [leaf for _, leaf in named],
            lambda found: jax.tree_util.tree_unflatten(structure, found),
        )
    leaves: dict[str, Any] = {}
    place = _places(tree, "", leaves)
    return list(leaves), list(leaves.values()), lambda found: place(found)


def _places(tree: Any, name: str, leaves: dict[str, Any]) -> Callable[[Sequence[Any]], Any]:
    """Add the leaves of a tree by name; return a function that builds it of a list of others.

    Dicts are gone through in the order of their keys, as JAX does: workers may have filled them in another.
    """
    if tree is None:
        return lambda _: None
    if isinstance(tree, dict):
        parts = {key: _places(tree[key], f"{name}[{key!r}]", leaves) for key in _in_order(tree)}

        def filled(found: Sequence[Any]) -> Any:
            made = copy.copy(tree)  # an OrderedDict, say, in its own order
            made.update({key: parts[key](found) for key in tree})
            return made

        return filled
    if isinstance(tree, (list, tuple)):
        items = [_places(each, f"{name}[{number}]", leaves) for number, each in enumerate(tree)]
        make = type(tree)._make if hasattr(tree, "_make") else type(tree)
        return lambda found: make(item(found) for item in items)
    place = len(leaves)
    leaves[name] = tree
    return lambda found: found[place]


def _in_order(keys: Iterable[Any]) -> list[Any]:
    return sorted(keys, key=lambda key: (type(key).__name__, key))


def _to_tensor(name: str, leaf: Any) -> torch.Tensor:
    """Return a leaf as a tensor that has a mean."""
    if isinstance(leaf, (float, complex)) and not isinstance(leaf, np.generic):
        return torch.tensor(
            leaf, dtype=torch.complex128 if isinstance(leaf, complex) else torch.float64, device="cpu"
        )
    if isinstance(leaf, np.generic):
        leaf = np.asarray(leaf)
    if isinstance(leaf, np.ndarray):
        leaf = np.ascontiguousarray(leaf).reshape(leaf.shape)
    if not isinstance(leaf, (torch.Tensor, np.ndarray)) and not hasattr(leaf, "__dlpack__"):
        raise InvalidArgument(
            f"average: leaf {name!r} of the tree is a {type(leaf).__name__}; pass tensors, arrays and floats"
        )
    tensor = to_tensor(leaf, f"leaf {name!r}").contiguous()
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise DtypeMismatch(
            f"average: leaf {name!r} of the tree is {tensor.dtype}, in which a mean cannot be told; convert "
            "it to floats, or leave it out"
        )
    return tensor


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
