"""Checks of several workers: agreement on settings, init and commit; delete; errors; stores."""

from __future__ import annotations

import functools
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from tensorkv.errors import (
    CommitMismatch,
    DtypeMismatch,
    InvalidArgument,
    KeyAlreadyInitialized,
    KeyNotInitialized,
    SettingMismatch,
    StoreMismatch,
    TensorKVError,
    UncommittedPush,
    UpdaterError,
)
from tensorkv.keys import ABSENT
from tensorkv.store import CommitResult, KVStore
from tensorkv.testing.checks_rounds import SEVERAL, assert_waits
from tensorkv.testing.suite import (
    DEADLINE_S,
    Meeting,
    StoreMaker,
    arrived,
    check,
    close,
    full,
    in_workers,
    keep_half,
    noise,
    raises,
    refuse_negative,
    same,
)

# ---- init -----------------------------------------------------------------------------------------


@check(workers=SEVERAL)
def check_rank_0_initialises(maker: StoreMaker, workers: int) -> None:
    """Rank 0's value counts, and init on another rank waits for it."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        if kv.rank == 0:
            kv.init("w", full(5))
            meeting.wait_for("1 came first")
            kv.init("b", full(7, 3))
        else:
            kv.init("w", full(-1))
            meeting.signal("1 came first")
            kv.init("b", full(kv.rank, 3))
        same(kv.pull("w"), 5.0)
        same(kv.pull("b"), full(7, 3))
        same(kv.broadcast("c", full(kv.rank + 2), full(0)), 2.0, "broadcast")
        assert kv.keys() == ["w", "b", "c"]

    in_workers(maker, workers, work)


@check(workers=SEVERAL)
def check_init_must_agree(maker: StoreMaker, workers: int) -> None:
    """An init with another shape or dtype than rank 0's is refused on its rank, and changes nothing."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        if kv.rank != 1:
            kv.init("w", full(5))
            kv.init("b", full(6, 3))
        else:
            raises(SettingMismatch, lambda: kv.init("w", full(5, 3, 2)), "'w'", "(3, 2)", "(2, 3)")
            raises(SettingMismatch, lambda: kv.init("b", full(6, 3, dtype=torch.float64)), "'b'", "float64")
        meeting.everybody()
        same(kv.pull("w"), 5.0)
        kv.set_updater("add")
        meeting.everybody()
        kv.push("w", full(1))
        kv.barrier()
        same(kv.pull("w"), 5.0 + workers)
        assert kv.info("b").dtype == torch.float32 and kv.keys() == ["w", "b"]

    in_workers(maker, workers, work)


@check(workers=SEVERAL)
def check_keys_used_without_init(maker: StoreMaker, workers: int) -> None:
    """A rank may use a key that it did not init, once rank 0 has; before, the key does not exist."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        if kv.rank == 1:
            raises(KeyNotInitialized, lambda: kv.push("w", full(1)), "'w'")
        meeting.everybody()
        if kv.rank == 0:
            kv.init(["w", "b"], [full(5), full(6, 4)])
            kv.set_updater("add")
            raises(KeyAlreadyInitialized, lambda: kv.init("w", full(5)), "'w'")
        meeting.everybody()
        assert kv.keys() == ["w", "b"] and "w" in kv and kv.info("b").shape == (4,)
        kv.push(["b", "w"], [full(1, 4), full(1)])
        kv.barrier()
        same(kv.pull("w"), 5.0 + workers)
        same(kv.pull("b"), full(6 + workers, 4))

    in_workers(maker, workers, work)


# ---- settings --------------------------------------------------------------------------------------


@check(workers=SEVERAL, only="sync")
def check_setting_holds_from_the_next_push_of_rank_0(maker: StoreMaker, workers: int) -> None:
    """A setting applies from the first round rank 0 pushes after it, whatever others have pushed already."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init(["w", "b"], [full(10), full(10)])
        meeting.everybody()
        if kv.rank == 0:
            kv.push("w", full(1))  # round 1 of w: still assign
            meeting.wait_for("pushed")
            kv.set_updater("add")
            meeting.signal("set")
            kv.push("b", full(1))  # round 1 of b: add, though others pushed before the setting
        else:
            kv.push("b", full(1))
            arrived(kv, "b")
            if kv.rank == 1:
                meeting.signal("pushed")
            meeting.wait_for("set")
            kv.push("w", full(1))
        same(kv.pull("w"), float(workers), "the round rank 0 pushed before the setting")
        same(kv.pull("b"), 10.0 + workers, "the round rank 0 pushed after it")
        kv.push("w", full(1))
        same(kv.pull("w"), 2.0 * workers, "the next round")

    in_workers(maker, workers, work)


