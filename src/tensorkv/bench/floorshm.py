"""The floor through shared memory: see floor.py."""

from __future__ import annotations

import functools
import math
import mmap
import os
import socket
from contextlib import ExitStack
from multiprocessing.synchronize import Barrier

import torch

from tensorkv.bench.floorjob import Floor, run_job, set_deadline, take, timed
from tensorkv.bench.shapes import FLOAT_BYTES
from tensorkv.bench.steps import check_results, gradient_value

READY, STOP = b"r", b"s"


def measure_shm(floor: Floor) -> list[float]:
    """Return the seconds of each step through shared memory, seen by worker 0.

    Raises:
        FloorError: a process failed, the sums were wrong, or it took longer than `timeout_s`.
    """
    with ExitStack() as stack:
        descriptors = [_shared_memory(floor, stack) for _ in range(floor.num_workers + 1)]
        pairs = [[_socket_pair(floor, stack) for _ in floor.cuts()] for _ in range(floor.num_workers)]
        servers = [
            functools.partial(_shm_server, descriptors, cut, floor, [pair[index][0] for pair in pairs])
            for index, cut in enumerate(floor.cuts())
        ]
        workers = [
            functools.partial(_shm_worker, rank, descriptors, floor, [end for _, end in pair])
            for rank, pair in enumerate(pairs)
        ]
        return run_job(floor, servers, workers)


def _shared_memory(floor: Floor, stack: ExitStack) -> int:
    descriptor = os.memfd_create("floor")
    stack.callback(os.close, descriptor)
    os.ftruncate(descriptor, max(floor.num_elems * FLOAT_BYTES, mmap.PAGESIZE))
    return descriptor


def _socket_pair(floor: Floor, stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    ends = socket.socketpair()
    for end in ends:
        stack.enter_context(end)
        set_deadline(end, floor.timeout_s)
    return ends


def _map(descriptor: int, floor: Floor) -> torch.Tensor:
    mapped = mmap.mmap(descriptor, max(floor.num_elems * FLOAT_BYTES, mmap.PAGESIZE))
    return torch.frombuffer(mapped, dtype=torch.float32)[: floor.num_elems]


def _shm_server(
    descriptors: list[int], cut: tuple[int, int], floor: Floor, socks: list[socket.socket]
) -> None:
    torch.set_num_threads(1)
    stored, *pushed = (_map(descriptor, floor)[cut[0] : cut[1]] for descriptor in descriptors)
    while all(take(sock, 1) == READY for sock in socks):
        if len(pushed) == 1:
            stored.copy_(pushed[0])
        else:
            torch.add(pushed[0], pushed[1], out=stored)
        for more in pushed[2:]:
            stored.add_(more)
        for sock in socks:
            sock.sendall(READY)


def _shm_worker(
    rank: int, descriptors: list[int], floor: Floor, socks: list[socket.socket], barrier: Barrier
) -> list[float]:
    torch.set_num_threads(1)
    grads = [
        torch.full((math.prod(shape),), gradient_value(rank, 0, 1, 1.0), device="cpu")
        for shape in floor.shapes
    ]
    outs = [torch.full_like(grad, torch.nan) for grad in grads]
    window = _map(descriptors[1 + rank], floor)
    stored = list(torch.split(_map(descriptors[0], floor), [out.numel() for out in outs]))

    def step() -> None:
        torch.cat(grads, out=window)
        for sock in socks:
            sock.sendall(READY)
        for sock in socks:
            take(sock, 1)
        torch._foreach_copy_(outs, stored)

    times_s = timed(step, floor, barrier)
    check_results((out.numpy() for out in outs), floor.total)
    for sock in socks:
        sock.sendall(STOP)
    return times_s
