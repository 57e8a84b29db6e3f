"""What one key or one list costs does not depend on how many keys are there.

The tables that grow with the keys are replaced by ones that may be asked, but not walked through; then every
verb is called on one key. Numbers of the whole are in the slow test below.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, KeysView
from typing import Any

import pytest
import torch

import tensorkv
from tensorkv.store import KVStore

NUM_KEYS = 600
MANY = 300
"""Tables with so many entries are those that grow with the keys."""

A_FEW = 16


class NotWalked(dict[Any, Any]):
    """A dictionary that may be asked for a key, but not gone through, but for its first entries."""

    def __init__(self, name: str, content: dict[Any, Any]) -> None:
        super().__init__(content)
        self.name = name

    def _walk(self, entries: Any) -> Iterator[Any]:
        yield from itertools.islice(entries, A_FEW)
        raise AssertionError(f"all {len(self)} entries of {self.name} are gone through")

    def __iter__(self) -> Iterator[Any]:
        return self._walk(super().__iter__())

    def values(self) -> Any:
        return self._walk(super().values())

    def items(self) -> Any:
        return self._walk(super().items())

    def keys(self) -> Any:
        return KeysView(self)  # which is asked, not walked, by `&` and `isdisjoint`

    def copy(self) -> Any:
        raise AssertionError(f"{self.name} is copied")


def guard(*parts: Any) -> int:
    """Replace the large dictionaries of these objects; return how many there were."""
    found = 0
    for part in parts:
        names = getattr(part, "__dict__", None) or {
            n: getattr(part, n, None) for n in getattr(type(part), "__slots__", ())
        }
        for name, value in list(names.items()):
            if type(value) is dict and len(value) >= MANY:
                setattr(part, name, NotWalked(f"{type(part).__name__}.{name}", value))
                found += 1
    return found


def parts_of(kv: Any) -> list[Any]:
    """The objects of a store that hold tables: its own, and in a distributed one those on the other side."""
    if kv.kind == "local":
        return [kv, kv._settings]
    membership = kv._embedded.scheduler._membership
    directories = membership._stores.values()
    shards = [shard for each in kv._embedded.servers for shard in each._state._stores.values()]
    parts: list[Any] = [kv, kv._core, kv._core.keys, kv._plans, kv._pusher, membership, *directories, *shards]
    return [*parts, *(each.schedule for each in shards), *(each._settings for each in directories)]


def open_store(kind: str) -> KVStore:
    if kind == "local":
        return tensorkv.create("local")
    return tensorkv.create(kind, embedded=True, num_servers=2)


def ones() -> torch.Tensor:
    return torch.ones(2)


CALLS: dict[str, Callable[[KVStore], Any]] = {
    "init": lambda kv: kv.init("new", ones()),
    "init a list": lambda kv: kv.init(["new", "newer"], [ones(), ones()]),
    "push": lambda kv: kv.push("k1", ones()),
    "push and pull another list": lambda kv: (kv.push(["k1", "k9"], [ones(), ones()]), kv.pull(["k9", "k1"])),
    "pushpull": lambda kv: kv.pushpull("k1", ones()),
    "pull": lambda kv: kv.pull("k1"),
    "put": lambda kv: kv.put("k1", ones()),
    "info": lambda kv: kv.info("k1"),
    "in": lambda kv: ("k1" in kv, "none" in kv),
    "len": lambda kv: len(kv),
    "delete": lambda kv: kv.delete("k1"),
    "set_optimizer": lambda kv: kv.set_optimizer("sgd", keys=["k1"], lr=0.5),
    "set_optimizer_options": lambda kv: (
        kv.set_optimizer("sgd", keys=["k1"], lr=0.5),
        kv.set_optimizer_options(keys=["k1"], lr=0.25),
        kv.push("k1", ones()),
        kv.pull("k1"),
    ),
    "commit": lambda kv: (kv.push("k1", ones(), apply=False), kv.commit(), kv.pull("k1")),
    "barrier": lambda kv: kv.barrier(),
}
NOT_ASYNC = ("commit",)
KINDS = ("local", "dist_sync", "dist_async")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", CALLS)
def test_a_call_on_one_key_goes_through_no_table_of_all_keys(kind: str, call: str) -> None:
    if kind == "dist_async" and call in NOT_ASYNC:
        pytest.skip("dist_async has no rounds to commit")
    names = [f"k{number}" for number in range(NUM_KEYS)]
    with open_store(kind) as kv:
        kv.init(names, [torch.zeros(2) for _ in names])
        assert guard(*parts_of(kv)) >= (1 if kind == "local" else 5)
        CALLS[call](kv)
        for part in parts_of(kv):  # what comes at the end may cost what it does
            for name, value in list(getattr(part, "__dict__", {}).items()):
                if isinstance(value, NotWalked):
                    setattr(part, name, dict(dict.items(value)))


@pytest.mark.parametrize("kind", KINDS)
def test_in_and_len_are_right(kind: str) -> None:
    with open_store(kind) as kv:
        assert (len(kv), "a" in kv) == (0, False)
        kv.init(["a", "b"], [ones(), ones()])
        assert (len(kv), "a" in kv, "c" in kv) == (2, True, False)
        for stranger in (1, True, None, 1.5, ["a"], {"a": 1}, b"a", "\ud800", 2**70):
            assert stranger not in kv
        kv.delete("a")
        assert (len(kv), "a" in kv, "b" in kv) == (1, False, True)
        kv.init("a", ones())
        assert (len(kv), "a" in kv) == (2, True)
        state = kv.state_dict()
        kv.load_state_dict(state)
        assert (len(kv), len(kv.keys())) == (2, 2)
        with open_store(kind) as other:
            other.load_state_dict(state)
            assert (len(other), "b" in other, "c" in other) == (2, True, False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["local", "dist_sync"])
def test_the_last_of_many_keys_cost_what_the_first_did(kind: str) -> None:
    times_s: list[float] = []
    values = [torch.zeros(2)] * 1000
    with open_store(kind) as kv:
        for number in range(25):
            began = time.process_time()
            kv.init([f"{number}-{each}" for each in range(1000)], values)
            times_s.append(time.process_time() - began)
        assert min(times_s[-5:]) < 2 * min(times_s[:5])  # 4 times, were it to go through what is there once