@check(workers=SEVERAL)
def check_settings_must_agree(maker: StoreMaker, workers: int) -> None:
    """The k-th setting of a rank is compared with rank 0's k-th, which it waits for."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init("w", full(0))
        if kv.rank == 0:
            meeting.wait_for("1 sets")
            kv.set_updater("add")
            kv.set_optimizer("sgd", lr=0.5)
            kv.set_optimizer_options(lr=1.0)
        elif kv.rank == 1:
            meeting.signal("1 sets")
            raises(SettingMismatch, lambda: kv.set_updater("assign"), "assign", "add")
            kv.set_updater("add")  # the refused setting does not count
            raises(SettingMismatch, lambda: kv.set_optimizer("sgd", lr=0.25), "0.25", "0.5")
            kv.set_optimizer("sgd", lr=0.5)
            kv.set_optimizer_options(lr=1.0)
        meeting.everybody()
        kv.push("w", full(1))
        kv.barrier()
        same(kv.pull("w"), -1.0 * workers, "after rank 0's settings")

    in_workers(maker, workers, work)


@check(workers=SEVERAL)
def check_optimizers_made_by_every_rank(maker: StoreMaker, workers: int) -> None:
    """Each rank passes an optimizer made for its own model; one that differs is refused."""

    def made(slow: torch.nn.Parameter, fast: torch.nn.Parameter) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = [{"params": [slow]}, {"params": [fast], "lr": 1.0}]
        return torch.optim.SGD(groups, lr=0.5)

    def work(kv: KVStore, meeting: Meeting) -> None:
        first, second = torch.nn.Parameter(full(0)), torch.nn.Parameter(full(kv.rank))
        kv.init({"a": first, "b": second})
        if kv.rank == 0:
            meeting.wait_for("1 sets")
        elif kv.rank == 1:
            meeting.signal("1 sets")
            raises(SettingMismatch, lambda: kv.set_optimizer(made(second, first)), "'a'", "'b'")
        kv.set_optimizer(made(first, second))
        meeting.everybody()
        kv.push({"a": full(1), "b": full(1)})
        kv.barrier()
        same(kv.pull("a"), -0.5 * workers)
        same(kv.pull("b"), -1.0 * workers)

    in_workers(maker, workers, work)


@check(workers=SEVERAL)
def check_followers_need_no_settings(maker: StoreMaker, workers: int) -> None:
    """A rank that makes no settings works with those of rank 0."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init("w", full(0))
        if kv.rank == 0:
            kv.set_optimizer(torch.optim.SGD, lr=0.5)
        meeting.everybody()
        for _ in range(3):
            kv.push("w", full(1))
        kv.barrier()
        same(kv.pull("w"), -1.5 * workers)

    in_workers(maker, workers, work)


