"""LatePulls: weights that come while the next forward is running already (`overlap="forward"`).

A step asks for its weights in the order in which a model has them, and returns. Before a block of the model
computes, a hook waits for the weights of that block, and before the model itself for those outside blocks.
Blocks are the outermost modules whose class occurs several times, such as the layers of a transformer; a
parameter that two of them have is outside.

A hook runs only where a module is called. If one reads the weights of a block without calling it, its
gradient is made while these are still awaited: an error. Nothing notices a reader that makes
no gradient, such as an average of weights: `DistributedOptimizer.wait` is for those.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, final

import torch
from torch import nn

from tensorkv.errors import InvalidValue, NotSupported
from tensorkv.store import KVStore
from tensorkv.tracers import opaque
from tensorkv.training.gradients import call_after_accumulation
from tensorkv.work import Work

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)

_COMPILED = (
    "overlap='forward' with a compiled model, whose forward is one piece: pass overlap='backward' or False"
)
_NOT_CALLED = (
    "parameter {name!r} was used while its new value was still on the way: overlap='forward' waits when "
    "module {module!r} is called, and the model reads its weights without calling it; pass overlap='backward'"
)


@final
class LatePulls:
    """Pulls the parameters of a model block by block.

    Args:
        kv: the store that has the parameters.
        model: the module that is called.
        parameters: by key.
        wait_for_all: a method that calls `wait`; called before a state dict is taken or loaded.

    Raises:
        NotSupported: the model is compiled.
    """

    def __init__(
        self,
        kv: KVStore,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        wait_for_all: Callable[[], None],
    ) -> None:
        compiled = [each for each in model.modules() if each._compiled_call_impl is not None]
        if compiled or hasattr(model, "_orig_mod"):
            raise NotSupported(_COMPILED)
        self._blocks = [_Block(kv, *each) for each in cut(model, parameters)]
        self._block_of = {id(each): block for block in self._blocks for each in block.parameters.values()}
        self._hooks: list[Any] = []
        for block in self._blocks:
            self._hooks.append(block.module.register_forward_pre_hook(_Hook(block.wait)))
        for each in model.modules():
            module: Any = each  # torch gives these no types
            self._hooks.append(module.register_state_dict_pre_hook(_Hook(wait_for_all)))
            self._hooks.append(module._register_load_state_dict_pre_hook(_Hook(wait_for_all)))
        self._hooks += [call_after_accumulation(each, self._check_awaited) for each in parameters.values()]

    def start(self) -> None:
        """Ask for all weights."""
        for block in self._blocks:
            block.start()

    def wait(self, in_backward: bool) -> None:
        """Wait until all weights are here. In a backward, no block that still waits may get a gradient."""
        for block in self._blocks:
            block.was_passed_by = in_backward and block.work is not None
            block.wait()

    def _check_awaited(self, parameter: torch.Tensor) -> None:
        """Raise InvalidValue if a parameter that has a gradient now was still awaited when it was used."""
        block = self._block_of[id(parameter)]
        if block.work is not None or block.was_passed_by:
            name = next(name for name, each in block.parameters.items() if each is parameter)
            raise InvalidValue(_NOT_CALLED.format(name=name, module=block.name))

    def close(self) -> None:
        """Wait for nothing any more."""
        for hook in self._hooks:
            hook.remove()


@final
class _Block:
    """A module, and the parameters that it must have before it computes."""

    def __init__(
        self, kv: KVStore, name: str, module: nn.Module, parameters: dict[str, nn.Parameter]
    ) -> None:
        self.name = name
        self.module = module
        self.parameters = parameters
        self.work: Work | None = None
        self.was_passed_by = False  # whether its weights were not awaited before a backward
        self._step = kv.bind(out=parameters)

    def start(self) -> None:
        self.work, self.was_passed_by = self._step.pull(async_op=True), False

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()
            self.work = None


def cut(
    model: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> Iterator[tuple[str, nn.Module, dict[str, nn.Parameter]]]:
    """Yield name, module and parameters of each part of a model, in its order; the model itself first."""
    blocks = list(_blocks(model, "", Counter(map(type, model.modules()))))
    owners = Counter(id(each) for _, block in blocks for each in block.parameters())
    outside = {id(each) for each in _parameters_outside(model, [block for _, block in blocks])}
    rest = {name: each for name, each in parameters.items() if owners[id(each)] != 1 or id(each) in outside}
    if rest:
        yield "the model", model, rest
    for name, block in blocks:
        mine = {id(each) for each in block.parameters()}
        found = {key: each for key, each in parameters.items() if id(each) in mine and key not in rest}
        if found:
            yield name, block, found


def _blocks(module: nn.Module, prefix: str, counts: Counter[type]) -> Iterator[tuple[str, nn.Module]]:
    for name, each in module.named_children():
        is_container = isinstance(each, _CONTAINERS)
        if counts[type(each)] > 1 and not is_container and next(each.parameters(), None) is not None:
            yield prefix + name, each
        else:
            yield from _blocks(each, f"{prefix}{name}.", counts)


def _parameters_outside(model: nn.Module, blocks: list[nn.Module]) -> Iterator[nn.Parameter]:
    """Yield the parameters of modules that are in no block."""
    inside = {id(each) for block in blocks for each in block.modules()}
    for each in model.modules():
        if id(each) not in inside:
            yield from each.parameters(recurse=False)


@final
class _Hook:
    """Calls a method while its object lives. Dynamo steps over it, and a copy of a model has none."""

    def __init__(self, method: Callable[[], None]) -> None:
        self._method = weakref.WeakMethod(method)

    @opaque
    def __call__(self, *args: Any) -> None:
        found = self._method()
        if found is not None:
            found()

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_hook, ()


def _no_hook() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(*args: Any) -> None:
    """Do nothing, in a copy of a model, whose weights nobody sends."""
