"""Saves as safetensors files in a folder.

What the records of a save mean stands in `tensorkv.savedstate`, and `tensorkv.slicestate` has what is
saved in memory. A save is made so that a crash at any moment leaves the one before it whole: files get
names of their own, are complete on disk before they have them, and count only when the index, which is
replaced last and at once, names them.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tensorkv.arrays import Key, dtype_from_name
from tensorkv.errors import InvalidValue, LoadError, SaveError
from tensorkv.savedstate import (
    FILE_NAME,
    INDEX_NAME,
    FileRecord,
    Index,
    KeyRecord,
    PieceRecord,
    TensorRecord,
    decode_index,
    encode_index,
)
from tensorkv.slicestate import SliceState, assemble, records_of
from tensorkv.updater import check_state_names

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


_PAGE_BYTES = 4096
_READ_BYTES = 1 << 20
"""What is read and added up at a time: little enough to stay in a cache of the processor."""


def checksum(path: str) -> int:
    """Return the checksum of a file: the CRC-32 of the sums of its pages.

    A page is 4096 bytes, the last one filled up with zeros, and its sum is that of its little-endian 64-bit
    words, modulo 2**64. So any change within one word is found, and pages that are swapped, missing or
    zeroed. A CRC-32 of all bytes takes longer than a load does: 0.48 s per GB, and 0.41.

    Raises OSError.
    """
    found = 0
    buffer = bytearray(_READ_BYTES)
    data, words = memoryview(buffer), np.frombuffer(buffer, "<u8")
    with open(path, "rb", buffering=0) as file:
        while (size_bytes := _fill(file, data)) > 0:
            end = -(-size_bytes // _PAGE_BYTES) * _PAGE_BYTES
            data[size_bytes:end] = bytes(end - size_bytes)
            pages = words[: end // 8].reshape(-1, _PAGE_BYTES // 8)
            found = zlib.crc32(pages.sum(axis=1, dtype="<u8"), found)
    return found


def _fill(file: Any, data: memoryview) -> int:
    """Read until `data` is full or the file ends; return how much that is."""
    size_bytes = 0
    while size_bytes < len(data):
        more = file.readinto(data[size_bytes:])
        if not more:
            break
        size_bytes += more
    return size_bytes


# ---- writing --------------------------------------------------------------------------------------------


def new_save_id() -> str:
    """Return what distinguishes the files of one save from those of all others."""
    return secrets.token_hex(8)


def file_name(save_id: str, server: int, number: int) -> str:
    """Return the name of a file of a save."""
    return f"tensorkv-{save_id}-{server}-{number}.safetensors"


def order_of(name: str) -> tuple[int, ...]:
    """Sort key of the files of a save: server and number."""
    return tuple(int(part) for part in name.removesuffix(".safetensors").split("-")[2:])


def make_folder(folder: str) -> None:
    """Make the folder of a save, if it is not there. Raises SaveError if that is not possible."""
    with _writing(folder):
        os.makedirs(folder, exist_ok=True)


def write_slices(
    folder: str, name: str, slices: Sequence[tuple[Key, int, int, SliceState]]
) -> tuple[FileRecord, list[PieceRecord]]:
    """Write slices, given as key, start, stop and state, to a file; return its record and theirs.

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
        file = FileRecord(os.path.getsize(f"{path}.tmp"), checksum(f"{path}.tmp"))
        os.replace(f"{path}.tmp", path)
        return file, pieces


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
    """Return the index of the save in a folder, after looking into each of its files, but not at its numbers.

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
    check_state_names(index.settings, index.keys, path)
    for name, file in index.files.items():
        _check_size(os.path.join(folder, name), file.size_bytes)
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


def check_files(folder: str, files: Mapping[str, FileRecord]) -> None:
    """Read these files of a save wholly, those that have a checksum.

    Raises:
        LoadError: one is not as it was saved.
    """
    for name, file in files.items():
        if not FILE_NAME.fullmatch(name):
            raise LoadError(f"{name!r} is not a file of a save")
        if file.checksum is None:
            continue
        path = os.path.join(folder, name)
        _check_size(path, file.size_bytes)
        try:
            found = checksum(path)
        except OSError as exc:
            raise LoadError(f"{path} cannot be read on host {os.uname().nodename}: {exc}") from exc
        if found != file.checksum:
            numbers = f"its checksum is {found:08x} and should be {file.checksum:08x}"
            raise LoadError(f"{path} is not as it was saved: {numbers}")


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
            with torch.device("cpu"):  # safetensors puts them where the caller's default is
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
