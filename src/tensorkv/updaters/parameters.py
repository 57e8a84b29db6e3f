"""ParameterTable: which parameters of a model the keys of a store were initialised with.

It maps the groups of an optimizer made of these parameters to keys. And it serves a warning: gradients that
are pushed before any updater is set replace the weights, without an error.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, final

import torch

from tensorkv.keys import PushBatch
from tensorkv.plain import Key

_PACKAGE = __name__.partition(".")[0]


@final
class ParameterTable:
    """The parameters that keys were initialised with, held weakly, and the keys whose next push is checked.

    `watched` becomes empty once an updater is set, a save is loaded, or the warning was given.
    """

    def __init__(self) -> None:
        self._parameters: dict[Key, weakref.ref[torch.Tensor]] = {}
        self._watches = True
        self.watched: set[Key] = set()

    def learn(self, keys: Iterable[Key], values: Iterable[Any], watch: bool) -> None:
        """Note the values that keys were initialised with, as the caller passed them."""
        for key, value in zip(keys, values, strict=True):
            if isinstance(value, (list, tuple)):  # one per device, at least one
                value = value[0]
            self.forget([key])
            if not isinstance(value, torch.nn.Parameter):
                continue
            self._parameters[key] = weakref.ref(value)
            if watch and self._watches and value.requires_grad:
                self.watched.add(key)

    def forget(self, keys: Iterable[Key]) -> None:
        """Forget the parameters of keys."""
        for key in keys:
            self._parameters.pop(key, None)
            self.watched.discard(key)

    def keys_by_id(self) -> dict[int, list[Key]]:
        """Return the keys of each parameter that is still alive, by its id."""
        found: dict[int, list[Key]] = {}
        for key, reference in list(self._parameters.items()):
            parameter = reference()
            if parameter is not None:
                found.setdefault(id(parameter), []).append(key)
        return found

    def stop_watching(self) -> None:
        """Stop warning: the user has chosen an updater, or was warned."""
        self._watches = False
        self.watched.clear()

    def check_push(self, batch: PushBatch) -> None:
        """Warn at a watched key's first push, unless it pushes the parameter itself.

        A program that pushes a parameter, or a view of its memory, averages weights.
        """
        if self.watched.isdisjoint(batch.keys):
            return
        for key, tensors in zip(batch.keys, batch.tensors, strict=True):
            if key not in self.watched or not tensors:
                continue
            self.watched.discard(key)
            reference = self._parameters.get(key)
            parameter = None if reference is None else reference()
            if parameter is None or not _share_memory(tensors, parameter):
                self.stop_watching()
                warnings.warn(_warning_text(key), UserWarning, stacklevel=_level_of_caller())
                return


def _share_memory(tensors: Sequence[torch.Tensor], parameter: torch.Tensor) -> bool:
    """Whether one of these lies in the memory of a parameter."""
    address = parameter.untyped_storage().data_ptr()
    return any(each.untyped_storage().data_ptr() == address for each in tensors)


def _level_of_caller() -> int:
    """Return how many frames up the code is that has called the package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
        level, frame = level + 1, frame.f_back
    return level


def _warning_text(key: Key) -> str:
    return (
        f"push of key {key!r}, which was initialised with a parameter that requires a gradient: no updater "
        'is set, so the default, "assign", replaces the parameter by the sum of what is pushed. If gradients '
        'are pushed, call set_optimizer first; if the sum is meant, call set_updater("assign"). This is said '
        "once for all keys"
    )
