"""Connections between threads of one process: queues of frames instead of sockets, for tests and debuggers.

Sending copies the frame, as a socket does.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import threading
from collections.abc import Sequence
from typing import final

from tensorkv.transport.base import TICK_S, Buffer, Connection, Listener, Sink, Tick, no_tick
from tensorkv.wire.codec import MAX_HANDSHAKE_BYTES, PREFIX, decode_prefix

_ports = itertools.count(1)
_listeners: dict[int, InprocListener] = {}

_Frame = tuple[bytes, bytes]


@final
class _Frames:
    """A queue of frames in one direction; None in it means that the connection has ended.

    The first call of `fileno` creates its descriptor for polling, an eventfd.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[_Frame | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards _event and its counter
        self._event = -1

    def put(self, frame: _Frame | None) -> None:
        with self._lock:
            self._queue.put(frame)
            if self._event >= 0:
                os.eventfd_write(self._event, 1)

    def get(self, timeout_s: float) -> _Frame | None:
        """Return the next frame; raises queue.Empty if none arrives within `timeout_s` seconds."""
        frame = self._queue.get(timeout_s > 0, timeout_s or None)
        if frame is None:
            self._queue.put(None)  # every later call finds the end, too
            return None
        with self._lock:
            if self._event >= 0:
                os.eventfd_read(self._event)
        return frame

    def empty(self) -> bool:
        return self._queue.empty()

    def fileno(self) -> int:
        with self._lock:
            if self._event < 0:
                flags = os.EFD_NONBLOCK | os.EFD_SEMAPHORE | os.EFD_CLOEXEC
                self._event = os.eventfd(self._queue.qsize(), flags)
            return self._event

    def close(self) -> None:
        with self._lock:
            if self._event >= 0:
                os.close(self._event)
                self._event = -1


@final
class InprocConnection(Connection):
    """One end of a pair of queues. `ended` is shared by both ends."""

    def __init__(self, incoming: _Frames, outgoing: _Frames, ended: threading.Event, peer: str) -> None:
        self.max_header_bytes = MAX_HANDSHAKE_BYTES
        self.peer = peer
        self._incoming, self._outgoing = incoming, outgoing
        self._ended = ended
        self._ended_here = False
        self._broken = False

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    @property
    def broken(self) -> bool:
        return self._broken

    @property
    def in_frame(self) -> bool:
        return False  # frames arrive whole

    def send_rest(self, buffers: Sequence[Buffer], tick: Tick = no_tick) -> None:
        if self._ended.is_set():
            raise ConnectionError(f"the connection to {self.peer} is gone")
        head, *parts = buffers
        self._outgoing.put((bytes(head), b"".join(parts)))

    def send_now(self, buffers: Sequence[Buffer]) -> list[Buffer]:
        self.send_rest(buffers)
        return []

    def receive(self, sink: Sink, tick: Tick = no_tick) -> None:
        while True:
            try:
                frame = self._incoming.get(TICK_S)
                break
            except queue.Empty:
                tick()
        self._take(frame, sink)

    def receive_now(self, sink: Sink) -> bool:
        try:
            frame = self._incoming.get(0)
        except queue.Empty:
            return False
        self._take(frame, sink)
        return True

    def _take(self, frame: _Frame | None, sink: Sink) -> None:
        if frame is None:
            if self._ended_here:
                raise ConnectionError(f"this side has ended the connection to {self.peer}")
            raise EOFError(f"{self.peer} ended the connection")
        head, payload = frame
        try:
            decode_prefix(head[: PREFIX.size], self.max_header_bytes)
            start = 0
            for buffer in sink(memoryview(head)[PREFIX.size :], len(payload)):
                buffer[:] = payload[start : start + len(buffer)]
                start += len(buffer)
        except Exception:
            self._broken = True
            raise

    @property
    def drained(self) -> bool:
        return self._incoming.empty()

    def fileno(self) -> int:
        return self._incoming.fileno()

    def readable(self) -> bool:
        return not self._incoming.empty()

    def notice_silence(self, timeout_s: float) -> None:
        """Do nothing: both ends are in one process, which ends as a whole."""

    def shutdown(self) -> None:
        self._ended_here = True
        self._ended.set()
        self._outgoing.put(None)
        self._incoming.put(None)

    def close(self) -> None:
        self.shutdown()
        self._incoming.close()


@final
class InprocListener(Listener):
    """Accepts connections from `connect` in the same process. Its port is a number unique in the process."""

    def __init__(self) -> None:
        self._port = next(_ports)
        self._waiting: queue.SimpleQueue[InprocConnection | None] = queue.SimpleQueue()
        _listeners[self._port] = self

    @property
    def address(self) -> tuple[str, int]:
        return ("inproc", self._port)

    def accept(self) -> Connection:
        connection = self._waiting.get()
        if connection is None:
            self._waiting.put(None)
            raise ConnectionError("the listener is closed")
        return connection

    def close(self) -> None:
        _listeners.pop(self._port, None)
        with contextlib.suppress(queue.Empty):  # connected, but not yet accepted
            while (connection := self._waiting.get_nowait()) is not None:
                connection.shutdown()
        self._waiting.put(None)

    def meet(self) -> InprocConnection:
        """Make a connected pair; queue one end for `accept` and return the other."""
        there = _Frames()
        back = _Frames()
        ended = threading.Event()
        self._waiting.put(InprocConnection(there, back, ended, "a thread of this process"))
        return InprocConnection(back, there, ended, f"inproc:{self._port}")


def connect(host: str, port: int, timeout_s: float) -> Connection:
    """Connect to the listener with this port.

    Raises:
        ConnectionError: nobody listens there.
    """
    listener = _listeners.get(port)
    if listener is None:
        raise ConnectionError(f"nobody listens at inproc:{port}")
    return listener.meet()
