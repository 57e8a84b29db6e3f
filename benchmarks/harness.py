"""Starts the measured jobs, always ends them, and aggregates their results."""

from __future__ import annotations

import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType
from typing import IO

from tensorkv.bench.steps import read_result

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent / "src"

END_S = 20.0
"""Timeout for a process to end by itself after its job is done, or after SIGTERM."""


_AWAKE = """
import os, sys
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
os.sched_setaffinity(0, {int(sys.argv[1])})
while os.getppid() == int(sys.argv[2]):
    sum(range(1000))
"""


class JobFailed(Exception):
    """A measured job failed or timed out. The text ends with its output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One process of a job.

    The job is over when all processes except `helper` ones have ended. Helpers, servers say, must
    then end by themselves.
    """

    name: str
    command: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)  # added to this process's own
    helper: bool = False


@contextmanager
def kept_awake() -> Iterator[None]:
    """Let no CPU sleep within the block: on each runs a process that gives way to any other (SCHED_IDLE).

    A CPU that has slept, in a virtual machine above all, takes 50 microseconds to wake. Whether it falls
    asleep between two frames of a step of 0.2 ms is chance, and stays so for as long as the processes live.
    """
    command = [sys.executable, "-S", "-c", _AWAKE]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for cpu in sorted(os.sched_getaffinity(0)):
            running.append(subprocess.Popen([*command, str(cpu), str(os.getpid())]))
        yield
    finally:
        for process in running:
            process.kill()
        for process in running:
            process.wait(END_S)


def python_script(script: str, *arguments: str, python: str = sys.executable) -> list[str]:
    """Return the command that runs a script of this folder."""
    return [python, str(HERE / script), *arguments]


def threads_env(num_processes: int) -> dict[str, str]:
    """Return OMP_NUM_THREADS as torchrun sets it: 1 for several processes, else unchanged."""
    return {"OMP_NUM_THREADS": "1"} if num_processes > 1 else {}


def run_job(processes: Sequence[Process], *, timeout_s: float) -> dict[str, list[float]]:
    """Run a job and return the seconds of its steps by way, as printed by its rank 0.

    Raises:
        JobFailed: a process ended with an error, the timeout expired, or there is no result.
    """
    (result,) = run_jobs([processes], timeout_s=timeout_s)
    return result


def run_jobs(jobs: Sequence[Sequence[Process]], *, timeout_s: float) -> list[dict[str, list[float]]]:
    """Run jobs side by side and return the seconds of the steps of each, as in `run_job`.

    Raises:
        JobFailed: as in `run_job`; the other jobs are ended too.
    """
    with _started([process for job in jobs for process in job]) as running:
        try:
            _wait_for([each for each in running if not each.process.helper], running, timeout_s)
            _wait_for(running, running, END_S)
            return [_result_of(job, running) for job in jobs]
        except (JobFailed, ValueError) as exc:
            raise JobFailed("\n".join([str(exc), *(each.tail() for each in running)])) from exc


def _result_of(job: Sequence[Process], running: Sequence[_Running]) -> dict[str, list[float]]:
    outputs = (
        each.output()
        for each in running
        if any(each.process is one for one in job) and not each.process.helper
    )
    return read_result("\n".join(outputs))


# ---- processes -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Running:
    process: Process
    popen: subprocess.Popen[bytes]
    descriptor: int  # a pidfd: readable once the process has ended
    log: IO[bytes]

    def status(self) -> int | None:
        """Return the exit status, negative for a signal; None while it runs.

        Does not reap the process, so that its pid is not reused before its group has been ended.
        """
        ended = os.waitid(os.P_PID, self.popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def output(self) -> str:
        self.log.seek(0)
        return self.log.read().decode(errors="replace")

    def tail(self) -> str:
        return f"--- {self.process.name}, status {self.status()}:\n{self.output()[-3000:]}"


@contextmanager
def _started(processes: Sequence[Process]) -> Iterator[list[_Running]]:
    """Start processes, each in its own process group, and end every group on exit, even by SIGTERM.

    In their own groups they would otherwise outlive this process. SIGTERM raises SystemExit, but not
    between the start of a process and its entry in the list.
    """
    running: list[_Running] = []
    asked_to_leave = starting = False

    def leave(signum: int, frame: FrameType | None) -> None:
        nonlocal asked_to_leave
        asked_to_leave = True
        if not starting:
            sys.exit(128 + signum)

    before = signal.signal(signal.SIGTERM, leave)
    with ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGTERM, before)
        try:
            for process in processes:
                starting = True
                running.append(_start(process, stack))
                starting = False
                if asked_to_leave:
                    sys.exit(128 + signal.SIGTERM)
            yield running
        finally:
            starting = False
            _end(running)


