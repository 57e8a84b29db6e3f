"""The distributed store as a worker sees it: jobs, threads, deadlines, losses, ends."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import tensorkv
from tensorkv.config import JobConfig
from tensorkv.errors import (
    AuthenticationError,
    InvalidArgument,
    KeyDeleted,
    KeyNotInitialized,
    MemoryLimitReached,
    NotInJob,
    PeerLostError,
    ProtocolVersionError,
    SettingMismatch,
    StoreClosed,
    StoreMismatch,
    TensorKVError,
    UncommittedPush,
    UpdaterError,
    WaitTimeout,
)
from tensorkv.launch.cluster import LocalCluster
from tensorkv.server import shm
from tensorkv.store import KVStore
from tensorkv.stores import dist
from tensorkv.stores.dist import DistStore, open_dist
from tensorkv.testing.cluster import run_job
from tensorkv.wire import messages as m
from tensorkv.wire.codec import MAGIC, PREFIX
from tensorkv.worker import plancache, session
from tensorkv.worker.hold import Hold
from tensorkv.worker.link import ServerLink

DEADLINE_S = 20.0


def ones(value: float = 1.0, size: int = 4) -> torch.Tensor:
    return torch.full((size,), float(value))


def in_turn(kv: KVStore, rank: int, gate: threading.Event, call: Callable[[], Any]) -> Any:
    """Let `rank` make a call first; the others wait for it outside the store."""
    if kv.rank == rank:
        result = call()
        gate.set()
        return result
    assert gate.wait(DEADLINE_S)
    return None


# ---- opening -----------------------------------------------------------------------------------------


def test_outside_a_job_the_error_says_how_to_start_one() -> None:
    with pytest.raises(NotInJob, match="tensorkv run -n WORKERS -s SERVERS python train.py") as caught:
        tensorkv.create("dist_sync")
    assert "embedded=True" in str(caught.value)


def test_a_server_process_opens_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    config = JobConfig(
        role="server",
        rank=0,
        num_workers=1,
        num_servers=1,
        scheduler_host="127.0.0.1",
        scheduler_port=1,
        token="t",
    )
    for name, value in config.to_env().items():
        monkeypatch.setenv(name, value)
    with pytest.raises(NotInJob, match="TENSORKV_ROLE=server"):
        tensorkv.create("dist_sync")


@pytest.mark.parametrize("role", ["worker", "banana"])
def test_a_role_without_a_job_is_told_of(monkeypatch: pytest.MonkeyPatch, role: str) -> None:
    monkeypatch.setenv("TENSORKV_ROLE", role)
    with pytest.raises(NotInJob, match=f"TENSORKV_ROLE={role} is set, but TENSORKV_SCHEDULER is not"):
        tensorkv.create("dist_sync")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"on_worker_loss": "hope"}, InvalidArgument),
        ({"embedded": True, "num_servers": 0}, InvalidArgument),
        ({"embedded": True, "timeout_s": 0.0}, InvalidArgument),
        ({"embedded": True, "reduction": "max"}, InvalidArgument),
        ({"embedded": True, "staleness": 1}, InvalidArgument),  # dist_sync
    ],
)
def test_arguments_are_checked_and_nothing_is_left(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        open_dist("dist_sync", **options)


@contextmanager
def job_over_tcp(num_workers: int = 1) -> Iterator[LocalCluster]:
    cluster = LocalCluster(num_workers, 1, host="127.0.0.1", timeout_s=DEADLINE_S)
    try:
        yield cluster
    finally:
        cluster.stop()


def enter_job(monkeypatch: pytest.MonkeyPatch, config: JobConfig, **changes: str) -> None:
    for name, value in {**config.to_env(), **changes}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(session, "_watch_end", lambda who: None)  # pytest keeps its own handlers


@pytest.mark.parametrize(
    ("transport", "expected"),
    [
        (None, "InprocConnection"),
        ("shm", "UnixConnection"),
        ("auto", "UnixConnection"),
        ("tcp", "TcpConnection"),
    ],
)
def test_an_embedded_job_by_each_transport(transport: Any, expected: str) -> None:
    value = torch.arange(100_000.0)  # large enough to stay in shared memory
    with tensorkv.create("dist_sync", embedded=True, num_servers=2, transport=transport) as kv:
        assert isinstance(kv, DistStore)
        assert {type(link._connection).__name__ for link in kv._job.links} == {expected}
        kv.init("w", torch.zeros(100_000))
        for number in range(1, 4):
            kv.push("w", value * number)
            assert torch.equal(kv.pull("w"), value * number)


def test_stores_of_one_process_go_one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    with job_over_tcp() as cluster:
        enter_job(monkeypatch, cluster.config("worker", 0))
        first = open_dist("dist_sync", transport="tcp")
        with pytest.raises(InvalidArgument, match="transport='shm', but an earlier store .* transport='tcp'"):
            open_dist("dist_sync", store="second", transport="shm")
        second = open_dist("dist_sync", store="second")
        for store in (first, second):
            store.close()
        session.leave(session._joined[os.getpid()])
        del session._joined[os.getpid()]


def test_create_finds_its_job_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with job_over_tcp() as cluster:
        enter_job(monkeypatch, cluster.config("worker", 0))
        with tensorkv.create("dist_sync") as kv, tensorkv.create("dist_async", store="other") as other:
            assert (kv.rank, kv.num_workers, kv.kind, other.kind) == (0, 1, "dist_sync", "dist_async")
            kv.init("w", ones())
            other.init("w", ones(5))
            kv.push("w", ones(2))
            assert kv.pull("w").tolist() == [2] * 4
            assert other.pull("w").tolist() == [5] * 4
        job = session._joined[os.getpid()]
        session.leave(job)
        session.leave(job)  # the interpreter's exit does it again
        assert cluster.scheduler.lost is None
        with pytest.raises(PeerLostError, match="this worker has left the job"):
            tensorkv.create("dist_sync")
        del session._joined[os.getpid()]


@pytest.mark.parametrize(
    ("token", "text"), [("not it", "does not hold the token of this job"), ("", "no token of a job")]
)
def test_a_wrong_or_missing_token(monkeypatch: pytest.MonkeyPatch, token: str, text: str) -> None:
    with job_over_tcp() as cluster:
        enter_job(monkeypatch, cluster.config("worker", 0), TENSORKV_TOKEN=token)
        with pytest.raises(AuthenticationError, match=text):
            tensorkv.create("dist_sync")


def test_nobody_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with job_over_tcp() as cluster:
        config = cluster.config("worker", 0)
    enter_job(monkeypatch, config)
    with pytest.raises(PeerLostError, match="the scheduler at 127.0.0.1:.* cannot be reached"):
        tensorkv.create("dist_sync")


def test_a_job_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(PREFIX.pack(MAGIC, 9, 4, 0) + b"1234")
                connection.recv(1)

        done = pool.submit(answer)
        host, port = listener.getsockname()
        config = JobConfig(
            role="worker",
            rank=0,
            num_workers=1,
            num_servers=1,
            scheduler_host=host,
            scheduler_port=port,
            token="t",
        )
        enter_job(monkeypatch, config)
        with pytest.raises(ProtocolVersionError, match="version 9 .* this process version 1"):
            tensorkv.create("dist_sync")
        done.result(DEADLINE_S)


def test_stores_of_one_name_must_agree() -> None:
    def work(kv: KVStore) -> None:
        assert isinstance(kv, DistStore)
        options: dict[str, Any] = {"store": "default", "timeout_s": DEADLINE_S}
        with pytest.raises(
            StoreMismatch,
            match="kind 'sync', reduction 'sum' and on_worker_loss 'fail'.*rank 0 asks for kind 'async'",
        ):
            DistStore("dist_async", kv._job, reduction="sum", **options)
        with pytest.raises(StoreMismatch, match="reduction 'mean'"):
            DistStore("dist_sync", kv._job, reduction="mean", **options)
        bounded = DistStore(
            "dist_async",
            kv._job,
            reduction="sum",
            store="stale",
            policy=m.StorePolicy("async", 2),
            timeout_s=9,
        )
        for other, text in ((3, "staleness 3"), (None, "reduction")):
            with pytest.raises(
                StoreMismatch, match=f"kind 'async', staleness 2, .*asks for kind 'async', {text}"
            ):
                DistStore(
                    "dist_async",
                    kv._job,
                    reduction="sum",
                    store="stale",
                    policy=m.StorePolicy("async", other),
                    timeout_s=DEADLINE_S,
                )
        bounded.close()

    run_job(work, num_workers=1, num_servers=1, timeout_s=DEADLINE_S)


def test_stores_of_several_kinds_share_a_job() -> None:
    def work(kv: KVStore) -> list[list[float]]:
        assert isinstance(kv, DistStore)
        summed = kv
        mean = DistStore("dist_sync", kv._job, store="mean", reduction="mean", timeout_s=DEADLINE_S)
        newest = DistStore("dist_async", kv._job, store="newest", reduction="sum", timeout_s=DEADLINE_S)
        with mean, newest:
            for store in (summed, mean, newest):
                store.init("w", ones(0))
            newest.set_updater("add")
            newest.barrier()
            for store in (summed, mean, newest):
                store.push("w", ones(kv.rank + 1))
            newest.barrier()
            values = [store.pull("w").tolist() for store in (summed, mean, newest)]
            newest.barrier()
        return [each[:1] for each in values]

    expected = [[3.0], [1.5], [3.0]]
    assert run_job(work, num_workers=2, num_servers=2, timeout_s=DEADLINE_S) == [expected, expected]


# ---- closing -----------------------------------------------------------------------------------------


def test_close_twice_and_use_after_close() -> None:
    kv = open_dist("dist_sync", embedded=True)
    kv.init("w", ones())
    kv.close()
    kv.close()
    with pytest.raises(StoreClosed, match="is closed"):
        kv.push("w", ones())


def test_a_closed_store_is_freed_at_once_with_the_memory_of_its_plans() -> None:
    cluster = LocalCluster(1, 2, timeout_s=20.0)
    job = cluster.join(0)
    gc.disable()
    try:
        kv = DistStore("dist_sync", job, store="s", reduction="sum", timeout_s=20.0)
        kv.init({"a": ones(), "b": ones()})
        kv.pushpull({"a": ones(), "b": ones()})
        kv.delete("b")
        with pytest.raises(KeyNotInitialized):
            kv.pull("b")
        kv.close()
        plans, store = weakref.ref(kv._plans), weakref.ref(kv)
        del kv
        assert store() is None
        assert plans() is None
    finally:
        gc.enable()
        job.close(m.Goodbye())
        cluster.stop()


@pytest.mark.parametrize("transport", [None, "tcp", "shm"])
def test_a_dropped_embedded_store_is_told_of_and_leaves_nothing(transport: Any) -> None:
    """The suite looks for threads and sockets, and the values are freed."""
    before = set(os.listdir("/proc/self/fd"))
    opened = [tensorkv.create("dist_sync", embedded=True, num_servers=2, transport=transport)]
    opened[0].init("w", ones())
    opened[0].push("w", ones(2))
    assert opened[0].pull("w").tolist() == [2.0] * 4
    gone = weakref.ref(opened[0])
    keeper = next(thread for thread in threading.enumerate() if thread.name == "tensorkv-embedded")
    with pytest.warns(ResourceWarning, match=r"kind 'dist_sync', rank 0> was dropped without close\(\)"):
        opened.clear()
    assert gone() is None
    keeper.join(DEADLINE_S)
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) <= before


def test_the_job_of_a_dropped_store_ends_although_a_call_has_broken_it_off() -> None:
    def break_off() -> None:
        kv = tensorkv.create("dist_sync", embedded=True)
        assert isinstance(kv, DistStore)
        kv.init("w", ones())
        kv._job.broken_off(KeyboardInterrupt())
        with pytest.raises(PeerLostError, match="KeyboardInterrupt"):
            kv.push("w", ones())

    def drop() -> None:
        break_off()
        gc.collect()  # the error that was raised has kept it

    with pytest.warns(ResourceWarning, match="was dropped without close"):
        drop()


def test_the_values_of_a_refused_init_are_freed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tensor: torch.Tensor, key: Any) -> torch.Tensor:
        raise ArithmeticError("not today")

    monkeypatch.setattr(dist, "_on_cpu", refuse)
    value = ones()
    kept = weakref.ref(value)
    with open_dist("dist_sync", embedded=True) as kv:
        gc.disable()
        try:
            with pytest.raises(ArithmeticError, match="not today"):
                kv.init("w", value)
            del value
            assert kept() is None
        finally:
            gc.enable()


def refuse(key: Any, pushed: torch.Tensor, stored: torch.Tensor) -> None:
    raise ArithmeticError("not today")


def test_close_raises_what_only_the_servers_knew() -> None:
    kv = open_dist("dist_sync", embedded=True)
    kv.set_updater(refuse)
    kv.init("w", ones())
    kv.push("w", ones())
    with pytest.raises(UpdaterError, match="not today"):
        kv.close()


@pytest.mark.parametrize("host", ["inproc", "127.0.0.1"])
def test_close_ends_the_calls_of_other_threads(host: str) -> None:
    """A thread waits for a round; another closes the store. Another store of the job is not harmed."""
    pushed = threading.Event()
    finished = threading.Event()

    def work(kv: KVStore) -> None:
        assert isinstance(kv, DistStore)
        other = DistStore("dist_sync", kv._job, store="other", reduction="sum", timeout_s=DEADLINE_S)
        kv.init(["w", "v"], [ones(), ones()])
        other.init("w", ones())
        if kv.rank == 0:
            waiting = threading.Event()

            def pull() -> None:
                kv.push("w", ones())
                work = kv.pull("w", async_op=True)
                waiting.set()
                kv.pull("w")
                work.wait()

            with ThreadPoolExecutor(2) as pool:
                stuck = [pool.submit(pull), pool.submit(lambda: [kv.push("v", ones()) for _ in range(2)])]
                assert waiting.wait(DEADLINE_S)
                kv.close()
                for each in stuck:
                    with pytest.raises(StoreClosed):
                        each.result(DEADLINE_S)
            pushed.set()
        else:
            assert pushed.wait(DEADLINE_S)
        other.push("w", ones())
        assert other.pull("w").tolist() == [2] * 4
        other.close()
        finished.set()

    run_job(work, num_workers=2, num_servers=2, timeout_s=DEADLINE_S, host=host)
    assert finished.is_set()


def test_a_forked_child_may_not_use_the_store() -> None:
    kv = open_dist("dist_sync", embedded=True)
    kv.init("w", ones())
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            kv.push("w", ones())
        except StoreClosed as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    assert b"forked child" in os.read(read, 1000)
    assert os.waitpid(child, 0)[1] == 0
    os.close(read)
    os.close(write)
    kv.push("w", ones(7))
    assert kv.pull("w").tolist() == [7] * 4
    kv.close()


# ---- order -------------------------------------------------------------------------------------------


def keep_half(key: Any, pushed: torch.Tensor, stored: torch.Tensor) -> None:
    stored.copy_(stored * 0.5 + pushed)


@pytest.mark.parametrize("host", ["inproc", "127.0.0.1"])
def test_an_async_push_behind_an_unmerged_one_keeps_program_order(host: str) -> None:
    begun = threading.Event()

    def work(kv: KVStore) -> list[float]:
        kv.set_updater(keep_half)
        kv.init("w", ones(0))
        pulled = []
        if kv.rank == 0:
            works = [kv.push("w", ones(value), async_op=True) for value in (1.0, 2.0, 4.0)]
            assert not works[1].is_completed()  # type: ignore[union-attr]
            both = kv.pushpull("w", ones(8.0), async_op=True)
            pull = kv.pull("w", async_op=True)
            begun.set()
            last = kv.pull("w")
            for each in works:
                each.wait()  # type: ignore[union-attr]
            pulled = [both.result()[0].item(), pull.result()[0].item(), last[0].item()]
        else:
            assert begun.wait(DEADLINE_S)
            for _ in range(4):
                kv.push("w", ones(0))
            pulled = [kv.pull("w")[0].item()] * 3
        return pulled

    value = ((1.0 * 0.5 + 2.0) * 0.5 + 4.0) * 0.5 + 8.0
    results = run_job(work, num_workers=2, num_servers=2, timeout_s=DEADLINE_S, host=host)
    assert results == [[value] * 3, [value] * 3]


def test_only_the_busy_keys_of_a_list_wait() -> None:
    first, looked = threading.Event(), threading.Event()

    def work(kv: KVStore) -> None:
        kv.init(["a", "b"], [ones(0), ones(0)])
        if kv.rank == 0:
            kv.push("a", ones(1))
            late = kv.push(["a", "b"], [ones(2), ones(3)], async_op=True)
            assert late is not None
            first.set()
            assert kv.pull("b").tolist() == [4] * 4  # needs the others' push of b, not of a
            assert not late.is_completed()
            looked.set()
            late_too = kv.push(["a"], [ones(3)], async_op=True)
            assert late_too is not None
            kv.barrier()
            late.wait()
            late_too.wait()
        else:
            assert first.wait(DEADLINE_S)
            kv.push("b", ones(1))
            kv.pull("b")
            assert looked.wait(DEADLINE_S)
            for _ in range(3):
                kv.push("a", ones(0))
            kv.barrier()
        assert kv.pull("a").tolist() == [3] * 4

    run_job(work, num_workers=2, num_servers=2, timeout_s=DEADLINE_S)


# ---- threads -----------------------------------------------------------------------------------------

NUM_STEPS = 10


@pytest.mark.parametrize("kind", ["dist_sync", "dist_async"])
def test_threads_with_keys_of_their_own(kind: str) -> None:
    """Several threads of each worker, small and sliced keys, blocking and async calls, over TCP."""

    def work(kv: KVStore) -> None:
        kv.set_updater("add")
        names = [[f"{thread}/{i}" for i in range(5)] for thread in range(3)]
        sizes = [3, 5000, 40_000, 100, 7]
        for group in names:
            kv.init(group, [torch.zeros(size) for size in sizes])
        kv.barrier()

        def train(group: list[str]) -> None:
            outs = [torch.empty(2 * size)[::2] for size in sizes]
            for step in range(1, NUM_STEPS + 1):
                gradients = [torch.full((size,), float(kv.rank + 1)) for size in sizes]
                if step % 3 == 0:
                    kv.push(group, gradients)
                    kv.pull(group, out=outs)
                elif step % 3 == 1:
                    kv.pushpull(group, gradients, out=outs)
                else:
                    pushed = kv.push(group, gradients, async_op=True)
                    kv.pull(group, out=outs, async_op=True).wait()
                    assert pushed is not None
                    pushed.wait()
                if kind == "dist_sync":
                    assert all(bool((out == 3 * step).all()) for out in outs), step

        with ThreadPoolExecutor(len(names)) as pool:
            for done in [pool.submit(train, group) for group in names]:
                done.result(DEADLINE_S)
        kv.barrier()
        for group in names:
            assert all(bool((value == 3 * NUM_STEPS).all()) for value in kv.pull(group))

    run_job(
        work,
        num_workers=2,
        num_servers=2,
        kind=kind,
        timeout_s=DEADLINE_S,
        host="127.0.0.1",
        slice_bound_bytes=50_000,
    )


@pytest.mark.parametrize("host", ["inproc", "127.0.0.1"])
def test_threads_that_push_the_same_keys(host: str) -> None:
    """No push is lost or refused, whichever thread is first in which round."""

    def work(kv: KVStore) -> None:
        kv.set_updater("add")
        keys = ["a", "b"]
        kv.init(keys, [ones(0), ones(0)])

        def push(number: int) -> None:
            for step in range(NUM_STEPS):
                values = [ones(), ones()]
                if (number + step) % 3 == 0:
                    kv.pushpull(keys, values)
                elif (number + step) % 3 == 1:
                    kv.push(keys, values)
                else:
                    pushed = kv.push(keys, values, async_op=True)
                    assert pushed is not None
                    pushed.wait()

        with ThreadPoolExecutor(3) as pool:
            for done in [pool.submit(push, number) for number in range(3)]:
                done.result(DEADLINE_S)
        assert kv.pull("a").tolist() == [2 * 3 * NUM_STEPS] * 4
        assert kv.pull("b").tolist() == [2 * 3 * NUM_STEPS] * 4

    run_job(work, num_workers=2, num_servers=2, timeout_s=DEADLINE_S, host=host)


# ---- plans -------------------------------------------------------------------------------------------


def test_plans_that_are_not_used_are_forgotten_and_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plancache, "MAX_PLANS", 2)

    def work(kv: KVStore) -> None:
        assert isinstance(kv, DistStore)
        keys = [str(i) for i in range(6)]
        kv.init(keys, [ones(0) for _ in keys])
        for step in range(3):
            for i in range(6):
                group = [keys[i], keys[(i + step + 1) % 6]]
                kv.push(group, [ones(i), ones(i)])
                assert [value.tolist() for value in kv.pull(group)] == [[2.0 * i] * 4] * 2
        assert len(kv._plans._plans) == 2

    run_job(work, num_workers=2, num_servers=2, timeout_s=DEADLINE_S)


def test_a_plan_is_forgotten_while_calls_of_it_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plancache, "MAX_PLANS", 1)
    pulling = threading.Event()

    def work(kv: KVStore) -> None:
        kv.init(["a", "b", "c"], [ones(0), ones(0), ones(0)])
        if kv.rank == 0:
            kv.push("a", ones(1))
            pull = kv.pull("a", async_op=True)
            late = kv.push("a", ones(2), async_op=True)
            for key in ("b", "c", "b"):
                kv.pull(key)
            pulling.set()
            assert pull.result().tolist() == [2] * 4
            assert late is not None
            late.wait()
        else:
            assert pulling.wait(DEADLINE_S)
            kv.push("a", ones(1))
            kv.push("a", ones(3))
        assert kv.pull("a").tolist() == [5] * 4

    run_job(work, num_workers=2, num_servers=2, timeout_s=DEADLINE_S)


# ---- keys that go and come ----------------------------------------------------------------------------


def test_a_deleted_key_may_be_initialised_again() -> None:
    def work(kv: KVStore) -> None:
        kv.init("w", ones(1))
        kv.push("w", ones(2))
        assert kv.pull("w").tolist() == [4] * 4
        kv.delete("w")
        kv.init("w", torch.ones(2, 3))
        kv.push("w", torch.ones(2, 3))
        assert torch.equal(kv.pull("w"), torch.full((2, 3), 2.0))

    run_job(work, num_workers=2, num_servers=2, timeout_s=DEADLINE_S)


def test_whoever_has_deleted_a_key_is_told_so_and_who_has_not() -> None:
    def work(kv: KVStore) -> None:
        kv.init("w", ones(1))
        if kv.rank == 1:
            kv.delete("w")
            for call in (kv.pull, kv.info, kv.delete):
                with pytest.raises(
                    KeyNotInitialized, match=r"this worker has deleted it, and ranks \[0\] have not"
                ):
                    call("w")
        kv.barrier()
        if kv.rank == 0:
            kv.delete("w")
            with pytest.raises(KeyNotInitialized, match=r"'w' is not initialised; call init"):
                kv.pull("w")
        kv.barrier()

    run_job(work, num_workers=2, num_servers=2, timeout_s=DEADLINE_S)


def test_an_init_that_waits_for_deletes_says_whose() -> None:
    def work(kv: KVStore) -> None:
        assert isinstance(kv, DistStore)
        kv.init("w", ones(1))
        if kv.rank == 0:
            kv.delete("w")
            kv._timeout_s = kv._driver.timeout_s = 0.2
            text = (
                "did not finish within 0.2 s: waiting for worker 1, init of 'w', which they have not deleted"
            )
            with pytest.raises(WaitTimeout, match=text):
                kv.init("w", ones(2))
            kv._timeout_s = kv._driver.timeout_s = DEADLINE_S
            kv.barrier()
            kv.init("w", ones(3))
        else:
            kv.barrier()
            assert kv.pull("w").tolist() == [1] * 4
            kv.delete("w")
            kv.init("w", ones(3))
        assert kv.pull("w").tolist() == [3] * 4

    run_job(work, num_workers=2, num_servers=2, timeout_s=DEADLINE_S)


def test_a_worker_need_not_have_used_a_key_to_delete_it() -> None:
    def work(kv: KVStore) -> None:
        if kv.rank == 0:
            kv.init("w", ones(1))
        kv.barrier()
        kv.delete("w")
        kv.init("w", ones(2))
        assert kv.pull("w").tolist() == [2] * 4

    run_job(work, num_workers=2, num_servers=2, timeout_s=DEADLINE_S)


def test_a_deferred_push_counts_before_its_key_is_deleted() -> None:
    pushed = threading.Event()

    def work(kv: KVStore) -> None:
        kv.init("w", ones(0))
        if kv.rank == 1:
            kv.push("w", ones(1))
            works = [kv.push("w", ones(value), async_op=True) for value in (2, 3)]
            pushed.set()
            kv.delete("w")
            assert all(each is not None and each.is_completed() for each in works)
        else:
            assert pushed.wait(DEADLINE_S)
            for value in (11.0, 12.0, 13.0, 10.0):
                assert kv.pushpull("w", ones(10)).tolist() == [value] * 4
        kv.barrier()

    run_job(work, num_workers=2, num_servers=2, timeout_s=DEADLINE_S)


def test_threads_that_delete_and_use_the_same_keys_get_an_error_of_their_own() -> None:
    """Whatever the order: a call counts, or says that its key is deleted, and the connections live."""

    def work(kv: KVStore) -> None:
        def use(thread: int) -> None:
            for turn in range(30):
                names = [f"k{turn}", f"k{turn + 1}"]
                with contextlib.suppress(KeyDeleted, KeyNotInitialized):
                    if thread == 0:
                        kv.delete(names[0])
                    elif thread == 1:
                        kv.pull(names)
                    elif thread == 2:
                        kv.push(names, [ones(), ones()])
                    else:
                        kv.put(names[0], ones(2))

        names = [f"k{number}" for number in range(31)]
        kv.init(names, [ones() for _ in names])
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(use, thread) for thread in range(4)]:
                done.result(DEADLINE_S)
        kv.barrier()
        assert kv.keys() == ["k30"]
        kv.barrier()  # else rank 0's next init is there before rank 1 has looked
        kv.init("k0", ones(5))
        assert kv.pull("k0").tolist() == [5] * 4

    run_job(work, num_workers=2, num_servers=2, kind="dist_async", timeout_s=DEADLINE_S)


def test_a_load_that_is_given_up_is_looked_up_anew() -> None:
    """Whether it has replaced the keys is not known then."""
    with tensorkv.create("dist_sync", embedded=True) as kv:
        assert isinstance(kv, DistStore)
        kv.init("w", ones(1))
        (state,) = kv._known(["w"])
        kv.push("w", ones(2))

        def late(*args: Any) -> Any:
            raise WaitTimeout("load did not finish")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kv, "_lead_or_follow", late)
            with pytest.raises(WaitTimeout):
                kv.load_state_dict({})
        assert kv._core.keys.those_known(None) == []
        assert kv.pull("w").tolist() == [2] * 4
        assert kv._known(["w"]) == [state]


def test_a_list_of_keys_is_deleted_by_one_message_to_each_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message per key took minutes for ten thousand: a server looks through its plans for each."""
    told: list[m.Message] = []
    put = ServerLink.put

    def spy(link: ServerLink, message: m.Message, *args: Any) -> None:
        told.append(message)
        put(link, message, *args)

    with tensorkv.create("dist_sync", embedded=True, num_servers=2) as kv:
        keys = [f"k{number}" for number in range(20)]
        kv.init(keys, [ones() for _ in keys])
        with monkeypatch.context() as patch:
            patch.setattr(ServerLink, "put", spy)
            kv.delete(keys[:15])
        assert [type(message) for message in told] == [m.DeleteSlices] * 2
        assert sum(len(message.slice_ids) for message in told) == 15  # type: ignore[attr-defined]
        assert kv.keys() == keys[15:]
        with pytest.raises(KeyNotInitialized):
            kv.push(keys[0], ones())


