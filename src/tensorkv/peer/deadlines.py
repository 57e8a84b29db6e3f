"""Waits with a deadline that say whom they wait for: every wait of a worker goes through a `Wait`."""

from __future__ import annotations

import errno
import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import final

from tensorkv.errors import PeerLostError, TensorKVError, WaitTimeout, again
from tensorkv.interrupts import ctrl_c
from tensorkv.transport.base import TICK_S
from tensorkv.wire import messages as m

logger = logging.getLogger(__name__)
_SILENT = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN)
LOG_EVERY_S = 10.0
ASK_GRACE_S = 2.0
LOST_GRACE_S = 2.0
"""Timeout for the scheduler's report of who was lost, once a server is unreachable."""

RECENT_S = 2.0
"""Maximum age of the last tick of a call that counts as waiting; such a call ticks several times in it."""

_lock = threading.Lock()
_noted: weakref.WeakSet[Wait] = weakref.WeakSet()  # calls that have waited, including ended ones


@final
class Wait:
    """The deadline of one call. The call ticks while it waits; `tick` raises if it is to be given up.

    Args:
        what: the call, for texts.
        timeout_s: seconds from now.
        failure: returns why the job is broken, None while it is not.
        ask: asks the other side whom this call waits for; `answered` receives the answer.
        whom: names the other side itself, in case it does not answer or cannot be asked.
    """

    # Class attributes for what most calls never change, since every small call makes a Wait.
    thread = ""  # name of the waiting thread
    _asked_at_end = False
    _to_log = False  # whether to log the next answer that names a rank
    _unanswered = False
    _waiting: m.Waiting | None = None
    _following = False  # whether the scheduler has been asked what those ranks wait for
    _stuck: m.Stuck | None = None
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
        """Raise if the job is broken, Ctrl-C came or the deadline has passed; log every ten seconds."""
        failure = self._failure()
        if failure is not None:
            raise again(failure) from None
        ctrl_c.check(self.describe)
        now = time.monotonic()
        if self._ticked is None:
            self._note()
        self._ticked = now
        waited_s = now - self._begin
        if waited_s >= self._timeout_s:
            self._at_deadline(waited_s)
        elif waited_s >= self._next_log_s:
            self._next_log_s += LOG_EVERY_S
            if self._ask is None or self.open_question:
                self._log(waited_s)
            self._to_log = True
            self.ask()

    def ask(self) -> None:
        """Ask the other side, if it can be asked, whom this call waits for. Safe from any thread."""
        if self._ask is not None:
            self._unanswered = True
            self._ask()

    def answered(self, waiting: m.Waiting, follow: Callable[[], None] | None = None) -> None:
        """Note the other side's answer to `ask`. Of several answers one that names ranks wins.

        Then `follow`, if given, asks the scheduler what these ranks wait for: `followed` gets the answer.
        """
        self._unanswered = False
        if waiting.ranks or self._waiting is None:
            self._waiting, self._stuck = waiting, None
        if waiting.ranks and follow is not None:
            self._following = True
            follow()
        elif waiting.ranks:
            self._log_answer()

    def followed(self, stuck: m.Stuck) -> None:
        """Note the scheduler's answer: one of the ranks that this call waits for waits itself."""
        self._following = False
        self._stuck = stuck if stuck.ranks else None
        self._log_answer()

    def _log_answer(self) -> None:
        waited_s = time.monotonic() - self._begin
        if self._to_log and waited_s < self._timeout_s:
            self._to_log = False
            self._log(waited_s)

    def find_out(self) -> str:
        """Ask whom this call waits for and return the answer; "" if there is none within two seconds."""
        self.ask()
        pause = threading.Event()
        for _ in range(int(ASK_GRACE_S / TICK_S)):
            if not self.open_question:
                break
            pause.wait(TICK_S)
        return self._missing()

    @property
    def open_question(self) -> bool:
        """Whether `ask` has not been answered yet."""
        return self._unanswered or self._following

    def describe(self) -> str:
        """Return one line: the call, how long it has waited, and, as far as known, for whom."""
        missing = self._missing()
        since = f"{self.what}, since {time.monotonic() - self._begin:.0f} s"
        return f"{since}: {missing}" if missing else since

    def _note(self) -> None:
        """List this call as waiting. Not before its first tick, so that a quick call costs nothing."""
        self.thread = threading.current_thread().name
        with _lock:
            _noted.add(self)

    def end(self) -> None:
        """Stop listing this call. Only needed for a Wait that is kept; otherwise the weak list drops it."""
        self._ticked = None

    def order(self) -> tuple[str, float]:
        """Sort key: by thread, then the longest wait first."""
        return self.thread, self._begin

    def is_waiting(self) -> bool:
        """Whether the call ticked within the last two seconds. A call that has ended no longer ticks."""
        return self._ticked is not None and time.monotonic() - self._ticked < RECENT_S

    def _log(self, waited_s: float) -> None:
        missing = self._missing()
        if missing:
            logger.warning("%s: %s, %.0f s", self.what, missing, waited_s)

    def _at_deadline(self, waited_s: float) -> None:
        if self._ask is not None and not self._asked_at_end:
            self._asked_at_end = True
            self._waiting = self._stuck = None
            self.ask()
            return
        if self.open_question and waited_s < self._timeout_s + ASK_GRACE_S:
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
        text = f"waiting for {_workers(self._waiting.ranks)}, {self._waiting.where}"
        if self._stuck is not None:
            text += (
                f"; worker {self._stuck.rank} waits in {self._stuck.where} for {_workers(self._stuck.ranks)}"
            )
        return text


