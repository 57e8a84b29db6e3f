"""The numbers of a save: slices with their state in memory, and as safetensors files in a folder.

What the records of a save mean stands in `tensorkv.savedstate`. A save is made so that a crash at any
moment leaves the one before it whole: files get names of their own, are complete on disk before they have
them, and count only when the index, which is replaced last and at once, names them.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tensorkv.arrays import Key, bytes_of, dtype_from_name, dtype_name
from tensorkv.errors import InvalidValue, LoadError, SaveError
from tensorkv.savedstate import (
    FILE_NAME,
    FORMAT,
    INDEX_NAME,
    VALUE,
    VERSION,
    Index,
    KeyRecord,
    Overlap,
    PieceRecord,
    Plain,
    SavedSettings,
    TensorRecord,
    check_alike,
    check_record,
    check_settings,
    check_states,
    decode_index,
    encode_index,
    from_plain,
    overlaps,
    version_of,
)

Fetch = Callable[[int, TensorRecord, int, int], torch.Tensor]
"""Returns elements [low, high) of a tensor of piece number i, flat; all of them if it is not elementwise."""

_AS_REAL = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}
"""How dtypes are written that safetensors does not have, in every version: as pairs of real numbers."""

_FILE_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(slots=True)
class SliceState:
    """A slice in memory: its value, flat, its version, and the optimizer's state by name.

    A tensor of the state has one element per element of the value, flat too, if its name is in
    `elementwise`.
    """

    value: torch.Tensor
    version: int
    state: dict[str, Any] = field(default_factory=dict)
    elementwise: frozenset[str] = frozenset()

    def optimizer_state(self, shape: Sequence[int]) -> dict[str, Any]:
        """Return the state as the optimizer keeps it, for a slice of this shape."""
        return {
            name: each.view(tuple(shape)) if name in self.elementwise else each
            for name, each in self.state.items()
        }


def slice_state(key: Key, value: torch.Tensor, version: int, state: dict[str, Any]) -> SliceState:
    """Return a copy of a slice, from what a store and an optimizer have of it.

    Raises:
        SaveError: the state holds something that is neither a tensor nor plain.
    """
    copied: dict[str, Any] = {}
    elementwise: set[str] = set()
    for name, each in state.items():
        if isinstance(each, torch.Tensor) and isinstance(name, str) and name:
            copied[name] = each.detach().to("cpu", copy=True).contiguous()
            if each.shape == value.shape:
                elementwise.add(name)
                copied[name] = copied[name].view(-1)
        elif isinstance(name, str) and name and (each is None or type(each) in (bool, int, float, str)):
            copied[name] = each
        else:
            raise SaveError(
                f"key {key!r}: the optimizer keeps {name!r}, a {type(each).__name__}, which cannot be saved; "
                "its state may hold tensors, numbers, bools, strings and None"
            )
    flat = value.detach().to("cpu", copy=True).contiguous().view(-1)
    return SliceState(flat, version, copied, frozenset(elementwise))


def records_of(each: SliceState) -> tuple[list[TensorRecord], list[torch.Tensor], dict[str, Plain]]:
    """Return what describes a slice: its tensors as records, the tensors themselves, and plain data."""
    tensors = {VALUE: each.value}
    tensors.update({name: t for name, t in each.state.items() if isinstance(t, torch.Tensor)})
    records = [
        TensorRecord(
            name, dtype_name(tensor.dtype), tuple(tensor.shape), name == VALUE or name in each.elementwise
        )
        for name, tensor in tensors.items()
    ]
    plain = {name: value for name, value in each.state.items() if not isinstance(value, torch.Tensor)}
    return records, list(tensors.values()), plain


def assemble(record: KeyRecord, start: int, stop: int, fetch: Fetch) -> SliceState:
    """Return elements [start, stop) of a key with their state, put together from its pieces.

    What belongs to a piece as a whole is taken from the first of them: it is the same in all.

    Raises:
        LoadError: the pieces do not fit together; or whatever `fetch` raises.
    """
    parts = overlaps(record.pieces, start, stop)
    check_alike(record, parts)
    first = record.pieces[parts[0].piece]
    made: dict[str, Any] = {}
    for number, each in enumerate(first.tensors):
        if each.elementwise:
            made[each.name] = _join(record, parts, number, fetch)
        else:
            made[each.name] = fetch(parts[0].piece, each, 0, each.num_elems).reshape(each.shape).clone()
    value = made.pop(VALUE)
    elementwise = frozenset(each.name for each in first.tensors[1:] if each.elementwise)
    return SliceState(value, version_of(record, parts), {**made, **first.plain}, elementwise)


def _join(record: KeyRecord, parts: Sequence[Overlap], number: int, fetch: Fetch) -> torch.Tensor:
    """Return the elements of tensor `number` of these pieces, flat, in memory of their own."""
    found = [
        fetch(part.piece, record.pieces[part.piece].tensors[number], part.low, part.high) for part in parts
    ]
    return found[0].clone() if len(found) == 1 else torch.cat(found)


class MemoryPieces:
    """The pieces of a key in memory: what `state_dict` puts together, and `load_state_dict` cuts."""

    def __init__(self, key: Key, shape: Sequence[int], whole: bool) -> None:
        self._key, self._shape, self._whole = key, tuple(shape), whole
        self._pieces: list[PieceRecord] = []
        self._tensors: list[dict[str, torch.Tensor]] = []

    def add(self, start: int, stop: int, each: SliceState) -> None:
        """Add the next piece, in element order."""
        records, tensors, plain = records_of(each)
        self._pieces.append(PieceRecord(start, stop, each.version, records, plain))
        self._tensors.append({record.name: t for record, t in zip(records, tensors, strict=True)})

    @property
    def record(self) -> KeyRecord:
        """The key."""
        dtype = self._pieces[0].tensors[0].dtype
        return KeyRecord(self._key, self._shape, dtype, self._whole, self._pieces)

    def fetch(self, piece: int, tensor: TensorRecord, low: int, high: int) -> torch.Tensor:
        """Return elements of a tensor of a piece."""
        return self._tensors[piece][tensor.name].view(-1)[low:high]


# ---- tensors as bytes, on their way between worker and server ----------------------------------------


def pack(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the bytes of tensors one after the other, as one uint8 tensor."""
    parts = [torch.frombuffer(bytearray(bytes_of(t)), dtype=torch.uint8) for t in tensors if t.numel()]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)


