"""Which keys a model's parameters were initialised as."""

from __future__ import annotations

import gc

import torch

from tensorkv.parameters import ParameterTable


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(2))


def test_keys_of_parameters() -> None:
    table, first, second = ParameterTable(), parameter(), parameter()
    table.learn(["a", "b", "c", "n"], [first, [second], first, torch.ones(2)])
    assert table.keys_by_id() == {id(first): ["a", "c"], id(second): ["b"]}
    table.forget(["a", "zzz"])
    assert table.keys_by_id() == {id(first): ["c"], id(second): ["b"]}
    table.learn(["c"], [torch.ones(2)])
    assert table.keys_by_id() == {id(second): ["b"]}


def test_parameters_are_held_weakly() -> None:
    table = ParameterTable()
    table.learn(["a"], [parameter()])
    gc.collect()
    assert table.keys_by_id() == {}
