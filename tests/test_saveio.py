"""Saves as files: written, read in any other cut, and what a crash leaves of one."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorkv import saveio
from tensorkv.errors import LoadError, SaveError
from tensorkv.savedstate import INDEX_NAME, Index, KeyRecord, SavedSettings, SettingEntry, new_index
from tensorkv.saveio import (
    PieceReader,
    file_name,
    make_folder,
    new_save_id,
    read_index,
    remove_files,
    write_index,
    write_slices,
)
from tensorkv.slicestate import SliceState, slice_state
from tensorkv.updaterspec import UpdaterSpec

ADAM = SavedSettings(
    [UpdaterSpec(type="optimizer", name="torch.optim.adam:Adam")], [SettingEntry(None, 0, {}, None)]
)
NUM = 61
VALUE = torch.arange(float(NUM))
AVERAGE = VALUE.double() * 10


def part(low: int, high: int) -> SliceState:
    state = {"exp_avg": AVERAGE[low:high], "step": torch.tensor(7.0), "best": 0.5}
    return slice_state("w", VALUE[low:high], 3, state)


def write(folder: Path, cuts: list[int]) -> Index:
    """Make a save with a file for each piece, as each server would."""
    save_id, files, found = new_save_id(), {}, []
    for number, (low, high) in enumerate(itertools.pairwise([0, *cuts, NUM])):
        name = file_name(save_id, number, 0)
        files[name], pieces = write_slices(str(folder), name, [("w", low, high, part(low, high))])
        found += pieces
    index = new_index("sum", ADAM, files, [KeyRecord("w", (NUM,), "float32", False, found)])
    write_index(str(folder), index)
    return index


def check(found: SliceState, low: int, high: int) -> None:
    assert torch.equal(found.value, VALUE[low:high])
    assert torch.equal(found.state["exp_avg"], AVERAGE[low:high])
    assert torch.equal(found.state["step"], torch.tensor(7.0))
    assert (found.state["best"], found.version, found.elementwise) == (0.5, 3, {"exp_avg"})


cuts = st.lists(st.integers(1, NUM - 1), max_size=5, unique=True).map(sorted)


@settings(max_examples=10)
@given(old=cuts, new=cuts)
def test_files_are_cut_in_any_other_way_too(
    tmp_path_factory: pytest.TempPathFactory, old: list[int], new: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("save")
    written = write(folder, old)
    index = read_index(str(folder))
    assert index == written
    (record,) = index.keys
    with PieceReader(str(folder), record.pieces) as reader:
        for low, high in itertools.pairwise([0, *new, NUM]):
            check(reader.load(record, low, high), low, high)


# ---- crashes -----------------------------------------------------------------------------------------


class Crash(BaseException):
    """The process ends here."""


def _crash_at(monkeypatch: pytest.MonkeyPatch, number: int) -> list[str]:
    """Let the step with this number, of those that change the folder, be the one that never happens."""
    done: list[str] = []

    def hooked(name: str, real: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            if len(done) == number:
                raise Crash(name)
            done.append(name)
            return real(*args, **options)

        return call

    monkeypatch.setattr(saveio, "save_file", hooked("save_file", saveio.save_file))
    for name in ("replace", "fsync", "remove"):
        monkeypatch.setattr(os, name, hooked(name, getattr(os, name)))
    return done


def test_a_crash_at_any_step_leaves_a_whole_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0
    while True:
        folder = tmp_path / str(steps)
        folder.mkdir()
        first = write(folder, [20])
        with monkeypatch.context() as patch:
            _crash_at(patch, steps)
            try:
                second = write(folder, [10, 30])
            except Crash:
                second = None
        index = read_index(str(folder))
        if second is not None:
            assert index == second
            break
        assert index == first or len(index.keys[0].pieces) == 3
        for path in folder.iterdir():  # half a file would be torn
            assert path.suffix != ".json" or path.name == INDEX_NAME
        after = write(folder, [])
        assert sorted(each.name for each in folder.iterdir()) == sorted([INDEX_NAME, *after.files])
        steps += 1
    assert steps > 10  # 3 files and an index, each written, synced and renamed


def test_a_file_that_is_torn_is_found(tmp_path: Path) -> None:
    index = write(tmp_path, [20])
    name = next(iter(index.files))
    os.truncate(tmp_path / name, index.files[name] - 1)
    with pytest.raises(LoadError, match="should have"):
        read_index(str(tmp_path))


def test_only_files_of_saves_are_removed(tmp_path: Path) -> None:
    index = write(tmp_path, [])
    for name in ("mine.safetensors", "tensorkv-x.safetensors", "model.pt"):
        (tmp_path / name).write_text("")
    remove_files(str(tmp_path), save_id="0" * 16)
    assert set(index.files) < {each.name for each in tmp_path.iterdir()}
    remove_files(str(tmp_path))
    assert {each.name for each in tmp_path.iterdir()} == {
        INDEX_NAME, "mine.safetensors", "tensorkv-x.safetensors", "model.pt"
    }  # fmt: skip
    remove_files(str(tmp_path / "nowhere"))


def test_folders_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="cannot be written"):
        make_folder(str(tmp_path / "file" / "save"))
    with pytest.raises(SaveError, match="file system that they all share"):
        write_slices(str(tmp_path / "nowhere"), file_name(new_save_id(), 0, 0), [])
    with pytest.raises(LoadError, match="there is no save"):
        read_index(str(tmp_path))
    with pytest.raises(LoadError, match="cannot be read"):
        read_index(str(tmp_path / "file"))


def test_a_reader_opens_files_of_saves_only(tmp_path: Path) -> None:
    (record,) = write(tmp_path, []).keys
    elsewhere = KeyRecord("w", (NUM,), "float32", False, [
        type(record.pieces[0])(0, NUM, 0, record.pieces[0].tensors, {}, "../" + record.pieces[0].file)
    ])  # fmt: skip
    with pytest.raises(LoadError, match="not a file of a save"):
        PieceReader(str(tmp_path), elsewhere.pieces)
