"""WorkerSteps: each worker runs the optimizer, on the mean of all gradients, which the servers take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, final

import torch

from tensorkv.errors import NotSupported
from tensorkv.keys import ABSENT
from tensorkv.training.gradients import pushed_gradient
from tensorkv.training.states import StateView, state_digest
from tensorkv.training.steps import State, Steps

_USED = "tensorkv.used"
"""Key of which parameters have a gradient: more than 0 if that of some worker has one."""


@final
class WorkerSteps(Steps):
    """Steps that every worker makes itself, all with the same bits. A key holds the mean of a gradient."""

    def _start(self, names: list[tuple[str, ...]]) -> None:
        if not self.kv._allows_commit:
            raise NotSupported(
                f"where='workers' needs the gradients of all workers, and {self.kv!r} waits for none"
            )
        self._keyed: dict[str, torch.nn.Parameter] = {}
        self._reduced = False  # whether the gradients are means: no backward was run after `reduce`
        self.accumulate: int | None = None  # number of backward passes in a step; the last one reduces
        self._in_backward = False
        self._num_backwards = 0  # since the last step
        with self.meeting() as others:
            self.check_alike(others, names)
            others.share(self.tensors())
        self._learn_keys(names)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self._keyed.values())

    def _learn_keys(self, names: list[tuple[str, ...]]) -> None:
        new = {name: each for name, each in self.trained(names).items() if name not in self._keyed}
        if not new:
            return
        self.kv.init({name: torch.zeros_like(each, device="cpu").detach() for name, each in new.items()})
        self._keyed.update(new)
        for each in new.values():
            each.register_post_accumulate_grad_hook(self._note_backward)  # type: ignore[no-untyped-call]  # torch's
        if len(new) < len(self._keyed):
            self.kv.delete(_USED)
        self.kv.init(_USED, torch.zeros(len(self._keyed), device="cpu"))

    def _note_backward(self, parameter: torch.Tensor) -> None:
        """Called for each gradient as it is accumulated; calls `_after_backward` when all are."""
        self._reduced = False
        if self.accumulate is not None and not self._in_backward:
            self._in_backward = True
            queue = torch.autograd.Variable._execution_engine.queue_callback
            queue(self._after_backward)

    def _after_backward(self) -> None:
        self._in_backward = False
        self._num_backwards += 1
        if self._num_backwards == self.accumulate:
            self.reduce()

    def add_group(self, group: State) -> None:
        self._learn_keys(self.extend(group))

    # ---- a step ----------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None) -> Any:
        if closure is None:
            self.skipped = not self.apply(None)
            return None

        def on_all() -> Any:
            with torch.enable_grad():
                loss = closure()
            self._reduced = self._reduced and self.accumulate is not None  # no hook may have run
            self.reduce()
            self._new_step()
            self._clip_mean(self.max_norm)
            return self._mean_loss(loss)

        return self.inner.step(on_all)

    def apply(self, skip: bool | None) -> bool:
        self.reduce()
        self._clip_mean(self.max_norm)
        self._new_step()
        checks = self.skip_nonfinite or skip is not None
        if checks and not all(bool(each.isfinite().all()) for each in self._means()):
            return False
        self.inner.step()
        return True

    def _new_step(self) -> None:
        self._reduced = self._in_backward = False
        self._num_backwards = 0

    def clip(self, max_norm: float) -> float:
        self.reduce()
        self._clip_mean(max_norm)
        assert self.norm is not None
        return self.norm

    def reduce(self) -> None:
        """Replace each gradient by its mean over the workers that have one, unless that is done."""
        if self._reduced:
            return
        self._learn_keys(self.names())
        pushed = {name: pushed_gradient(each) for name, each in self._keyed.items()}
        self.note_pushed(pushed.values())
        used = torch.tensor([float(each is not ABSENT) for each in pushed.values()], device="cpu")
        means = {name: self._destination(each) for name, each in self._keyed.items()}
        self.kv.pushpull({**pushed, _USED: used}, out={**means, _USED: used})
        for (name, parameter), is_used in zip(self._keyed.items(), used.tolist(), strict=True):
            parameter.grad = means[name] if is_used else None
        self._reduced = True

    def _destination(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """Return where the mean of a gradient goes: into the gradient, if there is a dense one."""
        found = parameter.grad
        if found is None or found.layout is not torch.strided or found.requires_grad:
            return torch.empty_like(parameter, requires_grad=False)
        return found

    def _means(self) -> list[torch.Tensor]:
        return [each.grad for each in self.parameters if each.grad is not None]

    def _clip_mean(self, max_norm: float | None) -> None:
        if max_norm is not None:
            self.norm = torch.nn.utils.clip_grad_norm_(self.parameters, max_norm).item()

    def _mean_loss(self, loss: Any) -> Any:
        """Return the mean of a loss over the workers, so that all search along the same line."""
        if not isinstance(loss, (torch.Tensor, float)):
            return loss
        mean = self._loss_of_all(torch.as_tensor(loss, device="cpu").detach().double().reshape(1))
        return mean.to(loss).reshape(loss.shape) if isinstance(loss, torch.Tensor) else mean.item()

    def _loss_of_all(self, loss: torch.Tensor) -> torch.Tensor:
        if "tensorkv.loss" not in self.kv:
            self.kv.init("tensorkv.loss", torch.zeros_like(loss))
        mean: torch.Tensor = self.kv.pushpull("tensorkv.loss", loss)
        return mean / self.kv.num_workers if self.kv.reduction == "sum" else mean

    # ---- checkpoints -----------------------------------------------------------------------------

    @property
    def state(self) -> MutableMapping[torch.Tensor, Any]:
        return StateView(lambda: self.inner.state, self.inner.state)

    def load(self, state: Mapping[Any, State], groups: list[State]) -> None:
        self.inner.__setstate__({"state": defaultdict(dict, state), "param_groups": groups})
        with self.meeting() as others:
            others.check_alike("checkpoint", state_digest(self.by_name(self.inner.state)))
            others.share(self.tensors())
