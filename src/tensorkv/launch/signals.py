"""Signals to the launcher, as bytes in a pipe that a loop can wait for."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, final

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@final
class SignalInbox:
    """While entered, collects SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGCHLD. In the main thread only.

    An ignored SIGHUP stays ignored (nohup).
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._report_asked = False

    def __enter__(self) -> SignalInbox:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("a job is run from the main thread, where signals arrive")
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._wakeup_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for signum in (*_ENDING, signal.SIGUSR1, signal.SIGCHLD):
            if signum == signal.SIGHUP and signal.getsignal(signum) is signal.SIG_IGN:
                continue
            self._before[signum] = signal.signal(signum, _note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self._wakeup_fd)
        os.close(self._read)
        os.close(self._write)

    def wake(self) -> None:
        """End a `wait` in progress or the next one. From any thread."""
        with contextlib.suppress(BlockingIOError):  # the pipe is full, so `wait` ends anyway
            os.write(self._write, b"\0")

    def wait(self, timeout_s: float | None) -> list[int]:
        """Wait for a signal or `wake`; return the signals that ask to end, in order of arrival."""
        ready, _, _ = select.select([self._read], [], [], timeout_s)
        received = os.read(self._read, 4096) if ready else b""
        self._report_asked = self._report_asked or signal.SIGUSR1 in received
        return [number for number in received if number in _ENDING]

    def take_report(self) -> bool:
        """Whether a SIGUSR1 has been received since the last call."""
        asked, self._report_asked = self._report_asked, False
        return asked


def _note(signum: int, frame: FrameType | None) -> None:
    """Do nothing: the wakeup descriptor receives the number."""
