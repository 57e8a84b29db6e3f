"""Measures the steps of one job: the loop, the check of the results, and the line that reports them.

It runs inside the measured jobs, in MXNet's environment too, and so needs only NumPy. A system under test is
a `System`; `run` measures each of its ways to do a step. In a step every worker pushes its gradients of all
keys and pulls all new values into its own tensors.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tensorkv.bench.shapes import Shape, shapes_of

MARK = "BENCH_RESULT "
"""Precedes the JSON of a result; a launcher's prefix may come before it on the line."""

LEARNING_RATE = 0.01
MOMENTUM = 0.9
ADAM_BETAS = (0.9, 0.999)
ADAM_EPSILON = 1e-8

ITEMSIZES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
TOLERANCES = {"float32": 1e-4, "float64": 1e-9, "float16": 4e-3, "bfloat16": 3e-2}
"""Maximum relative error of a result after some steps of an optimizer."""

MIN_STEPS, MAX_STEPS = 5, 1000
"""Minimum and maximum number of measured steps if the plan gives a time instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The plan of one job: a set of tensors, how they are updated, and how often.

    `tensors` is the name of a set, or a size. `updater` is "assign", or an optimizer of torch run by the
    store; "sgd" is SGD with momentum. `steps` is the number of measured steps; 0 means as many as fill
    `seconds`. `one_way` measures only the first of a system's ways. With `pushes` a step is that many pushes
    and a pull, for stores that apply each push by itself; then all workers push the same gradients.
    """

    tensors: str = "quick"
    updater: str = "assign"
    dtype: str = "float32"
    num_devices: int = 1
    warmup: int = 3
    steps: int = 10
    seconds: float = 2.0
    one_way: bool = False
    pushes: int = 0

    @property
    def shapes(self) -> list[Shape]:
        """The shapes of the set."""
        return shapes_of(self.tensors, ITEMSIZES[self.dtype])

    def arguments(self) -> list[str]:
        """Return the command line from which `parse_plan` rebuilds this plan."""
        return [
            f"--set={self.tensors}",
            f"--updater={self.updater}",
            f"--dtype={self.dtype}",
            f"--devices={self.num_devices}",
            f"--warmup={self.warmup}",
            f"--steps={self.steps}",
            f"--seconds={self.seconds}",
            *(["--one-way"] if self.one_way else []),
            f"--pushes={self.pushes}",
        ]


def plan_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser that knows the arguments of a plan; a job adds its own."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Plan()
    parser.add_argument("--set", dest="tensors", default=default.tensors)
    parser.add_argument("--updater", default=default.updater)
    parser.add_argument("--dtype", choices=ITEMSIZES, default=default.dtype)
    parser.add_argument("--devices", dest="num_devices", type=int, default=default.num_devices)
    parser.add_argument("--warmup", type=int, default=default.warmup)
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--seconds", type=float, default=default.seconds)
    parser.add_argument("--one-way", action="store_true")
    parser.add_argument("--pushes", type=int, default=default.pushes)
    return parser


def parse_plan(arguments: argparse.Namespace) -> Plan:
    """Return the plan among the parsed arguments."""
    return Plan(
        tensors=arguments.tensors,
        updater=arguments.updater,
        dtype=arguments.dtype,
        num_devices=arguments.num_devices,
        warmup=arguments.warmup,
        steps=arguments.steps,
        seconds=arguments.seconds,
        one_way=arguments.one_way,
        pushes=arguments.pushes,
    )


class System(Protocol):
    """One worker's end of a system under test."""

    rank: int
    num_workers: int
    ways: dict[str, Callable[[], None]]  # name to a function that does one whole step

    def barrier(self) -> None:
        """Return when every worker has called it. Called before each step, outside the measured time."""

    def set_gradients(self, scale: float) -> None:
        """Fill the gradients of device d with `gradient_value(rank, d, scale)`."""

    def clear_results(self) -> None:
        """Overwrite the tensors that receive the results, so that old ones cannot pass for new."""

    def results(self) -> Iterable[np.ndarray[Any, Any]]:
        """Yield every tensor that receives results."""


def gradient_value(rank: int, device: int, num_devices: int, scale: float) -> float:
    """Return the value of every element of a gradient, different for each device of each worker.

    If each push is applied by itself the order matters, so every worker uses rank 0's value.
    """
    return scale * (rank * num_devices + device + 1)


class Expectation(Protocol):
    """Computes the expected value of every element of every result."""

    def step(self, scale: float) -> float:
        """Return the value after one more step with gradients of this scale."""


class Expected:
    """The expected value of every element of every result after each step, computed on scalars.

    Args:
        updater: "assign", "sgd" (with momentum) or "adam".
        num_tensors: how many gradients a step sums.
        initial: the value before the first step.
    """

    def __init__(self, updater: str, num_tensors: int, initial: float = 0.0) -> None:
        self._rule = {"assign": self._assign, "sgd": self._sgd, "adam": self._adam}[updater]
        self._sum_at_scale_1 = num_tensors * (num_tensors + 1) / 2
        self._value = initial
        self._moments = (0.0, 0.0)
        self._num_steps = 0

    def step(self, scale: float) -> float:
        """Return the value after one more step with gradients of this scale."""
        self._num_steps += 1
        self._rule(self._sum_at_scale_1 * scale)
        return self._value

    def _assign(self, total: float) -> None:
        self._value = total

    def _sgd(self, total: float) -> None:
        self._moments = (MOMENTUM * self._moments[0] + total, 0.0)
        self._value -= LEARNING_RATE * self._moments[0]

    def _adam(self, total: float) -> None:
        beta1, beta2 = ADAM_BETAS
        first = beta1 * self._moments[0] + (1 - beta1) * total
        second = beta2 * self._moments[1] + (1 - beta2) * total**2
        self._moments = (first, second)
        first /= 1 - beta1**self._num_steps
        second /= 1 - beta2**self._num_steps
        self._value -= LEARNING_RATE * first / (math.sqrt(second) + ADAM_EPSILON)


