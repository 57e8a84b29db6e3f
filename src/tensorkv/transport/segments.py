"""Memory that processes of one host share: anonymous segments, and places in them.

A segment is a memfd. It has no name that could be left behind, travels as a descriptor (see `unix`) and lives
as long as a process maps it. Its size is sealed: a peer that truncated it could kill us with SIGBUS. Segments
are large and never resized. An `Arena` allocates places from a list of segments. The kernel allocates pages
on first touch, and a sweep returns pages that have long been idle.

A place is a NumPy array. There is no free(): its memory is released when its last view is collected. So a
tensor over it is as safe as any other.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import re
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, final

import numpy as np
import numpy.typing as npt

from tensorkv.errors import MemoryLimitReached, ProtocolError, TransportUnavailable
from tensorkv.transport.memorylimits import check_room, limits

SEGMENT_BYTES = 64 << 20
"""Minimum size of a segment; a larger place gets a larger segment."""

ALIGN_BYTES = 64
MAX_SEGMENTS = 1 << 16
"""Maximum number of segments of one peer that are mapped."""

SWEEP_TIMES = 2
"""Number of times the size of all segments that is allocated between two sweeps. A sweep returns the memory
that was idle since the last one to the system. A step, however large, reuses its memory sooner than that."""

SWEEP_S = 10.0
"""Interval after which the next allocation sweeps in any case, since a process that allocates little now may
have allocated much before. Without an allocation there is no sweep."""

PURGE_BYTES = 256 << 10
"""Minimum size of a piece that a sweep returns; for less the calls cost more than the memory is worth."""

_SEAL_FUTURE_WRITE = 0x10  # F_SEAL_FUTURE_WRITE: existing mappings may write, new ones may not
_SEALED = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_PAGE_BYTES = mmap.PAGESIZE
_NAME = "tensorkv"
_LINK = f"/memfd:{_NAME} (deleted)"
_PATH = re.compile(r"/proc/[0-9]+/fd/[0-9]+")

Bytes = npt.NDArray[np.uint8]


@final
class Segment:
    """Shared memory mapped into this process. `bytes` views all of it; the last view to go unmaps it."""

    def __init__(self, number: int, mapped: mmap.mmap) -> None:
        self.number = number
        self.size_bytes = len(mapped)
        self.bytes = _bytes_of(mapped)
        self._mapped = mapped
        self.address = self.bytes.ctypes.data

    @classmethod
    def create(cls, number: int, size_bytes: int, *, others_may_write: bool) -> tuple[Segment, int]:
        """Create a segment of whole pages; return it with its descriptor, which the caller owns.

        Raises:
            MemoryLimitReached: it would exceed a limit of this process; nothing was allocated.
            OSError: the system has no memory for it.
        """
        check_room(size_bytes)
        descriptor = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        shared = descriptor
        try:
            os.ftruncate(descriptor, -size_bytes // _PAGE_BYTES * -_PAGE_BYTES)
            mapped = mmap.mmap(descriptor, 0)
            with contextlib.suppress(OSError, AttributeError):  # huge pages are faster
                mapped.madvise(mmap.MADV_HUGEPAGE)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALED)
            if not others_may_write:
                shared = _read_only(descriptor)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
        except BaseException:
            for each in {descriptor, shared}:
                os.close(each)
            raise
        if shared != descriptor:
            os.close(descriptor)
        return cls(number, mapped), shared

    @classmethod
    def attach(cls, number: int, size_bytes: int, descriptor: int, *, writable: bool) -> Segment:
        """Map a segment that a peer has handed over. Closes the descriptor.

        Raises:
            MemoryLimitReached: there is no memory to map it.
            ProtocolError: the descriptor is not sealed memory of this size.
        """
        try:
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
            if seals & _SEALED != _SEALED:
                raise ProtocolError(f"segment {number} could be cut off: it is not sealed")
            found = os.fstat(descriptor).st_size
            if found != size_bytes or not size_bytes:
                raise ProtocolError(f"segment {number} has {found} bytes, not {size_bytes}")
            access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            mapped = mmap.mmap(descriptor, size_bytes, mmap.MAP_SHARED, access)
            with contextlib.suppress(OSError, AttributeError):
                mapped.madvise(mmap.MADV_HUGEPAGE)
        except OSError as exc:  # F_GET_SEALS raises it, too, if the descriptor is not a memfd
            if isinstance(exc, ProtocolError):
                raise
            if exc.errno in (errno.ENOMEM, errno.EMFILE, errno.ENFILE):
                raise MemoryLimitReached(
                    f"no memory to map {size_bytes} bytes of a segment of another process: {limits()}"
                ) from exc
            raise ProtocolError(f"segment {number} cannot be mapped: {exc}") from exc
        finally:
            os.close(descriptor)
        return cls(number, mapped)

    @classmethod
    def open(cls, path: str, size_bytes: int) -> Segment:
        """Map a segment that a process of this user holds, for writing, by its path in /proc.

        Raises:
            TransportUnavailable: it cannot be reached: the process is gone, or /proc shows others.
            MemoryLimitReached, ProtocolError: as `attach`.
        """
        return cls.attach(0, size_bytes, open_path(path, os.O_RDWR), writable=True)

    def purge(self, start: int, stop: int) -> None:
        """Return the whole pages of a part to the system; every process that maps them then reads zeros.

        Only for the creator of the segment. Does nothing where the system does not allow it.
        """
        start, stop = -start // _PAGE_BYTES * -_PAGE_BYTES, stop // _PAGE_BYTES * _PAGE_BYTES
        if start < stop:
            with contextlib.suppress(OSError):
                self._mapped.madvise(mmap.MADV_REMOVE, start, stop - start)

    def place(self, offset_bytes: int, size_bytes: int) -> Bytes:
        """Return a view of a part of the segment.

        Raises:
            ProtocolError: the part reaches beyond the end.
        """
        if not 0 <= offset_bytes <= offset_bytes + size_bytes <= self.size_bytes:
            raise ProtocolError(
                f"bytes [{offset_bytes}, {offset_bytes + size_bytes}) of segment {self.number}, "
                f"which has {self.size_bytes}"
            )
        return self.bytes[offset_bytes : offset_bytes + size_bytes]


def open_path(path: str, access: int) -> int:
    """Return a descriptor of a segment that a process of this user holds; `access` is O_RDONLY or O_RDWR.

    The path came from a peer, so what it leads to is checked.

    Raises:
        TransportUnavailable: it cannot be reached.
        ProtocolError: it leads to something else, or to what belongs to another user.
    """
    if not _PATH.fullmatch(path):
        raise ProtocolError(f"a segment is said to be at {path!r}, where none can be")
    try:
        descriptor = os.open(path, access | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        raise TransportUnavailable(f"shared memory cannot be reached at {path}: {exc.strerror}") from exc
    if os.readlink(f"/proc/self/fd/{descriptor}") != _LINK or os.fstat(descriptor).st_uid != os.geteuid():
        os.close(descriptor)
        raise ProtocolError(f"{path} is no segment of a process of this user")
    return descriptor


def _read_only(descriptor: int) -> int:
    """Return a read-only descriptor of the memory; without /proc, the same one, sealed against new writers.

    No part of memory that is sealed against writing can be returned to the system either.
    """
    os.fchmod(descriptor, 0o400)  # so that a peer cannot reopen it for writing
    try:
        readable = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        with contextlib.suppress(OSError):  # Linux before 5.1 lacks this seal
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEAL_FUTURE_WRITE)
        return descriptor
    return readable


def _bytes_of(mapped: mmap.mmap) -> Bytes:
    """Return an array over a whole mapping; the mapping lives as long as any view of it.

    A read-only mapping is wrapped by its address, since torch warns about read-only arrays.
    """
    array: Bytes = np.frombuffer(mapped, np.uint8)
    if array.flags.writeable:
        return array
    raw: Any = (ctypes.c_ubyte * len(mapped)).from_address(array.ctypes.data)
    raw.keeps = array
    return np.frombuffer(raw, np.uint8)


@final
class FreeRanges:
    """First-fit list of the free ranges of a segment.

    It also tracks the ranges that stayed free since the last `sweep`.
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._ranges = [(0, size_bytes)]  # start and stop, in order
        self._idle = list(self._ranges)  # the parts of them that stayed free since the last sweep

    @property
    def all_free(self) -> bool:
        """Whether the whole segment is free."""
        return self._ranges == [(0, self.size_bytes)]

    def take(self, size_bytes: int) -> int:
        """Allocate a range of this size and return where it starts; -1 if none is large enough."""
        for index, (start, stop) in enumerate(self._ranges):
            if stop - start >= size_bytes:
                rest = [(start + size_bytes, stop)] if stop - start > size_bytes else []
                self._not_idle(start, start + size_bytes)
                self._ranges[index : index + 1] = rest
                return start
        return -1

    def sweep(self) -> list[tuple[int, int]]:
        """Return start and stop of the ranges that stayed free since the last sweep, in order."""
        idle, self._idle = self._idle, list(self._ranges)
        return idle

    def _not_idle(self, start: int, stop: int) -> None:
        first = bisect.bisect(self._idle, (start,))
        if first > 0 and self._idle[first - 1][1] > start:
            first -= 1
        last = bisect.bisect_left(self._idle, (stop,))
        cut = self._idle[first:last]
        if cut:
            ends = ((cut[0][0], start), (stop, cut[-1][1]))
            self._idle[first:last] = [(low, high) for low, high in ends if low < high]

    def give(self, start: int, size_bytes: int) -> None:
        """Free an allocated range, and merge it with its free neighbours."""
        stop = start + size_bytes
        first = last = bisect.bisect(self._ranges, (start,))
        if first > 0 and self._ranges[first - 1][1] == start:
            first -= 1
            start = self._ranges[first][0]
        if last < len(self._ranges) and self._ranges[last][0] == stop:
            stop = self._ranges[last][1]
            last += 1
        self._ranges[first:last] = [(start, stop)]


