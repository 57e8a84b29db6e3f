"""Base of the conformance checks: the maker of stores, the table of checks, helpers.

A check is a function that takes a `StoreMaker`, opens stores through it and asserts one promise of
`tensorkv.store.KVStore`. The checks are in the `checks_*` modules; `tensorkv.testing.conformance`
imports them all and selects those that a kind of store must pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import torch

from tensorkv.plain import Key
from tensorkv.store import KVStore

DEADLINE_S = 20.0
"""Maximum wait of a check. Reached only when the store under test hangs."""


class StoreMaker(Protocol):
    """Opens stores of one kind for the checks."""

    @property
    def kind(self) -> str:
        """The kind, as given to `tensorkv.create`."""

    @property
    def max_workers(self) -> int:
        """Maximum number of workers of a job; 1 for a store in one process."""

    @property
    def distributed(self) -> bool:
        """Whether values live outside the worker, so that a later call may raise an updater's error."""

    @property
    def is_async(self) -> bool:
        """Whether every push is a round of its own."""

    @property
    def has_policies(self) -> bool:
        """Whether opening a store takes `staleness` and `quorum`, as `tensorkv.create` does."""

    @property
    def other_kind(self) -> str:
        """Another kind whose stores may be open in the same job, beside one of this kind."""

    def open(self, kv: KVStore, kind: str, store: str, **create_options: Any) -> KVStore:
        """Open another store in the job of `kv`, as the same worker. The caller closes it."""

    def run(self, fn: Callable[[KVStore], Any], num_workers: int = 1, **create_options: Any) -> list[Any]:
        """Open a store in each of `num_workers` workers, call `fn(kv)` there, close the stores.

        The workers are threads of this process: checks of several workers synchronise them in memory.

        Returns:
            The results of `fn`, by rank.

        Raises:
            The first error that `fn` or the store raised.
        """


Only = Literal["sync", "async"]
CheckFunction = Callable[..., None]
FunctionT = TypeVar("FunctionT", bound=CheckFunction)


@dataclass(frozen=True, slots=True)
class Check:
    """One entry of the table of checks.

    `function` is called as `function(maker)` if `workers` is (1,), else as `function(maker, n)` for
    each number n of workers. `only` restricts it to synchronous or asynchronous kinds, `distributed` to
    kinds that keep values outside the worker, and `policies` to kinds that have those.
    """

    function: CheckFunction
    workers: tuple[int, ...]
    only: Only | None
    distributed: bool
    policies: bool = False

    @property
    def name(self) -> str:
        return self.function.__name__.removeprefix("check_")

    def suits(self, maker: StoreMaker) -> bool:
        """Whether a kind of store must pass this check, number of workers aside."""
        if (self.distributed and not maker.distributed) or (self.policies and not maker.has_policies):
            return False
        return self.only is None or (self.only == "async") == maker.is_async


@dataclass(frozen=True, slots=True)
class Case:
    """A check with a number of workers: one test."""

    check: Check
    workers: int

    @property
    def name(self) -> str:
        return self.check.name if self.check.workers == (1,) else f"{self.check.name}-{self.workers}"

    def run(self, maker: StoreMaker) -> None:
        """Run the check. Raises AssertionError or TensorKVError if the store is faulty."""
        if self.check.workers == (1,):
            self.check.function(maker)
        else:
            self.check.function(maker, self.workers)


CHECKS: list[Check] = []
"""Every check of the suite. Complete once `tensorkv.testing.conformance` is imported."""


def check(
    *,
    workers: tuple[int, ...] = (1,),
    only: Only | None = None,
    distributed: bool = False,
    policies: bool = False,
) -> Callable[[FunctionT], FunctionT]:
    """Add the decorated function to the table of checks."""

    def enter(function: FunctionT) -> FunctionT:
        CHECKS.append(Check(function, workers, only, distributed, policies))
        return function

    return enter


# ---- running ---------------------------------------------------------------------------------------


class Meeting:
    """Barrier and events for the workers of a check, outside the store."""

    def __init__(self, workers: int) -> None:
        self._barrier = threading.Barrier(workers)
        self._changed = threading.Condition()
        self._signals: set[str] = set()
        self._failed = False

    def everybody(self) -> None:
        """Wait until every worker has arrived."""
        self._barrier.wait(DEADLINE_S)

    def signal(self, name: str) -> None:
        """Release all waiters for `name`, now and later."""
        with self._changed:
            self._signals.add(name)
            self._changed.notify_all()

    def wait_for(self, name: str) -> None:
        """Wait until a worker has signalled `name`."""
        with self._changed:
            there = self._changed.wait_for(lambda: self._failed or name in self._signals, DEADLINE_S)
            assert there and not self._failed, f"nobody signalled {name!r}"

    def fail(self) -> None:
        """End all waits: a worker has failed and will not arrive."""
        self._barrier.abort()
        with self._changed:
            self._failed = True
            self._changed.notify_all()


