"""Random programs: a store of any kind gives what the reference gives, to the last bit."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from tensorkv import ABSENT
from tensorkv.errors import TensorKVError
from tensorkv.store import KVStore
from tensorkv.testing.makers import EMBEDDED, JOBS, LOCAL
from tensorkv.testing.reference import ReferenceStore, WouldWait
from tensorkv.testing.suite import StoreMaker, in_workers, keep_half, noise

KEYS: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "a": ((3,), torch.float32),
    "b": ((2, 2), torch.float64),
    "n": ((), torch.int64),
}
FLOAT_KEYS = ["a", "b"]
REFUSALS = {"ShapeMismatch", "DtypeMismatch", "UncommittedPush"}  # of two mistakes either may be named
UPDATERS: dict[str, Any] = {"assign": "assign", "add": "add", "keep_half": keep_half}

programs = hypothesis.settings(
    deadline=None,
    print_blob=True,
    derandomize="CI" in os.environ,
    phases=[hypothesis.Phase.reuse, hypothesis.Phase.generate, hypothesis.Phase.shrink],
    max_examples=25,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
"""Prints the program that failed and how to run it again; the same programs each time under CI."""

ALL = [*LOCAL, *EMBEDDED, *JOBS]


# ---- what a program is made of -----------------------------------------------------------------------


@dataclass(frozen=True)
class Op:
    """One call. `seeds` make the pushed tensors, one per device; none stands for ABSENT."""

    call: str
    key: str = ""
    seeds: tuple[int, ...] = ()
    like: str = ""  # the key whose shape and dtype the tensors have; another than `key` is a mistake
    option: Any = None
    weight: float | None = None  # of a push

    def tensors(self) -> list[torch.Tensor]:
        shape, dtype = KEYS[self.like or self.key]
        if dtype.is_floating_point:
            return [noise(seed, *shape, dtype=dtype) for seed in self.seeds]
        return [torch.full(shape, seed, dtype=dtype) for seed in self.seeds]


class ReferenceWorker:
    """One rank of the reference, with the calls of a store."""

    def __init__(self, model: ReferenceStore, rank: int = 0) -> None:
        self.model, self.rank = model, rank

    def keys(self) -> list[Any]:
        return self.model.keys(self.rank)

    def barrier(self) -> None:
        """The reference has nothing to wait for."""

    def close(self) -> None:
        self.model.leave(self.rank)

    def __getattr__(self, call: str) -> Callable[..., Any]:
        method = getattr(self.model, call)
        return lambda *args, **options: method(self.rank, *args, **options)


def perform(store: Any, op: Op) -> Any:
    """Make one call on a store or on a rank of the reference; return the result or the error's name."""
    try:
        return _perform(store, op)
    except TensorKVError as exc:
        return type(exc).__name__


def _perform(store: Any, op: Op) -> Any:
    if op.call == "init":
        return store.init(op.key, op.tensors()[0])
    if op.call == "push":
        return store.push(op.key, op.tensors() or ABSENT, apply=op.option is not False, weight=op.weight)
    if op.call == "set_updater":
        return store.set_updater(UPDATERS[op.option])
    if op.call == "commit":
        max_norm, skip = op.option
        return store.commit(max_norm=max_norm, skip=skip)
    if op.call in ("barrier", "close", "keys"):
        return getattr(store, op.call)()
    result = getattr(store, op.call)(op.key)
    if op.call == "info" and not isinstance(result, tuple):
        return (result.round, result.version)
    return result


