"""What the leading worker does to save and load a store of a job: it tells the servers what to do.

Values go from servers to files and back without passing through a worker; for `state_dict` they do pass.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, final

import torch

from tensorkv.arrays import bytes_of, check_summable, dtype_from_name
from tensorkv.checkpoint.files import load_newest
from tensorkv.checkpoint.folder import Saving, order_of
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
    pack,
    records_of,
    to_state_dict,
    unpack,
)
from tensorkv.errors import ProtocolError, TensorKVError, from_wire
from tensorkv.interrupts import GIVEN_UP, ctrl_c
from tensorkv.keys import check_keys, check_new_keys
from tensorkv.peer.code import describe_code
from tensorkv.plain import Key
from tensorkv.updaters.settings import SettingsTable, restored_settings
from tensorkv.wire import messages as m
from tensorkv.wire.validate import check_saved, check_slice
from tensorkv.worker.conversations import begin_save
from tensorkv.worker.core import WorkerCore
from tensorkv.worker.driver import Driver
from tensorkv.worker.link import ServerLink
from tensorkv.worker.requests import Asked, Exchange, replies_of
from tensorkv.worker.session import Session

if TYPE_CHECKING:
    from rich.progress import Progress

PROGRESS_BYTES = 64 << 20
"""Minimum size of a save or load that shows its progress."""


@final
@dataclass(frozen=True, slots=True)
class Contents:
    """What a save has: keys and settings; and whether this worker saves alone."""

    entries: list[m.KeyEntry]
    settings: SavedSettings
    alone: bool = False


@final
class StateTransfer:
    """Saves and loads one store, in the worker that leads; the others wait meanwhile."""

    def __init__(
        self,
        job: Session,
        core: WorkerCore,
        driver: Driver,
        reduction: Literal["sum", "mean"],
        timeout_s: float,
    ) -> None:
        self._job = job
        self._core = core
        self._driver = driver
        self._store = core.store
        self._reduction = reduction
        self._timeout_s = timeout_s

    # ---- out -------------------------------------------------------------------------------------

    def newest(self) -> Contents:
        """Return all keys and the newest settings, for a save that all workers make."""
        return Contents(self._entries(), self._settings())

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let servers keep what a save by this worker alone needs from `begin` on, until the block ends.

        Use it within `Session.whole`: servers must learn of the end.
        """
        try:
            yield
        finally:
            if self._job.failure() is None:
                self._job.tell_all(m.EndSave(self._store), self._store)

    def begin(self) -> Contents | None:
        """Return the keys and settings of a save by this worker alone.

        Returns None if a round that this worker has pushed is not applied; see `begin_save`.
        """
        entries, control = self._entries(), self._job.control
        begun = self._driver.converse(begin_save(self._core, lambda: control.num_lost > 0), "saving alone")
        return None if begun is None else Contents(entries, _settings_of(entries, begun), alone=True)

    def save(self, folder: str, contents: Contents) -> None:
        """Let every server write its slices, then publish the save."""
        with Saving(folder) as save:
            files, pieces = self._write_files(folder, save, contents)
            keys = [_record_of(each, pieces) for each in contents.entries]
            index = new_index(self._reduction, contents.settings, files, keys)
            save.publish(encode_index(index), files)

    def _write_files(
        self, folder: str, save: Saving, contents: Contents
    ) -> tuple[dict[str, FileRecord], dict[int, PieceRecord]]:
        """Let every server write its slices; return the files, and the pieces by slice."""
        entries, alone = contents.entries, contents.alone
        files: dict[str, FileRecord] = {}
        pieces: dict[int, PieceRecord] = {}
        todo = [
            (each.server, each.slice_id, (each.stop - each.start) * dtype_from_name(entry.dtype).itemsize)
            for entry in entries
            for each in entry.slices
        ]
        range_of = {each.slice_id: (each.start, each.stop) for entry in entries for each in entry.slices}
        per_server = [[line[1:] for line in todo if line[0] == rank] for rank in range(len(self._job.links))]

        def make(request: int, *, server: int, number: int, things: list[int]) -> m.Message:
            return m.SaveSlices(request, self._store, folder, save.file_name(server, number), things, alone)

        def take(server: int, number: int, slice_ids: list[int], reply: m.SavedFile) -> None:
            save.touch()
            files[save.file_name(server, number)] = reply.file
            told = [(piece.start, piece.stop) for piece in reply.pieces]
            if told != [range_of[slice_id] for slice_id in slice_ids]:
                raise ProtocolError(f"server {server} has saved others than the {len(slice_ids)} slices")
            pieces.update(zip(slice_ids, reply.pieces, strict=True))

        self._in_batches("saving", per_server, make, take)
        return files, pieces

    def state_dict(self, contents: Contents) -> dict[str, Any]:
        """Return what `KVStore.state_dict` promises."""
        keys = (self._fetch_key(entry, contents.alone) for entry in contents.entries)
        return to_state_dict(self._reduction, contents.settings, keys)

    def _fetch_key(self, entry: m.KeyEntry, alone: bool) -> MemoryPieces:
        """Ask the servers for the slices of a key."""
        exchanges: list[tuple[ServerLink, int, _SliceExchange]] = []
        with self._job.order, self._job.whole:
            self._job.check_open(self._store)
            for each in entry.slices:
                link, exchange = self._job.links[each.server], _SliceExchange(entry, each)
                number = link.open(exchange)
                exchanges.append((link, number, exchange))
                link.put(m.AskSlice(number, self._store, each.slice_id, alone))
        self._await([(link, number) for link, number, _ in exchanges], f"state of {entry.key!r}")
        pieces = MemoryPieces(entry.key, entry.shape, entry.whole)
        for each, (_, _, exchange) in zip(entry.slices, exchanges, strict=True):
            pieces.add(each.start, each.stop, exchange.result())
        return pieces

    # ---- in --------------------------------------------------------------------------------------

    def load(self, folder: str, current: SettingsTable) -> SavedSettings:
        """Let every server read its slices; return the settings that apply afterwards."""
        return load_newest(folder, lambda index: self._load(folder, index, current))

    def _load(self, folder: str, index: Index, current: SettingsTable) -> SavedSettings:
        record_of = {record.key: record for record in index.keys}

        def send(entries: Sequence[m.KeyEntry]) -> None:
            todo: list[list[tuple[m.LoadedKey, int]]] = [[] for _ in self._job.links]
            for entry in entries:
                itemsize = dtype_from_name(entry.dtype).itemsize
                for each in entry.slices:
                    size_bytes = (each.stop - each.start) * itemsize
                    todo[each.server].append((m.LoadedKey(record_of[entry.key], [each]), size_bytes))
            checks = _shared_out(index.files, [len(_groups(lines)) for lines in todo])

            def make(request: int, *, server: int, number: int, things: list[m.LoadedKey]) -> m.Message:
                return m.LoadSlices(request, self._store, folder, things, checks[server, number])

            self._in_batches("loading", todo, make)

        self._restore(index.reduction, index.settings, index.keys, current, send)
        return index.settings

    def load_state_dict(self, state_dict: Mapping[str, Any], current: SettingsTable) -> SavedSettings:
        """Send every server its slices; return the settings that apply afterwards."""
        reduction, settings, keys = from_state_dict(state_dict)
        pieces_of = {each.record.key: each for each in keys}

        def send(entries: Sequence[m.KeyEntry]) -> None:
            for entry in entries:
                self._send_key(entry, pieces_of[entry.key])

        self._restore(reduction, settings, [each.record for each in keys], current, send)
        return settings

    def _send_key(self, entry: m.KeyEntry, pieces: MemoryPieces) -> None:
        asked: Asked = []
        states = [assemble(pieces.record, each.start, each.stop, pieces.fetch) for each in entry.slices]
        with self._job.order, self._job.whole:
            self._job.check_open(self._store)
            for each, state in zip(entry.slices, states, strict=True):
                records, tensors, plain = records_of(state)
                make = functools.partial(
                    m.RestoreSlice,
                    store=self._store,
                    key=entry.key,
                    shape=entry.shape,
                    entry=each,
                    version=state.version,
                    tensors=records,
                    plain=plain,
                )
                ask = self._job.links[each.server].ask
                asked.append((each.server, *ask(make, [bytes_of(pack(tensors))])))
        self._await_asked(asked, f"loading {entry.key!r}")

    def _restore(
        self,
        reduction: str,
        settings: SavedSettings,
        records: Sequence[KeyRecord],
        current: SettingsTable,
        send: Callable[[Sequence[m.KeyEntry]], None],
    ) -> None:
        """Replace keys and settings with those of a save, or change nothing."""
        check_reduction(reduction, self._reduction)
        self._check_keys(records)
        restored_settings(settings, current)  # finds what is wrong with them before anything is sent
        codes = [self._code(current, spec) for spec in settings.updaters]
        specs = [
            m.KeySpec(r.key, r.shape, r.dtype, dtype_from_name(r.dtype).itemsize, r.whole) for r in records
        ]
        what = "loading"
        reply = self._job.control.request(
            lambda n: m.ProposeLoad(n, self._store, specs, settings), what, self._timeout_s, self._store
        )
        try:
            self._ask_all(lambda n: m.PrepareRestore(n, self._store, settings, codes), what)
            send(reply.entries)
        except (Exception, *GIVEN_UP):
            self._withdraw(reply.entries)
            raise
        with ctrl_c.deferred():
            try:
                self._ask_all(lambda n: m.FinishRestore(n, self._store), what)
            except Exception:
                self._withdraw(reply.entries)
                raise

    def _withdraw(self, entries: Iterable[m.KeyEntry]) -> None:
        if self._job.failure() is None:
            self._drop(entries)

    def _check_keys(self, records: Sequence[KeyRecord]) -> None:
        there = {entry.key: entry for entry in self._entries()}
        if records:
            names = [record.key for record in records]
            check_keys(names, type(next(iter(there))) if there else None)
            check_new_keys(names)
        for record in records:
            if record.key in there:
                check_replaces(record, there[record.key].shape, there[record.key].dtype)
            check_summable(dtype_from_name(record.dtype), record.key, mean=self._reduction == "mean")

    def _code(self, current: SettingsTable, spec: Any) -> Any:
        code = None if spec.type == "named" else current.find_code(spec)
        return None if code is None else describe_code(code, self._job.code_table)

    def _drop(self, entries: Iterable[m.KeyEntry]) -> None:
        """Drop the slices that this load has created."""
        gone = [each.slice_id for entry in entries for each in entry.slices]
        self._ask_all(lambda n: m.DropSlices(n, self._store, gone), "loading")

    # ---- asking ----------------------------------------------------------------------------------

    def _entries(self) -> list[m.KeyEntry]:
        reply = self._job.control.request(
            lambda n: m.Lookup(n, self._store, None), "keys", self._timeout_s, self._store
        )
        entries: list[m.KeyEntry] = reply.entries
        return entries

    def _settings(self) -> SavedSettings:
        """Return the newest settings; every server has the same."""
        reply = self._job.ask_all(
            lambda n: m.AskSettings(n, self._store), "settings", self._timeout_s, self._store, [0]
        )[0]
        settings: SavedSettings = reply.settings
        check_saved(settings)
        return settings

    def _ask_all(self, make: Callable[[int], m.Message], what: str) -> None:
        self._job.ask_all(make, what, self._timeout_s, self._store)

    def _await(self, waits: list[tuple[ServerLink, int]], what: str) -> None:
        self._job.pump()
        self._job.await_replies(waits, what, self._timeout_s, self._store)

    def _await_asked(self, asked: Asked, what: str) -> list[Any]:
        self._job.pump()
        self._job.await_asked(asked, what, self._timeout_s, self._store)
        return replies_of(asked)

    def _in_batches(
        self,
        what: str,
        per_server: Sequence[Sequence[tuple[Any, int]]],
        make: Callable[..., m.Message],
        take: Callable[[int, int, list[Any], Any], None] | None = None,
    ) -> None:
        """Send each server one batch after the other, all servers at a time; show the progress.

        `per_server` has for each server pairs of a thing and its size in bytes. `make` gets the number of the
        request and, by name, `server`, `number` (of the batch) and `things`.
        """
        groups = [_groups(lines) for lines in per_server]
        total = sum(size for lines in per_server for _, size in lines)
        with _progress(total) as progress:
            bar = progress.add_task(what, total=total)
            for number in range(max(map(len, groups), default=0)):
                asked: Asked = []
                asked_for: list[list[Any]] = []  # per request
                done = 0
                with self._job.order, self._job.whole:
                    self._job.check_open(self._store)
                    for server, lines in enumerate(per_server):
                        if number >= len(groups[server]):
                            continue
                        chosen = [lines[place] for place in groups[server][number]]
                        done += sum(size for _, size in chosen)
                        things = [thing for thing, _ in chosen]
                        ask = functools.partial(make, server=server, number=number, things=things)
                        asked.append((server, *self._job.links[server].ask(ask)))
                        asked_for.append(things)
                replies = self._await_asked(asked, what)
                if take is not None:
                    for (server, _, _), things, reply in zip(asked, asked_for, replies, strict=True):
                        take(server, number, things, reply)
                progress.advance(bar, done)