@check(workers=SEVERAL, only="async")
def check_setting_holds_when_the_call_returns(maker: StoreMaker, workers: int) -> None:
    """In an asynchronous kind a push after the call uses the new setting, on any rank."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init(["a", "b", "c"], [full(0)] * 3)
        expected = 0.0
        for turn in range(1, 11):
            adds = turn % 2 == 0
            expected = expected + turn if adds else turn
            kv.set_updater("add" if adds else "assign")
            if kv.rank == 1:
                for value in kv.pushpull(["a", "b", "c"], [full(turn)] * 3):
                    same(value, float(expected), f"turn {turn}")
            meeting.everybody()

    in_workers(maker, workers, work)


@check(workers=SEVERAL, only="sync")
def check_optimizer_on_the_sum(maker: StoreMaker, workers: int) -> None:
    """An optimizer sees one gradient per round: the sum over the workers."""
    start, steps = noise(0, 6, 5), 4

    def gradient(rank: int, step: int) -> torch.Tensor:
        return noise(100 * rank + step, 6, 5)

    def work(kv: KVStore, meeting: Meeting) -> list[torch.Tensor]:
        kv.init("w", start)
        kv.set_optimizer("adam", lr=0.1)
        return [kv.pushpull("w", gradient(kv.rank, step)) for step in range(steps)]

    results = in_workers(maker, workers, work)
    parameter = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([parameter], lr=0.1)
    for step in range(steps):
        total = gradient(0, step)
        for rank in range(1, workers):
            total = total + gradient(rank, step)
        parameter.grad = total
        optimizer.step()
        for rank in range(workers):
            close(results[rank][step], parameter.detach(), f"rank {rank} after step {step}")
            same(results[rank][step], results[0][step], f"rank {rank} beside rank 0")


# ---- commit ----------------------------------------------------------------------------------------


@check(workers=SEVERAL, only="sync")
def check_commit_of_workers(maker: StoreMaker, workers: int) -> None:
    """A commit clips the sum over all workers, keys and servers; absent workers take part."""
    shapes = {"a": (5, 4), "b": (9,), "c": (2, 2, 2)}

    def gradients(rank: int) -> dict[str, torch.Tensor]:
        return {
            key: noise(10 * rank + index, *shape, dtype=torch.float64)
            for index, (key, shape) in enumerate(shapes.items())
        }

    def work(kv: KVStore, meeting: Meeting) -> tuple[float | None, list[torch.Tensor]]:
        kv.init({key: torch.zeros(shape, dtype=torch.float64) for key, shape in shapes.items()})
        mine: dict[str, Any] = gradients(kv.rank)
        if kv.rank == 1:
            mine["b"] = ABSENT
        kv.push(mine, apply=False)
        result = kv.commit(max_norm=1.5)
        assert result.applied
        return result.norm, kv.pull(list(shapes))

    results = in_workers(maker, workers, work)
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes.values()]
    for key, parameter in zip(shapes, parameters, strict=True):
        ranks = [rank for rank in range(workers) if (key, rank) != ("b", 1)]
        parameter.grad = torch.stack([gradients(rank)[key] for rank in ranks]).sum(0)
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.5).item()
    for rank, (found, values) in enumerate(results):
        assert found is not None and abs(found - norm) <= 1e-9 * norm, f"rank {rank}: {found}, not {norm}"
        for parameter, value in zip(parameters, values, strict=True):
            assert parameter.grad is not None
            close(value, parameter.grad, f"rank {rank}", rtol=1e-9)


@check(workers=SEVERAL, only="sync")
def check_commit_skip_is_ored(maker: StoreMaker, workers: int) -> None:
    """One worker that asks to skip, or one NaN of one worker, drops the round for all."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init(["w", "b"], [full(1), full(2)])
        kv.set_updater("add")
        kv.push(["w", "b"], [full(5), full(5)], apply=False)
        assert not kv.commit(skip=kv.rank == workers - 1).applied
        same(kv.pull("w"), 1.0, "after skip")
        bad = float("nan") if kv.rank == 1 else 1.0
        kv.push(["w", "b"], [full(5), full(bad)], apply=False)
        assert not kv.commit(check_finite=True).applied
        same(kv.pull("w"), 1.0, "after a NaN")
        same(kv.pull("b"), 2.0, "after a NaN")
        kv.push(["w", "b"], [full(5), full(5)], apply=False)
        assert kv.commit(check_finite=True).applied
        same(kv.pull("w"), 1.0 + 5 * workers)
        assert (kv.info("w").round, kv.info("w").version) == (3, 1)

    in_workers(maker, workers, work)


