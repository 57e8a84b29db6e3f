"""What a script may choose for its steps: known words, and choices that go together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tensorkv
from tensorkv.errors import InvalidArgument


@pytest.mark.parametrize(
    ("choices", "text"),
    [
        ({"where": "server"}, "where='server' is not known; use 'servers' or 'workers'"),
        ({"clip": "global"}, "clip='global' is not known"),
        ({"buffers": "rank1"}, "buffers='rank1' is not known"),
        ({"overlap": "backwards"}, "overlap='backwards' is not known; use False, 'backward' or 'forward'"),
        ({"overlap": True}, "overlap=True is not known"),
        ({"overlap": 0}, "overlap=0 is not known"),
        ({"share_weights": "yes"}, "share_weights='yes'"),
        ({"skip_nonfinite": 1}, "skip_nonfinite=1"),
        ({"max_norm": -1.0}, "max_norm=-1.0"),
        ({"overlap": "backward", "where": "workers"}, "where='workers'"),
        ({"share_weights": True, "where": "workers"}, "where='workers'"),
        ({"overlap": "forward", "share_weights": True}, "share_weights=True"),
        ({"overlap": "backward", "accumulate": 0}, "accumulate=0"),
        ({"overlap": "backward", "accumulate": True}, "accumulate=True"),
        ({"accumulate": 2}, "accumulate=2"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_before_a_store_is_open(choices: dict[str, Any], text: str) -> None:
    model = nn.Linear(2, 1)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InvalidArgument, match=text):
        tensorkv.DistributedOptimizer(inner, model, name="refused", **choices)


@pytest.mark.parametrize(
    "choices",
    [
        {"where": "workers", "accumulate": 2},
        {"overlap": "backward", "accumulate": 2, "max_norm": 1.0},
        {"overlap": "forward", "share_weights": "auto"},
        {"where": "workers", "share_weights": "auto"},
        {"clip": "local", "buffers": "mean", "skip_nonfinite": True},
    ],
    ids=str,
)
def test_what_goes_together(choices: dict[str, Any]) -> None:
    model = nn.Linear(2, 1)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = tensorkv.DistributedOptimizer(inner, model, **choices)
    before = model.bias.item()
    for _ in range(choices.get("accumulate", 1)):
        model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.wait()
    assert model.bias.item() < before
