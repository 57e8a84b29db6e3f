"""What a step costs, in TensorKV and in what people would use instead, measured in turn in one run.

A step is: every worker pushes its gradients of all keys and has pulled all new values ("push+pull" are
two calls with lists of keys, "pushpull" is one). Every result is checked. Cases:

{cases}

Each system does some steps in a job of its own, then the next one, and so on for several rounds, since
machines drift; ratios are taken within a round. "tensorkv" goes over TCP, as MXNet and gloo do, and
"tensorkv-shm" through shared memory. MXNet's ratio is to TensorKV's step of the same name,
any other's to its pushpull; more than 1 means that TensorKV is faster.

    python benchmarks/pushpull.py            TensorKV and the floor
    python benchmarks/pushpull.py --peers    and MXNet 1.9.1 and gloo
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from harness import figures, run_job
from jobs import Case, JobMaker, floor_job, gloo_job, has_floor, has_gloo, mxnet_job, tensorkv_job
from mxnetenv import ENV_PYTHON, default_cache, mxnet_python
from rich.console import Console
from tables import Row, as_json, markdown, terminal_table

from tensorkv.bench.machine import this_machine
from tensorkv.bench.steps import Plan

SYSTEMS = ("tensorkv", "tensorkv-shm", "mxnet", "gloo", "floor")
OURS = ("tensorkv", "tensorkv-shm", "floor")
JOB_TIMEOUT_S = 300.0

Times = dict[str, list[list[float]]]
"""Of one system: the name of a way to a list of seconds per round."""


def _dist(name: str, title: str, plan: Plan, required: float | None = None) -> Case:
    return Case(
        name=name,
        title=f"dist_sync, 2 workers, 2 servers: {title}",
        kind="dist_sync",
        plan=plan,
        num_workers=2,
        num_servers=2,
        required=required,
    )


def _local(name: str, title: str, plan: Plan, required: float | None = None) -> Case:
    return Case(name=name, title=f"local, one process: {title}", kind="local", plan=plan, required=required)


CASES = [
    _dist("dist-resnet50", "ResNet-50, 161 keys, 102 MB", Plan(tensors="resnet50"), 1.5),
    _dist("dist-tiny", "1000 keys of 64 floats", Plan(tensors="tiny", steps=50), 20.0),
    _dist("dist-one", "one key of 64 floats", Plan(tensors="one", warmup=20, steps=200), 2.0),
    _dist("dist-big", "one key of 102 MB", Plan(tensors="big")),
    _dist("dist-sgd", "ResNet-50, SGD with momentum on the servers", Plan(tensors="resnet50", updater="sgd")),
    _local("local-assign", "ResNet-50, 4 devices, ASSIGN", Plan(tensors="resnet50", num_devices=4), 1.5),
    _local(
        "local-sgd", "ResNet-50, 1 device, SGD with momentum", Plan(tensors="resnet50", updater="sgd"), 3.0
    ),
]

if __doc__ is not None:
    __doc__ = __doc__.format(cases="\n".join(f"  {case.name:14} {case.title}" for case in CASES))


def quick(case: Case) -> Case:
    """Return the case with tiny sizes and few steps, which shows that it runs and nothing else."""
    plan = dataclasses.replace(case.plan, tensors="quick", warmup=1, steps=3)
    return dataclasses.replace(case, plan=plan, required=None)


def job_makers(case: Case, systems: Sequence[str], mxnet: str | None, folder: Path) -> dict[str, JobMaker]:
    """Return the systems that can do the case, in order, with what makes their jobs.

    Args:
        systems: names out of SYSTEMS.
        mxnet: the interpreter that has MXNet, if it is among them.
        folder: an empty folder that lasts as long as the jobs.
    """
    makers: dict[str, JobMaker] = {}
    for system in systems:
        if system == "tensorkv":
            makers[system] = tensorkv_job
        elif system == "tensorkv-shm" and case.is_dist:
            makers[system] = lambda case: tensorkv_job(case, "shm")
        elif system == "mxnet" and mxnet is not None:
            makers[system] = lambda case: mxnet_job(case, mxnet)
        elif system == "gloo" and has_gloo(case):
            makers[system] = lambda case: gloo_job(case, Path(tempfile.mkdtemp(dir=folder)))
        elif system == "floor" and has_floor(case):
            makers[system] = floor_job
    return makers


def measure(case: Case, makers: dict[str, JobMaker], rounds: int, console: Console) -> dict[str, Times]:
    """Run every system once per round, in turn, and return what each step took.

    Raises:
        JobFailed: a job failed; nothing of it is left running.
    """
    times: dict[str, Times] = {system: {} for system in makers}
    for number in range(1, rounds + 1):
        for system, make in makers.items():
            with console.status(f"{case.name}, round {number} of {rounds}: {system}"):
                result = run_job(make(case), timeout_s=JOB_TIMEOUT_S)
            for way, times_s in result.items():
                times[system].setdefault(way, []).append(times_s)
    return times


def rows_of(case: Case, times: dict[str, Times]) -> list[Row]:
    """Return the table's rows for what `measure` returned."""
    ours = times.get("tensorkv", {})
    rows = []
    for system, ways in times.items():
        for way, rounds in ways.items():
            baseline = None if system == "tensorkv" else ours.get(way, ours.get("pushpull"))
            required = case.required if system == "mxnet" else None
            found = figures(rounds, baseline)
            rows.append(Row(case=case.name, system=system, way=way, figures=found, required=required))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for, and print or write the tables."""
    arguments = _parse(argv)
    signal.signal(signal.SIGTERM, _leave)  # so that jobs are ended on the way out
    console, machine = Console(), this_machine()
    systems = arguments.system or (SYSTEMS if arguments.peers else OURS)
    mxnet = mxnet_python(arguments.mxnet_python, arguments.cache) if "mxnet" in systems else None
    tables, command = [], _command(arguments)
    console.print(machine.text(), highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        for case in _cases(arguments):
            makers = job_makers(case, systems, mxnet, Path(folder))
            rows = rows_of(case, measure(case, makers, arguments.rounds, console))
            tables.append((case.title, rows))
            console.print(terminal_table(case.title, rows))
            if arguments.json:
                so_far = as_json([row for _, rows in tables for row in rows], machine, command)
                arguments.json.write_text(json.dumps(so_far, indent=1) + "\n")
            if arguments.markdown:
                arguments.markdown.write_text(markdown(tables, machine, command))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", action="store_true", help="measure MXNet 1.9.1 and gloo too")
    parser.add_argument("--system", action="append", choices=SYSTEMS, help="only this one; may be repeated")
    parser.add_argument(
        "--case", action="append", choices=[case.name for case in CASES], help="only this one"
    )
    parser.add_argument("--rounds", type=int, help="jobs of each system per case (3, or 1 with --quick)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as markdown")
    parser.add_argument(
        "--mxnet-python", metavar="PYTHON", help=f"an interpreter that has MXNet 1.9.1 (or {ENV_PYTHON})"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=default_cache(),
        metavar="FOLDER",
        help="where an environment for MXNet is made if none is named (%(default)s)",
    )
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
    """Return the command to measure the same elsewhere, without what is this machine's own."""
    words = ["python", "benchmarks/pushpull.py"]
    words += [f"--{flag}" for flag in ("peers", "quick") if getattr(arguments, flag)]
    words += [f"--system={name}" for name in arguments.system or ()]
    words += [f"--case={name}" for name in arguments.case or ()]
    words.append(f"--rounds={arguments.rounds}")
    return shlex.join(words)


def _leave(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
