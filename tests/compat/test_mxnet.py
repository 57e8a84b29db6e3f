"""The names of MXNet, in one namespace."""

from __future__ import annotations

from tensorkv.compat import base, context, kvstore, ndarray, optimizer
from tensorkv.compat import mxnet as mx


def test_names_are_where_mxnet_has_them() -> None:
    assert mx.kv is mx.kvstore is kvstore
    assert mx.nd is mx.ndarray is ndarray
    assert mx.optimizer is optimizer
    assert mx.base.MXNetError is mx.MXNetError is base.MXNetError
    assert issubclass(mx.MXNetError, RuntimeError)
    assert (mx.cpu, mx.gpu, mx.Context) == (context.cpu, context.gpu, context.Context)
    assert all(hasattr(mx, name) for name in mx.__all__)


def test_a_training_step_with_an_optimizer() -> None:
    kv = mx.kv.create("device")
    weight = mx.nd.array([1.0, 2.0])
    kv.init(0, weight)
    kv.set_optimizer(mx.optimizer.create("sgd", learning_rate=0.1, rescale_grad=1 / 4))
    with mx.cpu(1):
        grads = [mx.nd.ones((2,), mx.cpu(i)) for i in range(4)]
    kv.push(0, grads, priority=-1)
    kv.pull(0, out=[weight], priority=-1)
    assert abs(weight - mx.nd.array([0.9, 1.9])).sum().asscalar() < 1e-6
    kv.close()
