"""MXNet's NDArray on top of a torch tensor, and its functions that create arrays.

Operations take effect at once; only the GPU is asynchronous.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, final

import numpy as np
import torch

from tensorkv.compat.base import MXNetError, mxnet_errors
from tensorkv.compat.context import Context, context_of, current_context
from tensorkv.compat.indexing import reshaped, torch_index
from tensorkv.plain import Key

Shape = int | tuple[int, ...] | list[int]


class NDArray:
    """An MXNet array that holds a torch tensor.

    Arithmetic is elementwise and broadcasts; both arrays need the same dtype. As in MXNet a number is
    first cast to the array's dtype, so 1.7 becomes 1 with an array of ints. Quotients of ints are rounded
    towards 0, and their powers computed in float32. Comparisons give 0 and 1 in the array's dtype. With a
    number, an array of bools counts as int64.

    A contiguous part, `a[i]`, `a[i:j]` or `a[i, j:k]` say, shares the memory of `a`. Any other part is a
    copy: a column, every second row, a selection by an array of indices.

    Errors are both MXNetErrors and the Python errors that MXNet raises there.
    """

    def __init__(self, tensor: torch.Tensor, ctx: Context) -> None:
        self.tensor = tensor
        self._ctx = ctx

    # ---- what it is ------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each dimension."""
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> type:
        """NumPy type of the elements, `numpy.float32` say."""
        return _numpy_type(self.tensor.dtype)

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.tensor.numel()

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self.tensor.dim()

    @property
    def context(self) -> Context:
        """Context (device) of the array."""
        return self._ctx

    @property
    def ctx(self) -> Context:
        """Context (device) of the array."""
        return self._ctx

    @property
    def stype(self) -> str:
        """Storage type of the array: always "default", which is dense."""
        return "default"

    @property
    def T(self) -> NDArray:
        """The array with its dimensions in reverse order."""
        return self._new(
            self.tensor.permute(*range(self.ndim - 1, -1, -1)).clone(memory_format=torch.contiguous_format)
        )

    # ---- to somewhere else -----------------------------------------------------------------------

    @mxnet_errors()
    def asnumpy(self) -> np.ndarray[Any, Any]:
        """Return a copy as a NumPy array."""
        return np.array(self.tensor.cpu().numpy())

    @mxnet_errors()
    def asscalar(self) -> Any:
        """Return the only element as a NumPy number.

        Raises:
            ValueError: the array does not have exactly one element.
        """
        if self.size != 1:
            raise ValueError(f"an array of shape {self.shape} is not a scalar")
        return self.asnumpy().reshape(1)[0]

    def copy(self) -> NDArray:
        """Return a copy in the same context."""
        return self._new(self.tensor.clone())

    @mxnet_errors()
    def copyto(self, other: NDArray | Context) -> NDArray:
        """Copy into the array `other` and return it, or return a copy in the context `other`.

        Raises:
            MXNetError: the shapes differ.
        """
        if isinstance(other, Context):
            return NDArray(self.tensor.to(other.torch_device(), copy=True), other)
        if not isinstance(other, NDArray):
            raise TypeError(f"copyto takes an NDArray or a Context, not {type(other).__name__}")
        if other.shape != self.shape:
            raise MXNetError(f"copyto: from.shape = {self.shape} but to.shape = {other.shape}")
        other.tensor.copy_(self.tensor)
        return other

    @mxnet_errors()
    def as_in_context(self, context: Context) -> NDArray:
        """Return this array if it is in `context`, else a copy there."""
        return self if context == self._ctx else self.copyto(context)

    @mxnet_errors()
    def astype(self, dtype: Any, copy: bool = True) -> NDArray:
        """Return the array in another dtype: a copy, unless `copy` is False and the dtype is the same."""
        return self._new(self.tensor.to(_torch_dtype(dtype), copy=copy))

    @mxnet_errors()
    def reshape(self, *shape: Any, **options: Any) -> NDArray:
        """Return a view in another shape: `a.reshape(3, 2)` or `((3, 2))`.

        Besides lengths it takes 0 (this dimension as it is), -1 (once: the remaining elements), -2 (all
        remaining dimensions), -3 (the product of the next two) and -4 (the next one split into the two
        lengths that follow); with `reverse=True` it reads them from the right.

        Raises:
            MXNetValueError: the number of elements differs.
        """
        wanted: Any = shape[0] if len(shape) == 1 and not _is_int(shape[0]) else shape
        wanted = wanted if shape else options.pop("shape", ())
        reverse = bool(options.pop("reverse", False))
        options.pop("shape", None)  # MXNet, too, prefers the positional one
        if options:
            raise TypeError(f"reshape takes shape and reverse, and no {', '.join(options)}")
        return self._new(self.tensor.reshape(reshaped(self.shape, _shape(wanted), reverse)))

    def wait_to_read(self) -> None:
        """Wait until the array can be read."""
        waitall()

    @mxnet_errors()
    def sum(self) -> NDArray:
        """Return the sum of all elements, in an array of shape (1,)."""
        return self._new(self.tensor.sum(dtype=self.tensor.dtype).reshape(1))

    @mxnet_errors()
    def mean(self) -> NDArray:
        """Return the mean of all elements, in an array of shape (1,)."""
        return self._new((self.tensor.sum() / self.size).to(self.tensor.dtype).reshape(1))

    @mxnet_errors()
    def norm(self) -> NDArray:
        """Return the Euclidean norm over all elements, in an array of shape (1,)."""
        numbers = self.tensor if self.tensor.is_floating_point() else self.tensor.double()
        return self._new(numbers.norm().to(self.tensor.dtype).reshape(1))

    # ---- parts of it -----------------------------------------------------------------------------

    @mxnet_errors()
    def __len__(self) -> int:
        if not self.shape:
            raise IndexError("an array without dimensions has no length")
        return self.shape[0]

    def __iter__(self) -> Iterator[NDArray]:
        return (self[index] for index in range(len(self)))

    @mxnet_errors()
    def __getitem__(self, key: Any) -> NDArray:
        index, is_view = torch_index(_plain(key), self.shape)
        if not index:
            return self
        part = self.tensor[index]
        if is_view and not part.is_contiguous():
            part = part.clone(memory_format=torch.contiguous_format)
        return self._new(part if part.dim() else part.reshape(1))

    @mxnet_errors()
    def __setitem__(self, key: Any, value: Any) -> None:
        index, _ = torch_index(_plain(key), self.shape)
        shape = self.tensor[index].shape
        if isinstance(value, NDArray):
            value = value.tensor
        elif _is_number(value):
            value = _scalar(value, self.tensor.dtype)
        elif not isinstance(value, torch.Tensor):
            value = _from_host(value)
        if not _broadcasts(value.shape, shape):
            raise ValueError(f"cannot set a part of shape {tuple(shape)} to shape {tuple(value.shape)}")
        self.tensor[index] = value.to(self.tensor.device, self.tensor.dtype)

    # ---- arithmetic ------------------------------------------------------------------------------

    def __add__(self, other: Any) -> NDArray:
        return self._binary(operator.add, other)

    def __sub__(self, other: Any) -> NDArray:
        return self._binary(operator.sub, other)

    def __mul__(self, other: Any) -> NDArray:
        return self._binary(operator.mul, other)

    def __truediv__(self, other: Any) -> NDArray:
        return self._binary(_quotient, other)

    def __mod__(self, other: Any) -> NDArray:
        return self._binary(torch.remainder, other)

    def __pow__(self, other: Any) -> NDArray:
        return self._binary(_power, other)

    def __radd__(self, other: Any) -> NDArray:
        return self._binary(operator.add, other, reflected=True)

    def __rsub__(self, other: Any) -> NDArray:
        return self._binary(operator.sub, other, reflected=True)

    def __rmul__(self, other: Any) -> NDArray:
        return self._binary(operator.mul, other, reflected=True)

    def __rtruediv__(self, other: Any) -> NDArray:
        return self._binary(_quotient, other, reflected=True)

    def __rmod__(self, other: Any) -> NDArray:
        return self._binary(torch.remainder, other, reflected=True)

    def __rpow__(self, other: Any) -> NDArray:
        return self._binary(_power, other, reflected=True)

    def __iadd__(self, other: Any) -> NDArray:
        return self._in_place(operator.add, other)

    def __isub__(self, other: Any) -> NDArray:
        return self._in_place(operator.sub, other)

    def __imul__(self, other: Any) -> NDArray:
        return self._in_place(operator.mul, other)

    def __itruediv__(self, other: Any) -> NDArray:
        return self._in_place(_quotient, other)

    def __imod__(self, other: Any) -> NDArray:
        return self._in_place(torch.remainder, other)

    @mxnet_errors()
    def __neg__(self) -> NDArray:
        return self._new(-self.tensor)

    @mxnet_errors()
    def __abs__(self) -> NDArray:
        return self._new(self.tensor.abs())

    def __eq__(self, other: object) -> Any:
        return self._binary(operator.eq, other)

    def __ne__(self, other: object) -> Any:
        return self._binary(operator.ne, other)

    def __lt__(self, other: Any) -> NDArray:
        return self._binary(operator.lt, other)

    def __le__(self, other: Any) -> NDArray:
        return self._binary(operator.le, other)

    def __gt__(self, other: Any) -> NDArray:
        return self._binary(operator.gt, other)

    def __ge__(self, other: Any) -> NDArray:
        return self._binary(operator.ge, other)

    __hash__ = object.__hash__
    __array_priority__ = 1000.0  # NumPy leaves `number * array` to this class

    @mxnet_errors()
    def __bool__(self) -> bool:
        if self.size > 1:
            raise ValueError("the truth value of an NDArray with several elements is ambiguous")
        return self.size == 1 and bool(self.asscalar())

    def __repr__(self) -> str:
        sizes = "x".join(str(length) for length in self.shape)
        return f"\n{self.asnumpy()}\n<NDArray {sizes} @{self._ctx}>"

    @mxnet_errors()
    def _binary(self, function: Callable[..., Any], other: Any, reflected: bool = False) -> NDArray:
        mine = self.tensor
        if isinstance(other, NDArray):
            its = other.tensor
            if its.dtype != mine.dtype:
                raise MXNetError(f"dtypes {mine.dtype} and {its.dtype} differ; use astype")
        elif _is_number(other):
            mine = mine.long() if mine.dtype == torch.bool else mine
            its = _scalar(other, mine.dtype)
        else:
            raise TypeError(f"type {type(other)} is not supported beside an NDArray")
        try:
            result = function(its, mine) if reflected else function(mine, its)
        except RuntimeError as exc:  # shapes that do not broadcast, or different devices
            name = function.__name__.strip("_")
            raise MXNetError(f"{name} of {self.shape} and {_shape_of(other)}: {exc}") from exc
        return self._new(result.to(mine.dtype))

    @mxnet_errors()
    def _in_place(self, function: Callable[..., Any], other: Any) -> NDArray:
        result = self._binary(function, other)
        if (result.shape, result.dtype) != (self.shape, self.dtype):
            raise MXNetError(
                f"{function.__name__.strip('_')} in place: the result is of shape {result.shape} and "
                f"{result.dtype.__name__}, the array of shape {self.shape} and {self.dtype.__name__}"
            )
        self.tensor.copy_(result.tensor)
        return self

    def _new(self, tensor: torch.Tensor) -> NDArray:
        return NDArray(tensor, self._ctx)


