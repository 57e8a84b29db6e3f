"""OptimizerUpdater: a torch optimizer as an updater of many keys; and which optimizers and options are valid.

THEORY OF OPERATION
Optimizers that are known to be elementwise work on the stored values themselves, in one of two ways. *Fused*,
if torch has a kernel that is correct (`fusing`): one call for all slots of a dtype. The kernel checks its
arguments before it changes anything. Otherwise torch's *loop* over its operations, which may fail midway (a
learning rate that float16 cannot represent, a division by zero after enough steps): so slots go in batches,
with copies kept until the step is done. A batch that fails is rolled back and retried slot by slot, so that
only the slot that fails fails, and keeps its value. All other optimizers run on a copy of value and state.

How a loop rounds half-precision floats depends on where torch's vectors begin and end: it rounds once in a
full vector, twice in the tail. Torch's threads cut large values anywhere, so here the loop gets them in
blocks that one thread processes alone, cut where vectors end. Servers cut values at such places, too
(`tensorkv.partition`). So neither the number of threads nor that of servers changes a bit.
"""

from __future__ import annotations

import copy
import enum
import functools
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

import torch

from tensorkv.checkpoint.records import KeyRecord, SavedSettings
from tensorkv.errors import (
    InvalidOption,
    InvalidValue,
    LoadError,
    TensorKVError,
    UnknownUpdater,
    UnsupportedOptimizer,
    UpdaterError,
    did_you_mean,
)
from tensorkv.partition import CUT_ELEMS
from tensorkv.plain import Key, may_travel
from tensorkv.updaters.base import AwaitedUpdater, Failure, Update, Updater, updater_error
from tensorkv.updaters.fusing import is_fused_right
from tensorkv.updaters.spec import UpdaterSpec
from tensorkv.updaters.undecorated import build, step

ELEMENTWISE_OPTIMIZERS = frozenset(
    {
        torch.optim.SGD,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.Adamax,
        torch.optim.Adagrad,
        torch.optim.Adadelta,
        torch.optim.RMSprop,
        torch.optim.ASGD,
        torch.optim.Rprop,
    }
)
"""Optimizers known to be elementwise."""

_REFUSED = {
    torch.optim.LBFGS: "it needs a closure that evaluates the model again",
    torch.optim.SparseAdam: "it needs sparse gradients, and a store holds dense values",
}

_TORCH_GRAIN_ELEMS = 32768
"""Minimum number of elements of a CPU operation that torch divides among its threads."""

_BLOCK_ELEMS = (_TORCH_GRAIN_ELEMS - 1) // CUT_ELEMS * CUT_ELEMS
"""Maximum number of elements of a half-precision value that the loop gets at once."""

_BATCH_BYTES = {True: 1 << 20, False: 64 << 20}
"""Maximum size of the values in a batch of the loop, on a CPU (True) or elsewhere. One slot may be larger."""


class _Way(enum.Enum):
    """How slots of a dtype, on a type of device, are updated."""

    FUSED = "fused"
    LOOP = "loop"
    REFUSED = "refused"


