"""Memory in two views: elements for the arithmetic, bytes for the transport.

Creating one view of a tensor from the other takes longer than adding up a small value. So memory that is
reused in every step keeps both.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from typing import final

import torch

from tensorkv.arrays import bytes_of
from tensorkv.errors import MemoryLimitReached

SMALLEST_BYTES = 4096
LARGE_BYTES = 1 << 20
EXACT_BYTES = 8 << 20
SWEEP_TAKES = 256
"""Number of large buffers taken between two sweeps. A sweep frees those that stayed idle since the last."""


NoMemory = Callable[[str, int | None], MemoryLimitReached]
"""Makes the error of a call that lacks memory, from its purpose and, if known, the number of bytes."""

_SHORT = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)
_TORCH_SHORT = re.compile(
    r"(can.t allocate|not enough|unable to allocate|out of) memory|unable to mmap", re.IGNORECASE
)
_TORCH_BYTES = re.compile(r"allocate (\d+) bytes")


def no_memory(what: str, size_bytes: int | None = None) -> MemoryLimitReached:
    """Return the error of a server that does not know its limits."""
    size = "" if size_bytes is None else f"{size_bytes} bytes of "
    return MemoryLimitReached(f"a server has no memory for {size}{what}")


def is_short_of_memory(exc: BaseException | None) -> bool:
    """Whether an exception or its cause says that memory, or a descriptor for it, is lacking."""
    while exc is not None:
        if isinstance(exc, (MemoryError, MemoryLimitReached)):
            return True
        if isinstance(exc, OSError) and exc.errno in _SHORT:
            return True
        if isinstance(exc, RuntimeError) and _TORCH_SHORT.search(str(exc)):
            return True
        exc = exc.__cause__
    return False


def short_of(exc: BaseException, what: str, error_of: NoMemory) -> MemoryLimitReached | None:
    """Return the error to report if an exception means a lack of memory, otherwise None."""
    if isinstance(exc, MemoryLimitReached):
        return exc
    if not is_short_of_memory(exc):
        return None
    found = _TORCH_BYTES.search(f"{exc} {exc.__cause__}")
    return error_of(what, int(found[1]) if found else None)


@final
class Memory:
    """A flat, contiguous tensor, and its memory as bytes.

    Borrowed memory may only be read; `give_back` returns it to its owner. `place` is for the owner of shared
    memory: its location, once looked up.
    """

    __slots__ = ("__weakref__", "_elements", "_part", "bytes", "give_back", "place", "tensor")

    def __init__(self, tensor: torch.Tensor, give_back: Callable[[], None] | None = None) -> None:
        self.tensor = tensor
        self.give_back = give_back
        self.place: tuple[int, int, int] | None = None
        self.bytes = bytes_of(tensor)
        self._part: tuple[torch.dtype, int, int] | None = None  # what `_elements` shows
        self._elements = tensor

    @property
    def borrowed(self) -> bool:
        """Whether it belongs to another owner, and may only be read."""
        return self.give_back is not None

    def elements(self, dtype: torch.dtype, low: int, high: int) -> torch.Tensor:
        """Return elements [low, high) of memory that holds `dtype`. Caches the last answer: steps repeat."""
        part = (dtype, low, high)
        if part != self._part:
            itemsize = dtype.itemsize
            self._elements = self.tensor.view(torch.uint8)[low * itemsize : high * itemsize].view(dtype)
            self._part = part
        return self._elements


EMPTY = Memory(torch.empty(0, dtype=torch.uint8, device="cpu"))


def fresh(size_bytes: int) -> Memory:
    """Return new, uninitialised uint8 memory.

    Raises:
        MemoryLimitReached: the system has none.
    """
    try:
        return Memory(torch.empty(size_bytes, dtype=torch.uint8, device="cpu"))
    except (RuntimeError, MemoryError) as exc:
        raise no_memory("what was sent", size_bytes) from exc


@final
class BufferPool:
    """Reuses the buffers for received payloads, since fresh memory costs a page fault per 4 KiB.

    Sizes are powers of two; the largest buffers have exactly the requested size. The pool keeps as many
    small buffers as were in use at one time. It keeps large ones only while steps need them, so that a
    single peak does not hold memory for ever. One thread at a time.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[Memory]] = {}
        self._large_takes = 0
        self._spare: dict[int, int] = {}  # by size, of large ones: how many stayed idle since the last sweep

    def take(self, size_bytes: int) -> Memory:
        """Return uninitialised uint8 memory of at least `size_bytes` bytes. Raises as `fresh`."""
        capacity = SMALLEST_BYTES if size_bytes <= SMALLEST_BYTES else 1 << (size_bytes - 1).bit_length()
        if size_bytes > EXACT_BYTES:  # rare, and rounding up would waste much
            capacity = size_bytes
        free = self._free.get(capacity)
        buffer = free.pop() if free else fresh(capacity)
        if capacity >= LARGE_BYTES:
            self._count_large(capacity, len(free) if free else 0)
        return buffer

    def _count_large(self, capacity: int, num_free: int) -> None:
        """Count a taken large buffer, with `num_free` of its size left; sweep if due."""
        if num_free < self._spare.get(capacity, 0):
            self._spare[capacity] = num_free
        self._large_takes += 1
        if self._large_takes == SWEEP_TAKES:
            self._large_takes = 0
            for size, num_spare in self._spare.items():
                del self._free[size][:num_spare]  # those in use are at the end
            self._free = {size: free for size, free in self._free.items() if free}
            self._spare = {size: len(free) for size, free in self._free.items() if size >= LARGE_BYTES}

    def give(self, buffer: Memory) -> None:
        """Take a buffer back, or return it to its owner if it is borrowed. It must not be used afterwards."""
        if buffer.give_back is not None:
            buffer.give_back()
            return
        self._free.setdefault(len(buffer.bytes), []).append(buffer)
