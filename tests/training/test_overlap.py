"""Overlap: the same bits as without, gradients that leave in time, and changes that come too late."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tensorkv
from tensorkv.errors import InvalidValue, NotSupported
from tensorkv.store import KVStore
from tensorkv.testing.cluster import run_job
from tensorkv.training import overlap as module_of_pushes

DEADLINE_S = 30.0
OVERLAPS: tuple[Any, ...] = (False, "backward", "forward")
torch.manual_seed(11)


class Net(nn.Module):
    """Two inputs, a layer that is used twice, one that only odd steps use, and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.twice = nn.Linear(16, 16)
        self.norm = nn.BatchNorm1d(16)
        self.odd = nn.Linear(16, 16)
        self.last = nn.Linear(16, 2)

    def forward(self, inputs: torch.Tensor, step: int) -> torch.Tensor:
        found = torch.tanh(self.first(inputs))
        found = self.norm(torch.tanh(self.twice(torch.tanh(self.twice(found)))))
        if step % 2:
            found = torch.tanh(self.odd(found))
        result: torch.Tensor = self.last(found)
        return result


NET = Net()


@pytest.fixture(autouse=True, params=[1, 600, 1 << 20], ids=["a bucket each", "several", "one bucket"])
def _bucket_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_of_pushes, "BUCKET_BYTES", request.param)


def rows(step: int, kv: KVStore) -> torch.Tensor:
    return torch.randn(12, 6, generator=torch.Generator().manual_seed(step))[kv.rank :: kv.num_workers]


def wrapped(model: nn.Module, kv: KVStore, overlap: Any = "backward", **options: Any) -> Any:
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    return tensorkv.DistributedOptimizer(inner, model, kind=kv, overlap=overlap, **options)


def backward(model: nn.Module, step: int, kv: KVStore) -> None:
    model(rows(step, kv), step).square().mean().backward()


