"""PullCall: one pull (or pushpull) of a worker, from its requests to its result."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Sequence
from typing import Any, final

import torch

from tensorkv.errors import TensorKVError
from tensorkv.wire import messages as m
from tensorkv.worker.core import WorkerCore
from tensorkv.worker.link import ServerLink
from tensorkv.worker.plans import Plan
from tensorkv.worker.pusher import Pusher
from tensorkv.worker.session import Session
from tensorkv.worker.transfers import Destinations, PullExchange


@final
class PullCall:
    """A pull in progress.

    Args:
        plan: what to pull.
        destinations: where it goes.
        finish: called once, by the thread that receives the last reply, with the call and the first error or
            None; its return value or exception is the result.

    `up_to` is the number of the last push that was queued before it.
    """

    # Class attributes for what most calls never change, since every small call makes a PullCall.
    up_to = 0
    _first_error: TensorKVError | None = None
    _result: Any = None
    _error: Exception | None = None
    _future: concurrent.futures.Future[Any] | None = None

    def __init__(
        self,
        plan: Plan,
        destinations: Destinations,
        finish: Callable[[PullCall, TensorKVError | None], Any],
    ) -> None:
        self.plan = plan
        self.destinations = destinations
        self.numbers: list[tuple[ServerLink, int]] = []
        self._finish = finish
        self._left = len(plan.parts)
        self._lock = threading.Lock()

    @property
    def has_ended(self) -> bool:
        """Whether every server has answered everything, or refused."""
        return self._left == 0

    def ask(self, job: Session, core: WorkerCore) -> None:
        """Send the requests of a pull."""
        with job.order, job.whole:
            self.queue(core, job.links)
        if job.num_changes_queued:
            job.pump()
        for link, _ in self.numbers:
            link.pump()

    def queue(self, core: WorkerCore, links: Sequence[ServerLink]) -> None:
        """Queue the requests of a pull."""
        core.tell(self.plan)  # first, since it may raise
        self._open(links)
        for server, number in self.replies.items():
            links[server].put(m.Pull(self.plan.number, number))
        self.up_to = core.count

    def push(
        self, job: Session, pusher: Pusher, values: Sequence[torch.Tensor], weight: float | None = None
    ) -> bool:
        """Push, and request the values after the round, which return chunk by chunk.

        Returns False, and has done nothing, if a key is busy or pushes are held back. Raises what
        `Pusher.send` raises.
        """
        self._open(job.links)
        sent = None
        try:
            sent = pusher.send(self.plan, values, True, self, weight)
        finally:
            if sent is None:
                for link, number in self.numbers:
                    link.drop(number)
                self.numbers.clear()
        return sent is not None

    def _open(self, links: Sequence[ServerLink]) -> None:
        self.replies: dict[int, int] = {}
        for part in self.plan.parts:
            link = links[part.server]
            number = link.open(PullExchange(part, self.destinations, self._ended))
            self.numbers.append((link, number))
            self.replies[part.server] = number

    def watch(self) -> concurrent.futures.Future[Any]:
        """Let the threads of the links finish the call; return the future of its result."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        with self._lock:
            self._future = future
            ended = self.has_ended
        if ended:
            self._settle(future)
        for link, number in self.numbers:
            link.watch(number)
        return future

    def result(self) -> Any:
        """Return the result of a call that has ended, or raise its error."""
        if self._error is not None:
            try:
                raise self._error
            finally:  # its traceback references this call, which must not reference it: see `_ended`
                self._error = self._first_error = None
        return self._result

    def _ended(self, error: TensorKVError | None) -> None:
        """Note that one server has answered everything, or refused."""
        with self._lock:
            if error is not None and self._first_error is None:
                self._first_error = error
            if self._left > 1:
                self._left -= 1
                return
        try:
            self._result = self._finish(self, self._first_error)
        except Exception as exc:  # noqa: BLE001  # `result` raises it, or the future
            # Drop our frames, which reference this call and so the caller's tensors: in a cycle these would
            # live until the garbage collector runs, which counts objects and not bytes.
            self._error = exc.with_traceback(None)
        with self._lock:
            self._left = 0
            future = self._future
        if future is not None:
            self._settle(future)

    def _settle(self, future: concurrent.futures.Future[Any]) -> None:
        if self._error is not None:
            future.set_exception(self._error)
        else:
            future.set_result(self._result)
