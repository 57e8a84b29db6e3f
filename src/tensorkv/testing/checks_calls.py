"""Checks of one worker: commit, Work handles, threads, the end of a store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import torch

from tensorkv.errors import DtypeMismatch, NotSupported, StoreClosed, UncommittedPush, UpdaterError
from tensorkv.keys import ABSENT
from tensorkv.store import CommitResult, KVStore
from tensorkv.testing.suite import (
    DEADLINE_S,
    StoreMaker,
    check,
    close,
    full,
    in_one,
    in_threads,
    noise,
    raises,
    refuse_negative,
    same,
)
from tensorkv.work import Work

# ---- commit ----------------------------------------------------------------------------------------


@check(only="sync")
def check_commit(maker: StoreMaker) -> None:
    """apply=False only merges; commit applies all such keys; until then they are blocked."""

    def work(kv: KVStore) -> None:
        kv.init(["a", "b", "c"], [full(1), full(2), full(3)])
        kv.set_updater("add")
        kv.push(["a", "b"], [[full(1), full(1)], full(1)], apply=False)
        assert kv.info("a").version == 0
        blocked: list[Callable[[], Any]] = [
            lambda: kv.push("a", full(1)),
            lambda: kv.push(["c", "a"], [full(1), full(1)], apply=False),
            lambda: kv.pull(["c", "b"]),
            lambda: kv.pushpull("b", full(1)),
        ]
        for call in blocked:
            raises(UncommittedPush, call, "commit")
        same(kv.pull("c"), 3.0)
        assert kv.info("c").round == 0
        assert kv.commit() == CommitResult(applied=True, norm=None)
        for key, expected in (("a", 3.0), ("b", 3.0), ("c", 3.0)):
            same(kv.pull(key), expected, key)
        assert (kv.info("a").round, kv.info("a").version, kv.info("c").version) == (1, 1, 0)
        kv.push("a", full(1))
        same(kv.pull("a"), 4.0)

    in_one(maker, work)


@check(only="sync")
def check_commit_clips_exactly(maker: StoreMaker) -> None:
    """max_norm scales by the norm over all keys, as torch.nn.utils.clip_grad_norm_ does."""

    def work(kv: KVStore) -> None:
        shapes = {"a": (3, 4), "b": (7,), "c": ()}
        kv.init({key: torch.zeros(shape, dtype=torch.float64) for key, shape in shapes.items()})
        for max_norm in (0.5, 1e9):
            gradients = {k: noise(i, *s, dtype=torch.float64) for i, (k, s) in enumerate(shapes.items())}
            parameters = [torch.nn.Parameter(torch.zeros_like(each)) for each in gradients.values()]
            for parameter, gradient in zip(parameters, gradients.values(), strict=True):
                parameter.grad = gradient.clone()
            norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
            kv.push(gradients, apply=False)
            result = kv.commit(max_norm=max_norm)
            assert result.applied and result.norm is not None
            assert abs(result.norm - norm.item()) <= 1e-9 * norm.item(), f"norm {result.norm}, not {norm}"
            for key, parameter in zip(shapes, parameters, strict=True):
                assert parameter.grad is not None
                close(kv.pull(key), parameter.grad, f"{key} clipped at {max_norm}", rtol=1e-9)

    in_one(maker, work)


@check(only="sync")
def check_commit_skips(maker: StoreMaker) -> None:
    """skip, and check_finite with a NaN, drop the round: no value changes, no version, the next is free."""

    def work(kv: KVStore) -> None:
        kv.init(["a", "b"], [full(1), full(2)])
        for bad, options in ((5.0, {"skip": True}), (float("nan"), {}), (float("inf"), {"max_norm": 1.0})):
            kv.push({"a": full(bad), "b": full(5)}, apply=False)
            result = kv.commit(check_finite=True, **options)
            assert not result.applied, f"applied {bad} with {options}"
            same(kv.pull("a"), 1.0)
            same(kv.pull("b"), 2.0)
        assert (kv.info("a").round, kv.info("a").version) == (3, 0)
        kv.push({"a": full(7), "b": ABSENT}, apply=False)
        result = kv.commit(check_finite=True)
        assert result.applied and result.norm is not None and abs(result.norm - 7 * 6**0.5) < 1e-4
        same(kv.pull("a"), 7.0)
        same(kv.pull("b"), 2.0)
        assert (kv.info("b").round, kv.info("b").version) == (4, 0)

    in_one(maker, work)


@check(only="sync")
def check_commit_cannot_scale_integers(maker: StoreMaker) -> None:
    """max_norm over a key that is not a float is refused, naming it; without it the round is committed."""

    def work(kv: KVStore) -> None:
        ints = torch.tensor([3, 4])
        kv.init({"a": full(1), "n": ints, "c": full(0, 2, dtype=torch.complex64)})
        for _ in range(2):
            kv.push({"a": full(5), "n": ints, "c": full(1, 2) + 0j}, apply=False)
            error = raises(DtypeMismatch, lambda: kv.commit(max_norm=1.0), "'n'", "int64", "max_norm")
            assert isinstance(error, TypeError)
            raises(DtypeMismatch, lambda: kv.commit(max_norm=1.0, skip=True), "'n'")
            raises(UncommittedPush, lambda: kv.pull("a"), "commit")
            assert kv.info("a").version == kv.info("n").version
            assert kv.commit(check_finite=True).applied
            same(kv.pull("a"), 5.0)
            same(kv.pull("n"), ints)
            same(kv.pull("c"), full(1, 2) + 0j)
        kv.push({"a": full(5), "n": ABSENT, "c": full(0, 2) + 3j}, apply=False)
        assert kv.commit(max_norm=168.0**0.5 / 2).applied, "an absent integer has nothing to scale"
        close(kv.pull("a"), full(2.5), "a")
        close(kv.pull("c"), full(0, 2) + 1.5j, "c")
        assert (kv.info("n").round, kv.info("n").version) == (3, 2)

    in_one(maker, work)


@check(only="sync")
def check_commit_of_huge_and_tiny_values(maker: StoreMaker) -> None:
    """Finite elements are finite however large their squares; the norm neither overflows nor vanishes."""

    def work(kv: KVStore) -> None:
        wide = torch.float64
        kv.init({"a": full(0, 4, dtype=wide), "b": full(0, 5, dtype=wide)})
        for size in (1e200, 1e-200, 1e307):
            kv.push({"a": full(size, 4, dtype=wide), "b": full(size, 5, dtype=wide)}, apply=False)
            result = kv.commit(check_finite=True)
            assert result.applied, f"elements of {size} are finite"
            assert result.norm is not None and abs(result.norm / size - 3) < 1e-9, f"norm {result.norm}"
            same(kv.pull("a"), full(size, 4, dtype=wide))
        kv.push({"a": full(1e200, 4, dtype=wide), "b": full(1e200, 5, dtype=wide)}, apply=False)
        assert kv.commit(max_norm=3.0, check_finite=True).applied
        close(kv.pull("a"), full(1, 4, dtype=wide), "a clipped", rtol=1e-9)
        kv.push({"a": full(1e200, 4, dtype=wide), "b": ABSENT}, apply=False)
        assert kv.commit(max_norm=1.0).applied
        close(kv.pull("a"), full(0.5, 4, dtype=wide), "a alone, clipped", rtol=1e-9)
        for bad in (float("inf"), float("nan")):
            kv.push({"a": full(1e200, 4, dtype=wide), "b": full(bad, 5, dtype=wide)}, apply=False)
            assert not kv.commit(check_finite=True).applied, f"applied {bad}"

    in_one(maker, work)


@check(only="sync")
def check_commit_of_half_floats(maker: StoreMaker) -> None:
    """Norm and clipping use the sum of the round, rounded to the stored dtype."""

    def work(kv: KVStore) -> None:
        for dtype in (torch.float16, torch.bfloat16):
            key = str(dtype)
            kv.init(key, full(0, 50, dtype=dtype))
            gradients = [noise(1, 50), noise(2, 50)]
            total = (gradients[0] + gradients[1]).to(dtype)
            norm = torch.linalg.vector_norm(total, dtype=torch.float64).item()
            kv.push(key, gradients, apply=False)
            result = kv.commit(max_norm=1.0)
            assert result.norm is not None and abs(result.norm - norm) <= 1e-12 * norm
            same(kv.pull(key), total * (1.0 / (result.norm + 1e-6)), key)
            if dtype == torch.float16:
                kv.push(key, [full(60000, 50, dtype=dtype), full(60000, 50)], apply=False)
                assert not kv.commit(check_finite=True).applied, "the sum is infinite in float16"

    in_one(maker, work)


@check(only="sync")
def check_commit_with_optimizer(maker: StoreMaker) -> None:
    """A skipped step leaves the optimizer's state alone."""

    def work(kv: KVStore) -> None:
        kv.init("w", full(0))
        kv.set_optimizer("sgd", lr=1.0, momentum=0.5)
        for value, skip in ((1.0, False), (100.0, True), (1.0, False)):
            kv.push("w", full(value), apply=False)
            assert kv.commit(skip=skip).applied is not skip
        same(kv.pull("w"), -2.5)

    in_one(maker, work)


