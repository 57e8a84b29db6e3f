"""The server: serves `ServerState` to the workers. `python -m tensorkv.server.loop` is a server process.

One thread, the loop, receives from all workers and from the scheduler as bytes arrive. A payload goes
directly into a buffer of the pool, then the state machine runs, and the loop sends its answers as far as
possible without blocking. So a small request needs no thread switch, and a worker that stalls in the middle
of a frame blocks no other. A server process sets torch to one thread: there are many servers, and each adds
what fits its cache.
"""

from __future__ import annotations

import functools
import gc
import logging
import math
import operator
import os
import select
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, final

if __name__ == "__main__":  # a server process: imports create no garbage, and `main` enables gc again
    gc.disable()  # collections take a sixth of the time of importing torch

import torch

from tensorkv.config import JobConfig, Role, from_env
from tensorkv.errors import (
    AuthenticationError,
    MemoryLimitReached,
    NotInJob,
    ProtocolError,
    RankTaken,
    TensorKVError,
    TransportUnavailable,
    to_wire,
)
from tensorkv.peer.admission import SPARE_NEWCOMERS, Admission
from tensorkv.peer.code import LoadUpdater, updater_loader
from tensorkv.peer.deadlines import lost_error, scheduler_lost_error
from tensorkv.peer.handshake import accept, connect_to_scheduler
from tensorkv.server.memory import EMPTY, BufferPool, Memory, fresh
from tensorkv.server.shard import SCHEDULER, Outgoing
from tensorkv.server.shm import SharedValues, Sharing
from tensorkv.server.slots import Lease, allocate_private
from tensorkv.server.state import ServerState
from tensorkv.server.statefiles import FolderFiles
from tensorkv.transport import unix
from tensorkv.transport.base import TICK_S, Connection, Listener
from tensorkv.transport.endpoint import listen
from tensorkv.transport.memorylimits import limits, trim_heap, with_the_way_out
from tensorkv.transport.segments import Segment
from tensorkv.transport.seldomlog import SeldomLog
from tensorkv.transport.sender import MAX_QUEUED_FRAMES, Sender
from tensorkv.transport.tcp import hostname
from tensorkv.transport.unix import UnixConnection
from tensorkv.wire import messages as m
from tensorkv.wire.codec import Decoder, encode

logger = logging.getLogger("tensorkv.server.loop")  # the same name if this module is __main__
JOIN_TIMEOUT_S = 5.0
TICK_MS = int(TICK_S * 1000)
FRAMES_PER_TURN = 16
"""Maximum number of frames of one worker that the loop takes before others have their turn."""

SCRAP_BYTES = 1 << 20
"""Size of the buffer that receives, piece by piece, a payload for which there is no memory."""

TRIM_EVERY_S = 10.0
"""Time between two trims of the heap. Each costs what the temporary tensors of a step need as fresh pages."""

LAST_WORDS_S = 1.0
"""Timeout in seconds for draining a lost worker's connection. Every other worker waits meanwhile."""

_bytes_of = operator.attrgetter("bytes")


@final
class _Peer:
    """A connection that the loop reads, a worker's or the scheduler's, and its incoming frame."""

    def __init__(self, connection: Connection, name: str, worker: int, server: Server) -> None:
        self.connection = connection
        self.sink = functools.partial(server._place, self)
        self.sender = Sender(connection, name, self._cannot_send, MAX_QUEUED_FRAMES)
        self.worker = worker  # SCHEDULER for the scheduler
        self.message: Any = None
        self.buffer = EMPTY
        self.ended = False
        self.no_room: MemoryLimitReached | None = None  # for the payload of the incoming frame
        self.refused: Exception | None = None  # why sending to it ended, if that is its fault
        self.gone = False  # sending to it failed
        self.sharing = server._share_with(self)

    def _cannot_send(self, exc: BaseException) -> None:
        if isinstance(exc, ProtocolError):
            self.refused = exc
        else:
            self.gone = True
        self.connection.shutdown()


