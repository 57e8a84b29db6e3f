"""Session: this process as a worker of a job, with its connections to the scheduler and to every server.

Stores of one process share its job. The first store joins it. The process leaves it when the interpreter
exits or, for a job that lives in this process, when the store is closed.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol, final

from tensorkv.config import JobConfig
from tensorkv.errors import (
    MemoryLimitReached,
    NotInJob,
    PeerLostError,
    TensorKVError,
    TransportUnavailable,
    again,
    closed_meanwhile,
)
from tensorkv.interrupts import ORDERLY
from tensorkv.peer.code import CodeTable
from tensorkv.peer.deadlines import Wait, schedulers_word
from tensorkv.peer.handshake import connect_to_server
from tensorkv.transport.base import Connection
from tensorkv.transport.tcp import hostname
from tensorkv.wire import messages as m
from tensorkv.worker import interleave, uncaught
from tensorkv.worker.control import ControlClient
from tensorkv.worker.link import ServerLink
from tensorkv.worker.requests import Asked, Make, replies_of
from tensorkv.worker.signals import WorkerSignals
from tensorkv.worker.window import Window

logger = logging.getLogger(__name__)


class OpenStore(Protocol):
    """What a session needs of the stores opened in it."""

    def on_fault(self, fault: m.Fault) -> None:
        """Handle the failure of a round that this worker contributed to."""

    def close(self) -> None:
        """Leave the store."""


@final
class Session:
    """A worker's place in a job. Safe from any thread.

    `order` is held while one call's messages are queued to all servers, so that every server sees the
    calls of this worker in the same order. Nothing is queued for a store after its Leave.

    Args:
        config: the worker's place.
        code_table: where in-process servers find functions; None if servers are other processes.
        connection: an existing connection to the scheduler, if any; the session takes ownership.

    Raises:
        AuthenticationError, ProtocolVersionError, PeerLostError, TransportUnavailable, WaitTimeout,
        ConnectionError.
    """

    def __init__(
        self,
        config: JobConfig,
        code_table: CodeTable | None = None,
        connection: Connection | None = None,
    ) -> None:
        self.config = config
        self.code_table = code_table
        self.order = threading.Lock()
        self.whole = _Whole(self)
        self.plan_numbers = itertools.count(1)
        self._stores: dict[int, Callable[[], OpenStore | None]] = {}
        self.links: list[ServerLink] = []
        self.window = Window()
        self.closed = False
        self.num_changes_queued = 0  # of options, for every server; the next call sends them
        self.left: set[int] = set()  # numbers of stores; guarded by `order`
        self._broken: TensorKVError | None = None
        self.control = ControlClient(config, self._on_failure, connection)
        try:
            for rank, address in enumerate(self.control.servers()):
                connection = connect_to_server(config, rank, address, self.failure)
                self.links.append(self._link(connection, f"server {rank}"))
        except BaseException as exc:
            lost_server = isinstance(exc, (PeerLostError, TransportUnavailable))
            cause = schedulers_word(self.failure) if lost_server else None
            self.close(m.Abandon("it could not connect to all servers"))
            if cause is not None:
                raise again(cause) from None
            raise

    def _link(self, connection: Connection, name: str) -> ServerLink:
        """Return the link to a server, with shared memory if possible."""
        ends = (self.failure, self._on_fault, self.control.answered, self.broken_off)
        try:
            return ServerLink(connection, name, *ends, self.window)
        except (OSError, MemoryLimitReached) as exc:
            if self.config.transport == "shm":
                raise TransportUnavailable(f"transport='shm': no memory to share with {name}: {exc}") from exc
            logger.warning("no memory to share with %s: %s", name, exc)
            return ServerLink(connection, name, *ends)

    def failure(self) -> TensorKVError | None:
        """Return why the job is broken, None while it is not."""
        return self._broken or self.control.failure

    def broken_off(self, exc: BaseException) -> None:
        """Leave the job, as a signal handler has ended a call in the middle of a critical section.

        The call may have taken effect in part. Others are told at once; later calls here raise PeerLostError.
        Critical are the blocks of `whole`, sending, and waiting for replies.
        """
        self.control.break_off(exc)

    def ended_by(self, exc: BaseException) -> None:
        """Leave the job unless a critical section may end with this exception."""
        if not isinstance(exc, ORDERLY):
            self.broken_off(exc)

    def enter(self, number: int, store: OpenStore, weakly: bool = False) -> None:
        """Register an open store: it receives faults, and is closed when the process leaves the job.

        With `weakly`, only its user's references keep it alive.
        """
        self._stores[number] = weakref.ref(store) if weakly else lambda: store

    def forget(self, number: int) -> None:
        """Remove a store that has ended."""
        self._stores.pop(number, None)

    def stores(self) -> list[OpenStore]:
        """Return the stores that are open."""
        return [store for store in map(self._opened, list(self._stores)) if store is not None]

    def _opened(self, number: int) -> OpenStore | None:
        found = self._stores.get(number)
        return found and found()

    def check_open(self, store: int) -> None:
        """Raise StoreClosed if another thread has closed the store meanwhile. Called with the order held."""
        if store in self.left:
            raise closed_meanwhile("a call")

    def wait(
        self,
        what: str,
        timeout_s: float,
        ask: Callable[[], None] | None = None,
        store: int = 0,
        whom: Callable[[], str] | None = None,
    ) -> Wait:
        """Return a deadline for one call. It also ends when another thread closes the store."""

        def failure() -> TensorKVError | None:
            return self.failure() or (closed_meanwhile(what) if store in self.left else None)

        return Wait(what, timeout_s, failure, ask, whom)

    def ask_all(
        self,
        make: Make,
        what: str,
        timeout_s: float,
        store: int,
        servers: Sequence[int] | None = None,
    ) -> list[Any]:
        """Send a request to every server (or to `servers`) and return their replies, by rank.

        Raises:
            WaitTimeout, PeerLostError, StoreClosed, or the first refusal.
        """
        ranks = range(len(self.links)) if servers is None else servers
        with self.order, self.whole:
            self.check_open(store)
            asked: Asked = [(rank, *self.links[rank].ask(make)) for rank in ranks]
        self.pump()
        self.await_asked(asked, what, timeout_s, store)
        return replies_of(asked)

    def tell_all(self, message: m.Message, store: int) -> None:
        """Send every server a message that has no answer, unless the store is left."""
        with self.order, self.whole:
            if store in self.left:
                return
            for link in self.links:
                link.put(message)
        for link in self.links:
            link.pump()

    def await_asked(self, asked: Asked, what: str, timeout_s: float, store: int, keep: bool = False) -> None:
        """Wait until these requests have ended, as in `await_replies`."""
        waits = [(self.links[rank], number) for rank, number, _ in asked]
        self.await_replies(waits, what, timeout_s, store, keep=keep)

    def await_replies(
        self,
        numbers: list[tuple[ServerLink, int]],
        what: str,
        timeout_s: float,
        store: int,
        size_bytes: int = 0,
        keep: bool = False,
    ) -> None:
        """Wait until these exchanges have ended. One deadline for all.

        After an error they are given up, or with `keep` stay open. `size_bytes` is the approximate size of
        the replies; large ones arrive from all servers at once.
        """
        current = 0

        def ask() -> None:
            self.ask_waiting(*numbers[current], store)

        def whom() -> str:
            return numbers[current][0].name

        wait = self.wait(what, timeout_s, ask if store else None, store, whom)

        def turn_to(place: int) -> None:
            nonlocal current
            current = place

        try:
            if interleave.pays(numbers, size_bytes):
                interleave.receive_in_turn(numbers, wait, turn_to)
            for current in range(len(numbers)):
                link, number = numbers[current]
                link.wait(number, wait)
        except BaseException as exc:
            for link, number in () if keep else numbers:
                link.drop(number)
            self.ended_by(exc)
            raise

    def whom(self, numbers: list[tuple[ServerLink, int]], what: str, store: int) -> str:
        """Return whom these exchanges, which another thread receives, wait for; "" if none waits."""
        open_ones = ((link, number) for link, number in numbers if link.is_open(number))
        link, number = next(open_ones, (None, 0))
        if link is None:
            return ""
        wait = self.wait(what, 0.0, lambda: self.ask_waiting(link, number, store), store, lambda: link.name)
        with link.answering(number, wait):
            return wait.find_out()

    def ask_waiting(self, link: ServerLink, number: int, store: int) -> None:
        """Ask a server whom a request waits for; the link passes the answer to its Wait."""
        with self.order:
            if store not in self.left:
                link.put(m.AskWaiting(number, store))
        link.pump()

    def pump(self) -> None:
        """Send what is queued for the servers, as far as possible without blocking.

        A call that sends to some servers does so first if changes of options are queued: no server lacks for
        long what another has.
        """
        self.num_changes_queued = 0
        for link in self.links:
            link.pump()

    def poll(self) -> None:
        """Receive what the servers have already sent. Never blocks."""
        try:
            for link in self.links:
                link.poll()
        except BaseException as exc:
            self.ended_by(exc)
            raise

    def close(self, last_words: m.Message) -> None:
        """End all connections, after a Goodbye or an Abandon."""
        if self.closed:
            return
        self.closed = True
        if self._broken is None:
            self._broken = PeerLostError("this worker has left the job")
        self.control.close(last_words)
        for link in self.links:
            link.close()

    def _on_failure(self, error: TensorKVError) -> None:
        for link in self.links:
            link.shutdown()

    def _on_fault(self, fault: m.Fault) -> None:
        store = self._opened(fault.store)
        if store is not None:
            store.on_fault(fault)


@final
class _Whole:
    """A critical section: other ranks, or other threads, rely on it to be done whole; see `broken_off`.

    `with job.order, job.whole:` sends several messages that belong together.
    """

    def __init__(self, job: Session) -> None:
        self._job = job

    def __enter__(self) -> None:
        """Do nothing: nothing is sent yet."""

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: object) -> None:
        if exc is not None:
            self._job.ended_by(exc)


def _forked(config: JobConfig, parent: int) -> NotInJob:
    return NotInJob(
        f"this process {os.getpid()} was forked from worker {config.rank} (process {parent}), which holds "
        "the only place of that rank in the job: a child (of a DataLoader, say) cannot join it. Use the "
        "store in the worker itself, and hand tensors over to it"
    )


_lock = threading.Lock()
_joined: dict[int, Session] = {}  # by process id: a forked child has none


def check_not_forked(config: JobConfig) -> None:
    """Raise NotInJob if this process was forked from a worker that has joined the job."""
    if _joined and os.getpid() not in _joined:
        raise _forked(config, next(iter(_joined)))


def join(config: JobConfig, connection: Connection | None = None) -> Session:
    """Return this process's place in its job; the first call joins it.

    `connection` is an existing connection to the scheduler, if any.

    Raises:
        NotInJob: this process was forked from a worker, which holds the place.
        What `Session` raises.
    """
    with _lock:
        job = _joined.get(os.getpid())
        if job is None:
            check_not_forked(config)
            job = Session(config, connection=connection)
            _joined[os.getpid()] = job
            who = f"worker {config.rank} (process {os.getpid()} on {hostname()})"
            atexit.register(leave, job, _watch_end(who))
        return job


def _watch_end(who: str) -> WorkerSignals:
    """Handle what may end this process: signals, and an uncaught exception."""
    signals = WorkerSignals(who)
    uncaught.install(signals.leaving)
    return signals


def leave(job: Session, signals: WorkerSignals | None = None) -> None:
    """Leave the job as the interpreter exits: in good order, or as lost after an uncaught exception."""
    if _joined.get(os.getpid()) is not job or job.closed:
        return
    try:
        _leave(job)
    finally:
        if signals is not None:
            signals.stop()


def _leave(job: Session) -> None:
    error = None if hasattr(sys, "ps1") else getattr(sys, "last_value", None)
    if error is not None:
        job.close(m.Abandon(f"it ended with {type(error).__name__}: {error}"))
        return
    for store in job.stores():
        try:
            store.close()
        except TensorKVError as error:  # no caller is left to raise it to
            logger.error("while leaving the job: %s", error)
    job.close(m.Goodbye())
