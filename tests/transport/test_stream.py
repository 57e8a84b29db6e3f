"""What only stream sockets can show: frames cut in two, ticks in the middle, forked children, odd accepts."""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tensorkv.transport import stream, tcp
from tensorkv.transport.base import Sink
from tensorkv.wire.codec import PREFIX, encode

DEADLINE_S = 20.0
Pair = tuple[socket.socket, tcp.TcpConnection]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A bare socket, to send any bytes from, and a connection."""
    listener = tcp.TcpListener("127.0.0.1")
    bare = socket.create_connection(listener.address, timeout=DEADLINE_S)
    connection = listener.accept()
    assert isinstance(connection, tcp.TcpConnection)
    yield bare, connection
    listener.close()
    connection.shutdown()
    connection.close()
    bare.close()


def into(payload: bytearray) -> Sink:
    return lambda body, payload_bytes: [memoryview(payload)[:payload_bytes]]


FRAME = encode(["a message"], 6) + b"abcdef"


@pytest.mark.parametrize("cut", range(1, len(FRAME)))
def test_an_end_inside_a_frame_is_not_an_end_between_frames(pair: Pair, cut: int) -> None:
    bare, connection = pair
    bare.sendall(FRAME + FRAME[:cut])
    bare.shutdown(socket.SHUT_WR)
    payload = bytearray(6)
    connection.receive(into(payload))
    assert payload == b"abcdef"
    with pytest.raises(ConnectionError, match="in the middle of a frame"):
        connection.receive(into(payload))
    assert connection.broken


@pytest.mark.parametrize("cut", [1, PREFIX.size - 1, PREFIX.size, PREFIX.size + 2, len(FRAME) - 1])
def test_a_frame_may_come_in_pieces(pair: Pair, cut: int) -> None:
    """The second piece is sent by a tick, which tells that the frame has begun."""
    bare, connection = pair
    bare.sendall(FRAME[:cut])
    begun: list[bool] = []

    def more() -> None:
        begun.append(connection.in_frame)
        if len(begun) == 1:
            bare.sendall(FRAME[cut:])

    payload = bytearray(6)
    connection.receive(into(payload), more)
    assert payload == b"abcdef"
    assert begun[:1] == [True]
    assert not connection.broken


def test_what_a_signal_handler_raises_is_no_end_of_the_connection(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TimeoutError of an alarm is an OSError, too; the system's have a number."""
    _, connection = pair

    class Interrupted:
        def recv_into(self, *args: Any) -> int:
            raise TimeoutError("the alarm")

        def send(self, *args: Any) -> int:
            raise TimeoutError("the alarm")

    with monkeypatch.context() as patch:
        patch.setattr(connection, "_sock", Interrupted())
        with pytest.raises(TimeoutError, match="the alarm"):
            connection.receive(into(bytearray(6)))
        with pytest.raises(TimeoutError, match="the alarm"):
            connection.send(FRAME)


def test_a_tick_that_raises_inside_a_frame_breaks_the_connection(pair: Pair) -> None:
    bare, connection = pair
    bare.sendall(FRAME[:5])

    def stop() -> None:
        raise TimeoutError("enough")

    with pytest.raises(TimeoutError, match="enough"):
        connection.receive(into(bytearray(6)), stop)
    assert connection.broken


