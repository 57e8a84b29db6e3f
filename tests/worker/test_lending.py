"""Tensors in the window: how they lie to each other, and which chunks may stay where they are."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tensorkv.arrays import dtype_name
from tensorkv.errors import MemoryLimitReached
from tensorkv.transport import unix
from tensorkv.transport.unix import UnixConnection, UnixListener
from tensorkv.wire import messages as m
from tensorkv.worker import lending
from tensorkv.worker.lending import empty_tensors, spans_of
from tensorkv.worker.plans import KeyState, build_plan
from tensorkv.worker.window import Window


@pytest.fixture
def window() -> Iterator[Window]:
    """A window that a server shares."""
    listener = UnixListener()
    connection, other = unix.connect(listener.address[0], 10.0), listener.accept()
    listener.close()
    assert isinstance(connection, UnixConnection)
    made = Window()
    made.open_to(connection, lambda frame, sent: sent and sent())
    yield made
    connection.close()
    other.close()


def state(
    number: int, num_elems: int, slices: list[tuple[int, int, int]], dtype: torch.dtype = torch.float32
) -> KeyState:
    """Return a key with slices given as (server, start, stop)."""
    entries = [m.SliceEntry(100 * number + i, *each) for i, each in enumerate(slices)]
    return KeyState.of(m.KeyEntry(f"k{number}", number, (num_elems,), dtype_name(dtype), m.EPOCH, entries))


STATES = [
    state(1, 10_000, [(0, 0, 10_000)]),
    state(2, 5_001, [(1, 0, 5_001)]),
    state(3, 3, [(0, 0, 3)]),
    state(4, 64_000, [(0, 0, 32_000), (1, 32_000, 64_000)]),
    state(5, 7_000, [(0, 0, 7_000)]),
    state(6, 100, [(1, 0, 100)]),
]


def plan_of(values: list[torch.Tensor], states: list[KeyState] = STATES) -> Any:
    return build_plan(1, states, [value.dtype for value in values], [1] * len(states), 2, alone={4})


def stay(window: Window, values: list[torch.Tensor], states: list[KeyState] = STATES) -> set[str]:
    """Return the keys that are lent where they lie when these values are pushed."""
    plan = plan_of(values, states)
    spans = spans_of(window, plan, values)
    kept = (chunk for (_, _, chunk), span in zip(plan.frames, spans, strict=True) if span)
    return {states[piece.value].key for chunk in kept for piece in chunk.pieces}


def test_without_a_window_they_are_tensors_like_any_other() -> None:
    window = Window()
    found = empty_tensors(window, STATES)
    assert [each.shape for each in found] == [each.shape for each in STATES]
    assert not window.lends


def test_what_one_server_has_lies_together(window: Window) -> None:
    found = empty_tensors(window, STATES)
    assert [(each.shape, each.dtype) for each in found] == [(each.shape, each.dtype) for each in STATES]
    starts = [each.data_ptr() for each in found]
    assert starts[2] - starts[0] == found[0].nbytes
    assert starts[4] - starts[2] == found[2].nbytes
    assert starts[5] - starts[1] == found[1].nbytes
    assert window.lends


def test_tensors_of_other_dtypes_are_aligned(window: Window) -> None:
    states = [
        state(1, 3, [(0, 0, 3)], torch.bfloat16),
        state(2, 5, [(0, 0, 5)], torch.float64),
        state(3, 7, [(0, 0, 7)], torch.bfloat16),
    ]
    found = empty_tensors(window, states)
    assert all(each.data_ptr() % each.itemsize == 0 for each in found)
    assert found[2].data_ptr() - found[0].data_ptr() == found[0].nbytes


def test_every_chunk_of_tensors_that_were_handed_out_together_stays(window: Window) -> None:
    values = empty_tensors(window, STATES)
    plan = plan_of(values)
    spans = spans_of(window, plan, values)
    assert all(spans)
    assert [len(part.chunks) for part in plan.parts] == [2, 2]  # what is whole, and what is sliced
    for (_, _, chunk), span in zip(plan.frames, spans, strict=True):
        first = chunk.pieces[0]
        start = values[first.value].data_ptr() + first.start * 4
        assert span == (*window.where(start, chunk.size_bytes), chunk.size_bytes)


def test_the_tensors_of_the_last_push_are_known(window: Window, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only if they are the very same, where they were, in the same order of elements."""
    square = KeyState.of(m.KeyEntry("s", 1, (64, 64), "float32", m.EPOCH, [m.SliceEntry(100, 0, 0, 64 * 64)]))
    looked: list[int] = []
    real = lending._address
    monkeypatch.setattr(lending, "_address", lambda value: looked.append(1) or real(value))
    (value,) = empty_tensors(window, [square])
    plan = plan_of([value], [square])
    spans = spans_of(window, plan, [value])
    looked.clear()
    assert spans_of(window, plan, [value]) == spans != [None]
    assert not looked
    alias = value.view(64, 64)
    assert spans_of(window, plan, [alias]) == spans
    assert looked
    alias.t_()  # the same object, at the same place
    assert spans_of(window, plan, [alias]) == [None]
    (other,) = empty_tensors(window, [square])
    value.set_(other)  # type: ignore[no-untyped-call]
    assert spans_of(window, plan, [value]) != spans
    spans_of(window, plan, [value])
    assert lending._known_spans(plan, [value]) is not None
    assert lending._known_spans(plan, [other]) is None


def test_tensors_of_another_list_stay_if_they_are_adjacent_or_alone(window: Window) -> None:
    """In runs of the list, and in chunks of their own. The others are copied."""
    values, others = empty_tensors(window, STATES), empty_tensors(window, STATES)
    assert stay(window, values[2:], STATES[2:]) == {"k3", "k4", "k5", "k6"}
    assert stay(window, values[::-1], STATES[::-1]) == {"k4"}
    assert stay(window, values[:1] + values[3:], STATES[:1] + STATES[3:]) == {"k4", "k6"}  # k3 lay between
    assert stay(window, [*values[:3], *others[3:]]) == {"k4"}
    for number, each in enumerate(STATES):
        assert stay(window, [values[number]], [each]) == {each.key}


def test_tensors_outside_the_window_are_copied_with_what_travels_with_them(window: Window) -> None:
    values = empty_tensors(window, STATES)
    values[4] = torch.empty(7_000)
    assert stay(window, values) == {"k2", "k4", "k6"}


def test_a_tensor_in_another_order_or_pushed_twice_does_not_stay_where_it_cannot(window: Window) -> None:
    square = state(1, 10_000, [(0, 0, 10_000)])
    (value,) = empty_tensors(window, [square])
    turned = value.view(100, 100).t()
    assert spans_of(window, plan_of([value], [square]), [turned]) == [None]
    twice = [square, state(2, 10_000, [(0, 0, 10_000)])]
    assert spans_of(window, plan_of([value, value], twice), [value, value]) == [None]


def test_a_sparse_tensor_lies_nowhere(window: Window) -> None:
    sparse = torch.eye(3).to_sparse()
    state_of_it = KeyState.of(m.KeyEntry("s", 1, (3, 3), "float32", m.EPOCH, [m.SliceEntry(100, 0, 0, 9)]))
    assert stay(window, [sparse], [state_of_it]) == set()


def test_a_system_without_memory_is_told_of_with_the_size(
    window: Window, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, flags: int) -> int:
        raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(MemoryLimitReached, match="no shared memory of 40000 bytes: .*no memory"):
        empty_tensors(window, STATES[:1])
