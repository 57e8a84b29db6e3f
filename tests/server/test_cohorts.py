"""Cohorts: slices with one history share its numbers, and split and join without a difference."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensorkv.errors import ProtocolError, UpdaterError
from tensorkv.server.cohorts import Cohort, cohorts_of
from tensorkv.updaters.spec import UpdaterSpec
from tensorkv.wire import messages as m

SGD = UpdaterSpec(type="optimizer", name="torch.optim:SGD", options={"lr": 0.5, "momentum": 0.5})
ADD = UpdaterSpec(type="named", name="add")


def pair(t: Any, num_workers: int = 2, **store: Any) -> tuple[Any, list[int], list[int]]:
    bench = t.Bench(num_workers, **store)
    ids = [bench.init(key, torch.zeros(2))[0] for key in "ab"]
    plans = [bench.define(rank, t.dense(ids, [2, 2])) for rank in range(num_workers)]
    return bench, ids, plans


def a_round(t: Any, bench: Any, plans: list[int], value: float, order: tuple[int, ...] = (1, 0)) -> None:
    out: list[Any] = []
    for rank in order:
        out += bench.push(rank, plans[rank], torch.full((4,), value * (rank + 1)), reply=50 + rank)
    assert sorted(each.message.request for each in out) == sorted(50 + rank for rank in order)
    assert all(each.payload[0].tensor.tolist() == [value * sum(r + 1 for r in order)] * 4 for each in out)
    t.settle(out)


def test_rounds_and_versions_are_counted(t: Any) -> None:
    bench, ids, plans = pair(t)
    for number in range(5):
        a_round(t, bench, plans, number + 1.0)
        assert bench.value(0, plans[0]).tolist() == [3.0 * (number + 1)] * 4
    assert (bench.info(0, ids).rounds, bench.info(0, ids).versions) == ([5, 5], [5, 5])
    bench.check_empty()


def test_optimizers_step_a_whole_cohort(t: Any) -> None:
    bench, ids, plans = pair(t)
    bench.set_updater(0, SGD)
    values = [torch.nn.Parameter(torch.zeros(2)) for _ in ids]
    optimizer = torch.optim.SGD(values, lr=0.5, momentum=0.5)
    for number in range(5):
        grads = [torch.full((4,), number + each) for each in (1.0, 2.0)]
        out = bench.push(1, plans[1], grads[1], reply=51) + bench.push(0, plans[0], grads[0], reply=50)
        for each in values:
            each.grad = grads[0][:2] + grads[1][:2]
        optimizer.step()
        assert all(torch.equal(each.payload[0].tensor, torch.cat(values)) for each in out)
        assert sorted(each.message.request for each in out) == [50, 51]
        t.settle(out)
    assert (bench.info(0, ids).rounds, bench.info(0, ids).versions) == ([5, 5], [5, 5])
    bench.check_empty()


def test_an_update_that_fails_is_that_of_its_slice(t: Any) -> None:
    """The other slices go on, who pushed is told, and who waits has the values that there are."""

    def careful(key: Any, pushed: torch.Tensor, stored: torch.Tensor) -> None:
        if key == "b" and pushed[0] == 9.0:
            raise RuntimeError("nine")
        stored += pushed

    bench, ids, plans = pair(t, functions={"careful": careful})
    bench.set_updater(0, UpdaterSpec(type="function", name="careful"))
    for rank in range(2):
        bench.push(rank, plans[rank], torch.ones(4))
    bench.push(0, plans[0], torch.full((4,), 4.0))
    assert bench.pull(0, plans[0]) == []
    out = bench.push(1, plans[1], torch.full((4,), 5.0), reply=60)
    for worker, each in enumerate(out[:2]):
        assert (each.worker, each.message.slice_ids, each.message.round) == (worker, ids[1:], 2)
        assert isinstance(t.error_of(each.message), UpdaterError)
    for worker, each in enumerate(sorted(out[2:], key=lambda each: each.worker)):
        assert (each.worker, each.payload[0].tensor.tolist()) == (worker, [11.0, 11.0, 2.0, 2.0])
    t.settle(out)
    assert (bench.info(0, ids).rounds, bench.info(0, ids).versions) == ([2, 2], [2, 1])
    for rank in range(2):
        assert bench.push(rank, plans[rank], torch.ones(4)) == []
    assert bench.value(0, plans[0]).tolist() == [13.0, 13.0, 4.0, 4.0]
    assert (bench.info(0, ids).rounds, bench.info(0, ids).versions) == ([3, 3], [3, 2])
    bench.check_empty()


def test_an_open_round_goes_on_whatever_comes_in_between(t: Any) -> None:
    for between in ("info", "leave", "setting", "other list", "commit"):
        bench, ids, plans = pair(t, 3)
        a_round(t, bench, plans, 1.0, (2, 0, 1))
        bench.push(0, plans[0], torch.full((4,), 1.0), reply=60)
        bench.push(2, plans[2], torch.full((4,), 4.0))
        assert bench.pull(2, plans[2]) == []
        if between == "info":
            assert bench.info(1, ids).rounds == [1, 1]
        elif between == "leave":
            bench.leave(2)
        elif between == "setting":
            bench.set_updater(0, ADD)
        elif between == "other list":
            apart = bench.define(1, t.dense(ids[1:], [2]))
            bench.push(1, apart, torch.full((2,), 2.0))
        else:
            assert bench.commit(0) == []
        if between == "other list":
            apart = bench.define(1, t.dense(ids[:1], [2]))
            out = bench.push(1, apart, torch.full((2,), 2.0))
        else:
            out = bench.push(1, plans[1], torch.full((4,), 2.0))
        waited = [(0, [7.0] * 4)] + ([(2, [7.0] * 4)] if between != "leave" else [])
        assert [(each.worker, each.payload[0].tensor.tolist()) for each in out] == waited, between
        t.settle(out)
        assert bench.info(0, ids).versions == [2, 2]
        bench.check_empty()


def test_a_second_push_of_a_round_is_refused(t: Any) -> None:
    bench, _, plans = pair(t)
    bench.push(0, plans[0], torch.ones(4))
    with pytest.raises(ProtocolError, match="not merged"):
        bench.push(0, plans[0], torch.ones(4))
    bench.push(1, plans[1], torch.ones(4))
    assert bench.value(0, plans[0]).tolist() == [2.0] * 4
    bench.check_empty()


def test_a_deletion_leaves_the_rest_of_a_cohort(t: Any) -> None:
    bench, ids, plans = pair(t)
    a_round(t, bench, plans, 1.0)
    bench.push(0, plans[0], torch.ones(4), reply=60)
    out = bench.delete(1, "a", ids[:1])
    assert [type(each.message) for each in out] == [m.Done]  # the rest waits
    rest = bench.define(1, t.dense(ids[1:], [2]))
    (answer,) = bench.push(1, rest, torch.ones(2))
    assert torch.cat([each.tensor for each in answer.payload]).tolist() == [1.0, 1.0, 2.0, 2.0]
    t.settle([answer])
    bench.check_empty()


def test_cohorts_of_other_members_do_not_join(t: Any) -> None:
    bench, ids, plans = pair(t)
    a_round(t, bench, plans, 1.0)
    bench.delete(1, "a", ids[:1])
    rest = bench.define(1, t.dense(ids[1:], [2]))
    for value in range(2, 8):
        bench.push(0, plans[0], torch.full((4,), float(value)))
        bench.push(1, rest, torch.ones(2))
        assert bench.value(0, plans[0]).tolist() == [float(value)] * 2 + [value + 1.0] * 2
    assert len(bench.shard.plans.chunks(0, plans[0])[0].layout.cohorts(-2)) == 2
    bench.check_empty()


def test_a_key_made_after_a_delete_needs_all_again(t: Any) -> None:
    """Though the slices that nobody has pushed are in one cohort otherwise."""
    bench, ids, _ = pair(t)
    bench.delete(1, "a", ids[:1])
    bench.delete(1, "b", ids[1:])
    (c,) = bench.init("c", torch.zeros(2))
    for rank in range(2):
        assert bench.info(0, [c]).rounds == [0]
        bench.push(rank, bench.define(rank, t.dense([c], [2])), torch.ones(2))
    assert bench.info(0, [c]).rounds == [1]
    bench.check_empty()


def test_who_pushes_nothing_does_not_count_in_a_mean(t: Any) -> None:
    bench, ids, plans = pair(t, mean=True)
    nothing = [bench.define(rank, t.absent(ids, [2, 2])) for rank in range(2)]
    bench.push(0, nothing[0])
    bench.push(1, plans[1], torch.full((4,), 6.0))
    bench.push(1, nothing[1])
    bench.push(0, nothing[0])
    assert bench.value(0, plans[0]).tolist() == [6.0] * 4
    bench.push(1, plans[1], torch.full((4,), 6.0))
    bench.push(0, plans[0], torch.full((4,), 2.0))
    assert bench.value(0, plans[0]).tolist() == [4.0] * 4
    assert (bench.info(0, ids).rounds, bench.info(0, ids).versions) == ([3, 3], [2, 2])
    bench.check_empty()


# ---- splitting and joining ---------------------------------------------------------------------------


def cohorts(bench: Any) -> list[list[int]]:
    """Return the ids of the slices of each cohort."""
    return [sorted(each.slice_id for each in cohort.slices) for cohort in cohorts_of(bench.shard.slices)]


def all_push(bench: Any, plans: list[int], num_slices: int) -> None:
    for rank, plan in enumerate(plans):
        bench.push(rank, plan, torch.ones(2 * num_slices))


def many(t: Any, num_slices: int) -> tuple[Any, list[int], list[int], list[list[int]]]:
    """A store of two workers: ids, plans of the whole list, and for each slice the plans of it alone."""
    bench = t.Bench(2)
    bench.set_updater(0, ADD)
    ids = [bench.init(number, torch.zeros(2))[0] for number in range(num_slices)]
    whole = [bench.define(rank, t.dense(ids, [2] * num_slices)) for rank in range(2)]
    single = [[bench.define(rank, t.dense([each], [2])) for rank in range(2)] for each in ids]
    return bench, ids, whole, single


def test_slices_that_nobody_has_pushed_are_one_cohort(t: Any) -> None:
    bench, ids, whole, _ = many(t, 5)
    assert cohorts(bench) == [ids]
    all_push(bench, whole, 5)
    (new,) = bench.init("new", torch.zeros(2))
    assert cohorts(bench) == [ids, [new]]
    bench.check_empty()


def test_a_push_of_a_part_splits_a_cohort_in_the_middle_of_a_round(t: Any) -> None:
    bench, ids, whole, single = many(t, 3)
    all_push(bench, whole, 3)
    bench.push(0, whole[0], torch.ones(6), reply=50)
    for number in (1, 0):
        assert bench.push(1, single[number][1], torch.ones(2)) == []
    assert sorted(cohorts(bench)) == [[each] for each in ids]
    (out,) = bench.push(1, single[2][1], torch.ones(2))  # the pull waited for all of them
    assert (out.message.request, out.payload[0].tensor.tolist()) == (50, [4.0] * 6)
    t.settle([out])
    assert (bench.info(0, ids).rounds, bench.info(0, ids).versions) == ([2] * 3, [2] * 3)
    bench.check_empty()


def test_cohorts_join_at_the_second_push_of_their_list(t: Any) -> None:
    bench, ids, whole, single = many(t, 3)
    for plans in single:
        all_push(bench, plans, 1)
    all_push(bench, single[0], 1)  # is a round ahead for good
    all_push(bench, whole, 3)
    assert sorted(cohorts(bench)) == [[each] for each in ids]
    all_push(bench, whole, 3)
    assert cohorts(bench) == [ids]
    info = bench.info(0, ids)
    assert (info.rounds, info.versions) == ([4, 3, 3], [4, 3, 3])
    assert bench.value(0, whole[0]).tolist() == [8.0] * 2 + [6.0] * 4
    bench.check_empty()


def test_a_layout_whose_cohort_is_split_again_and_again_grows_patient(t: Any) -> None:
    bench, ids, whole, single = many(t, 2)
    joined = []
    for _ in range(6):
        all_push(bench, single[0], 1)
        pushes = 0
        while len(cohorts(bench)) > 1:
            all_push(bench, whole, 2)
            pushes += 1
        joined.append(pushes)
    assert joined == [2, 4, 8, 16, 32, 64]
    info = bench.info(0, ids)
    assert info.rounds == [sum(joined) + 6, sum(joined)]
    bench.check_empty()


def test_keys_pushed_singly_and_pulled_as_a_list_neither_split_nor_join(t: Any) -> None:
    bench, ids, whole, single = many(t, 4)
    for plans in single:
        all_push(bench, plans, 1)
    epoch = bench.shard._cohorts_epoch
    for number in range(5):
        for plans in single:
            all_push(bench, plans, 1)
        assert bench.value(0, whole[0]).tolist() == [4.0 + 2 * number] * 8
    assert bench.shard._cohorts_epoch == epoch
    assert sorted(cohorts(bench)) == [[each] for each in ids]
    bench.check_empty()


def test_who_waits_for_a_merge_is_told_of_each_part(t: Any) -> None:
    bench, _, whole, single = many(t, 3)
    bench.push(0, whole[0], torch.ones(6))
    bench.send(0, m.WaitMerged(whole[0], 70))
    for number in (2, 0, 1):
        (out,) = bench.push(1, single[number][1], torch.ones(2))
        assert out.message == m.Merged(70, [number])
    bench.check_empty()


def test_who_is_waited_for_is_told_after_a_split(t: Any) -> None:
    bench, _, whole, single = many(t, 2)
    bench.push(0, whole[0], torch.ones(4))
    bench.send(0, m.Pull(whole[0], 70))
    bench.push(1, single[0][1], torch.ones(2))
    (out,) = bench.send(0, m.AskWaiting(70, 1))
    assert out.message == m.Waiting(70, [1], "round 1 of 1")
    assert bench.shard.report() == ["round 1 of 1 waits for worker 1"]
    t.settle(bench.push(1, single[1][1], torch.ones(2)))
    bench.check_empty()


def test_a_put_waits_for_all_parts_of_a_cohort_that_was_split(t: Any) -> None:
    bench, ids, whole, single = many(t, 2)
    bench.push(0, whole[0], torch.ones(4))
    assert bench.put(0, whole[0], torch.full((4,), 9.0)) == []
    assert bench.push(1, single[0][1], torch.ones(2)) == []
    (out,) = bench.push(1, single[1][1], torch.ones(2))
    assert isinstance(out.message, m.Done)
    assert bench.value(1, whole[1]).tolist() == [9.0] * 4
    assert bench.info(0, ids).versions == [2, 2]
    bench.check_empty()


def test_the_memory_of_deleted_slices_is_free_at_once(t: Any) -> None:
    """No reference cycle keeps it until the garbage collector runs, which on a server may take long."""
    gc.disable()
    try:
        bench = t.Bench(2)
        bench.set_updater(0, ADD)
        ids = [bench.init(number, torch.zeros(40_000))[0] for number in range(4)]
        plans = [bench.define(rank, t.dense(ids[:3], [40_000] * 3)) for rank in range(2)]
        single = [[bench.define(rank, t.dense([each], [40_000])) for rank in range(2)] for each in ids]
        for pair in single[:3]:
            for rank in range(2):
                bench.push(rank, pair[rank], torch.ones(40_000))
        for _ in range(2):  # joins them
            for rank in range(2):
                bench.push(rank, plans[rank], torch.ones(120_000))
        bench.push(0, single[0][0], torch.ones(40_000))  # a round that stays open
        bench.push(0, single[3][0], torch.ones(40_000))
        slots = [weakref.ref(bench.shard.find(each).slot.tensor) for each in ids]
        for number in (0, 1, 3):
            for rank in range(2):
                bench.delete(rank, number, ids[number : number + 1])
        assert [slot() is None for slot in slots] == [True, True, False, True]
        for rank in range(2):
            bench.leave(rank)
        assert slots[2]() is None
    finally:
        gc.enable()


def test_a_wait_for_many_is_found_in_each_part(t: Any) -> None:
    """A cohort that is split slice by slice, while a pull waits for all of it and another for some."""
    bench, ids, whole, single = many(t, 6)
    half = bench.define(0, t.dense(ids[1:4], [2] * 3))
    bench.push(0, whole[0], torch.ones(12))
    bench.send(0, m.Pull(whole[0], 70))
    bench.send(0, m.Pull(half, 71))
    told = []
    for number in (5, 1, 2, 0, 3, 4):
        out = bench.push(1, single[number][1], torch.ones(2))
        told.append([each.message.request for each in out])
        t.settle(out)
    assert told == [[], [], [], [], [71], [70]]
    bench.check_empty()


def test_a_cohort_at_rest_has_nothing_open() -> None:
    cohort = Cohort({0})
    assert cohort.at_rest
    assert cohort.is_new
    cohort.held = True
    assert not cohort.at_rest
    cohort.finish_round()
    assert (cohort.at_rest, cohort.is_new, cohort.applied, cohort.merged) == (True, False, 1, 1)


NUM_SLICES = 4
SUBSETS = st.lists(st.integers(0, NUM_SLICES - 1), min_size=1, max_size=NUM_SLICES, unique=True)


@given(
    num_workers=st.integers(1, 3),
    events=st.lists(st.tuples(st.integers(0, 2), st.sampled_from("ppppppal"), SUBSETS), max_size=60),
)
def test_any_mix_of_lists_gives_what_each_slice_gives_alone(
    t: Any, num_workers: int, events: list[tuple[int, str, list[int]]]
) -> None:
    """Each slice has counters and a value of its own in the model; the server has cohorts."""
    bench = t.Bench(num_workers)
    bench.set_updater(0, ADD)
    ids = [bench.init(number, torch.zeros(1))[0] for number in range(NUM_SLICES)]
    pushed = [Counter[int]() for _ in ids]  # by slice: pushes of each worker
    open_sum, value, rounds = [0.0] * NUM_SLICES, [0.0] * NUM_SLICES, [0] * NUM_SLICES
    versions = [0] * NUM_SLICES
    members = set(range(num_workers))
    waiting: dict[int, tuple[int, dict[int, int]]] = {}  # by request: whose pull, of which rounds of what
    got: dict[int, list[float]] = {}

    def settle() -> None:
        """Merge what is complete in the model."""
        for each in range(NUM_SLICES):
            arrived = {worker for worker, count in pushed[each].items() if count > rounds[each]}
            if arrived and members <= arrived:
                rounds[each] += 1
                versions[each] += open_sum[each] != 0
                value[each] += open_sum[each]
                open_sum[each] = 0.0

    for request, (worker, event, subset) in enumerate(events, 1):
        if worker not in members:
            continue
        if event == "l":
            if len(members) == 1:
                continue
            out = bench.leave(worker)
            members.discard(worker)
            waiting = {number: pull for number, pull in waiting.items() if pull[0] != worker}
        elif any(pushed[each][worker] > rounds[each] for each in subset):
            continue
        else:
            entry = t.dense if event == "p" else t.absent
            plan = bench.define(worker, entry([ids[each] for each in subset], [1] * len(subset)))
            values = [torch.full((len(subset),), float(request))] if event == "p" else []
            for each in subset:
                pushed[each][worker] += 1
                open_sum[each] += float(request) * (event == "p")
            waiting[request] = worker, {each: pushed[each][worker] for each in subset}
            out = bench.push(worker, plan, *values, reply=request)
        settle()
        for each in out:
            if isinstance(each.message, m.Data):
                got[each.message.request] = torch.cat([part.tensor for part in each.payload]).tolist()
        t.settle(out)
        ready = {
            number: [value[each] for each in pulled]
            for number, (_, pulled) in waiting.items()
            if all(rounds[each] >= need for each, need in pulled.items())
        }
        assert got == ready
        waiting = {number: pull for number, pull in waiting.items() if number not in ready}
        got.clear()
    if members:
        info = bench.info(min(members), ids)
        assert (info.rounds, info.versions) == (rounds, versions)
