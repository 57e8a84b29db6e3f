"""Runs real processes: `Processes` watches and ends those of any job under the rules of the supervisor.

`ProcessGroup` runs a list of commands: output is merged by lines, the first failure or a signal ends
everything, and nothing is left running: each process leads its own session, whose group is signalled as a
whole, and all of them die with a launcher that is killed (`pdeathsig.py`, `reaper.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, final

from tensorkv.config import JobConfig
from tensorkv.launch.forwarder import Forwarder
from tensorkv.launch.output import STREAMS, Output
from tensorkv.launch.signals import SignalInbox
from tensorkv.launch.supervisor import (
    GRACE_S,
    KILL_WAIT_S,
    SERVER_STOP_S,
    Action,
    Finish,
    Kill,
    Node,
    Report,
    StopServers,
    Supervisor,
    Terminate,
    status_text,
)
from tensorkv.scheduler.loop import SchedulerServer
from tensorkv.worker.signals import handles

_PDEATHSIG = Path(__file__).with_name("pdeathsig.py")
_REAPER = Path(__file__).with_name("reaper.py")
_GUARD_EXIT_S = 5.0

_MAX_GUARDS = 10
"""Maximum number of reapers that one job uses up."""

_LAST_OUTPUT_S = 2.0
"""Maximum time that an interrupted launcher waits for a reader that does not read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpec:
    """One process to start. `env` is its whole environment.

    With `inherit_stdin` it shares the launcher's stdin; otherwise its stdin is empty.
    """

    node: Node
    argv: tuple[str, ...]
    env: Mapping[str, str]
    inherit_stdin: bool = False


@final
class Reaper:
    """The process that kills the orphans of a killed launcher; see `reaper.py`. A context manager.

    If it is itself killed (by a system short of memory, for example), `check` replaces it.
    """

    def __init__(self) -> None:
        self._groups: set[int] = set()
        self._replacements_left = _MAX_GUARDS - 1

    def __enter__(self) -> Reaper:
        self._process = self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_GUARD_EXIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(_GUARD_EXIT_S)

    def add(self, group: int) -> None:
        """Have `group` killed if this process dies."""
        self._groups.add(group)
        self._send(f"+{group}\n")

    def remove(self, group: int) -> None:
        """Forget `group`: it has ended, and its number may be reused."""
        self._groups.discard(group)
        self._send(f"-{group}\n")

    def check(self) -> str | None:
        """Replace the process if it has ended, and return a line that says so. Call it at each SIGCHLD."""
        status = self._process.poll()
        if status is None or self._replacements_left < 0:
            return None
        ended = f"the reaper of this job (process {self._process.pid}) ended with {status_text(status)}"
        self._replacements_left -= 1
        if self._replacements_left < 0:
            return f"{ended}, as those before it; the job goes on without one"
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process = self._start()
        except OSError as exc:
            self._replacements_left = -1
            return f"{ended}, and no other can be started ({exc}); the job goes on without one"
        for group in sorted(self._groups):
            self._send(f"+{group}\n")
        return f"{ended}; process {self._process.pid} has taken its place"

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(_REAPER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        if not self._process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):  # it was killed; `check` will notice
                os.write(self._process.stdin.fileno(), line.encode())