@check(workers=SEVERAL, only="sync")
def check_commit_measures(maker: StoreMaker, workers: int) -> None:
    """With apply=False every rank gets the norm and nothing changes; what was pushed waits for the next."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init(["a", "b"], [full(0, 1), full(0, 1)])
        kv.set_updater("add")
        for round_ in (1, 2):
            kv.push({"a": full(3.0, 1), "b": full(4.0, 1)}, apply=False)
            for _ in range(2):
                assert kv.commit(apply=False) == CommitResult(applied=False, norm=5.0 * workers)
            raises(UncommittedPush, lambda: kv.pull("a"), "commit")
            assert (kv.info("a").round, kv.info("b").version) == (round_ - 1, round_ - 1)
            raises(CommitMismatch, lambda: kv.commit(apply=kv.rank != 0), "apply")
            assert kv.commit().applied
            same(kv.pull("a"), 3.0 * workers * round_)
        raises(InvalidArgument, lambda: kv.commit(apply=False, max_norm=1.0), "measures")

    in_workers(maker, workers, work)


@check(workers=SEVERAL, only="sync")
def check_commit_must_agree(maker: StoreMaker, workers: int) -> None:
    """Different keys or max_norm raise on every rank and commit nothing; a correct retry works."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init(["a", "b"], [full(0), full(0)])
        kv.push("a", full(1), apply=False)
        raises(CommitMismatch, lambda: kv.commit(max_norm=1.0 + kv.rank), "max_norm")
        if kv.rank == 1:
            kv.push("b", full(1), apply=False)
        raises(CommitMismatch, kv.commit, "'b'")
        if kv.rank != 1:
            kv.push("b", full(1), apply=False)
        assert kv.info("a").version == kv.info("b").version == 0
        assert kv.commit().applied
        same(kv.pull("a"), float(workers))
        same(kv.pull("b"), float(workers))

    in_workers(maker, workers, work)


@check(workers=SEVERAL, only="sync")
def check_commit_cannot_scale_integers_of_workers(maker: StoreMaker, workers: int) -> None:
    """max_norm over an integer key is refused on every rank; a retry without it commits the round."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init(["a", "n"], [full(0), torch.tensor([0])])
        kv.push(["a", "n"], [full(3), torch.tensor([2]) if kv.rank == 1 else ABSENT], apply=False)
        raises(DtypeMismatch, lambda: kv.commit(max_norm=1.0), "'n'", "int64", "max_norm")
        assert kv.info("a").round == kv.info("n").round == 0
        assert kv.commit().applied
        same(kv.pull("a"), 3.0 * workers)
        same(kv.pull("n"), torch.tensor([2]))

    in_workers(maker, workers, work)


# ---- delete ----------------------------------------------------------------------------------------


@check(workers=SEVERAL, only="sync")
def check_delete_is_leaving(maker: StoreMaker, workers: int) -> None:
    """A worker that deletes a key is waited for no more; what it pushed counts; the others go on."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init(["w", "b", "c"], [full(0), full(0), full(0)])
        if kv.rank == workers - 1:
            kv.push("w", full(1))
            pulled = assert_waits(kv.pull("w", async_op=True), "the pull")
            kv.delete("w")
            assert kv.keys() == ["b", "c"] and len(kv) == 2 and "w" not in kv
            for call in (kv.pull, kv.info, kv.delete, lambda key: kv.push(key, full(1))):
                raises(KeyNotInitialized, functools.partial(call, "w"), "'w'")
            meeting.signal("deleted")
            same(pulled.result(), float(workers), "a pull that was called before the delete")
            meeting.wait_for("waiting")
            kv.delete("b")
            return
        meeting.wait_for("deleted")
        assert kv.keys() == ["w", "b", "c"] and len(kv) == 3 and "w" in kv
        same(kv.pushpull("w", full(1)), float(workers), "with the push of who has deleted the key")
        same(kv.pushpull("w", full(1)), workers - 1.0, "a round of those that have not")
        kv.push("b", full(1))
        pulled = kv.pull("b", async_op=True)
        if kv.rank == 0:
            assert_waits(pulled, "the pull")
            meeting.signal("waiting")
        same(pulled.result(), workers - 1.0, "without the push of who has deleted the key")

    in_workers(maker, workers, work)


