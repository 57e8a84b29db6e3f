"""Becomes the command of one process of a job. The launcher runs it as a script, by its path.

    python -I -S pdeathsig.py LAUNCHER_PID EXECUTABLE ARGV0 [ARGUMENT ...]

It asks the kernel to kill this process when the launcher dies, then execs the command. A launcher with
threads cannot do that between fork and exec, hence this script. It imports little, and nothing of TensorKV,
since every process of a job waits for it.
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
    if os.getppid() != launcher_pid:  # the launcher died before the request
        os._exit(128 + signal.SIGKILL)


def main(launcher_pid: str, executable: str, *argv: str) -> None:
    """Exec `executable`; raises SystemExit with 126 if that fails."""
    die_with(int(launcher_pid))
    # Python ignores these two when it starts, and ignored signals stay ignored across an exec.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        os.execv(executable, argv)
    except OSError as exc:
        sys.stderr.write(f"tensorkv: {executable} cannot be run: {exc.strerror}\n")
        sys.exit(126)


if __name__ == "__main__":
    main(*sys.argv[1:])
