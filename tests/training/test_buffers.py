"""Buffers are alike on all workers after each step, and only those are sent that steps change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tensorkv
from tensorkv.errors import InvalidArgument, NotSupported
from tensorkv.store import KVStore
from tensorkv.testing.cluster import run_job


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.out = nn.Linear(2, 1)
        self.register_buffer("mask", torch.ones(1000))
        self.register_buffer("seen", torch.zeros(1, dtype=torch.int64), persistent=False)
        self.register_buffer("last", torch.zeros(2, dtype=torch.bool))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.seen = self.seen + len(inputs)  # replaced, not changed in place
        self.last.copy_(inputs[0] > 0)
        found: torch.Tensor = self.out(self.norm(inputs) * self.mask[:2])
        return found


def rows(rank: int) -> torch.Tensor:
    return torch.randn(4 + 2 * rank, 2, generator=torch.Generator().manual_seed(rank))


def train(kv: KVStore, **options: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Return what one forward of this worker alone makes of the buffers, and what they are after steps."""
    model = Model()
    inner = torch.optim.SGD(model.parameters(), lr=0.0)
    with tensorkv.DistributedOptimizer(inner, model, kind=kv, **options) as optimizer:
        found = []
        for step in range(3):
            optimizer.zero_grad()
            model(rows(kv.rank)).sum().backward()
            if step == 0:
                alone = {name: each.clone() for name, each in model.named_buffers()}
            optimizer.step()
            found.append({name: each.clone() for name, each in model.named_buffers()})
    return alone, found


def as_workers(fn: Any, num_workers: int = 2, **options: Any) -> list[Any]:
    options = {"reduction": "mean", "timeout_s": 30.0, **options}
    return run_job(fn, num_workers=num_workers, num_servers=1, **options)


@pytest.mark.parametrize("where", ["servers", "workers"])
def test_all_have_those_of_rank_0(where: str) -> None:
    (alone, first), (_, second) = as_workers(lambda kv: train(kv, where=where))
    for mine, other in zip(first, second, strict=True):
        for name in mine:
            assert mine[name].dtype == other[name].dtype
            assert torch.equal(mine[name], other[name]), name
    for name, each in first[0].items():
        assert torch.equal(each, alone[name]), name
    assert [each["seen"].item() for each in first] == [4, 8, 12]
    assert first[-1]["norm.num_batches_tracked"] == 3


def test_all_have_the_mean() -> None:
    (one, first), (two, second) = as_workers(lambda kv: train(kv, buffers="mean"))
    for name in ("norm.running_mean", "norm.running_var"):
        assert torch.allclose(first[0][name], (one[name] + two[name]) / 2)
        assert torch.equal(first[2][name], second[2][name])
    assert first[0]["seen"] == second[0]["seen"] == 5
    assert first[0]["norm.num_batches_tracked"] == 1


def test_what_no_step_changes_is_not_sent() -> None:
    names: list[list[str]] = []

    def work(kv: KVStore) -> None:
        opened = kv._open_beside

        def note(name: str, *arguments: str) -> KVStore:
            store = opened(name, *arguments)
            if name.endswith(".buffers"):
                names.append(store)  # type: ignore[arg-type]
            return store

        kv._open_beside = note  # type: ignore[method-assign]  # to see the store that nobody else sees
        model = Model()
        optimizer = tensorkv.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), model, kind=kv)
        model(rows(kv.rank)).sum().backward()
        optimizer.step()
        names[:] = [sorted(each.keys()) for each in names if not isinstance(each, list)] or names
        optimizer.close()

    as_workers(work, 2)
    assert "mask" not in names[0]
    assert "norm.running_mean" in names[0]


def test_without_rounds_workers_take_what_rank_0_has_sent() -> None:
    def work(kv: KVStore) -> None:
        _, found = train(kv)
        assert found[-1]["norm.num_batches_tracked"] >= 1
        with pytest.raises(NotSupported, match="buffers='mean'"):
            train(kv._open_beside("other", "dist_async", "mean"), buffers="mean")

    as_workers(work, kind="dist_async")


def test_which_is_checked() -> None:
    model = nn.Linear(1, 1)
    with pytest.raises(InvalidArgument, match="buffers='all'"):
        tensorkv.DistributedOptimizer(torch.optim.SGD(model.parameters()), model, buffers="all")  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["servers", "workers"])
def test_after_a_worker_has_left_the_next_one_sends_its_buffers(where: str) -> None:
    def work(kv: KVStore) -> list[dict[str, torch.Tensor]]:
        model = Model()
        inner = torch.optim.SGD(model.parameters(), lr=0.0)
        found = []
        with tensorkv.DistributedOptimizer(inner, model, kind=kv, where=where) as optimizer:
            for _ in range((2, 4, 12, 12)[kv.rank]):
                optimizer.zero_grad()
                model(rows(kv.rank) + 10).sum().backward()
                optimizer.step()
                found.append({name: each.clone() for name, each in model.named_buffers()})
        return found

    *_, third, fourth = as_workers(work, 4)
    for name in third[-1]:
        assert torch.equal(third[-1][name], fourth[-1][name]), name
    assert third[-1]["norm.num_batches_tracked"] == 12
    assert (third[-1]["norm.running_mean"] > 5).all()  # it goes on to follow the data