def train(model: nn.Module, optimizer: Any, kv: KVStore, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(model, step, kv)
        optimizer.step()


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([each.detach().reshape(-1) for each in model.parameters()]).clone()


def trained(model: nn.Module, optimizer: Any) -> torch.Tensor:
    optimizer.wait()
    return flat(model)


def in_job(
    fn: Callable[[KVStore], Any], num_workers: int = 2, num_servers: int = 1, **options: Any
) -> list[Any]:
    options = {
        "reduction": "mean",
        "timeout_s": DEADLINE_S,
        "host": "127.0.0.1",
        "transport": "shm",
        **options,
    }
    return run_job(fn, num_workers=num_workers, num_servers=num_servers, **options)


def same_bits(
    work: Callable[[KVStore, Any], torch.Tensor],
    num_workers: int = 2,
    num_servers: int = 1,
    overlaps: Sequence[Any] = OVERLAPS,
    **options: Any,
) -> None:
    """Check that a training ends with the same bits with and without overlap, on all workers."""
    plain, *early = (
        in_job(lambda kv, overlap=overlap: work(kv, overlap), num_workers, num_servers, **options)
        for overlap in overlaps
    )
    assert all(torch.equal(each, plain[0]) for each in sum(early, plain))


# ---- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("choices", [{}, {"share_weights": True}, {"max_norm": 0.05}], ids=str)
@pytest.mark.parametrize(("num_workers", "num_servers"), [(1, 2), (2, 1), (3, 3)])
def test_it_has_the_same_bits_as_without(num_workers: int, num_servers: int, choices: dict[str, Any]) -> None:
    def work(kv: KVStore, overlap: Any) -> torch.Tensor:
        model = copy.deepcopy(NET)
        optimizer = wrapped(model, kv, overlap, **choices)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for step in range(6):
            train(model, optimizer, kv, range(step, step + 1))
            schedule.step()
        return trained(model, optimizer)

    same_bits(work, num_workers, num_servers, OVERLAPS[: 2 if "share_weights" in choices else 3])


def test_it_has_the_same_bits_over_tcp() -> None:
    def work(kv: KVStore, overlap: Any) -> torch.Tensor:
        model = copy.deepcopy(NET)
        optimizer = wrapped(model, kv, overlap)
        train(model, optimizer, kv, range(5))
        return trained(model, optimizer)

    same_bits(work, transport="tcp")


def test_it_has_the_same_bits_in_one_process() -> None:
    found = []
    for overlap in OVERLAPS:
        with tensorkv.create("local", reduction="mean") as kv:
            model = copy.deepcopy(NET)
            optimizer = wrapped(model, kv, overlap)
            train(model, optimizer, kv, range(5))
            found.append(trained(model, optimizer))
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("last", [1, 2], ids=["short", "whole"])
def test_several_passes_make_a_step(shares: bool, last: int) -> None:
    def work(kv: KVStore, overlap: Any) -> torch.Tensor:
        model = copy.deepcopy(NET)
        passes = {"accumulate": 2} if overlap else {}
        optimizer = wrapped(model, kv, overlap, share_weights=shares, **passes)
        for step in range(4):
            optimizer.zero_grad()
            for each in range(2 if step < 3 else last):
                backward(model, 10 * step + each, kv)
            optimizer.step()
        return trained(model, optimizer)

    same_bits(work, overlaps=OVERLAPS[: 3 - shares])


@pytest.mark.parametrize("set_to_none", [False, True])
def test_passes_without_sync_do_not_count(set_to_none: bool) -> None:
    def work(kv: KVStore, overlap: Any) -> torch.Tensor:
        model = copy.deepcopy(NET)
        optimizer = wrapped(model, kv, overlap)
        for step in range(3):
            optimizer.zero_grad(set_to_none=set_to_none)
            with optimizer.no_sync():
                for each in range(2):
                    backward(model, 10 * step + each, kv)
            backward(model, 10 * step + 2, kv)
            optimizer.step()
        return trained(model, optimizer)

    same_bits(work)


def test_a_closure_a_group_and_an_unfrozen_layer() -> None:
    def work(kv: KVStore, overlap: Any) -> torch.Tensor:
        model = copy.deepcopy(NET)
        model.twice.requires_grad_(False)
        first, *rest = model.parameters()
        inner = torch.optim.AdamW(rest, lr=0.01)
        optimizer: Any = tensorkv.DistributedOptimizer(inner, model, kind=kv, overlap=overlap)

        def closure(step: int) -> None:
            optimizer.zero_grad()
            backward(model, step, kv)

        for step in range(6):
            if step == 2:
                optimizer.add_param_group({"params": [first], "lr": 0.02})
            if step == 4:
                model.twice.requires_grad_(True)
            optimizer.step(lambda step=step: closure(step))
        return trained(model, optimizer)

    same_bits(work)


@pytest.mark.parametrize("shares", [False, True])
def test_weights_that_the_script_changes_between_steps(shares: bool) -> None:
    def work(kv: KVStore, overlap: Any) -> torch.Tensor:
        model = copy.deepcopy(NET)
        optimizer = wrapped(model, kv, overlap, share_weights=shares)
        for step in range(4):
            train(model, optimizer, kv, range(step, step + 1))
            optimizer.wait()
            with torch.no_grad():
                model.last.weight.clamp_(-0.1, 0.1)
        train(model, optimizer, kv, range(4, 5))
        return trained(model, optimizer)

    same_bits(work, overlaps=OVERLAPS[: 3 - shares])


@pytest.mark.parametrize("shares", [False, True])
def test_a_checkpoint_is_loaded_while_a_layer_is_frozen(shares: bool) -> None:
    def work(kv: KVStore, overlap: Any) -> torch.Tensor:
        model = copy.deepcopy(NET)
        optimizer = wrapped(model, kv, overlap, share_weights=shares)
        train(model, optimizer, kv, range(2))
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        model.twice.requires_grad_(False)
        train(model, optimizer, kv, range(2, 4))
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        train(model, optimizer, kv, range(4, 6))
        model.twice.requires_grad_(True)
        train(model, optimizer, kv, range(6, 8))
        return trained(model, optimizer)

    same_bits(work, overlaps=OVERLAPS[: 3 - shares])


@pytest.mark.parametrize("shares", [False, True])
def test_it_goes_on_from_a_checkpoint(shares: bool, tmp_path: Path) -> None:
    def work(kv: KVStore, overlap: Any) -> torch.Tensor:
        model = copy.deepcopy(NET)
        optimizer = wrapped(model, kv, overlap, share_weights=shares)
        train(model, optimizer, kv, range(3))
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        train(model, optimizer, kv, range(3, 5))
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        train(model, optimizer, kv, range(3, 5))
        kv.save(str(tmp_path / str(overlap)))
        train(model, optimizer, kv, range(5, 6))
        kv.load(str(tmp_path / str(overlap)))
        train(model, optimizer, kv, range(6, 8))
        return trained(model, optimizer)

    same_bits(work, overlaps=OVERLAPS[: 3 - shares])


def test_a_worker_with_fewer_rows_leaves() -> None:
    def work(kv: KVStore, overlap: Any) -> torch.Tensor:
        model = copy.deepcopy(NET)
        with wrapped(model, kv, overlap) as optimizer:
            train(model, optimizer, kv, range(3 + 2 * (kv.rank == 0)))
        return flat(model)

    plain, *early = (in_job(lambda kv, each=each: work(kv, each)) for each in OVERLAPS)
    assert all(torch.equal(each[0], plain[0]) for each in early)


def test_without_common_rounds_it_trains() -> None:
    def work(kv: KVStore) -> bool:
        model = nn.Linear(6, 1)
        optimizer = wrapped(model, kv)
        losses = []
        for step in range(30):
            optimizer.zero_grad()
            loss = (model(rows(step, kv)) - 1).square().mean()
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
        return losses[-1] < losses[0]

    assert all(in_job(work, kind="dist_async"))


def test_a_compiled_model_has_the_same_bits() -> None:
    def work(overlap: Any) -> torch.Tensor:
        with tensorkv.create("dist_sync", embedded=True, reduction="mean", timeout_s=DEADLINE_S) as kv:
            model = copy.deepcopy(NET)
            optimizer = wrapped(model, kv, overlap)
            compiled = torch.compile(model, backend="eager")
            for step in range(3):
                optimizer.zero_grad()
                compiled(rows(step, kv), step).square().mean().backward()
                optimizer.step()
            return trained(model, optimizer)

    assert torch.equal(work(False), work("backward"))


def test_a_compiled_model_has_no_blocks_to_wait_at() -> None:
    model = copy.deepcopy(NET)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    for compiled in (torch.compile(model, backend="eager"), copy.deepcopy(NET)):
        if isinstance(compiled, Net):
            compiled.compile(backend="eager")
            inner = torch.optim.SGD(compiled.parameters(), lr=0.1)
        with pytest.raises(NotSupported, match="compiled model"):
            tensorkv.DistributedOptimizer(inner, compiled, overlap="forward")


# ---- when gradients leave ------------------------------------------------------------------------


def test_a_gradient_leaves_before_backward_is_done(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_of_pushes, "BUCKET_BYTES", 1)

    def work(kv: KVStore) -> None:
        model = copy.deepcopy(NET)
        optimizer = wrapped(model, kv)
        before = kv.pull("last.weight")
        seen = []
        model.first.weight.register_post_accumulate_grad_hook(lambda _: seen.append(kv.pull("last.weight")))
        backward(model, 0, kv)
        assert not torch.equal(seen[0], before)  # updated, while the first layer's gradients were being made
        optimizer.step()
        assert torch.equal(model.last.weight, seen[0])

    in_job(work, num_workers=1)


# ---- changes that come too late ------------------------------------------------------------------


def scaled(model: Net, optimizer: Any, kv: KVStore) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def again(model: Net, optimizer: Any, kv: KVStore) -> None:
    backward(model, 1, kv)


def no_gradients(model: Net, optimizer: Any, kv: KVStore) -> None:
    optimizer.zero_grad()


def other_rate(model: Net, optimizer: Any, kv: KVStore) -> None:
    optimizer.param_groups[0]["lr"] = 0.5


def other_weights(model: Net, optimizer: Any, kv: KVStore) -> None:
    with torch.no_grad():
        model.last.bias.zero_()


def clips(model: Net, optimizer: Any, kv: KVStore) -> None:
    optimizer.clip_grad_norm_(1.0)


def scales(model: Net, optimizer: Any, kv: KVStore) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (scaled, InvalidValue, "after it was sent.*max_norm"),
        (again, InvalidValue, r"after it was sent.*no_sync\(\).*use_reentrant=False"),
        (no_gradients, InvalidValue, "after it was sent"),
        (other_rate, InvalidValue, "options of the optimizer changed between backward and step"),
        (other_weights, InvalidValue, r"last\.bias changed between backward and step"),
        (clips, NotSupported, "max_norm"),
        (scales, NotSupported, "GradScaler"),
    ],
)
def test_what_comes_too_late_is_an_error(
    change: Callable[..., None], error: type[Exception], text: str
) -> None:
    def work(kv: KVStore) -> None:
        model = copy.deepcopy(NET)
        optimizer = wrapped(model, kv)
        train(model, optimizer, kv, range(2))
        optimizer.zero_grad()
        backward(model, 3, kv)

        def change_and_step() -> None:
            change(model, optimizer, kv)
            optimizer.step()

        with pytest.raises(error, match=text):
            change_and_step()

    in_job(work, num_workers=1)


