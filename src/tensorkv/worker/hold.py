"""Hold: calls that would change a store wait in their worker while the store is saved.

Each worker that takes part holds back the calls of its own other threads. A call queues its messages to
all servers with the job's order held, and the hold begins with the order held, too. So each call is queued to
every server before the hold, or to none until the hold ends.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import final

from tensorkv.peer.deadlines import Taken
from tensorkv.transport.base import TICK_S
from tensorkv.worker.core import WorkerCore
from tensorkv.worker.session import Session


@final
class Hold:
    """The hold of one store in one worker. Safe from any thread.

    `WorkerCore.held` tells whether changes are held back. It does not change while the job's order is held.
    """

    def __init__(self, job: Session, core: WorkerCore, timeout_s: float) -> None:
        self._job = job
        self._core = core
        self._store = core.store
        self._timeout_s = timeout_s
        self._calls = threading.Lock()  # held by the call in progress
        self._over = threading.Event()
        self._over.set()

    def one_call(self, what: str) -> AbstractContextManager[None]:
        """Make one collective call at a time; the call of a second thread waits for that of the first.

        Args:
            what: names the call, for texts.

        Raises:
            WaitTimeout, PeerLostError, StoreClosed: it had to wait, and the wait failed.
        """
        whom = "another thread, which saves or loads"
        return Taken(
            self._calls,
            lambda: self._job.wait(what, self._timeout_s, store=self._store, whom=lambda: whom),
        )

    @contextmanager
    def back(self) -> Iterator[None]:
        """Hold changes back, within `one_call`. Those already begun are in flight to every server."""
        try:
            with self._job.order:
                self._core.held = True
                self._over.clear()
            yield
        finally:
            with self._job.order:
                self._core.held = False
                self._over.set()

    def wait(self, what: str) -> None:
        """Wait until nothing is held back; `what` names the call.

        Raises:
            WaitTimeout, PeerLostError, StoreClosed.
        """
        if not self._over.is_set():
            wait = self._job.wait(
                what, self._timeout_s, store=self._store, whom=lambda: "another thread, which saves the store"
            )
            while not self._over.wait(TICK_S):
                wait.tick()

    @contextmanager
    def turn(self, what: str) -> Iterator[None]:
        """Hold the job's order at a moment when nothing is held back; `what` names the call.

        Blocks until such a moment.

        Raises:
            WaitTimeout, PeerLostError, StoreClosed.
        """
        while True:
            self.wait(what)
            with self._job.order, self._job.whole:
                if not self._core.held:
                    yield
                    return
