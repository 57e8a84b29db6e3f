"""Work: the handle of a call that was started with `async_op=True`, as in torch.distributed."""

from __future__ import annotations

import concurrent.futures
import functools
import logging
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, final

from tensorkv.errors import PeerLostError, WaitTimeout

logger = logging.getLogger(__name__)


def _tell_unseen(what: str, future: concurrent.futures.Future[Any]) -> None:
    error = future.exception()
    if error is not None and not isinstance(error, PeerLostError):  # that one every later call raises
        logger.warning("%s with async_op, whose Work nobody waited for: %s", what, error)


@final
class Work:
    """A call that may still be going on. It is complete when the blocking call would have returned."""

    def __init__(
        self,
        future: concurrent.futures.Future[Any],
        what: str,
        timeout_s: float | None = None,
        whom: Callable[[], str] | None = None,
    ) -> None:
        self._future = future
        self._what = what
        self._timeout_s = timeout_s  # how long the blocking call would wait
        self._whom = whom  # finds out whom the call waits for; may take a moment
        self._seen = False  # whether somebody has asked how it ended

    @classmethod
    def completed(cls, value: Any, what: str) -> Work:
        """Return a work that is done and has `value` as its result."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        future.set_result(value)
        return cls(future, what)

    def wait(self, timeout: float | timedelta | None = None) -> bool:
        """Block until the call is complete and return True.

        Args:
            timeout: seconds, or a timedelta; None waits as long as the call itself would.

        Raises:
            WaitTimeout: `timeout` passed; the call goes on and may be waited for again.
            TensorKVError: what the blocking call would have raised.
        """
        self._result(timeout)
        return True

    def is_completed(self) -> bool:
        """Return whether the call is complete, also if it failed. Never blocks."""
        return self._future.done()

    def result(self) -> Any:
        """Block until complete and return what the blocking call would have returned."""
        return self._result(None)

    def exception(self) -> BaseException | None:
        """Return the error of a complete call, None if it succeeded. Blocks until complete."""
        self._seen = True
        return self._future.exception()

    def _result(self, timeout: float | timedelta | None) -> Any:
        timeout_s = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
        whom = None
        if timeout_s is None:  # nobody is asked at the end of a shorter wait: those may come by the thousand
            timeout_s, whom = self._timeout_s, self._whom
        self._seen = True
        try:
            return self._future.result(timeout_s)
        except concurrent.futures.TimeoutError as exc:
            self._seen = self._future.done()
            if self._seen:  # the call itself ended with a timeout of its own
                raise
            text = f"{self._what} is not complete after {timeout_s:g} s"
            missing = whom and whom()
            raise WaitTimeout(f"{text}: {missing}" if missing else text) from exc

    def __del__(self) -> None:
        """A call whose error nobody has seen is told of in the log: nothing else would."""
        if not self._seen and not sys.is_finalizing():
            self._future.add_done_callback(functools.partial(_tell_unseen, self._what))

    def __repr__(self) -> str:
        return f"Work({self._what}, {'completed' if self.is_completed() else 'pending'})"
