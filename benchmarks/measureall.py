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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from cases import CASES, GOALS, quick
from goals import Verdict, judge
from harness import HERE, Times
from jobs import Case
from peerenv import NoPeer, Peer, add_options, peer_pythons
from pictures import plot_sweeps
from rich.console import Console
from sweeps import SWEEPS, Found, sweep_markdown
from sweeps import SYSTEMS as SWEPT
from systems import SYSTEMS, can_do, job_makers, measure, rows_of
from tables import Row, goals_markdown, goals_table, markdown, terminal_table

from tensorkv.bench.machine import Machine, this_machine

START, END = "<!-- written by benchmarks/measureall.py -->\n", "<!-- end of what it writes -->\n"
PICTURE = "benchmarks-growth.png"
ROUNDS = 3


class NoPlace(Exception):
    """The page has no place for the figures."""


@dataclasses.dataclass(slots=True)
class Measured:
    """All results so far, as markdown."""

    machine: Machine
    tables: list[tuple[str, list[Row]]] = dataclasses.field(default_factory=list)
    times: dict[str, dict[str, Times]] = dataclasses.field(default_factory=dict)  # of the cases, by name
    found: dict[str, Found] = dataclasses.field(default_factory=dict)  # of the sweeps, by name
    failed: list[str] = dataclasses.field(default_factory=list)  # systems, each with its case
    missing: list[str] = dataclasses.field(default_factory=list)  # peers that could not be installed
    quick: bool = False
    minutes: float | None = None  # duration of the whole run; None until it is done

    def verdicts(self) -> list[Verdict]:
        """Return the verdicts on goals that were measured; tiny sizes have no goals."""
        return [] if self.quick else judge(GOALS, self.times)

    def note_failed(self, case: Case, times: Mapping[str, Times]) -> None:
        """Record the systems that have failed in a case."""
        self.failed += [f"{system} ({case.name})" for system, ways in times.items() if not ways]

    def markdown(self) -> str:
        """Return all tables."""
        command = "make bench" if self.minutes is None else f"make bench (took {self.minutes:.0f} minutes)"
        parts = [markdown(self.tables, self.machine, command)]
        if self.minutes is None:
            parts.insert(0, "**Unfinished**: what follows was measured before the run was ended.\n")
        if self.missing:
            parts.append(f"Not measured, as it could not be installed: {', '.join(self.missing)}.\n")
        if self.failed:
            parts.append(f"Left out, as their jobs failed: {', '.join(self.failed)}.\n")
        if self.found:
            parts.append(
                f"## How the cost grows\n\n![A panel each: workers, servers, keys, bytes]({PICTURE})\n"
            )
        for sweep in SWEEPS:
            if sweep.name in self.found:
                parts.append(sweep_markdown(sweep, self.found[sweep.name], sweep.fitting()[1]))
        if self.verdicts():
            parts.append("## What was asked, and what was found\n")
            parts.append(goals_markdown(self.verdicts()))
        return "\n".join(parts)


def put_figures(page: Path, figures: str) -> None:
    """Replace the text between the marks of a page.

    Raises:
        NoPlace: the page has no marks.
    """
    before, after = around_figures(page)
    new = page.with_suffix(".new")
    new.write_text(before + "\n" + figures.strip() + "\n\n" + after)
    new.replace(page)  # atomically, so that the page is never truncated


def around_figures(page: Path) -> tuple[str, str]:
    """Return the text before and after the figures of a page, marks included.

    Raises:
        NoPlace: the page does not exist, or has no marks.
    """
    try:
        text = page.read_text()
    except OSError as exc:
        raise NoPlace(f"the figures have no place: {exc}") from exc
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise NoPlace(f"{page} has no lines {START.strip()} and {END.strip()}")
    return before + start, end + after


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write the page."""
    started = time.monotonic()
    arguments = _parse(argv)
    signal.signal(signal.SIGTERM, _leave)  # so that exiting ends the jobs
    page, console = arguments.docs / "benchmarks.md", Console()
    around_figures(page)  # fail now, not after the first measurement
    measured = Measured(this_machine(), quick=arguments.quick)

    def note_missing(peer: Peer, reason: NoPeer) -> None:
        measured.missing.append(peer.name)
        console.print(f"{peer.name} is left out: {reason}", markup=False, highlight=False)

    pythons = peer_pythons(SYSTEMS, arguments, note_missing)
    console.print(measured.machine.text(), highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        _measure_all(measured, page, pythons, Path(folder), console)
    measured.minutes = (time.monotonic() - started) / 60
    put_figures(page, measured.markdown())
    if measured.verdicts():
        console.print(goals_table(measured.verdicts()))
    console.print(f"{measured.minutes:.1f} minutes; written: {page}", highlight=False)


def _measure_all(
    measured: Measured, page: Path, pythons: Mapping[str, str], folder: Path, console: Console
) -> None:
    """Measure everything. Results stay on the page even if a later step fails."""

    def times_of(case: Case, systems: Sequence[str], rounds: int) -> dict[str, Times]:
        case = quick(case) if measured.quick else case
        times = measure(case, job_makers(case, systems, pythons, folder), rounds, console)
        measured.note_failed(case, times)
        return times | {peer: {} for peer in measured.missing if peer in systems and can_do(peer, case)}

    for case in CASES:
        times = measured.times[case.name] = times_of(case, SYSTEMS, 1 if measured.quick else ROUNDS)
        title = f"tiny sizes instead of: {case.title}" if measured.quick else case.title
        measured.tables.append((title, rows_of(case, times)))
        console.print(terminal_table(*measured.tables[-1]))
        put_figures(page, measured.markdown())
    for sweep in SWEEPS:
        fits, skipped = sweep.fitting()
        found = {value: times_of(case, SWEPT, 1) for value, case in fits}
        measured.found[sweep.name] = found
        console.print(sweep_markdown(sweep, found, skipped), markup=False)
        put_figures(page, measured.markdown())
        plot_sweeps(SWEEPS, measured.found, page.with_name(PICTURE))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs", help="where benchmarks.md is")
    add_options(parser)
    arguments = parser.parse_args(argv)
    if arguments.quick and arguments.docs.resolve() == HERE.parent / "docs":
        parser.error("--quick measures nothing worth a page: name another folder with --docs")
    return arguments


def _leave(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
