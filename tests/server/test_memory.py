"""Memory as elements and as bytes, and the pool of buffers."""

from __future__ import annotations

import errno
import weakref

import numpy as np
import pytest
import torch

from tensorkv.errors import MemoryLimitReached, UpdaterError
from tensorkv.server.memory import (
    EXACT_BYTES,
    LARGE_BYTES,
    SWEEP_TAKES,
    BufferPool,
    Memory,
    is_short_of_memory,
    no_memory,
    short_of,
)


def test_bytes_and_elements_are_one_memory() -> None:
    memory = Memory(torch.zeros(16, dtype=torch.uint8))
    memory.bytes[4:8] = memoryview(b"\x00\x00\x80\x3f")
    assert memory.elements(torch.float32, 0, 2).tolist() == [0.0, 1.0]
    assert memory.elements(torch.float32, 1, 4).tolist() == [1.0, 0.0, 0.0]
    assert memory.elements(torch.int16, 3, 4).tolist() == [0x3F80]
    assert memory.elements(torch.float32, 1, 4).tolist() == [1.0, 0.0, 0.0]
    memory.elements(torch.float32, 0, 2).fill_(1.0)
    assert memory.bytes[:8].tobytes() == b"\x00\x00\x80\x3f" * 2


@pytest.mark.parametrize("size_bytes", [0, 1, 4096, 4097, 100_000, (8 << 20) + 1])
def test_a_buffer_is_large_enough_and_used_again(size_bytes: int) -> None:
    pool = BufferPool()
    buffer = pool.take(size_bytes)
    assert buffer.tensor.dtype == torch.uint8
    assert size_bytes <= buffer.tensor.numel() == len(buffer.bytes) <= max(4096, 2 * size_bytes)
    other = pool.take(size_bytes)
    assert other.tensor.data_ptr() != buffer.tensor.data_ptr()
    pool.give(buffer)
    assert pool.take(size_bytes) is buffer


def test_memory_that_is_not_there_is_refused() -> None:
    for size_bytes in (1 << 60, (1 << 62) + 1):
        with pytest.raises(MemoryLimitReached, match=f"no memory for {size_bytes} bytes of what was sent"):
            BufferPool().take(size_bytes)


def test_large_buffers_of_sizes_that_nobody_asks_for_any_more_are_freed() -> None:
    pool = BufferPool()
    for size_bytes in (LARGE_BYTES, EXACT_BYTES + 1):
        first = pool.take(size_bytes)
        pool.give(first)
        for _ in range(2 * SWEEP_TAKES):
            assert pool.take(size_bytes) is first
            pool.give(first)
        freed = weakref.ref(first)
        del first
        small = pool.take(100)
        pool.give(small)
        for number in range(2 * SWEEP_TAKES):
            pool.give(pool.take(EXACT_BYTES + 2 + number % 2))
        assert freed() is None
        assert pool.take(100) is small
        pool.give(small)


def test_what_was_in_use_in_one_moment_only_is_freed() -> None:
    pool = BufferPool()
    buffers = [pool.take(LARGE_BYTES) for _ in range(9)]
    alive = [weakref.ref(buffer) for buffer in buffers]
    while buffers:
        pool.give(buffers.pop())
    for _ in range(SWEEP_TAKES):  # every step needs three at a time
        taken = [pool.take(LARGE_BYTES) for _ in range(3)]
        for buffer in taken:
            pool.give(buffer)
    del buffer, taken
    assert sum(each() is not None for each in alive) == 3
    three = [pool.take(LARGE_BYTES) for _ in range(3)]
    assert {id(buffer) for buffer in three} == {id(each()) for each in alive if each() is not None}


def test_what_is_borrowed_goes_back_to_its_owner_and_not_into_the_pool() -> None:
    returned: list[str] = []
    pool = BufferPool()
    borrowed = Memory(torch.zeros(4096, dtype=torch.uint8), lambda: returned.append("back"))
    assert borrowed.borrowed
    assert not pool.take(4096).borrowed
    pool.give(borrowed)
    assert returned == ["back"]
    assert pool.take(4096) is not borrowed


def real_errors() -> list[Exception]:
    """What torch, NumPy and the system raise where there is no memory."""
    found: list[Exception] = [MemoryError(), OSError(errno.ENOMEM, "no"), OSError(errno.EMFILE, "no")]
    for make in (
        lambda: torch.empty(1 << 60, dtype=torch.uint8),
        lambda: np.empty(1 << 60, np.uint8),
        lambda: torch.zeros(1).expand(1 << 60).clone(),
        lambda: bytearray(1 << 62),
    ):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            make()
        found.append(caught.value)
    return found


def test_every_error_of_missing_memory_is_known_as_such() -> None:
    for error in real_errors():
        assert is_short_of_memory(error), repr(error)
        told = UpdaterError("updater 'sgd' raised on key 'w'")
        told.__cause__ = error
        assert isinstance(short_of(told, "an update", no_memory), MemoryLimitReached)
    for other in (RuntimeError("size mismatch"), OSError(errno.EACCES, "no"), ValueError("memory"), None):
        assert not is_short_of_memory(other)


def test_the_error_names_the_bytes_that_torch_has_asked_for() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    error = short_of(caught.value, "a save", no_memory)
    assert str(error) == f"a server has no memory for {1 << 60} bytes of a save"
    assert short_of(KeyError("w"), "a save", no_memory) is None
