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
    ask(bench, m.DropSlices(3, STORE, [11]))
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


# ---- a save by one worker ----------------------------------------------------------------------------

ADAM = UpdaterSpec(type="optimizer", name="torch.optim.adam:Adam", options={"lr": 1.0})


def begin(bench: Any, worker: int) -> m.SaveBegun:
    (out,) = bench.send(worker, m.BeginSave(9, STORE))
    assert isinstance(out.message, m.SaveBegun)
    assert out.worker == worker
    return out.message


def two_workers(t: Any) -> tuple[Any, int, list[int]]:
    """Return a server with "w" after one round of SGD with momentum, and the plan of each worker."""
    bench = t.Bench(2)
    bench.set_updater(0, SGD)
    (slice_id,) = bench.init("w", torch.zeros(2))
    plans = [bench.define(worker, t.dense([slice_id], [2])) for worker in range(2)]
    for worker in range(2):
        bench.push(worker, plans[worker], torch.ones(2))
    return bench, slice_id, plans


def state_alone(bench: Any, worker: int, slice_id: int) -> Any:
    """Return what a worker saves of a slice, alone."""
    told, data = bench.send(worker, m.AskSlice(5, STORE, slice_id, alone=True))
    record = told.message
    return unpack(data.payload[0].tensor, record.tensors, record.version, record.plain)


def test_a_save_alone_begins_when_the_workers_rounds_are_applied(t: Any) -> None:
    bench, slice_id, plans = two_workers(t)
    bench.push(1, plans[1], torch.ones(2))
    assert begin(bench, 1).num_open == 1
    with pytest.raises(ProtocolError, match="not begun"):
        bench.send(1, m.AskSlice(5, STORE, slice_id, alone=True))
    assert begin(bench, 0).num_open == 0  # what others have pushed is of its next round
    assert state_alone(bench, 0, slice_id).version == 1
    bench.push(0, plans[0], torch.ones(2))
    assert begin(bench, 1).num_open == 0
    assert state_alone(bench, 1, slice_id).version == 2


def test_the_state_that_is_saved_stays_while_its_optimizer_is_replaced(t: Any) -> None:
    """A setting for the round that comes next arrives in the middle of a save."""
    bench, slice_id, _ = two_workers(t)
    before = begin(bench, 1)
    bench.set_updater(0, ADAM)
    bench.send(0, m.ChangeOptions(STORE, None, {"lr": 0.5}))
    assert state_alone(bench, 1, slice_id).state["momentum_buffer"].tolist() == [2.0, 2.0]
    assert before.settings.spec_of("w").name == SGD.name

    again = begin(bench, 1)  # a server that had the setting before would say so
    assert (before.num_settings, again.num_settings) == (1, 3)
    assert again.settings.spec_of("w").name == ADAM.name
    assert again.settings.entries[0].options == {"lr": 0.5}
    assert state_alone(bench, 1, slice_id).state == {}
    assert bench.info(0, [slice_id]).state_bytes == [8]
    bench.send(1, m.EndSave(STORE))
    assert bench.info(0, [slice_id]).state_bytes == [0]
    assert not bench.shard.schedule.pending


def test_a_save_alone_has_no_setting_of_a_later_round(t: Any) -> None:
    bench, slice_id, plans = two_workers(t)
    bench.push(0, plans[0], torch.ones(2))
    bench.set_updater(0, ADAM)
    begun = begin(bench, 1)
    assert begun.settings.spec_of("w").name == SGD.name
    assert (begun.num_settings, begun.up_to) == (2, 1)
    assert state_alone(bench, 1, slice_id).state["momentum_buffer"].tolist() == [2.0, 2.0]
    bench.send(1, m.EndSave(STORE))
    bench.push(1, plans[1], torch.ones(2))
    assert begin(bench, 1).settings.spec_of("w").name == ADAM.name


@pytest.mark.parametrize("ends", [m.EndSave(STORE), m.Leave(7, STORE), None])
def test_nothing_is_kept_for_a_save_that_has_ended(t: Any, ends: Any) -> None:
    bench, slice_id, _ = two_workers(t)
    begin(bench, 1)
    bench.set_updater(0, ADAM)
    assert bench.info(0, [slice_id]).state_bytes == [8]
    if ends is None:
        bench.state.worker_lost(m.WorkerLost(1, "host", "killed", []))
    else:
        bench.send(1, ends)
    assert bench.info(0, [slice_id]).state_bytes == [0]
    assert not bench.shard._saves


def test_two_workers_save_alone_at_once(t: Any) -> None:
    bench, slice_id, _ = two_workers(t)
    begin(bench, 0)
    begin(bench, 1)
    bench.set_updater(0, ADAM)
    bench.send(0, m.EndSave(STORE))
    assert state_alone(bench, 1, slice_id).state["momentum_buffer"].tolist() == [2.0, 2.0]
    bench.send(1, m.EndSave(STORE))
    assert bench.info(0, [slice_id]).state_bytes == [0]


@pytest.mark.parametrize("options", [{"policy": "async"}, {"policy": "async", "staleness": 1}, {"quorum": 1}])
def test_a_save_alone_in_a_store_whose_rounds_go_on_is_refused(t: Any, options: Any) -> None:
    bench = t.Bench(2, **options)
    with pytest.raises(ProtocolError, match="rounds go on without it"):
        bench.send(0, m.BeginSave(9, STORE))