def test_a_key_takes_its_plans_with_it() -> None:
    """They hold buffers: a worker would keep more and more of them, and so would the servers."""
    cluster = LocalCluster(1, 1, timeout_s=DEADLINE_S)
    job = cluster.join(0)
    kv = DistStore("dist_sync", job, store="default", reduction="sum", timeout_s=DEADLINE_S)
    kv.init(["v", "w"], [ones(0), ones(0)])
    kv.pushpull(["v", "w"], [ones(), ones()])
    kv.pushpull("v", ones())
    kv.delete("w")
    assert [[state.key for state in plan.states] for plan in kv._plans._plans.values()] == [["v"]]
    (shard,) = cluster.servers[0]._state._stores.values()
    assert len(shard.plans._plans) == 1
    assert len(kv) == 1
    (directory,) = cluster.scheduler._membership._stores.values()
    assert list(directory._keys) == ["v"]
    kv.close()
    job.close(m.Goodbye())
    cluster.stop()


def test_who_waits_for_a_worker_that_deletes_the_key_goes_on() -> None:
    waiting = threading.Event()

    def work(kv: KVStore) -> None:
        kv.init("w", ones(1))
        if kv.rank == 1:
            kv.push("w", ones(3))
            pull = kv.pull("w", async_op=True)
            kv.info("w")
            waiting.set()
            assert pull.result().tolist() == [3] * 4
        else:
            assert waiting.wait(DEADLINE_S)
            kv.delete("w")
        kv.barrier()
        assert ("w" in kv) == (kv.rank == 1)

    run_job(work, num_workers=2, num_servers=2, timeout_s=DEADLINE_S)


