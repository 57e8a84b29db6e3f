"""A worker's requests to a scheduler in the hands of the test."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest

from tensorkv.config import JobConfig
from tensorkv.errors import KeyNotInitialized, PeerLostError, TensorKVError, WaitTimeout, to_wire
from tensorkv.interrupts import Interrupted, ctrl_c
from tensorkv.peer import deadlines
from tensorkv.peer.handshake import accept
from tensorkv.transport.base import Connection
from tensorkv.transport.endpoint import listen
from tensorkv.wire import messages as m
from tensorkv.wire.codec import Decoder, encode
from tensorkv.worker import control
from tensorkv.worker.control import ControlClient

DEADLINE_S = 20.0
decoder: Decoder[Any] = Decoder(m.ToScheduler)


class Scheduler:
    """Accepts one worker, and says what the test wants."""

    def __init__(self, host: str) -> None:
        listener = listen(host)
        address = listener.address
        config = JobConfig(
            role="worker",
            rank=0,
            num_workers=2,
            num_servers=2,
            scheduler_host=address[0],
            scheduler_port=address[1],
            token="t",
            timeout_s=DEADLINE_S,
        )
        self.failures: list[TensorKVError] = []
        self.failed = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            joined = pool.submit(ControlClient, config, self._fail)
            self.connection: Connection = listener.accept()
            accept(self.connection, "t", lambda role, rank: None)
            self.client = joined.result(DEADLINE_S)
        listener.close()
        assert isinstance(self.hear(), m.Register)

    def _fail(self, error: TensorKVError) -> None:
        self.failures.append(error)
        self.failed.set()

    def hear(self) -> Any:
        messages: list[Any] = []

        def sink(body: memoryview, payload_bytes: int) -> list[memoryview]:
            messages.append(decoder.decode(body))
            return []

        self.connection.receive(sink)
        return messages[0]

    def say(self, message: Any) -> None:
        self.connection.send(encode(message))

    def close(self) -> None:
        self.client.close(m.Goodbye())
        self.connection.shutdown()
        self.connection.close()


@pytest.fixture(params=["inproc", "127.0.0.1"])
def scheduler(request: pytest.FixtureRequest) -> Iterator[Scheduler]:
    made = Scheduler(request.param)
    yield made
    made.close()


@pytest.fixture
def asked(scheduler: Scheduler) -> Iterator[Callable[..., Future[Any]]]:
    """Make a barrier request in a thread; return its future once the scheduler has it."""
    pool = ThreadPoolExecutor(4)

    def ask(timeout_s: float = DEADLINE_S) -> Future[Any]:
        request = scheduler.client.request
        future = pool.submit(request, lambda n: m.Barrier(n, 1), "barrier", timeout_s, 1)
        heard = scheduler.hear()
        assert isinstance(heard, m.Barrier)
        future.number = heard.request  # type: ignore[attr-defined]
        return future

    yield ask
    pool.shutdown()


def test_replies_find_their_requests_in_any_order(
    scheduler: Scheduler, asked: Callable[..., Future[Any]]
) -> None:
    first, second = asked(), asked()
    assert first.number != second.number  # type: ignore[attr-defined]
    for each in (second, first):
        scheduler.say(m.Done(each.number))  # type: ignore[attr-defined]
        assert each.result(DEADLINE_S) == m.Done(each.number)  # type: ignore[attr-defined]


def test_a_refusal_is_raised(scheduler: Scheduler, asked: Callable[..., Future[Any]]) -> None:
    call = asked()
    scheduler.say(m.Failed(call.number, *to_wire(KeyNotInitialized("key 'w'"))))  # type: ignore[attr-defined]
    with pytest.raises(KeyNotInitialized, match="key 'w'"):
        call.result(DEADLINE_S)


def test_servers_are_waited_for(scheduler: Scheduler) -> None:
    with ThreadPoolExecutor(1) as pool:
        servers = pool.submit(scheduler.client.servers)
        scheduler.say(m.Welcome([m.ServerAddress("a", 1), m.ServerAddress("b", 2)]))
        assert servers.result(DEADLINE_S) == [m.ServerAddress("a", 1), m.ServerAddress("b", 2)]


def test_joining_is_not_listed_once_it_is_done(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines, "_noted", type(deadlines._noted)())
    scheduler.client._welcome.wait.tick()  # it has waited for a while
    assert [wait.what for wait in deadlines.waiting_calls()] == ["joining the job"]
    scheduler.say(m.Welcome([m.ServerAddress("a", 1), m.ServerAddress("b", 2)]))
    scheduler.client.servers()
    assert deadlines.waiting_calls() == []


def test_a_deadline_names_who_is_missing_and_gives_up(
    scheduler: Scheduler, asked: Callable[..., Future[Any]]
) -> None:
    call = asked(0.05)
    number = call.number  # type: ignore[attr-defined]
    assert scheduler.hear() == m.AskWaiting(number, 1)
    scheduler.say(m.Waiting(number, [1], "a barrier"))
    assert scheduler.hear() == m.GiveUp(1, number)
    scheduler.say(m.Failed(number, *to_wire(WaitTimeout("a barrier was given up"))))
    with pytest.raises(WaitTimeout, match="barrier .* waiting for worker 1, a barrier"):
        call.result(DEADLINE_S)
    after = asked()
    scheduler.say(m.Done(after.number))  # type: ignore[attr-defined]
    after.result(DEADLINE_S)


@pytest.mark.parametrize("refused", [False, True])
def test_a_reply_that_meets_the_deadline_counts(
    scheduler: Scheduler, asked: Callable[..., Future[Any]], refused: bool
) -> None:
    call = asked(0.05)
    number = call.number  # type: ignore[attr-defined]
    assert scheduler.hear() == m.AskWaiting(number, 1)
    scheduler.say(m.Waiting(number, [1], "a barrier"))
    assert scheduler.hear() == m.GiveUp(1, number)
    reply = m.Failed(number, *to_wire(KeyNotInitialized("key 'w'"))) if refused else m.Done(number)
    scheduler.say(reply)  # it was on its way before the scheduler heard of the deadline
    with pytest.raises(KeyNotInitialized, match="key 'w'") if refused else nullcontext():
        assert call.result(DEADLINE_S) == reply


@pytest.mark.parametrize("made", [False, True])
def test_ctrl_c_is_like_a_deadline(scheduler: Scheduler, made: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that was made all the same counts, and Ctrl-C is noted again."""
    monkeypatch.setattr(ctrl_c, "_watched", True)  # no thread delivers it to this test

    def answer() -> None:
        number = scheduler.hear().request
        ctrl_c.noted = True  # as its handler does
        assert scheduler.hear() == m.GiveUp(1, number)
        withdrawn = m.Failed(number, *to_wire(WaitTimeout("a barrier was given up")))
        scheduler.say(m.Done(number) if made else withdrawn)

    with ThreadPoolExecutor(1) as pool:
        answered = pool.submit(answer)
        with nullcontext() if made else pytest.raises(Interrupted, match="^Ctrl-C in barrier, since 0 s"):
            scheduler.client.request(lambda n: m.Barrier(n, 1), "barrier", DEADLINE_S, 1)
        answered.result(DEADLINE_S)
    noted, ctrl_c.noted = ctrl_c.noted, False
    assert noted == made


