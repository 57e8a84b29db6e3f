"""One rank of a gloo all-reduce, measured: what synchronous training costs without any server.

Needs torchrun's variables (RANK, WORLD_SIZE) and a file by which the ranks find each other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from tensorkv.bench.shapes import num_elems
from tensorkv.bench.steps import Plan, gradient_value, parse_plan, plan_parser, print_result, run


class GlooSystem:
    """A rank that sums its gradients with the others', in place.

    An all-reduce overwrites the gradients with their sum. They are written anew in `barrier`, outside
    the measured time.
    """

    def __init__(self, plan: Plan) -> None:
        self.rank = dist.get_rank()
        self.num_workers = dist.get_world_size()
        self._flat = torch.zeros(num_elems(plan.shapes))
        parts = torch.split(self._flat, [shape.numel() for shape in map(torch.Size, plan.shapes)])
        self._tensors = [part.view(shape) for part, shape in zip(parts, plan.shapes, strict=True)]
        self._value = 0.0
        self.ways: dict[str, Callable[[], None]] = {"flat": self._one, "per tensor": self._each}

    def _one(self) -> None:
        dist.all_reduce(self._flat)

    def _each(self) -> None:
        # Start all before waiting for the first: that is faster, measured in turn with one by one.
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in self._tensors]:
            assert work is not None
            work.wait()

    def barrier(self) -> None:
        self._flat.fill_(self._value)
        dist.barrier()

    def set_gradients(self, scale: float) -> None:
        self._value = gradient_value(self.rank, 0, 1, scale)

    def clear_results(self) -> None:
        """Do nothing: results replace the gradients, which `barrier` rewrites."""

    def results(self) -> Iterable[np.ndarray[Any, Any]]:
        # The last barrier of a checked step comes after this, so the sums are still intact.
        return [self._flat.numpy()]


def main() -> None:
    """Measure and, on rank 0, print the result."""
    parser = plan_parser(__doc__)
    parser.add_argument("--meet", required=True, help="path of a file that does not exist yet")
    arguments = parser.parse_args()
    plan = parse_plan(arguments)
    if plan.updater != "assign" or plan.num_devices != 1:
        parser.error("an all-reduce has no updater and no devices")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{arguments.meet}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(minutes=5),
    )
    try:
        system = GlooSystem(plan)
        times_s = run(system, plan)
    finally:
        dist.destroy_process_group()
    if system.rank == 0:
        print_result(times_s)


if __name__ == "__main__":
    main()
