"""The sidecar of the workers of one host, under a launcher that only knows workers (torchrun).

    python -m tensorkv.launch.sidecar PARENT_PID REPORT_FD SERVER_RANKS

The worker with local rank 0 starts it. It runs the servers of its host and, on the first host, the scheduler.
It is a separate process so that it can report the loss of its parent: if the scheduler ran inside the parent,
nobody would learn which worker was lost.

It ends when its parent has ended and the job is over, and its servers end with it: the kernel kills them if
the sidecar is killed. It has its own session, so that signals to the workers do not end the servers first.
On SIGUSR1 it and its servers report who waits for whom.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import final

import msgspec

from tensorkv.config import JobConfig, from_env
from tensorkv.errors import TensorKVError
from tensorkv.launch.processes import open_scheduler, server_spec, start
from tensorkv.launch.supervisor import KILL_WAIT_S, SERVER_STOP_S, shell_status
from tensorkv.peer.handshake import connect_as
from tensorkv.scheduler.loop import SchedulerServer
from tensorkv.worker.signals import handles

LINGER_S = 30.0
"""Timeout for workers that have never joined, from the end of the parent."""

TICK_S = 0.1
TOKEN_NAME = "tensorkv-token"
"""Name of the memfd that holds a token, so that readers can verify what they read."""


class JobRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Where to find a job. It passes through torchrun's store, which anybody can read, so it has no token.

    `token_file` is the path of a file on this host that only this user can read, "" if TENSORKV_TOKEN is set.
    `sidecars` are the ranks of the workers that start sidecars; the servers are dealt out to them in turn.
    `error` says why there is no job; the other fields mean nothing then.
    """

    host: str = ""
    port: int = 0
    num_workers: int = 0
    num_servers: int = 0
    sidecars: tuple[int, ...] = ()
    token_file: str = ""
    error: str = ""


