"""The scheduler's state of one store: its members, keys, placements, settings and barriers.

RULES
1. The setting rank is the lowest rank that has not left. Only it creates keys and makes settings: the
   scheduler tells it to (`lead`), it does so on the servers, and concludes.
2. An init of a key that exists must agree with it. A rank that has deleted the key waits until all have. A
   rank's k-th setting is matched with the k-th of the setting rank; it waits until there is one, and must
   agree with it.
3. A refused proposal changes nothing. A setting that the servers refused counts: other ranks that make
   it get the same refusal.
4. A key exists until every member has deleted it. Nothing is remembered of it then.

Answers are (rank, message) pairs in `out`. Nothing here blocks: calls that cannot be answered yet are
queued and retried after every change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import final

from tensorkv.checkpoint.records import SavedSettings, check_settings
from tensorkv.errors import (
    Hints,
    InvalidValue,
    LoadError,
    NotElementwise,
    ProtocolError,
    SettingMismatch,
    TensorKVError,
    WaitTimeout,
    already_initialized,
    closed_meanwhile,
    deleted_here,
    not_elementwise,
    not_initialized,
    to_wire,
)
from tensorkv.norms import total_norm
from tensorkv.partition import ValueSize, place
from tensorkv.plain import Key
from tensorkv.scheduler.collectives import Gathering
from tensorkv.scheduler.settings import SettingLog
from tensorkv.wire import messages as m
from tensorkv.wire.messages import KeyEntry, KeySpec, SettingRecord, SliceEntry

MAX_JOB_BYTES = 1 << 44
"""Maximum size of all values of a job. More is a mistake, and its slices alone would fill the memory."""

MAX_WAITS = 4096
"""Maximum calls of one rank that wait at one time."""
_AGREED = ("shape", "dtype", "whole")


@final
@dataclass(slots=True)
class Placement:
    """State of placement: the bounds of `tensorkv.partition`, and the bytes each server holds so far."""

    bound_bytes: int
    max_slice_bytes: int
    load_bytes: list[int]
    next_slice_id: int = 1
    next_key_id: int = 1


@final
@dataclass(slots=True, eq=False)
class _StoredKey:
    """A key that exists: what its init said, and the ranks that have initialised or deleted it.

    If a load has made it, an init checks only its shape and dtype.
    """

    spec: KeySpec
    entry: KeyEntry
    loaded: bool = False
    inited: set[int] = field(default_factory=set)
    deleted: set[int] = field(default_factory=set)


@final
@dataclass(slots=True)
class _WaitingInit:
    """A waiting init; `missing` is its first key that cannot be created yet."""

    rank: int
    message: m.ProposeInit
    missing: KeySpec | None = None


@final
class Catalog:
    """One store, as the scheduler sees it."""

    def __init__(self, store: int, opened: m.JoinStore, num_workers: int, placement: Placement) -> None:
        self.store = store
        self.opened = opened
        self.num_workers = num_workers
        self.left: set[int] = set()
        self.out: list[tuple[int, m.Message]] = []
        self._placement = placement
        self._keys: dict[Key, _StoredKey] = {}
        self._partly_deleted: set[Key] = set()  # those that some rank has deleted
        self._creating: dict[int, tuple[int, KeySpec, KeyEntry]] = {}  # by key id; first is the rank
        self._loading: list[tuple[KeySpec, KeyEntry]] = []
        self._under_way: set[Key] = set()  # names that are being created or loaded
        self._settings = SettingLog()
        self._gathering = Gathering()
        self._waiting_inits: list[_WaitingInit] = []
        self._waiting_settings: list[tuple[int, m.ProposeSetting]] = []
        self._barrier: dict[int, int] = {}  # rank -> request
        self._hints = Hints()

    @property
    def setting_rank(self) -> int:
        """The lowest rank that has not left."""
        return min(set(range(self.num_workers)) - self.left, default=0)

    @property
    def members(self) -> set[int]:
        """The ranks that have not left."""
        return set(range(self.num_workers)) - self.left

    # ---- init ------------------------------------------------------------------------------------

    def propose_init(self, rank: int, message: m.ProposeInit) -> None:
        """Handle a rank's init: lead, agree, refuse, or wait for the setting rank or for deletes.

        Raises:
            ProtocolError: the list has a key twice or an impossible shape, or the rank waits too often.
        """
        _check_specs(message.keys)
        self._check_waits(rank, (each.rank for each in self._waiting_inits))
        self._waiting_inits.append(_WaitingInit(rank, message))
        self._retry()

    def _try_init(self, waiting: _WaitingInit) -> bool:
        rank, message = waiting.rank, waiting.message
        if waiting.missing is not None and self._still_missing(rank, waiting.missing):
            return False
        lead: list[bool] = []
        try:
            for spec in message.keys:
                leads = self._leads(rank, spec)
                if leads is None:
                    waiting.missing = spec
                    return False
                lead.append(leads)
        except TensorKVError as error:
            self._refuse(rank, message.request, error)
            return True
        new = [spec for spec, leads in zip(message.keys, lead, strict=True) if leads]
        refusal = self._too_much(new)
        if refusal is not None:
            self._refuse(rank, message.request, refusal)
            return True
        placed = iter(self._place(new, self._settings.is_elementwise))
        entries: list[KeyEntry] = []
        for spec, leads in zip(message.keys, lead, strict=True):
            if leads:
                entry = self._begin(spec, next(placed))
                self._creating[entry.key_id] = (rank, spec, entry)
            else:
                entry = self._keys[spec.key].entry
                self._keys[spec.key].inited.add(rank)
            entries.append(entry)
        self.out.append((rank, m.InitReply(message.request, entries, lead)))
        return True

    def _still_missing(self, rank: int, spec: KeySpec) -> bool:
        """Whether a rank still waits for this key; if so, the rest of its list need not be checked."""
        try:
            return self._leads(rank, spec) is None
        except TensorKVError:
            return False

    def _check_waits(self, rank: int, waiters: Iterable[int]) -> None:
        if sum(waiter == rank for waiter in waiters) >= MAX_WAITS:
            raise ProtocolError(f"rank {rank} waits for {MAX_WAITS} answers already")

    def _leads(self, rank: int, spec: KeySpec) -> bool | None:
        """Return True if this rank creates the key, False if it agrees, None if it must wait."""
        there = self._keys.get(spec.key)
        if there is None:
            return None if spec.key in self._under_way or rank != self.setting_rank else True
        if rank in there.deleted:  # others have not
            return None
        if rank in there.inited:
            raise already_initialized(spec.key, there.entry.shape)
        _check_agrees(rank, spec, there.spec, ("shape", "dtype") if there.loaded else _AGREED)
        return False

    def _too_much(self, specs: Sequence[KeySpec]) -> InvalidValue | None:
        size_bytes = sum(_num_elems(spec.shape) * spec.itemsize_bytes for spec in specs)
        too_much = size_bytes + sum(self._placement.load_bytes) > MAX_JOB_BYTES
        return _too_large(specs, size_bytes) if too_much else None

    def _place(
        self, specs: Sequence[KeySpec], is_elementwise: Callable[[Key], bool]
    ) -> list[list[SliceEntry]]:
        sizes = [
            ValueSize(
                _num_elems(spec.shape),
                spec.itemsize_bytes,
                not spec.whole and is_elementwise(spec.key),
            )
            for spec in specs
        ]
        placement = self._placement
        all_parts = place(
            sizes,
            placement.load_bytes,
            bound_bytes=placement.bound_bytes,
            max_slice_bytes=placement.max_slice_bytes,
        )
        entries: list[list[SliceEntry]] = []
        for parts in all_parts:
            first = placement.next_slice_id
            placement.next_slice_id += len(parts)
            entries.append(
                [SliceEntry(first + i, part.server, part.start, part.stop) for i, part in enumerate(parts)]
            )
        return entries

    def _begin(self, spec: KeySpec, slices: list[SliceEntry]) -> KeyEntry:
        """Note that a key is being created or loaded; return its entry."""
        key_id = self._placement.next_key_id
        entry = KeyEntry(spec.key, key_id, spec.shape, spec.dtype, m.EPOCH, slices, spec.whole)
        self._placement.next_key_id += 1
        self._add_load(entry, spec.itemsize_bytes)
        self._under_way.add(spec.key)
        return entry

    def _withdraw(self, spec: KeySpec, entry: KeyEntry) -> None:
        """Note that creating or loading a key has failed."""
        self._under_way.discard(entry.key)
        self._add_load(entry, -spec.itemsize_bytes)

    def _add_load(self, entry: KeyEntry, bytes_per_elem: int) -> None:
        for each in entry.slices:
            self._placement.load_bytes[each.server] += (each.stop - each.start) * bytes_per_elem

    def conclude_init(self, rank: int, message: m.ConcludeInit) -> None:
        """Handle the end of an init: the leading rank has stored the values, or the keys do not exist."""
        for key_id in message.key_ids:
            created = self._creating.get(key_id)
            if created is None:
                continue
            leader, spec, entry = created
            if leader != rank:
                raise ProtocolError(f"rank {rank} concludes an init that rank {leader} makes")
            del self._creating[key_id]
            if message.error is None:
                self._under_way.discard(entry.key)
                self._keys[entry.key] = _StoredKey(spec, entry, inited={rank})
            else:
                self._withdraw(spec, entry)
        self.out.append((rank, m.Done(message.request)))
        self._retry()

    # ---- keys ------------------------------------------------------------------------------------

    def lookup(self, rank: int, message: m.Lookup) -> None:
        """Answer with the entries of keys; of all that the rank has not deleted, in their order, for None."""
        if message.keys is None:
            found = [each.entry for each in self._keys.values() if rank not in each.deleted]
            self.out.append((rank, m.Entries(message.request, sorted(found, key=lambda e: e.key_id))))
            return
        entries: list[KeyEntry] = []
        for key in message.keys:
            if not self._has(rank, key):
                self._refuse(rank, message.request, self._not_initialized(rank, key))
                return
            entries.append(self._keys[key].entry)
        self.out.append((rank, m.Entries(message.request, entries)))

    def _has(self, rank: int, key: Key) -> bool:
        """Whether a key exists, and this rank has not deleted it."""
        return key in self._keys and rank not in self._keys[key].deleted

    def _not_initialized(self, rank: int, key: Key) -> TensorKVError:
        if key in self._keys:
            return deleted_here(key, sorted(self.members - self._keys[key].deleted))
        return not_initialized(key, self._hints.near(key, self._keys))

    def count_keys(self, rank: int, message: m.CountKeys) -> None:
        """Answer with the number of keys that a rank has not deleted, among the named ones or in all."""
        if message.keys is None:
            number = len(self._keys) - sum(not self._has(rank, key) for key in self._partly_deleted)
        else:
            number = sum(self._has(rank, key) for key in message.keys)
        self.out.append((rank, m.NumKeys(message.request, number)))

    def delete(self, rank: int, message: m.DeleteKeys) -> None:
        """Note which keys a rank has deleted; skip those that a load has replaced meanwhile."""
        for key, key_id in message.keys:
            there = self._keys.get(key)
            if there is not None and there.entry.key_id == key_id:
                there.deleted.add(rank)
                self._partly_deleted.add(key)
        self._drop_deleted(self._partly_deleted.intersection(key for key, _ in message.keys))
        self._retry()

    def _drop_deleted(self, keys: Iterable[Key]) -> None:
        """Drop those of these keys that every member has deleted."""
        members = self.members
        for key in [key for key in keys if members <= self._keys[key].deleted]:
            self._drop(key)

    def _drop(self, key: Key) -> _StoredKey:
        there = self._keys.pop(key)
        self._partly_deleted.discard(key)
        self._add_load(there.entry, -there.spec.itemsize_bytes)
        return there

    # ---- settings --------------------------------------------------------------------------------

    def propose_setting(self, rank: int, message: m.ProposeSetting) -> None:
        """Handle a rank's next setting: lead, agree, refuse, or wait for the setting rank.

        Raises:
            ProtocolError: the rank waits too often.
        """
        self._check_waits(rank, (waiter for waiter, _ in self._waiting_settings))
        self._waiting_settings.append((rank, message))
        self._retry()

    def _try_setting(self, rank: int, message: m.ProposeSetting) -> bool:
        number = self._settings.num_made(rank)
        if number == self._settings.num_begun:
            sliced = self._sliced_key(message.record)
            if sliced is not None:  # the setting rank's would be refused too, so do not wait for it
                self._refuse(rank, message.request, sliced)
                return True
            if rank != self.setting_rank:
                return False
            number = self._settings.begin(rank, message.record)
            self.out.append((rank, m.SettingReply(message.request, number, True)))
            return True
        try:
            attempt = self._settings.match(rank, message.record)
        except SettingMismatch as error:
            self._refuse(rank, message.request, error)
            return True
        if attempt is not None and not attempt.done:
            return False
        self._settings.agreed(rank, self.members)
        if attempt is not None and attempt.error is not None:
            self.out.append((rank, m.Failed(message.request, *attempt.error)))
        else:
            self.out.append((rank, m.SettingReply(message.request, number, False)))
        return True

    def _sliced_key(self, record: SettingRecord) -> NotElementwise | None:
        """Return the error if this updater needs whole values and one of its keys is sliced."""
        if record.updater is None or record.updater.elementwise:
            return None
        for key in self._keys if record.keys is None else record.keys:
            there = self._keys.get(key)
            if there is not None and len(there.entry.slices) > 1:
                return not_elementwise(record.updater.name, key, there.entry.shape, len(there.entry.slices))
        return None

    def conclude_setting(self, rank: int, message: m.ConcludeSetting) -> None:
        """Handle the end of a setting: the setting rank has made it on all servers, or they refused it."""
        self._settings.conclude(rank, message.number, message.error, self.members)
        self.out.append((rank, m.Done(message.request)))
        self._retry()

    # ---- saving and loading ----------------------------------------------------------------------

    def together(self, rank: int, message: m.Together) -> None:
        """Handle a rank's arrival at a collective call."""
        self._gathering.add(rank, message)
        self._retry()

    def propose_load(self, rank: int, message: m.ProposeLoad) -> None:
        """Place the slices of a load for the rank that leads it.

        If it asks again, its previous load has failed: another save replaced the one it read.

        Raises:
            ProtocolError: the rank does not lead, or the list is invalid.
        """
        if rank != self._gathering.leader:
            raise ProtocolError(f"rank {rank} loads keys, but does not lead a load")
        _check_specs(message.keys)
        self._end_load(None)
        try:
            check_settings(message.settings, "the save")
        except LoadError as exc:
            self._refuse(rank, message.request, exc)
            return
        names = {spec.key for spec in message.keys}
        error = self._cannot_load(names, message.settings) or self._too_much(message.keys)
        if error is not None:
            self._refuse(rank, message.request, error)
            return
        placed = self._place(message.keys, lambda key: message.settings.spec_of(key).elementwise)
        self._loading = [
            (spec, self._begin(spec, slices)) for spec, slices in zip(message.keys, placed, strict=True)
        ]
        self.out.append((rank, m.LoadReply(message.request, [entry for _, entry in self._loading])))

    def _cannot_load(self, names: set[Key], settings: SavedSettings) -> TensorKVError | None:
        for key in names & self._under_way:
            return already_initialized(key, ())
        for key, there in self._keys.items():
            if len(there.entry.slices) > 1 and key not in names and not settings.spec_of(key).elementwise:
                return NotElementwise(
                    f"the save's updater {settings.spec_of(key).name!r} needs whole values, but key {key!r}, "
                    "which is not in it, is kept in slices; delete it first"
                )
        return None

    def conclude_together(self, rank: int, message: m.ConcludeTogether) -> None:
        """Handle the end of a collective call: the leader is done, or has failed.

        Raises:
            ProtocolError: the settings are not valid for a load.
        """
        reply = m.TogetherReply(message.request, False, None)
        if rank == self._gathering.leader:
            if message.settings is not None:
                try:
                    check_settings(message.settings, "the load")
                except LoadError as exc:
                    raise ProtocolError(str(exc)) from exc
            replaced = self._end_load(message.settings if message.error is None else None)

            def replaced_for(rank: int) -> list[KeyEntry]:
                return [each.entry for each in replaced if rank not in each.deleted]

            reply.settings, reply.replaced = message.settings, replaced_for(rank)
            self.out += self._gathering.conclude(message.error, message.settings, replaced_for)
        self.out.append((rank, reply))
        self._retry()

    def _end_load(self, settings: SavedSettings | None) -> list[_StoredKey]:
        """Adopt the keys and settings of a load, and return the keys that it replaces; None withdraws it."""
        loading, self._loading = self._loading, []
        replaced: list[_StoredKey] = []
        for spec, entry in loading:
            if settings is None:
                self._withdraw(spec, entry)
                continue
            self._under_way.discard(entry.key)
            if entry.key in self._keys:
                replaced.append(self._drop(entry.key))
            self._keys[entry.key] = _StoredKey(spec, entry, loaded=True)
        if settings is not None:  # restart the count of settings for all ranks
            updaters = settings.updaters
            records = [SettingRecord(each.keys, updater=updaters[each.updater]) for each in settings.entries]
            self._settings.replace(records, self.num_workers)
        return replaced

    # ---- barriers and leaving --------------------------------------------------------------------

    def barrier(self, rank: int, message: m.Barrier) -> None:
        """Handle a rank's arrival; when all members have arrived, all go on."""
        self._barrier[rank] = message.request
        self._retry()

    def give_up(self, rank: int, request: int) -> None:
        """Stop waiting for a call that has reached its deadline, and tell its rank.

        If the request does not wait here, its reply is in flight: that call was made, and counts.
        """
        waiting = self.waiting(rank, request)
        self._gathering.give_up(rank, request)
        if self._barrier.get(rank) == request:
            del self._barrier[rank]
        self._waiting_inits = [
            each for each in self._waiting_inits if (each.rank, each.message.request) != (rank, request)
        ]
        self._waiting_settings = [
            (r, w) for r, w in self._waiting_settings if (r, w.request) != (rank, request)
        ]
        if waiting is not None and self.waiting(rank, request) is None:
            self._refuse(rank, request, WaitTimeout(f"{waiting.where} was given up"))

    def unfinished(self, rank: int) -> list[int]:
        """Return the slices of the keys that a rank is creating on the servers."""
        entries = [entry for leader, _, entry in self._creating.values() if leader == rank]
        if rank == self._gathering.leader:
            entries += [entry for _, entry in self._loading]
        return [each.slice_id for entry in entries for each in entry.slices]

    def close_for(self, rank: int, message: m.LeaveStore) -> None:
        """Handle a clean leave. Refuse calls of this rank's other threads that still wait here."""
        for waiter, request in self._waits():
            if waiter == rank:
                self._refuse(rank, request, closed_meanwhile())
        self.leave(rank)
        self.out.append((rank, m.Done(message.request)))

    def leave(self, rank: int) -> None:
        """Remove a rank. Withdraw the keys it was creating and the settings it was making."""
        self.left.add(rank)
        self._barrier.pop(rank, None)
        if rank == self._gathering.leader:
            self._end_load(None)
        self.out += self._gathering.leave(rank)
        self._waiting_inits = [each for each in self._waiting_inits if each.rank != rank]
        self._waiting_settings = [each for each in self._waiting_settings if each[0] != rank]
        for key_id, (leader, spec, entry) in list(self._creating.items()):
            if leader == rank:
                del self._creating[key_id]
                self._withdraw(spec, entry)
        self._drop_deleted(self._partly_deleted)
        self._settings.leave(rank, self.members)
        self._retry()

    def close(self) -> None:
        """Release the load of this store's keys in the shared placement. All ranks have left."""
        for key in list(self._keys):
            self._drop(key)

    def waiting(self, rank: int, request: int) -> m.Waiting | None:
        """Return which ranks a request of this rank waits for, None if it does not wait here."""
        if self._barrier.get(rank) == request:
            return m.Waiting(request, sorted(self.members - set(self._barrier)), "a barrier")
        gathering = self._gathering.waiting(rank, request, self.members)
        if gathering is not None:
            return gathering
        for init in self._waiting_inits:
            if (init.rank, init.message.request) == (rank, request):
                return self._waiting_init(init)
        for waiter, setting in self._waiting_settings:
            if (waiter, setting.request) == (rank, request):
                number = self._settings.num_made(rank) + 1
                return m.Waiting(request, [self.setting_rank], f"setting number {number}")
        return None

    def _waiting_init(self, init: _WaitingInit) -> m.Waiting:
        missing = init.missing or init.message.keys[0]
        there = self._keys.get(missing.key)
        if there is None:
            return m.Waiting(init.message.request, [self.setting_rank], f"init of {missing.key!r}")
        where = f"init of {missing.key!r}, which they have not deleted yet"
        return m.Waiting(init.message.request, sorted(self.members - there.deleted), where)

    def _waits(self) -> list[tuple[int, int]]:
        """Return rank and request of every waiting call."""
        calls = [*self._barrier.items()]
        calls += [(each.rank, each.message.request) for each in self._waiting_inits]
        calls += [(rank, each.request) for rank, each in self._waiting_settings]
        return calls + self._gathering.waiters()

    def waits_of(self, ranks: Iterable[int]) -> list[tuple[int, m.Waiting]]:
        """Return the waiting calls of these ranks: each rank, and which ranks its call waits for."""
        asked = set(ranks)
        waits = [(rank, self.waiting(rank, request)) for rank, request in self._waits() if rank in asked]
        return [(rank, waiting) for rank, waiting in waits if waiting is not None]

    def report(self) -> list[str]:
        """Return a line per waiting call, with the workers it waits for."""
        lines: list[str] = []
        for rank, waiting in self.waits_of(range(self.num_workers)):
            missing = ", ".join(map(str, waiting.ranks))
            lines.append(f"worker {rank}, in {waiting.where}, waits for worker {missing}")
        return lines

    def _retry(self) -> None:
        """Answer all calls that can be answered now."""
        again = True
        while again:
            inits, self._waiting_inits = self._waiting_inits, []
            self._waiting_inits = [w for w in inits if not self._try_init(w)]
            settings, self._waiting_settings = self._waiting_settings, []
            self._waiting_settings = [w for w in settings if not self._try_setting(*w)]
            again = len(inits) + len(settings) > len(self._waiting_inits) + len(self._waiting_settings)
        self.out += self._gathering.begin(self.members)
        if self._barrier and self.members <= set(self._barrier):
            for rank, request in sorted(self._barrier.items()):
                self.out.append((rank, m.Done(request)))
            self._barrier.clear()

    def _refuse(self, rank: int, request: int, error: TensorKVError) -> None:
        self.out.append((rank, m.Failed(request, *to_wire(error))))