def assert_same(found: Any, expected: Any, where: str, exact: bool) -> None:
    """Compare two results of `perform`."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, torch.Tensor), f"{where}: {found!r}, not {expected}"
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype), where
        equal = torch.equal(found, expected) if exact else torch.allclose(found, expected, 1e-5, 1e-5)
        assert equal, f"{where}: {found}, not {expected}"
    elif hasattr(expected, "norm"):
        assert found.applied is expected.applied, f"{where}: {found}, not {expected}"
        norms_agree = found.norm == (expected.norm and pytest.approx(expected.norm, rel=1e-6))
        assert norms_agree, f"{where}: {found}, not {expected}"
    else:
        assert found == expected, f"{where}: {found!r}, not {expected!r}"


# ---- one worker ----------------------------------------------------------------------------------------

seeds = st.lists(st.integers(0, 50), min_size=1, max_size=3).map(tuple)


def _single_ops(keys: list[str], is_async: bool) -> st.SearchStrategy[Op]:
    key = st.sampled_from(keys)
    choices = [
        st.builds(lambda k, s: Op("init", k, (s,)), key, st.integers(0, 50)),
        st.builds(lambda k, s: Op("push", k, s), key, seeds),
        st.builds(lambda k, s: Op("push", k, s), key, seeds),
        st.builds(lambda k, s, like: Op("push", k, s, like), key, seeds, key),
        st.builds(lambda k: Op("push", k), key),
        st.builds(lambda k: Op("pull", k), key),
        st.builds(lambda k: Op("info", k), key),
        st.builds(lambda k: Op("delete", k), key),
        st.builds(lambda u: Op("set_updater", option=u), st.sampled_from(sorted(UPDATERS))),
        st.just(Op("keys")),
    ]
    if not is_async:
        norms = st.sampled_from([None, None, 0.5, 100.0])
        choices.append(
            st.builds(lambda k, s: Op("push", k, s, option=False), st.sampled_from(FLOAT_KEYS), seeds)
        )
        choices.append(st.builds(lambda n, s: Op("commit", option=(n, s)), norms, st.booleans()))
    return st.one_of(choices)


@st.composite
def single_programs(draw: st.DrawFn, is_async: bool, reduction: str) -> list[Op]:
    keys = list(KEYS) if reduction == "sum" else FLOAT_KEYS
    inits = [Op("init", key, (index,)) for index, key in enumerate(keys)]
    return inits[: draw(st.integers(0, len(inits)))] + draw(
        st.lists(_single_ops(keys, is_async), max_size=25)
    )


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("maker", ALL, ids=lambda maker: f"{maker.kind}-{type(maker).__name__}")
def test_one_worker(maker: StoreMaker, reduction: str) -> None:
    @programs
    @hypothesis.given(single_programs(maker.is_async, reduction))
    def run(program: list[Op]) -> None:
        reference = ReferenceWorker(ReferenceStore(1, reduction, maker.is_async))
        expected = [perform(reference, op) for op in program]
        (found,) = maker.run(lambda kv: [perform(kv, op) for op in program], reduction=reduction)
        exact = not any(op.call == "commit" and op.option[0] for op in program)
        for number, op in enumerate(program):
            if op.like not in ("", op.key) and expected[number] in REFUSALS:
                assert found[number] in REFUSALS, f"call {number}, {op}: {found[number]!r}"
            else:
                assert_same(found[number], expected[number], f"call {number}, {op}", exact)

    run()


# ---- several workers -----------------------------------------------------------------------------------


@dataclass
class Job:
    """A program per rank, grown call by call along an order in which the reference never has to wait.

    Such an order exists for every program that is built here, so no real job may hang on it.
    """

    workers: int
    reduction: str
    model: ReferenceStore = field(init=False)
    calls: list[list[Op]] = field(init=False)
    expected: list[list[Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.model = ReferenceStore(self.workers, self.reduction)
        self.calls = [[] for _ in range(self.workers)]
        self.expected = [[] for _ in range(self.workers)]
        for index, key in enumerate(FLOAT_KEYS):
            self.add(0, Op("init", key, (index,)))
        self.add_for_all(Op("barrier"))

    @property
    def members(self) -> list[int]:
        return [rank for rank in range(self.workers) if rank not in self.model.left]

    def add(self, rank: int, op: Op) -> bool:
        """Append a call to the program of a rank unless it would have to wait."""
        try:
            result = perform(ReferenceWorker(self.model, rank), op)
        except WouldWait:
            return False
        self.calls[rank].append(op)
        self.expected[rank].append(result)
        return True

    def add_for_all(self, op: Op) -> None:
        for rank in self.members:
            assert self.add(rank, op)

    def has(self, rank: int, key: str) -> bool:
        """Whether a rank has not deleted a key since it was last made."""
        return key in self.model.keys(rank)

    def add_commit(self, devices: tuple[int, ...], max_norm: float | None, skipping: int) -> None:
        """Every worker pushes all keys with apply=False, one perhaps absent, and all commit."""
        self.complete_rounds()
        for rank in self.members:
            for key in FLOAT_KEYS:
                seeds = tuple(rank * 7 + seed for seed in devices)
                if not self.has(rank, key):
                    continue
                weight = 1.5 + rank if self.model.reduction == "mean" else None
                self.add(rank, Op("push", key, seeds, option=False, weight=weight))
        for rank in self.members:
            self.add(rank, Op("commit", option=(max_norm, rank == skipping)))
        for rank in self.members:  # all have the result that the last one got
            self.expected[rank][-1] = self.expected[self.members[-1]][-1]

    def add_delete(self, key: str, rank: int) -> None:
        """Let one worker delete a key; what it does with it then depends on the others."""
        others = [each for each in self.members if each != rank and self.has(each, key)]
        if others and self.has(rank, key):
            assert self.add(rank, Op("delete", key))

    def add_again(self, key: str, seed: int) -> None:
        """Let all delete a key that have not, and make it anew; rank 0 waits for the others."""
        for rank in self.members:
            if self.has(rank, key):
                assert self.add(rank, Op("delete", key))
        assert self.add(0, Op("init", key, (seed,)))
        self.add_for_all(Op("barrier"))
        self.add_for_all(Op("pull", key))

    def complete_rounds(self) -> None:
        """Let those who are behind take part in the open rounds, so that nobody waits."""
        for key in FLOAT_KEYS:
            furthest = max(len(pushes) for pushes in self.model.entries[key].pushes)
            for rank in self.members:
                if self.has(rank, key) and len(self.model.entries[key].pushes[rank]) < furthest:
                    assert self.add(rank, Op("push", key))

    def finish(self) -> None:
        self.complete_rounds()
        self.add_for_all(Op("barrier"))
        for key in FLOAT_KEYS:
            for rank in self.members:
                if self.has(rank, key):
                    assert self.add(rank, Op("pull", key))
                    assert self.add(rank, Op("info", key))


WEIGHTS = st.sampled_from([None, None, 0, 1, 2.5, 1000, 1e-3])
STEPS = ["push"] * 6 + ["pull"] * 3 + ["absent", "set", "leave", "commit", "delete", "again"]


@st.composite
def jobs(draw: st.DrawFn, workers: int, reduction: str) -> Job:
    job = Job(workers, reduction)
    key, rank = st.sampled_from(FLOAT_KEYS), st.integers(0, workers - 1)
    for _ in range(draw(st.integers(0, 40))):
        what, who, name = draw(st.sampled_from(STEPS)), draw(rank), draw(key)
        if who not in job.members or (what in ("push", "absent", "pull") and not job.has(who, name)):
            continue
        if what == "push":
            weight = draw(WEIGHTS) if reduction == "mean" else None
            job.add(who, Op("push", name, draw(seeds), weight=weight))
        elif what == "absent":
            job.add(who, Op("push", name))
        elif what == "pull":
            job.add(who, Op("pull", name))
        elif what == "set" and set(FLOAT_KEYS) <= set(job.model.keys(0)):  # else it holds when it arrives
            job.add(0, Op("set_updater", option=draw(st.sampled_from(sorted(UPDATERS)))))
        elif what == "leave" and who != 0 and set(FLOAT_KEYS) <= set(job.model.keys(0)):
            job.add(who, Op("close"))
        elif what == "delete":
            job.add_delete(name, who)
        elif what == "commit":
            job.add_commit(draw(seeds), draw(st.sampled_from([None, 1.0])), draw(st.integers(0, 2 * workers)))
        elif what == "again":
            job.add_again(name, draw(st.integers(0, 50)))
    job.finish()
    return job


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("maker", [each for each in JOBS if not each.is_async], ids=lambda maker: maker.kind)
def test_several_workers(maker: StoreMaker, workers: int, reduction: str) -> None:
    @programs
    @hypothesis.given(jobs(workers, reduction))
    def run(job: Job) -> None:
        results = in_workers(
            maker,
            workers,
            lambda kv, meeting: [perform(kv, op) for op in job.calls[kv.rank]],
            reduction=reduction,
        )
        exact = not any(op.call == "commit" and op.option[0] for op in job.calls[0])
        for rank in range(workers):
            for number, op in enumerate(job.calls[rank]):
                where = f"rank {rank}, call {number}, {op}"
                assert_same(results[rank][number], job.expected[rank][number], where, exact)

    run()


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("maker", [each for each in JOBS if each.is_async], ids=lambda maker: maker.kind)
def test_several_workers_asynchronously(maker: StoreMaker, workers: int) -> None:
    """Integers are added in any order to the same sum, so the end is known though the way is not."""
    pushes = st.lists(st.lists(st.integers(-9, 9), min_size=1, max_size=3), max_size=8)

    @programs
    @hypothesis.given(st.lists(pushes, min_size=workers, max_size=workers))
    def run(program: list[list[list[int]]]) -> None:
        def work(kv: KVStore, meeting: Any) -> tuple[float, int, int]:
            kv.init("w", torch.zeros(2))
            kv.set_updater("add")
            for devices in program[kv.rank]:
                kv.push("w", [torch.full((2,), float(value)) for value in devices])
            kv.barrier()
            info = kv.info("w")
            return kv.pull("w")[1].item(), info.round, info.version

        reference = ReferenceStore(workers, is_async=True)
        reference.init(0, "w", torch.zeros(2))
        reference.set_updater(0, "add")
        for rank, own in enumerate(program):
            for devices in own:
                reference.push(rank, "w", [torch.full((2,), float(value)) for value in devices])
        rounds, version = reference.info(0, "w")
        expected = (reference.pull(0, "w")[1].item(), rounds, version)
        assert in_workers(maker, workers, work) == [expected] * workers

    run()