@final
class Arena:
    """Allocates places from segments of this process. Safe from any thread.

    Args:
        others_may_write: whether a peer that maps a segment may write to it.
        for_long: whether places are long-lived. Then a segment without any will not be needed again and is
            dropped at once; otherwise a sweep drops it when it has been idle.
        on_segment: called with every new segment and its descriptor, which the callee closes.
        on_drop: called with the number of a segment when it is dropped; nothing of it is in use.
    """

    def __init__(
        self,
        *,
        others_may_write: bool,
        for_long: bool,
        on_segment: Callable[[Segment, int], None],
        on_drop: Callable[[int], None],
    ) -> None:
        self._others_may_write = others_may_write
        self._for_long = for_long
        self._on_segment = on_segment
        self._on_drop = on_drop
        self._lock = threading.Lock()  # does not guard `_given`: the garbage collector may append to it
        self._segments: dict[int, Segment] = {}
        self._free: dict[int, FreeRanges] = {}
        self._next_number = 1
        self._taken_bytes = 0  # allocated since the last sweep
        self._swept = time.monotonic()
        self._given: list[tuple[int, int, int]] = []  # freed, not yet settled: segment, start, size

    def take(self, size_bytes: int) -> Bytes:
        """Allocate uninitialised memory of this size; it is freed when its last view is collected.

        Raises:
            MemoryLimitReached, OSError: there is no memory for it.
        """
        taken_bytes = max(1, -(-size_bytes // ALIGN_BYTES)) * ALIGN_BYTES
        with self._lock:
            self._settle()
            self._sweep_at_times()
            number, start = self._find(taken_bytes)
            self._taken_bytes += taken_bytes
            array: Bytes = self._segments[number].bytes[start : start + size_bytes]
            weakref.finalize(array, self._given.append, (number, start, taken_bytes)).atexit = False
            return array

    def where(self, address: int, size_bytes: int) -> tuple[int, int] | None:
        """Return segment and offset of memory at this address; None if it is not in this arena."""
        for segment in list(self._segments.values()):
            offset = address - segment.address
            if 0 <= offset <= segment.size_bytes - size_bytes:
                return segment.number, offset
        return None

    def _find(self, size_bytes: int) -> tuple[int, int]:
        for number, free in self._free.items():
            start = free.take(size_bytes)
            if start >= 0:
                return number, start
        self._drop([number for number, free in self._free.items() if free.all_free])  # too small
        number = self._next_number
        segment, descriptor = Segment.create(
            number, max(size_bytes, SEGMENT_BYTES), others_may_write=self._others_may_write
        )
        self._next_number += 1
        self._segments[number] = segment
        self._free[number] = FreeRanges(segment.size_bytes)
        self._on_segment(segment, descriptor)
        return number, self._free[number].take(size_bytes)

    def _sweep_at_times(self) -> None:
        """Sweep, if it is due: return memory that has long been idle to the system."""
        now = time.monotonic()
        much = SWEEP_TIMES * sum(free.size_bytes for free in self._free.values())
        if self._taken_bytes < much and now < self._swept + SWEEP_S:
            return
        self._taken_bytes, self._swept = 0, now
        unused: list[int] = []
        for number, free in self._free.items():
            idle = free.sweep()
            if idle == [(0, free.size_bytes)]:
                unused.append(number)
            for start, stop in idle:
                if stop - start >= PURGE_BYTES:
                    self._segments[number].purge(start, stop)
        self._drop(unused[1:])

    def _settle(self) -> None:
        """Return the places whose last views were collected to the free lists."""
        if not self._given:
            return
        while self._given:
            number, start, size_bytes = self._given.pop()
            self._free[number].give(start, size_bytes)
        if self._for_long:
            self._drop([number for number, free in self._free.items() if free.all_free][1:])

    def drop_unused(self) -> None:
        """Drop all segments of which nothing is used, after much was freed that will not come again."""
        with self._lock:
            self._settle()
            self._drop([number for number, free in self._free.items() if free.all_free])

    def _drop(self, unused: list[int]) -> None:
        """Drop unused segments. Most callers keep one back, since creating a segment is slow."""
        for number in unused:
            del self._free[number], self._segments[number]
            self._on_drop(number)
