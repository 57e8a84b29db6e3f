"""Checkpoints between torch's format and the store's."""

from __future__ import annotations

import pytest
import torch

from tensorkv.training.states import state_digest, with_states


def test_values_and_states_are_exchanged_and_all_else_stays() -> None:
    held = {
        "format": "f",
        "values": {"a": torch.zeros(1), "other": torch.ones(1)},
        "optimizer_state": {"other": {}},
    }
    state = {"momentum_buffer": torch.ones(1, requires_grad=True), "step": 3}
    found = with_states(held, {"a": torch.full((1,), 2.0)}, {"a": state})
    assert found["format"] == "f"
    assert {key: each.item() for key, each in found["values"].items()} == {"a": 2.0, "other": 1.0}
    assert found["optimizer_state"].keys() == {"a"}
    assert not found["optimizer_state"]["a"]["momentum_buffer"].requires_grad
    assert found["optimizer_state"]["a"]["step"] == 3
    assert held["values"]["a"] == 0


@pytest.mark.parametrize(
    "other",
    [
        {"a": {"m": torch.tensor([1.0, 3.0]), "step": 1}},
        {"a": {"m": torch.tensor([1.0, 2.0], dtype=torch.float64), "step": 1}},
        {"a": {"m": torch.tensor([[1.0, 2.0]]), "step": 1}},
        {"a": {"m": torch.tensor([1.0, 2.0]), "step": 2}},
        {"a": {"m": torch.tensor([1.0, 2.0])}},
        {"b": {"m": torch.tensor([1.0, 2.0]), "step": 1}},
        {},
    ],
)
def test_digests_differ_where_states_do(other: dict[str, dict[str, object]]) -> None:
    one = {"a": {"m": torch.tensor([1.0, 2.0]), "step": 1}}
    assert state_digest(one) == state_digest(
        {"a": {"step": 1, "m": torch.tensor([[1.0, 9.0], [2.0, 9.0]])[:, 0]}}
    )
    assert state_digest(one) != state_digest(other)
    assert state_digest({"a": {"n": torch.tensor(1, dtype=torch.bfloat16), "e": torch.zeros(0)}})
