"""`tensorkv.spawn`: a job whose workers call a function, like torch.multiprocessing.spawn.

Workers are fresh processes of `multiprocessing`, which passes function and arguments from this process
to its own children; no data from the network is involved. The scheduler is a few threads of this
process, the servers are processes as under `tensorkv run`. All of them die with this process.
"""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, final

from tensorkv.config import JobConfig, Transport
from tensorkv.errors import InvalidArgument, JobFailed
from tensorkv.launch.local import JobOptions, job_config
from tensorkv.launch.pdeathsig import die_with
from tensorkv.launch.processes import Processes, open_scheduler, scheduler_calls, server_spec, start
from tensorkv.launch.supervisor import KILL_WAIT_S, Action, Finish, Node, status_text
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
    scheduler, config = open_scheduler(job_config(options, os.environ, scheduler=("", 0), token=""))
    scheduler.start()
    try:
        _Job(config, **scheduler_calls(scheduler, num_servers)).run(fn, args)
    finally:
        scheduler.stop()


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


def _start(worker: SpawnProcess) -> None:
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
@dataclass
class _Job(Processes):
    """The processes of a job: servers as under `tensorkv run`, and workers of `multiprocessing`."""

    config: JobConfig
    _workers: dict[Node, SpawnProcess] = field(init=False, default_factory=dict)
    _pipes: dict[Node, Connection] = field(init=False, default_factory=dict)  # deliver a worker's traceback
    _tracebacks: dict[Node, str] = field(init=False, default_factory=dict)
    _pidfds: dict[Node, int] = field(init=False, default_factory=dict)

    def run(self, fn: Callable[..., object], args: tuple[Any, ...]) -> None:
        """Run the job to its end. Raises JobFailed. No process is left."""
        try:
            for rank in range(self.config.num_servers):
                self._start_server(rank)
            for rank in range(self.config.num_workers):
                self._start_worker(rank, fn, args)
            self._conclude(self._watch(self._pidfds, self._news))
        finally:
            self._signal(self._workers, signal.SIGKILL)
            self._end()
            for worker in self._workers.values():
                worker.join(KILL_WAIT_S)
            for pipe in self._pipes.values():
                pipe.close()
            for descriptor in self._pidfds.values():
                os.close(descriptor)

    def _start_server(self, rank: int) -> None:
        spec = server_spec(self.config, rank, os.environ)
        self._processes[spec.node] = server = start(spec)
        self._pidfds[spec.node] = os.pidfd_open(server.pid)

    def _start_worker(self, rank: int, fn: Callable[..., object], args: tuple[Any, ...]) -> None:
        node = Node("worker", rank)
        config = dataclasses.replace(self.config, rank=rank)
        context = multiprocessing.get_context("spawn")
        self._pipes[node], told = context.Pipe(duplex=False)
        worker = context.Process(
            target=_work, args=(fn, args, config, os.getpid(), told), name=f"tensorkv {node}"
        )
        with told:
            _start(worker)
        self._workers[node] = worker
        assert worker.pid is not None
        self._pidfds[node] = os.pidfd_open(worker.pid)

    def _news(self, timeout_s: float | None) -> tuple[list[Action], dict[Node, int]]:
        """Wait for the end of processes, and for tracebacks."""
        alive = {self._pidfds[node]: node for node in self._supervisor.alive}
        pipes = {pipe: node for node, pipe in self._pipes.items() if not pipe.closed}
        ready = wait([*alive, *pipes], timeout_s)
        for pipe in pipes.keys() & ready:
            self._take_report(pipes[pipe], pipe)
        return [], {node: self._status(node) for descriptor, node in alive.items() if descriptor in ready}

    def _take_report(self, node: Node, pipe: Connection) -> None:
        try:
            text = pipe.recv_bytes(_MAX_REPORT_BYTES).decode("utf-8", "replace")
        except (EOFError, OSError):  # it ended without a report, or was killed while sending it
            text = ""
        pipe.close()
        if text:
            self._tracebacks[node] = text

    def _status(self, node: Node) -> int:
        if node.role == "server":
            return self._processes[node].wait()
        worker = self._workers[node]
        worker.join()
        assert worker.exitcode is not None
        pipe = self._pipes[node]
        if not pipe.closed and pipe.poll():
            self._take_report(node, pipe)
        return worker.exitcode

    def _send(self, node: Node, signum: signal.Signals) -> None:
        if node.role == "server":
            super()._send(node, signum)
        elif (worker := self._workers[node]).exitcode is None:
            assert worker.pid is not None
            os.kill(worker.pid, signum)

    def _conclude(self, finish: Finish) -> None:
        if finish.text is None:
            return
        culprit, text = finish.culprit, finish.text
        first = self.first_lost()
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
