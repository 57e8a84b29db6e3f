"""LocalStore: the store of a single process, with one or several devices.

`local` sums on the CPU and keeps its values there. `device` sums on the GPUs and keeps each value on
one of them: the first push of a key places it on the least loaded GPU among those it is pushed from.

The one worker's push is the whole round, so a push merges and applies before it returns, and raises
any error of the updater. A call holds one lock, `_lock`, throughout; it is reentrant, so an updater may
call its own store from the same thread.
"""

from __future__ import annotations

import concurrent.futures
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch

from tensorkv.arrays import (
    accumulate_dtype,
    check_has_mean,
    check_matches,
    check_summable,
    dtype_from_name,
    dtype_name,
    new_tensor,
    size_bytes,
    unreadable,
)
from tensorkv.checkpoint.files import PieceReader, check_files, load_newest, write_slices
from tensorkv.checkpoint.folder import Saving
from tensorkv.checkpoint.records import (
    FileRecord,
    Index,
    KeyRecord,
    PieceRecord,
    SavedSettings,
    batches,
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
from tensorkv.errors import (
    Hints,
    MemoryLimitReached,
    SettingMismatch,
    StoreClosed,
    UncommittedPush,
    UpdaterError,
    already_initialized,
    not_initialized,
)
from tensorkv.keys import PullBatch, PushBatch, answer, check_keys
from tensorkv.norms import clip_factor, total_norm
from tensorkv.plain import Key
from tensorkv.reduce import broadcast, lightest, sum_devices
from tensorkv.server.commits import all_finite, norms_of, scale, unscalable
from tensorkv.server.memory import short_of
from tensorkv.store import CommitResult, KeyInfo, KVStore, Reduction, UpdaterFunction
from tensorkv.updaters.base import Assign, Update
from tensorkv.updaters.groups import OptimizerGroup
from tensorkv.updaters.optimizer import find_optimizer, optimizer_spec
from tensorkv.updaters.settings import (
    Setting,
    SettingsTable,
    apply_all,
    build,
    build_from_argument,
    restored_settings,
)
from tensorkv.work import Work

CPU_KINDS = ("local", "local_update_cpu", "local_allreduce_cpu")
DEVICE_KINDS = ("device", "local_allreduce_device")
LOCAL_KINDS = CPU_KINDS + DEVICE_KINDS

_CPU = torch.device("cpu")
_Load = tuple[KeyRecord, Callable[[KeyRecord], SliceState]]


@dataclass(slots=True)
class _Uncommitted:
    """A merged round that waits for commit. `merged` is None if the push was ABSENT."""

    merged: torch.Tensor | None
    setting: Setting


@dataclass(slots=True, eq=False)
class _Slot:
    """A key of the store. `value` is private to us and contiguous; `setting` applies to later rounds."""

    number: int
    key: Key
    value: torch.Tensor
    setting: Setting
    pull_device: torch.device  # of a pull without out
    placed: bool = False  # whether `value` is on its final device
    round: int = 0
    version: int = 0
    buffer: torch.Tensor | None = None  # for sums not written straight into `value`; kept between pushes
    uncommitted: _Uncommitted | None = None
    whole: bool = False  # as passed to init; matters if a save is loaded in a job
    loaded: bool = False  # created by a load; the next init keeps its value


@final
class LocalStore(KVStore):
    """A store within one process: rank 0 of 1 worker. The contract is that of `KVStore`."""

    def __init__(self, kind: str, *, store: str, reduction: Reduction, timeout_s: float) -> None:
        super().__init__(kind, store=store, reduction=reduction, timeout_s=timeout_s)
        self._on_devices = kind in DEVICE_KINDS
        self._lock = threading.RLock()  # guards everything below
        self._slots: dict[Key, _Slot] = {}
        self._settings = SettingsTable()
        self._uncommitted: dict[int, _Slot] = {}  # by number: slots with an `uncommitted` round
        self._load_bytes: dict[torch.device, int] = {}
        self._next_number = 0
        self._hints = Hints()

    @property
    def rank(self) -> int:
        """0, as there is one worker."""
        return 0

    @property
    def num_workers(self) -> int:
        """1."""
        return 1

    def _open_beside(self, name: str, kind: str = "dist_sync", reduction: Reduction = "sum") -> KVStore:
        return LocalStore("local", store=name, reduction=reduction, timeout_s=self._timeout_s)

    # ---- values ----------------------------------------------------------------------------------

    def _init(self, keys: tuple[Key, ...], values: list[torch.Tensor], whole: bool) -> None:
        with self._writing():
            if self._slots:  # another thread may have been first
                check_keys(keys, type(next(iter(self._slots))))
            for key, value in zip(keys, values, strict=True):
                self._check_new(key, value)
            for key, value in zip(keys, values, strict=True):
                if key in self._slots:
                    _check_init_of_loaded(self._slots[key], value)
            copies = [
                None if key in self._slots else self._copy(key, value)
                for key, value in zip(keys, values, strict=True)
            ]
            for key, value, copy in zip(keys, values, copies, strict=True):
                if copy is not None:
                    self._create_slot(key, copy, value.device).whole = whole
                else:
                    slot = self._slots[key]
                    slot.loaded = False
                    slot.pull_device = value.device if self._on_devices else _CPU

    def _push(self, batch: PushBatch, apply: bool, async_op: bool) -> Work | None:
        with self._writing():
            slots = self._check_push(batch)
            if async_op:
                return _work(lambda: self._run_round(slots, batch, apply), "push")
            self._run_round(slots, batch, apply)
            return None

    def _pull(self, batch: PullBatch, async_op: bool) -> Any:
        with self._lock:
            slots = self._check_pull(batch)
            if async_op:
                return _work(lambda: self._write(slots, batch), "pull")
            return self._write(slots, batch)

    def _pushpull(self, pushed: PushBatch, pulled: PullBatch, async_op: bool) -> Any:
        def call() -> Any:
            with self._writing():
                self._run_round(push_slots, pushed, True)
            return self._write(pull_slots, pulled)

        with self._lock:
            push_slots = self._check_push(pushed)
            pull_slots = self._check_pull(pulled)
            return _work(call, "pushpull") if async_op else call()

    def _put(self, keys: tuple[Key, ...], values: list[torch.Tensor]) -> None:
        with self._writing():
            slots = [self._slot(key) for key in keys]
            _check_committed(slots, "put")
            for slot, value in zip(slots, values, strict=True):
                check_matches("the value", value, slot.key, slot.value.shape, slot.value.dtype)
            for slot, value in zip(slots, values, strict=True):
                try:
                    slot.value.copy_(value)
                except (RuntimeError, MemoryError) as exc:
                    raise unreadable(exc, slot.key, value) from exc
                slot.version += 1

    def _commit(self, max_norm: float | None, skip: bool, check_finite: bool, apply: bool) -> CommitResult:
        with self._writing():
            slots = [self._uncommitted[number] for number in sorted(self._uncommitted)]
            waiting = [(slot, slot.uncommitted) for slot in slots if slot.uncommitted]
            merged = [(slot, each.merged) for slot, each in waiting if each.merged is not None]
            norm, finite = None, True
            if max_norm is not None or check_finite or not apply:
                if max_norm is not None:
                    _check_scalable(merged)
                norm, finite = _norm([tensor for _, tensor in merged])
            if not apply:
                return CommitResult(applied=False, norm=norm)
            applied = not skip and (finite or not check_finite)
            factor = 1.0 if norm is None else clip_factor(norm, max_norm)
            if applied and factor != 1.0:
                for _, tensor in merged:
                    scale(tensor, factor)
            for slot, _ in waiting:
                slot.uncommitted = None
                slot.round += 1
            self._uncommitted.clear()
            updates = [(slot, each.setting, each.merged) for slot, each in waiting]
            try:
                if applied:
                    _apply(
                        [(slot, setting, tensor) for slot, setting, tensor in updates if tensor is not None]
                    )
            finally:
                for slot, setting, _ in updates:
                    if setting.updater is not slot.setting.updater:  # the updater changed after the push
                        setting.updater.forget(slot.number)
            return CommitResult(applied=applied, norm=norm)

    # ---- settings --------------------------------------------------------------------------------

    def _set_updater(self, updater: UpdaterFunction | str | None, elementwise: bool) -> None:
        built = build_from_argument(updater, elementwise)
        with self._lock:
            self._settings.set_updater(built, None)
            self._settings_changed(None)

    def _set_optimizer(
        self, optimizer: type[torch.optim.Optimizer] | str, groups: Sequence[OptimizerGroup]
    ) -> None:
        optimizer_class = find_optimizer(optimizer)
        specs = [optimizer_spec(optimizer_class, group.options) for group in groups]
        built = [build(spec, optimizer_class) for spec in specs]
        with self._lock:
            for updater, group in zip(built, groups, strict=True):
                for key in self._slots if group.keys is None else group.keys:
                    if key in self._slots:
                        value = self._slots[key].value
                        updater.check_value(key, value.shape, value.dtype, group.options, self._device_type())
            for updater, group in zip(built, groups, strict=True):
                self._settings.set_updater(updater, group.keys)
                self._settings_changed(group.keys)

    def _set_optimizer_options(self, keys: tuple[Key, ...] | None, options: dict[str, Any]) -> None:
        with self._lock:
            if options.get("fused"):
                self._check_fused(options, keys)
            self._settings.set_options(options, keys)
            self._settings_changed(keys)

    def _check_fused(self, options: dict[str, Any], keys: tuple[Key, ...] | None) -> None:
        table = self._settings.copy()
        table.set_options(options, keys)
        for key in self._slots if keys is None else keys:
            slot = self._slots.get(key)
            if slot is not None and table.setting(key) is not self._settings.setting(key):
                table.setting(key).check_value(key, slot.value.shape, slot.value.dtype, self._device_type())

    def _settings_changed(self, keys: tuple[Key, ...] | None) -> None:
        """Adopt a new setting of these keys, or of all."""
        names = self._slots if keys is None else [key for key in keys if key in self._slots]
        for slot in map(self._slots.__getitem__, names):
            old, slot.setting = slot.setting, self._settings.setting(slot.key)
            if old.updater is slot.setting.updater:
                continue
            if slot.uncommitted is None or slot.uncommitted.setting.updater is not old.updater:
                old.updater.forget(slot.number)

    # ---- state -----------------------------------------------------------------------------------

    def _state_dict(self, alone: bool) -> dict[str, Any]:
        with self._writing():
            if alone:
                _check_committed(list(self._slots.values()), "state_dict(alone=True)")
            pieces = [self._pieces(slot) for slot in self._slots.values()]
            return to_state_dict(self._reduction, self._settings.describe(), pieces)

    def _slot_state(self, slot: _Slot) -> SliceState:
        state = slot.setting.updater.state(slot.number)
        return slice_state(slot.key, slot.value, slot.version, state)

    def _pieces(self, slot: _Slot) -> MemoryPieces:
        pieces = MemoryPieces(slot.key, slot.value.shape, slot.whole)
        pieces.add(0, slot.value.numel(), self._slot_state(slot))
        return pieces

    def _load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        reduction, settings, pieces = from_state_dict(state_dict)
        fetch_of = {each.record.key: each.fetch for each in pieces}

        def load(record: KeyRecord) -> SliceState:
            return assemble(record, 0, record.num_elems, fetch_of[record.key])

        with self._writing():
            self._take_over(reduction, settings, [(each.record, load) for each in pieces])

    def _save(self, folder: str, alone: bool) -> None:
        with self._writing():
            slots = list(self._slots.values())
            if alone:
                _check_committed(slots, f"save({folder!r}, alone=True)")
            settings = self._settings.describe()
            slices = [(slot.key, 0, slot.value.numel(), self._slot_state(slot)) for slot in slots]
        files: dict[str, FileRecord] = {}
        pieces: list[PieceRecord] = []
        with Saving(folder) as save:
            for number, group in enumerate(batches([_num_bytes(slot.value) for slot in slots])):
                name = save.file_name(0, number)
                files[name], written = write_slices(folder, name, [slices[each] for each in group])
                pieces += written
                save.touch()
            keys = [
                KeyRecord(
                    slot.key, tuple(slot.value.shape), dtype_name(slot.value.dtype), slot.whole, [piece]
                )
                for slot, piece in zip(slots, pieces, strict=True)
            ]
            index = new_index(self._reduction, settings, files, keys)
            save.publish(encode_index(index), files)

    def _load(self, folder: str) -> None:
        def take_over(index: Index) -> None:
            check_files(folder, index.files)
            with PieceReader(folder) as reader, self._writing():

                def load(record: KeyRecord) -> SliceState:
                    return reader.load(record, 0, record.num_elems)

                self._take_over(index.reduction, index.settings, [(record, load) for record in index.keys])

        load_newest(folder, take_over)

    def _take_over(self, reduction: str, settings: SavedSettings, loads: Sequence[_Load]) -> None:
        """Adopt the keys and settings of a save, or change nothing."""
        check_reduction(reduction, self._reduction)
        if self._slots and loads:
            check_keys([record.key for record, _ in loads], type(next(iter(self._slots))))
        for record, _ in loads:
            slot = self._slots.get(record.key)
            if slot is not None:
                check_replaces(record, slot.value.shape, dtype_name(slot.value.dtype))
            check_summable(dtype_from_name(record.dtype), record.key, mean=self._reduction == "mean")
        table = restored_settings(settings, self._settings)
        found = [(record, load(record)) for record, load in loads]
        self._settings = table
        self._settings_changed(None)
        for record, each in found:
            old = self._slots.get(record.key)
            if old is not None:
                self._drop(old)
            slot = self._create_slot(record.key, each.value.view(record.shape), _CPU)
            slot.loaded, slot.whole = True, record.whole
            slot.version = each.version
            slot.setting.updater.restore(slot.number, each.optimizer_state(record.shape))

    def _barrier(self, timeout_s: float) -> None:
        """Return at once: every push was applied before it returned."""

    # ---- the keys --------------------------------------------------------------------------------

    def _keys(self) -> list[Key]:
        with self._lock:
            return list(self._slots)

    def _has(self, key: Key) -> bool:
        with self._lock:
            return key in self._slots

    def _num_keys(self) -> int:
        with self._lock:
            return len(self._slots)

    def _info(self, key: Key) -> KeyInfo:
        with self._lock:
            slot = self._slot(key)
            return KeyInfo(
                key=key,
                shape=tuple(slot.value.shape),
                dtype=slot.value.dtype,
                version=slot.version,
                round=slot.round,
                updater=slot.setting.updater.spec.name,
                state_bytes=state_bytes(slot.setting.updater.state(slot.number)),
            )

    def _ids_of(self, keys: tuple[Key, ...]) -> tuple[int, ...]:
        with self._lock:
            return tuple(self._slot(key).number for key in keys)

    def _delete(self, keys: tuple[Key, ...]) -> None:
        with self._lock:
            for slot in [self._slot(key) for key in dict.fromkeys(keys)]:
                self._drop(slot)

    def _drop(self, slot: _Slot) -> None:
        del self._slots[slot.key]
        slot.setting.updater.forget(slot.number)
        if slot.uncommitted is not None:
            slot.uncommitted.setting.updater.forget(slot.number)
            del self._uncommitted[slot.number]
        if slot.placed:
            self._load_bytes[slot.value.device] -= _num_bytes(slot.value)

    # ---- the end ---------------------------------------------------------------------------------

    def _close(self) -> None:
        with self._lock:
            self._slots.clear()
            self._uncommitted.clear()
            self._settings = SettingsTable()

    def _abandon(self, why: str) -> None:
        self._close()

    # ---- checks: all of them before anything changes -----------------------------------------------

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the lock, and create tensors that any later call may change.

        Tensors created under the caller's inference mode could not be changed outside of it.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            yield

    def _slot(self, key: Key) -> _Slot:
        slot = self._slots.get(key)
        if slot is not None:
            return slot
        if self._closed:
            raise StoreClosed(f"store {self._name!r} was closed by another thread during the call")
        raise not_initialized(key, self._hints.near(key, self._slots))

    def _check_new(self, key: Key, value: torch.Tensor) -> None:
        if self._reduction == "mean":
            check_has_mean(key, value.dtype)
        self._settings.setting(key).check_value(key, value.shape, value.dtype, self._device_type())

    def _device_type(self) -> str | None:
        """Return the device type that runs updates, None if only a push of a key decides it."""
        return None if self._on_devices and torch.accelerator.is_available() else "cpu"

    def _check_push(self, batch: PushBatch) -> list[_Slot]:
        slots = [self._slot(key) for key in batch.keys]
        _check_committed(slots, "push")
        for slot, tensors in zip(slots, batch.tensors, strict=True):
            for tensor in tensors:
                check_matches("the pushed tensor", tensor, slot.key, slot.value.shape, slot.value.dtype)
        return slots

    def _check_pull(self, batch: PullBatch) -> list[_Slot]:
        slots = [self._slot(key) for key in batch.keys]
        _check_committed(slots, "pull")
        for slot, outs in zip(slots, batch.outs, strict=True):
            for out in outs:
                check_matches("out", out, slot.key, slot.value.shape, slot.value.dtype)
        return slots

    # ---- the work, with the lock held --------------------------------------------------------------

    def _copy(self, key: Key, value: torch.Tensor) -> torch.Tensor:
        device = value.device if self._on_devices else _CPU
        copy = new_tensor(key, value.shape, value.dtype, device)
        try:
            return copy.copy_(value)
        except (RuntimeError, MemoryError) as exc:
            raise unreadable(exc, key, value) from exc

    def _create_slot(self, key: Key, value: torch.Tensor, given_on: torch.device) -> _Slot:
        slot = self._slots[key] = _Slot(
            number=self._next_number,
            key=key,
            value=value,
            setting=self._settings.setting(key),
            pull_device=given_on if self._on_devices else _CPU,
        )
        self._next_number += 1
        return slot

    def _run_round(self, slots: list[_Slot], batch: PushBatch, apply: bool) -> None:
        if self._on_devices:
            self._place(slots, batch)
        updates: list[tuple[_Slot, Setting, torch.Tensor]] = []
        try:
            for slot, tensors, count in zip(slots, batch.tensors, batch.counts, strict=True):
                setting = slot.setting
                if not apply:
                    merged = self._merge(slot, tensors, count) if tensors else None
                    slot.uncommitted = _Uncommitted(merged, setting)
                    self._uncommitted[slot.number] = slot
                    continue
                if not tensors:
                    pass
                elif type(setting.updater) is Assign and self._reduction == "sum":
                    sum_devices(tensors, out=slot.value)
                    slot.version += 1
                elif self._can_be_lent(slot, tensors):
                    updates.append((slot, setting, tensors[0]))
                else:
                    updates.append((slot, setting, self._merge(slot, tensors, count)))
                slot.round += 1
        except (RuntimeError, MemoryError) as exc:  # this key and those after it are unchanged
            raise unreadable(exc, slot.key, tensors[0]) from exc
        finally:
            if updates:
                _apply(updates)

    def _can_be_lent(self, slot: _Slot, tensors: list[torch.Tensor]) -> bool:
        """Whether the updater may work on the caller's tensor itself, without a copy.

        This needs an updater known not to change the pushed tensor, and a tensor with the value's
        layout. A single tensor is its own mean.
        """
        tensor, value = tensors[0], slot.value
        return (
            len(tensors) == 1
            and tensor.dtype is value.dtype
            and tensor.device == value.device
            and tensor.is_contiguous()
            and not (tensor.is_conj() or tensor.is_neg() or tensor.is_inference())
            and _only_reads(slot.setting, value)
        )

    def _merge(self, slot: _Slot, tensors: list[torch.Tensor], count: int) -> torch.Tensor:
        """Return the sum or mean of `tensors` in the slot's buffer, with its value's dtype and device."""
        if slot.buffer is None:
            slot.buffer = torch.empty_like(slot.value)
        buffer = slot.buffer
        if self._reduction == "sum" or count == 1:
            return sum_devices(tensors, out=buffer)
        wide = accumulate_dtype(buffer.dtype)
        if wide is buffer.dtype:
            return sum_devices(tensors, out=buffer).div_(count)
        total = torch.empty_like(buffer, dtype=wide)
        return buffer.copy_(sum_devices(tensors, out=total).div_(count))

    def _place(self, slots: list[_Slot], batch: PushBatch) -> None:
        """Place each key that is pushed for the first time on a device, the largest key first."""
        new: list[tuple[_Slot, list[torch.device]]] = []
        for slot, tensors in zip(slots, batch.tensors, strict=True):
            if tensors:
                slot.pull_device = tensors[0].device
                if not slot.placed:
                    new.append((slot, list(dict.fromkeys(tensor.device for tensor in tensors))))
        for slot, devices in sorted(new, key=lambda each: -_num_bytes(each[0].value)):
            accelerators = [device for device in devices if device.type != "cpu"]
            device = lightest(self._load_bytes, accelerators or [_CPU])
            slot.value = slot.value.to(device)
            slot.placed = True
            self._load_bytes[device] = self._load_bytes.get(device, 0) + _num_bytes(slot.value)

    def _write(self, slots: list[_Slot], batch: PullBatch) -> Any:
        tensors: list[torch.Tensor] = []
        for slot, outs in zip(slots, batch.outs, strict=True):
            try:
                if outs:
                    broadcast(slot.value, outs)
                else:
                    tensors.append(slot.value.to(slot.pull_device, copy=True))
            except (RuntimeError, MemoryError) as exc:
                raise unreadable(exc, slot.key, slot.value) from exc
        return answer(batch, tensors)


def _check_init_of_loaded(slot: _Slot, value: torch.Tensor) -> None:
    """Raise unless an existing key was loaded, and this is its first init since."""
    there = slot.value
    if not slot.loaded:
        raise already_initialized(slot.key, tuple(there.shape))
    if (there.shape, there.dtype) != (value.shape, value.dtype):
        raise SettingMismatch(
            f"init of key {slot.key!r}: shape {tuple(value.shape)} and {value.dtype}, but it was loaded with "
            f"shape {tuple(there.shape)} and {there.dtype}"
        )


def _apply(updates: Sequence[tuple[_Slot, Setting, torch.Tensor]]) -> None:
    """Run all updaters, then raise the failures."""
    failures = apply_all(
        [
            (setting, Update(slot=slot.number, key=slot.key, pushed=merged, stored=slot.value))
            for slot, setting, merged in updates
        ]
    )
    failed = []
    for (slot, _, _), failure in zip(updates, failures, strict=True):
        if failure is None:
            slot.version += 1
        else:
            short = short_of(failure, f"an update of key {slot.key!r}", _no_memory)
            failed.append(short or failure)
    if failed:
        for other in failed[1:]:
            failed[0].add_note(f"and {other}")
        raise failed[0]


def _no_memory(what: str, size_bytes: int | None) -> MemoryLimitReached:
    size = "" if size_bytes is None else f"{size_bytes} bytes of "
    return MemoryLimitReached(f"this process has no memory for {size}{what}; use smaller values, or servers")


def _work(call: Callable[[], Any], what: str) -> Work:
    """Run `call` and return the completed work, with its result or error."""
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    try:
        future.set_result(call())
    except UpdaterError as exc:
        future.set_exception(exc)
    return Work(future, what)


def _only_reads(setting: Setting, value: torch.Tensor) -> bool:
    """Whether the updater is known not to change the pushed tensor.

    Named updaters do not, nor do known optimizers, except torch's `foreach` versions: some of those use
    the gradient as scratch memory, and on a GPU they are the default.
    """
    spec = setting.updater.spec
    if spec.type == "named":
        return True
    return (
        spec.type == "optimizer" and spec.elementwise and value.is_cpu and not setting.options.get("foreach")
    )


def _check_committed(slots: Sequence[_Slot], call: str) -> None:
    for slot in slots:
        if slot.uncommitted is not None:
            raise UncommittedPush(
                f"{call}: key {slot.key!r} was pushed with apply=False; call commit() first"
            )


def _check_scalable(merged: Sequence[tuple[_Slot, torch.Tensor]]) -> None:
    for slot, tensor in merged:
        error = unscalable(slot.key, tensor.dtype)
        if error is not None:
            raise error


def _norm(tensors: Sequence[torch.Tensor]) -> tuple[float, bool]:
    """Return the Euclidean norm over all `tensors`, and whether all elements are finite."""
    norms = norms_of(tensors)
    return total_norm(norms), all(map(math.isfinite, norms)) or all_finite(tensors)


def _num_bytes(tensor: torch.Tensor) -> int:
    return size_bytes(tuple(tensor.shape), tensor.dtype)
