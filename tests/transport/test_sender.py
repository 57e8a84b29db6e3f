"""Frames leave in order, without making anybody wait, and their buffers are always given back."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tensorkv.errors import ProtocolError
from tensorkv.transport.base import Connection
from tensorkv.transport.sender import Sender
from tensorkv.wire.codec import encode

DEADLINE_S = 20.0


def never(exc: Exception) -> None:
    raise AssertionError(f"the connection failed: {exc}")


def test_frames_of_several_threads_stay_in_the_order_of_the_queue(
    pair: tuple[Connection, Connection],
) -> None:
    """Big and small ones, so that both the callers and the sender's thread send."""
    one, other = pair
    sender = Sender(one, "test", never)
    queued: list[tuple[int, int]] = []
    order = threading.Lock()
    given_back: list[tuple[int, int]] = []
    sizes = [0, 10, 300_000]

    def send(thread: int) -> None:
        for number in range(30):
            name, payload = (thread, number), bytes([thread]) * sizes[number % 3]
            with order:
                queued.append(name)
                sender.put([encode(name, len(payload)), payload], lambda name=name: given_back.append(name))
            sender.pump()

    received: list[bytes] = []

    def sink(body: memoryview, payload_bytes: int) -> list[memoryview]:
        received.append(bytes(body))
        return [memoryview(bytearray(payload_bytes))]

    with ThreadPoolExecutor(3) as pool:
        done = [pool.submit(send, thread) for thread in range(3)]
        for _ in range(90):
            other.receive(sink)
        for each in done:
            each.result(DEADLINE_S)
    sender.close(DEADLINE_S)
    assert received == [encode(name)[16:] for name in queued]
    assert given_back == queued


def test_a_peer_that_does_not_read_holds_up_nobody(pair: tuple[Connection, Connection]) -> None:
    one, other = pair
    failures: list[Exception] = []
    sender = Sender(one, "test", failures.append)
    given_back = threading.Semaphore(0)
    payload = bytes(8 << 20)
    for _ in range(3):
        sender.put([encode(1, len(payload)), payload], given_back.release)
        sender.pump()  # returns, though nobody reads
    other.shutdown()
    one.shutdown()
    for _ in range(3):
        assert given_back.acquire(timeout=DEADLINE_S)
    sender.close(DEADLINE_S)
    assert not sender._thread.is_alive()
    assert not given_back.acquire(blocking=False)


def test_a_failure_is_told_once_and_buffers_are_given_back_once(gate: Any) -> None:
    failures: list[Exception] = []
    given_back: list[int] = []
    sender = Sender(gate, "test", failures.append)
    for number in range(3):
        sender.put([b"frame"], lambda number=number: given_back.append(number))
    gate.failing = ConnectionResetError("gone")
    gate.open.set()
    sender.pump()
    sender.close(DEADLINE_S)
    for number in (3, 4):  # also after the thread has ended
        sender.put([b"frame"], lambda number=number: given_back.append(number))
        sender.pump()
    assert failures == [gate.failing]
    assert given_back == [0, 1, 2, 3, 4]
    assert gate.sent == []


@pytest.mark.parametrize("kind", [KeyboardInterrupt, TimeoutError])
def test_a_send_that_a_signal_handler_breaks_off_is_a_failure(gate: Any, kind: type[BaseException]) -> None:
    """Nobody knows then what was sent, so nothing may follow it; the thread ends all the same."""
    failures: list[BaseException] = []
    given_back = threading.Semaphore(0)
    sender = Sender(gate, "test", failures.append)
    gate.failing = kind()
    gate.open.set()
    sender.put([b"frame"], given_back.release)
    with pytest.raises(kind):
        sender.pump()
    assert given_back.acquire(timeout=DEADLINE_S)
    sender.close(DEADLINE_S)
    assert not sender._thread.is_alive()
    assert failures == [gate.failing]
    assert gate.sent == []


def test_close_waits_for_what_is_queued(gate: Any) -> None:
    sender = Sender(gate, "test", never)
    for number in range(3):
        sender.put([bytes([number])])
    sender.pump()  # the gate is shut: the rest is for the thread
    assert gate.sent == []
    with ThreadPoolExecutor(1) as pool:
        closed = pool.submit(sender.close, DEADLINE_S)
        gate.open.set()
        closed.result(DEADLINE_S)
    assert gate.sent == [b"\0", b"\1", b"\2"]
    assert not sender._thread.is_alive()


def test_close_does_not_wait_for_ever(gate: Any) -> None:
    sender = Sender(gate, "test", never)
    sender.put([b"stuck"])
    sender.pump()
    sender.close(0.05)
    assert sender._thread.is_alive()
    gate.open.set()
    sender._thread.join(DEADLINE_S)
    assert gate.sent == [b"stuck"]


def test_a_peer_that_asks_and_does_not_read_is_ended(gate: Any) -> None:
    failures: list[Exception] = []
    given_back: list[int] = []
    sender = Sender(gate, "test", failures.append, max_frames=3)
    for number in range(4):
        sender.put([b"frame"], lambda number=number: given_back.append(number))
        sender.pump()
    assert [type(each) for each in failures] == [ProtocolError]
    assert "more than 3 frames" in str(failures[0])
    gate.failing = ConnectionResetError("shut down, as the owner does when it is told")
    gate.open.set()
    sender.close(DEADLINE_S)
    assert len(failures) == 1
    assert given_back == [0, 1, 2, 3]
