"""TCP: connections between hosts, and within a host where memory cannot be shared."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import struct
import sys
import termios
import threading
import time
from collections.abc import Sequence
from typing import Any, final

from tensorkv.addresses import LOOPBACK, bare_host, is_wildcard, join_address
from tensorkv.errors import AddressUnavailable
from tensorkv.transport.base import TICK_S, Buffer, Connection, Tick, no_tick
from tensorkv.transport.memorylimits import with_the_way_out
from tensorkv.transport.stream import StreamConnection, StreamListener

_MAX_KEEPALIVE_S = 32767  # Linux's maximum of TCP_KEEPIDLE
_BACKLOG = 1024
_LOOPBACK_ADDRESSES = ("127.0.0.1", "::1")
_NOT_OF_THIS_HOST = (errno.EADDRNOTAVAIL, errno.EINVAL)  # EINVAL: a link-local address without interface
_NO_SUCH_FAMILY = (errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT)


_INFO_BYTES = 232
_SND_WND_AT = 228  # offset in `struct tcp_info`, the answer of TCP_INFO; shorter before Linux 5.4
_TCP_CLOSE = 7  # a state of Linux: both directions have ended, by an error or by both sides
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.05


@final
class TcpConnection(StreamConnection):
    """A connected TCP socket.

    While the kernel watches for a silent peer (`notice_silence`), the connection sends no more than fits in
    the peer's receive window. With more queued, the kernel would send zero-window probes and end the
    connection after TCP_USER_TIMEOUT, although a peer that is stopped or busy has a full window but answers.
    With nothing queued it sends keepalive probes, which ask only whether the peer's host is there.

    A peer should not shrink the window that it has announced (RFC 9293, 3.8.6). So the connection asks the
    kernel again only when the last known window is used up, which saves two system calls for most messages.
    """

    def __init__(self, sock: socket.socket, peer: str) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().__init__(sock, peer)
        self._within_room = False
        self._room_bytes = 0  # lower bound of what still fits in the peer's window
        self._error: OSError | None = None  # what the kernel has told one of our threads
        self._told = threading.Event()  # set after that
        self._end = select.poll()
        self._end.register(sock, select.POLLRDHUP)

    def send_now(self, buffers: Sequence[Buffer]) -> list[Buffer]:
        size_bytes = sum(map(len, buffers))
        if not self._within_room:
            return self._send_now(buffers, size_bytes)
        if size_bytes <= self._room_bytes:  # usually
            self._room_bytes -= size_bytes
            return self._send_now(buffers, size_bytes)
        rest = buffers
        while rest:
            fits, rest = self._fitting(rest)
            if not fits:
                break
            if left := super().send_now(fits):
                return [*left, *rest]
        return list(rest)

    def send_rest(self, buffers: Sequence[Buffer], tick: Tick = no_tick) -> None:
        rest = buffers
        pause_s, next_tick = _FIRST_PAUSE_S, time.monotonic() + TICK_S
        while self._within_room and rest:
            fits, rest = self._fitting(rest)
            if fits:
                super().send_rest(fits, tick)
                pause_s = _FIRST_PAUSE_S
            elif self._end.poll(pause_s * 1000):
                break  # the connection has ended: sending raises the reason
            else:
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            if time.monotonic() >= next_tick:
                next_tick += TICK_S
                self._tick(tick)
        super().send_rest(rest, tick)

    def _tick(self, tick: Tick) -> None:
        try:
            tick()
        except BaseException:
            self._broken = True
            raise

    def _fitting(self, buffers: Sequence[Buffer]) -> tuple[Sequence[Buffer], Sequence[Buffer]]:
        """Split buffers into what fits in the peer's window, to be sent now, and the rest."""
        size_bytes = sum(map(len, buffers))
        if size_bytes > self._room_bytes:
            self._room_bytes = self._ask_room_bytes()
            if size_bytes > self._room_bytes:
                fits, rest = _split(buffers, self._room_bytes)
                self._room_bytes = 0
                return fits, rest
        self._room_bytes -= size_bytes
        return buffers, ()

    def _ask_room_bytes(self) -> int:
        """Ask the kernel how much more fits in the peer's window; sys.maxsize if it does not tell."""
        try:
            unanswered = fcntl.ioctl(self._sock, termios.TIOCOUTQ, bytes(4))  # first: it can only shrink
            info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
        except (OSError, ValueError) as exc:  # ValueError: the socket is closed
            self._broken = True
            self._raise_gone(
                exc if isinstance(exc, OSError) else OSError(errno.EBADF, os.strerror(errno.EBADF))
            )
        if len(info) < _INFO_BYTES:
            return sys.maxsize
        (window,) = struct.unpack_from("=I", info, _SND_WND_AT)
        (unanswered_bytes,) = struct.unpack("=i", unanswered)
        room_bytes: int = window - unanswered_bytes
        return room_bytes

    def _reason(self, exc: OSError | None) -> OSError | None:
        """Return why the connection has ended, also to the thread to which the kernel does not tell it.

        The kernel tells an error once, to the thread that sends or to the one that receives. The other gets
        EPIPE or the end of the connection, as when the peer's process ends; it waits a moment for the first.
        """
        if exc is not None and not isinstance(exc, BrokenPipeError):
            self._error = exc
            self._told.set()
            return exc
        if not self._ended_here and self._has_failed():
            self._told.wait(TICK_S)
        return exc if isinstance(self._error, ConnectionResetError) else self._error or exc

    def _has_failed(self) -> bool:
        """Whether the connection has failed, rather than that the peer has ended it."""
        try:
            return self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE
        except OSError:
            return False  # the socket is closed

    def notice_silence(self, timeout_s: float) -> None:
        self._within_room = True
        # The first probe comes after half the timeout, then one every second, the kernel's minimum. At each
        # probe the kernel also checks how long the peer has been silent.
        timeout_s = min(_MAX_KEEPALIVE_S, timeout_s)
        idle_s = max(1, int(timeout_s / 2))
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle_s)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, int(timeout_s * 1000)))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def _split(buffers: Sequence[Buffer], size_bytes: int) -> tuple[list[Buffer], list[Buffer]]:
    """Split buffers that have more than `size_bytes` bytes into the first `size_bytes` and the rest."""
    first: list[Buffer] = []
    for place, buffer in enumerate(buffers):
        if len(buffer) > size_bytes:
            view = memoryview(buffer)
            if size_bytes > 0:
                first.append(view[:size_bytes])
                view = view[size_bytes:]
            return first, [view, *buffers[place + 1 :]]
        first.append(buffer)
        size_bytes -= len(buffer)
    return first, []