@check(workers=SEVERAL, only="sync")
def check_delete_drops_uncommitted(maker: StoreMaker, workers: int) -> None:
    """A push that waits for a commit is dropped with the key, and the others commit without it."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init(["w", "b"], [full(0), full(0)])
        kv.push(["w", "b"], [full(1), full(2)], apply=False)
        if kv.rank == 1:
            kv.delete("w")
        assert kv.commit().applied
        same(kv.pull("b"), 2.0 * workers, "the key that all have committed")
        if kv.rank != 1:
            same(kv.pull("w"), workers - 1.0, "the key that one has deleted")

    in_workers(maker, workers, work)


@check(workers=SEVERAL)
def check_init_after_delete_waits_for_all(maker: StoreMaker, workers: int) -> None:
    """A name is free again when every worker has deleted the key, also those that have not used it."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        if kv.rank == 0:
            kv.init("w", full(1))
        meeting.everybody()
        if kv.rank == 0:
            kv.delete("w")
            meeting.signal("deleted")
            with ThreadPoolExecutor(1) as pool:
                made = pool.submit(kv.init, "w", full(3, 4))
                meeting.wait_for("seen")
                assert not made.done(), "init has not waited for the others' delete"
                meeting.signal("go on")
                made.result(DEADLINE_S)
        else:
            meeting.wait_for("deleted")
            if kv.rank == 1:
                same(kv.pull("w"), 1.0, "the key that only rank 0 has deleted")
                meeting.signal("seen")
            meeting.wait_for("go on")
            kv.delete("w")
            kv.init("w", full(0, 4))
        same(kv.pull("w"), full(3, 4), "the key that was made anew")
        assert kv.info("w").round == 0
        meeting.everybody()
        kv.push("w", full(2, 4))
        kv.barrier()
        same(kv.pull("w"), full(2.0 if maker.is_async else 2.0 * workers, 4), "a round of the new key")

    in_workers(maker, workers, work)


@check(workers=SEVERAL)
def check_leaving_is_deleting(maker: StoreMaker, workers: int) -> None:
    """A worker that has closed the store need not delete its keys."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init("w", full(1))
        meeting.everybody()
        if kv.rank == 1:
            kv.close()
            return
        kv.delete("w")
        kv.init("w", full(5))
        same(kv.pull("w"), 5.0, "the key that was made anew")

    in_workers(maker, workers, work)


# ---- several stores --------------------------------------------------------------------------------


@check(workers=SEVERAL)
def check_stores_of_workers(maker: StoreMaker, workers: int) -> None:
    """A job has several stores, each of its own kind, rounds, settings and members."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init("w", full(0))
        for turn in range(2):
            with maker.open(kv, maker.other_kind, "beside") as other:
                other.init("w", full(10, 4))
                other.set_updater("add")
                other.barrier()
                other.push("w", full(1, 4))
                other.barrier()
                same(other.pull("w"), full(10 + workers, 4), f"the other store, turn {turn}")
                other.barrier()
            meeting.everybody()  # all have closed it: the name starts empty again
        kv.push("w", full(1))
        kv.barrier()
        same(kv.pull("w"), 1.0 if maker.is_async else float(workers), "the first store")

    in_workers(maker, workers, work)


