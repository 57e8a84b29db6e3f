"""Copies past the caches: of what is bigger than those, and so is not there when it is read next.

A store that goes through a cache reads the memory first that it is going to overwrite, a third of what a
copy moves. The C library copies past the caches from some size on, torch never does: 102 MB in 7.5 ms instead
of 11.7 (2026-11-26, AMD EPYC). That size is far too big where a virtual machine tells the cache of its
whole host, 192 MB there, so `tensorkv run` sets it for workers, to `STREAM_BYTES` (`launch/local.py`).

Only with one thread: several that copy at once, as torch's do, take less time in either way.
"""

from __future__ import annotations

import numpy as np
import torch

from tensorkv.config import STREAM_BYTES

MIN_LIST_BYTES = 32 << 20
"""Lists of values under this size go through the caches, where the servers of this host find them again."""

_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pays(list_bytes: int, dtypes: tuple[torch.dtype, torch.dtype], longest_bytes: int) -> bool:
    """Whether pieces of a list are copied past the caches.

    Args:
        list_bytes: of all values of the list.
        dtypes: of the pieces as they are pushed, and as they are stored.
        longest_bytes: of the longest piece.
    """
    return (
        list_bytes >= MIN_LIST_BYTES
        and longest_bytes >= STREAM_BYTES
        and all(dtype.itemsize in _SAME_SIZE and not dtype.is_complex for dtype in dtypes)
    )


def stream(target: torch.Tensor, source: torch.Tensor) -> None:
    """Do what `target.copy_(source)` does; past the caches if they are alike and long. Without gradients."""
    if (
        source.nbytes < STREAM_BYTES
        or target.is_inference()  # torch refuses to write it, mostly
        or not (_is_bare(target) and _is_bare(source))
        or _differ(target, source)
    ):
        target.copy_(source)
        return
    torch.autograd.graph.increment_version(target)
    np.copyto(_as_ints(target), _as_ints(source))


def _is_bare(tensor: torch.Tensor) -> bool:
    """Whether the memory of the tensor holds its elements one after the other, just as they are."""
    bare = tensor.device.type == "cpu" and tensor.is_contiguous()
    return bare and not tensor.is_neg() and not tensor._is_zerotensor()


def _differ(target: torch.Tensor, source: torch.Tensor) -> bool:
    return target.dtype != source.dtype or target.shape != source.shape


def _as_ints(tensor: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.integer]]:
    """Return the memory as integers: NumPy has no bfloat16."""
    return tensor.detach().view(_SAME_SIZE[tensor.itemsize]).numpy()
