"""Checkpoints of an optimizer: between torch's format, which numbers parameters, and the store's, which names
them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, final

import torch

from tensorkv.arrays import bytes_of
from tensorkv.errors import NotSupported

State = dict[str, Any]


def with_states(
    held: Mapping[str, Any], weights: Mapping[str, torch.Tensor], states: Mapping[str, State]
) -> dict[str, Any]:
    """Return a store's state dict with other values and another optimizer state.

    Args:
        held: what the store has now: `KVStore.state_dict`.
        weights: the new value of each key.
        states: the new state of each key that has one.
    """
    return {
        **held,
        "values": {**held["values"], **weights},
        "optimizer_state": {name: _on_cpu(state) for name, state in states.items()},
    }


def _on_cpu(state: State) -> State:
    return {
        name: each.detach().cpu() if isinstance(each, torch.Tensor) else each for name, each in state.items()
    }


def state_digest(states: Mapping[str, State]) -> list[str]:
    """Return lines that are equal for equal states: for each parameter a hash of every entry."""
    lines = ["state"]
    for name in sorted(states):
        for entry, value in sorted(states[name].items()):
            lines.append(f"{name}: {entry} {_digest(value)}")
    return lines


def _digest(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    whole = value.detach().cpu().contiguous()
    return (
        f"{value.dtype} {tuple(value.shape)} {hashlib.blake2b(bytes_of(whole), digest_size=16).hexdigest()}"
    )


STATE_IS_THERE = (
    "the optimizer's state is on the servers, and cannot be removed or replaced here: load a state_dict, or "
    "make another DistributedOptimizer to start afresh"
)


@final
class StateView(MutableMapping[Any, Any]):
    """The state of all parameters as `Optimizer.state`, read when somebody looks at it.

    It is never false: torch's distributed checkpoints take an empty state for one to be created by a step.
    Without `target`, setting an entry does nothing: frameworks move state to other devices that way, and that
    of servers stays there. Removing one is refused.
    """

    def __init__(
        self, read: Callable[[], Mapping[Any, Any]], target: MutableMapping[Any, Any] | None = None
    ) -> None:
        self._read = read
        self._target: MutableMapping[Any, Any] = {} if target is None else target
        self._known: Mapping[Any, Any] | None = target

    def _found(self) -> Mapping[Any, Any]:
        if self._known is None:
            self._known = self._read()
        return self._known

    def __getitem__(self, parameter: Any) -> Any:
        return self._found()[parameter]

    def __setitem__(self, parameter: Any, state: Any) -> None:
        self._target[parameter] = state

    def __delitem__(self, parameter: Any) -> None:
        if self._known is not self._target:
            raise NotSupported(STATE_IS_THERE)
        del self._target[parameter]

    def clear(self) -> None:
        """Remove all state, if it is here."""
        if self._known is not self._target:
            raise NotSupported(STATE_IS_THERE)
        self._target.clear()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._found())

    def __len__(self) -> int:
        return len(self._found())

    def __bool__(self) -> bool:
        return True
