"""The names of MXNet over a TensorKV store: `from tensorkv.compat import mxnet as mx`.

    mx.kv.create("dist_sync")          mx.nd.ones((2, 3), mx.cpu(1))        mx.optimizer.create("sgd")
    mx.kvstore                         mx.nd.NDArray, .array, .zeros, ...   mx.base.MXNetError

What MXNet's tutorial on its key-value store uses runs as it is; `docs/from-mxnet.md` says what differs.
Only names are here: contexts, arrays, optimizers and the store have a module each in this folder.
"""

from __future__ import annotations

from tensorkv.compat import base, context, kvstore, ndarray, optimizer
from tensorkv.compat import kvstore as kv
from tensorkv.compat import ndarray as nd
from tensorkv.compat.base import MXNetError
from tensorkv.compat.context import Context, cpu, cpu_pinned, current_context, gpu, num_gpus

__all__ = [
    "Context",
    "MXNetError",
    "base",
    "context",
    "cpu",
    "cpu_pinned",
    "current_context",
    "gpu",
    "kv",
    "kvstore",
    "nd",
    "ndarray",
    "num_gpus",
    "optimizer",
]
