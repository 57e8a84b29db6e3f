"""Where a server keeps its values: slots of memory, leased to readers, shared by small values.

A slot is one flat tensor that holds one or more slices. A reply lends a slot's memory to the transport
until the bytes are sent; an update that finds it lent moves the slot to fresh memory first. So nobody
reads a half-written value, and no reader stops a writer.
"""

from __future__ import annotations

from typing import final

import torch

SMALL_BYTES = 64 << 10
"""Slices up to this size share slots, so that a list of small keys is one run of memory."""

SHARED_SLOT_BYTES = 1 << 20


@final
class Lease:
    """Counts who is reading one piece of memory."""

    __slots__ = ("readers",)

    def __init__(self) -> None:
        self.readers = 0


@final
class Slot:
    """A flat tensor, with the lease on its present memory."""

    __slots__ = ("lease", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.lease = Lease()

    def make_writable(self) -> None:
        """Move to fresh memory if somebody still reads the present one."""
        if self.lease.readers:
            self.tensor = self.tensor.clone()
            self.lease = Lease()


@final
class SlotAllocator:
    """Hands out places in slots: a slot of its own for a large slice, a shared one for small slices."""

    def __init__(self) -> None:
        self._open: dict[torch.dtype, tuple[Slot, int]] = {}

    def allocate(self, num_elems: int, dtype: torch.dtype) -> tuple[Slot, int]:
        """Return a slot and the offset in it, in elements, of `num_elems` fresh elements."""
        if num_elems * dtype.itemsize > SMALL_BYTES:
            return Slot(torch.empty(num_elems, dtype=dtype)), 0
        slot, used = self._open.get(dtype, (None, 0))
        if slot is None or used + num_elems > slot.tensor.numel():
            slot, used = Slot(torch.zeros(SHARED_SLOT_BYTES // dtype.itemsize, dtype=dtype)), 0
        self._open[dtype] = (slot, used + num_elems)
        return slot, used


@final
class BufferPool:
    """Memory for what is being received, used again and again: fresh memory costs a page fault per 4 KiB.

    Buffers come in powers of two. What is kept is at most what was in use at one time. `take` and `give`
    may be called from any thread: each is one operation on a list.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[torch.Tensor]] = {}

    def take(self, size_bytes: int) -> torch.Tensor:
        """Return a uint8 tensor of at least `size_bytes` bytes, of any content."""
        capacity = max(4096, 1 << (size_bytes - 1).bit_length()) if size_bytes else 4096
        if size_bytes > 8 << 20:  # rare, and rounding up would waste much
            capacity = size_bytes
        free = self._free.setdefault(capacity, [])
        try:
            return free.pop()
        except IndexError:
            return torch.empty(capacity, dtype=torch.uint8)

    def give(self, buffer: torch.Tensor) -> None:
        """Take a buffer back. Nobody may use it any more."""
        self._free.setdefault(buffer.numel(), []).append(buffer)
