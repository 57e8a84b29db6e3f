"""How the cost of a step grows: each sweep varies one parameter and keeps the others."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from harness import Times
from jobs import Case

from tensorkv.bench.machine import memory_bytes
from tensorkv.bench.report import three_digits
from tensorkv.bench.shapes import num_elems
from tensorkv.bench.steps import ITEMSIZES, Plan

SYSTEMS = ("tensorkv", "tensorkv-shm", "mxnet", "gloo", "floor")
BIG_BYTES = 128 << 20

AROUND = Case(
    name="around",
    title="",
    kind="dist_sync",
    plan=Plan(tensors="resnet50", one_way=True, warmup=2, steps=8),
    num_workers=2,
    num_servers=2,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """One varied parameter: `points` are its values, with their cases."""

    name: str
    title: str
    axis: str
    points: Sequence[tuple[str, Case]]

    def fitting(self) -> tuple[list[tuple[str, Case]], list[str]]:
        """Return the points to measure, and the values of those that need over half of the memory."""
        limit_bytes = memory_bytes() // 2
        fits = [(value, case) for value, case in self.points if needed_bytes(case) <= limit_bytes]
        return fits, [value for value, case in self.points if needed_bytes(case) > limit_bytes]


def needed_bytes(case: Case) -> int:
    """Estimate the memory of a case: each worker's gradients, results and window, the servers' values."""
    model_bytes = num_elems(case.plan.shapes) * ITEMSIZES[case.plan.dtype]
    states = {"assign": 0, "sgd": 1, "adam": 2}[case.plan.updater]
    return model_bytes * (3 * case.num_workers + case.num_workers + 2 + states)


def _workers(number: str) -> Case:
    return dataclasses.replace(AROUND, num_workers=int(number))


def _servers(number: str) -> Case:
    return dataclasses.replace(AROUND, num_servers=int(number))


def _of(**changes: object) -> Case:
    return dataclasses.replace(AROUND, plan=dataclasses.replace(AROUND.plan, **changes))  # type: ignore[arg-type]


def _bytes(size: str) -> Case:
    case = _of(tensors=size)
    return _of(tensors=size, warmup=1, steps=3) if num_elems(case.plan.shapes) * 4 > BIG_BYTES else case


def _keys(number: str) -> Case:
    return _of(tensors=f"{number}x256B", steps=40)


UPDATES = {
    "ASSIGN": _of(),
    "SGD with momentum": _of(updater="sgd"),
    "Adam": _of(updater="adam"),
    "ASSIGN, bfloat16": _of(dtype="bfloat16"),
}


def _sweep(name: str, title: str, axis: str, values: str, make: Callable[[str], Case]) -> Sweep:
    points = [
        (value, dataclasses.replace(make(value), name=f"{name} {value}")) for value in values.split(", ")
    ]
    return Sweep(name=name, title=title, axis=axis, points=points)


SWEEPS = [
    _sweep("workers", "more workers, 2 servers, ResNet-50", "workers", "1, 2, 4, 8", _workers),
    _sweep("servers", "more servers, 2 workers, ResNet-50", "servers", "1, 2, 4", _servers),
    _sweep("keys", "more keys of 64 floats", "keys", "1, 10, 100, 1000", _keys),
    _sweep("bytes", "one key of more bytes", "bytes", "1MB, 4MB, 16MB, 64MB, 256MB, 1GB", _bytes),
    Sweep(
        name="updates",
        title="other updates and dtypes, ResNet-50",
        axis="update",
        points=[(value, dataclasses.replace(case, name=value)) for value, case in UPDATES.items()],
    ),
]


Found = Mapping[str, Mapping[str, Times]]
"""Results of a sweep: times by value, then system."""


def medians_ms(found: Found) -> dict[str, dict[str, float]]:
    """Return the median step in milliseconds by line and value. Each system is a line; the floor has two."""
    lines: dict[str, dict[str, float]] = {}
    for value, systems in found.items():
        for system, ways in systems.items():
            for way, rounds in ways.items():
                name = f"floor, {way}" if system == "floor" else system
                all_s = [time_s for times_s in rounds for time_s in times_s]
                lines.setdefault(name, {})[value] = statistics.median(all_s) * 1e3
    return lines


def sweep_markdown(sweep: Sweep, found: Found, skipped: Sequence[str]) -> str:
    """Return a sweep as a table: a line for each system, a column for each value."""
    values = list(found)
    lines = [
        f"**{sweep.title}** (ms)",
        "",
        _line([sweep.axis, *values]),
        _line(["---", *["--:"] * len(values)]),
    ]
    for name, of_value in medians_ms(found).items():
        cells = [three_digits(of_value[value]) if value in of_value else "" for value in values]
        lines.append(_line([name, *cells]))
    if skipped:
        lines += ["", f"Not measured, as it takes over half of this machine's memory: {', '.join(skipped)}."]
    return "\n".join([*lines, ""])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
