"""Results as a table on the terminal, as markdown for the documentation, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import goals
from goals import Verdict
from harness import Figures
from rich.box import SIMPLE_HEAD
from rich.table import Table

from tensorkv.bench.machine import Machine
from tensorkv.bench.report import three_digits

COLUMNS = ("system", "step", "ms", "min", "p99", "ratio", "of min")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way of one system in one case."""

    case: str
    system: str
    way: str
    figures: Figures

    def cells(self) -> list[str]:
        """Return the texts of the row, one per column."""
        found = self.figures
        return [
            self.system,
            self.way,
            three_digits(found.median_ms),
            three_digits(found.min_ms),
            three_digits(found.p99_ms),
            "" if found.ratio is None else three_digits(found.ratio),
            "" if found.ratio_of_min is None else three_digits(found.ratio_of_min),
        ]


def terminal_table(title: str, rows: Sequence[Row]) -> Table:
    """Return the rows of a case as a table for rich."""
    table = Table(*COLUMNS, title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row.cells())
    return table


def goals_table(verdicts: Sequence[Verdict]) -> Table:
    """Return goals and results as a table for rich."""
    table = Table(*goals.COLUMNS, title="Goals", title_justify="left", box=SIMPLE_HEAD)
    for verdict in verdicts:
        style = "yellow" if verdict.reached is None else "green" if verdict.reached else "red"
        table.add_row(*verdict.cells(), style=style)
    return table


def goals_markdown(verdicts: Sequence[Verdict]) -> str:
    """Return goals and results as markdown: reached goals first, missed ones last."""
    ordered = sorted(verdicts, key=lambda verdict: not verdict.reached)
    lines = [_line(goals.COLUMNS), _line(["---"] * 3 + ["--:", "---"])]
    return "\n".join([*lines, *(_line(verdict.cells()) for verdict in ordered), ""])


def markdown(tables: Sequence[tuple[str, Sequence[Row]]], machine: Machine, command: str) -> str:
    """Return the tables of all cases, with machine, date and command, as markdown."""
    lines = [machine.text() + ".", "", f"    {command}", ""]
    for title, rows in tables:
        lines += [f"**{title}**", "", _line(COLUMNS), _line(["---", "---", *["--:"] * 5])]
        lines += [_line(row.cells()) for row in rows]
        lines.append("")
    return "\n".join(lines)


def as_json(
    rows: Sequence[Row], verdicts: Sequence[Verdict], machine: Machine, command: str
) -> dict[str, Any]:
    """Return everything as plain data."""
    return {
        "machine": asdict(machine),
        "command": command,
        "rows": [asdict(row) for row in rows],
        "goals": [asdict(verdict) for verdict in verdicts],
    }


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
