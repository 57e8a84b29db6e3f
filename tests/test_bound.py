"""Bound steps do what the verbs do, whatever happens to their tensors in between."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv import bound
from tensorkv.errors import (
    DuplicateKey,
    InvalidArgument,
    InvalidKey,
    InvalidValue,
    KeyDeleted,
    KeyNotInitialized,
    LengthMismatch,
    ShapeMismatch,
    StoreClosed,
)
from tensorkv.store import KVStore
from tensorkv.testing.cluster import run_job

KINDS = {"local": {}, "dist_sync": {"embedded": True, "num_servers": 2, "timeout_s": 20.0}}


@pytest.fixture(params=list(KINDS))
def kv(request: pytest.FixtureRequest) -> Iterator[KVStore]:
    with tensorkv.create(request.param, **KINDS[request.param]) as store:
        yield store


def filled(value: float, *shape: int) -> torch.Tensor:
    return torch.full(shape or (3,), value)


def added(kv: KVStore, **values: torch.Tensor) -> None:
    kv.init(values)
    kv.set_updater("add")


def test_a_step_does_what_the_verbs_do(kv: KVStore) -> None:
    added(kv, w=filled(0.0), b=filled(0.0, 2, 50_000))  # one small value, and one that is sliced
    pushed = {"w": filled(1.0), "b": filled(2.0, 2, 50_000)}
    mine = {"w": filled(9.0), "b": filled(9.0, 2, 50_000)}
    step = kv.bind(push=pushed, out=mine)
    for number in range(1, 5):
        assert step.push() is None
        assert step.pull() is mine
        assert mine["w"].tolist() == [2.0 * number - 1] * 3
        assert step.pushpull() is mine
        assert mine["w"].tolist() == [2.0 * number] * 3
        assert (mine["b"] == 4.0 * number).all()
        pushed["w"].fill_(1.0)  # the tensors stay the caller's
    assert kv.info("w").round == 8


def test_a_module_stands_for_its_gradients_and_its_parameters(kv: KVStore) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    other = [each.detach().clone().requires_grad_() for each in model.parameters()]
    kv.broadcast(model, out=model)
    kv.set_optimizer("sgd", lr=0.5)
    step = kv.bind(push=model, out=model)
    for number in range(8):
        inputs = torch.arange(12.0).view(4, 3) / 10
        model.zero_grad(set_to_none=number % 3 != 0)
        model(inputs).sum().backward()
        assert step.pushpull() is model
        hidden = inputs @ other[0].T + other[1]
        gradients = torch.autograd.grad((hidden @ other[2].T + other[3]).sum(), other)
        other = [(p - 0.5 * g).detach().requires_grad_() for p, g in zip(other, gradients, strict=True)]
        for ours, theirs in zip(model.parameters(), other, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-5)


def test_a_missing_gradient_is_an_error_that_names_the_way_out(kv: KVStore) -> None:
    model = torch.nn.Linear(2, 1)
    kv.init(model)
    kv.set_updater("add")
    step = kv.bind(push=model)
    with pytest.raises(InvalidValue, match="'weight' is None.*push tensorkv.ABSENT"):
        step.push()
    model(torch.ones(1, 2)).sum().backward()
    step.push()
    model.bias.grad = None
    with pytest.raises(InvalidValue, match="'bias' is None"):
        step.push()
    assert kv.info("weight").round == 1


def test_parameters_that_are_replaced_are_found(kv: KVStore) -> None:
    model = torch.nn.Linear(2, 1)
    kv.init(model)
    step = kv.bind(out=model)
    for value in (1.0, 2.0):
        kv.put(["weight", "bias"], [filled(value, 1, 2), filled(value, 1)])
        step.pull()
        assert model.weight.tolist() == [[value] * 2]
    model.weight = torch.nn.Parameter(torch.zeros(1, 2))
    step.pull()
    assert model.weight.tolist() == [[2.0] * 2]
    model.half()  # the same parameters, with other memory
    kv.put("weight", filled(3.0, 1, 2))
    step.pull()
    assert model.weight.tolist() == [[3.0] * 2]
    assert model.weight.dtype == torch.float16


def test_gradients_that_are_gone_are_an_error(kv: KVStore) -> None:
    """After `zero_grad()`: a dead reference to the last gradient must not pass for None."""
    model = torch.nn.Linear(3, 1)
    kv.broadcast(model, out=model)
    kv.set_optimizer("sgd", lr=0.1)
    step = kv.bind(push=model, out=model)
    for _ in range(2):
        model(torch.ones(1, 3)).sum().backward()
        step.pushpull()
        model.zero_grad()
        with pytest.raises(InvalidValue, match="'weight' is None.*ABSENT"):
            step.pushpull()
    assert kv.info("weight").round == 2


def test_an_out_that_is_gone_or_without_memory_is_an_error(kv: KVStore) -> None:
    added(kv, a=filled(1.0, 8), b=filled(1.0, 8))
    mine: dict[str, Any] = {"a": torch.zeros(8), "b": torch.zeros(8)}
    step = kv.bind(out=mine)
    step.pull()
    step.pull()
    mine["a"].untyped_storage().resize_(0)
    with pytest.raises(InvalidValue, match="'a'"):
        step.pull()
    mine["a"] = None
    with pytest.raises(InvalidValue, match="'a'"):
        step.pull()
    mine["a"] = torch.zeros(8)
    assert step.pull()["a"].tolist() == [1.0] * 8
    outs: list[Any] = [torch.zeros(8)]
    kv.pull(["a"], outs)
    outs[0] = None
    with pytest.raises(InvalidValue, match="'a'"):
        kv.pull(["a"], outs)


@pytest.mark.parametrize("size", [4, 40_000])
def test_gradients_that_change_their_dtype_in_place_are_read_right(kv: KVStore, size: int) -> None:
    model = torch.nn.Linear(size, 1)
    kv.init(model)
    kv.set_updater("assign")
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1.5)
    model.half()
    step = kv.bind(push=model)
    step.push()
    step.push()
    for convert in (model.bfloat16, model.half, model.float):
        convert()
        step.push()
        assert (kv.pull("weight") == 1.5).all()


def test_submodules_that_are_replaced_are_found_and_parameters_that_go_are_missed(kv: KVStore) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 1)))
    kv.init(model)
    kv.set_updater("assign")

    def fill(value: float) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)

    fill(1.0)
    step = kv.bind(push=model, out=model)
    step.pushpull()
    for value in (7.0, 8.0):
        model[1] = torch.nn.Sequential(torch.nn.Linear(2, 1))
        fill(value)
        step.pushpull()
        assert kv.pull("1.0.weight").tolist() == model[1][0].weight.tolist() == [[value] * 2]
    model[0].bias = None
    for call in (step.push, step.pull, step.pushpull):
        with pytest.raises(LengthMismatch, match="'0.bias' is gone"):
            call()
    model[1] = torch.nn.ReLU()
    with pytest.raises(LengthMismatch, match="'1.0.weight' is gone"):
        step.push()


def test_a_step_goes_on_when_another_worker_has_deleted_its_key() -> None:
    def work(kv: KVStore) -> None:
        kv.init("x", filled(0.0))
        mine = {"x": filled(0.0)}
        step = kv.bind(push={"x": filled(1.0)}, out=mine)
        step.pushpull()
        if kv.rank == 1:
            step.pushpull()  # a round without the other
            assert mine["x"].tolist() == [1.0] * 3
        kv.delete("x")
        with pytest.raises(KeyDeleted):
            step.pull()
        kv.init("x", filled(9.0))
        with pytest.raises(KeyDeleted):
            step.push()
        assert kv.info("x").round == 0

    run_job(work, num_workers=2, num_servers=1, timeout_s=20.0)


def test_a_dict_is_read_anew(kv: KVStore) -> None:
    added(kv, w=filled(0.0), b=filled(0.0))
    pushed: dict[str, Any] = {"w": filled(1.0), "b": filled(1.0)}
    step = kv.bind(push=pushed)
    for number, value in enumerate(
        [filled(1.0), filled(1.0).half(), [filled(0.5), filled(0.5)], np.ones(3, np.float32), filled(1.0)], 1
    ):
        pushed["w"] = value
        for _ in range(2):
            step.push()
        assert kv.pull("w").tolist() == [2.0 * number] * 3
    pushed["w"] = tensorkv.ABSENT
    step.push()
    assert kv.pull(["w", "b"])[0].tolist() == [10.0] * 3
    assert kv.pull("b").tolist() == [11.0] * 3
    pushed["w"] = filled(1.0, 4)
    with pytest.raises(ShapeMismatch, match="'w'"):
        step.push()
    del pushed["w"]
    with pytest.raises(LengthMismatch, match="had 2 keys, and has 1 now"):
        step.push()
    pushed["v"] = filled(1.0)
    with pytest.raises(LengthMismatch, match="'w' is gone"):
        step.push()
    assert kv.info("b").round == 11


def test_a_tensor_that_changed_in_place_is_looked_at_again(kv: KVStore) -> None:
    added(kv, w=filled(0.0), b=filled(0.0))
    pushed = {"w": filled(1.0), "b": filled(1.0)}
    step = kv.bind(push=pushed)
    step.push()
    step.push()
    pushed["w"].resize_(2)
    with pytest.raises(ShapeMismatch, match="'w'"):
        step.push()
    pushed["w"].data = torch.ones(4)
    with pytest.raises(ShapeMismatch, match="'w'"):
        step.push()
    pushed["w"].data = torch.full((3,), 2.0, dtype=torch.float64)
    step.push()
    pushed["w"].requires_grad_()
    step.push()
    assert kv.pull(["w", "b"])[0].tolist() == [6.0] * 3
    assert kv.info("b").round == 4


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("num_elems", [2, 4])
def test_a_large_tensor_that_changed_in_place_is_looked_at_again(transport: Any, num_elems: int) -> None:
    size = 50_000
    with tensorkv.create("dist_sync", embedded=True, transport=transport, timeout_s=20.0) as kv:
        added(kv, w=filled(0.0, size), b=filled(0.0))
        pushed = {"w": filled(1.0, size), "b": filled(1.0)}
        step = kv.bind(push=pushed)
        step.push()
        step.push()
        pushed["w"].data = torch.ones(size // 3 * num_elems)
        with pytest.raises(ShapeMismatch, match="'w'"):
            step.push()
        pushed["w"].data = torch.ones(size)
        step.push()
        assert (kv.pull("w") == 3.0).all()
        assert kv.info("b").round == 3


def test_pushes_between_two_of_a_step_do_not_matter(kv: KVStore) -> None:
    added(kv, w=filled(0.0), b=filled(0.0))
    mine = {"b": filled(0.0), "w": filled(0.0)}
    step = kv.bind(push={"w": filled(1.0), "b": filled(1.0)}, out=mine)
    for number in range(1, 4):
        step.pushpull()
        kv.push(["w", "b"], [filled(1.0).double(), filled(1.0).double()])
        kv.pull(["b", "w"], out=[filled(0.0), filled(0.0)])
        assert mine["w"].tolist() == mine["b"].tolist() == [2.0 * number - 1] * 3


def test_a_step_ends_with_its_keys(kv: KVStore, tmp_path: Path) -> None:
    added(kv, w=filled(1.0), b=filled(0.0))
    step = kv.bind(push={"w": filled(1.0)}, out={"w": filled(0.0)})
    step.push()
    kv.delete("b")
    step.push()  # another key
    kv.delete("w")
    with pytest.raises(KeyDeleted):
        step.push()
    kv.init("w", filled(0.0))
    for call in (step.push, step.pull, step.pushpull):
        with pytest.raises(KeyDeleted, match="bind the new ones"):
            call()
    assert kv.info("w").round == 0
    step = kv.bind(push={"w": filled(1.0)})
    kv.save(tmp_path / "saved")
    step.push()
    kv.load(tmp_path / "saved")
    with pytest.raises(KeyDeleted):
        step.push()
    step = kv.bind(push={"w": filled(1.0)})
    kv.close()
    with pytest.raises(StoreClosed):
        step.push()


def test_gradients_that_are_replaced_are_not_kept_alive(kv: KVStore) -> None:
    added(kv, w=filled(0.0))
    pushed = {"w": filled(1.0)}
    step = kv.bind(push=pushed)
    for number in range(2 * bound.MAX_MISSES):
        step.push()
        before = weakref.ref(pushed["w"])
        pushed["w"] = filled(1.0)
        gc.collect()
        assert before() is None, number
    assert kv.pull("w").tolist() == [2.0 * bound.MAX_MISSES] * 3


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({}, InvalidArgument, "what to push, what to pull into"),
        ({"push": "w"}, InvalidArgument, "push=...\\): pass a dict, pairs or a module, not str"),
        ({"out": [torch.zeros(3)]}, InvalidArgument, "out=...\\): pass a dict"),
        ({"push": {}}, LengthMismatch, "empty"),
        ({"push": {1: torch.zeros(3)}}, InvalidKey, "this store has str keys"),
        ({"push": {"v": torch.zeros(3)}}, KeyNotInitialized, "'v'"),
        ({"push": [("w", torch.zeros(3)), ("w", torch.zeros(3))]}, DuplicateKey, "appears twice"),
        ({"push": torch.nn.ReLU()}, LengthMismatch, "has no parameters"),
    ],
)
def test_what_cannot_be_bound_is_refused(
    kv: KVStore, arguments: dict[str, Any], error: type[Exception], text: str
) -> None:
    added(kv, w=filled(0.0))
    with pytest.raises(error, match=text):
        kv.bind(**arguments)
    assert kv.info("w").round == 0


def test_a_call_needs_what_was_bound(kv: KVStore) -> None:
    added(kv, w=filled(0.0), b=filled(0.0))
    step = kv.bind(push=iter([("w", filled(1.0))]), out={"b": filled(0.0)})
    with pytest.raises(InvalidArgument, match="bind push and out with the same keys"):
        step.pushpull()
    with pytest.raises(InvalidArgument, match="push of a step without push"):
        kv.bind(out={"w": filled(0.0)}).push()
    with pytest.raises(InvalidArgument, match="pushpull of a step without push"):
        kv.bind(out={"w": filled(0.0)}).pushpull()
    with pytest.raises(InvalidArgument, match="pull of a step without out"):
        kv.bind(push={"w": filled(0.0)}).pull()
    with pytest.raises(InvalidArgument, match="async_op="):
        step.push(async_op="no")  # type: ignore[arg-type]
    step.push()
    assert kv.pull("w").tolist() == [1.0] * 3
    assert repr(step) == f"<a step of 2 keys of {kv!r}>"


def test_a_step_has_the_options_of_the_verbs() -> None:
    for kind, options in KINDS.items():
        with tensorkv.create(kind, reduction="mean", **options) as kv:
            added(kv, w=filled(0.0))
            mine = {"w": filled(0.0)}
            step = kv.bind(push={"w": filled(1.0)}, out=mine)
            step.push(weight=3.0)
            step.push(weight=0)
            step.push(apply=False)
            kv.commit()
            pushed = step.push(async_op=True)
            assert pushed is not None
            pushed.wait()
            assert step.pull(async_op=True).result() is mine
            assert mine["w"].tolist() == [3.0] * 3
            assert step.pushpull(weight=2, async_op=True).result() is mine
            assert mine["w"].tolist() == [4.0] * 3


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_small_tensors_are_pushed_and_pulled_where_they_are(transport: Any, dtype: torch.dtype) -> None:
    """Also when they have moved, require gradients, are in an asynchronous call, or have another dtype."""
    names = [f"w{number}" for number in range(300)]
    with tensorkv.create(
        "dist_sync", embedded=True, num_servers=2, transport=transport, timeout_s=20.0
    ) as kv:
        added(kv, **{name: torch.zeros(8, 8, dtype=dtype) for name in names})
        pushed = {name: torch.full((8, 8), number % 3, dtype=dtype) for number, name in enumerate(names)}
        mine = {name: torch.nn.Parameter(torch.zeros(8, 8, dtype=dtype)) for name in names}
        step = kv.bind(push=pushed, out=mine)
        total = [0.0] * 300

        def check(async_op: bool = False) -> None:
            work = step.pushpull(async_op=async_op)
            if async_op:
                work.wait()
            for number, name in enumerate(names):
                total[number] += pushed[name][0, 0].item()
                assert mine[name].unique().tolist() == [total[number]], name

        for _ in range(3):
            check()
        version = mine["w7"]._version
        for number, name in enumerate(names):
            pushed[name].fill_(number % 5)
        check()
        assert mine["w7"]._version == version + 1
        mine["w7"].data = torch.zeros(8, 8, dtype=dtype)
        pushed["w8"].data = torch.full((8, 8), 2.0, dtype=dtype)
        pushed["w9"].requires_grad_()
        check()
        check(async_op=True)
        pushed["w10"].data = torch.ones(8, 8, dtype=torch.float64)
        mine["w11"] = torch.zeros(8, 8, dtype=torch.float64)
        check()
        check()


def test_a_step_that_was_interrupted_while_it_noted_tensors_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    with tensorkv.create("dist_sync", embedded=True, timeout_s=20.0) as kv:
        added(kv, w=filled(0.0))
        pushed, mine = {"w": filled(1.0)}, {"w": filled(0.0)}
        step = kv.bind(push=pushed, out=mine)
        step.pushpull()
        step.pushpull()

        def interrupted(*arguments: Any) -> None:
            raise KeyboardInterrupt

        pushed["w"].data, mine["w"].data = filled(10.0), filled(0.0)
        with monkeypatch.context() as patch:
            patch.setattr(type(kv), "_views_of", interrupted)
            with pytest.raises(KeyboardInterrupt):
                step.pushpull()
        step.pushpull()
        assert mine["w"].tolist() == kv.pull("w").tolist() == [22.0] * 3