def packed_bytes(records: Iterable[TensorRecord]) -> int:
    """Return how many bytes `pack` makes of tensors like these."""
    return sum(each.num_elems * dtype_from_name(each.dtype).itemsize for each in records)


def unpack(
    data: torch.Tensor, records: Sequence[TensorRecord], version: int, plain: dict[str, Plain]
) -> SliceState:
    """Return the slice whose tensors `pack` has packed."""
    made: dict[str, Any] = {}
    low = 0
    for each in records:
        dtype = dtype_from_name(each.dtype)
        size = each.num_elems * dtype.itemsize
        made[each.name] = data[low : low + size].clone().view(dtype).view(each.shape)
        low += size
    value = made.pop(VALUE)
    elementwise = frozenset(each.name for each in records if each.elementwise and each.name != VALUE)
    return SliceState(value, version, {**made, **plain}, elementwise)


# ---- writing --------------------------------------------------------------------------------------------


def new_save_id() -> str:
    """Return what distinguishes the files of one save from those of all others."""
    return secrets.token_hex(8)


def file_name(save_id: str, server: int, number: int) -> str:
    """Return the name of a file of a save."""
    return f"tensorkv-{save_id}-{server}-{number}.safetensors"


def make_folder(folder: str) -> None:
    """Make the folder of a save, if it is not there. Raises SaveError if that is not possible."""
    with _writing(folder):
        os.makedirs(folder, exist_ok=True)