# ---- functions that make arrays ------------------------------------------------------------------


@mxnet_errors()
def array(source_array: Any, ctx: Context | None = None, dtype: Any = None) -> NDArray:
    """Return a copy of an array, number or nested list; float32 by default, except for an NDArray."""
    if isinstance(source_array, NDArray):
        source = source_array.tensor
    else:
        source = _from_host(source_array)
        dtype = np.float32 if dtype is None else dtype
    ctx = current_context() if ctx is None else ctx
    torch_dtype = source.dtype if dtype is None else _torch_dtype(dtype)
    return NDArray(source.to(ctx.torch_device(), torch_dtype, copy=True), ctx)


@mxnet_errors()
def full(shape: Shape, val: Any, ctx: Context | None = None, dtype: Any = np.float32) -> NDArray:
    """Return an array filled with the number `val`."""
    ctx = current_context() if ctx is None else ctx
    made = torch.empty(_shape(shape), device=ctx.torch_device(), dtype=_torch_dtype(dtype))
    made.copy_(_scalar(val, made.dtype))
    return NDArray(made, ctx)


@mxnet_errors()
def zeros(shape: Shape, ctx: Context | None = None, dtype: Any = None) -> NDArray:
    """Return an array of zeros."""
    return full(shape, 0, ctx, dtype)