@final
class _SliceExchange(Exchange):
    """A slice from a server: first its record, then its bytes."""

    def __init__(self, entry: m.KeyEntry, part: m.SliceEntry) -> None:
        self._entry = entry
        self._part = part
        self._size_bytes = 0
        self._record: m.SliceRecord | None = None
        self._data = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._error: TensorKVError | None = None

    def place(self, message: m.Data, payload_bytes: int) -> list[memoryview]:
        if self._record is None or payload_bytes != self._size_bytes:
            raise ProtocolError(f"a slice came with {payload_bytes} bytes that were not announced")
        self._data = torch.empty(payload_bytes, dtype=torch.uint8, device="cpu")
        return [bytes_of(self._data)]

    def take(self, message: Any) -> bool:
        if isinstance(message, TensorKVError):
            self._error = message
        elif isinstance(message, m.Failed):
            self._error = from_wire(message.name, message.text)
        elif isinstance(message, m.SliceRecord) and self._record is None:
            self._note(message)
            return False
        elif not isinstance(message, m.Data) or self._data.numel() != self._size_bytes or not self._record:
            raise ProtocolError(f"{type(message).__name__} is no slice, or comes without its bytes")
        return True

    def _note(self, record: m.SliceRecord) -> None:
        part, shape = self._part, self._entry.shape
        self._size_bytes = check_slice(
            part.start, part.stop, shape, record.version, record.tensors, record.plain
        )
        if record.tensors[0].dtype != self._entry.dtype:
            raise ProtocolError(f"a slice of {record.tensors[0].dtype}, not {self._entry.dtype}")
        self._record = record

    def result(self) -> SliceState:
        """Return the slice. Raises the error with which the server refused it."""
        if self._error is not None:
            raise self._error
        assert self._record is not None
        return unpack(self._data, self._record.tensors, self._record.version, self._record.plain)


