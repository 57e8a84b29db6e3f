"""WorkerSteps: each worker runs the optimizer, on the mean of all gradients, which the servers take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any, final

import torch

from tensorkv.errors import NotSupported, SettingMismatch
from tensorkv.keys import ABSENT
from tensorkv.training.gradients import Marks, call_after_accumulation, pushed_gradient
from tensorkv.training.start import digests
from tensorkv.training.states import StateView, state_digest
from tensorkv.training.steps import State, Steps

_OF_ALL = "tensorkv.all"
"""Key of numbers about the workers: see `WorkerSteps._numbers`."""

_LOSS = "tensorkv.loss"
"""Key of the loss of a closure."""


@final
class WorkerSteps(Steps):
    """Steps that every worker makes itself, all with the same bits. A key holds the mean of a gradient."""

    def _start(self, names: list[tuple[str, ...]]) -> None:
        if not self.kv._allows_commit:
            raise NotSupported(
                f"where='workers' needs the gradients of all workers, and {self.kv!r} waits for none"
            )
        self._keyed: dict[str, torch.nn.Parameter] = {}
        self._is_paused = False  # during a backward pass that does not count
        self._means: Marks | None = None  # of gradients that are means: no backward was run since
        self._in_backward = False
        self._num_backwards = 0  # since the last step
        self._is_stepping = False  # whether the inner optimizer is changing weights
        self._versions: list[int] = []  # of the parameters, after the last step
        with self.meeting() as others:
            self.check_alike(others, names)
            others.check_alike("state of the optimizer", state_digest(self.by_name(self.inner.state)))
            others.share(self.tensors())
        self._learn_keys(names)
        self._new_step()

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self._keyed.values())

    def _learn_keys(self, names: list[tuple[str, ...]]) -> None:
        new = {name: each for name, each in self.trained(names).items() if name not in self._keyed}
        if not new:
            return
        self.kv.init({name: torch.zeros_like(each, device="cpu").detach() for name, each in new.items()})
        is_first = not self._keyed
        self._keyed.update(new)
        self._versions += [each._version for each in new.values()]
        for each in new.values():
            call_after_accumulation(each, self._note_backward)
        if not is_first:
            self.kv.delete(_OF_ALL)
        self.kv.init(_OF_ALL, torch.zeros(4 + len(self._keyed), dtype=torch.float64, device="cpu"))

    def _note_backward(self, parameter: torch.Tensor) -> None:
        """Called for each gradient as it is accumulated; calls `_after_backward` when all are."""
        self._means = None
        if self.chosen.accumulate is not None and not self._is_paused and not self._in_backward:
            self._in_backward = True
            queue = torch.autograd.Variable._execution_engine.queue_callback
            queue(self._after_backward)

    def _after_backward(self) -> None:
        self._in_backward = False
        self._num_backwards += 1
        if self._num_backwards == self.chosen.accumulate:
            self.reduce()

    def pause(self, is_paused: bool) -> None:
        self._is_paused = is_paused

    def add_group(self, group: State) -> None:
        self._learn_keys(self.extend(group))

    # ---- a step ----------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None) -> Any:
        if closure is None:
            self.skipped = not self.apply(None)
            return None

        def evaluate() -> Any:
            with torch.enable_grad():
                loss = closure()
            self.reduce()
            self._clip_means(self.chosen.max_norm)
            self._new_step()
            return self._mean_loss(loss)

        losses = [evaluate()]  # the first is made here, because an optimizer cannot be told to skip its step
        self.skipped = self.chosen.skip_nonfinite and not self._are_finite()
        if self.skipped:
            return losses[0]
        self._is_stepping = True
        try:
            return self.inner.step(lambda: losses.pop() if losses else evaluate())
        finally:
            self._is_stepping = False
            self._new_step()

    def apply(self, skip: bool | None) -> bool:
        self.reduce()
        self._clip_means(self.chosen.max_norm)
        applied = not (self.chosen.skip_nonfinite or skip is not None) or self._are_finite()
        if applied:
            self.inner.step()
        self._new_step()
        return applied

    def _new_step(self) -> None:
        self._means = None
        self._in_backward = False
        self._num_backwards = 0
        self._versions = [each._version for each in self._keyed.values()]

    def clip(self, max_norm: float) -> float:
        self.reduce()
        self._clip_means(max_norm)
        assert self.norm is not None
        return self.norm

    def reduce(self) -> None:
        """Replace each gradient by its mean over the workers that have one, unless that is done.

        Raises:
            SettingMismatch: the workers' options differ; no worker makes the step.
        """
        if self._means is not None and self._means.are_there():
            return
        self._learn_keys(self.names())
        pushed = {name: pushed_gradient(each) for name, each in self._keyed.items()}
        self.note_pushed(pushed.values())
        mine = self._numbers(pushed.values())
        means = {name: self._destination(each) for name, each in self._keyed.items()}
        found = torch.empty_like(mine)
        self.kv.pushpull({**pushed, _OF_ALL: mine}, out={**means, _OF_ALL: found})
        found /= found[0].item()
        for (name, parameter), is_used in zip(self._keyed.items(), found[4:].tolist(), strict=True):
            parameter.grad = means[name] if is_used else None
        self._means = Marks(self.parameters)
        if found[1]:
            with self.meeting() as others:
                others.share(self.tensors())
        if not torch.equal(found[2:4], mine[2:4]):
            raise SettingMismatch(
                f"the options of the workers' optimizers differ; those of worker {self.kv.rank} are "
                f"{self.options()}: run the same schedule on all, and give ReduceLROnPlateau a loss of all, "
                "tensorkv.average(loss)"
            )

    def _numbers(self, pushed: Iterable[Any]) -> torch.Tensor:
        """Return 1, whether the script has changed weights, digests of the options, and who has a gradient.

        The mean or sum of 1 is what all others are divided by.
        """
        versions = [each._version for each in self._keyed.values()]
        changed = versions != self._versions and not self._is_stepping
        used = [each is not ABSENT for each in pushed]
        flags = torch.tensor([1.0, float(changed), *used], dtype=torch.float64, device="cpu")
        return torch.cat([flags[:2], digests(repr(self.options())), flags[2:]])

    def _destination(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """Return where the mean of a gradient goes: into the gradient, if there is a dense one."""
        found = parameter.grad
        if found is None or found.layout is not torch.strided or found.requires_grad:
            return torch.empty_like(parameter, requires_grad=False)
        return found

    def _are_finite(self) -> bool:
        return all(bool(each.grad.isfinite().all()) for each in self.parameters if each.grad is not None)

    def _clip_means(self, max_norm: float | None) -> None:
        if max_norm is not None:
            self.norm = torch.nn.utils.clip_grad_norm_(self.parameters, max_norm).item()

    def _mean_loss(self, loss: Any) -> Any:
        """Return the mean of a loss over the workers, so that all search along the same line."""
        if not isinstance(loss, float) and not (isinstance(loss, torch.Tensor) and loss.numel() == 1):
            return loss
        value = loss.detach().item() if isinstance(loss, torch.Tensor) else loss
        if _LOSS not in self.kv:
            self.kv.init(_LOSS, torch.zeros(2, dtype=torch.float64, device="cpu"))
        total, number = self.kv.pushpull(
            _LOSS, torch.tensor([value, 1.0], dtype=torch.float64, device="cpu")
        ).tolist()
        return loss.new_full(loss.shape, total / number) if isinstance(loss, torch.Tensor) else total / number

    # ---- checkpoints -----------------------------------------------------------------------------

    @property
    def state(self) -> MutableMapping[torch.Tensor, Any]:
        return StateView(lambda: self.inner.state, self.inner.state)

    def load(self, state: Mapping[Any, State], groups: list[State]) -> None:
        self.inner.__setstate__({"state": defaultdict(dict, state), "param_groups": groups})
        with self.meeting() as others:
            others.check_alike("checkpoint", state_digest(self.by_name(self.inner.state)))
            others.share(self.tensors())
        self._new_step()
