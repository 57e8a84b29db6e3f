"""Sums over, and copies to, the devices of one process.

A sum takes its tensors in list order, ((d0+d1)+d2), so that it is bitwise repeatable. Half-width floats
add up in float32 and are rounded once. Tensors on other devices than the result are copied over one
at a time; CPU tensors that are larger than a cache are walked in blocks, so that the running sum stays
in the cache and every tensor crosses the memory bus once.

Nothing here writes to a tensor it was given to read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from tensorkv.arrays import accumulate_dtype
from tensorkv.errors import DtypeMismatch

BLOCK_BYTES = 4 << 20
"""Bytes of the running sum per block. Measured: smaller ones cost more in calls than the cache saves."""


def sum_dtype(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    """Return the dtype of a sum over `tensors`: theirs, or the widest if they are different floats.

    Raises:
        DtypeMismatch: the dtypes differ and are not all floating point.
    """
    dtype = tensors[0].dtype
    for tensor in tensors:
        if tensor.dtype is not dtype:
            dtype = _wider(dtype, tensor.dtype)
    return dtype


def sum_devices(tensors: Sequence[torch.Tensor], out: torch.Tensor | None = None) -> torch.Tensor:
    """Return the sum of `tensors`, in list order, rounded once to their (widest) dtype.

    Args:
        tensors: one or more of the same shape, on any devices; only read.
        out: where to write the sum, of the same shape, on any device. Its dtype may be another float,
            to which the rounded sum is cast. It must not share memory with `tensors`.

    Returns:
        `out`; without it a tensor on the device of the first. The sum of a single tensor is then that
        tensor itself: read it, do not write to it or keep it.

    Raises:
        DtypeMismatch: as `sum_dtype`.
    """
    dtype = sum_dtype(tensors)
    if len(tensors) == 1:
        return tensors[0] if out is None else out.copy_(tensors[0])
    if out is None:
        out = torch.empty(tensors[0].shape, dtype=dtype, device=tensors[0].device)
    if _walks_in_blocks(out, tensors):
        for part, *others in _blocks([out, *tensors]):
            _sum_block(others, part, dtype)
    else:
        _sum_block(tensors, out, dtype)
    return out


def broadcast(value: torch.Tensor, outs: Sequence[torch.Tensor]) -> None:
    """Copy `value` to each of `outs`, in list order, cast to its dtype.

    Args:
        value: of any device.
        outs: of the shape of `value`, any device and memory layout; they may overlap.
    """
    if len(outs) > 1 and _walks_in_blocks(value, outs) and _apart(outs):
        for part, *others in _blocks([value, *outs]):
            for other in others:
                other.copy_(part)
        return
    for out in outs:
        out.copy_(value)


def lightest(load_bytes: Mapping[torch.device, int], devices: Iterable[torch.device]) -> torch.device:
    """Return the one of `devices` that holds the fewest bytes; of several the first.

    Giving each key, the largest first, to the lightest of the devices it is pushed from spreads them.
    """
    return min(devices, key=lambda device: load_bytes.get(device, 0))


def _sum_block(tensors: Sequence[torch.Tensor], out: torch.Tensor, dtype: torch.dtype) -> None:
    total_dtype = accumulate_dtype(dtype)
    if total_dtype is dtype is out.dtype:
        total = out
    else:
        total = torch.empty(out.shape, dtype=total_dtype, device=out.device)
    first, second = tensors[0], tensors[1]
    if first.dtype is second.dtype is total.dtype and first.device == second.device == total.device:
        torch.add(first, second, out=total)
    else:
        total.copy_(first)
        total.add_(_addable(second, total))
    for tensor in tensors[2:]:
        total.add_(_addable(tensor, total))
    if total is not out:
        out.copy_(total.to(dtype))


def _addable(tensor: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Return `tensor` so that it can be added in place: on the same device, and no 8-bit float.

    The copy is not asynchronous: the caller may change its tensor when the sum has returned.
    """
    eight_bits = tensor.dtype.itemsize == 1 and tensor.dtype.is_floating_point
    return tensor.to(device=total.device, dtype=total.dtype if eight_bits else tensor.dtype)


def _walks_in_blocks(one: torch.Tensor, others: Sequence[torch.Tensor]) -> bool:
    if one.numel() * one.dtype.itemsize <= BLOCK_BYTES:
        return False
    return all(tensor.is_cpu and tensor.is_contiguous() for tensor in (one, *others))


def _blocks(tensors: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield the same range of each of some contiguous tensors of one shape, front to back."""
    num_blocks = -(-tensors[0].numel() * tensors[0].dtype.itemsize // BLOCK_BYTES)
    return zip(*(torch.chunk(tensor.view(-1), num_blocks) for tensor in tensors), strict=True)


def _apart(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether no two share memory. If they do, walking in blocks would let an earlier one win in places."""
    return len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)


def _wider(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    if not (one.is_floating_point and other.is_floating_point):
        raise DtypeMismatch(
            f"tensors of dtypes {one} and {other} cannot be summed; only float dtypes may differ: convert one"
        )
    if one.itemsize == other.itemsize:  # float16 and bfloat16: neither holds the values of the other
        return torch.float32
    return one if one.itemsize > other.itemsize else other
