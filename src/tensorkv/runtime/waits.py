"""Waiting with a deadline, and telling for whom: every wait of a worker goes through a `Wait`."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from typing import final

from tensorkv.errors import PeerLostError, TensorKVError, WaitTimeout, again
from tensorkv.wire import messages as m

logger = logging.getLogger(__name__)
_SILENT = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN)
LOG_EVERY_S = 10.0
ASK_GRACE_S = 2.0


@final
class Wait:
    """One call's deadline. `tick` is called while it waits, and raises when there is no more to wait for.

    Args:
        what: the call, for texts.
        timeout_s: seconds from now.
        failure: returns why the job is broken, None while it is not.
        ask: asks the other side whom this call waits for; the answer comes by `answered`.
    """

    def __init__(
        self,
        what: str,
        timeout_s: float,
        failure: Callable[[], TensorKVError | None],
        ask: Callable[[], None] | None = None,
    ) -> None:
        self.what = what
        self._begin = time.monotonic()
        self._timeout_s = timeout_s
        self._failure = failure
        self._ask = ask
        self._next_log_s = LOG_EVERY_S
        self._asked_at_end = False
        self._waiting: m.Waiting | None = None

    def tick(self) -> None:
        """Raise if the job is broken or the deadline has passed; log now and then."""
        failure = self._failure()
        if failure is not None:
            raise again(failure) from None
        waited_s = time.monotonic() - self._begin
        if waited_s >= self._timeout_s:
            self._at_deadline(waited_s)
        elif waited_s >= self._next_log_s:
            self._next_log_s += LOG_EVERY_S
            if self._ask is not None:
                self._ask()

    def answered(self, waiting: m.Waiting) -> None:
        """The other side tells whom this call waits for. Of several answers one that names ranks counts."""
        if waiting.ranks or self._waiting is None:
            self._waiting = waiting
        waited_s = time.monotonic() - self._begin
        if waited_s < self._timeout_s and waiting.ranks:
            logger.warning("%s: %s, %.0f s", self.what, _missing(waiting), waited_s)

    def _at_deadline(self, waited_s: float) -> None:
        if self._ask is not None and not self._asked_at_end:
            self._asked_at_end = True
            self._waiting = None
            self._ask()
            return
        if self._ask is not None and self._waiting is None and waited_s < self._timeout_s + ASK_GRACE_S:
            return
        text = f"{self.what} did not finish within {self._timeout_s:g} s"
        if self._waiting is not None and self._waiting.ranks:
            text += f": {_missing(self._waiting)}"
        raise WaitTimeout(text)


def lost_error(lost: m.Lost) -> PeerLostError:
    """Return the error that a lost process is reported with."""
    return PeerLostError(lost_text(lost.role, lost))


def lost_text(role: str, lost: m.Lost | m.WorkerLost) -> str:
    """Say which process was lost, and why."""
    return f"{role} {lost.rank} on host {lost.hostname or '?'} was lost: {lost.cause}"


def scheduler_lost_error(host: str, cause: Exception) -> PeerLostError:
    """Return the error of a process whose own connection to the scheduler has ended."""
    return PeerLostError(f"the scheduler on host {host} is gone: {ended_because(cause)}")


def ended_because(cause: Exception) -> str:
    """Say in plain words why a connection to or from the scheduler has ended."""
    reason = cause.__cause__
    if isinstance(cause, EOFError) or isinstance(reason, (ConnectionResetError, BrokenPipeError)):
        return "its connection ended without a goodbye, as when a process is killed or crashes"
    if isinstance(reason, OSError) and reason.errno in _SILENT:
        return f"its host does not answer ({reason.strerror})"
    return f"its connection ended: {cause}"


def _missing(waiting: m.Waiting) -> str:
    ranks = ", ".join(map(str, waiting.ranks))
    return f"waiting for worker {ranks}, {waiting.where}"
