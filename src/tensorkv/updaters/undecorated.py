"""Builds and steps torch's optimizers without the decorators around them.

torch.optim decorates `add_param_group` and `step` for torch.compile. The first call of either imports
torch._dynamo, which takes as long as importing torch itself, in each process that has an optimizer. Nobody
compiles the steps of a store, so the decorated functions are called directly. Optimizers of other modules are
used as they are: what is wrapped around their methods may be part of what they do.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch


def build(
    optimizer_class: type[torch.optim.Optimizer], parameters: Iterable[Any], options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """Return `optimizer_class(parameters, **options)`."""
    if not _is_of_torch(optimizer_class):
        return optimizer_class(parameters, **options)
    optimizer: Any = optimizer_class.__new__(optimizer_class)
    add_param_group = inspect.unwrap(optimizer_class.add_param_group)
    optimizer.add_param_group = functools.partial(add_param_group, optimizer)
    try:
        optimizer.__init__(parameters, **options)
    finally:
        del optimizer.add_param_group
    return cast(torch.optim.Optimizer, optimizer)


def step(optimizer: torch.optim.Optimizer) -> None:
    """Do `optimizer.step()`, without step hooks and torch's profiler around it."""
    if not _is_of_torch(type(optimizer)):
        optimizer.step()
        return
    with torch.set_grad_enabled(bool(optimizer.defaults.get("differentiable"))):
        inspect.unwrap(type(optimizer).step)(optimizer)


def _is_of_torch(optimizer_class: type[torch.optim.Optimizer]) -> bool:
    return optimizer_class.__module__.startswith("torch.optim.")