# ---- deadlines ---------------------------------------------------------------------------------------


def test_a_deadline_names_who_is_missing_and_leaves_the_store_usable() -> None:
    go_on = threading.Event()

    def work(kv: KVStore) -> list[float]:
        assert isinstance(kv, DistStore)
        kv.init("w", ones(0))
        if kv.rank == 0:
            kv._timeout_s = kv._driver.timeout_s = 0.3
            kv.push("w", ones(1))
            with pytest.raises(WaitTimeout, match="pull of 'w' .*waiting for worker 1, round 1 of 'w'"):
                kv.pull("w")
            with pytest.raises(WaitTimeout, match="pushpull of 'w' .*waiting for worker 1, round 1 of 'w'"):
                kv.pushpull("w", ones(2))
            with pytest.raises(WaitTimeout, match="barrier .*waiting for worker 1, a barrier"):
                kv.barrier()
            with pytest.raises(WaitTimeout, match="pull of 'w' is not complete"):
                kv.pull("w", async_op=True).wait(0.1)
            kv._timeout_s = kv._driver.timeout_s = DEADLINE_S
            go_on.set()
        else:
            assert go_on.wait(DEADLINE_S)
            kv.push("w", ones(10))
        kv.barrier()
        first = kv.pull("w")[0].item()
        kv.push("w", ones(1))
        return [first, kv.pull("w")[0].item()]

    assert run_job(work, num_workers=2, num_servers=2, timeout_s=DEADLINE_S) == [[11.0, 2.0]] * 2


