"""Waiting with a deadline, and telling for whom: every wait of a worker goes through a `Wait`."""

from __future__ import annotations

import errno
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import final

from tensorkv.errors import PeerLostError, TensorKVError, WaitTimeout, again
from tensorkv.transport.base import TICK_S
from tensorkv.wire import messages as m

logger = logging.getLogger(__name__)
_SILENT = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN)
LOG_EVERY_S = 10.0
ASK_GRACE_S = 2.0
LOST_GRACE_S = 2.0
"""How long the scheduler has to tell who was lost, once a server cannot be reached any more."""

RECENT_S = 2.0
"""A call that waits ticks several times in this time."""

_lock = threading.Lock()
_noted: weakref.WeakSet[Wait] = weakref.WeakSet()  # calls that have waited, those that have ended too


@final
class Wait:
    """One call's deadline. `tick` is called while it waits, and raises when there is no more to wait for.

    Args:
        what: the call, for texts.
        timeout_s: seconds from now.
        failure: returns why the job is broken, None while it is not.
        ask: asks the other side whom this call waits for; the answer comes by `answered`.
        whom: names the other side itself, for when it does not answer, or cannot be asked.
    """

    # What most calls never come to change stands here, since every small call makes a Wait.
    thread = ""  # the one that waits
    _asked_at_end = False
    _to_log = False  # the next answer that names somebody
    _unanswered = False
    _waiting: m.Waiting | None = None
    _ticked: float | None = None

    def __init__(
        self,
        what: str,
        timeout_s: float,
        failure: Callable[[], TensorKVError | None],
        ask: Callable[[], None] | None = None,
        whom: Callable[[], str] | None = None,
    ) -> None:
        self.what = what
        self._begin = time.monotonic()
        self._timeout_s = timeout_s
        self._failure = failure
        self._ask = ask
        self._whom = whom
        self._next_log_s = LOG_EVERY_S

    def tick(self) -> None:
        """Raise if the job is broken or the deadline has passed; log now and then."""
        failure = self._failure()
        if failure is not None:
            raise again(failure) from None
        now = time.monotonic()
        if self._ticked is None:
            self._note()
        self._ticked = now
        waited_s = now - self._begin
        if waited_s >= self._timeout_s:
            self._at_deadline(waited_s)
        elif waited_s >= self._next_log_s:
            self._next_log_s += LOG_EVERY_S
            if self._ask is None or self._unanswered:
                self._log(waited_s)
            self._to_log = True
            self.ask()

    def ask(self) -> None:
        """Ask whom this call waits for, where somebody can be asked. Safe from any thread."""
        if self._ask is not None:
            self._unanswered = True
            self._ask()

    def answered(self, waiting: m.Waiting) -> None:
        """The other side tells whom this call waits for. Of several answers one that names ranks counts."""
        self._unanswered = False
        if waiting.ranks or self._waiting is None:
            self._waiting = waiting
        waited_s = time.monotonic() - self._begin
        if self._to_log and waited_s < self._timeout_s and waiting.ranks:
            self._to_log = False
            self._log(waited_s)

    def find_out(self) -> str:
        """Ask whom this call waits for, and return that; "" if nobody says. Takes a moment, not long."""
        self.ask()
        pause = threading.Event()
        for _ in range(int(ASK_GRACE_S / TICK_S)):
            if not self._unanswered:
                break
            pause.wait(TICK_S)
        return self._missing()

    @property
    def open_question(self) -> bool:
        """Whether it was asked whom this call waits for, and the answer has not come."""
        return self._unanswered

    def describe(self) -> str:
        """Return one line: the call, since when it waits, and for whom as far as that is known."""
        missing = self._missing()
        since = f"{self.what}, since {time.monotonic() - self._begin:.0f} s"
        return f"{since}: {missing}" if missing else since

    def _note(self) -> None:
        """List this call among those that wait. Only now: a call that is answered at once costs nothing."""
        self.thread = threading.current_thread().name
        with _lock:
            _noted.add(self)

    def end(self) -> None:
        """The call has ended: list it no more. For a Wait that somebody keeps; else it goes by itself."""
        self._ticked = None

    def order(self) -> tuple[str, float]:
        """Sort key: thread, then who has waited longest."""
        return self.thread, self._begin

    def is_waiting(self) -> bool:
        """Whether the call was seen to wait a moment ago. One that has ended ticks no more."""
        return self._ticked is not None and time.monotonic() - self._ticked < RECENT_S

    def _log(self, waited_s: float) -> None:
        missing = self._missing()
        if missing:
            logger.warning("%s: %s, %.0f s", self.what, missing, waited_s)

    def _at_deadline(self, waited_s: float) -> None:
        if self._ask is not None and not self._asked_at_end:
            self._asked_at_end = True
            self._waiting = None
            self.ask()
            return
        if self._unanswered and waited_s < self._timeout_s + ASK_GRACE_S:
            return
        missing = self._missing()
        text = f"{self.what} did not finish within {self._timeout_s:g} s"
        raise WaitTimeout(f"{text}: {missing}" if missing else text)

    def _missing(self) -> str:
        if self._unanswered or self._ask is None:
            if self._whom is None:
                return ""
            return f"waiting for {self._whom()}" + (", which does not answer" if self._unanswered else "")
        if self._waiting is None or not self._waiting.ranks:
            return ""
        workers = "worker" if len(self._waiting.ranks) == 1 else "workers"
        return f"waiting for {workers} {', '.join(map(str, self._waiting.ranks))}, {self._waiting.where}"


