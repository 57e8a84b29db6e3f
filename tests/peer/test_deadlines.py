"""Deadlines with a clock of the test's own."""

from __future__ import annotations

import errno
import logging
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from tensorkv.errors import PeerLostError, ProtocolError, TensorKVError, WaitTimeout
from tensorkv.peer import deadlines
from tensorkv.peer.deadlines import Taken, Wait, ended_because, lost_error, scheduler_lost_error
from tensorkv.wire import messages as m


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(deadlines, "time", SimpleNamespace(monotonic=made.monotonic))
    monkeypatch.setattr(deadlines, "_noted", weakref.WeakSet())
    return made


class Call:
    """A call that waits; `asked` counts how often it asked whom for."""

    def __init__(self, timeout_s: float, answer: m.Waiting | None = None) -> None:
        self.asked = 0
        self.answer = answer
        self.failure: TensorKVError | None = None
        self.wait = Wait("pull of 'w'", timeout_s, lambda: self.failure, self.ask)

    def ask(self) -> None:
        self.asked += 1
        if self.answer is not None:
            self.wait.answered(self.answer)


MISSING = m.Waiting(1, [3, 5], "round 812 of 'w'")


def test_nothing_happens_before_ten_seconds(clock: Clock) -> None:
    call = Call(100.0)
    clock.now += 9.9
    call.wait.tick()
    assert call.asked == 0