@final
class _Snapshot:
    """Copies of parameters and their state, for a rollback if a step fails midway."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Iterable[torch.nn.Parameter]) -> None:
        self._optimizer = optimizer
        self._values = [(each, each.detach().clone()) for each in parameters]
        self._states = []
        for parameter, _ in self._values:
            state = optimizer.state.get(parameter)
            self._states.append(
                None if state is None else [(name, e, _cloned(e)) for name, e in state.items()]
            )

    def put_back(self) -> None:
        """Roll values and state back, in place."""
        for (parameter, value), entries in zip(self._values, self._states, strict=True):
            parameter.detach().copy_(value)
            self._optimizer.state.pop(parameter, None)
            if entries is None:
                continue
            for _, each, copied in entries:
                if isinstance(each, torch.Tensor):
                    each.copy_(copied)
            self._optimizer.state[parameter] = {name: each for name, each, _ in entries}


@final
class OptimizerUpdater(Updater):
    """A torch optimizer: pushed values are gradients, and the state is kept per slot.

    One optimizer object serves all slots; each call puts its slots into the only parameter group, so that
    torch can update them together. A slot is one parameter or, if it is processed in blocks, one per block.
    """

    def __init__(self, optimizer_class: type[torch.optim.Optimizer], spec: UpdaterSpec) -> None:
        self.spec = spec
        self._class = optimizer_class
        self._in_place = is_elementwise(optimizer_class)
        self._optimizer = make_optimizer(optimizer_class, probe(), spec.options)
        self._makes_state = bool(self._optimizer.state)  # in its constructor, as Adagrad does
        self._optimizer.state.clear()
        self._parameters: dict[int, torch.nn.Parameter] = {}
        self._blocks: dict[int, tuple[torch.Size, list[torch.nn.Parameter]]] = {}
        self._states: dict[int, Any] = {}  # of slots that are updated on a copy
        self._restored: dict[int, dict[str, Any]] = {}  # of slots not updated since the restore
        self._taken_shapes: set[tuple[int, ...]] = set()  # shapes that it is known to accept
        self._taken_cases: set[tuple[torch.dtype, tuple[str, ...]]] = set()

    @property
    def optimizer_class(self) -> type[torch.optim.Optimizer]:
        """The class of the optimizer."""
        return self._class

    @property
    def defaults(self) -> dict[str, Any]:
        """All options with their default values, which a call may override."""
        return self._optimizer.defaults

    # ---- updates -----------------------------------------------------------------------------------

    def apply(self, updates: Sequence[Update], options: dict[str, Any]) -> list[Failure]:
        if not self._in_place:
            return [self._apply_on_copy(update, options) for update in updates]
        failures: list[Failure] = [None] * len(updates)
        for way, group in self._groups(updates, options):
            chosen = [updates[index] for index in group]
            if way is _Way.FUSED:
                found = self._apply_fused(chosen, options)
            elif way is _Way.LOOP:
                found = self._apply_loop(chosen, options)
            else:
                found = [self._refusal(update) for update in chosen]
            for index, failure in zip(group, found, strict=True):
                failures[index] = failure
        return failures

    def _groups(self, updates: Sequence[Update], options: dict[str, Any]) -> list[tuple[_Way, list[int]]]:
        """Group the slots that are updated in one call, and choose the way for each group.

        Slots with state are separate from those without: fused SGD takes momentum of all or of none. The way
        must not depend on the other slots of the call, since each way rounds differently.
        """
        groups: dict[tuple[bool, torch.dtype, torch.device | None], list[int]] = {}
        states, parameters = self._optimizer.state, self._parameters
        for index, update in enumerate(updates):
            slot, stored = update.slot, update.stored
            parameter = parameters.get(slot)
            known = (
                bool(states.get(parameter))
                if parameter is not None
                else slot in self._blocks or bool(self._restored.get(slot))
            )
            place = None if stored.is_cpu else stored.device
            groups.setdefault((known, stored.dtype, place), []).append(index)
        return [
            (self._way(dtype, "cpu" if place is None else place.type, options), group)
            for (_, dtype, place), group in groups.items()
        ]

    def _way(self, dtype: torch.dtype, device_type: str, options: dict[str, Any]) -> _Way:
        if not _is_trainable(dtype):
            return _Way.REFUSED
        chosen = {"fused", "foreach", "differentiable"} & options.keys()
        if not chosen or (options.get("fused") and not options.get("differentiable")):
            return _Way.FUSED if is_fused_right(self._class, dtype, device_type) else _Way.LOOP
        return _Way.LOOP

    def _apply_fused(self, updates: Sequence[Update], options: dict[str, Any]) -> list[Failure]:
        parameters = self._parameters_of(updates, options, fused=True)
        state = self._optimizer.state
        known = bool(state.get(parameters[0]))  # of all, or of none
        steps = state[parameters[0]].get("step") if known else None
        before = steps.clone() if isinstance(steps, torch.Tensor) else None
        try:
            self._step(parameters, options, fused=True)
        except BaseException as exc:  # each slot is retried on its own below, which returns its error
            # The kernel checks all its arguments before it changes a value, but after it counts the steps.
            counted = steps is not None and before is not None and not torch.equal(steps, before)
            for parameter in parameters:
                if not known:
                    state.pop(parameter, {})
                elif counted:
                    state[parameter]["step"].sub_(1)
            if isinstance(exc, KeyboardInterrupt):
                raise
        else:
            return [None] * len(updates)
        finally:
            for parameter in parameters:
                parameter.grad = None
        return [self._apply_guarded([update], options, fused=True)[0] for update in updates]

    def _apply_loop(self, updates: Sequence[Update], options: dict[str, Any]) -> list[Failure]:
        if options.get("fused"):
            return [self._refusal(update) for update in updates]
        failures: list[Failure] = []
        batch: list[Update] = []
        num_bytes = 0
        for update in updates:
            if batch and num_bytes + update.stored.nbytes > _BATCH_BYTES[update.stored.is_cpu]:
                failures += self._apply_guarded(batch, options, fused=False)
                batch, num_bytes = [], 0
            batch.append(update)
            num_bytes += update.stored.nbytes
        return failures + self._apply_guarded(batch, options, fused=False)

    def _apply_guarded(
        self, updates: Sequence[Update], options: dict[str, Any], fused: bool
    ) -> list[Failure]:
        """Update slots together or, if that fails, one by one; those that fail stay unchanged."""
        parameters = self._parameters_of(updates, options, fused)
        snapshot: _Snapshot | None = None
        try:
            snapshot = _Snapshot(self._optimizer, parameters)
            self._step(parameters, options, fused)
        except BaseException as exc:  # whatever the optimizer raises is reported to the pushers
            if snapshot is not None:
                snapshot.put_back()
            if isinstance(exc, KeyboardInterrupt):
                raise
            if len(updates) == 1:
                return [updater_error(self.spec.name, updates[0].key, exc)]
        else:
            return [None] * len(updates)
        finally:
            for parameter in parameters:
                parameter.grad = None
        return [self._apply_guarded([update], options, fused)[0] for update in updates]

    def _apply_on_copy(self, update: Update, options: dict[str, Any]) -> Failure:
        slot, stored = update.slot, update.stored
        parameter: torch.nn.Parameter | None = None
        try:
            if slot in self._restored:
                self._states[slot] = _beside(self._restored[slot], stored, fused=False)
                del self._restored[slot]
            parameter = torch.nn.Parameter(stored.clone(), requires_grad=False)
            parameter.grad = update.pushed.clone()  # the optimizer may keep or change it
            if slot in self._states:
                self._optimizer.state[parameter] = copy.deepcopy(self._states[slot])
            self._step([parameter], options, fused=False)
            if parameter.shape != stored.shape:
                raise ValueError(
                    f"it has resized the parameter from {tuple(stored.shape)} to {tuple(parameter.shape)}"
                )
            stored.copy_(parameter.data)
            self._states[slot] = self._optimizer.state.get(parameter, {})
        except BaseException as exc:  # whatever the optimizer raises is reported to the pushers
            if isinstance(exc, KeyboardInterrupt):
                raise
            return updater_error(self.spec.name, update.key, exc)
        finally:
            if parameter is not None:
                self._optimizer.state.pop(parameter, None)
        return None

    def _step(self, parameters: list[torch.nn.Parameter], options: dict[str, Any], fused: bool) -> None:
        group = {**self._optimizer.defaults, **options, "params": parameters}
        if fused:
            group["fused"] = True
        self._optimizer.param_groups = [group]
        try:
            if _default_device_is_cpu():
                self._take_step(group)
            else:  # step counters belong on the CPU in any case
                with torch.device("cpu"):
                    self._take_step(group)
        finally:
            self._optimizer.param_groups = []

    def _take_step(self, group: dict[str, Any]) -> None:
        if self._makes_state:
            new = [each for each in group["params"] if not self._optimizer.state.get(each)]
            if new:
                options = {**self.spec.options, "fused": True} if group.get("fused") else self.spec.options
                self._optimizer.state.update(make_optimizer(self._class, new, options).state)
        step(self._optimizer)

    # ---- parameters --------------------------------------------------------------------------------

    def _parameters_of(
        self, updates: Sequence[Update], options: dict[str, Any], fused: bool
    ) -> list[torch.nn.Parameter]:
        """Return the parameters of slots, with the pushed values as their gradients."""
        found: list[torch.nn.Parameter] = []
        for update in updates:
            slot, stored, pushed = update.slot, update.stored, update.pushed
            if not fused:
                if options.get("foreach") or not stored.is_cpu:  # may use the gradient as scratch memory
                    pushed = pushed.clone()
                if _goes_in_blocks(stored):
                    found += self._blocks_of(slot, stored, pushed)
                    continue
            if slot in self._blocks:  # the options have changed
                self.restore(slot, self.state(slot))
            parameter = self._parameters.get(slot)
            if parameter is None:
                state = _beside(self._restored.pop(slot, {}), stored, fused)
                parameter = self._parameters[slot] = self._new_parameter(stored, state)
            elif parameter.data_ptr() != stored.data_ptr():
                parameter.data = stored
            parameter.grad = pushed
            found.append(parameter)
        return found

    def _blocks_of(self, slot: int, stored: torch.Tensor, pushed: torch.Tensor) -> list[torch.nn.Parameter]:
        """Return the parameters of a slot that is processed in blocks, with their gradients."""
        views = _cut(stored.view(-1))
        if slot not in self._blocks:
            states = _split(_beside(self.state(slot), stored, fused=False), stored.shape, len(views))
            self.forget(slot)
            blocks = [self._new_parameter(view, state) for view, state in zip(views, states, strict=True)]
            self._blocks[slot] = (stored.shape, blocks)
        _, blocks = self._blocks[slot]
        if blocks[0].data_ptr() != stored.data_ptr():
            for block, view in zip(blocks, views, strict=True):
                block.data = view
        for block, grad in zip(blocks, _cut(pushed.reshape(-1)), strict=True):
            block.grad = grad
        return blocks

    def _new_parameter(self, stored: torch.Tensor, state: dict[str, Any]) -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(stored, requires_grad=False)
        if state:
            self._optimizer.state[parameter] = state
        return parameter

    # ---- which values it accepts -------------------------------------------------------------------

    def check_value(
        self,
        key: Key,
        shape: Sequence[int],
        dtype: torch.dtype,
        options: Mapping[str, Any] | None = None,
        device_type: str | None = "cpu",
    ) -> None:
        """Raise if the optimizer cannot update such values.

        Args:
            key: named in the error.
            shape: of the whole value; Muon takes matrices only.
            dtype: of the value.
            options: of the call; those of its spec if not given.
            device_type: where the value is; None if that is not known yet.

        Raises:
            InvalidValue: the optimizer does not accept this dtype or shape.
            InvalidOption: `fused=True`, and torch has no fused kernel for this dtype or a wrong one.
        """
        options = self.spec.options if options is None else options
        name = self._class.__name__
        if not self._takes(dtype):
            raise InvalidValue(_wrong_dtype_text(name, key, dtype))
        if self._in_place:
            fused = options.get("fused") and device_type is not None
            if fused and not is_fused_right(self._class, dtype, device_type or "cpu"):
                raise InvalidOption(_wrong_fused_text(name, key, dtype))
            if device_type == "cpu":
                self._check_implementation(key, dtype, options)
            return
        if tuple(shape) in self._taken_shapes:
            return
        try:
            build(
                self._class,
                [torch.nn.Parameter(torch.zeros(shape, device="meta"))],
                tuples(self.spec.options),
            )
            refused = self._trial(shape, dtype, self.spec.options) if 0 in shape else None
        except (ValueError, TypeError) as exc:
            refused = exc
        if refused is not None:
            raise InvalidValue(
                f"{name} cannot update key {key!r} of shape {tuple(shape)}: {refused}; {_NAME_KEYS}"
            ) from refused
        self._taken_shapes.add(tuple(shape))

    def _check_implementation(self, key: Key, dtype: torch.dtype, options: Mapping[str, Any]) -> None:
        """Raise InvalidOption if the kernel that options ask for does not take a dtype on the CPU."""
        chosen = {name: options[name] for name in _IMPLEMENTATIONS if options.get(name)}
        case = (dtype, tuple(chosen))
        if not chosen or case in self._taken_cases:
            return
        if self._way(dtype, "cpu", dict(options)) is _Way.FUSED:
            return  # torch then ignores these options
        refused = self._trial((2,), dtype, options)
        if refused is not None:
            raise InvalidOption(
                f"{self._class.__name__} with {chosen} cannot update key {key!r} of dtype {dtype} on a CPU: "
                f"{refused}; leave these options out, or {_NAME_KEYS}"
            ) from refused
        self._taken_cases.add(case)

    def _trial(
        self, shape: Sequence[int], dtype: torch.dtype, options: Mapping[str, Any]
    ) -> Exception | None:
        """Return the error of a step of zeros, None if it goes well."""
        try:
            with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
                parameter = torch.nn.Parameter(torch.zeros(shape).to(dtype), requires_grad=False)
                parameter.grad = torch.zeros(shape).to(dtype)
                step(build(self._class, [parameter], tuples(dict(options))))
        except Exception as exc:  # noqa: BLE001  # whatever it is, the first push would raise it, too
            return exc
        return None

    def _takes(self, dtype: torch.dtype) -> bool:
        """Whether values of this dtype can be updated; found by a trial if the class is not a known one."""
        if self._in_place or (_is_trainable(dtype) and not dtype.is_complex):
            return _is_trainable(dtype)
        return self._trial((2, 2), dtype, self.spec.options) is None

    def _refusal(self, update: Update) -> TensorKVError:
        """Return the error of a push that the optimizer cannot apply, to a loaded key for example."""
        name, dtype = self._class.__name__, update.stored.dtype
        text = (_wrong_fused_text if self._takes(dtype) else _wrong_dtype_text)(name, update.key, dtype)
        return UpdaterError(text)

    # ---- state -------------------------------------------------------------------------------------

    def state(self, slot: int) -> dict[str, Any]:
        if slot in self._blocks:
            shape, blocks = self._blocks[slot]
            return _joined([self._optimizer.state.get(each) or {} for each in blocks], shape, blocks[0].shape)
        parameter = self._parameters.get(slot)
        known = None if parameter is None else self._optimizer.state.get(parameter)
        found: dict[str, Any] = known or self._states.get(slot) or self._restored.get(slot) or {}
        return found

    def restore(self, slot: int, state: dict[str, Any]) -> None:
        self.forget(slot)
        if state:
            self._restored[slot] = state

    def adopt(self, awaited: AwaitedUpdater) -> None:
        """Adopt the state that was loaded before this optimizer was set."""
        self._restored.update(awaited.states)

    def forget(self, slot: int) -> None:
        self._states.pop(slot, None)
        self._restored.pop(slot, None)
        parameters = self._blocks.pop(slot)[1] if slot in self._blocks else []
        if slot in self._parameters:
            parameters = [self._parameters.pop(slot)]
        for each in parameters:
            if each in self._optimizer.state:
                del self._optimizer.state[each]


# ---- which optimizers, with which options -----------------------------------------------------------


def find_optimizer(optimizer: type[torch.optim.Optimizer] | str) -> type[torch.optim.Optimizer]:
    """Return the optimizer class for a class or a name in torch.optim, ignoring case.

    Raises:
        UnknownUpdater: no such name, or not an optimizer class.
        UnsupportedOptimizer: a store cannot run it.
    """
    found: Any = optimizer
    if isinstance(optimizer, str):
        known = {name.lower(): cls for name, cls in vars(torch.optim).items() if is_optimizer_class(cls)}
        found = known.get(optimizer.lower())
        if found is None:
            names = ", ".join(repr(name) for name in sorted(known))
            raise UnknownUpdater(
                f"there is no optimizer {optimizer!r}{did_you_mean(optimizer, known)}; "
                f"torch.optim has {names}"
            )
    if not is_optimizer_class(found):
        raise UnknownUpdater(
            f"{_short(optimizer)} is not an optimizer; pass a subclass of torch.optim.Optimizer, its name, "
            "or an optimizer made from one"
        )
    if found in _REFUSED:
        raise UnsupportedOptimizer(f"{found.__name__} cannot run in a store: {_REFUSED[found]}")
    result: type[torch.optim.Optimizer] = found
    return result


def optimizer_spec(optimizer_class: type[torch.optim.Optimizer], options: dict[str, Any]) -> UpdaterSpec:
    """Return the spec of an optimizer after trying its options on a small parameter.

    An option that the constructor does not take, but that its groups have with the same value, is left out:
    AdamW's groups have `decoupled_weight_decay`.

    Raises:
        InvalidOption: an option is unknown, has a refused value, or is not plain data.
    """
    name = optimizer_class.__name__
    if "params" in options:
        raise InvalidOption(
            f"params is no option of {name}: a store has keys. For the groups of an optimizer pass itself, "
            "set_optimizer(optimizer); or call set_optimizer(..., keys=[...]) for each"
        )
    check_may_travel(optimizer_class, options)
    options = _taken_options(optimizer_class, options)
    make_optimizer(optimizer_class, probe(), options)
    return UpdaterSpec(
        type="optimizer",
        name=full_name(optimizer_class),
        options=options,
        elementwise=is_elementwise(optimizer_class),
    )


def check_may_travel(optimizer_class: type[torch.optim.Optimizer], options: Mapping[str, Any]) -> None:
    """Raise InvalidOption if an option is not plain data."""
    for option, value in options.items():
        if not may_travel(value):
            raise InvalidOption(
                f"option {option}={_short(value)} of {optimizer_class.__name__} cannot travel to the "
                "servers; use floats, ints of at most 64 bits, bools, strings, None and tuples of them"
            )


def _taken_options(optimizer_class: type[torch.optim.Optimizer], options: dict[str, Any]) -> dict[str, Any]:
    """Return the options without redundant ones. Raises InvalidOption if one is unknown."""
    taken = option_names(optimizer_class)
    strange = [] if taken is None else [option for option in options if option not in taken]
    if not strange:
        return options
    assert taken is not None
    kept = {option: value for option, value in options.items() if option in taken}
    made = make_optimizer(optimizer_class, probe(), kept).defaults
    for option in strange:
        if option not in made:
            raise unknown_option(optimizer_class, option, taken)
        if made[option] != options[option]:
            raise InvalidOption(
                f"{optimizer_class.__name__} has {option}={made[option]!r} always, not {options[option]!r}"
            )
    return kept


def unknown_option(
    optimizer_class: type[torch.optim.Optimizer], option: str, known: Iterable[str]
) -> InvalidOption:
    """Return the error of an option that an optimizer does not have."""
    listed = ", ".join(sorted(known))
    name = optimizer_class.__name__
    return InvalidOption(f"{name} has no option {option!r}{did_you_mean(option, known)}; it has {listed}")


def option_names(optimizer_class: type[torch.optim.Optimizer]) -> list[str] | None:
    """Return the names of the options that an optimizer's constructor takes, None if they are unknown."""
    parameters = list(inspect.signature(optimizer_class).parameters.values())[1:]
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters):
        return None
    return [each.name for each in parameters if each.kind is not inspect.Parameter.VAR_POSITIONAL]


