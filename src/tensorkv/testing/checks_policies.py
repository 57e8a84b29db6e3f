"""Checks of policies: when a push counts, and what a pull waits for, where not every round waits for all."""

from __future__ import annotations

from tensorkv.errors import NotSupported
from tensorkv.keys import ABSENT
from tensorkv.store import KVStore
from tensorkv.testing.checks_rounds import SEVERAL, assert_waits
from tensorkv.testing.suite import Meeting, StoreMaker, arrived, check, full, in_workers, raises, same

# ---- asynchronous -----------------------------------------------------------------------------------


@check(workers=(1, *SEVERAL), only="async")
def check_every_push_is_a_round(maker: StoreMaker, workers: int) -> None:
    """In an asynchronous kind each push is applied on its own, and none is lost."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init("w", full(0))
        kv.set_updater("add")
        seen = 0.0
        for step in range(1, 4 + kv.rank):
            kv.push("w", [full(1), full(1)])
            value = kv.pull("w")[0, 0].item()
            assert value >= max(seen, 2 * step), "a pull does not contain this worker's own pushes"
            seen = value
        kv.barrier()
        pushes = sum(3 + rank for rank in range(workers))
        same(kv.pull("w"), 2.0 * pushes)
        assert (kv.info("w").version, kv.info("w").round) == (pushes, pushes)

    in_workers(maker, workers, work)


@check(workers=SEVERAL, only="async")
def check_async_waits_for_nobody(maker: StoreMaker, workers: int) -> None:
    """A worker trains alone while the others do nothing."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init("w", full(0))
        meeting.everybody()
        if kv.rank == 1:
            for step in range(5):
                kv.push("w", full(step))
                same(kv.pull("w"), float(step))
        meeting.everybody()
        same(kv.pull("w"), 4.0)
        kv.push("w", ABSENT)
        kv.barrier()
        assert (kv.info("w").round, kv.info("w").version) == (5 + workers, 5)

    in_workers(maker, workers, work)


@check(workers=SEVERAL, only="async")
def check_async_mean(maker: StoreMaker, workers: int) -> None:
    """In an asynchronous kind a mean is over the devices of one push."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init("w", full(0))
        kv.set_updater("add")
        kv.push("w", [full(1), full(3)])
        kv.barrier()
        same(kv.pull("w"), 2.0 * workers)
        kv.barrier()
        kv.push("w", [full(1), full(3)], weight=10 + kv.rank)
        kv.barrier()
        same(kv.pull("w"), 4.0 * workers, "the weight of a round's only push cancels")

    in_workers(maker, workers, work, reduction="mean")


@check(workers=SEVERAL, only="async", policies=True)
def check_bounded_staleness(maker: StoreMaker, workers: int) -> None:
    """A pull waits until each worker is at most `staleness` pushes behind; to push nothing counts."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init("w", full(0))
        kv.set_updater("add")
        kv.barrier()
        if kv.rank == 0:
            kv.push("w", full(1))
            same(kv.pull("w"), 1.0, "one push ahead is allowed")
            kv.push("w", full(1))
            waiting = assert_waits(kv.pull("w", async_op=True), "a pull that is two pushes ahead")
            meeting.signal("waits")
            same(waiting.result(), 2.0 + workers - 2, "the pull that waited")
        else:
            meeting.wait_for("waits")
            kv.push("w", ABSENT if kv.rank == 1 else full(1))
            kv.pull("w")
        kv.barrier()
        assert kv.info("w").late == 0

    in_workers(maker, workers, work, staleness=1)


# ---- quorum -----------------------------------------------------------------------------------------


@check(workers=SEVERAL, only="sync", policies=True)
def check_a_round_merges_with_a_quorum(maker: StoreMaker, workers: int) -> None:
    """A round does not wait for the last worker, whose push then is dropped; its next one counts."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        last = kv.rank == workers - 1
        kv.init("w", full(0))
        kv.set_updater("add")
        kv.barrier()
        if last:
            meeting.wait_for("merged")
            kv.push("w", full(100))
            same(kv.pull("w"), 1.0, "a pull after a push that was dropped")
        else:
            same(kv.pushpull("w", full(1)), 1.0, "the mean of all but the last")
            if kv.rank == 0:
                meeting.signal("merged")
        meeting.everybody()
        assert (kv.info("w").round, kv.info("w").late) == (1, 1)
        kv.barrier()
        if last:
            kv.push("w", full(3))
            arrived(kv, "w")
        meeting.everybody()  # now its push is the first of the next round
        if not last:
            kv.push("w", ABSENT)
        same(kv.pull("w"), 4.0, "a round of the last worker's push and of nothing")
        kv.barrier()
        assert kv.info("w").late == 2, "the last worker's first push, and one of those of nothing"

    in_workers(maker, workers, work, reduction="mean", quorum=max(1, workers - 1))


@check(workers=SEVERAL, only="sync", policies=True)
def check_a_late_push_is_carried(maker: StoreMaker, workers: int) -> None:
    """With late="carry" a late push counts in the open round, once."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init("w", full(0))
        kv.set_updater("add")
        kv.barrier()
        if kv.rank == 0:
            same(kv.pushpull("w", full(1)), 1.0, "a round of one")
            meeting.signal("merged")
        else:
            meeting.wait_for("merged")
            value = kv.pushpull("w", full(10))
            assert value[0, 0].item() in {1.0 + 10 * count for count in range(1, workers)}
        kv.barrier()
        same(kv.pull("w"), 1.0 + 10 * (workers - 1), "every push counts once")
        assert kv.info("w").late >= 1

    in_workers(maker, workers, work, quorum=1, late="carry")


@check(workers=SEVERAL, only="sync", policies=True)
def check_a_quorum_waits_for_its_time_of_grace(maker: StoreMaker, workers: int) -> None:
    """Within the time of grace a round still waits for all; when all have pushed it merges at once."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init("w", full(0))
        kv.set_updater("add")
        for step in range(1, 4):
            same(kv.pushpull("w", full(1)), float(step * workers))
        assert kv.info("w").late == 0

    in_workers(maker, workers, work, quorum=1, grace_s=3600.0)


@check(workers=SEVERAL, only="sync", policies=True)
def check_a_round_is_not_held_up_longer_than_its_grace(maker: StoreMaker, workers: int) -> None:
    """A worker that pushes nothing holds no round up."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init("w", full(0))
        kv.set_updater("add")
        kv.barrier()
        if kv.rank == 0:
            for step in range(1, 4):
                same(kv.pushpull("w", full(1)), float(step))
        meeting.everybody()
        same(kv.pull("w"), 3.0)

    in_workers(maker, workers, work, quorum=1, grace_s=0.01)


@check(workers=(2,), only="sync", policies=True)
def check_a_quorum_has_no_commit(maker: StoreMaker, workers: int) -> None:
    """A round that may lack a worker's push cannot wait for a commit."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init("w", full(0))
        raises(NotSupported, lambda: kv.push("w", full(1), apply=False))
        raises(NotSupported, lambda: kv.commit())
        same(kv.pull("w"), 0.0)

    in_workers(maker, workers, work, quorum=2)
