"""Decides when a job ends, with which status, and which processes to end: a state machine without processes.

Method calls pass in events, together with the time, and return the list of actions to take.

    RUNNING ── all workers ended with 0 ──> STOPPING ── all servers ended ──> FINISHED
       │                                       │ too slow: killed
       ├── first failure ──> [AWAITING] ──> ENDING ── all ended, or grace over: killed ──> FINISHED
       └── signal ──────────────────────────> ENDING

AWAITING: a process that fails because it lost another one may end before that one does. The scheduler knows
which process was lost first; the job waits a moment for that process to end and takes its status. If that is
0 (a script that calls `os._exit`, for example), or the process does not end, the verdict still names it, with
the status of a process that failed because of it.

If all stores of a worker say on_worker_loss="continue", its failure does not end the job: it is *spared*. The
job runs to its end and succeeds if any other worker does.
"""

from __future__ import annotations

import dataclasses
import enum
import signal
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

GRACE_S = 3.0
"""Timeout between SIGTERM and SIGKILL."""

ENDED_WELL = "although it ended with status 0"
SERVER_STOP_S = 5.0
"""Timeout for the servers to end by themselves after the last worker."""

KILL_WAIT_S = 5.0
"""Timeout after SIGKILL before giving up on a process that has not ended."""


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
    """The job is over. `culprit` failed first; `text` is None if nothing failed.

    `went_on`: the failure did not end the job; `status` is then 0 if another worker ended with 0.
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
    """The state machine of one job.

    `deadline` is the time at which to call `tick`, or None. All times are seconds of any one clock. After
    `Finish` it returns no more actions.
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
        """Whether workers are working, so that a failure would end the job."""
        return self._phase is _Phase.RUNNING

    def exited(
        self,
        exits: Mapping[Node, int],
        now: float,
        suspect: Node | None = None,
        spared: Collection[Node] = (),
    ) -> list[Action]:
        """Note that processes ended.

        Args:
            exits: how each ended: its status, or -signal. Pass ends that were seen at the same time in one
                call; `_suspicion` then decides which was first.
            now: seconds.
            suspect: the process that the scheduler lost first, None if it lost none.
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
        """Note failures that do not end the job: the first becomes the verdict, others are reported."""
        actions: list[Action] = []
        for node, returncode in failed if self.running else ():
            failure = dataclasses.replace(_failure(node, returncode), went_on=True)
            if self._verdict.culprit is None:
                self._verdict = failure
            else:
                actions.append(Report(f"{failure.text}, too"))
        return actions

    def _overrule(self) -> list[Action]:
        """Report the failure that did not end the job, because something else now does."""
        return [Report(f"{self._verdict.text} before")] if self._verdict.went_on else []

    def dismiss(self, nodes: Iterable[Node]) -> list[Action]:
        """End processes that are no longer needed; how they end does not matter."""
        going = self._alive.intersection(nodes)
        self._dismissed |= going
        return [Terminate(tuple(sorted(going)))] if going else []

    def signalled(self, signum: int, now: float) -> list[Action]:
        """Note a signal to the launcher. The first one ends the job, a later Ctrl-C kills it."""
        if self._phase is _Phase.ENDING and signum == signal.SIGINT:
            return self._kill(now)
        return self.abort(128 + signum, f"ended by {signal_name(signum)}", now)

    def abort(self, status: int, text: str, now: float) -> list[Action]:
        """End the job for a reason outside its processes; does nothing if it is already ending."""
        actions: list[Action] = []
        if self._phase in (_Phase.RUNNING, _Phase.STOPPING):
            actions = self._overrule()
            self._verdict = Finish(status, text)
        elif self._phase is not _Phase.AWAITING:
            return []
        return actions + self._end(now) + self._advance(now)

    def tick(self, now: float) -> list[Action]:
        """Act on the deadline, if it has passed."""
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
        """Ask workers to end, and servers after them: a worker needs the servers to leave cleanly."""
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
        """Enter the next phase if no process of this one is left."""
        if self._phase is _Phase.FINISHED:
            return []
        if not self._alive:
            return self._finish()
        if self._phase is _Phase.RUNNING and all(node.role == "server" for node in self._alive):
            self._phase, self.deadline = _Phase.STOPPING, now + self._server_stop_s
            return [StopServers()]
        return self._ask() if self._phase is _Phase.ENDING else []


def _suspicion(node: Node, returncode: int) -> tuple[bool, Node]:
    """Sort key of failures seen at once: a killed process comes first, as others may have followed it."""
    return returncode > 0, node


def _failure(node: Node, returncode: int) -> Finish:
    text = f"{node} failed with {status_text(returncode)}"
    return Finish(1 if node.role == "server" else shell_status(returncode), text, node)


def _followed(first: Node, verdict: Finish, how: str) -> Finish:
    """Return a verdict that blames the lost process, not the one that failed because of it."""
    return dataclasses.replace(verdict, text=f"{first} was lost, {how}", culprit=first)


def _listing(nodes: Iterable[Node]) -> str:
    return ", ".join(str(node) for node in nodes)
