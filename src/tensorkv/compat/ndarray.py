"""MXNet's NDArray over a torch tensor, and its functions that make arrays.

Operations take effect at once; there is nothing to wait for but the GPU.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, final

import numpy as np
import torch

from tensorkv.arrays import Key
from tensorkv.compat.base import MXNetError
from tensorkv.compat.context import Context, context_of, current_context

Shape = int | tuple[int, ...] | list[int]


class NDArray:
    """An array of MXNet, which holds a torch tensor.

    Arithmetic is element by element and broadcasts; both arrays need the same dtype. A number is taken
    in the array's dtype, and comparisons give 0 and 1 in it. `a[i]` and `a[i:j]` share the memory of `a`.
    """

    def __init__(self, tensor: torch.Tensor, ctx: Context) -> None:
        self.tensor = tensor
        self._ctx = ctx

    # ---- what it is ------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        """The length of each dimension."""
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> type:
        """The NumPy type of the elements, `numpy.float32` say."""
        return _numpy_type(self.tensor.dtype)

    @property
    def size(self) -> int:
        """The number of elements."""
        return self.tensor.numel()

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return self.tensor.dim()

    @property
    def context(self) -> Context:
        """Where the array lives."""
        return self._ctx

    @property
    def ctx(self) -> Context:
        """Where the array lives."""
        return self._ctx

    @property
    def stype(self) -> str:
        """How the array is stored: always "default", which is dense."""
        return "default"

    @property
    def T(self) -> NDArray:
        """The array with its dimensions in reverse order."""
        return self._new(self.tensor.permute(*range(self.ndim - 1, -1, -1)).contiguous())

    # ---- to somewhere else -----------------------------------------------------------------------

    def asnumpy(self) -> np.ndarray[Any, Any]:
        """Return a copy as a NumPy array."""
        return np.array(self.tensor.cpu().numpy())

    def asscalar(self) -> Any:
        """Return the one element as a number of NumPy's.

        Raises:
            ValueError: there is not exactly one element.
        """
        if self.size != 1:
            raise ValueError(f"an array of shape {self.shape} is not a scalar")
        return self.asnumpy().reshape(1)[0]

    def copy(self) -> NDArray:
        """Return a copy in the same context."""
        return self._new(self.tensor.clone())

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

    def as_in_context(self, context: Context) -> NDArray:
        """Return this array if it lives in `context`, else a copy that does."""
        return self if context == self._ctx else self.copyto(context)

    def astype(self, dtype: Any, copy: bool = True) -> NDArray:
        """Return the array in another dtype: a copy, unless `copy` is False and nothing changes."""
        return self._new(self.tensor.to(_torch_dtype(dtype), copy=copy))

    def reshape(self, *shape: Any) -> NDArray:
        """Return the same elements in another shape; -1 stands for what is left. Shares the memory.

        Raises:
            ValueError: the number of elements differs.
        """
        wanted = _shape(shape[0] if len(shape) == 1 else shape)
        try:
            return self._new(self.tensor.reshape(wanted))
        except RuntimeError as exc:
            raise ValueError(f"an array of shape {self.shape} cannot take shape {wanted}") from exc

    def wait_to_read(self) -> None:
        """Return when the array can be read."""
        waitall()

    def sum(self) -> NDArray:
        """Return the sum of all elements, in an array of shape (1,)."""
        return self._new(self.tensor.sum(dtype=self.tensor.dtype).reshape(1))

    def mean(self) -> NDArray:
        """Return the mean of all elements, in an array of shape (1,)."""
        return self._new((self.tensor.sum() / self.size).to(self.tensor.dtype).reshape(1))

    def norm(self) -> NDArray:
        """Return the Euclidean norm over all elements, in an array of shape (1,)."""
        return self._new(self.tensor.norm().reshape(1))

    # ---- parts of it -----------------------------------------------------------------------------

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("an array without dimensions has no length")
        return self.shape[0]

    def __iter__(self) -> Iterator[NDArray]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, key: Any) -> NDArray:
        part = self.tensor[_index(key)]
        return self._new(part if part.dim() else part.reshape(1))

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(value, NDArray):
            value = value.tensor
        elif not isinstance(value, (bool, int, float, torch.Tensor)):
            value = torch.as_tensor(np.asarray(value), device="cpu")
        part = self.tensor[_index(key)]
        if isinstance(value, torch.Tensor) and not _broadcasts(value.shape, part.shape):
            raise ValueError(f"cannot set a part of shape {tuple(part.shape)} to shape {tuple(value.shape)}")
        if isinstance(value, torch.Tensor):
            value = value.to(self.tensor.device, self.tensor.dtype)
        self.tensor[_index(key)] = value

    # ---- arithmetic ------------------------------------------------------------------------------

    def __add__(self, other: Any) -> NDArray:
        return self._binary(operator.add, other)

    def __sub__(self, other: Any) -> NDArray:
        return self._binary(operator.sub, other)

    def __mul__(self, other: Any) -> NDArray:
        return self._binary(operator.mul, other)

    def __truediv__(self, other: Any) -> NDArray:
        return self._binary(operator.truediv, other)

    def __mod__(self, other: Any) -> NDArray:
        return self._binary(operator.mod, other)

    def __pow__(self, other: Any) -> NDArray:
        return self._binary(operator.pow, other)

    def __radd__(self, other: Any) -> NDArray:
        return self._binary(operator.add, other, reflected=True)

    def __rsub__(self, other: Any) -> NDArray:
        return self._binary(operator.sub, other, reflected=True)

    def __rmul__(self, other: Any) -> NDArray:
        return self._binary(operator.mul, other, reflected=True)

    def __rtruediv__(self, other: Any) -> NDArray:
        return self._binary(operator.truediv, other, reflected=True)

    def __rmod__(self, other: Any) -> NDArray:
        return self._binary(operator.mod, other, reflected=True)

    def __rpow__(self, other: Any) -> NDArray:
        return self._binary(operator.pow, other, reflected=True)

    def __iadd__(self, other: Any) -> NDArray:
        return self._in_place(operator.add, other)

    def __isub__(self, other: Any) -> NDArray:
        return self._in_place(operator.sub, other)

    def __imul__(self, other: Any) -> NDArray:
        return self._in_place(operator.mul, other)

    def __itruediv__(self, other: Any) -> NDArray:
        return self._in_place(operator.truediv, other)

    def __imod__(self, other: Any) -> NDArray:
        return self._in_place(operator.mod, other)

    def __neg__(self) -> NDArray:
        return self._new(-self.tensor)

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

    def __bool__(self) -> bool:
        if self.size > 1:
            raise ValueError("the truth value of an NDArray with several elements is ambiguous")
        return self.size == 1 and bool(self.asscalar())

    def __repr__(self) -> str:
        sizes = "x".join(str(length) for length in self.shape)
        return f"\n{self.asnumpy()}\n<NDArray {sizes} @{self._ctx}>"

    def _binary(self, function: Callable[..., Any], other: Any, reflected: bool = False) -> NDArray:
        pair = (self._operand(other), self.tensor) if reflected else (self.tensor, self._operand(other))
        try:
            result = function(*pair)
        except RuntimeError as exc:  # shapes that do not broadcast, devices that differ
            raise MXNetError(f"{function.__name__} of {self.shape} and {_shape_of(other)}: {exc}") from exc
        return self._new(result.to(self.tensor.dtype))

    def _in_place(self, function: Callable[..., Any], other: Any) -> NDArray:
        result = self._binary(function, other).tensor
        if result.shape != self.tensor.shape:
            raise MXNetError(
                f"{function.__name__} in place: the result has shape {tuple(result.shape)}, not {self.shape}"
            )
        self.tensor.copy_(result)
        return self

    def _operand(self, other: Any) -> Any:
        if isinstance(other, NDArray):
            if other.tensor.dtype != self.tensor.dtype:
                raise MXNetError(f"dtypes {self.tensor.dtype} and {other.tensor.dtype} differ; use astype")
            return other.tensor
        if isinstance(other, (bool, int, float, np.number, np.bool_)):
            return other.item() if isinstance(other, np.generic) else other
        raise TypeError(f"type {type(other)} is not supported beside an NDArray")

    def _new(self, tensor: torch.Tensor) -> NDArray:
        return NDArray(tensor, self._ctx)


# ---- functions that make arrays ------------------------------------------------------------------


def array(source_array: Any, ctx: Context | None = None, dtype: Any = None) -> NDArray:
    """Return a copy of an array, number or nested list; float32 unless it is an NDArray or `dtype` says."""
    if isinstance(source_array, NDArray):
        source = source_array.tensor
    else:
        source = torch.as_tensor(np.asarray(source_array), device="cpu")
        dtype = np.float32 if dtype is None else dtype
    ctx = current_context() if ctx is None else ctx
    torch_dtype = source.dtype if dtype is None else _torch_dtype(dtype)
    return NDArray(source.to(ctx.torch_device(), torch_dtype, copy=True), ctx)


def full(shape: Shape, val: Any, ctx: Context | None = None, dtype: Any = np.float32) -> NDArray:
    """Return an array filled with the number `val`."""
    ctx = current_context() if ctx is None else ctx
    made = torch.full(_shape(shape), val, device=ctx.torch_device(), dtype=_torch_dtype(dtype))
    return NDArray(made, ctx)


def zeros(shape: Shape, ctx: Context | None = None, dtype: Any = None) -> NDArray:
    """Return an array of zeros."""
    return full(shape, 0, ctx, dtype)


def ones(shape: Shape, ctx: Context | None = None, dtype: Any = None) -> NDArray:
    """Return an array of ones."""
    return full(shape, 1, ctx, dtype)


def empty(shape: Shape, ctx: Context | None = None, dtype: Any = None) -> NDArray:
    """Return an array whose elements may be anything."""
    ctx = current_context() if ctx is None else ctx
    return NDArray(torch.empty(_shape(shape), device=ctx.torch_device(), dtype=_torch_dtype(dtype)), ctx)


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
    """Return when all operations are done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@final
