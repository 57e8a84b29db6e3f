"""What SIGUSR1 and SIGTERM do in a worker: report which calls wait for whom, and leave the job.

Ctrl-C is in `tensorkv.interrupts`.

RULES
1. A handler acquires no lock and writes no text, since the main thread may be in the middle of anything: it
   sets plain attributes and increments an eventfd. A thread does the rest.
2. Only a signal without another handler is taken, and only from the main thread. Forked children give it
   back.
3. SIGTERM raises SystemExit(0) in the main thread: at once if it is in the user's code; if it is in a call of
   a store, when that has returned, or after LEAVE_CALL_S seconds: a call that waits then ends at the next
   tick of its wait, as at a deadline. So `with` and `finally` blocks do their work, and the stores are closed
   in good order. A call that neither waits nor returns is broken off WAIT_ENDS_S later, wherever it is.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from types import FrameType
from typing import final

from tensorkv.interrupts import ctrl_c, is_within
from tensorkv.peer.deadlines import waiting_calls

LEAVE_CALL_S = 2.0
"""Timeout in seconds for a call of a store after SIGTERM; `tensorkv run` kills one second later."""

WAIT_ENDS_S = 0.5
"""Time after LEAVE_CALL_S in which a wait ends by itself; it ticks twice as often."""

NUDGE_S = 0.05
ANSWER_S = 1.0
_CALLS = ("tensorkv.store", "tensorkv.stores.", "tensorkv.work", "tensorkv.worker.", "tensorkv.peer.")
_PACKAGE = "tensorkv."


@final
class WorkerSignals:
    """Handles SIGUSR1 and SIGTERM, those that are free, until `stop`; owns a thread if any is.

    Args:
        who: "worker 3 (process 4711 on node7)", for texts.
    """

    def __init__(self, who: str) -> None:
        self._who = who
        self._to_report = False
        self._leave_at: float | None = None  # when a call that still runs is interrupted
        self._left = False
        self._nudged = False
        self._stopping = False
        self.taken: list[int] = []
        if threading.current_thread() is threading.main_thread():
            self.taken = [each for each in (signal.SIGUSR1, signal.SIGTERM) if is_free(each)]
        if not self.taken:
            return
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._serve, name="tensorkv-signals", daemon=True)
        self._thread.start()
        for signum in self.taken:
            signal.signal(signum, self._on_usr1 if signum == signal.SIGUSR1 else self._on_term)
        _installed.append(self)

    def stop(self) -> None:
        """Stop handling, as the process is about to end: SIGTERM then kills it, SIGUSR1 does nothing.

        In the main thread only.
        """
        if not self.taken:
            return
        self._stopping = True
        ctrl_c.on_leave = None
        os.eventfd_write(self._wake, 1)
        self._thread.join()  # first, since it may be about to nudge, which must find our handler
        self._give_back(signal.SIG_IGN)
        os.close(self._wake)

    def leaving(self) -> None:
        """Note that an uncaught exception ends the process already, so that SIGTERM need not."""
        self._left = True

    def forget(self) -> None:
        """Give the signals back, in a forked child, which has neither the thread nor a place in the job."""
        self._give_back(signal.SIG_DFL)
        os.close(self._wake)

    def _give_back(self, usr1: signal.Handlers) -> None:
        for signum in self.taken:
            ours = signal.getsignal(signum) in (self._on_usr1, self._on_term)  # else the user has set one
            if ours:
                signal.signal(signum, usr1 if signum == signal.SIGUSR1 else signal.SIG_DFL)
        self.taken = []
        _installed.remove(self)

    # ---- handlers: between any two steps of the main thread --------------------------------------

    def _on_usr1(self, signum: int, frame: FrameType | None) -> None:
        self._to_report = True
        os.eventfd_write(self._wake, 1)

    def _on_term(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        nudged, self._nudged = self._nudged, False
        if self._left:
            if self._leave_at is None:
                self._leave_at = now
            elif not nudged and now > self._leave_at + LEAVE_CALL_S:
                signal.signal(signum, signal.SIG_DFL)  # it hangs while leaving, and was asked again
                signal.raise_signal(signum)
            return
        if self._leave_at is None:
            self._leave_at = now + LEAVE_CALL_S
            os.eventfd_write(self._wake, 1)
        if not in_store_call(frame) or now >= self._leave_at + WAIT_ENDS_S:
            self._leave()
            raise SystemExit(0)
        if now >= self._leave_at:
            ctrl_c.on_leave = self._leave  # its wait, if it is in one, ends in good order

    def _leave(self) -> None:
        self._left = True
        ctrl_c.on_leave = None

    # ---- the thread ------------------------------------------------------------------------------

    def _serve(self) -> None:
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        while True:
            leaving = self._leave_at is not None and not self._left
            if poller.poll(NUDGE_S * 1000 if leaving else None):
                os.eventfd_read(self._wake)
            if self._stopping:
                return
            if self._to_report:
                self._to_report = False
                sys.stderr.write("\n".join([*report(self._who), ""]))
                sys.stderr.flush()
            if self._leave_at is not None and not self._left and self._is_to_nudge(self._leave_at):
                self._nudged = True
                main = threading.main_thread().ident
                assert main is not None
                signal.pthread_kill(main, signal.SIGTERM)  # the call may have returned

    @staticmethod
    def _is_to_nudge(leave_at: float) -> bool:
        """Whether to send the signal again: not to a wait that is to end. Each makes its tick late."""
        return ctrl_c.on_leave is None or time.monotonic() >= leave_at + WAIT_ENDS_S


def is_free(signum: int) -> bool:
    """Whether this signal has its default effect: it is not handled, in Python or below, and not ignored."""
    mask = 1 << (signum - 1)
    return signal.getsignal(signum) is signal.SIG_DFL and not _masks(os.getpid()) & mask


def handles(pid: int, signum: int) -> bool:
    """Whether a process has a handler for a signal, so that it can be sent without killing it."""
    return bool(_masks(pid, ("SigCgt",)) & 1 << (signum - 1))


def _masks(pid: int, names: tuple[str, ...] = ("SigCgt", "SigIgn")) -> int:
    """Return the signals that a process catches or ignores, as the kernel reports them; 0 if it is gone."""
    found = 0
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as status:
            for line in status:
                name, _, value = line.partition(":")
                if name in names:
                    found |= int(value, 16)
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return found


def in_store_call(frame: FrameType | None) -> bool:
    """Whether this frame, or one that called it, is in a call of a store."""
    return is_within(frame, _CALLS)


def report(who: str) -> list[str]:
    """Return lines that say which calls of this process wait, since when and for whom.

    Asks the other side; blocks for at most a second.
    """
    calls = waiting_calls()
    for wait in calls:
        wait.ask()
    end = time.monotonic() + ANSWER_S
    while any(wait.open_question for wait in calls) and time.monotonic() < end:
        time.sleep(NUDGE_S)
    number = {0: "no call waits", 1: "1 call waits"}.get(len(calls), f"{len(calls)} calls wait")
    lines = [f"tensorkv: {who}: {number}"]
    lines += [f"  {wait.thread}: {wait.describe()}" for wait in calls]
    place = _place_of_main_thread()
    return [*lines, f"  MainThread is at {place}"] if place else lines


def _place_of_main_thread() -> str:
    """Return file, line and function of the main thread's innermost frame outside TensorKV."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and str(frame.f_globals.get("__name__", "")).startswith(_PACKAGE):
        frame = frame.f_back
    if frame is None:
        return ""
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"


_installed: list[WorkerSignals] = []


def _forget_in_child() -> None:
    for each in list(_installed):
        each.forget()


os.register_at_fork(after_in_child=_forget_in_child)