def in_threads(calls: list[Callable[[], None]]) -> None:
    """Run each call in a thread of its own, and raise the first error."""
    with ThreadPoolExecutor(len(calls)) as pool:
        for future in [pool.submit(call) for call in calls]:
            future.result(DEADLINE_S)


def in_one(maker: StoreMaker, fn: Callable[[KVStore], Any], **create_options: Any) -> Any:
    """Run `fn(kv)` in a store of one worker and return its result."""
    return maker.run(fn, **create_options)[0]


def in_workers(
    maker: StoreMaker, workers: int, fn: Callable[[KVStore, Meeting], Any], **create_options: Any
) -> list[Any]:
    """Run `fn(kv, meeting)` in each worker of a job and return the results by rank.

    Raises the first error only, not those it causes in other workers.
    """
    meeting = Meeting(workers)
    errors: list[Exception] = []

    def work(kv: KVStore) -> Any:
        try:
            return fn(kv, meeting)
        except Exception as exc:
            errors.append(exc)
            meeting.fail()
            raise

    try:
        return maker.run(work, num_workers=workers, **{"timeout_s": DEADLINE_S, **create_options})
    except Exception as exc:
        if errors and errors[0] is not exc:
            raise errors[0] from exc
        raise


# ---- values and asserting ----------------------------------------------------------------------------


def full(value: float, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a tensor of `shape`, (2, 3) if none is given, filled with `value`."""
    return torch.full(shape or (2, 3), value, dtype=dtype)


def noise(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return numbers of very different magnitude, so that the last bits of a sum depend on its order."""
    with torch.device("cpu"):  # draws the same numbers whatever the default device
        generator = torch.Generator().manual_seed(seed)
        small = torch.randn(shape, generator=generator, dtype=torch.float64)
        power = torch.randint(-8, 9, shape, generator=generator)
    return (small * 2.0**power).to(torch.get_default_device(), dtype)


def same(actual: Any, expected: torch.Tensor | float, what: str = "value") -> None:
    """Assert that a tensor equals `expected` bitwise, on any device. A number stands for a full tensor."""
    assert isinstance(actual, torch.Tensor), f"{what} is a {type(actual).__name__}, not a tensor"
    if not isinstance(expected, torch.Tensor):
        expected = torch.full_like(actual, expected)
    assert actual.shape == expected.shape, f"{what} has shape {actual.shape}, not {expected.shape}"
    assert actual.dtype == expected.dtype, f"{what} has dtype {actual.dtype}, not {expected.dtype}"
    assert torch.equal(actual.cpu(), expected.cpu()), f"{what} is {_short(actual)}, not {_short(expected)}"


def close(actual: torch.Tensor, expected: torch.Tensor, what: str = "value", *, rtol: float = 1e-5) -> None:
    """Assert that a tensor equals `expected` but for rounding, on any device."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, f"{what}: shape or dtype differ"
    assert torch.allclose(actual.cpu(), expected.cpu(), rtol=rtol, atol=rtol * 1e-1), (
        f"{what} is {_short(actual)}, not {_short(expected)}"
    )


ErrorT = TypeVar("ErrorT", bound=BaseException)


def raises(error: type[ErrorT], call: Callable[[], Any], *texts: str) -> ErrorT:
    """Assert that `call()` raises `error` with every one of `texts` in its text, and return the error."""
    try:
        result = call()
    except error as exc:
        for text in texts:
            assert text in str(exc), f"{text!r} is missing in the text of {error.__name__}: {exc}"
        return exc
    raise AssertionError(f"{error.__name__} was not raised; the call returned {result!r}")


def arrived(kv: KVStore, key: Key) -> None:
    """Wait until all of this worker's pushes of `key` have reached its server.

    Connections are FIFO, so the reply to a later request proves it.
    """
    kv.info(key)


def _short(tensor: torch.Tensor) -> str:
    text = str(tensor.flatten()[:8].tolist())
    return text if tensor.numel() <= 8 else f"{text[:-1]}, ...] (shape {tuple(tensor.shape)})"


# ---- updaters ------------------------------------------------------------------------------------------
# At module level, so that servers in other processes find them by name.


def add_twice(key: Key, pushed: torch.Tensor, stored: torch.Tensor) -> None:
    """The updater of MXNet's tutorial: stored += pushed * 2."""
    stored += pushed * 2


def keep_half(key: Key, pushed: torch.Tensor, stored: torch.Tensor) -> None:
    """An updater whose result depends on the order of rounds."""
    stored.copy_(stored * 0.5 + pushed)


def add_key(key: Key, pushed: torch.Tensor, stored: torch.Tensor) -> None:
    """Adds the key, an int, to each element."""
    stored += pushed * int(key)


def refuse_negative(key: Key, pushed: torch.Tensor, stored: torch.Tensor) -> None:
    """Adds the pushed tensor; if it has a negative element, raises after corrupting `stored`."""
    stored += pushed
    if bool((pushed < 0).any()):
        raise ArithmeticError(f"negative gradient for {key!r}")