class MXNetUpdater:
    """An updater of a store that calls an MXNet-style function, whose arrays are NDArrays.

    `__tensorkv_adapter__` lets it travel to servers as its function's name and its own (see
    `tensorkv.functions`).
    """

    __tensorkv_adapter__ = "tensorkv.compat.ndarray:MXNetUpdater"

    def __init__(self, function: Callable[[Key, NDArray, NDArray], Any]) -> None:
        self.function = function
        named = function if hasattr(function, "__qualname__") else type(function)
        self.__name__, self.__qualname__ = named.__name__, named.__qualname__
        self.__module__ = named.__module__  # a store tells its updater by these

    def __eq__(self, other: object) -> bool:  # setting the same function again is no other setting
        return isinstance(other, MXNetUpdater) and other.function == self.function

    def __hash__(self) -> int:
        return hash(self.function)

    def __call__(self, key: Key, pushed: torch.Tensor, stored: torch.Tensor) -> None:
        """Call the function; it changes `stored` in place."""
        self.function(key, NDArray(pushed, context_of(pushed)), NDArray(stored, context_of(stored)))


def _shape(shape: Any) -> tuple[int, ...]:
    return (shape,) if isinstance(shape, int) else tuple(int(length) for length in shape)


def _shape_of(value: Any) -> str:
    return str(value.shape) if isinstance(value, NDArray) else repr(value)


def _index(key: Any) -> Any:
    if isinstance(key, NDArray):
        return key.tensor.long()
    if isinstance(key, tuple):
        return tuple(_index(each) for each in key)
    return key


def _broadcasts(shape: torch.Size, target: torch.Size) -> bool:
    """Whether values of `shape` can be assigned to a part of shape `target`."""
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
