"""RoundWaits: a call waits at one slice at a time, and an update looks at no others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tensorkv.server.rounds import Index
from tensorkv.server.roundwaits import RoundWaits


@dataclass
class Call:
    name: str
    layout: Any
    need: Index


@dataclass
class Slices:
    index: Index


def call(name: str, *slices: int) -> Call:
    """A call that needs round 1 of some slices."""
    return Call(name, Slices(np.array(slices, np.int64)), np.ones(len(slices), np.int64))


def names(waits: Any) -> list[str]:
    return [each.name for each in waits]


def test_a_call_is_ready_when_its_last_slice_is_and_calls_come_out_in_order() -> None:
    waits: RoundWaits[Call] = RoundWaits()
    applied = np.zeros(4, np.int64)
    for each in (call("both", 0, 1), call("second", 1), call("other", 3), call("both too", 1, 0)):
        waits.add(each, applied)
    assert names(waits) == ["both", "second", "other", "both too"]
    applied[0] = 1
    assert waits.take_ready(np.array([0]), applied) == []
    applied[1] = 1
    assert names(waits.take_ready(np.array([1, 2]), applied)) == ["both", "second", "both too"]
    assert (names(waits), len(waits)) == (["other"], 1)
    assert waits.take_ready(np.array([1]), applied) == []


def test_what_was_dropped_never_comes_out() -> None:
    waits: RoundWaits[Call] = RoundWaits()
    applied = np.zeros(2, np.int64)
    for each in (call("a", 0), call("b", 0), call("c", 1)):
        waits.add(each, applied)
    waits.drop(lambda each: each.name in ("a", "c"))
    waits.drop(lambda each: each.name == "nobody")
    applied[:] = 1
    assert names(waits.take_ready(np.array([0, 1]), applied)) == ["b"]
    assert len(waits) == 0


def test_an_update_looks_at_no_call_that_waits_for_another_slice() -> None:
    looked: list[str] = []

    class Watched(Call):
        def __getattribute__(self, name: str) -> Any:
            if name == "need":
                looked.append(object.__getattribute__(self, "name"))
            return object.__getattribute__(self, name)

    waits: RoundWaits[Call] = RoundWaits()
    applied = np.zeros(100, np.int64)
    for each in range(100):
        waits.add(Watched(f"{each}", Slices(np.array([each])), np.ones(1, np.int64)), applied)
    looked.clear()
    applied[7] = 1
    assert names(waits.take_ready(np.array([7]), applied)) == ["7"]
    assert looked == ["7"]
