"""The records of a save: its index, and which pieces a slice needs.

No torch, no files: `files` has those. A save is a folder of safetensors files and one index, a JSON file that
says which elements of which key lie where. So a store with any other number of servers and slices can read
it:

    tensorkv.json                           the index, written last
    tensorkv-0f3a...-0-0.safetensors        values and optimizer state; "0-0" is server and number

A value is cut into *pieces*, elements [start, stop) of the flattened value. Each piece has its version and
the optimizer's state for it: elementwise tensors, tensors that belong to the piece as a whole ("step"), and
plain data.

The last line of the index has a checksum of everything before it. An index of format version 1 has none; its
files may have none either.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from tensorkv.errors import DtypeMismatch, LoadError, ShapeMismatch
from tensorkv.plain import MAX_INT, Key, Plain, may_travel
from tensorkv.updaters.spec import UpdaterSpec

INDEX_NAME = "tensorkv.json"
FORMAT: Literal["tensorkv-save"] = "tensorkv-save"
VERSION = 2
FILE_NAME = re.compile(r"tensorkv-[0-9a-f]{16}-[0-9]+-[0-9]+\.safetensors")
"""The name of a file of a save. No other file is ever read."""

_LAST_LINE = re.compile(rb',\n "checksum": "([0-9a-f]{32})"\n}\n')
_LAST_LINE_BYTES = 52
"""Length of the last line of an index, which has the checksum of all bytes before it."""

VALUE = ""
"""The name of the value itself among the tensors of a piece; all others are the optimizer's state."""

MAX_BATCH_BYTES = 256 << 20
"""Maximum size of several values that a server writes to one file, or reads at once."""

MAX_BATCH_SLICES = 50_000
"""Maximum number of slices in one file: its header has an entry for each tensor, and is bounded."""


