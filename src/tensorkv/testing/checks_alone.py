"""Checks of saves by one worker alone, while the others go on or stand still."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from typing import Any

import torch

from tensorkv.errors import InvalidArgument, NotSupported, UncommittedPush
from tensorkv.store import KVStore
from tensorkv.testing.suite import (
    Meeting,
    StoreMaker,
    arrived,
    check,
    full,
    in_one,
    in_workers,
    noise,
    raises,
    same,
)

SHAPES = {"w": (2, 3), "s": (), "large": (300_000,)}


def _start(kv: KVStore) -> None:
    """Two optimizers, one with state for each element and as a whole, on small and large values."""
    kv.set_optimizer(torch.optim.SGD, lr=0.5, momentum=0.5)
    kv.set_optimizer("adam", keys=["large"], lr=0.25, eps=0.5)
    kv.init({key: noise(place, *shape) for place, (key, shape) in enumerate(SHAPES.items())})


def _gradients(kv: KVStore, step: int) -> dict[str, torch.Tensor]:
    return {
        key: noise(100 * step + 10 * kv.rank + place, *shape)
        for place, (key, shape) in enumerate(SHAPES.items())
    }


def _steps(kv: KVStore, first: int, last: int) -> dict[str, torch.Tensor]:
    """Push the gradients of steps [first, last), and return all values."""
    for step in range(first, last):
        kv.push(_gradients(kv, step))
    kv.barrier()
    return {key: kv.pull(key) for key in SHAPES}


def _same_state(found: Any, expected: Any, where: str = "state") -> None:
    """Assert that two state dicts are alike bit by bit."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), f"{where} has {list(found)}, not {list(expected)}"
        for name, each in expected.items():
            _same_state(found[name], each, f"{where}, {name}")
    elif isinstance(expected, torch.Tensor):
        same(found, expected, where)
    else:
        assert found == expected, f"{where} is {found}, not {expected}"


@check(only="sync")
def check_save_alone(maker: StoreMaker) -> None:
    """The save of a single worker is the one that all make; a run that loads it goes on bit for bit."""

    def first(kv: KVStore) -> Any:
        _start(kv)
        _steps(kv, 0, 3)
        whole = kv.state_dict()
        _same_state(kv.state_dict(alone=True), whole)
        kv.save(folder, alone=True)
        raises(InvalidArgument, lambda: kv.save(folder, alone="yes"), "alone='yes'")  # type: ignore[arg-type]
        raises(InvalidArgument, lambda: kv.state_dict(alone=1), "alone=1")  # type: ignore[arg-type]
        return whole, _steps(kv, 3, 5)

    def second(kv: KVStore) -> None:
        kv.load(folder)
        _same_state(kv.state_dict(alone=True), whole)
        _same_state(_steps(kv, 3, 5), expected, "values")

    with tempfile.TemporaryDirectory() as folder:
        whole, expected = in_one(maker, first)
        in_one(maker, second)


@check(only="sync")
def check_uncommitted_push_is_not_saved_alone(maker: StoreMaker) -> None:
    """A push that awaits its commit is named; after the commit its round is saved."""

    def work(kv: KVStore) -> None:
        kv.init({"a": full(0), "b": full(0)})
        kv.set_updater("add")
        kv.push("a", full(1))
        kv.push("b", full(2), apply=False)
        raises(UncommittedPush, lambda: kv.state_dict(alone=True), "'b'", "commit")
        raises(UncommittedPush, lambda: kv.save(folder, alone=True), "'b'", "commit")
        assert not os.path.exists(folder), "a save that was refused has made its folder"
        kv.commit()
        same(kv.state_dict(alone=True)["values"]["b"], 2.0, "b, committed")

    with tempfile.TemporaryDirectory() as base:
        folder = os.path.join(base, "save")
        in_one(maker, work)


@check(only="async")
def check_async_is_not_saved_alone(maker: StoreMaker) -> None:
    """In an asynchronous kind no slice waits for its worker, so it cannot save alone."""

    def work(kv: KVStore) -> None:
        kv.init("w", full(0))
        raises(NotSupported, lambda: kv.save("nowhere", alone=True), "'async'", "all workers")
        raises(NotSupported, lambda: kv.state_dict(alone=True), "'async'", "all workers")

    in_one(maker, work)


