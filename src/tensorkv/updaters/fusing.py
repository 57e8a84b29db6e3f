"""Decides which of torch's fused optimizers are safe for which values: those that match torch's loop.

A fused kernel updates a value in one pass, several times as fast as the loop over torch's operations. It is
separate code, and can be wrong where the loop is right: torch 2.9 to 2.13 has a fused SGD for CPUs that
leaves every full vector of half-precision elements unchanged. So each kernel is tried once before it is used.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from tensorkv.updaters.undecorated import build, step

_ON_GPUS = frozenset({torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW})
_ON_CPUS = _ON_GPUS | {torch.optim.Adagrad}
_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})

_TRIALS: tuple[dict[str, Any], ...] = (
    {},
    {"momentum": 0.5},
    {"momentum": 0.5, "dampening": 0.25},
    {"momentum": 0.5, "nesterov": True},
    {"momentum": 0.5, "weight_decay": 0.25, "maximize": True},
    {"weight_decay": 0.25},
    {"maximize": True},
    {"amsgrad": True},
    {"amsgrad": True, "weight_decay": 0.25},
    {"decoupled_weight_decay": True, "weight_decay": 0.25},
    {"lr_decay": 0.25},
)
"""Options that some kernel has separate code for. An optimizer is tried with those it has."""

_TRIAL_ELEMS = 3 * 64 + 17
"""Number of elements of the trial value: full vectors on every processor, and a tail."""

_TRIAL_STEPS = 2


_found: dict[tuple[type[torch.optim.Optimizer], torch.dtype, str], bool] = {}


def is_fused_right(
    optimizer_class: type[torch.optim.Optimizer], dtype: torch.dtype, device_type: str
) -> bool:
    """Return whether torch has a fused kernel for this, and a trial of it matches the loop.

    The first call for an optimizer, dtype and type of device takes some milliseconds.
    """
    name = (optimizer_class, dtype, device_type)
    found = _found.get(name)
    if found is None:
        candidates = _ON_CPUS if device_type == "cpu" else _ON_GPUS
        found = dtype in _DTYPES and optimizer_class in candidates and _try_out(*name)
        _found[name] = found
    return found


def _try_out(optimizer_class: type[torch.optim.Optimizer], dtype: torch.dtype, device_type: str) -> bool:
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        expected = _trained(optimizer_class, dtype, device_type, fused=False)
        found = _trained(optimizer_class, dtype, device_type, fused=True)
    tolerance = 4 * torch.finfo(dtype).eps  # the two round differently
    return torch.allclose(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


def _trained(
    optimizer_class: type[torch.optim.Optimizer], dtype: torch.dtype, device_type: str, fused: bool
) -> torch.Tensor:
    """Return a value per trial after some steps, which move every element by far more than rounding does."""
    parameters = inspect.signature(optimizer_class).parameters
    numbers = torch.linspace(0.5, 1.5, _TRIAL_ELEMS, dtype=torch.float64, device=device_type)
    signs = 1 - 2 * (torch.arange(_TRIAL_ELEMS, device=device_type) % 3 == 0).double()
    values = [
        (torch.nn.Parameter(numbers.to(dtype), requires_grad=False), options)
        for options in _TRIALS
        if options.keys() <= parameters.keys()
    ]
    common: dict[str, Any] = {"lr": 1.0, "foreach": False, "fused": fused}
    if "eps" in parameters:
        common["eps"] = 1e-2  # half floats cannot represent 1e-8
    groups = [{"params": [value], **options} for value, options in values]
    optimizer = build(optimizer_class, groups, common)
    for number in range(_TRIAL_STEPS):
        for value, _ in values:
            value.grad = (signs * numbers.roll(number)).to(dtype)
        step(optimizer)
    return torch.stack([value.detach() for value, _ in values])
