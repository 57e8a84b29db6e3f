"""Results as a table on the terminal, as markdown for the documentation, and as JSON."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness import Figures
from rich.box import SIMPLE_HEAD
from rich.table import Table

COLUMNS = ("system", "step", "ms", "min", "p99", "ratio", "of min", "goal", "reached")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way of one system in one case."""

    case: str
    system: str
    way: str
    figures: Figures
    required: float | None

    @property
    def reached(self) -> bool | None:
        """Whether TensorKV is as many times as fast as required; None if nothing is."""
        if self.required is None or self.figures.ratio is None:
            return None
        return self.figures.ratio >= self.required

    def cells(self) -> list[str]:
        """Return the texts of the row, one per column."""
        found = self.figures
        reached = {True: "yes", False: "NO", None: ""}[self.reached]
        return [
            self.system,
            self.way,
            _three_digits(found.median_ms),
            _three_digits(found.min_ms),
            _three_digits(found.p99_ms),
            "" if found.ratio is None else _three_digits(found.ratio),
            "" if found.ratio_of_min is None else _three_digits(found.ratio_of_min),
            "" if self.required is None else f"{self.required:g}",
            reached,
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where and when it was measured. `load` is how many processes wanted a core just before."""

    cpu: str
    num_cores: int
    memory_gb: float
    system: str
    python: str
    date: str
    load: float

    def text(self) -> str:
        """Return it as one line."""
        return (
            f"{self.date}, {self.cpu}, {self.num_cores} cores, {self.memory_gb:.0f} GB, {self.system}, "
            f"Python {self.python}; load before the start {self.load:.1f}"
        )


def this_machine() -> Machine:
    """Return what this machine is, now."""
    return Machine(
        cpu=_cpu_model(),
        num_cores=len(os.sched_getaffinity(0)),
        memory_gb=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        system=f"{platform.system()} {platform.release().partition('-')[0]}",
        python=platform.python_version(),
        date=datetime.now(UTC).date().isoformat(),
        load=os.getloadavg()[0],
    )


def terminal_table(title: str, rows: Sequence[Row]) -> Table:
    """Return the rows of a case as a table for rich."""
    table = Table(*COLUMNS, title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[2:8]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row.cells(), style={False: "red", True: "green", None: ""}[row.reached])
    return table


def markdown(tables: Sequence[tuple[str, Sequence[Row]]], machine: Machine, command: str) -> str:
    """Return all tables, with machine, date and command, as markdown."""
    lines = [machine.text() + ".", "", f"    {command}", ""]
    for title, rows in tables:
        lines += [f"**{title}**", "", _line(COLUMNS), _line(["---", "---", *["--:"] * 6, "---"])]
        lines += [_line(row.cells()) for row in rows]
        lines.append("")
    return "\n".join(lines)


def as_json(rows: Sequence[Row], machine: Machine, command: str) -> dict[str, Any]:
    """Return everything as plain data."""
    return {
        "machine": asdict(machine),
        "command": command,
        "rows": [{**asdict(row), "reached": row.reached} for row in rows],
    }


def _three_digits(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
