"""What is TCP's own: addresses, and how the kernel is told of silent peers."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tensorkv.errors import AddressUnavailable, WaitTimeout
from tensorkv.transport import tcp

DEADLINE_S = 20.0


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this system has no ::1")


@pytest.fixture
def ends() -> Iterator[tuple[tcp.TcpConnection, socket.socket]]:
    """A connection and the bare socket at its other end."""
    listener = tcp.TcpListener("127.0.0.1")
    bare = socket.create_connection(listener.address, timeout=DEADLINE_S)
    accepted = listener.accept()
    assert isinstance(accepted, tcp.TcpConnection)
    yield accepted, bare
    listener.close()
    accepted.shutdown()
    accepted.close()
    bare.close()


@pytest.fixture
def connection(ends: tuple[tcp.TcpConnection, socket.socket]) -> tcp.TcpConnection:
    return ends[0]


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


def unanswered_bytes(connection: tcp.TcpConnection) -> int:
    """What was handed to the kernel and the peer's has not answered for."""
    (found,) = struct.unpack("=i", fcntl.ioctl(connection._sock, termios.TIOCOUTQ, bytes(4)))
    return int(found)


@pytest.mark.parametrize("frame_bytes", [20, 1000, 100_000])
def test_the_kernel_is_given_no_more_than_a_stopped_peer_has_room_for(
    ends: tuple[tcp.TcpConnection, socket.socket], frame_bytes: int
) -> None:
    """With more it would ask for room, and end the connection when the timeout has passed."""
    connection, bare = ends
    connection.notice_silence(10.0)
    frame, sent = os.urandom(frame_bytes), 0
    rest: list[Any] = []
    while not rest:
        rest = connection.send_now([frame[: frame_bytes // 2], frame[frame_bytes // 2 :]])
        sent += 1
    until = time.monotonic() + DEADLINE_S
    while unanswered_bytes(connection):  # all of it is answered for, although the peer reads nothing
        assert time.monotonic() < until

    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(connection.send_rest, rest)
        received = b""
        while len(received) < sent * frame_bytes:
            received += bare.recv(1 << 20)
        sending.result(DEADLINE_S)
    assert received == frame * sent


def test_the_kernel_is_asked_for_room_again_only_when_what_it_told_of_is_used_up(
    ends: tuple[tcp.TcpConnection, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    connection, peer = ends
    connection.notice_silence(10.0)
    told = iter([1000, 4000])  # runs out, and so fails, if it is asked once more
    monkeypatch.setattr(connection, "_ask_room_bytes", lambda: next(told))
    for _ in range(5):
        assert connection.send_now([bytes(100), bytes(100)]) == []
    connection.send_rest([bytes(300)])  # of 4000
    assert connection.send_now([bytes(3700)]) == []
    assert len(peer.recv(5000, socket.MSG_WAITALL)) == 5000


def test_a_peer_that_ends_while_it_has_no_room_is_noticed(
    ends: tuple[tcp.TcpConnection, socket.socket],
) -> None:
    connection, bare = ends
    connection.notice_silence(10.0)
    while not (rest := connection.send_now([bytes(100_000)])):
        pass
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(connection.send_rest, rest)
        bare.close()
        with pytest.raises(ConnectionError, match="is gone"):
            sending.result(DEADLINE_S)


class Reset:
    """A socket whose peer resets it. It tells the reset as what a silent host ends in, a timeout.

    As the kernel does, it tells that once: the next call gets EPIPE, or the end.
    """

    def __init__(self, sock: socket.socket, told: Callable[[], None] = lambda: None) -> None:
        self._sock = sock
        self._told = told

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def send(self, *arguments: Any) -> int:
        return int(self._call("send", arguments))

    def recv_into(self, *arguments: Any) -> int:
        return int(self._call("recv_into", arguments))

    def _call(self, name: str, arguments: Sequence[Any]) -> Any:
        try:
            return getattr(self._sock, name)(*arguments)
        except ConnectionResetError:
            self._told()
            raise TimeoutError(errno.ETIMEDOUT, "Connection timed out") from None


@pytest.fixture
def reset(ends: tuple[tcp.TcpConnection, socket.socket]) -> tcp.TcpConnection:
    """A connection that is reset by now."""
    connection, bare = ends
    bare.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    bare.close()
    found = select.poll()
    found.register(connection, select.POLLRDHUP)
    assert found.poll(1000 * DEADLINE_S)
    connection._sock = Reset(connection._sock)  # type: ignore[assignment]
    return connection


def no_sink(body: memoryview, payload_bytes: int) -> list[memoryview]:
    raise AssertionError("nothing comes")


def test_a_silent_host_is_told_to_both_threads_whoever_the_kernel_told(reset: tcp.TcpConnection) -> None:
    calls = [lambda: reset.send_now([b"x"]), lambda: reset.receive(no_sink)]
    for call in (*calls, *calls):
        with pytest.raises(ConnectionError, match="is gone: .*timed out") as caught:
            call()
        assert getattr(caught.value.__cause__, "errno", 0) == errno.ETIMEDOUT


def test_a_silent_host_that_the_receiving_thread_was_told_of(reset: tcp.TcpConnection) -> None:
    for call in (lambda: reset.receive(no_sink), lambda: reset.send_now([b"x"])):
        with pytest.raises(ConnectionError, match="timed out"):
            call()


def test_the_receiving_thread_waits_for_what_the_sending_thread_is_told(reset: tcp.TcpConnection) -> None:
    """The kernel has told one thread, and the other sees the end before that one has got any further."""

    class Told(threading.Event):
        asked = threading.Event()

        def wait(self, timeout: float | None = None) -> bool:
            self.asked.set()
            return super().wait(DEADLINE_S)  # longer than in earnest: this machine may be busy

    reset._told = Told()
    consumed = threading.Event()

    def told() -> None:
        consumed.set()
        assert Told.asked.wait(DEADLINE_S)

    reset._sock = Reset(reset._sock._sock, told)  # type: ignore[assignment, attr-defined]
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(reset.send_now, [b"x"])
        assert consumed.wait(DEADLINE_S)
        with pytest.raises(ConnectionError, match="timed out"):
            reset.receive(no_sink)
        with pytest.raises(ConnectionError, match="timed out"):
            sending.result(DEADLINE_S)


def test_a_peer_that_resets_or_ends_the_connection_is_told_as_before(
    ends: tuple[tcp.TcpConnection, socket.socket],
) -> None:
    connection, bare = ends
    bare.shutdown(socket.SHUT_WR)
    with pytest.raises(EOFError, match="ended the connection"):
        connection.receive(no_sink)
    bare.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    bare.close()

    def send_on() -> None:
        while True:
            connection.send_now([bytes(1000)])

    with pytest.raises(ConnectionError, match="is gone"):
        send_on()
    with pytest.raises(EOFError, match="ended the connection"):
        connection.receive(no_sink)


def test_what_this_side_ends_or_closes_is_a_connection_error(
    ends: tuple[tcp.TcpConnection, socket.socket],
) -> None:
    connection, _ = ends
    connection.notice_silence(10.0)
    while not (rest := connection.send_now([bytes(100_000)])):
        pass
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(connection.send_rest, rest)
        connection.shutdown()
        with pytest.raises(ConnectionError, match="is gone"):
            sending.result(DEADLINE_S)
    connection.close()
    with pytest.raises(ConnectionError, match="is gone"):
        connection.send_now([b"more"])


def test_waiting_for_room_looks_up(ends: tuple[tcp.TcpConnection, socket.socket]) -> None:
    connection, _ = ends
    connection.notice_silence(10.0)
    while not (rest := connection.send_now([bytes(100_000)])):
        pass

    def tick() -> None:
        raise WaitTimeout("no more")

    with pytest.raises(WaitTimeout):
        connection.send_rest(rest, tick)
    assert connection.broken


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


class Resolver:
    """A name service that knows some names, and what asked it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **names: list[str]) -> None:
        self.asked: list[str] = []
        real = socket.getaddrinfo

        def look_up(host: str, port: int, **more: Any) -> list[Any]:
            self.asked.append(host)
            if host in names:
                return [found for address in names[host] for found in real(address, port, **more)]
            return real(host, port, flags=socket.AI_NUMERICHOST, **more)

        monkeypatch.setattr(socket, "getaddrinfo", look_up)


@pytest.mark.parametrize(
    ("asked", "host"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("localhost", "127.0.0.1"),
        pytest.param("::1", "::1", marks=needs_ipv6),
        pytest.param("[::1]", "::1", marks=needs_ipv6),
        ("0.0.0.0", "0.0.0.0"),
        pytest.param("::", "::", marks=needs_ipv6),
        ("v4", "127.0.0.1"),
        pytest.param("v6", "::1", marks=needs_ipv6),
        ("elsewhere-first", "127.0.0.1"),
    ],
)
def test_a_listener_can_be_reached_where_it_says(
    monkeypatch: pytest.MonkeyPatch, asked: str, host: str
) -> None:
    names = {"v4": ["127.0.0.1"], "v6": ["::1"], "elsewhere-first": ["192.0.2.1", "127.0.0.1"]}
    Resolver(monkeypatch, **names)
    listener = tcp.TcpListener(asked)
    assert listener.address[0] == host
    one = tcp.connect(*listener.address, DEADLINE_S)
    other = listener.accept()
    assert one.peer == tcp.join_address(*listener.address)
    assert other.peer.rpartition(":")[0] in ("127.0.0.1", "[::1]")
    for each in (one, other, listener):
        each.close()


@needs_ipv6
@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_the_wildcard_of_ipv6_takes_connections_of_both_kinds(host: str) -> None:
    listener = tcp.TcpListener("::")
    one = tcp.connect(host, listener.address[1], DEADLINE_S)
    for each in (one, listener.accept(), listener):
        each.close()


@pytest.mark.parametrize("missing", ["127.0.0.1", "::1"])
def test_localhost_is_the_loopback_that_there_is(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """And no name service is asked what that is."""
    there = "::1" if missing == "127.0.0.1" else "127.0.0.1"
    if there == "::1" and not has_ipv6():
        pytest.skip("this system has no ::1")
    resolver = Resolver(monkeypatch)
    real = socket.create_server

    def create(address: Any, **more: Any) -> socket.socket:
        if address[0] == missing:
            raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")
        return real(address, **more)

    monkeypatch.setattr(socket, "create_server", create)
    listener = tcp.TcpListener("localhost")
    assert listener.address[0] == there
    one = tcp.connect("localhost", listener.address[1], DEADLINE_S)
    for each in (one, listener.accept(), listener):
        each.close()
    assert set(resolver.asked) == {"127.0.0.1", "::1"}


@needs_ipv6
def test_a_link_local_address_is_told_with_its_interface() -> None:
    found = [
        (f"{address}%{name}")
        for address, _, _, scope, _, name in (
            line.split() for line in Path("/proc/net/if_inet6").read_text().splitlines()
        )
        if scope == "20"
    ]
    if not found:
        pytest.skip("no interface of this system has a link-local address")
    digits, _, name = found[0].partition("%")
    host = ":".join(digits[low : low + 4] for low in range(0, 32, 4))
    listener = tcp.TcpListener(f"{host}%{name}")
    assert listener.address[0].endswith(f"%{name}")
    one = tcp.connect(*listener.address, DEADLINE_S)
    for each in (one, listener.accept(), listener):
        each.close()


@pytest.mark.parametrize(
    ("host", "why"),
    [
        ("192.0.2.1", "'192.0.2.1': none of its interfaces has that address"),
        pytest.param("2001:db8::1", "'2001:db8::1': none of its interfaces has", marks=needs_ipv6),
        ("nowhere", "'nowhere': that is neither an address nor a name"),
        ("fe80::1%nothing", "'fe80::1%nothing': that is neither an address nor a name"),
        ("", "'': that is neither an address nor a name"),
        ("a" * 80, "that is neither an address nor a name"),
        ("a..b", "that is neither an address nor a name"),
    ],
)
def test_an_address_where_this_host_cannot_listen(
    monkeypatch: pytest.MonkeyPatch, host: str, why: str
) -> None:
    Resolver(monkeypatch)
    with pytest.raises(AddressUnavailable, match=f"cannot listen at .*{why}.*; set TENSORKV_HOST, or --host"):
        tcp.TcpListener(host)
    with pytest.raises(OSError, match="cannot listen at"):
        tcp.TcpListener(host)


def test_a_system_without_ipv6_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(address: Any, **more: Any) -> socket.socket:
        raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")

    monkeypatch.setattr(socket, "create_server", create)
    with pytest.raises(AddressUnavailable, match="'::1': its system does not do IPv6"):
        tcp.TcpListener("::1")


def test_a_port_that_is_taken_is_named() -> None:
    listener = tcp.TcpListener("127.0.0.1")
    with pytest.raises(AddressUnavailable, match=f"at 127.0.0.1:{listener.address[1]}: .*in use"):
        tcp.TcpListener(*listener.address)
    listener.close()


def test_what_to_set_where_an_address_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    Resolver(monkeypatch)
    with pytest.raises(ConnectionError, match="cannot connect to nowhere:1: .*; TENSORKV_HOST, or --host"):
        tcp.connect("nowhere", 1, DEADLINE_S)
