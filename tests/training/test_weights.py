"""Shared weights: the same bits as without, and never an update under the feet of a worker that computes."""

from __future__ import annotations

import copy
import io
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tensorkv
from tensorkv.errors import InvalidArgument, NotSupported
from tensorkv.store import KVStore
from tensorkv.testing.cluster import run_job

DEADLINE_S = 30.0
torch.manual_seed(7)
MODEL = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 2))


def make_model() -> nn.Module:
    return copy.deepcopy(MODEL)  # workers are threads, which share torch's generator


def loss_of(model: nn.Module, step: int, kv: KVStore) -> torch.Tensor:
    inputs = torch.randn(12, 6, generator=torch.Generator().manual_seed(step))[kv.rank :: kv.num_workers]
    loss: torch.Tensor = model(inputs).square().mean()
    return loss


def wrapped(model: nn.Module, kv: KVStore, shares: bool = True, **options: Any) -> Any:
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    return tensorkv.DistributedOptimizer(inner, model, kind=kv, share_weights=shares, **options)


def train(model: nn.Module, optimizer: Any, kv: KVStore, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step, kv).backward()
        optimizer.step()


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([each.detach().reshape(-1) for each in model.parameters()]).clone()


def in_job(
    fn: Callable[[KVStore], Any], num_workers: int = 2, num_servers: int = 1, **options: Any
) -> list[Any]:
    """Run a function as each worker of a job whose processes share memory."""
    options = {
        "reduction": "mean",
        "timeout_s": DEADLINE_S,
        "host": "127.0.0.1",
        "transport": "shm",
        **options,
    }
    return run_job(fn, num_workers=num_workers, num_servers=num_servers, **options)


@pytest.mark.parametrize("num_servers", [1, 2, 3])
@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_it_has_the_same_bits_as_without(num_workers: int, num_servers: int) -> None:
    def work(kv: KVStore, shares: bool) -> torch.Tensor:
        model = make_model()
        optimizer = wrapped(model, kv, shares)
        train(model, optimizer, kv, range(20))
        return flat(model)

    sizes = {"num_workers": num_workers, "num_servers": num_servers, "slice_bound_bytes": 1024}
    plain = in_job(lambda kv: work(kv, False), **sizes)
    shared = in_job(lambda kv: work(kv, True), **sizes)
    assert all(torch.equal(each, plain[0]) for each in [*plain, *shared])


@pytest.mark.parametrize("how", ["max_norm", "skip", "clip", "scaler"])
def test_commits_have_the_same_bits_as_without(how: str) -> None:
    def work(kv: KVStore, shares: bool) -> torch.Tensor:
        model = make_model()
        options: dict[str, Any] = {"max_norm": {"max_norm": 0.1}, "skip": {"skip_nonfinite": True}}.get(
            how, {}
        )
        optimizer = wrapped(model, kv, shares, **options)
        scaler = torch.amp.GradScaler("cpu", enabled=how == "scaler", init_scale=8.0)
        for step in range(10):
            optimizer.zero_grad()
            loss = loss_of(model, step, kv)
            if how == "skip" and step == 3 and kv.rank == 1:
                loss = loss * torch.nan
            scaler.scale(loss).backward()
            if how == "clip":
                optimizer.clip_grad_norm_(0.1)
            scaler.step(optimizer)
            scaler.update()
        return flat(model)

    plain = in_job(lambda kv: work(kv, False))
    shared = in_job(lambda kv: work(kv, True))
    assert all(torch.equal(each, plain[0]) for each in [*plain, *shared])
    assert bool(plain[0].isfinite().all())


def test_weights_and_gradients_are_the_servers_memory_and_the_window() -> None:
    def work(kv: KVStore) -> None:
        model = make_model()
        optimizer = wrapped(model, kv)
        before = [each.data_ptr() for each in model.parameters()]
        train(model, optimizer, kv, range(2))
        assert [each.data_ptr() for each in model.parameters()] == before
        for name, each in model.named_parameters():
            assert torch.equal(each, kv.pull(name))
            assert each.untyped_storage().nbytes() == each.nbytes
            assert each.data_ptr() % 64 == 0
            assert kv._job.window.where(each.grad.data_ptr(), each.nbytes) is not None  # type: ignore[attr-defined]

    in_job(work)


def test_a_worker_reads_its_weights_as_they_were_while_others_wait() -> None:
    """A worker that has not come to its step computes with weights that nobody changes."""
    others = threading.Barrier(2, timeout=DEADLINE_S)

    def work(kv: KVStore) -> None:
        model = make_model()
        optimizer = wrapped(model, kv)
        train(model, optimizer, kv, range(1))
        if kv.rank == 1:
            seen = flat(model)
            others.wait()  # rank 0 is about to push
            for _ in range(200):
                assert torch.equal(flat(model), seen)
        else:
            others.wait()
        train(model, optimizer, kv, range(1, 2))

    in_job(work)


