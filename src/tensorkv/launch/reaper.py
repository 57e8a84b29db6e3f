"""Kills the processes of a job when its launcher is gone. Run as a script, by its path.

    python -I -S reaper.py < PIPE

The launcher writes "+PID" for each process group it starts and "-PID" when it has ended it. It holds
the only writing end of the pipe: at end of file it is gone, and the groups still listed are killed.
A launcher that ends in an orderly way has taken all of them back before, and one whose guard is killed
starts another.
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
            break  # cut off while it was written: the number may be a part of one
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
