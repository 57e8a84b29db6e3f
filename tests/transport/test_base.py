"""The contract of a connection, run on every transport."""

from __future__ import annotations

import select
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from tensorkv.errors import AddressUnavailable, ProtocolError, ProtocolVersionError
from tensorkv.transport import unix
from tensorkv.transport.base import Connection, Listener
from tensorkv.transport.endpoint import connect, listen
from tensorkv.transport.unix import UnixListener
from tensorkv.wire.codec import MAGIC, MAX_HANDSHAKE_BYTES, PREFIX, VERSION, encode

DEADLINE_S = 20.0


@dataclass
class Taker:
    """A sink that takes everything, the payload in buffers of `step` bytes."""

    step: int = 1 << 30
    bodies: list[bytes] = field(default_factory=list)
    payloads: list[bytearray] = field(default_factory=list)

    def __call__(self, body: memoryview, payload_bytes: int) -> list[memoryview]:
        self.bodies.append(bytes(body))
        self.payloads.append(bytearray(payload_bytes))
        whole = memoryview(self.payloads[-1])
        return [whole[low : low + self.step] for low in range(0, payload_bytes, self.step)]


class StopWaiting(Exception):
    """Raised by a tick."""


def stop() -> None:
    raise StopWaiting


@pytest.fixture(params=["inproc", "127.0.0.1", "::1", "unix"])
def listener(request: pytest.FixtureRequest) -> Iterator[Listener]:
    try:
        listening = UnixListener() if request.param == "unix" else listen(request.param)
    except AddressUnavailable:
        if request.param != "::1":
            raise
        pytest.skip("this system has no ::1")
    yield listening
    listening.close()


def reach(listener: Listener) -> Connection:
    host, port = listener.address
    return unix.connect(host, DEADLINE_S) if host.startswith("@") else connect(host, port, DEADLINE_S)


@pytest.fixture
def pair(listener: Listener) -> Iterator[tuple[Connection, Connection]]:
    """Two ends of a connection."""
    one = reach(listener)
    other = listener.accept()
    yield one, other
    for end in (one, other):
        end.shutdown()
        end.close()


def test_frames_arrive_in_order_with_their_payloads(pair: tuple[Connection, Connection]) -> None:
    one, other = pair
    for number in range(100):
        one.send(encode(number, number), [bytes([number]) * number])
    taker = Taker()
    for _ in range(100):
        other.receive(taker)
    assert taker.bodies == [encode(number)[PREFIX.size :] for number in range(100)]
    assert taker.payloads == [bytes([number]) * number for number in range(100)]
    assert not other.readable()
    assert not other.broken


def test_both_directions_at_once(pair: tuple[Connection, Connection]) -> None:
    payload = bytes(range(256)) * (1 << 14)

    def talk(connection: Connection) -> bytearray:
        taker = Taker()
        sending = threading.Thread(target=connection.send, args=(encode(1, len(payload)), [payload]))
        sending.start()
        connection.receive(taker)
        sending.join(DEADLINE_S)
        return taker.payloads[0]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(talk, pair)) == [payload, payload]


def test_more_buffers_than_one_call_takes(pair: tuple[Connection, Connection]) -> None:
    """Both ways: 3000 buffers sent, some empty, and 2000 others received into."""
    one, other = pair
    parts = [bytes([i % 251]) * (i % 5) for i in range(3000)]
    whole = b"".join(parts)
    taker = Taker(step=3)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(one.send, encode("many", len(whole)), parts)
        other.receive(taker)
        done.result(DEADLINE_S)
    assert bytes(taker.payloads[0]) == whole


def test_what_send_now_leaves_is_sent_next(pair: tuple[Connection, Connection]) -> None:
    one, other = pair
    payload = bytes(range(256)) * (1 << 16)  # 16 MiB: no socket takes that unread
    rest = one.send_now([encode("big", len(payload)), payload])
    assert sum(map(len, rest)) < len(payload)
    taker = Taker()
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(lambda: one.send_rest(rest) if rest else None)
        other.receive(taker)
        done.result(DEADLINE_S)
    assert bytes(taker.payloads[0]) == payload
    one.send(encode("after"))
    other.receive(taker)
    assert taker.bodies[-1] == encode("after")[PREFIX.size :]


def test_shutdown_wakes_who_receives(pair: tuple[Connection, Connection]) -> None:
    one, _ = pair
    waiting = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(one.receive, Taker(), waiting.set)
        assert waiting.wait(DEADLINE_S)
        one.shutdown()
        with pytest.raises(ConnectionError, match="this side"):
            got.result(DEADLINE_S)
    one.shutdown()  # again, harmless


def test_the_peer_sees_the_end_between_frames(pair: tuple[Connection, Connection]) -> None:
    one, other = pair
    one.send(encode("last", 3), [b"abc"])
    one.shutdown()
    taker = Taker()
    other.receive(taker)
    assert taker.payloads == [b"abc"]
    for _ in range(2):
        assert other.readable()
        with pytest.raises(EOFError, match="ended the connection"):
            other.receive(taker)


def test_sending_fails_once_a_side_has_ended_it(pair: tuple[Connection, Connection]) -> None:
    one, other = pair
    other.shutdown()
    with pytest.raises(EOFError):
        one.receive(Taker())

    def send_often() -> None:
        for _ in range(10_000):  # TCP learns it by the answer to the first
            one.send(encode("nobody reads this"))

    with pytest.raises(ConnectionError):
        send_often()
    with pytest.raises(ConnectionError):
        other.send(encode("nor this"))


