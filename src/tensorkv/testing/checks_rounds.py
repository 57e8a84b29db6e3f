"""Checks of several workers: rounds, sums, running ahead, leaving, and barrier."""

from __future__ import annotations

import asyncio
import itertools
import math

import torch

from tensorkv.errors import ShapeMismatch, WaitTimeout
from tensorkv.keys import ABSENT
from tensorkv.store import KVStore
from tensorkv.testing.suite import (
    DEADLINE_S,
    Meeting,
    StoreMaker,
    arrived,
    check,
    full,
    in_threads,
    in_workers,
    keep_half,
    noise,
    raises,
    same,
)
from tensorkv.work import Work

SEVERAL = (2, 3)
IN_TIME_S = 0.02  # timeout of a wait that must not succeed


def assert_waits(work: object, what: str) -> Work:
    """Assert that `work` is the handle of an incomplete call, and return it."""
    assert isinstance(work, Work), f"{what} gave {work!r}, not a Work"
    try:
        work.wait(timeout=IN_TIME_S)
    except WaitTimeout:
        assert not work.is_completed()
        return work
    raise AssertionError(f"{what} is complete before the other workers have contributed")


@check(workers=SEVERAL, only="sync")
def check_rounds_add_up(maker: StoreMaker, workers: int) -> None:
    """Round n sums every worker's n-th push; each worker pulls exactly the value after its round."""

    def work(kv: KVStore, meeting: Meeting) -> list[torch.Tensor]:
        assert kv.num_workers == kv.world_size == workers and kv.kind == maker.kind
        kv.init(["w", "b"], [full(0), full(0, 5)])
        kv.set_updater(keep_half)
        seen = []
        for step in range(1, 5):
            kv.push(["b", "w"], [full(step, 5), [full(kv.rank), full(step * 10)]])
            seen.append(kv.pull("w"))
        same(kv.pull("b"), _decayed(workers), "b")
        assert (kv.info("w").round, kv.info("w").version) == (4, 4)
        return seen

    results = in_workers(maker, workers, work)
    expected = 0.0
    for step in range(1, 5):
        expected = expected / 2 + sum(rank + step * 10 for rank in range(workers))
        for rank in range(workers):
            same(results[rank][step - 1], expected, f"rank {rank} after round {step}")


def _decayed(workers: int) -> torch.Tensor:
    value = 0.0
    for step in range(1, 5):
        value = value / 2 + step * workers
    return full(value, 5)


@check(workers=SEVERAL)
def check_ranks(maker: StoreMaker, workers: int) -> None:
    """Ranks count from 0, and results come by rank."""
    assert in_workers(maker, workers, lambda kv, meeting: kv.rank) == list(range(workers))


@check(workers=SEVERAL, only="sync")
def check_pull_waits_for_the_round(maker: StoreMaker, workers: int) -> None:
    """A pull after a push returns only when every worker's push of that round is in."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init("w", full(0))
        meeting.everybody()
        if kv.rank == 0:
            same(kv.pull("w"), 0.0, "before any push")
            kv.push("w", full(1))
            pulled = assert_waits(kv.pull("w", async_op=True), "the pull")
            meeting.signal("seen")
            same(pulled.result(), float(workers), "after the round")
        else:
            meeting.wait_for("seen")
            kv.push("w", full(1))
        same(kv.pull("w"), float(workers))

    in_workers(maker, workers, work)


@check(workers=SEVERAL, only="sync")
def check_pushed_memory_is_free_at_once(maker: StoreMaker, workers: int) -> None:
    """Once push has returned, the caller may change its tensors, even if the round is still open."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init(["w", "large"], [full(0), full(0, 50_000)])
        meeting.everybody()
        if kv.rank > 0:
            meeting.wait_for("changed")
        mine, large = full(1), full(1, 50_000)
        kv.push(["w", "large"], [mine, large])
        mine.fill_(1000)
        large.fill_(1000)
        meeting.signal("changed")
        same(kv.pull("w"), float(workers))
        same(kv.pull("large"), full(workers, 50_000))

    in_workers(maker, workers, work)


