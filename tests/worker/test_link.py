"""A link against a server in the hands of the test: who leads, who is told, what ends whom."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tensorkv.errors import (
    InvalidOut,
    KeyDeleted,
    PeerLostError,
    ProtocolError,
    TensorKVError,
    WaitTimeout,
    to_wire,
)
from tensorkv.interrupts import Interrupted, ctrl_c
from tensorkv.peer import deadlines
from tensorkv.peer.deadlines import Wait
from tensorkv.server.memory import Memory
from tensorkv.server.shm import SharedValues
from tensorkv.server.slots import Slot
from tensorkv.transport import unix
from tensorkv.transport.base import Connection
from tensorkv.transport.endpoint import connect, listen
from tensorkv.transport.unix import UnixConnection, UnixListener
from tensorkv.wire import messages as m
from tensorkv.wire.codec import Decoder, encode
from tensorkv.worker import link as link_module
from tensorkv.worker.link import ServerLink
from tensorkv.worker.requests import Exchange, SingleReply
from tensorkv.worker.window import Window

DEADLINE_S = 20.0
to_server: Decoder[Any] = Decoder(m.ToServer)


class Bench:
    """A link, and the server's end of its connection."""

    def __init__(self, host: str) -> None:
        listener = listen(host)
        connection = connect(*listener.address, DEADLINE_S)
        self.server: Connection = listener.accept()
        listener.close()
        connection.max_header_bytes = self.server.max_header_bytes = 1 << 20
        self.failure: TensorKVError | None = None
        self.faults: list[m.Fault] = []
        self.broken_off: list[BaseException] = []
        self.link = ServerLink(
            connection,
            "server 1",
            lambda: self.failure,
            self.faults.append,
            Wait.answered,
            self.broken_off.append,
        )

    def say(self, message: Any, payload: bytes = b"") -> None:
        self.server.send(encode(message, len(payload)), [payload] if payload else [])

    def hear(self) -> Any:
        messages: list[Any] = []

        def sink(body: memoryview, payload_bytes: int) -> list[memoryview]:
            messages.append(to_server.decode(body))
            return [memoryview(bytearray(payload_bytes))]

        self.server.receive(sink)
        return messages[0]

    def wait(self, timeout_s: float = DEADLINE_S) -> Wait:
        return Wait("a call", timeout_s, lambda: self.failure)

    def close(self) -> None:
        self.failure = self.failure or PeerLostError("the test is over")
        self.link.close()
        self.server.shutdown()
        self.server.close()


