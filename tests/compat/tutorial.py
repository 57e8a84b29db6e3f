"""The calls of MXNet's tutorial on its distributed key-value store, in its order: `tutorial.py [KIND]`.

A test runs it and compares what it prints. Like the tutorial it has no `__main__` guard.
"""

import sys

from tensorkv.compat import mxnet as mx

kv = mx.kv.create(sys.argv[1] if len(sys.argv) > 1 else "local")
shape = (2, 3)
kv.init(3, mx.nd.ones(shape) * 2)
a = mx.nd.zeros(shape)
kv.pull(3, out=a)
print("init", a.asnumpy().tolist())

kv.push(3, mx.nd.ones(shape) * 8)
kv.pull(3, out=a)
print("push", a.asnumpy().tolist())

devices = [mx.cpu(i) for i in range(4)]
b = [mx.nd.ones(shape, device) for device in devices]
kv.push(3, b)
kv.pull(3, out=a)
print("devices", a.asnumpy().tolist())


def update(key, input, stored):
    print("update on key: %d" % key)  # noqa: UP031 (as the tutorial has it)
    stored += input * 2


kv._set_updater(update)
kv.pull(3, out=a)
print("before update", a.asnumpy().tolist())
kv.push(3, mx.nd.ones(shape))
kv.pull(3, out=a)
print("updated", a.asnumpy().tolist())

b = [mx.nd.ones(shape, device) for device in devices]
kv.pull(3, out=b)
print("pulled", b[1].asnumpy().tolist(), b[1].context)

keys = [5, 7, 9]
kv.init(keys, [mx.nd.ones(shape)] * len(keys))
kv.push(keys, [mx.nd.ones(shape)] * len(keys))
b = [mx.nd.zeros(shape)] * len(keys)
kv.pull(keys, out=b)
print("keys", b[1].asnumpy().tolist())

b = [[mx.nd.ones(shape, device) for device in devices]] * len(keys)
kv.push(keys, b)
kv.pull(keys, out=b)
print("keys and devices", b[1][1].asnumpy().tolist())
kv._barrier()