@check(workers=SEVERAL, only="sync")
def check_sums_in_rank_order(maker: StoreMaker, workers: int) -> None:
    """Sums go over devices in list order, then workers in rank order, bitwise, for any order of arrival."""
    parts = [[noise(10 * rank + device, 97) for device in range(3)] for rank in range(workers)]
    sums = [(first + second) + third for first, second, third in parts]
    expected = sums[0]
    for each in sums[1:]:
        expected = expected + each

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init(["w", "b"], [torch.zeros(97), full(0, 3)])
        for order in itertools.permutations(range(workers)):
            for turn in order:
                if turn == kv.rank:
                    kv.push({"w": parts[turn], "b": _extreme(turn, workers)})
                    arrived(kv, "w")
                    arrived(kv, "b")
                meeting.everybody()
            same(kv.pull("w"), expected, f"the sum when ranks arrive as {order}")
            same(kv.pull("b"), float(workers > 2), f"the sum of extremes when ranks arrive as {order}")
            meeting.everybody()

    in_workers(maker, workers, work)


def _extreme(rank: int, workers: int) -> list[torch.Tensor]:
    """1e8 - 1e8 + 1 over three ranks; over two, 1 of rank 0 drowns in its own 1e8."""
    values = [[1e8], [-1e8], [1.0]] if workers > 2 else [[1e8, 1.0], [-1e8]]
    return [full(value, 3) for value in values[rank]]


@check(workers=SEVERAL, only="sync")
def check_double_push(maker: StoreMaker, workers: int) -> None:
    """A worker's second push of a key waits until the first is merged, and belongs to the next round."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init("w", full(0))
        meeting.everybody()
        if kv.rank == 0:
            kv.push("w", full(1))
            second = assert_waits(kv.push("w", full(10), async_op=True), "the second push")
            meeting.signal("second push waits")
            second.wait()
            same(kv.pull("w"), 10.0 + 1000 * (workers - 1), "round 2")
        else:
            meeting.wait_for("second push waits")
            kv.push("w", full(100))
            same(kv.pull("w"), 1.0 + 100 * (workers - 1), "round 1")
            meeting.signal(f"{kv.rank} has pulled")
            for rank in range(1, workers):
                meeting.wait_for(f"{rank} has pulled")
            kv.push("w", full(1000))
            same(kv.pull("w"), 10.0 + 1000 * (workers - 1), "round 2")
        assert kv.info("w").round == 2

    in_workers(maker, workers, work)


@check(workers=SEVERAL, only="sync")
def check_free_keys_go_at_once(maker: StoreMaker, workers: int) -> None:
    """Of a list, only the keys with an unmerged push wait for others."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init(["busy", "free"], [full(0), full(0)])
        meeting.everybody()
        if kv.rank == 0:
            kv.push("busy", full(1))
            both = assert_waits(kv.push(["busy", "free"], [full(2), full(3)], async_op=True), "the push")
            meeting.signal("pushed")
            both.wait()
        else:
            meeting.wait_for("pushed")
            kv.push("free", full(4))
            same(kv.pull("free"), 3.0 + 4 * (workers - 1), "the free key")
            kv.push("busy", full(1))
            kv.push("busy", full(5))
        same(kv.pull("busy"), 2.0 + 5 * (workers - 1), "the busy key")

    in_workers(maker, workers, work)


@check(workers=SEVERAL, only="sync")
def check_uneven_pushes(maker: StoreMaker, workers: int) -> None:
    """Workers with different numbers of batches: those that are done leave, and the others go on."""

    def work(kv: KVStore, meeting: Meeting) -> list[float]:
        kv.init("w", full(0))
        kv.set_updater("add")
        seen = []
        for _ in range(2 * kv.rank + 1):
            kv.push("w", full(1))
            seen.append(kv.pull("w")[0, 0].item())
        kv.close()
        return seen

    numbers = [2 * rank + 1 for rank in range(workers)]
    for rank, seen in enumerate(in_workers(maker, workers, work)):
        expected = [float(sum(min(n, each) for each in numbers)) for n in range(1, numbers[rank] + 1)]
        assert seen == expected, f"rank {rank} pulled {seen}, not {expected}"


