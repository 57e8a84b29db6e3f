"""Slices with their state in memory: cut and joined, packed, and as a dict."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensorkv.checkpoint.records import SavedSettings, SettingEntry
from tensorkv.checkpoint.slices import (
    MemoryPieces,
    SliceState,
    assemble,
    from_state_dict,
    pack,
    packed_bytes,
    records_of,
    slice_state,
    to_state_dict,
    unpack,
)
from tensorkv.errors import LoadError, SaveError
from tensorkv.updaters.spec import UpdaterSpec

ADAM = SavedSettings([UpdaterSpec(type="optimizer", name="mine:Adam")], [SettingEntry(None, 0, {}, None)])
NUM = 61
VALUE = torch.arange(float(NUM))
AVERAGE = VALUE.double() * 10


def part(low: int, high: int) -> SliceState:
    state = {"exp_avg": AVERAGE[low:high], "step": torch.tensor(7.0), "best": 0.5}
    return slice_state("w", VALUE[low:high], 3, state)


def in_memory(cuts: list[int]) -> MemoryPieces:
    pieces = MemoryPieces("w", (NUM,), False)
    for low, high in itertools.pairwise([0, *cuts, NUM]):
        pieces.add(low, high, part(low, high))
    return pieces


def check(found: SliceState, low: int, high: int) -> None:
    assert torch.equal(found.value, VALUE[low:high])
    assert torch.equal(found.state["exp_avg"], AVERAGE[low:high])
    assert torch.equal(found.state["step"], torch.tensor(7.0))
    assert (found.state["best"], found.version, found.elementwise) == (0.5, 3, {"exp_avg"})


cuts = st.lists(st.integers(1, NUM - 1), max_size=5, unique=True).map(sorted)


@given(cuts, cuts)
def test_however_it_was_cut_it_can_be_cut_in_any_other_way(old: list[int], new: list[int]) -> None:
    pieces = in_memory(old)
    for low, high in itertools.pairwise([0, *new, NUM]):
        found = assemble(pieces.record, low, high, pieces.fetch)
        check(found, low, high)
        found.value.fill_(-1)  # it shares no memory with what it was made of
        found.state["step"].fill_(-1)
    check(assemble(pieces.record, 0, NUM, pieces.fetch), 0, NUM)


@given(st.integers(0, NUM), st.integers(0, NUM))
def test_what_is_packed_is_unpacked(one: int, other: int) -> None:
    low, high = sorted((one, other))
    records, tensors, plain = records_of(part(low, high))
    data = pack(tensors)
    assert data.numel() == packed_bytes(records)
    check(unpack(data, records, 3, plain), low, high)


def test_state_of_other_shapes_stays_with_its_piece() -> None:
    value = torch.zeros(3, 4, dtype=torch.complex128)
    each = slice_state("w", value, 0, {"row": torch.ones(3), "z": value[0] + 1j, "buffer": value + 1j})
    assert each.elementwise == {"buffer"}
    back = each.optimizer_state((3, 4))
    assert {name: tuple(t.shape) for name, t in back.items()} == {"row": (3,), "z": (4,), "buffer": (3, 4)}


@pytest.mark.parametrize("state", [{"x": [1]}, {"x": object()}, {3: 1}, {"": 1}, {"x": {"y": 1}}])
def test_state_that_cannot_be_saved_says_so(state: dict[Any, Any]) -> None:
    with pytest.raises(SaveError, match="'w'.*cannot be saved"):
        slice_state("w", VALUE, 0, state)


# ---- as a dict ---------------------------------------------------------------------------------------


def test_a_dict_comes_back() -> None:
    found = to_state_dict("sum", ADAM, [in_memory([5, 40])])
    assert torch.equal(found["values"]["w"], VALUE)
    assert torch.equal(found["optimizer_state"]["w"]["exp_avg"], AVERAGE)
    reduction, saved, (pieces,) = from_state_dict(found)
    assert (reduction, saved) == ("sum", ADAM)
    check(assemble(pieces.record, 3, 50, pieces.fetch), 3, 50)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "x"},
        {"version": 2},
        {"reduction": "max"},
        {"settings": {}},
        {"settings": {"updaters": [], "entries": []}},
        {"values": [1]},
        {"values": {"w": 3}},
        {"values": {True: VALUE}},
        {"versions": {}},
        {"versions": {"w": 1.5}},
        {"versions": {"w": -1}},
        {"optimizer_state": {"w": {"x": object()}}},
        {"optimizer_state": {"w": 3}},
        {"whole": None},
    ],
)
def test_a_dict_that_is_none_is_refused(change: dict[str, Any]) -> None:
    good = to_state_dict("sum", ADAM, [in_memory([])])
    with pytest.raises(LoadError):
        from_state_dict({**good, **change})
