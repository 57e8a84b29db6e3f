"""Converts the arrays that users pass to torch tensors; the code inside sees nothing else.

Torch tensors pass as they are (without autograd history), NumPy arrays share their memory, JAX and CuPy
arrays and anything else with `__dlpack__` are converted by DLPack. A store holds dense values in memory.
Sparse, quantised, nested and lazy tensors are refused, and so are subclasses that keep their data elsewhere
(DTensor, MaskedTensor, FakeTensor); each error says what to pass instead. Torch can read, or write, a
converted tensor without raising an error; only memory may still run out.
"""

from __future__ import annotations

import ctypes
import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
from torch.nn.parameter import is_lazy

from tensorkv.errors import (
    DtypeMismatch,
    InvalidOut,
    InvalidValue,
    MemoryLimitReached,
    ShapeMismatch,
    TensorKVError,
)
from tensorkv.plain import Key

REFUSED_DTYPES = frozenset({torch.quint8, torch.qint8, torch.qint32, torch.quint4x2, torch.quint2x4})
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
"""A table, because getattr on torch imports submodules of the given name."""

_NATIVE_DTYPES = frozenset(  # dtypes that Python's memoryview can cast to bytes
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


_NO_MEMORY = "can't allocate memory"
"""Text in torch's RuntimeError when the system has no memory for a tensor on the CPU."""

_WAYS_OUT = {
    "full_tensor": "full_tensor() for the whole value",
    "to_local": "to_local() for the part of this rank",
    "dequantize": "dequantize()",
    "get_data": "get_data() for what is stored",
    "to_tensor": "to_tensor(fill) for what is stored with the rest filled in",
}
"""Methods of tensor subclasses that return a dense tensor, and the text that recommends each."""


def to_tensor(value: Any, key: Key) -> torch.Tensor:
    """Return `value` as a dense tensor that shares its memory and carries no autograd history.

    Raises:
        InvalidValue: `value` is not a tensor or array; is sparse, quantised, nested, lazy or on the meta
            device; keeps its data where it cannot be read; or has a dtype torch does not know.
    """
    if isinstance(value, torch.Tensor):
        tensor = _checked(_unwrapped(value, key), key)
        return torch.zeros_like(tensor) if tensor._is_zerotensor() else tensor
    if isinstance(value, np.ndarray):
        return _from_numpy(value, key)
    if hasattr(value, "__dlpack__"):
        return _from_dlpack(value, key)[0]
    if value is None:
        raise InvalidValue(
            f"the value for key {key!r} is None. A parameter that is frozen or had no part in the loss has "
            "no gradient: push tensorkv.ABSENT in its place, and this worker adds nothing"
        )
    raise InvalidValue(
        f"the value for key {key!r} is {_describe(value)}; "
        "pass a torch tensor, a NumPy array or an array with __dlpack__, or a list of them, one per device"
    )


def to_out(value: Any, key: Key) -> torch.Tensor:
    """Return `value`, a destination, as a tensor that shares its memory.

    Autograd sees a write to the result as a change of `value`.

    Raises:
        InvalidValue: as `to_tensor`.
        InvalidOut: the memory is read-only, or several elements share one place in it; or it is an inference
            tensor and we are not in inference mode. Read-only memory whose owner does not say so (a torch
            tensor over a read-only mapping, DLPack before 1.0) is not detected.
    """
    if isinstance(value, torch.Tensor):
        tensor = _checked(_unwrapped(value, key), key)
        if tensor._is_zerotensor():
            raise InvalidOut(
                f"out for key {key!r} is a tensor of zeros without memory, which torch makes in autograd; "
                "pass out.clone()"
            )
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
    if not tensor.is_contiguous() and _overlaps_itself(tensor):
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


def unreadable(exc: Exception, key: Key, tensor: torch.Tensor | None = None) -> TensorKVError:
    """Return the error of a value, or an out, that torch failed to copy: torch's error, with the key.

    Running out of memory is the only failure that no check of a tensor foresees.
    """
    said = str(exc).partition("\n")[0]
    if isinstance(exc, (MemoryError, torch.OutOfMemoryError)) or _NO_MEMORY in said:
        size = "" if tensor is None else f" of {tensor.numel() * tensor.dtype.itemsize} bytes"
        return MemoryLimitReached(
            f"there is no memory for a copy of the value{size} of key {key!r}; "
            f"a contiguous tensor on the CPU needs none. It was: {said or type(exc).__name__}"
        )
    return InvalidValue(
        f"torch failed to copy the value of key {key!r}: {type(exc).__name__}: {said}; "
        "pass a plain dense tensor, value.detach().clone() say"
    )


def new_tensor(
    key: Key, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Return an uninitialised tensor for a value. Raises MemoryLimitReached if there is no memory for it."""
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    except (RuntimeError, MemoryError) as exc:
        raise MemoryLimitReached(
            f"there is no memory on {device} for {size_bytes(shape, dtype)} bytes, the value of key {key!r}; "
            "use smaller values, or servers"
        ) from exc


def _of_any_mode(tensor: torch.Tensor, key: Key) -> torch.Tensor:
    """Return a normal tensor over the memory of an inference tensor, which other threads may write to."""
    if not torch.is_inference_mode_enabled():
        raise InvalidOut(
            f"out for key {key!r} was made in inference mode, and can be written there only; pull inside "
            "torch.inference_mode(), or pass out.clone()"
        )
    with torch.inference_mode(False):
        plain = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return plain.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def shape_of(tensor: torch.Tensor, key: Key) -> torch.Size:
    """Return the shape of a tensor. Raises InvalidValue if it is nested and so has none."""
    try:
        return tensor.shape
    except RuntimeError as exc:  # free in the common case; a check before would not be
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
    except RuntimeError:  # includes NotImplementedError
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
    """Return the dtype in which values of `dtype` are summed: float32 for half-width floats."""
    if dtype.is_floating_point and dtype.itemsize < 4:
        return torch.float32
    return dtype


def size_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the size in bytes of a dense tensor of `shape` and `dtype`."""
    return math.prod(shape) * dtype.itemsize


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name under which `dtype` travels, such as "float32"."""
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


def _unwrapped(tensor: torch.Tensor, key: Key) -> torch.Tensor:
    """Return a plain torch.Tensor with the same memory and without autograd history."""
    kind = type(tensor)
    if kind is torch.Tensor or kind is torch.nn.Parameter:
        return tensor.detach() if tensor.requires_grad or kind is not torch.Tensor else tensor
    if is_lazy(tensor):
        raise InvalidValue(
            f"the tensor for key {key!r} is of a lazy module and has no shape yet; call forward once first"
        )
    with torch._C.DisableTorchFunctionSubclass():
        if kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__:
            return tensor.detach().as_subclass(torch.Tensor)
        if tensor.is_nested:
            raise _nested(key)
        if hasattr(kind, "trigger_wait") and kind.__module__.startswith("torch.distributed."):
            plain: torch.Tensor = tensor.trigger_wait()  # type: ignore[attr-defined]  # of a collective
            return _unwrapped(plain, key)
    raise _hidden(kind, key)


def _hidden(kind: type[torch.Tensor], key: Key) -> InvalidValue:
    """Return the error of a subclass whose data may lie anywhere, since it overrides all operations."""
    named = f"the tensor for key {key!r} is {_describe_type(kind)}"
    if any(each.__name__ == "FakeTensor" for each in kind.__mro__):
        return InvalidValue(f"{named}, which has no data; call the store outside of FakeTensorMode")
    ways = [
        text
        for name, text in _WAYS_OUT.items()
        if getattr(kind, name, None) is not getattr(torch.Tensor, name, None)
    ]
    ask = " or ".join(ways) or "the plain tensor that it wraps"
    return InvalidValue(f"{named}, which keeps its data where a store cannot read it; pass its {ask}")


def _checked(tensor: torch.Tensor, key: Key) -> torch.Tensor:
    if tensor.is_nested:
        raise _nested(key)
    if tensor.layout is not torch.strided:
        raise InvalidValue(f"the tensor for key {key!r} has layout {tensor.layout}; pass tensor.to_dense()")
    if tensor.dtype in REFUSED_DTYPES:
        raise InvalidValue(f"the tensor for key {key!r} is quantised; pass tensor.dequantize()")
    if tensor.device.type == "meta":
        raise InvalidValue(f"the tensor for key {key!r} is on the meta device and has no data")
    if (tensor.is_cpu or tensor.is_cuda) and not _has_memory(tensor):
        raise InvalidValue(
            f"the tensor for key {key!r} has no memory of its own: it was freed (sharded modules free the "
            "parameters they do not need), or stands for a value inside torch.func, torch.vmap or a trace; "
            "call the store outside, with a plain tensor"
        )
    return tensor


def _has_memory(tensor: torch.Tensor) -> bool:
    """Whether all elements lie in memory. Torch itself does not check before it reads or writes."""
    try:
        if tensor.numel() == 0 or tensor._is_zerotensor():
            return True
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        needed_bytes = (tensor.storage_offset() + last + 1) * tensor.dtype.itemsize
        return tensor.data_ptr() != 0 and tensor.untyped_storage().nbytes() >= needed_bytes
    except RuntimeError:  # a placeholder for another tensor, without storage
        return False


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements of a tensor share memory."""
    dims = sorted(
        (stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1
    )
    last = 0  # the highest offset that the dimensions so far reach
    for stride, size in dims:
        if stride <= last or stride == 0:
            break
        last += stride * (size - 1)
    else:
        return False
    if dims[0][0] == 0:
        return True
    places = torch.zeros(1, dtype=torch.int64, device="cpu")  # rare: dimensions that interlace, or overlap
    for stride, size in dims:
        places = (places[:, None] + torch.arange(0, size * stride, stride, device="cpu")).flatten()
    return len(np.unique(places.numpy())) < tensor.numel()


def _from_numpy(array: np.ndarray[Any, Any], key: Key) -> torch.Tensor:
    if isinstance(array, np.ma.MaskedArray):
        raise InvalidValue(
            f"the NumPy array for key {key!r} is masked, and a store knows no masks; pass array.filled(0), "
            "or array.data for all that is stored"
        )
    try:
        with warnings.catch_warnings():  # reading a read-only array is fine
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(array)
    except (TypeError, ValueError) as exc:
        if not array.dtype.isnative:
            raise InvalidValue(
                f"the NumPy array for key {key!r} is {array.dtype.str}, of another byte order than this "
                "machine's; pass array.astype(array.dtype.newbyteorder('='))"
            ) from exc
        raise InvalidValue(f"the NumPy array for key {key!r} has no torch counterpart: {exc}") from exc


class _VersionedHead(ctypes.Structure):
    """The beginning of DLManagedTensorVersioned, which DLPack has since 1.0."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
    )


_READ_ONLY, _COPIED = 1, 2
"""Flags of a versioned DLPack tensor."""

_is_capsule = ctypes.pythonapi.PyCapsule_IsValid
_is_capsule.argtypes, _is_capsule.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_int
_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.argtypes, _pointer_of.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p


class _Exporter:
    """Passes the array of another library to torch, and notes the library's flags of its memory."""

    def __init__(self, value: Any) -> None:
        self._value = value
        self.flags = 0  # also if the library's DLPack is too old to have flags

    def __dlpack_device__(self) -> Any:
        return self._value.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        capsule = self._value.__dlpack__(**options)
        name = b"dltensor_versioned"
        if _is_capsule(capsule, name):
            self.flags = _VersionedHead.from_address(_pointer_of(capsule, name)).flags
        return capsule


def _from_dlpack(value: Any, key: Key) -> tuple[torch.Tensor, int]:
    """Return a tensor that shares the memory of an array, and the array's DLPack flags."""
    exporter = _Exporter(value)
    try:
        tensor = torch.utils.dlpack.from_dlpack(exporter)
    except Exception as exc:  # other people's code runs here, and may raise anything
        raise InvalidValue(f"{_describe(value)} for key {key!r} cannot come in by DLPack: {exc}") from exc
    return _checked(tensor, key), exporter.flags


def _writable_from_dlpack(value: Any, key: Key) -> torch.Tensor:
    # JAX arrays are immutable, and DLPack before 1.0 has no flag to say so.
    if type(value).__module__.partition(".")[0] in ("jax", "jaxlib"):
        raise InvalidOut(f"out for key {key!r} is a JAX array, which cannot be written; pull without out")
    tensor, flags = _from_dlpack(value, key)
    if flags & _READ_ONLY:
        raise InvalidOut(
            f"out for key {key!r} is {_describe(value)} in read-only memory; pass a copy of it, "
            "or pull without out"
        )
    if flags & _COPIED:
        raise InvalidOut(
            f"out for key {key!r} is {_describe(value)} that gives away only copies of its memory; "
            "pull without out"
        )
    return tensor


def _describe(value: Any) -> str:
    return "None" if value is None else _describe_type(type(value))


def _describe_type(kind: type) -> str:
    return f"a {kind.__module__}.{kind.__qualname__}"


def addresses_of(tensors: Sequence[Any]) -> list[int]:
    """Return where the memory of each tensor begins; an empty list if one is no tensor, or may have none."""
    try:
        return list(map(torch.Tensor.data_ptr, tensors))
    except (TypeError, RuntimeError):
        return []


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor as writable bytes, whatever its dtype. No copy.

    Raises:
        RuntimeError: it has no memory. NumPy would return bytes at address 0.
    """
    if tensor.data_ptr() == 0 and tensor.numel():
        raise RuntimeError("a tensor has no memory")
    if tensor.dtype in _NATIVE_DTYPES and tensor.numel():  # takes a third of the time
        return tensor.numpy().data.cast("B")
    array: np.ndarray[tuple[int], np.dtype[np.uint8]] = tensor.reshape(-1).view(torch.uint8).numpy()
    return array.data
