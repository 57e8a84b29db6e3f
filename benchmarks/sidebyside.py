"""Two checkouts of TensorKV, step by step in one run: has a change made anything slower?

Every case of `pushpull.py` runs as jobs from this checkout and from another one in turn, through TCP, shared
memory, and from tensors of `empty_like`. The ratio is what a step takes here to what it takes there, the
median of the rounds' ratios: 1.05 is 5 % slower here. Each round runs here, there, there, here, so
that a machine that drifts weighs on both alike. Results are checked, as in `pushpull.py`.

    git worktree add ../before COMMIT
    python benchmarks/sidebyside.py ../before            about 25 minutes with 7 rounds
    python benchmarks/sidebyside.py ../before --case dist-one --rounds 20

The status is 1 if a row is slower than `--allowed`. With few rounds a busy machine exceeds that by chance:
measure such a row again, alone, with more rounds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cases import CASES, quick
from harness import SOURCE, JobFailed, Times, ratio_of_rounds, run_job
from jobs import Case, tensorkv_job
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from systems import JOB_TIMEOUT_S, can_do

from tensorkv.bench.machine import this_machine

TRANSPORTS = {"tensorkv": ("tcp", False), "tensorkv-shm": ("shm", False), "tensorkv-lent": ("shm", True)}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both checkouts and print a row for each way of each system in each case."""
    arguments = _parse(argv)
    console = Console()
    console.print(this_machine().text(), highlight=False)
    slower = []
    for case in (case for case in CASES if not arguments.case or case.name in arguments.case):
        measured = quick(case) if arguments.quick else case
        ratios = compare(measured, arguments.checkout / "src", arguments.rounds)
        console.print(_table(case, ratios))
        slower += [f"{case.name} {name}" for name, ratio in ratios.items() if ratio > arguments.allowed]
    if slower:
        console.print(f"slower than {arguments.allowed}: {', '.join(slower)}", highlight=False)
        sys.exit(1)


def compare(case: Case, other: Path, rounds: int) -> dict[str, float]:
    """Return for each way of each of our systems how many times as long as in `other` a step takes here.

    Args:
        case: what is measured.
        other: the `src` folder of the other checkout.
        rounds: how often each pair of checkouts runs.

    Raises:
        JobFailed: a job failed; nothing of it is left running.
    """
    ratios = {}
    for system, (transport, lent) in TRANSPORTS.items():
        if not can_do(system, case):
            continue
        here: Times = {}
        there: Times = {}
        for _ in range(rounds):
            for source, times in ((SOURCE, here), (other, there), (other, there), (SOURCE, here)):
                job = tensorkv_job(case, transport, lent=lent, source=source)
                for way, times_s in run_job(job, timeout_s=JOB_TIMEOUT_S).items():
                    times.setdefault(way, []).append(times_s)
        for way in here.keys() & there.keys():
            ratios[f"{system}, {way}"] = ratio_of_rounds(_pairs(here[way]), _pairs(there[way]))
    return ratios


def _pairs(rounds: Sequence[Sequence[float]]) -> list[list[float]]:
    """Join the two jobs of each round."""
    return [[*first, *second] for first, second in zip(rounds[::2], rounds[1::2], strict=True)]


def _table(case: Case, ratios: dict[str, float]) -> Table:
    table = Table("system, step", "here / there", title=case.title, title_justify="left", box=SIMPLE_HEAD)
    table.columns[1].justify = "right"
    for name, ratio in sorted(ratios.items()):
        table.add_row(name, f"{ratio:.3f}")
    return table


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path, help="the folder of the other checkout")
    names = [case.name for case in CASES]
    parser.add_argument("--case", action="append", choices=names, help="only this one; may be repeated")
    parser.add_argument("--rounds", type=int, default=7, help="rounds per case and system (7)")
    parser.add_argument("--allowed", type=float, default=1.03, help="the largest ratio that is good (1.03)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    if not (arguments.checkout / "src" / "tensorkv").is_dir():
        parser.error(f"{arguments.checkout} is no checkout of TensorKV: it has no src/tensorkv")
    return arguments


if __name__ == "__main__":
    try:
        main()
    except JobFailed as error:
        sys.exit(str(error))
