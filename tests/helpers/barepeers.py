"""Peers on a bare connection, which send whatever a test wants."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tensorkv.config import JobConfig
from tensorkv.peer.handshake import introduce
from tensorkv.transport.base import Connection, Sink, no_tick
from tensorkv.transport.endpoint import connect, listen
from tensorkv.wire import messages as m
from tensorkv.wire.codec import Decoder, encode

DEADLINE_S = 20.0
HOSTS = ["inproc", "127.0.0.1"]
AnyMessage = m.ToServer | m.FromServer


class Peer:
    """One end of a connection, driven by a test."""

    def __init__(self, connection: Connection, union: Any = AnyMessage) -> None:
        self.connection = connection
        self._decoder: Decoder[Any] = Decoder(union)

    def say(self, message: Any, *parts: bytes) -> None:
        self.connection.send(encode(message, sum(map(len, parts))), parts)

    def hear(self) -> Any:
        """Receive and return the next message; its payload is in `heard`."""
        messages: list[Any] = []

        def sink(body: memoryview, payload_bytes: int) -> list[memoryview]:
            messages.append(self._decoder.decode(body))
            self.heard = bytearray(payload_bytes)
            return [memoryview(self.heard)]

        self.connection.receive(sink, deadline())
        return messages[0]


def deadline(ticks: int = 80) -> Callable[[], None]:
    """Return a tick that raises TimeoutError after `ticks` calls, each a quarter of a second."""
    left = iter(range(ticks))

    def tick() -> None:
        if next(left, None) is None:
            raise TimeoutError("the peer says nothing")

    return tick


@pytest.fixture(params=HOSTS)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Connection, Connection]]:
    """Two ends of a connection, past the handshake, over each transport."""
    listener = listen(request.param)
    one = connect(*listener.address, DEADLINE_S)
    other = listener.accept()
    one.max_header_bytes = other.max_header_bytes = 1 << 20
    yield one, other
    listener.close()
    for end in (one, other):
        end.shutdown()
        end.close()


@pytest.fixture
def join_as() -> Iterator[Callable[..., Peer]]:
    """Connect to a scheduler or server as a process of its job, and pass its handshake."""
    connections: list[Connection] = []

    def join(config: JobConfig, address: tuple[str, int], union: Any) -> Peer:
        connection = connect(*address, DEADLINE_S)
        connections.append(connection)
        introduce(connection, config.token, config.role, config.rank)
        return Peer(connection, union)

    yield join
    for connection in connections:
        connection.shutdown()
        connection.close()


class Gate(Connection):
    """A send-only connection that releases frames one by one, and fails on request."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.open = threading.Event()
        self.failing: Exception | None = None

    def send_now(self, buffers: Any) -> Any:
        if not self.open.is_set():
            return list(buffers)
        self.send_rest(buffers)
        return []

    def send_rest(self, buffers: Any, tick: Any = no_tick) -> None:
        assert self.open.wait(DEADLINE_S)
        if self.failing is not None:
            raise self.failing
        self.sent.append(b"".join(bytes(each) for each in buffers))

    def receive(self, sink: Any, tick: Any = no_tick) -> None:
        raise EOFError("nobody")

    def receive_now(self, sink: Sink) -> bool:
        raise AssertionError("nobody receives here")

    def fileno(self) -> int:
        raise AssertionError("nobody receives here")

    @property
    def drained(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    @property
    def ended(self) -> bool:
        return self.failing is not None

    @property
    def broken(self) -> bool:
        return False

    @property
    def in_frame(self) -> bool:
        return False

    def notice_silence(self, timeout_s: float) -> None:
        """Do nothing: no peer is silent here."""

    def shutdown(self) -> None:
        """Do nothing: there is no receiver to wake."""

    def close(self) -> None:
        """Do nothing: there is nothing to free."""


@pytest.fixture
def gate() -> Gate:
    return Gate()
