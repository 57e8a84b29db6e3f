"""Memory as both sides of a server see it: elements to the arithmetic, bytes to the transport.

Making the one view of a tensor from the other takes longer than adding up a small value. So memory that
is used again in every step keeps both.
"""

from __future__ import annotations

from typing import final

import torch

from tensorkv.arrays import bytes_of
from tensorkv.errors import ProtocolError

LARGE_BYTES = 8 << 20
IDLE_TAKES = 256
"""A large buffer is freed when so many other large ones have been taken since it was used."""


@final
class Memory:
    """A flat, contiguous tensor, and its memory as writable bytes."""

    __slots__ = ("__weakref__", "_elements", "_part", "bytes", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.bytes = bytes_of(tensor)
        self._part: tuple[torch.dtype, int, int] | None = None  # what `_elements` shows
        self._elements = tensor

    def elements(self, dtype: torch.dtype, low: int, high: int) -> torch.Tensor:
        """Return elements [low, high) of memory that holds `dtype`. The last answer is kept: steps repeat."""
        part = (dtype, low, high)
        if part != self._part:
            itemsize = dtype.itemsize
            self._elements = self.tensor.view(torch.uint8)[low * itemsize : high * itemsize].view(dtype)
            self._part = part
        return self._elements


EMPTY = Memory(torch.empty(0, dtype=torch.uint8))


def fresh(size_bytes: int) -> Memory:
    """Return new uint8 memory, of any content.

    Raises:
        ProtocolError: the system has none; who announced so many bytes is not served.
    """
    try:
        return Memory(torch.empty(size_bytes, dtype=torch.uint8))
    except (RuntimeError, MemoryError) as exc:
        raise ProtocolError(f"there is no memory for a payload of {size_bytes} bytes") from exc


@final
class BufferPool:
    """Memory for what is being received, used again and again: fresh memory costs a page fault per 4 KiB.

    Buffers come in powers of two, and what is kept is at most what was in use at one time. Large ones are
    just as large as they were asked for; those of a size that is not used any more are freed. One thread
    at a time.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[Memory]] = {}
        self._large_takes = 0
        self._last_take: dict[int, int] = {}  # of large buffers, by size

    def take(self, size_bytes: int) -> Memory:
        """Return uint8 memory of at least `size_bytes` bytes, of any content. Errors as `fresh`."""
        capacity = max(4096, 1 << (size_bytes - 1).bit_length()) if size_bytes else 4096
        if size_bytes > LARGE_BYTES:  # rare, and rounding up would waste much
            capacity = size_bytes
            self._free_idle(size_bytes)
        free = self._free.setdefault(capacity, [])
        try:
            return free.pop()
        except IndexError:
            return fresh(capacity)

    def _free_idle(self, size_bytes: int) -> None:
        """A large buffer is asked for: free those of sizes that nobody has asked for since long."""
        self._large_takes += 1
        self._last_take[size_bytes] = self._large_takes
        long_ago = self._large_takes - IDLE_TAKES
        for idle in [size for size, last in self._last_take.items() if last <= long_ago]:
            del self._last_take[idle]
            self._free.pop(idle, None)

    def give(self, buffer: Memory) -> None:
        """Take a buffer back. Nobody may use it any more."""
        self._free.setdefault(len(buffer.bytes), []).append(buffer)
