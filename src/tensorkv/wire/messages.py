"""Every message of the protocol, as a typed record; with a payload if its docstring says so.

There are three conversations: worker and server (data), every process and the scheduler (control), and the
handshake that begins each connection. A request carries a number that its reply repeats; the numbers of a
connection only grow. Nothing here is ever unpickled: msgspec checks each field's type.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from tensorkv.checkpoint.records import FileRecord, KeyRecord, PieceRecord, SavedSettings, TensorRecord
from tensorkv.config import Role
from tensorkv.plain import Key, Plain
from tensorkv.updaters.functions import CodeRef
from tensorkv.updaters.spec import UpdaterSpec

WorkerLossPolicy = Literal["fail", "continue"]
Late = Literal["drop", "carry"]
EPOCH = 0
"""The epoch of every placement so far: keys do not move yet."""


class Message(msgspec.Struct, array_like=True, tag_field="type", forbid_unknown_fields=True):
    """Base of all messages."""


class StorePolicy(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """When the rounds of a store merge, and what a pull may see. All workers of a store pass the same.

    `staleness` is for "async", the others for "sync": see `tensorkv.create`. None is no bound.
    """

    name: Literal["sync", "async"]
    staleness: int | None = None
    quorum: int | None = None
    grace_s: float = 0.0
    late: Late = "drop"

    @property
    def rounds_wait(self) -> bool:
        """Whether a round waits for other workers; else each push is a round of its own."""
        return self.name == "sync"

    @property
    def settings_wait(self) -> bool:
        """Whether a setting holds from the setting rank's next push on; else it holds when it arrives."""
        return self.name == "sync" and self.quorum is None

    @property
    def allows_commit(self) -> bool:
        """Whether pushes may wait for a commit: a round must then have a push of every worker."""
        return self.name == "sync" and self.quorum is None

    @property
    def saves_alone(self) -> bool:
        """Whether one worker can save: nothing but a put may change a slice until it pushes again."""
        return self.name == "sync" and self.quorum is None

    def __str__(self) -> str:
        """Describe it for error texts, without what does not apply."""
        more = "" if self.staleness is None else f", staleness {self.staleness}"
        if self.quorum is not None:
            more += f", quorum {self.quorum}, grace_s {self.grace_s}, late {self.late!r}"
        return f"kind {self.name!r}{more}"


# ---- handshake (at most 4 KiB before the peer has proved that it knows the token) ------------------


class Challenge(Message, tag=1):
    """The accepting side's first message."""

    nonce: bytes


class Hello(Message, tag=2):
    """The connecting side's identity, with an HMAC over both nonces and that identity."""

    nonce: bytes
    proof: bytes
    role: Role
    rank: int


class Accept(Message, tag=3):
    """The accepting side's own proof."""

    proof: bytes


class Reject(Message, tag=4):
    """The accepting side refuses the connection, with `name` (an error class) and `text`."""

    name: str
    text: str


# ---- replies shared by both conversations ---------------------------------------------------------


class Done(Message, tag=10):
    """The request succeeded."""

    request: int


class Failed(Message, tag=11):
    """The request was refused, with the class name and text of the error."""

    request: int
    name: str
    text: str


class AskWaiting(Message, tag=12):
    """Ask what request `request` of a store is waiting for."""

    request: int
    store: int


class Waiting(Message, tag=13):
    """Answer to AskWaiting: the ranks that are missing, and where, such as "round 812 of 'w'"."""

    request: int
    ranks: list[int]
    where: str


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


# ---- keys and settings ----------------------------------------------------------------------------


class SliceEntry(msgspec.Struct, frozen=True, array_like=True):
    """A slice: elements [start, stop) of the flattened value, its id, and the server that holds it."""

    slice_id: int
    server: int
    start: int
    stop: int


class KeySpec(msgspec.Struct, frozen=True, array_like=True):
    """A key as init describes it."""

    key: Key
    shape: tuple[int, ...]
    dtype: str
    itemsize_bytes: int
    whole: bool


class KeyEntry(msgspec.Struct, frozen=True, array_like=True):
    """An initialised key: its id, which no later key has, shape, dtype and slices; `whole` as in its init."""

    key: Key
    key_id: int
    shape: tuple[int, ...]
    dtype: str
    epoch: int
    slices: list[SliceEntry]
    whole: bool = False


