"""`python -m tensorkv` is the command `tensorkv`."""

from __future__ import annotations

import subprocess
import sys

import tensorkv


def test_it_runs_the_command_line() -> None:
    command = [sys.executable, "-m", "tensorkv", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout) == (0, f"tensorkv {tensorkv.__version__}\n")


def test_importing_it_does_nothing() -> None:
    import tensorkv.__main__

    assert tensorkv.__main__.main.__module__ == "tensorkv.cli.main"