@final
class TcpListener(StreamListener):
    """A listening socket. Port 0 lets the system choose one.

    Raises:
        AddressUnavailable: this host cannot listen there; the text says what to set.
    """

    def __init__(self, host: str, port: int = 0) -> None:
        super().__init__(listening_socket(host, port))
        self._address = _address_of(self._sock)

    @property
    def address(self) -> tuple[str, int]:
        return self._address

    def _connection(self, sock: socket.socket, name: Any) -> Connection:
        return TcpConnection(sock, join_address(name[0], name[1]))


def listening_socket(host: str, port: int = 0) -> socket.socket:
    """Return a socket that listens at the first address of `host` that this machine has.

    Args:
        host: an IPv4 or IPv6 address (brackets and a scope, as in "fe80::1%eth0", may be there), a name, or
            a wildcard; "::" takes IPv4 connections too where the system can.

    Raises:
        AddressUnavailable: there is no such address, or none of this machine.
    """
    where = join_address(bare_host(host), port) if port else repr(bare_host(host))
    failed: OSError | UnicodeError | None = None
    try:
        for family, address in _resolve(host, port):
            try:
                dual = is_wildcard(str(address[0])) and family == socket.AF_INET6
                return socket.create_server(
                    address,
                    family=family,
                    backlog=_BACKLOG,
                    dualstack_ipv6=dual and socket.has_dualstack_ipv6(),
                )
            except OSError as exc:
                failed = failed or exc
    except (OSError, UnicodeError) as exc:  # UnicodeError: an impossible name
        failed = exc
    raise AddressUnavailable(
        f"this host cannot listen at {where}: {_why_not(failed)}; set TENSORKV_HOST, or --host, to an "
        "address of this host, or leave it out for localhost"
    ) from failed


def connect(host: str, port: int, timeout_s: float) -> Connection:
    """Connect to a listener, trying the addresses of a name in turn.

    Raises:
        ConnectionError: nobody listens there, or nobody answers within `timeout_s` seconds.
    """
    where = join_address(bare_host(host), port)
    failed: Exception | None = None
    try:
        for family, address in _resolve(host, port):
            try:
                return TcpConnection(_connected(family, address, timeout_s), where)
            except OSError as exc:
                failed = failed or exc
    except (OSError, OverflowError, ValueError) as exc:  # the last two: an impossible address
        failed = exc
    text = f"cannot connect to {where}: {with_the_way_out(failed) if failed else failed}"
    if not isinstance(failed, (ConnectionRefusedError, ConnectionResetError)):
        text += "; TENSORKV_HOST, or --host, over there must be an address that this host can reach"
    raise ConnectionError(text) from failed


def hostname() -> str:
    """Return this host's name, for texts that people read."""
    return socket.gethostname()


def own_host_towards(host: str, port: int) -> str:
    """Return the address by which this machine is seen from another one; nothing is sent.

    Raises:
        OSError: there is no route to it.
    """
    family, address = _resolve(host, port)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # only looks up the route
        return _address_of(probe)[0]


def _resolve(host: str, port: int) -> list[tuple[socket.AddressFamily, Any]]:
    """Return the addresses of a host with their families, in the order in which to try them."""
    hosts = _LOOPBACK_ADDRESSES if host == LOOPBACK else (bare_host(host),)
    return [
        (family, address)
        for each in hosts
        for family, _, _, _, address in socket.getaddrinfo(each, port, type=socket.SOCK_STREAM)
    ]


def _connected(family: socket.AddressFamily, address: Any, timeout_s: float) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def _address_of(sock: socket.socket) -> tuple[str, int]:
    """Return where a socket listens. A link-local address includes its interface."""
    host, port, *more = sock.getsockname()
    if more and more[1]:
        host = f"{host}%{socket.if_indextoname(more[1])}"
    return str(host), int(port)


def _why_not(exc: Exception | None) -> str:
    """Return in plain words why a socket cannot listen."""
    if isinstance(exc, (socket.gaierror, UnicodeError)):
        return f"that is neither an address nor a name that this host can resolve ({exc})"
    if isinstance(exc, OSError) and exc.errno in _NOT_OF_THIS_HOST:
        return "none of its interfaces has that address"
    if isinstance(exc, OSError) and exc.errno in _NO_SUCH_FAMILY:
        return "its system does not do IPv6, or has it switched off"
    return str(exc)
