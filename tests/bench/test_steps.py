"""The loop that measures, and the check of the results."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from tensorkv.bench import steps
from tensorkv.bench.steps import Plan


def test_a_plan_survives_the_command_line() -> None:
    plan = Plan(
        tensors="tiny",
        updater="sgd",
        dtype="bfloat16",
        num_devices=3,
        warmup=2,
        steps=7,
        seconds=0.5,
        one_way=True,
        pushes=4,
    )
    assert steps.parse_plan(steps.plan_parser(None).parse_args([])) == Plan()
    assert steps.parse_plan(steps.plan_parser(None).parse_args(plan.arguments())) == plan


@pytest.mark.parametrize(
    ("name", "optimizer", "options"),
    [("sgd", torch.optim.SGD, {"momentum": steps.MOMENTUM}), ("adam", torch.optim.Adam, {})],
)
def test_expected_is_what_torch_computes(name: str, optimizer: Any, options: dict[str, float]) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = optimizer([parameter], lr=steps.LEARNING_RATE, **options)
    expected = steps.Expected(name, num_tensors=3)
    for scale in (2.0, 1.0, 1.0, 3.0):
        parameter.grad = torch.tensor(
            [sum(steps.gradient_value(0, device, 3, scale) for device in range(3))], dtype=torch.float64
        )
        optimizer.step()
        assert expected.step(scale) == pytest.approx(parameter.item(), abs=1e-12)


def test_where_each_push_is_applied_by_itself_a_step_is_all_pushes_of_all_workers() -> None:
    of_one = steps.Expected("sgd", num_tensors=1)
    expected = steps.expectation(Plan(updater="sgd", pushes=3), num_workers=2)
    for scale in (2.0, 1.0):
        assert expected.step(scale) == [of_one.step(scale) for _ in range(6)][-1]


@pytest.mark.parametrize("one_way", [False, True])
def test_one_way_is_the_first(one_way: bool) -> None:
    plan = Plan(warmup=1, steps=2, one_way=one_way)
    times_s = steps.run(Doubling(), plan)
    assert {way: len(found) for way, found in times_s.items()} == (
        {"first": 2} if one_way else {"first": 2, "second": 2}
    )


class Doubling:
    """Two workers' gradients, summed up here."""

    rank, num_workers = 0, 2

    def __init__(self) -> None:
        self._scale, self._result = 0.0, np.zeros(3)
        self.ways = {"first": self._step, "second": self._step}

    def _step(self) -> None:
        self._result[:] = sum(steps.gradient_value(rank, 0, 1, self._scale) for rank in range(2))

    def barrier(self) -> None:
        pass

    def set_gradients(self, scale: float) -> None:
        self._scale = scale

    def clear_results(self) -> None:
        self._result[:] = math.nan

    def results(self) -> list[np.ndarray[Any, Any]]:
        return [self._result]


@pytest.mark.parametrize("wrong", [math.nan, 2.5, -2.0])
def test_one_wrong_element_is_found(wrong: float) -> None:
    results = [np.full(5, 2.0, np.float32), np.full((2, 3), 2.0, np.float32)]
    steps.check_results(results, 2.0)
    results[1][1, 1] = wrong
    with pytest.raises(steps.WrongResult, match="tensor 1"):
        steps.check_results(results, 2.0)


def test_as_many_steps_as_fill_a_time() -> None:
    assert steps.steps_within(2.0, [0.1, 0.2, 9.0]) == 10
    assert steps.steps_within(2.0, [5.0]) == steps.MIN_STEPS
    assert steps.steps_within(2.0, [1e-9]) == steps.MAX_STEPS


def test_steps_are_told_of_before_they_are_made() -> None:
    told: list[int] = []
    made: list[int] = []
    times_s = steps.time_steps(lambda: made.append(len(told)), lambda: None, 3, told.append)
    assert (told, made, len(times_s)) == ([0, 1, 2], [1, 2, 3], 3)


def test_a_result_is_found_in_a_jobs_output() -> None:
    result = {"a way": [0.25, 0.5]}
    line = f"[worker 0] {steps.MARK}{json.dumps(result)}"
    assert steps.read_result(f"hello\n{line}\n") == result
    for output in ("nothing", f"{line}\n{line}\n"):
        with pytest.raises(ValueError, match="results instead of one"):
            steps.read_result(output)


def test_the_result_is_printed_as_it_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    steps.print_result({"a way": [1.0]})
    assert steps.read_result(capsys.readouterr().out) == {"a way": [1.0]}
