"""Arrays at the door: whatever a user holds becomes a torch tensor here, and nothing else inside.

Torch tensors pass as they are (without autograd history), NumPy arrays share their memory, JAX and
CuPy arrays and anything else with `__dlpack__` come in by DLPack. Sparse and quantised tensors are
refused: a store holds dense values.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack

from tensorkv.errors import DtypeMismatch, InvalidOut, InvalidValue, ShapeMismatch

Key = int | str
"""The name of a value in a store: an int or a str, one of the two in one store."""

REFUSED_DTYPES = frozenset({torch.quint8, torch.qint8, torch.qint32, torch.quint4x2, torch.quint2x4})
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
"""A table, for torch imports modules of its own when it is asked for an attribute of their name."""

_NATIVE_DTYPES = frozenset(  # those that Python's memoryview can cast to bytes
    {
        torch.float32,
        torch.float64,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
    }
)


def to_tensor(value: Any, key: Key) -> torch.Tensor:
    """Return `value` as a dense tensor that shares its memory and carries no autograd history.

    Raises:
        InvalidValue: `value` is no tensor or array, is sparse, quantised, on the meta device, or has
            a dtype torch does not know.
    """
    if isinstance(value, torch.Tensor):
        return _checked(value.detach() if value.requires_grad else value, key)
    if isinstance(value, np.ndarray):
        return _from_numpy(value, key)
    if hasattr(value, "__dlpack__"):
        return _from_dlpack(value, key)
    raise InvalidValue(
        f"the value for key {key!r} is {_describe(value)}; "
        "pass a torch tensor, a NumPy array or an array with __dlpack__, or a list of them, one per device"
    )


def to_out(value: Any, key: Key) -> torch.Tensor:
    """Return `value`, a destination, as a tensor that shares its memory.

    Writing to the result is seen by autograd as a change of `value`.

    Raises:
        InvalidValue: as `to_tensor`.
        InvalidOut: the memory cannot be written, or several elements share one place in it; or it is an
            inference tensor and we are not in inference mode.
    """
    if isinstance(value, torch.Tensor):
        tensor = _checked(value.detach(), key)
        if tensor.is_inference():
            tensor = _of_any_mode(tensor, key)
    elif isinstance(value, np.ndarray):
        if not value.flags.writeable:
            raise InvalidOut(f"out for key {key!r} is a read-only NumPy array; pass a copy of it")
        tensor = _from_numpy(value, key)
    elif hasattr(value, "__dlpack__"):
        tensor = _writable_from_dlpack(value, key)
    else:
        raise InvalidValue(f"out for key {key!r} is {_describe(value)}; pass a tensor or array to be written")
    if not tensor.is_contiguous() and any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    ):
        raise InvalidOut(
            f"out for key {key!r} is an expanded tensor: several of its elements share memory; "
            "pass out.clone() or torch.empty(shape)"
        )
    if tensor.is_conj() or tensor.is_neg():
        raise InvalidOut(
            f"out for key {key!r} is a view that torch conjugates or negates as it is read; "
            "pass out.resolve_conj().resolve_neg()"
        )
    return tensor


def _of_any_mode(tensor: torch.Tensor, key: Key) -> torch.Tensor:
    """Return an inference tensor as one that shares its memory, and that other threads may write to."""
    if not torch.is_inference_mode_enabled():
        raise InvalidOut(
            f"out for key {key!r} was made in inference mode, and can be written there only; pull inside "
            "torch.inference_mode(), or pass out.clone()"
        )
    with torch.inference_mode(False):
        plain = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return plain.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def shape_of(tensor: torch.Tensor, key: Key) -> torch.Size:
    """Return the shape of a tensor. Raises InvalidValue if it has none: nested tensors."""
    try:
        return tensor.shape
    except RuntimeError as exc:  # this costs nothing where there is a shape; to ask first would
        raise _nested(key) from exc


def check_summable(dtype: torch.dtype, key: Key, *, mean: bool = False) -> None:
    """Raise InvalidValue if torch cannot add, or with `mean` divide, values of this dtype."""
    if not _is_summable(dtype, mean):
        what = "take a mean of" if mean else "add"
        raise InvalidValue(
            f"torch cannot {what} values of dtype {dtype}, as key {key!r} has; use another dtype"
        )


@functools.cache
def _is_summable(dtype: torch.dtype, mean: bool) -> bool:
    try:
        total = torch.zeros(1, dtype=dtype, device="cpu").to(accumulate_dtype(dtype))
        total.add_(total)
        if mean and (dtype.is_floating_point or dtype.is_complex):
            total.div_(2)
        torch.zeros(1, dtype=dtype, device="cpu").copy_(total)
    except RuntimeError:  # NotImplementedError is one of them
        return False
    return True


def check_matches(
    what: str, tensor: torch.Tensor, key: Key, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Raise unless `tensor` has `shape` and a dtype that may be cast to or from `dtype`.

    Floats are cast between float dtypes; any other dtype must be equal.

    Raises:
        ShapeMismatch, DtypeMismatch, InvalidValue.
    """
    if shape_of(tensor, key) != shape:
        raise ShapeMismatch(
            f"{what} for key {key!r} has shape {tuple(tensor.shape)}, "
            f"but the key was initialised with shape {tuple(shape)}"
        )
    if tensor.dtype != dtype:
        if tensor.dtype.is_floating_point and dtype.is_floating_point:
            check_summable(tensor.dtype, key)
            return
        raise DtypeMismatch(
            f"{what} for key {key!r} has dtype {tensor.dtype}, but the key was initialised with {dtype}; "
            f"only float dtypes are cast to each other: convert with .to({dtype})"
        )


