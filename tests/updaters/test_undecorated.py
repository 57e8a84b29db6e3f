"""Torch's optimizers, built and stepped without the decorators around them."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tensorkv.updaters.optimizer import ELEMENTWISE_OPTIMIZERS
from tensorkv.updaters.undecorated import build, step

OPTIMIZERS = {
    "SGD": {"lr": 0.5, "momentum": 0.5},
    "Adam": {"lr": 0.5, "amsgrad": True},
    "AdamW": {"lr": 0.5},
    "NAdam": {"lr": 0.5},
    "RAdam": {"lr": 0.5},
    "Adamax": {"lr": 0.5},
    "Adagrad": {"lr": 0.5},
    "Adadelta": {"lr": 0.5},
    "RMSprop": {"lr": 0.5, "momentum": 0.5, "centered": True},
    "ASGD": {"lr": 0.5},
    "Rprop": {"lr": 0.5},
    "Adafactor": {"lr": 0.5},
    "Muon": {"lr": 0.5},
}


def trained(
    make: Callable[..., torch.optim.Optimizer],
    advance: Callable[[torch.optim.Optimizer], Any],
    options: dict[str, Any],
) -> list[Any]:
    """Return a parameter after some steps, and the state that its optimizer has then."""
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4))
    optimizer = make([parameter], **options)
    for number in range(3):
        parameter.grad = torch.linspace(1, 2, 12).reshape(3, 4).roll(number)
        advance(optimizer)
    state = optimizer.state[parameter]
    return [parameter.detach().tolist(), {name: torch.as_tensor(state[name]).tolist() for name in state}]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_does_what_torch_does(name: str) -> None:
    optimizer_class: Any = getattr(torch.optim, name, None)
    if optimizer_class is None:
        pytest.skip(f"this torch has no {name}")
    expected = trained(optimizer_class, lambda optimizer: optimizer.step(), OPTIMIZERS[name])
    found = trained(
        lambda parameters, **options: build(optimizer_class, parameters, options), step, OPTIMIZERS[name]
    )
    assert found == expected


def test_a_step_records_no_gradients_unless_it_is_differentiable() -> None:
    for differentiable in (False, True):
        factor = torch.ones(2, requires_grad=True)
        parameter = factor * 2 if differentiable else torch.nn.Parameter(torch.ones(2))
        parameter.retain_grad()
        optimizer = build(torch.optim.SGD, [parameter], {"lr": 0.5, "differentiable": differentiable})
        parameter.grad = torch.ones(2)
        step(optimizer)
        assert parameter.tolist() == ([1.5, 1.5] if differentiable else [0.5, 0.5])
        assert (type(parameter.grad_fn).__name__ == "AddBackward0") == differentiable


def test_it_is_an_optimizer_like_any_other() -> None:
    first, second = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    made = build(torch.optim.SGD, [first], {"lr": 0.5})
    assert vars(made).keys() == vars(torch.optim.SGD([second], lr=0.5)).keys()
    made.add_param_group({"params": [second], "lr": 0.25})
    assert [group["lr"] for group in made.param_groups] == [0.5, 0.25]
    with pytest.raises(ValueError, match="empty parameter list"):
        build(torch.optim.SGD, [], {})
    with pytest.raises(TypeError, match="unexpected keyword argument 'speed'"):
        build(torch.optim.SGD, [first], {"speed": 1})


def test_what_another_class_wraps_around_its_methods_is_called() -> None:
    calls: list[str] = []

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*arguments: Any) -> Any:
            calls.append(function.__name__)
            return function(*arguments)

        return wrapper

    class Noted(torch.optim.SGD):
        step = noted(torch.optim.SGD.step)
        add_param_group = noted(torch.optim.SGD.add_param_group)

    step(build(Noted, [torch.nn.Parameter(torch.ones(2))], {"lr": 0.5}))
    assert calls == ["add_param_group", "step"]


def test_dynamo_is_not_imported() -> None:
    code = (
        "import sys, torch\n"
        "from tensorkv.updaters.undecorated import build, step\n"
        "for name in sys.argv[1:]:\n"
        "    parameter = torch.nn.Parameter(torch.ones(2, 2))\n"
        "    parameter.grad = torch.ones(2, 2)\n"
        "    step(build(getattr(torch.optim, name), [parameter], {'lr': 0.5}))\n"
        "    assert 'torch._dynamo' not in sys.modules, name\n"
    )
    known = [name for name in OPTIMIZERS if getattr(torch.optim, name, None) in ELEMENTWISE_OPTIMIZERS]
    command = [sys.executable, "-c", code, *known]  # Adafactor itself imports it
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
