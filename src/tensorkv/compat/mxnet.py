"""MXNet's API on top of a TensorKV store: `from tensorkv.compat import mxnet as mx`.

    mx.kv.create("dist_sync")          mx.nd.ones((2, 3), mx.cpu(1))        mx.optimizer.create("sgd")
    mx.kvstore                         mx.nd.NDArray, .array, .zeros, ...   mx.base.MXNetError

MXNet's tutorial on its key-value store runs unchanged; `docs/from-mxnet.md` lists the differences.
This module only has the names: contexts, arrays, optimizers and the store each have a module in this folder.
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
