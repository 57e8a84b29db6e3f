"""Memory as both sides of a server see it: elements to the arithmetic, bytes to the transport.

Making the one view of a tensor from the other takes longer than adding up a small value. So memory that
is used again in every step keeps both.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from typing import final

import torch

from tensorkv.arrays import bytes_of
from tensorkv.errors import MemoryLimitReached

LARGE_BYTES = 1 << 20
EXACT_BYTES = 8 << 20
SWEEP_TAKES = 256
"""So often large buffers are taken until those are freed that nobody has needed meanwhile."""


NoMemory = Callable[[str, int | None], MemoryLimitReached]
"""Makes the error of a call for which there is no memory: what for, and how many bytes, if that is known."""

_SHORT = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)
_TORCH_SHORT = re.compile(
    r"(can.t allocate|not enough|unable to allocate|out of) memory|unable to mmap", re.IGNORECASE
)
_TORCH_BYTES = re.compile(r"allocate (\d+) bytes")


def no_memory(what: str, size_bytes: int | None = None) -> MemoryLimitReached:
    """Return the error of a server that knows nothing of its limits."""
    size = "" if size_bytes is None else f"{size_bytes} bytes of "
    return MemoryLimitReached(f"a server has no memory for {size}{what}")


def is_short_of_memory(exc: BaseException | None) -> bool:
    """Whether an exception, or its cause, says that the system has no memory, or no descriptor for it."""
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
    """Return the error to tell if an exception is that of missing memory, else None."""
    if isinstance(exc, MemoryLimitReached):
        return exc
    if not is_short_of_memory(exc):
        return None
    found = _TORCH_BYTES.search(f"{exc} {exc.__cause__}")
    return error_of(what, int(found[1]) if found else None)


@final
class Memory:
    """A flat, contiguous tensor, and its memory as bytes.

    Borrowed memory may only be read; `give_back` tells its owner that nobody does any more. `place` is for
    the owner of memory that is shared: where it is, if that was looked up.
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
        """Whether it is not the store's, and may only be read."""
        return self.give_back is not None

    def elements(self, dtype: torch.dtype, low: int, high: int) -> torch.Tensor:
        """Return elements [low, high) of memory that holds `dtype`. The last answer is kept: steps repeat."""
        part = (dtype, low, high)
        if part != self._part:
            itemsize = dtype.itemsize
            self._elements = self.tensor.view(torch.uint8)[low * itemsize : high * itemsize].view(dtype)
            self._part = part
        return self._elements


EMPTY = Memory(torch.empty(0, dtype=torch.uint8, device="cpu"))


def fresh(size_bytes: int) -> Memory:
    """Return new uint8 memory, of any content.

    Raises:
        MemoryLimitReached: the system has none.
    """
    try:
        return Memory(torch.empty(size_bytes, dtype=torch.uint8, device="cpu"))
    except (RuntimeError, MemoryError) as exc:
        raise no_memory("what was sent", size_bytes) from exc


@final
class BufferPool:
    """Memory for what is being received, used again and again: fresh memory costs a page fault per 4 KiB.

    Buffers come in powers of two, the largest just as large as they were asked for. Small ones are kept, as
    many as were in use at one time; large ones while steps need them: one moment in which much was in use
    is no reason to keep so much for ever. One thread at a time.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[Memory]] = {}
        self._large_takes = 0
        self._spare: dict[int, int] = {}  # of large ones, by size: so many lay free since the last sweep

    def take(self, size_bytes: int) -> Memory:
        """Return uint8 memory of at least `size_bytes` bytes, of any content. Errors as `fresh`."""
        capacity = max(4096, 1 << (size_bytes - 1).bit_length()) if size_bytes else 4096
        if size_bytes > EXACT_BYTES:  # rare, and rounding up would waste much
            capacity = size_bytes
        free = self._free.setdefault(capacity, [])
        try:
            buffer = free.pop()
        except IndexError:
            buffer = fresh(capacity)
        if capacity >= LARGE_BYTES:
            self._count_large(capacity, len(free))
        return buffer

    def _count_large(self, capacity: int, num_free: int) -> None:
        """A large buffer is taken, and `num_free` of its size are left; sweep now and then."""
        if num_free < self._spare.get(capacity, 0):
            self._spare[capacity] = num_free
        self._large_takes += 1
        if self._large_takes == SWEEP_TAKES:
            self._large_takes = 0
            for size, num_spare in self._spare.items():
                del self._free[size][:num_spare]  # the last ones are those in use
            self._free = {size: free for size, free in self._free.items() if free}
            self._spare = {size: len(free) for size, free in self._free.items() if size >= LARGE_BYTES}

    def give(self, buffer: Memory) -> None:
        """Take a buffer back, or give it back if it is borrowed. Nobody may use it any more."""
        if buffer.give_back is not None:
            buffer.give_back()
            return
        self._free.setdefault(len(buffer.bytes), []).append(buffer)
