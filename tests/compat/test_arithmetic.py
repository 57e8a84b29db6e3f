"""The optimizers compute what MXNet 1.9.1 computed: its own results are pinned here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tensorkv.compat import arithmetic
from tensorkv.updaters.optimizer import is_elementwise

START = [1.0, -2.0, 0.5, 3.0]
"""The weights before; four gradients follow, see `_run`."""

PINNED: list[tuple[str, dict[str, Any], list[float]]] = [
    ("SGD", {}, [0.9699999690, -1.8400001526, 0.4996000528, 2.9599997997]),
    ("SGD", {"learning_rate": 0.1}, [0.7000000477, -0.4000000656, 0.4960000515, 2.5999999046]),
    (
        "SGD",
        {"learning_rate": 0.1, "momentum": 0.9},
        [0.4432299733, 1.6195999384, 0.4909510016, 1.6887500286],
    ),
    (
        "SGD",
        {"learning_rate": 0.1, "momentum": 0.9, "wd": 0.01},
        [0.4347835183, 1.6321408749, 0.4864472151, 1.6645205021],
    ),
    (
        "SGD",
        {"learning_rate": 0.1, "wd": 0.05, "rescale_grad": 0.5, "clip_gradient": 1.0},
        [0.8308976889, -1.5632890463, 0.4880897105, 2.7678141594],
    ),
    (
        "SGD",
        {"learning_rate": 0.1, "momentum": 0.5, "wd": 0.05, "rescale_grad": 0.5, "clip_gradient": 1.0},
        [0.7625969052, -1.3315973282, 0.4817708433, 2.5817160606],
    ),
    (
        "SGD",
        {"learning_rate": 0.1, "clip_gradient": 0},
        [0.7000000477, -0.4000000656, 0.4960000515, 2.5999999046],
    ),
    (
        "SGD",
        {"learning_rate": 0.1, "clip_gradient": -1},
        [0.7000000477, -0.4000000656, 0.4960000515, 2.5999999046],
    ),
    (
        "SGD",
        {"learning_rate": 0.1, "momentum": -0.5},
        [0.7000000477, -0.4000000656, 0.4960000515, 2.5999999046],
    ),
    ("Adam", {}, [0.9961163998, -1.9959998131, 0.4960000515, 2.9966256618]),
    ("Adam", {"learning_rate": 0.1}, [0.6116381884, -1.5999975204, 0.1000062004, 2.6625480652]),
    (
        "Adam",
        {"learning_rate": 0.1, "beta1": 0.8, "beta2": 0.95, "epsilon": 1e-3},
        [0.6079422235, -1.6003158092, 0.1949377656, 2.6752703190],
    ),
    (
        "Adam",
        {"learning_rate": 0.1, "wd": 0.1},
        [0.6072420478, -1.6000517607, 0.1091821790, 2.6487550735],
    ),
    (
        "Adam",
        {"learning_rate": 0.1, "wd": 0.5, "rescale_grad": 0.25, "clip_gradient": 0.6},
        [0.5996431112, -1.5999975204, 0.1126676425, 2.5999975204],
    ),
    (
        "Adam",
        {"learning_rate": 0.1, "begin_num_update": 10},
        [0.7371394634, -1.7284235954, 0.2284291685, 2.7784261703],
    ),
    ("Test", {}, [4.0, -18.0, 0.5399999620, 7.0]),
    ("Test", {"rescale_grad": 0.5}, [2.5, -10.0, 0.5199999809, 5.0]),
]


def _run(optimizer_class: Any, options: dict[str, Any]) -> torch.Tensor:
    weight = torch.nn.Parameter(torch.tensor(START))
    optimizer = optimizer_class([weight], **options)
    for step in range(4):
        weight.grad = torch.tensor([0.3 * (step + 1), -4.0, 0.01, 2.5 - step])
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize(("name", "options", "expected"), PINNED)
def test_results_are_those_of_mxnet(name: str, options: dict[str, Any], expected: list[float]) -> None:
    result = _run(getattr(arithmetic, name), options)
    # MXNet takes 1 - beta2 in float32, where 1 - 0.999 is off by 5e-5; here it is exact.
    tolerance = 1e-4 if name == "Adam" else 1e-6
    torch.testing.assert_close(result, torch.tensor(expected), rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("name", ["SGD", "Adam", "Test"])
def test_a_store_may_slice_their_values(name: str) -> None:
    optimizer_class = getattr(arithmetic, name)
    assert is_elementwise(optimizer_class)


def test_a_parameter_without_gradient_stays() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    arithmetic.SGD([weight]).step()
    assert weight.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {"learning_rate": "0.1"}),
        ("SGD", {"momentum": None}),
        ("SGD", {"wd": True}),
        ("SGD", {"clip_gradient": "1"}),
        ("Adam", {"beta1": 1.0}),
        ("Adam", {"beta2": -0.1}),
        ("Adam", {"begin_num_update": 0.5}),
        ("Adam", {"begin_num_update": -1}),
        ("Test", {"rescale_grad": [1]}),
    ],
)
def test_options_of_a_wrong_type_or_range_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=r"is not a number|must lie in|must be a count"):
        getattr(arithmetic, name)([torch.nn.Parameter(torch.ones(2))], **options)
