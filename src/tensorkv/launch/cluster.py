"""LocalCluster: scheduler and servers as threads of this process, connected without sockets.

For notebooks, debuggers and tests. Values take the same path as in a real job, but frames travel through
queues.
"""

from __future__ import annotations

import errno
import os
import queue
import secrets
import threading
import warnings
import weakref
from typing import final

from tensorkv.config import (
    DEFAULT_PEER_TIMEOUT_S,
    DEFAULT_TIMEOUT_S,
    SLICE_BOUND_BYTES,
    JobConfig,
    Role,
    Transport,
)
from tensorkv.errors import MemoryLimitReached
from tensorkv.peer.code import CodeTable, updater_loader
from tensorkv.scheduler.loop import SchedulerServer
from tensorkv.server.loop import Server
from tensorkv.transport.memorylimits import with_the_way_out
from tensorkv.wire import messages as m
from tensorkv.worker.session import Session

JOIN_TIMEOUT_S = 5.0


@final
class LocalCluster:
    """A job whose scheduler and servers are threads of this process. Owns them until `stop`.

    `host` is "inproc", or an address for real sockets; `transport` then chooses which.
    """

    def __init__(
        self,
        num_workers: int,
        num_servers: int,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        slice_bound_bytes: int = SLICE_BOUND_BYTES,
        peer_timeout_s: float = DEFAULT_PEER_TIMEOUT_S,
        host: str = "inproc",
        transport: Transport = "auto",
    ) -> None:
        self._size = (num_workers, num_servers)
        self._token = secrets.token_hex(16)
        self._timeout_s = timeout_s
        self._peer_timeout_s = peer_timeout_s
        self._host = host
        self._transport = transport
        self._drops: queue.SimpleQueue[bool] = queue.SimpleQueue()  # False: the store was closed
        self._finalizer: weakref.finalize[..., object] | None = None
        self._keeper: threading.Thread | None = None
        self.code_table = CodeTable()
        self.scheduler = SchedulerServer(
            num_workers=num_workers,
            num_servers=num_servers,
            token=self._token,
            host=host,
            slice_bound_bytes=slice_bound_bytes,
            peer_timeout_s=peer_timeout_s,
        )
        self.servers: list[Server] = []
        self.scheduler.start()
        try:
            loader = updater_loader((), self.code_table)
            for rank in range(num_servers):
                self.servers.append(Server(self.config("server", rank), loader))
                self.servers[-1].start()
        except BaseException as exc:
            self.stop()
            if isinstance(exc, OSError) and exc.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise MemoryLimitReached(f"the job cannot be started: {with_the_way_out(exc)}") from exc
            raise

    def config(self, role: Role, rank: int) -> JobConfig:
        """Return the config of a process of this job, here a thread."""
        host, port = self.scheduler.address
        return JobConfig(
            role=role,
            rank=rank,
            num_workers=self._size[0],
            num_servers=self._size[1],
            scheduler_host=host,
            scheduler_port=port,
            token=self._token,
            host=self._host,
            timeout_s=self._timeout_s,
            peer_timeout_s=self._peer_timeout_s,
            transport=self._transport,
        )

    def join(self, rank: int) -> Session:
        """Join as worker `rank`."""
        return Session(self.config("worker", rank), self.code_table)

    def end_with(self, store: object, job: Session) -> None:
        """End the job of the only worker, `job`, when its store is collected without having been closed.

        The garbage collector may run at any point of any thread, even of this job's. So a separate thread
        waits for it and does the rest.
        """
        self._finalizer = weakref.finalize(store, _dropped, repr(store), os.getpid(), self._drops)
        self._finalizer.atexit = False
        self._keeper = threading.Thread(target=self._keep, args=(job,), name="tensorkv-embedded", daemon=True)
        self._keeper.start()

    def _keep(self, job: Session) -> None:
        dropped = self._drops.get()
        if dropped:
            job.close(m.Goodbye())
            self.stop()

    def stop(self) -> None:
        """Stop scheduler and servers. The workers have left before."""
        if self._finalizer is not None:
            self._finalizer.detach()
        if self._keeper is not None and self._keeper is not threading.current_thread():
            self._drops.put(False)
            self._keeper.join(JOIN_TIMEOUT_S)
        self.scheduler.stop()
        for server in self.servers:
            server.stop()


def _dropped(store: str, process: int, drops: queue.SimpleQueue[bool]) -> None:
    """Note that a store was collected. Takes no lock, since it may interrupt a thread of the job anywhere."""
    if os.getpid() == process:  # a forked child has the object, but neither the job nor its threads
        drops.put(True)
        warnings.warn(f"{store} was dropped without close()", ResourceWarning, stacklevel=2)
