"""The memory of a server's values: slots, leased to readers and shared by small values.

A slot is one flat tensor that holds one or more slices. A reply leases a slot's memory until the bytes are
sent; an update that finds it leased moves the slot to fresh memory first. So no reader sees a half-written
value, and no reader blocks a writer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch

Allocate = Callable[[int], torch.Tensor]
"""Returns this many bytes of new, uninitialised uint8 memory.

Raises RuntimeError, MemoryError or OSError if there is none.
"""


def allocate_private(size_bytes: int) -> torch.Tensor:
    """Return private memory of this process."""
    return torch.empty(size_bytes, dtype=torch.uint8, device="cpu")


PACKED_BYTES = 32 << 10
"""Maximum size of slices that share slots, so that a list of small keys is one run of memory."""

PACKED_SLOT_BYTES = 128 << 10


@final
class Lease:
    """Counts the readers of one piece of memory."""

    __slots__ = ("readers",)

    def __init__(self) -> None:
        self.readers = 0


@final
class Slot:
    """A flat tensor, with the lease on its current memory.

    A `fixed` one is mapped by workers, and never moves: nobody gets a lease on it, but a copy.
    """

    __slots__ = ("_allocate", "fixed", "lease", "tensor")

    def __init__(
        self, tensor: torch.Tensor, allocate: Allocate = allocate_private, fixed: bool = False
    ) -> None:
        self.tensor = tensor
        self.fixed = fixed
        self.lease = Lease()
        self._allocate = allocate

    def make_writable(self) -> None:
        """Move to fresh memory if the current memory still has readers."""
        if self.lease.readers:
            self.replace(self.fresh().copy_(self.tensor))

    def fresh(self) -> torch.Tensor:
        """Return uninitialised memory of this slot's size and dtype."""
        return self._allocate(self.tensor.nbytes).view(self.tensor.dtype)

    def replace(self, tensor: torch.Tensor) -> None:
        """Switch to this memory. Readers of the old memory keep it until they are done."""
        self.tensor = tensor
        self.lease = Lease()


@final
class SlotAllocator:
    """Allocates places in slots: a slot of its own for a large slice, a shared one for small slices."""

    def __init__(self, allocate: Allocate = allocate_private) -> None:
        self._allocate = allocate
        self._open: dict[torch.dtype, tuple[Slot, int]] = {}

    def allocate(self, num_elems: int, dtype: torch.dtype) -> tuple[Slot, int]:
        """Return a slot and the offset in it, in elements, of `num_elems` fresh elements."""
        if num_elems * dtype.itemsize > PACKED_BYTES:
            return self._slot(num_elems * dtype.itemsize, dtype), 0
        slot, used = self._open.get(dtype, (None, 0))
        if slot is None or used + num_elems > slot.tensor.numel():
            slot, used = self._slot(PACKED_SLOT_BYTES, dtype), 0
        self._open[dtype] = (slot, used + num_elems)
        return slot, used

    def _slot(self, size_bytes: int, dtype: torch.dtype) -> Slot:
        return Slot(self._allocate(size_bytes).view(dtype), self._allocate)
