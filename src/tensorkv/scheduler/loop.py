"""The scheduler's threads: they serve `Membership` to all processes of a job. Imports no torch."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from tensorkv.addresses import LOOPBACK
from tensorkv.config import DEFAULT_PEER_TIMEOUT_S, SLICE_BOUND_BYTES, Role
from tensorkv.errors import NotInJob, PeerLostError, ProtocolError, RankTaken, TensorKVError
from tensorkv.peer.admission import SPARE_NEWCOMERS, Admission
from tensorkv.peer.deadlines import ended_because, lost_text
from tensorkv.peer.handshake import accept, receive_message
from tensorkv.scheduler.membership import Membership
from tensorkv.transport.base import Connection
from tensorkv.transport.endpoint import listen
from tensorkv.transport.seldomlog import SeldomLog
from tensorkv.transport.sender import MAX_QUEUED_FRAMES, Sender
from tensorkv.wire import messages as m
from tensorkv.wire.codec import Decoder, encode

logger = logging.getLogger(__name__)
JOIN_TIMEOUT_S = 5.0
LAST_WORDS_S = 1.0


@final
@dataclass(slots=True)
class _Peer:
    connection: Connection
    sender: Sender
    ended: threading.Event  # set when its last message is handled


@final
class SchedulerServer:
    """The scheduler of one job, in threads of this process.

    Args:
        num_workers, num_servers: the size of the job.
        token: the job's secret.
        host: the address to bind to; "inproc" serves threads of this process only.
        port: 0 lets the system choose.
        slice_bound_bytes: larger values are sliced where they may be.
        peer_timeout_s: how many seconds the host of a process may be silent before it counts as lost.
        starter_gone: returns whether worker 0 has ended, if worker 0 started this scheduler. The scheduler
            admits no worker after that, unless worker 0 has left cleanly.

    `start` it, give its `address` to all processes, and `stop` it when the workers have ended.
    """

    def __init__(
        self,
        *,
        num_workers: int,
        num_servers: int,
        token: str,
        host: str = LOOPBACK,
        port: int = 0,
        slice_bound_bytes: int = SLICE_BOUND_BYTES,
        peer_timeout_s: float = DEFAULT_PEER_TIMEOUT_S,
        starter_gone: Callable[[], bool] = lambda: False,
    ) -> None:
        if num_workers < 1 or num_servers < 1:
            raise ValueError(f"a job needs workers and servers, not {num_workers} and {num_servers}")
        self._token = token
        self._peer_timeout_s = peer_timeout_s
        self._starter_gone = starter_gone
        self._listener = listen(host, port)
        self._lock = threading.Lock()  # guards everything below
        self._membership = Membership(num_workers, num_servers, slice_bound_bytes)
        self._size: dict[Role, int] = {"worker": num_workers, "server": num_servers}
        self._peers: dict[tuple[Role, int], _Peer] = {}
        self._taken: set[tuple[Role, int]] = set()  # places of authenticated processes
        self._newcomers = Admission(num_workers + num_servers + SPARE_NEWCOMERS)
        self._threads: list[threading.Thread] = []
        self._stopped = False
        self._refusals = SeldomLog(logger, "refused connections")

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that the processes of the job connect to."""
        return self._listener.address

    @property
    def lost(self) -> m.Lost | None:
        """The first process that was declared lost, if any."""
        return self._membership.lost

    def has_joined(self, role: Role, rank: int) -> bool:
        """Whether this process of the job has registered."""
        with self._lock:
            return self._membership.has_joined(role, rank)

    def count_workers(self) -> tuple[int, int]:
        """Return how many workers have ever joined, and how many of those are still there."""
        with self._lock:
            return self._membership.count_workers()

    def report(self) -> list[str]:
        """Return lines that name the missing processes and the calls that wait here; at least one line."""
        with self._lock:
            return self._membership.report() or ["nothing waits at the scheduler"]

    def worker_exited(self, rank: int) -> None:
        """Note that the launcher saw a worker end with status 0; it may never have opened a store."""
        with self._lock:
            if not self._membership.has_joined("worker", rank):
                self._membership.worker_exited(rank)
                self._flush()
        self._pump()

    def worker_failed(self, rank: int, cause: str) -> bool:
        """Note that the launcher saw a worker fail (status not 0); return whether the job goes on.

        A worker that had joined is lost now, even if it has left its stores before. Blocks while the
        scheduler drains the worker's last messages, which have arrived already; for a second at most, as
        the worker's own children may hold its connection open.
        """
        with self._lock:
            peer = self._peers.get(("worker", rank))
        if peer is not None:
            peer.ended.wait(LAST_WORDS_S)
        with self._lock:
            if self._membership.has_joined("worker", rank):
                self._membership.declare_lost("worker", rank, cause)
                self._flush()
            goes_on = self._membership.is_dropped(rank)
        self._pump()
        return goes_on

    def start(self) -> None:
        """Start to accept processes. Returns at once."""
        self._spawn("accept", self._accept)

    def stop(self) -> None:
        """Tell the servers that the job is over, and end all threads. Blocks for a few seconds at most."""
        with self._lock:
            self._stopped = True
            self._membership.stop()
            self._flush()
            peers = list(self._peers.values())
        self._listener.close()
        self._newcomers.end()
        for peer in peers:
            peer.sender.pump()
        for peer in peers:
            peer.sender.close(JOIN_TIMEOUT_S)
        for peer in peers:
            peer.connection.shutdown()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(JOIN_TIMEOUT_S)
        for peer in peers:
            peer.connection.close()
        self._refusals.end()

    def _spawn(self, name: str, target: Any, *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, name=f"tensorkv-scheduler-{name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except ConnectionError:
                return
            if not self._newcomers.add(connection):
                connection.close()
                return
            with self._lock:
                self._threads = [thread for thread in self._threads if thread.is_alive()]
                self._spawn(connection.peer, self._serve, connection)

    def _serve(self, connection: Connection) -> None:
        """Serve one process, from its handshake to its end."""
        connection.notice_silence(self._peer_timeout_s)
        try:
            role, rank = accept(connection, self._token, self._check_place)
        except (TensorKVError, EOFError, ConnectionError) as exc:
            self._refusals.warning("scheduler: refused %s: %s", connection.peer, exc)
            self._pump()
            connection.shutdown()
            connection.close()
            return
        finally:
            self._newcomers.remove(connection)
        with self._lock:
            if self._stopped:  # `stop` would miss this connection
                connection.close()
                return
            unsent: list[BaseException] = []

            def give_up(exc: BaseException) -> None:
                if isinstance(exc, ProtocolError):  # otherwise the report of its loss is enough
                    logger.warning("scheduler: closed the connection of %s %d: %s", role, rank, exc)
                unsent.append(exc)
                connection.shutdown()

            sender = Sender(connection, f"{role}-{rank}", give_up, MAX_QUEUED_FRAMES)
            ended = threading.Event()
            self._peers[role, rank] = _Peer(connection, sender, ended)
        cause = self._read(connection, role, rank)
        if unsent:  # sending failed, and `give_up` then ended the reading
            cause = ended_because(unsent[0])
        with self._lock:
            if not self._stopped:
                self._membership.disconnected(role, rank, cause)
                self._flush()
        ended.set()
        self._pump()
        connection.shutdown()

    def _read(self, connection: Connection, role: Role, rank: int) -> str:
        decoder: Decoder[m.ToScheduler] = Decoder(m.ToScheduler)
        try:
            while True:
                message = receive_message(connection, decoder)
                with self._lock:
                    self._membership.handle(role, rank, message)
                    self._flush()
                self._pump()
        except (EOFError, ConnectionError) as exc:
            if isinstance(exc, TensorKVError):
                logger.warning("scheduler: closed the connection of %s %d: %s", role, rank, exc)
            return ended_because(exc)
        except Exception as exc:  # an invalid message, or a bug of ours: drop this process
            logger.exception("scheduler: closed the connection of %s %d", role, rank)
            return f"the scheduler could not handle its message: {type(exc).__name__}: {exc}"

    def _check_place(self, role: Role, rank: int) -> TensorKVError | None:
        size = self._size.get(role, 0)
        with self._lock:
            if not 0 <= rank < size:
                return NotInJob(
                    f"there is no {role} {rank} in this job, which has {size}, counted from 0; "
                    "whoever started this process told it a wrong rank, or a wrong job"
                )
            if role == "worker" and (over := self._over(rank)):
                return PeerLostError(f"the job is over: {over}")
            if (role, rank) in self._taken:
                return RankTaken(
                    f"{role} {rank} of this job is taken by {self._membership.holder(role, rank)}; start "
                    f"each {role} with a rank of its own (a process that a worker has started itself, of a "
                    "DataLoader say, has no place: use the store in the worker)"
                )
            self._taken.add((role, rank))
        return None

    def _over(self, rank: int) -> str:
        """Return why no process can become worker `rank` any more, "" if one can. Requires the lock.

        If a launcher restarts all workers, those of the next attempt may connect to this scheduler. They
        must look elsewhere: admitting them, or refusing their rank as taken, would be wrong. So this does
        not wait until the scheduler has heard of a loss.
        """
        membership = self._membership
        if membership.lost is None and self._starter_gone():
            if rank == 0 or not (membership.has_left(0) or membership.is_dropped(0)):
                # If this is rank 0 of the next attempt, late workers of this attempt must not stay in it.
                membership.declare_lost("worker", 0, "its process has ended")
                self._flush()
            if rank == 0:
                return "worker 0, which has started it, has ended"
        if membership.lost is not None:
            return lost_text(membership.lost.role, membership.lost)
        peer = self._peers.get(("worker", rank))
        stays = membership.has_left(rank) or membership.is_dropped(rank)
        return f"worker {rank} was lost" if peer is not None and peer.connection.ended and not stays else ""

    def _flush(self) -> None:
        """Queue the messages of the state machine. Requires the lock, so that their order is kept."""
        for role, rank, message in self._membership.out:
            peer = self._peers.get((role, rank))
            if peer is not None:
                peer.sender.put([encode(message)])
        self._membership.out.clear()

    def _pump(self) -> None:
        with self._lock:
            peers = list(self._peers.values())
        for peer in peers:
            peer.sender.pump()
