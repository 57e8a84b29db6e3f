"""An executable specification, a small dictionary: the results of any kind of store, and nothing else.

It has no threads, no waiting, no speed. Every method takes the calling rank; a call that would have to
wait for another worker raises `WouldWait` and changes nothing. Tests run random programs on a real
store and on this one, and compare.

It supports values of the stored dtype, sums and means, rounds, ABSENT, commit, leaving, deleting, and
updaters that are functions. Optimizers are such functions as well.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from tensorkv.arrays import accumulate_dtype, check_matches
from tensorkv.errors import (
    DtypeMismatch,
    KeyAlreadyInitialized,
    KeyNotInitialized,
    UncommittedPush,
    UpdaterError,
)
from tensorkv.keys import ABSENT
from tensorkv.plain import Key
from tensorkv.store import CommitResult, UpdaterFunction


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(accumulate_dtype(tensor.dtype))


def _assign(key: Key, pushed: torch.Tensor, stored: torch.Tensor) -> None:
    stored.copy_(pushed)


def _add(key: Key, pushed: torch.Tensor, stored: torch.Tensor) -> None:
    stored.copy_(_wide(stored) + _wide(pushed))


def _check_scalable(sums: dict[Key, torch.Tensor | None]) -> None:
    for key, total in sums.items():
        if total is not None and not (total.is_floating_point() or total.is_complex()):
            raise DtypeMismatch(f"max_norm cannot scale key {key!r} of {total.dtype}")


def _real(tensor: torch.Tensor) -> torch.Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).double()


NAMED: dict[str, UpdaterFunction] = {"assign": _assign, "add": _add}


class WouldWait(Exception):
    """The call would have to wait for another worker."""


@dataclass
class _Push:
    """One worker's part of a round: the sum over its devices (None: absent), and their number."""

    total: torch.Tensor | None
    count: int
    weight: float | None
    apply: bool
    updater: UpdaterFunction


def _weighted_mean(parts: list[_Push], dtype: torch.dtype) -> torch.Tensor:
    weights = [part.count if part.weight is None else part.weight for part in parts]
    products = [
        _wide(part.total) * (weight / part.count)
        for part, weight in zip(parts, weights, strict=True)
        if part.total is not None
    ]
    total = sum(products[1:], start=products[0])
    return (total / math.fsum(weights)).to(dtype)


@dataclass
class _Entry:
    """A key: its value, the pushes of each rank from the first round on, and who has deleted it.

    No other key of the store has its number.
    """

    value: torch.Tensor
    number: int
    pushes: list[list[_Push | None]]
    deleted: set[int] = field(default_factory=set)
    round: int = 0
    version: int = 0
    failures: dict[int, UpdaterError] = field(default_factory=dict)  # by contributor, until raised
    left_with: UpdaterFunction | None = None  # that in force when rank 0 deleted the key
    # The value after the last round of each rank that is gone: the others' rounds go on without it.
    seen_last: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass
