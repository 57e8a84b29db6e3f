"""MXNet's KVStore on top of a TensorKV store. It only translates arguments and errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from tensorkv.compat.base import mxnet_errors
from tensorkv.compat.ndarray import MXNetUpdater, NDArray
from tensorkv.compat.optimizer import Optimizer
from tensorkv.errors import InvalidOut, UnknownUpdater
from tensorkv.store import KVStore as TensorKVStore
from tensorkv.stores.registry import create as create_store
from tensorkv.tracers import opaque_methods


@final
@opaque_methods
class KVStore:
    """A store with the methods of MXNet's KVStore.

    Keys are ints or strings; a value is an NDArray, or a list of them, one per device.
    `priority` is accepted and has no effect. Calls return None, like MXNet's; their errors are both
    MXNetErrors and those of the TensorKV call.

    Attributes:
        store: the TensorKV store underneath.
    """

    def __init__(self, store: TensorKVStore) -> None:
        self.store = store
        self._optimizers_set = 0

    @property
    def type(self) -> str:
        """Kind of the store, as given to `create`."""
        return self.store.kind

    @property
    def rank(self) -> int:
        """Number of this worker, from 0."""
        return self.store.rank

    @property
    def num_workers(self) -> int:
        """Number of workers."""
        return self.store.num_workers

    def init(self, key: Any, value: Any) -> None:
        """Create a key, or a list of keys, with initial values."""
        with mxnet_errors():
            self.store.init(key, _unwrap(value))

    def push(self, key: Any, value: Any, priority: int = 0) -> None:
        """Add values to keys; several values of a key are summed first."""
        with mxnet_errors():
            self.store.push(key, _unwrap(value))

    def pull(self, key: Any, out: Any = None, priority: int = 0, ignore_sparse: bool = True) -> None:
        """Copy the values of keys into `out`: an array, or a list of arrays, per key."""
        with mxnet_errors():
            if out is None:
                raise InvalidOut(f"pull({key!r}): there is no out; MXNet's pull writes into arrays")
            self.store.pull(key, _unwrap(out))

    def pushpull(self, key: Any, value: Any, out: Any = None, priority: int = 0) -> None:
        """Push `value`, then pull into `out`, or into `value` itself if there is no `out`."""
        with mxnet_errors():
            self.store.pushpull(key, _unwrap(value), _unwrap(value if out is None else out))

    def broadcast(self, key: Any, value: Any, out: Any, priority: int = 0) -> None:
        """Create keys and copy them into `out`: every worker ends with rank 0's value."""
        with mxnet_errors():
            self.store.broadcast(key, _unwrap(value), _unwrap(out))

    def _set_updater(self, updater: Callable[[Any, NDArray, NDArray], Any]) -> None:
        """Set `updater(key, input, stored)`, which combines the pushed with the stored value in place."""
        with mxnet_errors():
            if not callable(updater):
                raise UnknownUpdater(f"{updater!r} is not a function of a key and two arrays")
            self.store.set_updater(MXNetUpdater(updater))

    def set_optimizer(self, optimizer: Optimizer) -> None:
        """Use an optimizer of `tensorkv.compat.optimizer` as the updater, where the values live.

        Each call starts afresh, without the previous momentum, even with the same optimizer.
        """
        with mxnet_errors():
            if not isinstance(optimizer, Optimizer):
                raise UnknownUpdater(
                    f"{optimizer!r} is not an optimizer of MXNet's; use mx.optimizer.create(name, ...)"
                )
            self._optimizers_set += 1
            self.store.set_optimizer(
                optimizer.torch_class, set_number=self._optimizers_set, **optimizer.options
            )

    def _barrier(self) -> None:
        """Wait until all workers have called it."""
        with mxnet_errors():
            self.store.barrier()

    def close(self) -> None:
        """Leave the store. MXNet has no such call: it leaves the store when the program ends."""
        with mxnet_errors():
            self.store.close()


def create(name: str = "local", **options: Any) -> KVStore:
    """Open a store.

    Args:
        name: its kind, "local" or "dist_sync" say. MXNet opens a local store for an unknown kind; here that
            is an error.
        **options: those of `tensorkv.create`.

    Raises:
        TypeError: `name` is not a str.
        UnknownKind, NotInJob, and the other errors of `tensorkv.create`, each an MXNetError.
    """
    with mxnet_errors():
        if not isinstance(name, str):
            raise TypeError("name must be a string")
        return KVStore(create_store(name, **options))


def _unwrap(value: Any) -> Any:
    """Replace NDArrays, even in lists, by their tensors. The store checks all other values."""
    if isinstance(value, NDArray):
        return value.tensor
    if isinstance(value, (list, tuple)):
        return [_unwrap(each) for each in value]
    return value
