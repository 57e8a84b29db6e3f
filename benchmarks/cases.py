"""The measured cases, and our goals for each."""

from __future__ import annotations

import dataclasses

from goals import Goal
from jobs import Case

from tensorkv.bench.steps import Plan


def _dist(name: str, title: str, plan: Plan, kind: str = "dist_sync") -> Case:
    title = f"{kind}, 2 workers, 2 servers: {title}"
    return Case(name=name, title=title, kind=kind, plan=plan, num_workers=2, num_servers=2)


def _local(name: str, title: str, plan: Plan) -> Case:
    return Case(name=name, title=f"local, one process: {title}", kind="local", plan=plan)


CASES = [
    _dist("dist-resnet50", "ResNet-50, 161 keys, 102 MB", Plan(tensors="resnet50")),
    _dist("dist-tiny", "1000 keys of 64 floats", Plan(tensors="tiny", steps=50)),
    _dist("dist-one", "one key of 64 floats", Plan(tensors="one", warmup=20, steps=200)),
    _dist("dist-big", "one key of 102 MB", Plan(tensors="big")),
    _dist("dist-sgd", "ResNet-50, SGD with momentum on the servers", Plan(tensors="resnet50", updater="sgd")),
    _dist(
        "dist-async",
        "ResNet-50, SGD with momentum, a step is 5 pushes and a pull",
        Plan(tensors="resnet50", updater="sgd", pushes=5, warmup=1, steps=4),
        kind="dist_async",
    ),
    _local("local-assign", "ResNet-50, 4 devices, ASSIGN", Plan(tensors="resnet50", num_devices=4)),
    _local("local-sgd", "ResNet-50, 1 device, SGD with momentum", Plan(tensors="resnet50", updater="sgd")),
]

MXNETS_WAYS = ("push+pull", "pushpull")

GOALS = [
    *(Goal.faster("dist-resnet50", "tensorkv", way, "mxnet", way, 1.8) for way in MXNETS_WAYS),
    Goal.within("dist-resnet50", "tensorkv", "pushpull", "floor", "tcp", 1.25),
    *(Goal.faster("dist-resnet50", "tensorkv-shm", way, "mxnet", way, 5) for way in MXNETS_WAYS),
    Goal.faster("dist-resnet50", "tensorkv-shm", "pushpull", "gloo", "flat", 1.5),
    Goal.within("dist-resnet50", "tensorkv-shm", "pushpull", "floor", "shm", 1.2),
    Goal.within("dist-resnet50", "tensorkv-lent", "pushpull", "floor", "shm", 0.8),
    *(Goal.faster("dist-tiny", "tensorkv", way, "mxnet", way, 30) for way in MXNETS_WAYS),
    Goal.time("dist-tiny", "tensorkv", "pushpull", median_ms=3),
    *(Goal.faster("dist-tiny", "tensorkv-shm", way, "mxnet", way, 40) for way in MXNETS_WAYS),
    Goal.time("dist-tiny", "tensorkv-shm", "pushpull", median_ms=2),
    *(Goal.faster("dist-one", "tensorkv", way, "mxnet", way, 3) for way in MXNETS_WAYS),
    Goal.time("dist-one", "tensorkv", "pushpull", median_ms=0.2, p99_ms=0.8),
    *(Goal.faster("dist-one", "tensorkv-shm", way, "mxnet", way, 4) for way in MXNETS_WAYS),
    Goal.time("dist-one", "tensorkv-shm", "pushpull", median_ms=0.15, p99_ms=0.6),
    *(Goal.faster("dist-sgd", "tensorkv", way, "mxnet", way, 2) for way in MXNETS_WAYS),
    *(Goal.faster("dist-sgd", "tensorkv-shm", way, "mxnet", way, 5) for way in MXNETS_WAYS),
    Goal.faster("dist-async", "tensorkv-shm", "pushes", "mxnet", "pushes", 4),
    *(Goal.faster("local-assign", "tensorkv", way, "mxnet", way, 1.8) for way in MXNETS_WAYS),
    *(Goal.faster("local-sgd", "tensorkv", way, "mxnet", way, 4.5) for way in MXNETS_WAYS),
]


def quick(case: Case) -> Case:
    """Return the case with tiny sizes and few steps, only to check that it runs."""
    return dataclasses.replace(case, plan=dataclasses.replace(case.plan, tensors="quick", warmup=1, steps=3))
