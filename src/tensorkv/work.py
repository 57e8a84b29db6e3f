"""Work: the handle of a call started with `async_op=True`, as in torch.distributed."""

from __future__ import annotations

import concurrent.futures
import logging
import math
import sys
import threading
import weakref
from collections.abc import Callable, Generator
from datetime import timedelta
from typing import Any, final

from tensorkv.errors import InvalidArgument, PeerLostError, WaitTimeout

logger = logging.getLogger(__name__)


def _tell_unseen(what: str, error: BaseException | None) -> None:
    if error is not None and not isinstance(error, PeerLostError):  # every later call raises that one
        logger.warning("%s with async_op, whose Work nobody waited for: %s", what, error)


def _seconds(timeout: Any) -> float:
    """Return a timeout in seconds, clipped to the system's maximum of some centuries."""
    value = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise InvalidArgument(
            f"timeout={timeout!r} is neither a number of seconds, nor a timedelta, nor None"
        )
    return float(min(value, threading.TIMEOUT_MAX))


@final
class Work(concurrent.futures.Future[Any]):
    """A call that may still be in progress. It is complete when the blocking call would have returned.

    In a coroutine it can be awaited: `weight = await kv.pull("w", async_op=True)`. It is a
    `concurrent.futures.Future` too, so `asyncio.wrap_future`, `concurrent.futures.wait` and
    `add_done_callback` take it; callbacks run in the thread that completes the call, and must not block.
    A call in progress cannot be cancelled: `cancel` returns False, and a coroutine that stops waiting, by
    `asyncio.wait_for` say, does not stop the call.
    """

    def __init__(
        self,
        future: concurrent.futures.Future[Any],
        what: str,
        timeout_s: float | None = None,
        whom: Callable[[], str] | None = None,
    ) -> None:
        super().__init__()
        self.set_running_or_notify_cancel()  # now it cannot be cancelled
        self._what = what
        self._timeout_s = timeout_s  # timeout of the blocking call
        self._whom = whom  # finds out which peers the call waits for; may take a moment
        self._seen = False  # whether a caller has asked for the outcome
        self._end = _Completes(self)
        future.add_done_callback(self._end)

    @classmethod
    def completed(cls, value: Any, what: str) -> Work:
        """Return a completed work with `value` as its result.

        Example:
            ```python
            work = tensorkv.Work.completed(7, "pull of key 'w'")
            print(work)  # Work(pull of key 'w', completed)
            print(work.result())  # 7
            ```
        """
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        future.set_result(value)
        return cls(future, what)

    def wait(self, timeout: float | timedelta | None = None) -> bool:
        """Block until the call is complete and return True.

        Args:
            timeout: seconds, or a timedelta; None waits as long as the blocking call would.

        Raises:
            InvalidArgument: `timeout` is not a time.
            WaitTimeout: `timeout` passed; the call goes on, and you may wait for it again.
            TensorKVError: what the blocking call would have raised.

        Example:
            ```python
            kv = tensorkv.create("local")
            kv.init("w", torch.zeros(2))
            work = kv.push("w", torch.ones(2), async_op=True)
            print(work.wait(timeout=30))  # True
            ```
        """
        self._outcome(timeout)
        return True

    def is_completed(self) -> bool:
        """Return whether the call is complete, even if it failed. Never blocks.

        Example:
            ```python
            kv = tensorkv.create("local")
            kv.init("w", torch.zeros(2))
            work = kv.push("w", torch.ones(2), async_op=True)
            work.wait()
            print(work.is_completed())  # True
            ```
        """
        return self.done()

    def result(self, timeout: float | timedelta | None = None) -> Any:
        """Block until complete and return the blocking call's result. Otherwise like `wait`.

        Example:
            ```python
            kv = tensorkv.create("local")
            kv.init("w", torch.zeros(2))
            work = kv.pull("w", async_op=True)
            print(work.result(timeout=30))  # tensor([0., 0.])
            ```
        """
        return self._outcome(timeout)

    def exception(self, timeout: float | timedelta | None = None) -> BaseException | None:
        """Block until complete, or until `timeout`. Return the call's error, None if it succeeded.

        Example:
            ```python
            kv = tensorkv.create("local")
            kv.init("w", torch.zeros(2))
            print(kv.pull("w", async_op=True).exception(timeout=30))  # None
            ```
        """
        self._seen = True
        return super().exception(None if timeout is None else _seconds(timeout))

    def add_done_callback(self, fn: Callable[[Any], object]) -> None:
        """Call `fn(work)` once the call is complete: now, or later in the thread that completes it.

        Example:
            ```python
            kv = tensorkv.create("local")
            kv.init("w", torch.zeros(2))
            values = []
            work = kv.pull("w", async_op=True)
            work.add_done_callback(lambda done: values.append(done.result()))
            work.wait()
            print(values)  # [tensor([0., 0.])]
            ```
        """
        if not self.done():
            self._end.kept = self
        super().add_done_callback(fn)

    def __await__(self) -> Generator[Any, None, Any]:
        """Wait in a coroutine, as long as the blocking call would, and return its result."""
        return self._awaited().__await__()

    async def _awaited(self) -> Any:
        import asyncio  # most programs do not need it

        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.wrap_future(self)
        except TimeoutError as exc:
            if self.done():  # the call's own timeout, or it completed at the last moment
                return self._outcome(None)
            missing = None
            if self._whom is not None:
                missing = await asyncio.to_thread(self._whom)  # may take a moment
            raise self._late(self._timeout_s, missing) from exc

    def _outcome(self, timeout: float | timedelta | None) -> Any:
        timeout_s = None if timeout is None else _seconds(timeout)
        whom = None
        if timeout_s is None:  # a shorter wait asks no peer when it ends: there may be thousands of those
            timeout_s, whom = self._timeout_s, self._whom
        self._seen = True
        try:
            return super().result(timeout_s)
        except concurrent.futures.TimeoutError as exc:
            self._seen = self.done()
            if self._seen:  # the call itself failed with a timeout
                raise
            raise self._late(timeout_s, None if whom is None else whom()) from exc

    def _late(self, timeout_s: float | None, missing: str | None) -> WaitTimeout:
        text = f"{self._what} is not complete after {timeout_s:g} s"
        return WaitTimeout(f"{text}: {missing}" if missing else text)

    def __del__(self) -> None:
        """Log an error that no caller has seen: nothing else would report it."""
        if not self._seen and self.done() and not sys.is_finalizing():
            _tell_unseen(self._what, super().exception())

    def __repr__(self) -> str:
        return f"Work({self._what}, {'completed' if self.is_completed() else 'pending'})"


@final
class _Completes:
    """Completes a work when its call completes. If the work is gone by then, logs the call's error.

    Keeps the work alive, as `kept`, only if it has a callback.
    """

    kept: Work | None = None

    def __init__(self, work: Work) -> None:
        self._work = weakref.ref(work)
        self._what = work._what

    def __call__(self, call: concurrent.futures.Future[Any]) -> None:
        work, error = self._work(), call.exception()
        if work is None:
            _tell_unseen(self._what, error)
        elif error is not None:
            work.set_exception(error)
        else:
            work.set_result(call.result())
        self.kept = None
