"""The suite itself: a store made of the reference passes it, and stores with one fault each do not."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tensorkv import errors
from tensorkv.arrays import accumulate_dtype, check_matches, dtype_name
from tensorkv.checkpoint.files import PieceReader, load_newest, write_slices
from tensorkv.checkpoint.folder import Saving
from tensorkv.checkpoint.records import (
    Index,
    KeyRecord,
    check_reduction,
    check_replaces,
    encode_index,
    new_index,
)
from tensorkv.checkpoint.slices import (
    MemoryPieces,
    SliceState,
    assemble,
    from_state_dict,
    slice_state,
    state_bytes,
    to_state_dict,
)
from tensorkv.keys import ABSENT, PullBatch, PushBatch, answer
from tensorkv.store import CommitResult, KeyInfo, KVStore
from tensorkv.testing import checks_rounds
from tensorkv.testing.conformance import BAD_INPUTS, BadInput, Case, StoreMaker, applicable
from tensorkv.testing.reference import ReferenceStore, WouldWait
from tensorkv.updaters.base import FunctionUpdater, Update, named_spec
from tensorkv.updaters.optimizer import find_optimizer, optimizer_spec
from tensorkv.updaters.settings import SettingsTable, build, restored_settings
from tensorkv.updaters.spec import UpdaterSpec
from tensorkv.work import Work


@dataclass
class Job:
    """What the workers of a model job share, under one lock. `reference` does the arithmetic."""

    reference: ReferenceStore
    changed: threading.Condition = field(default_factory=threading.Condition)
    table: SettingsTable = field(default_factory=SettingsTable)
    settings: list[Any] = field(default_factory=list)  # of rank 0, to be compared
    barriers: list[int] = field(default_factory=list)
    commits: dict[int, Any] = field(default_factory=dict)
    outcomes: list[Any] = field(default_factory=list)
    broken: str = ""
    calls: dict[int, str] = field(default_factory=dict)  # that all make together
    together: Any = None  # what came of it
    loaded: set[Any] = field(default_factory=set)  # keys that rank 0 has not initialised since a load
    others: dict[str, Job] = field(default_factory=dict)  # more stores, by name


class ModelStore(KVStore):
    """A worker of a model job: the calls of a store, the waiting, and for the rest the reference."""

    def __init__(self, kind: str, job: Job, rank: int, store: str, reduction: Any, timeout_s: float) -> None:
        super().__init__(kind, store=store, reduction=reduction, timeout_s=timeout_s)
        self.job, self.reference, self._rank = job, job.reference, rank
        self.num_settings = 0
        self.pool = ThreadPoolExecutor(1)  # one call after the other, so that they stay in order

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def num_workers(self) -> int:
        return self.reference.num_workers

    def _when(self, ready: Callable[[], Any], what: str, timeout_s: float | None = None) -> Any:
        """Return what `ready` returns once it raises no WouldWait any more."""
        timeout_s = self._timeout_s if timeout_s is None else timeout_s

        def attempt() -> bool:
            try:
                results.append(ready())
            except WouldWait:
                return False
            return True

        results: list[Any] = []
        with self.job.changed:
            if not self.job.changed.wait_for(attempt, timeout_s):
                raise errors.WaitTimeout(f"{what} waits for workers {self._missing()}")
            self.job.changed.notify_all()
        return results[0]

    def _missing(self) -> list[int]:
        mine = self.job.barriers[self.rank]
        return [rank for rank, count in enumerate(self.job.barriers) if count < mine]

    def _submit(self, call: Callable[[], Any], what: str, async_op: bool) -> Any:
        future: Future[Any] = self.pool.submit(call)
        return Work(future, what) if async_op else future.result()

    # ---- values

    def _init(self, keys: Any, values: Any, whole: bool) -> None:
        if self._reduction == "mean" and any(not v.dtype.is_floating_point for v in values):
            raise errors.DtypeMismatch(f"there is no mean of integers: {keys}")
        if self.rank == 0:
            self._when(lambda: self._create_all(keys, values), "init")
            return
        for key, value in zip(keys, values, strict=True):
            self._when(lambda key=key: self._there(key), "init")
            self._check_agrees(key, value)

    def _create_all(self, keys: Any, values: Any) -> None:
        there = self.reference.entries
        mine = self.job.loaded.intersection(keys)
        for key, value in zip(keys, values, strict=True):
            if key in there and 0 in there[key].deleted:
                raise WouldWait
            if key in mine:
                self._check_agrees(key, value)
        if self.job.broken == "init overwrites":
            for key, value in zip(keys, values, strict=True):
                if key in mine:
                    there[key].value.copy_(value)
        for key in keys:
            if key in there and key not in mine:
                raise errors.KeyAlreadyInitialized(f"key {key!r} is initialised; delete it first")
        for key, value in zip(keys, values, strict=True):
            if key not in mine:
                self.reference.init(0, key, value.detach())
        self.job.loaded -= mine

    def _check_agrees(self, key: Any, value: torch.Tensor) -> None:
        entry = self.reference.entries[key]
        if entry.value.shape != value.shape or entry.value.dtype != value.dtype:
            raise errors.SettingMismatch(
                f"init of key {key!r}: {tuple(value.shape)} {value.dtype}, "
                f"but rank 0 has {tuple(entry.value.shape)} {entry.value.dtype}"
            )

    def _there(self, key: Any) -> Any:
        if key not in self.reference.keys(self.rank):
            raise WouldWait
        return self.reference.entries[key]

    def _push(self, batch: PushBatch, apply: bool, async_op: bool) -> Any:
        if not apply and self.reference.is_async:
            raise errors.NotSupported("there is no commit in an asynchronous kind")
        self._check_push(batch)
        copies = [[tensor.clone() for tensor in each] for each in batch.tensors]
        if self.job.broken == "keeps memory":
            copies = batch.tensors
        return self._submit(lambda: self._push_now(batch, copies, apply), "push", async_op)

    def _check_push(self, batch: PushBatch) -> None:
        with self.job.changed:
            values = [self._entry(key).value for key in batch.keys]
            for key in batch.keys:
                self._check_committed(key)
            for key, value, tensors in zip(batch.keys, values, batch.tensors, strict=True):
                for tensor in tensors:
                    check_matches("value", tensor, key, tuple(value.shape), value.dtype)

    def _check_committed(self, key: Any) -> None:
        if self.reference._is_uncommitted(self.reference.entries[key], self.rank):
            raise errors.UncommittedPush(f"key {key!r} awaits commit")

    def _push_now(self, batch: PushBatch, copies: list[list[torch.Tensor]], apply: bool) -> None:
        todo = list(zip(batch.keys, copies, batch.counts, strict=True))

        def attempt() -> None:
            left = [each for each in todo if not self._contribute(*each, apply=apply, weight=batch.weight)]
            if len(left) < len(todo):
                todo[:] = left
                self.job.changed.notify_all()
            if todo:
                raise WouldWait

        self._when(attempt, "push")

    def _contribute(
        self, key: Any, tensors: list[torch.Tensor], count: int, apply: bool, weight: float | None
    ) -> bool:
        value = self._entry(key).value
        wide = [tensor.to(accumulate_dtype(value.dtype)) for tensor in tensors]
        total = sum(wide[1:], start=wide[0]).to(value.dtype) if wide else None
        self.reference._updater = self._updater()
        try:
            self.reference.push(self.rank, key, ABSENT if total is None else [total], apply, count, weight)
        except WouldWait:
            return False
        last = self.reference.entries[key].pushes[self.rank][-1]
        if self.job.broken == "keeps memory" and last is not None:
            last.total = tensors[0]
        return True

    def _pull(self, batch: PullBatch, async_op: bool) -> Any:
        entries = self._check_pull(batch)
        return self._submit(lambda: self._pull_now(batch, entries), "pull", async_op)

    def _check_pull(self, batch: PullBatch) -> list[Any]:
        with self.job.changed:
            entries = [self._entry(key) for key in batch.keys]
            for key in batch.keys:
                self._check_committed(key)
            for key, entry, outs in zip(batch.keys, entries, batch.outs, strict=True):
                for out in outs:
                    check_matches("out", out, key, tuple(entry.value.shape), entry.value.dtype)
        return entries

    def _pull_now(self, batch: PullBatch, entries: list[Any]) -> Any:
        tensors: list[torch.Tensor] = []
        failures: list[errors.UpdaterError] = []
        for key, entry, outs in zip(batch.keys, entries, batch.outs, strict=True):
            try:
                value = self._when(lambda key=key, entry=entry: self._value(key, entry), "pull")
            except errors.UpdaterError as exc:
                failures.append(exc)
                continue
            for out in outs:
                out.copy_(value)
            if not outs:
                tensors.append(value)
        for other in failures[1:]:
            failures[0].add_note(str(other))
        if failures:
            raise failures[0]
        return answer(batch, tensors)

    def _value(self, key: Any, entry: Any) -> torch.Tensor:
        if self.job.broken == "pull does not wait":
            return torch.as_tensor(entry.value.clone())
        return self.reference.read(self.rank, key, entry)

    def _pushpull(self, pushed: PushBatch, pulled: PullBatch, async_op: bool) -> Any:
        self._check_push(pushed)
        entries = self._check_pull(pulled)
        copies = [[tensor.clone() for tensor in each] for each in pushed.tensors]

        def both() -> Any:
            self._push_now(pushed, copies, True)
            return self._pull_now(pulled, entries)

        return self._submit(both, "pushpull", async_op)

    def _put(self, keys: Any, values: Any) -> None:
        with self.job.changed:
            entries = [self._entry(key) for key in keys]
            for key in keys:
                self._check_committed(key)
            for key, value, entry in zip(keys, values, entries, strict=True):
                check_matches("value", value, key, tuple(entry.value.shape), entry.value.dtype)
        for key, value in zip(keys, values, strict=True):
            if self.job.broken == "put does not wait":
                self.reference.entries[key].value.copy_(value)
                continue
            self._when(lambda key=key, value=value: self.reference.put(self.rank, key, value), "put")

    # ---- commit

    def _commit(self, max_norm: float | None, skip: bool, check_finite: bool, apply: bool) -> CommitResult:
        if self.reference.is_async:
            raise errors.NotSupported("there is no commit in an asynchronous kind")
        with self.job.changed:
            number = len(self.job.outcomes)
            uncommitted = [
                key
                for key, entry in self.reference.entries.items()
                if self.reference._is_uncommitted(entry, self.rank)
            ]
            apply = apply or self.job.broken == "a measure applies"
            self.job.commits[self.rank] = (uncommitted, max_norm, check_finite, apply), skip

        def decided() -> Any:
            if len(self.job.outcomes) <= number:
                self._decide_commit()
            return self.job.outcomes[number]

        outcome = self._when(decided, "commit")
        if isinstance(outcome, errors.TensorKVError):
            raise type(outcome)(str(outcome))
        assert isinstance(outcome, CommitResult)
        return outcome

    def _decide_commit(self) -> None:
        commits, left = self.job.commits, self.reference.left
        if len(commits) + len(left - set(commits)) < self.num_workers:
            raise WouldWait
        first = commits[min(commits)][0]
        together = {key for (keys, *_), _ in commits.values() for key in keys}
        lacking = [
            key
            for rank, ((keys, *_), _) in commits.items()
            for key in together.difference(keys)
            if rank not in self.reference.entries[key].deleted
        ]
        if lacking or any(terms[1:] != first[1:] for terms, _ in commits.values()):
            text = f"keys, max_norm, check_finite or apply differ: {commits}"
            self.job.outcomes.append(errors.CommitMismatch(text))
        else:
            skips = [skip for _, skip in commits.values()]
            skip = all(skips) if self.job.broken == "skip is and-ed" else any(skips)
            result: Any = None
            try:
                for rank in commits:
                    result = self.reference.commit(
                        rank, max_norm=first[1], skip=skip, check_finite=first[2], apply=first[3]
                    )
            except errors.DtypeMismatch as exc:  # told to every rank
                result = exc
            self.job.outcomes.append(result)
        commits.clear()

    # ---- settings

    def _updater(self) -> Callable[[Any, torch.Tensor, torch.Tensor], None]:
        table = self.job.table.copy()

        def update(key: Any, pushed: torch.Tensor, stored: torch.Tensor) -> None:
            current = self.job.table if self.job.broken == "settings hold at once" else table
            setting = current.setting(key)
            slot = hash((key, self.reference.entries[key].number))
            (failure,) = setting.updater.apply([Update(slot, key, pushed.clone(), stored)], setting.options)
            if failure is not None:
                raise failure

        update.table = table  # type: ignore[attr-defined]
        return update

    def _agree(self, setting: Any, change: Callable[[], None]) -> None:
        def agreed() -> None:
            if self.rank == 0:
                change()
                self.job.settings.append(setting)
            elif len(self.job.settings) <= self.num_settings:
                raise WouldWait
            elif self.job.settings[self.num_settings] != setting:
                raise errors.SettingMismatch(
                    f"{setting} differs from rank 0's {self.job.settings[self.num_settings]}"
                )
            self.num_settings += 1

        self._when(agreed, "a setting")

    def _set_updater(self, updater: Any, elementwise: bool) -> None:
        if updater is None or isinstance(updater, str):
            built: Any = build(named_spec(updater or "assign"))
        else:
            name = updater.__qualname__
            built = FunctionUpdater(updater, UpdaterSpec(type="function", name=name, elementwise=elementwise))
        self._agree(built.spec, lambda: self.job.table.set_updater(built, None))

    def _set_optimizer(self, optimizer: Any, groups: Any) -> None:
        found = find_optimizer(optimizer)
        for group in groups:
            built = build(optimizer_spec(found, group.options), found)
            for key, entry in list(self.reference.entries.items()):
                if group.keys is None or key in group.keys:
                    built.check_value(key, entry.value.shape, entry.value.dtype, group.options)
            change = functools.partial(self.job.table.set_updater, built, group.keys)
            self._agree((built.spec, group.keys), change)

    def _set_optimizer_options(self, keys: Any, options: dict[str, Any]) -> None:
        self._agree((options, keys), lambda: self.job.table.set_options(options, keys))

    # ---- state

    def _together(self, call: str, lead: Callable[[], Any]) -> Any:
        with self.job.changed:
            self.job.calls[self.rank] = call
        self._barrier(self._timeout_s)
        calls = {r: c for r, c in self.job.calls.items() if r not in self.reference.left}
        if self.rank == min(calls):
            self.job.together = (None, None)
            try:
                if len(set(calls.values())) > 1:
                    told = [f"rank {rank} calls {call}" for rank, call in sorted(calls.items())]
                    raise errors.SettingMismatch(f"the calls differ: {told}")
                with self.job.changed:
                    self.job.together = (lead(), None)
            except errors.TensorKVError as error:
                self.job.together = (None, error)
        self._barrier(self._timeout_s)
        result, error = self.job.together
        self._barrier(self._timeout_s)  # everybody has read it
        if error is not None:
            raise type(error)(str(error))
        return result if self.rank == min(calls) else None

    def _alone(self, call: str) -> tuple[SettingsTable, list[tuple[Any, int, int, SliceState]]]:
        """Return what this worker saves alone: settings of its next rounds, and keys as of its last ones."""
        if self.reference.is_async:
            raise errors.NotSupported(
                f"{call}: rounds of an 'async' store wait for nobody; let all workers save"
            )

        def there() -> Any:
            for key, entry in self.reference.entries.items():
                self._check_committed(key)
                behind = entry.round < len(entry.pushes[self.rank])
                if behind and self.job.broken != "a save alone does not wait":
                    raise WouldWait
            table = self._due()
            return table, self._slices(table)

        found: tuple[SettingsTable, list[Any]] = self._when(there, call)
        return found

    def _due(self) -> SettingsTable:
        """Return the settings of the open rounds: those with which rank 0 has pushed, or the newest."""
        tables: dict[Any, SettingsTable] = {}
        for key, entry in self.reference.entries.items():
            ahead = entry.pushes[0][entry.round :]
            newest = not ahead or self.job.broken == "a save alone has the newest settings"
            tables[key] = self.job.table if newest else ahead[0].updater.table  # type: ignore[union-attr]
        found = next(iter(tables.values()), self.job.table).copy()
        for key, table in tables.items():
            found.keep(key, table.setting(key))
        return found

    def _slices(self, table: SettingsTable) -> list[tuple[Any, int, int, SliceState]]:
        found = []
        for key, entry in self.reference.entries.items():
            state = table.setting(key).updater.state(hash((key, entry.number)))
            each = slice_state(key, entry.value, entry.version, state)
            found.append((key, 0, entry.value.numel(), each))
        return found

    def _state_dict(self, alone: bool) -> dict[str, Any]:
        def make(table: SettingsTable, slices: Any) -> dict[str, Any]:
            keys = []
            for key, start, stop, each in slices:
                pieces = MemoryPieces(key, self.reference.entries[key].value.shape, False)
                pieces.add(start, stop, each)
                keys.append(pieces)
            return to_state_dict(self._reduction, table.describe(), keys)

        if alone:
            return make(*self._alone("state_dict(alone=True)"))
        newest = self.job.table
        return self._together("state_dict()", lambda: make(newest, self._slices(newest))) or {}

    def _load_state_dict(self, state_dict: Any) -> None:
        def lead() -> None:
            reduction, settings, keys = from_state_dict(state_dict)
            found = [
                (each.record, assemble(each.record, 0, each.record.num_elems, each.fetch)) for each in keys
            ]
            self._take_over(reduction, settings, found)

        self._together("load_state_dict()", lead)

    def _save(self, folder: str, alone: bool) -> None:
        def write(table: SettingsTable, slices: Any) -> None:
            with Saving(folder) as save:
                name = save.file_name(0, 0)
                file, pieces = write_slices(folder, name, slices)
                keys = []
                for (key, _, _, each), piece in zip(slices, pieces, strict=True):
                    shape = tuple(self.reference.entries[key].value.shape)
                    keys.append(KeyRecord(key, shape, dtype_name(each.value.dtype), False, [piece]))
                index = new_index(self._reduction, table.describe(), {name: file}, keys)
                save.publish(encode_index(index), index.files)

        if alone:
            write(*self._alone(f"save({folder!r}, alone=True)"))
        else:
            self._together(f"save({folder!r})", lambda: write(self.job.table, self._slices(self.job.table)))

    def _load(self, folder: str) -> None:
        def lead() -> None:
            def read(index: Index) -> Any:
                with PieceReader(folder) as reader:
                    return index, [(each, reader.load(each, 0, each.num_elems)) for each in index.keys]

            index, found = load_newest(folder, read)
            self._take_over(index.reduction, index.settings, found)

        self._together(f"load({folder!r})", lead)

    def _take_over(self, reduction: Any, settings: Any, found: Any) -> None:
        check_reduction(reduction, self._reduction)
        for record, _ in found:
            entry = self.reference.entries.get(record.key)
            if entry is not None:
                check_replaces(record, entry.value.shape, dtype_name(entry.value.dtype))
        self.job.table = restored_settings(settings, self.job.table)
        for record, each in found:
            self.reference.entries.pop(record.key, None)
            self.reference.init(0, record.key, each.value.view(record.shape))
            entry = self.reference.entries[record.key]
            entry.version = 0 if self.job.broken == "versions start anew" else each.version
            slot = hash((record.key, entry.number))
            if self.job.broken != "state is lost":
                setting = self.job.table.setting(record.key)
                setting.updater.restore(slot, each.optimizer_state(record.shape))
            self.job.loaded.add(record.key)

    # ---- together, the keys, the end

    def _barrier(self, timeout_s: float) -> None:
        with self.job.changed:
            self.job.barriers[self.rank] += 1
            mine = self.job.barriers[self.rank]
            self.job.changed.notify_all()

        def there() -> None:
            for entry in self.reference.entries.values():
                if self.rank in entry.failures:
                    raise entry.failures.pop(self.rank)
            counts = enumerate(self.job.barriers)
            if self.job.broken == "barrier does not wait":
                return
            if any(count < mine and rank not in self.reference.left for rank, count in counts):
                raise WouldWait

        self._when(there, "barrier", timeout_s)

    def _keys(self) -> list[Any]:
        with self.job.changed:
            return self.reference.keys(self.rank)

    def _has(self, key: Any) -> bool:
        with self.job.changed:
            return key in self.reference.keys(self.rank)

    def _num_keys(self) -> int:
        with self.job.changed:
            return len(self.reference.keys(self.rank))

    def _ids_of(self, keys: Any) -> Any:
        with self.job.changed:
            return tuple(self._entry(key).number for key in keys)

    def _entry(self, key: Any) -> Any:
        return self.reference.entry(self.rank, key)

    def _info(self, key: Any) -> KeyInfo:
        with self.job.changed:
            entry = self._entry(key)
            return KeyInfo(
                key=key,
                shape=tuple(entry.value.shape),
                dtype=entry.value.dtype,
                version=entry.version,
                round=entry.round,
                updater=self.job.table.setting(key).updater.spec.name,
                state_bytes=self._state_bytes(key, entry),
            )

    def _state_bytes(self, key: Any, entry: Any) -> int:
        if self.job.broken == "state is not counted":
            return 0
        return state_bytes(self.job.table.setting(key).updater.state(hash((key, entry.number))))

    def _delete(self, keys: Any) -> None:
        with self.job.changed:
            for key in keys:
                self._entry(key)
            for key in keys:
                self.reference.delete(self.rank, key)
                if key not in self.reference.entries:
                    self.job.loaded.discard(key)
            self.job.changed.notify_all()

    def _close(self) -> None:
        with self.job.changed:
            self.reference.leave(self.rank)
            self.job.changed.notify_all()
        self.pool.shutdown()

    def _abandon(self, why: str) -> None:
        self._close()


@dataclass(frozen=True)
class ModelMaker:
    """Opens model jobs, their workers threads. `broken` names a fault they are given."""

    kind: str
    is_async: bool = False
    broken: str = ""
    max_workers: int = 3
    distributed: bool = True
    has_policies: bool = False

    @property
    def other_kind(self) -> str:
        return "model_sync" if self.is_async else "model_async"

    def open(self, kv: KVStore, kind: str, store: str, **create_options: Any) -> KVStore:
        assert isinstance(kv, ModelStore)
        options: dict[str, Any] = {"reduction": "sum", "timeout_s": 20.0, **create_options}
        size, terms = kv.num_workers, (kind == "model_async", options["reduction"])
        with kv.job.changed:
            other = kv.job.others.get(store)
            if other is None or len(other.reference.left) == size:
                reference = ReferenceStore(size, options["reduction"], kind == "model_async")
                other = kv.job.others[store] = Job(reference, barriers=[0] * size)
            open_terms = (other.reference.is_async, other.reference.reduction)
            if open_terms != terms:
                raise errors.StoreMismatch(f"store {store!r} is open with {open_terms}, not {terms}")
            return ModelStore(kind, other, kv.rank, store, **options)

    def run(self, fn: Callable[[KVStore], Any], num_workers: int = 1, **create_options: Any) -> list[Any]:
        options: dict[str, Any] = {
            "store": "default",
            "reduction": "sum",
            "timeout_s": 20.0,
            **create_options,
        }
        faulty = FAULTS.get(self.broken, ReferenceStore)
        job = Job(faulty(num_workers, options["reduction"], self.is_async), broken=self.broken)
        job.barriers = [0] * num_workers
        stores = [ModelStore(self.kind, job, rank, **options) for rank in range(num_workers)]

        def work(kv: KVStore) -> Any:
            with kv:
                return fn(kv)

        with ThreadPoolExecutor(num_workers) as pool:
            futures = [pool.submit(work, kv) for kv in stores]
        return [future.result() for future in futures]


# ---- faults ------------------------------------------------------------------------------------------


class SumsBackwards(ReferenceStore):
    def _parts(self, entry: Any) -> Any:
        return dict(reversed(super()._parts(entry).items()))


class LeavingDrops(ReferenceStore):
    def leave(self, rank: int) -> None:
        for entry in self.entries.values():
            del entry.pushes[rank][entry.round :]
        super().leave(rank)


class NeverWaits(ReferenceStore):
    def _check_free(self, entry: Any, rank: int, key: Any) -> None:
        pass


class SpoilsOnError(ReferenceStore):
    def _update(self, key: Any, entry: Any, total: Any, parts: Any) -> None:
        before = entry.version
        super()._update(key, entry, total, parts)
        if entry.version == before:
            entry.value += total


class CountsAbsent(ReferenceStore):
    def _apply(self, key: Any, entry: Any, total: Any) -> None:
        super()._apply(key, entry, total)
        entry.version = entry.round


class PutIsARound(ReferenceStore):
    def put(self, rank: int, key: Any, value: torch.Tensor) -> None:
        super().put(rank, key, value)
        self.entries[key].round += 1


class DeletesForAll(ReferenceStore):
    def delete(self, rank: int, key: Any) -> None:
        super().delete(rank, key)
        self.entries.pop(key, None)


class KeepsUncommitted(ReferenceStore):
    def delete(self, rank: int, key: Any) -> None:
        dropped = self._is_uncommitted(self.entry(rank, key), rank)
        last = self.entries[key].pushes[rank][-1:]
        super().delete(rank, key)
        if dropped and key in self.entries:
            self.entries[key].pushes[rank] += last


class IgnoresWeights(ReferenceStore):
    def push(self, *args: Any, **kwargs: Any) -> None:
        super().push(*args[:5], **kwargs)


class WeighsEachDevice(ReferenceStore):
    def push(
        self, rank: int, key: Any, values: Any, apply: bool = True, count: Any = None, weight: Any = None
    ) -> None:
        super().push(rank, key, values, apply, count, weight and weight * (count or len(values)))


FAULTS = {
    "ignores weights": IgnoresWeights,
    "weighs each device": WeighsEachDevice,
    "sums backwards": SumsBackwards,
    "leaving drops": LeavingDrops,
    "never waits": NeverWaits,
    "spoils on error": SpoilsOnError,
    "counts absent": CountsAbsent,
    "deletes for all": DeletesForAll,
    "keeps uncommitted": KeepsUncommitted,
    "put is a round": PutIsARound,
}
"""Faults of the arithmetic; those of the waiting stand in ModelStore."""

CAUGHT_BY = {
    "ignores weights": ["weighted_mean-2", "weights_of_some-2"],
    "weighs each device": ["weights_of_some-2"],
    "sums backwards": ["sums_in_rank_order-3", "large_values_of_workers-3"],
    "leaving drops": ["what_a_left_worker_pushed_counts-2"],
    "never waits": ["double_push-2", "free_keys_go_at_once-2", "pull_waits_for_the_round-2"],
    "spoils on error": ["updater_error", "updater_error_of_workers-2"],
    "counts absent": ["absent", "absent_workers-2", "commit_skips"],
    "deletes for all": ["delete_is_leaving-2", "init_after_delete_waits_for_all-2"],
    "keeps uncommitted": ["delete_drops_uncommitted-2"],
    "versions start anew": ["saved_state_as_dict", "save_and_load-1", "load_into_a_store_in_use"],
    "state is lost": ["saved_state_as_dict", "save_and_load-2", "settings_are_saved"],
    "init overwrites": ["save_and_load-3", "load_into_a_store_in_use"],
    "state is not counted": ["bytes_held", "bytes_held_of_workers-2"],
    "put is a round": ["put", "put_in_an_open_round-2"],
    "put does not wait": ["put_waits_for_own_round-2", "put_of_large_values"],
    "keeps memory": ["pushed_memory_is_free_at_once-2"],
    "pull does not wait": ["pull_waits_for_the_round-2", "updater_error"],
    "skip is and-ed": ["commit_skip_is_ored-2"],
    "a measure applies": ["commit_measures-2"],
    "settings hold at once": ["setting_holds_from_the_next_push_of_rank_0-2"],
    "barrier does not wait": ["barrier_timeout-2"],
    "a save alone does not wait": ["save_alone_waits_for_own_round-2"],
    "a save alone has the newest settings": ["save_alone_as_of_own_round-2"],
}

MAKERS: list[StoreMaker] = [ModelMaker("model_sync"), ModelMaker("model_async", is_async=True)]


# ---- the reference passes ------------------------------------------------------------------------------


def _params(of: Callable[[StoreMaker], list[Any]]) -> list[Any]:
    return [
        pytest.param(maker, line, id=f"{maker.kind}-{line.name}") for maker in MAKERS for line in of(maker)
    ]


@pytest.mark.parametrize(("maker", "case"), _params(applicable))
def test_the_reference_passes(maker: StoreMaker, case: Case) -> None:
    case.run(maker)


@pytest.mark.parametrize(("maker", "bad"), _params(lambda maker: BAD_INPUTS))
def test_the_reference_refuses(maker: StoreMaker, bad: BadInput) -> None:
    bad.run(maker)


# ---- a faulty store does not -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "name"), [(fault, name) for fault, names in CAUGHT_BY.items() for name in names]
)
def test_a_fault_is_caught(fault: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A call that wrongly does not wait ends at once; a thread of its own may be late, on a busy machine.
    monkeypatch.setattr(checks_rounds, "IN_TIME_S", 2.0)
    maker = ModelMaker("model_sync", broken=fault)
    (case,) = [case for case in applicable(maker) if case.name == name]
    with pytest.raises((AssertionError, errors.TensorKVError)):
        case.run(maker)


@pytest.mark.parametrize("bad", BAD_INPUTS, ids=lambda bad: bad.name)
def test_a_call_that_is_not_refused_is_caught(bad: BadInput) -> None:
    harmless = BadInput(bad.name, lambda kv: kv.pull("w"), bad.error, bad.standard)
    with pytest.raises(AssertionError, match="was not raised"):
        harmless.run(MAKERS[0])


def test_a_refused_call_that_changes_something_is_caught() -> None:
    def push_then_fail(kv: KVStore) -> None:
        kv.push("b", torch.ones(3))
        kv.push("b", torch.ones(4))

    bad = BadInput("half", push_then_fail, errors.ShapeMismatch, ValueError)
    with pytest.raises(AssertionError, match="'b' after the refused call"):
        bad.run(MAKERS[0])
