"""NDArrays behave as MXNet's; what is expected here was looked at in MXNet 1.9.1."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tensorkv.compat import ndarray as nd
from tensorkv.compat.base import MXNetError
from tensorkv.compat.context import Context, cpu
from tensorkv.compat.ndarray import MXNetUpdater, NDArray


def values(array: NDArray) -> Any:
    return array.asnumpy().tolist()


# ---- making arrays ---------------------------------------------------------------------------------


def test_makers() -> None:
    assert values(nd.ones((2, 3))) == [[1.0] * 3] * 2
    assert values(nd.zeros(3)) == [0.0, 0.0, 0.0]
    assert values(nd.full((2,), 3.5)) == [3.5, 3.5]
    assert values(nd.array([[1, 2], [3, 4]])) == [[1.0, 2.0], [3.0, 4.0]]
    assert values(nd.arange(5)) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert values(nd.arange(1, 7, 2)) == [1.0, 3.0, 5.0]
    assert values(nd.arange(2, repeat=2)) == [0.0, 0.0, 1.0, 1.0]
    assert nd.empty((4, 1)).shape == (4, 1)
    assert values(nd.array(3.0)) == 3.0


@pytest.mark.parametrize(
    "make",
    [
        lambda **kwargs: nd.ones((2,), **kwargs),
        lambda **kwargs: nd.zeros((2,), **kwargs),
        lambda **kwargs: nd.empty((2,), **kwargs),
        lambda **kwargs: nd.full((2,), 1, **kwargs),
        lambda **kwargs: nd.array([1, 2], **kwargs),
        lambda **kwargs: nd.array(np.array([1, 2], dtype="int64"), **kwargs),
        lambda **kwargs: nd.arange(2, **kwargs),
    ],
)
def test_makers_take_context_and_dtype(make: Callable[..., NDArray]) -> None:
    assert (make().dtype, make().context) == (np.float32, cpu(0))
    made = make(ctx=cpu(2), dtype="int32")
    assert (made.dtype, made.context, made.ctx) == (np.int32, cpu(2), cpu(2))
    with Context("cpu", 3):
        assert make().context == cpu(3)


def test_array_copies_and_keeps_the_dtype_of_an_ndarray() -> None:
    source = nd.ones((2,), dtype=np.float64)
    copied = nd.array(source)
    copied[:] = 5
    assert values(source) == [1.0, 1.0]
    assert copied.dtype is np.float64
    numbers = np.ones(2, dtype=np.float32)
    nd.array(numbers)[:] = 5
    assert numbers.tolist() == [1.0, 1.0]


# ---- looking at arrays -----------------------------------------------------------------------------


def test_properties() -> None:
    array = nd.ones((2, 3))
    assert (array.shape, array.size, array.ndim, array.stype, len(array)) == ((2, 3), 6, 2, "default", 2)
    assert values(nd.array([[1, 2, 3], [4, 5, 6]]).T) == [[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]]
    with pytest.raises(IndexError):
        len(nd.array(3.0))


def test_print_form() -> None:
    assert repr(nd.ones((2, 3))) == "\n[[1. 1. 1.]\n [1. 1. 1.]]\n<NDArray 2x3 @cpu(0)>"
    assert str(nd.array([3], cpu(1))) == "\n[3.]\n<NDArray 1 @cpu(1)>"
    assert repr(nd.array(3.0)) == "\n3.0\n<NDArray  @cpu(0)>"


def test_asnumpy_is_a_copy() -> None:
    array = nd.ones((2,))
    array.asnumpy()[:] = 7
    assert values(array) == [1.0, 1.0]


def test_asscalar_and_truth() -> None:
    assert nd.array([2.0]).asscalar() == 2.0
    assert isinstance(nd.array([2.0]).asscalar(), np.float32)
    assert bool(nd.ones((1,)))
    assert not bool(nd.zeros((1,)))
    with pytest.raises(ValueError, match="not a scalar"):
        nd.ones((2,)).asscalar()
    with pytest.raises(ValueError, match="ambiguous"):
        bool(nd.ones((2,)))


def test_reductions() -> None:
    array = nd.array([3.0, 4.0])
    assert values(array.sum()) == [7.0]
    assert values(array.mean()) == [3.5]
    assert values(array.norm()) == [5.0]
    for dtype in ("int8", "int32", "int64", "uint8"):
        ints = nd.array([3, 4, 6], dtype=dtype)
        assert [values(each)[0] for each in (ints.sum(), ints.mean(), ints.norm())] == [13, 4, 7]
    array.wait_to_read()
    nd.waitall()


# ---- copies ----------------------------------------------------------------------------------------


def test_copyto_an_array_and_a_context() -> None:
    source, target = nd.ones((2, 3)), nd.zeros((2, 3), cpu(1), dtype="float64")
    assert source.copyto(target) is target
    assert (values(target), target.context) == ([[1.0] * 3] * 2, cpu(1))
    copied = source.copyto(cpu(2))
    copied[:] = 9
    assert (copied.context, values(source)) == (cpu(2), [[1.0] * 3] * 2)
    with pytest.raises(MXNetError, match=r"from.shape = \(2, 3\) but to.shape = \(3, 2\)"):
        source.copyto(nd.zeros((3, 2)))
    with pytest.raises(TypeError, match="ndarray"):
        source.copyto(np.ones(2))  # type: ignore[arg-type]


def test_as_in_context_copies_only_to_another_one() -> None:
    array = nd.ones((2,))
    assert array.as_in_context(cpu(0)) is array
    other = array.as_in_context(cpu(1))
    other[:] = 2
    assert (other.context, values(array)) == (cpu(1), [1.0, 1.0])


def test_copy_astype_reshape() -> None:
    array = nd.array([1.5, -1.5])
    array.copy()[:] = 0
    assert values(array) == [1.5, -1.5]
    assert values(array.astype("int32")) == [1, -1]
    assert array.astype("float32").tensor.data_ptr() != array.tensor.data_ptr()
    assert array.astype("float32", copy=False).tensor.data_ptr() == array.tensor.data_ptr()
    whole = nd.ones((2, 3))
    assert [whole.reshape((3, 2)).shape, whole.reshape(-1).shape, whole.reshape(3, -1).shape] == [
        (3, 2),
        (6,),
        (3, 2),
    ]
    whole.reshape((3, 2))[:] = 7
    assert values(whole) == [[7.0] * 3] * 2
    with pytest.raises(ValueError, match=r"cannot take shape \(5,\)"):
        whole.reshape((5,))


# ---- parts -----------------------------------------------------------------------------------------


def test_reading_parts() -> None:
    array = nd.array([[0, 1, 2], [3, 4, 5]])
    assert values(array[0]) == [0.0, 1.0, 2.0]
    assert values(array[1, 2]) == [5.0]
    assert values(array[1:2, 0:2]) == [[3.0, 4.0]]
    assert values(array[:, 1]) == [1.0, 4.0]
    assert values(array[nd.array([1, 0])]) == [[3.0, 4.0, 5.0], [0.0, 1.0, 2.0]]
    assert values(nd.arange(3)[2]) == [2.0]
    assert [values(row) for row in array] == values(array)
    with pytest.raises(IndexError):
        array[5]


def test_setting_parts() -> None:
    array = nd.zeros((2, 3))
    array[:] = 5
    assert values(array) == [[5.0] * 3] * 2
    array[0] = nd.array([1, 2, 3])
    array[1, 2] = 9
    assert values(array) == [[1.0, 2.0, 3.0], [5.0, 5.0, 9.0]]
    array[1] = [4, 5, 6]
    array[0] = np.arange(3)
    assert values(array) == [[0.0, 1.0, 2.0], [4.0, 5.0, 6.0]]
    array[:] = torch.ones(3)
    array[0][:] = 7  # a part shares the memory
    assert values(array) == [[7.0] * 3, [1.0] * 3]
    for wrong in (nd.ones((2,)), np.ones(4), [1, 2], nd.ones((3, 2, 3))):
        with pytest.raises(ValueError, match="cannot set a part of shape"):
            array[:] = wrong
    assert values(array) == [[7.0] * 3, [1.0] * 3]


# ---- arithmetic ------------------------------------------------------------------------------------

OPERATORS = [operator.add, operator.sub, operator.mul, operator.truediv, operator.mod, operator.pow]
COMPARISONS = [operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge]
ALL = slice(None)
LEFT, RIGHT = np.array([[1.0, 2.0], [3.0, 4.0]], "float32"), np.array([[2.0, 2.0], [4.0, 3.0]], "float32")


@pytest.mark.parametrize("function", OPERATORS + COMPARISONS)
def test_operators_agree_with_numpy_both_ways(function: Callable[..., Any]) -> None:
    left, right = nd.array(LEFT), nd.array(RIGHT)
    for got, expected in (
        (function(left, right), function(LEFT, RIGHT)),
        (function(left, 2), function(LEFT, 2)),
        (function(left, np.float32(2)), function(LEFT, 2)),
        (function(3.0, left), function(3.0, LEFT)),
    ):
        assert isinstance(got, NDArray)
        assert got.dtype is np.float32
        np.testing.assert_allclose(got.asnumpy(), expected.astype("float32"), rtol=1e-6)
    assert values(left) == LEFT.tolist()


@pytest.mark.parametrize("name", ["iadd", "isub", "imul", "itruediv", "imod"])
def test_in_place_operators_write_into_the_same_memory(name: str) -> None:
    array, expected = nd.array(LEFT), LEFT.copy()
    memory = array.tensor.data_ptr()
    function = getattr(operator, name)
    for other in (nd.array(RIGHT), 1.5, nd.array([[2.0]])):
        result = function(array, other)
        expected = function(expected, other.asnumpy() if isinstance(other, NDArray) else other)
        assert result is array
    np.testing.assert_allclose(array.asnumpy(), expected, rtol=1e-6)
    assert array.tensor.data_ptr() == memory


def test_unary_operators() -> None:
    assert values(-nd.array([1, -2])) == [-1.0, 2.0]
    assert values(abs(nd.array([1, -2]))) == [1.0, 2.0]
    assert isinstance(hash(nd.ones((1,))), int)


def test_numbers_are_taken_in_the_dtype_of_the_array() -> None:
    array = nd.array([3, 4], dtype="int32")
    assert values(array / 2) == [1, 2]
    assert values(array * 1.5) == [3, 4]
    assert (array / 2).dtype is np.int32
    array /= 2
    assert values(array) == [1, 2]


SIGNED: dict[str, list[list[int]]] = {
    "add": [[8, -6, 4], [8, -6, 4], [5, -9, 1], [5, -9, 1]],
    "sub": [[6, -8, 2], [-6, 8, -2], [9, -5, 5], [-9, 5, -5]],
    "mul": [[7, -7, 3], [7, -7, 3], [-14, 14, -6], [-14, 14, -6]],
    "truediv": [[7, -7, 3], [0, 0, 0], [-3, 3, -1], [0, 0, 0]],
    "mod": [[0, 0, 0], [1, -6, 1], [-1, -1, -1], [5, -2, 1]],
    "pow": [[7, -7, 3], [1, 1, 1], [0, 0, 0], [-128, 0, -8]],
    "eq": [[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]],
    "ne": [[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1]],
    "lt": [[0, 1, 0], [1, 0, 1], [0, 1, 0], [1, 0, 1]],
    "le": [[0, 1, 0], [1, 0, 1], [0, 1, 0], [1, 0, 1]],
    "gt": [[1, 0, 1], [0, 1, 0], [1, 0, 1], [0, 1, 0]],
    "ge": [[1, 0, 1], [0, 1, 0], [1, 0, 1], [0, 1, 0]],
}
"""What MXNet 1.9.1 gives for a = [7, -7, 3] of int8, int32, int64: a and 1.7, 1.7 and a; then with -2.6."""

UNSIGNED: dict[str, list[list[int]]] = {
    "add": [[8, 10, 4], [8, 10, 4], [5, 7, 1], [5, 7, 1]],
    "sub": [[6, 8, 2], [250, 248, 254], [9, 11, 5], [247, 245, 251]],
    "mul": [[7, 9, 3], [7, 9, 3], [242, 238, 250], [242, 238, 250]],
    "truediv": [[7, 9, 3], [0, 0, 0], [0, 0, 0], [36, 28, 84]],
    "mod": [[0, 0, 0], [1, 1, 1], [7, 9, 3], [2, 2, 2]],
    "pow": [[7, 9, 3], [1, 1, 1], [0, 0, 0], [0, 0, 248]],
    "eq": [[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]],
    "ne": [[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1]],
    "lt": [[0, 0, 0], [1, 1, 1], [1, 1, 1], [0, 0, 0]],
    "le": [[0, 0, 0], [1, 1, 1], [1, 1, 1], [0, 0, 0]],
    "gt": [[1, 1, 1], [0, 0, 0], [0, 0, 0], [1, 1, 1]],
    "ge": [[1, 1, 1], [0, 0, 0], [0, 0, 0], [1, 1, 1]],
}
"""The same for [7, 9, 3] of uint8."""


@pytest.mark.parametrize("name", SIGNED)
@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "uint8"])
def test_ints_beside_a_number_with_a_fraction(dtype: str, name: str) -> None:
    numbers, table = ([7, 9, 3], UNSIGNED) if dtype == "uint8" else ([7, -7, 3], SIGNED)
    function = getattr(operator, name)
    in_place = getattr(operator, f"i{name}", None)
    for number, forward, reflected in ((1.7, *table[name][:2]), (-2.6, *table[name][2:])):
        array = nd.array(numbers, dtype=dtype)
        for other in (number, np.float32(number), np.float64(number)):
            assert values(function(array, other)) == forward
            assert values(function(other, array)) == reflected
        assert function(array, number).dtype is array.dtype
        if in_place is not None:
            assert values(in_place(array, number)) == forward


def test_ints_beside_ints() -> None:
    left, right = nd.array([7, -7, 3], dtype="int32"), nd.array([2, 2, -2], dtype="int32")
    assert values(left / right) == [3, -3, -1]
    assert values(left % right) == [1, 1, -1]
    assert values(left**right) == [49, 49, 0]
    assert values(nd.array([7, 3], dtype="int64") ** 19) == [11398894743191552, 1162261504]  # float32's
    with pytest.raises(MXNetError):
        left / 0.5  # 0, as an int


def test_a_number_out_of_range_wraps_around() -> None:
    assert values(nd.array([0, 1], dtype="uint8") + 300) == [44, 45]
    assert values(nd.array([0, 1], dtype="int8") + 300) == [44, 45]
    with pytest.raises(MXNetError) as info:
        nd.array([0, 1], dtype="int64") + 10**400
    assert isinstance(info.value, OverflowError)


def test_bools_beside_a_number_are_int64() -> None:
    array = nd.array([1, 0], dtype="bool")
    assert (values(array + 2), (array + 2).dtype) == ([3, 2], np.int64)
    assert values(array * 1.7) == [1, 0]
    with pytest.raises(MXNetError, match="int64, the array of shape"):
        array += 1


def test_arrays_broadcast_and_the_left_context_stays() -> None:
    result = nd.ones((2, 3)) + nd.ones((1, 3), cpu(1))
    assert (values(result), result.context) == ([[2.0] * 3] * 2, cpu(0))


def test_what_does_not_fit_is_an_mxnet_error() -> None:
    array = nd.ones((2, 3))
    with pytest.raises(MXNetError, match=r"\(2, 3\) and \(3, 2\)"):
        array + nd.ones((3, 2))
    with pytest.raises(MXNetError, match=r"of shape \(2, 3\) and float32, the array of shape \(1, 3\)"):
        operator.iadd(nd.ones((1, 3)), array)
    with pytest.raises(MXNetError, match="use astype"):
        array + nd.ones((2, 3), dtype="float64")
    for other in ("a", None, np.ones(2), [1, 2], 1j):
        for use in (operator.add, operator.iadd, operator.pow, operator.eq, lambda a, b: b + a):
            with pytest.raises(MXNetError, match="not supported") as info:
                use(array, other)
            assert isinstance(info.value, TypeError)


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda: nd.array("abc"), TypeError),
        (lambda: nd.array([[1], [1, 2]]), TypeError),
        (lambda: nd.array(1j), TypeError),
        (lambda: nd.array(None), TypeError),
        (lambda: nd.zeros((-1,)), RuntimeError),
        (lambda: nd.zeros("a"), TypeError),
        (lambda: nd.zeros((2,), dtype="foo"), TypeError),
        (lambda: nd.full((2,), "a"), TypeError),
        (lambda: nd.arange(3, 1), RuntimeError),
        (lambda: nd.arange(0, 3, 0), RuntimeError),
        (lambda: nd.arange("a"), TypeError),
        (lambda: nd.ones((2,)).astype("foo"), TypeError),
        (lambda: nd.ones((2,)).copyto(3), TypeError),
        (lambda: nd.ones((2,)).copyto(nd.ones((3,))), RuntimeError),
        (lambda: nd.ones((2,)).asscalar(), ValueError),
        (lambda: bool(nd.ones((2,))), ValueError),
        (lambda: len(nd.array(3.0)), IndexError),
        (lambda: Context("abc"), KeyError),
        (lambda: nd.ones((2,)).__setitem__(0, "abc"), TypeError),
        (lambda: nd.ones((2,)).__setitem__(0, [[1], [1, 2]]), TypeError),
        (lambda: nd.ones((2,)).__setitem__(ALL, nd.ones((3,))), ValueError),
    ],
)
def test_mistakes_are_mxnet_errors_and_those_of_python(
    call: Callable[[], Any], kind: type[Exception]
) -> None:
    with pytest.raises(MXNetError) as info:
        call()
    assert isinstance(info.value, kind)


# ---- updaters --------------------------------------------------------------------------------------


def test_an_updater_works_on_the_memory_of_the_tensors() -> None:
    seen: list[tuple[Any, Context]] = []

    def update(key: Any, pushed: NDArray, stored: NDArray) -> None:
        seen.append((key, stored.context))
        stored += pushed * 2
        stored[0] = -1

    updater = MXNetUpdater(update)
    stored = torch.ones(3)
    updater("w", torch.ones(3), stored)
    assert stored.tolist() == [-1.0, 3.0, 3.0]
    assert seen == [("w", cpu(0))]
    assert (updater.__module__, updater.__qualname__) == (update.__module__, update.__qualname__)
    assert updater == MXNetUpdater(update) != MXNetUpdater(print)
    assert len({updater, MXNetUpdater(update)}) == 1