@final
class CommitReduction:
    """Collects the servers' reports of a commit, and decides once all are in."""

    def __init__(self, num_servers: int) -> None:
        self._num_servers = num_servers
        self._ready: dict[tuple[int, int], dict[int, m.CommitReady]] = {}

    def add(self, server: int, ready: m.CommitReady) -> m.CommitDecision | None:
        """Add a server's report. Return the decision if it was the last.

        Raises:
            ProtocolError: another commit is under way, or a norm is below 0.
        """
        if any(store == ready.store and number != ready.number for store, number in self._ready):
            raise ProtocolError(
                f"server {server} is ready for commit {ready.number}, and another is under way"
            )
        if any(norm < 0 for norm in ready.norms):
            raise ProtocolError("a norm below 0")
        name = (ready.store, ready.number)
        there = self._ready.setdefault(name, {})
        there[server] = ready
        if len(there) < self._num_servers:
            return None
        del self._ready[name]
        in_order = [there[rank] for rank in sorted(there)]
        error = next((each.error for each in in_order if each.error is not None), None)
        norm = total_norm([norm for each in in_order for norm in each.norms])
        skip = any(each.skip for each in in_order) or not all(each.finite for each in in_order)
        return m.CommitDecision(ready.store, ready.number, not skip and error is None, norm, error)

    def forget(self, store: int) -> None:
        """Drop the reports of a store that has ended."""
        for name in [name for name in self._ready if name[0] == store]:
            del self._ready[name]


