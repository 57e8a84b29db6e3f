"""Numbers that make no sense, in messages whose types are right."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tensorkv.checkpoint.records import VALUE, SavedSettings, SettingEntry, TensorRecord
from tensorkv.errors import ProtocolError
from tensorkv.updaters.spec import UpdaterSpec
from tensorkv.wire import messages as m
from tensorkv.wire.validate import (
    MAX_STATE_BYTES,
    MAX_STATE_TENSORS,
    check_entries,
    check_init,
    check_reply,
    check_saved,
    check_slice,
    sent_dtype,
    sent_size,
)


def entry(*slices: tuple[int, int, int], shape: tuple[int, ...] = (8,), dtype: str = "float32") -> m.KeyEntry:
    """A key whose slices are given as server, start and stop."""
    return m.KeyEntry("w", 1, shape, dtype, 0, [m.SliceEntry(7, *each) for each in slices])


def test_keys_that_can_be() -> None:
    check_entries([entry((0, 0, 8)), entry((1, 4, 8), (0, 0, 4)), entry((0, 0, 1), shape=())], 2)
    check_entries([entry((1, 0, 0), shape=(0, 3))], 2)


@pytest.mark.parametrize(
    "wrong",
    [
        entry((2, 0, 8)),
        entry(shape=(0,)),
        entry((-1, 0, 8)),
        entry((0, 0, 7)),
        entry((0, 0, 9)),
        entry((0, 1, 8)),
        entry((0, 0, 5), (1, 4, 8)),
        entry((0, 0, 3), (1, 4, 8)),
        entry((0, 0, 8), (0, 8, 7), (0, 7, 8)),
        entry((0, 0, 8), dtype="no_dtype"),
        entry((0, 0, 8), shape=(-8,)),
        entry((0, 0, 1), shape=(1,) * 5000),
    ],
)
def test_keys_that_cannot_be(wrong: m.KeyEntry) -> None:
    for reply in (
        m.Entries(1, [entry((0, 0, 8)), wrong]),
        m.InitReply(1, [wrong], [True]),
        m.LoadReply(1, [wrong]),
        m.TogetherReply(1, False, None, [wrong]),
    ):
        with pytest.raises(ProtocolError):
            check_reply(reply, 2)


SPEC = m.KeySpec("w", (8,), "float32", 4, False)


def test_an_init_is_answered_by_its_own_keys() -> None:
    good = entry((0, 0, 8))
    check_init(m.InitReply(1, [good], [True]), [SPEC])
    for entries, lead in (
        ([], []),
        ([good], []),
        ([good, good], [True, True]),
        ([entry((0, 0, 7), shape=(7,))], [True]),
        ([entry((0, 0, 8), dtype="int64")], [True]),
    ):
        with pytest.raises(ProtocolError):
            check_init(m.InitReply(1, entries, lead), [SPEC])


def test_settings_that_are_not_complete() -> None:
    add = UpdaterSpec(type="named", name="add", elementwise=True)
    check_saved(SavedSettings([add], [SettingEntry(None, 0, {}, None)]))
    for wrong in (SavedSettings([], []), SavedSettings([add], [SettingEntry(None, 1, {}, None)])):
        with pytest.raises(ProtocolError):
            check_saved(wrong)
        with pytest.raises(ProtocolError):
            check_reply(m.TogetherReply(1, False, wrong), 1)


def record(name: str, *shape: int, dtype: str = "float32", elementwise: bool = True) -> TensorRecord:
    return TensorRecord(name, dtype, shape, elementwise)


def test_a_slice_with_its_state() -> None:
    tensors = [record(VALUE, 4), record("m", 4, dtype="float64"), record("step", elementwise=False)]
    assert check_slice(2, 6, (8,), 3, tensors, {"lr": 0.1}) == 16 + 32 + 4


@pytest.mark.parametrize(
    "changes",
    [
        {"start": -1},
        {"stop": 9},
        {"start": 7},
        {"version": -1},
        {"version": 2**63},  # the fuzzer found it: no int64 holds it
        {"tensors": []},
        {"tensors": [record("m", 4)]},
        {"tensors": [record(VALUE, 4, elementwise=False)]},
        {"tensors": [record(VALUE, 5)]},
        {"tensors": [record(VALUE, 4), record("m", 5)]},
        {"tensors": [record(VALUE, 4), record("m", 4), record("m", 4)]},
        {"tensors": [record(VALUE, 4), record("lr", 4)]},
        {"tensors": [record(VALUE, 4, dtype="no_dtype")]},
        {"tensors": [record(VALUE, 4), record("m", -1, elementwise=False)]},
        {"tensors": [record(VALUE, 4), record("m", MAX_STATE_BYTES, elementwise=False)]},
        {"tensors": [record(VALUE, 4), *(record(str(each), 4) for each in range(MAX_STATE_TENSORS))]},
    ],
)
def test_a_slice_that_cannot_be(changes: dict[str, Any]) -> None:
    good = {"start": 2, "stop": 6, "shape": (8,), "version": 3, "tensors": [record(VALUE, 4)]}
    with pytest.raises(ProtocolError):
        check_slice(**{**good, "plain": {"lr": 0.1}, **changes})  # type: ignore[arg-type]


def test_dtypes_come_by_name() -> None:
    assert sent_dtype("bfloat16") == torch.bfloat16
    for name in ("float33", "", "Tensor", "nn"):
        with pytest.raises(ProtocolError, match=repr(name)):
            sent_dtype(name)


def test_a_dtype_is_looked_up_in_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch imports modules of its own when it is asked for an attribute of their name."""
    asked: list[str] = []
    monkeypatch.setattr(torch, "__getattr__", asked.append)
    for name in ("_dynamo", "_inductor", "quint8", "bits8"):
        with pytest.raises(ProtocolError):
            sent_dtype(name)
    assert asked == []


def test_the_size_of_a_shape_that_was_sent() -> None:
    assert [sent_size(shape) for shape in ((), (0,), (2, 3), (0, 1 << 58))] == [1, 0, 6, 0]
    for shape in ((-1,), (-2, -2), (1 << 60,), (1 << 30, 1 << 30), (0, 1 << 60), (2,) * 65):
        with pytest.raises(ProtocolError, match="a shape of"):
            sent_size(shape)
