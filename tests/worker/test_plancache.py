"""Plans are found again, told to servers once, and dropped when they are not used."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from ports import Port

from tensorkv.errors import KeyDeleted
from tensorkv.wire import messages as m
from tensorkv.worker import plancache
from tensorkv.worker.plancache import PlanCache
from tensorkv.worker.plans import KeyState, Plan


class Bench:
    """A cache in a job of two servers that remember what they are told."""

    def __init__(self) -> None:
        self.told: list[list[Any]] = [[], []]
        ports = [Port(lambda message, data, told=told: told.append(message)) for told in self.told]
        self.cache = PlanCache(1, ports, itertools.count(1))

    def plan(self, *states: KeyState) -> Plan:
        return self.cache.plan_to_pull(states)


def key(number: int, servers: tuple[int, ...] = (0, 1)) -> KeyState:
    slices = [m.SliceEntry(10 * number + i, i, 2 * i, 2 * i + 2) for i in servers]
    return KeyState.of(m.KeyEntry(number, number, (4,), "float32", m.EPOCH, slices))


A, B, C = key(1), key(2), key(3)


def test_the_same_list_has_the_same_plan() -> None:
    bench = Bench()
    plan = bench.plan(A, B)
    assert bench.plan(A, B) is plan
    others = [
        bench.plan(B, A),
        bench.plan(A),
        bench.cache.plan([A, B], [torch.float64, torch.float32], [1, 1]),
        bench.cache.plan([A, B], [torch.float32] * 2, [1, 2]),
    ]
    assert len({id(each) for each in (plan, *others)}) == 5
    assert len({each.number for each in (plan, *others)}) == 5
    assert bench.cache.part_of(plan, [0]) is others[1]


def test_servers_are_told_once_and_only_what_concerns_them() -> None:
    bench = Bench()
    plan = bench.plan(key(4, servers=(1,)))
    for _ in range(2):
        bench.cache.tell(plan)
    assert bench.told[0] == []
    assert [type(each) for each in bench.told[1]] == [m.DefinePlan]


def test_the_plan_not_used_for_longest_is_dropped_and_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plancache, "MAX_PLANS", 2)
    bench = Bench()
    first, second = bench.plan(A), bench.plan(B)
    bench.cache.remember_push((1,), first)
    bench.cache.remember_pull((2,), second)
    bench.cache.tell(first)
    bench.cache.tell(second)
    assert bench.plan(A) is first
    third = bench.plan(C)
    assert bench.cache.last_push == {(1,): first}
    assert bench.cache.last_pull == {}
    bench.cache.remember_pull((2,), second)  # found before it was dropped, remembered after
    assert bench.cache.last_pull == {}
    bench.cache.tell(third)
    assert bench.told[0][2:] == [m.DropPlan(second.number), bench.told[0][3]]
    assert bench.told[0][3].plan == third.number
    again = bench.plan(B)
    assert again.number > third.number


def test_a_plan_that_is_still_used_after_its_drop_is_defined_anew() -> None:
    bench = Bench()
    plan = bench.plan(A)
    bench.cache.tell(plan)
    bench.cache.forget([A])
    bench.cache.tell(plan)
    numbers = [(type(each), each.plan) for each in bench.told[0]]
    assert numbers == [
        (m.DefinePlan, plan.number),
        (m.DropPlan, plan.number),
        (m.DefinePlan, plan.number),
    ]
    bench.cache.tell_dropped()  # it is not forgotten at the servers
    assert bench.told[0][3:] == [m.DropPlan(plan.number)]


def test_no_plan_names_a_retired_key() -> None:
    bench = Bench()
    a, b = key(1), key(2)
    plan, other = bench.plan(a, b), bench.plan(b)
    bench.cache.remember_push((1, 2), plan)
    bench.cache.tell(plan)
    a.retired = True
    bench.cache.forget([a])
    bench.cache.tell_dropped()
    assert bench.told[0][1:] == [m.DropPlan(plan.number)]
    assert bench.cache.last_push == {}
    for call in (lambda: bench.cache.tell(plan), lambda: bench.plan(a)):
        with pytest.raises(KeyDeleted, match="key 1 was deleted by another thread"):
            call()
    assert bench.plan(b) is other


def test_plans_of_a_forgotten_key_go() -> None:
    bench = Bench()
    plans = [bench.plan(A), bench.plan(A, B), bench.plan(B)]
    bench.cache.forget([A])
    assert bench.plan(B) is plans[2]
    assert bench.plan(A, B) is not plans[1]


def test_slices_that_are_cut_alone_share_no_chunk_from_then_on() -> None:
    bench = Bench()
    whole = key(4, (0,))
    before = bench.plan(A, whole)
    assert [len(part.chunks) for part in before.parts] == [1, 1]
    bench.cache.cut_alone([A, whole])
    assert before.dropped
    after = bench.plan(A, whole)
    assert [len(part.chunks) for part in after.parts] == [2, 1]
    bench.cache.cut_alone([whole, A])
    assert bench.plan(A, whole) is after  # nothing is new
    bench.cache.forget([A])
    assert [len(part.chunks) for part in bench.plan(B, whole).parts] == [1, 1]
