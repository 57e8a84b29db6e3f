"""Writes slices to the files of a save, and reads them back as any other slices.

`records` says what the records of a save mean, `slices` has slices in memory, `folder` publishes a save, and
`tensorfile` reads and writes one file.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from tensorkv.arrays import dtype_from_name
from tensorkv.checkpoint.folder import MAX_INDEX_BYTES, new_part
from tensorkv.checkpoint.records import (
    FILE_NAME,
    INDEX_NAME,
    FileRecord,
    Index,
    KeyRecord,
    PieceRecord,
    TensorRecord,
    decode_index,
)
from tensorkv.checkpoint.slices import SliceState, assemble, records_of
from tensorkv.checkpoint.tensorfile import TensorFile, open_regular, write_tensors
from tensorkv.errors import InvalidValue, LoadError
from tensorkv.plain import Key
from tensorkv.updaters.optimizer import check_state_names

_MAX_LABEL = 100
_MAX_OPEN_FILES = 64
_MAX_TRIES = 50

_T = TypeVar("_T")


def write_slices(
    folder: str, name: str, slices: Sequence[tuple[Key, int, int, SliceState]]
) -> tuple[FileRecord, list[PieceRecord]]:
    """Write slices, given as key, start, stop and state, to a file of a save; return its record and theirs.

    Raises:
        SaveError: it cannot be written, or this save is not in progress in this folder.
    """
    tensors: dict[str, torch.Tensor] = {}
    pieces: list[PieceRecord] = []
    for number, (key, start, stop, each) in enumerate(slices):
        records, values, plain = records_of(each)
        stored: list[TensorRecord] = []
        for record, tensor in zip(records, values, strict=True):
            label = f"{number}/{record.name or 'value'}/{str(key)[:_MAX_LABEL]}[{start}:{stop}]"
            tensors[label] = tensor
            stored.append(TensorRecord(record.name, record.dtype, record.shape, record.elementwise, label))
        pieces.append(PieceRecord(start, stop, each.version, stored, plain, name))
    with new_part(folder, name) as descriptor:
        return write_tensors(descriptor, tensors), pieces


def load_newest(folder: str, load: Callable[[Index], _T]) -> _T:
    """Call `load` with the index of the save in a folder; retry if another save was published meanwhile.

    Before that, it checks size and header of each file, but not the numbers.

    Raises:
        LoadError: there is no save, or it is incomplete; or whatever `load` raises.
    """
    path = os.path.join(folder, INDEX_NAME)
    text = _read_index(path)
    for _ in range(_MAX_TRIES):
        try:
            index = decode_index(text, path)
            check_state_names(index.settings, index.keys, path)
            _look_into_files(folder, index)
            return load(index)
        except LoadError as exc:
            newer = _read_index(path)
            if newer == text:
                raise
            text, error = newer, exc
    raise error


def _read_index(path: str) -> bytes:
    try:
        with open(open_regular(path), "rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            if size_bytes > MAX_INDEX_BYTES:
                raise LoadError(f"{path} has {size_bytes} bytes, of at most {MAX_INDEX_BYTES}")
            return file.read()
    except FileNotFoundError as exc:
        raise LoadError(f"there is no save in {os.path.dirname(path)}: {INDEX_NAME} is missing") from exc
    except OSError as exc:
        raise LoadError(f"{path} cannot be read: {exc}") from exc


def _look_into_files(folder: str, index: Index) -> None:
    """Raise LoadError unless each file has its recorded size, and the tensors of its pieces."""
    inside: dict[str, list[tuple[KeyRecord, TensorRecord]]] = {name: [] for name in index.files}
    for record in index.keys:
        for piece in record.pieces:
            inside[piece.file] += [(record, tensor) for tensor in piece.tensors]
    for name, tensors in inside.items():
        file = _open(folder, name)
        try:
            file.verify(index.files[name], wholly=False)
            for record, tensor in tensors:
                file.check(tensor.stored, _dtype(record, tensor), tensor.shape)
        finally:
            file.close()


def check_files(folder: str, files: Mapping[str, FileRecord]) -> None:
    """Check the sizes of these files of a save, and the checksums of those that have one.

    Raises:
        LoadError: a file has changed since it was saved.
    """
    for name, record in files.items():
        file = _open(folder, name)
        try:
            file.verify(record, wholly=True)
        finally:
            file.close()


def _open(folder: str, name: str) -> TensorFile:
    if not FILE_NAME.fullmatch(name):
        raise LoadError(f"{name!r} is not a file of a save")
    return TensorFile(os.path.join(folder, name))


def _dtype(record: KeyRecord, tensor: TensorRecord) -> torch.dtype:
    try:
        return dtype_from_name(tensor.dtype)
    except InvalidValue as exc:
        raise LoadError(f"{tensor.name or 'value'!r} of key {record.key!r}: {exc}") from exc


class PieceReader:
    """Reads pieces from the files of a save. A context manager."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._files: dict[str, TensorFile] = {}
        self._open: OrderedDict[str, TensorFile] = OrderedDict()  # the open ones, least recently used first

    def __enter__(self) -> PieceReader:
        return self

    def __exit__(self, *exc: object) -> None:
        for file in self._open.values():
            file.close()

    def _file(self, name: str) -> TensorFile:
        """Return a file, open. At most `_MAX_OPEN_FILES` are open, since a save may have very many."""
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        if len(self._open) == _MAX_OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        if name in self._files:
            self._files[name].reopen()
        else:
            self._files[name] = _open(self._folder, name)
        self._open[name] = self._files[name]
        return self._files[name]

    def load(self, record: KeyRecord, start: int, stop: int) -> SliceState:
        """Return elements [start, stop) of a key with their state. Raises LoadError."""

        def fetch(piece: int, tensor: TensorRecord, low: int, high: int) -> torch.Tensor:
            file = self._file(record.pieces[piece].file)
            return file.read(tensor.stored, _dtype(record, tensor), tensor.shape, low, high)

        return assemble(record, start, stop, fetch)
