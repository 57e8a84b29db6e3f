"""TCP: blocking sockets, `sendmsg` out and `recvmsg_into` straight into place.

Deadlines are the kernel's, by SO_RCVTIMEO and SO_SNDTIMEO: `settimeout` would make the socket
non-blocking underneath and so defeat MSG_WAITALL (61 calls instead of 1 for 4 MB, measured).
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import struct
import threading
import time
import weakref
from collections.abc import Sequence
from typing import final

from tensorkv.transport.base import TICK_S, Buffer, Connection, Listener, Sink, Tick, no_tick
from tensorkv.wire.codec import MAX_HANDSHAKE_BYTES, PREFIX_BYTES, decode_prefix

logger = logging.getLogger(__name__)
MAX_BUFFERS = 1024
"""What one sendmsg or recvmsg takes (IOV_MAX)."""

LOOK_AHEAD_BYTES = 32 << 10
"""Frames are received through a buffer of this size; what does not fit goes straight into place."""

_MAX_KEEPALIVE_S = 32767  # what Linux takes for TCP_KEEPIDLE
_TICK = struct.pack("ll", int(TICK_S), int(TICK_S % 1 * 1e6))
_open_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


@final
class TcpConnection(Connection):
    """A connected socket that carries frames."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        sock.setblocking(True)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TICK)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TICK)
        _open_sockets.add(sock)
        self.max_header_bytes = MAX_HANDSHAKE_BYTES
        self.peer = peer
        self._sock = sock
        self._ahead = memoryview(bytearray(LOOK_AHEAD_BYTES))  # received, but not yet taken
        self._ahead_start = self._ahead_stop = 0
        self._short = False  # whether the last receive found less than it had room for
        self._broken = False
        self._rest: list[Buffer] | None = None  # of the present frame's payload
        self._ended_here = False
        self._next_tick = 0.0  # when `receive` looks up although bytes come; 0 before the first piece
        self._poll = select.poll()  # select() refuses descriptors above 1023
        self._poll.register(sock, select.POLLIN)

    @property
    def broken(self) -> bool:
        return self._broken

    def send_rest(self, buffers: Sequence[Buffer], tick: Tick = no_tick) -> None:
        rest = list(buffers)
        try:
            while rest:
                try:
                    rest = _after(rest, self._sendmsg(rest, 0))
                except BlockingIOError:
                    tick()
        except BaseException:
            self._broken = True
            raise

    def send_now(self, buffers: Sequence[Buffer]) -> list[Buffer]:
        rest: list[Buffer] = buffers if isinstance(buffers, list) else list(buffers)
        try:
            while rest:
                rest = _after(rest, self._sendmsg(rest, socket.MSG_DONTWAIT))
        except BlockingIOError:
            pass  # the rest is the answer
        return rest

    def _sendmsg(self, buffers: list[Buffer], flags: int) -> int:
        try:
            if len(buffers) == 1:
                return self._sock.send(buffers[0], flags)
            return self._sock.sendmsg(buffers[:MAX_BUFFERS], (), flags)
        except BlockingIOError:
            raise
        except OSError as exc:
            self._broken = True
            raise ConnectionError(f"the connection to {self.peer} is gone: {exc}") from exc

    def receive(self, sink: Sink, tick: Tick = no_tick) -> None:
        self._next_tick = 0.0
        while True:
            try:
                self._advance(sink, 0)
                return
            except BlockingIOError:
                self._next_tick = 0.0  # a tick has passed
            try:
                tick()
            except BaseException:
                self._broken = self._broken or self.in_frame
                raise

    def receive_now(self, sink: Sink) -> bool:
        try:
            self._advance(sink, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        return True

    @property
    def in_frame(self) -> bool:
        return self._rest is not None or self._ahead_start < self._ahead_stop

    def _advance(self, sink: Sink, flags: int) -> None:
        """Go on with the present frame to its end; BlockingIOError where more must come first."""
        try:
            if self._rest is None:
                self._rest = self._begin_frame(sink, flags)
            while self._rest:
                self._short = False
                got = self._receive_some(self._rest[:MAX_BUFFERS], flags | socket.MSG_WAITALL)
                self._rest = _after(self._rest, got)
                if self._rest and not flags:
                    self._look_up()
            self._rest = None
        except BlockingIOError:
            raise
        except BaseException:  # Ctrl-C too: what has just come may be lost
            self._broken = self._broken or self.in_frame
            raise

    def _begin_frame(self, sink: Sink, flags: int) -> list[Buffer]:
        """Receive prefix and message, and return the buffers that the payload has yet to fill."""
        if self._ahead_stop - self._ahead_start < PREFIX_BYTES:
            self._look_ahead(PREFIX_BYTES, flags)
        try:
            header_bytes, payload_bytes = decode_prefix(self._ahead, self.max_header_bytes, self._ahead_start)
            size_bytes = PREFIX_BYTES + header_bytes
            if self._ahead_stop - self._ahead_start < size_bytes:
                self._look_ahead(size_bytes, flags)
            start = self._ahead_start
            stop = self._ahead_start = start + size_bytes
            buffers = sink(self._ahead[start + PREFIX_BYTES : stop], payload_bytes)
            if not payload_bytes:
                return []
            if len(buffers) == 1 and payload_bytes <= self._ahead_stop - stop:  # a small payload, mostly
                self._ahead_start += payload_bytes
                buffers[0][:] = self._ahead[stop : self._ahead_start]
                return []
            return self._fill_from_ahead(buffers)
        except BlockingIOError:
            raise
        except BaseException:
            self._broken = True
            raise

    def _look_ahead(self, size_bytes: int, flags: int) -> None:
        """Have at least `size_bytes` bytes in the look-ahead buffer, and what else has come.

        So a small frame, or several, cost one call.
        """
        space, start, stop = self._ahead, self._ahead_start, self._ahead_stop
        if size_bytes > len(space) or len(space) > LOOK_AHEAD_BYTES >= size_bytes:
            space = memoryview(bytearray(max(size_bytes, LOOK_AHEAD_BYTES)))
        if start == stop:
            start = stop = 0
        elif space is not self._ahead or start + size_bytes > len(space):
            space[: stop - start] = self._ahead[start:stop]
            start, stop = 0, stop - start
        self._ahead, self._ahead_start, self._ahead_stop = space, start, stop
        while True:
            space[stop] = 0  # no frame begins so: it tells, after Ctrl-C, whether something has come
            try:
                stop += self._receive_some((space[stop:] if stop else space,), flags)
                self._ahead_stop = stop
            except (BlockingIOError, ConnectionError, EOFError):
                raise
            except BaseException:
                self._broken = self._broken or space[stop] != 0
                raise
            self._short = stop < len(space)
            if stop - start >= size_bytes:
                return
            if not flags:
                self._look_up()

    def _look_up(self) -> None:
        """Raise BlockingIOError if a tick has passed while a frame came in small pieces.

        Else a peer that sends a byte now and then would keep `receive` from its deadline.
        """
        now = time.monotonic()
        if self._next_tick == 0.0:
            self._next_tick = now + TICK_S
        elif now >= self._next_tick:
            raise BlockingIOError

    def _fill_from_ahead(self, buffers: Sequence[memoryview]) -> list[Buffer]:
        """Move what was received ahead into buffers, and return those that it has not filled."""
        rest: list[Buffer] = [each for each in buffers if len(each)]
        while rest and self._ahead_start < self._ahead_stop:
            size_bytes = min(len(rest[0]), self._ahead_stop - self._ahead_start)
            start = self._ahead_start
            memoryview(rest[0])[:size_bytes] = self._ahead[start : start + size_bytes]
            self._ahead_start += size_bytes
            rest = _after(rest, size_bytes)
        return rest

    def _receive_some(self, buffers: Sequence[Buffer], flags: int) -> int:
        """Receive at least one byte, or raise BlockingIOError."""
        try:
            got: int
            if len(buffers) == 1:
                got = self._sock.recv_into(buffers[0], 0, flags)
            else:
                got = self._sock.recvmsg_into(buffers, 0, flags)[0]
        except BlockingIOError:
            raise
        except OSError as exc:
            raise ConnectionError(f"the connection to {self.peer} is gone: {exc}") from exc
        if got:
            return got
        if self._ended_here:
            raise ConnectionError(f"this side has ended the connection to {self.peer}")
        if self.in_frame:
            self._broken = True
            raise ConnectionError(f"{self.peer} ended the connection in the middle of a frame")
        raise EOFError(f"{self.peer} ended the connection")

    @property
    def drained(self) -> bool:
        return self._short and self._ahead_start == self._ahead_stop

    def fileno(self) -> int:
        return self._sock.fileno()

    def readable(self) -> bool:
        return self._ahead_start < self._ahead_stop or bool(self._poll.poll(0))

    def notice_silence(self, timeout_s: float) -> None:
        # The first probe after half the time, then one a second, the shortest the kernel knows; each is
        # also when the kernel looks how long the peer has been silent.
        timeout_s = min(_MAX_KEEPALIVE_S, timeout_s)
        idle_s = max(1, int(timeout_s / 2))
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle_s)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, int(timeout_s * 1000)))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def shutdown(self) -> None:
        self._ended_here = True
        with contextlib.suppress(OSError):  # already shut down, by us or by the peer
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()


