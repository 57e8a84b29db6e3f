"""Lockstep gives what the general way gives, and ends when anything else comes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tensorkv.errors import ProtocolError, UpdaterError
from tensorkv.server.layouts import Layout
from tensorkv.server.lockstep import is_at_rest
from tensorkv.server.rounds import Rounds
from tensorkv.updaters.spec import UpdaterSpec
from tensorkv.wire import messages as m

SGD = UpdaterSpec(type="optimizer", name="torch.optim:SGD", options={"lr": 0.5, "momentum": 0.5})


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
    assert bench.shard._locksteps
    assert (bench.info(0, ids).rounds, bench.info(0, ids).versions) == ([5, 5], [5, 5])
    bench.check_empty()


def test_optimizers_step_in_it(t: Any) -> None:
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
    assert bench.shard._locksteps
    assert (bench.info(0, ids).rounds, bench.info(0, ids).versions) == ([5, 5], [5, 5])
    bench.check_empty()


def test_an_update_that_fails_ends_it(t: Any) -> None:
    """The other slices go on, who pushed is told, and who waits has the values that there are."""

    def careful(key: Any, pushed: torch.Tensor, stored: torch.Tensor) -> None:
        if key == "b" and pushed[0] == 9.0:
            raise RuntimeError("nine")
        stored += pushed

    bench, ids, plans = pair(t, functions={"careful": careful})
    bench.set_updater(0, UpdaterSpec(type="function", name="careful"))
    for rank in range(2):
        bench.push(rank, plans[rank], torch.ones(4))
    assert bench.shard._locksteps
    bench.push(0, plans[0], torch.full((4,), 4.0))
    assert bench.pull(0, plans[0]) == []
    out = bench.push(1, plans[1], torch.full((4,), 5.0), reply=60)
    assert not bench.shard._locksteps
    for worker, each in enumerate(out[:2]):
        assert (each.worker, each.message.slice_ids, each.message.round) == (worker, ids[1:], 2)
        assert isinstance(t.error_of(each.message), UpdaterError)
    for worker, each in enumerate(out[2:]):
        assert (each.worker, each.payload[0].tensor.tolist()) == (worker, [11.0, 11.0, 2.0, 2.0])
    t.settle(out)
    assert (bench.info(0, ids).rounds, bench.info(0, ids).versions) == ([2, 2], [2, 1])
    for rank in range(2):
        assert bench.push(rank, plans[rank], torch.ones(4)) == []
    assert bench.value(0, plans[0]).tolist() == [13.0, 13.0, 4.0, 4.0]
    assert (bench.info(0, ids).rounds, bench.info(0, ids).versions) == ([3, 3], [3, 2])
    bench.check_empty()


def test_it_ends_in_the_middle_of_a_round(t: Any) -> None:
    """Whatever comes in between, the round that is open goes on in the general way."""
    for between in ("info", "leave", "setting", "other list", "commit"):
        bench, ids, plans = pair(t, 3)
        a_round(t, bench, plans, 1.0, (2, 0, 1))
        bench.push(0, plans[0], torch.full((4,), 1.0), reply=60)
        bench.push(2, plans[2], torch.full((4,), 4.0))
        assert bench.pull(2, plans[2]) == []
        assert bench.shard._locksteps
        if between == "info":
            assert bench.info(1, ids).rounds == [1, 1]
        elif between == "leave":
            bench.leave(2)
        elif between == "setting":
            bench.set_updater(0, UpdaterSpec(type="named", name="add"))
        elif between == "other list":
            apart = bench.define(1, t.dense(ids[1:], [2]))
            bench.push(1, apart, torch.full((2,), 2.0))
        else:
            assert bench.commit(0) == []
        assert not bench.shard._locksteps
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


def test_a_second_push_is_refused_as_ever(t: Any) -> None:
    bench, _, plans = pair(t)
    bench.push(0, plans[0], torch.ones(4))
    with pytest.raises(ProtocolError, match="not merged"):
        bench.push(0, plans[0], torch.ones(4))
    bench.push(1, plans[1], torch.ones(4))
    assert bench.value(0, plans[0]).tolist() == [2.0] * 4
    bench.check_empty()


def test_a_deletion_ends_it_and_its_pulls(t: Any) -> None:
    bench, ids, plans = pair(t)
    a_round(t, bench, plans, 1.0)
    bench.push(0, plans[0], torch.ones(4), reply=60)
    out = bench.delete(1, "a", ids[:1])
    assert [type(each.message) for each in out] == [m.Failed, m.Done]
    rest = bench.define(1, t.dense(ids[1:], [2]))
    bench.push(1, rest, torch.ones(2))
    assert bench.value(1, rest).tolist() == [2.0, 2.0]
    bench.check_empty()


def test_absent_and_mean_are_as_ever(t: Any) -> None:
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


def test_only_a_layout_at_rest_may_begin(t: Any) -> None:
    bench, ids, _ = pair(t)
    layout = Layout([bench.shard._slices[bench.shard._index_of[each]] for each in ids], [0, 2])
    for change in (None, "applied", "pushed", "merged", "left"):
        rounds = Rounds(2)
        for _ in ids:
            rounds.add()
        if change == "applied":
            rounds.push_alone(0, np.array([0]))
        elif change == "pushed":
            rounds.push(0, np.array([1]))
        elif change == "merged":
            rounds.merge(np.array([0, 1]))
        elif change == "left":
            rounds.left[1] = True
        assert is_at_rest(layout, rounds) is (change is None)