def test_a_tick_is_called_while_nothing_comes_and_may_end_the_wait(
    pair: tuple[Connection, Connection],
) -> None:
    one, other = pair
    ticks: list[bool] = []

    def third_time() -> None:
        ticks.append(one.in_frame)
        if len(ticks) == 3:
            raise StopWaiting

    with pytest.raises(StopWaiting):
        one.receive(Taker(), third_time)
    assert ticks == [False] * 3
    assert not one.broken
    other.send(encode("good as new"))
    taker = Taker()
    one.receive(taker, stop)
    assert taker.bodies == [encode("good as new")[PREFIX.size :]]


def test_readable_tells_without_waiting(pair: tuple[Connection, Connection]) -> None:
    one, other = pair
    assert not other.readable()
    one.send(encode(1))
    one.send(encode(2))
    taker = Taker()
    other.receive(taker)
    assert other.readable()  # wherever the second is kept by now
    other.receive(taker)
    assert not other.readable()


@pytest.mark.parametrize(
    ("head", "error", "text"),
    [
        (PREFIX.pack(b"GET", 32, 0, 0), ProtocolError, "does not speak TensorKV"),
        (PREFIX.pack(MAGIC, VERSION + 1, 0, 0), ProtocolVersionError, f"version {VERSION + 1}"),
        (PREFIX.pack(MAGIC, VERSION, MAX_HANDSHAKE_BYTES + 1, 0), ProtocolError, "over the limit of 4096"),
        (PREFIX.pack(MAGIC, VERSION, (1 << 32) - 1, 0), ProtocolError, "over the limit of 4096"),
    ],
)
def test_a_frame_that_is_none_breaks_the_connection(
    pair: tuple[Connection, Connection], head: bytes, error: type[Exception], text: str
) -> None:
    """Nothing but the prefix was sent: that memory is taken for what it announces would show as a wait."""
    one, other = pair
    one.send(head)
    taker = Taker()
    with pytest.raises(error, match=text):
        other.receive(taker, stop)
    assert taker.bodies == []
    assert other.broken


def test_the_limit_of_headers_is_that_of_the_connection(pair: tuple[Connection, Connection]) -> None:
    one, other = pair
    long = "x" * 100_000
    other.max_header_bytes = 200_000
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(one.send, encode(long, 2), [b"ab"])
        taker = Taker()
        other.receive(taker)
        done.result(DEADLINE_S)
    assert taker.bodies == [encode(long)[PREFIX.size :]]
    assert taker.payloads == [b"ab"]


def test_a_sink_that_raises_breaks_the_connection(pair: tuple[Connection, Connection]) -> None:
    one, other = pair
    one.send(encode(1, 3), [b"abc"])

    def refuse(body: memoryview, payload_bytes: int) -> list[memoryview]:
        raise ProtocolError(f"no place for {payload_bytes} bytes")

    with pytest.raises(ProtocolError, match="no place for 3 bytes"):
        other.receive(refuse)
    assert other.broken


def test_a_closed_listener_wakes_who_accepts(listener: Listener) -> None:
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(listener.accept)
        listener.close()
        with pytest.raises(ConnectionError, match="the listener is closed"):
            accepted.result(DEADLINE_S)
    with pytest.raises(ConnectionError):
        reach(listener)


def test_who_was_not_accepted_learns_that_the_listener_has_closed(listener: Listener) -> None:
    waiting = reach(listener)
    listener.close()
    with pytest.raises((EOFError, ConnectionError)):
        waiting.receive(Taker(), stop)
    waiting.close()


def test_receive_now_goes_on_where_it_stopped(pair: tuple[Connection, Connection]) -> None:
    """A frame of 16 MiB comes in many pieces; the sink is asked once, and a small frame follows at once."""
    one, other = pair
    payload = bytes(range(256)) * (1 << 16)
    taker = Taker(step=1 << 20)
    assert not other.receive_now(taker)
    poller = select.poll()
    poller.register(other.fileno(), select.POLLIN)
    assert poller.poll(0) == []
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(
            lambda: (one.send(encode("big", len(payload)), [payload]), one.send(encode("small")))
        )
        while len(taker.bodies) < 2:
            if not other.receive_now(taker):
                assert poller.poll(DEADLINE_S * 1000)
        done.result(DEADLINE_S)
    assert bytes(taker.payloads[0]) == payload
    assert [len(each) for each in taker.payloads] == [len(payload), 0]
    assert not other.receive_now(taker)
    one.shutdown()
    assert poller.poll(DEADLINE_S * 1000)
    with pytest.raises(EOFError):
        other.receive_now(taker)


def test_a_message_longer_than_the_look_ahead(pair: tuple[Connection, Connection]) -> None:
    one, other = pair
    other.max_header_bytes = 1 << 20
    taker = Taker()
    text = "long" * 50_000
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(lambda: [one.send(encode(each)) for each in ("before", text, "after")])
        for _ in range(3):
            other.receive(taker)
        done.result(DEADLINE_S)
    assert taker.bodies == [encode(each)[PREFIX.size :] for each in ("before", text, "after")]
