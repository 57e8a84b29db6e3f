"""Long answers of several servers: taken in frame by frame, whoever sends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tensorkv.errors import PeerLostError, ProtocolError, TensorKVError, WaitTimeout
from tensorkv.peer.deadlines import Wait
from tensorkv.transport.endpoint import connect, listen
from tensorkv.wire import messages as m
from tensorkv.wire.codec import encode
from tensorkv.worker import interleave
from tensorkv.worker.interleave import pays, receive_in_turn
from tensorkv.worker.link import ServerLink
from tensorkv.worker.requests import Exchange

DEADLINE_S = 20.0
NUM_CHUNKS = 4
CHUNK_BYTES = 50_000  # more than is received ahead

Heard = list[tuple[str, int]]


class Answer(Exchange):
    """Chunks, written down as they come."""

    def __init__(self, name: str, heard: Heard) -> None:
        self._name, self._heard = name, heard
        self.error: Any = None

    def place(self, message: m.Data, payload_bytes: int) -> list[memoryview]:
        return [memoryview(bytearray(payload_bytes))]

    def take(self, message: Any) -> bool:
        if isinstance(message, TensorKVError):
            self.error = message
            return True
        self._heard.append((self._name, message.chunk))
        return message.chunk == NUM_CHUNKS - 1


class Server:
    """A link, the server's end of its connection, and one request that is open there."""

    def __init__(self, name: str, heard: Heard, host: str = "127.0.0.1") -> None:
        listener = listen(host)
        connection = connect(*listener.address, DEADLINE_S)
        self.end = listener.accept()
        listener.close()
        connection.max_header_bytes = self.end.max_header_bytes = 1 << 20
        self.failure: TensorKVError | None = None
        self.link = ServerLink(connection, name, lambda: self.failure, _nothing, _pass_on, _nothing)
        self.number = self.link.open(Answer(name, heard))

    def say(self, *chunks: int) -> None:
        for chunk in chunks:
            self.end.send(encode(m.Data(self.number, chunk), CHUNK_BYTES), [bytes(CHUNK_BYTES)])

    def close(self) -> None:
        self.failure = PeerLostError("the test is over")
        self.link.close()
        self.end.shutdown()
        self.end.close()


def _nothing(what: object) -> None:
    """Nobody listens."""


def _pass_on(wait: Wait, waiting: m.Waiting) -> None:
    wait.answered(waiting)


@pytest.fixture
def heard() -> Heard:
    return []


@pytest.fixture
def servers(heard: Heard) -> Iterator[list[Server]]:
    found = [Server("a", heard), Server("b", heard)]
    yield found
    for server in found:
        server.close()


def in_turn(servers: list[Server], timeout_s: float = DEADLINE_S) -> list[int]:
    """Receive from all, and return whose turn it was."""
    turns: list[int] = []
    wait = Wait("a pull", timeout_s, lambda: None)
    receive_in_turn([(server.link, server.number) for server in servers], wait, turns.append)
    return turns


def test_frames_are_taken_from_each_in_turn(servers: list[Server], heard: Heard) -> None:
    for server in servers:
        server.say(*range(NUM_CHUNKS))
    turns = in_turn(servers)
    # The last frame of one ends it: the rest of the other is for whoever waits for that alone.
    assert heard == [(name, chunk) for chunk in range(NUM_CHUNKS) for name in "ab"]
    assert set(turns) == {0}
    assert not any(server.link.is_open(server.number) for server in servers)


def test_one_that_is_late_does_not_hold_up_the_other(servers: list[Server], heard: Heard) -> None:
    late, early = servers
    early.say(*range(NUM_CHUNKS))
    in_turn(servers)
    assert heard == [("b", chunk) for chunk in range(NUM_CHUNKS)]
    assert late.link.is_open(late.number)
    assert not early.link.is_open(early.number)


def test_it_sleeps_while_nobody_has_sent(servers: list[Server], heard: Heard) -> None:
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(in_turn, servers)
        servers[1].say(0)
        servers[0].say(*range(NUM_CHUNKS))
        assert set(done.result(DEADLINE_S)) == {0}
    assert heard[-1] == ("a", NUM_CHUNKS - 1)


