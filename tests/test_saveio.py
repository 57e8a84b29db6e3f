"""Saves as files: written, read in any other cut, and what a crash leaves of one."""

from __future__ import annotations

import itertools
import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorkv import saveio
from tensorkv.errors import LoadError, SaveError
from tensorkv.savedstate import (
    INDEX_NAME,
    FileRecord,
    Index,
    KeyRecord,
    SavedSettings,
    SettingEntry,
    new_index,
)
from tensorkv.saveio import (
    PieceReader,
    check_files,
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

ADAM = SavedSettings([UpdaterSpec(type="optimizer", name="mine:Adam")], [SettingEntry(None, 0, {}, None)])
NUM = 61
VALUE = torch.arange(float(NUM))
AVERAGE = VALUE.double() * 10


def part(low: int, high: int, value: torch.Tensor = VALUE) -> SliceState:
    state = {"exp_avg": AVERAGE[low:high], "step": torch.tensor(7.0), "best": 0.5}
    return slice_state("w", value[low:high], 3, state)


def write(folder: Path, cuts: list[int], value: torch.Tensor = VALUE) -> Index:
    """Make a save with a file for each piece, as each server would."""
    folder.mkdir(exist_ok=True)
    save_id, files, found = new_save_id(), {}, []
    for number, (low, high) in enumerate(itertools.pairwise([0, *cuts, NUM])):
        name = file_name(save_id, number, 0)
        files[name], pieces = write_slices(str(folder), name, [("w", low, high, part(low, high, value))])
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
    os.truncate(tmp_path / name, index.files[name].size_bytes - 1)
    with pytest.raises(LoadError, match="should have"):
        read_index(str(tmp_path))


@given(where=st.integers(0, 1 << 30), bit=st.integers(0, 7))
@settings(max_examples=30)
def test_a_flipped_bit_is_found_wherever_it_is(
    tmp_path_factory: pytest.TempPathFactory, where: int, bit: int
) -> None:
    folder = tmp_path_factory.mktemp("save")
    index = write(folder, [20])
    check_files(str(folder), index.files)
    name = list(index.files)[where % 2]
    data = bytearray((folder / name).read_bytes())
    data[where % len(data)] ^= 1 << bit
    (folder / name).write_bytes(data)
    with pytest.raises(LoadError, match=f"{name} is not as it was saved: its checksum is"):
        check_files(str(folder), index.files)


def test_files_that_are_swapped_are_found(tmp_path: Path) -> None:
    """Of the same size, and with the same names in them: only the numbers differ."""
    first, second = write(tmp_path / "a", []), write(tmp_path / "b", [], VALUE + 1)
    (a,), (b,) = first.files, second.files
    assert first.files[a].size_bytes == second.files[b].size_bytes
    os.replace(tmp_path / "b" / b, tmp_path / "a" / a)
    read_index(str(tmp_path / "a"))
    with pytest.raises(LoadError, match=f"{a} is not as it was saved"):
        check_files(str(tmp_path / "a"), first.files)


def test_a_checksum_covers_every_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also over several reads, with a last page that is not full, and with pages in another order."""
    monkeypatch.setattr(saveio, "_READ_BYTES", 8192)
    pages = [bytes([number]) * 4096 for number in range(5)]
    path = tmp_path / "file"

    def of(*parts: bytes) -> int:
        path.write_bytes(b"".join(parts))
        return saveio.checksum(str(path))

    found = of(*pages, b"tail")
    others = [
        of(*pages),
        of(*pages, b"tali"),
        of(pages[1], pages[0], *pages[2:], b"tail"),
        of(pages[0], *pages[3:5], *pages[1:3], b"tail"),
        of(*pages[1:], b"tail"),
        of(),
    ]
    assert len({found, *others}) == 7
    assert of(*pages, b"tail") == found
    one = np.frombuffer(b"".join(pages), "<u8").reshape(5, 512)
    assert of(*pages) == zlib.crc32(one.sum(axis=1, dtype="<u8").tobytes())


def test_a_save_of_before_there_were_checksums_is_read(tmp_path: Path) -> None:
    index = write(tmp_path, [20])
    old = json.loads((tmp_path / INDEX_NAME).read_text())
    old["files"] = {name: each["size_bytes"] for name, each in old["files"].items()}
    (tmp_path / INDEX_NAME).write_text(json.dumps(old))
    found = read_index(str(tmp_path))
    assert found.keys == index.keys
    assert [each.checksum for each in found.files.values()] == [None, None]
    check_files(str(tmp_path), found.files)


def test_a_file_to_check_is_one_of_a_save_and_there(tmp_path: Path) -> None:
    index = write(tmp_path, [])
    with pytest.raises(LoadError, match="not a file of a save"):
        check_files(str(tmp_path), {"../passwd": FileRecord(1, 1)})
    with pytest.raises(LoadError, match="missing"):
        check_files(str(tmp_path / "nowhere"), index.files)


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
