"""Commits on one server: gather the requests of all workers, and check that they agree."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import final

import torch

from tensorkv.errors import CommitMismatch, DtypeMismatch, TensorKVError
from tensorkv.plain import Key
from tensorkv.server.layouts import Contribution, Slice
from tensorkv.wire.messages import Commit

_SQUARES_ARE_EXACT = 1e-140  # above this norm, squares that underflow are negligible


@final
@dataclass(slots=True)
class CommitGather:
    """One commit of a store: which workers have asked for it, for which pushes, and later the sums.

    `pushes` holds the contributions to commit, by worker and slice. A worker's request stands even if it
    leaves then: servers may learn of that before or after they report, and must do the same. `slices` are
    those that take part, `totals` their sums; a slice whose round is empty has none.
    """

    number: int
    asked: dict[int, Commit] = field(default_factory=dict)
    pushes: dict[int, dict[Slice, Contribution]] = field(default_factory=dict)
    reported: bool = False
    slices: list[Slice] = field(default_factory=list)
    totals: list[tuple[Slice, torch.Tensor]] = field(default_factory=list)

    def add(self, worker: int, commit: Commit, pushes: Mapping[Slice, Contribution]) -> None:
        """Record a worker's request and the pushes that it commits."""
        self.asked[worker] = commit
        self.pushes[worker] = dict(pushes)

    def forget_dropped(self, exists: Callable[[Slice], bool]) -> None:
        """Remove pushes whose round was dropped meanwhile, and those of deleted slices."""
        for worker, pushes in self.pushes.items():
            self.pushes[worker] = {
                each: pushed
                for each, pushed in pushes.items()
                if exists(each) and each.cohort.inbox.get(worker) is pushed
            }

    def disagreement(self) -> TensorKVError | None:
        """Return why the workers disagree, or None."""
        first_worker = min(self.asked)
        first = self.asked[first_worker]
        for worker, commit in sorted(self.asked.items()):
            mine, theirs = _terms(commit), _terms(first)
            if mine != theirs:
                return CommitMismatch(
                    f"commit: rank {worker} asks for max_norm={mine[0]}, check_finite={mine[1]}, "
                    f"apply={mine[2]}, rank {first_worker} for max_norm={theirs[0]}, "
                    f"check_finite={theirs[1]}, apply={theirs[2]}"
                )
        if all(pushes.keys() == self.pushes[first_worker].keys() for pushes in self.pushes.values()):
            return None
        for one, other in itertools.combinations(sorted(self.asked), 2):
            different = self._lacking(one, other) + self._lacking(other, one)
            if different:
                keys = sorted({repr(each.key) for each in different})
                return CommitMismatch(
                    f"commit: ranks {one} and {other} have not pushed the same keys with "
                    f"apply=False: only one of them has pushed {', '.join(keys)}"
                )
        return None

    def _lacking(self, worker: int, other: int) -> list[Slice]:
        """Return what another worker commits and this one does not, though it needs it."""
        missing = self.pushes[other].keys() - self.pushes[worker].keys()
        return [each for each in missing if worker in each.cohort.members]

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
    def applies(self) -> bool:
        """Whether it may apply something, or only measures; all workers agree on it."""
        return next(iter(self.asked.values())).apply

    @property
    def wants_norm(self) -> bool:
        """Whether norms are needed at all."""
        return self.max_norm is not None or self.check_finite or not self.applies


def _terms(commit: Commit) -> tuple[float | None, bool, bool]:
    """Return what all workers must agree on."""
    return commit.max_norm, commit.check_finite, commit.apply


def norms_of(tensors: Iterable[torch.Tensor]) -> list[float]:
    """Return the Euclidean norm of each tensor, taken in float64. Infinite and NaN elements propagate."""
    return [_norm(_computable(tensor)) for tensor in tensors]


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether no element is infinite or NaN. The norm of finite elements may still be infinite."""
    return all(bool(_computable(tensor).isfinite().all()) for tensor in tensors)


def unscalable(key: Key, dtype: torch.dtype) -> DtypeMismatch | None:
    """Return why `max_norm` cannot be used with a key of this dtype, or None."""
    if dtype.is_floating_point or dtype.is_complex:
        return None
    return DtypeMismatch(
        f"commit: key {key!r} has dtype {dtype}, which max_norm cannot scale; nothing was committed: "
        "commit without max_norm, or push the key with apply=True"
    )


def scale(tensor: torch.Tensor, factor: float) -> None:
    """Multiply `tensor` in place."""
    if _is_eight_bit_float(tensor):
        tensor.copy_(_computable(tensor).mul_(factor))
    else:
        tensor.mul_(factor)


def _norm(tensor: torch.Tensor) -> float:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point():
        tensor = tensor.to(torch.float64)
    norm: float = torch.linalg.vector_norm(tensor, dtype=torch.float64).item()
    if _SQUARES_ARE_EXACT < norm < math.inf or not tensor.numel():
        return norm
    largest: float = tensor.abs().max().item()  # squares may have overflowed or underflowed
    if largest == 0 or not math.isfinite(largest):
        return norm
    scaled: float = torch.linalg.vector_norm(tensor.to(torch.float64) / largest).item()
    return largest * scaled


def _computable(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor`, or its values in float32 if torch cannot compute with its dtype."""
    return tensor.to(torch.float32) if _is_eight_bit_float(tensor) else tensor


def _is_eight_bit_float(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize == 1
