"""Policies: when a round is merged, and what a pull waits for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensorkv.errors import ProtocolError
from tensorkv.server.cohorts import Cohort
from tensorkv.server.policy import Async, BoundedStaleness, Quorum, Sync, make_policy
from tensorkv.updaters.spec import UpdaterSpec
from tensorkv.wire import messages as m


def cohort(*contributed: int, held: bool = False, members: set[int] | None = None) -> Cohort:
    made = Cohort({0, 1, 2} if members is None else members)
    made.applied, made.held = 4, held
    made.inbox = dict.fromkeys(contributed, object())  # type: ignore[assignment]
    return made


def test_sync_merges_when_all_members_have_contributed() -> None:
    policy = Sync()
    assert not policy.merges(cohort())
    assert not policy.merges(cohort(0, 2))
    assert policy.merges(cohort(2, 0, 1))
    assert policy.missing(cohort(1), 5) == [0, 2]
    assert policy.merges(cohort(0, 2, members={0, 2}))
    assert not policy.merges(cohort(0, 1, members={0, 2}))  # who has left counts, but stands for nobody
    assert policy.merges(cohort(0, 1, 2, members={0, 2}))
    assert policy.merges(cohort(1, members=set()))
    assert not policy.merges(cohort(members=set()))


def test_in_sync_a_pull_waits_for_its_own_last_push() -> None:
    policy = Sync()
    assert policy.last_round(cohort(1), 0) == 4
    assert policy.last_round(cohort(1), 1) == 5
    assert policy.last_round(cohort(0, 1, held=True), 1) == 5
    assert policy.allows_commit


def test_async_merges_each_push_and_makes_nobody_wait() -> None:
    policy = Async()
    assert policy.merges(cohort(1))
    assert not policy.merges(cohort())
    assert policy.last_round(cohort(), 1) == 4
    assert not policy.allows_commit


def test_bounded_staleness_compares_the_pushes_of_all_members() -> None:
    policy = BoundedStaleness(2)
    made = cohort()
    made.progress = {0: 5, 2: 3}
    assert policy.reached(made) == 0
    assert [policy.needed(made, peer) for peer in range(3)] == [3, None, 1]
    assert policy.missing(made, 3) == [1]
    assert policy.missing(made, 4) == [1, 2]
    made.members = {0, 2}
    assert policy.reached(made) == 3
    made.members = set()
    assert policy.needed(made, 0) is None  # there is nobody to wait for
    assert policy.merges(cohort(1))
    assert not policy.merges(cohort())


def test_a_quorum_merges_when_all_have_contributed_or_when_its_time_is_over() -> None:
    policy = Quorum(2, 0.5, carries=False)
    made = cohort(0)
    assert not policy.merges(made)
    assert policy.deadline_s(made, 10.0) is None
    made = cohort(0, 2)
    assert not policy.merges(made)
    assert policy.deadline_s(made, 10.0) == 10.5
    assert policy.deadline_s(made, 10.4) == 10.5  # the second contribution counts, not the last
    assert policy.merges(cohort(2, 0, 1))
    assert policy.deadline_s(cohort(0), 20.0) is None
    assert policy.merges(cohort(0, members={0}))  # all that are left are enough
    assert not policy.merges(cohort(1, members={0}))  # who has left is not
    assert policy.deadline_s(cohort(), 20.0) is None
    assert not policy.allows_commit


def test_without_grace_the_quorum_itself_merges() -> None:
    policy = Quorum(2, 0.0, carries=False)
    assert not policy.merges(cohort(1))
    assert policy.merges(cohort(1, 2))
    assert not policy.merges(cohort())
    assert policy.merges(cohort(1, members=set()))
    assert not policy.merges(cohort(members=set()))


@pytest.mark.parametrize("carries", [False, True])
def test_a_late_push_is_dropped_or_carried_and_its_worker_catches_up(carries: bool) -> None:
    policy = Quorum(1, 0.0, carries)
    made = cohort()  # four rounds have merged
    made.progress = {0: 4, 1: 1}
    assert policy.count_push(made, 0)
    assert made.num_late == 0
    assert policy.count_push(made, 1) == carries
    assert made.num_late == 1
    assert made.progress == {0: 5, 1: 5 if carries else 4}
    if not carries:
        assert policy.count_push(made, 1)  # its next one is for the open round
    assert (made.progress[1], made.num_late) == (5, 1)


def test_a_policy_is_made_of_its_options() -> None:
    assert isinstance(make_policy(m.StorePolicy("sync")), Sync)
    assert isinstance(make_policy(m.StorePolicy("async")), Async)
    bounded = make_policy(m.StorePolicy("async", 3))
    assert isinstance(bounded, BoundedStaleness)
    assert bounded.staleness == 3
    quorum = make_policy(m.StorePolicy("sync", None, 2, 1.5, "carry"))
    assert isinstance(quorum, Quorum)
    assert (quorum.quorum, quorum.grace_s, quorum.carries) == (2, 1.5, True)


@pytest.mark.parametrize(
    "options",
    [
        ("sync", 1),
        ("async", -1),
        ("async", None, 1),
        ("async", 1, 1),
        ("sync", 1, 1),
        ("sync", None, 0),
        ("sync", None, 1, -0.5),
        ("sync", None, 1, float("inf")),
        ("sync", None, 1, float("nan")),
    ],
)
def test_a_policy_that_cannot_be_is_refused(options: Any) -> None:
    with pytest.raises(ProtocolError, match=f"no policy with kind '{options[0]}'"):
        make_policy(m.StorePolicy(*options))


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


# ---- quorum ------------------------------------------------------------------------------------------


def with_quorum(t: Any, num_workers: int, **options: Any) -> tuple[Any, list[int], list[int]]:
    """A store with a quorum and two slices; ids, and the plan of each worker."""
    bench = t.Bench(num_workers, **options)
    bench.set_updater(0, UpdaterSpec(type="named", name="add"))
    ids = [bench.init(key, torch.zeros(1))[0] for key in "ab"]
    return bench, ids, [bench.define(rank, t.dense(ids, [1, 1])) for rank in range(num_workers)]


def test_a_round_with_a_quorum_merges_after_its_time_of_grace(t: Any) -> None:
    bench, ids, plans = with_quorum(t, 3, quorum=2, grace_s=0.5)
    bench.push(0, plans[0], torch.ones(2))
    assert bench.tick(10.0) == ([], None)
    assert bench.push(1, plans[1], torch.full((2,), 10.0), reply=50) == []
    assert bench.tick(11.0) == ([], 11.5)
    assert bench.tick(11.4) == ([], 11.5)
    assert bench.pull(0, plans[0]) == []
    out, next_s = bench.tick(11.5)
    assert values_of(t, out) == [(1, [11.0, 11.0]), (0, [11.0, 11.0])]
    assert next_s is None
    assert bench.push(2, plans[2], torch.full((2,), 100.0)) == []  # late, and dropped
    assert bench.value(2, plans[2]).tolist() == [11.0, 11.0]
    assert bench.info(0, ids).late == [1, 1]
    for rank in (2, 0, 1):
        bench.push(rank, plans[rank], torch.full((2,), 100.0))
    assert bench.value(0, plans[0]).tolist() == [311.0, 311.0]
    assert bench.info(0, ids).rounds == [2, 2]
    assert bench.tick(20.0) == ([], None)
    bench.check_empty()


def test_a_late_push_that_is_carried_counts_in_the_open_round(t: Any) -> None:
    bench, ids, plans = with_quorum(t, 2, quorum=1, grace_s=1.0, late="carry")
    bench.push(0, plans[0], torch.ones(2))
    bench.tick(0.0)
    bench.tick(1.0)
    (answer,) = bench.push(1, plans[1], torch.full((2,), 10.0), reply=50)
    assert answer.message.unmerged
    assert values_of(t, [answer]) == [(1, [1.0, 1.0])]  # it does not wait for the round
    with pytest.raises(ProtocolError, match="last push is not merged"):
        bench.push(1, plans[1], torch.ones(2))  # the next one waits at its worker
    bench.push(0, plans[0], torch.ones(2))
    (answer,) = bench.pull(1, plans[1])
    assert not answer.message.unmerged
    assert values_of(t, [answer]) == [(1, [12.0, 12.0])]
    assert bench.info(0, ids).late == [1, 1]
    bench.check_empty()


def test_a_push_may_be_late_for_some_slices_and_not_for_others(t: Any) -> None:
    bench, ids, plans = with_quorum(t, 2, quorum=1)
    alone = bench.define(0, t.dense(ids[:1], [1]))
    bench.push(0, alone, torch.ones(1))
    out = bench.push(1, plans[1], torch.full((2,), 10.0), reply=50)
    assert values_of(t, out) == [(1, [1.0, 10.0])]
    info = bench.info(0, ids)
    assert (info.late, info.rounds, info.versions) == ([1, 0], [1, 1], [1, 1])
    bench.check_empty()


def test_a_late_push_that_splits_a_cohort_keeps_the_deadline_of_both_parts(t: Any) -> None:
    bench, ids, plans = with_quorum(t, 3, quorum=2, grace_s=1.0)
    for round_s in (0.0, 10.0):
        for rank in range(2):
            bench.push(rank, plans[rank], torch.ones(2))
        assert bench.tick(round_s) == ([], round_s + 1)
        if round_s:
            alone = bench.define(2, t.dense(ids[:1], [1]))
            bench.push(2, alone, torch.ones(1))  # late, and dropped
        bench.tick(round_s + 1)
    assert bench.info(0, ids).rounds == [2, 2]
    bench.check_empty()


def test_workers_that_are_late_for_different_keys_do_not_wait_for_each_other(t: Any) -> None:
    """Each has the only push of the open round of its key; nobody pushes again before its pull returns."""
    bench = t.Bench(3, quorum=2, late="carry")
    ids = [bench.init(key, torch.zeros(1))[0] for key in "abc"]
    for rank, first in enumerate(([0, 2], [0, 1], [1, 2])):
        bench.push(rank, bench.define(rank, t.dense([ids[each] for each in first], [1, 1])), torch.ones(2))
    for rank, last in enumerate((1, 2, 0)):
        bench.push(rank, bench.define(rank, t.dense([ids[last]], [1])), torch.ones(1))
    assert bench.info(0, ids).late == [1, 1, 1]
    for rank in range(3):
        plan = bench.define(rank, t.dense(ids, [1, 1, 1]))
        (answer,) = bench.pull(rank, plan)
        assert values_of(t, [answer]) == [(rank, [2.0] * 3)]
        assert answer.message.unmerged


def test_a_mean_divides_by_what_went_in(t: Any) -> None:
    bench, _, plans = with_quorum(t, 3, quorum=2, mean=True)
    bench.push(0, plans[0], torch.full((2,), 4.0))
    bench.push(2, plans[2], torch.full((2,), 8.0))
    assert bench.value(0, plans[0]).tolist() == [6.0, 6.0]
    nothing = bench.define(1, t.absent([1, 2], [1, 1]))
    bench.push(1, nothing)  # late
    bench.push(1, nothing)
    bench.push(0, plans[0], torch.ones(2))  # to push nothing counts for the quorum
    assert bench.value(0, plans[0]).tolist() == [7.0, 7.0]
    bench.check_empty()


def test_a_setting_holds_on_arrival_with_a_quorum(t: Any) -> None:
    bench, _, plans = with_quorum(t, 2, quorum=2, grace_s=9.0)
    bench.push(0, plans[0], torch.ones(2))
    bench.set_updater(0, UpdaterSpec(type="named", name="assign"))
    bench.push(1, plans[1], torch.ones(2))  # in sync `add` would still hold for the open round
    bench.push(0, plans[0], torch.ones(2))
    bench.push(1, plans[1], torch.ones(2))
    assert bench.value(0, plans[0]).tolist() == [2.0, 2.0]
    bench.check_empty()


def test_deleted_slices_and_workers_that_leave_have_no_deadline(t: Any) -> None:
    bench, ids, plans = with_quorum(t, 2, quorum=2, grace_s=1.0)
    bench.push(0, plans[0], torch.ones(2))
    assert bench.tick(0.0) == ([], None)
    for rank in range(2):
        t.settle(bench.delete(rank, "a", ids[:1]))
    bench.leave(0)  # a push of who has left is no reason to go on without the last one
    assert bench.tick(1.0) == ([], None)
    rest = bench.define(1, t.dense(ids[1:], [1]))
    bench.push(1, rest, torch.ones(1))
    assert bench.tick(5.0) == ([], None)
    assert bench.value(1, rest).tolist() == [2.0]
    bench.check_empty()


def test_deadlines_of_merged_rounds_take_no_memory(t: Any) -> None:
    bench, ids, _ = with_quorum(t, 2, quorum=1, grace_s=3600.0)
    alone, both = bench.define(0, t.dense(ids[:1], [1])), [t.dense(ids[1:], [1])] * 2
    bench.push(0, alone, torch.ones(1))  # its deadline is the first for an hour
    others = [bench.define(rank, chunk) for rank, chunk in enumerate(both)]
    for step in range(1000):
        for rank in range(2):
            bench.push(rank, others[rank], torch.ones(1))
            bench.tick(float(step))
    assert bench.info(0, ids).rounds == [0, 1000]
    assert len(bench.shard._deadlines) < 200
    assert bench.tick(3600.0)[1] is None
    assert bench.info(0, ids).rounds == [1, 1000]
    bench.check_empty()


class Round:
    """What policies.md promises of one slice, written down once more, without cohorts."""

    def __init__(self, quorum: int, grace_s: float, late: str) -> None:
        self.quorum, self.grace_s, self.carries = quorum, grace_s, late == "carry"
        self.inbox: dict[int, int] = {}
        self.stands = dict.fromkeys(range(3), 0)
        self.needs = dict.fromkeys(range(3), 0)  # the round that a pull of each worker waits for
        self.applied = self.late = self.value = 0
        self.due_s: float | None = None

    def push(self, worker: int, number: int, members: set[int]) -> None:
        is_late = self.stands[worker] < self.applied
        self.late += is_late
        self.needs[worker] = self.applied + (not is_late)
        if is_late and not self.carries:
            self.stands[worker] = self.applied
        else:
            self.inbox[worker] = number
            self.stands[worker] = self.applied + 1
        self.check(members)

    def check(self, members: set[int]) -> None:
        enough = len(self.inbox) >= self.quorum
        if self.inbox and (members <= self.inbox.keys() or (enough and not self.grace_s)):
            self.merge()

    def tick(self, now_s: float, members: set[int]) -> None:
        if len(self.inbox) >= self.quorum:
            self.due_s = now_s + self.grace_s if self.due_s is None else self.due_s
            if self.due_s <= now_s:
                self.merge()

    def merge(self) -> None:
        self.value += sum(4**number for number in self.inbox.values())
        self.applied += 1
        self.inbox = {}
        self.due_s = None


@given(
    quorum=st.integers(1, 4),
    grace_s=st.sampled_from([0.0, 1.0]),
    late=st.sampled_from(["drop", "carry"]),
    events=st.lists(
        st.tuples(
            st.integers(0, 2),
            st.sampled_from(["push", "push", "push", "pushpull", "pull", "tick", "tick", "leave"]),
            st.sampled_from([[0], [1], [0, 1], [1, 0]]),
        ),
        max_size=24,
    ),
)
def test_rounds_with_a_quorum_are_those_of_a_simple_model(
    t: Any, quorum: int, grace_s: float, late: str, events: list[tuple[int, str, list[int]]]
) -> None:
    bench = t.Bench(3, quorum=quorum, grace_s=grace_s, late=late)
    bench.set_updater(0, UpdaterSpec(type="named", name="add"))
    ids = [bench.init(key, torch.zeros(1, dtype=torch.float64))[0] for key in "ab"]
    rounds = [Round(quorum, grace_s, late) for _ in ids]
    members, now_s = {0, 1, 2}, 0.0
    waiting: dict[int, tuple[int, dict[int, int]]] = {}
    for number, (worker, event, subset) in enumerate(events):
        mine = [rounds[each] for each in subset]
        if worker not in members or (event == "leave" and len(members) == 1):
            continue
        if event in ("push", "pushpull") and any(worker in each.inbox for each in mine):
            continue
        plan = bench.define(worker, t.dense([ids[each] for each in subset], [1] * len(subset), "float64"))
        request = 1000 + number
        if event == "leave":
            out = bench.leave(worker)
            members.discard(worker)
            waiting = {each: pull for each, pull in waiting.items() if pull[0] != worker}
            for every in rounds:
                every.check(members)
        elif event == "tick":
            now_s += 0.6
            out, _ = bench.tick(now_s)
            for every in rounds:
                every.tick(now_s, members)
        elif event == "pull":
            out = bench.send(worker, m.Pull(plan, request))
        else:
            value = torch.full((len(subset),), 4.0**number, dtype=torch.float64)
            out = bench.push(worker, plan, value, reply=request * (event == "pushpull"))
            for each in mine:
                each.push(worker, number, members)
        if event in ("pull", "pushpull"):
            waiting[request] = worker, {each: rounds[each].needs[worker] for each in subset}
        ready = {
            request
            for request, (_, needed) in waiting.items()
            if all(rounds[each].applied >= need for each, need in needed.items())
        }
        answers = [each for each in out if isinstance(each.message, m.Data)]
        assert sorted(each.message.request for each in answers) == sorted(ready)
        for answer in answers:
            found = torch.cat([part.tensor for part in answer.payload]).tolist()
            assert found == [rounds[each].value for each in waiting[answer.message.request][1]]
        waiting = {request: pull for request, pull in waiting.items() if request not in ready}
        t.settle(out)
        info = bench.info(min(members), ids)
        assert info.rounds == [each.applied for each in rounds]
        assert info.late == [each.late for each in rounds]
    while members:
        t.settle(bench.leave(members.pop()))
    assert bench.pool.out == {}


@pytest.mark.parametrize(
    "spec",
    [
        m.StorePolicy("sync"),
        m.StorePolicy("async"),
        m.StorePolicy("async", staleness=2),
        m.StorePolicy("sync", quorum=1),
        m.StorePolicy("sync", quorum=2, late="carry"),
    ],
    ids=str,
)
def test_workers_and_servers_agree_on_what_a_policy_allows(spec: m.StorePolicy) -> None:
    policy = make_policy(spec)
    assert policy.allows_commit == spec.allows_commit
    assert policy.settings_wait == spec.settings_wait
    assert policy.saves_alone == spec.saves_alone == (spec == m.StorePolicy("sync"))
