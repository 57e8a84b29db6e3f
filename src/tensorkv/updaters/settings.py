"""Settings: which updater applies to which key, with which options; and how updaters are made.

A `SettingsTable` holds the settings a store has been given, and finds the one that applies to a key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from tensorkv.checkpoint.records import SavedSettings, SettingEntry
from tensorkv.errors import InvalidOption, LoadError, UnknownUpdater, UnsupportedOptimizer
from tensorkv.plain import Key
from tensorkv.updaters.base import (
    NAMED_UPDATERS,
    Assign,
    AwaitedUpdater,
    Failure,
    FunctionUpdater,
    Update,
    Updater,
    UpdaterFunction,
    named_spec,
)
from tensorkv.updaters.optimizer import (
    OptimizerUpdater,
    find_optimizer,
    full_name,
    is_optimizer_class,
    optimizer_spec,
    tuples,
    unknown_option,
)
from tensorkv.updaters.spec import UpdaterSpec


def build(spec: UpdaterSpec, code: Any = None) -> Updater:
    """Return the updater a spec describes. `code` is the function or class that it names."""
    if spec.type == "named":
        named_spec(spec.name)
        return NAMED_UPDATERS[spec.name]()
    if spec.type == "function":
        return FunctionUpdater(code, spec)
    return OptimizerUpdater(find_optimizer(code), spec)


def build_saved(spec: UpdaterSpec, code: Any) -> Updater:
    """Return the updater of a save: `code` is the result of `SettingsTable.find_code` for it.

    Raises:
        LoadError: it names an optimizer of torch that this torch does not have.
    """
    if code is None and spec.type == "optimizer" and spec.name.startswith("torch.optim."):
        raise LoadError(f"the save was made with {spec.name!r}, which this version of torch does not have")
    return AwaitedUpdater(spec) if code is None and spec.type != "named" else build(spec, code)


def restored_settings(saved: SavedSettings, current: SettingsTable) -> SettingsTable:
    """Return the settings of a save; functions and classes are torch's own, or those of `current`.

    Raises:
        LoadError: an optimizer refuses its options.
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
    if isinstance(updater, torch.optim.Optimizer):
        raise UnknownUpdater(
            f"the updater is an optimizer, {type(updater).__name__}; pass it to set_optimizer"
        )
    if not callable(updater):
        raise UnknownUpdater(f"{updater!r} is no updater; pass a function (key, pushed, stored), or a name")
    named = updater if hasattr(updater, "__qualname__") else type(updater)  # a callable object lacks it
    spec = UpdaterSpec(
        type="function",
        name=f"{named.__module__}:{named.__qualname__}",
        elementwise=elementwise,
    )
    return build(spec, updater)


@dataclass(frozen=True, slots=True, eq=False)
class Setting:
    """The setting of a slot in a round: an updater and the options it is called with.

    `asked` is the spec of the call that made it, None if no call did. The updater's own spec may be that of
    an earlier call: a repeated setting keeps the same updater.
    """

    updater: Updater
    options: dict[str, Any] = field(default_factory=dict)
    asked: UpdaterSpec | None = None

    def check_value(
        self, key: Key, shape: Sequence[int], dtype: torch.dtype, device_type: str | None = "cpu"
    ) -> None:
        """Raise if it cannot apply to such a value: see `Updater.check_value`."""
        self.updater.check_value(key, shape, dtype, self.options, device_type)


