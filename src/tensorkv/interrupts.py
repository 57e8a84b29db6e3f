"""Ctrl-C inside a call of a distributed store: noted, and raised where the call can be given up.

RULES
1. This holds where SIGINT has Python's own handler, and in the main thread, which alone handles signals.
2. Outside of a call Ctrl-C raises KeyboardInterrupt at once. Inside it is only noted, so messages that belong
   together are all sent, and a frame is read to its end.
3. A call that waits looks for it where it looks at its deadline, several times a second (`Wait.tick`), and
   raises Interrupted. What is true after a deadline is then true after Ctrl-C. A call that does not wait
   returns; then a thread, which lives that long, delivers the signal once more, unless the next call
   raises it first.
4. A second Ctrl-C while the first is still noted raises at once, wherever the call is.
5. The handler acquires no lock: the main thread may hold any.
"""

from __future__ import annotations

import _thread
import signal
import sys
import threading
import time
from _signal import getsignal  # type: ignore[import-not-found]  # that of `signal` takes microseconds
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import final

from tensorkv.errors import TensorKVError

NUDGE_S = 0.05
_CALLS = ("tensorkv.stores.dist", "tensorkv.worker.", "tensorkv.peer.")
"""Modules whose calls defer Ctrl-C. A local store has nothing to finish, and runs the user's updaters."""


@final
class Interrupted(KeyboardInterrupt):
    """Ctrl-C, raised where a call could be given up. The text says in which call, and for whom it waited."""


@final
class Leaving(SystemExit):
    """SIGTERM, raised where a call could be given up: see `WorkerSignals`."""


GIVEN_UP = (Interrupted, Leaving)
"""The exceptions of a call that is given up in its wait, as by a deadline."""

ORDERLY = (TensorKVError, *GIVEN_UP)
"""The exceptions that leave a call where others may rely on it. Any other may have come in the middle."""


@final
class CtrlC:
    """The Ctrl-C of this process. The first call in the main thread takes SIGINT, and keeps it."""

    def __init__(self) -> None:
        self.noted = False  # a plain attribute, since every call reads it
        self.on_leave: Callable[[], None] | None = None  # called when the next wait raises Leaving
        self._kept = False
        self._nudged = False
        self._watched = False

    def begin_call(self) -> None:
        """Note that a call begins. Raises KeyboardInterrupt if an earlier call has noted Ctrl-C.

        Looks at the handler each time, since a notebook sets Python's own before each cell.
        """
        if getsignal(signal.SIGINT) is signal.default_int_handler and _in_main_thread():
            signal.signal(signal.SIGINT, self._handle)
        if self.noted and _in_main_thread():
            self.noted = False
            raise KeyboardInterrupt

    def check(self, describe: Callable[[], str]) -> None:
        """Raise Interrupted if Ctrl-C was noted: this call, which `describe` names, can be given up here.

        Raise Leaving if SIGTERM is to end the call.
        """
        if not (self.noted or self.on_leave) or self._kept or not _in_main_thread():
            return
        if self.on_leave is not None:
            on_leave, self.on_leave = self.on_leave, None
            on_leave()
            raise Leaving(0)
        self.noted = False
        raise Interrupted(f"Ctrl-C in {describe()}")

    def note(self) -> None:
        """Let the next wait raise Ctrl-C, or the end of the call. Acquires no lock."""
        self.noted = True
        self._start_to_watch()

    def _start_to_watch(self) -> None:
        if self.noted and not self._watched:
            self._watched = True
            try:
                _thread.start_new_thread(self._watch, ())
            except RuntimeError:  # the system has no thread for it: the next call will raise it
                self._watched = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Do not give up waits within the block: what is half done is finished. Rule 4 still holds."""
        is_main = _in_main_thread()
        try:
            if is_main:
                self._kept = True
            yield
        finally:
            if is_main:
                self._kept = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        nudged, self._nudged = self._nudged, False
        if getsignal(signal.SIGINT) != self._handle:
            pass  # the user's handler has called this one: then Ctrl-C is his
        elif is_within(frame, _CALLS):
            if nudged:
                return  # a call has begun meanwhile
            if not self.noted:
                self.note()
                return
        elif nudged and not self.noted:
            return  # a wait has raised it meanwhile
        self.noted = False
        signal.default_int_handler(signum, frame)

    def _watch(self) -> None:
        """Deliver a noted Ctrl-C when the main thread has left its call, unless the user took SIGINT then."""
        main = threading.main_thread().ident
        assert main is not None
        while self.noted:
            if not is_within(sys._current_frames().get(main), _CALLS):
                if signal.getsignal(signal.SIGINT) == self._handle:
                    self._nudged = True
                    signal.pthread_kill(main, signal.SIGINT)
                else:
                    self.noted = False
            time.sleep(NUDGE_S)
        self._watched = False
        self._start_to_watch()  # it may have been noted once more, just now


def is_within(frame: FrameType | None, modules: tuple[str, ...]) -> bool:
    """Whether this frame, or one that called it, runs code of modules whose names begin so."""
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).startswith(modules):
            return True
        frame = frame.f_back
    return False


def _in_main_thread() -> bool:
    return threading.get_ident() == threading.main_thread().ident


ctrl_c = CtrlC()
