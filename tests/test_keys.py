"""Arguments become pairs of key and values, in each of the three forms."""

from __future__ import annotations

import operator
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from tensorkv.errors import InvalidArgument, InvalidKey, InvalidOut, InvalidValue, LengthMismatch
from tensorkv.keys import (
    ABSENT,
    Form,
    answer,
    check_keys,
    check_new_keys,
    pull_batch,
    pull_batch_of,
    push_batch,
    split_keys,
)

A, B, C = torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([3.0])


class TestCheckKeys:
    def test_ints_or_strings(self) -> None:
        assert check_keys([3, 1]) == (3, 1)
        assert check_keys(iter(["b", "a"]), str) == ("b", "a")

    @pytest.mark.parametrize("key", [True, None, 1.0, b"w", ("w",), np.int64(3)])
    def test_anything_else_is_refused(self, key: Any) -> None:
        with pytest.raises(InvalidKey, match="int or a str"):
            check_keys([key])

    def test_a_bool_among_ints_is_found(self) -> None:
        with pytest.raises(InvalidKey, match="True is a bool"):
            check_keys([1, True])

    def test_a_number_of_numpy_says_what_to_pass(self) -> None:
        with pytest.raises(InvalidKey, match=r"key 3 is a numpy\.int64.*pass key\.item\(\)"):
            check_keys([np.int64(3)])

    def test_a_mix_is_refused(self) -> None:
        with pytest.raises(InvalidKey, match="mixed"):
            check_keys([1, "a"])
        with pytest.raises(InvalidKey, match="int keys"):
            check_keys(["a"], int)
        with pytest.raises(InvalidKey, match="key 1 is an int, but this store has str keys"):
            check_keys([1], str)

    def test_a_long_list_is_cut_in_the_text(self) -> None:
        with pytest.raises(InvalidKey) as caught:
            check_keys([*range(1000), "a"])
        assert len(str(caught.value)) < 200

    def test_none_at_all(self) -> None:
        with pytest.raises(LengthMismatch, match="empty"):
            check_keys([])


class TestSplitKeys:
    def test_three_forms(self) -> None:
        assert split_keys("w", A) == (["w"], [A], Form.SINGLE)
        assert split_keys(("w", "b"), [A, B]) == (["w", "b"], [A, B], Form.LIST)
        assert split_keys({"w": A, "b": B}, None) == (["w", "b"], [A, B], Form.DICT)

    def test_values_may_come_from_a_generator(self) -> None:
        assert split_keys([1, 2], (x for x in (A, B)))[1] == [A, B]

    def test_a_dict_and_values(self) -> None:
        with pytest.raises(InvalidValue, match="already holds"):
            split_keys({"w": A}, A)

    @pytest.mark.parametrize("value", [None, A, {"w": A}])
    def test_a_list_of_keys_wants_a_list(self, value: Any) -> None:
        with pytest.raises(InvalidValue, match="list of 1 keys"):
            split_keys(["w"], value)

    @pytest.mark.parametrize(("keys", "values"), [(["w"], [A, B]), (["w", "b"], [A]), ([], []), ({}, None)])
    def test_lengths(self, keys: Any, values: Any) -> None:
        with pytest.raises(LengthMismatch):
            split_keys(keys, values)


class TestPushBatch:
    def test_devices_of_one_key(self) -> None:
        batch = push_batch("w", [A, B], None)
        assert batch.keys == ("w",)
        assert batch.tensors == [[A, B]]
        assert batch.counts == [2]

    def test_absent(self) -> None:
        batch = push_batch(["w", "b"], [ABSENT, A], None)
        assert batch.tensors == [[], [A]]
        assert batch.counts == [0, 1]

    def test_absent_is_no_device(self) -> None:
        with pytest.raises(InvalidValue):
            push_batch("w", [A, ABSENT], None)

    def test_a_repeated_key_is_joined_in_order_and_counts_as_one_push(self) -> None:
        batch = push_batch(["w", "b", "w"], [[A, B], A, [C]], None)
        assert batch.keys == ("w", "b")
        assert batch.tensors[0] == [A, B, C]
        assert batch.counts == [2, 1]

    def test_a_repeated_key_with_absent(self) -> None:
        batch = push_batch(["w", "w"], [ABSENT, A], None)
        assert batch.tensors == [[A]]
        assert batch.counts == [1]

    def test_no_devices(self) -> None:
        with pytest.raises(LengthMismatch, match="'w' is empty"):
            push_batch("w", [], None)

    def test_a_missing_value(self) -> None:
        with pytest.raises(InvalidValue, match="None"):
            push_batch("w", None, None)


class TestPullBatch:
    def test_without_out(self) -> None:
        single, many = pull_batch("w", None, None), pull_batch(["w", "b"], None, str)
        assert (single.outs, single.form) == ([[]], Form.SINGLE)
        assert (many.outs, many.form) == ([[], []], Form.LIST)

    def test_keys_may_repeat(self) -> None:
        assert pull_batch(["w", "w"], [A, B], None).keys == ("w", "w")

    def test_a_dict_of_outs_needs_no_keys(self) -> None:
        given = {"w": torch.zeros(1), "b": [torch.zeros(1), torch.zeros(1)]}
        batch = pull_batch(None, given, None)
        assert batch.keys == ("w", "b")
        assert [len(outs) for outs in batch.outs] == [1, 2]
        assert answer(batch, []) is given

    def test_no_key_and_no_out(self) -> None:
        with pytest.raises(InvalidKey):
            pull_batch(None, None, None)

    def test_bad_outs(self) -> None:
        with pytest.raises(LengthMismatch, match="outs"):
            pull_batch("w", [], None)
        with pytest.raises(InvalidOut):
            pull_batch("w", torch.zeros(1).expand(4), None)

    def test_the_answer_has_the_form_of_the_question(self) -> None:
        assert answer(pull_batch("w", None, None), [A]) is A
        assert answer(pull_batch(["w"], None, None), [A]) == [A]
        out = torch.zeros(1)
        assert answer(pull_batch("w", out, None), []) is out


