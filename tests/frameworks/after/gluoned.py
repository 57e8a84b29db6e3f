"""A network on handwritten digits, with MXNet's gluon."""

import gzip
import os
import sys

import mxnet as mx
import numpy as np
import tensorkv.compat.gluon

mx.random.seed(0)
batch_size, optimizer = int(sys.argv[1]), sys.argv[2]
with gzip.open(os.environ["DIGITS"]) as file:
    rows = np.loadtxt(file, delimiter=",", dtype="float32")[:512]
data = mx.gluon.data.ArrayDataset(rows[:, :64] / 16, rows[:, 64])
loader = mx.gluon.data.DataLoader(tensorkv.shard(data), batch_size)
contexts = [mx.cpu(0), mx.cpu(1)]
net = mx.gluon.nn.Sequential()
net.add(mx.gluon.nn.Dense(32, activation="tanh", in_units=64), mx.gluon.nn.Dense(10, in_units=32))
net.initialize(mx.init.Xavier(), ctx=contexts)
schedule = mx.lr_scheduler.FactorScheduler(step=10, factor=0.9, base_lr=0.01)
net[0].weight.wd_mult = 2.0
trainer = mx.gluon.Trainer(
    net.collect_params(), optimizer, {"lr_scheduler": schedule, "wd": 0.001}, kvstore="tensorkv"
)
loss = mx.gluon.loss.SoftmaxCrossEntropyLoss()
for _ in range(2):
    for images, labels in loader:
        with mx.autograd.record():
            parts = map(mx.gluon.utils.split_and_load, (images, labels), (contexts, contexts))
            losses = [loss(net(some), wanted) for some, wanted in zip(*parts, strict=True)]
        mx.autograd.backward(losses)
        trainer.step(batch_size * tensorkv.num_workers())
weights = [each.data(contexts[0]).asnumpy() for each in net.collect_params().values()]
print("weights", [round(float(np.abs(each).sum(dtype="float64")), 5) for each in weights])
