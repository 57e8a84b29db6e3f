"""ControlClient: a worker's connection to the scheduler."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Any, final

from tensorkv.config import JobConfig
from tensorkv.errors import PeerLostError, ProtocolError, TensorKVError, WaitTimeout, again
from tensorkv.interrupts import ORDERLY, Interrupted, ctrl_c
from tensorkv.peer.deadlines import (
    ASK_GRACE_S,
    Wait,
    broken_off_error,
    lost_error,
    lost_text,
    scheduler_lost_error,
)
from tensorkv.peer.handshake import connect_to_scheduler, receive_message
from tensorkv.transport.base import TICK_S, Connection
from tensorkv.transport.sender import Sender
from tensorkv.transport.tcp import hostname
from tensorkv.wire import messages as m
from tensorkv.wire.codec import Decoder, encode
from tensorkv.wire.validate import check_reply
from tensorkv.worker.requests import RequestTable, SingleReply

logger = logging.getLogger(__name__)
JOIN_TIMEOUT_S = 5.0


@final
class _Reply(SingleReply):
    """The reply to a request. The thread that reads the scheduler's messages wakes the one that waits."""

    def __init__(self, wait: Wait) -> None:
        super().__init__(m.Welcome)
        self.ready = threading.Event()
        self.wait = wait

    def take(self, message: Any) -> bool:
        super().take(message)
        self.ready.set()
        return True

    @property
    def is_made(self) -> bool:
        """Whether the scheduler has replied."""
        return self.message is not None and not isinstance(self.message, TensorKVError)