def waiting_calls() -> list[Wait]:
    """Return the calls of this process that wait now, and have for a quarter of a second, by thread."""
    with _lock:
        noted = list(_noted)
    return sorted((wait for wait in noted if wait.is_waiting()), key=Wait.order)


def lost_error(lost: m.Lost) -> PeerLostError:
    """Return the error that a lost process is reported with."""
    return PeerLostError(lost_text(lost.role, lost))


def schedulers_word(failure: Callable[[], TensorKVError | None]) -> TensorKVError | None:
    """Return why the job is broken, for somebody who has lost a server; None if nobody tells soon.

    Several may lose each other when one has died. The scheduler, who hears of all, knows which it was.
    """
    pause = threading.Event()
    for _ in range(int(LOST_GRACE_S / TICK_S)):
        found = failure()
        if found is not None:
            return found
        pause.wait(TICK_S)
    return None


def lost_text(role: str, lost: m.Lost | m.WorkerLost) -> str:
    """Say which process was lost, and why."""
    cause, _, rest = lost.cause.partition("\n")  # which may end with a traceback, that its own process shows
    return f"{role} {lost.rank} on host {lost.hostname or '?'} was lost: {cause}{' ...' if rest else ''}"


def scheduler_lost_error(host: str, cause: BaseException) -> PeerLostError:
    """Return the error of a process whose own connection to the scheduler has ended."""
    return PeerLostError(f"the scheduler on host {host} is gone: {ended_because(cause)}")


@contextmanager
def taken(lock: threading.RLock, wait: Wait) -> Iterator[None]:
    """Hold a lock that another call may hold for long. Raises what `wait.tick` does while it is not free.

    The lock is of those that know their thread: Ctrl-C may come when it is taken and nothing yet knows.
    """
    try:
        while not lock.acquire(timeout=TICK_S):
            wait.tick()
        yield
    finally:
        with suppress(RuntimeError):  # this thread has not got it
            lock.release()


def broken_off_error(exc: BaseException) -> PeerLostError:
    """Return the error of a worker in which Ctrl-C, say, has ended a call inside a message."""
    return PeerLostError(
        f"a call was broken off by {type(exc).__name__} while it sent or received, so that what it did may "
        "be done in part; this worker has left the job"
    )


def ended_because(cause: BaseException) -> str:
    """Say in plain words why a connection to or from the scheduler has ended."""
    reason = cause.__cause__
    if isinstance(cause, EOFError) or isinstance(reason, (ConnectionResetError, BrokenPipeError)):
        return "its connection ended without a goodbye, as when a process is killed or crashes"
    if isinstance(reason, OSError) and reason.errno in _SILENT:
        return f"its host does not answer ({reason.strerror})"
    return f"its connection ended: {cause}"
