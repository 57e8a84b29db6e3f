"""The measured systems, which of them support a case, and measuring them in turn."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness import JobFailed, Times, figures, run_job
from jobs import Case, JobMaker, floor_job, gloo_job, mxnet_job, ray_job, tensorkv_job
from peerenv import PEERS
from rich.console import Console
from tables import Row

SYSTEMS = ("tensorkv", "tensorkv-shm", "tensorkv-lent", "mxnet", "gloo", "ray", "floor")
"""The systems, in the order of measurement. "tensorkv" uses TCP, as MXNet and gloo do; "tensorkv-shm" uses
shared memory, and so does "tensorkv-lent", which pushes tensors of `empty_like`."""

OURS = ("tensorkv", "tensorkv-shm", "tensorkv-lent", "floor")
NEED_A_PYTHON = tuple(peer.name for peer in PEERS)
JOB_TIMEOUT_S = 300.0


def job_makers(
    case: Case, systems: Sequence[str], pythons: Mapping[str, str], folder: Path
) -> dict[str, JobMaker]:
    """Return the systems that support the case, in order, with the makers of their jobs.

    Args:
        case: the case to measure.
        systems: names out of SYSTEMS.
        pythons: the interpreters with MXNet and Ray; a system without its interpreter is omitted.
        folder: an empty folder that lasts as long as the jobs.
    """
    makers: dict[str, JobMaker] = {
        "tensorkv": tensorkv_job,
        "tensorkv-shm": lambda case: tensorkv_job(case, "shm"),
        "tensorkv-lent": lambda case: tensorkv_job(case, "shm", lent=True),
        "mxnet": lambda case: mxnet_job(case, pythons["mxnet"]),
        "gloo": lambda case: gloo_job(case, Path(tempfile.mkdtemp(dir=folder))),
        "ray": lambda case: ray_job(case, pythons["ray"], Path(tempfile.mkdtemp(dir=folder))),
        "floor": floor_job,
    }
    return {
        system: makers[system]
        for system in systems
        if can_do(system, case) and (system in pythons or system not in NEED_A_PYTHON)
    }


def can_do(system: str, case: Case) -> bool:
    """Whether a system supports a case."""
    plan, of_float32 = case.plan, case.plan.dtype == "float32"
    if system == "tensorkv":
        return True
    if system == "tensorkv-shm":
        return case.is_dist
    if system == "tensorkv-lent":
        return case.is_dist and plan.updater == "assign" and not plan.pushes and of_float32
    if system == "mxnet":
        return of_float32
    if system == "gloo":  # an all-reduce has no updater, and is trivial with one worker
        reduces = case.is_dist and case.num_workers > 1
        return reduces and plan.updater == "assign" and not plan.pushes
    if system == "ray":
        return case.kind == "dist_sync" and plan.updater in ("assign", "sgd") and of_float32
    # There is no floor for several processes with an optimizer.
    return of_float32 and not plan.pushes and (not case.is_dist or plan.updater == "assign")


def measure(case: Case, makers: Mapping[str, JobMaker], rounds: int, console: Console) -> dict[str, Times]:
    """Run every system once per round, in turn, and return the step times.

    A peer with a failed job is omitted: it has no times.

    Raises:
        JobFailed: a job of ours failed; nothing of it is left running.
    """
    times: dict[str, Times] = {system: {} for system in makers}
    failed: set[str] = set()
    for number in range(1, rounds + 1):
        for system, make in makers.items():
            if system in failed:
                continue
            try:
                with console.status(f"{case.name}, round {number} of {rounds}: {system}"):
                    result = run_job(make(case), timeout_s=JOB_TIMEOUT_S)
            except JobFailed as error:
                if system in OURS:
                    raise
                failed.add(system)
                times[system] = {}
                console.print(f"{case.name}: {system} is left out: {error}", markup=False, highlight=False)
                continue
            for way, times_s in result.items():
                times[system].setdefault(way, []).append(times_s)
    return times


def rows_of(case: Case, times: Mapping[str, Times]) -> list[Row]:
    """Return the table's rows for results of `measure`."""
    ours = times.get("tensorkv", {})
    rows = []
    for system, ways in times.items():
        for way, rounds in ways.items():
            baseline = None if system == "tensorkv" else ours.get(way, ours.get("pushpull"))
            rows.append(Row(case=case.name, system=system, way=way, figures=figures(rounds, baseline)))
    return rows
