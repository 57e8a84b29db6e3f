"""Combines the norms of many tensors, without torch, for the scheduler.

The result does not depend on the order or grouping of the parts, so it is bitwise the same wherever the
tensors live.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

EPSILON = 1e-6
"""Added to the norm before dividing, as torch.nn.utils.clip_grad_norm_ does."""


def total_norm(norms: Sequence[float]) -> float:
    """Return the Euclidean norm of the whole from those of its parts; 0 if there are none.

    No square overflows or underflows. An infinite or NaN part makes the result infinite or NaN.
    """
    if not all(map(math.isfinite, norms)):
        return sum(norms)
    largest = max(norms, default=0.0)
    _, exponent = math.frexp(largest)
    parts = (math.ldexp(norm, -exponent) for norm in norms)  # at most 1; a power of two, so exact
    root = math.sqrt(math.fsum(part * part for part in parts))
    try:
        return math.ldexp(root, exponent)
    except OverflowError:
        return math.inf


def clip_factor(norm: float, max_norm: float | None) -> float:
    """Return the factor that reduces the norm of the sums to at most `max_norm`.

    It is that of torch.nn.utils.clip_grad_norm_, also for a norm that is infinite (0) or NaN (NaN).
    """
    return 1.0 if max_norm is None else min(max_norm / (norm + EPSILON), 1.0)
