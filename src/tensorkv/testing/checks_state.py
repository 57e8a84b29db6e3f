"""Checks of putting, saving and loading: what is done to values, and their state, outside rounds."""

from __future__ import annotations

from typing import Any

import torch

from tensorkv.store import KVStore
from tensorkv.testing.suite import Meeting, StoreMaker, arrived, check, full, in_one, in_workers, noise, same


@check()
def check_put(maker: StoreMaker) -> None:
    """put replaces values in every form; rounds stay, the version goes up by one, no updater runs."""

    def work(kv: KVStore) -> None:
        kv.init({"a": full(1), "b": full(2, 4), "n": torch.tensor([1, 2])})
        kv.set_updater("add")
        kv.push("a", full(1))
        one = full(5)
        kv.put("a", one)
        one.zero_()  # the store has kept nothing of it
        same(kv.pull("a"), 5.0, "a")
        info = kv.info("a")
        assert (info.round, info.version) == (1, 2), info
        kv.put(["b", "n"], [full(6, 4), torch.tensor([7, 8])])
        kv.put({"a": full(9).t().contiguous().t()})
        same(kv.pull("a"), 9.0, "a")
        same(kv.pull("b"), full(6, 4), "b")
        same(kv.pull("n"), torch.tensor([7, 8]), "n")
        kv.put("a", full(0.5, dtype=torch.float64))
        same(kv.pull("a"), full(0.5), "a, put as float64")
        kv.push("a", full(1))
        same(kv.pull("a"), 1.5, "a, after the next push")
        info = kv.info("a")
        assert (info.round, info.version) == (2, 5), info

    in_one(maker, work)


@check()
def check_put_keeps_optimizer_state(maker: StoreMaker) -> None:
    """The optimizer goes on with its state from the value that was put."""

    def work(kv: KVStore) -> None:
        kv.set_optimizer(torch.optim.SGD, lr=1.0, momentum=0.5)
        kv.init("w", full(0))
        kv.push("w", full(1))
        kv.put("w", full(10))
        kv.push("w", full(1))
        same(kv.pull("w"), 8.5)

    in_one(maker, work)


@check()
def check_put_of_large_values(maker: StoreMaker) -> None:
    """Values in many slices, and views of other memory, are put whole."""
    wide = noise(1, 1500, 1000)

    def work(kv: KVStore) -> None:
        kv.init(["w", "v"], [torch.zeros(1000, 1500), torch.zeros(1_300_000)])
        kv.put(["w", "v"], [wide.t(), wide.flatten()[:1_300_000]])
        same(kv.pull("w"), wide.t().contiguous(), "w")
        same(kv.pull("v"), wide.flatten()[:1_300_000], "v")
        assert kv.info("w").version == 1

    in_one(maker, work)


@check(workers=(2, 3))
def check_put_of_one_worker(maker: StoreMaker, workers: int) -> None:
    """One worker puts; the others see it, and the next round builds on it."""

    def work(kv: KVStore, meeting: Meeting) -> Any:
        kv.init("w", full(1))
        kv.set_updater("add")
        meeting.everybody()
        if kv.rank == workers - 1:
            kv.put("w", full(10))
        meeting.everybody()
        same(kv.pull("w"), 10.0, "after the put")
        meeting.everybody()
        kv.push("w", full(1))
        kv.barrier()
        same(kv.pull("w"), 10.0 + workers, "after the next round")

    in_workers(maker, workers, work)


@check(workers=(2,), only="sync")
def check_put_in_an_open_round(maker: StoreMaker, workers: int) -> None:
    """A put while a round is open takes effect before that round does."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init("w", full(1))
        kv.set_updater("add")
        meeting.everybody()
        if kv.rank == 1:
            kv.push("w", full(2))
            arrived(kv, "w")
            meeting.everybody()
        else:
            meeting.everybody()
            kv.put("w", full(100))
            kv.push("w", full(3))
        same(kv.pull("w"), 105.0)
        info = kv.info("w")
        assert (info.round, info.version) == (1, 2), info

    in_workers(maker, workers, work)


@check(workers=(2,), only="sync")
def check_put_after_own_push(maker: StoreMaker, workers: int) -> None:
    """A put comes after what this worker pushed before, also where that round waits for somebody."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init("w", full(1))
        kv.set_updater("add")
        meeting.everybody()
        if kv.rank == 0:
            kv.push("w", full(2))
            kv.put("w", full(50))
            meeting.everybody()
        else:
            kv.push("w", full(3))
            meeting.everybody()
        same(kv.pull("w"), 50.0)

    in_workers(maker, workers, work)