class TensorRecord(msgspec.Struct, frozen=True):
    """A tensor of a piece: `VALUE`, or an entry of the optimizer's state.

    `stored` is its name in the file. An `elementwise` tensor has one element for each of the piece.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    elementwise: bool
    stored: str = ""

    @property
    def num_elems(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class PieceRecord(msgspec.Struct, frozen=True):
    """Elements [start, stop) of a value, with version and state. The first tensor is the value."""

    start: int
    stop: int
    version: int
    tensors: list[TensorRecord]
    plain: dict[str, Plain] = {}
    file: str = ""


class KeyRecord(msgspec.Struct, frozen=True):
    """A key and its pieces, in element order. `whole`: it was initialised not to be sliced."""

    key: Key
    shape: tuple[int, ...]
    dtype: str
    whole: bool
    pieces: list[PieceRecord]

    @property
    def num_elems(self) -> int:
        """Number of elements of the value."""
        return math.prod(self.shape)


class SettingEntry(msgspec.Struct, frozen=True):
    """A setting: its keys (None: all others), the index of its updater in the list, and the options.

    `asked` are the options of the call that made the setting, None if no call did.
    """

    keys: tuple[Key, ...] | None
    updater: int
    options: dict[str, Any]
    asked: dict[str, Any] | None


class SavedSettings(msgspec.Struct, frozen=True):
    """The settings of a store: the specs of its updaters, and which one applies to which keys."""

    updaters: list[UpdaterSpec]
    entries: list[SettingEntry]

    def spec_of(self, key: Key) -> UpdaterSpec:
        """Return the updater that applies to `key`."""
        found = self.entries[0]
        for entry in self.entries:
            if entry.keys is not None and key in entry.keys:
                found = entry
        return self.updaters[found.updater]

    def with_keys_of(self, parts: Iterable[tuple[SavedSettings, Iterable[Key]]]) -> SavedSettings:
        """Return these settings, but for some keys those of others: each part has the keys that it is for."""
        mine, updaters = _Lookup(self), list(self.updaters)
        moved: dict[Key, bytes] = {}
        entry_of: dict[bytes, SettingEntry] = {}
        for part, keys in parts:
            if part == self:
                continue
            theirs = _Lookup(part)
            for key in keys:
                spec, entry = theirs.find(key)
                name = _name_of(spec, entry)
                if name == _name_of(*mine.find(key)):
                    continue
                moved[key] = name
                if name not in entry_of:
                    if spec not in updaters:
                        updaters.append(spec)
                    entry_of[name] = msgspec.structs.replace(entry, updater=updaters.index(spec))
        if not moved:
            return self
        entries = [self.entries[0]]
        for entry in self.entries[1:]:
            left = tuple(key for key in entry.keys or () if key not in moved)
            entries += [msgspec.structs.replace(entry, keys=left)] if left else []
        for name, entry in entry_of.items():
            named = tuple(key for key, other in moved.items() if other == name)
            entries.append(msgspec.structs.replace(entry, keys=named))
        return SavedSettings(updaters, entries)


class _Lookup:
    """The setting of each key in settings."""

    def __init__(self, settings: SavedSettings) -> None:
        self._settings = settings
        self._of_key = {key: entry for entry in settings.entries[1:] for key in entry.keys or ()}

    def find(self, key: Key) -> tuple[UpdaterSpec, SettingEntry]:
        """Return the updater that applies to a key, and the entry that says so."""
        entry = self._of_key.get(key, self._settings.entries[0])
        return self._settings.updaters[entry.updater], entry


def _name_of(spec: UpdaterSpec, entry: SettingEntry) -> bytes:
    """Return the same bytes for settings that are alike."""
    return msgspec.msgpack.encode((spec, entry.options, entry.asked))


class FileRecord(msgspec.Struct, frozen=True):
    """A file of a save: its size, and the row and column checksums of `tensorfile.Checksum`.

    Older saves have None for the columns, or for both.
    """

    size_bytes: int
    checksum: int | None = None
    columns: int | None = None


class Index(msgspec.Struct, frozen=True):
    """Everything in a save except the numbers."""

    format: Literal["tensorkv-save"]
    version: int
    reduction: Literal["sum", "mean"]
    settings: SavedSettings
    files: dict[str, FileRecord]
    keys: list[KeyRecord]


def new_index(
    reduction: Literal["sum", "mean"],
    settings: SavedSettings,
    files: dict[str, FileRecord],
    keys: list[KeyRecord],
) -> Index:
    """Return the index of a save in progress."""
    return Index(FORMAT, VERSION, reduction, settings, files, keys)


def check_reduction(saved: str, mine: str) -> None:
    """Raise LoadError if a save is of a store with another reduction."""
    if saved != mine:
        raise LoadError(f"this store was created with reduction={mine!r}, and the save with {saved!r}")


def check_replaces(record: KeyRecord, shape: Sequence[int], dtype: str) -> None:
    """Raise ShapeMismatch or DtypeMismatch if an existing key differs from the saved one."""
    text = (
        f"key {record.key!r} is {dtype} of shape {tuple(shape)}, and {record.dtype} of shape {record.shape} "
    )
    text += "in what is to be loaded; delete it first"
    if tuple(shape) != tuple(record.shape):
        raise ShapeMismatch(text)
    if dtype != record.dtype:
        raise DtypeMismatch(text)


def encode_index(index: Index) -> bytes:
    """Return the text of the index file."""
    text = json.dumps(msgspec.to_builtins(index), indent=1).encode().removesuffix(b"\n}")
    return text + b',\n "checksum": "%s"\n}\n' % _checksum(text)


def _checksum(text: bytes | memoryview) -> bytes:
    return hashlib.blake2b(text, digest_size=16).hexdigest().encode()


def decode_index(text: bytes, where: str) -> Index:
    """Return the index, after all checks that need no files.

    Raises:
        LoadError: it is not an index, has changed since it was written, or contradicts itself.
    """
    end = max(0, len(text) - _LAST_LINE_BYTES)
    last_line = _LAST_LINE.fullmatch(text, end)
    if last_line is not None and _checksum(memoryview(text)[:end]) != last_line[1]:
        raise LoadError(f"{where}: not as it was saved: its last line has another checksum than it has")
    try:
        data = json.loads(text)
        index: Index = from_plain(_with_file_records(data), Index)
    except (ValueError, RecursionError) as exc:
        raise LoadError(f"{where}: not the index of a save: {exc}") from exc
    if not 1 <= index.version <= VERSION:
        raise LoadError(
            f"{where}: has version {index.version} of the format; this tensorkv reads 1 to {VERSION}"
        )
    if last_line is None and (index.version > 1 or "checksum" in data):
        raise LoadError(f"{where}: not as it was saved: it does not end with its checksum")
    check_settings(index.settings, where)
    for name in index.files:
        if not FILE_NAME.fullmatch(name):
            raise LoadError(f"{where}: names {name!r}, which is not a file of a save")
    if len({record.key for record in index.keys}) < len(index.keys):
        raise LoadError(f"{where}: has a key twice")
    if len({type(record.key) for record in index.keys}) > 1:
        raise LoadError(f"{where}: mixes int and str keys")
    for record in index.keys:
        if not may_travel(record.key):
            raise LoadError(f"{where}: has key {record.key!r}, which no store can have")
        check_record(record, where)
        for piece in record.pieces:
            if piece.file not in index.files:
                raise LoadError(f"{where}: key {record.key!r} lies in {piece.file!r}, which is not listed")
    check_states(index.settings, index.keys, where)
    return index


def _with_file_records(data: Any) -> Any:
    """Upgrade an index from before there were checksums, which has only a size for each file."""
    files = data.get("files") if isinstance(data, dict) else None
    if not isinstance(files, dict):
        return data
    records = {name: {"size_bytes": each} if isinstance(each, int) else each for name, each in files.items()}
    return {**data, "files": records}


def from_plain(data: Any, kind: Any) -> Any:
    """Return the record that plain data describes. Raises ValueError if they describe none."""
    return msgspec.convert(data, kind)


def check_settings(settings: SavedSettings, where: str) -> None:
    """Raise LoadError unless the settings are complete: the first is for all keys."""
    entries = settings.entries
    if not entries or entries[0].keys is not None or any(each.keys is None for each in entries[1:]):
        raise LoadError(f"{where}: the first setting, and no other, has to be for all keys")
    if any(spec.type == "named" and spec.name not in ("assign", "add") for spec in settings.updaters):
        raise LoadError(f"{where}: an updater of this save is not known to this tensorkv")
    for spec in settings.updaters:
        module, _, name = spec.name.rpartition(":")
        if not may_travel(spec.name) or (spec.type == "optimizer" and not (module and name)):
            raise LoadError(f"{where}: {spec.name!r} is not the name of an updater")
    options = [*(spec.options for spec in settings.updaters), *(each.options for each in entries)]
    for each in (*options, *(each.asked for each in entries if each.asked is not None)):
        if not (may_travel(list(each)) and may_travel(list(each.values()))):
            raise LoadError(f"{where}: has options {each}, which are not plain data or do not fit in 64 bits")
    for entry in entries:
        if not may_travel(entry.keys):
            raise LoadError(f"{where}: a setting is for keys {entry.keys}, which no store can have")
        if not 0 <= entry.updater < len(settings.updaters):
            raise LoadError(f"{where}: a setting names updater {entry.updater}, which is not listed")


def check_record(record: KeyRecord, where: str) -> None:
    """Raise LoadError unless the pieces of a key are complete and its tensors fit them."""
    what = f"{where}: key {record.key!r}"
    if not _are_sizes(record.shape):
        raise LoadError(f"{what} has shape {record.shape}")
    if not record.pieces:
        raise LoadError(f"{what} has no pieces")
    at = 0
    for piece in record.pieces:
        if piece.start != at or piece.stop < piece.start:
            raise LoadError(f"{what}: elements {at} to {piece.start} are missing or there twice")
        at = piece.stop
        _check_tensors(piece, record.dtype, what)
    if at != record.num_elems:
        raise LoadError(f"{what}: its pieces have {at} elements, its shape {record.shape} {record.num_elems}")


def _check_tensors(piece: PieceRecord, dtype: str, what: str) -> None:
    names = [each.name for each in piece.tensors]
    if not names or names[0] != VALUE or len({*names, *piece.plain}) < len(names) + len(piece.plain):
        raise LoadError(f"{what}: a piece has no value, or state of one name twice")
    value = piece.tensors[0]
    if value.dtype != dtype or not value.elementwise:
        raise LoadError(f"{what} is {dtype}, but a piece of it {value.dtype}")
    if not 0 <= piece.version <= MAX_INT:
        raise LoadError(f"{what} has version {piece.version}")
    for each in piece.tensors:
        if not _are_sizes(each.shape) or (each.elementwise and each.num_elems != piece.stop - piece.start):
            raise LoadError(f"{what}: {each.name or 'value'!r} of a piece has shape {each.shape}")


def _are_sizes(shape: Sequence[int]) -> bool:
    return all(0 <= size <= MAX_INT for size in shape)


@dataclass(frozen=True, slots=True)
class Overlap:
    """Elements [low, high) of piece number `piece`, counted within the piece."""

    piece: int
    low: int
    high: int


def check_states(settings: SavedSettings, records: Iterable[KeyRecord], where: str) -> None:
    """Raise LoadError if a key has optimizer state but no optimizer."""
    for record in records:
        spec = settings.spec_of(record.key)
        if spec.type != "optimizer" and any(len(p.tensors) > 1 or p.plain for p in record.pieces):
            raise LoadError(
                f"{where}: key {record.key!r} has optimizer state, but its updater is {spec.name!r}"
            )


def overlaps(pieces: Sequence[PieceRecord], start: int, stop: int) -> list[Overlap]:
    """Return the parts of the pieces that make up elements [start, stop), in order; at least one part."""
    found = [
        Overlap(number, max(start, piece.start) - piece.start, min(stop, piece.stop) - piece.start)
        for number, piece in enumerate(pieces)
        if piece.start < stop and start < piece.stop
    ]
    return found or [Overlap(0, 0, 0)]  # a value without elements


def check_alike(record: KeyRecord, parts: Iterable[Overlap]) -> None:
    """Raise LoadError unless these pieces have the same kind of optimizer state and so can be joined."""
    kinds = {
        (
            tuple((each.name, each.dtype, each.elementwise) for each in record.pieces[part.piece].tensors),
            tuple(record.pieces[part.piece].plain),
        )
        for part in parts
    }
    if len(kinds) > 1:
        raise LoadError(
            f"key {record.key!r}: its pieces have different optimizer state, for an updater failed on some "
            "of them; it can only be loaded where it is sliced just as it was"
        )


def version_of(record: KeyRecord, parts: Iterable[Overlap]) -> int:
    """Return the version of a value joined from these parts: the smallest of theirs."""
    return min(record.pieces[part.piece].version for part in parts)


def batches(sizes_bytes: Sequence[int], max_bytes: int = MAX_BATCH_BYTES) -> list[list[int]]:
    """Group things of these sizes, by index, into batches of at most `max_bytes`; a larger one is alone.

    No batch has more than `MAX_BATCH_SLICES`.
    """
    groups: list[list[int]] = []
    used = 0
    for number, size in enumerate(sizes_bytes):
        if not groups or used + size > max_bytes or len(groups[-1]) == MAX_BATCH_SLICES:
            groups.append([])
            used = 0
        groups[-1].append(number)
        used += size
    return groups
