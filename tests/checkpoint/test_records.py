"""What is saved, as records: the index as text, what is refused in it, and which pieces make up a slice."""

from __future__ import annotations

import contextlib
import itertools
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorkv.checkpoint.records import (
    INDEX_NAME,
    MAX_BATCH_SLICES,
    VALUE,
    FileRecord,
    Index,
    KeyRecord,
    Overlap,
    PieceRecord,
    SavedSettings,
    SettingEntry,
    TensorRecord,
    batches,
    check_alike,
    check_reduction,
    check_replaces,
    decode_index,
    encode_index,
    new_index,
    overlaps,
    version_of,
)
from tensorkv.errors import DtypeMismatch, LoadError, ShapeMismatch
from tensorkv.updaters.spec import UpdaterSpec

ADAM = UpdaterSpec(type="optimizer", name="torch.optim.adam:Adam", options={"betas": [0.5, 0.75]})
ASSIGN = UpdaterSpec(type="named", name="assign")
SETTINGS = SavedSettings(
    [ASSIGN, ADAM], [SettingEntry(None, 0, {}, None), SettingEntry(("w",), 1, {"lr": 0.1}, {"lr": 0.2})]
)
FILE = "tensorkv-0123456789abcdef-0-0.safetensors"


def piece(start: int, stop: int, version: int = 0, *, state: bool = True) -> PieceRecord:
    shape = (stop - start,)
    tensors = [TensorRecord(VALUE, "float32", shape, True, f"v{start}")]
    if state:
        tensors += [
            TensorRecord("step", "float32", (), False, f"s{start}"),
            TensorRecord("exp_avg", "float32", shape, True, f"e{start}"),
        ]
    return PieceRecord(start, stop, version, tensors, {"best": 1.5, "seen": None} if state else {}, FILE)


def index(*pieces: PieceRecord, shape: tuple[int, ...] = (4, 8)) -> Index:
    record = KeyRecord("w", shape, "float32", False, list(pieces) or [piece(0, 16, 3), piece(16, 32, 2)])
    return new_index("sum", SETTINGS, {FILE: FileRecord(100, 7)}, [record])


cuts = st.lists(st.integers(1, 60), max_size=6, unique=True).map(sorted)


@given(cuts, st.integers(0, 60), st.integers(0, 60))
def test_overlaps_are_the_elements_asked_for(at: list[int], one: int, other: int) -> None:
    pieces = [piece(low, high) for low, high in itertools.pairwise([0, *at, 61])]
    start, stop = sorted((one, other))
    parts = overlaps(pieces, start, stop)
    found = [e + pieces[each.piece].start for each in parts for e in range(each.low, each.high)]
    assert found == list(range(start, stop))
    assert parts
    assert all(each.low < each.high for each in parts) or start == stop


def test_a_value_without_elements_has_one_piece() -> None:
    assert overlaps([piece(0, 0)], 0, 0) == [Overlap(0, 0, 0)]


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 60))
def test_batches_keep_the_order_and_the_bound(sizes: list[int], bound: int) -> None:
    groups = batches(sizes, bound)
    assert [number for group in groups for number in group] == list(range(len(sizes)))
    for group in groups:
        assert len(group) == 1 or sum(sizes[number] for number in group) <= bound
    for one, other in itertools.pairwise(groups):
        assert sum(sizes[number] for number in one) + sizes[other[0]] > bound


def test_a_batch_has_a_bound_on_its_slices() -> None:
    groups = batches([0] * (MAX_BATCH_SLICES + 3))
    assert [len(group) for group in groups] == [MAX_BATCH_SLICES, 3]


def test_an_index_comes_back_from_its_text() -> None:
    written = index()
    assert decode_index(encode_index(written), INDEX_NAME) == written
    assert SETTINGS.spec_of("w") is ADAM
    assert SETTINGS.spec_of("x") is ASSIGN


def test_numbers_that_json_lacks_come_back() -> None:
    settings = SavedSettings([ADAM], [SettingEntry(None, 0, {"lr": float("inf")}, None)])
    written = new_index("mean", settings, {}, [])
    assert decode_index(encode_index(written), INDEX_NAME) == written


def _changed(path: list[Any], value: Any) -> bytes:
    """Return an index with a change, of the version that has no checksum."""
    data = {**msgspec.to_builtins(index()), "version": 1}
    at = data
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    return json.dumps(data).encode()


