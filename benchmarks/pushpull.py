"""What a step costs, in TensorKV and in what people would use instead, measured in turn in one run.

A step is: every worker pushes its gradients of all keys and has pulled all new values ("push+pull" are
two calls with lists of keys, "pushpull" is one). Every result is checked. Cases:

{cases}

Each system does some steps in a job of its own, then the next one, and so on for several rounds, since
machines drift; ratios are taken within a round. "tensorkv" goes over TCP, as MXNet and gloo do,
"tensorkv-shm" through shared memory, "tensorkv-lent" too, from tensors of `empty_like`. MXNet's ratio is to
the step of "tensorkv" of the same name, any other's to its pushpull; more than 1 means that "tensorkv" is
faster. `measureall.py` measures more, and writes docs/benchmarks.md.

    python benchmarks/pushpull.py            TensorKV and the floor
    python benchmarks/pushpull.py --peers    and MXNet 1.9.1, gloo and Ray
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from cases import CASES, GOALS, quick
from goals import judge
from harness import Times
from jobs import Case
from peerenv import NoPeer, Peer, add_options, peer_pythons
from rich.console import Console
from systems import OURS, SYSTEMS, job_makers, measure, rows_of
from tables import as_json, goals_markdown, goals_table, markdown, terminal_table

from tensorkv.bench.machine import this_machine

if __doc__ is not None:
    __doc__ = __doc__.format(cases="\n".join(f"  {case.name:14} {case.title}" for case in CASES))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the measurements of the command line, and print or write the tables."""
    arguments = _parse(argv)
    signal.signal(signal.SIGTERM, _leave)  # so that exiting ends the jobs
    console, machine = Console(), this_machine()
    systems = arguments.system or (SYSTEMS if arguments.peers else OURS)
    pythons = peer_pythons(systems, arguments, _refuse)
    goals = [] if arguments.quick else GOALS
    tables, times, command = [], dict[str, dict[str, Times]](), _command(arguments)
    console.print(machine.text(), highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        for case in _cases(arguments):
            makers = job_makers(case, systems, pythons, Path(folder))
            times[case.name] = measure(case, makers, arguments.rounds, console)
            rows, verdicts = rows_of(case, times[case.name]), judge(goals, times)
            tables.append((case.title, rows))
            console.print(terminal_table(case.title, rows))
            if arguments.json:
                all_rows = [row for _, rows in tables for row in rows]
                so_far = as_json(all_rows, verdicts, machine, command)
                arguments.json.write_text(json.dumps(so_far, indent=1) + "\n")
            if arguments.markdown:
                goals_text = f"\n{goals_markdown(verdicts)}" if verdicts else ""
                arguments.markdown.write_text(markdown(tables, machine, command) + goals_text)
    if verdicts:
        console.print(goals_table(verdicts))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", action="store_true", help="measure MXNet 1.9.1, gloo and Ray too")
    parser.add_argument("--system", action="append", choices=SYSTEMS, help="only this one; may be repeated")
    parser.add_argument(
        "--case", action="append", choices=[case.name for case in CASES], help="only this one"
    )
    parser.add_argument("--rounds", type=int, help="jobs of each system per case (3, or 1 with --quick)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as markdown")
    add_options(parser)
    arguments = parser.parse_args(argv)
    if arguments.rounds is None:
        arguments.rounds = 1 if arguments.quick else 3
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    return arguments


def _cases(arguments: argparse.Namespace) -> list[Case]:
    cases = [case for case in CASES if not arguments.case or case.name in arguments.case]
    return [quick(case) for case in cases] if arguments.quick else cases


def _command(arguments: argparse.Namespace) -> str:
    """Return a command that repeats the measurement elsewhere, without this machine's own paths."""
    words = ["python", "benchmarks/pushpull.py"]
    words += [f"--{flag}" for flag in ("peers", "quick") if getattr(arguments, flag)]
    words += [f"--system={name}" for name in arguments.system or ()]
    words += [f"--case={name}" for name in arguments.case or ()]
    words.append(f"--rounds={arguments.rounds}")
    return shlex.join(words)


def _refuse(peer: Peer, missing: NoPeer) -> NoReturn:
    raise missing  # the user asked for this peer


def _leave(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
