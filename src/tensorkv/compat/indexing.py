"""MXNet's rules for shapes and indices: the special numbers of `reshape`, and what an index selects."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def reshaped(shape: tuple[int, ...], wanted: Sequence[int], reverse: bool = False) -> tuple[int, ...]:
    """Return the shape that MXNet's `reshape` to `wanted` gives an array of `shape`.

    Besides lengths, `wanted` may contain these numbers, which refer to the dimensions of `shape` in turn:

        0       this dimension as it is
        -1      once: the remaining elements
        -2      all remaining dimensions
        -3      this dimension times the next
        -4 a b  this dimension split in two; one of them may be -1

    Args:
        shape: the current shape.
        wanted: as above.
        reverse: read both from the right.

    Raises:
        ValueError: the number of elements or dimensions does not match.
    """
    if reverse:
        return reshaped(shape[::-1], wanted[::-1])[::-1]
    made: list[int] = []
    left, asked = list(shape), list(wanted)
    inferred: int | None = None
    try:
        while asked:
            length = asked.pop(0)
            if length == -1 and inferred is None:
                inferred = len(made)
                made.append(1)
                del left[:1]
            elif length == -2:
                made += left
                left = []
            elif length == -3:
                made.append(left.pop(0) * left.pop(0))
            elif length == -4:
                made += _split(left.pop(0), asked.pop(0), asked.pop(0))
            elif length == 0:
                made.append(left.pop(0))
            elif length > 0:
                made.append(length)
                del left[:1]
            else:
                raise ValueError(length)
        if inferred is not None:
            made[inferred] = math.prod(shape) // math.prod(made)
        if math.prod(made) != math.prod(shape):
            raise ValueError(made)
    except (IndexError, ValueError, ZeroDivisionError) as exc:
        raise ValueError(f"an array of shape {shape} cannot take shape {tuple(wanted)}") from exc
    return tuple(made)


def _split(length: int, first: int, second: int) -> tuple[int, int]:
    """Return two lengths whose product is `length`; one of the arguments may be -1."""
    first = length // second if first == -1 else first
    second = length // first if second == -1 else second
    if first < 1 or second < 1:
        raise ValueError(length)
    return first, second


def torch_index(key: Any, shape: tuple[int, ...]) -> tuple[tuple[Any, ...], bool]:
    """Return a torch index that selects as `key` does in MXNet, and whether it gives a view.

    An entry of a key is an int, a slice, `...`, None, or an array or list, whose numbers are cast to ints.

    Raises:
        ValueError: an entry has another type, or the step of a slice is 0.
        IndexError: an index in an array is out of range.
    """
    if isinstance(key, slice) and key == slice(None):
        return (), True  # `a[:]` is `a`, even if it has no dimensions
    entries = tuple(_entry(each) for each in (key if isinstance(key, tuple) else (key,)))
    if not any(isinstance(each, np.ndarray) or _is_backwards(each) for each in entries):
        return entries, True
    # NumPy selects as MXNet does; torch has no negative steps, and orders some dimensions differently.
    places = np.arange(math.prod(shape)).reshape(shape)[entries]
    return tuple(torch.as_tensor(each, device="cpu") for each in np.unravel_index(places, shape)), False


def _entry(entry: Any) -> Any:
    if entry is None or entry is Ellipsis:
        return entry
    if isinstance(entry, slice):
        if entry.step == 0:
            raise ValueError("the step of a slice cannot be 0")
        bounds = (entry.start, entry.stop, entry.step)
        return slice(*(None if each is None else operator.index(each) for each in bounds))
    if isinstance(entry, (int, np.integer)):
        return int(entry)
    if isinstance(entry, torch.Tensor):
        entry = entry.cpu().numpy()
    if isinstance(entry, (list, tuple, range, np.ndarray)):
        return np.asarray(entry).astype(np.int64)  # a mask too: MXNet reads False and True as 0 and 1
    raise ValueError(f"an NDArray cannot be indexed with {entry!r} of type {type(entry).__name__}")


def _is_backwards(entry: Any) -> bool:
    return isinstance(entry, slice) and entry.step is not None and entry.step < 0
