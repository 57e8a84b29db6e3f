"""Non-temporal copies, for data too large to still be in cache when it is read next.

A store through a cache first reads the memory that it overwrites: a third of what a copy moves. The C library
uses non-temporal stores from some size on; torch never does. They copy 102 MB in 7.5 ms instead of 11.7
(2026-11-26, AMD EPYC). The library's threshold is far too large if a virtual machine reports the cache of its
whole host, 192 MB there, so `tensorkv run` sets it to `STREAM_BYTES` for workers (`launch/local.py`).

Only with one thread: several threads that copy at once, as torch's do, are faster either way.
"""

from __future__ import annotations

import numpy as np
import torch

from tensorkv.config import STREAM_BYTES

MIN_LIST_BYTES = 32 << 20
"""Minimum size of a list for non-temporal copies; the servers of this host find smaller ones in cache."""

_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pays(list_bytes: int, dtypes: tuple[torch.dtype, torch.dtype], longest_bytes: int) -> bool:
    """Whether to copy the pieces of a list with non-temporal stores.

    Args:
        list_bytes: size of all values of the list.
        dtypes: of the pieces as pushed and as stored.
        longest_bytes: size of the longest piece.
    """
    return (
        list_bytes >= MIN_LIST_BYTES
        and longest_bytes >= STREAM_BYTES
        and all(dtype.itemsize in _SAME_SIZE and not dtype.is_complex for dtype in dtypes)
    )


def stream(target: torch.Tensor, source: torch.Tensor) -> None:
    """Do what `target.copy_(source)` does; non-temporally if both are alike and long. Without gradients."""
    if (
        source.nbytes < STREAM_BYTES
        or target.is_inference()  # torch mostly refuses to write it
        or not (_is_bare(target) and _is_bare(source))
        or _differ(target, source)
    ):
        target.copy_(source)
        return
    torch.autograd.graph.increment_version(target)
    np.copyto(_as_ints(target), _as_ints(source))


def _is_bare(tensor: torch.Tensor) -> bool:
    """Whether the tensor's memory holds its elements in order, unmodified."""
    bare = tensor.device.type == "cpu" and tensor.is_contiguous()
    return bare and not tensor.is_neg() and not tensor._is_zerotensor()


def _differ(target: torch.Tensor, source: torch.Tensor) -> bool:
    return target.dtype != source.dtype or target.shape != source.shape


def _as_ints(tensor: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.integer]]:
    """Return the memory as integers, since NumPy has no bfloat16."""
    return tensor.detach().view(_SAME_SIZE[tensor.itemsize]).numpy()
