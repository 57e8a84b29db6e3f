"""Two checkouts of TensorKV, step by step in one run: has a change made anything slower?

Every case of `pushpull.py` runs as a job from this checkout and one from another, through TCP, shared
memory, and from tensors of `empty_like`. Both jobs live side by side and take turns of a few steps
(`turnsteps.py`), so that a machine that drifts weighs on both alike. The ratio is what a step takes here to
what it takes there in the turn beside it, the median of the turns and of the rounds: 1.05 is 5 % slower here.
A process stays quicker or slower than another of the same code as long as it lives, by 15 % where a step
takes 0.2 ms: where its memory lies differs, and the order of its sets. So several rounds are needed, each
with two new jobs, which begin in turn. The case whose steps are that short takes more of them, and no CPU may
sleep meanwhile (`harness.kept_awake`). Results are checked, as in `pushpull.py`.

    git worktree add ../before COMMIT
    python benchmarks/sidebyside.py ../before            about 110 minutes with 6 rounds
    python benchmarks/sidebyside.py ../before --case dist-one --system tensorkv --rounds 4
    python benchmarks/sidebyside.py . --bound --case dist-tiny       what `kv.bind` saves

Behind each ratio stand the lowest and the highest of the rounds. The status is 1 if a row is slower than
`--allowed`. With few rounds that happens by chance: measure such a row again with more.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from cases import CASES, quick
from harness import SOURCE, JobFailed, kept_awake, middle, ratio_of_rounds, run_jobs
from jobs import Case, turns_job
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from systems import JOB_TIMEOUT_S, can_do

from tensorkv.bench.machine import this_machine

TRANSPORTS = {"tensorkv": ("tcp", False), "tensorkv-shm": ("shm", False), "tensorkv-lent": ("shm", True)}
TURNS_OF_A_CASE = 10
"""Number of turns that `pushpull.py`'s steps of a case are split into."""
STEPS_FACTOR = 5
"""Factor by which a job multiplies those steps."""
SHORT = ("dist-one",)
"""Cases whose steps take a fraction of a millisecond."""
SHORT_ROUNDS_FACTOR = 10
"""Factor by which the rounds of such a case are multiplied."""

Ratios = Sequence[float]
"""Ratio of each round, for one way."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both checkouts and print a row for each way of each system in each case."""
    arguments = _parse(argv)
    console = Console()
    console.print(this_machine().text(), highlight=False)
    slower = []
    for case in (case for case in CASES if not arguments.case or case.name in arguments.case):
        measured = quick(case) if arguments.quick else case
        other = arguments.checkout.resolve() / "src"
        is_short = case.name in SHORT
        rounds = arguments.rounds * (SHORT_ROUNDS_FACTOR if is_short else 1)
        with kept_awake() if is_short else nullcontext():
            ratios = compare(measured, other, rounds, arguments.system, arguments.bound)
        console.print(_table(case, ratios))
        slower += [
            f"{case.name} {name}" for name, found in ratios.items() if middle(found) > arguments.allowed
        ]
    if slower:
        console.print(f"slower than {arguments.allowed}: {', '.join(slower)}", highlight=False)
        sys.exit(1)


def compare(
    case: Case, other: Path, rounds: int, systems: Sequence[str] | None = None, bound: bool = False
) -> dict[str, Ratios]:
    """Return the ratio of the step time here to that in `other`, for each way of each of our systems.

    Args:
        case: the case to measure.
        other: the `src` folder of the other checkout.
        rounds: number of rounds, each with two new jobs.
        systems: some of `TRANSPORTS`; None for all.
        bound: whether the steps here are those of `KVStore.bind`.

    Raises:
        JobFailed: a job failed; nothing of it is left running.
    """
    turn = max(1, case.plan.steps // TURNS_OF_A_CASE)
    plan = dataclasses.replace(case.plan, steps=case.plan.steps * STEPS_FACTOR)
    longer = dataclasses.replace(case, plan=plan)
    ratios: dict[str, list[float]] = {}
    for system in (system for system in systems or TRANSPORTS if can_do(system, case)):
        for number in range(rounds):
            for way, ratio in _round(longer, system, other, turn, number % 2 == 0, bound).items():
                ratios.setdefault(f"{system}, {way}", []).append(ratio)
    return ratios


def _round(
    case: Case, system: str, other: Path, turn: int, here_first: bool, bound: bool
) -> dict[str, float]:
    """Run both jobs and return the ratio of each way. The job started first gets the first turn."""
    transport, lent = TRANSPORTS[system]
    with tempfile.TemporaryDirectory() as folder:
        fifos = [Path(folder, name) for name in ("here", "there")]
        for fifo in fifos:
            os.mkfifo(fifo)
        places = [(SOURCE, fifos, bound), (other, fifos[::-1], False)]
        jobs = [
            turns_job(
                case,
                transport,
                lent=lent,
                source=source,
                fifos=pair,
                turn=turn,
                second=number == 1,
                bound=is_bound,
            )
            for number, (source, pair, is_bound) in enumerate(places if here_first else places[::-1])
        ]
        times = run_jobs(jobs, timeout_s=JOB_TIMEOUT_S)
    here, there = times if here_first else times[::-1]
    return {way: ratio_of_rounds(_turns(here[way], turn), _turns(there[way], turn)) for way in here}


def _turns(times_s: Sequence[float], turn: int) -> list[Sequence[float]]:
    return [times_s[at : at + turn] for at in range(0, len(times_s), turn)]


def _table(case: Case, ratios: Mapping[str, Ratios]) -> Table:
    table = Table(
        "system, step", "here / there", "rounds", title=case.title, title_justify="left", box=SIMPLE_HEAD
    )
    table.columns[1].justify = "right"
    for name, found in sorted(ratios.items()):
        table.add_row(name, f"{middle(found):.3f}", f"{min(found):.3f} to {max(found):.3f}")
    return table


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path, help="the folder of the other checkout")
    names = [case.name for case in CASES]
    parser.add_argument("--case", action="append", choices=names, help="only this one; may be repeated")
    parser.add_argument("--system", action="append", choices=TRANSPORTS, help="only this; may be repeated")
    parser.add_argument(
        "--rounds",
        type=int,
        default=6,
        help="rounds per case and system (6); of one short key 10 times as many",
    )
    parser.add_argument("--allowed", type=float, default=1.03, help="the largest ratio that is good (1.03)")
    parser.add_argument("--bound", action="store_true", help="take the steps here through kv.bind")
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
