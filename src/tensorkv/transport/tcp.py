"""TCP: connections between hosts, and within one where memory cannot be shared."""

from __future__ import annotations

import errno
import socket
from typing import Any, final

from tensorkv.addresses import LOOPBACK, bare_host, is_wildcard, join_address
from tensorkv.errors import AddressUnavailable
from tensorkv.transport.base import Connection
from tensorkv.transport.stream import StreamConnection, StreamListener

_MAX_KEEPALIVE_S = 32767  # what Linux takes for TCP_KEEPIDLE
_BACKLOG = 1024
_LOOPBACK_ADDRESSES = ("127.0.0.1", "::1")
_NOT_OF_THIS_HOST = (errno.EADDRNOTAVAIL, errno.EINVAL)  # the second: a link-local address of no interface
_NO_SUCH_FAMILY = (errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT)


@final
class TcpConnection(StreamConnection):
    """A connected TCP socket."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().__init__(sock, peer)

    def notice_silence(self, timeout_s: float) -> None:
        # The first probe after half the time, then one a second, the shortest the kernel knows; each is
        # also when the kernel looks how long the peer has been silent.
        timeout_s = min(_MAX_KEEPALIVE_S, timeout_s)
        idle_s = max(1, int(timeout_s / 2))
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle_s)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, int(timeout_s * 1000)))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


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
    except (OSError, UnicodeError) as exc:  # the latter: a name that cannot be one
        failed = exc
    raise AddressUnavailable(
        f"this host cannot listen at {where}: {_why_not(failed)}; set TENSORKV_HOST, or --host, to an "
        "address of this host, or leave it out for localhost"
    ) from failed


def connect(host: str, port: int, timeout_s: float) -> Connection:
    """Connect to a listener; the addresses of a name are tried in turn.

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
    except (OSError, OverflowError, ValueError) as exc:  # the latter: an address that cannot be one
        failed = exc
    text = f"cannot connect to {where}: {failed}"
    if not isinstance(failed, (ConnectionRefusedError, ConnectionResetError)):
        text += "; TENSORKV_HOST, or --host, over there must be an address that this host can reach"
    raise ConnectionError(text) from failed


def hostname() -> str:
    """Return this host's name, for texts that people read."""
    return socket.gethostname()


def _resolve(host: str, port: int) -> list[tuple[socket.AddressFamily, Any]]:
    """Return the addresses of a host, with their families, those to try first first."""
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
    """Return where a socket listens. A link-local address is one only together with its interface."""
    host, port, *more = sock.getsockname()
    if more and more[1]:
        host = f"{host}%{socket.if_indextoname(more[1])}"
    return str(host), int(port)


def _why_not(exc: Exception | None) -> str:
    """Say in plain words why a socket cannot listen."""
    if isinstance(exc, (socket.gaierror, UnicodeError)):
        return f"that is neither an address nor a name that this host can resolve ({exc})"
    if isinstance(exc, OSError) and exc.errno in _NOT_OF_THIS_HOST:
        return "none of its interfaces has that address"
    if isinstance(exc, OSError) and exc.errno in _NO_SUCH_FAMILY:
        return "its system does not do IPv6, or has it switched off"
    return str(exc)
