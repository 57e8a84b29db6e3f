"""What the processes of a job take."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys

import pytest

from tensorkv.bench import memory
from tensorkv.bench.memory import own_bytes, own_of_job, pss_bytes, pss_of_job


def test_a_process_that_takes_memory_has_grown() -> None:
    before = pss_bytes(os.getpid())
    block = b"x" * (64 << 20)
    assert pss_bytes(os.getpid()) - before > 60 << 20
    del block


def test_a_process_that_is_gone_takes_nothing() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert pss_bytes(child.pid) == own_bytes(child.pid) == 0


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
    assert own_of_job().keys() == found.keys()
    for child in children:
        child.communicate(b"\n")
    assert list(found) == ["server 3"]
    assert found["server 3"] > 1 << 20


@pytest.mark.parametrize(("writes", "num_mib"), [(True, 64), (False, 0)])
def test_only_segments_that_a_process_writes_are_its_own(writes: bool, num_mib: int) -> None:
    descriptor = os.memfd_create("tensorkv")
    os.ftruncate(descriptor, 64 << 20)
    before = own_bytes(os.getpid())
    segment = mmap.mmap(descriptor, 64 << 20, prot=mmap.PROT_READ | (mmap.PROT_WRITE if writes else 0))
    if writes:
        segment.write(bytes(64 << 20))
    else:
        assert not any(segment[at] for at in range(0, 64 << 20, mmap.PAGESIZE))
    grown = own_bytes(os.getpid()) - before
    segment.close()
    os.close(descriptor)
    assert abs(grown - (num_mib << 20)) < 4 << 20


def test_private_memory_is_a_processes_own() -> None:
    before = own_bytes(os.getpid())
    block = b"x" * (64 << 20)
    assert own_bytes(os.getpid()) - before > 60 << 20
    del block
