"""Messages between the scheduler and every other process."""

from __future__ import annotations

import msgspec

from tensorkv.config import Role
from tensorkv.plain import Key
from tensorkv.wire.common import KeyEntry, KeySpec, Message, SettingRecord, StorePolicy, WorkerLossPolicy


class Register(Message, tag=50):
    """A process joins the job; a server says where it listens, as in ServerAddress."""

    host: str
    port: int
    hostname: str
    pid: int
    socket_name: str = ""


class ServerAddress(msgspec.Struct, frozen=True, array_like=True):
    """Where a server listens: host and port, and the abstract name of its Unix socket ("" if it has none)."""

    host: str
    port: int
    socket_name: str = ""


class Welcome(Message, tag=51):
    """All servers are there: their addresses by rank."""

    servers: list[ServerAddress]


class JoinStore(Message, tag=52):
    """Open a store by name."""

    request: int
    name: str
    policy: StorePolicy
    reduction: str
    on_worker_loss: WorkerLossPolicy


class Joined(Message, tag=53):
    """The store's number, unique in the job."""

    request: int
    store: int


class ProposeInit(Message, tag=54):
    """A rank calls init."""

    request: int
    store: int
    keys: list[KeySpec]


class InitReply(Message, tag=55):
    """The entries of the keys; if `lead[i]` is set, this rank sends the value of key i to the servers."""

    request: int
    entries: list[KeyEntry]
    lead: list[bool]


class ConcludeInit(Message, tag=56):
    """The leading rank has stored the values of these key ids, or failed to. Answered by Done."""

    request: int
    store: int
    key_ids: list[int]
    error: tuple[str, str] | None


class ProposeSetting(Message, tag=57):
    """A rank makes its next setting."""

    request: int
    store: int
    record: SettingRecord


class SettingReply(Message, tag=58):
    """The setting agrees with that of the setting rank; or, with `lead`, this rank has to make it."""

    request: int
    number: int
    lead: bool


class ConcludeSetting(Message, tag=59):
    """The leading rank has made the setting on all servers, or failed to. Answered by Done."""

    request: int
    store: int
    number: int
    error: tuple[str, str] | None


class Lookup(Message, tag=60):
    """Ask for the entries of keys; None asks for all."""

    request: int
    store: int
    keys: list[Key] | None


class Entries(Message, tag=61):
    """The entries that were asked for, in the order asked, or that of init."""

    request: int
    entries: list[KeyEntry]


class CountKeys(Message, tag=76):
    """Ask how many of these keys are initialised; None for all keys of the store."""

    request: int
    store: int
    keys: list[Key] | None = None


class NumKeys(Message, tag=77):
    """Answer to CountKeys: how many of the keys are initialised."""

    request: int
    number: int


class DeleteKeys(Message, tag=62):
    """A rank has deleted these keys, each with its id, and has told the servers. No answer."""

    store: int
    keys: list[tuple[Key, int]]


class Barrier(Message, tag=64):
    """A rank has arrived at its next barrier of the store."""

    request: int
    store: int


class GiveUp(Message, tag=72):
    """The deadline of a request has passed. If it is still waiting, it is withdrawn and answered by Failed.

    Otherwise its reply is in flight. So worker and scheduler agree on which calls were made.
    """

    store: int
    request: int


class LeaveStore(Message, tag=65):
    """A rank has left the store, after it has told the servers."""

    request: int
    store: int


class Goodbye(Message, tag=66):
    """The process leaves the job cleanly; its connection closes next."""


class Abandon(Message, tag=67):
    """The process gives up: it counts as lost, for this cause."""

    cause: str


class CommitReady(Message, tag=68):
    """A server has all contributions to commit `number` of a store; `norms` are those of its slices."""

    store: int
    number: int
    norms: list[float]
    finite: bool
    skip: bool
    error: tuple[str, str] | None


class CommitDecision(Message, tag=69):
    """The scheduler's decision about a commit, for all servers."""

    store: int
    number: int
    apply: bool
    norm: float
    error: tuple[str, str] | None


class Lost(Message, tag=70):
    """The scheduler declares a process lost, and with it the job."""

    role: Role
    rank: int
    hostname: str
    cause: str


class Stop(Message, tag=71):
    """The job is over: a server ends."""


class Gone(Message, tag=73):
    """A worker has left the job cleanly: it has left every store, including those it never opened."""

    rank: int


class WorkerLost(Message, tag=74):
    """A worker is lost and the job goes on: it has left every store, including those it never opened.

    `dropped` are, by store, the slices of keys that it was about to create; for servers only.
    """

    rank: int
    hostname: str
    cause: str
    dropped: list[tuple[int, list[int]]]


class AskStuck(Message, tag=14):
    """Ask the scheduler which of `ranks`, for whom a call of this worker waits, waits in a call of all."""

    request: int
    ranks: list[int]


class Stuck(Message, tag=15):
    """Answer to AskStuck: a rank that waits, its call, and the ranks that it waits for.

    Of several, one that waits for the worker that asks. No rank waits if `ranks` is empty.
    """

    request: int
    rank: int
    where: str
    ranks: list[int]
