"""Steps: what changes about a `DistributedOptimizer`, wherever the update runs; see the package's
docstring."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from tensorkv.errors import InvalidArgument, InvalidValue, LoadError, NotSupported
from tensorkv.store import KVStore
from tensorkv.training.buffers import BufferExchange, Buffers
from tensorkv.training.choices import Choices
from tensorkv.training.gradients import ClippingWatch, digest, tell_scaler, unscale, warn_if_alike
from tensorkv.training.start import Meeting, describe, meeting
from tensorkv.updaters.groups import plain

State = dict[str, Any]


class Steps(ABC):
    """An inner optimizer, a model, and the store in which its workers meet. Not safe for several threads at
    once."""

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        model: torch.nn.Module,
        kv: KVStore,
        chosen: Choices,
    ) -> None:
        self.inner = inner
        self.kv = kv
        self.chosen = chosen
        self.norm: float | None = None  # of the gradients of the last step, if it was needed
        self.skipped = False  # whether the last step was
        self.watch: ClippingWatch | None = None
        self._model = model
        self._name_of = {id(each): name for name, each in model.named_parameters()}
        if (chosen.max_norm is not None or chosen.skip_nonfinite) and not kv._allows_commit:
            raise NotSupported(
                f"max_norm and skip_nonfinite need all workers' gradients of a step at once, and {kv!r} does "
                "not wait for these; leave them away, or use kind='dist_sync'"
            )
        self._was_first = False  # whether the first step was made
        self._digest = 0.0  # of this worker's gradients in the first step
        self._start(self.names())
        self._buffers: BufferExchange | None = None
        if kv.num_workers > 1 and next(model.buffers(), None) is not None:
            self._buffers = self._exchange_of_buffers(chosen.buffers)

    # ---- what a step is --------------------------------------------------------------------------

    @property
    @abstractmethod
    def parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that are trained."""

    @abstractmethod
    def step(self, closure: Callable[[], Any] | None) -> Any:
        """Make a step, and return what the closure has returned."""

    @abstractmethod
    def apply(self, skip: bool | None) -> bool:
        """Make a step with the gradients that are there.

        Args:
            skip: whether this worker asks all to skip the step; None if no worker may.

        Returns:
            Whether the step was made; False if it was skipped.
        """

    def step_scaled(self, scale: torch.Tensor | None, found_inf: torch.Tensor) -> None:
        """Make a step for a GradScaler. Without a scale the gradients are unscaled already."""
        if self.chosen.overlap:
            raise NotSupported(
                f"overlap={self.chosen.overlap!r} with a GradScaler: scaled gradients have left before it "
                "looks at them; pass overlap=False"
            )
        mine = bool(found_inf.item())
        if scale is not None and not mine:
            unscale(self.parameters, scale)
        self.skipped = not self.apply(mine)
        if self.skipped and not mine:
            tell_scaler()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within the block, let backward passes neither send anything nor count."""
        self.pause(True)
        try:
            yield
        finally:
            self.pause(False)

    @abstractmethod
    def pause(self, is_paused: bool) -> None:
        """Let the backward passes that follow send nothing, or send again."""

    @abstractmethod
    def clip(self, max_norm: float) -> float:
        """Return the norm of the mean of all gradients; the step that follows scales them down to
        `max_norm`."""

    @abstractmethod
    def add_group(self, group: State) -> None:
        """Add a group to the optimizer. Every worker calls it."""

    @property
    @abstractmethod
    def state(self) -> MutableMapping[torch.Tensor, Any]:
        """The optimizer's state of each parameter. It is never false."""

    @abstractmethod
    def load(self, state: Mapping[Any, State], groups: list[State]) -> None:
        """Go on with the state and the options of a checkpoint, and rank 0's present weights.

        Every worker calls it, with the same checkpoint.
        """

    def wait(self) -> None:  # noqa: B027  # only servers send weights late
        """Wait until all weights of the last step are here."""

    def release(self) -> None:  # noqa: B027  # only servers share
        """Make shared weights this worker's own, before it leaves."""

    def close(self) -> None:
        """Leave the store."""
        self.wait()
        self.release()
        self.kv.close()
        if self.watch is not None:
            self.watch.stop()
        if self._buffers is not None:
            self._buffers.close()

    # ---- buffers ---------------------------------------------------------------------------------

    def _exchange_of_buffers(self, which: Buffers) -> BufferExchange:
        """Return what makes buffers alike. Without rounds, workers take what rank 0 has pushed last."""
        in_rounds = self.kv._allows_commit
        if which == "mean" and not in_rounds:
            raise NotSupported(f"buffers='mean' needs those of all workers, and {self.kv!r} waits for none")
        kind = "dist_sync" if in_rounds else "dist_async"
        return BufferExchange(
            self._model, self.kv._open_beside(f"{self.kv.name}.buffers", kind, "mean"), which
        )

    def after_step(self) -> None:
        """Make the buffers alike on all workers, after a step; and see in the first one whether all is
        well."""
        if not self._was_first and self.kv.num_workers > 1:
            self._was_first = True
            with self.meeting() as others:
                self._look_at_first_step(others)
        if self._buffers is not None:
            self._buffers.exchange()

    def _look_at_first_step(self, others: Meeting) -> None:
        if self._buffers is not None:
            self._buffers.agree(others)
        digests = others.numbers(self._digest)
        if self.kv.rank == 0:
            warn_if_alike(digests)

    # ---- who has what ----------------------------------------------------------------------------

    @abstractmethod
    def _start(self, names: list[tuple[str, ...]]) -> None:
        """Make sure that all workers have the same optimizer, model and values; `names` are those of each
        group."""

    def note_pushed(self, gradients: Iterable[Any]) -> None:
        """Note what this worker pushes in its first step."""
        if not self._was_first and self.kv.num_workers > 1:
            self._digest = digest(gradients)

    def meeting(self) -> AbstractContextManager[Meeting]:
        """Let the workers meet."""
        return meeting(self.kv)

    def names(self) -> list[tuple[str, ...]]:
        """Return the names of the parameters in each group.

        Raises:
            InvalidArgument: a parameter is not one of the model.
        """
        found: list[tuple[str, ...]] = []
        for number, group in enumerate(self.inner.param_groups):
            for place, parameter in enumerate(group["params"]):
                if id(parameter) not in self._name_of:
                    raise InvalidArgument(
                        f"parameter {place} of group {number}, of shape {tuple(parameter.shape)}, is "
                        "no parameter of the model that was passed: pass the model whose parameters the "
                        "optimizer has, as they are after a load with assign=True, say"
                    )
                _check_placement(self._name_of[id(parameter)], parameter)
            found.append(tuple(self._name_of[id(each)] for each in group["params"]))
        return found

    def trained(self, names: list[tuple[str, ...]]) -> dict[str, torch.nn.Parameter]:
        """Return the parameters of all groups that require a gradient, by name."""
        found = {name: self._model.get_parameter(name) for group in names for name in group}
        return {name: each for name, each in found.items() if each.requires_grad}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all parameters and buffers of the model."""
        return {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}

    def description(self, names: list[tuple[str, ...]]) -> Iterator[str]:
        """Yield what must be alike on all workers, a line for each part."""
        yield f"{type(self.inner).__name__} with {len(names)} groups"
        for number, (group, options) in enumerate(zip(names, self.options(), strict=True)):
            yield f"group {number}: {', '.join(group)}"
            yield f"options of group {number}: {options}"
        for name, each in self.tensors().items():
            yield describe(name, each)

    def check_alike(self, others: Meeting, names: list[tuple[str, ...]]) -> None:
        """Raise on all workers if their models or optimizers differ, or there is nothing to train."""
        others.check_alike("model and optimizer", list(self.description(names)))
        if not self.trained(names):
            raise InvalidArgument(
                "no parameter of this optimizer requires a gradient, so there is nothing to train"
            )

    def options(self) -> list[State]:
        """Return the options of each group, not what schedules and scripts keep beside them."""
        return [
            {name: plain(group[name]) for name in self.inner.defaults if name in group}
            for group in self.inner.param_groups
        ]

    def extend(self, group: State) -> list[tuple[str, ...]]:
        """Add a group to the inner optimizer; return the names in all groups, which are alike on all
        workers."""
        self._name_of = {id(each): name for name, each in self._model.named_parameters()}  # it may have grown
        self.inner.add_param_group(group)
        try:
            names = self.names()
        except Exception:
            self.inner.param_groups.pop()
            raise
        with self.meeting() as others:
            self.check_alike(others, names)
        return names

    def by_name(self, state: Mapping[Any, State]) -> dict[str, State]:
        """Return the state of each parameter that is trained, by its name, without empty entries.

        Raises:
            LoadError: there is state of something else.
        """
        found: dict[str, State] = {}
        for parameter, each in state.items():
            name = self._name_of.get(id(parameter))
            if name is None:
                raise LoadError("the checkpoint has state that belongs to no parameter")
            known = {
                entry: value for entry, value in each.items() if value is not None
            }  # SGD's momentum may be
            if known and parameter.requires_grad:
                found[name] = known
        return found


def _check_placement(name: str, parameter: torch.nn.Parameter) -> None:
    """Raise if a parameter is not a whole, dense tensor of this process."""
    if hasattr(parameter, "device_mesh"):
        raise NotSupported(
            f"parameter {name!r} is a DTensor, of FSDP2 say: its parts are on several workers, and each "
            "would push its own under one key. Without fully_shard, too, the servers hold the state only once"
        )
    if torch.nn.parameter.is_lazy(parameter):
        raise InvalidValue(f"parameter {name!r} is lazy and has no shape yet; call forward once first")
