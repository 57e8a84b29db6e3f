"""The arithmetic of MXNet's optimizers, as torch optimizers that a store can run on servers.

They differ from torch's in the order of weight decay and clipping, and in Adam's epsilon. `w` is the
weight, `g` the gradient; `clip` limits each element and does nothing unless `clip_gradient` > 0.

`set_number` does not affect the arithmetic. A store keeps the state if the same optimizer is set again, and
MXNet does not: a unique number makes each `set_optimizer` a different one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch

Parameters = Iterable[torch.nn.Parameter]


class _MXNetOptimizer(torch.optim.Optimizer):
    """Calls `_update` for each parameter with a gradient."""

    elementwise: ClassVar[bool] = True
    """Each element is treated on its own, so a store may slice values."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters. `closure` is not used."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, self.state[parameter], group)

    def _update(self, w: torch.Tensor, g: torch.Tensor, state: Any, group: dict[str, Any]) -> None:
        raise NotImplementedError


class SGD(_MXNetOptimizer):
    """m = momentum * m - lr * (clip(rescale_grad * g) + wd * w); w += m. Without m if momentum <= 0."""

    def __init__(
        self,
        params: Parameters,
        learning_rate: float = 0.01,
        momentum: float = 0.0,
        wd: float = 0.0,
        rescale_grad: float = 1.0,
        clip_gradient: float | None = None,
        set_number: int = 0,
    ) -> None:
        _check_numbers(learning_rate, momentum, wd, rescale_grad, clip_gradient or 0)
        defaults = {
            "learning_rate": learning_rate,
            "momentum": momentum,
            "wd": wd,
            "rescale_grad": rescale_grad,
            "clip_gradient": clip_gradient,
            "set_number": set_number,
        }
        super().__init__(params, defaults)

    def _update(self, w: torch.Tensor, g: torch.Tensor, state: Any, group: dict[str, Any]) -> None:
        change = _clip(g * group["rescale_grad"], group).add_(w, alpha=group["wd"])
        if group["momentum"] > 0:
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(w)
            state["momentum"].mul_(group["momentum"]).sub_(change, alpha=group["learning_rate"])
            w.add_(state["momentum"])
        else:
            w.sub_(change, alpha=group["learning_rate"])


class Adam(_MXNetOptimizer):
    """Adam with weight decay inside the clipping, and epsilon outside the bias correction.

    h = clip(rescale_grad * g + wd * w); m and v are the decaying means of h and h * h;
    w -= lr * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + epsilon)
    """

    def __init__(
        self,
        params: Parameters,
        learning_rate: float = 0.001,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        wd: float = 0.0,
        rescale_grad: float = 1.0,
        clip_gradient: float | None = None,
        begin_num_update: int = 0,
        set_number: int = 0,
    ) -> None:
        _check_numbers(learning_rate, beta1, beta2, epsilon, wd, rescale_grad, clip_gradient or 0)
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
            raise ValueError(f"beta1={beta1} and beta2={beta2} must lie in [0, 1)")
        if not isinstance(begin_num_update, int) or begin_num_update < 0:
            raise ValueError(f"begin_num_update={begin_num_update!r} must be a count, 0 or more")
        defaults = {
            "learning_rate": learning_rate,
            "beta1": beta1,
            "beta2": beta2,
            "epsilon": epsilon,
            "wd": wd,
            "rescale_grad": rescale_grad,
            "clip_gradient": clip_gradient,
            "begin_num_update": begin_num_update,
            "set_number": set_number,
        }
        super().__init__(params, defaults)

    def _update(self, w: torch.Tensor, g: torch.Tensor, state: Any, group: dict[str, Any]) -> None:
        if not state:
            state["step"] = group["begin_num_update"]
            state["mean"] = torch.zeros_like(w)
            state["variance"] = torch.zeros_like(w)
        state["step"] += 1
        beta1, beta2 = group["beta1"], group["beta2"]
        change = _clip((g * group["rescale_grad"]).add_(w, alpha=group["wd"]), group)
        state["mean"].mul_(beta1).add_(change, alpha=1 - beta1)
        state["variance"].mul_(beta2).addcmul_(change, change, value=1 - beta2)
        unbias = math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        divisor = state["variance"].sqrt().add_(group["epsilon"])
        w.addcdiv_(state["mean"], divisor, value=-group["learning_rate"] * unbias)


class Test(_MXNetOptimizer):
    """w += rescale_grad * g, as MXNet's tests use it."""

    def __init__(self, params: Parameters, rescale_grad: float = 1.0, set_number: int = 0) -> None:
        _check_numbers(rescale_grad)
        super().__init__(params, {"rescale_grad": rescale_grad, "set_number": set_number})

    def _update(self, w: torch.Tensor, g: torch.Tensor, state: Any, group: dict[str, Any]) -> None:
        w.add_(g, alpha=group["rescale_grad"])


def _clip(tensor: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    limit = group["clip_gradient"]
    return tensor.clamp_(-limit, limit) if limit and limit > 0 else tensor


def _check_numbers(*values: Any) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{value!r} is not a number")