@check(workers=SEVERAL, only="sync")
def check_what_a_left_worker_pushed_counts(maker: StoreMaker, workers: int) -> None:
    """Leaving completes the rounds that waited for the worker; its earlier pushes count."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init(["w", "b"], [full(0), full(0)])
        meeting.everybody()
        last = workers - 1
        if kv.rank == last:
            kv.push("w", full(100))
            meeting.wait_for("waiting")
            kv.close()
            meeting.signal("left")
            return
        kv.push("b", full(1))
        if kv.rank == 0:
            assert_waits(kv.pull("b", async_op=True), "the pull")
            meeting.signal("waiting")
        same(kv.pull("b"), float(last), "the round without the one who left")
        meeting.wait_for("left")
        kv.push("w", full(1))
        same(kv.pull("w"), 100.0 + last, "the round the one who left had pushed")
        kv.push("w", full(1))
        same(kv.pull("w"), float(last), "the next round")
        kv.barrier()

    in_workers(maker, workers, work)


@check(workers=SEVERAL, only="sync")
def check_leaving_drops_uncommitted(maker: StoreMaker, workers: int) -> None:
    """An uncommitted push is dropped when its worker leaves."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init("w", full(0))
        meeting.everybody()
        kv.push("w", full(1 if kv.rank else 100), apply=False)
        if kv.rank == workers - 1:
            kv.close()
            meeting.signal("left")
            return
        meeting.wait_for("left")
        assert kv.commit().applied
        same(kv.pull("w"), 100.0 + workers - 2, "what the workers that stayed committed")

    in_workers(maker, workers, work)


@check(workers=(2,), only="sync")
def check_who_stops_to_await_a_pull(maker: StoreMaker, workers: int) -> None:
    """A coroutine that stops waiting does not affect the pull or the store."""

    async def give_up(pulled: Work) -> None:
        try:
            await asyncio.wait_for(asyncio.wrap_future(pulled), IN_TIME_S)
        except TimeoutError:
            return
        raise AssertionError("the pull is complete before the other worker has contributed")

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init("w", full(0))
        meeting.everybody()
        if kv.rank == 0:
            kv.push("w", full(1))
            pulled = kv.pull("w", async_op=True)
            asyncio.run(give_up(pulled))
            assert not pulled.is_completed() and not pulled.cancel()
            meeting.signal("gave up")
            same(pulled.result(), 2.0, "the pull goes on")
        else:
            meeting.wait_for("gave up")
            kv.push("w", full(1))
        same(kv.pull("w"), 2.0)

    in_workers(maker, workers, work)


def weighted_mean(pushes: list[tuple[torch.Tensor, float]], dtype: torch.dtype) -> torch.Tensor:
    """Return the mean by its definition: over sums of devices, in rank order, each with its weight."""
    wide = torch.float32 if dtype.itemsize < 4 else dtype
    products = [value.to(wide) * factor for value, factor in pushes]
    return sum(products[1:], start=products[0]).to(wide)


@check(workers=SEVERAL, only="sync")
def check_weighted_mean(maker: StoreMaker, workers: int) -> None:
    """The mean is sum(weight * value) / sum(weight) in rank order, bitwise, for any order of arrival."""
    weights = [300, 1.7, 12345][:workers]
    dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

    def work(kv: KVStore, meeting: Meeting) -> None:
        for turn, dtype in enumerate(dtypes):
            key, size = f"w{turn}", 300_011 if turn == 0 else 61
            kv.init(key, torch.zeros(size, dtype=dtype))
            values = [noise(10 * turn + rank, size, dtype=dtype) / 256 for rank in range(workers)]
            for step in range(2):
                meeting.everybody()
                if kv.rank == step:  # a different rank comes first each time
                    kv.push(key, values[kv.rank], weight=weights[kv.rank])
                    arrived(kv, key)
                    meeting.signal(f"{key} {step}")
                else:
                    meeting.wait_for(f"{key} {step}")
                    kv.push(key, values[kv.rank], weight=weights[kv.rank])
                total = weighted_mean(list(zip(values, weights, strict=True)), dtype)
                same(kv.pull(key), (total / math.fsum(weights)).to(dtype), f"the mean of {dtype}")

    in_workers(maker, workers, work, reduction="mean")