@final
class Sidecar:
    """Runs the servers of this host, and the scheduler if `config.scheduler_port` is 0. A context manager.

    Args:
        config: the job; role and rank are ignored. If it has a scheduler to run and no token, one is made.
        servers: ranks of the servers of this host.
        environ: the environment that they inherit.
        parent: a pidfd of the worker that started this process.
    """

    def __init__(
        self,
        config: JobConfig,
        servers: Iterable[int],
        environ: Mapping[str, str],
        parent: int | None = None,
    ) -> None:
        self._parent = parent
        self._ranks = tuple(servers)
        self._environ = environ
        self._scheduler: SchedulerServer | None = None
        self._servers: dict[int, subprocess.Popen[bytes]] = {}
        self.token_file = ""
        self._token: int | None = None  # descriptor of that file
        if config.scheduler_port == 0:
            self._scheduler, config = open_scheduler(config, self._parent_gone)
        self.config = config
        self._asked = os.eventfd(0, os.EFD_CLOEXEC)  # counted up by `ask_report`

    def __enter__(self) -> Sidecar:
        if self._scheduler is not None:
            self._scheduler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._scheduler is not None:
            self._scheduler.stop()
        self._end_servers()
        os.close(self._asked)
        if self._token is not None:
            os.close(self._token)

    def ask_report(self) -> None:
        """Have `run` report on stderr who waits for whom. Callable from a signal handler while entered."""
        os.eventfd_write(self._asked, 1)

    def write_token(self) -> None:
        """Write the token where only this user can read it: to a memfd, which vanishes with this process."""
        self._token = os.memfd_create(TOKEN_NAME)
        os.fchmod(self._token, 0o600)
        os.write(self._token, self.config.token.encode())
        self.token_file = f"/proc/{os.getpid()}/fd/{self._token}"

    def start_servers(self) -> None:
        """Start the servers of this host. Does not wait for them."""
        for rank in self._ranks:
            self._servers[rank] = start(server_spec(self.config, rank, self._environ))

    def _parent_gone(self) -> bool:
        return self._parent is not None and bool(select.select([self._parent], [], [], 0)[0])

    def run(self, parent: int) -> None:
        """Run until the job is over. `parent` is a pidfd of the worker that started this process."""
        self._parent = parent
        with contextlib.ExitStack() as stack:
            poller = select.poll()
            poller.register(parent, select.POLLIN)
            poller.register(self._asked, select.POLLIN)
            ranks: dict[int, int] = {}  # of running servers, by pidfd
            for rank, process in self._servers.items():
                descriptor = os.pidfd_open(process.pid)
                stack.callback(os.close, descriptor)
                poller.register(descriptor, select.POLLIN)
                ranks[descriptor] = rank
            gone_at: float | None = None
            while not self._over(gone_at, bool(ranks)):
                for descriptor, _ in poller.poll(None if gone_at is None else TICK_S * 1000):
                    if descriptor == self._asked:
                        os.eventfd_read(descriptor)
                        self._report()
                        continue
                    poller.unregister(descriptor)
                    if descriptor == parent:
                        gone_at = time.monotonic()
                    else:
                        self._server_ended(ranks.pop(descriptor))

    def _over(self, gone_at: float | None, serving: bool) -> bool:
        """Whether this process has nothing left to do. `gone_at`: when the parent ended."""
        scheduler = self._scheduler
        if scheduler is None:  # the scheduler of the first host tells its servers to end
            return not serving
        if gone_at is None:
            return False
        if scheduler.lost is not None or not scheduler.has_joined("worker", 0):
            return True
        joined, present = scheduler.count_workers()
        late = time.monotonic() > gone_at + LINGER_S
        return present == 0 and (joined == self.config.num_workers or late)

    def _report(self) -> None:
        """Report who waits at the scheduler, and have the servers report on their rounds."""
        if self._scheduler is not None:
            lines = self._scheduler.report()
            sys.stderr.write("".join(f"tensorkv: {line}\n" for line in lines))
            sys.stderr.flush()
        for process in self._servers.values():
            if handles(process.pid, signal.SIGUSR1):  # it may still be starting
                process.send_signal(signal.SIGUSR1)

    def _server_ended(self, rank: int) -> None:
        """Tell the scheduler about a server that failed before it could join: nobody else would."""
        status = self._servers[rank].wait()
        if status == 0 or (self._scheduler is not None and self._scheduler.has_joined("server", rank)):
            return
        config = dataclasses.replace(self.config, role="server", rank=rank)
        host, port = config.scheduler_host, config.scheduler_port
        # To the scheduler, a connection in the server's place that ends at once is a lost server. It refuses
        # the connection if the server had joined or the job is over; then there is nothing to report.
        with contextlib.suppress(TensorKVError):
            connection = connect_as(config, "the scheduler", host, port)
            sys.stderr.write(f"tensorkv: server {rank} failed at its start, status {shell_status(status)}\n")
            connection.shutdown()
            connection.close()

    def _end_servers(self) -> None:
        """Wait for the servers, which know that the job is over; kill those that do not end in time."""
        deadline = time.monotonic() + SERVER_STOP_S
        for rank, process in self._servers.items():
            if self._scheduler is None or not self._scheduler.has_joined("server", rank):
                process.terminate()  # no scheduler here, or it is still starting: nobody told it to end
        for process in self._servers.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0.0))
        for process in self._servers.values():
            if process.returncode is None:
                process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel
                    process.wait(KILL_WAIT_S)


def main(parent_pid: str, report_fd: str, server_ranks: str) -> int:
    """Run a sidecar to its end; the environment describes the job. Returns the exit status."""
    try:
        parent = os.pidfd_open(int(parent_pid))
    except ProcessLookupError:
        return 1
    if os.getppid() != int(parent_pid):  # the parent died before it was watched
        return 1
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until there is something to report
    logging.basicConfig(format="%(name)s: %(message)s")
    config = from_env()
    assert config is not None
    ranks = [int(rank) for rank in server_ranks.split(",") if rank]
    with open(int(report_fd), "wb") as report:
        try:
            sidecar = Sidecar(config, ranks, os.environ, parent)
        except OSError as exc:
            report.write(msgspec.json.encode(JobRecord(error=str(exc))))
            return 1
        with sidecar, contextlib.ExitStack() as ending:
            ending.callback(signal.signal, signal.SIGUSR1, signal.SIG_IGN)
            signal.signal(signal.SIGUSR1, lambda number, frame: sidecar.ask_report())
            if not config.token:
                sidecar.write_token()
            sidecar.start_servers()
            host, port = sidecar.config.scheduler_host, sidecar.config.scheduler_port
            record = JobRecord(
                host=host,
                port=port,
                num_workers=config.num_workers,
                num_servers=config.num_servers,
                token_file=sidecar.token_file,
            )
            report.write(msgspec.json.encode(record))
            report.close()
            sidecar.run(parent)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