def test_with_bounded_staleness_a_pull_waits_for_who_is_too_far_behind() -> None:
    go_on = threading.Event()

    def work(kv: KVStore) -> list[float]:
        assert isinstance(kv, DistStore)
        kv.init(["v", "w"], [ones(0), ones(0, 100_000)])  # "w" lies on both servers
        kv.set_updater("add")
        kv.barrier()
        seen = []
        if kv.rank == 0:
            kv.push(["v", "w"], [ones(1), ones(1, 100_000)])
            seen.append(kv.pull("w")[-1].item())  # one ahead is allowed
            kv._timeout_s = kv._driver.timeout_s = 0.3
            with pytest.raises(WaitTimeout, match="pushpull of 'v' .*waiting for worker 1, push 1 of 'v'"):
                kv.pushpull("v", ones(1))
            kv.push("w", ones(1, 100_000))
            with pytest.raises(WaitTimeout, match="pull of 'w' .*waiting for worker 1, push 1 of 'w'"):
                kv.pull("w")
            kv._timeout_s = kv._driver.timeout_s = DEADLINE_S
            go_on.set()
        else:
            assert go_on.wait(DEADLINE_S)
            seen.append(kv.pull("w")[-1].item())  # who is behind waits for nobody
            kv.push(["v", "w"], [ones(10), ones(10, 100_000)])
        seen += [value[-1].item() for value in kv.pull(["v", "w"])]
        return seen

    found = run_job(
        work,
        num_workers=2,
        num_servers=2,
        kind="dist_async",
        staleness=1,
        timeout_s=DEADLINE_S,
        slice_bound_bytes=1000,
    )
    assert found == [[1.0, 12.0, 12.0], [2.0, 12.0, 12.0]]