class TestPullBatchOf:
    """Where a pushpull writes, in each of the forms its keys and its out may have."""

    @pytest.mark.parametrize("key", ["w", ["w", "b"], ["w", "b", "w"], {"w": A, "b": B}])
    def test_new_tensors_in_the_form_of_the_keys(self, key: Any) -> None:
        values = None if isinstance(key, dict) else A if key == "w" else [A, B, C][: len(key)]
        batch = pull_batch_of(push_batch(key, values, None), key, None, None)
        distinct = ("w",) if key == "w" else ("w", "b")
        assert (batch.keys, batch.outs) == (distinct, [[] for _ in distinct])
        answers: Any = {"w": A, "b": B} if isinstance(key, dict) else A if key == "w" else [A, B]
        assert answer(batch, [A, B][: len(distinct)]) == answers

    def test_one_out_per_distinct_key(self) -> None:
        outs = [torch.zeros(1), torch.zeros(1)]
        for keys, values in ((["w", "b"], [A, B]), (["w", "b", "w"], [A, B, C]), (("w", "b"), (A, B))):
            batch = pull_batch_of(push_batch(keys, values, None), keys, outs, None)
            assert batch.keys == ("w", "b")
            assert [out is given for (out,), given in zip(batch.outs, outs, strict=True)] == [True, True]
            assert answer(batch, []) is outs
        assert outs == [torch.zeros(1), torch.zeros(1)]

    def test_a_list_of_outs_per_key(self) -> None:
        outs = [[torch.zeros(1), torch.zeros(1)], [torch.zeros(1)]]
        batch = pull_batch_of(push_batch(["w", "b"], [A, B], None), ["w", "b"], outs, None)
        assert list(map(len, batch.outs)) == [2, 1]

    def test_a_dict_of_outs_in_any_order(self) -> None:
        pushed = push_batch(["w", "b"], [A, B], None)
        given = {"b": torch.zeros(1), "w": torch.zeros(1)}
        batch = pull_batch_of(pushed, ["w", "b"], given, None)
        assert batch.keys == ("b", "w")
        assert answer(batch, []) is given
        with pytest.raises(InvalidArgument, match="other keys"):
            pull_batch_of(pushed, ["w", "b"], {"b": torch.zeros(1)}, None)

    def test_too_few_and_bad_outs(self) -> None:
        pushed = push_batch(["w", "b"], [A, B], None)
        with pytest.raises(LengthMismatch):
            pull_batch_of(pushed, ["w", "b"], [torch.zeros(1)], None)
        with pytest.raises(InvalidOut):
            pull_batch_of(pushed, ["w", "b"], [torch.zeros(1), torch.zeros(1).expand(4)], None)
        with pytest.raises(InvalidValue, match="out for key 'b' is None"):
            pull_batch_of(pushed, ["w", "b"], [torch.zeros(1), None], None)


def test_lists_per_device_of_plain_tensors_are_taken_as_they_are() -> None:
    tensors = [[torch.ones(2), torch.zeros(2)], (torch.ones(2),)]
    for found in (push_batch(["a", "b"], tensors, None).tensors, pull_batch(["a", "b"], tensors, None).outs):
        assert [len(each) for each in found] == [2, 1]
        flat = [each for of_key in found for each in of_key]
        assert all(map(operator.is_, flat, [*tensors[0], *tensors[1]]))
        assert found[0] is not tensors[0]  # the caller's list may change


@pytest.mark.parametrize(
    "odd", [torch.ones(1).expand(2), torch.ones(2, device="meta"), torch.ones(2).to_sparse(), None]
)
def test_an_odd_one_in_a_list_per_device_is_found(odd: Any) -> None:
    with pytest.raises((InvalidOut, InvalidValue), match="'b'"):
        pull_batch(["a", "b"], [[torch.ones(2)], [torch.ones(2), odd]], None)
    if odd is None or odd.layout is not torch.strided or odd.is_meta:
        with pytest.raises(InvalidValue, match="'b'"):
            push_batch(["a", "b"], [[torch.ones(2)], [torch.ones(2), odd]], None)


def test_absent_is_one_object_with_a_name() -> None:
    assert repr(ABSENT) == "tensorkv.ABSENT"
    assert pickle.loads(pickle.dumps(ABSENT)) is ABSENT


@pytest.mark.parametrize("key", [2**63, -(2**63) - 1, "\ud800", "a\udfffb"])
def test_a_new_key_must_fit_into_a_message(key: Any) -> None:
    with pytest.raises(InvalidKey, match="64 bits|Unicode"):
        check_new_keys([key])


def test_new_keys_that_fit() -> None:
    check_new_keys([2**63 - 1, -(2**63), 0])
    check_new_keys(["w", "", "grün", "\U0001f600", "\ud7ff\ue000"])
