"""TCP: connections between hosts, and within one where memory cannot be shared."""

from __future__ import annotations

import socket
from typing import Any, final

from tensorkv.transport.base import Connection
from tensorkv.transport.stream import StreamConnection, StreamListener

_MAX_KEEPALIVE_S = 32767  # what Linux takes for TCP_KEEPIDLE


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
    """A listening socket. Port 0 lets the system choose one."""

    def __init__(self, host: str, port: int = 0) -> None:
        super().__init__(socket.create_server((host, port), backlog=1024))
        name = self._sock.getsockname()
        self._address = (str(name[0]), int(name[1]))

    @property
    def address(self) -> tuple[str, int]:
        return self._address

    def _connection(self, sock: socket.socket, name: Any) -> Connection:
        return TcpConnection(sock, f"{name[0]}:{name[1]}")


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
