"""UpdaterSpec: which updater, as plain data that may travel. Without torch, for the scheduler's sake.

What can travel at all stands here too, `may_travel`: the one rule for keys, names, options and versions.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

MAX_INT = 2**63 - 1
"""The largest int that travels, and is saved; the smallest is `-MAX_INT - 1`."""


def may_travel(value: Any) -> bool:
    """Whether a value can be sent and saved as plain data: an int of 64 bits, a float, a bool, valid Unicode,
    None, or a list or tuple of those.
    """
    if type(value) is int:
        return -MAX_INT - 1 <= value <= MAX_INT
    if type(value) is str:
        return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)
    if isinstance(value, (list, tuple)):
        return all(map(may_travel, value))
    return value is None or type(value) in (bool, float)


class UpdaterSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Which updater, as plain data.

    `type` tells how `name` is read: a name of `tensorkv.updaters.base` ("assign", "add"), or "module:name" of
    a function or of an optimizer class. `options` are the optimizer's.
    """

    type: Literal["named", "function", "optimizer"]
    name: str
    options: dict[str, Any] = {}
    elementwise: bool = True
