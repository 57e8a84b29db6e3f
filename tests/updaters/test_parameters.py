"""Which keys a model's parameters were initialised as, and the warning of gradients that replace them."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tensorkv
from tensorkv.store import KVStore
from tensorkv.testing.cluster import run_job
from tensorkv.updaters.parameters import ParameterTable

KINDS: dict[str, dict[str, Any]] = {
    "local": {"kind": "local"},
    "dist_sync": {"kind": "dist_sync", "embedded": True},
    "dist_async": {"kind": "dist_async", "embedded": True},
}


@pytest.fixture(params=KINDS)
def kv(request: pytest.FixtureRequest) -> Iterator[KVStore]:
    with tensorkv.create(**KINDS[request.param]) as store:
        yield store


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(2))


def test_keys_of_parameters() -> None:
    table, first, second = ParameterTable(), parameter(), parameter()
    table.learn(["a", "b", "c", "n"], [first, [second], first, torch.ones(2)], watch=False)
    assert table.keys_by_id() == {id(first): ["a", "c"], id(second): ["b"]}
    table.forget(["a", "zzz"])
    assert table.keys_by_id() == {id(first): ["c"], id(second): ["b"]}
    table.learn(["c"], [torch.ones(2)], watch=False)
    assert table.keys_by_id() == {id(second): ["b"]}


def test_parameters_are_held_weakly() -> None:
    table = ParameterTable()
    table.learn(["a"], [parameter()], watch=False)
    gc.collect()
    assert table.keys_by_id() == {}


PUSHES: dict[str, Callable[[KVStore, torch.nn.Linear], Any]] = {
    "push": lambda kv, net: kv.push(net),
    "pushpull": lambda kv, net: kv.pushpull(net, out=net),
    "a key": lambda kv, net: kv.push("bias", net.bias.grad),
    "lists": lambda kv, net: kv.push(["weight", "bias"], [[net.weight.grad] * 2, net.bias.grad]),
    "async_op": lambda kv, net: kv.push(net, async_op=True).wait(),
    "copies": lambda kv, net: kv.push("bias", net.bias.detach().clone()),
}


def net_with_gradients() -> torch.nn.Linear:
    net = torch.nn.Linear(3, 2)
    net(torch.ones(3)).sum().backward()
    return net


@pytest.mark.parametrize("how", PUSHES)
@pytest.mark.parametrize("form", ["module", "dict", "list", "broadcast"])
def test_gradients_under_the_default_updater_are_warned_of_once(kv: KVStore, how: str, form: str) -> None:
    net = net_with_gradients()
    if form == "module":
        kv.init(net)
    elif form == "dict":
        kv.init(dict(net.named_parameters()))
    elif form == "list":
        kv.init(["weight", "bias"], [net.weight, [net.bias]])
    else:
        kv.broadcast(net, out=net)
    with pytest.warns(UserWarning, match=r"set_optimizer first.*set_updater\(\"assign\"\)") as caught:
        PUSHES[how](kv, net)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    for again in PUSHES.values():
        again(kv, net)
    kv.init("late", torch.nn.Parameter(torch.ones(2)))
    kv.push("late", torch.ones(2))


def test_with_warnings_as_errors_nothing_is_pushed(kv: KVStore) -> None:
    kv.init("w", weight := torch.nn.Parameter(torch.ones(2)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="'w'"):
            kv.push("w", torch.zeros(2))
    assert kv.pull("w").tolist() == weight.tolist()


CHOICES: dict[str, Callable[[KVStore, torch.nn.Linear, Path], Any]] = {
    "optimizer": lambda kv, net, path: kv.set_optimizer("sgd", lr=0.5),
    "optimizer of others": lambda kv, net, path: kv.set_optimizer("sgd", lr=0.5, keys=["other"]),
    "instance": lambda kv, net, path: kv.set_optimizer(torch.optim.SGD(net.parameters(), lr=0.5)),
    "assign": lambda kv, net, path: kv.set_updater("assign"),
    "None": lambda kv, net, path: kv.set_updater(None),
    "add": lambda kv, net, path: kv.set_updater("add"),
    "load": lambda kv, net, path: (kv.save(str(path)), kv.load(str(path))),
    "load_state_dict": lambda kv, net, path: kv.load_state_dict(kv.state_dict()),
}

WEIGHTS: dict[str, Callable[[torch.nn.Linear], Any]] = {
    "parameters": lambda net: dict(net.named_parameters()),
    "state": lambda net: net.state_dict(),
    "data": lambda net: {name: each.data for name, each in net.named_parameters()},
    "arrays": lambda net: {name: each.detach().numpy() for name, each in net.named_parameters()},
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_who_has_chosen_is_not_warned(kv: KVStore, choice: str, when: str, tmp_path: Path) -> None:
    """pytest makes errors of warnings."""
    net = net_with_gradients()
    kv.init("other", torch.ones(2))
    if when == "before":
        CHOICES[choice](kv, net, tmp_path)
    kv.init(net)
    if when == "after":
        CHOICES[choice](kv, net, tmp_path)
    kv.push(net)


@pytest.mark.parametrize("which", WEIGHTS)
def test_who_averages_weights_is_not_warned(kv: KVStore, which: str) -> None:
    """And each key is looked at once: a push that is made again costs no more than a look at an empty set."""
    net = net_with_gradients()
    kv.init(net)
    kv.pushpull(WEIGHTS[which](net), out=WEIGHTS[which](net))
    assert not kv._watched
    kv.push(net)


def test_put_and_absent_say_nothing_of_the_push_to_come(kv: KVStore) -> None:
    net = net_with_gradients()
    kv.init(net)
    kv.put(net)
    kv.push(["weight", "bias"], [tensorkv.ABSENT] * 2)
    with pytest.warns(UserWarning, match="assign"):
        kv.push(net)


def test_only_rank_0_is_warned() -> None:
    """The others need not make its settings."""

    def work(kv: KVStore) -> None:
        kv.init("w", torch.nn.Parameter(torch.ones(2)))
        if kv.rank == 0:
            kv.set_updater("assign")
        kv.push("w", torch.ones(2))

    run_job(work, num_workers=2, num_servers=1)


def test_what_is_no_parameter_to_train_is_not_warned_of(kv: KVStore) -> None:
    kv.init({"w": torch.ones(2), "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False)})
    kv.push({"w": torch.ones(2), "frozen": torch.ones(2)})
    kv.init("gone", torch.nn.Parameter(torch.ones(2)))
    kv.delete("gone")
    kv.init("gone", torch.ones(2))
    kv.push("gone", torch.ones(2))


def test_a_refused_setting_is_no_choice(kv: KVStore) -> None:
    kv.init("w", torch.nn.Parameter(torch.ones(2)))
    with pytest.raises(tensorkv.errors.UnknownUpdater):
        kv.set_updater("ad")
    with pytest.warns(UserWarning, match="'w'"):
        kv.push("w", torch.ones(2))