def is_elementwise(optimizer_class: type[torch.optim.Optimizer]) -> bool:
    """Whether the optimizer may run on a slice of a value. A class of ours declares it itself."""
    if optimizer_class.__module__.startswith("tensorkv."):
        return bool(getattr(optimizer_class, "elementwise", False))
    return optimizer_class in ELEMENTWISE_OPTIMIZERS


def make_optimizer(
    optimizer_class: type[torch.optim.Optimizer],
    parameters: Iterable[torch.nn.Parameter],
    options: dict[str, Any],
) -> torch.optim.Optimizer:
    """Build the optimizer; turn its error about an option into InvalidOption."""
    try:
        return build(optimizer_class, parameters, tuples(options))
    except (
        Exception
    ) as exc:  # betas with one number are an IndexError; a class of the user may raise anything
        raise InvalidOption(f"{optimizer_class.__name__} refuses its options {options}: {exc}") from exc


# ---- what is saved ----------------------------------------------------------------------------------


def check_state_names(settings: SavedSettings, records: Iterable[KeyRecord], where: str) -> None:
    """Raise LoadError if a key's state is not that of the torch optimizer that its settings name.

    Optimizers that are not known to be elementwise are not checked: their state is unknown, too.
    """
    classes = {full_name(each): each for each in ELEMENTWISE_OPTIMIZERS}
    for record in records:
        optimizer_class = classes.get(settings.spec_of(record.key).name)
        if optimizer_class is None:
            continue
        always, known, scalars = _state_names(optimizer_class)
        for piece in record.pieces:
            names = {each.name for each in piece.tensors[1:]} | set(piece.plain)
            if names and not always <= names <= known:
                raise LoadError(
                    f"{where}: key {record.key!r} has optimizer state {sorted(names)}, which is not that of "
                    f"{optimizer_class.__name__}: {sorted(known)}"
                )
            for each in piece.tensors[1:]:
                if each.elementwise and not (record.shape == () and each.name in scalars):
                    fits = each.dtype == record.dtype
                else:  # of a scalar value no shape tells a step from a momentum
                    fits = each.shape == ((1,) if each.elementwise else ())
                if not fits:
                    raise LoadError(
                        f"{where}: key {record.key!r} is {record.dtype}, and its optimizer state "
                        f"{each.name!r} is {each.dtype} of shape {each.shape}, which does not go with it"
                    )


