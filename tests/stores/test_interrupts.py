"""Ctrl-C and other signals inside calls of distributed stores: real ones, to this process.

After Ctrl-C a call has ended whole, or not at all, or was given up in its wait; the worker stays in its job.
A second one, and an exception of any other handler, makes it leave if others may rely on the rest.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import tensorkv
from tensorkv.errors import PeerLostError, TensorKVError
from tensorkv.interrupts import Interrupted, Leaving, ctrl_c
from tensorkv.launch.cluster import LocalCluster
from tensorkv.peer import deadlines
from tensorkv.stores.dist import DistStore
from tensorkv.transport import inproc
from tensorkv.wire import messages as m
from tensorkv.worker import control, interleave, signals
from tensorkv.worker.plancache import PlanCache
from tensorkv.worker.session import Session

PACKAGE = os.path.dirname(tensorkv.__file__)
KEYS = ["small", "big"]
TIMEOUT_S = 20.0
SEED = int(os.environ.get("TEST_SEED", "0"))
STRIDE = 10
LONG_STRIDE = 60
"""Every so many steps are tried, from a random one on; in long calls fewer."""


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Begin with Python's handler of Ctrl-C, and put those of before back."""
    alarm = signal.getsignal(signal.SIGALRM)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
    signal.signal(signal.SIGALRM, alarm)
    assert not ctrl_c.noted


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def press_in(call: Callable[[], Any], step: int) -> str | None:
    """Make a call and press Ctrl-C at its n-th step; return where, None if it has not so many.

    A step is a call of a function of the package. What `__del__` raises is ignored by Python: it is no step.
    """
    found: list[str] = []
    passed = 0

    def trace(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal passed
        code = frame.f_code
        if not found and code.co_filename.startswith(PACKAGE) and code.co_name != "__del__":
            passed += 1
            if passed == step:
                found.append(f"{code.co_qualname}, line {frame.f_lineno}")
                sys.settrace(None)
                press()

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
        if found:
            threading.Event().wait(TIMEOUT_S)
            raise AssertionError(f"Ctrl-C in {found[0]} was lost")
    except KeyboardInterrupt:
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
        self.outs = {key: torch.empty_like(one) for key, one in zip(KEYS, self.ones, strict=True)}
        self._fresh = itertools.count()

    def bound(self) -> None:
        """Make a bound step's call; a load between two of them needs a new step."""
        self.kv.bind(push=dict(zip(KEYS, self.ones, strict=True)), out=self.outs).pushpull()

    def come_and_go(self) -> None:
        """Make a key and delete it."""
        key = f"fresh {next(self._fresh)}"
        self.kv.init(key, torch.ones(2000))
        self.kv.delete(key)

    def commit(self) -> None:
        """Push and commit, after a commit that Ctrl-C has kept from being made."""
        with contextlib.suppress(tensorkv.errors.UncommittedPush):
            self.kv.push(KEYS, self.ones, apply=False)
        self.kv.commit()

    def check(self) -> None:
        """No value is torn, one more push counts once, and every call can be made."""
        assert self.job.failure() is None
        self.kv.commit()  # one that was given up ends, else this commits nothing
        before = self.kv.pull(KEYS)
        self.kv.push(KEYS, self.ones)
        for old, new in zip(before, self.kv.pull(KEYS), strict=True):
            assert len(old.unique()) == 1
            assert (new - old).unique().tolist() == [1.0]
        self.kv.set_updater("add")
        self.kv.state_dict()
        self.come_and_go()
        self.kv.load(self.folder)

    def close(self) -> None:
        with contextlib.suppress(TensorKVError):
            self.kv.close()
        self.job.close(m.Goodbye())
        self.cluster.stop()


CALLS: dict[str, Callable[[Bench], Any]] = {
    "push": lambda bench: bench.kv.push(KEYS, bench.ones),
    "pull": lambda bench: bench.kv.pull(KEYS),
    "pushpull": lambda bench: bench.kv.pushpull(KEYS, bench.ones),
    "bound step": lambda bench: bench.bound(),
    "async pull": lambda bench: bench.kv.pull(KEYS, async_op=True).wait(),
    "put": lambda bench: bench.kv.put(KEYS, bench.ones),
    "barrier": lambda bench: bench.kv.barrier(),
    "commit": lambda bench: bench.commit(),
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
SLOW = [pytest.param(way, False, marks=pytest.mark.slow) for way in ("tcp", "shm")]


@pytest.mark.parametrize(("way", "ticks"), [("inproc", False), ("inproc", True), *SLOW])
@pytest.mark.parametrize("name", [*CALLS, *LONG_CALLS])
def test_ctrl_c_leaves_no_torn_value_and_the_worker_in_its_job(
    name: str, way: str, ticks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `ticks`, waits look for Ctrl-C all the time: so it is raised in them, and not after the call."""
    monkeypatch.setattr(m, "PLACED_BYTES", 1)
    monkeypatch.setattr(interleave, "MIN_BYTES", 1)
    for module in (inproc, control) if ticks else ():
        monkeypatch.setattr(module, "TICK_S", 1e-5)
    call = (CALLS | LONG_CALLS)[name]
    stride = STRIDE if name in CALLS else LONG_STRIDE
    with contextlib.closing(Bench(way, str(tmp_path))) as bench:
        for step in itertools.count(1 + random.Random(SEED).randrange(stride), stride):
            where = press_in(lambda: call(bench), step)
            if where is None:
                break
            try:
                bench.check()
            except Exception as error:
                raise AssertionError(f"seed {SEED}, Ctrl-C in {where}") from error
        assert step > stride, "no step was tried"


# ---- waiting for another worker ------------------------------------------------------------------


@dataclass
class Pair:
    """Two workers of a job. The main thread is one of them."""

    jobs: list[Session]
    stores: list[DistStore]
    pool: ThreadPoolExecutor

    def interrupt(
        self, call: Callable[[], Any], signum: signal.Signals, kind: type[BaseException] = Interrupted
    ) -> None:
        """Make a call that waits for the other worker; send a signal while it does, which raises `kind`."""
        main = threading.main_thread()

        def send_when_it_waits() -> None:
            while not any(wait.thread == main.name for wait in deadlines.waiting_calls()):
                threading.Event().wait(0.01)
            signal.pthread_kill(main.ident or 0, signum)

        sent = self.pool.submit(send_when_it_waits)
        with pytest.raises(kind):
            call()
        sent.result(TIMEOUT_S)


@pytest.fixture(params=["inproc", "tcp", "shm"])
def pair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    monkeypatch.setattr(deadlines, "_noted", type(deadlines._noted)())
    way: dict[str, Any] = {"host": "127.0.0.1", "transport": request.param}
    cluster = LocalCluster(2, 2, timeout_s=TIMEOUT_S, **({} if request.param == "inproc" else way))
    jobs = [cluster.join(rank) for rank in range(2)]
    stores = [
        DistStore("dist_sync", job, store="default", reduction="sum", timeout_s=TIMEOUT_S) for job in jobs
    ]
    for store in stores:
        store.init("w", torch.zeros(4))
    with ThreadPoolExecutor(2) as pool:
        yield Pair(jobs, stores, pool)
    for job in jobs:
        job.close(m.Abandon("the test is over"))
    cluster.stop()


ONE = torch.ones(4)


def push_and(call: Callable[[DistStore], Any], **options: Any) -> Callable[[DistStore], Any]:
    def both(kv: DistStore) -> Any:
        kv.push("w", ONE, **options)
        return call(kv)

    return both


def step(kv: DistStore) -> Any:
    return kv.bind(push={"w": ONE}, out={"w": torch.zeros(4)}).pushpull()


def nothing(kv: DistStore) -> None: ...


def pull(kv: DistStore) -> Any:
    return kv.pull("w")


def commit(kv: DistStore) -> Any:
    return kv.commit()


def load(kv: DistStore) -> None:
    with tensorkv.create("local") as local:
        local.init("w", ONE)
        state = local.state_dict()
    kv.load_state_dict(state)


Call = Callable[[DistStore], Any]
WAITS: dict[str, tuple[int, Call, Call, Call]] = {
    "pull": (0, push_and(pull), push_and(nothing), pull),
    "push": (0, push_and(push_and(nothing)), push_and(nothing), nothing),
    "pushpull": (0, lambda kv: kv.pushpull("w", ONE), push_and(nothing), pull),
    "bound step": (0, step, push_and(nothing), pull),
    "barrier": (0, lambda kv: kv.barrier(), lambda kv: kv.barrier(), lambda kv: kv.barrier()),
    "commit": (0, push_and(commit, apply=False), push_and(commit, apply=False), commit),
    "init": (1, *[lambda kv: kv.init("v", ONE)] * 3),
    "setting": (1, *[lambda kv: kv.set_updater("add")] * 3),
    "state_dict of the leader": (0, *[lambda kv: kv.state_dict()] * 3),
    "state_dict": (1, *[lambda kv: kv.state_dict()] * 3),
    "load_state_dict of the leader": (0, load, load, load),
    "load_state_dict": (1, load, load, load),
}
"""By name: who presses Ctrl-C, in which call; then what the other worker does, and what the first."""


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_for_another_worker_is_given_up(pair: Pair, name: str) -> None:
    rank, call, others, then = WAITS[name]
    kv, other = pair.stores[rank], pair.stores[1 - rank]
    pair.interrupt(lambda: call(kv), signal.SIGINT)
    assert pair.jobs[rank].failure() is None
    done = pair.pool.submit(others, other)
    then(kv)
    done.result(TIMEOUT_S)
    before = kv.pull("w")
    done = pair.pool.submit(push_and(pull), other)
    kv.push("w", ONE)
    assert kv.pull("w").tolist() == done.result(TIMEOUT_S).tolist()
    assert before.unique().numel() == 1


class Late(Exception):
    """Raised by a handler of the user's."""


@pytest.mark.parametrize(("signum", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGALRM, Late)])
def test_a_works_wait_is_given_up_at_once(
    pair: Pair, signum: signal.Signals, kind: type[BaseException]
) -> None:
    """It waits for another thread, so nothing is critical."""

    def late(signum: int, frame: Any) -> None:
        raise Late

    signal.signal(signal.SIGALRM, late)
    kv, other = pair.stores
    kv.push("w", ONE)
    work = kv.pull("w", async_op=True)
    main = threading.main_thread().ident
    assert main is not None
    waits, raised = threading.Event(), threading.Event()

    def send_until_raised() -> None:
        """Send it again if it came just before Python began to wait, which does not see it then."""
        waits.wait()
        while not raised.wait(0.25):
            signal.pthread_kill(main, signum)

    sending = pair.pool.submit(send_until_raised)
    try:
        waits.set()
        work.wait(TIMEOUT_S)
    except kind:
        raised.set()
    assert raised.is_set()
    sending.result(TIMEOUT_S)
    other.push("w", ONE)
    assert work.result().tolist() == [2.0] * 4


# ---- a second one, and other signals -------------------------------------------------------------


def raise_in_tell(monkeypatch: pytest.MonkeyPatch, *signums: int) -> None:
    """Send signals between the messages of a call that belong together."""

    def tell(self: PlanCache, plan: Any) -> None:
        for signum in signums:
            signal.raise_signal(signum)

    monkeypatch.setattr(PlanCache, "tell", tell)


def check_left(pair: Pair, why: str) -> None:
    """Worker 0 has left the job, and the other one is told."""

    def meet() -> None:
        """Worker 0 may have asked for one barrier before."""
        pair.stores[1].barrier()
        pair.stores[1].barrier()

    with pytest.raises(PeerLostError, match=f"worker 0 .*a call was broken off by {why}"):
        meet()
    with pytest.raises(PeerLostError, match=f"a call was broken off by {why}"):
        pair.stores[0].pull("w")


def test_a_second_ctrl_c_leaves_the_job_at_once(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        raise_in_tell(patch, signal.SIGINT, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            pair.stores[0].push("w", ONE)
    check_left(pair, "KeyboardInterrupt")


@pytest.mark.parametrize("kind", [Late, TimeoutError])
@pytest.mark.parametrize("where", ["between messages", "at a server's reply", "at the scheduler's"])
def test_an_exception_of_another_handler_leaves_the_job(
    pair: Pair, where: str, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(signum: int, frame: Any) -> None:
        raise kind

    kv = pair.stores[0]
    signal.signal(signal.SIGALRM, late)
    if where == "between messages":
        with monkeypatch.context() as patch:
            raise_in_tell(patch, signal.SIGALRM)
            with pytest.raises(kind):
                kv.push("w", ONE)
    elif where == "at a server's reply":
        kv.push("w", ONE)
        pair.interrupt(lambda: kv.pull("w"), signal.SIGALRM, kind)
    else:
        pair.interrupt(kv.barrier, signal.SIGALRM, kind)
    check_left(pair, kind.__name__)


def test_with_a_handler_of_the_users_nothing_is_deferred(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pressed: list[int] = []
    signal.signal(signal.SIGINT, lambda signum, frame: pressed.append(signum))
    tell = PlanCache.tell

    def tell_and_press(self: PlanCache, plan: Any) -> None:
        press()
        assert pressed == [signal.SIGINT]
        tell(self, plan)

    with monkeypatch.context() as patch:
        patch.setattr(PlanCache, "tell", tell_and_press)
        pair.stores[0].push("w", ONE)
    assert not ctrl_c.noted
    pair.stores[1].push("w", ONE)
    assert pair.stores[0].pull("w").tolist() == [2.0] * 4


def test_term_gives_a_wait_up_and_the_others_go_on(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "LEAVE_CALL_S", 0.0)
    made = signals.WorkerSignals("worker 0")
    try:
        pair.stores[0].push("w", ONE)
        pair.interrupt(lambda: pair.stores[0].pull("w"), signal.SIGTERM, Leaving)
    finally:
        made.stop()
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    assert pair.jobs[0].failure() is None
    pair.stores[0].close()
    found = pair.pool.submit(push_and(pull), pair.stores[1]).result(TIMEOUT_S)
    assert found.tolist() == [2.0] * 4  # what it had pushed counts
