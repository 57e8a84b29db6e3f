"""The gradients of a step: what is pushed, whether the script changed them, and what a GradScaler has
found."""

from __future__ import annotations

import math
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, final

import torch
import torch.utils.hooks

from tensorkv.keys import ABSENT

_WATCHED_STEPS = 3
"""Number of steps whose gradients are watched. It costs a norm of each gradient in every backward."""


def pushed_gradient(parameter: torch.nn.Parameter) -> Any:
    """Return what a parameter pushes: its gradient, dense and without a graph, or ABSENT."""
    found = parameter.grad
    if found is None:
        return ABSENT
    if found.layout is not torch.strided:
        found = found.to_dense()
    return found.detach() if found.requires_grad else found


def call_after_accumulation(
    parameter: torch.nn.Parameter, method: Callable[[torch.Tensor], None]
) -> torch.utils.hooks.RemovableHandle:
    """Call a method whenever a gradient of the parameter was accumulated, while its object lives.

    A hook that held the object would keep it, and its parameters, alive for ever: the garbage collector does
    not look through torch's own structures. A parameter that is frozen now is called for once it is not.
    """
    reference = weakref.WeakMethod(method)

    def hook(parameter: torch.Tensor) -> None:
        found = reference()
        if found is not None:
            found(parameter)

    is_trained = parameter.requires_grad
    parameter.requires_grad_(True)  # else torch takes no hook
    handle: torch.utils.hooks.RemovableHandle
    handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]  # torch's
    parameter.requires_grad_(is_trained)
    return handle


@final
class Marks:
    """Tells whether gradients are still those of an earlier moment: not replaced, and not changed."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._parameters = parameters
        gradients = [each.grad for each in parameters]
        self._gradients = [None if each is None else weakref.ref(each) for each in gradients]
        self._versions = [None if each is None else each._version for each in gradients]

    def hold(self) -> bool:
        """Whether all gradients are as they were."""
        return self.are_there() and all(
            each.grad is None or each.grad._version == version
            for each, version in zip(self._parameters, self._versions, strict=True)
        )

    def are_there(self) -> bool:
        """Whether no gradient was replaced."""
        return all(
            each.grad is (None if reference is None else reference())
            for each, reference in zip(self._parameters, self._gradients, strict=True)
        )


@final
class ClippingWatch:
    """Notices gradients that were changed between backward and step, and says once what that means.

    Clipping by the norm of one worker's gradients, which frameworks do unasked, is another algorithm than
    clipping by the norm of their mean. Torch counts changes in place, but clipping to a norm that is not
    reached multiplies by 1, and counts too: so norms are compared.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._made: dict[int, tuple[int, torch.Tensor]] = {}  # by backward, in this step: version and norm
        self._parameters = parameters
        self._steps_left = _WATCHED_STEPS
        self._hooks = [call_after_accumulation(each, self._note) for each in parameters]

    def _note(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self._made[id(parameter)] = parameter.grad._version, _norm(parameter.grad)

    def check(self) -> None:
        """Look at the gradients of a step, and warn if they are not what backward has made."""
        if not self._steps_left:
            return
        self._steps_left -= 1
        changed = any(
            each.grad is not None and self._is_changed(each, each.grad) for each in self._parameters
        )
        self._made.clear()  # a parameter that the next step does not use has a gradient of zeros perhaps
        if changed or not self._steps_left:
            self.stop()
        if changed:
            warnings.warn(_CLIPPED, UserWarning, stacklevel=6)

    def _is_changed(self, parameter: torch.Tensor, gradient: torch.Tensor) -> bool:
        version, norm = self._made.get(id(parameter), (gradient._version, gradient))
        return version != gradient._version and not torch.equal(norm, _norm(gradient))

    def stop(self) -> None:
        """Watch no more."""
        self._steps_left = 0
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def digest(gradients: Iterable[Any]) -> float:
    """Return a number that differs for gradients of different data: their norm, to the last bit."""
    norms = [_norm(each).double().item() for each in gradients if each is not ABSENT]
    return math.hypot(*norms)


def warn_if_alike(digests: Sequence[float]) -> None:
    """Warn if several workers have pushed the very same gradients, in the first step."""
    ranks: dict[float, list[int]] = {}
    for rank, each in enumerate(digests):
        if each and math.isfinite(each):
            ranks.setdefault(each, []).append(rank)
    alike = max(ranks.values(), key=len, default=[])
    if len(alike) > 1:
        warnings.warn(
            f"workers {', '.join(map(str, alike))} have pushed the very same gradients: do they read the "
            "same data? Give each its part, by DataLoader(tensorkv.shard(data), ...)",
            UserWarning,
            stacklevel=5,
        )


def _norm(gradient: torch.Tensor) -> torch.Tensor:
    dense = gradient.detach()
    norm: torch.Tensor = torch.linalg.vector_norm(
        dense if dense.layout is torch.strided else dense.to_dense()
    )
    return norm


_CLIPPED = (
    "the gradients of this worker were changed between backward and step, by clip_grad_norm_ say, or by a "
    "framework's max_grad_norm. To clip each worker's own gradients is not to clip their mean: pass "
    "max_norm=... to DistributedOptimizer and switch the other off (Trainer: max_grad_norm=0), or call "
    "optimizer.clip_grad_norm_(...). If it is meant, pass clip='local'. This is said once"
)


def unscale(parameters: Iterable[torch.nn.Parameter], scale: torch.Tensor) -> None:
    """Divide gradients by the scale of a GradScaler, in place, as its `unscale_` does."""
    inverse = scale.double().reciprocal().float()
    for each in parameters:
        if each.grad is not None:
            each.grad.mul_(inverse.to(each.grad.device))


def tell_scaler() -> None:
    """Tell the GradScaler that is calling `step` that the step was skipped: another worker has found
    infinities.

    All workers then go on with the same scale. The scaler passes only a copy of what it has found, so it is
    looked up among the callers.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is torch.amp.GradScaler.step.__code__:
            scaler, optimizer = frame.f_locals["self"], frame.f_locals["optimizer"]
            for found in scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values():
                found.fill_(1.0)
            return
        frame = frame.f_back  # type: ignore[assignment]
