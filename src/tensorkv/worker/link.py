"""ServerLink: a worker's connection to one server.

Callers receive in their own threads. A caller that waits for an answer takes the lead: it receives frames,
also those for other callers, until its own has arrived. Then another caller takes the lead. So a small
request costs no thread switch. A thread of the link leads only while exchanges that no caller waits in are
in flight (`watch`), as in calls with `async_op`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, final

from tensorkv.errors import PeerLostError, ProtocolError, TensorKVError, WaitTimeout, again
from tensorkv.interrupts import Interrupted, ctrl_c
from tensorkv.peer.deadlines import Wait, schedulers_word
from tensorkv.transport.base import TICK_S, Connection, Tick, no_tick
from tensorkv.transport.sender import Sender, Sent
from tensorkv.transport.stream import StreamConnection
from tensorkv.transport.unix import UnixConnection
from tensorkv.wire import messages as m
from tensorkv.wire.codec import Decoder, encode
from tensorkv.worker.requests import Exchange, Make, RequestTable, SingleReply, error_of
from tensorkv.worker.window import Window, WindowEnd

JOIN_TIMEOUT_S = 5.0
STALL_S = 10.0
"""Timeout in seconds for the rest of a frame once the deadline of its receiver has passed."""

DISCARD_BYTES = 1 << 20
MAX_DISCARDED_BYTES = 1 << 40
"""Maximum size of a discarded payload, more than any chunk has; a longer one ends the connection."""

_decoder: Decoder[m.FromServer] = Decoder(m.FromServer)


@final
class ServerLink:
    """Sends messages to one server and hands its replies to the exchanges that wait for them.

    Args:
        connection: after its handshake.
        name: "server 1", for texts.
        failure: returns why the job is broken, None while it is not.
        on_fault: called with every Fault of this server.
        on_waiting: called with what this server answers when a Wait asks whom it waits for.
        broken_off: called when a send, or the link's own thread, ends by an error that is not the
            connection's: what it did may be done in part.
        window: memory to share with the server, if the connection can hand it over.

    Raises:
        OSError: there is no memory to share.
    """

    def __init__(
        self,
        connection: Connection,
        name: str,
        failure: Callable[[], TensorKVError | None],
        on_fault: Callable[[m.Fault], None],
        on_waiting: Callable[[Wait, m.Waiting], None],
        broken_off: Callable[[BaseException], None],
        window: Window | None = None,
    ) -> None:
        self.name = name
        self._connection = connection
        self._failure = failure
        self._on_fault = on_fault
        self._on_waiting = on_waiting
        self._broken_off = broken_off
        self._sender = Sender(connection, name.replace(" ", "-"), self._cannot_send)
        self._requests = RequestTable()
        self.open, self.drop = self._requests.open, self._requests.drop  # without a call in between
        self._exchanges = self._requests.exchanges  # those that have not ended
        self._waits: dict[int, Wait] = {}
        self._reading = threading.Lock()  # its holder leads
        self._turn = threading.Condition(
            threading.RLock()
        )  # notified when an exchange ends or the lead is free
        self._waiting = 0  # threads in _turn.wait; changed with _turn held
        self._message: Any = None  # the one that the leader is receiving
        self._tick: Tick = no_tick  # of the leader
        self._stalled = 0  # how often its deadline has come inside a frame
        self._watched: set[int] = set()  # exchanges that no caller waits in; guarded by _turn
        self._thread: threading.Thread | None = None
        self._closing = False
        self._lost: TensorKVError | None = None  # why nothing more can be received; guarded by _reading
        self.shared: WindowEnd | None = None
        if window is not None and isinstance(connection, UnixConnection):
            self.shared = window.open_to(connection, self._put_frame)

    # ---- sending ---------------------------------------------------------------------------------

    def ask(self, make: Make, parts: list[memoryview] | None = None) -> tuple[int, SingleReply]:
        """Queue, like `put`, the request that `make` builds from its number; return number and exchange."""
        exchange = SingleReply()
        number, message = self._requests.request(make, exchange)
        self.put(message, parts)
        return number, exchange

    def put(
        self, message: m.Message, parts: list[memoryview] | None = None, on_sent: Sent | None = None
    ) -> None:
        """Queue a message. The caller keeps the order between servers, and calls `pump` afterwards."""
        if parts:
            self._sender.put([encode(message, sum(map(len, parts))), *parts], on_sent)
        else:
            self._sender.put([encode(message)], on_sent)

    def _put_frame(self, frame: bytes, on_sent: Sent | None) -> None:
        self._sender.put([frame], on_sent)

    def pump(self) -> None:
        """Send as much of the queue as possible without blocking."""
        self._sender.pump()

    def _cannot_send(self, exc: BaseException) -> None:
        if not isinstance(exc, (ConnectionError, EOFError)):
            self._broken_off(exc)
        self._connection.shutdown()

    @property
    def cut_off(self) -> TensorKVError | None:
        """Return why frames are dropped instead of sent; None while they are not."""
        return PeerLostError(f"the connection to {self.name} has ended") if self._sender.failed else None

    # ---- receiving -------------------------------------------------------------------------------

    def wait(self, number: int, wait: Wait) -> None:
        """Block until the exchange with this number has ended.

        Raises:
            WaitTimeout, PeerLostError: it has not.
        """
        self._waits[number] = wait  # like `answering`, whose context manager costs a microsecond more
        try:
            self._lead_until(lambda: number not in self._exchanges, wait.tick)
        finally:
            self._waits.pop(number, None)

    @contextmanager
    def answering(self, number: int, wait: Wait) -> Iterator[None]:
        """Within the block, pass the server's reports of whom this exchange waits for to `wait`."""
        self._waits[number] = wait
        try:
            yield
        finally:
            self._waits.pop(number, None)  # the watching thread may have removed it

    def is_open(self, number: int) -> bool:
        """Whether the exchange with this number has not ended."""
        return number in self._exchanges

    @property
    def carries_values(self) -> bool:
        """Whether values travel through a socket instead of shared memory."""
        return self.shared is None and isinstance(self._connection, StreamConnection)

    def fileno(self) -> int:
        """Return a descriptor that polls as readable when data, or the end of the connection, has arrived."""
        return self._connection.fileno()

    def readable(self) -> bool:
        """Whether something has arrived that was not received yet. For the leader only."""
        return self._connection.readable()

    def begin_to_lead(self, tick: Tick) -> bool:
        """Take the lead if it is free: until `end_leading` only this thread receives here."""
        leads = self._reading.acquire(blocking=False)
        if leads:
            self._tick, self._stalled = tick, 0
        return leads

    def end_leading(self) -> None:
        """Release the lead."""
        self._reading.release()
        if self._waiting:
            self._tell()

    def receive_one(self) -> None:
        """Receive one frame and dispatch it. For the leader only."""
        self._receive()

    def poll(self) -> None:
        """Receive what has already arrived, without blocking, unless another thread leads."""
        if self.begin_to_lead(self._check_failure):
            try:
                while self._connection.readable():
                    self._receive()
            finally:
                self.end_leading()

    def watch(self, number: int, wait: Wait | None = None) -> None:
        """Let the link's thread receive for this exchange, which no caller waits in.

        Args:
            number: of the exchange.
            wait: gets the server's reports of whom the exchange waits for, if it asks.
        """
        with self._turn:
            if self._thread is None:
                thread = threading.Thread(
                    target=self._lead_watched, name=f"tensorkv-receive-{self.name}", daemon=True
                )
                thread.start()
                self._thread = thread
            self._watched.add(number)
            if wait is not None:
                self._waits[number] = wait
            self._turn.notify_all()

    def close(self) -> None:
        """End the connection."""
        self._closing = True
        self._sender.close(JOIN_TIMEOUT_S)
        self._connection.shutdown()
        with self._turn:
            self._turn.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(JOIN_TIMEOUT_S)
        self._connection.close()

    def shutdown(self) -> None:
        """Wake all waiting threads, as the job is broken."""
        self._connection.shutdown()

    def _lead_until(self, done: Callable[[], bool], tick: Tick) -> None:
        while not done():
            if self.begin_to_lead(tick):
                try:
                    ended = done()  # the previous leader may have received it just before
                    while not ended:
                        self._receive()
                        ended = done()
                        if not ended:
                            tick()  # frames for others may arrive without a pause
                finally:
                    self.end_leading()
                if ended:
                    return
            else:
                with self._turn:
                    self._waiting += 1
                    try:
                        if not done() and self._reading.locked():
                            self._turn.wait(TICK_S)
                    finally:
                        self._waiting -= 1
                if not done():
                    tick()

    def _patient_tick(self) -> None:
        """The leader's tick; neither its deadline nor Ctrl-C stops the receiving of a frame in its middle.

        That would end the connection for all callers.
        """
        try:
            self._tick()
        except (Interrupted, WaitTimeout) as exc:
            self._stalled += 1
            if not self._connection.in_frame or self._stalled * TICK_S > STALL_S:
                raise
            if isinstance(exc, Interrupted):
                ctrl_c.note()

    def _tell(self) -> None:
        """Wake the threads that wait for the lead or for an exchange; they are counted before they look."""
        with self._turn:
            self._turn.notify_all()

    def _lead_watched(self) -> None:
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._closing or not self._nothing_watched())
            if self._closing:
                return
            try:
                self._lead_until(lambda: self._closing or self._nothing_watched(), self._check_failure)
            except TensorKVError as error:
                self._end_all(error)
            except BaseException as exc:  # a bug: no call may wait for a thread that has ended
                self._broken_off(exc)
                raise

    def _nothing_watched(self) -> bool:
        """Whether all watched exchanges have ended."""
        with self._turn:
            for number in self._watched - self._exchanges.keys():
                self._watched.discard(number)
                self._waits.pop(number, None)
            return not self._watched

    def _check_failure(self) -> None:
        failure = self._failure()
        if failure is not None:
            raise again(failure) from None

    def _receive(self) -> None:
        """Receive one frame and dispatch it. For the leader only."""
        if self._lost is not None:
            raise again(self._lost) from None
        self._message = None
        try:
            self._connection.receive(self._sink, self._patient_tick)
            self._hand_on(self._message)
        except (EOFError, ConnectionError) as exc:  # ProtocolError too
            self._lose(exc)
        except Exception as exc:
            if self._connection.broken:
                self._connection.shutdown()
                self._lost = PeerLostError(f"the connection to {self.name} ended inside a message: {exc}")
            raise

    def _lose(self, exc: Exception) -> NoReturn:
        """Raise why the connection has ended."""
        self._connection.shutdown()
        self._lost = self._why_gone(exc)
        raise again(self._lost) from None  # its text tells all that `exc` does

    def _sink(self, body: memoryview, payload_bytes: int) -> list[memoryview]:
        message = self._message = _decoder.decode(body)
        if not payload_bytes:
            return []
        if not isinstance(message, m.Data):
            raise ProtocolError(f"{type(message).__name__} came with {payload_bytes} bytes of payload")
        exchange = self._requests.find(message.request)
        if exchange is None:
            return _discard(payload_bytes)
        try:
            return exchange.place(message, payload_bytes)
        except ProtocolError:
            raise
        except Exception as exc:  # noqa: BLE001  # e.g. no memory for it: an error of this exchange alone
            self._end_exchange(exchange, message.request, error_of(exc))
            return _discard(payload_bytes)

    def _hand_on(self, message: Any) -> None:
        if type(message) is m.Data and message.placed is not None:
            self._hand_on_placed(message, message.placed)
        elif type(message) is m.Fault:
            self._on_fault(message)
        elif isinstance(message, (m.ShareSegment, m.DropSegment)):
            self._share(message)
        elif type(message) is m.Waiting:
            wait = self._waits.get(message.request)
            if wait is not None:
                self._on_waiting(wait, message)
        else:
            exchange = self._requests.find(message.request)
            if exchange is not None:
                self._end_exchange(exchange, message.request, message)

    def _hand_on_placed(self, message: m.Data, placed: m.Placed) -> None:
        """Dispatch a reply in the server's memory, and tell the server that it was copied.

        If the server has ended the connection meanwhile, that memory may have changed during the copy.
        """
        if self.shared is None:
            raise ProtocolError("a reply in shared memory, where there is none")
        parts = self.shared.view(placed)
        exchange = self._requests.find(message.request)
        if exchange is None:
            self.shared.copied()
            return
        try:
            exchange.copy(message, parts)
        except ProtocolError:
            raise
        except Exception as exc:  # noqa: BLE001  # e.g. unwritable memory: an error of this exchange alone
            self.shared.copied()
            self._end_exchange(exchange, message.request, error_of(exc))
            return
        if self._connection.ended:
            raise ConnectionError("it ended the connection while its reply was copied")
        self.shared.copied()
        self._end_exchange(exchange, message.request, message)

    def _end_exchange(self, exchange: Exchange, number: int, message: Any) -> None:
        """Pass a reply, which may be its last, to an exchange."""
        if self._requests.take(exchange, number, message) and self._waiting:
            self._tell()

    def _share(self, message: m.ShareSegment | m.DropSegment) -> None:
        if self.shared is None:
            raise ProtocolError("shared memory, over a connection that cannot hand it over")
        if isinstance(message, m.DropSegment):
            self.shared.detach(message)
        else:
            self.shared.attach(message)

    def _why_gone(self, exc: BaseException) -> TensorKVError:
        """Return why the connection ended: the scheduler's report takes precedence if it arrives soon."""
        if isinstance(exc, TensorKVError):
            return exc
        return schedulers_word(self._failure) or PeerLostError(f"{self.name} was lost: {exc}")

    def _end_all(self, error: TensorKVError) -> None:
        """End every exchange with this error, as nothing more will arrive."""
        with self._reading:  # no thread dispatches a reply meanwhile
            self._requests.end_all(error)
        with self._turn:
            self._turn.notify_all()


def _discard(payload_bytes: int) -> list[memoryview]:
    """Return buffers for an unwanted payload: the same small memory over and over."""
    if payload_bytes > MAX_DISCARDED_BYTES:
        raise ProtocolError(f"a payload of {payload_bytes} bytes for a request that is not there")
    scratch = memoryview(bytearray(min(payload_bytes, DISCARD_BYTES)))
    whole, rest = divmod(payload_bytes, DISCARD_BYTES)
    return [scratch] * whole + ([scratch[:rest]] if rest else [])
