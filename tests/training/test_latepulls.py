"""LatePulls: which part of a model waits for which parameters, and who waits for them."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn

import tensorkv
from tensorkv.errors import InvalidValue
from tensorkv.store import KVStore
from tensorkv.testing.cluster import run_job
from tensorkv.training import overlap
from tensorkv.training.latepulls import cut


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.linear = nn.Linear(4, 4)


class Model(nn.Module):
    """Two blocks that share a bias, and an embedding whose weight the head has, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 4)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3, bias=False)
        self.head.weight = self.embedding.weight
        self.blocks[1].linear.bias = self.blocks[0].linear.bias  # type: ignore[union-attr]


def parts_of(model: nn.Module) -> dict[str, list[str]]:
    return {name: list(part) for name, _, part in cut(model, dict(model.named_parameters()))}


def test_parts_are_the_outermost_modules_that_are_repeated() -> None:
    inner = ["attention.in_proj_weight", "attention.in_proj_bias"]
    inner += ["attention.out_proj.weight", "attention.out_proj.bias", "linear.weight"]
    assert parts_of(Model()) == {
        "the model": ["embedding.weight", "blocks.0.linear.bias", "norm.weight", "norm.bias"],
        "blocks.0": [f"blocks.0.{name}" for name in inner],
        "blocks.1": [f"blocks.1.{name}" for name in inner],
    }


def test_layers_of_a_sequential_are_parts() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Sequential(nn.Linear(2, 2)), nn.LayerNorm(2))
    assert parts_of(model) == {
        "the model": ["3.weight", "3.bias"],
        "0": ["0.weight", "0.bias"],
        "2.0": ["2.0.weight", "2.0.bias"],
    }


def test_a_model_of_one_layer_is_one_part() -> None:
    assert parts_of(nn.Linear(2, 2)) == {"the model": ["weight", "bias"]}


class Reader(nn.Module):
    """Reads the weights of a layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.second = nn.Linear(2, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.first(inputs), self.second.weight)


def late(model: nn.Module, **options: Any) -> Any:
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    return tensorkv.DistributedOptimizer(
        inner, model, kind="dist_sync", embedded=True, timeout_s=30.0, overlap="forward", **options
    )


def test_weights_that_are_read_past_their_module_are_an_error() -> None:
    model = Reader()
    optimizer = late(model)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(InvalidValue, match=r"'second\.weight'.*module 'second'"):
        model(torch.ones(1, 2)).sum().backward()
    optimizer.close()


def test_weights_that_are_read_past_their_module_before_others_are_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(overlap, "BUCKET_BYTES", 1)  # the gradients of the first layer leave last

    class First(Reader):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.second(nn.functional.linear(inputs, self.first.weight))
            return found

    model = First()
    optimizer = late(model)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(InvalidValue, match=r"'first\.weight'.*module 'first'"):
        model(torch.ones(1, 2)).sum().backward()
    optimizer.close()


def test_a_load_waits_for_weights_that_are_on_the_way() -> None:
    others = threading.Event()

    def work(kv: KVStore) -> None:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        zeros = {name: torch.zeros_like(each) for name, each in model.state_dict().items()}
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer: Any = tensorkv.DistributedOptimizer(inner, model, kind=kv, overlap="forward")
        for step in range(2):
            model(torch.ones(1, 2)).sum().mul(1 + kv.rank).backward()
            if step and kv.rank:
                assert others.wait(30.0)
            optimizer.step()
            optimizer.zero_grad()
        if not kv.rank:
            others.set()
            model.load_state_dict(zeros)
            optimizer.wait()
            assert not any(each.any() for each in model.parameters())

    run_job(work, num_workers=2, num_servers=1, reduction="mean", timeout_s=30.0)


def test_a_model_is_saved_and_copied_without_its_hooks() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = late(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copied.parameters(), strict=True))
        copied(torch.ones(1, 2)).sum().backward()
    optimizer.close()


def test_state_dict_and_close_wait() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    expected = copy.deepcopy(model)
    plain = torch.optim.SGD(expected.parameters(), lr=0.1)
    optimizer = late(model)
    for _ in range(3):
        for trained, each in ((expected, plain), (model, optimizer)):
            each.zero_grad()
            trained(torch.ones(1, 2)).sum().backward()
            each.step()
        for name, value in model.state_dict().items():
            assert torch.equal(value, expected.state_dict()[name])
    optimizer.close()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    model(torch.ones(1, 2)).sum().backward()  # the hooks are gone