def _workers(ranks: Sequence[int]) -> str:
    return ("worker " if len(ranks) == 1 else "workers ") + ", ".join(map(str, ranks))


def waiting_calls() -> list[Wait]:
    """Return the calls of this process that have waited for a quarter of a second or more, by thread."""
    with _lock:
        noted = list(_noted)
    return sorted((wait for wait in noted if wait.is_waiting()), key=Wait.order)


def lost_error(lost: m.Lost) -> PeerLostError:
    """Return the error that reports a lost process."""
    return PeerLostError(lost_text(lost.role, lost))


def schedulers_word(failure: Callable[[], TensorKVError | None]) -> TensorKVError | None:
    """Wait for the scheduler's report after losing a server; None if none arrives within two seconds.

    When one process dies, several lose their connections. Only the scheduler, which hears of all, knows which
    one died.
    """
    pause = threading.Event()
    for _ in range(int(LOST_GRACE_S / TICK_S)):
        found = failure()
        if found is not None:
            return found
        pause.wait(TICK_S)
    return None


def lost_text(role: str, lost: m.Lost | m.WorkerLost) -> str:
    """Return which process was lost, and why."""
    cause, _, rest = lost.cause.partition("\n")  # without the traceback, which the lost process shows itself
    return f"{role} {lost.rank} on host {lost.hostname or '?'} was lost: {cause}{' ...' if rest else ''}"


def scheduler_lost_error(host: str, cause: BaseException) -> PeerLostError:
    """Return the error of a process whose own connection to the scheduler has ended."""
    return PeerLostError(f"the scheduler on host {host} is gone: {ended_because(cause)}")


@final
class Taken:
    """Holds, within its block, a lock that another call may hold for long.

    Entering raises what `Wait.tick` raises while it waits; `make_wait` is called if it has to.
    """

    __slots__ = ("_lock", "_make_wait")

    def __init__(self, lock: threading.Lock, make_wait: Callable[[], Wait]) -> None:
        self._lock = lock
        self._make_wait = make_wait

    def __enter__(self) -> None:
        if self._lock.acquire(blocking=False):
            return
        wait = self._make_wait()
        while not self._lock.acquire(timeout=TICK_S):
            wait.tick()

    def __exit__(self, *exc: object) -> None:
        self._lock.release()


def broken_off_error(exc: BaseException) -> PeerLostError:
    """Return the error of a worker whose call a signal handler has broken off inside a critical section."""
    return PeerLostError(
        f"a call was broken off by {type(exc).__name__} while it sent or received, so that what it did may "
        "be done in part; this worker has left the job"
    )


def ended_because(cause: BaseException) -> str:
    """Return in plain words why a connection to or from the scheduler has ended."""
    reason = cause.__cause__
    if isinstance(cause, EOFError) or isinstance(reason, (ConnectionResetError, BrokenPipeError)):
        return "its connection ended without a goodbye, as when a process is killed or crashes"
    if isinstance(reason, OSError) and reason.errno in _SILENT:
        return f"its host does not answer ({reason.strerror})"
    return f"its connection ended: {cause}"