@pytest.mark.parametrize("host", ["inproc", "127.0.0.1"])
def test_a_circle_through_a_barrier_is_named(host: str) -> None:
    circle = "pull of 'w' did not finish .*: waiting for worker 1, push 1 of 'w'"
    circle += "; worker 1 waits in a barrier for worker 0"

    def work(kv: KVStore) -> float:
        assert isinstance(kv, DistStore)
        kv.set_updater("add")
        kv.init("w", ones(0))
        if kv.rank == 0:
            kv.push("w", ones())
            kv._timeout_s = kv._driver.timeout_s = 0.3
            texts: list[str] = []
            while not any(re.match(circle, text) for text in texts):
                assert len(texts) < 60, texts  # worker 1 comes to its barrier in the end
                with pytest.raises(WaitTimeout) as caught:
                    kv.pull("w")
                texts.append(str(caught.value))
            kv._timeout_s = kv._driver.timeout_s = DEADLINE_S
        kv.barrier()
        if kv.rank == 1:
            kv.push("w", ones())
        return kv.pull("w")[0].item()

    found = run_job(
        work, num_workers=2, num_servers=2, kind="dist_async", staleness=0, timeout_s=DEADLINE_S, host=host
    )
    assert found == [2.0, 2.0]


def test_a_round_with_a_quorum_tells_whom_it_waits_for() -> None:
    go_on = threading.Event()

    def work(kv: KVStore) -> float:
        assert isinstance(kv, DistStore)
        kv.init("w", ones(0, 100_000))  # on both servers
        kv.set_updater("add")
        kv.barrier()
        if kv.rank == 0:
            kv.push("w", ones(1, 100_000))
            kv._timeout_s = kv._driver.timeout_s = 0.3
            with pytest.raises(WaitTimeout, match="pull of 'w' .*waiting for workers 1, 2, round 1 of 'w'"):
                kv.pull("w")
            kv._timeout_s = kv._driver.timeout_s = DEADLINE_S
            go_on.set()
        elif kv.rank == 1:
            assert go_on.wait(DEADLINE_S)
            kv.push("w", ones(10, 100_000))
        kv.barrier()
        assert kv.info("w").late == 0
        return kv.pull("w")[-1].item()

    found = run_job(
        work,
        num_workers=3,
        num_servers=2,
        quorum=2,
        timeout_s=DEADLINE_S,
        slice_bound_bytes=1000,
    )
    assert found == [11.0] * 3


