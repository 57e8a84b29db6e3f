"""Views of the memory of small tensors, through which a bound step copies a thousand of them in 50 us.

torch takes 0.3 us for each of many small tensors that it copies, and Python 0.05 us for a memoryview. A view
does not follow its tensor to other memory, so it is used only where the tensor's address was just compared
with that of the view (`BoundStep`), and only in calls that copy before they return.
"""

from __future__ import annotations

import ctypes
import operator
from collections import deque
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any, final

import torch

from tensorkv.worker.plans import COALESCE_BYTES

_TYPES = (torch.Tensor, torch.nn.Parameter)
_ALL = slice(None)
_COUNTS_MANY = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 5)


@final
class Views:
    """Views of the memory of small contiguous tensors. They keep the memory alive, not the tensors."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._storages = list(map(torch.Tensor.untyped_storage, tensors))
        self.parts = list(map(_view_of, tensors))


@final
class Viewed(list[torch.Tensor]):
    """Tensors of which there are views."""

    def __init__(self, tensors: Sequence[torch.Tensor], views: Views) -> None:
        super().__init__(tensors)
        self._views = views  # keeps the memory: a call may fill it when its step has others already
        self._parts = views.parts

    def gather(self, pick: Callable[[Any], Sequence[Any]]) -> bytes:
        """Return the bytes of the tensors that `pick` selects, one after the other."""
        return b"".join(pick(self._parts))

    def fill(self, pick: Callable[[Any], Sequence[Any]], parts: Sequence[memoryview]) -> None:
        """Copy a part of equal size to each tensor that `pick` selects, and tell autograd."""
        deque(map(operator.setitem, pick(self._parts), repeat(_ALL), parts), maxlen=0)
        _count_changes(pick(self))


def views_of(tensors: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype]) -> Views | None:
    """Return views of these tensors; None if one is large, or not of plain memory, or of another dtype."""
    return Views(tensors) if all(map(_can_be_viewed, tensors, dtypes)) else None


def _can_be_viewed(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the memory of a tensor holds a small value of that dtype, and its version can be counted."""
    return (
        type(tensor) in _TYPES
        and tensor.is_cpu
        and tensor.layout == torch.strided
        and tensor.dtype == dtype
        and 0 < tensor.nbytes <= COALESCE_BYTES
        and tensor.is_contiguous()
        and not (dtype.is_complex or tensor.is_neg() or tensor.is_inference())
    )


def _count_changes(tensors: Sequence[torch.Tensor]) -> None:
    """Tell autograd that tensors were changed. torch 2.4 takes one at a time."""
    if _COUNTS_MANY:
        torch.autograd.graph.increment_version(tensors)
    else:
        deque(map(torch.autograd.graph.increment_version, tensors), maxlen=0)


def _view_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor as bytes. NumPy's view would forbid to resize the tensor."""
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