@mxnet_errors()
def ones(shape: Shape, ctx: Context | None = None, dtype: Any = None) -> NDArray:
    """Return an array of ones."""
    return full(shape, 1, ctx, dtype)


@mxnet_errors()
def empty(shape: Shape, ctx: Context | None = None, dtype: Any = None) -> NDArray:
    """Return an uninitialised array."""
    ctx = current_context() if ctx is None else ctx
    return NDArray(torch.empty(_shape(shape), device=ctx.torch_device(), dtype=_torch_dtype(dtype)), ctx)


@mxnet_errors()
def arange(
    start: float,
    stop: float | None = None,
    step: float = 1.0,
    repeat: int = 1,
    ctx: Context | None = None,
    dtype: Any = np.float32,
) -> NDArray:
    """Return the numbers from `start` to before `stop`, each `repeat` times; from 0 if `stop` is None."""
    begin, end = (0, start) if stop is None else (start, stop)
    ctx = current_context() if ctx is None else ctx
    numbers = torch.arange(begin, end, step, dtype=torch.float64, device="cpu").repeat_interleave(repeat)
    return NDArray(numbers.to(ctx.torch_device(), _torch_dtype(dtype)), ctx)


def waitall() -> None:
    """Wait until all operations are done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@final
class MXNetUpdater:
    """An updater of a store that calls an MXNet-style function on NDArrays.

    `__tensorkv_adapter__` lets a store send it to servers as two names, its function's and its own (see
    `tensorkv.updaters.functions`).
    """

    __tensorkv_adapter__ = "tensorkv.compat.ndarray:MXNetUpdater"

    def __init__(self, function: Callable[[Key, NDArray, NDArray], Any]) -> None:
        self.function = function
        named = function if hasattr(function, "__qualname__") else type(function)
        self.__name__, self.__qualname__ = named.__name__, named.__qualname__
        self.__module__ = named.__module__  # a store identifies its updater by these

    def __eq__(self, other: object) -> bool:  # setting the same function again is the same setting
        return isinstance(other, MXNetUpdater) and other.function == self.function

    def __hash__(self) -> int:
        return hash(self.function)

    def __call__(self, key: Key, pushed: torch.Tensor, stored: torch.Tensor) -> None:
        """Call the function, which changes `stored` in place."""
        self.function(key, NDArray(pushed, context_of(pushed)), NDArray(stored, context_of(stored)))


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer))


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float, np.bool_, np.integer, np.floating))


def _shape(shape: Any) -> tuple[int, ...]:
    return (int(shape),) if _is_int(shape) else tuple(operator.index(length) for length in shape)


def _shape_of(value: Any) -> str:
    return str(value.shape) if isinstance(value, NDArray) else repr(value)


def _scalar(value: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return a number as MXNet reads it: converted to a double, then cast to the dtype."""
    if not _is_number(value):
        raise TypeError(f"{value!r} is not a number")
    return torch.tensor(float(value), dtype=torch.float64, device="cpu").to(dtype)


