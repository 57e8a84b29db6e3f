"""Results as a table on the terminal, as markdown for the documentation, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from harness import Figures
from rich.box import SIMPLE_HEAD
from rich.table import Table

from tensorkv.bench.machine import Machine
from tensorkv.bench.report import three_digits

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
            three_digits(found.median_ms),
            three_digits(found.min_ms),
            three_digits(found.p99_ms),
            "" if found.ratio is None else three_digits(found.ratio),
            "" if found.ratio_of_min is None else three_digits(found.ratio_of_min),
            "" if self.required is None else f"{self.required:g}",
            reached,
        ]


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


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
