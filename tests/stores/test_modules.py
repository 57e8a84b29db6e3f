"""Modules and pairs in every verb: a module stands for its parameters, or for their gradients."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import tensorkv
from tensorkv.errors import (
    DuplicateKey,
    InvalidArgument,
    InvalidKey,
    InvalidValue,
    KeyAlreadyInitialized,
    KeyNotInitialized,
    LengthMismatch,
    NotPicklable,
)
from tensorkv.store import KVStore
from tensorkv.testing.cluster import run_job


@pytest.fixture(params=["local", "device", "dist_sync", "dist_async"])
def kv(request: pytest.FixtureRequest) -> Iterator[KVStore]:
    options: dict[str, Any] = {"embedded": True} if request.param.startswith("dist") else {}
    with tensorkv.create(request.param, timeout_s=50, **options) as made:
        yield made


class Net(torch.nn.Module):
    """A tied parameter, a frozen one, and buffers of every sort."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.first = torch.nn.Linear(2, 2, bias=False)
        self.norm = torch.nn.BatchNorm1d(2)
        self.last = torch.nn.Linear(2, 2)
        self.last.weight = self.first.weight
        self.last.bias.requires_grad_(False)
        self.register_buffer("mask", torch.ones(2), persistent=False)
        for parameter in self.parameters():
            torch.nn.init.constant_(parameter, value)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.last(self.norm(self.first(batch)))
        return result


NAMES = ["first.weight", "norm.weight", "norm.bias", "last.bias"]


def values(module: torch.nn.Module) -> list[float]:
    return [parameter.flatten()[0].item() for parameter in module.parameters()]


def with_gradients(value: float = 3.0) -> Net:
    net = Net(0.0)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, value)
    return net


