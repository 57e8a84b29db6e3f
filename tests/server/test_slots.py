"""Slots: shared memory of small values, and leases."""

from __future__ import annotations

import torch

from tensorkv.server.slots import PACKED_BYTES, PACKED_SLOT_BYTES, Slot, SlotAllocator


def test_a_slot_that_is_lent_moves_before_it_is_written() -> None:
    slot = Slot(torch.ones(3))
    memory, lease = slot.tensor, slot.lease
    slot.make_writable()
    assert slot.tensor is memory
    lease.readers += 1
    slot.make_writable()
    slot.tensor.zero_()
    assert memory.tolist() == [1.0, 1.0, 1.0]
    assert slot.lease is not lease
    slot.make_writable()  # the lease on the old memory does not concern the new
    assert slot.tensor.tolist() == [0.0, 0.0, 0.0]
    lease.readers -= 1
    assert slot.lease.readers == 0


def test_small_values_of_one_dtype_share_a_slot_and_large_ones_do_not() -> None:
    slots = SlotAllocator()
    first, at = slots.allocate(10, torch.float32)
    second, behind = slots.allocate(20, torch.float32)
    other, start = slots.allocate(5, torch.float64)
    large, zero = slots.allocate(PACKED_BYTES // 4 + 1, torch.float32)
    assert (first is second, at, behind) == (True, 0, 10)
    assert (other is first, start, other.tensor.dtype) == (False, 0, torch.float64)
    assert (large.tensor.numel(), zero) == (PACKED_BYTES // 4 + 1, 0)
    assert slots.allocate(1, torch.float32) == (first, 30)


def test_a_full_slot_is_followed_by_another() -> None:
    slots = SlotAllocator()
    per_slot = PACKED_SLOT_BYTES // PACKED_BYTES
    found = [slots.allocate(PACKED_BYTES // 4, torch.float32) for _ in range(per_slot + 1)]
    assert len({id(slot) for slot, _ in found}) == 2
    assert [offset for _, offset in found][-2:] == [(per_slot - 1) * PACKED_BYTES // 4, 0]
    slots.allocate(0, torch.float32)


def test_memory_is_taken_where_it_was_asked_to_be() -> None:
    """That of new slots, and that to which one moves when it is lent."""
    taken: list[int] = []

    def allocate(size_bytes: int) -> torch.Tensor:
        taken.append(size_bytes)
        return torch.empty(size_bytes, dtype=torch.uint8)

    slots = SlotAllocator(allocate)
    slot, _ = slots.allocate(PACKED_BYTES, torch.float64)
    slot.tensor.fill_(3)
    slot.lease.readers += 1
    slot.make_writable()
    assert bool((slot.tensor == 3).all())
    slots.allocate(1, torch.float32)
    assert taken == [PACKED_BYTES * 8, PACKED_BYTES * 8, PACKED_SLOT_BYTES]
