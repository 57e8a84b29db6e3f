"""Remote: what changes about a `DistributedOptimizer`: its inner optimizer, its store, and what was sent
last."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, final

import torch

from tensorkv.bound import BoundStep
from tensorkv.errors import InvalidArgument, InvalidValue, LoadError, NotSupported
from tensorkv.keys import ABSENT
from tensorkv.store import KVStore
from tensorkv.training.gradients import ClippingWatch, Marks, pushed_gradient
from tensorkv.training.start import Meeting, describe, meeting
from tensorkv.training.states import state_digest, with_states
from tensorkv.updaters.groups import plain

State = dict[str, Any]


@final
class Remote:
    """An optimizer that runs on the servers of a store. Not safe for several threads at once."""

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        model: torch.nn.Module,
        kv: KVStore,
        max_norm: float | None,
        skip_nonfinite: bool,
    ) -> None:
        self.inner = inner
        self.kv = kv
        self.max_norm = max_norm
        self.skip_nonfinite = skip_nonfinite
        self.norm: float | None = None  # of the gradients of the last step, if it was needed
        self.skipped = False  # whether the last step was
        self.watch: ClippingWatch | None = None
        self.may_commit = kv._allows_commit
        self._commits = max_norm is not None or skip_nonfinite
        self._held: Marks | None = None  # of the gradients that await a commit
        self._clip_to: float | None = None
        self.steps = 0  # that this worker has made, or loaded
        self._num_meetings = 0
        self._model = model
        self._name_of = {id(each): name for name, each in model.named_parameters()}
        self._keyed: dict[str, torch.nn.Parameter] = {}  # what the store has
        self._gradients: dict[str, Any] = {}
        self._step: BoundStep | None = None
        self._versions: list[int] = []  # of the parameters, after the last pull
        self._sent: list[State] = []  # the options of each group that the servers have
        self._groups: list[tuple[str, ...]] = []  # the names in each group
        if self._commits and not self.may_commit:
            raise NotSupported(
                f"max_norm and skip_nonfinite need all workers' gradients of a step at once, and {kv!r} does "
                "not wait for these; leave them away, or use kind='dist_sync'"
            )
        self._start()

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that are trained."""
        return list(self._keyed.values())

    # ---- the start -------------------------------------------------------------------------------

    def _start(self) -> None:
        names = self._names()
        with self._meeting() as others:
            others.check_alike("model and optimizer", list(self._description(names)))
            keyed = {id(self._parameter(name)) for group in names for name in group} & self._trainable()
            rest = {
                name: each
                for name, each in [*self._model.named_parameters(), *self._model.named_buffers()]
                if id(each) not in keyed
            }
            others.share(rest)
        self._set_groups(names)
        self._learn_keys()
        if not self._keyed:
            raise InvalidArgument(
                "no parameter of this optimizer requires a gradient, so there is nothing to train"
            )
        self._pull()

    def _meeting(self) -> AbstractContextManager[Meeting]:
        self._num_meetings += 1
        return meeting(self.kv, self._num_meetings)

    def _names(self) -> list[tuple[str, ...]]:
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
            found.append(tuple(self._name_of[id(each)] for each in group["params"]))
        return found

    def _parameter(self, name: str) -> torch.nn.Parameter:
        return self._model.get_parameter(name)

    def _trainable(self) -> set[int]:
        return {
            id(each) for group in self.inner.param_groups for each in group["params"] if each.requires_grad
        }

    def _description(self, names: list[tuple[str, ...]]) -> Iterator[str]:
        yield f"{type(self.inner).__name__} with {len(names)} groups"
        for number, group in enumerate(names):
            yield f"group {number}: {', '.join(group)}"
        for name, each in [*self._model.named_parameters(), *self._model.named_buffers()]:
            yield describe(name, each)

    def _set_groups(self, names: list[tuple[str, ...]]) -> None:
        """Set the optimizer on the servers, as its groups are now."""
        keys_by_id = {identity: [name] for identity, name in self._name_of.items()}
        self.kv._set_instance(self.inner, None, keys_by_id)
        self._groups = names
        self._sent = [self._options(group) for group in self.inner.param_groups]

    def _learn_keys(self) -> None:
        """Initialise the parameters that require a gradient and are not in the store yet."""
        new = {
            name: self._parameter(name)
            for group in self._groups
            for name in group
            if name not in self._keyed and self._parameter(name).requires_grad
        }
        if not new:
            return
        for name, each in new.items():
            _check_placement(name, each)
        self.kv.init({name: each.detach() for name, each in new.items()})
        self._keyed.update(new)
        self._gradients.update(dict.fromkeys(new, ABSENT))
        self._versions += [each._version for each in new.values()]
        self._bind()

    def _bind(self) -> None:
        self._step = self.kv.bind(push=self._gradients, out=self._keyed)

    # ---- a step ----------------------------------------------------------------------------------

    def step(self, *, skip: bool | None = None) -> bool:
        """Push the gradients, and pull the weights that they lead to.

        Args:
            skip: whether this worker asks all to skip the step; None if no worker may.

        Returns:
            Whether the step was made; False if it was skipped.
        """
        if not self.may_commit and skip:
            self._push_nothing()
            return False
        if not self.may_commit or not (self._commits or self._held or skip is not None):
            self._prepare()
            assert self._step is not None
            self._step.pushpull()
            self._note_pull()
            return True
        self._hold()
        max_norm = self.max_norm if self._clip_to is None else self._clip_to
        self._held, self._clip_to = None, None
        result = self.kv.commit(max_norm=max_norm, skip=bool(skip), check_finite=self.skip_nonfinite)
        self.norm = result.norm
        self._pull()
        return result.applied

    def clip(self, max_norm: float) -> float:
        """Push the gradients of a step without applying them; return the norm of their mean.

        The step that follows scales them down to `max_norm`.
        """
        if not self.may_commit:
            raise NotSupported(
                f"clip_grad_norm_: {self.kv!r} does not wait for all workers' gradients of a step"
            )
        self._hold()
        self._clip_to = max_norm
        norm = self.kv.commit(apply=False).norm
        assert norm is not None
        return norm

    def _hold(self) -> None:
        """Push the gradients for a commit, unless these are pushed already."""
        if self._held is not None and self._held.hold():
            return
        if self._held is not None:  # of a step that the script has not made
            self.kv.commit(skip=True)
        self._prepare()
        assert self._step is not None
        self._step.push(apply=False)
        self._held = Marks(self.parameters)

    def _push_nothing(self) -> None:
        """Take part in a round that other workers make."""
        self._prepare()
        self._gradients.update(dict.fromkeys(self._keyed, ABSENT))
        assert self._step is not None
        self._step.pushpull()
        self._note_pull()

    def add_group(self, group: dict[str, Any]) -> None:
        """Add a group to the optimizer. Every worker calls it."""
        groups = self.inner.param_groups
        self.inner.add_param_group(group)
        try:
            names = self._names()
        except InvalidArgument:
            groups.pop()
            raise
        with self._meeting() as others:
            others.check_alike("optimizer", list(self._description(names)))
        self._set_groups(names)
        self._learn_keys()

    def _prepare(self) -> None:
        """Send what goes ahead of the gradients, and collect these."""
        self._send_values()
        if self._grown():
            self._learn_keys()
        self._send_options()
        for name, parameter in self._keyed.items():
            self._gradients[name] = pushed_gradient(parameter)
        self.steps += 1

    def _grown(self) -> bool:
        """Whether a frozen parameter of the optimizer requires a gradient by now."""
        if sum(map(len, self._groups)) == len(self._keyed):
            return False
        return any(
            each.requires_grad and self._name_of[id(each)] not in self._keyed
            for group in self.inner.param_groups
            for each in group["params"]
        )

    def _send_values(self) -> None:
        """Put the parameters that the script has changed since the last pull."""
        versions = [each._version for each in self._keyed.values()]
        if versions == self._versions or self.kv.rank != 0:
            return
        changed = {
            name: each.detach()
            for (name, each), now, then in zip(self._keyed.items(), versions, self._versions, strict=True)
            if now != then
        }
        self.kv.put(changed)

    def _send_options(self) -> None:
        for number, group in enumerate(self.inner.param_groups):
            options = self._options(group)
            if options == self._sent[number]:
                continue
            changed = {name: each for name, each in options.items() if each != self._sent[number].get(name)}
            keys = list(self._groups[number]) if len(self._groups) > 1 else None
            self.kv.set_optimizer_options(keys=keys, **changed)
            self._sent[number] = options

    def _options(self, group: Mapping[str, Any]) -> State:
        """Return the options of a group, not what schedules and scripts keep beside them."""
        return {name: plain(group[name]) for name in self.inner.defaults if name in group}

    def _pull(self) -> None:
        assert self._step is not None
        self._step.pull()
        self._note_pull()

    def _note_pull(self) -> None:
        self._versions = [each._version for each in self._keyed.values()]

    # ---- checkpoints -----------------------------------------------------------------------------

    def state(self) -> dict[torch.Tensor, State]:
        """Return the state of each parameter that has one, as of this worker's last step."""
        if not self.steps:
            return {}
        found = self.kv.state_dict(alone=True)["optimizer_state"]
        parameters = {
            self._name_of[id(each)]: each for group in self.inner.param_groups for each in group["params"]
        }
        return {each: found[name] for name, each in parameters.items() if name in found}

    def load(self, state: Mapping[Any, State], groups: list[State]) -> None:
        """Go on with the state and the options of a checkpoint, and rank 0's present weights.

        Every worker calls it, with the same checkpoint.
        """
        inner, kv = self.inner, self.kv
        inner.__setstate__({"state": defaultdict(dict, state), "param_groups": groups})
        found, inner.state = inner.state, defaultdict(dict)
        by_name: dict[str, State] = {}
        for parameter, each in found.items():
            name = self._name_of.get(id(parameter))
            if name is None:
                raise LoadError("the checkpoint has state that belongs to no parameter")
            known = {
                entry: value for entry, value in each.items() if value is not None
            }  # SGD's momentum may be
            if name in self._keyed and known:
                by_name[name] = known
        with self._meeting() as others:
            others.check_alike("checkpoint", state_digest(by_name))
        self._set_groups(self._names())
        held = kv.state_dict()
        weights = {name: each.detach() for name, each in self._keyed.items()}
        kv.load_state_dict(with_states(held, weights, by_name) if held else {})
        kv.init({name: each.detach() for name, each in self._keyed.items()})
        self._bind()
        self.steps += bool(by_name)
        self._pull()


def _check_placement(name: str, parameter: torch.nn.Parameter) -> None:
    """Raise if a parameter is not a whole, dense tensor of this process."""
    if hasattr(parameter, "device_mesh"):
        raise NotSupported(
            f"parameter {name!r} is a DTensor, of FSDP2 say: its parts are on several workers, and each "
            "would push its own under one key. Without fully_shard, too, the servers hold the state only once"
        )
    if torch.nn.parameter.is_lazy(parameter):
        raise InvalidValue(f"parameter {name!r} is lazy and has no shape yet; call forward once first")
