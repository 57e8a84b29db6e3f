"""Membership: the scheduler's state of the job. Its members, its open stores and its losses.

RULES
1. Once all servers have registered, workers are told the servers' addresses.
2. A process is lost when its connection ends without a Goodbye, when it sends Abandon, or when its
   launcher saw it end with another status than 0. Its later messages are dropped.
3. A lost worker is dropped, and the job goes on, if every open store it is a member of says so, and
   another worker is left. Any other loss ends the job: the first such loss is the cause that all
   processes are told, and later ones are ignored.
4. A worker that has said Goodbye, or is dropped, has left every store. A dropped one may have been
   creating keys on the servers; the servers are told which slices to drop.
5. A store lives from the first JoinStore of its name until every worker has left it.

Outgoing messages are (role, rank, message) tuples in `out`. Nothing here blocks or uses a socket.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from tensorkv.config import MAX_SLICE_BYTES, Role
from tensorkv.errors import ProtocolError, StoreMismatch, closed_meanwhile, to_wire
from tensorkv.scheduler.catalog import Catalog, CommitReduction, Placement
from tensorkv.wire import messages as m

MAX_STORES = 4096
"""Maximum stores open at one time."""

MAX_NAME_CHARS = 255
MAX_CAUSE_CHARS = 10_000
_OF_BOTH = (m.Register, m.Goodbye, m.Abandon)


@final
@dataclass(slots=True)
class _Process:
    address: m.ServerAddress
    hostname: str
    pid: int
    gone: bool = False
    said_goodbye: bool = False


@final
class Membership:
    """State of one job."""

    def __init__(self, num_workers: int, num_servers: int, slice_bound_bytes: int) -> None:
        self.num_workers = num_workers
        self.num_servers = num_servers
        self.out: list[tuple[Role, int, m.Message]] = []
        self.lost: m.Lost | None = None
        self._processes: dict[tuple[Role, int], _Process] = {}
        self._placement = Placement(slice_bound_bytes, MAX_SLICE_BYTES, [0] * num_servers)
        self._stores: dict[int, Catalog] = {}
        self._by_name: dict[str, int] = {}
        self._next_store = 1
        self._commits = CommitReduction(num_servers)
        self._goodbyes: set[int] = set()
        self._dropped: dict[int, m.WorkerLost] = {}

    @property
    def finished(self) -> bool:
        """Whether every worker has said Goodbye, or was dropped."""
        return len(self._gone) == self.num_workers

    @property
    def _gone(self) -> set[int]:
        return self._goodbyes | self._dropped.keys()

    def is_dropped(self, rank: int) -> bool:
        """Whether this worker is lost and the job goes on without it."""
        return rank in self._dropped

    def has_joined(self, role: Role, rank: int) -> bool:
        """Whether a process has registered in this place of the job."""
        return (role, rank) in self._processes

    def has_left(self, rank: int) -> bool:
        """Whether this worker has said Goodbye, or the launcher saw it end with status 0."""
        return rank in self._goodbyes

    def holder(self, role: Role, rank: int) -> str:
        """Describe the process that holds this place of the job, for error texts."""
        process = self._processes.get((role, rank))
        if process is None:
            return "another process"
        gone = ", which has left" if process.said_goodbye else ", which is lost" if process.gone else ""
        return f"process {process.pid} on host {process.hostname or '?'}{gone}"

    def count_workers(self) -> tuple[int, int]:
        """Return how many workers have ever joined, and how many of those are still there."""
        workers = [process for (role, _), process in self._processes.items() if role == "worker"]
        return len(workers), sum(not process.gone for process in workers)

    def handle(self, role: Role, rank: int, message: Any) -> None:
        """Handle a message of a process.

        Raises:
            ProtocolError: a process in this place may not send it now.
        """
        if isinstance(message, m.Register) == self.has_joined(role, rank):
            raise ProtocolError(f"{type(message).__name__} of {role} {rank}: out of turn")
        if (process := self._processes.get((role, rank))) is not None and process.said_goodbye:
            raise ProtocolError(f"{type(message).__name__} of {role} {rank}, which has said Goodbye")
        if isinstance(message, m.CommitReady) != (role == "server") and not isinstance(message, _OF_BOTH):
            raise ProtocolError(f"{type(message).__name__} is not for a {role} to say")
        if role == "worker" and rank in self._dropped:
            return  # it was in flight
        match message:
            case m.Register():
                self._register(role, rank, message)
            case m.Goodbye():
                self._goodbye(role, rank)
            case m.Abandon():
                self.declare_lost(role, rank, message.cause[:MAX_CAUSE_CHARS])
            case m.CommitReady():
                self._commit_ready(rank, message)
            case m.JoinStore():
                self._join_store(rank, message)
            case m.AskWaiting():
                self._answer_waiting(rank, message.request)
            case m.AskStuck():
                self._answer_stuck(rank, message)
            case _:
                self._handle_store(rank, message)

    def _commit_ready(self, rank: int, message: m.CommitReady) -> None:
        if message.store in self._stores:  # else the store has ended, and no worker waits for the commit
            decision = self._commits.add(rank, message)
            if decision is not None:
                self._to_servers(decision)

    def _handle_store(self, rank: int, message: Any) -> None:
        directory = self._stores.get(message.store)
        left = directory is not None and rank in directory.left and not isinstance(message, m.LeaveStore)
        if directory is None or left:  # another thread of this worker has closed the store
            if type(message) in m.REPLIES:
                self.out.append(("worker", rank, m.Failed(message.request, *to_wire(closed_meanwhile()))))
            return
        match message:
            case m.ProposeInit():
                directory.propose_init(rank, message)
            case m.ConcludeInit():
                directory.conclude_init(rank, message)
            case m.ProposeSetting():
                directory.propose_setting(rank, message)
            case m.ConcludeSetting():
                directory.conclude_setting(rank, message)
            case m.Lookup():
                directory.lookup(rank, message)
            case m.CountKeys():
                directory.count_keys(rank, message)
            case m.DeleteKeys():
                directory.delete(rank, message)
            case m.Barrier():
                directory.barrier(rank, message)
            case m.Together():
                directory.together(rank, message)
            case m.ConcludeTogether():
                directory.conclude_together(rank, message)
            case m.ProposeLoad():
                directory.propose_load(rank, message)
            case m.GiveUp():
                directory.give_up(rank, message.request)
            case m.LeaveStore():
                directory.close_for(rank, message)
        self._collect(directory)

    def _register(self, role: Role, rank: int, message: m.Register) -> None:
        names = (message.host, message.hostname, message.socket_name)
        if not 0 <= message.port < 1 << 16 or max(map(len, names)) > MAX_NAME_CHARS:
            raise ProtocolError(f"an address of {role} {rank} that cannot be one")
        address = m.ServerAddress(message.host, message.port, message.socket_name)
        self._processes[role, rank] = _Process(address, message.hostname, message.pid)
        if self.lost is not None:  # the job has ended already
            self.out.append((role, rank, self.lost))
            return
        if role == "server":
            self.out += [(role, rank, m.Gone(gone)) for gone in sorted(self._goodbyes)]
        self.out += [(role, rank, lost) for _, lost in sorted(self._dropped.items())]
        servers = [self._processes.get(("server", each)) for each in range(self.num_servers)]
        addresses = [server.address for server in servers if server is not None]
        if len(addresses) < self.num_servers:
            return
        welcome = m.Welcome(addresses)
        newcomers = list(self._processes) if role == "server" else [(role, rank)]
        for each_role, each_rank in newcomers:
            if each_role == "worker":
                self.out.append((each_role, each_rank, welcome))

    def _join_store(self, rank: int, message: m.JoinStore) -> None:
        number = self._by_name.get(message.name)
        directory = self._stores[number] if number is not None else None
        if directory is not None and rank in directory.left:
            text = (
                f"store {message.name!r}: rank {rank} has closed it, and other ranks have not yet; "
                "the name is free again when all have"
            )
            self.out.append(("worker", rank, m.Failed(message.request, *to_wire(StoreMismatch(text)))))
            return
        if directory is None and len(self._stores) >= MAX_STORES:
            text = f"store {message.name[:40]!r}: {MAX_STORES} stores are open already; close some first"
            self.out.append(("worker", rank, m.Failed(message.request, *to_wire(StoreMismatch(text)))))
            return
        if directory is None:
            number = self._next_store
            self._next_store += 1
            directory = Catalog(number, message, self.num_workers, self._placement)
            for gone in self._gone:
                directory.leave(gone)
            self._stores[number] = directory
            self._by_name[message.name] = number
        terms, wanted = _terms(directory.opened), _terms(message)
        if terms != wanted:
            text = (
                f"store {message.name!r} is open with {terms}, but rank {rank} asks for {wanted}; all ranks "
                "must agree, or use another store name"
            )
            self.out.append(("worker", rank, m.Failed(message.request, *to_wire(StoreMismatch(text)))))
            return
        self.out.append(("worker", rank, m.Joined(message.request, directory.store)))

    def _goodbye(self, role: Role, rank: int) -> None:
        process = self._processes[role, rank]
        process.gone = process.said_goodbye = True
        if role == "worker":
            self.worker_exited(rank)

    def worker_exited(self, rank: int) -> None:
        """Note that a worker has ended cleanly, perhaps without ever having joined."""
        if rank in self._goodbyes:
            return
        self._goodbyes.add(rank)
        self._to_servers(m.Gone(rank))
        self._leave_all(rank)

    def disconnected(self, role: Role, rank: int, cause: str) -> None:
        """Note that a connection has ended: a loss, unless the process had said Goodbye."""
        process = self._processes.get((role, rank))
        if process is None or not process.gone:
            self.declare_lost(role, rank, cause)

    def declare_lost(self, role: Role, rank: int, cause: str) -> None:
        """Declare a process lost, once, even after its Goodbye. Drop it, or end the job."""
        process = self._processes.get((role, rank))
        if process is not None:
            process.gone = True
        if self.lost is not None or self.finished or (role == "worker" and rank in self._dropped):
            return
        hostname = process.hostname if process else ""
        if role == "worker" and process is not None and self._goes_on_without(rank):
            self._drop(m.WorkerLost(rank, hostname, cause, []))
            return
        self.lost = m.Lost(role, rank, hostname, cause)
        for each_role, each_rank in self._processes:
            if (each_role, each_rank) != (role, rank):
                self.out.append((each_role, each_rank, self.lost))

    def _goes_on_without(self, rank: int) -> bool:
        """Whether all stores that a worker is a member of (if of none, all stores) let the job go on."""
        stores = list(self._stores.values())
        mine = [each for each in stores if rank not in each.left] or stores
        others = self.num_workers - len(self._gone | {rank})
        return others > 0 and bool(mine) and all(each.opened.on_worker_loss == "continue" for each in mine)

    def _drop(self, lost: m.WorkerLost) -> None:
        """Remove a worker from every store, and tell all processes."""
        self._dropped[lost.rank] = lost
        unfinished = [
            (number, slice_ids)
            for number, directory in self._stores.items()
            if (slice_ids := directory.unfinished(lost.rank))
        ]
        self._to_servers(m.WorkerLost(lost.rank, lost.hostname, lost.cause, unfinished))
        for role, rank in self._processes:
            if role == "worker" and rank not in self._dropped:
                self.out.append((role, rank, lost))
        self._leave_all(lost.rank)

    def _leave_all(self, rank: int) -> None:
        for directory in list(self._stores.values()):
            if rank not in directory.left:
                directory.leave(rank)
            self._collect(directory)

    def stop(self) -> None:
        """Tell the servers that the job is over."""
        self._to_servers(m.Stop())

    def report(self) -> list[str]:
        """Return a line for each missing process and for each call that waits here."""
        places = [("worker", rank) for rank in range(self.num_workers) if rank not in self._goodbyes]
        places += [("server", rank) for rank in range(self.num_servers)]
        lines = [
            f"{role} {rank} has not joined" for role, rank in places if (role, rank) not in self._processes
        ]
        for directory in self._stores.values():
            lines += [f"store {directory.opened.name!r}: {line}" for line in directory.report()]
        return lines

    def _to_servers(self, message: m.Message) -> None:
        for rank in range(self.num_servers):
            self.out.append(("server", rank, message))

    def _answer_waiting(self, rank: int, request: int) -> None:
        for directory in self._stores.values():
            answer = directory.waiting(rank, request)
            if answer is not None:
                self.out.append(("worker", rank, answer))
                return
        self.out.append(("worker", rank, m.Waiting(request, [], "")))

    def _answer_stuck(self, rank: int, message: m.AskStuck) -> None:
        """Tell which of some ranks waits in a call of all; first of all one that waits for `rank`."""
        waits = (wait for directory in self._stores.values() for wait in directory.waits_of(message.ranks))
        stuck, waiting = max(waits, key=lambda wait: rank in wait[1].ranks, default=(0, m.Waiting(0, [], "")))
        answer = m.Stuck(message.request, stuck, waiting.where, waiting.ranks)
        self.out.append(("worker", rank, answer))

    def _collect(self, directory: Catalog) -> None:
        self.out += [("worker", rank, message) for rank, message in directory.out]
        directory.out.clear()
        if not directory.members and directory.store in self._stores:
            directory.close()
            self._commits.forget(directory.store)
            del self._stores[directory.store]
            del self._by_name[directory.opened.name]


def _terms(opened: m.JoinStore) -> str:
    """Describe what all ranks must agree on when they open a store, for error texts."""
    return f"{opened.policy}, reduction {opened.reduction!r} and on_worker_loss {opened.on_worker_loss!r}"
