"""Signals to the processes of a real job."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

DEADLINE_S = 60.0

ONE_SLEEPS = """
import os, signal, time
import torch
import tensorkv
from tensorkv.peer import deadlines

signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a tool that measures coverage may have one
deadlines.LOG_EVERY_S = 0.5
kv = tensorkv.create("dist_sync")
kv.init("w", torch.zeros(4))
kv.barrier()
print("pid", kv.rank, os.getpid(), flush=True)
if kv.rank == 1:
    while True:
        time.sleep(1000)
kv.push("w", torch.ones(4))
print("pulled", kv.pull("w").tolist(), flush=True)
"""


class Started:
    """A job of two workers and a server that have all joined; worker 1 sleeps, worker 0 waits for it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.pids = {}
        for _ in range(2):
            rank, pid = self.line_with(r"pid (\d) (\d+)").groups()
            self.pids[int(rank)] = int(pid)

    def line_with(self, pattern: str) -> re.Match[str]:
        """Read on to a line that has `pattern` in it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            found = re.search(pattern, line)
            if found:
                return found
        raise AssertionError(f"the job ended without a line like {pattern}")

    def end(self) -> tuple[int, str]:
        out, _ = self.process.communicate(timeout=DEADLINE_S)
        return self.process.returncode, out


@contextmanager
def started(tmp_path: Path, script: str) -> Iterator[Started]:
    path = tmp_path / "train.py"
    path.write_text(script)
    command = [sys.executable, "-m", "tensorkv", "run", "-n", "2", "--", sys.executable, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield Started(process)
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=DEADLINE_S)


@pytest.mark.slow
def test_the_log_and_a_report_say_who_waits_for_whom(tmp_path: Path) -> None:
    with started(tmp_path, ONE_SLEEPS) as job:
        job.line_with(r"^\[worker 0\] pull of 'w': waiting for worker 1, round 1 of 'w', \d+ s$")
        job.process.send_signal(signal.SIGUSR1)
        patterns = [
            r"^tensorkv: nothing waits at the scheduler",
            r"^\[server 0\] tensorkv: server 0 \(process \d+ on .*\):",
            r"^\[server 0\]   store 'default': round 1 of 'w' waits for worker 1",
            r"^\[worker 0\]   MainThread: pull of 'w', since \d+ s: waiting for worker 1, round 1 of 'w'",
            r"^\[worker 0\]   MainThread is at .*train.py:17 in <module>",
            r"^\[worker 1\] tensorkv: worker 1 \(process \d+ on .*\): no call waits",
            # It sleeps at line 15, if it is not on its way from line 12 yet.
            r"^\[worker 1\]   MainThread is at .*train.py:1[2-5] in <module>",
        ]
        while patterns:
            found = job.line_with("|".join(patterns)).string
            patterns = [each for each in patterns if not re.search(each, found)]


@pytest.mark.slow
def test_term_to_a_worker_is_leaving(tmp_path: Path) -> None:
    with started(tmp_path, ONE_SLEEPS) as job:
        os.kill(job.pids[1], signal.SIGTERM)
        status, out = job.end()
    assert "[worker 0] pulled [1.0, 1.0, 1.0, 1.0]" in out
    assert status == 0


@pytest.mark.slow
def test_term_to_a_server_is_a_loss_with_a_name(tmp_path: Path) -> None:
    with started(tmp_path, ONE_SLEEPS) as job:
        job.process.send_signal(signal.SIGUSR1)
        server = int(job.line_with(r"server 0 \(process (\d+)").group(1))
        os.kill(server, signal.SIGTERM)
        status, out = job.end()
    assert re.search(r"PeerLostError: server 0 on host .* was lost: it was ended by SIGTERM", out)
    assert out.splitlines()[-1] == "tensorkv: server 0 failed with status 143 (SIGTERM); the job was ended"
    assert status == 1
