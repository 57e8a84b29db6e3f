"""The results as rows, for the terminal and as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import final

from tensorkv.bench.machine import Machine

COLUMNS = ("tensors", "keys", "size", "by", "step", "ms", "min", "p99", "GB/s", "in all", "floor", "of it")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The results of one way to do a step, over one transport.

    `floor_ms` is the median of a step that only moves the same bytes, None if it was not measured.
    """

    tensors: str
    num_keys: int
    size_bytes: int
    transport: str
    way: str
    median_ms: float
    min_ms: float
    p99_ms: float
    num_steps: int
    num_workers: int
    floor_ms: float | None

    @property
    def gb_per_s(self) -> float:
        """Bandwidth of one worker, pushes and pulls together, in units of 1e9 bytes per second."""
        return 2 * self.size_bytes / self.median_ms / 1e6

    @property
    def total_gb_per_s(self) -> float:
        """Bandwidth of all workers together."""
        return self.gb_per_s * self.num_workers

    @property
    def of_floor(self) -> float | None:
        """Fraction of the floor's speed."""
        return None if self.floor_ms is None else self.floor_ms / self.median_ms

    def cells(self) -> list[str]:
        """Return the texts of the row, one per column."""
        return [
            self.tensors,
            str(self.num_keys),
            size_text(self.size_bytes),
            self.transport,
            self.way,
            three_digits(self.median_ms),
            three_digits(self.min_ms),
            three_digits(self.p99_ms),
            three_digits(self.gb_per_s),
            three_digits(self.total_gb_per_s),
            "" if self.floor_ms is None else three_digits(self.floor_ms),
            "" if self.of_floor is None else f"{self.of_floor:.0%}",
        ]

    def data(self) -> dict[str, object]:
        """Return the row as plain data."""
        derived = {
            "gb_per_s": self.gb_per_s,
            "total_gb_per_s": self.total_gb_per_s,
            "of_floor": self.of_floor,
        }
        return {**asdict(self), **derived}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRow:
    """The memory growth of a process since before the first init, and as a multiple of the model."""

    tensors: str
    transport: str
    process: str
    grown_bytes: int
    model_bytes: int

    @property
    def models(self) -> float:
        """The growth as a multiple of the model's size."""
        return self.grown_bytes / self.model_bytes


def make_row(
    times_s: Sequence[float],
    *,
    tensors: str,
    num_keys: int,
    size_bytes: int,
    transport: str,
    way: str,
    num_workers: int,
    floor_ms: float | None,
) -> Row:
    """Return the row of the given steps."""
    ordered = sorted(times_s)
    return Row(
        tensors=tensors,
        num_keys=num_keys,
        size_bytes=size_bytes,
        transport=transport,
        way=way,
        median_ms=statistics.median(ordered) * 1e3,
        min_ms=ordered[0] * 1e3,
        p99_ms=ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1e3,
        num_steps=len(ordered),
        num_workers=num_workers,
        floor_ms=floor_ms,
    )


def write_json(
    path: Path, rows: Sequence[Row], memory: Sequence[MemoryRow], machine: Machine, options: dict[str, object]
) -> None:
    """Write everything as plain data."""
    content = {
        "machine": asdict(machine),
        "options": options,
        "rows": [row.data() for row in rows],
        "memory": [{**asdict(row), "models": row.models} for row in memory],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def three_digits(number: float) -> str:
    """Return a number with three significant digits."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def size_text(size_bytes: int) -> str:
    """Return a size for readers, in units of 1000."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= size:
            return f"{three_digits(size_bytes / size)} {unit}"
    return f"{size_bytes} B"
