"""Ray actors as a parameter server, measured by their driver. Runs in Ray's own environment.

As in Ray's own example of a synchronous parameter server, https://docs.ray.io/en/latest/ray-core/examples/
plot_parameter_server.html: the driver asks the worker actors for their gradients, hands the references
on to the server actors, each of which holds a part of the keys, and theirs to the workers. Nothing is
pickled but small headers: NumPy arrays lie in Ray's shared memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import ray  # type: ignore[import-not-found]

from tensorkv.bench.shapes import Shape
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


class Server:
    """Holds some keys. Its optimizer, if any, is SGD with momentum."""

    def __init__(self, shapes: list[Shape], updater: str) -> None:
        self._values = [np.zeros(shape, np.float32) for shape in shapes]
        self._momenta = [np.zeros(shape, np.float32) for shape in shapes] if updater == "sgd" else None

    def push(self, *grads: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """Sum up the gradients of all workers, update the values and return them."""
        for key, of_workers in enumerate(zip(*grads, strict=True)):
            value = self._values[key]
            if self._momenta is None:
                np.copyto(value, of_workers[0])
                for grad in of_workers[1:]:
                    value += grad
            else:
                momentum = self._momenta[key]
                momentum *= MOMENTUM
                for grad in of_workers:
                    momentum += grad
                value -= LEARNING_RATE * momentum
        return self._values


class Worker:
    """Holds gradients of all keys, and copies the new values into its own arrays."""

    def __init__(self, rank: int, parts: list[list[Shape]]) -> None:
        self._rank = rank
        self._grads = [[np.zeros(shape, np.float32) for shape in shapes] for shapes in parts]
        self._outs = [[np.zeros(shape, np.float32) for shape in shapes] for shapes in parts]

    def fill(self, scale: float) -> None:
        """Write the gradients."""
        for grads in self._grads:
            for grad in grads:
                grad.fill(gradient_value(self._rank, 0, 1, scale))

    def clear(self) -> None:
        """Overwrite the destinations of pulls."""
        for outs in self._outs:
            for out in outs:
                out.fill(np.nan)

    def grads(self) -> Any:
        """Return the gradients, a list per server."""
        return tuple(self._grads) if len(self._grads) > 1 else self._grads[0]

    def take(self, *values: list[np.ndarray[Any, Any]]) -> None:
        """Copy the servers' values into the arrays of this worker."""
        for outs, found in zip(self._outs, values, strict=True):
            for out, value in zip(outs, found, strict=True):
                np.copyto(out, value)

    def lowest_and_highest(self) -> np.ndarray[Any, Any]:
        """Return the minimum and maximum of each destination of a pull."""
        outs = [out for outs in self._outs for out in outs]
        return np.array([(out.min(), out.max()) for out in outs])


class RaySystem:
    """A whole job, as its driver sees it."""

    def __init__(self, plan: Plan, num_workers: int, num_servers: int) -> None:
        self.rank = 0
        self.num_workers = num_workers
        parts = parts_of(plan.shapes, num_servers)
        one_core = ray.remote(num_cpus=1)
        self._servers = [one_core(Server).remote(shapes, plan.updater) for shapes in parts]
        self._workers = [one_core(Worker).remote(rank, parts) for rank in range(num_workers)]
        self.ways: dict[str, Callable[[], None]] = {"actors": self._step}

    def _step(self) -> None:
        each = {"num_returns": len(self._servers)}
        grads = [worker.grads.options(**each).remote() for worker in self._workers]
        grads = [refs if isinstance(refs, list) else [refs] for refs in grads]
        values = [
            server.push.remote(*(refs[rank] for refs in grads)) for rank, server in enumerate(self._servers)
        ]
        ray.get([worker.take.remote(*values) for worker in self._workers])

    def barrier(self) -> None:
        """Do nothing: no call is in flight between two steps."""

    def set_gradients(self, scale: float) -> None:
        ray.get([worker.fill.remote(scale) for worker in self._workers])

    def clear_results(self) -> None:
        ray.get([worker.clear.remote() for worker in self._workers])

    def results(self) -> Iterable[np.ndarray[Any, Any]]:
        for bounds in ray.get([worker.lowest_and_highest.remote() for worker in self._workers]):
            yield from bounds


def parts_of(shapes: list[Shape], num_servers: int) -> list[list[Shape]]:
    """Distribute keys over servers, the largest first, each to the least loaded; every server gets one."""
    parts: list[list[Shape]] = [[] for _ in range(num_servers)]
    sizes = [0] * num_servers
    for shape in sorted(shapes, key=lambda shape: -int(np.prod(shape))):
        server = sizes.index(min(sizes))
        parts[server].append(shape)
        sizes[server] += int(np.prod(shape))
    return [part for part in parts if part]


def main() -> None:
    """Measure and print the result."""
    parser = plan_parser(__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--folder", help="for the logs and sockets of Ray (its own choice)")
    arguments: argparse.Namespace = parser.parse_args()
    plan = parse_plan(arguments)
    # An actor reserves a core; declare enough, as the other systems' processes need no reservation.
    ray.init(
        num_cpus=arguments.workers + arguments.servers,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=arguments.folder,
    )
    try:
        print_result(run(RaySystem(plan, arguments.workers, arguments.servers), plan))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
