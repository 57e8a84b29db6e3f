"""Rounds: who has contributed to which round of which slice, and which rounds are merged or applied.

RULES
1. A worker's n-th push of a slice belongs to round n. `pushed[w, i]` is that n.
2. Round `merged[i] + 1` is open. It is merged when every member has pushed it; who has left is needed
   no more, but what it pushed counts.
3. Rounds are applied in order, at once after merging or, if held, at the commit. `applied` counts
   rounds, also empty and failed ones; `version` counts updates.
4. A worker is never two rounds ahead: the caller sees to it that a push comes only when the worker's
   last one is merged, and `push` refuses it otherwise.

Slices are rows of arrays, so that a message about a thousand slices costs a few vector operations.
In async mode there is nothing to wait for: `push_alone` makes a push a round of its own.
"""

from __future__ import annotations

from typing import final

import numpy as np
import numpy.typing as npt

Index = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@final
class Rounds:
    """Counters of all slices of one store on one server. An index names a slice for as long as it lives."""

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self.left = np.zeros(num_workers, np.bool_)
        self._free: list[int] = []
        self._size = 0
        self._allocate(64)

    def _allocate(self, capacity: int) -> None:
        def grown(old: npt.NDArray[np.int64] | None, shape: tuple[int, ...]) -> Index:
            new = np.zeros(shape, np.int64)
            if old is not None:
                new[..., : old.shape[-1]] = old
            return new

        wide = (self.num_workers, capacity)
        self.pushed: Index = grown(getattr(self, "pushed", None), wide)
        self.merged: Index = grown(getattr(self, "merged", None), (capacity,))
        self.applied: Index = grown(getattr(self, "applied", None), (capacity,))
        self.version: Index = grown(getattr(self, "version", None), (capacity,))

    def add(self) -> int:
        """Return the index of a new slice, at round 0."""
        if self._free:
            index = self._free.pop()
            self.pushed[:, index] = 0
            self.merged[index] = self.applied[index] = self.version[index] = 0
            return index
        if self._size == self.merged.shape[0]:
            self._allocate(2 * self._size)
        self._size += 1
        return self._size - 1

    def remove(self, index: int) -> None:
        """Forget a slice; its index may be given to another."""
        self.pushed[:, index] = 0
        self.merged[index] = self.applied[index] = 0
        self._free.append(index)

    def may_push(self, worker: int, slices: Index) -> Mask:
        """Which of `slices` this worker may push now: those where its last push is merged."""
        free: Mask = self.pushed[worker, slices] <= self.merged[slices]
        return free

    def push(self, worker: int, slices: Index) -> Index:
        """Count a push of this worker, and return the slices whose round is merged by it."""
        self.pushed[worker, slices] += 1
        return self.mergeable(slices)

    def mergeable(self, slices: Index) -> Index:
        """Return those of `slices` whose open round everybody has contributed to, and somebody has."""
        arrived = self.pushed[:, slices] > self.merged[slices]
        complete = (arrived | self.left[:, None]).all(axis=0) & arrived.any(axis=0)
        return slices if complete.all() else slices[complete]

    def merge(self, slices: Index) -> None:
        """The open round of these slices is merged: no contribution to it can come any more."""
        self.merged[slices] += 1

    def apply(self, slices: Index) -> None:
        """The merged round of these slices is applied, whatever came of it."""
        self.applied[slices] += 1

    def push_alone(self, worker: int, slices: Index) -> None:
        """Count a push that is merged at once, as a round of its own."""
        self.pushed[worker, slices] += 1
        self.merged[slices] += 1

    def withdraw(self, worker: int, slices: Index) -> None:
        """Take back this worker's last push of slices whose round is not merged."""
        self.pushed[worker, slices] -= 1

    def missing(self, index: int) -> list[int]:
        """Return the workers that the open round of a slice still waits for, by rank."""
        arrived = self.pushed[:, index] > self.merged[index]
        return np.flatnonzero(~arrived & ~self.left).tolist()
