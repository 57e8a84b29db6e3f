"""Ctrl-C: real signals to this process, in calls of the test's own."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tensorkv import interrupts
from tensorkv.interrupts import CtrlC, Interrupted, Leaving, is_within

DEADLINE_S = 20.0


@pytest.fixture
def ctrl_c() -> Iterator[CtrlC]:
    """Return one of the test's own that has taken SIGINT; put the handler of before back."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    made = CtrlC()
    made.begin_call()
    yield made
    signal.signal(signal.SIGINT, before)
    made.noted = False


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def call(*steps: Callable[[], Any]) -> None:
    """Do these steps as if they were in a call of a distributed store."""
    names: dict[str, Any] = {"__name__": "tensorkv.stores.dist"}
    exec("def call(steps):\n    for step in steps:\n        step()", names)
    names["call"](steps)


def go_on() -> None:
    """Stay in user code, where Ctrl-C ends this."""
    threading.Event().wait(DEADLINE_S)


def wait(ctrl_c: CtrlC) -> None:
    ctrl_c.check(lambda: "pull of 'w', since 3 s")


def test_outside_of_a_call_it_is_raised_at_once(ctrl_c: CtrlC) -> None:
    with pytest.raises(KeyboardInterrupt):
        press()
    assert not ctrl_c.noted


def test_a_wait_raises_what_was_noted(ctrl_c: CtrlC) -> None:
    done: list[str] = []
    with pytest.raises(Interrupted, match=r"^Ctrl-C in pull of 'w', since 3 s$"):
        call(press, lambda: done.append("finished"), lambda: wait(ctrl_c), go_on)
    assert done == ["finished"]
    wait(ctrl_c)  # only once


def test_without_a_wait_it_is_raised_when_the_call_has_returned(ctrl_c: CtrlC) -> None:
    done: list[str] = []

    def user_code() -> None:
        call(press, lambda: done.append("finished"))
        go_on()

    with pytest.raises(KeyboardInterrupt):
        user_code()
    assert done == ["finished"]
    assert not ctrl_c.noted


def test_the_next_call_may_be_the_first_to_raise_it(ctrl_c: CtrlC, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctrl_c, "_watched", True)  # as if its thread were slow
    call(press)
    with pytest.raises(KeyboardInterrupt):
        ctrl_c.begin_call()
    ctrl_c.begin_call()


def test_a_second_one_is_raised_wherever_the_call_is(ctrl_c: CtrlC) -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        call(press, press, go_on)
    assert not isinstance(caught.value, Interrupted)
    call(lambda: wait(ctrl_c))  # both are raised with it


def test_what_is_half_done_is_finished(ctrl_c: CtrlC) -> None:
    done: list[str] = []

    def finish() -> None:
        with ctrl_c.deferred():
            press()
            wait(ctrl_c)
            done.append("finished")

    with pytest.raises(Interrupted):
        call(finish, lambda: wait(ctrl_c))
    assert done == ["finished"]


def test_a_second_one_ends_even_that(ctrl_c: CtrlC) -> None:
    def finish() -> None:
        with ctrl_c.deferred():
            press()
            press()

    with pytest.raises(KeyboardInterrupt):
        call(finish, go_on)
    with pytest.raises(Interrupted):
        call(press, lambda: wait(ctrl_c))


def test_other_threads_raise_nothing(ctrl_c: CtrlC) -> None:
    errors: list[BaseException] = []

    def other() -> None:
        try:
            with ctrl_c.deferred():
                ctrl_c.begin_call()
            wait(ctrl_c)
        except BaseException as exc:  # noqa: BLE001  # the main thread asserts that there is none
            errors.append(exc)

    def run_other() -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    with pytest.raises(Interrupted):
        call(press, run_other, lambda: wait(ctrl_c))
    assert errors == []


def test_what_was_given_up_in_vain_is_raised_later(ctrl_c: CtrlC) -> None:
    """A wait that is answered after all notes it again; also when the thread of the first has ended."""

    def answered() -> None:
        with pytest.raises(Interrupted):
            wait(ctrl_c)
        while ctrl_c._watched:
            threading.Event().wait(interrupts.NUDGE_S)
        ctrl_c.note()

    def user_code() -> None:
        call(press, answered)
        go_on()

    with pytest.raises(KeyboardInterrupt):
        user_code()


def test_a_handler_of_the_users_stays() -> None:
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda signum, frame: pressed.append(signum))
    try:
        made = CtrlC()
        made.begin_call()
        call(press)
        assert pressed == [signal.SIGINT]
        assert not made.noted
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_handler_that_is_set_after_the_call_gets_nothing_of_before(ctrl_c: CtrlC) -> None:
    """A notebook sets another one when a cell has ended."""
    pressed: list[int] = []

    def take() -> None:
        signal.signal(signal.SIGINT, lambda signum, frame: pressed.append(signum))

    call(press, take)
    while ctrl_c._watched:
        threading.Event().wait(interrupts.NUDGE_S)
    assert not ctrl_c.noted
    assert pressed == []


def test_pythons_own_handler_is_replaced_again(ctrl_c: CtrlC) -> None:
    """A notebook sets it before each cell."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ctrl_c.begin_call()
    with pytest.raises(Interrupted):
        call(press, lambda: wait(ctrl_c))


def test_only_the_main_thread_takes_the_signal(ctrl_c: CtrlC) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=ctrl_c.begin_call)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_which_frames_are_within() -> None:
    found: list[bool] = []
    call(lambda: found.append(is_within(sys._getframe(), ("tensorkv.stores.dist",))))
    call(lambda: found.append(is_within(sys._getframe(), ("tensorkv.worker.",))))
    assert found == [True, False]
    assert not is_within(None, ("tensorkv.",))


def test_a_handler_of_the_users_that_calls_this_one_gets_it_at_once(ctrl_c: CtrlC) -> None:
    """In a call, too: it stands in for Python's."""
    before = signal.getsignal(signal.SIGINT)
    assert callable(before)
    signal.signal(signal.SIGINT, lambda signum, frame: before(signum, frame))
    with pytest.raises(KeyboardInterrupt):
        call(press, go_on)
    assert not ctrl_c.noted


def test_a_system_without_a_thread_for_it_is_asked_again(
    ctrl_c: CtrlC, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(interrupts._thread, "start_new_thread", refuse)
        call(press)
    with pytest.raises(KeyboardInterrupt):  # the next call raises it, and a later one is delivered again
        ctrl_c.begin_call()

    def press_in_a_call_and_go_on() -> None:
        call(press)
        go_on()

    with pytest.raises(KeyboardInterrupt):
        press_in_a_call_and_go_on()


def test_a_wait_ends_when_the_process_is_to_leave(ctrl_c: CtrlC) -> None:
    left: list[bool] = []
    ctrl_c.on_leave = lambda: left.append(True)
    with ctrl_c.deferred():
        wait(ctrl_c)
    with pytest.raises(Leaving) as caught:
        wait(ctrl_c)
    assert (left, caught.value.code) == ([True], 0)
    wait(ctrl_c)
