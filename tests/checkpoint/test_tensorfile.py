"""One file of a save: all dtypes, its checksum, its mode, and what is no such file."""

from __future__ import annotations

import itertools
import json
import os
import random
import stat
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensorkv.arrays import REFUSED_DTYPES, bytes_of
from tensorkv.checkpoint import tensorfile
from tensorkv.checkpoint.records import FileRecord
from tensorkv.checkpoint.tensorfile import Checksum, TensorFile, new_file, write_tensors
from tensorkv.errors import LoadError, SaveError

DTYPES = sorted({each for each in vars(torch).values() if isinstance(each, torch.dtype)}, key=str)
PAGES = [bytes([number]) * 4096 for number in range(5)]


def write(path: Path, tensors: Mapping[str, torch.Tensor]) -> FileRecord:
    descriptor = new_file(str(path))
    try:
        return write_tensors(descriptor, tensors)
    finally:
        os.close(descriptor)


def verify(path: Path, record: FileRecord) -> None:
    file = TensorFile(str(path))
    try:
        file.verify(record, wholly=True)
    finally:
        file.close()


def read(path: Path, name: str, like: torch.Tensor, low: int = 0, high: int | None = None) -> torch.Tensor:
    file = TensorFile(str(path))
    try:
        return file.read(name, like.dtype, like.shape, low, like.numel() if high is None else high)
    finally:
        file.close()


