"""ParameterTable: which parameters of a model the keys of a store were initialised with."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, final

import torch

from tensorkv.arrays import Key


@final
class ParameterTable:
    """The parameters that keys were initialised with, held weakly. By them an optimizer tells its groups."""

    def __init__(self) -> None:
        self._parameters: dict[Key, weakref.ref[torch.Tensor]] = {}

    def learn(self, keys: Iterable[Key], values: Iterable[Any]) -> None:
        """Note what keys were initialised with, as the caller gave it."""
        for key, value in zip(keys, values, strict=True):
            if isinstance(value, (list, tuple)):  # one per device, and there is one
                value = value[0]
            if isinstance(value, torch.nn.Parameter):
                self._parameters[key] = weakref.ref(value)
            else:
                self._parameters.pop(key, None)

    def forget(self, keys: Iterable[Key]) -> None:
        """Drop what is known of keys."""
        for key in keys:
            self._parameters.pop(key, None)

    def keys_by_id(self) -> dict[int, list[Key]]:
        """Return the keys of each parameter that is still there, by its id."""
        found: dict[int, list[Key]] = {}
        for key, reference in list(self._parameters.items()):
            parameter = reference()
            if parameter is not None:
                found.setdefault(id(parameter), []).append(key)
        return found
