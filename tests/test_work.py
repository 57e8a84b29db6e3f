"""Work: the handle of a call that may still be going on."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import pytest

from tensorkv.errors import PeerLostError, WaitTimeout
from tensorkv.work import Work


def test_a_completed_work_has_its_value() -> None:
    work = Work.completed(3, "pull")
    assert work.is_completed()
    assert work.wait() is True
    assert work.result() == 3
    assert work.exception() is None
    assert "completed" in repr(work)


def test_a_pending_work_can_be_waited_for_again() -> None:
    future: Future[Any] = Future()
    work = Work(future, "push of 'w'")
    assert not work.is_completed()
    assert "pending" in repr(work)
    with pytest.raises(WaitTimeout, match=r"push of 'w' is not complete after 0\.01 s"):
        work.wait(0.01)
    with pytest.raises(WaitTimeout):
        work.wait(timedelta(milliseconds=1))
    future.set_result("value")
    assert work.wait(timedelta(seconds=1)) is True
    assert work.result() == "value"


def test_wait_wakes_up_when_another_thread_completes_it() -> None:
    future: Future[Any] = Future()
    thread = threading.Thread(target=future.set_result, args=(1,))
    thread.start()
    assert Work(future, "pull").wait(30)
    thread.join(30)


def test_the_error_of_the_call_is_raised() -> None:
    future: Future[Any] = Future()
    future.set_exception(PeerLostError("server 1 is gone"))
    work = Work(future, "pull")
    assert work.is_completed()
    assert isinstance(work.exception(), PeerLostError)
    for call in (work.wait, work.result):
        with pytest.raises(PeerLostError, match="server 1"):
            call()


def test_a_timeout_of_the_call_itself_passes_as_it_is() -> None:
    future: Future[Any] = Future()
    future.set_exception(WaitTimeout("waiting for worker 3"))
    with pytest.raises(WaitTimeout, match="worker 3"):
        Work(future, "pull").wait(5)


def test_an_error_that_nobody_saw_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Also if it comes when the work is gone already; not one that was seen, or that every call raises."""
    for early in (True, False):
        for error in (WaitTimeout("waiting for worker 3"), PeerLostError("worker 3 was lost")):
            future: Future[None] = Future()
            work = Work(future, "push of 'w'")
            if early:
                future.set_exception(error)
            del work
            if not early:
                future.set_exception(error)
    text = "push of 'w' with async_op, whose Work nobody waited for: waiting for worker 3"
    assert caplog.messages == [text] * 2
    seen: Future[None] = Future()
    seen.set_exception(WaitTimeout("waiting for worker 3"))
    assert isinstance(Work(seen, "push of 'w'").exception(), WaitTimeout)
    assert len(caplog.messages) == 2


def test_at_its_own_deadline_a_work_says_whom_it_waits_for() -> None:
    """Not at a shorter one: asking takes a moment."""
    work = Work(Future(), "pull of 'w'", 0.01, lambda: "waiting for worker 3")
    with pytest.raises(WaitTimeout, match="^pull of 'w' is not complete after 0.01 s: waiting for worker 3$"):
        work.wait()
    with pytest.raises(WaitTimeout, match="^pull of 'w' is not complete after 0.02 s$"):
        work.wait(0.02)
