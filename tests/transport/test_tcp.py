"""What is TCP's own: addresses, and how the kernel is told of silent peers."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tensorkv.transport import tcp

DEADLINE_S = 20.0


@pytest.fixture
def connection() -> Iterator[tcp.TcpConnection]:
    """A connection to a bare socket."""
    listener = tcp.TcpListener("127.0.0.1")
    bare = socket.create_connection(listener.address, timeout=DEADLINE_S)
    accepted = listener.accept()
    assert isinstance(accepted, tcp.TcpConnection)
    yield accepted
    listener.close()
    accepted.shutdown()
    accepted.close()
    bare.close()


@pytest.mark.parametrize(
    ("timeout_s", "idle_s", "user_ms"),
    [(10.0, 5, 10_000), (2.5, 1, 2500), (0.5, 1, 500), (float("inf"), 16383, 32_767_000)],
)
def test_the_kernel_is_told_how_long_a_peer_may_be_silent(
    connection: tcp.TcpConnection, timeout_s: float, idle_s: int, user_ms: int
) -> None:
    sock = connection._sock
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0  # data connections stay so
    connection.notice_silence(timeout_s)
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_USER_TIMEOUT)
    assert [sock.getsockopt(socket.IPPROTO_TCP, name) for name in names] == [idle_s, 1, user_ms]


def test_nobody_listens() -> None:
    listener = tcp.TcpListener("127.0.0.1")
    host, port = listener.address
    listener.close()
    with pytest.raises(ConnectionError, match=f"cannot connect to {host}:{port}"):
        tcp.connect(host, port, DEADLINE_S)


def test_hostname_is_what_the_system_says() -> None:
    assert tcp.hostname() == socket.gethostname()


@pytest.mark.parametrize(
    ("host", "port"), [("127.0.0.1", 1 << 40), ("127.0.0.1", -1), ("a" * 80, 1), ("\0", 1)]
)
def test_an_address_that_cannot_be_one(host: str, port: int) -> None:
    """A server's address comes from another process."""
    with pytest.raises(ConnectionError, match="cannot connect"):
        tcp.connect(host, port, DEADLINE_S)
