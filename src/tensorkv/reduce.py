"""Sums over, and copies to, the devices of one process.

A sum adds its tensors in list order, ((d0+d1)+d2), so that it is bitwise repeatable. Half-width floats are
added in float32 and rounded once. Tensors on other devices than the result are copied over one at a time. CPU
tensors that are larger than a cache are processed in blocks, so that the running sum stays in the cache and
every tensor crosses the memory bus once.

Nothing here writes to its input tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from tensorkv.arrays import accumulate_dtype
from tensorkv.errors import DtypeMismatch

BLOCK_BYTES = 4 << 20
"""Size of a block of the running sum. Measured: smaller blocks cost more in calls than the cache saves."""


def sum_dtype(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    """Return the dtype of a sum over `tensors`: theirs, or the widest if their float dtypes differ.

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
        out: destination of the sum, of the same shape, on any device. Its dtype may be another float; the
            rounded sum is then cast to it. It must not share memory with `tensors`.

    Returns:
        `out`; without it a tensor on the device of the first. The sum of a single tensor is then that tensor
        itself: read it, but do not write to it or keep it.

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
    """Return the first of `devices` that holds the fewest bytes.

    To spread the keys, assign each, the largest first, to the lightest device it is pushed from.
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
    """Convert `tensor` so that it can be added in place: on the same device, and not an 8-bit float.

    The copy is not asynchronous: the caller may change its tensor once the sum returns.
    """
    eight_bits = tensor.dtype.itemsize == 1 and tensor.dtype.is_floating_point
    return tensor.to(device=total.device, dtype=total.dtype if eight_bits else tensor.dtype)


def _walks_in_blocks(one: torch.Tensor, others: Sequence[torch.Tensor]) -> bool:
    if one.numel() * one.dtype.itemsize <= BLOCK_BYTES:
        return False
    return all(tensor.is_cpu and tensor.is_contiguous() for tensor in (one, *others))


def _blocks(tensors: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield the same range of each tensor, front to back; all are contiguous and of one shape."""
    num_blocks = -(-tensors[0].numel() * tensors[0].dtype.itemsize // BLOCK_BYTES)
    return zip(*(torch.chunk(tensor.view(-1), num_blocks) for tensor in tensors), strict=True)


def _apart(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether no two share memory. If two did, an earlier one could win in some blocks."""
    return len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)


def _wider(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    if not (one.is_floating_point and other.is_floating_point):
        raise DtypeMismatch(
            f"tensors of dtypes {one} and {other} cannot be summed; only float dtypes may differ: convert one"
        )
    if one.itemsize == other.itemsize:  # float16 and bfloat16: neither holds the values of the other
        return torch.float32
    return one if one.itemsize > other.itemsize else other
