"""Frames over a stream socket of any family: blocking, `sendmsg` out and `recvmsg_into` straight into place.

The kernel keeps the deadlines, by SO_RCVTIMEO and SO_SNDTIMEO: `settimeout` would make the socket
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
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NoReturn

from tensorkv.transport.base import TICK_S, Buffer, Connection, Listener, Sink, Tick, no_tick
from tensorkv.transport.memorylimits import with_the_way_out
from tensorkv.transport.seldomlog import SeldomLog
from tensorkv.wire.codec import MAX_HANDSHAKE_BYTES, PREFIX_BYTES, decode_prefix

logger = logging.getLogger(__name__)
MAX_BUFFERS = 1024
"""Maximum number of buffers in one sendmsg or recvmsg (IOV_MAX)."""

LOOK_AHEAD_BYTES = 32 << 10
"""Size of the read-ahead buffer; the part of a payload that does not fit goes straight into place."""

_END = select.POLLRDHUP | select.POLLHUP | select.POLLERR
_DONTWAIT = int(socket.MSG_DONTWAIT)  # plain ints: combining two enum flags takes a microsecond
_WAITALL = int(socket.MSG_WAITALL)
_TICK = struct.pack("ll", int(TICK_S), int(TICK_S % 1 * 1e6))
_open_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


class StreamConnection(Connection):
    """A connected socket that carries frames. Owns the socket."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        sock.setblocking(True)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TICK)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TICK)
        _open_sockets.add(sock)
        self.max_header_bytes = MAX_HANDSHAKE_BYTES
        self.peer = peer
        self._sock = sock
        self._ahead = memoryview(bytearray(LOOK_AHEAD_BYTES))  # received, but not yet consumed
        self._ahead_start = self._ahead_stop = 0
        self._short = False  # whether the last receive found less than it had room for
        self._broken = False
        self._rest: list[Buffer] | None = None  # buffers of the current payload still to be filled
        self._ended_here = False
        self._next_tick = 0.0  # when `receive` ticks although bytes arrive; 0 before the first piece
        self._poll = select.poll()  # select() refuses descriptors above 1023
        self._poll.register(sock, select.POLLIN | select.POLLRDHUP)

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
        return self._send_now(buffers, sum(map(len, buffers)))

    def _send_now(self, buffers: Sequence[Buffer], size_bytes: int) -> list[Buffer]:
        """Send buffers of this many bytes as far as possible without blocking; return the rest."""
        rest = buffers
        try:
            sent_bytes = self._sendmsg(rest, _DONTWAIT)
            if sent_bytes == size_bytes:  # mostly
                return []
            rest = _after(rest, sent_bytes)
            while rest:
                rest = _after(rest, self._sendmsg(rest, _DONTWAIT))
        except BlockingIOError:
            pass  # the rest is the answer
        return list(rest)

    def _sendmsg(
        self, buffers: Sequence[Buffer], flags: int, ancillary: Sequence[tuple[int, int, Any]] = ()
    ) -> int:
        """Send part of `buffers` and return the number of bytes, or raise BlockingIOError."""
        try:
            if len(buffers) == 1 and not ancillary:
                return self._sock.send(buffers[0], flags)
            return self._sock.sendmsg(buffers[:MAX_BUFFERS], ancillary, flags)
        except BlockingIOError:
            raise
        except OSError as exc:
            self._broken = True
            self._raise_gone(exc)

    def _raise_gone(self, exc: OSError) -> NoReturn:
        if exc.errno is None:  # not the system's: a signal handler has raised it
            raise exc
        reason = self._reason(exc) or exc
        raise ConnectionError(f"the connection to {self.peer} is gone: {reason}") from reason

    def _reason(self, exc: OSError | None) -> OSError | None:
        """Return why the connection has ended; `exc` is what this thread was told, None for its end."""
        return exc

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
            self._advance(sink, _DONTWAIT)
        except BlockingIOError:
            return False
        return True

    @property
    def in_frame(self) -> bool:
        return self._rest is not None or self._ahead_start < self._ahead_stop

    def _advance(self, sink: Sink, flags: int) -> None:
        """Receive the rest of the current frame, or raise BlockingIOError if more must arrive first."""
        try:
            if self._rest is None:
                self._rest = self._begin_frame(sink, flags)
            while self._rest:
                self._short = False
                got = self._receive_some(self._rest[:MAX_BUFFERS], flags | _WAITALL)
                self._rest = _after(self._rest, got)
                if self._rest and not flags:
                    self._look_up()
            self._rest = None
        except BlockingIOError:
            raise
        except Exception:
            self._broken = self._broken or self.in_frame
            raise

    def _begin_frame(self, sink: Sink, flags: int) -> list[Buffer]:
        """Receive prefix and message; return the payload's buffers that are still to be filled."""
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
        except Exception:
            self._broken = True
            raise

    def _look_ahead(self, size_bytes: int, flags: int) -> None:
        """Read at least `size_bytes` bytes into the read-ahead buffer, and whatever else has arrived.

        So one small frame, or several, cost one call.
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
            stop += self._receive_ahead(space[stop:] if stop else space, flags)
            self._ahead_stop = stop
            self._short = stop < len(space)
            if stop - start >= size_bytes:
                return
            if not flags:
                self._look_up()

    def _receive_ahead(self, buffer: memoryview, flags: int) -> int:
        """Receive what has arrived, at least one byte, or raise BlockingIOError."""
        try:
            got = self._sock.recv_into(buffer, 0, flags)
        except BlockingIOError:
            raise
        except OSError as exc:
            self._raise_gone(exc)
        return got or self._at_end()

    def _look_up(self) -> None:
        """Raise BlockingIOError if a tick has passed while a frame arrived in small pieces.

        Otherwise a peer that sends a byte now and then could keep `receive` from its deadline.
        """
        now = time.monotonic()
        if self._next_tick == 0.0:
            self._next_tick = now + TICK_S
        elif now >= self._next_tick:
            raise BlockingIOError

    def _fill_from_ahead(self, buffers: Sequence[memoryview]) -> list[Buffer]:
        """Copy the bytes that were read ahead into buffers; return those still to be filled."""
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
            self._raise_gone(exc)
        return got or self._at_end()

    def _receive_with(
        self, buffer: memoryview, ancillary_bytes: int, flags: int
    ) -> tuple[int, list[tuple[int, int, bytes]]]:
        """Receive at least one byte and its ancillary data, or raise BlockingIOError."""
        try:
            got, ancillary, _, _ = self._sock.recvmsg_into((buffer,), ancillary_bytes, flags)
        except BlockingIOError:
            raise
        except OSError as exc:
            self._raise_gone(exc)
        return got or self._at_end(), ancillary

    def _at_end(self) -> int:
        """Raise the reason why the connection has ended."""
        if self._ended_here:
            raise ConnectionError(f"this side has ended the connection to {self.peer}")
        if reason := self._reason(None):
            self._broken = self._broken or self.in_frame
            self._raise_gone(reason)
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

    @property
    def ended(self) -> bool:
        found = self._poll.poll(0)
        return self._ended_here or bool(found and found[0][1] & _END)

    def shutdown(self) -> None:
        self._ended_here = True
        with contextlib.suppress(OSError):  # already shut down, by us or by the peer
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()


class StreamListener(Listener):
    """A listening socket. Owns it."""

    def __init__(self, sock: socket.socket) -> None:
        _open_sockets.add(sock)
        self._sock = sock
        self._closed = threading.Event()
        self._log = SeldomLog(logger, "connections that were not accepted")

    @abstractmethod
    def _connection(self, sock: socket.socket, name: Any) -> Connection:
        """Return the connection of an accepted socket, whose other end has this name.

        To refuse it, close the socket and raise OSError.
        """

    def accept(self) -> Connection:
        while True:
            try:
                sock, name = self._sock.accept()
            except OSError as exc:
                if self._closed.is_set():
                    raise ConnectionError("the listener is closed") from exc
                self._log.warning("a connection could not be accepted: %s", with_the_way_out(exc))
                self._closed.wait(TICK_S)  # back off: descriptors may have run out for the moment
                continue
            try:
                return self._connection(sock, name)
            except OSError as exc:
                self._log.warning("a connection was refused: %s", with_the_way_out(exc))

    def close(self) -> None:
        self._closed.set()
        with contextlib.suppress(OSError):  # shutdown wakes an accept; not every system allows it
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


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
    """Close all sockets in a forked child; otherwise peers would notice the parent's end late."""
    for sock in list(_open_sockets):
        with contextlib.suppress(OSError):
            sock.close()


os.register_at_fork(after_in_child=_close_in_child)
