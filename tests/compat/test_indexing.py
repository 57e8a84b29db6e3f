"""Shapes and indices are those of MXNet 1.9.1: the tables hold what it returned."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tensorkv.compat import mxnet as mx
from tensorkv.compat.indexing import reshaped, torch_index

nd = mx.nd
ALL = slice(None)


def square() -> Any:
    """Return an array of the numbers 0 to 8 in three rows."""
    return nd.array(np.arange(9).reshape(3, 3))


# ---- reading ---------------------------------------------------------------------------------------

VIEWS: list[tuple[Any, tuple[int, ...], list[int]]] = [
    (0, (3,), [0, 1, 2]),
    (-1, (3,), [6, 7, 8]),
    (np.int64(1), (3,), [3, 4, 5]),
    (ALL, (3, 3), list(range(9))),
    ((), (3, 3), list(range(9))),
    (..., (3, 3), list(range(9))),
    (None, (1, 3, 3), list(range(9))),
    (slice(0, 1), (1, 3), [0, 1, 2]),
    (slice(-2, None), (2, 3), [3, 4, 5, 6, 7, 8]),
    (slice(None, None, 5), (1, 3), [0, 1, 2]),
    ((0, 1), (1,), [1]),
    ((1, slice(0, 2)), (2,), [3, 4]),
    ((1, slice(None, None, 3)), (1,), [3]),
    ((slice(0, 1), slice(1, 3)), (1, 2), [1, 2]),
    ((slice(0, 1), -1), (1,), [2]),
    ((slice(0, 2), slice(0, 3)), (2, 3), [0, 1, 2, 3, 4, 5]),
    ((slice(0, 2), None), (2, 1, 3), [0, 1, 2, 3, 4, 5]),
    ((0, ...), (3,), [0, 1, 2]),
]
"""What lies in one piece in memory: an index, the shape and the numbers that it selects."""

COPIES: list[tuple[Any, tuple[int, ...], list[int]]] = [
    ((ALL, 1), (3,), [1, 4, 7]),
    ((..., 0), (3,), [0, 3, 6]),
    ((ALL, slice(1, 2)), (3, 1), [1, 4, 7]),
    ((ALL, slice(1, 2), None), (3, 1, 1), [1, 4, 7]),
    ((slice(0, 2), slice(0, 2)), (2, 2), [0, 1, 3, 4]),
    ((slice(1, 2), slice(None, None, 2)), (1, 2), [3, 5]),
    (slice(None, None, 2), (2, 3), [0, 1, 2, 6, 7, 8]),
    (slice(None, None, -1), (3, 3), [6, 7, 8, 3, 4, 5, 0, 1, 2]),
    ((ALL, slice(None, None, -1)), (3, 3), [2, 1, 0, 5, 4, 3, 8, 7, 6]),
    ([0, 1], (2, 3), [0, 1, 2, 3, 4, 5]),
    ([[0, 1]], (1, 2, 3), [0, 1, 2, 3, 4, 5]),
    (range(2), (2, 3), [0, 1, 2, 3, 4, 5]),
    (np.array([1, 0]), (2, 3), [3, 4, 5, 0, 1, 2]),
    (np.array([1.9, 0.2]), (2, 3), [3, 4, 5, 0, 1, 2]),
    (np.array([True, False]), (2, 3), [3, 4, 5, 0, 1, 2]),
    (nd.array([1, 0]), (2, 3), [3, 4, 5, 0, 1, 2]),
    (([0, 1], [1, 2]), (2,), [1, 5]),
    (([0, -1], 0), (2,), [0, 6]),
    ((0, [0, 1]), (2,), [0, 1]),
    ((ALL, [0, 2]), (3, 2), [0, 2, 3, 5, 6, 8]),
    ((slice(None, None, -1), [0, 1]), (3, 2), [6, 7, 3, 4, 0, 1]),
    ((ALL, None, [0, 1]), (3, 1, 2), [0, 1, 3, 4, 6, 7]),
]
"""What does not."""


@pytest.mark.parametrize(
    ("key", "shape", "numbers", "is_view"),
    [(*row, True) for row in VIEWS] + [(*row, False) for row in COPIES],
)
def test_a_part_is_a_view_if_it_lies_in_one_piece(
    key: Any, shape: tuple[int, ...], numbers: list[int], is_view: bool
) -> None:
    array = square()
    part = array[key]
    assert (part.shape, part.asnumpy().ravel().tolist()) == (shape, numbers)
    part[:] = -1
    left = [n for n in range(9) if not is_view or n not in numbers]
    assert array.asnumpy().ravel().tolist() == [n if n in left else -1 for n in range(9)]
    array[:] = 5
    assert (part.asnumpy() == (5 if is_view else -1)).all()


def test_a_transposed_array_is_a_copy() -> None:
    for array in (square(), nd.arange(3)):
        array.T[:] = -1
        assert array.asnumpy().min() == 0


def test_an_array_without_dimensions() -> None:
    array = nd.array(3.0)
    assert array[:].shape == array[()].shape == ()
    array[:] = 4
    assert array.asscalar() == 4


# ---- writing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "shape", "numbers"), VIEWS + COPIES)
def test_a_number_is_written_to_the_part_and_nothing_else(
    key: Any, shape: tuple[int, ...], numbers: list[int]
) -> None:
    array = square()
    array[key] = -5
    assert array.asnumpy().ravel().tolist() == [-5 if n in numbers else n for n in range(9)]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        (0, [10, 11, 12], [10, 11, 12, 3, 4, 5, 6, 7, 8]),
        (0, nd.array([10, 11, 12], dtype="int32"), [10, 11, 12, 3, 4, 5, 6, 7, 8]),
        (0, nd.ones((1, 1, 3)) * -9, [-9, -9, -9, 3, 4, 5, 6, 7, 8]),
        ((0, None), nd.array([[10, 11, 12]]), [10, 11, 12, 3, 4, 5, 6, 7, 8]),
        ((0, 1), [[55]], [0, 55, 2, 3, 4, 5, 6, 7, 8]),
        ((ALL, 1), nd.array([10, 11, 12]), [0, 10, 2, 3, 11, 5, 6, 12, 8]),
        (slice(None, None, -1), [[10], [11], [12]], [12, 12, 12, 11, 11, 11, 10, 10, 10]),
        ([1, 0], nd.array([[10], [11]]), [11, 11, 11, 10, 10, 10, 6, 7, 8]),
        ([0, 0], [[1, 1, 1], [2, 2, 2]], [2, 2, 2, 3, 4, 5, 6, 7, 8]),
        (([0, 1], [1, 2]), np.array([10, 11]), [0, 10, 2, 3, 4, 11, 6, 7, 8]),
    ],
)
def test_arrays_are_written_where_the_index_says(key: Any, value: Any, expected: list[int]) -> None:
    array = square()
    array[key] = value
    assert array.asnumpy().ravel().tolist() == expected


@pytest.mark.parametrize(
    ("dtype", "expected"), [("int32", [2, -2, 300]), ("uint8", [2, 254, 44]), ("int64", [2, -2, 300])]
)
def test_what_is_written_is_cast_as_c_does(dtype: str, expected: list[int]) -> None:
    numbers = [2.7, -2.7, 300]
    array = nd.zeros((3,), dtype=dtype)
    array[:] = numbers
    assert array.asnumpy().tolist() == expected
    for index, number in enumerate(numbers):
        array[:] = 0
        array[index] = number
        assert array.asnumpy()[index] == nd.full((1,), number, dtype=dtype).asscalar() == expected[index]


# ---- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        (5, IndexError),
        (-5, IndexError),
        ((0, 5), IndexError),
        ((0, 1, 2), IndexError),
        (([0, 9],), IndexError),
        ("a", ValueError),
        (1.5, ValueError),
        (np.float32(1), ValueError),
        (slice(None, None, 0), ValueError),
        (slice(0.5, 2), TypeError),
    ],
)
def test_an_index_that_selects_nothing_is_an_mxnet_error(key: Any, kind: type[Exception]) -> None:
    array = square()
    for use in (lambda: array[key], lambda: array.__setitem__(key, 1)):
        with pytest.raises(mx.MXNetError) as info:
            use()
        assert isinstance(info.value, kind)
    assert array.asnumpy().ravel().tolist() == list(range(9))


def test_torch_is_told_whether_it_makes_a_view() -> None:
    assert torch_index((0, slice(1, 2)), (3, 3)) == ((0, slice(1, 2, None)), True)
    index, is_view = torch_index([1, 0], (3,))
    assert ([each.tolist() for each in index], is_view) == ([[1, 0]], False)


# ---- reshape ---------------------------------------------------------------------------------------

SHAPES: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = [
    ((2, 3, 4), (4, 0, 2), (4, 3, 2)),
    ((2, 3, 4), (2, 0, 0), (2, 3, 4)),
    ((2, 3, 4), (6, 1, -1), (6, 1, 4)),
    ((2, 3, 4), (3, -1, 8), (3, 1, 8)),
    ((2, 3, 4), (-1,), (24,)),
    ((2, 3, 4), (0, -1), (2, 12)),
    ((2, 3, 4), (-2,), (2, 3, 4)),
    ((2, 3, 4), (2, -2), (2, 3, 4)),
    ((2, 3, 4), (-2, 1, 1), (2, 3, 4, 1, 1)),
    ((2, 3, 4), (-3, 4), (6, 4)),
    ((2, 3, 4, 5), (-3, -3), (6, 20)),
    ((2, 3, 4), (0, -3), (2, 12)),
    ((2, 3, 4), (-3, -2), (6, 4)),
    ((2, 3, 4), (-4, 1, 2, -2), (1, 2, 3, 4)),
    ((2, 3, 4), (2, -4, -1, 3, -2), (2, 1, 3, 4)),
    ((10, 5, 4), (-1, 0), (40, 5)),
    ((6,), (0, 1), (6, 1)),
]


@pytest.mark.parametrize(("shape", "wanted", "expected"), SHAPES)
def test_reshape_takes_special_numbers(
    shape: tuple[int, ...], wanted: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert reshaped(shape, wanted) == expected
    array = nd.zeros(shape)
    assert array.reshape(wanted).shape == array.reshape(*wanted).shape == expected
    assert array.reshape(list(wanted)).shape == array.reshape(shape=wanted).shape == expected
    array.reshape(wanted)[:] = 7
    assert array.asnumpy().min() == 7


@pytest.mark.parametrize(
    ("shape", "wanted", "expected"),
    [
        ((10, 5, 4), (-1, 0), (50, 4)),
        ((2, 3, 4), (-1, 0, 0), (2, 3, 4)),
        ((2, 3, 4), (-2, 4), (2, 3, 4)),
        ((2, 3, 4), (0, -3), (2, 12)),
    ],
)
def test_reshape_from_the_right(
    shape: tuple[int, ...], wanted: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert reshaped(shape, wanted, reverse=True) == expected
    assert nd.zeros(shape).reshape(wanted, reverse=True).shape == expected
    assert nd.zeros(shape).reshape(shape=wanted, reverse=1).shape == expected


@pytest.mark.parametrize(
    "wanted",
    [
        (4,),
        (),
        (0, 0, 0),
        (-1, -1),
        (-5,),
        (-3, -3),
        (-4, 4, -1),
        (-4, -1, -1),
        (-4, 2),
        (-4, -2, -1),
        (0, 4),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(wanted: tuple[int, ...]) -> None:
    with pytest.raises(mx.MXNetError, match=r"shape \(2, 3\) cannot take shape") as info:
        nd.zeros((2, 3)).reshape(wanted)
    assert isinstance(info.value, ValueError)


@pytest.mark.parametrize("wanted", ["a", 1.5, (3.0, 2.0), None])
def test_a_shape_that_is_none_is_refused(wanted: Any) -> None:
    with pytest.raises(mx.MXNetError) as info:
        nd.zeros((2, 3)).reshape(wanted)
    assert isinstance(info.value, TypeError)
    with pytest.raises(mx.MXNetError, match="size"):
        nd.zeros((2, 3)).reshape((3, 2), size=6)
