"""Ctrl-C at any step of a call: afterwards the store is as it was promised, or the worker has left the job.

The interpreter looks for signals where a call of a function has ended and where a function of Python
begins. A trace function raises there, one place after the other.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import itertools
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch

import tensorkv
from tensorkv.errors import PeerLostError, TensorKVError
from tensorkv.launch.cluster import LocalCluster
from tensorkv.stores.dist import DistStore
from tensorkv.wire import messages as m
from tensorkv.worker import interleave

PACKAGE = os.path.dirname(tensorkv.__file__)
KEYS = ["small", "big"]
TIMEOUT_S = 20.0
SEED = int(os.environ.get("TEST_SEED", "0"))
STRIDE = 12
LONG_STRIDE = 60
"""Every so many places are tried, from a random one on; in long calls fewer."""


class Interrupt(KeyboardInterrupt):
    """Raised in place of what Ctrl-C raises."""


@functools.cache
def places(code: CodeType) -> set[int]:
    """Return the offsets of the instructions before which a signal may be seen."""
    names = [(each.opname, each.offset) for each in dis.get_instructions(code)]
    looks = ("CALL", "CALL_FUNCTION_EX", "CALL_KW", "RESUME")
    return {offset for (before, _), (_, offset) in itertools.pairwise(names) if before in looks}


def interrupt(call: Callable[[], Any], place: int) -> str | None:
    """Make a call and raise at its n-th place in the package; return where, None if it has not so many."""
    found: list[str] = []
    passed = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal passed
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode" and not found and frame.f_lasti in places(frame.f_code):
            passed += 1
            if passed == place:
                found.append(f"{frame.f_code.co_qualname}, line {frame.f_lineno}")
                sys.settrace(None)
                raise Interrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Interrupt:
        pass
    finally:
        sys.settrace(before)
    return found[0] if found else None


class Bench:
    """A worker alone in its job, with two servers that share the large value."""

    def __init__(self, way: str, folder: str) -> None:
        self.folder = folder
        sockets: dict[str, Any] = {"host": "127.0.0.1", "transport": way}
        options = {} if way == "inproc" else sockets
        self.cluster = LocalCluster(1, 2, timeout_s=TIMEOUT_S, slice_bound_bytes=3000, **options)
        self.job = self.cluster.join(0)
        self.kv = DistStore("dist_sync", self.job, store="default", reduction="sum", timeout_s=TIMEOUT_S)
        self.ones = [torch.ones(3), torch.ones(2000)]
        self.kv.set_updater("add")
        self.kv.init(KEYS, [torch.zeros(3), torch.zeros(2000)])
        for _ in range(2):
            self.kv.pushpull(KEYS, self.ones)
            self.kv.push(KEYS, self.ones)
            self.kv.pull(KEYS)
        self.state = self.kv.state_dict()
        self.kv.save(folder)
        self._fresh = itertools.count()

    def fresh(self) -> str:
        """Return a new name for a key."""
        return f"fresh {next(self._fresh)}"

    def come_and_go(self) -> None:
        """Make a key and delete it."""
        key = self.fresh()
        self.kv.init(key, torch.ones(2000))
        self.kv.delete(key)

    def check(self) -> None:
        """No value is torn, one more push counts once, and calls that are made one by one can be made.

        Raises:
            PeerLostError: the worker has left the job.
        """
        before = self.kv.pull(KEYS)
        self.kv.push(KEYS, self.ones)
        for old, new in zip(before, self.kv.pull(KEYS), strict=True):
            assert len(old.unique()) == 1
            assert (new - old).unique().tolist() == [1.0]
        self.kv.set_updater("add")
        self.kv.state_dict()
        self.come_and_go()

    def close(self) -> None:
        with contextlib.suppress(TensorKVError):
            self.kv.close()
        self.job.close(m.Goodbye())
        self.cluster.stop()


@contextlib.contextmanager
def benches(way: str, folder: str) -> Iterator[Callable[[], Bench]]:
    """Give a function that returns the bench, a new one where its worker has left the job."""
    open_ones: list[Bench] = []

    def bench() -> Bench:
        if open_ones and open_ones[-1].job.failure() is not None:
            open_ones.pop().close()
        if not open_ones:
            open_ones.append(Bench(way, folder))
        return open_ones[-1]

    try:
        yield bench
    finally:
        for each in open_ones:
            each.close()


CALLS: dict[str, Callable[[Bench], Any]] = {
    "push": lambda bench: bench.kv.push(KEYS, bench.ones),
    "pull": lambda bench: bench.kv.pull(KEYS),
    "pushpull": lambda bench: bench.kv.pushpull(KEYS, bench.ones),
    "put": lambda bench: bench.kv.put(KEYS, bench.ones),
    "barrier": lambda bench: bench.kv.barrier(),
    "setting": lambda bench: bench.kv.set_updater("add"),
}
LONG_CALLS: dict[str, Callable[[Bench], Any]] = {
    "init, delete": lambda bench: bench.come_and_go(),
    "state_dict": lambda bench: bench.kv.state_dict(),
    "load_state_dict": lambda bench: bench.kv.load_state_dict(bench.state),
    "save": lambda bench: bench.kv.save(bench.folder),
    "save alone": lambda bench: bench.kv.save(bench.folder, alone=True),
    "load": lambda bench: bench.kv.load(bench.folder),
}


# Between `open` and its `with` Python itself has only the count of references to close a file.
@pytest.mark.filterwarnings("ignore:.*<_io.FileIO:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "way", ["inproc", *(pytest.param(way, marks=pytest.mark.slow) for way in ["tcp", "shm"])]
)
@pytest.mark.parametrize("name", [*CALLS, *LONG_CALLS])
def test_a_call_that_is_broken_off_leaves_no_torn_value(
    name: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(m, "PLACED_BYTES", 1)
    monkeypatch.setattr(interleave, "MIN_BYTES", 1)
    call = (CALLS | LONG_CALLS)[name]
    stride = STRIDE if name in CALLS else LONG_STRIDE
    went_on = left = 0
    with benches(way, str(tmp_path)) as bench:
        for place in itertools.count(1 + random.Random(SEED).randrange(stride), stride):
            now = bench()
            where = interrupt(lambda now=now: call(now), place)  # type: ignore[misc]
            assert torch.is_grad_enabled(), f"seed {SEED}, {where}: gradients are off"
            if where is None:
                break
            told = ""
            try:
                now.check()
            except PeerLostError as error:
                told = str(error)
            except Exception as error:
                raise AssertionError(f"seed {SEED}, broken off in {where}") from error
            assert not told or "a call was broken off by Interrupt" in told, f"seed {SEED}, {where}: {told}"
            went_on += not told
            left += bool(told)
    assert went_on or name.startswith("load")  # it leaves nearly always
    assert left or name == "barrier"


def test_a_delete_that_is_broken_off_half_way_leaves_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler has deleted the key and the servers have not: nobody may wait at its slices."""

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise Interrupt

    with benches("inproc", str(tmp_path)) as bench:
        now = bench()
        with monkeypatch.context() as patch:
            patch.setattr(type(now.job), "ask_all", interrupted)
            with pytest.raises(Interrupt):
                now.kv.delete("small")
        with pytest.raises(PeerLostError, match="a call was broken off by Interrupt"):
            now.kv.pull("big")


def test_others_are_told_at_once_that_a_worker_was_broken_off() -> None:
    cluster = LocalCluster(2, 1, timeout_s=TIMEOUT_S)
    jobs = [cluster.join(rank) for rank in range(2)]
    try:
        for job in jobs:
            store = job.control.request(
                lambda n: m.JoinStore(n, "shared", m.StorePolicy("sync"), "sum", "fail"), "opening", TIMEOUT_S
            ).store
        with pytest.raises(Interrupt), jobs[0].order, jobs[0].whole:
            raise Interrupt
        with pytest.raises(PeerLostError, match="worker 0 .*a call was broken off by Interrupt"):
            jobs[1].control.request(lambda n: m.Barrier(n, store), "barrier", TIMEOUT_S, store)
    finally:
        for job in jobs:
            job.close(m.Goodbye())
        cluster.stop()
