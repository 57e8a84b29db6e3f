"""Updaters: how they combine a round's sum with the stored value, for many keys at once.

An `UpdaterSpec` describes an updater as plain data that may travel; `settings` makes the `Updater` from it.
An updater works on `Update` records, one per slot: a slot is a whole value, or one slice of it if the updater
is elementwise. It keeps its state per slot, under the number the caller gives the slot. Optimizers are in
`optimizer`.
"""

from __future__ import annotations

import os
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch

from tensorkv.errors import LoadError, TensorKVError, UnknownUpdater, UpdaterError, did_you_mean
from tensorkv.plain import Key
from tensorkv.updaters.spec import UpdaterSpec

Failure = Exception | None
UpdaterFunction = Callable[[Key, torch.Tensor, torch.Tensor], None]


@dataclass(slots=True)
class Update:
    """One slot to update: change `stored` in place by `pushed`, both of the slot's shape and dtype.

    `pushed` is valid during this call only, and only read: it may be a worker's own memory.
    """

    slot: int
    key: Key
    pushed: torch.Tensor
    stored: torch.Tensor


class Updater(ABC):
    """Changes stored values by pushed ones. Not thread-safe: one call at a time."""

    spec: UpdaterSpec

    @abstractmethod
    def apply(self, updates: Sequence[Update], options: dict[str, Any]) -> list[Failure]:
        """Update every slot; return for each the error it failed with, or None.

        A slot that failed keeps its value and state.
        """

    def check_value(
        self,
        key: Key,
        shape: Sequence[int],
        dtype: torch.dtype,
        options: Mapping[str, Any] | None = None,
        device_type: str | None = "cpu",
    ) -> None:
        """Raise if values of this shape and dtype cannot be updated. Optimizers use the other arguments."""
        return  # accepts any value that can be stored

    def forget(self, slot: int) -> None:
        """Drop the state of a slot, if it has any."""
        return  # it has none

    def state(self, slot: int) -> dict[str, Any]:
        """Return the state of a slot, by name; empty if there is none. Not a copy."""
        return {}

    def restore(self, slot: int, state: dict[str, Any]) -> None:
        """Continue with this state of a slot, in CPU tensors that the updater owns from now on."""
        if state:  # this updater keeps none
            raise LoadError(f"updater {self.spec.name!r} keeps no state, but there is some in what was saved")


@final
class Assign(Updater):
    """Replace the stored value by the sum. MXNet's default, ASSIGN."""

    spec = UpdaterSpec(type="named", name="assign")

    def apply(self, updates: Sequence[Update], options: dict[str, Any]) -> list[Failure]:
        for update in updates:
            update.stored.copy_(update.pushed)
        return [None] * len(updates)


@final
class Add(Updater):
    """Add the sum to the stored value."""

    spec = UpdaterSpec(type="named", name="add")

    def apply(self, updates: Sequence[Update], options: dict[str, Any]) -> list[Failure]:
        return [self._apply_one(update) for update in updates]

    def _apply_one(self, update: Update) -> Failure:
        stored, pushed = update.stored, update.pushed
        try:
            if stored.is_floating_point() and stored.dtype.itemsize == 1:  # torch cannot add 8-bit floats
                stored.copy_(stored.float().add_(pushed.float()))
            else:
                stored.add_(pushed)
        except (RuntimeError, MemoryError) as exc:
            return updater_error(self.spec.name, update.key, exc)
        return None


@final
class FunctionUpdater(Updater):
    """Call a user's function on a copy of the stored value, and store the copy if the function returns.

    The function owns both tensors that it gets: if it keeps them, they never change.
    """

    def __init__(self, function: UpdaterFunction, spec: UpdaterSpec) -> None:
        self.function = function
        self.spec = spec

    def apply(self, updates: Sequence[Update], options: dict[str, Any]) -> list[Failure]:
        return [self._apply_one(update) for update in updates]

    def _apply_one(self, update: Update) -> Failure:
        try:
            changed = update.stored.clone()
            with torch.no_grad():
                returned: Any = self.function(update.key, update.pushed.clone(), changed)
            if returned is not None and not _shares_memory(returned, changed):
                raise TypeError(
                    f"it has returned a {type(returned).__name__}, which nobody takes: change `stored` in "
                    "place, by stored.copy_(new) say, and return nothing"
                )
            if changed.shape != update.stored.shape:
                raise ValueError(
                    f"it has resized `stored` from {tuple(update.stored.shape)} to {tuple(changed.shape)}"
                )
            update.stored.copy_(changed.detach())  # the function may have had it track gradients
        except BaseException as exc:  # the user's code may raise anything
            if isinstance(exc, KeyboardInterrupt):
                raise
            return updater_error(self.spec.name, update.key, exc)
        return None


@final
class AwaitedUpdater(Updater):
    """Placeholder for a function or class of a save, which has only its name, until it is set again.

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

    def forget(self, slot: int) -> None:
        self.states.pop(slot, None)

    def state(self, slot: int) -> dict[str, Any]:
        return self.states.get(slot, {})

    def restore(self, slot: int, state: dict[str, Any]) -> None:
        self.states[slot] = state


NAMED_UPDATERS: dict[str, type[Assign] | type[Add]] = {"assign": Assign, "add": Add}
"""The updaters that users can choose by name."""


def named_spec(name: str) -> UpdaterSpec:
    """Return the spec of the updater called `name`.

    Raises:
        UnknownUpdater: no such updater; the text lists the known ones.
    """
    if name not in NAMED_UPDATERS:
        known = ", ".join(repr(each) for each in sorted(NAMED_UPDATERS))
        raise UnknownUpdater(
            f"there is no updater {name!r}{did_you_mean(name, NAMED_UPDATERS)}; known are {known}, "
            "or pass a function"
        )
    return NAMED_UPDATERS[name].spec


def updater_error(name: str, key: Key, exc: BaseException) -> TensorKVError:
    """Return the error of an updater that raised on a key, with the traceback in its text."""
    frames = exc.__traceback__
    while frames is not None and frames.tb_next and _is_ours(frames.tb_frame.f_code.co_filename):
        frames = frames.tb_next
    text = "".join(traceback.format_exception(type(exc), exc, frames)).rstrip()
    error = UpdaterError(f"updater {name!r} raised {type(exc).__name__} on key {key!r}: {exc}\n{text}")
    error.__cause__ = exc
    return error


def _is_ours(path: str) -> bool:
    """Whether a frame is of this package; users look for their mistake elsewhere."""
    return os.path.dirname(path) == os.path.dirname(__file__)


def _shares_memory(returned: Any, stored: torch.Tensor) -> bool:
    """Whether a function returned `stored` itself, or a view of it, as `return stored.add_(pushed)` does."""
    if returned is stored:
        return True
    return (
        isinstance(returned, torch.Tensor)
        and stored.numel() > 0
        and returned.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()
    )
