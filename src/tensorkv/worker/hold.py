"""Hold: what would change a store waits in its worker while the store is saved.

All workers make the call, so all hold back what their other threads do to the store. A call's messages
are queued to all servers with the job's order held, and so does the hold begin: each call goes to every
server before it, or to none until it ends.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

from tensorkv.peer.deadlines import taken
from tensorkv.transport.base import TICK_S
from tensorkv.worker.session import Session


@final
class Hold:
    """The hold of one store in one worker. Safe from any thread.

    `on` tells whether changes are held back. It does not change while the job's order is held.
    """

    def __init__(self, job: Session, store: int, timeout_s: float) -> None:
        self._job = job
        self._store = store
        self._timeout_s = timeout_s
        self._calls = threading.RLock()  # held by the call that is under way
        self._over = threading.Event()
        self._over.set()
        self.on = False  # a plain attribute: every push looks at it

    @contextmanager
    def one_call(self, what: str) -> Iterator[None]:
        """Make one call at a time that all workers make together; a second thread's waits for the first's.

        Args:
            what: names the call, for texts.

        Raises:
            WaitTimeout, PeerLostError, StoreClosed: it had to wait, and that ended so.
        """
        wait = self._job.wait(
            what, self._timeout_s, store=self._store, whom=lambda: "another thread, which saves or loads"
        )
        with taken(self._calls, wait):
            yield

    @contextmanager
    def back(self) -> Iterator[None]:
        """Hold changes back, within `one_call`. Those already begun are on their way to every server.

        Within `Session.whole`, too: Ctrl-C as it ends may leave them held back.
        """
        try:
            with self._job.order:
                self.on = True
                self._over.clear()
            yield
        finally:
            with self._job.order:
                self.on = False
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
        """Hold the job's order at a moment at which nothing is held back; `what` names the call.

        Blocks until there is one.

        Raises:
            WaitTimeout, PeerLostError, StoreClosed.
        """
        while True:
            self.wait(what)
            with self._job.order, self._job.whole:
                if not self.on:
                    yield
                    return