class ReferenceStore:
    """A store of `num_workers` workers; with `is_async` every push is a round of its own."""

    num_workers: int = 1
    reduction: str = "sum"
    is_async: bool = False
    entries: dict[Key, _Entry] = field(default_factory=dict)
    left: set[int] = field(default_factory=set)
    _updater: UpdaterFunction = _assign
    _num_made: int = 0
    _commits: dict[int, bool] = field(default_factory=dict)

    def init(self, rank: int, key: Key, value: torch.Tensor) -> None:
        """Create a key. In a real job only rank 0's value counts, so only rank 0 calls this here.

        If the rank has deleted an earlier one, it waits until all have.
        """
        if key in self.entries:
            if rank in self.entries[key].deleted:
                raise WouldWait
            raise KeyAlreadyInitialized(f"key {key!r} is initialised")
        self._num_made += 1
        pushes: list[list[_Push | None]] = [[] for _ in range(self.num_workers)]
        self.entries[key] = _Entry(value.clone(), self._num_made, pushes)

    def push(
        self,
        rank: int,
        key: Key,
        values: Sequence[torch.Tensor] | object,
        apply: bool = True,
        count: int | None = None,
        weight: float | None = None,
    ) -> None:
        """Contribute to the next round of this rank: one tensor per device, or ABSENT.

        In a mean they count as `weight`; without one as `count`, by default their number.
        """
        entry = self.entry(rank, key)
        tensors = [] if values is ABSENT or weight == 0 else list(values)  # type: ignore[call-overload]
        for tensor in tensors:
            check_matches("value", tensor, key, tuple(entry.value.shape), entry.value.dtype)
        self._check_free(entry, rank, key)
        total = None
        for tensor in tensors:  # devices first, in list order
            total = tensor.clone() if total is None else total + tensor
        for other, pushes in enumerate(entry.pushes):
            if other == rank:
                count = len(tensors) if count is None else count
                pushes.append(_Push(total, count, weight, apply, self._updater))
            elif self.is_async:  # a round without other workers
                pushes.append(None)
        self._advance(key, entry)

    def pull(self, rank: int, key: Key) -> torch.Tensor:
        """Return the value after as many rounds as this rank has pushed."""
        return self.read(rank, key, self.entry(rank, key))

    def read(self, rank: int, key: Key, entry: _Entry) -> torch.Tensor:
        """Return the value of a pull that was called when the key was `entry`, which may be deleted now."""
        self._check_free(entry, rank, key)
        return entry.seen_last.get(rank, entry.value).clone()

    def put(self, rank: int, key: Key, value: torch.Tensor) -> None:
        """Replace a value outside rounds, after all of this rank's pushes."""
        entry = self.entry(rank, key)
        self._check_free(entry, rank, key)
        entry.value.copy_(value)
        entry.version += 1

    def commit(
        self,
        rank: int,
        *,
        max_norm: float | None = None,
        skip: bool = False,
        check_finite: bool = False,
        apply: bool = True,
    ) -> CommitResult | None:
        """Commit pushes made with `apply=False`: the last worker's call applies them, others get None."""
        self._commits[rank] = skip
        if len(self._commits) + len(self.left) < self.num_workers:
            return None
        asked_to_skip = any(self._commits.values())
        self._commits.clear()
        ranks = range(self.num_workers)
        sums = {
            key: self._sum(entry)
            for key, entry in self.entries.items()
            if any(self._is_uncommitted(entry, each) for each in ranks)
        }
        if max_norm is not None:
            _check_scalable(sums)
        values = [_real(total) for total in sums.values() if total is not None]
        norm = math.hypot(*[each for value in values for each in value.flatten().tolist()])
        if not apply:
            return CommitResult(applied=False, norm=norm)
        finite = all(bool(value.isfinite().all()) for value in values)
        skip = asked_to_skip or (check_finite and not finite)
        scale = 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
        for key, total in sums.items():
            scaled = total if total is None or scale == 1.0 else total * scale
            self._apply(key, self.entries[key], None if skip else scaled)
        return CommitResult(applied=not skip, norm=None if max_norm is None and not check_finite else norm)

    def set_updater(self, rank: int, updater: UpdaterFunction | str) -> None:
        """Set the updater, from this rank's next push on: in a real job rank 0's setting counts."""
        self._updater = NAMED[updater] if isinstance(updater, str) else updater

    def leave(self, rank: int) -> None:
        """Remove a rank: rounds no longer wait for it. Its pushes count; uncommitted ones are dropped."""
        self.left.add(rank)
        for key in list(self.entries):
            self._go_on_without(rank, key)

    def delete(self, rank: int, key: Key) -> None:
        """Remove a rank from a key, as `leave` does. When all have deleted it, the name is free."""
        entry = self.entry(rank, key)
        entry.deleted.add(rank)
        if rank == 0:
            entry.left_with = self._updater
        self._go_on_without(rank, key)

    def keys(self, rank: int) -> list[Key]:
        """Return the keys that a rank has not deleted."""
        return [key for key, entry in self.entries.items() if rank not in entry.deleted]

    def info(self, rank: int, key: Key) -> tuple[int, int]:
        """Return round and version."""
        entry = self.entry(rank, key)
        return entry.round, entry.version

    def entry(self, rank: int, key: Key) -> _Entry:
        """Return what a rank means by a key."""
        if key not in self.entries or rank in self.entries[key].deleted:
            raise KeyNotInitialized(f"key {key!r} is not initialised")
        return self.entries[key]

    def _go_on_without(self, rank: int, key: Key) -> None:
        entry = self.entries[key]
        if self._is_uncommitted(entry, rank):
            entry.pushes[rank].pop()
        if len(entry.pushes[rank]) <= entry.round:
            entry.seen_last[rank] = entry.value.clone()
        self._advance(key, entry)
        if self.left | entry.deleted >= set(range(self.num_workers)):
            del self.entries[key]

    def _check_free(self, entry: _Entry, rank: int, key: Key) -> None:
        if rank in entry.failures:
            raise entry.failures.pop(rank)
        if self._is_uncommitted(entry, rank):
            raise UncommittedPush(f"key {key!r} awaits commit")
        if entry.round < len(entry.pushes[rank]):
            raise WouldWait

    def _is_uncommitted(self, entry: _Entry, rank: int) -> bool:
        last = entry.pushes[rank][-1] if entry.pushes[rank] else None
        return last is not None and not last.apply

    def _parts(self, entry: _Entry) -> dict[int, _Push]:
        """Return the contributions to the open round by rank, in rank order."""
        in_round = (
            (rank, each[entry.round]) for rank, each in enumerate(entry.pushes) if len(each) > entry.round
        )
        return {rank: push for rank, push in in_round if push is not None}

    def _advance(self, key: Key, entry: _Entry) -> None:
        while parts := self._parts(entry):
            waits = any(
                len(pushes) <= entry.round and rank not in self.left | entry.deleted
                for rank, pushes in enumerate(entry.pushes)
            )
            if waits or not all(part.apply for part in parts.values()):
                return
            self._apply(key, entry, self._sum(entry))

    def _sum(self, entry: _Entry) -> torch.Tensor | None:
        total: torch.Tensor | None = None
        parts = [part for part in self._parts(entry).values() if part.total is not None]
        if self.reduction == "mean" and len(parts) > 1 and any(part.weight is not None for part in parts):
            return _weighted_mean(parts, entry.value.dtype)
        for part in parts:  # then workers, in rank order
            total = part.total if total is None or part.total is None else total + part.total
        if total is None or self.reduction == "sum":
            return total
        mean = _wide(total) / sum(part.count for part in parts)
        return mean.to(total.dtype)

    def _apply(self, key: Key, entry: _Entry, total: torch.Tensor | None) -> None:
        """End the open round. It uses the updater in force when its lowest rank pushed.

        If rank 0, which makes the settings, has deleted the key before it pushed, that in force then.
        """
        parts = self._parts(entry)
        for part in parts.values():
            part.apply = True
        if total is not None:
            self._update(key, entry, total, parts)
        entry.round += 1
        for rank in (self.left | entry.deleted) & set(parts):
            entry.seen_last[rank] = entry.value.clone()

    def _update(self, key: Key, entry: _Entry, total: torch.Tensor, parts: dict[int, _Push]) -> None:
        changed = entry.value.clone()
        try:
            updater = parts[min(parts)].updater
            if 0 not in parts and entry.left_with is not None:
                updater = entry.left_with
            updater(key, total, changed)
        except Exception as exc:  # noqa: BLE001  (raised at each contributor)
            error = UpdaterError(f"key {key!r}: {''.join(traceback.format_exception(exc))}")
            entry.failures.update(dict.fromkeys(parts, error))
            return
        entry.value.copy_(changed)
        entry.version += 1