def _from_host(value: Any) -> torch.Tensor:
    """Return a NumPy array, or anything that converts to one, as a tensor."""
    try:
        numbers = np.asarray(value)
    except ValueError as exc:  # lists of different lengths
        raise TypeError(f"{value!r} is no array: {exc}") from exc
    if numbers.dtype.kind not in "biuf":
        raise TypeError(f"{value!r} is no array of numbers")
    return torch.as_tensor(numbers, device="cpu")


def _quotient(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if left.is_floating_point():
        return left / right
    return torch.div(left, right, rounding_mode="trunc")


def _power(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if left.is_floating_point():
        return torch.pow(left, right)
    return torch.pow(left.float(), right.float()).to(left.dtype)


def _plain(key: Any) -> Any:
    """Return an index without NDArrays in it."""
    if isinstance(key, NDArray):
        return key.tensor
    return tuple(_plain(each) for each in key) if isinstance(key, tuple) else key


def _broadcasts(shape: torch.Size, target: torch.Size) -> bool:
    """Whether values of `shape` broadcast to a part of shape `target`."""
    extra = len(shape) - len(target)
    if extra > 0 and any(length != 1 for length in shape[:extra]):
        return False
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return all(length in (1, wanted) for length, wanted in pairs)


def _torch_dtype(dtype: Any) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    return torch.from_numpy(np.empty(0, np.float32 if dtype is None else dtype)).dtype


def _numpy_type(dtype: torch.dtype) -> type:
    return torch.empty(0, dtype=dtype, device="cpu").numpy().dtype.type