class EachPush:
    """The expected results if each push of each worker is a step by itself; all push the same."""

    def __init__(self, of_one: Expectation, num_pushes: int) -> None:
        self._of_one = of_one
        self._num_pushes = num_pushes

    def step(self, scale: float) -> float:
        """Return the value after the pushes of one more step."""
        return [self._of_one.step(scale) for _ in range(self._num_pushes)][-1]


class WrongResult(Exception):
    """A measured step computed a wrong result."""


def check_results(
    results: Iterable[np.ndarray[Any, Any]], expected: float, tolerance: float = TOLERANCES["float32"]
) -> None:
    """Raise WrongResult unless every element of every array is `expected`, up to a relative tolerance."""
    for index, array in enumerate(results):
        low, high = float(array.min()), float(array.max())
        for found in (low, high):
            if not math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance / 100):
                raise WrongResult(f"tensor {index} holds values from {low} to {high}, expected {expected}")


def time_steps(
    step: Callable[[], None],
    barrier: Callable[[], None],
    num_steps: int,
    tell: Callable[[int], None] = lambda number: None,
) -> list[float]:
    """Return the duration of each step in seconds, from the moment all workers were ready for it.

    `tell` is called with the number of each step before it, outside the measured time.
    """
    times_s = []
    for number in range(num_steps):
        tell(number)
        barrier()
        start = time.perf_counter()
        step()
        times_s.append(time.perf_counter() - start)
    return times_s


Tell = Callable[[str, int, int], None]
"""Progress callback: called with the way, the number of its step, and the number of steps."""


def run(
    system: System,
    plan: Plan,
    expected: Expectation | None = None,
    agree: Callable[[int], int] | None = None,
    tell: Tell = lambda way, number, num_steps: None,
    pull: Callable[[], None] | None = None,
) -> dict[str, list[float]]:
    """Measure every way of the system and return the seconds per step, by the way's name.

    It checks the results of a warm-up step before the measured ones, and of one more step after them.

    Args:
        system: the system under test.
        plan: the plan to run.
        expected: the expected results; computed here for the updaters that `Expected` knows if not given.
        agree: returns rank 0's number to every worker; needed if the plan gives a time and no steps.
        tell: progress callback.
        pull: pulls all values, after other workers' pushes; needed if the plan has pushes.

    Raises:
        WrongResult: the results were wrong.
    """
    expected = expected or expectation(plan, system.num_workers)
    times_s: dict[str, list[float]] = {}
    for name, step in list(system.ways.items())[: 1 if plan.one_way else None]:
        _checked_step(system, plan, name, expected, pull, scale=2.0)
        system.set_gradients(1.0)
        found = time_steps(step, system.barrier, plan.warmup)
        num_steps = plan.steps
        if not num_steps:
            assert agree is not None
            num_steps = agree(steps_within(plan.seconds, found))

        def tell_step(number: int, name: str = name, num_steps: int = num_steps) -> None:
            tell(name, number, num_steps)

        times_s[name] = time_steps(step, system.barrier, num_steps, tell_step)
        for _ in range(plan.warmup + num_steps):
            expected.step(1.0)
        _checked_step(system, plan, name, expected, pull, scale=3.0)
    return times_s


def expectation(plan: Plan, num_workers: int, of_one: Expectation | None = None) -> Expectation:
    """Return the expected results of a plan's steps.

    Args:
        plan: the plan of the workers.
        num_workers: the number of workers.
        of_one: the expected result of one update; computed here for the updaters that `Expected` knows.
    """
    if plan.pushes:
        return EachPush(of_one or Expected(plan.updater, 1), plan.pushes * num_workers)
    return of_one or Expected(plan.updater, num_workers * plan.num_devices)


def steps_within(seconds: float, times_s: Sequence[float]) -> int:
    """Return how many steps fill a time, estimated from the durations of some."""
    return max(MIN_STEPS, min(MAX_STEPS, int(seconds / statistics.median(times_s))))


def _checked_step(
    system: System,
    plan: Plan,
    way: str,
    expected: Expectation,
    pull: Callable[[], None] | None,
    *,
    scale: float,
) -> None:
    system.set_gradients(scale)
    system.clear_results()
    system.barrier()
    system.ways[way]()
    if plan.pushes:
        assert pull is not None
        system.barrier()
        pull()
    try:
        check_results(system.results(), expected.step(scale), TOLERANCES[plan.dtype])
    except WrongResult as exc:
        raise WrongResult(f"{way}, gradients of scale {scale}: {exc}") from None
    system.barrier()


def print_result(times_s: dict[str, list[float]]) -> None:
    """Print the line that `read_result` finds."""
    sys.stdout.write(f"{MARK}{json.dumps(times_s)}\n")
    sys.stdout.flush()


def read_result(output: str) -> dict[str, list[float]]:
    """Return the result printed somewhere in a job's output.

    Raises:
        ValueError: there is none, or more than one.
    """
    lines = [line.partition(MARK)[2] for line in output.splitlines() if MARK in line]
    if len(lines) != 1:
        raise ValueError(f"the job printed {len(lines)} results instead of one:\n{output[-2000:]}")
    result: dict[str, list[float]] = json.loads(lines[0])
    return result
