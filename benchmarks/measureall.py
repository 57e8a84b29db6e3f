"""Everything that docs/benchmarks.md tells of speed, measured in one run and written there.

First the cases of `pushpull.py`, with MXNet, gloo, Ray and the floor beside TensorKV, then how the cost
of a step grows with workers, servers, keys, bytes and the work of the servers. Takes 25 minutes at most on
two cores.

    make bench                                           writes docs/benchmarks.md and its picture
    python benchmarks/measureall.py --quick --docs FOLDER     tiny sizes, to see that everything runs
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from cases import CASES, GOALS, quick
from goals import judge
from harness import HERE, Times
from jobs import Case
from peerenv import add_options, peer_pythons
from pictures import plot_sweeps
from rich.console import Console
from sweeps import SWEEPS, Found, sweep_markdown
from sweeps import SYSTEMS as SWEPT
from systems import SYSTEMS, job_makers, measure, rows_of
from tables import Row, goals_table, markdown, terminal_table

from tensorkv.bench.machine import this_machine

START, END = "<!-- written by benchmarks/measureall.py -->\n", "<!-- end of what it writes -->\n"
PICTURE = "benchmarks-growth.png"
ROUNDS = 2


class NoPlace(Exception):
    """The page has no place for the figures."""


@dataclasses.dataclass(frozen=True, slots=True)
class Measuring:
    """What is the same for everything that is measured."""

    pythons: dict[str, str]
    folder: Path
    console: Console

    def times(self, case: Case, systems: Sequence[str], rounds: int) -> dict[str, Times]:
        """Measure the systems that can do a case, in turn."""
        return measure(case, job_makers(case, systems, self.pythons, self.folder), rounds, self.console)


def put_figures(page: Path, figures: str) -> None:
    """Replace what stands between the marks of a page.

    Raises:
        NoPlace: it has no marks.
    """
    text = page.read_text()
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise NoPlace(f"{page} has no lines {START.strip()} and {END.strip()}")
    page.write_text(before + start + "\n" + figures.strip() + "\n\n" + end + after)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs", help="where benchmarks.md is")
    add_options(parser)
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _leave)  # so that jobs are ended on the way out
    started, machine, page = time.monotonic(), this_machine(), arguments.docs / "benchmarks.md"
    put_figures(page, "Being measured.")
    with tempfile.TemporaryDirectory() as folder:
        measuring = Measuring(peer_pythons(SYSTEMS, arguments), Path(folder), Console())
        measuring.console.print(machine.text(), highlight=False)
        tables, times = _cases(measuring, arguments.quick)
        found, skipped = _sweeps(measuring, arguments.quick)
    verdicts = judge(GOALS, times)
    measuring.console.print(goals_table(verdicts))
    plot_sweeps(SWEEPS, found, arguments.docs / PICTURE)
    minutes = (time.monotonic() - started) / 60
    growth = [sweep_markdown(sweep, found[sweep.name], skipped[sweep.name]) for sweep in SWEEPS]
    figures = [
        markdown(tables, verdicts, machine, f"make bench (took {minutes:.0f} minutes)"),
        f"## How the cost grows\n\n![Four panels: workers, servers, keys, bytes]({PICTURE})\n",
        *growth,
    ]
    put_figures(page, "\n".join(figures))
    measuring.console.print(f"{minutes:.1f} minutes; written: {page}", highlight=False)


def _cases(
    measuring: Measuring, tiny: bool
) -> tuple[list[tuple[str, list[Row]]], dict[str, dict[str, Times]]]:
    tables, times = [], {}
    for case in map(quick, CASES) if tiny else CASES:
        times[case.name] = measuring.times(case, SYSTEMS, 1 if tiny else ROUNDS)
        rows = rows_of(case, times[case.name])
        tables.append((case.title, rows))
        measuring.console.print(terminal_table(case.title, rows))
    return tables, times


def _sweeps(measuring: Measuring, tiny: bool) -> tuple[dict[str, Found], dict[str, list[str]]]:
    found: dict[str, Found] = {}
    skipped = {}
    for sweep in SWEEPS:
        points, skipped[sweep.name] = sweep.fitting()
        found[sweep.name] = {
            value: measuring.times(quick(case) if tiny else case, SWEPT, 1) for value, case in points
        }
        measuring.console.print(sweep_markdown(sweep, found[sweep.name], skipped[sweep.name]), markup=False)
    return found, skipped


def _leave(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
