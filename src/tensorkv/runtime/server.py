"""The server: serves `ServerState` to the workers. `python -m tensorkv.runtime.server` is a server process.

One thread per worker receives: the payload goes straight into a buffer of the pool, then the state
machine runs under the lock, and what it answers is sent as far as that goes without waiting. Torch
is set to one thread in a server process: servers are many, and each adds what fits its cache.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, final

import torch

from tensorkv.arrays import bytes_of
from tensorkv.config import JobConfig, Role, from_env
from tensorkv.errors import AuthenticationError, NotInJob, PeerLostError, ProtocolError, TensorKVError
from tensorkv.protocol.schedule import LoadUpdater
from tensorkv.protocol.serverstate import ServerState
from tensorkv.protocol.shard import SCHEDULER, Outgoing
from tensorkv.protocol.slots import BufferPool, Lease
from tensorkv.runtime.code import updater_loader
from tensorkv.runtime.handshake import accept, connect_as, receive_message
from tensorkv.runtime.sender import Sender
from tensorkv.runtime.waits import lost_error
from tensorkv.transport.base import Connection
from tensorkv.transport.endpoint import listen
from tensorkv.transport.tcp import hostname
from tensorkv.wire import messages as m
from tensorkv.wire.codec import Decoder, encode

logger = logging.getLogger(__name__)
JOIN_TIMEOUT_S = 5.0


@final
class Server:
    """One server of a job, in threads of this process.

    Args:
        config: its place in the job; `host` is the address it binds to.
        load_updater: makes an updater from a setting that has travelled.
    """

    def __init__(self, config: JobConfig, load_updater: LoadUpdater) -> None:
        self._config = config
        self._pool = BufferPool()
        self._lock = threading.Lock()  # guards _state, _workers and the order of what is sent
        self._state = ServerState(config.num_workers, self._pool, load_updater)
        self._workers: dict[int, tuple[Connection, Sender]] = {}
        self._taken: set[int] = set()  # ranks of workers that have proved themselves
        self._released: deque[list[Lease]] = deque()  # by sending threads, settled under the lock
        self._pending: set[Connection] = set()
        self._threads: list[threading.Thread] = []
        self._listener = listen(config.host)
        self._ended = threading.Event()
        self._failure: TensorKVError | None = None
        self._scheduler: Connection | None = None
        self._to_scheduler: Sender | None = None

    def start(self) -> None:
        """Register with the scheduler and begin to serve.

        Raises:
            PeerLostError, AuthenticationError, ProtocolVersionError: the scheduler cannot be joined.
        """
        config = self._config
        self._scheduler = connect_as(config, "the scheduler", config.scheduler_host, config.scheduler_port)
        self._to_scheduler = Sender(self._scheduler, "scheduler", self._scheduler_failed)
        host, port = self._listener.address
        self._spawn("accept", self._accept)
        self._to_scheduler.put([encode(m.Register(host, port, hostname(), os.getpid()))])
        self._to_scheduler.pump()
        self._spawn("scheduler", self._listen_to_scheduler)

    def wait(self) -> TensorKVError | None:
        """Block until the job is over, and return why it failed, None if it did not."""
        self._ended.wait()
        return self._failure

    def stop(self) -> None:
        """End all connections and threads. Blocks for a few seconds at most."""
        self._end(None)
        self._listener.close()
        with self._lock:
            workers, pending = list(self._workers.values()), list(self._pending)
        connections = [*pending, *(connection for connection, _ in workers)]
        senders = [sender for _, sender in workers]
        if self._scheduler is not None and self._to_scheduler is not None:
            connections.append(self._scheduler)
            senders.append(self._to_scheduler)
        for connection in connections:
            connection.shutdown()
        for sender in senders:
            sender.close(JOIN_TIMEOUT_S)
        for thread in self._threads:
            thread.join(JOIN_TIMEOUT_S)
        for connection in connections:
            connection.close()

    def _spawn(self, name: str, target: Callable[..., None], *args: Any) -> None:
        rank = self._config.rank
        thread = threading.Thread(target=target, args=args, name=f"tensorkv-server{rank}-{name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _end(self, failure: TensorKVError | None) -> None:
        if not self._ended.is_set():
            self._failure = failure
            self._ended.set()

    # ---- workers ---------------------------------------------------------------------------------

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except ConnectionError:
                return
            with self._lock:
                if self._ended.is_set():
                    connection.close()
                    return
                self._pending.add(connection)
                self._threads = [thread for thread in self._threads if thread.is_alive()]
                self._spawn(connection.peer, self._serve, connection)

    def _serve(self, connection: Connection) -> None:
        """One worker, from its handshake to its end."""
        try:
            _, worker = accept(connection, self._config.token, self._check_place)
        except (TensorKVError, EOFError, ConnectionError) as exc:
            logger.warning("server %d: refused %s: %s", self._config.rank, connection.peer, exc)
            with self._lock:
                self._pending.discard(connection)
            connection.shutdown()
            connection.close()
            return
        with self._lock:
            if self._ended.is_set():  # `stop` has shut this connection down, and would not see the sender
                connection.close()
                return
            self._pending.discard(connection)
            sender = Sender(connection, f"worker-{worker}", lambda exc: connection.shutdown())
            self._workers[worker] = (connection, sender)
        try:
            self._read(connection, worker)
        except EOFError:
            pass  # the worker has ended; whether in good order, the scheduler knows
        except ConnectionError as exc:  # ProtocolError too: it ends this connection, and nothing else
            if not self._ended.is_set():
                logger.warning("server %d: worker %d: %s", self._config.rank, worker, exc)
        except Exception:  # a message that makes no sense, or a fault of ours: it ends this connection
            logger.exception("server %d: closed the connection of worker %d", self._config.rank, worker)
        connection.shutdown()

    def _check_place(self, role: Role, rank: int) -> TensorKVError | None:
        if role != "worker" or not 0 <= rank < self._config.num_workers:
            return AuthenticationError(f"there is no {role} {rank} that this server serves")
        with self._lock:
            if rank in self._taken:
                return AuthenticationError(f"worker {rank} is connected already")
            self._taken.add(rank)
        return None

    def _read(self, connection: Connection, worker: int) -> None:
        decoder: Decoder[m.ToServer] = Decoder(m.ToServer)
        message: Any = None
        buffer = torch.empty(0, dtype=torch.uint8)
        size_bytes = 0

        def sink(body: memoryview, payload_bytes: int) -> list[memoryview]:
            nonlocal message, buffer, size_bytes
            message = decoder.decode(body)
            with self._lock:
                expected = self._state.payload_bytes(worker, message)
            if payload_bytes != expected:
                raise ProtocolError(
                    f"{type(message).__name__} came with {payload_bytes} bytes of payload, not {expected}"
                )
            size_bytes = payload_bytes
            takes_buffer = isinstance(message, (m.Push, m.InitSlices))
            buffer = self._pool.take(payload_bytes) if takes_buffer else buffer
            return [bytes_of(buffer)[:payload_bytes]] if payload_bytes else []

        while True:
            connection.receive(sink)
            payload = buffer[:size_bytes] if isinstance(message, m.InitSlices) else buffer
            self._handle(worker, message, payload)
            if isinstance(message, m.InitSlices):
                self._pool.give(buffer)

    def _handle(self, worker: int, message: Any, payload: torch.Tensor) -> None:
        self._run(lambda: self._state.handle(worker, message, payload))

    def _run(self, step: Callable[[], list[Outgoing]]) -> None:
        """Run one step of the state machine, and send what it answers."""
        with self._lock:
            self._settle_leases()
            self._queue(step())
        self._pump()

    def _queue(self, out: list[Outgoing]) -> None:
        """Queue what is to be sent. With the lock held, so that the order stays."""
        for each in out:
            if each.worker == SCHEDULER:
                assert self._to_scheduler is not None
                self._to_scheduler.put([encode(each.message)])
                continue
            entry = self._workers.get(each.worker)
            if entry is None:
                self._released.append(each.leases)
                continue
            parts = [bytes_of(tensor) for tensor in each.payload]
            head = encode(each.message, sum(map(len, parts)))
            leases = each.leases
            on_sent = (lambda leases=leases: self._released.append(leases)) if leases else None
            entry[1].put([head, *parts], on_sent)

    def _settle_leases(self) -> None:
        while self._released:
            for lease in self._released.popleft():
                lease.readers -= 1

    def _pump(self) -> None:
        for _, sender in list(self._workers.values()):
            sender.pump()
        if self._to_scheduler is not None:
            self._to_scheduler.pump()

    # ---- the scheduler ---------------------------------------------------------------------------

    def _listen_to_scheduler(self) -> None:
        decoder: Decoder[m.FromScheduler] = Decoder(m.FromScheduler)
        assert self._scheduler is not None
        try:
            while not self._ended.is_set():
                self._take(receive_message(self._scheduler, decoder))
        except (EOFError, ConnectionError) as exc:
            self._scheduler_failed(exc)
        except Exception as exc:  # a fault of ours; deaf to the scheduler the server is of no use
            logger.exception("server %d: cannot go on", self._config.rank)
            self._end(TensorKVError(f"the server failed: {type(exc).__name__}: {exc}"))

    def _take(self, message: m.FromScheduler) -> None:
        match message:
            case m.CommitDecision():
                self._run(lambda: self._state.decide_commit(message))
            case m.Gone():
                self._run(lambda: self._state.worker_gone(message.rank))
            case m.Lost():
                self._end(lost_error(message))
            case m.Stop():
                self._end(None)

    def _scheduler_failed(self, exc: Exception) -> None:
        self._end(PeerLostError(f"the scheduler is gone: {exc}"))


def main() -> int:
    """Run a server process until the job is over; return its exit status."""
    try:
        config = from_env()
        if config is None or config.role != "server":
            raise NotInJob("a server process is started by `tensorkv run -n WORKERS -s SERVERS ...`")
        torch.set_num_threads(1)
        logging.basicConfig(format="%(name)s: %(message)s")
        server = Server(config, updater_loader(config.allow_import))
        try:
            server.start()
            failure = server.wait()
        finally:
            server.stop()
    except TensorKVError as error:
        sys.stderr.write(f"tensorkv server: {error}\n")
        return 1
    if failure is not None:
        sys.stderr.write(f"tensorkv server {config.rank}: {failure}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