class SettingsTable:
    """The settings of a store, in the order they were made; the last one that names a key applies to it.

    An updater keeps its state when a setting asks for what applies already, or repeats the last call that
    made a setting; this is decided for each key separately.
    """

    def __init__(self) -> None:
        self._default = Setting(Assign())
        self._of_key: dict[Key, Setting] = {}

    def setting(self, key: Key) -> Setting:
        """Return the setting that applies to `key`."""
        return self._of_key.get(key, self._default)

    def set_updater(self, updater: Updater, keys: tuple[Key, ...] | None) -> None:
        """Apply `updater`, which is new, to `keys` or to all; keys that have the same already keep theirs."""
        new = Setting(updater, tuples(updater.spec.options), updater.spec)
        current = [self._default, *self._of_key.values()] if keys is None else map(self.setting, keys)
        repeated = {id(setting): _repeated(setting, new) for setting in current}
        if keys is None:
            default = repeated[id(self._default)] or new
            of_key = {key: repeated[id(setting)] or new for key, setting in self._of_key.items()}
            self._of_key = {key: setting for key, setting in of_key.items() if setting is not default}
            self._default = default
        else:
            self._of_key.update({key: repeated[id(self.setting(key))] or new for key in keys})

    def set_options(
        self, options: dict[str, Any], keys: tuple[Key, ...] | None, *, checked: bool = False
    ) -> None:
        """Change options of the optimizers of `keys`, or of all keys that have one.

        If they are `checked`, the worker that sent them has tried them on an optimizer.

        Raises:
            InvalidOption: a named key, or with keys=None every key, has no optimizer; or an optimizer
                refuses an option. Then nothing is changed.
        """
        current = [self._default, *self._of_key.values()] if keys is None else [self.setting(k) for k in keys]
        concerned = {id(s): s for s in current if isinstance(s.updater, OptimizerUpdater)}
        if not concerned or (keys is not None and len(concerned) != len({id(s) for s in current})):
            named = "" if keys is None else f" for keys {list(keys)}"
            raise InvalidOption(f"options {options} need an optimizer{named}; call set_optimizer first")
        changed = {number: _with_options(setting, options, checked) for number, setting in concerned.items()}
        if keys is None:
            self._default = changed.get(id(self._default), self._default)
            self._of_key = {k: changed.get(id(s), s) for k, s in self._of_key.items()}
        else:
            self._of_key.update({k: changed[id(self.setting(k))] for k in keys})

    def keep(self, key: Key, setting: Setting) -> None:
        """Let this setting, which may be of another table, apply to a key."""
        if self.setting(key) is not setting:
            self._of_key[key] = setting

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
        """Return the table that `describe` described; `load` makes updater number i from its spec.

        Raises what `load` raises, or InvalidOption.
        """
        updaters = [load(number, spec) for number, spec in enumerate(saved.updaters)]
        table = cls()
        for entry in saved.entries:
            updater = updaters[entry.updater]
            if isinstance(updater, OptimizerUpdater):
                optimizer_spec(updater.optimizer_class, entry.options)
            asked = None
            if entry.asked is not None:
                asked = msgspec.structs.replace(updater.spec, options=entry.asked)
            setting = Setting(updater, tuples(entry.options), asked)
            if entry.keys is None:
                table._default = setting
            else:
                table._of_key.update(dict.fromkeys(entry.keys, setting))
        return table

    def find_code(self, spec: UpdaterSpec) -> Any:
        """Return the function or class that a spec names, from torch.optim or this table; None if unknown."""
        if spec.type == "optimizer":
            found: Any = getattr(torch.optim, spec.name.rpartition(":")[2], None)
            if is_optimizer_class(found) and full_name(found) == spec.name:
                return found
        for setting in (self._default, *self._of_key.values()):
            updater = setting.updater
            if (updater.spec.type, updater.spec.name) == (spec.type, spec.name):
                if isinstance(updater, OptimizerUpdater):
                    return updater.optimizer_class
                if isinstance(updater, FunctionUpdater):
                    return updater.function
        return None

    def copy(self) -> SettingsTable:
        """Return a table that can be changed without changing this one. Updaters are shared."""
        other = SettingsTable()
        other._default, other._of_key = self._default, dict(self._of_key)
        return other


def apply_all(updates: Sequence[tuple[Setting, Update]]) -> list[Failure]:
    """Apply updates, those with the same setting in one call; return each one's failure or None."""
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


def _with_options(setting: Setting, options: dict[str, Any], checked: bool) -> Setting:
    updater = setting.updater
    assert isinstance(updater, OptimizerUpdater)
    optimizer_class = updater.optimizer_class
    for name in options:
        if name not in updater.defaults:
            raise unknown_option(optimizer_class, name, updater.defaults)
    merged = {**setting.options, **options}
    if not checked and not _only_another_rate(updater, setting, options):
        optimizer_spec(optimizer_class, merged)
    return Setting(updater, tuples(merged), setting.asked)


def _only_another_rate(updater: OptimizerUpdater, setting: Setting, options: dict[str, Any]) -> bool:
    """Whether options are only a learning rate that every optimizer of torch takes, as in a schedule.

    Trying an optimizer would take longer than all the rest of such a call.
    """
    rate = options.get("lr")
    return (
        len(options) == 1
        and type(rate) is float
        and 0.0 <= rate < math.inf
        and type(setting.options.get("lr", updater.defaults["lr"])) is float
        and updater.optimizer_class.__module__.startswith("torch.optim.")
    )


def _repeated(current: Setting, new: Setting) -> Setting | None:
    """Return `new` with the updater of `current`, and so its state, if it asks for the same; else None."""
    old, updater = current.updater, new.updater
    if isinstance(old, AwaitedUpdater):
        return _found(current, old, new)
    if type(old) is not type(updater) or old.spec.name != updater.spec.name:
        return None
    if isinstance(old, FunctionUpdater) and isinstance(updater, FunctionUpdater):
        return current if old.function is updater.function and old.spec == updater.spec else None
    if not (isinstance(old, OptimizerUpdater) and isinstance(updater, OptimizerUpdater)):
        return current  # a named updater
    made, asked = old.defaults, {**updater.defaults, **new.options}
    if {**made, **current.options} != asked and not _asks_alike(current, new):
        return None
    given = {name: value for name, value in asked.items() if name in new.options or made.get(name) != value}
    return Setting(old, given, new.asked)


def _asks_alike(current: Setting, new: Setting) -> bool:
    """Whether equal calls made both settings. Tuples that have travelled or were saved are lists."""
    if current.asked is None or new.asked is None:
        return False
    return tuples(current.asked.options) == tuples(new.asked.options)


def _found(current: Setting, old: AwaitedUpdater, new: Setting) -> Setting | None:
    """Return `new` with the state that was loaded for it, if `old` is its placeholder; else None."""
    updater = new.updater
    if (old.spec.type, old.spec.name) != (updater.spec.type, updater.spec.name):
        return None
    if isinstance(updater, OptimizerUpdater):
        defaults = updater.defaults
        if {**defaults, **current.options} != {**defaults, **new.options} and not _asks_alike(current, new):
            return None
        updater.adopt(old)
    return new
