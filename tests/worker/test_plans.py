"""Plans: every element of every key, once, in chunks of one dtype that are not too long."""

from __future__ import annotations

import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from tensorkv.arrays import dtype_name
from tensorkv.config import MAX_SLICE_BYTES
from tensorkv.wire import messages as m
from tensorkv.worker.plans import COALESCE_BYTES, KeyState, build_plan


def key(
    number: int, shape: tuple[int, ...], dtype: torch.dtype, slices: list[tuple[int, int, int]]
) -> KeyState:
    """Return a key with slices given as (server, start, stop)."""
    entries = [m.SliceEntry(100 * number + i, *each) for i, each in enumerate(slices)]
    return KeyState.of(m.KeyEntry(f"k{number}", number, shape, dtype_name(dtype), m.EPOCH, entries))


def test_a_key_as_a_worker_knows_it() -> None:
    state = key(7, (2, 3), torch.float16, [(0, 0, 6)])
    assert (state.key, state.key_id, state.num_elems) == ("k7", 7, 6)
    assert (state.shape, state.dtype) == (torch.Size([2, 3]), torch.float16)


@pytest.mark.parametrize(
    ("dtypes", "shapes", "fits"),
    [
        ([torch.float32, torch.float16], [(2, 3), ()], True),
        ([torch.float32, torch.float32], [(2, 3), ()], False),
        ([torch.float32, torch.float16], [(6,), ()], False),
        ([torch.float32, torch.float16], [(2, 3), (1,)], False),
    ],
)
def test_values_fit_that_have_the_dtypes_and_shapes_of_a_plan(
    dtypes: list[torch.dtype], shapes: list[tuple[int, ...]], fits: bool
) -> None:
    states = [key(1, (2, 3), torch.float32, [(0, 0, 6)]), key(2, (), torch.float32, [(0, 0, 1)])]
    plan = build_plan(1, states, [torch.float32, torch.float16], [1, 1], 1)
    values = [torch.zeros(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    assert plan.fits(values) is fits


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_fits_no_plan() -> None:
    plan = build_plan(1, [key(1, (2, 3), torch.float32, [(0, 0, 6)])], [torch.float32], [1], 1)
    assert not plan.fits([torch.nested.nested_tensor([torch.zeros(3), torch.zeros(2)])])


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=80)
def test_every_element_travels_once_and_both_ends_agree(data: st.DataObject) -> None:
    num_servers = data.draw(st.integers(1, 3))
    dtypes = [torch.float32, torch.float64, torch.float16]
    states, pushed, counts = [], [], []
    for number in range(1, 1 + data.draw(st.integers(1, 6))):
        size = data.draw(st.sampled_from([0, 1, 5, 3000, 40_000, 600_000]))
        step = data.draw(st.sampled_from([max(size, 1), 16 * (1 + size // 50)]))
        slices = [
            (data.draw(st.integers(0, num_servers - 1)), low, min(low + step, size))
            for low in range(0, max(size, 1), step)
        ]
        states.append(key(number, (size,), data.draw(st.sampled_from(dtypes)), slices))
        pushed.append(data.draw(st.sampled_from(dtypes)))
        counts.append(data.draw(st.integers(0, 2)))
    alone = set(data.draw(st.lists(st.integers(1, 6), max_size=3)))
    plan = build_plan(1, states, pushed, counts, num_servers, alone)
    seen: list[tuple[int, int, int]] = []
    for part in plan.parts:
        ids: list[int] = []
        values: list[int] = []
        for chunk, entry in zip(part.chunks, part.entries, strict=True):
            low = 0
            for piece, slice_id, length, count in zip(
                chunk.pieces, entry.slice_ids, entry.lengths, entry.counts, strict=True
            ):
                state = states[piece.value]
                assert piece.low == low
                assert length == piece.stop - piece.start
                assert piece.whole == (length == state.num_elems)
                assert (pushed[piece.value], state.dtype) == (chunk.dtype, chunk.stored_dtype)
                assert count == counts[piece.value]
                assert chunk.absent == (count == 0) == (entry.payload.kind == "absent")
                widest = max(chunk.dtype.itemsize, chunk.stored_dtype.itemsize)
                assert piece.small == (length * widest <= COALESCE_BYTES)
                seen.append((piece.value, piece.start, piece.stop))
                ids.append(slice_id)
                values.append(piece.value)
                low += length
            assert low == chunk.num_elems
            too_long = (
                chunk.num_elems * max(chunk.dtype.itemsize, chunk.stored_dtype.itemsize) > MAX_SLICE_BYTES
            )
            assert not too_long or len(chunk.pieces) == 1
            assert len(chunk.pieces) == 1 or not alone & {states[each.value].key_id for each in chunk.pieces}
        assert values == part.values
        in_order = sorted(states, key=lambda state: state.key_id in alone)
        assert ids == [e.slice_id for s in in_order for e in s.entry.slices if e.server == part.server]
    expected = [(i, e.start, e.stop) for i, s in enumerate(states) for e in s.entry.slices]
    assert sorted(seen) == sorted(expected)
    frames = [(part.server, place, chunk) for part in plan.parts for place, chunk in enumerate(part.chunks)]
    assert plan.frames == frames
    assert plan.num_lending == sum(chunk.lends for _, _, chunk in frames)
    assert plan.key_ids == frozenset(state.key_id for state in states)


@pytest.mark.parametrize(
    ("shapes", "picked", "one_dim"),
    [
        ([(3,), (4,)], True, True),
        ([(3,), (2, 2)], True, False),
        ([(3,)], True, True),
        ([(3,), (COALESCE_BYTES,)], False, False),
    ],
)
def test_chunks_of_small_whole_values_have_a_short_way(
    shapes: list[tuple[int, ...]], picked: bool, one_dim: bool
) -> None:
    states = [
        key(i, shape, torch.float32, [(0, 0, math.prod(shape))]) for i, shape in enumerate(shapes, start=1)
    ]
    plan = build_plan(1, states, [torch.float32] * len(shapes), [1] * len(shapes), 1)
    chunk = plan.parts[0].chunks[0]
    assert (chunk.pick is not None) == picked
    assert chunk.one_dim == one_dim
    if chunk.pick is not None:
        values = [torch.ones(shape) for shape in shapes]
        assert all(one is other for one, other in zip(chunk.pick(values), values, strict=True))
