"""The policy of a distributed store, from the options of `create`."""

from __future__ import annotations

from typing import Any, Literal

from tensorkv.arguments import not_negative
from tensorkv.errors import InvalidArgument
from tensorkv.plain import MAX_INT
from tensorkv.wire.messages import Late, StorePolicy


def policy_of(
    kind: str,
    staleness: int | None = None,
    quorum: int | None = None,
    grace_s: float = 0.0,
    late: Late = "drop",
) -> StorePolicy:
    """Return the policy that these options of `create` ask for.

    Raises:
        InvalidArgument: one is out of range, or makes no sense for the kind or without another.
    """
    name: Literal["sync", "async"] = "async" if kind == "dist_async" else "sync"
    if staleness is not None:
        if name == "sync":
            why = "a pull waits for its round; it is for dist_async"
            raise InvalidArgument(f"staleness={staleness!r} makes no sense for kind {kind!r}, where {why}")
        _check_count("staleness", staleness, "pushes", least=0)
    if quorum is None:
        for option, value, default in (("grace_s", grace_s, 0), ("late", late, "drop")):
            if not (isinstance(value, (int, float, str)) and value == default):
                raise InvalidArgument(f"{option}={value!r} makes no sense without quorum")
        return StorePolicy(name, staleness)
    if name == "async":
        why = "each push is a round of its own; it is for dist_sync"
        raise InvalidArgument(f"quorum={quorum!r} makes no sense for kind {kind!r}, where {why}")
    _check_count("quorum", quorum, "workers", least=1)
    if late not in ("drop", "carry"):
        raise InvalidArgument(f"late={late!r} is not known; use 'drop' or 'carry'")
    return StorePolicy(name, None, quorum, not_negative("grace_s", grace_s), late)


def _check_count(name: str, value: Any, unit: str, least: int) -> None:
    if type(value) is not int or not least <= value <= MAX_INT:
        raise InvalidArgument(f"{name}={value!r} is not a number of {unit}: pass an int, {least} or more")
