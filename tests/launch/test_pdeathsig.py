"""The script that becomes a process of the job. It replaces itself, so it is run in a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tensorkv.launch import pdeathsig


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-S", pdeathsig.__file__, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_it_becomes_the_command_with_its_own_name_for_it() -> None:
    done = run(str(os.getpid()), "/bin/sh", "a name", "-c", "echo $0; exit 5")
    assert (done.returncode, done.stdout, done.stderr) == (5, "a name\n", "")


def test_a_launcher_that_is_gone_already_takes_it_along() -> None:
    done = run("1", "/bin/sh", "sh", "-c", "echo alive")
    assert (done.returncode, done.stdout) == (128 + signal.SIGKILL, "")


def test_what_cannot_be_run_is_status_126() -> None:
    done = run(str(os.getpid()), os.devnull, "null")
    assert (done.returncode, done.stderr) == (
        126,
        f"tensorkv: {os.devnull} cannot be run: Permission denied\n",
    )


def test_main_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[object]()
    monkeypatch.setattr(pdeathsig, "die_with", calls.append)
    monkeypatch.setattr(signal, "signal", lambda number, handler: calls.append((number, handler)))
    monkeypatch.setattr(os, "execv", lambda *arguments: calls.append(arguments))
    pdeathsig.main("12", "/bin/sh", "sh", "-c", "true")
    assert calls == [
        12,
        (signal.SIGPIPE, signal.SIG_DFL),
        (signal.SIGXFSZ, signal.SIG_DFL),
        ("/bin/sh", ("sh", "-c", "true")),
    ]
