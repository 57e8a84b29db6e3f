"""Copies between host memory and devices: each value is copied once, small ones together.

A push gathers values on their device and copies them from there to where the servers read them, or to the
buffer that is sent. A pull copies values to the device from where they lie, or were received.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from operator import attrgetter
from typing import ParamSpec, TypeVar

import torch

from tensorkv.worker.plans import COALESCE_BYTES

Tensors = list[torch.Tensor] | tuple[torch.Tensor, ...]
Streams = tuple[torch.cuda.Stream, ...]
_device_of = attrgetter("device")
_HERE: AbstractContextManager[None] = nullcontext()

P = ParamSpec("P")
T = TypeVar("T")


def no_grad(function: Callable[P, T]) -> Callable[P, T]:
    """Run a function without gradients, like `torch.no_grad`, but in 0.4 microseconds instead of 2.3."""

    @functools.wraps(function)
    def without_gradients(*args: P.args, **kwargs: P.kwargs) -> T:
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            return function(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(before)

    return without_gradients


def joined(pieces: Tensors) -> torch.Tensor:
    """Concatenate flat pieces on the CPU. They have one dtype, and may be on any devices."""
    try:
        return torch.cat(pieces).cpu()
    except RuntimeError:
        if not _on_several(pieces):
            raise
    return torch.cat([piece.cpu() for piece in pieces])


def join_into(target: torch.Tensor, pieces: Tensors) -> None:
    """Concatenate flat pieces into `target`, on the CPU. Otherwise like `joined`."""
    try:
        if len(pieces) == 1:
            target.copy_(pieces[0])
        elif pieces[0].is_cpu:
            torch.cat(pieces, out=target)
        else:
            target.copy_(torch.cat(pieces))
        return
    except RuntimeError:
        if not _on_several(pieces):
            raise
    torch.cat([piece.cpu() for piece in pieces], out=target)


@no_grad
def copy_each(targets: Tensors, sources: Tensors) -> None:
    """Copy each source, on the CPU, to its target on any device, of the same shape. Without gradients.

    The sources have one dtype. When it returns, the targets are written, and the sources may be changed.
    """
    if len(targets) == 1:
        targets[0].copy_(sources[0])
    elif targets[0].is_cpu:
        torch._foreach_copy_(targets, sources)
    else:
        _copy_across(targets, sources)


def _copy_across(targets: Tensors, sources: Tensors) -> None:
    """Copy to devices: large values one by one, the small ones of each device together."""
    max_elems = COALESCE_BYTES // sources[0].itemsize
    small: list[int] = []
    for number, source in enumerate(sources):
        if source.numel() > max_elems:
            targets[number].copy_(source)
        else:
            small.append(number)
    by_device: dict[torch.device, list[int]] = {}
    for device, number in zip(map(_device_of, map(targets.__getitem__, small)), small, strict=True):
        by_device.setdefault(device, []).append(number)
    for device, numbers in by_device.items():
        found = [sources[number] for number in numbers]
        flat = [each if each.dim() == 1 else each.reshape(-1) for each in found]
        parts = torch.split(torch.cat(flat).to(device), list(map(torch.Tensor.numel, flat)))
        shaped = [
            part if each.dim() == 1 else part.view(each.shape)
            for part, each in zip(parts, found, strict=True)
        ]
        torch._foreach_copy_([targets[number] for number in numbers], shaped)
        if device.type == "cuda":  # they may be read in another stream
            torch.cuda.current_stream(device).synchronize()


def _on_several(tensors: Iterable[torch.Tensor]) -> bool:
    return len(set(map(_device_of, tensors))) > 1


def streams_of(tensors: Iterable[torch.Tensor]) -> Streams:
    """Return the caller's streams on the GPUs that these tensors are on.

    Another thread copies to them in these streams, so after everything the caller has queued before.
    """
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return ()
    devices = set(map(_device_of, tensors))
    return tuple(torch.cuda.current_stream(device) for device in devices if device.type == "cuda")


def on(streams: Streams) -> AbstractContextManager[None]:
    """Make this thread copy to GPUs in these streams."""
    return _on(streams) if streams else _HERE


@contextmanager
def _on(streams: Streams) -> Iterator[None]:
    with ExitStack() as stack:
        for stream in streams:
            stack.enter_context(torch.cuda.stream(stream))
        yield