def write_slices(
    folder: str, name: str, slices: Sequence[tuple[Key, int, int, SliceState]]
) -> tuple[int, list[PieceRecord]]:
    """Write slices, given as key, start, stop and state, to a file; return its size and their records.

    Raises:
        SaveError: it cannot be written.
    """
    if not os.path.isdir(folder):
        raise SaveError(
            f"{folder} is not a folder on host {os.uname().nodename}: the servers write the files of a save, "
            "so the folder has to be on a file system that they all share"
        )
    tensors: dict[str, torch.Tensor] = {}
    pieces: list[PieceRecord] = []
    for number, (key, start, stop, each) in enumerate(slices):
        records, values, plain = records_of(each)
        stored: list[TensorRecord] = []
        for record, tensor in zip(records, values, strict=True):
            label = f"{number}/{record.name or 'value'}/{key}[{start}:{stop}]"
            real = _AS_REAL.get(tensor.dtype)
            tensors[label] = tensor if real is None else tensor.view(-1).view(real)
            stored.append(TensorRecord(record.name, record.dtype, record.shape, record.elementwise, label))
        pieces.append(PieceRecord(start, stop, each.version, stored, plain, name))
    path = os.path.join(folder, name)
    with _writing(path):
        save_file(tensors, f"{path}.tmp")
        _sync(f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
        return os.path.getsize(path), pieces


def write_index(folder: str, index: Index) -> None:
    """Let a save count, and remove the files of saves before it. All its files have been written.

    Raises:
        SaveError: it cannot be written; the save before it is whole.
    """
    path = os.path.join(folder, INDEX_NAME)
    with _writing(path):
        _sync(folder)  # the names of the files are on disk before the index that tells of them
        with open(f"{path}.tmp", "w", encoding="utf-8") as file:
            file.write(encode_index(index))
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
        _sync(folder)
    remove_files(folder, keep=index.files)


def remove_files(folder: str, keep: Iterable[str] = (), save_id: str = "") -> None:
    """Remove files of saves from a folder, but not those to keep; with `save_id` only those of one save.

    What cannot be removed stays: it is in nobody's way, and the next save tries again.
    """
    kept = set(keep)
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            of_save = FILE_NAME.fullmatch(name.removesuffix(".tmp")) and f"tensorkv-{save_id}" in name
            if of_save and name not in kept:
                with contextlib.suppress(OSError):
                    os.remove(os.path.join(folder, name))


@contextlib.contextmanager
def _writing(path: str) -> Any:
    try:
        yield
    except (OSError, SafetensorError) as exc:
        raise SaveError(f"{path} cannot be written on host {os.uname().nodename}: {exc}") from exc


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- reading --------------------------------------------------------------------------------------------


def read_index(folder: str) -> Index:
    """Return the index of the save in a folder, after looking into each of its files.

    Raises:
        LoadError: there is no save, or it is not whole.
    """
    path = os.path.join(folder, INDEX_NAME)
    try:
        text = Path(path).read_bytes()
    except FileNotFoundError as exc:
        raise LoadError(f"there is no save in {folder}: {INDEX_NAME} is missing") from exc
    except OSError as exc:
        raise LoadError(f"{path} cannot be read: {exc}") from exc
    index = decode_index(text, path)
    for name, size_bytes in index.files.items():
        _check_size(os.path.join(folder, name), size_bytes)
    with PieceReader(folder, [piece for record in index.keys for piece in record.pieces]) as reader:
        for record in index.keys:
            for number, piece in enumerate(record.pieces):
                for tensor in piece.tensors:
                    reader.check(record, number, tensor)
    return index


def _check_size(path: str, size_bytes: int) -> None:
    try:
        found = os.lstat(path).st_size
    except OSError as exc:
        raise LoadError(f"{path} belongs to the save and is missing: {exc}") from exc
    if found != size_bytes or os.path.islink(path):
        raise LoadError(f"{path} has {found} bytes and should have {size_bytes}: it is not as it was saved")


class PieceReader:
    """Reads pieces from the files of a save. A context manager."""

    def __init__(self, folder: str, pieces: Iterable[PieceRecord]) -> None:
        self._stack = contextlib.ExitStack()
        self._files: dict[str, Any] = {}
        self._folder = folder
        try:
            for name in dict.fromkeys(piece.file for piece in pieces):
                self._files[name] = self._open(name)
        except BaseException:
            self._stack.close()
            raise

    def _open(self, name: str) -> Any:
        if not FILE_NAME.fullmatch(name):
            raise LoadError(f"{name!r} is not a file of a save")
        path = os.path.join(self._folder, name)
        try:
            return self._stack.enter_context(safe_open(path, framework="pt"))
        except (OSError, SafetensorError) as exc:
            raise LoadError(f"{path} cannot be read on host {os.uname().nodename}: {exc}") from exc

    def __enter__(self) -> PieceReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def check(self, record: KeyRecord, piece: int, tensor: TensorRecord) -> None:
        """Raise LoadError unless a tensor is in its file, and is what its record says."""
        name = record.pieces[piece].file
        what = f"{os.path.join(self._folder, name)}: {tensor.stored!r} of key {record.key!r}"
        dtype = self._dtype(tensor, what)
        try:
            view = self._files[name].get_slice(tensor.stored)
        except SafetensorError as exc:
            raise LoadError(f"{what} is not in the file: {exc}") from exc
        found = (_FILE_DTYPES.get(view.get_dtype()), tuple(view.get_shape()))
        real = _AS_REAL.get(dtype)
        expected = (dtype, tensor.shape) if real is None else (real, (2 * tensor.num_elems,))
        if found != expected:
            raise LoadError(f"{what} is {found[0]} of shape {found[1]}, not {expected[0]} of {expected[1]}")

    @staticmethod
    def _dtype(tensor: TensorRecord, what: str) -> torch.dtype:
        try:
            return dtype_from_name(tensor.dtype)
        except InvalidValue as exc:
            raise LoadError(f"{what}: {exc}") from exc

    def load(self, record: KeyRecord, start: int, stop: int) -> SliceState:
        """Return elements [start, stop) of a key with their state. Raises LoadError."""

        def fetch(piece: int, tensor: TensorRecord, low: int, high: int) -> torch.Tensor:
            self.check(record, piece, tensor)
            dtype = dtype_from_name(tensor.dtype)
            step = 2 if dtype in _AS_REAL else 1
            file = self._files[record.pieces[piece].file]
            if not tensor.elementwise:
                found: torch.Tensor = file.get_tensor(tensor.stored)
            else:
                found = file.get_slice(tensor.stored)[low * step : high * step]
            if step > 1:  # in memory of its own, for a complex number has to lie at a multiple of its size
                found = found.clone()
            return found.reshape(-1).view(dtype)

        try:
            return assemble(record, start, stop, fetch)
        except (OSError, SafetensorError) as exc:
            raise LoadError(f"key {record.key!r} cannot be read from {self._folder}: {exc}") from exc


# ---- as a dict --------------------------------------------------------------------------------------------


def to_state_dict(reduction: str, settings: SavedSettings, keys: Iterable[MemoryPieces]) -> dict[str, Any]:
    """Return the dict that `KVStore.state_dict` promises."""
    found: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "reduction": reduction,
        "settings": msgspec.to_builtins(settings),
        "whole": [],
        "values": {},
        "versions": {},
        "optimizer_state": {},
    }
    for pieces in keys:
        record = pieces.record
        each = assemble(record, 0, record.num_elems, pieces.fetch)
        found["values"][record.key] = each.value.view(record.shape)
        found["versions"][record.key] = each.version
        if record.whole:
            found["whole"].append(record.key)
        if each.state:
            found["optimizer_state"][record.key] = each.optimizer_state(record.shape)
    return found