def test_a_worker_that_is_late_for_one_slice_is_told_the_largest_count() -> None:
    def work(kv: KVStore) -> int:
        kv.init("w", ones(0, 100_000))
        if kv.rank == 0:
            for _ in range(3):
                kv.pushpull("w", ones(1, 100_000))
        kv.barrier()
        if kv.rank == 1:
            kv.push("w", ones(1, 100_000))
        kv.barrier()
        return kv.info("w").late

    found = run_job(
        work, num_workers=2, num_servers=2, quorum=1, timeout_s=DEADLINE_S, slice_bound_bytes=1000
    )
    assert found == [1, 1]


def test_init_that_waits_for_rank_0_in_vain() -> None:
    go_on = threading.Event()

    def work(kv: KVStore) -> None:
        assert isinstance(kv, DistStore)
        if kv.rank == 1:
            kv._timeout_s = kv._driver.timeout_s = 0.3
            with pytest.raises(WaitTimeout, match="init of 'w' .*waiting for worker 0, init of 'w'"):
                kv.init("w", ones())
            with pytest.raises(WaitTimeout, match="waiting for worker 0, setting number 1"):
                kv.set_updater("add")
            kv._timeout_s = kv._driver.timeout_s = DEADLINE_S
            go_on.set()
        else:
            assert go_on.wait(DEADLINE_S)
        kv.set_updater("add")
        kv.init("w", ones(0))
        kv.push("w", ones())
        assert kv.pull("w").tolist() == [2] * 4

    run_job(work, num_workers=2, num_servers=2, timeout_s=DEADLINE_S)


# ---- losses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["inproc", "127.0.0.1"])
def test_a_worker_lost_inside_with_ends_the_calls_of_others(host: str) -> None:
    """Blocking and async calls in progress raise, and every later one, with role, rank and cause."""
    errors: list[TensorKVError] = []
    stuck = threading.Barrier(2, timeout=DEADLINE_S)

    def fail(kv: KVStore) -> None:
        with kv:
            stuck.wait()
            raise ArithmeticError("a nan")

    def work(kv: KVStore) -> None:
        kv.init("w", ones(0))
        if kv.rank == 1:
            fail(kv)
        kv.push("w", ones())
        pull = kv.pull("w", async_op=True)
        push = kv.push("w", ones(), async_op=True)
        stuck.wait()
        for call in (
            pull.wait,
            kv.barrier,
            push.wait,  # type: ignore[union-attr]
            lambda: kv.pull("w"),
            lambda: kv.pull("w", async_op=True).wait(),
            lambda: kv.pushpull("w", ones()),
            lambda: kv.init("v", ones()),
        ):
            with pytest.raises(PeerLostError) as caught:
                call()
            errors.append(caught.value)

    with pytest.raises(ArithmeticError, match="a nan"):
        run_job(work, num_workers=2, num_servers=2, timeout_s=DEADLINE_S, host=host)
    assert len(errors) == 7
    assert {str(error).split(" on host ")[0] for error in errors} == {"worker 1"}
    assert all(str(error).endswith("was lost: ArithmeticError: a nan") for error in errors)


