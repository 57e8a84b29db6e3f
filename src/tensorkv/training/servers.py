"""ServerSteps: the servers run the optimizer; a step pushes gradients and pulls weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, final

import torch

from tensorkv.bound import BoundStep
from tensorkv.errors import InvalidArgument, InvalidValue, NotSupported
from tensorkv.keys import ABSENT
from tensorkv.training.gradients import Marks, pushed_gradient
from tensorkv.training.latepulls import LatePulls
from tensorkv.training.overlap import EarlyPushes
from tensorkv.training.states import StateView, state_digest, with_states
from tensorkv.training.steps import State, Steps
from tensorkv.training.weights import SharedWeights, all_can_share
from tensorkv.training.windows import GradientWindows

_CHANGED = (
    "{what} changed between backward and step, and with overlap gradients have been sent by then: make "
    "changes between step and backward, or pass overlap=False"
)


@final
class ServerSteps(Steps):
    """Steps that the servers of a store make. Their keys are the parameters that require a gradient, by
    name."""

    def _start(self, names: list[tuple[str, ...]]) -> None:
        self._keyed: dict[str, torch.nn.Parameter] = {}
        self._gradients: dict[str, Any] = {}
        self._step: BoundStep | None = None
        self._versions: list[int] = []  # of the parameters, after the last pull
        self._sent: list[State] = []  # the options of each group that the servers have
        self._groups: list[tuple[str, ...]] = []  # the names in each group
        self._steps = 0  # number that this worker has made, or loaded
        self._held: Marks | None = None  # of the gradients that await a commit
        self._clip_to: float | None = None
        self._shared: list[SharedWeights] = []
        self._rejoins = False  # whether the script has changed some of them
        self._put_shared: set[str] = set()  # their names
        self._windows: list[GradientWindows] = []
        self._early: list[EarlyPushes] = []
        self._has_begun = False  # whether gradients of this step have left during a backward
        self._late: list[LatePulls] = []
        self._is_late = False  # whether some of the weights may still be on the way
        trained = self.trained(names)
        with self.meeting() as others:
            self.check_alike(others, names)
            others.share({name: each for name, each in self.tensors().items() if name not in trained})
        self._set_groups(names)
        self._learn_keys()
        self._pull()
        self._take_up(self._keyed)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self._keyed.values())

    # ---- settings and keys -----------------------------------------------------------------------

    def _set_groups(self, names: list[tuple[str, ...]]) -> None:
        """Set the optimizer on the servers, as its groups are now."""
        keys_by_id = {identity: [name] for identity, name in self._name_of.items()}
        self.kv._set_instance(self.inner, None, keys_by_id)
        self._groups = names
        self._sent = self.options()

    def _learn_keys(self) -> None:
        """Initialise the parameters that require a gradient and are not in the store yet."""
        new = {name: each for name, each in self.trained(self._groups).items() if name not in self._keyed}
        if not new:
            return
        self.kv.init({name: each.detach() for name, each in new.items()})
        self._keyed.update(new)
        self._gradients.update(dict.fromkeys(new, ABSENT))
        self._versions += [each._version for each in new.values()]
        self._bind()
        if self._shared:
            self._pull_new(new)
        if self._shared or self._early:
            self._take_up(new)

    def _pull_new(self, new: Mapping[str, torch.nn.Parameter]) -> None:
        """Take over rank 0's values of parameters that are trained from now on."""
        self.kv.pull(list(new), out=[each.detach() for each in new.values()])

    def _bind(self) -> None:
        self._step = self.kv.bind(push=self._gradients, out=self._keyed)
        self._num_retired = self.kv.num_retired

    def _take_up(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Let these parameters, whose keys are new, lie in memory of the servers, and their gradients leave
        early, as far as that is chosen."""
        if self._may_share:
            with self.meeting() as others:
                if self.chosen.share_weights != "auto" or all_can_share(self.kv, parameters, others):
                    self._shared.append(SharedWeights(self.kv, parameters, others))
            self._note_pull()
        if self.chosen.overlap:
            passes, is_late = self.chosen.accumulate or 1, self.chosen.overlap == "forward"
            if is_late:
                self._late.append(LatePulls(self.kv, self._model, parameters, self.wait))
            self._early.append(
                EarlyPushes(self.kv, parameters, passes, self._begin, not self._commits, not is_late)
            )
        elif self._shared:
            self._windows.append(GradientWindows(self.kv, parameters))

    @property
    def _may_share(self) -> bool:
        """Whether weights are to lie in memory of the servers if possible, and there are other processes."""
        if self.chosen.share_weights == "auto" and self.chosen.overlap == "forward":
            return False
        return bool(self.chosen.share_weights) and self.kv._why_no_sharing is not None

    @property
    def _commits(self) -> bool:
        """Whether gradients only merge until all workers have come to their `step`."""
        clips = self.chosen.max_norm is not None or self.chosen.skip_nonfinite
        return clips or (self.chosen.overlap and bool(self._shared))

    def release(self) -> None:
        movers: list[GradientWindows | EarlyPushes | LatePulls] = [*self._windows, *self._early, *self._late]
        for each in movers:
            each.close()
        self._windows, self._early, self._late = [], [], []
        self._has_begun = self._is_late = False
        while self._shared:
            self._shared.pop().release()

    def pause(self, is_paused: bool) -> None:
        for each in self._early:
            each.is_paused = is_paused

    def add_group(self, group: State) -> None:
        self.wait()
        self._send_options()  # else the new setting would be another one for all groups, and drop their state
        self._set_groups(self.extend(group))
        self._learn_keys()

    # ---- a step ----------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.watch is not None:
            self.watch.check()
        self.skipped = not self.apply(None)
        self.inner._opt_called = True  # type: ignore[attr-defined]  # or a scheduler made before the wrap warns
        return loss

    def apply(self, skip: bool | None) -> bool:
        if not self.kv._allows_commit:  # a worker skips its own steps only
            self._exchange(absent=bool(skip))
            return not skip
        if not (self._commits or self._held or skip is not None):
            self._exchange()
            return True
        self._hold()
        max_norm = self.chosen.max_norm if self._clip_to is None else self._clip_to
        self._held, self._clip_to = None, None
        result = self.kv.commit(max_norm=max_norm, skip=bool(skip), check_finite=self.chosen.skip_nonfinite)
        self.norm = result.norm
        self._get_weights()
        return result.applied

    def clip(self, max_norm: float) -> float:
        if not self.kv._allows_commit:
            raise NotSupported(
                f"clip_grad_norm_: {self.kv!r} does not wait for all workers' gradients of a step"
            )
        if self._early and not self._commits:
            raise NotSupported(
                f"clip_grad_norm_ with overlap={self.chosen.overlap!r}: the servers have updated weights by "
                "some gradients already; pass max_norm=... to DistributedOptimizer, or overlap=False"
            )
        self._hold()
        self._clip_to = max_norm
        norm = self.kv.commit(apply=False).norm
        assert norm is not None
        return norm

    def _exchange(self, absent: bool = False) -> None:
        """Push the gradients, or take part without, and pull the weights."""
        self._prepare()
        if absent:
            self._gradients.update(dict.fromkeys(self._keyed, ABSENT))
        assert self._step is not None
        if self._shared or self._early:
            self._push(apply=True)
            self._get_weights()
        else:
            self._step.pushpull()
            self._note_pull()

    def _hold(self) -> None:
        """Push the gradients for a commit, unless these are pushed already."""
        if self._held is not None and self._held.hold() and not self._has_new_options():
            return
        if self._held is not None:  # of a step that the script has not made
            self.kv.commit(skip=True)
        self._prepare()
        self._push(apply=False)
        self._held = Marks(self.parameters)

    def _push(self, apply: bool) -> None:
        """Push the gradients that have not left during backward."""
        if self._early:
            for each in self._early:
                each.finish()
            self._has_begun = False
        else:
            assert self._step is not None
            self._step.push(apply=apply)

    def _prepare(self) -> None:
        """Send what goes ahead of the gradients, and collect these."""
        self.wait()
        if self._has_begun:
            self._check_unchanged()
        if self.kv.num_retired != self._num_retired:  # the script has loaded a save into the store
            self.release()
            self._bind()
            self._pull()
            self._take_up(self._keyed)
        if not self._has_begun:
            self._send_values()
        if self._has_grown():
            self._learn_keys()
        self._send_options()
        for name, parameter in self._keyed.items():
            self._gradients[name] = pushed_gradient(parameter)
        self.note_pushed(self._gradients.values())
        self._steps += 1

    def _begin(self) -> bool:
        """Send what goes ahead of gradients that leave during backward; False if `step` has to push them."""
        if self.kv.num_retired != self._num_retired or self._held is not None:
            return False
        self._wait(in_backward=True)
        if not self._has_begun:
            self._send_values()
            self._send_options()
            self._note_pull()  # what changes from now on comes too late
            self._has_begun = True
        return True

    def _check_unchanged(self) -> None:
        """Raise if the script has changed what had to go ahead of gradients that have left."""
        if self._has_new_options():
            raise InvalidValue(_CHANGED.format(what="options of the optimizer"))
        changed = set(self._changed_values()) if self.kv.rank == 0 else set()
        changed |= self._changed_shared() ^ self._put_shared
        if changed:
            raise InvalidValue(_CHANGED.format(what=", ".join(sorted(changed))))

    def _has_grown(self) -> bool:
        """Whether a frozen parameter of the optimizer requires a gradient by now."""
        if sum(map(len, self._groups)) == len(self._keyed):
            return False
        return not self.trained(self._groups).keys() <= self._keyed.keys()

    def _send_values(self) -> None:
        """Put the parameters that the script has changed since the last pull."""
        if self._shared:
            changed = {name: each for shared in self._shared for name, each in shared.changed().items()}
            self._rejoins, self._put_shared = bool(changed), set(changed)
            if changed and self.kv.rank == 0:
                self.kv.put(changed)
            return
        if self.kv.rank == 0 and (changed := self._changed_values()):
            self.kv.put(changed)

    def _changed_shared(self) -> set[str]:
        """Return the names of shared parameters that differ from what the servers have."""
        return {name for shared in self._shared for name in shared.changed()}

    def _changed_values(self) -> dict[str, torch.Tensor]:
        """Return the parameters that were changed in place since the last pull."""
        versions = [each._version for each in self._keyed.values()]
        if versions == self._versions:
            return {}
        return {
            name: each.detach()
            for (name, each), now, then in zip(self._keyed.items(), versions, self._versions, strict=True)
            if now != then
        }

    def _has_new_options(self) -> bool:
        return self.options() != self._sent

    def _send_options(self) -> None:
        if len(self.inner.param_groups) != len(self._sent):
            raise InvalidArgument("param_groups has other groups than before: add one by add_param_group")
        for number, (options, sent) in enumerate(zip(self.options(), self._sent, strict=True)):
            if options == sent:
                continue
            changed = {name: each for name, each in options.items() if each != sent.get(name)}
            keys = list(self._groups[number]) if len(self._groups) > 1 else None
            self.kv.set_optimizer_options(keys=keys, **changed)
            self._sent[number] = options

    def _pull(self) -> None:
        assert self._step is not None
        if self._shared:
            self._await_update()
        else:
            self._step.pull()
            self._note_pull()

    def _get_weights(self) -> None:
        """Pull the weights of this step, or let them come while the script goes on."""
        if not self._late:
            self._pull()
            return
        self._is_late = True
        for each in self._late:
            each.start()

    def wait(self) -> None:
        self._wait(in_backward=False)

    def _wait(self, in_backward: bool) -> None:
        if self._is_late:
            self._is_late = False
            for each in self._late:
                each.wait(in_backward)
            self._note_pull()

    def _await_update(self) -> None:
        """Wait until the servers have updated the weights that lie in their memory."""
        self.kv._await_applied("step")
        for each in self._shared:
            if self._rejoins:
                each.rejoin()
            each.note_update()
        self._rejoins = False
        self._note_pull()

    def _note_pull(self) -> None:
        self._versions = [each._version for each in self._keyed.values()]

    # ---- checkpoints -----------------------------------------------------------------------------

    @property
    def state(self) -> MutableMapping[torch.Tensor, Any]:
        return StateView(self._read_state)

    def _read_state(self) -> dict[torch.Tensor, State]:
        """Return the state of each parameter that has one, as of this worker's last step."""
        if not self._steps:
            return {}
        self.kv._check_usable("state_dict")
        if self._has_begun:
            raise NotSupported(
                f"the optimizer's state between backward and step, with overlap={self.chosen.overlap!r}: "
                "gradients have left already; read it before backward or after step"
            )
        self.wait()
        found = self.kv._state_now()["optimizer_state"]
        ordered = [each for group in self.inner.param_groups for each in group["params"]]
        names = {self._name_of[id(each)]: each for each in ordered}
        return {each: found[name] for name, each in names.items() if name in found}

    def load(self, state: Mapping[Any, State], groups: list[State]) -> None:
        inner, kv = self.inner, self.kv
        self.wait()
        self.release()
        inner.__setstate__({"state": defaultdict(dict, state), "param_groups": groups})
        found, inner.state = inner.state, defaultdict(dict)
        states = self.by_name(found)
        with self.meeting() as others:
            others.check_alike("checkpoint", state_digest(states))
            others.share({name: each for name, each in self.tensors().items() if name not in self._keyed})
        self._set_groups(self.names())
        held = kv.state_dict()
        weights = {name: each.detach() for name, each in self._keyed.items()}
        kv.load_state_dict(with_states(held, weights, states) if held else {})
        kv.init(weights)
        self._bind()
        self._steps += bool(states)
        self._pull()
        self._take_up(self._keyed)
