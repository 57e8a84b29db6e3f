"""Memory as both sides of a server see it: elements to the arithmetic, bytes to the transport.

Making the one view of a tensor from the other takes longer than adding up a small value. So memory that
is used again in every step keeps both.
"""

from __future__ import annotations

from typing import final

import torch

from tensorkv.arrays import bytes_of


@final
class Memory:
    """A flat, contiguous tensor, and its memory as writable bytes."""

    __slots__ = ("_elements", "_part", "bytes", "tensor")

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


@final
class BufferPool:
    """Memory for what is being received, used again and again: fresh memory costs a page fault per 4 KiB.

    Buffers come in powers of two. What is kept is at most what was in use at one time. `take` and `give`
    may be called from any thread: each is one operation on a list.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[Memory]] = {}

    def take(self, size_bytes: int) -> Memory:
        """Return uint8 memory of at least `size_bytes` bytes, of any content."""
        capacity = max(4096, 1 << (size_bytes - 1).bit_length()) if size_bytes else 4096
        if size_bytes > 8 << 20:  # rare, and rounding up would waste much
            capacity = size_bytes
        free = self._free.setdefault(capacity, [])
        try:
            return free.pop()
        except IndexError:
            return Memory(torch.empty(capacity, dtype=torch.uint8))

    def give(self, buffer: Memory) -> None:
        """Take a buffer back. Nobody may use it any more."""
        self._free.setdefault(len(buffer.bytes), []).append(buffer)
