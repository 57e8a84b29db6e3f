"""MXNet's rules of shapes and indices: what `reshape` makes of special numbers, and what an index selects."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def reshaped(shape: tuple[int, ...], wanted: Sequence[int], reverse: bool = False) -> tuple[int, ...]:
    """Return the shape that MXNet gives an array of `shape` that is asked to be `wanted`.

    Besides lengths there may be in `wanted`, read beside the dimensions that are there:

        0       this dimension as it is
        -1      once: whatever is left
        -2      all dimensions that are left
        -3      this dimension times the next
        -4 a b  this dimension as two, of which one may be -1

    Args:
        shape: the shape that is.
        wanted: as above.
        reverse: both are read from the right.

    Raises:
        ValueError: there are not as many elements, or dimensions.
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
    """Return the two lengths whose product is `length`; one of them may be asked for as -1."""
    first = length // second if first == -1 else first
    second = length // first if second == -1 else second
    if first < 1 or second < 1:
        raise ValueError(length)
    return first, second


def torch_index(key: Any, shape: tuple[int, ...]) -> tuple[tuple[Any, ...], bool]:
    """Return what selects in a tensor of `shape` as `key` does in MXNet, and whether torch gives a view then.

    An entry of a key is an int, a slice, `...`, None, or an array or list, whose numbers are taken as ints.

    Raises:
        ValueError: an entry is of another kind, or the step of a slice is 0.
        IndexError: an array names an element that is not there.
    """
    if isinstance(key, slice) and key == slice(None):
        return (), True  # `a[:]` is `a`, also where it has no dimensions
    entries = tuple(_entry(each) for each in (key if isinstance(key, tuple) else (key,)))
    if not any(isinstance(each, np.ndarray) or _is_backwards(each) for each in entries):
        return entries, True
    # NumPy selects as MXNet does; torch has no steps backwards, and puts some dimensions elsewhere.
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
        return np.asarray(entry).astype(np.int64)  # a mask too: MXNet takes its False and True as 0 and 1
    raise ValueError(f"an NDArray cannot be indexed with {entry!r} of type {type(entry).__name__}")


def _is_backwards(entry: Any) -> bool:
    return isinstance(entry, slice) and entry.step is not None and entry.step < 0
