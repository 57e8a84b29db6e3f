"""Norms of many tensors put together, without torch: the scheduler does this.

The result does not depend on the order or grouping of the parts, so that it is the same to the last bit
wherever the tensors live.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

EPSILON = 1e-6
"""Added to the norm before dividing, as torch.nn.utils.clip_grad_norm_ does."""


def total_norm(norms: Sequence[float]) -> float:
    """Return the Euclidean norm of the whole from those of its parts; 0 if there are none.

    No square overflows or vanishes on the way. A part that is infinite or NaN makes the whole so.
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
    """Return what the sums are multiplied by so that their norm is at most `max_norm`.

    As torch.nn.utils.clip_grad_norm_ has it, also for a norm that is infinite (0) or NaN (NaN).
    """
    return 1.0 if max_norm is None else min(max_norm / (norm + EPSILON), 1.0)