@final
class ControlClient:
    """Requests to the scheduler, and its announcements. Safe from any thread.

    `on_failure` is called once, from any thread, when the job is declared broken. After `close`, requests
    raise PeerLostError. `connection` is an existing connection to the scheduler, if any.

    Raises:
        PeerLostError, AuthenticationError, ProtocolVersionError, ProtocolError: the job cannot be joined.
    """

    def __init__(
        self,
        config: JobConfig,
        on_failure: Callable[[TensorKVError], None],
        connection: Connection | None = None,
    ) -> None:
        self._on_failure = on_failure
        self._requests = RequestTable()
        self._followed: dict[int, Wait] = {}  # by number of the AskStuck, until it is answered
        joining = Wait(
            "joining the job", config.timeout_s, lambda: self.failure, whom=lambda: "all servers to join it"
        )
        self._welcome = _Reply(joining)
        self.failure: TensorKVError | None = None
        self.num_lost = 0  # workers without which the job goes on
        self._scheduler_host = config.scheduler_host
        self._num_servers = config.num_servers
        self._failing = threading.Lock()  # only one failure counts
        self._connection = connect_to_scheduler(config) if connection is None else connection
        self._sender = Sender(self._connection, "scheduler", self._cannot_send)
        self._thread = threading.Thread(target=self._read, name="tensorkv-control", daemon=True)
        self._thread.start()
        self.notify(m.Register("", 0, hostname(), os.getpid()))

    def servers(self) -> list[m.ServerAddress]:
        """Wait until all servers have joined, and return their addresses."""
        self._await(self._welcome)
        self._welcome.check()
        self._welcome.wait.end()
        servers: list[m.ServerAddress] = self._welcome.message.servers
        return servers

    def notify(self, message: m.Message) -> None:
        """Send a message that has no reply. Never blocks."""
        self._sender.put([encode(message)])
        self._sender.pump()

    def answered(self, wait: Wait, waiting: m.Waiting) -> None:
        """Pass a server's answer to a Wait, and ask what the ranks that it names wait for. Never blocks.

        A server knows who has not pushed; only the scheduler knows who stands in a barrier.
        """

        def follow() -> None:
            number = self._requests.number()
            self._followed[number] = wait
            self.notify(m.AskStuck(number, waiting.ranks))

        wait.answered(waiting, follow)

    def request(self, make: Callable[[int], m.Message], what: str, timeout_s: float, store: int = 0) -> Any:
        """Send a request and wait for its reply.

        Args:
            make: builds the message from the request's number.
            what: the call, for texts.
            timeout_s: seconds.
            store: the store it is about; 0 if none.

        Raises:
            WaitTimeout: no reply in time; the text names who is missing.
            PeerLostError, or the error of a refused request.
        """
        if self.failure is not None:  # the scheduler may still answer, but the job is broken
            raise again(self.failure) from None

        def ask() -> None:
            self.notify(m.AskWaiting(number, store))

        reply = _Reply(Wait(what, timeout_s, lambda: self.failure, ask, lambda: "the scheduler"))
        number, message = self._requests.request(make, reply)
        self.notify(message)
        try:
            self._await(reply)
        except ORDERLY as exc:
            if self.failure is None and store:
                self.notify(m.GiveUp(store, number))
            if not isinstance(exc, (WaitTimeout, Interrupted)) or not store or not self._was_made(reply):
                raise
            if isinstance(exc, Interrupted):
                ctrl_c.note()  # for the next wait of this call, or its end
        except BaseException as exc:  # out of a signal handler: the request may have been made
            self.break_off(exc)
            raise
        finally:
            self._requests.drop(number)
        reply.check()
        return reply.message

    def _was_made(self, reply: _Reply) -> bool:
        """Return whether the reply to a request was in flight when the request was given up.

        The request has then taken effect for the others. An error here would make this rank count wrongly.
        """
        grace_s = (
            0.0 if reply.wait.open_question else ASK_GRACE_S
        )  # an open question: the scheduler does not answer
        answered = reply.ready.wait(grace_s) and reply.is_made
        withdrawn = isinstance(reply.message, m.Failed) and reply.message.name == WaitTimeout.__name__
        return answered and not withdrawn

    def break_off(self, exc: BaseException) -> None:
        """Leave the job, as a call was broken off by this exception: requests raise that from now on."""
        error = broken_off_error(exc)
        if self.failure is None:
            self._fail(error)
            self.notify(m.Abandon(str(error)))

    def close(self, last_words: m.Message) -> None:
        """Send a Goodbye or Abandon and end the connection. Requests that wait raise PeerLostError."""
        self.notify(last_words)
        with self._failing:
            if self.failure is None:
                self.failure = PeerLostError("this worker has left the job")
        self._end_all(self.failure)
        self._sender.close(JOIN_TIMEOUT_S)
        self._connection.shutdown()
        if threading.current_thread() is not self._thread:
            self._thread.join(JOIN_TIMEOUT_S)
        self._connection.close()

    def _await(self, reply: _Reply) -> None:
        while not reply.ready.wait(TICK_S):
            reply.wait.tick()

    def _read(self) -> None:
        decoder: Decoder[m.FromScheduler] = Decoder(m.FromScheduler)
        try:
            while True:
                self._take(receive_message(self._connection, decoder))
        except (EOFError, ConnectionError) as exc:
            self._fail(exc)
        except Exception as exc:  # our own bug: no call may wait for a thread that has ended
            logger.exception("worker: a message of the scheduler could not be handled")
            self._fail(exc)
        self._connection.shutdown()

    def _take(self, message: Any) -> None:
        match message:
            case m.Welcome():
                if self._welcome.message is not None or len(message.servers) != self._num_servers:
                    raise ProtocolError(f"a welcome to {len(message.servers)} servers")
                self._welcome.take(message)
            case m.WorkerLost():
                self.num_lost += 1
                logger.warning("%s; the job goes on without it", lost_text("worker", message))
            case m.Lost():
                self._fail(lost_error(message))
            case m.Waiting():
                waiting = self._requests.exchanges.get(message.request)
                if isinstance(waiting, _Reply):
                    waiting.wait.answered(message)
            case m.Stuck():
                followed = self._followed.pop(message.request, None)
                if followed is not None:
                    followed.followed(message)
            case m.Stop() | m.Gone() | m.CommitDecision():
                raise ProtocolError(f"{type(message).__name__} is not for a worker to hear")
            case _:
                check_reply(message, self._num_servers)
                reply = self._requests.find(message.request)
                if reply is not None:
                    self._requests.take(reply, message.request, message)

    def _cannot_send(self, exc: BaseException) -> None:
        self._fail(exc if isinstance(exc, (ConnectionError, EOFError)) else broken_off_error(exc))

    def _fail(self, exc: BaseException) -> None:
        with self._failing:
            if self.failure is not None:
                return
            if isinstance(exc, PeerLostError):
                self.failure = exc
            else:
                self.failure = scheduler_lost_error(self._scheduler_host, exc)
        self._end_all(self.failure)
        self._on_failure(self.failure)

    def _end_all(self, failure: TensorKVError) -> None:
        self._requests.end_all(failure)
        if self._welcome.message is None:
            self._welcome.take(failure)