@check(only="sync", policies=True)
def check_quorum_is_not_saved_alone(maker: StoreMaker) -> None:
    """With a quorum rounds go on without a worker, so it cannot save alone."""

    def work(kv: KVStore) -> None:
        kv.init("w", full(0))
        raises(NotSupported, lambda: kv.state_dict(alone=True), "quorum 1", "all workers")

    in_one(maker, work, quorum=1)


@check(workers=(2, 3), only="sync")
def check_save_alone_as_of_own_round(maker: StoreMaker, workers: int) -> None:
    """It is the save of all at its worker's round, however far others are, and loads as that does.

    Rank 0 is two rounds ahead, and has made settings for rounds that are still to come; rank 2 does nothing.
    """
    wholes: list[dict[str, Any]] = []

    def ahead(kv: KVStore) -> Any:
        kv.push(_gradients(kv, 3))
        kv.set_optimizer_options(lr=1.0)
        kv.set_optimizer("adam", keys=["w"], lr=2.0)
        for key in SHAPES:
            arrived(kv, key)
        return kv.push(_gradients(kv, 4), async_op=True)

    def first(kv: KVStore, meeting: Meeting) -> None:
        _start(kv)
        _steps(kv, 0, 3)
        if kv.rank == 0:
            kv.set_optimizer_options(lr=0.125)  # for the next round of all
            kv.set_optimizer("adam", keys=["s"], lr=0.25)
        kv.barrier()
        wholes.append(kv.state_dict())
        kv.save(folders[0])
        later = ahead(kv) if kv.rank == 0 else None
        meeting.everybody()
        if kv.rank == 1:
            expected = next(filter(None, wholes))
            _same_state(kv.state_dict(alone=True), expected)
            assert "s" not in expected["optimizer_state"], "an optimizer that is due has the state of another"
            kv.save(folders[1], alone=True)
        meeting.everybody()
        if later is None:
            kv.push(_gradients(kv, 3))
            kv.push(_gradients(kv, 4))
        else:
            later.wait()
        kv.barrier()

    def resumed(folder: str, kv: KVStore) -> Any:
        kv.load(folder)
        assert kv.info("w").version == 3
        return _steps(kv, 3, 5)

    with tempfile.TemporaryDirectory() as base:
        folders = [os.path.join(base, name) for name in ("by all", "alone")]
        in_workers(maker, workers, first)
        by_all, alone = (maker.run(partial(resumed, folder), num_workers=workers)[0] for folder in folders)
        _same_state(alone, by_all, "values")


@check(workers=(2, 3), only="sync")
def check_save_alone_waits_for_own_round(maker: StoreMaker, workers: int) -> None:
    """It has all that its worker has pushed, and waits for the others to push that round."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init("w", full(0))
        kv.set_updater("add")
        meeting.everybody()
        if kv.rank == 1:
            kv.push("w", full(1))
            meeting.signal("pushed")
            state = kv.state_dict(alone=True)
            same(state["values"]["w"], float(workers), "w, as saved")
            assert state["versions"] == {"w": 1}
        else:
            meeting.wait_for("pushed")
            kv.push("w", full(1))
            kv.push("w", full(10))
        meeting.everybody()
        if kv.rank == 1:
            kv.push("w", full(10))
        same(kv.pull("w"), 11.0 * workers, "w, in the end")

    in_workers(maker, workers, work)


@check(workers=(2,), only="sync")
def check_saves_alone_at_once(maker: StoreMaker, workers: int) -> None:
    """Every worker may save alone, at the same time, and each save is of its own round."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init("w", full(0))
        kv.set_updater("add")
        meeting.everybody()
        if kv.rank == 0:
            kv.push("w", full(1))
        arrived(kv, "w")
        meeting.everybody()
        if kv.rank == 1:
            kv.save(folders[1], alone=True)
            kv.push("w", full(1))
        kv.save(folders[0], alone=True)  # both into one folder
        meeting.everybody()
        kv.load(folders[1])
        same(kv.pull("w"), 0.0, "w, before the round")
        kv.load(folders[0])
        same(kv.pull("w"), 2.0, "w, after the round")

    with tempfile.TemporaryDirectory() as base:
        folders = [os.path.join(base, name) for name in ("both", "mine")]
        in_workers(maker, workers, work)