PIECE = ["keys", 0, "pieces", 0]
BAD = {
    "version": (["version"], 3),
    "format": (["format"], "mine"),
    "reduction": (["reduction"], "max"),
    "no settings": (["settings", "entries"], []),
    "a setting for no key first": (["settings", "entries", 0, "keys"], ["w"]),
    "two settings for all": (["settings", "entries", 1, "keys"], None),
    "an updater that is not there": (["settings", "entries", 1, "updater"], 2),
    "an unknown updater": (["settings", "updaters", 0, "name"], "os:system"),
    "state without an optimizer": (["settings", "entries", 1, "updater"], 0),
    "a path for a file": (["files"], {"../x/" + FILE: 3, FILE: 100}),
    "an absolute path": (["files"], {"/etc/passwd": 3, FILE: 100}),
    "a file that is not listed": ([*PIECE, "file"], FILE.replace("0-0", "0-1")),
    "a size that is no number": (["files", FILE], "much"),
    "a negative shape": (["keys", 0, "shape"], [-4, -8]),
    "another shape": (["keys", 0, "shape"], [4, 9]),
    "no pieces": (["keys", 0, "pieces"], []),
    "a gap": ([*PIECE, "stop"], 15),
    "an overlap": ([*PIECE, "stop"], 17),
    "pieces backwards": ([*PIECE, "start"], 40),
    "no value": ([*PIECE, "tensors"], []),
    "another value dtype": ([*PIECE, "tensors", 0, "dtype"], "int32"),
    "a value not for each element": ([*PIECE, "tensors", 0, "elementwise"], False),
    "too short a state": ([*PIECE, "tensors", 2, "shape"], [3]),
    "a negative state": ([*PIECE, "tensors", 1, "shape"], [-1]),
    "state twice": ([*PIECE, "tensors", 1, "name"], "best"),
    "a negative version": ([*PIECE, "version"], -1),
    "plain data that is none": ([*PIECE, "plain"], {"x": [1]}),
    "a huge version": ([*PIECE, "version"], 10**30),
    "a huge shape": (["keys", 0, "shape"], [0, 10**30]),
    "a huge state": ([*PIECE, "tensors", 1, "shape"], [0, 10**30]),
    "a huge key": (["keys", 0, "key"], 10**30),
    "a key that is no Unicode": (["keys", 0, "key"], "\ud800"),
    "a setting for a huge key": (["settings", "entries", 1, "keys"], [10**30]),
    "a huge option": (["settings", "entries", 1, "options"], {"lr": 10**30}),
    "a huge option that was asked": (["settings", "entries", 1, "asked"], {"lr": 10**30}),
    "a huge option of an updater": (["settings", "updaters", 1, "options"], {"lr": 10**30}),
    "an option that is not plain": (["settings", "entries", 1, "options"], {"lr": {"a": 1}}),
    "an optimizer without a module": (["settings", "updaters", 1, "name"], "x"),
    "no keys": (["keys"], None),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_index_is_refused(name: str) -> None:
    with pytest.raises(LoadError, match=INDEX_NAME):
        decode_index(_changed(*BAD[name]), INDEX_NAME)


def test_a_key_twice_or_of_two_types_is_refused() -> None:
    record = msgspec.to_builtins(index())["keys"][0]
    for keys in ([record, record], [record, {**record, "key": 3}]):
        with pytest.raises(LoadError, match="key"):
            decode_index(_changed(["keys"], keys), INDEX_NAME)


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_are_refused_as_an_index(data: bytes) -> None:
    with pytest.raises(LoadError):
        decode_index(data, INDEX_NAME)


@given(st.data())
def test_any_change_of_the_text_is_read_or_refused(data: st.DataObject) -> None:
    text = bytearray(_changed(["version"], 1))
    at = data.draw(st.integers(0, len(text) - 1))
    text[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(LoadError):
        decode_index(bytes(text), INDEX_NAME)


@pytest.mark.parametrize("change", [1, 2, 3, 4, 0x20, 0xFF])
def test_every_changed_byte_is_refused(change: int) -> None:
    """1 and 2 together make the version that needs no checksum."""
    text = bytearray(encode_index(index()))
    for at in range(len(text)):
        text[at] ^= change
        with pytest.raises(LoadError, match=INDEX_NAME):
            decode_index(bytes(text), INDEX_NAME)
        text[at] ^= change
    assert decode_index(bytes(text), INDEX_NAME) == index()


def test_every_cut_is_refused_and_what_is_added() -> None:
    text = encode_index(index())
    assert json.loads(text)["keys"][0]["key"] == "w"  # it is JSON as a whole
    for changed in [*(text[:end] for end in range(len(text))), text + b" ", text + text, b" " + text]:
        with pytest.raises(LoadError, match=INDEX_NAME):
            decode_index(changed, INDEX_NAME)


def test_an_index_of_before_there_were_checksums_is_read() -> None:
    old = index()
    assert decode_index(_changed(["files"], {FILE: 100}), INDEX_NAME).files == {FILE: FileRecord(100)}
    assert decode_index(_changed(["files", FILE, "columns"], None), INDEX_NAME).keys == old.keys
    with pytest.raises(LoadError, match="does not end with its checksum"):
        decode_index(_changed(["version"], 2), INDEX_NAME)


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(LoadError):
        decode_index(b"[" * 100_000, INDEX_NAME)


def test_pieces_with_and_without_state_cannot_be_joined() -> None:
    (record,) = index(piece(0, 16), piece(16, 32, state=False)).keys
    check_alike(record, overlaps(record.pieces, 0, 16))
    check_alike(record, overlaps(record.pieces, 20, 32))
    with pytest.raises(LoadError, match="'w'.*different optimizer state"):
        check_alike(record, overlaps(record.pieces, 10, 20))


def test_a_slice_is_as_far_as_the_least_of_its_pieces() -> None:
    (record,) = index().keys
    assert [version_of(record, overlaps(record.pieces, *of)) for of in ((0, 8), (8, 24), (16, 32))] == [
        3,
        2,
        2,
    ]


def test_what_is_replaced_has_to_be_alike() -> None:
    (record,) = index().keys
    check_replaces(record, [4, 8], "float32")
    with pytest.raises(ShapeMismatch, match="'w'.*\\(8, 4\\).*\\(4, 8\\)"):
        check_replaces(record, (8, 4), "float32")
    with pytest.raises(DtypeMismatch, match="'w'.*float64.*float32"):
        check_replaces(record, (4, 8), "float64")
    check_reduction("sum", "sum")
    with pytest.raises(LoadError, match="'mean'"):
        check_reduction("mean", "sum")


# ---- settings of several servers ---------------------------------------------------------------------


def settings_as_one(settings: SavedSettings, keys: list[str]) -> dict[str | None, Any]:
    """What holds for each of these keys, and for all others (None)."""
    found: dict[str | None, Any] = {}
    for key in (None, *keys):
        entry = settings.entries[0]
        for each in settings.entries[1:]:
            entry = each if key in (each.keys or ()) else entry
        found[key] = (settings.updaters[entry.updater], entry.options, entry.asked)
    return found


def test_settings_with_keys_of_others() -> None:
    other = SavedSettings(
        [ADAM, ASSIGN], [SettingEntry(None, 0, {"lr": 0.3}, None), SettingEntry(("v",), 1, {}, None)]
    )
    keys = ["u", "v", "w", "x"]
    mine, theirs = settings_as_one(SETTINGS, keys), settings_as_one(other, keys)
    assert SETTINGS.with_keys_of([(SETTINGS, keys), (other, [])]) is SETTINGS
    assert SETTINGS.with_keys_of([(other, ["v"])]) is SETTINGS  # it has the same
    for chosen in (["u"], ["w"], ["u", "w", "x"], keys):
        found = SETTINGS.with_keys_of([(SETTINGS, ["v"]), (other, chosen)])
        expected = {key: theirs[key] if key in chosen else mine[key] for key in mine}
        assert settings_as_one(found, keys) == expected
        named = [key for entry in found.entries[1:] for key in entry.keys or ()]
        assert len(set(named)) == len(named)
        assert [entry.keys for entry in found.entries].count(None) == 1
        assert len(found.updaters) == 2


def test_settings_with_a_key_that_has_what_others_have_not() -> None:
    other = SavedSettings([ASSIGN], [SettingEntry(None, 0, {}, None)])
    found = SETTINGS.with_keys_of([(other, ["w"])])
    assert settings_as_one(found, ["w"]) == settings_as_one(other, ["w"])
    assert found.spec_of("w") == ASSIGN
