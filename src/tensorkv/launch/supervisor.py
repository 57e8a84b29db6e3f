"""When a job ends, with which status, and who has to be ended: a state machine without processes.

Events come in by method calls, together with the time; what to do comes out as a list of actions.

    RUNNING ── all workers ended with 0 ──> STOPPING ── all servers ended ──> FINISHED
       │                                       │ too slow: killed
       ├── first failure ──> [AWAITING] ──> ENDING ── all ended, or grace over: killed ──> FINISHED
       └── signal ──────────────────────────> ENDING

AWAITING: a process that fails because it lost another may well end before that other one does. Who
was lost first is known to the scheduler; the job waits a moment for that process and takes its status.
Where that is 0 (a script that calls `os._exit`, say), or does not come, the process is named all the same,
with the status of one that followed it.

A worker whose stores all say on_worker_loss="continue" may fail without an end of the job: it is *spared*.
The job goes on to its end, and has succeeded if any other worker has.
"""

from __future__ import annotations

import dataclasses
import enum
import signal
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

GRACE_S = 3.0
"""Time between SIGTERM and SIGKILL."""

ENDED_WELL = "although it ended with status 0"
SERVER_STOP_S = 5.0
"""Time that servers have to end by themselves after the last worker."""

KILL_WAIT_S = 5.0
"""Time after SIGKILL before a process that is still there is given up."""


@dataclass(frozen=True, slots=True, order=True)
class Node:
    """One process of the job; `rank` counts from 0 within the role."""

    role: Literal["server", "worker"]
    rank: int

    def __str__(self) -> str:
        return f"{self.role} {self.rank}"


@dataclass(frozen=True, slots=True)
class Terminate:
    """Send SIGTERM to the process groups of these."""

    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Kill:
    """Send SIGKILL to the process groups of these."""

    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class StopServers:
    """Tell the servers that the job is over."""


