"""What goes into a save of slices on a server, and what comes out of one, with files that are a dict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tensorkv.checkpoint.records import FileRecord, KeyRecord, PieceRecord
from tensorkv.checkpoint.slices import MemoryPieces, assemble, pack, records_of, unpack
from tensorkv.errors import KeyDeleted, LoadError, ProtocolError
from tensorkv.server import checkpoint
from tensorkv.updaters.functions import CodeRef
from tensorkv.updaters.spec import UpdaterSpec
from tensorkv.wire import messages as m

STORE = 1
FOLDER, NAME = "run", "tensorkv-0123456789abcdef-0-0.safetensors"
SGD = UpdaterSpec(type="optimizer", name="torch.optim.sgd:SGD", options={"lr": 1.0, "momentum": 0.5})

CODE = CodeRef(module="torch.optim.sgd", name="SGD")


def trained(t: Any) -> tuple[Any, list[int], int]:
    """Return a server with "w" of 6 elements in two slices after one push of ones."""
    bench = t.Bench(1)
    bench.set_updater(0, SGD)
    ids = bench.init("w", torch.zeros(6), 4)
    plan = bench.define(0, t.dense(ids, [4, 2]))
    assert bench.push(0, plan, torch.ones(6)) == []
    return bench, ids, plan


def ask(bench: Any, message: Any, tensors: Sequence[torch.Tensor] = ()) -> Any:
    """Return the one answer to a message."""
    (out,) = bench.send(0, message, tensors)
    return out.message


def save(bench: Any, ids: list[int]) -> KeyRecord:
    saved = ask(bench, m.SaveSlices(7, STORE, FOLDER, NAME, ids))
    assert isinstance(saved, m.SavedFile)
    return KeyRecord("w", (6,), "float32", False, saved.pieces)


def settings_of(bench: Any) -> Any:
    return ask(bench, m.AskSettings(8, STORE)).settings


def prepare(bench: Any, settings: Any) -> None:
    codes = [None if spec.type == "named" else CODE for spec in settings.updaters]
    assert isinstance(ask(bench, m.PrepareRestore(1, STORE, settings, codes)), m.Done)


def test_what_was_saved_goes_on_in_other_slices_on_another_server(t: Any) -> None:
    bench, ids, plan = trained(t)
    record, settings = save(bench, ids), settings_of(bench)
    assert [(each.start, each.stop, each.version) for each in record.pieces] == [(0, 4, 1), (4, 6, 1)]
    bench.push(0, plan, torch.ones(6))
    expected = bench.value(0, plan)

    other = t.Bench(1)
    other.state._files = bench.files
    prepare(other, settings)
    loaded = m.LoadedKey(record, [m.SliceEntry(11, 0, 0, 3), m.SliceEntry(12, 0, 3, 6)])
    assert isinstance(ask(other, m.LoadSlices(2, STORE, FOLDER, [loaded], {})), m.Done)
    assert isinstance(ask(other, m.FinishRestore(3, STORE)), m.Done)
    assert other.info(0, [11, 12]).versions == [1, 1]
    plan = other.define(0, t.dense([11, 12], [3, 3]))
    other.push(0, plan, torch.ones(6))
    assert torch.equal(other.value(0, plan), expected)
    assert all(each.restored is None for each in other.shard.slices)
    other.check_empty()


def test_a_slice_travels_with_its_state(t: Any) -> None:
    bench, ids, plan = trained(t)
    pieces = MemoryPieces("w", (6,), False)
    for slice_id, (low, high) in zip(ids, ((0, 4), (4, 6)), strict=True):
        told, data = bench.send(0, m.AskSlice(5, STORE, slice_id))
        assert isinstance(data.message, m.Data)
        record = told.message
        pieces.add(low, high, unpack(data.payload[0].tensor, record.tensors, record.version, record.plain))
    whole = assemble(pieces.record, 0, 6, pieces.fetch)
    assert whole.state["momentum_buffer"].tolist() == [1.0] * 6
    records, tensors, plain = records_of(whole)
    settings = settings_of(bench)
    bench.push(0, plan, torch.ones(6))

    other = t.Bench(1)
    prepare(other, settings)
    entry = m.SliceEntry(11, 0, 0, 6)
    message = m.RestoreSlice(4, STORE, "w", (6,), entry, whole.version, records, plain)
    assert isinstance(ask(other, message, [pack(tensors)]), m.Done)
    with pytest.raises(ProtocolError, match="exists already"):
        ask(other, message, [pack(tensors)])
    ask(other, m.FinishRestore(3, STORE))
    again = other.define(0, t.dense([11], [6]))
    other.push(0, again, torch.ones(6))
    assert torch.equal(other.value(0, again), bench.value(0, plan))


def test_a_load_is_finished_once_and_only_if_it_was_prepared(t: Any) -> None:
    bench, _, _ = trained(t)
    prepare(bench, settings_of(bench))
    ask(bench, m.FinishRestore(3, STORE))
    with pytest.raises(ProtocolError, match="not prepared"):
        ask(bench, m.FinishRestore(3, STORE))


def test_what_a_load_brought_before_it_failed_is_dropped_with_its_slices(t: Any) -> None:
    bench, ids, _ = trained(t)
    record, settings = save(bench, ids), settings_of(bench)
    prepare(bench, settings)
    loaded = m.LoadedKey(record, [m.SliceEntry(11, 0, 0, 6)])
    ask(bench, m.LoadSlices(2, STORE, FOLDER, [loaded], {}))
    assert bench.shard.find(11).restored is not None
    prepare(bench, settings)  # the next load has begun
    assert bench.shard.find(11).restored is None
    bench.delete(0, "w", [11])
    with pytest.raises(KeyDeleted):
        bench.shard.find(11)


def test_what_cannot_be_saved_or_loaded_is_refused(t: Any) -> None:
    bench, ids, _ = trained(t)
    record = save(bench, ids)
    with pytest.raises(ProtocolError, match="not a file of a save"):
        ask(bench, m.SaveSlices(7, STORE, FOLDER, "../w", ids))
    bench.delete(0, "w", [ids[1]])
    failed = ask(bench, m.SaveSlices(7, STORE, FOLDER, NAME, ids))
    assert isinstance(t.error_of(failed), KeyDeleted)
    torn = KeyRecord("w", (6,), "float32", False, record.pieces[1:])
    failed = ask(bench, m.LoadSlices(2, STORE, FOLDER, [m.LoadedKey(torn, [m.SliceEntry(11, 0, 0, 6)])], {}))
    assert isinstance(t.error_of(failed), LoadError)


def test_the_interface_is_abstract() -> None:
    class Half(checkpoint.StateFiles):
        def write(self, folder: str, name: str, slices: Any) -> tuple[FileRecord, list[PieceRecord]]:
            return 0, []

    with pytest.raises(TypeError, match="abstract"):
        Half()  # type: ignore[abstract]
