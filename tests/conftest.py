"""Fixtures of every test: seeds, a clean environment, and no leaks.

A test fails if it leaks a thread, a child process or a socket. Those that end by themselves within a few
seconds of the test's end are not leaks.
"""

from __future__ import annotations

import gc
import os
import random
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# Set before torch is imported, here or in a process of a test: whole jobs run on few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import numpy as np
import pytest
import torch

pytest_plugins = ["barepeers"]  # in tests/helpers

SEED = int(os.environ.get("TEST_SEED", "0"))
GRACE_S = 10.0

# nohup, and a script's background, ignore these signals. Processes of tests would inherit that, and some
# tests wait for the signals' effect. Handlers other than SIG_IGN stay.
for _signum, _usual in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(_signum) is signal.SIG_IGN:
        signal.signal(_signum, _usual)

hypothesis.settings.register_profile("tensorkv", deadline=None, print_blob=True)
hypothesis.settings.load_profile("tensorkv")


def pytest_report_header() -> str:
    """Print the seed of this run."""
    return f"seed of random, numpy and torch: {SEED} (TEST_SEED sets it)"


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Seed every test with the same numbers."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.default_generator.manual_seed(SEED)  # `torch.manual_seed` formats a stack for each other device


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Run every test outside a job, and restore the environment after it."""
    before = dict(os.environ)
    for name in before:
        if name.startswith("TENSORKV_"):
            del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Fail a test that leaks threads, child processes or sockets."""
    threads, children, sockets = _threads(), _children(), _sockets()
    yield
    deadline = time.monotonic() + GRACE_S
    left = [
        *_left_threads(threads, deadline),
        *_left_children(children, deadline),
        *_left_sockets(sockets),
    ]
    if left:
        pytest.fail("the test left behind: " + "; ".join(left), pytrace=False)


@pytest.fixture
def count_descriptors() -> Callable[[], int]:
    """Return a function that counts this process's open descriptors; collects other tests' garbage first."""
    gc.collect()
    return lambda: len(os.listdir("/proc/self/fd"))


def _threads() -> set[threading.Thread]:
    return set(threading.enumerate())


def _left_threads(before: set[threading.Thread], deadline: float) -> list[str]:
    new = _threads() - before
    for thread in new:
        thread.join(max(0.0, deadline - time.monotonic()))
    return [f"thread {thread.name!r}" for thread in new if thread.is_alive()]


def _children() -> set[int]:
    pids: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            pids.update(int(pid) for pid in (task / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue  # that thread has just ended
    return {pid for pid in pids if not _is_helper(pid)}


def _is_helper(pid: int) -> bool:
    """Whether a child belongs to multiprocessing itself, and lives as long as this process."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return True  # already gone
    return b"multiprocessing.resource_tracker" in command or b"multiprocessing.forkserver" in command


def _left_children(before: set[int], deadline: float) -> list[str]:
    for pid in _children() - before:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        os.close(handle)
    return [f"child process {pid}: {_command(pid)}" for pid in sorted(_children() - before)]


def _command(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    return command.replace(b"\0", b" ").decode(errors="replace") or "ended, but nobody waited for it"


def _sockets() -> set[str]:
    names: set[str] = set()
    for entry in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
        except FileNotFoundError:
            continue  # the descriptor of this listing
        if target.startswith("socket:"):
            names.add(target)
    return names


def _left_sockets(before: set[str]) -> list[str]:
    if _sockets() - before:
        gc.collect()  # a socket held only by a garbage cycle reports itself by a ResourceWarning
    return sorted(_sockets() - before)
