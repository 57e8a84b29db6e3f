"""Kills the processes of a job when its launcher has died. Run as a script, by its path.

    python -I -S reaper.py < PIPE

The launcher writes "+PID" for each process group it starts and "-PID" when it has ended it. It holds the only
writing end of the pipe: end of file means that it has died, and the groups still listed are killed. A
launcher that exits in an orderly way has removed all of them before, and starts another reaper if this one
is killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterable


def watch(lines: Iterable[str], kill: Callable[[int, int], None]) -> None:
    """Follow `lines` to their end, then `kill(group, SIGKILL)` each group that is still listed."""
    groups: set[int] = set()
    for line in lines:
        if not line.endswith("\n"):
            break  # the write was cut off: the number may be incomplete
        number = int(line[1:])
        if line[0] == "+":
            groups.add(number)
        else:
            groups.discard(number)
    for group in sorted(groups):
        with contextlib.suppress(ProcessLookupError):  # it ended before us
            kill(group, signal.SIGKILL)


if __name__ == "__main__":
    watch(sys.stdin, os.killpg)