@functools.cache
def _state_names(
    optimizer_class: type[torch.optim.Optimizer],
) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """Return the names that an optimizer's state always has, all that it may have, and those of scalars.

    Finds them by trying it.
    """
    found: list[frozenset[str]] = []
    scalars: set[str] = set()
    extras: list[dict[str, Any]] = [{}, {"momentum": 0.5}, {"amsgrad": True}, {"centered": True}]
    with torch.device("cpu"):  # whatever the caller's default is
        for options in extras:
            parameter = torch.nn.Parameter(torch.zeros(2))
            parameter.grad = torch.ones(2)
            optimizer = make_optimizer(optimizer_class, [parameter], {"lr": 0.1})
            if options.keys() <= optimizer.defaults.keys():
                optimizer.param_groups[0].update(options)
                step(optimizer)
                state = optimizer.state[parameter]
                found.append(frozenset(state))
                tensors = {name: each for name, each in state.items() if isinstance(each, torch.Tensor)}
                scalars.update(name for name, each in tensors.items() if each.shape == ())
    return frozenset.intersection(*found), frozenset.union(*found), frozenset(scalars)


# ---- small things -----------------------------------------------------------------------------------


def _is_trainable(dtype: torch.dtype) -> bool:
    """Whether torch's optimizers take parameters of this dtype: floats of 16 bits or more, and complex."""
    return dtype.is_complex or (dtype.is_floating_point and dtype.itemsize >= 2)


