"""UpdaterSpec: an updater as plain data that may travel. Without torch, for the scheduler's sake."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class UpdaterSpec(msgspec.Struct, frozen=True, kw_only=True):
    """An updater as plain data.

    `type` says how to read `name`: as a name in `tensorkv.updaters.base` ("assign", "add"), or as
    "module:name" of a function or of an optimizer class. `options` are the optimizer's.
    """

    type: Literal["named", "function", "optimizer"]
    name: str
    options: dict[str, Any] = {}
    elementwise: bool = True