@dataclass(frozen=True, slots=True)
class Report:
    """Tell the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Finish:
    """The job is over. `culprit` failed first; `text` is None if nobody failed.

    `went_on` tells that the failure did not end the job; `status` is 0 then if another worker ended with 0.
    """

    status: int
    text: str | None = None
    culprit: Node | None = None
    went_on: bool = False


Action = Terminate | Kill | StopServers | Report | Finish


class _Phase(enum.Enum):
    RUNNING = enum.auto()
    AWAITING = enum.auto()
    STOPPING = enum.auto()
    ENDING = enum.auto()
    KILLING = enum.auto()
    FINISHED = enum.auto()


def shell_status(returncode: int) -> int:
    """Return the status a shell would show: 128 + signal for `returncode` = -signal."""
    return 128 - returncode if returncode < 0 else returncode


def signal_name(signum: int) -> str:
    """Return "SIGKILL" for 9, and "signal 64" for a number without a name."""
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"


def status_text(returncode: int) -> str:
    """Return "status 3", or "status 137 (SIGKILL)" for -9."""
    named = f" ({signal_name(-returncode)})" if returncode < 0 else ""
    return f"status {shell_status(returncode)}{named}"


@final
class Supervisor:
    """Decides over the processes of one job.

    `deadline` is the time at which `tick` wants to be called, or None. All times are seconds of any
    one clock. After `Finish` nothing more comes out.
    """

    def __init__(
        self,
        nodes: Iterable[Node],
        *,
        grace_s: float = GRACE_S,
        server_stop_s: float = SERVER_STOP_S,
        kill_wait_s: float = KILL_WAIT_S,
    ) -> None:
        self._alive = set(nodes)
        self._grace_s = grace_s
        self._server_stop_s = server_stop_s
        self._kill_wait_s = kill_wait_s
        self._phase = _Phase.RUNNING
        self._verdict = Finish(0)
        self._suspect: Node | None = None
        self._ended_well: set[Node] = set()
        self._dismissed: set[Node] = set()
        self._asked: set[Node] = set()
        self.deadline: float | None = None

    @property
    def alive(self) -> tuple[Node, ...]:
        """The processes not seen to end, servers first, in rank order."""
        return tuple(sorted(self._alive))

    @property
    def running(self) -> bool:
        """Whether workers do their work, and a failure would end the job."""
        return self._phase is _Phase.RUNNING

    def exited(
        self,
        exits: Mapping[Node, int],
        now: float,
        suspect: Node | None = None,
        spared: Collection[Node] = (),
    ) -> list[Action]:
        """Take note that processes ended.

        Args:
            exits: how each ended: its status, or -signal. Ends that were seen at the same time come
                in one call: which was first is then told by `_suspicion`.
            now: seconds.
            suspect: the process that the scheduler lost first, where it knows.
            spared: those of `exits` whose failure does not end the job.
        """
        self._alive -= exits.keys()
        self._ended_well.update(node for node in exits if exits[node] == 0)
        failing = (node for node in exits if exits[node] != 0 and node not in self._dismissed)
        failed = sorted(failing, key=lambda node: _suspicion(node, exits[node]))
        actions = self._spare([(node, exits[node]) for node in failed if node in spared])
        failed = [node for node in failed if node not in spared]
        if failed and self._phase in (_Phase.RUNNING, _Phase.STOPPING):
            first = suspect if suspect in failed else failed[0]
            assert first is not None
            actions += self._overrule()
            self._verdict = _failure(first, exits[first])
            if suspect in self._ended_well:
                self._verdict = _followed(suspect, self._verdict, ENDED_WELL)
            if suspect in self._alive:
                self._phase, self._suspect, self.deadline = _Phase.AWAITING, suspect, now + self._grace_s
            else:
                actions += self._end(now)
        elif self._phase is _Phase.AWAITING and self._suspect in exits:
            if self._suspect in failed:
                self._verdict = _failure(self._suspect, exits[self._suspect])
            elif self._suspect in self._ended_well:
                self._verdict = _followed(self._suspect, self._verdict, ENDED_WELL)
            actions += self._end(now)
        return actions + self._advance(now)

    def _spare(self, failed: Sequence[tuple[Node, int]]) -> list[Action]:
        """Note failures that do not end the job: the first is what it ends with, others are reported."""
        actions: list[Action] = []
        for node, returncode in failed if self.running else ():
            failure = dataclasses.replace(_failure(node, returncode), went_on=True)
            if self._verdict.culprit is None:
                self._verdict = failure
            else:
                actions.append(Report(f"{failure.text}, too"))
        return actions

    def _overrule(self) -> list[Action]:
        """Something else ends the job now: report the failure that did not."""
        return [Report(f"{self._verdict.text} before")] if self._verdict.went_on else []

    def dismiss(self, nodes: Iterable[Node]) -> list[Action]:
        """End these, whose work is not wanted any more: how they end does not matter."""
        going = self._alive.intersection(nodes)
        self._dismissed |= going
        return [Terminate(tuple(sorted(going)))] if going else []

    def signalled(self, signum: int, now: float) -> list[Action]:
        """Take note of a signal to the launcher. The first ends the job, a later Ctrl-C kills it."""
        if self._phase is _Phase.ENDING and signum == signal.SIGINT:
            return self._kill(now)
        return self.abort(128 + signum, f"ended by {signal_name(signum)}", now)

    def abort(self, status: int, text: str, now: float) -> list[Action]:
        """End the job for a reason outside of its processes; nothing if it is ending already."""
        actions: list[Action] = []
        if self._phase in (_Phase.RUNNING, _Phase.STOPPING):
            actions = self._overrule()
            self._verdict = Finish(status, text)
        elif self._phase is not _Phase.AWAITING:
            return []
        return actions + self._end(now) + self._advance(now)

    def tick(self, now: float) -> list[Action]:
        """Do what the deadline was set for, if it has passed."""
        if self.deadline is None or now < self.deadline:
            return []
        if self._phase is _Phase.AWAITING:
            assert self._suspect is not None
            self._verdict = _followed(
                self._suspect, self._verdict, f"and had not ended {self._grace_s:g} s later"
            )
            return self._end(now)
        if self._phase is _Phase.KILLING:
            return [Report(f"{_listing(self.alive)} could not be killed"), *self._finish()]
        stopping = self._phase is _Phase.STOPPING
        late = self._server_stop_s if stopping else self._grace_s
        who = _listing(node for node in self.alive if stopping or node in self._asked)
        return [Report(f"{who} did not end within {late:g} s and will be killed"), *self._kill(now)]

    def _end(self, now: float) -> list[Action]:
        self._phase, self.deadline = _Phase.ENDING, now + self._grace_s
        return self._ask()

    def _ask(self) -> list[Action]:
        """Ask workers to end, and servers after them: a worker that leaves in good order needs those."""
        workers = {node for node in self._alive if node.role == "worker"}
        new = (workers or self._alive) - self._asked
        self._asked |= new
        return [Terminate(tuple(sorted(new)))] if new else []

    def _kill(self, now: float) -> list[Action]:
        self._phase, self.deadline = _Phase.KILLING, now + self._kill_wait_s
        return [Kill(self.alive)]

    def _finish(self) -> list[Action]:
        self._phase, self.deadline = _Phase.FINISHED, None
        if self._verdict.went_on and any(node.role == "worker" for node in self._ended_well):
            self._verdict = dataclasses.replace(self._verdict, status=0)
        return [self._verdict]

    def _advance(self, now: float) -> list[Action]:
        """Go on where nobody is left to wait for."""
        if self._phase is _Phase.FINISHED:
            return []
        if not self._alive:
            return self._finish()
        if self._phase is _Phase.RUNNING and all(node.role == "server" for node in self._alive):
            self._phase, self.deadline = _Phase.STOPPING, now + self._server_stop_s
            return [StopServers()]
        return self._ask() if self._phase is _Phase.ENDING else []


def _suspicion(node: Node, returncode: int) -> tuple[bool, Node]:
    """Sort key of failures seen at once: a killed process fails by itself, others may have followed it."""
    return returncode > 0, node


def _failure(node: Node, returncode: int) -> Finish:
    text = f"{node} failed with {status_text(returncode)}"
    return Finish(1 if node.role == "server" else shell_status(returncode), text, node)


def _followed(first: Node, verdict: Finish, how: str) -> Finish:
    """Blame the process that was lost, not the one that failed because of it."""
    return dataclasses.replace(verdict, text=f"{first} was lost, {how}", culprit=first)


def _listing(nodes: Iterable[Node]) -> str:
    return ", ".join(str(node) for node in nodes)