@pytest.mark.parametrize("rank", [0, 1])
def test_shared_weights_that_are_changed_too_late_are_an_error(rank: int) -> None:
    def work(kv: KVStore) -> None:
        model = copy.deepcopy(NET)
        optimizer = wrapped(model, kv, share_weights=True)
        train(model, optimizer, kv, range(2))
        optimizer.zero_grad()
        backward(model, 3, kv)
        if kv.rank == rank:
            model.last.weight.data.mul_(0.5)
            with pytest.raises(InvalidValue, match=r"last\.weight changed between backward and step"):
                optimizer.step()

    in_job(work)


def test_state_is_not_read_between_backward_and_step() -> None:
    def work(kv: KVStore) -> None:
        model = copy.deepcopy(NET)
        optimizer = wrapped(model, kv)
        train(model, optimizer, kv, range(1))
        backward(model, 1, kv)
        with pytest.raises(NotSupported, match="between backward and step"):
            optimizer.state_dict()
        optimizer.step()
        assert optimizer.state_dict()["state"]

    in_job(work, num_workers=1)


def test_a_gradient_of_half_a_pass_is_an_error() -> None:
    """Reentrant checkpoints accumulate a parameter's gradient in parts."""

    def work(kv: KVStore) -> None:
        shared = nn.Linear(6, 6)
        model = nn.ModuleList([shared])
        optimizer = wrapped(model, kv)
        inputs = torch.ones(2, 6, requires_grad=True)
        loss = (shared(inputs) + checkpoint(shared, inputs, use_reentrant=True)).sum()
        with pytest.raises(InvalidValue, match="use_reentrant=False"):
            loss.backward()
        del optimizer

    in_job(work, num_workers=1)


def test_checkpoints_that_are_not_reentrant_have_the_same_bits() -> None:
    def work(kv: KVStore, overlap: Any) -> torch.Tensor:
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        torch.nn.init.constant_(model[0].weight, 0.1)
        torch.nn.init.constant_(model[0].bias, 0.2)
        optimizer = wrapped(model, kv, overlap)
        for step in range(3):
            optimizer.zero_grad()
            inputs = rows(step, kv)
            (checkpoint(model, inputs, use_reentrant=False) + model(inputs)).square().mean().backward()
            optimizer.step()
        return trained(model, optimizer)

    same_bits(work)
