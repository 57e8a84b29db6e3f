"""The floor over loopback TCP: see floor.py."""

from __future__ import annotations

import functools
import queue
import socket
import struct
import threading
from contextlib import ExitStack
from multiprocessing.synchronize import Barrier

import numpy as np

from tensorkv.addresses import LOOPBACK
from tensorkv.bench.floorjob import Floor, FloorError, run_job, set_deadline, take, timed
from tensorkv.bench.shapes import FLOAT_BYTES
from tensorkv.bench.steps import check_results, gradient_value
from tensorkv.transport.tcp import listening_socket

CHUNK_BYTES = 1 << 20
_INDEX = struct.Struct("q")


def measure_tcp(floor: Floor) -> list[float]:
    """Return the seconds of each step over loopback TCP, seen by worker 0.

    Raises:
        FloorError: as for `measure_shm`.
    """
    with ExitStack() as stack:
        listeners = [stack.enter_context(listening_socket(LOOPBACK)) for _ in floor.cuts()]
        for listener in listeners:
            listener.settimeout(floor.timeout_s)
        addresses = [listener.getsockname()[:2] for listener in listeners]
        servers = [
            functools.partial(_tcp_server, listener, cut, floor)
            for listener, cut in zip(listeners, floor.cuts(), strict=True)
        ]
        workers = [
            functools.partial(_tcp_worker, rank, addresses, floor) for rank in range(floor.num_workers)
        ]
        return run_job(floor, servers, workers)


def _receive(sock: socket.socket, into: memoryview) -> None:
    """Fill `into`. A signal may interrupt a call early, hence the loop."""
    got = 0
    while got < len(into):
        count = sock.recv_into(into[got:], 0, socket.MSG_WAITALL)
        if count == 0:
            raise FloorError("the peer closed its connection inside a chunk")
        got += count


def _send(sock: socket.socket, index: int, chunk: memoryview) -> None:
    header = _INDEX.pack(index)
    sent = sock.sendmsg([header, chunk])
    if sent < len(header):
        raise FloorError("not even a header could be sent")
    sock.sendall(chunk[sent - len(header) :])


def _chunks(num_bytes: int) -> list[tuple[int, int]]:
    """Cut `num_bytes` bytes into ranges of at most CHUNK_BYTES each."""
    return [(start, min(start + CHUNK_BYTES, num_bytes)) for start in range(0, num_bytes, CHUNK_BYTES)]


class _Shard:
    """One server's range of the values: the contribution of each worker, and the sum."""

    def __init__(self, num_elems: int, floor: Floor) -> None:
        self.chunks = _chunks(num_elems * FLOAT_BYTES)
        self._num_workers = floor.num_workers
        self._stored = np.zeros(num_elems, np.float32)
        self._pushed = [np.zeros(num_elems, np.float32) for _ in range(floor.num_workers)]
        self.stored_bytes = self._stored.data.cast("B")
        self.pushed_bytes = [each.data.cast("B") for each in self._pushed]
        self._arrived = [0] * len(self.chunks)
        self._lock = threading.Lock()

    def arrive(self, index: int) -> bool:
        """Count a worker's chunk; sum it and return True if it is the last worker's."""
        with self._lock:
            self._arrived[index] += 1
            if self._arrived[index] < self._num_workers:
                return False
            self._arrived[index] = 0
        part = slice(*(edge // FLOAT_BYTES for edge in self.chunks[index]))
        stored = self._stored[part]
        if self._num_workers == 1:
            stored[:] = self._pushed[0][part]
        else:
            np.add(self._pushed[0][part], self._pushed[1][part], out=stored)
        for more in self._pushed[2:]:
            stored += more[part]
        return True


def _tcp_server(listener: socket.socket, cut: tuple[int, int], floor: Floor) -> None:
    shard = _Shard(cut[1] - cut[0], floor)
    socks = [listener.accept()[0] for _ in range(floor.num_workers)]
    outboxes: list[queue.SimpleQueue[int | None]] = [queue.SimpleQueue() for _ in socks]
    ranks = []
    for sock in socks:
        _tune(sock, floor)
        ranks.append(_INDEX.unpack(take(sock, _INDEX.size))[0])

    def read(sock: socket.socket, rank: int, outbox: queue.SimpleQueue[int | None]) -> None:
        try:
            while header := take(sock, _INDEX.size):
                (index,) = _INDEX.unpack(header)
                start, stop = shard.chunks[index]
                _receive(sock, shard.pushed_bytes[rank][start:stop])
                if shard.arrive(index):
                    for box in outboxes:
                        box.put(index)
        finally:
            outbox.put(None)

    def write(sock: socket.socket, outbox: queue.SimpleQueue[int | None]) -> None:
        while (index := outbox.get()) is not None:
            start, stop = shard.chunks[index]
            _send(sock, index, shard.stored_bytes[start:stop])

    threads = [threading.Thread(target=read, args=each) for each in zip(socks, ranks, outboxes, strict=True)]
    threads += [threading.Thread(target=write, args=each) for each in zip(socks, outboxes, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _tune(sock: socket.socket, floor: Floor) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    set_deadline(sock, floor.timeout_s)


class _Connection:
    """A worker's connection to one server: sends the gradient's chunks and fetches the sums."""

    def __init__(self, address: tuple[str, int], rank: int, grad: memoryview, out: memoryview, floor: Floor):
        self._sock = socket.create_connection(address, timeout=floor.timeout_s)
        _tune(self._sock, floor)
        self._sock.sendall(_INDEX.pack(rank))
        self._chunks = _chunks(len(grad))
        self._grad, self._out = grad, out

    def send(self) -> None:
        for index, (start, stop) in enumerate(self._chunks):
            _send(self._sock, index, self._grad[start:stop])

    def fetch(self) -> None:
        for _ in self._chunks:
            (index,) = _INDEX.unpack(take(self._sock, _INDEX.size))
            start, stop = self._chunks[index]
            _receive(self._sock, self._out[start:stop])

    def close(self) -> None:
        self._sock.close()


def _tcp_worker(rank: int, addresses: list[tuple[str, int]], floor: Floor, barrier: Barrier) -> list[float]:
    grad = np.full(floor.num_elems, gradient_value(rank, 0, 1, 1.0), np.float32)
    out = np.full(floor.num_elems, np.nan, np.float32)
    connections = [
        _Connection(address, rank, grad[a:b].data.cast("B"), out[a:b].data.cast("B"), floor)
        for address, (a, b) in zip(addresses, floor.cuts(), strict=True)
    ]
    go: list[queue.SimpleQueue[bool]] = [queue.SimpleQueue() for _ in connections]
    threads = [
        threading.Thread(target=_send_on_demand, args=(connection, box), daemon=True)
        for connection, box in zip(connections, go, strict=True)
    ]
    small = floor.num_elems * FLOAT_BYTES <= CHUNK_BYTES  # threads would cost more than they save

    def step() -> None:
        for connection, box in zip(connections, go, strict=True):
            connection.send() if small else box.put(True)
        for connection in connections:
            connection.fetch()

    for thread in threads:
        thread.start()
    times_s = timed(step, floor, barrier)
    for box, thread in zip(go, threads, strict=True):
        box.put(False)
        thread.join(floor.timeout_s)
    check_results([out], floor.total)
    for connection in connections:
        connection.close()
    return times_s


def _send_on_demand(connection: _Connection, box: queue.SimpleQueue[bool]) -> None:
    while box.get():
        connection.send()