def _start(process: Process, stack: ExitStack) -> _Running:
    log = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  # the stack closes it
    popen = subprocess.Popen(
        list(process.command),
        env={**os.environ, **process.env},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    descriptor = os.pidfd_open(popen.pid)
    stack.callback(os.close, descriptor)
    return _Running(process, popen, descriptor, log)


def _end(running: Sequence[_Running]) -> None:
    """Send SIGTERM to running processes, so that a launcher can end its own, then SIGKILL to the rest."""
    alive = {each.descriptor for each in running if each.status() is None}
    for each in running:
        if each.descriptor in alive:
            os.killpg(each.popen.pid, signal.SIGTERM)
    deadline = time.monotonic() + END_S
    while alive and (ended := wait(list(alive), max(0.0, deadline - time.monotonic()))):
        alive.difference_update(ended)
    for each in running:
        os.killpg(each.popen.pid, signal.SIGKILL)  # the process itself, or children that outlived it
        each.popen.wait()


def _wait_for(wanted: Sequence[_Running], watched: Sequence[_Running], timeout_s: float) -> None:
    """Wait until all `wanted` have ended; raise if one of `watched` fails or the timeout expires."""
    deadline = time.monotonic() + timeout_s
    while True:
        for each in watched:
            if each.status() not in (None, 0):
                raise JobFailed(f"{each.process.name} ended with status {each.status()}")
        missing = [each for each in wanted if each.status() is None]
        if not missing:
            return
        alive = [each.descriptor for each in watched if each.status() is None]
        if not wait(alive, max(0.0, deadline - time.monotonic())):
            names = ", ".join(each.process.name for each in missing)
            raise JobFailed(f"{names} still running after {timeout_s:.0f} s")


# ---- figures -------------------------------------------------------------------------------------


Times = dict[str, list[list[float]]]
"""Times of one system: by way, a list of seconds per round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Step times of one way over all rounds, in milliseconds, and relative to TensorKV.

    `ratio` is the step time over TensorKV's, None for TensorKV itself or without it. See
    `ratio_of_rounds`. `ratio_of_min` compares the fastest steps, which other load disturbs least.
    """

    median_ms: float
    min_ms: float
    p99_ms: float
    num_steps: int
    ratio: float | None
    ratio_of_min: float | None


def ratio_of_rounds(rounds: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]]) -> float:
    """Return the ratio of step times to those of `baseline`: the median of the rounds' ratios.

    A round's jobs run one after another within a minute, so that other load on the machine affects both
    sides alike.
    """
    return middle(
        [
            statistics.median(times_s) / statistics.median(base_s)
            for times_s, base_s in zip(rounds, baseline, strict=True)
        ]
    )


def middle(ratios: Sequence[float]) -> float:
    """Return the median of ratios.

    For an even number it is the geometric mean of the middle two, so that it does not matter which side
    is the baseline.
    """
    return math.exp(statistics.median(math.log(ratio) for ratio in ratios))


def figures(rounds: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]] | None) -> Figures:
    """Return the figures of a way from its step times.

    Args:
        rounds: the seconds of each step, a list per round.
        baseline: the same of TensorKV, from the same rounds; None gives no ratio.
    """
    all_s = sorted(time_s for times_s in rounds for time_s in times_s)
    ratio = ratio_of_min = None
    if baseline is not None:
        ratio_of_min = all_s[0] / min(map(min, baseline))
        ratio = ratio_of_rounds(rounds, baseline)
    return Figures(
        median_ms=statistics.median(all_s) * 1e3,
        min_ms=all_s[0] * 1e3,
        p99_ms=all_s[min(len(all_s) - 1, int(len(all_s) * 0.99))] * 1e3,
        num_steps=len(all_s),
        ratio=ratio,
        ratio_of_min=ratio_of_min,
    )
