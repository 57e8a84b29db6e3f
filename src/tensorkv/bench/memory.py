"""Memory of the processes of a job, with shared pages divided among their users: PSS, from `smaps_rollup`."""

from __future__ import annotations

import os
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


def pss_of_job() -> dict[str, int]:
    """Return the PSS, by name such as "server 0", of the processes of this job with the same parent.

    Under `tensorkv run` these are all processes of this host except the launcher.
    """
    found: dict[str, int] = {}
    for pid in _children(os.getppid()):
        environ = _environ(pid)
        role, rank = environ.get(ENV_ROLE), environ.get(ENV_RANK)
        if role is not None and rank is not None:
            found[f"{role} {rank}"] = pss_bytes(pid)
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
