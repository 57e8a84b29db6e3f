"""Choices: what a script has chosen for its steps, checked also for whether it goes together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, final

from tensorkv.arguments import flag, positive
from tensorkv.errors import InvalidArgument
from tensorkv.training.buffers import Buffers

Overlap = Literal[False, "backward", "forward"]


@final
@dataclass(frozen=True)
class Choices:
    """What a script has chosen for its steps; see `DistributedOptimizer`."""

    max_norm: float | None = None
    skip_nonfinite: bool = False
    buffers: Buffers = "rank0"
    share_weights: bool | Literal["auto"] = False
    overlap: Overlap = False
    accumulate: int | None = None


def choose(
    where: Any,
    *,
    clip: Any,
    max_norm: Any,
    skip_nonfinite: Any,
    buffers: Any,
    share_weights: Any,
    overlap: Any,
    accumulate: Any,
) -> Choices:
    """Check the arguments of `DistributedOptimizer` that say how to step. Raises InvalidArgument."""
    _check_one_of("where", where, ("servers", "workers"))
    _check_one_of("clip", clip, (None, "local"))
    _check_one_of("buffers", buffers, ("rank0", "mean"))
    _check_one_of("overlap", overlap, (False, "backward", "forward"))
    shares = share_weights if share_weights == "auto" else flag("share_weights", share_weights)
    if where == "workers" and overlap:
        raise InvalidArgument(
            f"overlap={overlap!r} with where='workers', where `step` needs the mean of all gradients"
        )
    if where == "workers" and shares is True:
        raise InvalidArgument("share_weights=True with where='workers', where the servers have no weights")
    if overlap == "forward" and shares is True:
        raise InvalidArgument("share_weights=True with overlap='forward', where no weights are sent")
    counts = where == "workers" or overlap
    if accumulate is not None and (type(accumulate) is not int or accumulate < 1 or not counts):
        raise InvalidArgument(
            f"accumulate={accumulate!r} with where={where!r}: it is a number of passes, 1 or more, for "
            "where='workers' or overlap; else servers get the gradients in `step`, after any number of passes"
        )
    bound = None if max_norm is None else positive("max_norm", max_norm)
    return Choices(bound, flag("skip_nonfinite", skip_nonfinite), buffers, shares, overlap, accumulate)


def _check_one_of(name: str, value: Any, known: tuple[Any, ...]) -> None:
    if not any(type(value) is type(each) and value == each for each in known):
        *others, last = map(repr, known)
        raise InvalidArgument(f"{name}={value!r} is not known; use {', '.join(others)} or {last}")