@check(workers=SEVERAL, only="sync")
def check_weights_of_some(maker: StoreMaker, workers: int) -> None:
    """Next to a weighted push an unweighted tensor counts one; several devices share their push's weight."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init(["w", "v"], [full(-1), full(-1)])
        others = workers - 1
        first = kv.rank == 0

        kv.push("w", [full(1), full(3)], weight=6) if first else kv.push("w", full(4))
        same(kv.pull("w"), full(3 * (1 + 3) + 4 * others) / (6 + others), "6 for both devices together")
        kv.push("w", [full(1), full(3)]) if first else kv.push("w", full(4), weight=10)
        same(kv.pull("w"), full(1 + 3 + 40 * others) / (2 + 10 * others), "each device counts one")
        kv.push(["w", "w"], [full(1), full(2)], weight=5) if first else kv.push("w", full(8))
        same(kv.pull("w"), full(5 * 3 + 8 * others) / (5 + others), "the same key twice is one push")
        kv.push("w", full(7) / 3, weight=3 if first else 0)
        same(kv.pull("w"), full(7) / 3, "a weight alone cancels, and 0 is as ABSENT")
        kv.push("w", ABSENT if first else full(float(kv.rank)), weight=9)
        if workers == 2:
            same(kv.pull("w"), 1.0, "absent has no weight")
        found = (
            kv.pushpull(["w", "v"], [full(1), full(2)], weight=4)
            if first
            else kv.pushpull({"v": full(5), "w": full(4)})
        )
        found = found if first else [found["w"], found["v"]]
        same(found[0], full(4 + 4 * others) / (4 + others), "pushpull, another list on each rank")
        same(found[1], full(8 + 5 * others) / (4 + others), "pushpull")
        kv.push("w", full(1), weight=4 if first else None, apply=False)
        assert kv.commit(max_norm=100).applied
        same(kv.pull("w"), full(4 + others) / (4 + others), "committed")
        for _ in range(3):  # running ahead: all but the first push wait for the previous round
            last = kv.push("w", full(2), weight=2 if first else 1, async_op=True)
        assert last is not None and last.wait()
        same(kv.pull("w"), full(4 + 2 * others) / (2 + others), "pushed ahead")
        kv.push("w", full(9), weight=3)
        if not first:
            kv.close()
            return
        same(kv.pull("w"), 9.0)
        kv.push("w", full(7), weight=3)
        same(kv.pull("w"), 7.0, "without those that left")

    in_workers(maker, workers, work, reduction="mean")


@check(workers=SEVERAL, only="sync")
def check_mean_over_workers(maker: StoreMaker, workers: int) -> None:
    """A mean divides by every device of every worker; absent workers count none."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init("w", full(-1))
        kv.push("w", [full(0), full(2)] if kv.rank == 0 else full(4))
        same(kv.pull("w"), full(2 + 4 * (workers - 1)) / (workers + 1), "the mean of all devices")
        kv.push("w", [full(1), full(3)] if kv.rank == 0 else ABSENT)
        same(kv.pull("w"), 2.0, "the mean without those absent")
        kv.push(["w", "w"], [full(1), full(2)])
        same(kv.pull("w"), 3.0, "the same key twice counts one")
        kv.push("w", ABSENT)
        same(kv.pull("w"), 3.0, "all absent")
        assert (kv.info("w").round, kv.info("w").version) == (4, 3)

    in_workers(maker, workers, work, reduction="mean")


@check(workers=SEVERAL, only="sync")
def check_absent_workers(maker: StoreMaker, workers: int) -> None:
    """ABSENT completes a round for this worker; a round of nothing but ABSENT runs no updater."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init("w", full(1))
        kv.set_updater("add")
        for step in range(workers):
            kv.push("w", full(10) if kv.rank == step else ABSENT)
            same(kv.pull("w"), 1.0 + 10 * (step + 1), f"rank {step} alone")
        kv.push("w", ABSENT)
        same(kv.pull("w"), 1.0 + 10 * workers, "all absent")
        assert (kv.info("w").round, kv.info("w").version) == (workers + 1, workers)

    in_workers(maker, workers, work)


@check(workers=SEVERAL)
def check_barrier(maker: StoreMaker, workers: int) -> None:
    """No worker passes before all have arrived, and all earlier pushes are applied by then."""
    there: list[int] = []

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init("w", full(0))
        kv.set_updater("add")
        kv.barrier()
        for step in range(1, 6):
            kv.push("w", full(1))
            there.append(kv.rank)
            kv.barrier()
            assert len(there) >= step * workers, f"passed the barrier with {len(there)} there"
            same(kv.pull("w"), float(step * workers), f"after barrier {step}")
            kv.barrier()
        info = kv.info("w")
        assert info.version == (5 * workers if maker.is_async else 5)

    in_workers(maker, workers, work)


@check(workers=SEVERAL)
def check_barriers_of_threads(maker: StoreMaker, workers: int) -> None:
    """Each thread's barrier counts: it meets one of every other worker, and none is lost."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        def meet() -> None:
            for _ in range(5):
                kv.barrier(timeout_s=DEADLINE_S)

        in_threads([meet] * 3)

    in_workers(maker, workers, work)