@check(workers=SEVERAL)
def check_stores_must_agree(maker: StoreMaker, workers: int) -> None:
    """Opening a name with another kind or reduction is refused, and the open store goes on."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        if kv.rank == 0:
            with maker.open(kv, maker.kind, "beside") as other:
                meeting.signal("open")
                meeting.wait_for("refused")
                other.init("w", full(1))
                meeting.signal("used")
        elif kv.rank == 1:
            meeting.wait_for("open")
            raises(StoreMismatch, lambda: maker.open(kv, maker.other_kind, "beside"), "beside")
            raises(StoreMismatch, lambda: maker.open(kv, maker.kind, "beside", reduction="mean"), "mean")
            meeting.signal("refused")
        meeting.wait_for("used")
        kv.init("w", full(2))
        same(kv.pull("w"), 2.0)

    in_workers(maker, workers, work)


# ---- an updater that raises -------------------------------------------------------------------------


@check(workers=SEVERAL, only="sync")
def check_updater_error_of_workers(maker: StoreMaker, workers: int) -> None:
    """Each contributor gets the error once; value and version stay as they were, and the round counts."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init(["w", "b"], [full(1), full(1)])
        kv.set_updater(refuse_negative)
        kv.push(["w", "b"], [full(-1), full(1)])
        raises(UpdaterError, lambda: kv.pull("w"), "'w'", "negative gradient", "Traceback")
        same(kv.pull("w"), 1.0, "the value after the updater raised")
        same(kv.pull("b"), 1.0 + workers, "the other key")
        assert (kv.info("w").round, kv.info("w").version) == (1, 0)
        kv.push("w", full(2))
        same(kv.pull("w"), 1.0 + 2 * workers, "the next round")
        kv.push("w", full(-1))
        raises(UpdaterError, kv.barrier, "'w'", "negative gradient")
        meeting.everybody()
        kv.barrier()

    in_workers(maker, workers, work)


@check(workers=SEVERAL, only="async")
def check_updater_error_of_one_worker(maker: StoreMaker, workers: int) -> None:
    """In an asynchronous kind only the worker whose push failed gets the error."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init("w", full(1))
        kv.set_updater(refuse_negative)
        meeting.everybody()

        def step(value: float) -> None:
            kv.push("w", full(value))
            kv.pull("w")

        if kv.rank == 1:
            raises(UpdaterError, lambda: step(-1), "negative gradient")
        else:
            step(1)
        kv.barrier()
        same(kv.pull("w"), float(workers))
        assert (kv.info("w").round, kv.info("w").version) == (workers, workers - 1)

    in_workers(maker, workers, work)


@check(workers=SEVERAL)
def check_refused_calls_change_nothing(maker: StoreMaker, workers: int) -> None:
    """A worker whose push was refused has not contributed: its next push is the same round."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init(["w", "b"], [full(0), full(0)])
        kv.set_updater(keep_half if not maker.is_async else "add")
        for _ in range(2):
            if kv.rank == 0:
                raises(TensorKVError, lambda: kv.push(["w", "b"], [full(1), full(1, 3)]), "(3,)")
                raises(TensorKVError, lambda: kv.push(["w", "x"], [full(1), full(1)]), "'x'")
            kv.push(["w", "b"], [full(2), full(2)])
        kv.barrier()
        for value in kv.pull(["w", "b"]):
            same(value, (4.0 if maker.is_async else 3.0) * workers)

    in_workers(maker, workers, work)


@check(workers=(2,))
def check_an_exit_in_good_order_inside_with(maker: StoreMaker, workers: int) -> None:
    """sys.exit() and sys.exit(0) inside a `with` are a leave, not a loss: the others go on."""

    def work(kv: KVStore) -> None:
        kv.init("w", full(0))
        kv.set_updater("add")
        try:
            with kv:
                kv.push("w", full(1))
                kv.barrier()
                if kv.rank == 0:
                    sys.exit()
                kv.push("w", full(1))
                same(kv.pull("w"), 3.0)
                sys.exit(0)
        except SystemExit:
            assert kv.closed

    maker.run(work, workers)