class SettingRecord(msgspec.Struct, frozen=True):
    """A setting on the wire: an updater, with the code it names, for some keys or all (None)."""

    keys: tuple[Key, ...] | None
    updater: UpdaterSpec
    code: CodeRef | None = None


PayloadKind = Literal["dense", "absent"]


class PayloadDescriptor(msgspec.Struct, frozen=True, array_like=True):
    """How to read the bytes of a chunk.

    `kind` is that of the value ("dense", or "absent" without bytes), `codec` how it was packed.
    """

    kind: PayloadKind
    dtype: str
    codec: Literal["plain"] = "plain"


class ChunkEntry(msgspec.Struct, frozen=True, array_like=True):
    """A chunk of a plan: slices that travel in one frame, one after the other.

    `lengths` are their numbers of elements, `counts` how often each counts in a mean.
    """

    slice_ids: list[int]
    lengths: list[int]
    payload: PayloadDescriptor
    counts: list[int]


PLACED_BYTES = 16 << 10
"""Minimum size of a payload that stays in shared memory; smaller ones travel in their frame."""


class Placed(msgspec.Struct, frozen=True, array_like=True):
    """A payload in the sender's shared memory, in `spans`: segment, offset and length in bytes.

    In a push `number` is that of its loan, which the server returns when it has used the memory. In a reply
    it is the reply's; the worker counts the replies that it has copied.
    """

    number: int
    spans: list[tuple[int, int, int]]


class ShareSegment(Message, tag=45):
    """Share a segment of memory: its descriptor comes with this frame.

    A worker's first one, number 0, is the control segment; see `peer.shm`.
    """

    segment: int
    size_bytes: int


class DropSegment(Message, tag=46):
    """Nothing in this segment of the sender is in use any more."""

    segment: int


# ---- worker to server -----------------------------------------------------------------------------


class OpenStore(Message, tag=20):
    """Announce the store on this connection."""

    store: int
    name: str
    policy: StorePolicy
    mean: bool


class InitSlices(Message, tag=21):
    """Create slices. Payload: their values, one after the other, each `stop - start` elements."""

    request: int
    store: int
    key: Key
    shape: tuple[int, ...]
    dtype: str
    slices: list[SliceEntry]


class DefinePlan(Message, tag=22):
    """Name a list of slices that will be pushed or pulled together, so that a step need not repeat it."""

    store: int
    plan: int
    chunks: list[ChunkEntry]


class DropPlan(Message, tag=23):
    """The plan will not be used again."""

    plan: int


class Push(Message, tag=24):
    """A contribution to the current round of the slices of a chunk. Payload: their elements, or `placed`.

    If `reply` is not 0, the server sends the values back as `Data` of that request, as after a pull. In a
    mean each slice counts as `weight` or, without one, as the chunk says.
    """

    plan: int
    chunk: int
    apply: bool
    reply: int
    placed: Placed | None = None
    weight: float | None = None


class Pull(Message, tag=25):
    """Send the values of a plan, chunk by chunk, each as soon as the store's policy allows.

    In sync that is when this worker's last round is applied.
    """

    plan: int
    request: int


class WaitMerged(Message, tag=26):
    """Ask to be told, by Merged, when this worker's last push of each slice of a plan is merged."""

    plan: int
    request: int


class Commit(Message, tag=27):
    """Apply the values pushed with apply=False."""

    request: int
    store: int
    max_norm: float | None
    skip: bool
    check_finite: bool


class PrepareSetting(Message, tag=28):
    """Load the code of a setting, and keep the setting ready."""

    request: int
    store: int
    number: int
    record: SettingRecord


class ActivateSetting(Message, tag=29):
    """Apply the prepared setting from this worker's next push of each key on."""

    store: int
    number: int


class ChangeOptions(Message, tag=35):
    """Change options of the optimizers of some keys or all (None), from this worker's next push of each on.

    Every worker may send it; that of the lowest rank holds, and others are compared with it.
    """

    store: int
    keys: tuple[Key, ...] | None
    options: dict[str, Any]


class DeleteSlices(Message, tag=30):
    """This worker has deleted the keys of these slices, and names them in no plan any more.

    The server drops a slice when every worker has deleted it or left.
    """

    request: int
    store: int
    slice_ids: list[int]


class DropSlices(Message, tag=36):
    """Drop slices of an init or a load that has failed: no other worker knows them."""

    request: int
    store: int
    slice_ids: list[int]


