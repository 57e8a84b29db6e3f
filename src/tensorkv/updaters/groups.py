"""Reads an optimizer object: the options and the keys of each of its groups.

The object itself does not go to the servers. They make it again, from its class and the options of its
groups; this module first verifies that this gives the same groups.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tensorkv.errors import InvalidArgument, InvalidOption
from tensorkv.plain import Key
from tensorkv.updaters.optimizer import (
    check_may_travel,
    find_optimizer,
    make_optimizer,
    optimizer_spec,
    probe,
)

_NO_OPTIONS = frozenset({"params", "param_names", "initial_lr"})
"""Entries of a group that are not options: torch's own, and that of learning rate schedulers."""

_COLLECTING = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_MODULES_OF_TORCH = "torch.optim."


@dataclass(frozen=True, slots=True)
class OptimizerGroup:
    """Options of an optimizer, and the keys they apply to; None means all."""

    keys: tuple[Key, ...] | None
    options: dict[str, Any]


def groups_of(
    optimizer: torch.optim.Optimizer, keys: tuple[Key, ...] | None, keys_by_id: Mapping[int, Sequence[Key]]
) -> list[OptimizerGroup]:
    """Return the groups of an optimizer, merging those with the same options.

    A single group applies to all keys. Of several, each applies to the keys of its parameters: the keys that
    were initialised with a parameter, or the parameter's name, if torch has recorded it.

    Args:
        optimizer: as the user has made it; it has made no step.
        keys: the keys of a single group, instead of all.
        keys_by_id: the keys that were initialised with a parameter, by the id of the parameter.

    Raises:
        UnknownUpdater, UnsupportedOptimizer: a store cannot run its class.
        InvalidOption: an option is not plain data, or its groups do not tell it.
        InvalidArgument: it has made steps; or it has several groups, and their keys are unknown, or `keys`
            is given.
    """
    optimizer_class = find_optimizer(type(optimizer))
    found: list[tuple[dict[str, Any], list[int]]] = []
    for number, group in enumerate(optimizer.param_groups):
        if not group["params"] and len(optimizer.param_groups) > 1:
            continue
        options = _options_of(optimizer_class, optimizer, number)
        alike = next((numbers for known, numbers in found if known == options), None)
        if alike is None:
            found.append((options, [number]))
        else:
            alike.append(number)
    if not found:
        raise InvalidArgument(
            f"set_optimizer: no group of this {optimizer_class.__name__} has a parameter, so it cannot be "
            "told which keys they are for; pass the class and its options"
        )
    _check_makes_first_step(optimizer_class, optimizer, found[0][0])
    if len(found) == 1:
        return [OptimizerGroup(keys, found[0][0])]
    name = optimizer_class.__name__
    if keys is not None:
        raise InvalidArgument(
            f"keys={list(keys)} with an {name} of {len(found)} groups: each group says by its parameters "
            "which keys it is for; leave keys away, or call set_optimizer(..., keys=[...]) for each"
        )
    group_of: dict[Key, int] = {}
    result: list[OptimizerGroup] = []
    for options, numbers in found:
        mine: list[Key] = []
        for number in numbers:
            for key in _keys_of(optimizer, number, keys_by_id):
                if group_of.setdefault(key, number) != number:
                    raise InvalidArgument(
                        f"set_optimizer: key {key!r} is in groups {group_of[key]} and {number} of {name}; "
                        "give its parameters different names"
                    )
                mine.append(key)
        result.append(OptimizerGroup(tuple(mine), options))
    return result


def _keys_of(
    optimizer: torch.optim.Optimizer, number: int, keys_by_id: Mapping[int, Sequence[Key]]
) -> list[Key]:
    """Return the keys of a group's parameters."""
    group = optimizer.param_groups[number]
    parameters, names = group["params"], group.get("param_names") or ()
    found: list[Key] = []
    for place, parameter in enumerate(parameters):
        known = keys_by_id.get(id(parameter), ())
        recorded = names[place] if len(names) == len(parameters) else None
        if recorded is not None and (recorded in known or not known):
            found.append(recorded)
        elif known:
            found += known
        else:
            name = type(optimizer).__name__
            raise InvalidArgument(
                f"set_optimizer: which key is parameter {place} of group {number} of the {name}, of shape "
                f"{tuple(parameter.shape)}, for? Give init the parameters themselves, and before; or make "
                "the optimizer of named_parameters() (torch 2.6 or newer); or call "
                f"set_optimizer({name}, keys=[...], ...) for each group"
            )
    return found


def _options_of(
    optimizer_class: type[torch.optim.Optimizer], optimizer: torch.optim.Optimizer, number: int
) -> dict[str, Any]:
    """Return the options of a group that differ from the defaults.

    Omitting the others matters: the store chooses how to step if `foreach`, for example, is not given.
    """
    name = optimizer_class.__name__
    group = {
        option: plain(value)
        for option, value in optimizer.param_groups[number].items()
        if option not in _NO_OPTIONS
    }
    if optimizer_class.__module__.startswith(_MODULES_OF_TORCH):  # torch's own read nothing else
        group = {option: value for option, value in group.items() if option in optimizer.defaults}
    check_may_travel(optimizer_class, group)
    parameters = list(inspect.signature(optimizer_class).parameters.values())[1:]
    named = {each.name: each.default for each in parameters if each.kind not in _COLLECTING}
    for option in named:
        if option not in group:
            raise InvalidOption(
                f"what {option!r} this {name} was made with cannot be told: its groups do not have it; call "
                f"set_optimizer({name}, {option}=..., ...), with the class"
            )
    options = {option: group[option] for option, usual in named.items() if not _same(usual, group[option])}
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters):
        made = make_optimizer(optimizer_class, probe(), options).defaults
        for option, value in group.items():
            if option not in named and not (option in made and _same(made[option], value)):
                options[option] = value
    options = optimizer_spec(optimizer_class, options).options
    again = make_optimizer(optimizer_class, probe(), options).param_groups[0]
    for option, value in group.items():
        if option not in again or not _same(again[option], value):
            raise InvalidOption(
                f"group {number} of this {name} has {option}={value!r}, which {name}(..., {options}) does "
                f"not lead to; call set_optimizer({name}, ...), with the class and the options that it takes"
            )
    return options


def _check_makes_first_step(
    optimizer_class: type[torch.optim.Optimizer], optimizer: torch.optim.Optimizer, options: dict[str, Any]
) -> None:
    """Raise InvalidArgument if the optimizer has state, such as momentum, that the servers would lack."""
    for state in optimizer.state.values():
        step = state.get("step") if isinstance(state, Mapping) else None
        if isinstance(step, (int, float, torch.Tensor)):
            stepped = float(step) > 0
        else:  # some optimizers have state from the start
            stepped = bool(state) and not make_optimizer(optimizer_class, probe(), options).state
        if stepped:
            name = optimizer_class.__name__
            raise InvalidArgument(
                f"this {name} has made steps, and its state ({', '.join(map(str, state))}) stays here: pass "
                f"a new {name}, made of the same parameters and options, and let the store make the steps; "
                "what a store has saved is loaded by its own load. A checkpoint of this optimizer is loaded "
                "by DistributedOptimizer.load_state_dict, after the wrap"
            )


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with NumPy numbers converted to Python's."""
    return {
        name: type(value)(map(_number, value)) if type(value) in (list, tuple) else _number(value)
        for name, value in options.items()
    }


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def plain(value: Any) -> Any:
    """Return an option, with Python's number for one in a tensor or of NumPy."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    return _number(value)


def _same(one: Any, other: Any) -> bool:
    """Whether two options are equal. 0 and False are not."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)
