"""Checks of arguments that are not tensors or keys: flags, numbers, seconds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tensorkv.errors import InvalidArgument

MAX_TIMEOUT_S = 1e9
"""Maximum timeout, 31 years; longer ones, even infinite, are clipped to it. The system takes no more."""


def flag(name: str, value: Any) -> bool:
    """Return a bool argument, NumPy's included. Raises InvalidArgument if it is neither True nor False."""
    if not isinstance(value, (bool, np.bool_)):
        raise InvalidArgument(f"{name}={value!r} is neither True nor False; pass bool({name})")
    return bool(value)


def number(value: Any) -> float:
    """Return an argument as a float, NaN if it is not a number."""
    try:
        return math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # not a number, several, or 10**400
        return math.nan


def positive(name: str, value: Any) -> float:
    """Return a positive number. Raises InvalidArgument if the argument is not one."""
    found = number(value)
    if not found > 0:
        raise InvalidArgument(f"{name}={value!r} is not a positive number")
    return found


def not_negative(name: str, value: Any) -> float:
    """Return a finite number that is 0 or more. Raises InvalidArgument if the argument is not one."""
    found = number(value)
    if not 0 <= found < math.inf:
        raise InvalidArgument(f"{name}={value!r} is not a finite number, 0 or more")
    return found


def seconds(name: str, value: Any) -> float:
    """Return a timeout in seconds, clipped to `MAX_TIMEOUT_S`. Raises InvalidArgument if not positive."""
    return min(positive(name, value), MAX_TIMEOUT_S)