def test_where_another_thread_receives_it_is_left_to_that(servers: list[Server], heard: Heard) -> None:
    began, go_on = threading.Event(), threading.Event()

    class Slow(Answer):
        def place(self, message: m.Data, payload_bytes: int) -> list[memoryview]:
            began.set()
            assert go_on.wait(DEADLINE_S)
            return super().place(message, payload_bytes)

    first, second = servers
    number, first.number = first.number, first.link.open(Slow("a", heard))
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(first.link.wait, first.number, Wait("a pull", DEADLINE_S, lambda: None))
        try:
            first.say(*range(NUM_CHUNKS))
            first.number = number
            assert began.wait(DEADLINE_S)  # inside a frame
            second.say(0)
            in_turn(servers)
            assert first.link.is_open(first.number)
            assert second.link.is_open(second.number)
        finally:
            go_on.set()
        other.result(DEADLINE_S)


def test_two_threads_receive_from_the_same_servers(servers: list[Server], heard: Heard) -> None:
    """One of them takes in what both wait for, or they take turns: none is in the other's way."""
    rounds = 50
    links = [server.link for server in servers]
    for _ in range(rounds):
        answers = [[link.open(Answer("x", heard)) for link in links] for _ in range(2)]

        def pull(numbers: list[int]) -> None:
            wait = Wait("a pull", DEADLINE_S, lambda: None)
            pairs = list(zip(links, numbers, strict=True))
            receive_in_turn(pairs, wait, lambda place: None)
            for link, number in pairs:
                link.wait(number, wait)

        with ThreadPoolExecutor(3) as pool:
            done = [pool.submit(pull, numbers) for numbers in answers]
            for chunk in range(NUM_CHUNKS):
                for place, server in enumerate(servers):
                    for numbers in answers:
                        server.number = numbers[place]
                        server.say(chunk)
            for each in done:
                each.result(DEADLINE_S)
    assert len(heard) == rounds * 2 * 2 * NUM_CHUNKS


def test_a_deadline_ends_it_between_frames(servers: list[Server]) -> None:
    with pytest.raises(WaitTimeout, match="a pull did not finish within 0 s"):
        in_turn(servers, timeout_s=0.0)
    for server in servers:  # nothing is broken
        server.say(*range(NUM_CHUNKS))
        server.link.wait(server.number, Wait("a pull", DEADLINE_S, lambda: None))


def test_a_lost_server_is_its_links_error(servers: list[Server]) -> None:
    servers[1].failure = PeerLostError("server 1 was lost")
    servers[1].end.shutdown()
    with pytest.raises(PeerLostError, match="server 1 was lost"):
        in_turn(servers)


def test_bytes_that_are_no_answer_are_an_error(servers: list[Server]) -> None:
    servers[1].end.send(b"x" * 100)
    with pytest.raises((PeerLostError, ProtocolError)):
        in_turn(servers)


def test_a_word_on_whom_it_waits_for_is_handed_to_the_wait(servers: list[Server]) -> None:
    class Asks(Wait):
        heard: m.Waiting | None = None

        def answered(self, waiting: m.Waiting) -> None:
            self.heard = waiting

    late, early = servers
    wait = Asks("a pull", DEADLINE_S, lambda: None)
    word = m.Waiting(late.number, [3], "key 'w'")
    late.end.send(encode(word))
    early.say(*range(NUM_CHUNKS))
    receive_in_turn([(server.link, server.number) for server in servers], wait, lambda place: None)
    assert wait.heard == word


def test_short_answers_and_those_within_a_process_are_waited_for_one_after_the_other(
    servers: list[Server], heard: Heard
) -> None:
    numbers = [(server.link, server.number) for server in servers]
    assert pays(numbers, interleave.MIN_BYTES)
    assert not pays(numbers, interleave.MIN_BYTES - 1)
    assert not pays(numbers[:1], interleave.MIN_BYTES)
    within = Server("c", heard, "inproc")
    assert not pays([*numbers, (within.link, within.number)], interleave.MIN_BYTES)
    within.close()