@check(only="async")
def check_async_has_no_commit(maker: StoreMaker) -> None:
    """Without common rounds there is nothing to commit."""

    def work(kv: KVStore) -> None:
        kv.init("w", full(1))
        raises(NotSupported, kv.commit)
        raises(NotSupported, lambda: kv.push("w", full(2), apply=False))
        same(kv.pull("w"), 1.0)
        assert kv.info("w").round == 0

    in_one(maker, work)


# ---- handles, threads, the end -----------------------------------------------------------------------


@check()
def check_work_handles(maker: StoreMaker) -> None:
    """async_op=True returns a Work: wait, is_completed, result, exception."""

    def work(kv: KVStore) -> None:
        kv.init(["a", "b"], [full(1), full(2)])
        pushed = kv.push("a", full(5), async_op=True)
        assert isinstance(pushed, Work)
        assert pushed.wait() is True and pushed.is_completed() and pushed.result() is None
        assert pushed.exception() is None
        pulled = kv.pull("a", async_op=True)
        assert isinstance(pulled, Work) and pulled.wait(timeout=DEADLINE_S) is True
        same(pulled.result(), 5.0)
        out = torch.empty(2, 3)
        assert kv.pull("a", out, async_op=True).result() is out
        same(out, 5.0)
        both = kv.pushpull(["a", "b"], [full(6), full(7)], async_op=True)
        first, second = both.result()
        same(first, 6.0)
        same(second, 7.0)
        named = kv.pushpull({"a": full(1), "b": full(2)}, async_op=True).result()
        same(named["a"], 1.0)
        same(named["b"], 2.0)
        pending = [kv.push("a", full(value), async_op=True) for value in range(20)]
        last = kv.pull("a", async_op=True)
        same(last.result(), 19.0, "calls of one thread take effect in order")
        assert all(each is not None and each.wait() for each in pending)

    in_one(maker, work)