@dataclass(kw_only=True)
class Processes:
    """Watches the processes of a job until it is over, and ends them. A subclass starts them.

    Args:
        absent_servers: returns the servers that are still starting. Called when the last worker has ended
            with 0; these servers get a SIGTERM.
        stop_servers: called after that; tells the other servers to end.
        first_lost: returns the process that the scheduler lost first, None if it lost none.
        on_worker_done: called with the rank of each worker that has ended with 0.
        report: returns lines that say who waits at the scheduler.
        goes_on: called with a worker that has failed, and how it ended (its status, or -signal); returns
            whether the job goes on without it.
        grace_s, server_stop_s: see `supervisor`.
    """

    absent_servers: Callable[[], Iterable[Node]]
    stop_servers: Callable[[], None]
    first_lost: Callable[[], Node | None] = lambda: None
    on_worker_done: Callable[[int], None] = lambda rank: None
    report: Callable[[], Iterable[str]] = tuple
    goes_on: Callable[[Node, int], bool] = lambda node, returncode: False
    grace_s: float = GRACE_S
    server_stop_s: float = SERVER_STOP_S
    _supervisor: Supervisor = field(init=False)
    _processes: dict[Node, subprocess.Popen[bytes]] = field(init=False, default_factory=dict)
    _reports: list[str] = field(init=False, default_factory=list)

    def _watch(
        self, nodes: Iterable[Node], news: Callable[[float | None], tuple[list[Action], dict[Node, int]]]
    ) -> Finish:
        """Feed events to the supervisor and perform its actions, until it says that the job is over.

        `news(timeout_s)` waits; it returns actions, and how each process ended that has ended meanwhile.
        """
        supervisor = self._supervisor = Supervisor(
            nodes, grace_s=self.grace_s, server_stop_s=self.server_stop_s
        )
        while True:
            deadline = supervisor.deadline
            actions, exits = news(None if deadline is None else max(deadline - time.monotonic(), 0.0))
            now = time.monotonic()
            for node, status in exits.items():
                if node.role == "worker" and status == 0:
                    self.on_worker_done(node.rank)
            if exits:
                spared = self._spared(exits)
                actions += supervisor.exited(exits, now, self.first_lost(), spared)
            actions += supervisor.tick(now)
            for action in actions:
                if isinstance(action, Finish):
                    return action
                self._perform(action)

    def _spared(self, exits: Mapping[Node, int]) -> list[Node]:
        """Return the workers whose failure the job survives: none once the job is ending."""
        return [
            node
            for node, returncode in exits.items()
            if self._supervisor.running
            and node.role == "worker"
            and returncode != 0
            and self.goes_on(node, returncode)
        ]

    def _perform(self, action: Action) -> None:
        match action:
            case Terminate(nodes):
                self._signal(nodes, signal.SIGTERM)
            case Kill(nodes):
                self._signal(nodes, signal.SIGKILL)
            case StopServers():
                # The absent ones first: otherwise one may find the scheduler gone and log that.
                for further in self._supervisor.dismiss(self.absent_servers()):
                    self._perform(further)
                self.stop_servers()
            case Report(text):
                self._reports.append(text)

    def _signal(self, nodes: Iterable[Node], signum: signal.Signals) -> None:
        for node in nodes:
            # The group is empty, or (as some systems report it) has only its ended leader.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                self._send(node, signum)

    def _send(self, node: Node, signum: signal.Signals) -> None:
        """Signal the group of a process, unless it was reaped: its number may then be another's."""
        if self._processes[node].returncode is None:
            os.killpg(self._processes[node].pid, signum)

    def _end(self, forget: Callable[[int], None] = lambda pid: None) -> None:
        """Kill the rest of every group, `forget` it, and reap its leader."""
        self._signal(self._processes, signal.SIGKILL)
        for process in self._processes.values():
            forget(process.pid)
            with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel: reported before
                process.wait(KILL_WAIT_S)
        self._processes.clear()


@final
@dataclass
class ProcessGroup(Processes):
    """Starts commands and waits until the last has ended. Call `run` once, in the main thread.

    On SIGUSR1 it writes the lines of `report`; every process that handles this signal gets it, too.

    Args:
        specs: the processes to start, in this order.
        output: where the lines go.
        The others: see `Processes`.
    """

    specs: Sequence[ProcessSpec]
    output: Output

    def run(self) -> int:
        """Run the job; return the exit status of the launcher.

        Raises:
            OSError: a process could not be started. Those already started are ended.
        """
        with SignalInbox() as inbox, Reaper() as reaper:
            forwarder = Forwarder(self.output, inbox.wake)
            try:
                self._start(forwarder, reaper)
                finish = self._watch(
                    self._processes, lambda timeout_s: self._news(timeout_s, forwarder, inbox, reaper)
                )
                self._end(reaper.remove)
                written = self._flush(forwarder, inbox, finish)
                if (
                    forwarder.error is not None and finish.status == 0
                ):  # only the last lines could not be written
                    finish = Finish(*_lost_output(forwarder.error))
            finally:
                self._end(reaper.remove)
                forwarder.close()
        if written or forwarder.error is not None:
            with contextlib.suppress(OSError):  # usually the same error again
                self._conclude(finish)
        return finish.status

    def _start(self, forwarder: Forwarder, reaper: Reaper) -> None:
        for spec in self.specs:
            process = start(spec, subprocess.PIPE)
            self._processes[spec.node] = process
            reaper.add(process.pid)
            for stream, pipe in zip(STREAMS, (process.stdout, process.stderr), strict=True):
                assert pipe is not None
                forwarder.add(spec.node, stream, pipe)
        forwarder.start()

    def _news(
        self, timeout_s: float | None, forwarder: Forwarder, inbox: SignalInbox, reaper: Reaper
    ) -> tuple[list[Action], dict[Node, int]]:
        """Wait for a signal, one of the end of a process included, or the end of the output."""
        signals = inbox.wait(timeout_s)
        now = time.monotonic()
        actions: list[Action] = []
        if inbox.take_report():
            self._tell(forwarder)
        if line := reaper.check():
            forwarder.say(line)
        for signum in signals:
            actions += self._supervisor.signalled(signum, now)
        if forwarder.done:
            actions += self._supervisor.abort(*_lost_output(forwarder.error), now)
        return actions, self._exits()

    def _tell(self, forwarder: Forwarder) -> None:
        """Write what the scheduler waits for, and send SIGUSR1 to every process that can report its waits."""
        for line in self.report():
            forwarder.say(line)
        for node in self._supervisor.alive:
            pid = self._processes[node].pid
            if handles(pid, signal.SIGUSR1):
                os.kill(pid, signal.SIGUSR1)
            else:
                forwarder.say(
                    f"{node} (process {pid}) cannot be asked: it has not joined, or is a script around it"
                )

    def _exits(self) -> dict[Node, int]:
        """Return the processes that have ended since the last call, and how.

        They are reaped only at the end of the job: while a leader is a zombie, the kernel does not reuse its
        number, and its group can be killed safely.
        """
        exits = {}
        for node in self._supervisor.alive:
            pid = self._processes[node].pid
            info = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if info is not None:
                exits[node] = info.si_status if info.si_code == os.CLD_EXITED else -info.si_status
        return exits

    def _flush(self, forwarder: Forwarder, inbox: SignalInbox, finish: Finish) -> bool:
        """Wait until all output is written; return whether it is.

        Wait for a reader that does not read, unless the user wants the job to end.
        """
        interrupted = finish.status != 0 and finish.culprit is None
        deadline = time.monotonic() + _LAST_OUTPUT_S if interrupted else math.inf
        forwarder.finish()
        while not forwarder.done:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or inbox.wait(left_s if interrupted else None):
                return False
        return forwarder.error is None

    def _conclude(self, finish: Finish) -> None:
        """Write the reports and the outcome, below the last line of the processes."""
        for text in self._reports:
            self.output.say(text)
        if finish.culprit is not None:
            words = self.output.last_words(finish.culprit)
            if words:
                self.output.say(f"the last lines of {finish.culprit} on stderr were")
            for line in words:
                self.output.say(f"  {line}")
        if finish.text is not None:
            outcome = "the job went on without it" if finish.went_on else "the job was ended"
            self.output.say(f"{finish.text}; {outcome}")