@pytest.mark.parametrize("how", ["in place", "by rank 1", "other memory", "state_dict", "commit"])
def test_weights_that_the_script_changes_are_rank_0s(how: str) -> None:
    def change(model: nn.Module, kv: KVStore) -> None:
        weight = model.get_parameter("2.weight")
        with torch.no_grad():
            if how in ("in place", "commit") or (how == "by rank 1" and kv.rank == 1):
                weight.add_(1.0 + kv.rank)
            elif how == "other memory":
                weight.data = weight.data.t().contiguous().t()
            elif how == "state_dict":
                model.load_state_dict({**model.state_dict(), "2.weight": torch.zeros(30, 40) + kv.rank})

    def work(kv: KVStore, shares: bool) -> torch.Tensor:
        model = make_model()
        optimizer = wrapped(model, kv, shares, max_norm=1e9 if how == "commit" else None)
        train(model, optimizer, kv, range(2))
        change(model, kv)
        train(model, optimizer, kv, range(2, 5))
        return flat(model)

    plain, shared = (in_job(lambda kv, shares=shares: work(kv, shares)) for shares in (False, True))
    assert all(torch.equal(each, plain[0]) for each in [*plain, *shared])


def test_changes_through_data_are_seen() -> None:
    def work(kv: KVStore, how: str) -> torch.Tensor:
        model = make_model()
        optimizer = wrapped(model, kv)
        train(model, optimizer, kv, range(2))
        if how == "data":
            model.get_parameter("2.bias").data.fill_(0.5)
        else:
            nn.init.constant_(model.get_parameter("2.bias"), 0.5)
        train(model, optimizer, kv, range(2, 4))
        return flat(model)

    found = [in_job(lambda kv, how=how: work(kv, how)) for how in ("data", "in place")]
    assert all(torch.equal(each, found[0][0]) for each in [*found[0], *found[1]])


def test_a_model_that_is_converted_is_refused() -> None:
    def work(kv: KVStore) -> None:
        model = make_model()
        optimizer = wrapped(model, kv)
        train(model, optimizer, kv, range(1))
        optimizer.zero_grad()
        model.double()
        with pytest.raises(NotSupported, match=r"'0\.weight'.*share_weights=False"):
            optimizer.step()

    in_job(work)


def test_weights_that_are_swapped_and_swapped_back_go_on() -> None:
    def work(kv: KVStore, swaps: bool) -> torch.Tensor:
        model = make_model()
        optimizer = wrapped(model, kv)
        for step in range(6):
            train(model, optimizer, kv, range(step, step + 1))
            if swaps:
                mine = [each.detach().clone() for each in model.parameters()]
                for each in model.parameters():
                    each.data.zero_()
                for each, was in zip(model.parameters(), mine, strict=True):
                    each.data.copy_(was)
        return flat(model)

    plain, swapped = (in_job(lambda kv, swaps=swaps: work(kv, swaps)) for swaps in (False, True))
    assert all(torch.equal(each, plain[0]) for each in [*plain, *swapped])


def test_a_worker_that_leaves_keeps_its_weights() -> None:
    def work(kv: KVStore) -> None:
        model = make_model()
        optimizer = wrapped(model, kv)
        train(model, optimizer, kv, range(3))
        if kv.rank == 1:
            optimizer.close()
            left = flat(model)
            others.wait()
            others.wait()  # rank 0 has trained on
            assert torch.equal(flat(model), left)
            return
        others.wait()
        before = flat(model)
        train(model, optimizer, kv, range(3, 6))
        assert not torch.equal(flat(model), before)
        others.wait()

    others = threading.Barrier(2, timeout=DEADLINE_S)
    in_job(work)


def test_copies_and_checkpoints_are_of_ordinary_memory() -> None:
    def work(kv: KVStore) -> None:
        model = make_model()
        optimizer = wrapped(model, kv)
        train(model, optimizer, kv, range(2))
        copied, file = copy.deepcopy(model), io.BytesIO()
        torch.save(dict(model.state_dict()), file)
        expected = flat(model)
        plain = io.BytesIO()
        torch.save({name: each.clone() for name, each in model.state_dict().items()}, plain)
        assert len(file.getvalue()) == len(plain.getvalue())
        train(model, optimizer, kv, range(2, 4))
        assert torch.equal(flat(copied), expected)
        file.seek(0)
        restored = make_model()
        restored.load_state_dict(torch.load(file))
        assert torch.equal(flat(restored), expected)

    in_job(work)


def test_it_goes_on_from_a_checkpoint() -> None:
    def work(kv: KVStore, steps: int) -> list[torch.Tensor]:
        model = make_model()
        optimizer = wrapped(model, kv)
        train(model, optimizer, kv, range(3))
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        train(model, optimizer, kv, range(3, 3 + steps))
        found = flat(model)
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        train(model, optimizer, kv, range(3, 3 + steps))
        return [found, flat(model)]

    for first, second in in_job(lambda kv: work(kv, 4)):
        assert torch.equal(first, second)


