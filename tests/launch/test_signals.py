"""Signals as something to wait for."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from tensorkv.launch.signals import SignalInbox


def test_signals_come_in_order_and_others_are_left_out() -> None:
    with SignalInbox() as inbox:
        for signum in (signal.SIGTERM, signal.SIGCHLD, signal.SIGINT, signal.SIGHUP):
            os.kill(os.getpid(), signum)
        received = list[int]()
        while len(received) < 3:
            received += inbox.wait(10.0)
        assert received == [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
        assert inbox.wait(0.0) == []


def test_another_thread_ends_the_wait() -> None:
    with SignalInbox() as inbox:
        thread = threading.Thread(target=inbox.wake)
        thread.start()
        assert inbox.wait(None) == []
        thread.join(10.0)


def test_waking_never_blocks() -> None:
    with SignalInbox() as inbox:
        for _ in range(100_000):  # more than a pipe holds
            inbox.wake()
        assert inbox.wait(0.0) == []


def test_everything_is_as_before_afterwards() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.getsignal(signal.SIGINT)
    outer = signal.set_wakeup_fd(write)
    try:
        with SignalInbox():
            assert signal.getsignal(signal.SIGINT) is not before
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        assert signal.set_wakeup_fd(outer) == write
        os.close(read)
        os.close(write)


def test_an_ignored_hangup_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with SignalInbox() as inbox:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert inbox.wait(0.0) == []
    finally:
        signal.signal(signal.SIGHUP, before)


def test_only_the_main_thread_has_signals() -> None:
    errors = list[str]()

    def enter() -> None:
        with pytest.raises(RuntimeError) as caught, SignalInbox():
            pass
        errors.append(str(caught.value))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join(10.0)
    assert errors == ["a job is run from the main thread, where signals arrive"]


def test_a_wish_for_a_report_is_no_wish_to_end() -> None:
    with SignalInbox() as inbox:
        assert not inbox.take_report()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert inbox.wait(10.0) == []
        assert inbox.take_report()
        assert not inbox.take_report()