def test_a_scheduler_that_does_not_say_whether_a_call_was_made(
    scheduler: Scheduler, asked: Callable[..., Future[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "ASK_GRACE_S", 0.05)
    call = asked(0.05)
    number = call.number  # type: ignore[attr-defined]
    assert scheduler.hear() == m.AskWaiting(number, 1)
    scheduler.say(m.Waiting(number, [], ""))
    assert scheduler.hear() == m.GiveUp(1, number)
    with pytest.raises(WaitTimeout, match="barrier did not finish"):
        call.result(DEADLINE_S)
    scheduler.say(m.Done(number))  # too late, and nobody minds
    after = asked()
    scheduler.say(m.Done(after.number))  # type: ignore[attr-defined]
    after.result(DEADLINE_S)


@pytest.mark.parametrize("lost", [True, False])
def test_a_broken_job_ends_every_request(
    scheduler: Scheduler, asked: Callable[..., Future[Any]], lost: bool
) -> None:
    calls = [asked(), asked()]
    if lost:
        scheduler.say(m.Lost("server", 0, "node", "killed"))
        scheduler.say(m.Lost("worker", 1, "node", "because of that"))
        text = "server 0 on host node was lost: killed"
    else:
        text = "the scheduler on host .* is gone: its connection ended without a goodbye"
    scheduler.connection.shutdown()
    for call in calls:
        with pytest.raises(PeerLostError, match=text):
            call.result(DEADLINE_S)
    with pytest.raises(PeerLostError, match=text):
        scheduler.client.request(lambda n: m.Barrier(n, 1), "barrier", DEADLINE_S, 1)
    with pytest.raises(PeerLostError, match=text):
        scheduler.client.servers()
    assert scheduler.failed.wait(DEADLINE_S)
    assert len(scheduler.failures) == 1


def test_close_says_its_last_words_and_ends_requests(
    scheduler: Scheduler, asked: Callable[..., Future[Any]]
) -> None:
    call = asked()
    scheduler.client.close(m.Abandon("it fell over"))
    assert scheduler.hear() == m.Abandon("it fell over")
    with pytest.raises(EOFError):
        scheduler.hear()
    with pytest.raises(PeerLostError, match="this worker has left the job"):
        call.result(DEADLINE_S)
    with pytest.raises(PeerLostError, match="this worker has left the job"):
        scheduler.client.request(lambda n: m.Barrier(n, 1), "barrier", DEADLINE_S, 1)
    assert scheduler.failures == []


def test_answers_to_nobody_are_passed_over(scheduler: Scheduler, asked: Callable[..., Future[Any]]) -> None:
    ended = asked()
    for _ in range(2):
        scheduler.say(m.Done(ended.number))  # type: ignore[attr-defined]
    ended.result(DEADLINE_S)
    scheduler.say(m.Waiting(1234, [1], "a barrier"))
    call = asked()
    scheduler.say(m.Done(call.number))  # type: ignore[attr-defined]
    call.result(DEADLINE_S)


ENTRY = m.KeyEntry("w", 1, (4,), "float32", 0, [m.SliceEntry(1, 7, 0, 4)])


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (m.Stop(), "Stop is not for a worker to hear"),
        (m.CommitDecision(1, 1, True, 1.0, None), "CommitDecision is not for a worker to hear"),
        (m.Joined(1, 1), "Joined where Done belongs"),
        (m.Done(1234), "a reply to request 1234, which was never made"),
        (m.Welcome([]), "a welcome to 0 servers"),
        (m.Entries(1, [ENTRY]), "on server 7"),
        (m.Flush(1, 1), "malformed message"),
    ],
)
def test_nonsense_from_a_scheduler_ends_every_request(
    scheduler: Scheduler, asked: Callable[..., Future[Any]], message: Any, text: str
) -> None:
    call = asked()
    scheduler.say(message)
    with pytest.raises(PeerLostError, match=text):
        call.result(DEADLINE_S)
    with pytest.raises(EOFError):  # and the scheduler learns that this worker is gone
        scheduler.hear()


def test_a_fault_of_ours_ends_every_request(
    scheduler: Scheduler,
    asked: Callable[..., Future[Any]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody reads what the scheduler says after it."""

    def fail(reply: Any, num_servers: int) -> None:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr("tensorkv.worker.control.check_reply", fail)
    call = asked()
    scheduler.say(m.Done(1))
    with pytest.raises(PeerLostError, match="a fault"):
        call.result(DEADLINE_S)
    assert "ZeroDivisionError: a fault" in caplog.text
