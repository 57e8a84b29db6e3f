"""Sums of contributions: in rank order, in the stored dtype, narrow floats in float32.

The order is fixed, ((w0 + w1) + w2), whatever the order of arrival, so runs are bitwise repeatable. This
also holds with weights: each contribution is first multiplied by a number, and every product is rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tensorkv.arrays import accumulate_dtype


def add_up(
    parts: Sequence[torch.Tensor],
    dtype: torch.dtype,
    divisor: float = 1,
    out: torch.Tensor | None = None,
    *,
    may_overwrite: bool = True,
    factors: Sequence[float] | None = None,
) -> torch.Tensor:
    """Return ((p0 + p1) + p2 ...) / divisor in `dtype`, all flat and of one length.

    Args:
        parts: at least one; their dtypes may differ from `dtype` if all are floats.
        dtype: dtype of the result; the sum itself is taken in float32 for narrow floats.
        divisor: what a mean divides by.
        out: receives the result, if given; it must not overlap the parts. It is unchanged if this raises:
            nothing is written there until all memory is allocated.
        may_overwrite: whether the first part may serve as the accumulator.
        factors: each part is first multiplied by its own, in the dtype of the sum.
    """
    if factors is not None:
        return _add_up_products(parts, dtype, divisor, out, factors)
    wide = accumulate_dtype(dtype)
    first, rest = parts[0], parts[1:]
    if out is not None and len(rest) == 1 and divisor == 1 and wide == dtype == first.dtype == rest[0].dtype:
        return torch.add(first, rest[0], out=out)  # usually: nothing is cast
    # A cast of the third part allocates memory after the sum of the first two is written.
    in_place = dtype == wide and (len(parts) < 3 or all(part.dtype == wide for part in rest[1:]))
    target = out if in_place else None
    if not rest:
        total = _single(first, wide, target, may_overwrite or divisor == 1)
    elif target is not None:
        total = torch.add(first.to(wide), rest[0].to(wide), out=target)
    elif first.dtype == wide and may_overwrite:
        total = first.add_(rest[0].to(wide))
    else:
        total = torch.add(first.to(wide), rest[0].to(wide))
    for part in rest[1:]:
        total.add_(part.to(wide))
    if divisor != 1:
        total.div_(divisor)
    if total.dtype != dtype:
        total = total.to(dtype)
    if out is not None and total is not out:
        out.copy_(total)
        return out
    return total


def weigh(shares: Sequence[tuple[float | None, int]]) -> tuple[float, list[float] | None]:
    """Return the divisor of a mean, and the factors of its contributions, None if all of them are 1.

    Args:
        shares: weight of each contribution, None if it has none, and its count. If there is only one
            contribution, its weight cancels.
    """
    if len(shares) == 1 or all(weight is None for weight, _ in shares):
        return sum(count for _, count in shares), None
    divisor = math.fsum(count if weight is None else weight for weight, count in shares)
    return divisor, [1.0 if weight is None else weight / count for weight, count in shares]


def _add_up_products(
    parts: Sequence[torch.Tensor],
    dtype: torch.dtype,
    divisor: float,
    out: torch.Tensor | None,
    factors: Sequence[float],
) -> torch.Tensor:
    """Add up products. `add` with `alpha` would round sum and product together on some processors only."""
    wide = accumulate_dtype(dtype)
    total = parts[0].to(wide) * factors[0]
    for part, factor in zip(parts[1:], factors[1:], strict=True):
        total.add_(part.to(wide) * factor)
    total.div_(divisor)
    return total.to(dtype) if out is None else out.copy_(total)


def _single(
    part: torch.Tensor, wide: torch.dtype, target: torch.Tensor | None, may_overwrite: bool
) -> torch.Tensor:
    if target is not None:
        return target.copy_(part)
    if part.dtype == wide:
        return part if may_overwrite else part.clone()
    return part.to(wide)