def _goes_in_blocks(stored: torch.Tensor) -> bool:
    """Whether torch's threads would cut the value at places that change the result."""
    return stored.is_cpu and stored.dtype.itemsize == 2 and stored.numel() > _BLOCK_ELEMS


def _cut(flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the blocks of a value."""
    return torch.split(flat, _BLOCK_ELEMS)


def _cloned(each: Any) -> Any:
    return each.clone() if isinstance(each, torch.Tensor) else each


def _beside(state: dict[str, Any], stored: torch.Tensor, fused: bool) -> dict[str, Any]:
    """Move restored state to where the optimizer expects it: beside the value, or on the CPU."""
    return {
        name: each.to(stored.device) if isinstance(each, torch.Tensor) and (each.dim() or fused) else each
        for name, each in state.items()
    }


def _split(state: dict[str, Any], shape: torch.Size, num_blocks: int) -> list[dict[str, Any]]:
    """Split the state of a value of this shape into that of its blocks."""
    states: list[dict[str, Any]] = [{} for _ in range(num_blocks)]
    for name, each in state.items():
        if isinstance(each, torch.Tensor) and each.shape == shape:
            parts = _cut(each.reshape(-1))
        else:
            parts = tuple(_cloned(each) for _ in states)
        for of_block, part in zip(states, parts, strict=True):
            of_block[name] = part
    return states


def _joined(states: list[dict[str, Any]], shape: torch.Size, of_block: torch.Size) -> dict[str, Any]:
    """Join the states of the blocks of a value of this shape; the first block has shape `of_block`."""
    return {
        name: torch.cat([state[name] for state in states]).view(shape)
        if isinstance(each, torch.Tensor) and each.shape == of_block
        else each
        for name, each in states[0].items()
    }


def _default_device_is_cpu() -> bool:
    """Whether new tensors go to the CPU by default. Trying is six times as fast as torch's getter."""
    return torch.empty(0).is_cpu


_IMPLEMENTATIONS = ("foreach", "capturable", "differentiable")
"""Options that choose one of torch's implementations of an optimizer, beside `fused`."""

_NAME_KEYS = "name the keys it is for with set_optimizer(..., keys=[...])"


def _wrong_dtype_text(name: str, key: Key, dtype: torch.dtype) -> str:
    return (
        f"{name} cannot update key {key!r} of dtype {dtype}, which it does not take; {_NAME_KEYS}, keep "
        f"{key!r} in a store of its own, or init it as torch.float32"
    )


def _wrong_fused_text(name: str, key: Key, dtype: torch.dtype) -> str:
    return (
        f"fused=True: key {key!r} is {dtype}, for which this torch has no fused {name}, or one that gives "
        "other results than its loop; leave the option away: the store uses what is right"
    )


def full_name(optimizer_class: type[torch.optim.Optimizer]) -> str:
    """Return the name under which an optimizer travels and is saved."""
    return f"{optimizer_class.__module__}:{optimizer_class.__qualname__}"


def is_optimizer_class(value: Any) -> bool:
    """Whether it is an optimizer class."""
    return (
        isinstance(value, type)
        and issubclass(value, torch.optim.Optimizer)
        and value is not torch.optim.Optimizer
    )


def _short(value: Any) -> str:
    """Describe an argument, without the numbers of tensors."""
    text = f"a {type(value).__name__}" if isinstance(value, (torch.Tensor, list, dict)) else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    """Turn lists into tuples: `betas` travels as a list, and torch expects a tuple."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


def probe() -> list[torch.nn.Parameter]:
    """Return a parameter that every optimizer accepts: a matrix, because Muon needs one."""
    return [torch.nn.Parameter(torch.zeros(2, 2, device="cpu"), requires_grad=False)]
