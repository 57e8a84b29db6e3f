"""MXNet's own gluon.Trainer on a store: `import tensorkv.compat.gluon`, and pass kvstore="tensorkv".

    import mxnet as mx
    import tensorkv.compat.gluon  # registers the kind "tensorkv" in MXNet

    trainer = mx.gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.1}, kvstore="tensorkv")

It needs MXNet 1.9.1 (`pip install mxnet==1.9.1 numpy==1.23.5`), which the other modules of this folder stand
in for. In a job the store is "dist_sync", outside one "local"; pass a `TensorKV` for another kind. MXNet's
SGD and Adam run where the weights live, on the servers. Any other optimizer of MXNet runs on each worker,
with the sum of all gradients; so does every one with `update_on_kvstore=False`.

As in MXNet's distributed stores the gradients of all workers are added up: `trainer.step(batch_size)` takes
the size of the batches of all workers together. Unlike MXNet's, a call returns when its result is there.

Source: python/mxnet/kvstore/base.py and python/mxnet/gluon/trainer.py of MXNet 1.9.1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mxnet as mx
import torch
from mxnet.gluon import trainer
from mxnet.kvstore import KVStoreBase

from tensorkv.compat import arithmetic
from tensorkv.errors import NotSupported
from tensorkv.store import KVStore
from tensorkv.stores.registry import open_next

_ON_SERVERS: dict[type, tuple[type[torch.optim.Optimizer], tuple[str, ...]]] = {
    mx.optimizer.SGD: (arithmetic.SGD, ("momentum",)),
    mx.optimizer.Adam: (arithmetic.Adam, ("beta1", "beta2", "epsilon")),
}
"""MXNet's optimizers that servers can run: their arithmetic, and their options beside those of all."""


@KVStoreBase.register
class TensorKV(KVStoreBase):  # type: ignore[misc]  # MXNet has no types
    """A store for gluon.Trainer, or for `broadcast` and `pushpull` of single keys.

    Attributes:
        store: the TensorKV store underneath; its keys are the numbers of the parameters.
    """

    def __init__(self, kind: str = "auto", **options: Any) -> None:
        """Open a store.

        Args:
            kind: as in `tensorkv.create`; "auto" is "dist_sync" in a job and "local" outside one.
            **options: those of `tensorkv.create`.
        """
        self.store: KVStore = open_next(kind, "gluon", **options)
        self._updater: Any = None  # MXNet's, whose optimizer Trainer reads; it steps if servers cannot
        self._on_servers = False
        self._sent: dict[Any, dict[str, Any]] = {}  # options that the servers have, by key; None: by default

    @property
    def type(self) -> str:
        """The name in MXNet's registry. Where it has "dist" in it, Trainer forbids other batch sizes."""
        return "tensorkv"

    @property
    def rank(self) -> int:
        """Number of this worker, from 0."""
        return self.store.rank

    @property
    def num_workers(self) -> int:
        """Number of workers."""
        return self.store.num_workers

    @staticmethod
    def is_capable(capability: str) -> bool:
        """Whether the store takes an optimizer: it does.

        Raises:
            ValueError: another capability is asked for.
        """
        if capability.lower() != KVStoreBase.OPTIMIZER:
            raise ValueError(f"unknown capability: {capability}")
        return True

    def broadcast(self, key: Any, value: Any, out: Any, priority: int = 0) -> None:
        """Create a key, and copy it into `out`: every worker ends with rank 0's value."""
        (initial, *_) = _tensors(value)
        self.store.broadcast(key, initial, _tensors(out, write=True))

    def pushpull(self, key: Any, value: Any, out: Any = None, priority: int = 0) -> None:
        """Add up gradients of all devices and workers, and pull what becomes of them.

        Args:
            key: of a parameter.
            value: its gradient, or a list with one for each device.
            out: gets the updated weight; None writes the sum into `value`.
            priority: without effect.

        Raises:
            NotSupported: no optimizer runs on the servers, and the store's rounds do not wait for all
                workers (dist_async, quorum), so that there is no sum over them.

        Blocks until all workers have made the call.
        """
        if not self._on_servers and not self.store._allows_commit:
            raise NotSupported(
                f"{self.store!r} has no sum over all workers, which an update on the workers needs: use "
                "kind='dist_sync' without a quorum, or let MXNet's SGD or Adam run on the servers"
            )
        gradients = _tensors(value)
        if out is None or self._updater is None:
            self.store.pushpull(key, gradients, _tensors(value if out is None else out, write=True))
        elif self._on_servers:
            self._send_options(key)
            self.store.pushpull(key, gradients, _tensors(out, write=True))
        else:
            first, *others = out if isinstance(out, (list, tuple)) else [out]
            total = mx.nd.zeros_like(first)
            self.store.pushpull(key, gradients, _tensors(total, write=True))
            self._updater(key, total, first)
            for other in others:
                first.copyto(other)

    def set_optimizer(self, optimizer: Any) -> None:
        """Run one of MXNet's optimizers: SGD and Adam where the values live, any other on each worker."""
        self._updater = mx.optimizer.get_updater(optimizer)
        self._on_servers = type(optimizer) in _ON_SERVERS and not optimizer.multi_precision
        if self._on_servers:
            torch_class, _ = _ON_SERVERS[type(optimizer)]
            self._sent = {None: _options_of(optimizer, None)}
            self.store.set_optimizer(torch_class, **self._sent[None])

    def _send_options(self, key: Any) -> None:
        """Tell the servers what has changed: by a schedule, `set_learning_rate` or a size of a batch."""
        optimizer = self._updater.optimizer
        optimizer._update_count(key)  # as MXNet's own updater does, for schedules
        options, sent = _options_of(optimizer, key), self._sent.get(key, self._sent.get(None, {}))
        changed = {name: value for name, value in options.items() if name not in sent or sent[name] != value}
        if changed:
            self.store.set_optimizer_options(keys=[key], **changed)
        self._sent[key] = options

    def save_optimizer_states(self, fname: str, dump_optimizer: bool = False) -> None:
        """Save weights and optimizer state in a folder of this name, as of this worker's last step.

        Raises:
            NotSupported: the optimizer runs on the workers.
        """
        self._check_saves()
        self.store.save(fname, alone=True)

    def load_optimizer_states(self, fname: str) -> None:
        """Load such a folder. Every worker makes the call.

        Raises:
            NotSupported: the optimizer runs on the workers.
        """
        self._check_saves()
        self.store.load(fname)
        self._sent = {}
        optimizer = self._updater.optimizer
        for key in self.store.keys():  # noqa: SIM118  # a store is no dict
            count = optimizer._index_update_count[key] = self.store.info(key).version
            optimizer.num_update = max(optimizer.num_update, count)

    def _check_saves(self) -> None:
        if not self._on_servers:
            raise NotSupported(
                "the state of this optimizer is on the workers, not in the store: pass "
                "update_on_kvstore=False to Trainer, whose save_states then writes it"
            )