class Flush(Message, tag=31):
    """Answer when everything sent before on this connection has been processed.

    A commit that was completed by it has then been decided.
    """

    request: int
    store: int


class AskInfo(Message, tag=32):
    """Ask for rounds and versions of slices."""

    request: int
    store: int
    slice_ids: list[int]


class Leave(Message, tag=33):
    """This worker leaves the store."""

    request: int
    store: int


class Put(Message, tag=34):
    """Replace the values of a chunk once this worker's last push of them is applied. Payload: as of Push."""

    plan: int
    chunk: int
    request: int


# ---- server to worker -----------------------------------------------------------------------------


class Data(Message, tag=40):
    """Values of a chunk. Payload: the elements of its slices, in the stored dtype, or `placed`.

    With `unmerged` the last push of them by this worker was late, and is not merged yet.
    """

    request: int
    chunk: int
    placed: Placed | None = None
    unmerged: bool = False


class Merged(Message, tag=41):
    """These positions of the plan (counted over all its chunks) are merged."""

    request: int
    positions: list[int]


class Committed(Message, tag=42):
    """The commit is done."""

    request: int
    applied: bool
    norm: float | None


class Info(Message, tag=43):
    """Rounds, versions, late pushes and sizes of the optimizer's state, in the order asked.

    `updater` is the updater's name.
    """

    request: int
    rounds: list[int]
    versions: list[int]
    late: list[int]
    state_bytes: list[int]
    updater: str


class Fault(Message, tag=44):
    """A round this worker contributed to failed for these slices. Its next call on the key raises this.

    Without slices, change of options number `round` of this worker differs from that of the setting rank:
    its next call on any key raises this.
    """

    store: int
    slice_ids: list[int]
    round: int
    name: str
    text: str


# ---- to and from the scheduler --------------------------------------------------------------------


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


# ---- saving and loading: worker and server ---------------------------------------------------------


class LoadedKey(msgspec.Struct, frozen=True, array_like=True):
    """A key of a save, and those of its slices that a server has to create."""

    record: KeyRecord
    slices: list[SliceEntry]


class SaveSlices(Message, tag=80):
    """Write these slices, with their optimizer state, to a new file in a folder.

    With `alone` the state goes with the settings of this worker's SaveBegun, else with the newest.
    """

    request: int
    store: int
    folder: str
    name: str
    slice_ids: list[int]
    alone: bool = False


class AskSlice(Message, tag=81):
    """Send a slice with its optimizer state: a SliceRecord, then Data. `alone` is as in SaveSlices."""

    request: int
    store: int
    slice_id: int
    alone: bool = False


class AskSettings(Message, tag=82):
    """Ask for the newest settings."""

    request: int
    store: int


class BeginSave(Message, tag=87):
    """Begin a save by this worker alone, if each round that it has pushed is applied.

    The states that the save needs are kept until EndSave, or until this worker has left.
    """

    request: int
    store: int


class EndSave(Message, tag=88):
    """This worker's save has ended, or has not begun. No answer."""

    store: int


class PrepareRestore(Message, tag=83):
    """Load the code of a save's settings, and keep them ready; code is None if only a name is known."""

    request: int
    store: int
    settings: SavedSettings
    codes: list[CodeRef | None]


class LoadSlices(Message, tag=84):
    """Create slices from the files of a save in a folder.

    `check` has the files whose checksums this server verifies; each file of a save is in one message.
    """

    request: int
    store: int
    folder: str
    keys: list[LoadedKey]
    check: dict[str, FileRecord]


class RestoreSlice(Message, tag=85):
    """Create a slice. Payload: the tensors, one after the other; the first is the value."""

    request: int
    store: int
    key: Key
    shape: tuple[int, ...]
    entry: SliceEntry
    version: int
    tensors: list[TensorRecord]
    plain: dict[str, Plain]


class FinishRestore(Message, tag=86):
    """Install the prepared settings, and the state of the slices created since."""

    request: int
    store: int


class SavedFile(Message, tag=90):
    """The slices are on disk: the file, and their places in it, in the order asked."""

    request: int
    file: FileRecord
    pieces: list[PieceRecord]


class SliceRecord(Message, tag=91):
    """The description of a slice; Data of the same request follows, with the tensors as payload."""

    request: int
    version: int
    tensors: list[TensorRecord]
    plain: dict[str, Plain]


class Settings(Message, tag=92):
    """The newest settings of a store."""

    request: int
    settings: SavedSettings


