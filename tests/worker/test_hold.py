"""Hold: what waits while a store is saved, how long, and what it finds afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import tensorkv
from tensorkv.errors import PeerLostError, WaitTimeout
from tensorkv.stores.dist import DistStore
from tensorkv.worker.hold import Hold

DEADLINE_S = 20.0
KEYS = ["a", "b"]
ONES = [torch.ones(2), torch.ones(2)]


class Bench:
    """A store of one worker, and a thread that makes calls; `reached` when one of these has to wait."""

    def __init__(self, kind: str, timeout_s: float = DEADLINE_S) -> None:
        kv = tensorkv.create(kind, embedded=True, num_servers=2, timeout_s=timeout_s)
        assert isinstance(kv, DistStore)
        self.kv = kv
        self.hold: Hold = kv._hold
        self.reached = threading.Event()
        self.pool = ThreadPoolExecutor(1)
        wait = self.hold.wait

        def watched(what: str) -> None:
            self.reached.set()
            wait(what)

        self.hold.wait = watched  # type: ignore[method-assign]
        kv.set_updater("add")
        kv.init(KEYS, [torch.zeros(2) for _ in KEYS])

    def start(self, call: Callable[[], Any]) -> Any:
        """Let the thread make a call, and return its future when the call waits for the end of the hold."""
        self.reached.clear()
        future = self.pool.submit(call)
        assert self.reached.wait(DEADLINE_S)
        assert not future.done()
        return future

    def values(self) -> list[float]:
        return [value[0].item() for value in self.kv.pull(KEYS)]

    def close(self) -> None:
        self.pool.shutdown()
        self.kv.close()


@pytest.fixture(params=["dist_sync", "dist_async"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    made = Bench(request.param)
    yield made
    made.close()


@pytest.fixture
def sync_bench() -> Iterator[Bench]:
    made = Bench("dist_sync")
    yield made
    made.close()


CALLS: dict[str, Callable[[tensorkv.KVStore], Any]] = {
    "push": lambda kv: kv.push(KEYS, ONES),
    "pushpull": lambda kv: kv.pushpull(KEYS, ONES),
    "push of another dtype": lambda kv: kv.pushpull(KEYS, [each.half() for each in ONES]),
    "push and pull": lambda kv: kv.pushpull(KEYS, ONES, out=[torch.empty(2), torch.empty(2)]),
    "async_op": lambda kv: kv.push(KEYS, ONES, async_op=True).wait(DEADLINE_S),
    "pushpull with async_op": lambda kv: kv.pushpull(KEYS, ONES, async_op=True).result(),
    "put": lambda kv: kv.put(KEYS, ONES),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_changes_values_waits_and_is_done_afterwards(bench: Bench, name: str) -> None:
    with bench.hold.back():
        future = bench.start(lambda: CALLS[name](bench.kv))
        assert [bench.kv.info(key).round for key in KEYS] == [0, 0]
    found = future.result(DEADLINE_S)
    assert bench.values() == [1.0, 1.0]
    if found is not None and "pull" in name and isinstance(found[0], torch.Tensor):
        assert [value.tolist() for value in found] == [[1.0, 1.0]] * 2


def test_calls_of_one_thread_keep_their_order(bench: Bench) -> None:
    with bench.hold.back():
        work = bench.kv.push("a", torch.ones(2), async_op=True)
        second = bench.kv.push("a", torch.ones(2), async_op=True)
        future = bench.pool.submit(lambda: bench.kv.pull("a"))
        assert work is not None
        assert second is not None
        assert not work.is_completed()
    assert bench.kv.pull("a").tolist() == [2.0, 2.0]
    assert future.result(DEADLINE_S)[0].item() in (0.0, 2.0)


def test_a_commit_is_of_what_was_pushed_when_the_hold_ends(sync_bench: Bench) -> None:
    kv = sync_bench.kv
    kv.push("a", torch.ones(2), apply=False)
    with sync_bench.hold.back():
        future = sync_bench.start(kv.commit)
    assert future.result(DEADLINE_S).applied
    assert sync_bench.values() == [1.0, 0.0]


def test_a_setting_holds_after_it(bench: Bench) -> None:
    bench.kv.set_optimizer("sgd", lr=1.0)
    with bench.hold.back():
        future = bench.start(lambda: bench.kv.set_optimizer_options(lr=0.5))
    future.result(DEADLINE_S)
    bench.kv.push("a", torch.ones(2))
    assert bench.values() == [-0.5, 0.0]


def test_the_store_is_left_after_it(bench: Bench) -> None:
    with bench.hold.back():
        future = bench.start(bench.kv.close)
    future.result(DEADLINE_S)


def test_it_ends_with_an_error_of_the_call_that_saves(bench: Bench) -> None:
    with pytest.raises(ValueError, match="of the call"), bench.hold.back():
        raise ValueError("of the call")
    assert not bench.kv._core.held
    bench.kv.push(KEYS, ONES)
    assert bench.values() == [1.0, 1.0]


def test_a_turn_is_a_moment_outside_of_it(bench: Bench) -> None:
    def turn() -> tuple[bool, bool]:
        with bench.hold.turn("a test"):
            return bench.kv._core.held, bench.kv._job.order.locked()

    with bench.hold.back():
        future = bench.start(turn)
    assert future.result(DEADLINE_S) == (False, True)
    assert not bench.kv._job.order.locked()


@pytest.mark.parametrize("name", ["push", "async_op", "put"])
def test_a_call_that_waits_has_a_deadline(name: str) -> None:
    bench = Bench("dist_async", timeout_s=0.3)
    with bench.hold.back(), pytest.raises(WaitTimeout, match="another thread, which saves the store"):
        CALLS[name](bench.kv)
    bench.close()


def test_a_broken_job_ends_it(bench: Bench) -> None:
    with bench.hold.back():
        future = bench.start(lambda: bench.kv.push(KEYS, ONES))
        bench.kv._abandon("a test")
        with pytest.raises(PeerLostError, match="has left the job"):
            future.result(DEADLINE_S)
    bench.kv._closed = True


def test_one_call_of_all_at_a_time(bench: Bench, tmp_path: Path) -> None:
    """Two threads that save make one save after the other."""
    with bench.hold.one_call("a test"):
        future = bench.pool.submit(bench.kv.save, tmp_path / "one")
        assert not bench.kv._core.held
    bench.kv.save(tmp_path / "two")
    future.result(DEADLINE_S)
    assert (tmp_path / "one/tensorkv.json").exists()


def test_one_call_has_a_deadline() -> None:
    bench = Bench("dist_sync", timeout_s=0.3)
    with bench.hold.one_call("a test"), pytest.raises(WaitTimeout, match="which saves or loads"):
        bench.pool.submit(bench.kv.state_dict).result(DEADLINE_S)
    bench.close()
