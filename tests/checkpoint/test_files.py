"""Saves as files: written, read in any other cut, and refused if a bit of them has changed."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tensorkv
from tensorkv.arrays import REFUSED_DTYPES, bytes_of
from tensorkv.checkpoint import files as files_module
from tensorkv.checkpoint.files import PieceReader, check_files, load_newest, write_slices
from tensorkv.checkpoint.folder import Saving, file_name
from tensorkv.checkpoint.records import (
    INDEX_NAME,
    FileRecord,
    Index,
    KeyRecord,
    SavedSettings,
    SettingEntry,
    encode_index,
    new_index,
)
from tensorkv.checkpoint.slices import SliceState, slice_state
from tensorkv.errors import LoadError, SaveError
from tensorkv.updaters.optimizer import ELEMENTWISE_OPTIMIZERS
from tensorkv.updaters.spec import UpdaterSpec

ADAM = SavedSettings([UpdaterSpec(type="optimizer", name="mine:Adam")], [SettingEntry(None, 0, {}, None)])
NUM = 61
VALUE = torch.arange(float(NUM))
AVERAGE = VALUE.double() * 10


def part(low: int, high: int, value: torch.Tensor = VALUE) -> SliceState:
    state = {"exp_avg": AVERAGE[low:high], "step": torch.tensor(7.0), "best": 0.5}
    return slice_state("w", value[low:high], 3, state)


def write(folder: Path, cuts: list[int], value: torch.Tensor = VALUE) -> Index:
    """Make a save with a file for each piece, as each server would."""
    files, found = {}, []
    with Saving(str(folder)) as saving:
        for number, (low, high) in enumerate(itertools.pairwise([0, *cuts, NUM])):
            name = saving.file_name(number, 0)
            files[name], pieces = write_slices(str(folder), name, [("w", low, high, part(low, high, value))])
            found += pieces
        index = new_index("sum", ADAM, files, [KeyRecord("w", (NUM,), "float32", False, found)])
        saving.publish(encode_index(index), files)
    return index


def index_of(folder: Path) -> Index:
    return load_newest(str(folder), lambda index: index)


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
    index = index_of(folder)
    assert index == written
    (record,) = index.keys
    with PieceReader(str(folder)) as reader:
        for low, high in itertools.pairwise([0, *new, NUM]):
            check(reader.load(record, low, high), low, high)


def test_a_save_of_more_files_than_may_be_open_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_module, "_MAX_OPEN_FILES", 3)
    (record,) = write(tmp_path, list(range(4, NUM, 4))).keys
    before = len(os.listdir("/proc/self/fd"))
    with PieceReader(str(tmp_path)) as reader:
        for low, high in ((0, NUM), (3, 50), (0, 5)):
            check(reader.load(record, low, high), low, high)
            assert len(os.listdir("/proc/self/fd")) == before + 3
    assert len(os.listdir("/proc/self/fd")) == before


DTYPES = sorted({each for each in vars(torch).values() if isinstance(each, torch.dtype)}, key=str)


class Keeps(torch.optim.Optimizer):
    """Keeps what it is told to, for each element and for all of them."""

    kept: torch.Tensor = torch.empty(0)

    def __init__(self, params: Any, lr: float = 0.5) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            kept = type(self).kept
            self.state[parameter].update(each=kept.view(parameter.shape), all=kept.view(-1), one=kept[0, 0])


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_optimizer_keeps_state_of_any_dtype_or_its_save_is_refused(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = torch.arange(15 * dtype.itemsize, dtype=torch.uint8)
    kept = (data % 2 if dtype is torch.bool else data).view(dtype).view(3, 5)
    monkeypatch.setattr(Keeps, "kept", kept)
    kv = tensorkv.create("local")
    kv.set_optimizer(Keeps)
    kv.init("w", torch.zeros(3, 5))
    kv.push("w", torch.ones(3, 5))
    try:
        kept.clone()
    except RuntimeError:  # torch copies none of these
        for call in (kv.state_dict, lambda: kv.save(tmp_path / "run")):
            with pytest.raises(SaveError, match="'w': the optimizer keeps 'each', which cannot be saved"):
                call()
        assert not (tmp_path / "run").exists()
        return
    kv.save(tmp_path / "run")
    torch.save(kv.state_dict(), tmp_path / "dict")
    again = [tensorkv.create("local"), tensorkv.create("local")]
    for each in again:
        each.set_optimizer(Keeps)
    again[0].load(tmp_path / "run")
    again[1].load_state_dict(torch.load(tmp_path / "dict", weights_only=True))
    for each in again:
        state = each.state_dict()["optimizer_state"]["w"]
        assert {name: (t.dtype, t.shape) for name, t in state.items()} == {
            "each": (dtype, (3, 5)), "all": (dtype, (15,)), "one": (dtype, ())
        }  # fmt: skip
        assert all(bytes_of(state[name]) == bytes_of(kept) for name in ("each", "all"))
        assert bytes_of(state["one"]) == bytes_of(kept)[: dtype.itemsize]


SCALAR_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("dtype", SCALAR_DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(each.__name__ for each in ELEMENTWISE_OPTIMIZERS))
def test_a_scalar_value_is_saved_with_the_steps_that_have_its_shape(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    one = torch.tensor(1.0, dtype=dtype)
    kv = tensorkv.create("local")
    kv.init("scale", one)
    kv.set_optimizer(name, lr=0.1)
    kv.push("scale", one)
    kv.save(tmp_path)
    state = kv.state_dict()
    expected = kv.pushpull("scale", one)
    of_folder, of_dict = tensorkv.create("local"), tensorkv.create("local")
    of_folder.load(tmp_path)
    of_dict.load_state_dict(state)
    for again in (of_folder, of_dict):
        assert torch.equal(again.pushpull("scale", one), expected)


def test_the_dtypes_that_no_optimizer_can_keep_are_few() -> None:
    assert len([each for each in DTYPES if each not in REFUSED_DTYPES]) > 25


# ---- what is not as it was saved -----------------------------------------------------------------------


def test_a_changed_byte_of_a_save_is_refused_and_a_cut(tmp_path: Path) -> None:
    """In its index and in its data; the error names the file, and nothing has changed.

    Every byte is tried where the files are made, in test_savedstate and test_tensorfile.
    """
    kv = tensorkv.create("local")
    kv.set_optimizer("sgd", lr=0.1, momentum=0.9)
    kv.init("w", torch.zeros(2))
    kv.push("w", torch.ones(2))
    kv.save(tmp_path)
    again = tensorkv.create("local")
    for path in tmp_path.iterdir():
        data = bytearray(path.read_bytes())
        for at in range(0, len(data), 11):
            data[at] ^= 1 << at % 8
            path.write_bytes(data)
            with pytest.raises(LoadError, match=path.name):
                again.load(tmp_path)
            data[at] ^= 1 << at % 8
            path.write_bytes(data[:at])
            with pytest.raises(LoadError, match=path.name):
                again.load(tmp_path)
        path.write_bytes(data)
        assert len(again) == 0
    again.load(tmp_path)
    assert repr(again.state_dict()) == repr(kv.state_dict())


def test_files_that_are_swapped_are_found(tmp_path: Path) -> None:
    """Of the same size, and with the same names in them: only the numbers differ."""
    first, second = write(tmp_path / "a", []), write(tmp_path / "b", [], VALUE + 1)
    (a,), (b,) = first.files, second.files
    assert first.files[a].size_bytes == second.files[b].size_bytes
    os.replace(tmp_path / "b" / b, tmp_path / "a" / a)
    index_of(tmp_path / "a")
    with pytest.raises(LoadError, match=f"{a} is not as it was saved"):
        check_files(str(tmp_path / "a"), first.files)


@pytest.mark.parametrize("checksums", [False, True])
def test_a_save_of_before_the_index_had_a_checksum_is_read(checksums: bool, tmp_path: Path) -> None:
    index = write(tmp_path, [20])
    old = json.loads((tmp_path / INDEX_NAME).read_text())
    del old["checksum"]
    old["version"] = 1
    for name, each in old["files"].items():
        del each["columns"]
        old["files"][name] = each if checksums else each["size_bytes"]
    (tmp_path / INDEX_NAME).write_text(json.dumps(old, indent=1))
    found = index_of(tmp_path)
    assert found.keys == index.keys
    kept = [each.checksum if checksums else None for each in index.files.values()]
    assert [each.checksum for each in found.files.values()] == kept
    check_files(str(tmp_path), found.files)
    with PieceReader(str(tmp_path)) as reader:
        check(reader.load(found.keys[0], 3, 50), 3, 50)


def test_a_load_looks_again_if_another_save_has_come_to_count(tmp_path: Path) -> None:
    first = write(tmp_path, [20])
    seen: list[Index] = []

    def load(index: Index) -> str:
        seen.append(index)
        if len(seen) < 3:
            write(tmp_path, [10, 30])
            check_files(str(tmp_path), index.files)
        return "loaded"

    assert load_newest(str(tmp_path), load) == "loaded"
    assert len(seen) == 3
    assert seen[0] == first
    assert len(seen[2].files) == 3


def test_a_load_that_never_comes_to_an_end_is_given_up(tmp_path: Path) -> None:
    write(tmp_path, [])

    def load(index: Index) -> None:
        write(tmp_path, [])
        check_files(str(tmp_path), index.files)

    with pytest.raises(LoadError, match="belongs to the save and cannot be read"):
        load_newest(str(tmp_path), load)


def test_a_file_to_check_is_one_of_a_save_and_there(tmp_path: Path) -> None:
    index = write(tmp_path, [])
    for name in ("../passwd", "/etc/passwd", "tensorkv-0123456789abcdef-0-0.safetensors/x"):
        with pytest.raises(LoadError, match="not a file of a save"):
            check_files(str(tmp_path), {name: FileRecord(1, 1)})
    with pytest.raises(LoadError, match="cannot be read"):
        check_files(str(tmp_path / "nowhere"), index.files)


def test_what_is_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LoadError, match="there is no save"):
        index_of(tmp_path)
    with pytest.raises(LoadError, match="cannot be read"):
        index_of(tmp_path / "file")
    os.mkfifo(tmp_path / INDEX_NAME)  # whoever opened it would wait for a writer
    with pytest.raises(LoadError, match="is not a file"):
        index_of(tmp_path)
    os.remove(tmp_path / INDEX_NAME)
    write(tmp_path, [])
    monkeypatch.setattr(files_module, "MAX_INDEX_BYTES", 100)
    with pytest.raises(LoadError, match="of at most 100"):
        index_of(tmp_path)


def test_slices_are_written_where_a_save_is_made_only(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SaveError, match="file system that they all share"):
            write_slices(str(folder), file_name("0123456789abcdef", 0, 0), [])
    assert list(tmp_path.iterdir()) == []


def test_a_reader_opens_files_of_saves_only(tmp_path: Path) -> None:
    (record,) = write(tmp_path, []).keys
    elsewhere = KeyRecord("w", (NUM,), "float32", False, [
        type(record.pieces[0])(0, NUM, 0, record.pieces[0].tensors, {}, "../" + record.pieces[0].file)
    ])  # fmt: skip
    with PieceReader(str(tmp_path)) as reader, pytest.raises(LoadError, match="not a file of a save"):
        reader.load(elsewhere, 0, NUM)
