"""Limits of memory and descriptors, as the system tells them: read before anything is allocated."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tensorkv.errors import MemoryLimitReached
from tensorkv.transport import memorylimits
from tensorkv.transport.memorylimits import check_room, trim_heap
from tensorkv.transport.segments import Segment

MB = 1 << 20


def limits(monkeypatch: pytest.MonkeyPatch, found: dict[int, int]) -> None:
    """Let the system tell these limits, and none else."""
    monkeypatch.setattr(
        memorylimits.resource, "getrlimit", lambda kind: (found.get(kind, resource.RLIM_INFINITY),) * 2
    )


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the control groups of this process be files of a folder."""
    limits(monkeypatch, {})
    monkeypatch.setattr(memorylimits, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memorylimits, "CGROUPS", tmp_path / "cgroup")
    (tmp_path / "proc").mkdir()

    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    return write


def test_a_system_without_limits_has_room() -> None:
    check_room(1 << 20)


def test_descriptors(monkeypatch: pytest.MonkeyPatch, count_descriptors: Callable[[], int]) -> None:
    used = count_descriptors()
    limits(monkeypatch, {resource.RLIMIT_NOFILE: used + 1})
    check_room(MB)
    limits(monkeypatch, {resource.RLIMIT_NOFILE: used})
    with pytest.raises(MemoryLimitReached, match=rf"no file descriptor .* of {used} are in use"):
        check_room(MB)


def test_address_space(monkeypatch: pytest.MonkeyPatch) -> None:
    limits(monkeypatch, {resource.RLIMIT_AS: 1 << 60})
    check_room(MB)
    limits(monkeypatch, {resource.RLIMIT_AS: 10 * MB})
    with pytest.raises(MemoryLimitReached, match=r"1048576 bytes .* address space .* of 10485760 bytes"):
        check_room(MB)


@pytest.mark.parametrize("size_mb", [10, 11])
@pytest.mark.parametrize(
    ("line", "folder", "names"),
    [
        ("0::/job/worker", "cgroup/job/worker", ("memory.current", "memory.max")),
        ("0::/job/worker", "cgroup/job", ("memory.current", "memory.max")),
        ("0::/", "cgroup", ("memory.current", "memory.max")),
        ("0::/not/seen/here", "cgroup", ("memory.current", "memory.max")),
        ("4:memory:/job", "cgroup/memory/job", ("memory.usage_in_bytes", "memory.limit_in_bytes")),
        ("4:cpu,memory:/", "cgroup/memory", ("memory.usage_in_bytes", "memory.limit_in_bytes")),
    ],
)
def test_a_control_group_and_those_it_is_in(
    groups: Any, line: str, folder: str, names: tuple[str, str], size_mb: int
) -> None:
    """Of 30 MB 25 are in use, of which 5 are pages of files that the kernel would give up."""
    groups("proc/cgroup", f"9:name=systemd:/x\n{line}\n")
    groups("cgroup/job/worker/memory.max", "max\n")
    groups(f"{folder}/{names[0]}", f"{25 * MB}\n")
    groups(f"{folder}/{names[1]}", f"{30 * MB}\n")
    groups(f"{folder}/memory.stat", f"anon 123\ninactive_file {3 * MB}\nactive_file {2 * MB}\n")
    if size_mb <= 10:
        check_room(size_mb * MB)
        return
    with pytest.raises(MemoryLimitReached, match=rf"{folder}: {20 * MB} of {30 * MB} bytes are in use"):
        check_room(size_mb * MB)


def test_a_system_without_control_groups(groups: Any) -> None:
    check_room(1 << 50)


def test_a_segment_over_the_limit_is_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "memfd_create", lambda *_: pytest.fail("it was allocated"))
    limits(monkeypatch, {resource.RLIMIT_AS: 10 * MB})
    with pytest.raises(MemoryLimitReached):
        Segment.create(1, 20 * MB, others_may_write=False)


SCRIPT = """
import resource
import torch
import tensorkv

with tensorkv.create("dist_sync", embedded=True, transport="shm") as kv:
    kv.init("small", torch.zeros(100_000))
    large = torch.zeros(50_000_000)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20), resource.RLIM_INFINITY))
    try:
        kv.init("large", large)
    except tensorkv.MemoryLimitReached as error:
        print("init:", error)
    try:
        kv.empty_like(["small"] * 2000)
    except tensorkv.MemoryLimitReached as error:
        print("empty_like:", error)
    kv.push("small", torch.ones(100_000))
    print(kv.keys(), kv.pull("small").unique().tolist())
"""


@pytest.mark.e2e
def test_what_a_job_cannot_hold_is_refused_with_the_numbers_and_it_goes_on() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 0, done.stderr
    init, lent, last = done.stdout.splitlines()
    told = r"init: server 0 on host .* has no memory for 200000000 bytes of key 'large': \d+ of \d+ bytes"
    assert re.match(told, init)
    assert "bytes of the address space of the process (ulimit -v) are in use" in init
    assert lent.startswith("empty_like: 800000000 bytes of shared memory are too many for the address space")
    assert last == "['small'] [1.0]"


SOCKETS = """
import resource, socket
from tensorkv.transport import tcp, unix

tcp_listener, unix_listener = tcp.TcpListener("127.0.0.1"), unix.UnixListener()
kept = []
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
try:
    while True:
        kept.append(socket.socket())
except OSError:
    pass
for connect in (tcp.connect, unix.connect):
    name, port = (tcp_listener if connect is tcp.connect else unix_listener).address
    try:
        connect(*((name, port) if connect is tcp.connect else (name,)), 1.0)
    except ConnectionError as error:
        print(error)
"""


def test_too_many_open_files_says_what_to_raise() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SOCKETS], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("Too many open files; raise the limit on open files (ulimit -n)" in line for line in lines)


def private_bytes() -> int:
    """Return the size of this process's own pages."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_Dirty:"))


def test_a_heap_that_is_trimmed_returns_what_was_freed() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = (ctypes.c_void_p,)
    size_bytes = 100_000  # too small for pages of its own
    pieces = [libc.malloc(size_bytes) for _ in range(1000)]
    for piece in pieces:
        ctypes.memset(piece, 1, size_bytes)
    for piece in pieces[:-1]:  # the last one keeps the end of the heap in use
        libc.free(piece)
    before_bytes = private_bytes()
    trim_heap()
    assert private_bytes() < before_bytes - 50_000_000
    libc.free(pieces[-1])
