"""Which server holds which part of which value: every element once, bytes balanced, cuts at 64."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tensorkv.partition import CUT_ELEMS, Part, ValueSize, place

SIZES = st.builds(
    ValueSize,
    num_elems=st.integers(0, 5000),
    itemsize_bytes=st.sampled_from([1, 2, 4, 8, 16]),
    sliceable=st.booleans(),
)


@given(
    sizes=st.lists(SIZES, min_size=1, max_size=8),
    load=st.lists(st.integers(0, 10_000), min_size=1, max_size=5),
    bound_bytes=st.integers(0, 8000),
    max_slice_bytes=st.integers(1, 8000),
)
def test_every_element_has_one_place(
    sizes: list[ValueSize], load: list[int], bound_bytes: int, max_slice_bytes: int
) -> None:
    parts = place(sizes, load, bound_bytes=bound_bytes, max_slice_bytes=max_slice_bytes)
    assert len(parts) == len(sizes)
    for size, of_value in zip(sizes, parts, strict=True):
        assert of_value  # an empty value too lives somewhere
        assert [part.start for part in of_value] == [0, *(part.stop for part in of_value[:-1])]
        assert of_value[-1].stop == size.num_elems
        assert all(part.start % CUT_ELEMS == 0 for part in of_value)
        assert all(0 <= part.server < len(load) for part in of_value)
        if not size.sliceable:
            assert len(of_value) == 1
        limit = max(max_slice_bytes, CUT_ELEMS * size.itemsize_bytes)
        if size.sliceable:
            assert all((part.stop - part.start) * size.itemsize_bytes <= limit for part in of_value)


def floats(num_elems: int, sliceable: bool = True) -> ValueSize:
    return ValueSize(num_elems, 4, sliceable)


def test_a_small_value_is_whole_on_the_emptiest_server() -> None:
    parts = place([floats(100)], [500, 200, 300], bound_bytes=400, max_slice_bytes=4096)
    assert parts == [[Part(1, 0, 100)]]


def test_a_value_over_the_bound_is_cut_over_all_servers() -> None:
    parts = place([floats(301)], [0, 0], bound_bytes=400, max_slice_bytes=4096)
    assert parts == [[Part(0, 0, 128), Part(1, 128, 301)]]


def test_one_that_must_stay_whole_does() -> None:
    parts = place([floats(5000, sliceable=False)], [9, 0], bound_bytes=4, max_slice_bytes=64)
    assert parts == [[Part(1, 0, 5000)]]


def test_slices_have_a_limit_on_a_single_server_too() -> None:
    parts = place([floats(300)], [0], bound_bytes=4, max_slice_bytes=400)
    assert parts == [
        [Part(0, 0, 64), Part(0, 64, 128), Part(0, 128, 192), Part(0, 192, 256), Part(0, 256, 300)]
    ]


def test_bytes_are_balanced_the_largest_first() -> None:
    sizes = [floats(10), floats(10), floats(80), floats(60)]
    parts = place(sizes, [0, 0], bound_bytes=1 << 20, max_slice_bytes=1 << 20)
    assert [of_value[0].server for of_value in parts] == [1, 1, 0, 1]


def test_the_load_it_is_given_stays_as_it_is() -> None:
    load = [3, 4]
    place([floats(10)], load, bound_bytes=1, max_slice_bytes=64)
    assert load == [3, 4]
