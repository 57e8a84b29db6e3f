"""One file of a save: written straight from the memory of tensors, and read a range at a time.

It is a safetensors file: a length of 8 bytes, a header in JSON, then the data. This module, and not the
library of that name, reads and writes it. The library writes through a temporary file that a killed process
leaves behind for good, gives its files the mode 0600 whatever the umask, has another table of dtypes in each
version, and maps the files it reads, so that truncating one meanwhile kills the process.
"""

from __future__ import annotations

import json
import math
import os
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tensorkv.arrays import bytes_of
from tensorkv.checkpoint.records import FileRecord
from tensorkv.errors import LoadError, SaveError

MAX_HEADER_BYTES = 100_000_000
"""Maximum length of the header, here and in the safetensors library."""

_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
"""Names of the dtypes that every version of safetensors has. A complex number is stored as a pair of reals,
any other element as bytes; the index has its dtype."""

_AS_REAL = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}

_PAGE_BYTES = 4096
_BLOCK_BYTES = 1 << 20
"""Size of the blocks that are written, or read and checksummed, at a time; small enough for the CPU cache."""


class Checksum:
    """The checksum of a file, computed block by block.

    Each block of 1 MiB, the last one zero-padded to a multiple of 4096 bytes, is read as rows of 512
    little-endian 64-bit words. One CRC-32 runs over the sums of the rows, modulo 2**64, another over those of
    the columns. Words that change, in one place or in a few, change a row or a column sum; so do pages that
    are swapped, missing or zeroed. A CRC-32 of all bytes would take longer than loading them: 0.49 s per GiB,
    this 0.21.
    """

    def __init__(self) -> None:
        self.rows = self.columns = 0

    def add(self, block: memoryview) -> None:
        """Add the next block. All but the last are 1 MiB long."""
        if len(block) % _PAGE_BYTES:
            filled = bytearray(-(-len(block) // _PAGE_BYTES) * _PAGE_BYTES)
            filled[: len(block)] = block
            block = memoryview(filled)
        words = np.frombuffer(block, "<u8").reshape(-1, _PAGE_BYTES // 8)
        self.rows = zlib.crc32(words.sum(axis=1, dtype="<u8"), self.rows)
        self.columns = zlib.crc32(words.sum(axis=0, dtype="<u8"), self.columns)


# ---- writing --------------------------------------------------------------------------------------------


def new_file(path: str) -> int:
    """Create a file and return its descriptor, open for writing, with the mode that `open` would give it.

    Raises OSError, also if the name exists, even as a link.
    """
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def write_tensors(descriptor: int, tensors: Mapping[str, torch.Tensor]) -> FileRecord:
    """Write contiguous tensors to a new file. They are on disk when this returns.

    Raises:
        OSError: they cannot be written.
        SaveError: they are too many for one file.
    """
    largest_first = sorted(tensors.items(), key=lambda each: -each[1].dtype.itemsize)  # so each is aligned
    checksum = Checksum()
    size_bytes = 0
    for block in _blocks([_header(largest_first), *(bytes_of(tensor) for _, tensor in largest_first)]):
        checksum.add(block)
        write_all(descriptor, block)
        size_bytes += len(block)
    os.fsync(descriptor)
    return FileRecord(size_bytes, checksum.rows, checksum.columns)


def _header(tensors: Sequence[tuple[str, torch.Tensor]]) -> memoryview:
    """Return everything before the data: the header, preceded by its length."""
    entries: dict[str, Any] = {}
    at = 0
    for name, tensor in tensors:
        dtype, shape = _form(tensor.dtype, tensor.shape)
        end = at + tensor.numel() * tensor.dtype.itemsize
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise SaveError(f"{len(tensors)} tensors are too many for one file: its header has {len(text)} bytes")
    return memoryview(len(text).to_bytes(8, "little") + text)


def _form(dtype: torch.dtype, shape: Sequence[int]) -> tuple[str, list[int]]:
    """Return the dtype and shape with which a file stores a tensor."""
    if dtype in _NAMES:
        return _NAMES[dtype], list(shape)
    if dtype in _AS_REAL:
        return _NAMES[_AS_REAL[dtype]], [2 * math.prod(shape)]
    return "U8", [dtype.itemsize * math.prod(shape)]


def _blocks(parts: Iterable[memoryview]) -> Iterator[memoryview]:
    """Regroup bytes into blocks of equal size, except the last. Each is valid until the next is fetched."""
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    used = 0
    for part in parts:
        at = 0
        while at < len(part):
            size = min(_BLOCK_BYTES - used, len(part) - at)
            buffer[used : used + size] = part[at : at + size]
            used, at = used + size, at + size
            if used == _BLOCK_BYTES:
                yield buffer
                used = 0
    if used:
        yield buffer[:used]


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of `data`, in several calls if one writes only a part. Raises OSError."""
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


# ---- reading --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Entry:
    """The header's entry for a tensor; its bytes are [start, stop) of the file."""

    dtype: str
    shape: list[int]
    start: int
    stop: int


class TensorFile:
    """An open file of a save. Each length in it is checked before memory is allocated.

    Raises:
        LoadError: it cannot be read, is a link, or is not a safetensors file. The text names it and the host.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._entries: dict[str, _Entry] | None = None
        try:
            self._file = open_regular(path)
        except OSError as exc:
            raise self._bad(f"belongs to the save and cannot be read: {exc}") from exc
        self.size_bytes = os.fstat(self._file).st_size

    def close(self) -> None:
        """Close the file, but keep its size and header for `reopen`."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def reopen(self) -> None:
        """Open the file again after `close`. Raises LoadError if its size has changed."""
        again = TensorFile(self._path)
        self._file, again._file = again._file, self._file
        if again.size_bytes != self.size_bytes:
            raise self._bad(f"has {again.size_bytes} bytes, and had {self.size_bytes}")

    def _bad(self, what: str) -> LoadError:
        return LoadError(f"{self._path} {what} (on host {os.uname().nodename})")

    def verify(self, file: FileRecord, *, wholly: bool) -> None:
        """Raise LoadError unless size and, with `wholly`, checksum match this record."""
        if self.size_bytes != file.size_bytes:
            raise self._bad(f"is not as it was saved: {self.size_bytes} bytes and not {file.size_bytes}")
        if not wholly or file.checksum is None:
            return
        found = Checksum()
        buffer = memoryview(bytearray(_BLOCK_BYTES))
        for at in range(0, self.size_bytes, _BLOCK_BYTES):
            block = buffer[: self.size_bytes - at]
            self._fill(block, at)
            found.add(block)
        if found.rows != file.checksum or file.columns not in (None, found.columns):
            raise self._bad(
                f"is not as it was saved: its checksum is {found.rows:08x} {found.columns:08x} and should be "
                f"{file.checksum:08x}" + ("" if file.columns is None else f" {file.columns:08x}")
            )

    def _fill(self, buffer: memoryview, at: int) -> None:
        """Fill a buffer with the bytes of the file from offset `at` on."""
        try:
            while buffer:
                size = os.preadv(self._file, [buffer], at)
                if not size:
                    raise self._bad("is cut off")
                buffer, at = buffer[size:], at + size
        except OSError as exc:
            raise self._bad(f"cannot be read: {exc}") from exc

    def check(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> None:
        """Raise LoadError unless the file has a tensor of this name, dtype and shape."""
        self._find(name, dtype, shape)

    def read(self, name: str, dtype: torch.dtype, shape: Sequence[int], low: int, high: int) -> torch.Tensor:
        """Return a flat copy of elements [low, high) of a tensor. Raises LoadError."""
        entry = self._find(name, dtype, shape)
        data = torch.empty((high - low) * dtype.itemsize, dtype=torch.uint8, device="cpu")
        self._fill(bytes_of(data), entry.start + low * dtype.itemsize)
        return data.view(dtype)

    def _find(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> _Entry:
        if self._entries is None:
            try:
                self._entries = self._read_header()
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
                if isinstance(exc, LoadError):
                    raise
                raise self._bad(f"is no safetensors file: {exc}") from exc
        entry = self._entries.get(name)
        if entry is None:
            raise self._bad(f"has no tensor {name!r}")
        # Older saves have the safetensors name of dtypes that are now saved as bytes.
        as_bytes = dtype not in _NAMES and dtype not in _AS_REAL
        as_told = as_bytes or (entry.dtype, entry.shape) == _form(dtype, shape)
        if not as_told or entry.stop - entry.start != math.prod(shape) * dtype.itemsize:
            found = f"{entry.dtype} of shape {entry.shape}"
            raise self._bad(f"has {name!r} as {found}, which is not {dtype} of {list(shape)}")
        return entry

    def _read_header(self) -> dict[str, _Entry]:
        """Return the entries of the header. Raises LoadError or, if it is malformed, many other errors."""
        length = memoryview(bytearray(8))
        self._fill(length, 0)
        header_bytes = int.from_bytes(length, "little")
        data_at = 8 + header_bytes
        if header_bytes > min(MAX_HEADER_BYTES, self.size_bytes - 8):
            raise self._bad(f"has {self.size_bytes} bytes and claims a header of {header_bytes}")
        text = bytearray(header_bytes)
        self._fill(memoryview(text), 8)
        entries: dict[str, _Entry] = {}
        for name, told in json.loads(text).items():
            if name != "__metadata__":
                start, stop = told["data_offsets"]
                entry = _Entry(told["dtype"], told["shape"], data_at + start, data_at + stop)
                whole = type(start) is int and type(stop) is int
                if not whole or not data_at <= entry.start <= entry.stop <= self.size_bytes:
                    raise self._bad(f"claims bytes {entry.start} to {entry.stop} for {name!r}")
                entries[name] = entry
        return entries


def open_regular(path: str) -> int:
    """Open a file for reading. Raises OSError if that fails or it is a link or not a regular file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a file")
    return descriptor