@final
class Server:
    """One server of a job, in threads of this process.

    Args:
        config: its place in the job; `host` is the address it binds to.
        load_updater: makes an updater from a received setting.
        trim: returns freed memory to the system; called every `TRIM_EVERY_S`, if the process is the server's.
    """

    def __init__(
        self, config: JobConfig, load_updater: LoadUpdater, trim: Callable[[], None] | None = None
    ) -> None:
        self._config = config
        self._trim = trim
        self._trim_at_s = time.monotonic() + TRIM_EVERY_S
        self._pool = BufferPool()
        self._listeners = _listen(config)
        self._values = SharedValues() if len(self._listeners) > 1 else None
        self._state = ServerState(  # only for the loop
            config.num_workers,
            self._pool,
            load_updater,
            FolderFiles(),
            _memory_bytes(),
            allocate_private if self._values is None else self._values.allocate,
            self._no_memory,
        )
        self._scrap = memoryview(bytearray(SCRAP_BYTES))  # receives payloads that have no memory
        self._peers: dict[int, _Peer] = {}  # by worker; only for the loop
        self._worker_decoder: Decoder[m.ToServer] = Decoder(m.ToServer)
        self._scheduler_decoder: Decoder[m.FromScheduler] = Decoder(m.FromScheduler)
        self._released: deque[list[Lease]] = deque()  # filled by sending threads, settled by the loop
        self._lock = threading.Lock()  # guards _taken, _arrived and _threads
        self._taken: set[int] = set()  # ranks of authenticated workers
        self._newcomers = Admission(config.num_workers + SPARE_NEWCOMERS)
        self._arrived: list[_Peer] = []  # workers for the loop to take over
        self._threads: list[threading.Thread] = []
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._refusals = SeldomLog(logger, "refused connections")
        self._ended = threading.Event()
        self._report_wanted = False
        self.terminated = False
        self._failure: TensorKVError | None = None
        self._scheduler: _Peer | None = None

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Addresses that it listens at; the first is for other hosts."""
        return [listener.address for listener in self._listeners]

    def start(self) -> None:
        """Register with the scheduler and begin to serve.

        Raises:
            PeerLostError, AuthenticationError, ProtocolVersionError: the scheduler cannot be joined.
        """
        config = self._config
        connection = connect_to_scheduler(config)
        self._scheduler = _Peer(connection, "scheduler", SCHEDULER, self)
        (host, port), *others = self.addresses
        socket_name = others[0][0] if others else ""
        with self._lock:
            for listener in self._listeners:
                self._spawn("accept", self._accept, listener)
            self._spawn("loop", self._loop)
        registration = m.Register(host, port, hostname(), os.getpid(), socket_name)
        self._scheduler.sender.put([encode(registration)])
        self._scheduler.sender.pump()

    def wait(self) -> TensorKVError | None:
        """Block until the job is over, and return why it failed, None if it did not."""
        self._ended.wait()
        return self._failure

    def ask_report(self) -> None:
        """Make the loop write the open rounds to stderr. For a signal handler: takes no lock."""
        self._report_wanted = True
        os.eventfd_write(self._wake, 1)

    def terminate(self) -> None:
        """Make the loop abandon the job: the server counts as lost. For a signal handler: takes no lock."""
        self.terminated = True
        os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        """End all connections and threads. Blocks for a few seconds at most."""
        self._end(None)
        for listener in self._listeners:
            listener.close()
        self._newcomers.end()
        with self._lock:
            threads = list(self._threads)
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)
        for thread in threads:
            thread.join(JOIN_TIMEOUT_S)
        peers = [*self._peers.values(), *self._arrived, *([self._scheduler] if self._scheduler else [])]
        for peer in peers:
            peer.connection.shutdown()
        for peer in peers:
            peer.sender.close(JOIN_TIMEOUT_S)
            peer.connection.close()
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1
        if self._values is not None:
            self._values.close()
        self._refusals.end()

    def _spawn(self, name: str, target: Callable[..., None], *args: Any) -> None:
        """Start a thread that `stop` joins. The caller holds the lock."""
        rank = self._config.rank
        thread = threading.Thread(target=target, args=args, name=f"tensorkv-server{rank}-{name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _end(self, failure: TensorKVError | None) -> None:
        if not self._ended.is_set():
            self._failure = failure
            self._ended.set()

    # ---- newcomers, in threads of their own --------------------------------------------------------

    def _accept(self, listener: Listener) -> None:
        while True:
            try:
                connection = listener.accept()
            except ConnectionError:
                return
            if not self._newcomers.add(connection):
                connection.close()
                return
            with self._lock:
                self._threads = [thread for thread in self._threads if thread.is_alive()]
                self._spawn(connection.peer, self._greet, connection)

    def _greet(self, connection: Connection) -> None:
        """Authenticate a worker, and hand it over to the loop."""
        try:
            _, worker = accept(connection, self._config.token, self._check_place)
        except (TensorKVError, EOFError, ConnectionError) as exc:
            self._refusals.warning("server %d: refused %s: %s", self._config.rank, connection.peer, exc)
            connection.shutdown()
            connection.close()
            return
        finally:
            self._newcomers.remove(connection)
        with self._lock:
            if self._ended.is_set():
                connection.close()
                return
            self._arrived.append(_Peer(connection, f"worker-{worker}", worker, self))
            os.eventfd_write(self._wake, 1)

    def _check_place(self, role: Role, rank: int) -> TensorKVError | None:
        if role != "worker" or not 0 <= rank < self._config.num_workers:
            return AuthenticationError(f"there is no {role} {rank} that this server serves")
        with self._lock:
            if rank in self._taken:
                return RankTaken(f"worker {rank} is connected already")
            self._taken.add(rank)
        return None

    # ---- the loop ----------------------------------------------------------------------------------

    def _loop(self) -> None:
        try:
            self._serve()
        except BaseException as exc:  # of any kind: a server without its loop is useless
            logger.exception("server %d: cannot go on", self._config.rank)
            self._end(TensorKVError(f"the server failed: {type(exc).__name__}: {exc}"))
            for peer in [*self._peers.values(), *([self._scheduler] if self._scheduler else [])]:
                peer.connection.shutdown()  # so that no peer waits: the server may be a thread of a worker

    def _serve(self) -> None:
        """Read from every peer that has sent something, until the job is over."""
        assert self._scheduler is not None
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        peers: dict[int, _Peer] = {}  # by descriptor

        def admit(peer: _Peer) -> None:
            peers[peer.connection.fileno()] = peer
            poller.register(peer.connection.fileno(), select.POLLIN)

        admit(self._scheduler)
        unread: dict[int, _Peer] = {}  # peers with more to read, whatever the poller reports
        pause_ms = TICK_MS
        while not self._ended.is_set():
            ready, unread = unread, {}
            for descriptor, _ in poller.poll(0 if ready else pause_ms):
                if descriptor == self._wake:
                    os.eventfd_read(self._wake)
                    self._serve_signals()
                    for peer in self._take_arrived():
                        admit(peer)
                else:
                    ready[descriptor] = peers[descriptor]
            for descriptor, peer in ready.items():
                if self._read(peer):
                    unread[descriptor] = peer
                if peer.ended:
                    poller.unregister(descriptor)
                    del peers[descriptor]
            now_s = time.monotonic()
            if self._trim is not None and now_s >= self._trim_at_s:
                self._trim()
                self._trim_at_s = now_s + TRIM_EVERY_S
            pause_ms = self._tick(now_s) if self._state.timed else TICK_MS

    def _tick(self, now_s: float) -> int:
        """Merge the rounds whose deadline has passed; return how many milliseconds the loop may sleep."""
        out, due_s = self._state.tick(now_s)
        self._queue(out)
        return TICK_MS if due_s is None else min(TICK_MS, math.ceil((due_s - now_s) * 1000))

    def _serve_signals(self) -> None:
        """Do what signal handlers have asked for."""
        if self._report_wanted:
            self._report_wanted = False
            who = f"server {self._config.rank} (process {os.getpid()} on {hostname()})"
            lines = [f"  {line}" for line in self._state.report()] or ["  no round is open"]
            sys.stderr.write("\n".join([f"tensorkv: {who}:", *lines, ""]))
            sys.stderr.flush()
        if self.terminated and not self._ended.is_set():
            assert self._scheduler is not None
            self._scheduler.sender.put([encode(m.Abandon("it was ended by SIGTERM"))])
            self._scheduler.sender.pump()
            self._end(None)

    def _take_arrived(self) -> list[_Peer]:
        with self._lock:
            arrived, self._arrived = self._arrived, []
        for peer in arrived:
            self._peers[peer.worker] = peer
            if self._state.is_gone(peer.worker):  # lost before the loop took it over
                self._dismiss(peer)
        return arrived

    def _read(self, peer: _Peer, to_the_end: bool = False) -> bool:
        """Take what a peer has sent, at most FRAMES_PER_TURN frames; return whether there may be more.

        With `to_the_end`, ask the system for more until it has none.
        """
        cause: Exception
        if peer.ended:
            return False
        try:
            connection = peer.connection
            for _ in range(FRAMES_PER_TURN):
                if not connection.receive_now(peer.sink):
                    return False
                self._take(peer)
                if peer.refused is not None:  # do not answer the rest of what it has sent
                    raise peer.refused
                if (connection.drained and not to_the_end) or peer.ended:
                    return False
            return True
        except (EOFError, ConnectionError) as exc:  # ProtocolError too
            cause = exc
        except Exception as exc:  # an invalid message, or a bug of ours
            logger.exception("server %d: a message of worker %d", self._config.rank, peer.worker)
            cause = exc
        self._lose(peer, cause)
        return False

    def _dismiss(self, peer: _Peer) -> None:
        """Stop receiving from this peer, and sending to it."""
        peer.ended = True
        peer.connection.shutdown()
        if isinstance(peer.message, m.Push) and peer.buffer is not EMPTY:  # its payload is incomplete
            self._pool.give(peer.buffer)
        peer.buffer = EMPTY
        if peer.sharing is not None:
            peer.sharing.end()

    def _drop(self, lost: m.WorkerLost) -> None:
        """Handle a lost worker while the job goes on: take its complete frames, and nothing after.

        Only its connection to the scheduler need have ended. A worker that lives and sends as fast as it is
        read must not keep the loop from all others.
        """
        peer = self._peers.get(lost.rank)
        if peer is not None:
            until = time.monotonic() + LAST_WORDS_S
            while self._read(peer, to_the_end=True):
                if time.monotonic() >= until:
                    logger.warning(
                        "server %d: worker %d is lost, and sends on: no more of it is read",
                        self._config.rank,
                        lost.rank,
                    )
                    break
            self._dismiss(peer)
        self._queue(self._state.worker_lost(lost))

    def _lose(self, peer: _Peer, cause: Exception) -> None:
        """Handle the end of a connection, or end it since its peer broke the protocol.

        The server goes on without a worker, but ends without the scheduler.
        """
        self._dismiss(peer)
        cause = peer.refused or cause
        has_left = peer.refused is None and (peer.gone or isinstance(cause, EOFError))
        if peer.worker == SCHEDULER and isinstance(cause, (EOFError, ConnectionError)):
            self._end(scheduler_lost_error(self._config.scheduler_host, cause))
        elif peer.worker == SCHEDULER:  # a server without its scheduler is useless
            self._end(TensorKVError(f"the server failed: {type(cause).__name__}: {cause}"))
        elif not has_left and not self._ended.is_set():  # else the scheduler knows whether it was lost
            logger.warning("server %d: worker %d: %s", self._config.rank, peer.worker, cause)

    def _place(self, peer: _Peer, body: memoryview, payload_bytes: int) -> list[memoryview]:
        """Decode a message, check the length of its payload, and return where to receive it."""
        message: Any
        if peer.worker == SCHEDULER:
            message, expected = self._scheduler_decoder.decode(body), 0
        else:
            message = self._worker_decoder.decode(body)
            expected = self._state.payload_bytes(peer.worker, message)
        peer.message = message
        if type(message) is m.Push and message.placed is not None:
            if payload_bytes or peer.sharing is None:
                raise ProtocolError("a push in shared memory, with a payload or where there is none")
            try:
                peer.buffer = peer.sharing.borrow(message.placed, expected)
            except MemoryLimitReached as exc:
                peer.no_room = exc
            return []
        if payload_bytes != expected:
            raise ProtocolError(
                f"{type(message).__name__} came with {payload_bytes} bytes of payload, not {expected}"
            )
        if not expected and type(message) is not m.Push:
            return []
        try:
            if type(message) is m.Push:
                buffer = peer.buffer = self._pool.take(payload_bytes)
            else:  # rare, not for the pool
                buffer = peer.buffer = fresh(payload_bytes)
        except MemoryLimitReached as exc:
            if payload_bytes > _memory_bytes():
                raise ProtocolError(f"there is no memory for a payload of {payload_bytes} bytes") from exc
            peer.no_room = self._no_memory(f"the values of a {type(message).__name__}", payload_bytes)
            whole, rest = divmod(payload_bytes, SCRAP_BYTES)
            return [self._scrap] * whole + ([self._scrap[:rest]] if rest else [])
        return [buffer.bytes[:payload_bytes]] if payload_bytes else []

    def _no_memory(self, what: str, size_bytes: int | None) -> MemoryLimitReached:
        """Return the error of a call for which this server has no memory."""
        size = "" if size_bytes is None else f"{size_bytes} bytes of "
        return MemoryLimitReached(
            f"server {self._config.rank} on host {hostname()} has no memory for {size}{what}: {limits()}; "
            "use more servers, or smaller values"
        )

    def _take(self, peer: _Peer) -> None:
        """Pass a complete message to the state machine, and send its answers."""
        if self._released or self._values is not None:
            self._settle()
        if peer.worker != SCHEDULER:
            payload, peer.buffer = peer.buffer, EMPTY
            if type(peer.message) in (m.ShareSegment, m.DropSegment, m.PlaceSlices):
                self._share(peer, peer.message)
                return
            no_room, peer.no_room = peer.no_room, None
            out = self._state.handle(peer.worker, peer.message, payload, no_room)
            if out:
                self._queue(out)
            return
        match peer.message:
            case m.CommitDecision():
                self._queue(self._state.decide_commit(peer.message))
            case m.Gone():
                self._queue(self._state.worker_gone(peer.message.rank))
            case m.WorkerLost():
                self._drop(peer.message)
            case m.Lost():
                self._end(lost_error(peer.message))
            case m.Stop():
                self._end(None)

    def _settle(self) -> None:
        """End the leases of replies that were sent or copied."""
        while self._released:
            for lease in self._released.popleft():
                lease.readers -= 1
        if self._values is not None:
            self._values.settle()

    def _queue(self, out: list[Outgoing]) -> None:
        """Send in order, as far as possible without blocking; sending threads do the rest."""
        for each in out:
            peer = self._scheduler if each.worker == SCHEDULER else self._peers.get(each.worker)
            if peer is None or peer.ended:
                self._released.append(each.leases)
            elif not each.payload:
                peer.sender.send([encode(each.message)])
            elif peer.sharing is None or not _reply_in_place(peer.sharing, each):
                parts = list(map(_bytes_of, each.payload))
                on_sent = functools.partial(self._released.append, each.leases)
                peer.sender.send([encode(each.message, sum(map(len, parts))), *parts], on_sent)

    def _share_with(self, peer: _Peer) -> Sharing | None:
        if self._values is None or not isinstance(peer.connection, UnixConnection):
            return None
        return self._values.share_with(peer.connection, lambda frame: peer.sender.send([frame]))

    def _share(self, peer: _Peer, message: m.ShareSegment | m.DropSegment | m.PlaceSlices) -> None:
        """Map a segment that a worker hands over, or drop one that it takes back."""
        if peer.sharing is None:
            raise ProtocolError("shared memory, over a connection that cannot hand it over")
        match message:
            case m.DropSegment():
                peer.sharing.drop(message)
            case m.ShareSegment():
                peer.sharing.attach(message)
            case m.PlaceSlices():
                self._place_slices(peer.worker, message)

    def _place_slices(self, worker: int, message: m.PlaceSlices) -> None:
        """Map memory that workers map, too, and move slices there."""
        try:
            segment = Segment.open(message.path, message.size_bytes)
        except (MemoryLimitReached, TransportUnavailable) as error:
            self._queue([Outgoing(worker, m.Failed(message.request, *to_wire(error)))])
            return
        self._queue(self._state.handle(worker, message, Memory(torch.from_numpy(segment.bytes))))
        if self._values is not None:
            self._values.drop_unused()


def _reply_in_place(sharing: Sharing, reply: Outgoing) -> bool:
    """Tell a worker of this host where its requested values lie, if it can copy them from there."""
    return type(reply.message) is m.Data and sharing.reply(reply.message, reply.payload, reply.leases)


def _listen(config: JobConfig) -> list[Listener]:
    """Return a server's listeners: at its address and, for workers of its host, at a Unix socket."""
    listeners = [listen(config.host)]
    if config.host != "inproc" and config.transport != "tcp":
        if why := unix.why_not():
            logger.warning("server %d: workers of this host are served over TCP: %s", config.rank, why)
        else:
            listeners.append(unix.UnixListener())
    return listeners


