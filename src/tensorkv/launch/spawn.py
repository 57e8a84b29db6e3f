"""`tensorkv.spawn`: a job whose workers call a function, like torch.multiprocessing.spawn.

Workers are fresh processes of `multiprocessing`, which passes function and arguments from this process
to its own children; no data from the network is involved. The scheduler is a few threads of this
process, the servers are processes as under `tensorkv run`. All of them die with this process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any, final

from tensorkv.config import JobConfig, Transport
from tensorkv.errors import InvalidArgument, JobFailed
from tensorkv.launch.local import JobOptions, job_config
from tensorkv.launch.pdeathsig import die_with
from tensorkv.launch.processes import shielded
from tensorkv.launch.supervisor import (
    KILL_WAIT_S,
    Action,
    Finish,
    Kill,
    Node,
    StopServers,
    Supervisor,
    Terminate,
    status_text,
)
from tensorkv.scheduler.loop import SchedulerServer
from tensorkv.worker.uncaught import described

logger = logging.getLogger(__name__)
_MAX_REPORT_BYTES = 1 << 20


def spawn(
    fn: Callable[..., object],
    args: tuple[Any, ...] = (),
    *,
    num_workers: int,
    num_servers: int = 1,
    timeout_s: float | None = None,
    allow_import: Iterable[str] = (),
    transport: Transport | None = None,
) -> None:
    """Run a job on this machine whose workers call `fn(rank, *args)`, and wait until all have returned.

    In `fn`, `tensorkv.create("dist_sync")` opens a store of the job.

    Args:
        fn: a function of a module or of the script: every worker is a fresh process that imports it. The
            script must call `spawn` under `if __name__ == "__main__":`.
        args: the further arguments: picklable objects, and those that torch.multiprocessing passes to new
            processes. Tensors are moved to shared memory; create queues, locks and events with
            `multiprocessing.get_context("spawn")`.
        num_workers, num_servers: number of processes of each.
        timeout_s: timeout of a waiting call in seconds; None uses the environment's, else 1800.
        allow_import: modules that servers may import for updaters and optimizers.
        transport: how workers reach servers: "shm" by shared memory, "tcp" by TCP, "auto" by shared memory
            where available; None uses the environment's, else "auto".

    Raises:
        JobFailed: a worker raised, or a process ended with another status than 0. The text names the
            first that failed, and ends with the worker's traceback. All others were ended. If the failed
            worker's stores say on_worker_loss="continue" and others return, the failure is logged instead.
        InvalidArgument: a number is out of range, or `fn` or `args` cannot be passed to a worker.

    Blocks. When it ends, even by KeyboardInterrupt, no process of the job is left.

    Example:
        <!-- file: sums.py -->
        ```python
        import tensorkv, torch

        def work(rank):
            with tensorkv.create("dist_sync") as kv:
                kv.init("w", torch.zeros(1))
                total = kv.pushpull("w", torch.ones(1))  # both push, and the servers add up
            if rank == 0:
                print(total)

        if __name__ == "__main__":
            tensorkv.spawn(work, num_workers=2)
        ```

        ```console
        $ python sums.py
        tensor([2.])
        ```
    """
    _check_function(fn, args)
    options = JobOptions(
        command=("a function",),
        num_workers=num_workers,
        num_servers=num_servers,
        timeout_s=timeout_s,
        allow_import=tuple(allow_import),
        transport=transport,
    )
    with _Job(options, os.environ) as job:
        job.start(fn, args)
        job.supervise()


def _check_function(fn: Any, args: Any) -> None:
    """Refuse arguments that would fail in every worker with an obscure error."""
    if not callable(fn):
        raise InvalidArgument(f"fn is {fn!r}, which cannot be called")
    if not isinstance(args, tuple):
        raise InvalidArgument(f"args is a {type(args).__name__}; pass a tuple: args=(x,) for one argument")
    main = sys.modules.get("__main__")
    if getattr(fn, "__module__", None) == "__main__" and not hasattr(main, "__file__"):
        raise InvalidArgument(
            f"{getattr(fn, '__qualname__', fn)} was defined in a notebook, an interactive session or with "
            "-c, where new processes cannot find it; move it to a module"
        )


def _start_worker(worker: SpawnProcess) -> None:
    """Start a process. This pickles its arguments; not earlier, as some can be pickled once per process only.

    Raises:
        InvalidArgument: they cannot be pickled.
    """
    try:
        worker.start()
    except OSError:  # out of processes or file descriptors
        raise
    except Exception as exc:  # pickling an object may raise anything
        raise InvalidArgument(
            f"fn and args cannot be handed to another process: {exc}; fn has to stand at the top level of a "
            "module, args must be picklable, and queues, locks and events have to be made by "
            "multiprocessing.get_context('spawn')"
        ) from exc


@final
class _Job:
    """The processes of a job and their supervisor. Leaving the block ends them all."""

    def __init__(self, options: JobOptions, environ: Mapping[str, str]) -> None:
        self._environ = environ
        token = secrets.token_hex(32)
        self._config = job_config(options, environ, scheduler=("", 0), token=token)
        self._scheduler = SchedulerServer(
            num_workers=options.num_workers,
            num_servers=options.num_servers,
            token=token,
            host=self._config.host,
            slice_bound_bytes=self._config.slice_bound_bytes,
        )
        host, port = self._scheduler.address
        self._config = dataclasses.replace(self._config, scheduler_host=host, scheduler_port=port)
        self._servers: dict[Node, subprocess.Popen[bytes]] = {}
        self._workers: dict[Node, SpawnProcess] = {}
        self._reports: dict[Node, Connection] = {}  # pipes that deliver a worker's traceback
        self._tracebacks: dict[Node, str] = {}
        self._pidfds: dict[int, Node] = {}
        nodes = [Node("server", rank) for rank in range(options.num_servers)]
        nodes += [Node("worker", rank) for rank in range(options.num_workers)]
        self._supervisor = Supervisor(nodes)

    def __enter__(self) -> _Job:
        self._scheduler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in (*self._workers, *self._servers):
            self._signal(node, signal.SIGKILL)
        for worker in self._workers.values():
            worker.join(KILL_WAIT_S)
        for server in self._servers.values():
            with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel
                server.wait(KILL_WAIT_S)
        self._scheduler.stop()
        for report in self._reports.values():
            report.close()
        for descriptor in self._pidfds:
            os.close(descriptor)

    def start(self, fn: Callable[..., object], args: tuple[Any, ...]) -> None:
        """Start all processes, without waiting for them."""
        context = multiprocessing.get_context("spawn")
        for node in self._supervisor.alive:
            config = dataclasses.replace(self._config, role=node.role, rank=node.rank)
            if node.role == "server":
                environ = {**self._environ, **config.to_env(), "OMP_NUM_THREADS": "1"}
                argv = (sys.executable, "-m", "tensorkv.server.loop")
                server = subprocess.Popen(
                    shielded(argv, environ), env=environ, stdin=subprocess.DEVNULL, start_new_session=True
                )
                self._servers[node] = server
                pid: int | None = server.pid
            else:
                report, told = context.Pipe(duplex=False)
                self._reports[node] = report
                worker = context.Process(
                    target=_work, args=(fn, args, config, os.getpid(), told), name=f"tensorkv {node}"
                )
                with told:
                    _start_worker(worker)
                self._workers[node] = worker
                pid = worker.pid
            assert pid is not None
            self._pidfds[os.pidfd_open(pid)] = node

    def supervise(self) -> None:
        """Wait until the job is over. Raises JobFailed."""
        running = dict(self._pidfds)
        supervisor = self._supervisor
        while True:
            deadline = supervisor.deadline
            timeout_s = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            listened = [report for report in self._reports.values() if not report.closed]
            ready = wait([*running, *listened], timeout_s)
            for node, report in self._reports.items():
                if report in ready:
                    self._take_report(node, report)
            exits = {}
            for descriptor in [each for each in ready if isinstance(each, int)]:
                node = running.pop(descriptor)
                exits[node] = self._status(node)
                if node.role == "worker" and exits[node] == 0:
                    self._scheduler.worker_exited(node.rank)
            spared = self._spared(exits)
            now = time.monotonic()
            actions = supervisor.exited(exits, now, self._first_lost(), spared) if exits else []
            for action in [*actions, *supervisor.tick(now)]:
                if isinstance(action, Finish):
                    self._conclude(action)
                    return
                self._perform(action)

    def _spared(self, exits: Mapping[Node, int]) -> list[Node]:
        """Return the failed workers that the job survives; none once the job is ending."""
        return [
            node
            for node, returncode in exits.items()
            if self._supervisor.running
            and node.role == "worker"
            and returncode != 0
            and self._scheduler.worker_failed(node.rank, f"it ended with {status_text(returncode)}")
        ]

    def _take_report(self, node: Node, report: Connection) -> None:
        try:
            text = report.recv_bytes(_MAX_REPORT_BYTES).decode("utf-8", "replace")
        except (EOFError, OSError):  # it ended without a report, or was killed while sending it
            text = ""
        report.close()
        if text:
            self._tracebacks[node] = text

    def _status(self, node: Node) -> int:
        if node.role == "server":
            return self._servers[node].wait()
        worker = self._workers[node]
        worker.join()
        assert worker.exitcode is not None
        report = self._reports[node]
        if not report.closed and report.poll():
            self._take_report(node, report)
        return worker.exitcode

    def _first_lost(self) -> Node | None:
        lost = self._scheduler.lost
        return Node(lost.role, lost.rank) if lost is not None and lost.role != "scheduler" else None

    def _perform(self, action: Action) -> None:
        match action:
            case Terminate(nodes):
                for node in nodes:
                    self._signal(node, signal.SIGTERM)
            case Kill(nodes):
                for node in nodes:
                    self._signal(node, signal.SIGKILL)
            case StopServers():
                absent = [
                    node for node in self._servers if not self._scheduler.has_joined("server", node.rank)
                ]
                # These first: otherwise one may find the scheduler gone, and report it.
                for further in self._supervisor.dismiss(absent):
                    self._perform(further)
                self._scheduler.stop()

    def _signal(self, node: Node, signum: signal.Signals) -> None:
        """Signal a process that has not been reaped yet; for a server, its process group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if node.role == "server":
                if self._servers[node].returncode is None:
                    os.killpg(self._servers[node].pid, signum)
            elif self._workers[node].exitcode is None:
                pid = self._workers[node].pid
                assert pid is not None
                os.kill(pid, signum)

    def _conclude(self, finish: Finish) -> None:
        if finish.text is None:
            return
        culprit, text = finish.culprit, finish.text
        first = self._first_lost()
        if first in self._tracebacks:  # it reported its failure, but ended later than those that followed it
            culprit, text = first, f"{first} failed with {status_text(1)}"
        words = self._tracebacks.get(culprit) if culprit is not None else None
        outcome = "the job went on without it" if finish.went_on else "the job was ended"
        text = f"{text}; {outcome}" + (f"\n\n{words.rstrip()}" if words else "")
        if finish.status != 0:
            raise JobFailed(text)
        logger.warning("%s", text)


def _work(
    fn: Callable[..., object], args: tuple[Any, ...], config: JobConfig, parent_pid: int, told: Connection
) -> None:
    """Run a worker, in its own process, as the target of multiprocessing."""
    die_with(parent_pid)
    os.register_at_fork(after_in_child=told.close)
    os.environ.update(config.to_env())
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // config.num_workers))
    try:
        fn(config.rank, *args)
    except KeyboardInterrupt as exc:  # Ctrl-C reaches all processes; the parent ends the job
        sys.last_value = exc
        sys.exit(128 + signal.SIGINT)
    except Exception as exc:  # any error of the user's function goes to the parent
        text = described(exc).encode("utf-8", "replace")
        told.send_bytes(text[-_MAX_REPORT_BYTES:])
        sys.last_value = exc  # as the interpreter does: leaving the job then counts as a loss, with its cause
        raise SystemExit(1) from exc
    finally:
        told.close()
