"""Whole jobs over shared memory: what is borrowed is never changed, and what is lent comes back."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import tensorkv
from tensorkv.store import KVStore
from tensorkv.stores.dist import DistStore
from tensorkv.testing.cluster import run_job
from tensorkv.updaters.optimizer import ELEMENTWISE_OPTIMIZERS
from tensorkv.worker import pusher
from tensorkv.worker.plans import PlanChunk

NUM_ELEMS = 50_000  # large enough to stay in shared memory


def run(fn: Any, num_workers: int = 1, **options: Any) -> list[Any]:
    return run_job(fn, num_workers=num_workers, num_servers=2, host="127.0.0.1", transport="shm", **options)


def lent_bytes(kv: KVStore) -> int:
    """Return how much the servers have not returned."""
    assert isinstance(kv, DistStore)
    total = 0
    for link in kv._job.links:
        assert link.shared is not None
        link.shared.collect()
        total += link.shared.lent_bytes
    return total


def gradients(seed: int) -> torch.Tensor:
    return torch.randn(NUM_ELEMS, generator=torch.Generator().manual_seed(seed))


OPTIONS: list[dict[str, Any]] = [{}, {"weight_decay": 0.1}, {"maximize": True}, {"foreach": True}]


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("optimizer", sorted(ELEMENTWISE_OPTIMIZERS, key=lambda each: each.__name__))
def test_no_optimizer_writes_to_what_one_worker_pushed(
    optimizer: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    """With one worker nothing is added up: the optimizer reads the window, which no server can write to."""
    if not options.keys() <= {*optimizer([torch.zeros(1, requires_grad=True)]).defaults}:
        pytest.skip(f"{optimizer.__name__} has no {next(iter(options))}")

    def train(kv: KVStore) -> torch.Tensor:
        kv.set_optimizer(optimizer, **options)
        kv.init("w", torch.ones(NUM_ELEMS))
        for step in range(3):
            kv.push("w", gradients(step))
        return kv.pull("w")

    expected = train(tensorkv.create("local"))
    for kind in ("dist_sync", "dist_async"):
        (found,) = run(train, kind=kind)
        torch.testing.assert_close(found, expected)


def scribble(key: Any, pushed: torch.Tensor, stored: torch.Tensor) -> None:
    pushed.mul_(2)
    stored.add_(pushed)


@pytest.mark.parametrize("kind", ["dist_sync", "dist_async"])
def test_a_function_may_write_to_what_was_pushed(kind: str) -> None:
    def work(kv: KVStore) -> None:
        kv.set_updater(scribble)
        kv.init("w", torch.zeros(NUM_ELEMS), whole=True)
        for step in range(1, 4):
            kv.push("w", torch.ones(NUM_ELEMS))
            assert torch.equal(kv.pull("w"), torch.full((NUM_ELEMS,), 2.0 * step))

    run(work, kind=kind)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_what_was_pushed_is_clipped_by_a_commit(reduction: str) -> None:
    def work(kv: KVStore) -> None:
        kv.init("w", torch.zeros(NUM_ELEMS))
        for _ in range(2):
            kv.push("w", torch.ones(NUM_ELEMS), apply=False)
            kv.commit(max_norm=1.0)
            assert kv.pull("w").norm().item() == pytest.approx(1.0, rel=1e-4)
        assert lent_bytes(kv) == 0

    run(work, reduction=reduction)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize("kind", ["dist_sync", "dist_async"])
def test_everything_lent_comes_back(kind: str, num_workers: int) -> None:
    """After pulls of what was pushed, behind each other too, with devices, in mean, and for deleted keys."""

    def work(kv: KVStore) -> None:
        keys = ["a", "b", "c"]
        kv.init(keys, [torch.zeros(NUM_ELEMS)] * 3)
        for step in range(4):
            kv.push(keys, [gradients(step)] * 3)
            kv.push("a", [gradients(step), gradients(step)])
            kv.pushpull("b", gradients(step))
        kv.pull(keys)
        kv.barrier()
        assert lent_bytes(kv) == 0
        if kv.rank == 0:
            kv.barrier()
            kv.delete("c")  # in the middle of a round, which is merged without a push of this worker
        else:
            kv.push("c", gradients(1))
            kv.barrier()
        kv.barrier()
        kv.barrier()
        assert lent_bytes(kv) == 0

    run(work, num_workers, kind=kind)


KEYS = ["a", "b", "c", "d"]
SIZES = [NUM_ELEMS, 20_000, 30, 3_000_000]  # the last is sliced


@contextlib.contextmanager
def counted_copies() -> Iterator[list[int]]:
    """Count the bytes that pushes copy or send, instead of lending them."""
    found: list[int] = []
    gather, gather_into = pusher.gather, pusher.gather_into

    def count(call: Any) -> Any:
        def counting(*arguments: Any) -> Any:
            chunk = next(each for each in arguments if isinstance(each, PlanChunk))
            found.append(chunk.size_bytes)
            return call(*arguments)

        return counting

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pusher, "gather", count(gather))
        patch.setattr(pusher, "gather_into", count(gather_into))
        yield found


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("kind", ["dist_sync", "dist_async"])
def test_what_is_pushed_from_empty_like_is_not_copied(kind: str, num_workers: int) -> None:
    def work(kv: KVStore) -> None:
        kv.set_updater("add")
        kv.init(KEYS, [torch.zeros(size) for size in SIZES])
        lent = kv.empty_like(KEYS)
        assert [each.shape for each in lent] == [(size,) for size in SIZES]
        for step in range(1, 12):
            for each in lent:
                each.fill_(step)
            if step % 2:
                kv.push(KEYS, lent)
                found = kv.pull(KEYS)
            else:
                found = kv.pushpull(KEYS, lent)
            if kind == "dist_sync":
                for each in found:
                    assert each.unique().tolist() == [num_workers * step * (step + 1) / 2]
            kv.barrier()
        assert lent_bytes(kv) == 0

    with counted_copies() as copies:
        run(work, num_workers, kind=kind)
    assert sum(copies) == 0


def test_lent_tensors_in_every_arrangement_are_pushed_right() -> None:
    """Alone, in other lists, beside others, in turn, twice in one push, in another order, as two devices."""

    def work(kv: KVStore) -> None:
        def pushed(keys: list[str], values: list[Any], *expected: float) -> None:
            for each, value in zip(kv.pushpull(keys, values), expected, strict=True):
                assert each.unique().tolist() == [2 * value]

        kv.init(KEYS, [torch.zeros(size) for size in SIZES])
        kv.init("square", torch.zeros(200, 200))
        one, other = kv.empty_like(KEYS), [kv.empty_like(key) for key in KEYS]
        for number, each in enumerate([*one, *other]):
            each.fill_(number)
        plain = [torch.full((size,), 100.0) for size in SIZES]
        for _ in range(2):
            pushed(KEYS, one, 0, 1, 2, 3)
            pushed(KEYS, other, 4, 5, 6, 7)
            pushed(KEYS[::-1], one[::-1], 3, 2, 1, 0)
            pushed(KEYS[1:], one[1:], 1, 2, 3)
            pushed(KEYS, [one[0], other[1], plain[2], other[3]], 0, 5, 100, 7)
            pushed(KEYS, plain, 100, 100, 100, 100)
            pushed(["a", "d"], [[one[0], other[0]], [one[3], one[3]]], 4, 6)
            kv.push(["a", "a"], [one[0], other[0]])
            assert kv.pull("a").unique().tolist() == [8]
        square = kv.empty_like("square")
        square.copy_(torch.arange(40_000.0).view(200, 200))
        assert torch.equal(kv.pushpull("square", square.t()), 2 * square.t())
        assert torch.equal(kv.pushpull("square", square), 2 * square)
        assert torch.equal(kv.pushpull("square", square.double()), 2 * square)
        kv.barrier()
        assert lent_bytes(kv) == 0

    run(work, 2)


@pytest.mark.slow
def test_a_lent_tensor_is_kept_until_the_servers_have_read_it_and_then_free() -> None:
    def work(kv: KVStore) -> None:
        kv.init("w", torch.zeros(30_000_000))
        for _ in range(5):
            kv.push("w", kv.empty_like("w").fill_(1))
            gc.collect()
            between = kv.empty_like("w").fill_(7)
            assert kv.pull("w").unique().tolist() == [1]
            del between
        lent_bytes(kv)
        gc.collect()
        assert isinstance(kv, DistStore)
        kv.empty_like("w")
        assert len(kv._job.window._arena._segments) <= 3

    run(work)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int8], ids=str)
def test_lent_tensors_of_other_dtypes(dtype: torch.dtype) -> None:
    def work(kv: KVStore) -> None:
        kv.init(["a", "b", "c"], [torch.zeros(size, dtype=dtype) for size in (50_001, 49_999, 4_000_003)])
        lent = kv.empty_like(["a", "b", "c"])
        for step in range(3):
            for each in lent:
                each.fill_(step)
            for each in kv.pushpull(["a", "b", "c"], lent):
                assert each.unique().tolist() == [2 * step]

    with counted_copies() as copies:
        run(work, 2)
    assert sum(copies) == 0


def test_lent_tensors_wait_for_a_commit_where_they_lie() -> None:
    def work(kv: KVStore) -> None:
        kv.init(["a", "d"], [torch.zeros(NUM_ELEMS), torch.zeros(3_000_000)])
        lent = kv.empty_like(["a", "d"])
        for each in lent:
            each.fill_(3)
        kv.push(["a", "d"], lent, apply=False)
        assert kv.commit(max_norm=1e9).applied
        assert [each.unique().tolist() for each in kv.pull(["a", "d"])] == [[6], [6]]
        assert [each.unique().tolist() for each in lent] == [[3], [3]]

    run(work, 2)


def test_a_pull_that_is_not_waited_for_keeps_its_value_and_stops_nobody() -> None:
    """Its worker does not read while others push on: it gets one version, whole."""

    def work(kv: KVStore) -> None:
        kv.init("w", torch.zeros(NUM_ELEMS))
        kv.barrier()
        if kv.rank == 0:
            pending = [kv.pull("w", async_op=True) for _ in range(8)]
            for each in pending:
                value = each.result()
                assert value.unique().numel() <= 2  # a slice on each server
        else:
            for step in range(1, 30):
                kv.push("w", torch.full((NUM_ELEMS,), float(step)))
                kv.pull("w")
        kv.barrier()

    run(work, 2, kind="dist_async")


@pytest.mark.slow
def test_stores_that_come_and_go_leave_no_segments() -> None:
    def work(kv: KVStore) -> int:
        assert isinstance(kv, DistStore)
        for number in range(6):
            other = DistStore("dist_sync", kv._job, store=f"other {number}", reduction="sum", timeout_s=60.0)
            other.init("w", torch.zeros(30_000_000))
            other.push("w", torch.ones(30_000_000))
            assert other.pull("w")[-1] == 1
            other.close()
        return sum(len(link.shared._segments) for link in kv._job.links if link.shared is not None)

    (num_segments,) = run(work)
    assert num_segments <= 4  # of two servers; one that is not in use is kept