def _memory_bytes() -> int:
    """Return the size of this host's memory; a payload that announces more can be refused at once."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _handle_signals(server: Server) -> None:
    if threading.current_thread() is threading.main_thread():  # other threads may not set signal handlers
        signal.signal(signal.SIGUSR1, lambda signum, frame: server.ask_report())
        signal.signal(signal.SIGTERM, lambda signum, frame: server.terminate())


def _end_signals() -> None:
    """Ignore SIGUSR1 and restore SIGTERM: the process is about to end."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def main() -> int:
    """Run a server process until the job is over; return its exit status."""
    try:
        config = from_env()
        if config is None or config.role != "server":
            raise NotInJob("a server process is started by `tensorkv run -n WORKERS -s SERVERS ...`")
        torch.set_num_threads(1)
        gc.freeze()  # otherwise each full collection walks torch's objects: all wait for 40 ms
        gc.enable()
        logging.basicConfig(format="%(name)s: %(message)s")
        server = Server(config, updater_loader(config.allow_import), trim_heap)
        try:
            _handle_signals(server)
            server.start()
            failure = server.wait()
        except TensorKVError as error:
            failure = error
        finally:
            _end_signals()
            server.stop()
        if server.terminated:
            signal.raise_signal(signal.SIGTERM)  # for the exit status, even if the job has ended
    except (TensorKVError, OSError) as error:
        sys.stderr.write(f"tensorkv server: {with_the_way_out(error)}\n")
        return 1
    if failure is not None:
        sys.stderr.write(f"tensorkv server {config.rank}: {failure}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
