"""Every message of the protocol in one namespace, and who may send which.

There are three conversations: worker and server (`data`), every process and the scheduler (`control`), and
the handshake that begins each connection (`handshake`). Saving and loading (`checkpoint`) are parts of the
first two. A message is a typed record, with a payload if its docstring says so. A request carries a number
that its reply repeats; the numbers of a connection only grow. Nothing here is ever unpickled: msgspec checks
each field's type.
"""

# ruff: noqa: F403, F405
from __future__ import annotations

from tensorkv.wire.checkpoint import *
from tensorkv.wire.common import *
from tensorkv.wire.control import *
from tensorkv.wire.data import *
from tensorkv.wire.handshake import *

HandshakeMessage = Challenge | Hello | Accept | Reject
ToServer = (
    OpenStore
    | ShareSegment
    | DropSegment
    | InitSlices
    | PlaceSlices
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
    PlaceSlices: Done,
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
