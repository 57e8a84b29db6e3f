"""The command `tensorkv bench`: alone, where it starts jobs, or as each worker of an existing job."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tensorkv.bench.machine import this_machine
from tensorkv.bench.measuring import Event, measure_sets, read_event
from tensorkv.bench.options import BenchOptions
from tensorkv.bench.plot import NO_MATPLOTLIB, has_matplotlib, plot_bandwidth
from tensorkv.bench.report import COLUMNS, MemoryRow, Row, make_row, write_json
from tensorkv.bench.shapes import format_size, num_elems
from tensorkv.bench.steps import ITEMSIZES, Plan, WrongResult, read_result
from tensorkv.config import from_env
from tensorkv.errors import TensorKVError

FLOOR_TIMEOUT_S = 300.0
END_S = 20.0
IN_JOB = "job"
"""Used in place of a transport if this command did not start the job."""


class BenchFailed(Exception):
    """A job to be measured has failed; the text says why."""


def run_bench(options: BenchOptions, console: Console) -> int:
    """Measure, print and write; return the exit status."""
    if options.plot_path is not None and not has_matplotlib():
        console.print(f"tensorkv bench: {NO_MATPLOTLIB}", markup=False)
        return 2
    try:
        if _in_job():
            return _as_worker(options, console)
        results = _alone(options, console)
    except (BenchFailed, TensorKVError, WrongResult) as error:
        console.print(f"tensorkv bench: {error}", markup=False, highlight=False)
        return 1
    _report(options, results, console)
    return 0


Results = list[tuple[str, Event, float | None]]
"""The transport, the result that rank 0 reported, and the floor in milliseconds."""


def _in_job() -> bool:
    config = from_env()
    return (config is not None and config.role == "worker") or "TORCHELASTIC_RUN_ID" in os.environ


# ---- in an existing job ----------------------------------------------------------------------------


def _as_worker(options: BenchOptions, console: Console) -> int:
    """Measure as one worker of a job; rank 0 reports."""
    found: Results = []
    with _progress(console, options, IN_JOB) as follow:

        def report(event: Event) -> None:
            follow(event)
            if event["event"] == "result":
                found.append((IN_JOB, event, None))

        measure_sets(options.kind, options.plans, report)
    if found:
        _report(options, found, console)
    return 0


# ---- alone -----------------------------------------------------------------------------------------


def _alone(options: BenchOptions, console: Console) -> Results:
    found: Results = []
    for transport in options.transports:
        with _progress(console, options, transport) as follow:
            events = _run_job(options, transport, follow)
        for plan, event in zip(options.plans, events, strict=True):
            with console.status(f"{plan.tensors}: the floor"):
                floor_ms = _floor_ms(options, plan, transport) if options.with_floor else None
            found.append((transport, event, floor_ms))
    return found


def _run_job(options: BenchOptions, transport: str, follow: Any) -> list[Event]:
    """Start a job, follow its events, and return its results; leave none of its processes behind.

    Raises:
        BenchFailed: it failed, or did not report all results.
    """
    plans = [f"--plan={json.dumps(asdict(plan))}" for plan in options.plans]
    command = [sys.executable, "-m", "tensorkv.bench.measuring", f"--kind={options.kind}", *plans]
    if options.is_dist:
        size = ["-n", str(options.num_workers), "-s", str(options.num_servers)]
        launcher = [
            sys.executable,
            "-m",
            "tensorkv",
            "run",
            *size,
            "--transport",
            transport,
            "--no-prefix",
            "--",
        ]
        command = [*launcher, *command]
    found: list[Event] = []
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            event = read_event(line)
            if event is None:
                sys.stderr.write(line)
                continue
            follow(event)
            if event["event"] == "result":
                found.append(event)
        status = process.wait()
    finally:
        _end(process)
    if status or len(found) != len(options.plans):
        raise BenchFailed(
            f"the job ended with status {status} after {len(found)} of {len(options.plans)} results"
        )
    return found


def _end(process: subprocess.Popen[str]) -> None:
    """End a job that is still running; its launcher ends the other processes."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _floor_ms(options: BenchOptions, plan: Plan, transport: str) -> float | None:
    """Return the median duration of a step that only moves the same bytes.

    Raises:
        BenchFailed: it could not be measured.
    """
    way = {"shm": "shm", "tcp": "tcp", "local": "local"}[transport]
    floor = Plan(tensors=plan.tensors, warmup=2, steps=max(3, plan.steps or 10))
    if plan.dtype != "float32":  # as many bytes
        floor = Plan(
            tensors=format_size(num_elems(plan.shapes) * ITEMSIZES[plan.dtype]), warmup=2, steps=floor.steps
        )
    command = [
        *(sys.executable, "-m", "tensorkv.bench.floor", f"--way={way}", *floor.arguments()),
        *(f"--workers={options.num_workers}", f"--servers={options.num_servers}"),
    ]
    environ: Mapping[str, str] = {**os.environ, **({"OMP_NUM_THREADS": "1"} if options.is_dist else {})}
    done = subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=FLOOR_TIMEOUT_S, check=False
    )
    if done.returncode:
        raise BenchFailed(f"the floor of {plan.tensors} could not be measured:\n{done.stderr[-2000:]}")
    return statistics.median(read_result(done.stdout)[way]) * 1e3


