"""One worker of a job, or a store in one process, measured.

    tensorkv run -n 2 -s 2 -- python -m tensorkv.bench.worker --kind dist_sync --set resnet50

prints one result; `tensorkv bench` is for people.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, final

import numpy as np
import torch

from tensorkv.arrays import dtype_from_name
from tensorkv.bench.shapes import key_names
from tensorkv.bench.steps import (
    LEARNING_RATE,
    MOMENTUM,
    Plan,
    expectation,
    gradient_value,
    parse_plan,
    plan_parser,
    print_result,
    run,
)
from tensorkv.errors import TensorKVError
from tensorkv.store import KVStore
from tensorkv.stores.registry import create
from tensorkv.updaters.optimizer import ELEMENTWISE_OPTIMIZERS, find_optimizer

AGREED = "bench/steps"


@final
class TensorKVSystem:
    """A worker of a TensorKV store, all keys in one list per call.

    With `lent` it pushes from tensors of `empty_like`.
    """

    def __init__(self, kv: KVStore, plan: Plan, lent: bool = False) -> None:
        self._kv = kv
        self._pushes = plan.pushes
        self.rank = kv.rank
        self.num_workers = kv.num_workers
        self._keys = key_names(plan.shapes)
        dtype = dtype_from_name(plan.dtype)

        def tensors() -> list[list[torch.Tensor]]:
            return [
                [torch.zeros(shape, dtype=dtype, device="cpu") for _ in range(plan.num_devices)]
                for shape in plan.shapes
            ]

        kv.init(self._keys, [torch.zeros(shape, dtype=dtype, device="cpu") for shape in plan.shapes])
        if plan.updater != "assign":
            kv.set_optimizer(optimizer_class(plan.updater), **optimizer_options(plan.updater))
        self._grads = [[each] for each in kv.empty_like(self._keys)] if lent else tensors()
        self._outs = tensors()
        # As a user with one device would write it: a list of tensors, not of lists.
        one = plan.num_devices == 1
        self._pushed = [grads[0] for grads in self._grads] if one else self._grads
        self._pulled = [outs[0] for outs in self._outs] if one else self._outs
        self.ways: dict[str, Callable[[], None]] = (
            {"pushes": self._push_often}
            if plan.pushes
            else {"push+pull": self._push_pull, "pushpull": self._pushpull}
        )

    def bind(self) -> None:
        """Take the same steps through `KVStore.bind` from now on. Not for a plan with pushes."""
        pushed, pulled = (dict(zip(self._keys, each, strict=True)) for each in (self._pushed, self._pulled))
        step = self._kv.bind(push=pushed, out=pulled)

        def push_pull() -> None:
            step.push()
            step.pull()

        self.ways = {"push+pull": push_pull, "pushpull": step.pushpull}

    def _push_pull(self) -> None:
        self._kv.push(self._keys, self._pushed)
        self.pull()

    def _push_often(self) -> None:
        for _ in range(self._pushes):
            self._kv.push(self._keys, self._pushed)
        self.pull()

    def pull(self) -> None:
        """Pull all values."""
        self._kv.pull(self._keys, out=self._pulled)

    def _pushpull(self) -> None:
        self._kv.pushpull(self._keys, self._pushed, out=self._pulled)

    def barrier(self) -> None:
        """Wait for all workers."""
        self._kv.barrier()

    def set_gradients(self, scale: float) -> None:
        """Fill the gradients."""
        for grads in self._grads:
            for device, grad in enumerate(grads):
                grad.fill_(gradient_value(0 if self._pushes else self.rank, device, len(grads), scale))

    def clear_results(self) -> None:
        """Overwrite the destinations of the pulls."""
        for outs in self._outs:
            for out in outs:
                out.fill_(torch.nan)

    def results(self) -> Iterable[np.ndarray[Any, Any]]:
        """Yield the pulled values."""
        return (_as_numpy(out) for outs in self._outs for out in outs)

    def agree(self, number: int) -> int:
        """Return rank 0's number, to every worker."""
        agreed = torch.tensor([number], device="cpu")
        if AGREED not in self._kv:
            self._kv.init(AGREED, agreed)
        elif self.rank == 0:
            self._kv.put(AGREED, agreed)
        self._kv.barrier()
        found = int(self._kv.pull(AGREED))
        self._kv.barrier()
        return found


@final
class TorchExpected:
    """The expected value of every element of every result after each step: torch's result for one element.

    Args:
        plan: the plan of the store.
        num_tensors: how many gradients a step sums.
    """

    def __init__(self, plan: Plan, num_tensors: int) -> None:
        self._sum_at_scale_1 = num_tensors * (num_tensors + 1) / 2
        self._parameter = torch.nn.Parameter(torch.zeros(1, dtype=dtype_from_name(plan.dtype), device="cpu"))
        make: Any = optimizer_class(plan.updater)
        self._optimizer = make([self._parameter], **optimizer_options(plan.updater))

    def step(self, scale: float) -> float:
        """Return the value after one more step with gradients of this scale."""
        self._parameter.grad = torch.full_like(self._parameter, self._sum_at_scale_1 * scale)
        self._optimizer.step()
        return self._parameter.item()


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """Return an elementwise optimizer, so that all elements of a result must be equal.

    Raises:
        ValueError: there is no such optimizer.
    """
    try:
        found = find_optimizer(name)
    except TensorKVError as exc:
        raise ValueError(str(exc)) from exc
    if found not in ELEMENTWISE_OPTIMIZERS:
        known = ", ".join(sorted(each.__name__.lower() for each in ELEMENTWISE_OPTIMIZERS))
        raise ValueError(f"optimizer {name!r} is not measured; use assign, or one of {known}")
    return found


def optimizer_options(name: str) -> dict[str, Any]:
    """Return the options of a measured optimizer: SGD has momentum."""
    return {"lr": LEARNING_RATE, **({"momentum": MOMENTUM} if name.lower() == "sgd" else {})}


def measure(
    kv: KVStore, plan: Plan, tell: Any = lambda way, number, num_steps: None, lent: bool = False
) -> dict[str, list[float]]:
    """Measure a store that is open and empty; return the seconds of each step, by way.

    Raises:
        WrongResult: a result was wrong.
    """
    system = TensorKVSystem(kv, plan, lent)
    num_tensors = 1 if plan.pushes else kv.num_workers * plan.num_devices
    of_one = None if plan.updater == "assign" else TorchExpected(plan, num_tensors)
    return run(system, plan, expectation(plan, kv.num_workers, of_one), system.agree, tell, system.pull)


def _as_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return found


def main() -> None:
    """Measure and, on rank 0, print the result."""
    parser = plan_parser(__doc__)
    parser.add_argument("--kind", default="local")
    parser.add_argument("--lent", action="store_true", help="push from tensors of empty_like")
    arguments = parser.parse_args()
    with create(arguments.kind) as kv:
        times_s = measure(kv, parse_plan(arguments), lent=arguments.lent)
        if kv.rank == 0:
            print_result(times_s)


if __name__ == "__main__":
    main()
