"""What a gluon.Trainer does with a store beside plain steps. Prints weights [1.0] if all of it is right."""

import tempfile
from pathlib import Path

import mxnet as mx
import numpy as np
import pytest

import tensorkv.compat.gluon
from tensorkv.errors import NotSupported


def make(optimizer, **options):
    net = mx.gluon.nn.Dense(1, in_units=2, use_bias=False)
    net.initialize(mx.init.One())
    return net, mx.gluon.Trainer(net.collect_params(), optimizer, **options)


def step(net, trainer, batch_size=1):
    with mx.autograd.record():
        loss = net(mx.nd.array([[1.0, 2.0]])).sum()
    loss.backward()
    trainer.step(batch_size)
    return net.weight.data().asnumpy().ravel().tolist()


# One device: MXNet alone would drop a store without "dist" in its name.
net, trainer = make("sgd", optimizer_params={"learning_rate": 0.5}, kvstore="tensorkv")
assert step(net, trainer) == [0.5, 0.0]
assert isinstance(trainer._kvstore, tensorkv.compat.gluon.TensorKV)
assert trainer._kvstore.store.kind == "local"

# The rate, and the size of a batch, may change.
trainer.set_learning_rate(0.25)
assert step(net, trainer) == [0.25, -0.5]
assert step(net, trainer, 2) == [0.125, -0.75]

# Saved state goes on.
net, trainer = make("adam", kvstore="tensorkv")
[step(net, trainer) for _ in range(3)]
with tempfile.TemporaryDirectory() as folder:
    trainer.save_states(str(Path(folder, "states")))
    expected = [step(net, trainer) for _ in range(3)]
    trainer.load_states(str(Path(folder, "states")))
    assert [step(net, trainer) for _ in range(3)] == expected
assert trainer.optimizer.num_update == 6

# The update on the worker, by wish or since servers do not know the optimizer.
net, trainer = make(
    "sgd", optimizer_params={"learning_rate": 0.5}, kvstore="tensorkv", update_on_kvstore=False
)
assert step(net, trainer) == [0.5, 0.0]
net, trainer = make("rmsprop", kvstore="tensorkv")
step(net, trainer)
with pytest.raises(NotSupported, match="update_on_kvstore=False"):
    trainer.save_states("nowhere")

# The calls of a store by themselves, and what it refuses.
kv = mx.kv.create("tensorkv")
out = mx.nd.zeros((2,), mx.cpu(1))
kv.broadcast("a", mx.nd.ones((2,)), out)
kv.pushpull("a", [mx.nd.ones((2,)), mx.nd.ones((2,), mx.cpu(1))], out)
assert out.asnumpy().tolist() == [2.0, 2.0]
assert (kv.type, kv.rank, kv.num_workers, kv.is_capable("optimizer")) == ("tensorkv", 0, 1, True)
with pytest.raises(ValueError, match="wings"):
    kv.is_capable("wings")
with pytest.raises(NotSupported, match="row_sparse"):
    kv.broadcast("b", out.tostype("row_sparse"), out)

# Without rounds of all workers there is no sum to update with on a worker; servers take each push by itself.
asynchronous = {"kind": "dist_async", "embedded": True}
for optimizer, options in (("rmsprop", {}), ("sgd", {"update_on_kvstore": False})):
    with tensorkv.compat.gluon.TensorKV(**asynchronous).store as store:
        net, trainer = make(optimizer, kvstore=tensorkv.compat.gluon.TensorKV(**asynchronous), **options)
        with pytest.raises(NotSupported, match="no sum over all workers"):
            step(net, trainer)
        trainer._kvstore.store.close()
on_servers = tensorkv.compat.gluon.TensorKV(**asynchronous)
net, trainer = make("sgd", optimizer_params={"learning_rate": 0.5}, kvstore=on_servers)
assert step(net, trainer) == [0.5, 0.0]
on_servers.store.close()
print("weights", [float(np.ones(()))])