class SaveBegun(Message, tag=93):
    """The settings that hold in this worker's next round of each key that has a slice here.

    `num_open` is the number of slices whose last round by this worker is not applied; unless it is 0, nothing
    has begun. `num_settings` counts the settings that this server has been given. For keys without a slice
    here, those up to number `up_to` hold.
    """

    request: int
    num_open: int
    num_settings: int
    up_to: int
    settings: SavedSettings


# ---- saving and loading: worker and scheduler ------------------------------------------------------


class Together(Message, tag=100):
    """A rank makes a collective call; `call` says which, and must be the same for all.

    With `only_meet` nobody leads: it is answered when all have asked.
    """

    request: int
    store: int
    call: str
    only_meet: bool


class TogetherReply(Message, tag=101):
    """With `lead` this rank has to do it now. Otherwise it is done; after a load these settings apply.

    `replaced` are the keys that a load has replaced, without those that this rank had deleted.
    """

    request: int
    lead: bool
    settings: SavedSettings | None
    replaced: list[KeyEntry] = []


class ConcludeTogether(Message, tag=102):
    """The leading rank is done, or has failed. Answered like the calls of the others, but with no error."""

    request: int
    store: int
    error: tuple[str, str] | None
    settings: SavedSettings | None


class ProposeLoad(Message, tag=103):
    """The leading rank is about to create these keys anew, with these settings."""

    request: int
    store: int
    keys: list[KeySpec]
    settings: SavedSettings


class LoadReply(Message, tag=104):
    """The keys as the leading rank has to create them."""

    request: int
    entries: list[KeyEntry]


HandshakeMessage = Challenge | Hello | Accept | Reject
ToServer = (
    OpenStore
    | ShareSegment
    | DropSegment
    | InitSlices
    | DefinePlan
    | DropPlan
    | Push
    | Put
    | Pull
    | WaitMerged
    | Commit
    | PrepareSetting
    | ActivateSetting
    | ChangeOptions
    | DeleteSlices
    | DropSlices
    | Flush
    | AskInfo
    | Leave
    | AskWaiting
    | SaveSlices
    | AskSlice
    | AskSettings
    | BeginSave
    | EndSave
    | PrepareRestore
    | LoadSlices
    | RestoreSlice
    | FinishRestore
)
FromServer = (
    Done
    | Failed
    | Waiting
    | Data
    | ShareSegment
    | DropSegment
    | Merged
    | Committed
    | Info
    | Fault
    | SavedFile
    | SliceRecord
    | Settings
    | SaveBegun
)
ToScheduler = (
    Register
    | JoinStore
    | ProposeInit
    | ConcludeInit
    | ProposeSetting
    | ConcludeSetting
    | Lookup
    | CountKeys
    | DeleteKeys
    | Barrier
    | GiveUp
    | LeaveStore
    | Goodbye
    | Abandon
    | CommitReady
    | AskWaiting
    | AskStuck
    | Together
    | ConcludeTogether
    | ProposeLoad
)
FromScheduler = (
    Welcome
    | Joined
    | InitReply
    | SettingReply
    | Entries
    | NumKeys
    | Done
    | Failed
    | Waiting
    | Stuck
    | CommitDecision
    | TogetherReply
    | LoadReply
    | Gone
    | WorkerLost
    | Lost
    | Stop
)

REPLIES: dict[type[Message], type[Message]] = {
    InitSlices: Done,
    Put: Done,
    Commit: Committed,
    PrepareSetting: Done,
    DeleteSlices: Done,
    DropSlices: Done,
    Flush: Done,
    AskInfo: Info,
    Leave: Done,
    SaveSlices: SavedFile,
    AskSettings: Settings,
    BeginSave: SaveBegun,
    PrepareRestore: Done,
    LoadSlices: Done,
    RestoreSlice: Done,
    FinishRestore: Done,
    JoinStore: Joined,
    ProposeInit: InitReply,
    ConcludeInit: Done,
    ProposeSetting: SettingReply,
    ConcludeSetting: Done,
    Lookup: Entries,
    CountKeys: NumKeys,
    Barrier: Done,
    LeaveStore: Done,
    Together: TogetherReply,
    ConcludeTogether: TogetherReply,
    ProposeLoad: LoadReply,
}
"""The reply to each request that has exactly one, without payload. Any request may be answered by Failed."""