def test_frames_around_the_size_of_the_look_ahead(pair: Pair) -> None:
    """Headers and payloads that end just before, at, and after the end of the look-ahead buffer."""
    bare, connection = pair
    connection.max_header_bytes = 1 << 20
    sizes = [stream.LOOK_AHEAD_BYTES + delta for delta in (-40, -17, -16, -4, -3, 0, 1, 5000)]
    frames = [
        encode("h" * (size - size // 2), size // 2) + bytes([number]) * (size // 2)
        for number, size in enumerate(sizes)
    ] + [encode("h" * size) for size in sizes]
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(bare.sendall, b"".join(frames))
        received: list[bytes] = []
        for _ in frames:
            payload = bytearray(40_000)
            bodies: list[bytes] = []

            def sink(
                body: memoryview,
                payload_bytes: int,
                payload: bytearray = payload,
                bodies: list[bytes] = bodies,
            ) -> list[memoryview]:
                bodies.append(bytes(body) + payload_bytes.to_bytes(4, "big"))
                return [memoryview(payload)[:payload_bytes]]

            connection.receive(sink)
            size = int.from_bytes(bodies[0][-4:], "big")
            received.append(encode(None, size)[: PREFIX.size][8:] + bodies[0][:-4] + payload[:size])
        done.result(DEADLINE_S)
    assert received == [frame[8:] for frame in frames]
    assert not connection.readable()


def test_a_peer_that_resets(pair: Pair) -> None:
    bare, connection = pair
    bare.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    bare.close()
    with pytest.raises(ConnectionError, match="is gone"):
        connection.receive(into(bytearray()))


def test_sending_waits_with_ticks_and_breaks_if_they_raise(pair: Pair) -> None:
    _, connection = pair
    ticks: list[int] = []

    def second_time() -> None:
        ticks.append(1)
        if len(ticks) == 2:
            raise TimeoutError("nobody reads")

    with pytest.raises(TimeoutError, match="nobody reads"):
        connection.send(encode(1, 32 << 20), [bytes(32 << 20)], second_time)
    assert connection.broken


def test_shutdown_wakes_who_sends(pair: Pair) -> None:
    _, connection = pair
    waiting = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(connection.send, encode(1, 32 << 20), [bytes(32 << 20)], waiting.set)
        assert waiting.wait(DEADLINE_S)
        connection.shutdown()
        with pytest.raises(ConnectionError):
            sent.result(DEADLINE_S)


def test_an_accept_that_fails_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A connection that was reset before it was accepted, or a lack of descriptors, is not the end."""
    listener = tcp.TcpListener("127.0.0.1")
    client = socket.create_connection(listener.address, timeout=DEADLINE_S)
    failures = iter([errno.ECONNABORTED, errno.EMFILE])
    real = listener._sock.accept

    class Flaky:
        def accept(self) -> tuple[socket.socket, tuple[str, int]]:
            number = next(failures, None)
            if number is not None:
                raise OSError(number, os.strerror(number))
            return real()

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(listener, "_sock", Flaky())
        connection = listener.accept()
    assert "Too many open files" in caplog.text
    connection.close()
    client.close()
    listener.close()


def test_a_forked_child_holds_no_connection(pair: Pair) -> None:
    """The parent's end is seen at once, though the child lives on."""
    bare, connection = pair
    listening = [sock.fileno() for sock in stream._open_sockets if sock.fileno() >= 0]
    assert connection._sock.fileno() in listening
    go_read, go_write = os.pipe()
    told_read, told_write = os.pipe()
    child = os.fork()
    if child == 0:  # only system calls: this process must not run pytest's own end
        still = [fd for fd in listening if _is_socket(fd)]
        os.write(told_write, str(still).encode())
        os.read(go_read, 1)
        os._exit(0)
    try:
        assert os.read(told_read, 100) == b"[]"
        connection.shutdown()
        connection.close()
        assert bare.recv(1) == b""
    finally:
        os.write(go_write, b"x")
        assert os.waitpid(child, 0)[1] == 0
        for descriptor in (go_read, go_write, told_read, told_write):
            os.close(descriptor)


def _is_socket(descriptor: int) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:")
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("begun", [b"", FRAME[:-6]])
def test_a_peer_that_sends_a_byte_now_and_then_does_not_put_off_a_deadline(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, begun: bytes
) -> None:
    """Each byte comes in time; the time, here one that jumps a second at each look, passes nonetheless."""
    bare, connection = pair
    frame = encode(["a message"], 1 << 20)
    now = iter(range(1, 1000))
    monkeypatch.setattr("tensorkv.transport.stream.time.monotonic", lambda: float(next(now)))
    real = connection._receive_some

    def one_byte(buffers: Any, flags: int) -> int:
        return real([memoryview(buffers[0])[:1]], flags)

    monkeypatch.setattr(connection, "_receive_some", one_byte)
    bare.sendall(frame + bytes(100) if begun else frame[:10])
    ticks: list[int] = []

    def tick() -> None:
        ticks.append(1)
        if len(ticks) == 3:
            raise TimeoutError("the deadline")

    with pytest.raises(TimeoutError, match="the deadline"):
        connection.receive(into(bytearray(1 << 20)), tick)
    assert connection.broken
