"""Save and load of a store's slices on one server.

This module accesses files only through `StateFiles`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from tensorkv.checkpoint.records import FILE_NAME, FileRecord, KeyRecord, PieceRecord, check_record
from tensorkv.checkpoint.slices import SliceState, pack, records_of, slice_state, unpack
from tensorkv.errors import ProtocolError
from tensorkv.plain import Key
from tensorkv.server.layouts import Slice
from tensorkv.server.memory import Memory
from tensorkv.server.shard import Outgoing, StoreShard
from tensorkv.updaters.settings import SettingsTable
from tensorkv.wire import messages as m


class SavedPieces(Protocol):
    """The pieces of a save that is open for reading."""

    def load(self, record: KeyRecord, start: int, stop: int) -> SliceState:
        """Return elements [start, stop) of a key with their state. Raises LoadError."""


class StateFiles(ABC):
    """Where a server keeps the files of saves."""

    @abstractmethod
    def write(
        self, folder: str, name: str, slices: Sequence[tuple[Key, int, int, SliceState]]
    ) -> tuple[FileRecord, list[PieceRecord]]:
        """Write slices, given as key, start, stop and state, to a file; return its record and theirs.

        Raises:
            SaveError: it cannot be written.
        """

    @abstractmethod
    def check(self, folder: str, files: Mapping[str, FileRecord]) -> None:
        """Raise LoadError unless these files are as they were saved, as far as that can be checked."""

    @abstractmethod
    def open(self, folder: str) -> AbstractContextManager[SavedPieces]:
        """Open the files of the save in a folder for reading."""


# ---- out ---------------------------------------------------------------------------------------------


def save_slices(shard: StoreShard, files: StateFiles, worker: int, message: m.SaveSlices) -> None:
    """Write slices to a file. Raises SaveError."""
    if not FILE_NAME.fullmatch(message.name):
        raise ProtocolError(f"{message.name!r} is not a file of a save")
    settings = _settings_of(shard, worker, message.alone)
    slices = [shard.find(slice_id) for slice_id in message.slice_ids]
    states = [(each.key, each.start, each.stop, _state_of(each, settings)) for each in slices]
    file, pieces = files.write(message.folder, message.name, states)
    shard.out.append(Outgoing(worker, m.SavedFile(message.request, file, pieces)))


def ask_slice(shard: StoreShard, worker: int, message: m.AskSlice) -> None:
    """Send a slice and its state. Raises SaveError."""
    each = _state_of(shard.find(message.slice_id), _settings_of(shard, worker, message.alone))
    records, tensors, plain = records_of(each)
    shard.out.append(Outgoing(worker, m.SliceRecord(message.request, each.version, records, plain)))
    shard.out.append(Outgoing(worker, m.Data(message.request, 0), [Memory(pack(tensors))]))


def _settings_of(shard: StoreShard, worker: int, alone: bool) -> SettingsTable:
    """Return the settings that a worker saves: the newest, or those with which it began to save alone."""
    return shard.settings_of_save(worker) if alone else shard.schedule.table()


def _state_of(each: Slice, settings: SettingsTable) -> SliceState:
    """Return a copy of a slice, with the state of its optimizer if these settings keep its updater."""
    updater = each.setting.updater
    kept = settings.setting(each.key).updater is updater
    state = updater.state(each.slice_id) if kept else {}
    return slice_state(each.key, each.value, each.version, state)


def begin_save(shard: StoreShard, worker: int, message: m.BeginSave) -> None:
    """Let a worker save alone, if its rounds are applied; send the settings that it saves."""
    num_open, up_to, table = shard.begin_save(worker)
    begun = m.SaveBegun(message.request, num_open, shard.schedule.number, up_to, table.describe())
    shard.out.append(Outgoing(worker, begun))


def ask_settings(shard: StoreShard, worker: int, message: m.AskSettings) -> None:
    """Send the newest settings."""
    shard.out.append(Outgoing(worker, m.Settings(message.request, shard.schedule.table().describe())))


# ---- in ----------------------------------------------------------------------------------------------


def prepare_restore(shard: StoreShard, worker: int, message: m.PrepareRestore) -> None:
    """Load the settings of a save; raises if they are invalid."""
    shard.schedule.prepare_restore(message.settings, message.codes)
    for each in shard.slices:
        each.restored = None
    shard.out.append(Outgoing(worker, m.Done(message.request)))


def load_slices(shard: StoreShard, files: StateFiles, worker: int, message: m.LoadSlices) -> None:
    """Create slices from files. Raises LoadError; some slices may exist then."""
    files.check(message.folder, message.check)
    with files.open(message.folder) as saved:
        for each in message.keys:
            record = each.record
            check_record(record, "the save")
            for entry in each.slices:
                restore(shard, entry, record.key, record.shape, saved.load(record, entry.start, entry.stop))
    shard.out.append(Outgoing(worker, m.Done(message.request)))


def restore_slice(shard: StoreShard, worker: int, message: m.RestoreSlice, payload: Memory) -> None:
    """Create a slice from a received payload."""
    each = unpack(payload.tensor, message.tensors, message.version, message.plain)
    restore(shard, message.entry, message.key, message.shape, each)
    shard.out.append(Outgoing(worker, m.Done(message.request)))


def restore(
    shard: StoreShard, entry: m.SliceEntry, key: Key, shape: tuple[int, ...], each: SliceState
) -> None:
    """Create a slice, and keep the state that its updater will continue with."""
    shard.create(entry, key, shape, each.value, each.version).restored = each


def finish_restore(shard: StoreShard, worker: int, message: m.FinishRestore) -> None:
    """Install the settings of the save, and hand the states of the new slices to their updaters."""
    shard.install_settings(shard.schedule.take_restored())
    for each in shard.slices:
        if each.restored is not None:
            each.setting.updater.restore(each.slice_id, each.restored.optimizer_state(each.shape))
            each.restored = None
    shard.out.append(Outgoing(worker, m.Done(message.request)))
