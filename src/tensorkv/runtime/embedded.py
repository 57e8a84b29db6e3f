"""EmbeddedJob: scheduler and servers as threads of this process, connected without sockets.

For notebooks, debuggers and tests. Values take the very way they take in a real job, but frames are
handed over in queues.
"""

from __future__ import annotations

import secrets
from typing import final

from tensorkv.config import (
    DEFAULT_PEER_TIMEOUT_S,
    DEFAULT_TIMEOUT_S,
    SLICE_BOUND_BYTES,
    JobConfig,
    Role,
    Transport,
)
from tensorkv.runtime.code import CodeTable, updater_loader
from tensorkv.runtime.job import Job
from tensorkv.runtime.scheduler import SchedulerServer
from tensorkv.runtime.server import Server


@final
class EmbeddedJob:
    """A job whose scheduler and servers are threads of this process. Owns them until `stop`.

    `host` is "inproc", or an address to go through real sockets; `transport` says which then.
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
        except BaseException:
            self.stop()
            raise

    def config(self, role: Role, rank: int) -> JobConfig:
        """Return the place of a process, or here a thread, in this job."""
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

    def join(self, rank: int) -> Job:
        """Join as worker `rank`."""
        return Job(self.config("worker", rank), self.code_table)

    def stop(self) -> None:
        """End scheduler and servers. The workers have left."""
        self.scheduler.stop()
        for server in self.servers:
            server.stop()