@check(workers=SEVERAL)
def check_barrier_timeout(maker: StoreMaker, workers: int) -> None:
    """A barrier that not all workers reach raises an error that names the missing ones."""

    def work(kv: KVStore, meeting: Meeting) -> str:
        text = ""
        if kv.rank != workers - 1:
            try:
                kv.barrier(timeout_s=IN_TIME_S)
            except WaitTimeout as exc:
                text = str(exc)
        meeting.everybody()
        return text

    for text in in_workers(maker, workers, work)[:-1]:
        assert str(workers - 1) in text, f"the text does not name worker {workers - 1}: {text!r}"


@check(workers=SEVERAL)
def check_barrier_without_those_who_left(maker: StoreMaker, workers: int) -> None:
    """A barrier waits for a worker until it leaves."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init("w", full(0))
        meeting.everybody()
        if kv.rank == workers - 1:
            return  # the maker closes the store
        kv.barrier()
        kv.barrier()

    in_workers(maker, workers, work)


@check(workers=SEVERAL)
def check_many_keys_of_workers(maker: StoreMaker, workers: int) -> None:
    """Every worker pushes a thousand keys in one call, each in its own order."""
    names = list(range(1000))

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init(names, [full(0, 8)] * 1000)
        kv.set_updater("add")
        mine = names[::-1] if kv.rank else names
        kv.push({key: full(key, 8) for key in mine})
        kv.barrier()
        values = torch.stack(kv.pull(names))
        same(values, torch.arange(1000.0)[:, None].expand(1000, 8) * workers, "the values")
        assert kv.keys() == names

    in_workers(maker, workers, work)


@check(workers=SEVERAL)
def check_large_values_of_workers(maker: StoreMaker, workers: int) -> None:
    """Values of several MB give the same sums, sliced or whole."""
    size = 600_011
    parts = [noise(rank, size) for rank in range(workers)]
    expected = parts[0]
    for part in parts[1:]:
        expected = expected + part

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init("cut", torch.zeros(size))
        kv.init("whole", torch.zeros(size), whole=True)
        if maker.is_async:
            kv.set_updater("add")
        for _ in range(1 if maker.is_async else 2):
            kv.push(["cut", "whole"], [parts[kv.rank], parts[kv.rank]])
        kv.barrier()
        for key in ("cut", "whole"):
            value = kv.pull(key)
            if maker.is_async:  # in order of arrival
                assert torch.allclose(value, expected, rtol=1e-4, atol=1e-3), key
            else:
                same(value, expected, key)
        assert kv.info("whole").num_slices == 1

    in_workers(maker, workers, work)


@check(workers=(1, *SEVERAL), only="sync")
def check_a_bound_step_does_what_the_verbs_do(maker: StoreMaker, workers: int) -> None:
    """Steps and verbs by turns, with tensors that stay, are replaced, and are refused."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init({"w": full(0), "b": full(0, 5)})
        kv.set_updater("add")
        pushed, mine = {"w": full(1), "b": full(2, 5)}, {"b": full(0, 5), "w": full(0)}
        step = kv.bind(push=pushed, out=mine)
        for number in range(1, 6):
            step.push()
            assert step.pull() is mine
            assert step.pushpull() is mine
            kv.push(pushed)
            kv.pull(out=mine)
            same(mine["w"], 3.0 * number * workers, "w")
            same(mine["b"], 6.0 * number * workers, "b")
            if number % 2:
                pushed["w"], mine["b"] = full(1), full(0, 5)
        pushed["w"] = full(1, 7)
        raises(ShapeMismatch, lambda: step.push(), "'w'")
        raises(ShapeMismatch, lambda: step.pushpull(), "'w'")
        same(kv.pull("w"), 15.0 * workers, "w after a step that was refused")

    in_workers(maker, workers, work)