@pytest.mark.parametrize("host", ["inproc", "127.0.0.1"])
@pytest.mark.parametrize("options", [{}, {"kind": "dist_sync", "on_worker_loss": "continue"}])
def test_the_others_go_on_without_a_lost_worker(
    host: str, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Calls that wait for it go on: a pull, a push, a barrier, an init and a setting that rank 0 led."""
    pushed = threading.Barrier(3, timeout=DEADLINE_S)

    def work(kv: KVStore) -> list[float]:
        kv.set_updater("add")
        kv.init("w", ones(0))
        if kv.rank == 0:
            kv.push("w", ones(100))
            kv.pull("w") if kv.kind == "dist_async" else kv._flush(DEADLINE_S)  # type: ignore[attr-defined]
            pushed.wait()
            raise ArithmeticError("a nan")
        pushed.wait()
        for _ in range(3):
            kv.push("w", ones())
            kv.pull("w")
        kv.barrier()
        kv.init("v", ones(5))
        kv.set_updater("assign")
        return [*kv.pull("w").tolist()[:1], *kv.pull("v").tolist()[:1]]

    results: dict[int, list[float]] = {}

    def note(kv: KVStore) -> None:
        results[kv.rank] = work(kv)

    with pytest.raises(ArithmeticError, match="a nan"):
        run_job(
            note, num_workers=3, num_servers=2, timeout_s=DEADLINE_S, host=host,
            **{"kind": "dist_async", **options},
        )  # fmt: skip
    assert results == {1: [106.0, 5.0], 2: [106.0, 5.0]}
    lines = [record.getMessage() for record in caplog.records if "was lost" in record.getMessage()]
    assert len(lines) == 2
    assert {line.split(" on host ")[0] for line in lines} == {"worker 0"}
    assert all(
        line.endswith("was lost: ArithmeticError: a nan; the job goes on without it") for line in lines
    )


def test_what_happens_at_a_loss_is_agreed() -> None:
    def work(kv: KVStore) -> None:
        assert isinstance(kv, DistStore)
        with pytest.raises(StoreMismatch, match="on_worker_loss 'fail', but rank 0 asks .* 'continue'"):
            DistStore(
                "dist_sync",
                kv._job,
                store="default",
                reduction="sum",
                timeout_s=DEADLINE_S,
                on_worker_loss="continue",
            )

    run_job(work, num_workers=1, num_servers=1, timeout_s=DEADLINE_S)


def test_a_worker_that_comes_after_a_loss_is_told() -> None:
    cluster = LocalCluster(2, 1, timeout_s=DEADLINE_S)
    try:
        cluster.join(0).close(m.Abandon("it fell over"))
        end = time.monotonic() + DEADLINE_S
        while cluster.scheduler.lost is None:  # what it said last may be read later than what the next says
            assert time.monotonic() < end
            time.sleep(0.01)
        with pytest.raises(PeerLostError, match="worker 0 .* was lost: it fell over"):  # noqa: PT012
            late = cluster.join(1)
            try:
                late.control.request(
                    lambda n: m.JoinStore(n, "default", m.StorePolicy("sync"), "sum", "fail"),
                    "opening",
                    DEADLINE_S,
                )
            finally:
                late.close(m.Goodbye())
    finally:
        cluster.stop()


# ---- real processes ----------------------------------------------------------------------------------

LEAVES_AT_EXIT = """
import torch
import tensorkv

kv = tensorkv.create("dist_sync")
kv.init("w", torch.zeros(4))
if kv.rank == 0:
    kv.push("w", torch.full((4,), 5.0))  # and ends, without a word
else:
    kv.push("w", torch.full((4,), 1.0))
    print("both", kv.pull("w").tolist())
    kv.push("w", torch.full((4,), 7.0))
    print("alone", kv.pull("w").tolist())
"""

DIES_BY_EXCEPTION = """
import torch
import tensorkv

kv = tensorkv.create("dist_sync")
kv.init("w", torch.zeros(4))
if kv.rank == 0:
    raise ArithmeticError("a nan")
try:
    kv.push("w", torch.ones(4))
    kv.pull("w")
except tensorkv.PeerLostError as error:
    print(error, flush=True)
    raise SystemExit(9)
"""


def run_script(tmp_path: Path, script: str) -> tuple[int, str, str]:
    path = tmp_path / "train.py"
    path.write_text(script)
    command = [sys.executable, "-m", "tensorkv", "run", "-n", "2", "--", sys.executable, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.e2e
def test_a_worker_leaves_when_its_interpreter_exits(tmp_path: Path) -> None:
    status, out, err = run_script(tmp_path, LEAVES_AT_EXIT)
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "[worker 1] both [6.0, 6.0, 6.0, 6.0]",
        "[worker 1] alone [7.0, 7.0, 7.0, 7.0]",
    ]


@pytest.mark.slow
@pytest.mark.e2e
def test_an_uncaught_exception_is_a_loss_with_its_cause(tmp_path: Path) -> None:
    status, out, err = run_script(tmp_path, DIES_BY_EXCEPTION)
    assert status == 1
    assert "ArithmeticError: a nan" in err
    assert "worker 0 failed with status 1" in err
    assert all("was lost: it ended with ArithmeticError: a nan" in line for line in out.splitlines())


def test_a_close_that_gives_up_tells_for_whom() -> None:
    """An earlier push with async_op waits for the others, and so does close."""
    go_on = threading.Event()

    def work(kv: KVStore) -> None:
        assert isinstance(kv, DistStore)
        kv.init("w", ones(0))
        kv.barrier()
        if kv.rank == 1:
            assert go_on.wait(DEADLINE_S)
            return
        kv._timeout_s = kv._driver.timeout_s = 0.3
        kv.push("w", ones())
        kv.push("w", ones(), async_op=True)
        try:
            with pytest.raises(
                WaitTimeout, match="close: an earlier push of 'w' .*waiting for worker 1, round 1 of 'w'"
            ):
                kv.close()
        finally:
            go_on.set()

    run_job(work, num_workers=2, num_servers=1, timeout_s=DEADLINE_S)


@pytest.mark.parametrize("kind", ["dist_sync", "dist_async"])
def test_options_that_differ_are_an_error_of_a_later_call(kind: str) -> None:
    """Each server compares, and reports; the worker raises it once. Nothing waits for rank 0."""
    met = threading.Barrier(2)

    def work(kv: KVStore) -> tuple[list[str], float]:
        kv.init("w", ones(0, 100_000))  # on both servers
        kv.set_optimizer("sgd", lr=1.0)
        kv.barrier()
        for lr in (1.0, 0.5):
            met.wait(DEADLINE_S)
            kv.set_optimizer_options(lr=lr / 2 if kv.rank == 1 and lr < 1.0 else lr)
        met.wait(DEADLINE_S)
        errors: list[str] = []
        try:
            kv.push("w", ones(1, 100_000))
        except SettingMismatch as exc:  # it may have been told already
            errors.append(str(exc))
            kv.push("w", ones(1, 100_000))
        for _ in range(2):
            try:
                kv.barrier()
            except SettingMismatch as exc:  # after all have met
                errors.append(str(exc))
        return errors, kv.pull("w")[-1].item()

    found = run_job(
        work, num_workers=2, num_servers=2, kind=kind, timeout_s=DEADLINE_S, slice_bound_bytes=1000
    )
    (mine, first), (theirs, second) = found
    assert mine == []
    assert theirs == [
        "change of options number 2 of rank 1 is options {'lr': 0.25} for all keys, but that of rank 0 is "
        "options {'lr': 0.5} for all keys; all ranks that change options must agree"
    ]
    assert first == second == -1.0


def test_changes_of_options_are_counted_anew_after_a_load(tmp_path: Path) -> None:
    def work(kv: KVStore) -> float:
        kv.init("w", ones(0))
        kv.set_optimizer("sgd", lr=1.0)
        if kv.rank == 1:  # ahead of rank 0, which makes none
            kv.set_optimizer_options(lr=7.0)
        kv.save(tmp_path / "saved")
        kv.load(tmp_path / "saved")
        for number in range(3):
            kv.set_optimizer_options(lr=0.5**number)
            kv.pushpull("w", ones(1))
        if kv.rank == 1:
            kv.set_optimizer_options(lr=0.0)
        kv.barrier()
        if kv.rank == 0:
            kv.set_optimizer_options(lr=9.0)
        kv.push("w", ones(1))
        if kv.rank == 1:
            with pytest.raises(SettingMismatch, match="number 4 of rank 1"):
                kv.pull("w")
        return kv.pull("w")[0].item()

    found = run_job(work, num_workers=2, num_servers=2, timeout_s=DEADLINE_S)
    assert found == [-2 * (1 + 0.5 + 0.25) - 18.0] * 2


def test_a_rank_that_becomes_the_lowest_goes_on_where_it_is() -> None:
    """Its changes that rank 0 has not made hold once rank 0 has left."""
    left = threading.Event()

    def work(kv: KVStore) -> float | None:
        kv.init("w", ones(0))
        kv.set_optimizer("sgd", lr=1.0)
        kv.set_optimizer_options(lr=0.5)
        kv.pushpull("w", ones(1))
        if kv.rank == 0:
            kv.close()
            left.set()
            return None
        kv.set_optimizer_options(lr=0.25)
        assert left.wait(DEADLINE_S)
        kv.pushpull("w", ones(1))
        kv.set_optimizer_options(lr=0.125)
        return kv.pushpull("w", ones(1))[0].item()

    found = run_job(work, num_workers=2, num_servers=1, timeout_s=DEADLINE_S)
    assert found == [None, -1.0 - 0.25 - 0.125]


def test_threads_that_make_settings_do_so_one_after_the_other() -> None:
    """Each builds on the one before: a server forgets a setting that was prepared when another one is."""
    with tensorkv.create("dist_sync", embedded=True) as kv:
        kv.init("w", torch.zeros(2))
        kv.set_optimizer("sgd", lr=1.0)
        with ThreadPoolExecutor(3) as pool:
            made = [pool.submit(kv.set_optimizer_options, lr=0.5 + each % 3) for each in range(12)]
            for each in made:
                each.result(20)
        kv.set_optimizer_options(lr=0.25)
        kv.push("w", torch.ones(2))
        assert kv.pull("w").tolist() == [-0.25, -0.25]


@pytest.mark.parametrize("call", ["init", "put", "push", "load_state_dict"])
@pytest.mark.parametrize(
    ("host", "transport"), [("inproc", "auto"), ("127.0.0.1", "tcp"), ("127.0.0.1", "shm")]
)
def test_a_server_without_memory_refuses_the_call_and_the_job_goes_on(
    host: str, transport: Any, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the server is short of: memory for what is sent, for values, or to map what a worker lends."""
    size = 100_000
    large = torch.ones(size)
    cluster = LocalCluster(1, 1, timeout_s=DEADLINE_S, host=host, transport=transport)
    job = cluster.join(0)
    kv = DistStore("dist_sync", job, store="s", reduction="sum", timeout_s=DEADLINE_S)
    kv.init("there", torch.zeros(size))
    state = kv.state_dict()

    def none(*_: Any, **__: Any) -> Any:
        raise MemoryLimitReached("no memory")

    map_segment = shm.map_segment

    def refused_map(message: Any, descriptor: int, *args: Any, **options: Any) -> Any:
        if "server" not in threading.current_thread().name:  # the worker has memory
            return map_segment(message, descriptor, *args, **options)
        os.close(descriptor)
        return none()

    calls: dict[str, Callable[[], Any]] = {
        "init": lambda: kv.init("large", large),
        "put": lambda: kv.put("there", large),
        "push": lambda: kv.pushpull("there", large),
        "load_state_dict": lambda: kv.load_state_dict(state),
    }
    with monkeypatch.context() as patch:
        patch.setattr("tensorkv.server.loop.fresh", none)
        patch.setattr(cluster.servers[0]._pool, "take", none)
        patch.setattr("tensorkv.server.shm.map_segment", refused_map)
        with pytest.raises(MemoryLimitReached):
            calls[call]()
    assert kv.pull("there").tolist() == [0.0] * size
    calls[call]()
    assert (len(kv), "large" in kv) == ((2, True) if call == "init" else (1, False))
    kv.close()
    job.close(m.Goodbye())
    cluster.stop()


def test_commits_of_two_threads_are_made_one_after_the_other() -> None:
    """The first commits what both threads have pushed; no call is forgotten on the way."""

    def work(kv: KVStore) -> list[int]:
        kv.init(["a", "b"], [torch.zeros(4), torch.zeros(4)])
        kv.set_updater("add")
        for _ in range(10):
            kv.push(["a", "b"], [torch.ones(4), torch.ones(4)], apply=False)
            with ThreadPoolExecutor(3) as pool:
                calls = [pool.submit(kv.commit) for _ in range(3)]
                assert all(call.result(DEADLINE_S).applied for call in calls)
        assert kv.pull("a").tolist() == [20.0] * 4
        return [kv.info(key).version for key in ("a", "b")]

    assert run_job(work, num_workers=2, num_servers=2, timeout_s=DEADLINE_S) == [[10, 10]] * 2


def test_a_setting_that_its_leader_gives_up_fails_for_the_others_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rank 0 reaches its deadline before the setting is sent: rank 1 does not wait for its own deadline."""

    def given_up(self: Hold, call: str) -> Any:
        raise WaitTimeout(f"{call} was given up")

    def work(kv: KVStore) -> None:
        kv.init("w", torch.zeros(4))
        kv.barrier()
        if kv.rank == 0:
            monkeypatch.setattr(Hold, "turn", given_up)
        with pytest.raises(WaitTimeout, match="was given up"):
            kv.set_updater("add")
        kv.barrier()
        monkeypatch.undo()
        kv.barrier()
        kv.set_updater("add")
        kv.push("w", torch.ones(4))
        assert kv.pull("w").tolist() == [2.0] * 4

    run_job(work, num_workers=2, num_servers=2, timeout_s=DEADLINE_S)


def test_a_save_alone_waits_for_no_worker_that_has_changed_options() -> None:
    """It sends the change to all servers with its next call, though this concerns one of them."""
    changed = threading.Event()

    def work(kv: KVStore) -> float:
        assert isinstance(kv, DistStore)
        kv.set_optimizer("sgd", lr=1.0)
        kv.init("w", ones(0))  # on one of two servers
        kv.barrier()
        if kv.rank == 0:
            kv.set_optimizer_options(lr=0.5)
            kv.push("w", ones())
            assert not kv._job.num_changes_queued
            kv.info("w")  # its server has the change now; the other one gets it sooner or later
            changed.set()
            return kv.pull("w")[0].item()
        assert changed.wait(DEADLINE_S)
        saved = kv.state_dict(alone=True)
        kv.set_optimizer_options(lr=0.5)
        kv.push("w", ones())
        assert kv.pull("w")[0].item() == -1.0
        with tensorkv.create("local") as resumed:
            resumed.load_state_dict(saved)
            resumed.push("w", ones())
            return resumed.pull("w")[0].item()

    found = run_job(work, num_workers=2, num_servers=2, timeout_s=DEADLINE_S)
    assert found == [-1.0, -0.5]


def test_the_scheduler_hears_of_a_delete_before_the_key_can_be_looked_up_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a look-up of another thread could learn the key anew, and use what the servers have dropped."""

    def work(kv: KVStore) -> None:
        assert isinstance(kv, DistStore)
        kv.init("w", ones())
        told: list[Any] = []
        retire, notify = kv._core.keys.retire, kv._job.control.notify

        def noted(message: Any) -> None:
            told.append(type(message))
            notify(message)

        def checked(entries: Any) -> Any:
            assert m.DeleteKeys in told
            return retire(entries)

        with monkeypatch.context() as patch:
            patch.setattr(kv._core, "_notify", noted)
            patch.setattr(kv._core.keys, "retire", checked)
            kv.delete("w")
        assert "w" not in kv

    run_job(work, num_workers=1, num_servers=1, timeout_s=DEADLINE_S)


@pytest.mark.parametrize("host", ["inproc", "127.0.0.1"])
def test_calls_behind_a_deferred_push_that_waits_for_a_commit_are_refused(host: str) -> None:
    """Sent behind it, a push would end the connection, and a pull would wait for a commit that follows it."""
    refused = threading.Event()

    def work(kv: KVStore) -> list[float]:
        kv.set_updater("add")
        kv.init(["w", "v"], [ones(0), ones(0)])
        if kv.rank == 1:
            assert refused.wait(DEADLINE_S)
        kv.push("w", ones(1))
        deferred = kv.push("w", ones(10), apply=False, async_op=True)
        assert deferred is not None
        if kv.rank == 0:
            calls: list[Callable[[], Any]] = [
                lambda: kv.push("w", ones(100)),
                lambda: kv.push(["v", "w"], [ones(100)] * 2),
                lambda: kv.push("w", ones(100), apply=False),
                lambda: kv.push("w", ones(100), async_op=True),
                lambda: kv.pushpull("w", ones(100)),
                lambda: kv.pull("w"),
                lambda: kv.pull(["v", "w"], async_op=True),
                lambda: kv.put("w", ones(100)),
            ]
            for call in calls:
                with pytest.raises(UncommittedPush, match="key 'w' was pushed with apply=False"):
                    call()
            refused.set()
        deferred.wait()
        assert kv.commit().applied
        return [value[0].item() for value in kv.pull(["w", "v"])]

    found = run_job(work, num_workers=2, num_servers=2, host=host, timeout_s=DEADLINE_S)
    assert found == [[22.0, 0.0]] * 2


def test_a_fault_of_a_key_that_a_load_replaces_is_not_the_new_keys() -> None:
    with open_dist("dist_sync", embedded=True) as kv:
        assert isinstance(kv, DistStore)
        kv.init("w", ones(1))
        saved = kv.state_dict()
        kv.set_updater(refuse)
        kv.push("w", ones())
        kv._flush(DEADLINE_S)
        assert kv._core.keys.faults
        kv.load_state_dict(saved)
        assert kv.pull("w").tolist() == [1.0] * 4