def check_has_mean(key: Key, dtype: torch.dtype) -> None:
    """Raise DtypeMismatch if values of `dtype` have no mean in their own dtype: integers and bools."""
    if not (dtype.is_floating_point or dtype.is_complex):
        raise DtypeMismatch(
            f"key {key!r} has dtype {dtype}, of which a store with reduction='mean' takes no mean; "
            "use a float dtype, or reduction='sum'"
        )


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values of `dtype` are added up: float32 for the half-width floats."""
    if dtype.is_floating_point and dtype.itemsize < 4:
        return torch.float32
    return dtype


def size_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the bytes a dense tensor of `shape` and `dtype` takes."""
    return math.prod(shape) * dtype.itemsize


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name under which `dtype` travels, "float32" say."""
    return str(dtype).removeprefix("torch.")


def dtype_from_name(name: str) -> torch.dtype:
    """Return the dtype called `name`.

    Raises:
        InvalidValue: torch has no such dtype.
    """
    dtype = _DTYPES.get(name)
    if dtype is None:
        raise InvalidValue(f"there is no dtype {name[:40]!r} in torch")
    return dtype


def _nested(key: Key) -> InvalidValue:
    return InvalidValue(
        f"the tensor for key {key!r} is nested, so it has no shape; pass its parts, each with a key"
    )


def _checked(tensor: torch.Tensor, key: Key) -> torch.Tensor:
    if tensor.is_nested:
        raise _nested(key)
    if tensor.layout is not torch.strided:
        raise InvalidValue(f"the tensor for key {key!r} has layout {tensor.layout}; pass tensor.to_dense()")
    if tensor.dtype in REFUSED_DTYPES:
        raise InvalidValue(f"the tensor for key {key!r} is quantised; pass tensor.dequantize()")
    if tensor.device.type == "meta":
        raise InvalidValue(f"the tensor for key {key!r} is on the meta device and has no data")
    return tensor


def _from_numpy(array: np.ndarray[Any, Any], key: Key) -> torch.Tensor:
    try:
        with warnings.catch_warnings():  # a read-only array is fine to read from
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(array)
    except (TypeError, ValueError) as exc:
        raise InvalidValue(f"the NumPy array for key {key!r} has no torch counterpart: {exc}") from exc


def _from_dlpack(value: Any, key: Key) -> torch.Tensor:
    try:
        return _checked(torch.utils.dlpack.from_dlpack(value), key)
    except (RuntimeError, BufferError, TypeError, ValueError) as exc:
        raise InvalidValue(f"{_describe(value)} for key {key!r} cannot come in by DLPack: {exc}") from exc


def _writable_from_dlpack(value: Any, key: Key) -> torch.Tensor:
    # JAX arrays are immutable, and DLPack before 1.0 has no flag to say so.
    if type(value).__module__.partition(".")[0] in ("jax", "jaxlib"):
        raise InvalidOut(f"out for key {key!r} is a JAX array, which cannot be written; pull without out")
    return _from_dlpack(value, key)


def _describe(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__module__}.{type(value).__qualname__}"


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor as writable bytes, whatever its dtype. No copy."""
    if tensor.dtype in _NATIVE_DTYPES and tensor.numel():  # a third of the time
        return tensor.numpy().data.cast("B")
    array: np.ndarray[tuple[int], np.dtype[np.uint8]] = tensor.reshape(-1).view(torch.uint8).numpy()
    return array.data