def _check_specs(specs: Sequence[KeySpec]) -> None:
    if len({spec.key for spec in specs}) < len(specs):
        raise ProtocolError("an init names a key twice")
    if not all(map(_can_be, specs)):
        raise ProtocolError("an init has a shape or itemsize that cannot be")


def _check_agrees(rank: int, spec: KeySpec, first: KeySpec, agreed: Sequence[str]) -> None:
    for what in agreed:
        mine, theirs = getattr(spec, what), getattr(first, what)
        if mine != theirs:
            raise SettingMismatch(
                f"init of key {spec.key!r}: rank {rank} has {what} {mine}, but it was initialised with "
                f"{theirs}; all ranks must agree"
            )


def _can_be(spec: KeySpec) -> bool:
    """Whether a tensor can have this shape. Byte offsets have 63 bits."""
    product = 1
    for size in spec.shape:
        product *= max(size, 1)
        if size < 0 or product >= 1 << 59:
            return False
    return len(spec.shape) <= 64 and 1 <= spec.itemsize_bytes <= 16


def _too_large(specs: Sequence[KeySpec], size_bytes: int) -> InvalidValue:
    return InvalidValue(
        f"init of {len(specs)} keys, the first {specs[0].key!r}: {size_bytes} bytes more would be over the "
        f"{MAX_JOB_BYTES} that one job may hold"
    )


def _num_elems(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