FORMS: dict[str, Callable[[Net], Any]] = {
    "module": lambda net: net,
    "generator": lambda net: net.named_parameters(),
    "pairs": lambda net: list(net.named_parameters()),
    "dict": lambda net: dict(net.named_parameters()),
    "items": lambda net: dict(net.named_parameters()).items(),
    "zip": lambda net: zip(NAMES, net.parameters(), strict=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_parameters_are_shared_in_every_form(kv: KVStore, form: str) -> None:
    net = Net(2.0)
    kv.init(FORMS[form](net))
    assert kv.keys() == NAMES
    other = Net(0.0)
    out = FORMS[form](other)
    found = kv.pull(out=out)
    assert values(other) == [2.0] * 4
    assert found is out or list(found) == NAMES
    kv.put(FORMS[form](Net(5.0)))
    kv.pull(out=FORMS[form](other))
    assert values(other) == [5.0] * 4
    assert other.norm.running_mean.tolist() == [0.0, 0.0]
    with pytest.raises(KeyAlreadyInitialized, match="'first.weight'.*put"):
        kv.init(FORMS[form](net))


@pytest.mark.parametrize("form", FORMS)
def test_broadcast_in_every_form(kv: KVStore, form: str) -> None:
    net, other = Net(2.0), Net(0.0)
    kv.broadcast(FORMS[form](net), out=FORMS[form](other))
    assert values(other) == [2.0] * 4
    assert kv.keys() == NAMES


def test_a_broadcast_gives_every_worker_the_parameters_of_rank_0() -> None:
    def work(kv: KVStore) -> list[float]:
        net = Net(float(kv.rank + 1))
        assert kv.broadcast(net, out=net) is net
        return values(net)

    assert run_job(work, num_workers=2, num_servers=2) == [[1.0] * 4] * 2


def test_the_gradients_of_a_module_are_pushed(kv: KVStore) -> None:
    net = with_gradients()
    kv.init(net)
    kv.set_optimizer("sgd", lr=1.0)
    kv.push(net)
    kv.pull(out=net)
    assert values(net) == [-3.0] * 4
    assert kv.pushpull(net, out=net) is net
    assert values(net) == [-6.0] * 4
    found = kv.pushpull(net)
    assert list(found) == NAMES
    assert found["last.bias"].tolist() == [-9.0, -9.0]
    assert net.last.bias.tolist() == [-6.0, -6.0]
    kv.pushpull(((name, p.grad) for name, p in net.named_parameters()), out=net.named_parameters())
    assert values(net) == [-12.0] * 4


def test_no_gradient_names_absent_and_nothing_is_pushed(kv: KVStore) -> None:
    net = Net(1.0)
    kv.init(net)
    kv.set_updater("assign")
    net(torch.ones(4, 2)).sum().backward()
    for call in (
        lambda: kv.push(net),
        lambda: kv.pushpull(net, out=net),
        lambda: kv.push({name: p.grad for name, p in net.named_parameters()}),
        lambda: kv.push([(name, p.grad) for name, p in net.named_parameters()]),
        lambda: kv.push("last.bias", None),
        lambda: kv.push("last.bias", [torch.ones(2), None]),
    ):
        with pytest.raises(InvalidValue, match=r"'last\.bias' is None.*frozen.*tensorkv\.ABSENT"):
            call()
    assert kv.info("first.weight").round == 0
    kv.push((name, tensorkv.ABSENT if p.grad is None else p.grad) for name, p in net.named_parameters())
    assert kv.pull("last.bias").tolist() == [1.0, 1.0]


def test_buffers_are_shared_by_name(kv: KVStore) -> None:
    net = Net(1.0)
    kv.init(net.named_buffers())
    assert kv.keys() == ["mask", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
    net.norm.num_batches_tracked.add_(7)
    kv.put(net.named_buffers())
    other = Net(0.0)
    kv.pull(out=other.named_buffers())
    assert other.norm.num_batches_tracked.item() == 7


def test_a_state_dict_has_both(kv: KVStore) -> None:
    net = Net(2.0)
    kv.init(net.state_dict())
    other = Net(0.0)
    kv.pull(out=other.state_dict())
    assert values(other) == [2.0] * 4
    assert "mask" not in kv


def test_a_lazy_module(kv: KVStore) -> None:
    lazy = torch.nn.LazyLinear(2)
    for call in (lambda: kv.init(lazy), lambda: kv.push(lazy), lambda: kv.pull(out=lazy)):
        with pytest.raises(InvalidValue, match="'weight'.*call forward once first"):
            call()
    lazy(torch.ones(1, 3))
    kv.init(lazy)
    assert kv.pull("weight").shape == (2, 3)


def test_what_holds_no_names_or_names_twice(kv: KVStore) -> None:
    net = Net(1.0)
    with pytest.raises(LengthMismatch, match="Flatten has no parameters"):
        kv.init(torch.nn.Flatten())
    with pytest.raises(LengthMismatch, match="empty"):
        kv.init(iter(()))
    with pytest.raises(InvalidValue, match="named_parameters"):
        kv.init(net.parameters())
    with pytest.raises(InvalidValue, match="a module already holds"):
        kv.init(net, torch.ones(2))
    with pytest.raises(DuplicateKey, match="'w'"):
        kv.init([("w", torch.ones(2)), ("w", torch.ones(2))])
    kv.init("w", torch.ones(2))
    with pytest.raises(InvalidKey, match="out") as caught:
        kv.pull(net)
    assert "Parameter" not in str(caught.value)
    with pytest.raises(InvalidKey, match="a Tensor"):
        kv.pull(torch.ones(2))
    with pytest.raises(InvalidArgument, match="other keys"):
        kv.pushpull({"w": torch.ones(2)}, out=net)


def test_a_mistyped_key(kv: KVStore) -> None:
    kv.init(Net(1.0))
    for call in (
        lambda: kv.push("frist.weight", torch.ones(2, 2)),
        lambda: kv.pull("frist.weight"),
        lambda: kv.pull(["norm.bias", "frist.weight"]),
        lambda: kv.put("frist.weight", torch.ones(2, 2)),
        lambda: kv.info("frist.weight"),
        lambda: kv.delete("frist.weight"),
    ):
        with pytest.raises(KeyNotInitialized, match="'frist.weight'.*did you mean 'first.weight'"):
            call()
    wrapped = torch.nn.ModuleDict({"module": Net(0.0)})
    with pytest.raises(KeyNotInitialized, match="did you mean 'first.weight'"):
        kv.pull(out=wrapped)
    with pytest.raises(KeyNotInitialized) as caught:
        kv.pull("x")
    assert "mean" not in str(caught.value)


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_store_is_not_copied(kv: KVStore, copied: Callable[[Any], Any]) -> None:
    class Trainer:
        def __init__(self) -> None:
            self.store = kv

    for held in (kv, [kv], {"kv": kv}):
        if copied is copy.copy and held is not kv:
            continue
        with pytest.raises(NotPicklable, match="'default'.*create") as caught:
            copied(held)
        assert isinstance(caught.value, TypeError)
    with pytest.raises(NotPicklable):
        copy.deepcopy(Trainer())
    kv.init("w", torch.ones(2))
    assert kv.pull("w").tolist() == [1.0, 1.0]