def test_a_line_every_ten_seconds(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    call = Call(100.0, MISSING)
    with caplog.at_level(logging.WARNING):
        for _ in range(100):
            clock.now += 0.45
            call.wait.tick()
    assert call.asked == 4
    assert caplog.messages == [
        f"pull of 'w': waiting for workers 3, 5, round 812 of 'w', {seconds} s"
        for seconds in (10, 20, 30, 40)
    ]


def test_no_line_if_nobody_is_known_to_be_missing(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    call = Call(100.0, m.Waiting(1, [], ""))
    with caplog.at_level(logging.WARNING):
        clock.now += 10
        call.wait.tick()
    assert call.asked == 1
    assert caplog.messages == []


def test_the_deadline_names_who_is_missing(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    call = Call(5.0, MISSING)
    clock.now += 5
    with caplog.at_level(logging.WARNING):
        call.wait.tick()  # asks; the answer is here by the next tick
    clock.now += 0.25
    with pytest.raises(
        WaitTimeout,
        match="^pull of 'w' did not finish within 5 s: waiting for workers 3, 5, round 812 of 'w'$",
    ):
        call.wait.tick()
    assert caplog.messages == []


def test_an_answer_is_waited_for_only_so_long(clock: Clock) -> None:
    call = Call(5.0)
    clock.now += 5
    call.wait.tick()
    clock.now += deadlines.ASK_GRACE_S - 0.1
    call.wait.tick()
    clock.now += 0.1
    with pytest.raises(WaitTimeout, match="^pull of 'w' did not finish within 5 s$"):
        call.wait.tick()
    assert call.asked == 1


def test_an_old_answer_does_not_count_at_the_deadline(clock: Clock) -> None:
    call = Call(15.0, MISSING)
    clock.now += 10
    call.wait.tick()
    call.answer = m.Waiting(1, [7], "round 813 of 'w'")
    clock.now += 5
    call.wait.tick()
    with pytest.raises(WaitTimeout, match="waiting for worker 7, round 813"):
        call.wait.tick()


def test_of_several_answers_the_one_that_names_somebody_counts(clock: Clock) -> None:
    call = Call(5.0)
    clock.now += 5
    call.wait.tick()
    for answer in (m.Waiting(1, [], ""), MISSING, m.Waiting(2, [], "")):
        call.wait.answered(answer)
    with pytest.raises(WaitTimeout, match="workers 3, 5"):
        call.wait.tick()


def follow_from(wait: Wait, waiting: m.Waiting, asked: list[m.Waiting]) -> None:
    wait.answered(waiting, lambda: asked.append(waiting))


def test_the_log_waits_for_what_the_missing_ranks_wait_for(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    call, asked = Call(100.0), list[m.Waiting]()
    clock.now += 10.5
    call.wait.tick()
    follow_from(call.wait, m.Waiting(1, [1], "push 3 of 'w'"), asked)
    assert (asked, call.wait.open_question, caplog.messages) == (
        [m.Waiting(1, [1], "push 3 of 'w'")],
        True,
        [],
    )
    call.wait.followed(m.Stuck(2, 1, "a barrier", [0]))
    assert not call.wait.open_question
    assert caplog.messages == [
        "pull of 'w': waiting for worker 1, push 3 of 'w'; worker 1 waits in a barrier for worker 0, 10 s"
    ]
    clock.now += 10.0
    call.wait.tick()
    follow_from(call.wait, MISSING, asked)
    call.wait.followed(m.Stuck(3, 0, "", []))
    assert caplog.messages[1:] == ["pull of 'w': waiting for workers 3, 5, round 812 of 'w', 20 s"]


def test_the_deadline_waits_for_what_the_missing_ranks_wait_for(clock: Clock) -> None:
    call = Call(5.0)
    clock.now += 5.0
    call.wait.tick()
    follow_from(call.wait, MISSING, [])
    clock.now += 1.9
    call.wait.tick()
    call.wait.followed(m.Stuck(3, 5, "a barrier", [0, 3]))
    with pytest.raises(
        WaitTimeout, match="workers 3, 5, round .*; worker 5 waits in a barrier for workers 0, 3$"
    ):
        call.wait.tick()


def test_a_scheduler_that_does_not_follow_holds_a_deadline_up_only_so_long(clock: Clock) -> None:
    call = Call(5.0)
    clock.now += 5.0
    call.wait.tick()
    follow_from(call.wait, MISSING, [])
    clock.now += 2.1
    with pytest.raises(WaitTimeout, match="waiting for workers 3, 5, round 812 of 'w'$"):
        call.wait.tick()


def test_without_anybody_to_ask_the_deadline_is_the_deadline(clock: Clock) -> None:
    wait = Wait("joining the job", 5.0, lambda: None)
    clock.now += 4.9
    wait.tick()
    clock.now += 0.1
    with pytest.raises(WaitTimeout, match="^joining the job did not finish within 5 s$"):
        wait.tick()


def silent(timeout_s: float) -> Wait:
    """Return a wait for a server that never answers."""
    return Wait("pull of 'w'", timeout_s, lambda: None, lambda: None, lambda: "server 1")


def test_who_does_not_answer_is_named(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    wait = silent(35.0)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            clock.now += 10
            wait.tick()
    assert caplog.messages == [
        f"pull of 'w': waiting for server 1, which does not answer, {seconds} s" for seconds in (20, 30)
    ]
    clock.now += 5
    wait.tick()
    clock.now += deadlines.ASK_GRACE_S
    with pytest.raises(WaitTimeout, match="within 35 s: waiting for server 1, which does not answer$"):
        wait.tick()


def test_who_cannot_be_asked_is_named(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    wait = Wait("close", 15.0, lambda: None, whom=lambda: "server 1")
    with caplog.at_level(logging.WARNING):
        clock.now += 10
        wait.tick()
    assert caplog.messages == ["close: waiting for server 1, 10 s"]
    clock.now += 5
    with pytest.raises(WaitTimeout, match="^close did not finish within 15 s: waiting for server 1$"):
        wait.tick()


def test_calls_that_wait_are_listed_until_they_end(clock: Clock) -> None:
    call = Call(100.0, MISSING)
    assert deadlines.waiting_calls() == []
    clock.now += 1
    call.wait.tick()
    other = silent(100.0)
    clock.now += 1
    other.tick()
    assert deadlines.waiting_calls() == [call.wait, other]
    assert [wait.thread for wait in deadlines.waiting_calls()] == ["MainThread"] * 2
    assert [wait.describe() for wait in deadlines.waiting_calls()] == [
        "pull of 'w', since 2 s",
        "pull of 'w', since 1 s",
    ]
    call.wait.ask()
    other.ask()
    assert [wait.open_question for wait in deadlines.waiting_calls()] == [False, True]
    assert call.wait.describe() == "pull of 'w', since 2 s: waiting for workers 3, 5, round 812 of 'w'"
    assert other.describe() == "pull of 'w', since 1 s: waiting for server 1, which does not answer"
    other.end()
    assert deadlines.waiting_calls() == [call.wait]
    clock.now += deadlines.RECENT_S  # it has not ticked since: it has ended
    assert deadlines.waiting_calls() == []


def test_a_question_that_was_not_for_the_log_is_not_logged(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    call = Call(100.0, MISSING)
    with caplog.at_level(logging.WARNING):
        call.wait.tick()
        call.wait.ask()
    assert caplog.messages == []


def test_a_broken_job_ends_the_wait_at_once(clock: Clock) -> None:
    call = Call(100.0)
    call.failure = PeerLostError("worker 1 was lost")
    with pytest.raises(PeerLostError, match="worker 1 was lost"):
        call.wait.tick()


@pytest.mark.parametrize(("hostname", "named"), [("node7", "node7"), ("", "?")])
def test_a_lost_process_is_named(hostname: str, named: str) -> None:
    error = lost_error(m.Lost("worker", 1, hostname, "killed"))
    assert str(error) == f"worker 1 on host {named} was lost: killed"


def test_each_call_raises_an_error_of_its_own(clock: Clock) -> None:
    """One that several threads raise collects the tracebacks, and so the tensors, of all."""
    call = Call(100.0)
    call.failure = PeerLostError("worker 1 was lost")
    raised = []
    for _ in range(2):
        with pytest.raises(PeerLostError) as caught:
            call.wait.tick()
        raised.append(caught.value)
    assert raised[0] is not raised[1]
    assert call.failure.__traceback__ is None


def broken(cause: Exception) -> ConnectionError:
    """Return the error of a connection that the system has ended for this cause."""
    error = ConnectionError(f"the connection to 10.0.0.7:1 is gone: {cause}")
    error.__cause__ = cause
    return error


KILLED = "its connection ended without a goodbye, as when a process is killed or crashes"


@pytest.mark.parametrize(
    ("cause", "text"),
    [
        (EOFError("10.0.0.7:1 ended the connection"), KILLED),
        (broken(ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")), KILLED),
        (
            broken(TimeoutError(errno.ETIMEDOUT, "Connection timed out")),
            "its host does not answer (Connection timed out)",
        ),
        (
            broken(OSError(errno.EHOSTUNREACH, "No route to host")),
            "its host does not answer (No route to host)",
        ),
        (ProtocolError("a malformed message"), "its connection ended: a malformed message"),
    ],
)
def test_why_a_connection_ended_is_said_in_plain_words(cause: Exception, text: str) -> None:
    assert ended_because(cause) == text
    error = scheduler_lost_error("10.0.0.7", cause)
    assert str(error) == f"the scheduler on host 10.0.0.7 is gone: {text}"


def test_a_lock_that_is_not_free_is_waited_for_with_a_deadline() -> None:
    lock = threading.Lock()

    def take() -> str:
        """Take it in another thread, with no patience; return what came of it."""
        try:
            with Taken(lock, lambda: Wait("a call", 0.0, lambda: None, whom=lambda: "another thread")):
                return "taken"
        except WaitTimeout as exc:
            return str(exc)

    with ThreadPoolExecutor(1) as pool:
        with Taken(lock, lambda: Wait("a call", 20.0, lambda: None)):
            for _ in range(2):  # whoever has not got it does not set it free
                text = pool.submit(take).result(20.0)
                assert text == "a call did not finish within 0 s: waiting for another thread"
        assert pool.submit(take).result(20.0) == "taken"
