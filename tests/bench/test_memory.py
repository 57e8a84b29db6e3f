"""What the processes of a job take."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tensorkv.bench import memory
from tensorkv.bench.memory import pss_bytes, pss_of_job


def test_a_process_that_takes_memory_has_grown() -> None:
    before = pss_bytes(os.getpid())
    block = b"x" * (64 << 20)
    assert pss_bytes(os.getpid()) - before > 60 << 20
    del block


def test_a_process_that_is_gone_takes_nothing() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert pss_bytes(child.pid) == 0


def test_processes_of_a_job_are_known_by_their_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "print(flush=True); input()"
    job = {"TENSORKV_ROLE": "server", "TENSORKV_RANK": "3"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, **extra},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for extra in (job, {})
    ]
    for child in children:
        assert child.stdout is not None
        child.stdout.readline()
    monkeypatch.setattr(memory.os, "getppid", os.getpid)
    found = pss_of_job()
    for child in children:
        child.communicate(b"\n")
    assert list(found) == ["server 3"]
    assert found["server 3"] > 1 << 20