def from_state_dict(data: Any) -> tuple[str, SavedSettings, list[MemoryPieces]]:
    """Return reduction, settings and keys of such a dict.

    Raises:
        LoadError: it is none.
    """
    where = "the state dict"
    try:
        if (data["format"], data["version"]) != (FORMAT, VERSION) or data["reduction"] not in ("sum", "mean"):
            raise LoadError(f"{where} is not one that state_dict() of this version of tensorkv has made")
        settings: SavedSettings = from_plain(data["settings"], SavedSettings)
        check_settings(settings, where)
        keys = [_pieces_of(data, key, value) for key, value in data["values"].items()]
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        if isinstance(exc, LoadError):
            raise
        raise LoadError(f"{where} is not one of a store: {type(exc).__name__}: {exc}") from exc
    for pieces in keys:
        check_record(pieces.record, where)
    check_states(settings, [pieces.record for pieces in keys], where)
    return data["reduction"], settings, keys


def _pieces_of(data: Any, key: Any, value: Any) -> MemoryPieces:
    state = data["optimizer_state"].get(key, {})
    version = data["versions"][key]
    if type(key) not in (int, str) or type(version) is not int:
        raise LoadError(f"the state dict has key {key!r} with version {version!r}")
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        raise LoadError(f"the state dict has no tensor as value of key {key!r}")
    try:
        each = slice_state(key, value, version, state)
    except SaveError as exc:
        raise LoadError(str(exc)) from exc
    pieces = MemoryPieces(key, value.shape, key in data["whole"])
    pieces.add(0, value.numel(), each)
    return pieces
