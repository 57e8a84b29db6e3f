"""Tracers and transforms of the caller's code: torch.compile steps over a store, all others are refused.

A verb changes what other processes see, so it has to run once for each call, on numbers. Dynamo is told to
step over it: it breaks its graph there, and runs the verb and everything it calls as plain Python. A
transform of torch.func, or a tracer that only records, has no numbers to push, or would run the call while it
traces and never again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar, cast

import torch

from tensorkv.errors import InvalidValue

_MSG = (
    "a store is shared with other processes; torch.compile steps over its calls, so leave fullgraph=True away"
)

_FunctionT = TypeVar("_FunctionT", bound=Callable[..., Any])
_ClassT = TypeVar("_ClassT", bound=type)

_num_modes = torch._C._len_torch_dispatch_stack
_tracing_state: Any = torch._C._get_tracing_state
_transform: Any = torch._C._functorch.peek_interpreter_stack
_mode: Any = torch._C._get_dispatch_mode
_MODES = {
    "FAKE": "FakeTensorMode",
    "PROXY": "torch.fx's make_fx",
    "FUNCTIONAL": "a functionalising tracer",
}
_TRANSFORMS = {
    "Vmap": "torch.vmap",
    "Grad": "torch.func.grad",
    "Jvp": "torch.func.jvp",
    "Functionalize": "torch.func.functionalize",
}


def opaque(function: _FunctionT) -> _FunctionT:
    """Return a function that Dynamo steps over: it traces neither the function nor anything it calls.

    `torch.compiler.disable` does the same, but takes seconds (it imports all of Dynamo) and wraps each call.
    """
    c_api = torch._C._dynamo.eval_frame
    mark = getattr(c_api, "set_code_exec_strategy", None)
    if mark is None:  # this torch can only skip the function itself, not the functions it calls
        function = _around(function)
        c_api.skip_code(function.__code__)  # type: ignore[attr-defined]
    else:
        skip = c_api._FrameAction.SKIP
        mark(function.__code__, c_api._FrameExecStrategy(skip, skip))
    vars(function).update(_torchdynamo_disable=True, _torchdynamo_disable_msg=_MSG)
    return function


def _around(function: _FunctionT) -> _FunctionT:
    set_callback = torch._C._dynamo.eval_frame.set_eval_frame

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        callback = set_callback(None)
        try:
            return function(*args, **kwargs)
        finally:
            set_callback(callback)

    return cast("_FunctionT", call)


def opaque_methods(cls: _ClassT) -> _ClassT:
    """Make Dynamo step over every public method that a class defines. It may still trace into properties."""
    for name, each in list(vars(cls).items()):
        if isinstance(each, FunctionType) and (name[0] != "_" or name[:2] == "__"):
            setattr(cls, name, opaque(each))
    return cls


def check_traced(call: str, key: Any = None) -> None:
    """Raise InvalidValue if the call is made under a tracer or a transform that a store cannot run under.

    Args:
        call: the verb, for the text.
        key: its first argument, for the text.
    """
    if _num_modes() or _tracing_state() is not None or _transform() is not None:
        tracer = _tracer()
        if tracer is not None:
            where = "" if key is None else f" of key {_short(key)}"
            raise InvalidValue(
                f"{call}{where} under {tracer}: a store needs the numbers themselves, once for each call; "
                "call it outside of the function that is traced or transformed, on what that returns"
            )


def _tracer() -> str | None:
    """Return the tracer or transform that this thread runs under, if a store cannot run under it."""
    if _tracing_state() is not None:
        return "torch.jit.trace"
    transform = _transform()
    if transform is not None:
        name = str(transform.key().name)
        return _TRANSFORMS.get(name, name)
    for name, text in _MODES.items():
        if _mode(getattr(torch._C._TorchDispatchModeKey, name)) is not None:
            return text
    return None


def _short(key: Any) -> str:
    if isinstance(key, (list, tuple, dict)) and key:
        key = next(iter(key))
    return repr(key)[:80]
