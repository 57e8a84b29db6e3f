"""Memory of the processes of a job, as the kernel counts it: PSS, or what a process would free by its end."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tensorkv.config import ENV_RANK, ENV_ROLE

PROC = Path("/proc")


def pss_bytes(pid: int) -> int:
    """Return the proportional set size of a process of this user; 0 if it is gone."""
    try:
        for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    return 0


def own_bytes(pid: int) -> int:
    """Return the size of a process's private pages, and of those that it has written in segments of its own.

    A server's segments hold its values. It maps the windows of workers too, but only to read them. 0 if the
    process is gone.
    """
    found = 0
    try:
        mapped = (PROC / str(pid) / "smaps").read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    counted: tuple[str, ...] = ()
    for line in mapped.splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):  # the first line of a mapping: its range, rights, ..., file
            is_segment = "memfd:tensorkv" in line
            counted = () if is_segment else ("Private_Clean:", "Private_Dirty:")
            if is_segment and "w" in rest[0]:
                counted = ("Rss:",)
        elif name in counted:
            found += int(rest[0]) << 10
    return found


def pss_of_job() -> dict[str, int]:
    """Return the PSS, by name such as "server 0", of the processes of this job with the same parent.

    Under `tensorkv run` these are all processes of this host except the launcher.
    """
    return _of_job(pss_bytes)


def own_of_job() -> dict[str, int]:
    """Return what `own_bytes` counts, by name, of the same processes."""
    return _of_job(own_bytes)


def _of_job(measure: Callable[[int], int]) -> dict[str, int]:
    found: dict[str, int] = {}
    for pid in _children(os.getppid()):
        environ = _environ(pid)
        role, rank = environ.get(ENV_ROLE), environ.get(ENV_RANK)
        if role is not None and rank is not None:
            found[f"{role} {rank}"] = measure(pid)
    return dict(sorted(found.items()))


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in (PROC / str(pid) / "task").iterdir():
        try:
            found += map(int, (task / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):  # that thread has ended
            continue
    return found


def _environ(pid: int) -> dict[str, str]:
    try:
        raw = (PROC / str(pid) / "environ").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return {}
    pairs = (each.partition("=") for each in raw.decode(errors="replace").split("\0"))
    return {name: value for name, _, value in pairs}