def _options_of(optimizer: Any, key: Any) -> dict[str, Any]:
    """Return the present options for a key, in the names of `arithmetic`; key None has no multipliers."""
    _, names = _ON_SERVERS[type(optimizer)]
    rates = (
        (optimizer.learning_rate, optimizer.wd)
        if key is None
        else (optimizer._get_lr(key), optimizer._get_wd(key))
    )
    return {
        "learning_rate": float(rates[0]),
        "wd": float(rates[1]),
        "rescale_grad": float(optimizer.rescale_grad),
        "clip_gradient": None if optimizer.clip_gradient is None else float(optimizer.clip_gradient),
        **{name: float(getattr(optimizer, name)) for name in names},
    }


def _tensors(arrays: Any, write: bool = False) -> list[torch.Tensor]:
    """Return the memory of one or more arrays of MXNet as tensors, once MXNet has computed them.

    Raises:
        NotSupported: an array is sparse.
    """
    found: list[torch.Tensor] = []
    for each in arrays if isinstance(arrays, (list, tuple)) else [arrays]:
        if each.stype != "default":
            raise NotSupported(f"an array of MXNet of type {each.stype!r}: a store takes dense ones")
        capsule = each.to_dlpack_for_write() if write else each.to_dlpack_for_read()
        found.append(torch.utils.dlpack.from_dlpack(capsule))
    return found


def _for_one_device_too(create_kvstore: Callable[..., Any]) -> Callable[..., Any]:
    """Let Trainer use the store for one device: MXNet drops one without "dist" in its name in silence."""

    @functools.wraps(create_kvstore)
    def create_any(kvstore: Any, num_device: int, arg_params: Any) -> Any:
        if isinstance(kvstore, str) and kvstore.lower() == TensorKV.__name__.lower():
            kvstore = mx.kv.create(kvstore)
        return create_kvstore(kvstore, num_device, arg_params)

    return create_any


trainer._create_kvstore = _for_one_device_too(trainer._create_kvstore)