@check()
def check_work_in_coroutines(maker: StoreMaker) -> None:
    """A Work can be awaited, alone or with others, and wrapped as an asyncio future."""

    def work(kv: KVStore) -> None:
        kv.init(["a", "b"], [full(1), full(2)])

        async def several() -> None:
            assert await kv.push("a", full(5), async_op=True) is None  # type: ignore[misc]
            same(await kv.pull("a", async_op=True), 5.0)
            same(await asyncio.wrap_future(kv.pushpull("b", full(6), async_op=True)), 6.0)
            works = [kv.pull(key, async_op=True) for key in ("a", "b", "a")]
            first, second, third = await asyncio.gather(*map(asyncio.wrap_future, works))
            same(first, 5.0)
            same(second, 6.0)
            same(third, 5.0)
            kv.set_updater(refuse_negative)
            failing = kv.pushpull("a", full(-1), async_op=True)
            try:
                await failing
            except UpdaterError as exc:
                assert "negative gradient" in str(exc)
            else:
                raise AssertionError("the error did not travel")

        asyncio.run(several())
        same(kv.pull("a"), 5.0)

    in_one(maker, work)


@check()
def check_work_carries_errors(maker: StoreMaker) -> None:
    """wait and result raise the blocking call's error; exception returns it."""

    def work(kv: KVStore) -> None:
        kv.init("a", full(1))
        kv.set_updater(refuse_negative)
        failing = kv.pushpull("a", full(-1), async_op=True)
        assert isinstance(failing.exception(), UpdaterError)
        raises(UpdaterError, failing.wait, "negative gradient")
        raises(UpdaterError, failing.result, "negative gradient")
        assert failing.is_completed()
        same(kv.pull("a"), 1.0)

    in_one(maker, work)


