"""Updaters: how a round's sum is combined with the stored value, for many keys at once.

An `UpdaterSpec` says which updater in plain data that may travel; `build` makes the `Updater` from it.
An updater works on `Update` records, one per slot: a slot is a whole value, or one slice of it where
the updater is elementwise. It keeps its state per slot, under the number the caller gives the slot.

A `SettingsTable` is the list of settings a store has been given, and says what holds for a key.
"""

from __future__ import annotations

import copy
import functools
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import msgspec
import torch

from tensorkv.arrays import Key
from tensorkv.errors import (
    InvalidOption,
    InvalidValue,
    LoadError,
    TensorKVError,
    UnknownUpdater,
    UnsupportedOptimizer,
    UpdaterError,
)
from tensorkv.savedstate import KeyRecord, SavedSettings, SettingEntry
from tensorkv.updaterspec import UpdaterSpec, may_travel

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
"""Optimizers known to treat each element on its own, and to leave everything as it was when they refuse."""

_FUSED_ON_GPUS = frozenset({torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW})
_FUSED_ON_CPUS = _FUSED_ON_GPUS | {torch.optim.Adagrad}
_FUSED_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
_REFUSED = {
    torch.optim.LBFGS: "it needs a closure that evaluates the model again",
    torch.optim.SparseAdam: "it needs sparse gradients, and a store holds dense values",
}

Plain = None | bool | int | float | str | tuple[Any, ...]
Failure = Exception | None
UpdaterFunction = Callable[[Key, torch.Tensor, torch.Tensor], None]


@dataclass(slots=True)
class Update:
    """One slot to be updated: change `stored` in place by `pushed`, both of the slot's shape and dtype.

    `pushed` may be used up: its memory is free to be overwritten, unless it is borrowed.
    """

    slot: int
    key: Key
    pushed: torch.Tensor
    stored: torch.Tensor
    borrowed: bool = False

    def pushed_to_strangers(self) -> torch.Tensor:
        """Return `pushed` for code that may overwrite it."""
        return self.pushed.clone() if self.borrowed else self.pushed


