"""The options of `tensorkv bench`, checked before anything is started."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from tensorkv.bench.shapes import SETS, parse_sizes
from tensorkv.bench.steps import ITEMSIZES, Plan

KINDS = ("dist_sync", "dist_async", "local")
TRANSPORTS = ("shm", "tcp")


class BadOption(Exception):
    """An option is not valid; the text says which, and what would be."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What to measure."""

    plans: tuple[Plan, ...]
    kind: str
    transports: tuple[str, ...]
    num_workers: int
    num_servers: int
    with_floor: bool
    json_path: Path | None
    plot_path: Path | None

    @property
    def is_dist(self) -> bool:
        """Whether it needs servers."""
        return self.kind.startswith("dist")


def make_options(
    *,
    models: Sequence[str],
    sizes: str | None,
    kind: str,
    transports: Sequence[str],
    num_workers: int,
    num_servers: int,
    optimizer: str,
    dtype: str,
    steps: int,
    seconds: float,
    with_floor: bool,
    json: str | None,
    plot: str | None,
) -> BenchOptions:
    """Return the options.

    Raises:
        BadOption: one of them is not valid.
    """
    _one_of("--store", kind, KINDS)
    _one_of("--dtype", dtype, tuple(ITEMSIZES))
    for each in models:
        _one_of("--model", each, tuple(SETS))
    for each in transports:
        _one_of("--transport", each, TRANSPORTS)
    _at_least("--workers", num_workers, 1)
    _at_least("--servers", num_servers, 1)
    _at_least("--steps", steps, 0)
    if not 0 < seconds < math.inf:
        raise BadOption(f"--seconds {seconds}: a number over 0")
    if optimizer != "assign":
        _check_optimizer(optimizer)
    names = [*models, *_sizes(sizes)]
    local = kind == "local"
    return BenchOptions(
        plans=tuple(
            Plan(tensors=name, updater=optimizer, dtype=dtype, steps=steps, seconds=seconds)
            for name in dict.fromkeys(names or ["resnet50"])
        ),
        kind=kind,
        transports=("local",) if local else tuple(dict.fromkeys(transports)) or TRANSPORTS,
        num_workers=1 if local else num_workers,
        num_servers=num_servers,
        with_floor=with_floor,
        json_path=None if json is None else Path(json),
        plot_path=None if plot is None else Path(plot),
    )


def _sizes(text: str | None) -> list[str]:
    if text is None:
        return []
    try:
        return parse_sizes(text)
    except ValueError as exc:
        raise BadOption(f"--sizes {exc}") from exc


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise BadOption(f"{name} {value!r} is not known; use {', '.join(known)}")


def _at_least(name: str, number: int, least: int) -> None:
    if number < least:
        raise BadOption(f"{name} {number}: at least {least}")


def _check_optimizer(name: str) -> None:
    from tensorkv.bench.worker import optimizer_class  # only this needs torch here

    try:
        optimizer_class(name)
    except ValueError as exc:
        raise BadOption(f"--optimizer: {exc}") from exc
