"""Becomes the command of one process of a job. Run as a script, by its path, by the launcher.

    python -I -S pdeathsig.py LAUNCHER_PID EXECUTABLE ARGV0 [ARGUMENT ...]

Asks the kernel to kill this process when the launcher dies, then replaces itself by the command. That
cannot be done from a launcher with threads between fork and exec, hence this script. Imports little,
and nothing of TensorKV: every process of a job waits for it.
"""

from __future__ import annotations

import os
import signal
import sys


def die_with(launcher_pid: int) -> None:
    """Have the kernel kill this process when its parent, `launcher_pid`, dies. Linux only."""
    if sys.platform != "linux":
        return
    import ctypes

    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != launcher_pid:  # it died before the request
        os._exit(128 + signal.SIGKILL)


def main(launcher_pid: str, executable: str, *argv: str) -> None:
    """Become `executable`; returns only by SystemExit, with 126, if that cannot be run."""
    die_with(int(launcher_pid))
    # Python ignores these two at its start, and what is ignored stays so over an exec.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        os.execv(executable, argv)
    except OSError as exc:
        sys.stderr.write(f"tensorkv: {executable} cannot be run: {exc.strerror}\n")
        sys.exit(126)


if __name__ == "__main__":
    main(*sys.argv[1:])