@check()
def check_threads_with_own_keys(maker: StoreMaker) -> None:
    """Threads that push their own keys do not interfere, and each sees its calls in order."""

    def work(kv: KVStore) -> None:
        names = [f"w{number}" for number in range(4)]
        kv.init(names, [full(0)] * 4)
        kv.set_updater("add")

        def train(name: str) -> None:
            for step in range(1, 11):
                kv.push(name, full(step))
                same(kv.pull(name), step * (step + 1) / 2, f"{name} after step {step}")

        in_threads([lambda name=name: train(name) for name in names])  # type: ignore[misc]
        assert [kv.info(name).version for name in names] == [10] * 4

    in_one(maker, work)


@check()
def check_threads_on_one_key(maker: StoreMaker) -> None:
    """Each push of one key from several threads counts once."""

    def work(kv: KVStore) -> None:
        kv.init("w", full(0))
        kv.set_updater("add")

        def push() -> None:
            for _ in range(10):
                kv.push("w", full(1))

        in_threads([push] * 4)
        same(kv.pull("w"), 40.0)
        assert kv.info("w").round == 40

    in_one(maker, work)


@check()
def check_context_manager(maker: StoreMaker) -> None:
    """A store is a context manager; after it, and after close, it refuses to be used."""

    def work(kv: KVStore) -> None:
        closed = kv.closed
        assert not closed, "a new store is closed"
        with kv as same_store:
            assert same_store is kv
            kv.init("w", full(1))
        assert kv.closed
        kv.close()
        raises(StoreClosed, lambda: kv.pull("w"), "closed")
        raises(StoreClosed, kv.__enter__, "closed")

    in_one(maker, work)


@check()
def check_who(maker: StoreMaker) -> None:
    """kind, name, rank and numbers; a barrier of one returns."""

    def work(kv: KVStore) -> None:
        assert kv.kind == maker.kind and kv.name == "default" and kv.reduction == "sum"
        assert kv.rank == 0 and kv.num_workers == kv.world_size == 1
        assert maker.kind in repr(kv)
        kv.barrier()

    in_one(maker, work)


@check()
def check_stores_beside_each_other(maker: StoreMaker) -> None:
    """Stores with different names, or kinds, share nothing; a name that all have closed is empty."""

    def work(kv: KVStore) -> None:
        kv.init("w", full(1))
        for kind in (maker.kind, maker.other_kind):
            with maker.open(kv, kind, "beside") as other:
                assert (other.kind, other.name, other.keys()) == (kind, "beside", [])
                other.init([3, 4], [full(2, 5), full(3)])
                other.set_updater("add")
                other.push(4, full(4))
                same(other.pull(4), 7.0, "the other store")
                kv.push("w", full(5))
                same(kv.pull("w"), 5.0, "the first store")
            assert other.closed and not kv.closed
            kv.push("w", full(6))
            same(kv.pull("w"), 6.0, "the first store, after the other was closed")
        assert kv.keys() == ["w"] and kv.info("w").round == 4

    in_one(maker, work)
