"""Messages of saving and loading: between worker and server, and with the scheduler."""

from __future__ import annotations

import msgspec

from tensorkv.checkpoint.records import FileRecord, KeyRecord, PieceRecord, SavedSettings, TensorRecord
from tensorkv.plain import Key, Plain
from tensorkv.updaters.functions import CodeRef
from tensorkv.wire.common import KeyEntry, KeySpec, Message, SliceEntry

# ---- worker and server -----------------------------------------------------------------------------


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


# ---- worker and scheduler --------------------------------------------------------------------------


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
    replaced: list[KeyEntry] = msgspec.field(default_factory=list)


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
