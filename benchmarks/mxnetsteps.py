"""One process of an MXNet job, or MXNet's local store, measured. Runs in MXNet's own environment.

The scheduler and the servers run this file too: there `import mxnet` serves until the job is over and
then leaves the interpreter, so that nothing after it is reached.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import mxnet as mx  # type: ignore[import-not-found]  # ends the process here, unless it is a worker
import numpy as np

from tensorkv.bench.shapes import key_names
from tensorkv.bench.steps import (
    LEARNING_RATE,
    MOMENTUM,
    Plan,
    gradient_value,
    parse_plan,
    plan_parser,
    print_result,
    run,
)


class MXNetSystem:
    """A worker of MXNet's KVStore, all keys in one list per call.

    MXNet's dist_sync keeps a worker's only gradient as its buffer, and the next pull overwrites it
    with the pulled value. So `barrier` rewrites the gradients, outside the measured time.
    """

    def __init__(self, kind: str, plan: Plan) -> None:
        self._plan = plan
        self._kv = mx.kv.create(kind)
        self._is_dist = kind.startswith("dist")
        # MXNet ranks workers by their ports. Any order works here.
        self.rank = self._kv.rank
        self._grad_rank = 0 if plan.pushes else self.rank
        self.num_workers = self._kv.num_workers
        self._scale = 0.0
        self._keys = key_names(plan.shapes)
        self._grads = self._tensors()
        self._outs = self._tensors()
        one = plan.num_devices == 1
        self._pushed = [grads[0] for grads in self._grads] if one else self._grads
        self._pulled = [outs[0] for outs in self._outs] if one else self._outs
        self._kv.init(self._keys, [mx.nd.zeros(shape or (1,)) for shape in plan.shapes])
        if plan.updater == "sgd":
            sgd = mx.optimizer.create("sgd", learning_rate=LEARNING_RATE, momentum=MOMENTUM)
            self._kv.set_optimizer(sgd)
        elif plan.updater == "adam":
            self._kv.set_optimizer(mx.optimizer.create("adam", learning_rate=LEARNING_RATE))
        self.ways: dict[str, Callable[[], None]] = (
            {"pushes": self._push_often}
            if plan.pushes
            else {"push+pull": self._push_pull, "pushpull": self._pushpull}
        )

    def _tensors(self) -> list[list[Any]]:
        devices = [mx.cpu(index) for index in range(self._plan.num_devices)]
        # MXNet 1.9 has no 0-dim tensors.
        return [[mx.nd.zeros(shape or (1,), device) for device in devices] for shape in self._plan.shapes]

    def _push_pull(self) -> None:
        self._kv.push(self._keys, self._pushed)
        self.pull()

    def _push_often(self) -> None:
        for _ in range(self._plan.pushes):
            self._kv.push(self._keys, self._pushed)
        self.pull()

    def pull(self) -> None:
        """Pull all values, and wait for them."""
        self._kv.pull(self._keys, out=self._pulled)
        self._wait()

    def _pushpull(self) -> None:
        self._kv.pushpull(self._keys, self._pushed, out=self._pulled)
        self._wait()

    def _wait(self) -> None:
        """Wait for MXNet's calls, which return before their work is done."""
        for outs in self._outs:
            for out in outs:
                out.wait_to_read()

    def barrier(self) -> None:
        if self._is_dist:
            self.set_gradients(self._scale)
            self._kv._barrier()

    def set_gradients(self, scale: float) -> None:
        self._scale = scale
        for grads in self._grads:
            for device, grad in enumerate(grads):
                grad[:] = gradient_value(self._grad_rank, device, len(grads), scale)
        mx.nd.waitall()

    def clear_results(self) -> None:
        for outs in self._outs:
            for out in outs:
                out[:] = np.nan
        mx.nd.waitall()

    def results(self) -> Iterable[np.ndarray[Any, Any]]:
        return (out.asnumpy() for outs in self._outs for out in outs)


def main() -> None:
    """Measure and, on rank 0, print the result."""
    parser = plan_parser(__doc__)
    parser.add_argument("--kind", default="local")
    arguments = parser.parse_args()
    plan = parse_plan(arguments)
    system = MXNetSystem(arguments.kind, plan)
    times_s = run(system, plan, pull=system.pull)
    if system.rank == 0:
        print_result(times_s)


if __name__ == "__main__":
    if os.environ.get("DMLC_ROLE", "worker") != "worker":
        raise SystemExit("MXNet did not serve: this build has no distributed store")
    main()
