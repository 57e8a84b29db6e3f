"""The processes of a floor measurement: how much they move, and how they start, end and report.

The ways themselves are in floorshm.py, floortcp.py and floorlocal.py; floor.py runs them.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import multiprocessing as mp
import socket
import struct
import time
from collections.abc import Callable, Sequence
from ctypes import c_double
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from multiprocessing.sharedctypes import RawArray
from multiprocessing.synchronize import Barrier

from tensorkv.bench.shapes import FLOAT_BYTES, Shape, num_elems
from tensorkv.bench.steps import gradient_value, time_steps

MIN_SHARE_BYTES = 4096
"""Minimum size of a server's share; less is not worth a message."""

_FORK = mp.get_context("fork")  # the processes inherit descriptors and sockets

ServerMain = Callable[[], None]
WorkerMain = Callable[[Barrier], list[float]]


class FloorError(Exception):
    """A process of the floor failed or did not end in time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """One measurement: the processes, the tensors they move, and how often."""

    shapes: list[Shape]
    num_workers: int = 2
    num_servers: int = 2
    warmup: int = 3
    steps: int = 10
    timeout_s: float = 120.0

    @property
    def num_elems(self) -> int:
        """Number of floats in all shapes together."""
        return num_elems(self.shapes)

    @property
    def total(self) -> float:
        """The value of every element of the sum."""
        return sum(gradient_value(rank, 0, 1, 1.0) for rank in range(self.num_workers))

    def cuts(self) -> list[tuple[int, int]]:
        """Return the range of elements of each server that gets any."""
        num = max(1, min(self.num_servers, self.num_elems * FLOAT_BYTES // MIN_SHARE_BYTES))
        edges = [self.num_elems * index // num for index in range(num + 1)]
        return list(itertools.pairwise(edges))


def run_job(floor: Floor, servers: Sequence[ServerMain], workers: Sequence[WorkerMain]) -> list[float]:
    """Run each in its own process, end them whatever happens, and return worker 0's times.

    Raises:
        FloorError: a process failed, or the whole took longer than `floor.timeout_s`.
    """
    barrier = _FORK.Barrier(len(workers))
    times_s = RawArray(c_double, floor.steps)
    processes = [_FORK.Process(target=main, daemon=True) for main in servers]
    for rank, main in enumerate(workers):
        target = functools.partial(_work, main, barrier, times_s if rank == 0 else None)
        processes.append(_FORK.Process(target=target, daemon=True))
    try:
        for process in processes:
            process.start()
        _join(processes, floor.timeout_s)
        return list(times_s)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()


def _work(main: WorkerMain, barrier: Barrier, report: ctypes.Array[c_double] | None) -> None:
    times_s = main(barrier)
    if report is not None:
        for index, time_s in enumerate(times_s):
            report[index] = time_s


def _join(processes: Sequence[ForkProcess], timeout_s: float) -> None:
    """Wait for all; raise as soon as one fails or the time is up."""
    deadline = time.monotonic() + timeout_s
    running = list(processes)
    while running:
        ended = wait([process.sentinel for process in running], max(0.0, deadline - time.monotonic()))
        if not ended:
            raise FloorError(f"{len(running)} processes of the floor still run after {timeout_s} s")
        for process in [each for each in running if each.sentinel in ended]:
            process.join()
            running.remove(process)
            if process.exitcode != 0:
                raise FloorError(f"a process of the floor ended with {process.exitcode}; see its traceback")


def timed(step: Callable[[], None], floor: Floor, barrier: Barrier) -> list[float]:
    """Warm up, then return the seconds of each step. For workers."""

    def ready() -> None:
        barrier.wait(floor.timeout_s)

    time_steps(step, ready, floor.warmup)
    times_s = time_steps(step, ready, floor.steps)
    ready()
    return times_s


def set_deadline(sock: socket.socket, timeout_s: float) -> None:
    """Set a timeout for every receive and send, but leave the socket blocking: MSG_WAITALL needs that."""
    sock.setblocking(True)
    value = struct.pack("ll", int(timeout_s), 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)


def take(sock: socket.socket, num_bytes: int) -> bytes:
    """Receive a few bytes; b"" at the end of the stream."""
    return sock.recv(num_bytes, socket.MSG_WAITALL)