# ---- the report ------------------------------------------------------------------------------------


@contextmanager
def _progress(console: Console, options: BenchOptions, transport: str) -> Iterator[Any]:
    """Show the progress of a job on a terminal; yields a callback for its events."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"{transport}: starting", total=2 * len(options.plans))
        done = 0

        def follow(event: Event) -> None:
            nonlocal done
            if event["event"] == "result":
                done += 2
                progress.update(task, completed=done)
            else:
                ways = {"push+pull": 0, "pushpull": 1}[event["way"]]
                completed = done + ways + event["number"] / event["num_steps"]
                text = f"{transport}: {event['tensors']}, {event['way']}"
                progress.update(task, description=text, completed=completed)

        yield follow


def _report(options: BenchOptions, results: Results, console: Console) -> None:
    rows, memory = _rows(options, results), _memory(options, results)
    machine = this_machine()
    table = Table(*COLUMNS, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in [*table.columns[1:3], *table.columns[5:]]:
        column.justify = "right"
    for column in table.columns:
        column.no_wrap = True
    for row in rows:
        table.add_row(*row.cells())
    plan = options.plans[0]
    sizes = [_counted(rows[0].num_workers, "worker")]
    if options.is_dist and rows[0].transport != IN_JOB:  # a worker of an existing job does not know
        sizes.append(_counted(options.num_servers, "server"))
    title = ", ".join([options.kind, *sizes, plan.updater, plan.dtype])
    console.print(machine.text(), title, sep="\n", highlight=False)
    console.print(table)
    for each in memory:
        text = (
            f"{each.tensors}, {each.transport}: {each.process} has grown by {each.grown_bytes / 1e6:.0f} MB"
        )
        console.print(f"{text}, {each.models:.2f} times the model", highlight=False)
    console.print("all results were checked", highlight=False)
    if options.json_path is not None:
        chosen: dict[str, object] = {
            "kind": options.kind,
            "num_workers": rows[0].num_workers,
            "num_servers": None if rows[0].transport == IN_JOB else options.num_servers,
            "plans": [asdict(plan) for plan in options.plans],
        }
        write_json(options.json_path, rows, memory, machine, chosen)
    if options.plot_path is not None:
        plot_bandwidth(rows, options.plot_path, title)


def _rows(options: BenchOptions, results: Results) -> list[Row]:
    plans = {plan.tensors: plan for plan in options.plans}
    return [
        make_row(
            times_s,
            tensors=event["tensors"],
            num_keys=len(plans[event["tensors"]].shapes),
            size_bytes=_size_bytes(plans[event["tensors"]]),
            transport=transport,
            way=way,
            num_workers=event["num_workers"],
            floor_ms=floor_ms,
        )
        for transport, event, floor_ms in results
        for way, times_s in event["times_s"].items()
    ]


def _memory(options: BenchOptions, results: Results) -> list[MemoryRow]:
    plans = {plan.tensors: plan for plan in options.plans}
    return [
        MemoryRow(
            tensors=event["tensors"],
            transport=transport,
            process=process,
            grown_bytes=after - before,
            model_bytes=_size_bytes(plans[event["tensors"]]),
        )
        for transport, event, _ in results
        for process, (before, after) in event["memory"].items()
        if _size_bytes(plans[event["tensors"]]) >= MIN_MEMORY_BYTES
    ]


MIN_MEMORY_BYTES = 64 << 20
"""Minimum size of a model whose memory is reported; the growth of smaller ones is lost in the noise."""


def _size_bytes(plan: Plan) -> int:
    return num_elems(plan.shapes) * ITEMSIZES[plan.dtype]


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
