"""A list of keys that is pushed or pulled again is looked at less closely: nothing wrong may slip through.

Each test makes the good call first, so that the list is known, and then the same with other tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tensorkv.errors import (
    DtypeMismatch,
    InvalidKey,
    InvalidOut,
    InvalidValue,
    ShapeMismatch,
    TensorKVError,
)
from tensorkv.store import KVStore
from tensorkv.testing.cluster import run_job

WAYS = [("inproc", "auto"), ("127.0.0.1", "tcp"), ("127.0.0.1", "shm")]
SIZES = {
    "one small": [(8, 8)],
    "one large": [(300, 300)],
    "vectors": [(64,)] * 20,
    "mixed": [(8, 8), (3,), (), (300, 300), (2000, 2000)],
}


@pytest.fixture(params=WAYS, ids=lambda way: f"{way[0]}-{way[1]}")
def run(request: pytest.FixtureRequest) -> Callable[..., Any]:
    host, transport = request.param

    def call(work: Callable[[KVStore], Any], num_workers: int = 1, **options: Any) -> Any:
        return run_job(
            work, num_workers=num_workers, num_servers=2, host=host, transport=transport, **options
        )

    return call


@pytest.fixture(params=SIZES)
def shapes(request: pytest.FixtureRequest) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = SIZES[request.param]
    return found


def tensors(shapes: list[tuple[int, ...]], value: float = 1.0) -> list[torch.Tensor]:
    return [torch.full(shape, value) for shape in shapes]


def known_store(kv: KVStore, shapes: list[tuple[int, ...]]) -> tuple[list[str], list[torch.Tensor]]:
    """Return keys and outs that were used before."""
    keys = [f"k{number}" for number in range(len(shapes))]
    outs = tensors(shapes, 0.0)
    kv.init(keys, tensors(shapes, 0.0))
    for value in (1.0, 2.0, 3.0):
        kv.push(keys, tensors(shapes, value))
        kv.pull(keys, out=outs)
        assert all(out.eq(value).all() for out in outs)
    for value in (4.0, 5.0):
        kv.pushpull(keys, tensors(shapes, value), out=outs)
        assert all(out.eq(value).all() for out in outs)
    return keys, outs


GOOD: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "requires a gradient": lambda tensor: tensor.clone().requires_grad_(),
    "a result with a history": lambda tensor: tensor.clone().requires_grad_() * 1,
    "a parameter": torch.nn.Parameter,
    "half": torch.Tensor.half,
    "double": torch.Tensor.double,
    "transposed": lambda tensor: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor,
    "strided": lambda tensor: torch.stack([tensor, tensor], -1)[..., 0],
    "expanded": lambda tensor: tensor.flatten()[0].expand(tensor.shape),
    "negated as it is read": lambda tensor: torch._neg_view(-tensor),
    "made in inference mode": lambda tensor: _in_inference_mode(tensor),
}


def _in_inference_mode(tensor: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return tensor.clone()


@pytest.mark.parametrize("what", GOOD)
@pytest.mark.parametrize("which", [0, -1])
def test_other_tensors_are_pushed_as_ever(
    run: Callable[..., Any], shapes: list[tuple[int, ...]], what: str, which: int
) -> None:
    def work(kv: KVStore) -> None:
        keys, outs = known_store(kv, shapes)
        for value in (7.0, 8.0):
            pushed = tensors(shapes, value)
            pushed[which] = GOOD[what](pushed[which])
            kv.push(keys, pushed)
            kv.pull(keys, out=outs)
            assert all(out.eq(value).all() for out in outs)
            again = tensors(shapes, value + 0.5)
            again[which] = GOOD[what](again[which])
            kv.pushpull(keys, again, out=outs)
            assert all(out.eq(value + 0.5).all() for out in outs)
            assert not any(out.requires_grad for out in outs)
        with torch.no_grad():
            kv.push(keys, pushed)
        assert all(out.eq(8.0).all() for out in kv.pull(keys))

    run(work)


BAD: dict[str, tuple[Callable[[torch.Tensor], Any], type[TensorKVError]]] = {
    "a shape more": (lambda tensor: tensor.unsqueeze(0), ShapeMismatch),
    "an int": (torch.Tensor.int, DtypeMismatch),
    "complex": (lambda tensor: tensor.to(torch.complex64), DtypeMismatch),
    "sparse": (torch.Tensor.to_sparse, InvalidValue),
    "on no device": (lambda tensor: tensor.to("meta"), InvalidValue),
    "a number": (lambda tensor: 3.0, InvalidValue),
    "nothing": (lambda tensor: None, InvalidValue),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("which", [0, -1])
def test_what_cannot_be_pushed_is_refused_as_ever_and_changes_nothing(
    run: Callable[..., Any], shapes: list[tuple[int, ...]], what: str, which: int
) -> None:
    make, error = BAD[what]

    def work(kv: KVStore) -> None:
        keys, outs = known_store(kv, shapes)
        for call in (
            lambda pushed: kv.push(keys, pushed),
            lambda pushed: kv.pushpull(keys, pushed, out=outs),
        ):
            pushed = tensors(shapes, 7.0)
            pushed[which] = make(pushed[which])
            with pytest.raises(error, match=keys[which]):
                call(pushed)
            assert all(out.eq(5.0).all() for out in kv.pull(keys))
        kv.pushpull(keys, tensors(shapes, 9.0), out=outs)
        assert all(out.eq(9.0).all() for out in outs)

    run(work)


def test_a_bool_is_no_key_although_it_equals_one(run: Callable[..., Any]) -> None:
    def work(kv: KVStore) -> None:
        kv.init([0, 1], [torch.zeros(3)] * 2)
        for _ in range(3):
            kv.push([0, 1], [torch.ones(3)] * 2)
        with pytest.raises(InvalidKey):
            kv.push([False, True], [torch.ones(3)] * 2)
        with pytest.raises(InvalidKey):
            kv.pull([0, True], out=[torch.ones(3)] * 2)

    run(work)


CHANGED: dict[str, Callable[[torch.Tensor], Any]] = {
    "requires a gradient now": lambda out: out.requires_grad_(),
    "transposed in place": lambda out: out.t_() if out.dim() == 2 and out.shape[0] == out.shape[1] else out,
    "other memory": lambda out: setattr(out, "data", torch.zeros(out.shape)),
    "another dtype": lambda out: setattr(out, "data", out.data.double()),
}


@pytest.mark.parametrize("what", CHANGED)
@pytest.mark.parametrize("which", [0, -1])
def test_outs_that_have_changed_since_are_written_as_ever(
    run: Callable[..., Any], shapes: list[tuple[int, ...]], what: str, which: int
) -> None:
    def work(kv: KVStore) -> None:
        keys, outs = known_store(kv, shapes)
        version = outs[which]._version
        CHANGED[what](outs[which])
        for value in (7.0, 8.0):
            kv.push(keys, tensors(shapes, value))
            kv.pull(keys, out=outs)
            assert all(out.eq(value).all() for out in outs)
            kv.pushpull(keys, tensors(shapes, value + 0.5), out=outs)
            assert all(out.eq(value + 0.5).all() for out in outs)
        assert outs[which]._version > version
        assert outs[which].is_leaf

    run(work)


@pytest.mark.parametrize("call", ["pull", "pushpull"])
def test_outs_that_do_not_fit_any_more_are_refused(
    run: Callable[..., Any], shapes: list[tuple[int, ...]], call: str
) -> None:
    def work(kv: KVStore) -> None:
        def pull(into: list[torch.Tensor]) -> None:
            if call == "pull":
                kv.pull(keys, out=into)
            else:
                kv.pushpull(keys, tensors(shapes, 7.0), out=into)

        keys, outs = known_store(kv, shapes)
        for which in (0, -1):
            outs[which].unsqueeze_(0)
            with pytest.raises(ShapeMismatch, match=keys[which]):
                pull(outs)
            outs[which].squeeze_(0)
        outs[-1].data = torch.zeros(1).expand(outs[-1].shape)
        if shapes[-1]:
            with pytest.raises(InvalidOut, match=keys[-1]):
                pull(outs)

    run(work)


def test_outs_that_share_memory_now_have_the_value_of_the_last_key(run: Callable[..., Any]) -> None:
    def work(kv: KVStore) -> None:
        keys = ["a", "b", "c"]
        outs = [torch.zeros(50_000) for _ in keys]
        kv.init(keys, [torch.full((50_000,), float(number)) for number in range(3)])
        for _ in range(3):
            kv.pull(keys, out=outs)
        outs[0].data = outs[2].data
        for _ in range(3):
            kv.pull(keys, out=outs)
            assert [out.unique().tolist() for out in outs] == [[2], [1], [2]]

    run(work)


def test_nothing_of_what_was_pulled_into_is_kept(run: Callable[..., Any]) -> None:
    def work(kv: KVStore) -> None:
        _, outs = known_store(kv, SIZES["mixed"])
        gone = [weakref.ref(out) for out in outs]
        outs.clear()
        assert [ref() for ref in gone] == [None] * len(gone)

    run(work)


def test_a_push_behind_an_unmerged_one_is_not_made_twice_where_torch_refuses_a_part(
    run: Callable[..., Any],
) -> None:
    """The free key of the list goes first, and once, whatever becomes of the busy one."""

    def work(kv: KVStore) -> None:
        kv.set_updater("add")
        keys = ["a", "b"]
        kv.init(keys, [torch.zeros(50_000), torch.zeros(60_000)])
        for _ in range(3):
            kv.push(keys, [torch.ones(50_000), torch.ones(60_000)])
            kv.pull(keys)
        kv.push("b", torch.ones(60_000))
        kv.push(keys, [torch.ones(50_000), torch.ones(60_000).requires_grad_()])
        kv.push("a", torch.ones(50_000))
        assert [value.unique().tolist() for value in kv.pull(keys)] == [[10], [10]]

    run(work, 2)