@pytest.mark.parametrize("shares", [False, True])
def test_it_goes_on_after_a_load_of_the_store(shares: bool, tmp_path: Path) -> None:
    def work(kv: KVStore) -> list[torch.Tensor]:
        model = make_model()
        optimizer = wrapped(model, kv, shares)
        train(model, optimizer, kv, range(3))
        kv.save(str(tmp_path))
        train(model, optimizer, kv, range(3, 6))
        kv.load(str(tmp_path))
        train(model, optimizer, kv, range(99, 100))  # the gradient is that of the weights before the load
        return [flat(model), torch.cat([kv.pull(name).reshape(-1) for name, _ in model.named_parameters()])]

    first, second = in_job(work)
    assert torch.equal(first[0], first[1])
    assert torch.equal(first[0], second[0])


def test_a_group_that_is_added_is_shared_too() -> None:
    def work(kv: KVStore, shares: bool) -> torch.Tensor:
        model = make_model()
        first, *rest = model.parameters()
        inner = torch.optim.AdamW([first], lr=0.01)
        optimizer: Any = tensorkv.DistributedOptimizer(inner, model, kind=kv, share_weights=shares)
        train(model, optimizer, kv, range(2))
        optimizer.add_param_group({"params": rest, "lr": 0.02})
        train(model, optimizer, kv, range(2, 5))
        return flat(model)

    plain, shared = (in_job(lambda kv, shares=shares: work(kv, shares)) for shares in (False, True))
    assert all(torch.equal(each, plain[0]) for each in [*plain, *shared])


def test_a_put_waits_for_the_next_round() -> None:
    others = threading.Barrier(2, timeout=DEADLINE_S)

    def work(kv: KVStore) -> None:
        model = make_model()
        optimizer = wrapped(model, kv)
        seen = flat(model)
        if kv.rank == 0:
            kv.put("0.weight", torch.zeros(40, 6))
        others.wait()
        assert torch.equal(flat(model), seen)  # rank 1 may be computing
        for each in model.parameters():
            each.grad = None if each is model.get_parameter("0.weight") else torch.zeros_like(each)
        optimizer.step()
        assert not model.get_parameter("0.weight").any()

    in_job(work)


def test_a_forked_child_reads_the_weights() -> None:
    def work(kv: KVStore) -> None:
        model = make_model()
        optimizer = wrapped(model, kv)
        train(model, optimizer, kv, range(2))
        expected = flat(model).double().sum().item()
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.write(write, str(flat(model).double().sum().item()).encode())
            os._exit(0)
        os.waitpid(child, 0)
        assert float(os.read(read, 100)) == expected
        os.close(read)
        os.close(write)
        optimizer.close()

    in_job(work, num_workers=1)


def test_in_one_process_there_is_nobody_to_share_with() -> None:
    model = make_model()
    with tensorkv.create("local", reduction="mean") as kv:
        optimizer = wrapped(model, kv)
        train(model, optimizer, kv, range(2))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"transport": "tcp"}, "shares no memory"),
        ({"kind": "dist_async"}, "change while other workers compute"),
        ({"quorum": 1}, "change while other workers compute"),
        ({"on_worker_loss": "continue"}, "lost worker"),
    ],
    ids=["tcp", "async", "quorum", "loss"],
)
def test_where_it_is_not_possible_all_workers_are_told(options: dict[str, Any], why: str) -> None:
    def work(kv: KVStore) -> None:
        with pytest.raises(NotSupported, match=f"share_weights=True is not possible here.*{why}"):
            wrapped(make_model(), kv)

    in_job(work, **options)


@pytest.mark.parametrize("options", [{"transport": "tcp"}, {"kind": "dist_async"}, {}], ids=str)
def test_auto_shares_where_it_is_possible(options: dict[str, Any]) -> None:
    def work(kv: KVStore) -> bool:
        model = make_model()
        optimizer = wrapped(model, kv, "auto")
        train(model, optimizer, kv, range(2))
        found = bool(optimizer._steps._shared)
        optimizer.close()
        return found

    assert in_job(work, **options) == [not options, not options]


def test_auto_goes_without_if_one_worker_cannot_share() -> None:
    def work(kv: KVStore) -> torch.Tensor:
        model = make_model()
        if kv.rank == 1:
            weight = model.get_parameter("0.weight")
            weight.data = torch.empty(6, 40).t().copy_(weight.data)
        optimizer = wrapped(model, kv, "auto")
        train(model, optimizer, kv, range(3))
        assert not optimizer._steps._shared
        return flat(model)

    first, second = in_job(work)
    assert torch.equal(first, second)


def test_one_worker_that_cannot_share_is_an_error_on_all() -> None:
    def work(kv: KVStore) -> None:
        model = make_model()
        if kv.rank == 1:
            weight = model.get_parameter("0.weight")
            weight.data = torch.empty(6, 40).t().copy_(weight.data)  # the same values, in another order
        with pytest.raises(NotSupported, match=r"worker 1 says why|parameter '0\.weight'"):
            wrapped(model, kv)

    in_job(work)


def test_workers_have_no_weights_to_share_where_they_update() -> None:
    model = make_model()
    with pytest.raises(InvalidArgument, match="where='workers'"):
        tensorkv.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model, where="workers", share_weights=True
        )
