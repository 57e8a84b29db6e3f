"""Commits on one server: gather every worker's, and check that they agree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import final

import torch

from tensorkv.errors import CommitMismatch, TensorKVError
from tensorkv.protocol.layouts import Slice
from tensorkv.protocol.rounds import Index
from tensorkv.wire.messages import Commit

EPSILON = 1e-6
"""Added to the norm before dividing, as torch.nn.utils.clip_grad_norm_ does."""


@final
@dataclass(slots=True)
class CommitGather:
    """One commit of a store: who has asked for it, for which pushes, and later the sums.

    `pushes` are by worker and slice index the numbers of the contributions to be committed. What a
    worker has asked for stands, also if it leaves then: servers may learn of that before or after they
    report, and must do the same. `slices` are those that take part, `totals` their sums but for those
    whose round is empty.
    """

    number: int
    asked: dict[int, Commit] = field(default_factory=dict)
    pushes: dict[int, dict[int, int]] = field(default_factory=dict)
    reported: bool = False
    slices: list[Slice] = field(default_factory=list)
    totals: list[tuple[Slice, torch.Tensor]] = field(default_factory=list)

    def add(self, worker: int, commit: Commit, pushes: Mapping[int, int]) -> None:
        """A worker has asked, and has made these pushes for it."""
        self.asked[worker] = commit
        self.pushes[worker] = dict(pushes)

    def forget_dropped(self, holder: Index) -> None:
        """Leave out pushes whose round was dropped meanwhile; `holder` tells what is still there."""
        for worker, pushes in self.pushes.items():
            self.pushes[worker] = {i: number for i, number in pushes.items() if holder[worker, i] == number}

    def disagreement(self, names: dict[int, str]) -> TensorKVError | None:
        """Return why the workers do not agree, or None. `names` tells the key of a slice."""
        first_worker = min(self.asked)
        first = self.asked[first_worker]
        for worker, commit in sorted(self.asked.items()):
            mine, theirs = (commit.max_norm, commit.check_finite), (first.max_norm, first.check_finite)
            if mine != theirs:
                return CommitMismatch(
                    f"commit: rank {worker} asks for max_norm={mine[0]}, check_finite={mine[1]}, "
                    f"rank {first_worker} for max_norm={theirs[0]}, check_finite={theirs[1]}"
                )
            different = self.pushes[worker].keys() ^ self.pushes[first_worker].keys()
            if different:
                keys = sorted({names[index] for index in different})
                return CommitMismatch(
                    f"commit: ranks {first_worker} and {worker} have not pushed the same keys with "
                    f"apply=False: only one of them has pushed {', '.join(keys)}"
                )
        return None

    @property
    def skip(self) -> bool:
        """Whether some worker asks to skip."""
        return any(commit.skip for commit in self.asked.values())

    @property
    def max_norm(self) -> float | None:
        """The norm to clip to; all workers agree on it."""
        return next(iter(self.asked.values())).max_norm

    @property
    def check_finite(self) -> bool:
        """Whether a sum that is not finite drops the round; all workers agree on it."""
        return next(iter(self.asked.values())).check_finite

    @property
    def wants_norm(self) -> bool:
        """Whether sums of squares are needed at all."""
        return self.max_norm is not None or self.check_finite


def sum_squares(tensors: Iterable[torch.Tensor]) -> float:
    """Return the sum of the squares of all elements, taken in float64. Infinite or NaN elements show."""
    total = 0.0
    for tensor in tensors:
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor)
        if not tensor.is_floating_point():
            tensor = tensor.to(torch.float64)
        norm = torch.linalg.vector_norm(tensor, dtype=torch.float64).item()
        total += norm * norm
    return total


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether no element is infinite or NaN. The square of one that is finite may not be."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def clip_factor(norm: float, max_norm: float | None) -> float:
    """Return what the sums are multiplied by so that their norm is at most `max_norm`.

    As torch.nn.utils.clip_grad_norm_ has it, also for a norm that is infinite (0) or NaN (NaN).
    """
    return 1.0 if max_norm is None else min(max_norm / (norm + EPSILON), 1.0)
