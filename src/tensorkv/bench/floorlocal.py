"""The floor in one process: the same traffic in bare torch, see floor.py."""

from __future__ import annotations

import math

import torch

from tensorkv.bench.steps import (
    LEARNING_RATE,
    MOMENTUM,
    Expected,
    Plan,
    check_results,
    gradient_value,
    time_steps,
)


def measure_local(plan: Plan) -> list[float]:
    """Return the seconds of each step of bare torch in this process.

    ASSIGN sums the devices' gradients into the stored values; SGD steps torch's fused optimizer on them;
    either then copies the stored values to every device's tensors. It uses torch's default number of threads,
    as MXNet and TensorKV may.

    Raises:
        WrongResult: the values were wrong.
    """
    sizes = [math.prod(shape) for shape in plan.shapes]
    grads = [_tensors(sizes, gradient_value(0, d, plan.num_devices, 1.0)) for d in range(plan.num_devices)]
    outs = [_tensors(sizes, torch.nan) for _ in range(plan.num_devices)]
    stored = _tensors(sizes, 0.0)
    update = _assign if plan.updater == "assign" else _Sgd(stored)

    def step() -> None:
        update(grads, stored)
        for out in outs:
            torch._foreach_copy_(out, stored)

    expected = Expected(plan.updater, plan.num_devices)
    time_steps(step, _nobody_to_wait_for, plan.warmup)
    times_s = time_steps(step, _nobody_to_wait_for, plan.steps)
    values = [expected.step(1.0) for _ in range(plan.warmup + plan.steps)]
    check_results((tensor.numpy() for out in outs for tensor in out), values[-1])
    return times_s


def _nobody_to_wait_for() -> None:
    """Do nothing: there is only one process."""


def _tensors(sizes: list[int], value: float) -> list[torch.Tensor]:
    return [torch.full((size,), value, device="cpu") for size in sizes]


def _assign(grads: list[list[torch.Tensor]], stored: list[torch.Tensor]) -> None:
    if len(grads) == 1:
        torch._foreach_copy_(stored, grads[0])
        return
    for target, first, second in zip(stored, grads[0], grads[1], strict=True):
        torch.add(first, second, out=target)
    for more in grads[2:]:
        torch._foreach_add_(stored, more)


class _Sgd:
    """Torch's fused SGD over all tensors at once, on the sum of the devices' gradients."""

    def __init__(self, stored: list[torch.Tensor]) -> None:
        self._parameters = [torch.nn.Parameter(each, requires_grad=False) for each in stored]
        self._optimizer = torch.optim.SGD(self._parameters, lr=LEARNING_RATE, momentum=MOMENTUM, fused=True)
        self._total = [torch.zeros_like(each) for each in stored]

    def __call__(self, grads: list[list[torch.Tensor]], stored: list[torch.Tensor]) -> None:
        total = grads[0]
        if len(grads) > 1:
            _assign(grads, self._total)
            total = self._total
        for parameter, grad in zip(self._parameters, total, strict=True):
            parameter.grad = grad
        self._optimizer.step()
