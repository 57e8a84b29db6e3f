"""One worker of a TensorKV job, or a store in one process, measured.

python -m tensorkv run -n 2 -s 2 -- python benchmarks/tensorkvsteps.py --kind dist_sync --set resnet50
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from steps import (
    LEARNING_RATE,
    MOMENTUM,
    Plan,
    gradient_value,
    parse_plan,
    plan_parser,
    print_result,
    run,
)
from tensorsets import key_names

import tensorkv


class TensorKVSystem:
    """A worker of a TensorKV store, all keys in one list per call."""

    def __init__(self, kv: tensorkv.KVStore, plan: Plan) -> None:
        self._kv = kv
        self.rank = kv.rank
        self.num_workers = kv.num_workers
        self._keys = key_names(plan.shapes)
        self._grads = [[torch.zeros(shape) for _ in range(plan.num_devices)] for shape in plan.shapes]
        self._outs = [[torch.zeros(shape) for _ in range(plan.num_devices)] for shape in plan.shapes]
        # As a user with one device would write it: a list of tensors, not of lists.
        one = plan.num_devices == 1
        self._pushed = [grads[0] for grads in self._grads] if one else self._grads
        self._pulled = [outs[0] for outs in self._outs] if one else self._outs
        kv.init(self._keys, [torch.zeros(shape) for shape in plan.shapes])
        if plan.updater == "sgd":
            kv.set_optimizer(torch.optim.SGD, lr=LEARNING_RATE, momentum=MOMENTUM)
        self.ways: dict[str, Callable[[], None]] = {
            "push+pull": self._push_pull,
            "pushpull": self._pushpull,
        }

    def _push_pull(self) -> None:
        self._kv.push(self._keys, self._pushed)
        self._kv.pull(self._keys, out=self._pulled)

    def _pushpull(self) -> None:
        self._kv.pushpull(self._keys, self._pushed, out=self._pulled)

    def barrier(self) -> None:
        self._kv.barrier()

    def set_gradients(self, scale: float) -> None:
        for grads in self._grads:
            for device, grad in enumerate(grads):
                grad.fill_(gradient_value(self.rank, device, len(grads), scale))

    def clear_results(self) -> None:
        for outs in self._outs:
            for out in outs:
                out.fill_(torch.nan)

    def results(self) -> Iterable[np.ndarray[Any, Any]]:
        return (out.numpy() for outs in self._outs for out in outs)


def main() -> None:
    """Measure and, on rank 0, print the result."""
    parser = plan_parser(__doc__)
    parser.add_argument("--kind", default="local")
    arguments = parser.parse_args()
    plan = parse_plan(arguments)
    with tensorkv.create(arguments.kind) as kv:
        system = TensorKVSystem(kv, plan)
        times_s = run(system, plan)
    if system.rank == 0:
        print_result(times_s)


if __name__ == "__main__":
    main()