def any_bits(dtype: torch.dtype, num_elems: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_elems)
    data = torch.randint(0, 256, (num_elems * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return (data % 2 if dtype is torch.bool else data).view(dtype)


@pytest.mark.parametrize("dtype", [each for each in DTYPES if each not in REFUSED_DTYPES], ids=str)
def test_every_dtype_comes_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"w": any_bits(dtype, 15), "odd": any_bits(torch.uint8, 3), "none": any_bits(dtype, 0)}
    record = write(tmp_path / "file", tensors)
    verify(tmp_path / "file", record)
    for name, tensor in tensors.items():
        assert bytes_of(read(tmp_path / "file", name, tensor)) == bytes_of(tensor)
    assert bytes_of(read(tmp_path / "file", "w", tensors["w"], 4, 9)) == bytes_of(tensors["w"][4:9])
    told = safetensors.torch.load_file(tmp_path / "file")  # anybody can read it, if not know what it is
    assert bytes_of(told["w"]) == bytes_of(tensors["w"])
    assert dtype not in tensorfile._NAMES or (told["w"].dtype, told["w"].shape) == (dtype, (15,))


@pytest.mark.parametrize("name", ["float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float32", "bool"])
def test_what_the_library_has_written_is_read(name: str, tmp_path: Path) -> None:
    """Earlier versions let it write, under whatever name it had for a dtype."""
    value = any_bits(getattr(torch, name), 12).view(3, 4)
    safetensors.torch.save_file({"w": value, "b": torch.zeros(1)}, tmp_path / "file")
    assert bytes_of(read(tmp_path / "file", "w", value)) == bytes_of(value)


def test_each_tensor_is_aligned_and_the_header_too(tmp_path: Path) -> None:
    write(tmp_path / "file", {str(number): any_bits(d, 3) for number, d in enumerate(tensorfile._NAMES)})
    data = (tmp_path / "file").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    for name, entry in json.loads(data[8 : 8 + length]).items():
        assert entry["data_offsets"][0] % list(tensorfile._NAMES)[int(name)].itemsize == 0


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600), (0, 0o666)])
def test_a_file_has_the_mode_that_open_would_give(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write(tmp_path / "file", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_nothing_that_is_there_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("kept")
    (tmp_path / "link").symlink_to("there")
    (tmp_path / "dangling").symlink_to("made")
    for name in ("there", "link", "dangling"):
        with pytest.raises(FileExistsError):
            new_file(str(tmp_path / name))
    assert (tmp_path / "there").read_text() == "kept"
    assert not (tmp_path / "made").exists()


def test_too_many_tensors_for_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorfile, "MAX_HEADER_BYTES", 100)
    with pytest.raises(SaveError, match="too many for one file"):
        write(tmp_path / "file", {"a": torch.zeros(1), "b": torch.zeros(1)})


# ---- the checksum ------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [1, 0x80, 0x55, 0xFF])
def test_every_changed_byte_is_found_and_every_cut(change: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    record = write(path, {"w": torch.arange(33.0), "step": torch.tensor(3)})
    data = bytearray(path.read_bytes())
    for at in range(len(data)):
        data[at] ^= change
        path.write_bytes(data)
        with pytest.raises(LoadError, match=f"{path} is not as it was saved: its checksum is"):
            verify(path, record)
        data[at] ^= change
    for size in range(len(data)):
        os.truncate(path, size) if size else path.write_bytes(b"")
        with pytest.raises(LoadError, match=f"{path} is not as it was saved: {size} bytes"):
            verify(path, record)
        path.write_bytes(data)
    verify(path, record)


def of(*parts: bytes) -> tuple[int, int]:
    found = Checksum()
    for block in tensorfile._blocks([memoryview(part) for part in parts]):
        found.add(block)
    return found.rows, found.columns


@given(st.integers(0, 4), st.integers(0, 4), st.integers(0, 511), st.integers(0, 511), st.integers(0, 63))
def test_two_bits_that_make_up_for_each_other_are_found(
    page: int, other: int, word: int, place: int, bit: int
) -> None:
    """One is set and one cleared, of the same weight: a sum that both are in stays the same."""
    if (page, word) == (other, place):
        return
    data = bytearray(5 * 4096)
    data[other * 4096 + place * 8 + bit // 8] = 1 << bit % 8
    changed = bytearray(5 * 4096)
    changed[page * 4096 + word * 8 + bit // 8] = 1 << bit % 8
    assert of(bytes(data)) != of(bytes(changed))


def test_words_and_pages_that_are_swapped_or_missing_are_found() -> None:
    numbers = random.Random(3).randbytes(4096)
    swapped = numbers[8:16] + numbers[:8] + numbers[16:]
    others = [
        of(*PAGES),
        of(*PAGES, b"tail"),
        of(*PAGES, b"tali"),
        of(PAGES[1], PAGES[0], *PAGES[2:], b"tail"),
        of(PAGES[0], *PAGES[3:5], *PAGES[1:3], b"tail"),
        of(*PAGES[1:], b"tail"),
        of(numbers),
        of(swapped),
        of(),
    ]
    assert len(set(others)) == len(others)


def test_a_checksum_does_not_depend_on_how_bytes_came_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorfile, "_BLOCK_BYTES", 8192)
    data = random.Random(4).randbytes(20_001)
    expected = of(data)
    for cuts in ([1], [8, 9, 8192, 8193], list(range(0, 20_000, 777))):
        assert of(*(data[low:high] for low, high in itertools.pairwise([0, *cuts, len(data)]))) == expected


def test_the_rows_are_what_they_were_when_there_were_no_columns() -> None:
    one = np.frombuffer(b"".join(PAGES), "<u8").reshape(5, 512)
    assert of(*PAGES)[0] == zlib.crc32(one.sum(axis=1, dtype="<u8").tobytes())


def test_the_rows_alone_are_compared_where_there_are_no_columns(tmp_path: Path) -> None:
    path = tmp_path / "file"
    record = write(path, {"w": torch.arange(33.0)})
    verify(path, FileRecord(record.size_bytes, record.checksum))
    verify(path, FileRecord(record.size_bytes))
    for wrong in (FileRecord(record.size_bytes, 1), FileRecord(record.size_bytes, record.checksum, 1)):
        with pytest.raises(LoadError, match="and should be"):
            verify(path, wrong)


# ---- what is no such file ----------------------------------------------------------------------------


def _file(header: Any, data: bytes = bytes(16), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def _entry(**changes: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changes}}


BAD = {
    "nothing": b"",
    "no length": b"\1\2\3",
    "a header longer than the file": _file(_entry(), length=1 << 62),
    "a header that is just too long": _file(b"", b"", length=1),
    "no JSON": _file(b"{not JSON"),
    "no Unicode": _file(b'{"\xff": 1}'),
    "a list": _file([1]),
    "deep": _file(b"[" * 100_000),
    "no entry": _file({"w": 3}),
    "no offsets": _file({"w": {"dtype": "F32", "shape": [4]}}),
    "offsets past the end": _file(_entry(data_offsets=[0, 17])),
    "huge offsets": _file(_entry(data_offsets=[0, 10**30])),
    "offsets in the header": _file(_entry(data_offsets=[-8, 8])),
    "offsets backwards": _file(_entry(data_offsets=[16, 0])),
    "offsets in fractions": _file(_entry(data_offsets=[0.0, 16.0])),
    "offsets in words": _file(_entry(data_offsets=["0", "16"])),
    "another dtype": _file(_entry(dtype="I32")),
    "another shape": _file(_entry(shape=[2, 2])),
    "no shape": _file(_entry(shape=4)),
    "fewer bytes": _file(_entry(data_offsets=[0, 12])),
    "another name": _file({"v": _entry()["w"]}),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_none_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(BAD[name])
    file = TensorFile(str(path))
    try:
        with pytest.raises(LoadError, match=str(path)):
            file.check("w", torch.float32, (4,))
    finally:
        file.close()


def test_a_good_one_of_these(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(_file(_entry() | {"__metadata__": {"a": "b"}}))
    assert read(tmp_path / "file", "w", torch.ones(4)).eq(0).all()


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(_file(_entry()))
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")  # whoever opened it would wait for a writer
    (tmp_path / "folder").mkdir()
    for name in ("link", "pipe", "folder", "nowhere"):
        with pytest.raises(LoadError, match=f"{name} belongs to the save and cannot be read.*on host"):
            TensorFile(str(tmp_path / name))


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    record = write(path, {"w": torch.arange(4.0)})
    file = TensorFile(str(path))
    try:
        file.check("w", torch.float32, (4,))
        os.truncate(path, record.size_bytes - 8)
        for call in (
            lambda: file.read("w", torch.float32, (4,), 0, 4),
            lambda: file.verify(record, wholly=True),
        ):
            with pytest.raises(LoadError, match="is cut off"):
                call()
        file.close()
        with pytest.raises(LoadError, match="bytes, and had"):
            file.reopen()
    finally:
        file.close()
