"""Policies: when a round is merged, and what a pull waits for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensorkv.errors import ProtocolError
from tensorkv.server.cohorts import Cohort
from tensorkv.server.policy import Async, BoundedStaleness, Sync, make_policy
from tensorkv.updaters.spec import UpdaterSpec
from tensorkv.wire import messages as m


def cohort(*contributed: int, held: bool = False) -> Cohort:
    made = Cohort()
    made.applied, made.held = 4, held
    made.inbox = dict.fromkeys(contributed, object())  # type: ignore[assignment]
    return made


def test_sync_merges_when_all_members_have_contributed() -> None:
    members = {0, 1, 2}
    policy = Sync(members)
    assert not policy.merges(cohort())
    assert not policy.merges(cohort(0, 2))
    assert policy.merges(cohort(2, 0, 1))
    assert policy.missing(cohort(1), 5) == [0, 2]
    members.discard(1)
    assert policy.merges(cohort(0, 2))
    assert not policy.merges(cohort(0, 1))  # who has left counts, but stands for nobody
    assert policy.merges(cohort(0, 1, 2))
    members.clear()
    assert policy.merges(cohort(1))
    assert not policy.merges(cohort())


def test_in_sync_a_pull_waits_for_its_own_last_push() -> None:
    policy = Sync({0, 1})
    assert policy.last_round(cohort(1), 0) == 4
    assert policy.last_round(cohort(1), 1) == 5
    assert policy.last_round(cohort(0, 1, held=True), 1) == 5
    assert policy.allows_commit


def test_async_merges_each_push_and_makes_nobody_wait() -> None:
    policy = Async({0, 1})
    assert policy.merges(cohort(1))
    assert not policy.merges(cohort())
    assert policy.last_round(cohort(), 1) == 4
    assert not policy.allows_commit


def test_bounded_staleness_compares_the_pushes_of_all_members() -> None:
    members = {0, 1, 2}
    policy = BoundedStaleness(members, 2)
    made = cohort()
    made.pushed = {0: 5, 2: 3}
    assert policy.reached(made) == 0
    assert [policy.needed(made, peer) for peer in range(3)] == [3, -2, 1]
    assert policy.missing(made, 3) == [1]
    assert policy.missing(made, 4) == [1, 2]
    members.discard(1)
    assert policy.reached(made) == 3
    members.clear()
    assert policy.reached(made) == 0
    assert policy.merges(cohort(1))
    assert not policy.merges(cohort())


def test_a_policy_is_made_by_its_name() -> None:
    assert isinstance(make_policy("sync", set()), Sync)
    assert isinstance(make_policy("async", set()), Async)
    with pytest.raises(ProtocolError, match="no policy 'eventual'"):
        make_policy("eventual", set())
    bounded = make_policy("async", {0}, 3)
    assert isinstance(bounded, BoundedStaleness)
    assert bounded.staleness == 3
    for name, staleness in (("sync", 1), ("async", -1)):
        with pytest.raises(ProtocolError, match=f"no policy '{name}' with staleness {staleness}"):
            make_policy(name, {0}, staleness)


def test_only_sync_takes_pushes_for_a_commit(t: Any) -> None:
    bench = t.Bench(1, policy="async")
    plan = bench.define(0, t.dense(bench.init("w", torch.zeros(2)), [2]))
    with pytest.raises(ProtocolError, match="for a commit"):
        bench.push(0, plan, torch.ones(2), apply=False)
    assert bench.value(0, plan).tolist() == [0.0, 0.0]
    bench.check_empty()


def stale(t: Any, staleness: int, num_workers: int = 2) -> tuple[Any, list[int], list[int]]:
    """A store with bounded staleness and two slices; ids, and the plan of each worker."""
    bench = t.Bench(num_workers, policy="async", staleness=staleness)
    bench.set_updater(0, UpdaterSpec(type="named", name="add"))
    ids = [bench.init(key, torch.zeros(1))[0] for key in "ab"]
    return bench, ids, [bench.define(rank, t.dense(ids, [1, 1])) for rank in range(num_workers)]


def values_of(t: Any, out: list[Any]) -> list[tuple[int, list[float]]]:
    t.settle(out)
    return [(each.worker, torch.cat([part.tensor for part in each.payload]).tolist()) for each in out]


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_a_pull_waits_for_a_worker_that_is_too_far_behind(t: Any, staleness: int) -> None:
    bench, _, plans = stale(t, staleness)
    for number in range(staleness):
        bench.push(0, plans[0], torch.ones(2))
        assert bench.value(0, plans[0]).tolist() == [number + 1.0] * 2
    bench.push(0, plans[0], torch.ones(2))
    assert bench.pull(0, plans[0]) == []
    assert bench.value(1, plans[1]).tolist() == [staleness + 1.0] * 2  # who is behind waits for nobody
    out = bench.push(1, plans[1], torch.ones(2))
    assert values_of(t, out) == [(0, [staleness + 2.0] * 2)]
    bench.check_empty()


def test_a_push_that_asks_for_the_value_waits_in_the_same_way(t: Any) -> None:
    bench, _, plans = stale(t, 1)
    assert values_of(t, bench.push(0, plans[0], torch.ones(2), reply=50)) == [(0, [1.0, 1.0])]
    assert bench.push(0, plans[0], torch.ones(2), reply=51) == []
    nothing = bench.define(1, t.absent([1, 2], [1, 1]))
    assert values_of(t, bench.push(1, nothing)) == [(0, [2.0, 2.0])]  # to push nothing counts
    bench.check_empty()


def test_a_worker_that_leaves_is_waited_for_no_more(t: Any) -> None:
    bench, _, plans = stale(t, 0, num_workers=3)
    bench.push(0, plans[0], torch.ones(2))
    bench.push(1, plans[1], torch.ones(2))
    for rank in range(2):
        assert bench.pull(rank, plans[rank]) == []
    out = [each for each in bench.leave(2) if isinstance(each.message, m.Data)]
    assert sorted(values_of(t, out)) == [(0, [2.0, 2.0]), (1, [2.0, 2.0])]
    bench.check_empty()


def test_who_is_waited_for_is_told_by_pushes(t: Any) -> None:
    bench, ids, plans = stale(t, 1, num_workers=3)
    alone = bench.define(1, t.dense(ids[:1], [1]))
    bench.push(1, alone, torch.ones(1))
    for _ in range(2):
        bench.push(0, plans[0], torch.ones(2))
    bench.send(0, m.Pull(plans[0], 77))
    (answer,) = bench.send(0, m.AskWaiting(77, 1))
    assert answer.message == m.Waiting(77, [2], "push 1 of 'a'")
    bench.push(2, plans[2], torch.ones(2))
    (answer,) = bench.send(0, m.AskWaiting(77, 1))
    assert answer.message == m.Waiting(77, [1], "push 1 of 'b'")
    assert bench.put(0, plans[0], torch.zeros(2)) != []  # only pulls wait
    t.settle(bench.push(1, plans[1], torch.ones(2)))
    bench.check_empty()


@given(
    staleness=st.integers(0, 2),
    events=st.lists(
        st.tuples(
            st.integers(0, 2),
            st.sampled_from(["push", "push", "pushpull", "pull", "leave"]),
            st.sampled_from([[0], [1], [0, 1], [1, 0]]),
        ),
        max_size=40,
    ),
)
def test_no_pull_is_answered_early_or_late(
    t: Any, staleness: int, events: list[tuple[int, str, list[int]]]
) -> None:
    bench, ids, _ = stale(t, staleness, num_workers=3)
    pushed = [[0, 0, 0], [0, 0, 0]]  # by slice and worker
    members = {0, 1, 2}
    waiting: dict[int, tuple[int, dict[int, int]]] = {}
    for number, (worker, event, subset) in enumerate(events, 1000):
        if worker not in members or (event == "leave" and len(members) == 1):
            continue
        plan = bench.define(worker, t.dense([ids[each] for each in subset], [1] * len(subset)))
        if event == "leave":
            out = bench.leave(worker)
            members.discard(worker)
            waiting = {request: pull for request, pull in waiting.items() if pull[0] != worker}
        elif event == "pull":
            out = bench.send(worker, m.Pull(plan, number))
        else:
            out = bench.push(worker, plan, torch.ones(len(subset)), reply=number * (event == "pushpull"))
            for each in subset:
                pushed[each][worker] += 1
        if event in ("pull", "pushpull"):
            waiting[number] = worker, {each: pushed[each][worker] - staleness for each in subset}
        ready = {
            request
            for request, (_, needed) in waiting.items()
            if all(min(pushed[each][peer] for peer in members) >= need for each, need in needed.items())
        }
        answered = [each.message.request for each in out if isinstance(each.message, m.Data)]
        assert sorted(answered) == sorted(ready)
        waiting = {request: pull for request, pull in waiting.items() if request not in ready}
        t.settle(out)