@pytest.fixture(params=["inproc", "127.0.0.1"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    made = Bench(request.param)
    yield made
    made.close()


@pytest.fixture
def tcp_bench() -> Iterator[Bench]:
    made = Bench("127.0.0.1")
    yield made
    made.close()


class Values(Exchange):
    """Takes `number` payloads; what is received, and how it ends, can be looked at."""

    def __init__(self, number: int, on_take: Callable[[], None] = lambda: None) -> None:
        self.left = number
        self.payloads: list[bytearray] = []
        self.error: Exception | None = None
        self.ended = threading.Event()
        self._on_take = on_take

    def place(self, message: m.Data, payload_bytes: int) -> list[memoryview]:
        self.payloads.append(bytearray(payload_bytes))
        return [memoryview(self.payloads[-1])]

    def take(self, message: Any) -> bool:
        if isinstance(message, TensorKVError):
            self.error = message
            self.left = 0
        else:
            self._on_take()
            self.left -= 1
        if not self.left:
            self.ended.set()
        return not self.left


def test_a_request_and_its_reply(bench: Bench) -> None:
    reply = SingleReply()
    number = bench.link.open(reply)
    bench.link.put(m.Flush(number, 7))
    bench.link.pump()
    assert bench.hear() == m.Flush(number, 7)
    bench.say(m.Done(number))
    bench.link.wait(number, bench.wait())
    assert reply.message == m.Done(number)
    reply.check()


def test_a_refusal_is_raised_by_its_own_call(bench: Bench) -> None:
    refused, fine = SingleReply(), SingleReply()
    numbers = [bench.link.open(refused), bench.link.open(fine)]
    bench.say(m.Failed(numbers[0], *to_wire(KeyDeleted("key 'w' was deleted by rank 2"))))
    bench.say(m.Done(numbers[1]))
    bench.link.wait(numbers[1], bench.wait())
    fine.check()
    with pytest.raises(KeyDeleted, match="deleted by rank 2"):
        refused.check()


def test_replies_find_the_calls_of_several_threads_in_any_order(bench: Bench) -> None:
    """Whoever leads receives for all; the lead goes on when its own reply has come."""
    exchanges = [Values(2) for _ in range(6)]
    numbers = [bench.link.open(each) for each in exchanges]
    with ThreadPoolExecutor(len(numbers)) as pool:
        done = [pool.submit(bench.link.wait, number, bench.wait()) for number in numbers]
        for chunk in range(2):
            for number in (*reversed(numbers[3:]), *numbers[:3]):
                bench.say(m.Data(number, chunk), bytes([number, chunk]) * 50_000)
        for each in done:
            each.result(DEADLINE_S)
    for number, exchange in zip(numbers, exchanges, strict=True):
        assert exchange.payloads == [bytes([number, chunk]) * 50_000 for chunk in range(2)]


def test_watched_exchanges_end_although_nobody_waits(bench: Bench) -> None:
    watched, waited = Values(2), SingleReply()
    numbers = [bench.link.open(watched), bench.link.open(waited)]
    bench.link.watch(numbers[0])
    bench.say(m.Data(numbers[0], 0), b"abc")
    bench.say(m.Done(numbers[1]))
    bench.link.wait(numbers[1], bench.wait())  # the link's own thread may lead meanwhile
    bench.say(m.Data(numbers[0], 1), b"def")
    assert watched.ended.wait(DEADLINE_S)
    assert watched.payloads == [b"abc", b"def"]
    again = Values(1)
    number = bench.link.open(again)
    bench.link.watch(number)
    bench.say(m.Data(number, 0), b"ghi")
    assert again.ended.wait(DEADLINE_S)


def test_poll_takes_in_what_has_come(bench: Bench) -> None:
    fault = m.Fault(1, [2], 3, "UpdaterError", "it raised")
    bench.link.poll()
    assert bench.faults == []
    bench.say(fault)
    while not bench.faults:  # a moment on the way, over TCP
        bench.link.poll()
    assert bench.faults == [fault]


def test_replies_to_a_call_that_was_given_up_are_thrown_away(bench: Bench) -> None:
    given_up, other = Values(1), SingleReply()
    numbers = [bench.link.open(given_up), bench.link.open(other)]
    bench.link.drop(numbers[0])
    bench.say(m.Data(numbers[0], 0), bytes(100_000))
    bench.say(m.Failed(numbers[0], "KeyDeleted", "late"))
    bench.say(m.Done(numbers[1]))
    bench.link.wait(numbers[1], bench.wait())
    assert given_up.payloads == []
    assert given_up.error is None


def test_a_deadline_leaves_the_link_usable(bench: Bench) -> None:
    late, next_one = SingleReply(), SingleReply()
    numbers = [bench.link.open(late), bench.link.open(next_one)]
    with pytest.raises(WaitTimeout, match="a call did not finish within 0.1 s"):
        bench.link.wait(numbers[0], bench.wait(0.1))
    bench.link.drop(numbers[0])
    bench.say(m.Done(numbers[0]))
    bench.say(m.Done(numbers[1]))
    bench.link.wait(numbers[1], bench.wait())
    assert late.message is None


def test_a_deadline_is_kept_although_frames_for_others_keep_coming(bench: Bench) -> None:
    """The leader receives a long reply for somebody else, without a pause in which a tick could come."""
    stop = threading.Event()
    number = bench.link.open(SingleReply())
    endless = bench.link.open(Values(1 << 60))

    def chatter() -> None:
        while not stop.is_set():
            bench.say(m.Data(endless, 0), b"more")

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(chatter)
        try:
            with pytest.raises(WaitTimeout):
                bench.link.wait(number, bench.wait(0.2))
        finally:
            stop.set()
        while not done.done():  # make room for its last frames
            bench.link.poll()
        done.result(DEADLINE_S)


def test_a_deadline_inside_a_frame_waits_for_the_rest_of_it(tcp_bench: Bench) -> None:
    """Else the connection would be lost for every other call."""
    bench = tcp_bench
    values = Values(1)
    number, hurried = bench.link.open(values), bench.link.open(SingleReply())
    frame = encode(m.Data(number, 0), 6) + b"abcdef"
    bench.server.send(frame[:-3])
    ticks: list[int] = []

    def rest_after_the_deadline() -> None:
        ticks.append(1)
        if len(ticks) == 2:
            bench.server.send(frame[-3:])

    wait = bench.wait(0.05)
    real = wait.tick

    def tick() -> None:
        rest_after_the_deadline()
        real()

    wait.tick = tick  # type: ignore[method-assign]
    with pytest.raises(WaitTimeout):
        bench.link.wait(hurried, wait)
    assert len(ticks) >= 2
    assert values.payloads == [b"abcdef"]
    fine = SingleReply()
    number = bench.link.open(fine)
    bench.say(m.Done(number))
    bench.link.wait(number, bench.wait())


def test_ctrl_c_inside_a_frame_waits_for_the_rest_of_it(tcp_bench: Bench) -> None:
    bench = tcp_bench
    values = Values(1)
    number, waiting = bench.link.open(values), bench.link.open(SingleReply())
    frame = encode(m.Data(number, 0), 6) + b"abcdef"
    bench.server.send(frame[:-3])
    num_ticks = 0

    def send_rest_at_the_second_tick() -> None:
        nonlocal num_ticks
        num_ticks += 1
        if num_ticks == 2:
            bench.server.send(frame[-3:])

    ctrl_c.noted = True  # as its handler does
    with pytest.raises(Interrupted, match="Ctrl-C in a call"):
        bench.link.wait(waiting, Wait("a call", DEADLINE_S, send_rest_at_the_second_tick))
    assert num_ticks >= 2
    assert values.payloads == [b"abcdef"]
    bench.say(m.Done(waiting))
    bench.link.wait(waiting, bench.wait())


def test_after_ctrl_c_too_the_end_of_a_frame_is_not_awaited_for_ever(
    tcp_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "STALL_S", 0.3)
    monkeypatch.setattr(deadlines, "LOST_GRACE_S", 0.0)
    bench = tcp_bench
    number = bench.link.open(SingleReply())
    bench.server.send(encode(m.Done(number))[:-1])
    ctrl_c.noted = True
    with pytest.raises(Interrupted, match="Ctrl-C in a call"):
        bench.link.wait(number, bench.wait())
    assert not ctrl_c.noted


def test_a_frame_whose_end_never_comes(tcp_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "STALL_S", 0.3)
    monkeypatch.setattr(deadlines, "LOST_GRACE_S", 0.0)
    bench = tcp_bench
    number = bench.link.open(SingleReply())
    bench.server.send(encode(m.Done(number))[:-1])
    with pytest.raises(WaitTimeout):
        bench.link.wait(number, bench.wait(0.1))
    with pytest.raises(PeerLostError, match="the connection to server 1 ended inside a message"):
        bench.link.wait(number, bench.wait())


def poll_until_it_fails(link: ServerLink) -> None:
    """The thread that has ended the calls may still lead, and `poll` does not wait until it has left."""
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        link.poll()


@pytest.mark.parametrize("known", [True, False])
def test_the_end_of_the_connection_ends_every_call(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """Calls that wait, calls nobody waits for, and later ones; the scheduler's word is the cause."""
    monkeypatch.setattr(deadlines, "LOST_GRACE_S", 0.0 if not known else 3.0)
    bench.failure = PeerLostError("worker 1 was lost") if known else None
    watched = [Values(1), Values(1)]
    reply = SingleReply()
    number = bench.link.open(reply)
    first = bench.link.open(watched[0])
    bench.link.watch(first)
    bench.server.shutdown()
    assert watched[0].ended.wait(DEADLINE_S)
    bench.link.wait(number, bench.wait())  # it has ended; its reply tells how
    with pytest.raises(PeerLostError):
        reply.check()
    with pytest.raises(PeerLostError):
        bench.link.wait(bench.link.open(SingleReply()), bench.wait())
    second = bench.link.open(watched[1])
    bench.link.watch(second)
    assert watched[1].ended.wait(DEADLINE_S)
    with pytest.raises(PeerLostError):
        poll_until_it_fails(bench.link)
    for each in watched:
        assert str(each.error).startswith("worker 1 was lost" if known else "server 1 was lost: ")


@pytest.mark.parametrize(
    ("message", "payload", "text"),
    [
        (m.Done(1), b"abc", "Done came with 3 bytes"),
        (m.Data(1, 0), b"abc", "a payload where none belongs"),
        (m.Flush(1, 1), b"", "malformed message"),
        (m.Data(1, 0), b"", "Data where Done belongs"),
        (m.Info(1, [1], [1], [0], [0], "add"), b"", "Info where Done belongs"),
        (m.Done(2), b"", "a reply to request 2, which was never made"),
        (m.Data(3, 0), b"abc", "a reply to request 3, which was never made"),
        (m.Done(-1), b"", "a reply to request -1, which was never made"),
    ],
)
def test_nonsense_from_a_server_ends_the_link(bench: Bench, message: Any, payload: bytes, text: str) -> None:
    number = bench.link.open(SingleReply())
    bench.say(message, payload)
    with pytest.raises(ProtocolError, match=text):
        bench.link.wait(number, bench.wait())
    with pytest.raises(ProtocolError, match=text):  # not whatever stands in the rest of the bytes
        bench.link.wait(number, bench.wait())


@pytest.mark.parametrize("watched", [True, False])
def test_what_goes_wrong_in_an_exchange_is_its_own(bench: Bench, watched: bool) -> None:
    """Memory that cannot be written, say: neither the thread that receives nor other calls suffer."""

    def fail() -> None:
        raise RuntimeError("read-only memory")

    bad, good = Values(1, fail), Values(1)
    numbers = [bench.link.open(bad), bench.link.open(good)]
    if watched:
        bench.link.watch(numbers[0])
    bench.say(m.Data(numbers[0], 0), b"abc")
    bench.say(m.Data(numbers[1], 0), b"abc")
    bench.link.wait(numbers[1], bench.wait())
    assert bad.ended.wait(DEADLINE_S)
    assert "RuntimeError: read-only memory" in str(bad.error)
    assert isinstance(bad.error, TensorKVError)
    assert isinstance(bad.error.__cause__, RuntimeError)


def test_where_there_is_no_memory_for_a_payload_only_its_exchange_fails(bench: Bench) -> None:
    class NoMemory(Values):
        def place(self, message: m.Data, payload_bytes: int) -> list[memoryview]:
            raise RuntimeError("not enough memory")

    bad, good = NoMemory(1), Values(1)
    numbers = [bench.link.open(bad), bench.link.open(good)]
    bench.say(m.Data(numbers[0], 0), bytes(3_000_000))
    bench.say(m.Data(numbers[1], 0), b"abc")
    for number in numbers:
        bench.link.wait(number, bench.wait())
    assert "RuntimeError: not enough memory" in str(bad.error)
    assert good.payloads == [b"abc"]


@pytest.mark.parametrize(("make", "kind"), [(m.Flush, m.Done), (m.AskSettings, m.Settings)])
def test_a_request_knows_its_reply(bench: Bench, make: Any, kind: Any) -> None:
    number, exchange = bench.link.ask(lambda n: make(n, 7))
    bench.link.pump()
    assert bench.hear() == make(number, 7)
    assert exchange.kind is kind


def test_an_error_of_ours_keeps_its_class(bench: Bench) -> None:
    def fail() -> None:
        raise InvalidOut("out for key 'w' cannot be written")

    bad = Values(1, fail)
    number = bench.link.open(bad)
    bench.say(m.Data(number, 0), b"abc")
    bench.link.wait(number, bench.wait())
    assert isinstance(bad.error, InvalidOut)


@pytest.mark.parametrize("watched", [True, False])
def test_the_answer_whom_a_call_waits_for_reaches_it(bench: Bench, watched: bool) -> None:
    number = bench.link.open(Values(1))
    answered = threading.Event()

    def ask() -> None:
        bench.say(m.Waiting(number, [3], "round 2 of 'w'"))
        answered.set()

    wait = Wait("pull of 'w'", 0.01, lambda: None, ask)
    if watched:
        bench.link.watch(number, wait)
        while not answered.is_set():
            wait.tick()
        other = bench.link.open(SingleReply())
        bench.say(m.Done(other))
        bench.link.wait(other, bench.wait())  # then the answer is here, too
        with pytest.raises(WaitTimeout, match="waiting for worker 3, round 2 of 'w'"):
            wait.tick()
    else:
        with pytest.raises(WaitTimeout, match="waiting for worker 3, round 2 of 'w'"):
            bench.link.wait(number, wait)


def test_close_wakes_who_waits(bench: Bench) -> None:
    numbers = [bench.link.open(SingleReply()) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        done = [pool.submit(bench.link.wait, number, bench.wait()) for number in numbers]
        while not bench.link._reading.locked():
            pass
        bench.failure = PeerLostError("this worker has left the job")
        bench.link.close()
        for each in done:
            with pytest.raises(PeerLostError, match="has left the job"):
                each.result(DEADLINE_S)


def test_a_payload_that_nobody_wants_takes_little_memory(bench: Bench) -> None:
    given_up, number = bench.link.open(Values(1)), bench.link.open(SingleReply())
    bench.link.drop(given_up)
    bench.say(m.Data(given_up, 0), bytes(2_500_000))
    bench.say(m.Done(number))
    bench.link.wait(number, bench.wait())
    buffers = link_module._discard(5 << 40 >> 3)
    assert sum(map(len, buffers)) == 5 << 40 >> 3
    assert len({id(each.obj) for each in buffers}) == 1


def test_a_payload_longer_than_any_ends_the_link(tcp_bench: Bench) -> None:
    given_up, number = tcp_bench.link.open(Values(1)), tcp_bench.link.open(SingleReply())
    tcp_bench.link.drop(given_up)
    tcp_bench.server.send(encode(m.Data(given_up, 0), 1 << 62))
    with pytest.raises(ProtocolError, match="for a request that is not there"):
        tcp_bench.link.wait(number, tcp_bench.wait())


# ---- replies in shared memory ----------------------------------------------------------------------


class Filled(Exchange):
    """Takes one reply of 8 bytes."""

    def __init__(self) -> None:
        self.bytes = bytearray(8)
        self.taken: list[Any] = []

    def place(self, message: m.Data, payload_bytes: int) -> list[memoryview]:
        return [memoryview(self.bytes)[:3], memoryview(self.bytes)[3:payload_bytes]]

    def take(self, message: Any) -> bool:
        self.taken.append(message)
        return True


class SharedBench(Bench):
    """A link that shares memory with a server."""

    def __init__(self) -> None:
        listener = UnixListener()
        connection = unix.connect(listener.address[0], DEADLINE_S)
        self.server = listener.accept()
        listener.close()
        self.failure = None
        self.broken_off: list[BaseException] = []
        self.link = ServerLink(
            connection,
            "server 1",
            lambda: self.failure,
            lambda _: None,
            Wait.answered,
            self.broken_off.append,
            Window(),
        )
        self.link.pump()
        assert isinstance(self.server, UnixConnection)
        self.values = SharedValues()
        self.sharing = self.values.share_with(self.server, self.server.send)
        self.sharing.attach(self.hear())
        self.slot = Slot(self.values.allocate(8))
        self.slot.tensor.fill_(7)

    def reply(self, number: int) -> None:
        self.slot.lease.readers += 1
        assert self.sharing.reply(m.Data(number, 0), [Memory(self.slot.tensor)], [self.slot.lease])

    @property
    def num_leases(self) -> int:
        """How many replies were not copied."""
        self.values.settle()
        return self.slot.lease.readers

    def close(self) -> None:
        super().close()
        self.values.close()


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[SharedBench]:
    monkeypatch.setattr(m, "PLACED_BYTES", 8)
    made = SharedBench()
    yield made
    made.close()


def test_a_reply_in_shared_memory_is_copied_and_its_lease_ends(shared: SharedBench) -> None:
    exchange = Filled()
    number = shared.link.open(exchange)
    shared.reply(number)
    assert shared.num_leases == 1
    shared.link.wait(number, shared.wait())
    assert exchange.bytes == bytes([7] * 8)
    assert shared.num_leases == 0


def test_a_reply_that_nobody_wants_any_more_holds_no_lease(shared: SharedBench) -> None:
    number = shared.link.open(Filled())
    shared.link.drop(number)
    shared.reply(number)
    shared.link.poll()
    assert shared.num_leases == 0


def test_a_reply_that_cannot_be_taken_is_the_error_of_its_call_alone(shared: SharedBench) -> None:
    class Full(Filled):
        def place(self, message: m.Data, payload_bytes: int) -> list[memoryview]:
            raise MemoryError("no room")

    exchange = Full()
    number = shared.link.open(exchange)
    shared.reply(number)
    shared.link.wait(number, shared.wait())
    (error,) = exchange.taken
    assert "no room" in str(error)
    assert shared.num_leases == 0


def test_a_copy_from_a_server_that_has_ended_the_connection_does_not_count(shared: SharedBench) -> None:
    """It may write where it likes from then on: half of another value may have been copied."""
    exchange = Filled()
    number = shared.link.open(exchange)
    shared.reply(number)
    shared.server.shutdown()
    shared.failure = PeerLostError("server 1 has failed")
    with pytest.raises(PeerLostError, match="server 1 has failed"):
        shared.link.wait(number, shared.wait())
    assert exchange.taken == []


@pytest.mark.parametrize(
    "message",
    [
        m.Data(1, 0, m.Placed(2, [(1, 0, 8)])),
        m.Data(1, 0, m.Placed(1, [(9, 0, 8)])),
        m.Data(99, 0, m.Placed(1, [])),
        m.ShareSegment(1, 4096),
        m.DropSegment(5),
    ],
    ids=str,
)
def test_shared_memory_that_makes_no_sense_ends_the_connection(shared: SharedBench, message: Any) -> None:
    number = shared.link.open(Filled())
    shared.say(message)
    with pytest.raises(ProtocolError):
        shared.link.wait(number, shared.wait())
    assert not shared.broken_off


@pytest.mark.parametrize(
    "message", [m.Data(1, 0, m.Placed(1, [])), m.ShareSegment(1, 4096), m.DropSegment(1)]
)
def test_where_no_memory_is_shared_there_is_none(bench: Bench, message: Any) -> None:
    number = bench.link.open(Filled())
    bench.say(message)
    with pytest.raises(ProtocolError, match="shared memory"):
        bench.link.wait(number, bench.wait())


def test_a_thread_that_cannot_start_is_tried_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    number, exchange = bench.link.ask(lambda number: m.Flush(number, 1))
    bench.link.pump()
    bench.hear()

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            bench.link.watch(number)
    bench.link.watch(number)
    bench.say(m.Done(number))
    bench.link.wait(number, bench.wait())
    exchange.check()