class Updater(ABC):
    """Changes stored values by what was pushed. Not thread-safe: one call at a time."""

    spec: UpdaterSpec

    @abstractmethod
    def apply(self, updates: Sequence[Update], options: dict[str, Any]) -> list[Failure]:
        """Update every slot, and return for each the error it failed with, or None.

        A slot that failed has its value and state as before.
        """

    @abstractmethod
    def check_value(self, key: Key, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Raise if values of this shape and dtype cannot be updated."""

    @abstractmethod
    def forget(self, slot: int) -> None:
        """Drop the state of a slot, if there is any."""

    def state(self, slot: int) -> dict[str, Any]:
        """Return the state of a slot, by name; empty if there is none. Not a copy."""
        return {}

    def restore(self, slot: int, state: dict[str, Any]) -> None:
        """Go on with this state of a slot, in CPU tensors that are the updater's from now on."""
        if state:  # of an updater that keeps none it cannot be
            raise LoadError(f"updater {self.spec.name!r} keeps no state, but there is some in what was saved")


@final
class Assign(Updater):
    """Replace the stored value by the sum. MXNet's default, ASSIGN."""

    spec = UpdaterSpec(type="named", name="assign")

    def apply(self, updates: Sequence[Update], options: dict[str, Any]) -> list[Failure]:
        for update in updates:
            update.stored.copy_(update.pushed)
        return [None] * len(updates)

    def check_value(self, key: Key, shape: Sequence[int], dtype: torch.dtype) -> None:
        pass

    def forget(self, slot: int) -> None:
        pass


@final
class Add(Updater):
    """Add the sum to the stored value."""

    spec = UpdaterSpec(type="named", name="add")

    def apply(self, updates: Sequence[Update], options: dict[str, Any]) -> list[Failure]:
        for update in updates:
            if update.stored.is_floating_point() and update.stored.dtype.itemsize == 1:
                total = update.stored.float().add_(update.pushed.float())  # torch adds no 8-bit floats
                update.stored.copy_(total)
            else:
                update.stored.add_(update.pushed)
        return [None] * len(updates)

    def check_value(self, key: Key, shape: Sequence[int], dtype: torch.dtype) -> None:
        pass

    def forget(self, slot: int) -> None:
        pass


@final
class FunctionUpdater(Updater):
    """Call a user's function on a copy of the stored value, and keep the copy if it returns."""

    def __init__(self, function: UpdaterFunction, spec: UpdaterSpec) -> None:
        self.function = function
        self.spec = spec

    def apply(self, updates: Sequence[Update], options: dict[str, Any]) -> list[Failure]:
        return [self._apply_one(update) for update in updates]

    def _apply_one(self, update: Update) -> Failure:
        changed = update.stored.clone()
        try:
            with torch.no_grad():
                self.function(update.key, update.pushed_to_strangers(), changed)
            if changed.shape != update.stored.shape:
                raise ValueError(
                    f"it has resized `stored` from {tuple(update.stored.shape)} to {tuple(changed.shape)}"
                )
        except (Exception, SystemExit) as exc:  # noqa: BLE001  # the user's code may raise anything
            return _updater_error(self.spec.name, update.key, exc)
        update.stored.copy_(changed)
        return None

    def check_value(self, key: Key, shape: Sequence[int], dtype: torch.dtype) -> None:
        pass

    def forget(self, slot: int) -> None:
        pass


@final
class AwaitedUpdater(Updater):
    """Stands for a function or class of a save until it is set again: only its name was saved.

    It keeps the state that was loaded for it, and refuses to update.
    """

    def __init__(self, spec: UpdaterSpec) -> None:
        self.spec = spec
        self.states: dict[int, dict[str, Any]] = {}

    def apply(self, updates: Sequence[Update], options: dict[str, Any]) -> list[Failure]:
        call = "set_optimizer" if self.spec.type == "optimizer" else "set_updater"
        return [
            UpdaterError(
                f"key {update.key!r}: the store was loaded from a save made with {self.spec.name!r}, which a "
                f"save has only by name; call {call} with it, before the load or after"
            )
            for update in updates
        ]

    def check_value(self, key: Key, shape: Sequence[int], dtype: torch.dtype) -> None:
        pass

    def forget(self, slot: int) -> None:
        self.states.pop(slot, None)

    def state(self, slot: int) -> dict[str, Any]:
        return self.states.get(slot, {})

    def restore(self, slot: int, state: dict[str, Any]) -> None:
        self.states[slot] = state


@final
class OptimizerUpdater(Updater):
    """A torch optimizer: what is pushed are gradients, its state is kept per slot.

    One optimizer object serves all slots; each call puts the slots concerned into its one parameter
    group, so that torch can update them together, fused where it has that.
    """

    def __init__(self, optimizer_class: type[torch.optim.Optimizer], spec: UpdaterSpec) -> None:
        self.spec = spec
        self._class = optimizer_class
        self._in_place = is_elementwise(optimizer_class)
        self._optimizer = make_optimizer(optimizer_class, _probe(), spec.options)
        self._makes_state = bool(self._optimizer.state)  # when it is built, as Adagrad does
        self._optimizer.state.clear()
        self._parameters: dict[int, torch.nn.Parameter] = {}
        self._states: dict[int, Any] = {}  # of slots that are updated on a copy
        self._restored: dict[int, dict[str, Any]] = {}  # of slots that were not updated since

    def apply(self, updates: Sequence[Update], options: dict[str, Any]) -> list[Failure]:
        if not self._in_place:
            return [self._apply_on_copy(update, options) for update in updates]
        failures: list[Failure] = [None] * len(updates)
        together: list[tuple[int, Update]] = []
        for index, update in enumerate(updates):
            if update.stored.dtype.is_floating_point or update.stored.dtype.is_complex:
                together.append((index, update))
            else:  # an optimizer may refuse other dtypes, each slot on its own
                failures[index] = self._apply_on_copy(update, options)
        for fused, group in self._groups(together, options):
            if self._restored:
                self._take_restored([updates[index] for index in group], fused)
            failure = self._apply_in_place([updates[index] for index in group], options, fused)
            for index in group:
                failures[index] = failure
        return failures

    def _groups(
        self, updates: Sequence[tuple[int, Update]], options: dict[str, Any]
    ) -> list[tuple[bool, list[int]]]:
        """Return which slots are updated in one call, and whether by torch's fused kernel.

        Slots without state are apart from those with: fused SGD takes momentum of all or of none. That a
        slot is fused must not depend on the others of the call, for the kernel rounds in its own way.
        """
        groups: dict[tuple[bool, torch.device | None], list[int]] = {}
        may_fuse = not {"fused", "foreach", "differentiable"} & set(options)
        for index, update in updates:
            parameter = self._parameters.get(update.slot)
            known = parameter is not None and bool(self._optimizer.state.get(parameter))
            known = known or bool(self._restored.get(update.slot))
            stored = update.stored
            fusing = _FUSED_ON_CPUS if stored.is_cpu else _FUSED_ON_GPUS
            fuses = may_fuse and self._class in fusing and stored.dtype in _FUSED_DTYPES
            fused_on = stored.device if fuses else None
            groups.setdefault((known, fused_on), []).append(index)
        return [(fused_on is not None, group) for (_, fused_on), group in groups.items()]

    def _take_restored(self, updates: Sequence[Update], fused: bool) -> None:
        """Hand the state that was restored to the optimizer, where the values of these slots are."""
        for update in updates:
            state = self._restored.pop(update.slot, None)
            if state is not None:
                parameter = torch.nn.Parameter(update.stored, requires_grad=False)
                self._parameters[update.slot] = parameter
                self._optimizer.state[parameter] = {
                    name: _placed(each, update.stored, fused) for name, each in state.items()
                }

    def _apply_in_place(self, updates: Sequence[Update], options: dict[str, Any], fused: bool) -> Failure:
        parameters = []
        for update in updates:
            parameter = self._parameters.get(update.slot)
            if parameter is None:
                parameter = torch.nn.Parameter(update.stored, requires_grad=False)
                self._parameters[update.slot] = parameter
            elif parameter.data_ptr() != update.stored.data_ptr():
                parameter.data = update.stored
            parameter.grad = update.pushed
            parameters.append(parameter)
        try:
            self._step(parameters, options, fused)
        except Exception as exc:  # noqa: BLE001  # whatever the optimizer raises is reported to the pushers
            return _updater_error(self.spec.name, updates[0].key, exc)
        finally:
            for parameter in parameters:
                parameter.grad = None
        return None

    def _apply_on_copy(self, update: Update, options: dict[str, Any]) -> Failure:
        parameter = torch.nn.Parameter(update.stored.clone(), requires_grad=False)
        parameter.grad = update.pushed_to_strangers()
        if update.slot in self._restored:
            state = self._restored.pop(update.slot)
            self._states[update.slot] = {
                name: _placed(each, update.stored, fused=False) for name, each in state.items()
            }
        if update.slot in self._states:
            self._optimizer.state[parameter] = copy.deepcopy(self._states[update.slot])
        try:
            self._step([parameter], options, fused=False)
        except Exception as exc:  # noqa: BLE001  # whatever the optimizer raises is reported to the pushers
            self._optimizer.state.pop(parameter, None)
            return _updater_error(self.spec.name, update.key, exc)
        self._states[update.slot] = self._optimizer.state.pop(parameter, {})
        update.stored.copy_(parameter.data)
        return None

    def _step(self, parameters: list[torch.nn.Parameter], options: dict[str, Any], fused: bool) -> None:
        group = {**self._optimizer.defaults, **options, "params": parameters}
        if fused:
            group["fused"] = True
        self._optimizer.param_groups = [group]
        try:
            if _default_device_is_cpu():
                self._take_step(group)
            else:  # what counts the steps is on the CPU all the same
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
        self._optimizer.step()

    def check_value(self, key: Key, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Raise InvalidValue if the optimizer refuses a parameter of this shape; Muon takes matrices only."""
        try:
            self._class([torch.nn.Parameter(torch.zeros(shape, device="meta"))], **self.spec.options)
        except (ValueError, TypeError) as exc:
            raise InvalidValue(
                f"{self._class.__name__} cannot update key {key!r} of shape {tuple(shape)}: {exc}; "
                "name the keys it is for with set_optimizer(..., keys=[...])"
            ) from exc

    def state(self, slot: int) -> dict[str, Any]:
        parameter = self._parameters.get(slot)
        known = None if parameter is None else self._optimizer.state.get(parameter)
        found: dict[str, Any] = known or self._states.get(slot) or self._restored.get(slot) or {}
        return found

    def restore(self, slot: int, state: dict[str, Any]) -> None:
        self.forget(slot)
        if state:
            self._restored[slot] = state

    def adopt(self, awaited: AwaitedUpdater) -> None:
        """Take over the state that was loaded while this optimizer was not there yet."""
        self._restored.update(awaited.states)

    def forget(self, slot: int) -> None:
        self._states.pop(slot, None)
        self._restored.pop(slot, None)
        parameter = self._parameters.pop(slot, None)
        if parameter is not None:
            self._optimizer.state.pop(parameter, None)


NAMED_UPDATERS: dict[str, type[Assign] | type[Add]] = {"assign": Assign, "add": Add}
"""The updaters that have a name of their own."""


def named_spec(name: str) -> UpdaterSpec:
    """Return the spec of the updater called `name`.

    Raises:
        UnknownUpdater: there is none; the text lists the known ones.
    """
    if name not in NAMED_UPDATERS:
        known = ", ".join(repr(each) for each in sorted(NAMED_UPDATERS))
        raise UnknownUpdater(f"there is no updater {name!r}; known are {known}, or pass a function")
    return NAMED_UPDATERS[name].spec


def find_optimizer(optimizer: type[torch.optim.Optimizer] | str) -> type[torch.optim.Optimizer]:
    """Return the optimizer class for a class or a name of torch.optim in any case.

    Raises:
        UnknownUpdater: no such name, or not a class of optimizers.
        UnsupportedOptimizer: a store cannot run it.
    """
    found: Any = optimizer
    if isinstance(optimizer, str):
        known = {name.lower(): cls for name, cls in vars(torch.optim).items() if _is_optimizer(cls)}
        found = known.get(optimizer.lower())
        if found is None:
            names = ", ".join(repr(name) for name in sorted(known))
            raise UnknownUpdater(f"there is no optimizer {optimizer!r}; torch.optim has {names}")
    if not _is_optimizer(found):
        raise UnknownUpdater(
            f"{optimizer!r} is not an optimizer; pass a subclass of torch.optim.Optimizer (the class, "
            "not an object made from it), or its name"
        )
    if found in _REFUSED:
        raise UnsupportedOptimizer(f"{found.__name__} cannot run in a store: {_REFUSED[found]}")
    result: type[torch.optim.Optimizer] = found
    return result


def optimizer_spec(optimizer_class: type[torch.optim.Optimizer], options: dict[str, Any]) -> UpdaterSpec:
    """Return the spec of an optimizer after trying its options on a small parameter.

    Raises:
        InvalidOption: an option is unknown, has a refused value, or is not plain data.
    """
    for name, value in options.items():
        if not may_travel(value):
            raise InvalidOption(
                f"option {name}={value!r} of {optimizer_class.__name__} cannot travel to the servers; "
                "use floats, ints of at most 64 bits, bools, strings, None and tuples of them"
            )
    make_optimizer(optimizer_class, _probe(), options)
    return UpdaterSpec(
        type="optimizer",
        name=_full_name(optimizer_class),
        options=options,
        elementwise=is_elementwise(optimizer_class),
    )


def is_elementwise(optimizer_class: type[torch.optim.Optimizer]) -> bool:
    """Whether the optimizer may be run on a slice of a value. A class of ours says so itself."""
    if optimizer_class.__module__.startswith("tensorkv."):
        return bool(getattr(optimizer_class, "elementwise", False))
    return optimizer_class in ELEMENTWISE_OPTIMIZERS


def make_optimizer(
    optimizer_class: type[torch.optim.Optimizer],
    parameters: Iterable[torch.nn.Parameter],
    options: dict[str, Any],
) -> torch.optim.Optimizer:
    """Build the optimizer, with its complaint about an option turned into InvalidOption."""
    try:
        return optimizer_class(parameters, **_tuples(options))
    except (
        Exception
    ) as exc:  # betas with one number are an IndexError; a class of the user may raise anything
        raise InvalidOption(f"{optimizer_class.__name__} refuses its options {options}: {exc}") from exc


def build(spec: UpdaterSpec, code: Any = None) -> Updater:
    """Return the updater a spec describes. `code` is the function or class its name stands for."""
    if spec.type == "named":
        named_spec(spec.name)
        return NAMED_UPDATERS[spec.name]()
    if spec.type == "function":
        return FunctionUpdater(code, spec)
    return OptimizerUpdater(find_optimizer(code), spec)


def build_saved(spec: UpdaterSpec, code: Any) -> Updater:
    """Return the updater of a save: `code` is what `SettingsTable.find_code` has found for it.

    Raises:
        LoadError: it is said to be one of torch's optimizers, and torch has no such one.
    """
    if code is None and spec.type == "optimizer" and spec.name.startswith("torch.optim."):
        raise LoadError(f"the save was made with {spec.name!r}, which this version of torch does not have")
    return AwaitedUpdater(spec) if code is None and spec.type != "named" else build(spec, code)


def check_state_names(settings: SavedSettings, records: Iterable[KeyRecord], where: str) -> None:
    """Raise LoadError if a key has other state than the optimizer of torch that its settings name.

    Of optimizers that are not known to go element by element nothing is known of their state either.
    """
    classes = {_full_name(each): each for each in ELEMENTWISE_OPTIMIZERS}
    for record in records:
        optimizer_class = classes.get(settings.spec_of(record.key).name)
        if optimizer_class is None:
            continue
        always, known = _state_names(optimizer_class)
        for piece in record.pieces:
            names = {each.name for each in piece.tensors[1:]} | set(piece.plain)
            if names and not always <= names <= known:
                raise LoadError(
                    f"{where}: key {record.key!r} has optimizer state {sorted(names)}, which is not that of "
                    f"{optimizer_class.__name__}: {sorted(known)}"
                )


@functools.cache
def _state_names(optimizer_class: type[torch.optim.Optimizer]) -> tuple[frozenset[str], frozenset[str]]:
    """Return what the state of an optimizer always has, and all that it may have, from trying it out."""
    found: list[frozenset[str]] = []
    extras: list[dict[str, Any]] = [{}, {"momentum": 0.5}, {"amsgrad": True}, {"centered": True}]
    with torch.device("cpu"):  # whatever the caller's default is
        for options in extras:
            parameter = torch.nn.Parameter(torch.zeros(2))
            parameter.grad = torch.ones(2)
            optimizer = make_optimizer(optimizer_class, [parameter], {"lr": 0.1})
            if options.keys() <= optimizer.defaults.keys():
                optimizer.param_groups[0].update(options)
                optimizer.step()
                found.append(frozenset(optimizer.state[parameter]))
    return frozenset.intersection(*found), frozenset.union(*found)


def restored_settings(saved: SavedSettings, current: SettingsTable) -> SettingsTable:
    """Return the settings of a save; functions and classes are torch's own, or those that `current` has.

    Raises:
        LoadError: an optimizer does not take its options.
    """
    try:
        return SettingsTable.restore(saved, lambda _, spec: build_saved(spec, current.find_code(spec)))
    except (InvalidOption, UnsupportedOptimizer) as exc:
        raise LoadError(f"the settings that were saved cannot be made: {exc}") from exc


def build_from_argument(updater: UpdaterFunction | str | None, elementwise: bool) -> Updater:
    """Return the updater that a user names or passes to `set_updater`.

    Raises:
        UnknownUpdater: there is no such name, or it is not a function.
    """
    if updater is None or isinstance(updater, str):
        return build(named_spec("assign" if updater is None else updater))
    if isinstance(updater, type) and issubclass(updater, torch.optim.Optimizer):
        raise UnknownUpdater(
            f"{updater.__name__} is an optimizer; use set_optimizer({updater.__name__}, ...)"
        )
    if not callable(updater):
        raise UnknownUpdater(f"{updater!r} is no updater; pass a function (key, pushed, stored), or a name")
    named = updater if hasattr(updater, "__qualname__") else type(updater)  # a callable object has none
    spec = UpdaterSpec(
        type="function",
        name=f"{named.__module__}:{named.__qualname__}",
        elementwise=elementwise,
    )
    return build(spec, updater)


@dataclass(frozen=True, slots=True, eq=False)
class Setting:
    """What holds for a slot in a round: an updater and the options it is called with.

    `asked` is the spec of the call that made it, None if it was not made by a call. The updater's own
    spec may be that of an earlier call: a setting that was repeated goes on with the same updater.
    """

    updater: Updater
    options: dict[str, Any] = field(default_factory=dict)
    asked: UpdaterSpec | None = None


class SettingsTable:
    """The settings of a store, in the order they were made; the last one that names a key holds for it.

    An updater keeps its state when a setting asks for what holds already, or repeats the last call
    that made a setting; this is decided for each key by itself.
    """

    def __init__(self) -> None:
        self._default = Setting(Assign())
        self._of_key: dict[Key, Setting] = {}

    def setting(self, key: Key) -> Setting:
        """Return what holds for `key`."""
        return self._of_key.get(key, self._default)

    def set_updater(self, updater: Updater, keys: tuple[Key, ...] | None) -> None:
        """Make `updater`, which is new, hold for `keys`, or for all; where it holds already it stays."""
        new = Setting(updater, _tuples(updater.spec.options), updater.spec)
        current = [self._default, *self._of_key.values()] if keys is None else map(self.setting, keys)
        repeated = {id(setting): _repeated(setting, new) for setting in current}
        if keys is None:
            default = repeated[id(self._default)] or new
            of_key = {key: repeated[id(setting)] or new for key, setting in self._of_key.items()}
            self._of_key = {key: setting for key, setting in of_key.items() if setting is not default}
            self._default = default
        else:
            self._of_key.update({key: repeated[id(self.setting(key))] or new for key in keys})

    def set_options(self, options: dict[str, Any], keys: tuple[Key, ...] | None) -> None:
        """Change options of the optimizers that hold for `keys`, or for all that have one.

        Raises:
            InvalidOption: a named key, or with keys=None every key, has no optimizer; or an optimizer
                refuses an option. Nothing is changed then.
        """
        current = [self._default, *self._of_key.values()] if keys is None else [self.setting(k) for k in keys]
        concerned = {id(s): s for s in current if isinstance(s.updater, OptimizerUpdater)}
        if not concerned or (keys is not None and len(concerned) != len({id(s) for s in current})):
            named = "" if keys is None else f" for keys {list(keys)}"
            raise InvalidOption(f"options {options} need an optimizer{named}; call set_optimizer first")
        changed = {number: _with_options(setting, options) for number, setting in concerned.items()}
        if keys is None:
            self._default = changed.get(id(self._default), self._default)
            self._of_key = {k: changed.get(id(s), s) for k, s in self._of_key.items()}
        else:
            self._of_key.update({k: changed[id(self.setting(k))] for k in keys})

    def describe(self) -> SavedSettings:
        """Return the settings as plain data, for a save."""
        updaters: dict[int, tuple[int, UpdaterSpec]] = {}
        entries: dict[int, SettingEntry] = {}
        keys: dict[int, list[Key]] = {}
        for key, setting in [(None, self._default), *self._of_key.items()]:
            spec = setting.updater.spec
            number, _ = updaters.setdefault(id(setting.updater), (len(updaters), spec))
            asked = None if setting.asked is None else setting.asked.options
            mine = keys.setdefault(id(setting) if key is not None else 0, [])
            if key is not None:
                mine.append(key)
            held_for = None if key is None else tuple(mine)
            name = id(setting) if key is not None else 0
            entries[name] = SettingEntry(held_for, number, setting.options, asked)
        return SavedSettings([spec for _, spec in updaters.values()], list(entries.values()))

    @classmethod
    def restore(cls, saved: SavedSettings, load: Callable[[int, UpdaterSpec], Updater]) -> SettingsTable:
        """Return the table that was described; `load` makes updater number i from its spec.

        Raises what `load` raises, or InvalidOption.
        """
        updaters = [load(number, spec) for number, spec in enumerate(saved.updaters)]
        table = cls()
        for entry in saved.entries:
            updater = updaters[entry.updater]
            if isinstance(updater, OptimizerUpdater):
                optimizer_spec(updater._class, entry.options)
            asked = None
            if entry.asked is not None:
                asked = msgspec.structs.replace(updater.spec, options=entry.asked)
            setting = Setting(updater, _tuples(entry.options), asked)
            if entry.keys is None:
                table._default = setting
            else:
                table._of_key.update(dict.fromkeys(entry.keys, setting))
        return table

    def find_code(self, spec: UpdaterSpec) -> Any:
        """Return the function or class that a spec names, of torch.optim or one that is set here, or None."""
        if spec.type == "optimizer":
            found: Any = getattr(torch.optim, spec.name.rpartition(":")[2], None)
            if _is_optimizer(found) and _full_name(found) == spec.name:
                return found
        for setting in (self._default, *self._of_key.values()):
            updater = setting.updater
            if (updater.spec.type, updater.spec.name) == (spec.type, spec.name):
                if isinstance(updater, OptimizerUpdater):
                    return updater._class
                if isinstance(updater, FunctionUpdater):
                    return updater.function
        return None

    def copy(self) -> SettingsTable:
        """Return a table that can be changed without changing this one. Updaters are shared."""
        other = SettingsTable()
        other._default, other._of_key = self._default, dict(self._of_key)
        return other


def apply_all(updates: Sequence[tuple[Setting, Update]]) -> list[Failure]:
    """Apply updates, those with the same setting in one call, and return each one's failure or None."""
    groups: dict[int, list[int]] = {}
    for index, (setting, _) in enumerate(updates):
        groups.setdefault(id(setting), []).append(index)
    failures: list[Failure] = [None] * len(updates)
    for indices in groups.values():
        setting = updates[indices[0]][0]
        results = setting.updater.apply([updates[index][1] for index in indices], setting.options)
        for index, failure in zip(indices, results, strict=True):
            failures[index] = failure
    return failures


def _with_options(setting: Setting, options: dict[str, Any]) -> Setting:
    updater = setting.updater
    assert isinstance(updater, OptimizerUpdater)
    optimizer_class = updater._class
    for name in options:
        if name not in updater._optimizer.defaults:
            known = ", ".join(sorted(updater._optimizer.defaults))
            raise InvalidOption(f"{optimizer_class.__name__} has no option {name!r}; it has {known}")
    merged = {**setting.options, **options}
    optimizer_spec(optimizer_class, merged)
    return Setting(updater, _tuples(merged), setting.asked)


def _repeated(current: Setting, new: Setting) -> Setting | None:
    """Return `new` with the updater of `current`, if it asks for the same: the state is kept then."""
    old, updater = current.updater, new.updater
    if isinstance(old, AwaitedUpdater):
        return _found(current, old, new)
    if type(old) is not type(updater) or old.spec.name != updater.spec.name:
        return None
    if isinstance(old, FunctionUpdater) and isinstance(updater, FunctionUpdater):
        return current if old.function is updater.function and old.spec == updater.spec else None
    if not (isinstance(old, OptimizerUpdater) and isinstance(updater, OptimizerUpdater)):
        return current  # a named updater
    made, asked = old._optimizer.defaults, {**updater._optimizer.defaults, **new.options}
    if {**made, **current.options} != asked and not _asks_alike(current, new):
        return None
    given = {name: value for name, value in asked.items() if name in new.options or made.get(name) != value}
    return Setting(old, given, new.asked)


def _asks_alike(current: Setting, new: Setting) -> bool:
    """Whether two settings were made by the same call. Tuples that have travelled or were saved are lists."""
    if current.asked is None or new.asked is None:
        return False
    return _tuples(current.asked.options) == _tuples(new.asked.options)


def _found(current: Setting, old: AwaitedUpdater, new: Setting) -> Setting | None:
    """Return `new` with the state that was loaded for it, if it is what a loaded store has waited for."""
    updater = new.updater
    if (old.spec.type, old.spec.name) != (updater.spec.type, updater.spec.name):
        return None
    if isinstance(updater, OptimizerUpdater):
        defaults = updater._optimizer.defaults
        if {**defaults, **current.options} != {**defaults, **new.options} and not _asks_alike(current, new):
            return None
        updater.adopt(old)
    return new


def _placed(each: Any, stored: torch.Tensor, fused: bool) -> Any:
    """Return an entry of restored state where the optimizer expects it: beside the value, or on the CPU."""
    if not isinstance(each, torch.Tensor):
        return each
    return each.to(stored.device) if each.dim() or fused else each


def _default_device_is_cpu() -> bool:
    """Whether tensors go to the CPU unless told otherwise. Trying is six times as fast as torch's getter."""
    return torch.empty(0).is_cpu


def _full_name(optimizer_class: type[torch.optim.Optimizer]) -> str:
    return f"{optimizer_class.__module__}:{optimizer_class.__qualname__}"


def _updater_error(name: str, key: Key, exc: BaseException) -> TensorKVError:
    text = "".join(traceback.format_exception(exc)).rstrip()
    error = UpdaterError(f"updater {name!r} raised {type(exc).__name__} on key {key!r}: {exc}\n{text}")
    error.__cause__ = exc
    return error


def _is_optimizer(value: Any) -> bool:
    return (
        isinstance(value, type)
        and issubclass(value, torch.optim.Optimizer)
        and value is not torch.optim.Optimizer
    )


def _tuples(options: dict[str, Any]) -> dict[str, Any]:
    """Turn lists into tuples: `betas` travels as a list, and torch expects a tuple."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


def _probe() -> list[torch.nn.Parameter]:
    """A parameter every optimizer takes: a matrix, because Muon wants one."""
    return [torch.nn.Parameter(torch.zeros(2, 2, device="cpu"), requires_grad=False)]
