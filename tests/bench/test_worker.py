"""A worker, measured: what it does, and what it must find."""

from __future__ import annotations

import pytest
import torch

import tensorkv
from tensorkv.bench import steps
from tensorkv.bench.steps import Plan
from tensorkv.bench.worker import TensorKVSystem, TorchExpected, measure, optimizer_class
from tensorkv.store import KVStore
from tensorkv.testing.cluster import run_job
from tensorkv.updaters.optimizer import ELEMENTWISE_OPTIMIZERS

QUICK = Plan(warmup=1, steps=3)


@pytest.mark.parametrize("updater", ["assign", "sgd", "adam"])
@pytest.mark.parametrize("num_devices", [1, 4])
def test_a_local_store_is_measured(updater: str, num_devices: int) -> None:
    plan = Plan(updater=updater, num_devices=num_devices, warmup=1, steps=3)
    with tensorkv.create("local") as kv:
        times_s = measure(kv, plan)
    assert {way: len(found) for way, found in times_s.items()} == {"push+pull": 3, "pushpull": 3}


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("lent", [False, True])
def test_workers_of_a_job_agree_on_how_many_steps_fill_a_time(dtype: str, lent: bool) -> None:
    plan = Plan(dtype=dtype, warmup=1, steps=0, seconds=1e-6)
    told: list[tuple[str, int, int]] = []

    def work(kv: KVStore) -> int:
        def tell(way: str, number: int, num_steps: int) -> None:
            if kv.rank == 0:
                told.append((way, number, num_steps))

        return len(measure(kv, plan, tell, lent)["pushpull"])

    assert run_job(work, num_workers=2, num_servers=2, host="127.0.0.1") == [steps.MIN_STEPS] * 2
    assert told[-1] == ("pushpull", steps.MIN_STEPS - 1, steps.MIN_STEPS)


@pytest.mark.parametrize("updater", ["sgd", "adam"])
def test_pushes_that_are_applied_one_by_one_are_measured_and_checked(updater: str) -> None:
    plan = Plan(updater=updater, pushes=3, warmup=1, steps=2)

    def work(kv: KVStore) -> dict[str, int]:
        return {way: len(found) for way, found in measure(kv, plan).items()}

    found = run_job(work, kind="dist_async", num_workers=2, num_servers=2, host="127.0.0.1")
    assert found == [{"pushes": 2}] * 2


def test_a_step_that_does_nothing_is_caught() -> None:
    with tensorkv.create("local") as kv:
        system = TensorKVSystem(kv, QUICK)
        system.ways = {"nothing": lambda: None}
        with pytest.raises(steps.WrongResult, match="nothing, gradients of scale 2"):
            steps.run(system, QUICK)


@pytest.mark.parametrize("optimizer", sorted(each.__name__ for each in ELEMENTWISE_OPTIMIZERS))
def test_every_optimizer_has_an_expectation(optimizer: str) -> None:
    """What torch makes of one element is what a store makes of all."""
    plan = Plan(updater=optimizer.lower(), warmup=2, steps=4)
    with tensorkv.create("local") as kv:
        measure(kv, plan)
    expected = TorchExpected(plan, 1)
    assert expected.step(1.0) != expected.step(1.0)


@pytest.mark.parametrize("name", ["muon", "lbfgs", "nothing"])
def test_other_optimizers_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"(?i){name}"):
        optimizer_class(name)


def test_a_wrong_value_is_found_in_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    with tensorkv.create("local") as kv:
        pull = kv.pull

        def wrong(key: object, out: list[torch.Tensor]) -> None:
            pull(key, out)
            out[-1][-1] += 1

        monkeypatch.setattr(kv, "pull", wrong)
        with pytest.raises(steps.WrongResult, match="push\\+pull"):
            measure(kv, QUICK)