@final
class TcpListener(Listener):
    """A listening socket. Port 0 lets the system choose one."""

    def __init__(self, host: str, port: int = 0) -> None:
        self._sock = socket.create_server((host, port), backlog=1024)
        _open_sockets.add(self._sock)
        name = self._sock.getsockname()
        self._address = (str(name[0]), int(name[1]))
        self._closed = threading.Event()

    @property
    def address(self) -> tuple[str, int]:
        return self._address

    def accept(self) -> Connection:
        while True:
            try:
                sock, name = self._sock.accept()
                return TcpConnection(sock, f"{name[0]}:{name[1]}")
            except OSError as exc:
                if self._closed.is_set():
                    raise ConnectionError("the listener is closed") from exc
                logger.warning("a connection could not be accepted: %s", exc)
                self._closed.wait(TICK_S)  # there may be no descriptors left for the moment

    def close(self) -> None:
        self._closed.set()
        with contextlib.suppress(OSError):  # shutdown wakes an accept; not every system allows it
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


def connect(host: str, port: int, timeout_s: float) -> Connection:
    """Connect to a listener.

    Raises:
        ConnectionError: nobody listens there, or nobody answers within `timeout_s` seconds.
    """
    try:
        sock = socket.create_connection((host, port), timeout=timeout_s)
    except (OSError, OverflowError, ValueError) as exc:  # the latter: an address that cannot be one
        raise ConnectionError(f"cannot connect to {host}:{port}: {exc}") from exc
    return TcpConnection(sock, f"{host}:{port}")


def hostname() -> str:
    """Return this host's name, for texts that people read."""
    return socket.gethostname()


def _after(buffers: Sequence[Buffer], num_bytes: int) -> list[Buffer]:
    """Return what is left of `buffers` after their first `num_bytes` bytes."""
    if num_bytes == sum(map(len, buffers)):
        return []
    for index, buffer in enumerate(buffers):
        size = len(buffer)
        if num_bytes < size:
            return [memoryview(buffer)[num_bytes:], *buffers[index + 1 :]]
        num_bytes -= size
    return []


def _close_in_child() -> None:
    """A forked child keeps no connection open: its parent's end would otherwise be seen late."""
    for sock in list(_open_sockets):
        with contextlib.suppress(OSError):
            sock.close()


os.register_at_fork(after_in_child=_close_in_child)
