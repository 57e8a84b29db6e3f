"""Plain data: the types of keys, and of values that can travel and be saved."""

from __future__ import annotations

from typing import Any

Key = int | str
"""The name of a value in a store. All keys of a store have the same type."""

Plain = None | bool | int | float | str

MAX_INT = 2**63 - 1
"""Maximum int that can travel and be saved; the minimum is `-MAX_INT - 1`."""


def may_travel(value: Any) -> bool:
    """Whether a value can be sent and saved as plain data.

    That is: an int of 64 bits, a float, a bool, valid Unicode, None, or a list or tuple of those.
    """
    if type(value) is int:
        return -MAX_INT - 1 <= value <= MAX_INT
    if type(value) is str:
        return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)
    if isinstance(value, (list, tuple)):
        return all(map(may_travel, value))
    return value is None or type(value) in (bool, float)