def _settings_of(entries: Sequence[m.KeyEntry], begun: Sequence[m.SaveBegun]) -> SavedSettings:
    """Return the settings that hold in this worker's next rounds: each key's from a server that holds it.

    For other keys they are those before the first setting that nobody's next round has.
    """
    for each in begun:
        check_saved(each.settings)
    keys_of: list[list[Key]] = [[] for _ in begun]
    for entry in entries:
        for part in entry.slices[:1]:
            keys_of[part.server].append(entry.key)
    first = min(begun, key=lambda each: each.up_to).settings
    return first.with_keys_of([(each.settings, keys) for each, keys in zip(begun, keys_of, strict=True)])


def _record_of(entry: m.KeyEntry, pieces: Mapping[int, PieceRecord]) -> KeyRecord:
    in_order = sorted(entry.slices, key=lambda each: (each.start, each.stop))
    found = [pieces[each.slice_id] for each in in_order]
    return KeyRecord(entry.key, entry.shape, entry.dtype, entry.whole, found)


def _groups(lines: Sequence[tuple[Any, int]]) -> list[list[int]]:
    return batches([size for _, size in lines])


def _shared_out(
    files: Mapping[str, FileRecord], num_requests: Sequence[int]
) -> dict[tuple[int, int], dict[str, FileRecord]]:
    """Return which files each server checks with which of its requests, every file once.

    If the slices are placed as in the save, each server checks the files that it reads anyway.
    """
    shares: dict[tuple[int, int], dict[str, FileRecord]] = {
        (server, number): {} for server, count in enumerate(num_requests) for number in range(count)
    }
    for name, share in zip(sorted(files, key=order_of), itertools.cycle(shares.values()), strict=False):
        share[name] = files[name]
    return shares


def _progress(total_bytes: int) -> Progress:
    from rich.console import Console  # not at the top: every worker would import it at its start
    from rich.progress import Progress

    hidden = total_bytes < PROGRESS_BYTES or not sys.stderr.isatty()
    return Progress(console=Console(stderr=True), transient=True, disable=hidden)