def shielded(argv: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """Return a command that execs `argv` and dies with this process; see `pdeathsig.py`."""
    executable = shutil.which(argv[0], path=environ.get("PATH", os.defpath)) or argv[0]
    return [sys.executable, "-I", "-S", str(_PDEATHSIG), str(os.getpid()), executable, *argv]


def start(spec: ProcessSpec, output: int | None = None) -> subprocess.Popen[bytes]:
    """Start a process that has its own session and dies with this one.

    `output` is what `Popen` takes for its stdout and stderr; without it these are the launcher's.
    """
    return subprocess.Popen(
        shielded(spec.argv, spec.env),
        env=dict(spec.env),
        stdin=None if spec.inherit_stdin else subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        bufsize=0,
        start_new_session=True,
    )


def server_spec(config: JobConfig, rank: int, environ: Mapping[str, str]) -> ProcessSpec:
    """Return server `rank` of the job of `config`. It inherits `environ`."""
    config = dataclasses.replace(config, role="server", rank=rank)
    return ProcessSpec(
        node=Node("server", rank),
        argv=(sys.executable, "-m", "tensorkv.server.loop"),
        env={**environ, **config.to_env(), "OMP_NUM_THREADS": "1"},
    )


def open_scheduler(
    config: JobConfig, starter_gone: Callable[[], bool] = lambda: False
) -> tuple[SchedulerServer, JobConfig]:
    """Return a scheduler, not yet started, and `config` with its address, and with a token if it had none.

    Raises:
        AddressUnavailable: the scheduler cannot listen at `config.host`.
    """
    config = dataclasses.replace(config, token=config.token or secrets.token_hex(32))
    scheduler = SchedulerServer(
        num_workers=config.num_workers,
        num_servers=config.num_servers,
        token=config.token,
        host=config.host,
        slice_bound_bytes=config.slice_bound_bytes,
        peer_timeout_s=config.peer_timeout_s,
        starter_gone=starter_gone,
    )
    host, port = scheduler.address
    return scheduler, dataclasses.replace(config, scheduler_host=host, scheduler_port=port)


def scheduler_calls(scheduler: SchedulerServer, num_servers: int) -> dict[str, Any]:
    """Return the arguments of `Processes` through which it asks and tells this scheduler."""

    def first_lost() -> Node | None:
        lost = scheduler.lost
        return Node(lost.role, lost.rank) if lost is not None and lost.role != "scheduler" else None

    def goes_on(node: Node, returncode: int) -> bool:
        return scheduler.worker_failed(node.rank, f"it ended with {status_text(returncode)}")

    def absent_servers() -> list[Node]:
        servers = [Node("server", rank) for rank in range(num_servers)]
        return [node for node in servers if not scheduler.has_joined(node.role, node.rank)]

    return {
        "absent_servers": absent_servers,
        "stop_servers": scheduler.stop,
        "first_lost": first_lost,
        "on_worker_done": scheduler.worker_exited,
        "goes_on": goes_on,
        "report": scheduler.report,
    }


def _lost_output(error: OSError | None) -> tuple[int, str]:
    if isinstance(error, BrokenPipeError):
        return 128 + signal.SIGPIPE, "nobody reads the output"
    return 1, f"the output cannot be written: {error.strerror if error else 'its thread has ended'}"
