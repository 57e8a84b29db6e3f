"""Changes of options on a server: which hold, from which round on, and which differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensorkv.errors import SettingMismatch
from tensorkv.server import options
from tensorkv.server.options import Change, OptionLog
from tensorkv.updaters.spec import UpdaterSpec
from tensorkv.wire import messages as m

SGD = UpdaterSpec(type="optimizer", name="torch.optim:SGD", options={"lr": 1.0})


def change(rank: int, lr: float, *keys: str) -> Change:
    return Change(rank, keys or None, {"lr": lr})


def added(log: OptionLog, *changes: Change) -> OptionLog:
    for each in changes:
        log.add(each)
    return log


def texts(log: OptionLog) -> list[str]:
    found = [f"{each.rank}:{each.number}" for each, _ in log.differing]
    log.differing.clear()
    return found


def test_changes_of_the_setting_rank_hold_and_others_are_compared() -> None:
    log = OptionLog({0, 1, 2})
    assert log.add(change(1, 0.5)) == "waits"
    assert log.add(change(0, 0.5)) == "holds"
    assert log.add(change(2, 0.25)) == "compared"
    added(log, change(0, 0.1), change(1, 0.1, "w"))
    assert texts(log) == ["2:1", "1:2"]
    added(log, change(2, 0.1), change(2, 7.0), change(0, 8.0))
    assert texts(log) == ["2:3"]


def test_a_mismatch_says_who_asked_for_what() -> None:
    log = added(OptionLog({0, 1}), change(0, 0.5), change(1, 0.25, "w"))
    ((_, text),) = log.differing
    assert text == (
        "change of options number 1 of rank 1 is options {'lr': 0.25} for keys ['w'], but that of rank 0 is "
        "options {'lr': 0.5} for all keys; all ranks that change options must agree"
    )


def test_what_the_next_rank_was_ahead_by_holds_when_the_setting_rank_leaves() -> None:
    members = {0, 1, 2}
    log = added(OptionLog(members), change(0, 0.5), change(1, 0.5), change(1, 0.4), change(1, 0.3))
    added(log, change(2, 0.5), change(2, 0.7))
    members.discard(0)
    assert [each.options["lr"] for each in log.leave(0)] == [0.4, 0.3]
    assert texts(log) == ["2:2"]
    members.discard(1)
    assert log.leave(1) == []
    assert log.add(change(2, 0.3)) == "compared"
    assert texts(log) == []
    assert log.add(change(2, 0.2)) == "holds"


def test_memory_is_bounded_and_what_is_forgotten_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "MAX_REMEMBERED_CHANGES", 3)
    log = OptionLog({0, 1, 2})
    added(log, *(change(0, float(each)) for each in range(10)))
    added(log, *(change(1, -1.0) for _ in range(10)))
    assert texts(log) == ["1:8", "1:9", "1:10"]
    added(log, *(change(2, float(each)) for each in range(20)))
    assert texts(log) == []
    added(log, *(change(0, -2.0) for each in range(10, 20)))
    assert texts(log) == ["2:18", "2:19", "2:20"]
    assert len(log._kept) == 3
    assert not log._waiting


def test_after_a_load_all_begin_anew() -> None:
    log = added(OptionLog({0, 1}), change(0, 0.5), change(1, 0.5), change(1, 0.25))
    log.clear()
    added(log, change(1, 0.1), change(0, 0.1))
    assert texts(log) == []


def two_slices(t: Any, num_workers: int = 2, **store: Any) -> tuple[Any, list[int], list[int]]:
    bench = t.Bench(num_workers, **store)
    bench.set_updater(0, SGD)
    ids = [bench.init(key, torch.zeros(1, dtype=torch.float64))[0] for key in "ab"]
    return bench, ids, [bench.define(rank, t.dense(ids, [1, 1], "float64")) for rank in range(num_workers)]


def set_lr(bench: Any, worker: int, lr: float, *keys: str) -> list[Any]:
    return bench.send(worker, m.ChangeOptions(1, keys or None, {"lr": lr}))


def ones() -> torch.Tensor:
    return torch.ones(2, dtype=torch.float64)


def test_a_change_holds_from_the_setting_ranks_next_push_on(t: Any) -> None:
    bench, _, plans = two_slices(t)
    bench.push(0, plans[0], ones())
    set_lr(bench, 0, 0.5)
    bench.push(1, plans[1], ones())  # the round that rank 0 pushed before
    assert bench.value(0, plans[0]).tolist() == [-2.0, -2.0]
    bench.push(1, plans[1], ones())
    set_lr(bench, 0, 0.25, "b")
    bench.push(0, plans[0], ones())
    assert bench.value(0, plans[0]).tolist() == [-3.0, -2.5]
    assert not bench.shard.schedule.pending
    bench.check_empty()


def test_in_async_a_change_holds_when_it_arrives(t: Any) -> None:
    bench, _, plans = two_slices(t, policy="async")
    set_lr(bench, 0, 0.5)
    bench.push(1, plans[1], ones())
    assert bench.value(0, plans[0]).tolist() == [-0.5, -0.5]


def test_a_change_that_differs_is_told_once_and_changes_nothing(t: Any) -> None:
    bench, _, plans = two_slices(t)
    assert set_lr(bench, 1, 0.25) == []
    (told,) = set_lr(bench, 0, 0.5)
    assert (told.worker, told.message.slice_ids, told.message.round) == (1, [], 1)
    error = t.error_of(told.message)
    assert isinstance(error, SettingMismatch)
    assert "rank 1 is options {'lr': 0.25}" in str(error)
    for rank in range(2):
        bench.push(rank, plans[rank], ones())
    assert bench.value(0, plans[0]).tolist() == [-1.0, -1.0]


def test_a_change_without_an_optimizer_is_told(t: Any) -> None:
    bench = t.Bench(1)
    bench.init("w", torch.zeros(1))
    (told,) = set_lr(bench, 0, 0.5)
    assert "need an optimizer" in t.error_of(told.message).args[0]


def test_a_key_made_after_a_waiting_change_gets_it_too(t: Any) -> None:
    bench, ids, plans = two_slices(t)
    bench.push(1, plans[1], ones())
    set_lr(bench, 1, 0.5)  # rank 0 has not made it
    late = bench.init("c", torch.zeros(1, dtype=torch.float64), worker=1)
    bench.leave(0)
    assert bench.value(1, plans[1]).tolist() == [-1.0, -1.0]
    plan = bench.define(1, t.dense([*ids, *late], [1, 1, 1], "float64"))
    bench.push(1, plan, torch.ones(3, dtype=torch.float64))
    assert bench.value(1, plan).tolist() == [-1.5, -1.5, -0.5]
    bench.check_empty()


STEPS = st.lists(st.tuples(st.integers(0, 2), st.sampled_from([[0], [1], [0, 1]])), min_size=1, max_size=40)


@given(steps=STEPS, rates=st.lists(st.sampled_from([1.0, 0.5, 0.25]), min_size=6, max_size=6))
def test_whatever_the_order_each_round_has_the_rate_of_its_setting_rank(
    t: Any, steps: list[tuple[int, list[int]]], rates: list[float]
) -> None:
    """Every rank changes the rate before each of its pushes of all keys; the keys are pushed in pieces."""
    bench, ids, _ = two_slices(t, num_workers=3)
    num_pushed = [[0, 0] for _ in range(3)]
    expected = [0.0, 0.0]
    applied = [0, 0]
    num_changes = [0, 0, 0]
    rate_of_round: list[list[float]] = [[], []]  # by slice: rank 0's rate when it pushed round n
    rate = 1.0
    for worker, wanted in steps:
        chosen = [each for each in wanted if num_pushed[worker][each] == applied[each]]
        if not chosen:
            continue
        number = num_changes[worker]
        num_changes[worker] += 1
        assert set_lr(bench, worker, rates[number % 6]) == []
        if worker == 0:
            rate = rates[number % 6]
        plan = bench.define(worker, t.dense([ids[each] for each in chosen], [1] * len(chosen), "float64"))
        bench.push(worker, plan, torch.ones(len(chosen), dtype=torch.float64))
        for each in chosen:
            num_pushed[worker][each] += 1
            if worker == 0:
                rate_of_round[each].append(rate)
            if all(pushed[each] > applied[each] for pushed in num_pushed):
                expected[each] -= 3 * rate_of_round[each][applied[each]]
                applied[each] += 1
    found = [each.value.item() for each in sorted(bench.shard.slices, key=lambda each: each.slice_id)]
    assert found == expected
