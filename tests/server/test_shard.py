"""StoreShard through ServerState: rounds, sums, commits, deletions and leavings on one server."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tensorkv.errors import (
    CommitMismatch,
    KeyDeleted,
    MemoryLimitReached,
    ProtocolError,
    UnknownUpdater,
    UpdaterError,
)
from tensorkv.server import updates as updates_module
from tensorkv.server.memory import Memory
from tensorkv.server.shard import SCHEDULER
from tensorkv.server.slots import PACKED_BYTES, Slot
from tensorkv.updaters.spec import UpdaterSpec
from tensorkv.wire import messages as m

ADD = UpdaterSpec(type="named", name="add")
ASSIGN = UpdaterSpec(type="named", name="assign")
SGD = UpdaterSpec(type="optimizer", name="torch.optim:SGD", options={"lr": 0.5, "momentum": 0.5})
FAIL = UpdaterSpec(type="function", name="fail")


def ones(num_elems: int, factor: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full((num_elems,), factor, dtype=dtype)


def fail(key: Any, pushed: torch.Tensor, stored: torch.Tensor) -> None:
    stored.fill_(99)
    raise RuntimeError("no")


def kinds(out: list[Any]) -> list[tuple[int, str]]:
    return [(each.worker, type(each.message).__name__) for each in out]


# ---- rounds ----------------------------------------------------------------------------------------


def test_a_round_needs_everybody_and_is_summed_in_rank_order(t: Any) -> None:
    bench = t.Bench(3)
    (w,) = bench.init("w", torch.zeros(2))
    plans = [bench.define(rank, t.dense([w], [2])) for rank in range(3)]
    big = [1.0, 1e8, -1e8]  # (1 + 1e8) - 1e8 is 0 in float32; another order gives 1
    for rank in (2, 0):
        assert bench.push(rank, plans[rank], ones(2, big[rank])) == []
        assert bench.info(0, [w]).rounds == [0]
    bench.push(1, plans[1], ones(2, big[1]))
    assert bench.value(0, plans[0]).tolist() == [0.0, 0.0]
    assert (bench.info(0, [w]).rounds, bench.info(0, [w]).versions) == ([1], [1])
    bench.check_empty()


def test_a_pull_waits_for_its_workers_round_and_others_do_not(t: Any) -> None:
    bench = t.Bench(2)
    (w,) = bench.init("w", torch.zeros(2))
    mine, theirs = (bench.define(rank, t.dense([w], [2])) for rank in range(2))
    bench.push(0, mine, ones(2))
    assert bench.pull(0, mine) == []
    assert bench.value(1, theirs).tolist() == [0.0, 0.0]
    out = bench.push(1, theirs, ones(2, 2.0), reply=7)
    assert sorted(kinds(out)) == [(0, "Data"), (1, "Data")]
    assert m.Data(7, 0) in [each.message for each in out]
    assert [each.payload[0].tensor.tolist() for each in out] == [[3.0, 3.0], [3.0, 3.0]]
    t.settle(out)
    bench.check_empty()


def test_list_orders_and_chunks_may_differ_between_workers(t: Any) -> None:
    bench = t.Bench(2)
    (a,) = bench.init("a", torch.zeros(2))
    (b,) = bench.init("b", torch.zeros(3))
    together = bench.define(0, t.dense([a, b], [2, 3]))
    backwards = bench.define(1, t.dense([b, a], [3, 2]))
    apart = bench.define(1, t.dense([b], [3]), t.dense([a], [2]))
    bench.push(0, together, torch.arange(5.0))
    bench.push(1, backwards, 10 * torch.arange(5.0))
    assert bench.value(0, together).tolist() == [30.0, 41.0, 2.0, 13.0, 24.0]
    bench.push(1, apart, ones(2), chunk=1)
    bench.push(0, together, torch.arange(5.0))
    assert bench.info(0, [a, b]).rounds == [2, 1]
    bench.push(1, apart, ones(3), chunk=0)
    assert bench.value(0, together).tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    bench.check_empty()


@pytest.mark.parametrize("spec", [ASSIGN, ADD, SGD], ids=lambda spec: spec.name)
def test_the_quick_way_and_the_general_way_agree_bitwise(t: Any, spec: UpdaterSpec) -> None:
    values: list[torch.Tensor] = []
    for same_order in (True, False):
        generator = torch.Generator().manual_seed(3)
        bench = t.Bench(3)
        bench.set_updater(0, spec)
        (a,) = bench.init("a", torch.randn(40, generator=generator))
        (b,) = bench.init("b", torch.randn(30, generator=generator))
        read = bench.define(0, t.dense([a, b], [40, 30]))
        forward = [bench.define(rank, t.dense([a, b], [40, 30])) for rank in range(3)]
        backward = [bench.define(rank, t.dense([b, a], [30, 40])) for rank in range(3)]
        for _ in range(3):
            for rank in range(3):
                first, second = torch.randn(40, generator=generator), torch.randn(30, generator=generator)
                if same_order or rank == 1:
                    bench.push(rank, forward[rank], first, second)
                else:
                    bench.push(rank, backward[rank], second, first)
        values.append(bench.value(0, read))
        bench.check_empty()
    assert torch.equal(*values)


def test_absent_takes_part_without_a_value(t: Any) -> None:
    bench = t.Bench(2, mean=True)
    (w,) = bench.init("w", ones(2, 5.0))
    value = bench.define(0, t.dense([w], [2], counts=[2]))
    nothing = [bench.define(rank, t.absent([w], [2])) for rank in range(2)]
    bench.push(1, nothing[1])
    bench.push(0, value, ones(2, 3.0))
    assert bench.value(0, value).tolist() == [1.5, 1.5]
    bench.push(0, nothing[0])
    bench.push(1, nothing[1])
    assert bench.value(0, value).tolist() == [1.5, 1.5]
    assert (bench.info(0, [w]).rounds, bench.info(0, [w]).versions) == ([2], [1])
    bench.check_empty()


def test_a_mean_divides_each_slice_by_its_own_counts(t: Any) -> None:
    bench = t.Bench(2, mean=True)
    (a,) = bench.init("a", torch.zeros(2))
    (b,) = bench.init("b", torch.zeros(2))
    one = bench.define(0, t.dense([a, b], [2, 2], counts=[1, 3]))
    other = bench.define(1, t.dense([a, b], [2, 2], counts=[1, 1]))
    bench.push(0, one, ones(4, 6.0))
    bench.push(1, other, ones(4, 2.0))
    assert bench.value(0, one).tolist() == [4.0, 4.0, 2.0, 2.0]


@pytest.mark.parametrize("same_chunks", [True, False])
@pytest.mark.parametrize("spec", [ASSIGN, ADD], ids=str)
@pytest.mark.parametrize("first", [0, 1])
def test_a_weight_counts_instead_of_the_tensors(t: Any, first: int, spec: Any, same_chunks: bool) -> None:
    """However the slices come, and whoever is first. The lockstep of unweighted rounds ends and returns."""
    bench = t.Bench(2, mean=True)
    bench.set_updater(0, spec)
    ids = bench.init("w", torch.zeros(4), 2)
    plans = [bench.define(rank, t.dense(ids, [2, 2], counts=[1 + rank] * 2)) for rank in range(2)]
    if not same_chunks:
        plans[1] = bench.define(1, *(t.dense([each], [2], counts=[2]) for each in ids))
    expected = torch.zeros(4)
    generator = torch.Generator().manual_seed(5)
    for weights in ((None, None), (0.3, 7), (None, 7), (0.3, None), (None, None)):
        values = [torch.randn(4, generator=generator) for _ in range(2)]
        for rank in (first, 1 - first):
            if rank == 1 and not same_chunks:
                for chunk in range(2):
                    part = values[1][2 * chunk : 2 * chunk + 2]
                    bench.push(1, plans[1], part, chunk=chunk, weight=weights[1])
            else:
                bench.push(rank, plans[rank], values[rank], weight=weights[rank])
        shares = [rank + 1 if weight is None else weight for rank, weight in enumerate(weights)]
        products = [
            value * (share / (rank + 1))
            for rank, (value, share) in enumerate(zip(values, shares, strict=True))
        ]
        mean = (products[0] + products[1]) / sum(shares)
        expected = mean if spec is ASSIGN else expected + mean
        assert torch.equal(bench.value(0, plans[0]), expected)
    bench.check_empty()


def test_weights_hold_till_the_commit_and_beyond_a_leave(t: Any) -> None:
    bench = t.Bench(3, mean=True)
    (w,) = bench.init("w", torch.zeros(2))
    plans = [bench.define(rank, t.dense([w], [2])) for rank in range(3)]
    for rank in range(3):
        bench.push(rank, plans[rank], ones(2, rank + 1.0), apply=False, weight=[1.0, 2.0, 5.0][rank])
    for rank in range(3):
        last = bench.commit(rank)
    bench.decide(last[0].message)
    assert bench.value(0, plans[0]).tolist() == [(1 + 4 + 15) / 8] * 2
    bench.push(0, plans[0], ones(2, 4.0), weight=3.0)
    bench.push(1, plans[1], ones(2, 8.0), weight=1.0)
    bench.leave(2)
    assert bench.value(0, plans[0]).tolist() == [5.0] * 2
    bench.check_empty()


def test_the_weight_of_a_rounds_only_push_cancels(t: Any) -> None:
    for policy in ("async", "sync"):
        bench = t.Bench(2, mean=True, policy=policy)
        (w,) = bench.init("w", torch.zeros(1))
        plans = [bench.define(rank, t.dense([w], [1], counts=[3])) for rank in range(2)]
        nothing = bench.define(1, t.absent([w], [1]))
        value = torch.tensor([1 / 3])
        bench.push(0, plans[0], value, weight=0.7)
        if policy == "sync":
            bench.push(1, nothing, weight=9.0)
        assert torch.equal(bench.value(0, plans[0]), value / 3)


@pytest.mark.parametrize("weight", [0.0, -1.0, 1e-19, 1e19, float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_none_can_be_ends_its_connection(t: Any, weight: float) -> None:
    bench = t.Bench(2, mean=True)
    (w,) = bench.init("w", torch.zeros(2))
    plans = [bench.define(rank, t.dense([w], [2])) for rank in range(2)]
    with pytest.raises(ProtocolError, match="weight"):
        bench.push(0, plans[0], ones(2), weight=weight)
    assert bench.info(0, [w]).rounds == [0]
    for rank in range(2):
        bench.push(rank, plans[rank], ones(2, 2.0), weight=2.0)
    assert bench.value(0, plans[0]).tolist() == [2.0, 2.0]
    bench.check_empty()


def test_a_weight_without_a_mean_ends_its_connection(t: Any) -> None:
    bench = t.Bench(1)
    (w,) = bench.init("w", torch.zeros(2))
    plan = bench.define(0, t.dense([w], [2]))
    with pytest.raises(ProtocolError, match="no mean"):
        bench.push(0, plan, ones(2), weight=1.0)


def test_empty_values_and_scalars(t: Any) -> None:
    bench = t.Bench(2)
    (empty,) = bench.init("empty", torch.zeros(0, 3))
    (scalar,) = bench.init("scalar", torch.tensor(2.0))
    plans = [bench.define(rank, t.dense([empty, scalar], [0, 1])) for rank in range(2)]
    alone = bench.define(0, t.dense([empty], [0]))
    for spec in (ASSIGN, ADD, SGD):
        bench.set_updater(0, spec)
        for rank in (1, 0):
            bench.push(rank, plans[rank], ones(1))
    assert bench.value(0, plans[0]).tolist() == [2.0 + 2.0 - 0.5 * 2.0]
    assert bench.value(0, alone).numel() == 0
    assert bench.info(0, [empty, scalar]).versions == [3, 3]
    bench.check_empty()


def test_half_width_floats_are_added_in_float32_and_pushed_dtypes_are_cast(t: Any) -> None:
    bench = t.Bench(3)
    (w,) = bench.init("w", torch.zeros(2, dtype=torch.float16))
    dtypes = [torch.float16, torch.float32, torch.bfloat16]
    names = ["float16", "float32", "bfloat16"]
    plans = [bench.define(rank, t.dense([w], [2], dtype=names[rank])) for rank in range(3)]
    for rank in range(3):
        bench.push(rank, plans[rank], ones(2, 2048.0 if rank == 0 else 0.75, dtypes[rank]))
    assert bench.value(0, plans[0]).tolist() == [2050.0, 2050.0]  # 2048 if each sum were rounded to float16


# ---- what breaks the rules -------------------------------------------------------------------------


def test_a_second_push_of_an_unmerged_round_is_refused_and_changes_nothing(t: Any) -> None:
    bench = t.Bench(2)
    (a,) = bench.init("a", torch.zeros(2))
    (b,) = bench.init("b", torch.zeros(2))
    both = bench.define(0, t.dense([b, a], [2, 2]))
    mine, theirs = (bench.define(rank, t.dense([a], [2])) for rank in range(2))
    bench.push(0, mine, ones(2))
    with pytest.raises(ProtocolError, match="not merged"):
        bench.push(0, both, ones(4, 5.0))
    bench.push(1, theirs, ones(2))
    assert bench.value(0, both).tolist() == [0.0, 0.0, 2.0, 2.0]
    assert bench.info(0, [a, b]).rounds == [1, 0]
    bench.check_empty()


def test_a_push_of_what_awaits_commit_is_refused(t: Any) -> None:
    bench = t.Bench(1)
    (w,) = bench.init("w", torch.zeros(2))
    plan = bench.define(0, t.dense([w], [2]))
    bench.push(0, plan, ones(2), apply=False)
    for apply in (True, False):
        with pytest.raises(ProtocolError, match="commit"):
            bench.push(0, plan, ones(2, 7.0), apply=apply)
    (ready,) = bench.commit(0)
    bench.decide(ready.message)
    assert bench.value(0, plan).tolist() == [1.0, 1.0]
    bench.check_empty()


@pytest.mark.parametrize(
    "entry",
    [
        m.ChunkEntry([1], [2, 2], m.PayloadDescriptor("dense", "float32"), [1]),
        m.ChunkEntry([1], [2], m.PayloadDescriptor("dense", "float32"), []),
        m.ChunkEntry([1, 1], [2, 2], m.PayloadDescriptor("dense", "float32"), [1, 1]),
        m.ChunkEntry([1], [3], m.PayloadDescriptor("dense", "float32"), [1]),
        m.ChunkEntry([9], [-3], m.PayloadDescriptor("dense", "float32"), [1]),
        m.ChunkEntry([1], [2], m.PayloadDescriptor("dense", "no_such"), [1]),
        m.ChunkEntry([1], [2], m.PayloadDescriptor("dense", "Tensor"), [1]),
        m.ChunkEntry([1], [2], m.PayloadDescriptor("dense", "int32"), [1]),
        m.ChunkEntry([1, 2], [2, 2], m.PayloadDescriptor("dense", "float32"), [1, 1]),
    ],
    ids=["lengths", "counts", "twice", "length", "negative", "dtype", "no dtype", "cast", "stored dtypes"],
)
def test_a_plan_that_makes_no_sense_is_refused(t: Any, entry: m.ChunkEntry) -> None:
    bench = t.Bench(1)
    assert bench.init("a", torch.zeros(2)) == [1]
    assert bench.init("b", torch.zeros(2, dtype=torch.float64)) == [2]
    with pytest.raises(ProtocolError):
        bench.state.handle(0, m.DefinePlan(1, 1, [entry]))
    with pytest.raises(ProtocolError, match="plan 1"):
        bench.state.handle(0, m.Pull(1, 1))


def test_an_init_that_makes_no_sense_is_refused(t: Any) -> None:
    bench = t.Bench(1)
    bench.init("a", torch.zeros(4))
    good = {"request": 1, "store": 1, "key": "b", "shape": (4,), "dtype": "float32"}
    for wrong in (
        {**good, "slices": [m.SliceEntry(1, 0, 0, 4)]},  # the id exists
        {**good, "slices": [m.SliceEntry(5, 0, 0, 2), m.SliceEntry(5, 0, 2, 4)]},  # twice
        {**good, "slices": [m.SliceEntry(5, 0, 0, 5)]},
        {**good, "slices": [m.SliceEntry(5, 0, 3, 2)]},
        {**good, "shape": (-2, -2), "slices": [m.SliceEntry(5, 0, 0, 4)]},
        {**good, "dtype": "no_such", "slices": [m.SliceEntry(5, 0, 0, 4)]},
    ):
        with pytest.raises(ProtocolError):
            bench.send(0, m.InitSlices(**wrong), [torch.zeros(4)])
    assert {each.slice_id for each in bench.shard.slices} == {1}
    bench.check_empty()


def test_a_chunk_that_is_not_there(t: Any) -> None:
    bench = t.Bench(1)
    (w,) = bench.init("w", torch.zeros(2))
    plan = bench.define(0, t.dense([w], [2]))
    for number in (-1, 1):
        with pytest.raises(ProtocolError, match=f"chunk {number}"):
            bench.push(0, plan, chunk=number)


# ---- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [ASSIGN, ADD, SGD], ids=lambda spec: spec.name)
@pytest.mark.parametrize("num_elems", [3, 40_000])
def test_what_is_lent_is_never_written(t: Any, spec: UpdaterSpec, num_elems: int) -> None:
    bench = t.Bench(1, policy="async")
    bench.set_updater(0, spec)
    (w,) = bench.init("w", torch.zeros(num_elems))
    (small,) = bench.init("small", torch.zeros(3))
    plan = bench.define(0, t.dense([w], [num_elems]))
    other = bench.define(0, t.dense([small], [3]))
    seen: list[tuple[Any, torch.Tensor]] = []
    for step in range(4):
        (out,) = bench.pull(0, plan)
        seen.append((out, out.payload[0].tensor.clone()))
        bench.push(0, plan, ones(num_elems, step + 1.0))
        bench.push(0, other, ones(3))
        bench.init(f"new {step}", torch.ones(3))  # small values share memory with those that are lent
    assert all(torch.equal(out.payload[0].tensor, value) for out, value in seen)
    assert len({float(value[0]) for _, value in seen}) == len(seen)
    t.settle([out for out, _ in seen])
    assert all(lease.readers == 0 for out, _ in seen for lease in out.leases)
    where = bench.shard.find(w).slot.tensor.data_ptr()
    bench.push(0, plan, ones(num_elems))
    assert bench.shard.find(w).slot.tensor.data_ptr() == where  # not lent: in place
    bench.check_empty()


def test_assign_does_not_copy_a_lent_value_that_it_replaces(t: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = t.Bench(1, policy="async")
    (w,) = bench.init("w", torch.zeros(40_000))
    plan = bench.define(0, t.dense([w], [40_000]))
    (out,) = bench.pull(0, plan)
    monkeypatch.setattr(Slot, "make_writable", lambda slot: pytest.fail("it was copied"))
    with monkeypatch.context() as patch:
        patch.setattr(updates_module, "add_up", refuse)
        bench.push(0, plan, ones(40_000, 5.0))
        assert float(bench.shard.find(w).value[0]) == 0.0  # a sum that fails leaves the value as it was
    bench.push(0, plan, ones(40_000, 7.0))
    assert bench.shard.find(w).value.unique().tolist() == [7.0]
    assert bool((out.payload[0].tensor == 0).all())
    t.settle([out])
    bench.check_empty()


def refuse(*_: object, **__: object) -> None:
    raise RuntimeError("no")


def test_many_slices_outgrow_the_first_tables(t: Any) -> None:
    bench = t.Bench(2)
    ids = [bench.init(f"k{i}", ones(1, float(i)))[0] for i in range(150)]
    plans = [bench.define(rank, t.dense(ids, [1] * 150)) for rank in range(2)]
    bench.set_updater(0, ADD)
    for rank in range(2):
        bench.push(rank, plans[rank], ones(150))
    assert bench.value(0, plans[0]).tolist() == [i + 2.0 for i in range(150)]
    bench.check_empty()


# ---- faults ----------------------------------------------------------------------------------------


def test_an_updater_that_raises_blames_each_contributor_once_per_slice(t: Any) -> None:
    bench = t.Bench(3, functions={"fail": fail})
    bench.leave(2)
    (w,) = bench.init("w", torch.zeros(2))
    (calm,) = bench.init("calm", torch.zeros(2))
    bench.set_updater(0, FAIL, keys=("w",))
    plans = [bench.define(rank, t.dense([w, calm], [2, 2])) for rank in range(2)]
    bench.push(0, plans[0], ones(4))
    out = bench.push(1, plans[1], ones(4), reply=3)
    assert kinds(out) == [(0, "Fault"), (1, "Fault"), (1, "Data")]
    for each in out[:2]:
        assert (each.message.slice_ids, each.message.round) == ([w], 1)
        assert isinstance(t.error_of(each.message), UpdaterError)
        assert "RuntimeError: no" in each.message.text
    t.settle(out)
    assert bench.value(0, plans[0]).tolist() == [0.0, 0.0, 2.0, 2.0]
    assert (bench.info(0, [w, calm]).rounds, bench.info(0, [w, calm]).versions) == ([1, 1], [0, 1])
    bench.check_empty()


def test_a_setting_that_cannot_be_loaded_is_refused_and_changes_nothing(t: Any) -> None:
    bench = t.Bench(1)
    (w,) = bench.init("w", torch.zeros(2))
    record = m.SettingRecord(None, UpdaterSpec(type="named", name="no such"))
    (out,) = bench.send(0, m.PrepareSetting(4, 1, 0, record))
    assert isinstance(t.error_of(out.message), UnknownUpdater)
    with pytest.raises(ProtocolError, match="not prepared"):
        bench.send(0, m.ActivateSetting(1, 0))
    assert bench.info(0, [w]).updater == "assign"


# ---- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0), (1, 2, 0)])
def test_a_setting_holds_from_the_setting_ranks_next_push_on(t: Any, order: tuple[int, ...]) -> None:
    """Rank 0 pushes, sets and pushes again; the others push twice, whenever they may."""
    bench = t.Bench(3)
    (w,) = bench.init("w", ones(1, 100.0))
    plans = [bench.define(rank, t.dense([w], [1])) for rank in range(3)]
    for rank in order:
        bench.push(rank, plans[rank], ones(1))
        if rank == 0:
            bench.set_updater(0, ADD)
    assert bench.value(0, plans[0]).tolist() == [3.0]
    for rank in order:
        bench.push(rank, plans[rank], ones(1))
    assert bench.value(0, plans[0]).tolist() == [6.0]
    assert not bench.shard.schedule.pending


def test_a_setting_holds_for_keys_that_are_made_after_it_and_not_for_others(t: Any) -> None:
    bench = t.Bench(1)
    (a,) = bench.init("a", ones(1, 10.0))
    bench.set_updater(0, ADD, keys=("a", "c"))
    (b,) = bench.init("b", ones(1, 10.0))
    (c,) = bench.init("c", ones(1, 10.0))
    plan = bench.define(0, t.dense([a, b, c], [1, 1, 1]))
    bench.push(0, plan, ones(3))
    assert bench.value(0, plan).tolist() == [11.0, 1.0, 11.0]


def test_another_optimizer_starts_fresh_and_the_same_keeps_its_state(t: Any) -> None:
    bench = t.Bench(1)
    bench.set_updater(0, SGD)
    (w,) = bench.init("w", torch.zeros(1))
    plan = bench.define(0, t.dense([w], [1]))
    values = []
    for spec in (SGD, SGD, ASSIGN, SGD):
        bench.set_updater(0, spec)
        bench.push(0, plan, ones(1))
        values.append(bench.value(0, plan).item())
    assert values == [-0.5, -0.5 - 0.75, 1.0, 0.5]


def test_a_later_setting_is_not_undone_by_an_earlier_one_that_waits(t: Any) -> None:
    """Rank 0 sets while it is ahead, and leaves; rank 1, behind, sets again: the last setting stays."""
    bench = t.Bench(2)
    (w,) = bench.init("w", ones(1, 10.0))
    plans = [bench.define(rank, t.dense([w], [1])) for rank in range(2)]
    bench.push(0, plans[0], ones(1))
    bench.set_updater(0, ADD)  # from round 2 on
    bench.leave(0)
    bench.set_updater(1, ASSIGN)  # from round 1 on: made later, it holds for round 2 too
    for value in (2.0, 3.0):
        bench.push(1, plans[1], ones(1, value))
    assert bench.value(1, plans[1]).tolist() == [3.0]
    assert not bench.shard.schedule.pending


def test_a_setting_for_some_keys_leaves_the_round_of_others_alone(t: Any) -> None:
    bench = t.Bench(2)
    (a,) = bench.init("a", ones(1, 10.0))
    (b,) = bench.init("b", ones(1, 10.0))
    plans = [bench.define(rank, t.dense([a], [1])) for rank in range(2)]
    bench.push(0, plans[0], ones(1))
    bench.set_updater(0, ADD, keys=("a",))  # from round 2 of "a" on
    bench.leave(0)
    bench.set_updater(1, ADD, keys=("b",))
    bench.push(1, plans[1], ones(1, 2.0))
    assert bench.value(1, plans[1]).tolist() == [3.0]  # round 1 of "a" is still assigned
    bench.push(1, plans[1], ones(1, 2.0))
    assert bench.value(1, plans[1]).tolist() == [5.0]
    assert bench.info(1, [b]).updater == "add"


def test_in_async_a_setting_holds_at_once(t: Any) -> None:
    bench = t.Bench(2, policy="async")
    (w,) = bench.init("w", ones(1, 10.0))
    plan = bench.define(1, t.dense([w], [1]))
    bench.set_updater(0, ADD)
    bench.push(1, plan, ones(1))
    assert bench.value(1, plan).tolist() == [11.0]
    assert not bench.shard.schedule.pending


# ---- delete ----------------------------------------------------------------------------------------


def test_a_worker_that_deletes_is_waited_for_no_more(t: Any) -> None:
    bench = t.Bench(2)
    (a,) = bench.init("a", torch.zeros(2))
    (b,) = bench.init("b", torch.zeros(2))
    plan = bench.define(0, t.dense([a], [2]), t.dense([b], [2]))
    for chunk in range(2):
        bench.push(0, plan, ones(2), chunk=chunk)
    bench.send(0, m.Pull(plan, 90))
    bench.send(0, m.WaitMerged(plan, 91))
    out = bench.delete(1, "a", [a])
    assert [(each.worker, each.message.request) for each in out[:-1]] == [(0, 90), (0, 91)]
    assert (out[0].message, out[1].message) == (m.Data(90, 0), m.Merged(91, [0]))
    assert out[0].payload[0].tensor.tolist() == [1.0, 1.0]
    t.settle(out)
    alone = bench.define(0, t.dense([a], [2]))
    bench.push(0, alone, ones(2, 5.0))  # the other goes on
    assert bench.value(0, alone).tolist() == [5.0, 5.0]
    bench.push(1, bench.define(1, t.dense([b], [2])), ones(2))
    assert bench.info(1, [a, b]).rounds == [2, 1]
    bench.check_empty()


def test_what_was_pushed_before_a_delete_counts_and_its_pull_is_answered(t: Any) -> None:
    bench = t.Bench(2)
    (a,) = bench.init("a", torch.zeros(2))
    (b,) = bench.init("b", torch.zeros(2))
    mine, theirs = (bench.define(rank, t.dense([a, b], [2, 2])) for rank in range(2))
    assert bench.push(0, mine, ones(4), reply=8) == []
    assert kinds(bench.delete(0, "a", [a])) == [(0, "Done")]
    bench.set_updater(0, SGD)
    (out,) = bench.push(1, theirs, ones(4))
    assert (out.worker, out.message) == (0, m.Data(8, 0))
    t.settle([out])
    bench.check_empty()


def test_the_last_delete_drops_a_slice_with_its_state(t: Any) -> None:
    bench = t.Bench(2)
    bench.set_updater(0, SGD)
    (old,), (kept,) = bench.init("w", torch.zeros(2)), bench.init("kept", torch.zeros(2))
    plans = [bench.define(rank, t.dense([old], [2])) for rank in range(2)]
    for rank in range(2):
        bench.push(rank, plans[rank], ones(2))
    assert kinds(bench.delete(1, "w", [old])) == [(1, "Done")]
    updater = bench.shard.find(old).setting.updater
    assert updater.state(old)
    assert kinds(bench.delete(0, "w", [old])) == [(0, "Done")]
    assert not updater.state(old)
    assert {each.slice_id for each in bench.shard.slices} == {kept}
    assert isinstance(t.error_of(bench.send(0, m.AskInfo(7, 1, [old]))[0].message), KeyDeleted)
    (new,) = bench.init("w", torch.zeros(2))
    again = [bench.define(rank, t.dense([new], [2])) for rank in range(2)]
    for rank in range(2):
        bench.push(rank, again[rank], ones(2))
    assert bench.value(0, again[0]).tolist() == [-1.0, -1.0]  # the momentum of the old one is forgotten
    bench.check_empty()


def test_leaving_counts_as_deleting(t: Any) -> None:
    bench = t.Bench(3)
    (a,), (b,) = bench.init("a", torch.zeros(2)), bench.init("b", torch.zeros(2))
    bench.delete(0, "a", [a])
    bench.leave(2)
    assert {each.slice_id for each in bench.shard.slices} == {a, b}
    bench.leave(1)
    assert {each.slice_id for each in bench.shard.slices} == {b}


def test_uncommitted_pushes_go_with_a_delete_and_the_others_commit_without(t: Any) -> None:
    bench, ids, plans = held_pair(t)
    bench.delete(1, "a", ids[:1])
    bench.commit(0)
    (ready,) = bench.commit(1)
    assert ready.message.error is None
    bench.decide(ready.message)
    assert bench.value(0, plans[0]).tolist() == [1.0, 1.0, 3.0, 3.0]
    bench.check_empty()


def test_whoever_has_not_deleted_a_key_must_commit_it(t: Any) -> None:
    bench = t.Bench(3)
    (a,) = bench.init("a", torch.zeros(2))
    bench.delete(0, "a", [a])
    plan = bench.define(1, t.dense([a], [2]))
    bench.push(1, plan, ones(2), apply=False)
    bench.commit(0)
    bench.commit(1)
    (ready,) = bench.commit(2)
    assert "ranks 1 and 2 have not pushed the same keys" in ready.message.error[1]
    bench.decide(ready.message)
    assert bench.info(1, [a]).rounds == [0]
    bench.leave(1)
    bench.leave(2)
    bench.check_empty()


def test_what_was_to_be_committed_ends_with_the_last_delete(t: Any) -> None:
    """Other threads of both workers delete the key between the request and the decision."""
    bench, ids, plans = held_pair(t)
    bench.commit(0)
    bench.send(1, m.Pull(plans[1], 90))
    (ready,) = bench.commit(1)
    assert bench.delete(0, "a", ids[:1])[:-1] == []
    out = bench.delete(1, "a", ids[:1])
    assert kinds(out) == [(1, "Done")]  # the pull still waits for the other key
    out = bench.decide(ready.message)
    assert (1, "Data") in kinds(out)
    t.settle(out)
    bench.check_empty()


def test_what_was_asked_to_be_committed_by_who_has_deleted_it_goes_if_the_commit_is_refused(t: Any) -> None:
    bench, ids, _ = held_pair(t)
    bench.commit(0, max_norm=1.0)
    (ready,) = bench.commit(1, max_norm=2.0)
    bench.delete(0, "a", ids[:1])
    bench.decide(ready.message)
    committed(bench)
    rest = bench.define(1, t.dense(ids[:1], [2]))
    assert bench.value(1, rest).tolist() == [2.0, 2.0]  # what worker 1 has pushed
    bench.check_empty()


def test_a_delete_that_cannot_be_changes_nothing(t: Any) -> None:
    bench = t.Bench(2)
    (a,), (b,) = bench.init("a", torch.zeros(2)), bench.init("b", torch.zeros(2))
    plan = bench.define(0, t.dense([a], [2]))
    for slice_ids in ([a], [b, 77], [b, b]):  # named in a plan, unknown, twice
        with pytest.raises(ProtocolError):
            bench.send(0, m.DeleteSlices(5, 1, slice_ids))
    bench.delete(0, "b", [b])
    with pytest.raises(ProtocolError, match="or that it has deleted"):
        bench.delete(0, "b", [b])
    with pytest.raises(ProtocolError, match="worker 0 has deleted it"):
        bench.define(0, t.dense([a, b], [2, 2]))
    assert kinds(bench.send(1, m.DropSlices(5, 1, [a]))) == [(1, "Done")]  # it is in use, and stays
    bench.push(0, plan, ones(2))
    bench.push(1, bench.define(1, t.dense([a, b], [2, 2])), ones(4))
    assert bench.info(0, [a, b]).rounds == [1, 1]
    bench.check_empty()


def test_slices_of_an_init_that_failed_are_dropped(t: Any) -> None:
    bench = t.Bench(2)
    (a,), (b,) = bench.init("a", torch.zeros(2)), bench.init("b", torch.zeros(2))
    assert kinds(bench.send(0, m.DropSlices(5, 1, [a, 77]))) == [(0, "Done")]
    assert {each.slice_id for each in bench.shard.slices} == {b}


# ---- waiting ---------------------------------------------------------------------------------------


def test_wait_merged_tells_slice_by_slice(t: Any) -> None:
    bench = t.Bench(2)
    ids = [bench.init(key, torch.zeros(1))[0] for key in "abc"]
    plan = bench.define(0, t.dense(ids[:2], [1, 1]), t.dense(ids[2:], [1]))
    single = [bench.define(1, t.dense([each], [1])) for each in ids]
    bench.push(0, plan, ones(2), chunk=0)
    (out,) = bench.send(0, m.WaitMerged(plan, 9))
    assert out.message == m.Merged(9, [2])
    (out,) = bench.push(1, single[1], ones(1))
    assert (out.worker, out.message) == (0, m.Merged(9, [1]))
    (out,) = bench.push(1, single[0], ones(1), apply=False)[-1:]
    assert (out.worker, out.message) == (0, m.Merged(9, [0]))
    assert not bench.shard._merge_waits


def test_waiting_names_who_is_missing(t: Any) -> None:
    bench = t.Bench(3)
    (w,) = bench.init("w", torch.zeros(1))
    plans = [bench.define(rank, t.dense([w], [1])) for rank in range(3)]
    bench.push(0, plans[0], ones(1))
    bench.send(0, m.Pull(plans[0], 70))
    bench.send(0, m.WaitMerged(plans[0], 71))
    for request in (70, 71):
        (out,) = bench.send(0, m.AskWaiting(request, 1))
        assert out.message == m.Waiting(request, [1, 2], "round 1 of 'w'")
    for rank in (1, 2):
        bench.push(rank, plans[rank], ones(1), apply=False)
    (out,) = bench.send(0, m.AskWaiting(999, 1))
    assert out.message == m.Waiting(999, [], "")


def test_waiting_for_a_commit_names_who_has_not_asked(t: Any) -> None:
    bench = t.Bench(2)
    (w,) = bench.init("w", torch.zeros(1))
    plans = [bench.define(rank, t.dense([w], [1])) for rank in range(2)]
    for rank in range(2):
        bench.push(rank, plans[rank], ones(1), apply=False)
    bench.send(0, m.Pull(plans[0], 70))
    bench.send(0, m.Commit(71, 1, None, False, False, True))
    (out,) = bench.send(0, m.AskWaiting(70, 1))
    assert out.message == m.Waiting(70, [1], "round 1 of 'w', to be committed")
    (out,) = bench.send(0, m.AskWaiting(71, 1))
    assert out.message == m.Waiting(71, [1], "commit 1")


# ---- commit ----------------------------------------------------------------------------------------


def committed(bench: Any, ranks: tuple[int, ...] = (0, 1), **arguments: Any) -> list[Any]:
    """Let workers ask for a commit, and decide it."""
    *before, last = [bench.commit(rank, **arguments) for rank in ranks]
    assert not any(before)
    (ready,) = last
    assert ready.worker == SCHEDULER
    return bench.decide(ready.message)


def held_pair(t: Any, *, mean: bool = False) -> tuple[Any, list[int], list[int]]:
    """Two workers have pushed "a" and "b" with apply=False."""
    bench = t.Bench(2, mean=mean)
    ids = [bench.init(key, ones(2, 10.0))[0] for key in "ab"]
    plans = [bench.define(rank, t.dense(ids, [2, 2])) for rank in range(2)]
    for rank in range(2):
        bench.push(rank, plans[rank], ones(4, rank + 1.0), apply=False)
    return bench, ids, plans


def test_commit_applies_the_sums_clipped(t: Any) -> None:
    bench, ids, plans = held_pair(t)
    assert bench.pull(0, plans[0]) == []
    out = committed(bench, max_norm=3.0)
    assert kinds(out) == [(0, "Committed"), (1, "Committed"), (0, "Data")]
    assert out[0].message.norm == pytest.approx(6.0)
    assert out[2].payload[0].tensor.tolist() == pytest.approx([1.5] * 4)
    t.settle(out)
    assert bench.info(0, ids).versions == [1, 1]
    bench.check_empty()


def test_a_skipped_commit_counts_the_round_and_not_the_version(t: Any) -> None:
    bench, ids, plans = held_pair(t)
    bench.commit(0, skip=True)
    (ready,) = bench.commit(1)
    assert ready.message.skip
    out = bench.decide(ready.message)
    assert [each.message.applied for each in out] == [False, False]
    assert (bench.info(0, ids).rounds, bench.info(0, ids).versions) == ([1, 1], [0, 0])
    assert bench.value(0, plans[0]).tolist() == [10.0] * 4
    bench.check_empty()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_check_finite_finds_what_is_not(t: Any, bad: float) -> None:
    bench = t.Bench(1)
    (w,) = bench.init("w", torch.zeros(2))
    plan = bench.define(0, t.dense([w], [2]))
    for value, finite in ((bad, False), (1.0, True)):
        bench.push(0, plan, torch.tensor([1.0, value]), apply=False)
        (ready,) = bench.commit(0, check_finite=True)
        assert ready.message.finite is finite
        bench.decide(ready.message)
    assert bench.info(0, [w]).versions == [1]


def test_large_finite_values_are_finite(t: Any) -> None:
    bench = t.Bench(1)
    (w,) = bench.init("w", torch.zeros(2, dtype=torch.float64))
    plan = bench.define(0, t.dense([w], [2], dtype="float64"))
    bench.push(0, plan, ones(2, 1e200, torch.float64), apply=False)
    (ready,) = bench.commit(0, check_finite=True)
    assert ready.message.finite  # although the sum of their squares is not


@pytest.mark.parametrize("mean", [False, True])
def test_a_disagreement_changes_nothing_and_can_be_made_good(t: Any, mean: bool) -> None:
    bench, ids, plans = held_pair(t, mean=mean)
    bench.commit(0, max_norm=1.0)
    (ready,) = bench.commit(1, max_norm=2.0)
    out = bench.decide(ready.message)
    assert kinds(out) == [(0, "Failed"), (1, "Failed")]
    assert all(isinstance(t.error_of(each.message), CommitMismatch) for each in out)
    assert bench.info(0, ids).rounds == [0, 0]
    committed(bench)
    assert bench.value(0, plans[0]).tolist() == [1.5 if mean else 3.0] * 4
    bench.check_empty()


def test_a_refusal_by_another_server_changes_nothing_either(t: Any) -> None:
    bench, _, plans = held_pair(t)
    bench.commit(0)
    (ready,) = bench.commit(1)
    refusal = ("CommitMismatch", "elsewhere")
    out = bench.state.decide_commit(m.CommitDecision(1, ready.message.number, False, 0.0, refusal))
    assert [each.message.text for each in out] == ["elsewhere", "elsewhere"]
    committed(bench)
    assert bench.value(0, plans[0]).tolist() == [3.0] * 4
    bench.check_empty()


def test_different_keys_are_a_disagreement(t: Any) -> None:
    bench = t.Bench(2)
    (a,) = bench.init("a", torch.zeros(2))
    plan = bench.define(0, t.dense([a], [2]))
    bench.push(0, plan, ones(2), apply=False)
    bench.commit(0)
    (ready,) = bench.commit(1)
    name, text = ready.message.error
    assert name == "CommitMismatch"
    assert "'a'" in text
    bench.decide(ready.message)
    bench.push(1, bench.define(1, t.dense([a], [2])), ones(2), apply=False)
    committed(bench)
    assert bench.value(0, plan).tolist() == [2.0, 2.0]


def test_a_decision_nobody_waits_for_is_refused(t: Any) -> None:
    bench, _, _ = held_pair(t)
    with pytest.raises(ProtocolError, match="commit 1 was decided"):
        bench.state.decide_commit(m.CommitDecision(1, 1, True, 0.0, None))


def test_what_is_pushed_during_a_commit_belongs_to_the_next(t: Any) -> None:
    """Another thread of each worker pushes a key while the commit is under way."""
    bench, _, plans = held_pair(t)
    (c,) = bench.init("c", torch.zeros(2))
    late = [bench.define(rank, t.dense([c], [2])) for rank in range(2)]
    bench.commit(0)
    bench.push(0, late[0], ones(2), apply=False)
    (ready,) = bench.commit(1)
    bench.push(1, late[1], ones(2), apply=False)
    bench.decide(ready.message)
    assert bench.value(0, plans[0]).tolist() == [3.0] * 4
    assert bench.info(0, [c]).rounds == [0]
    committed(bench)
    assert bench.value(0, late[0]).tolist() == [2.0, 2.0]
    bench.check_empty()


def test_a_key_deleted_during_a_commit_is_left_out(t: Any) -> None:
    bench, ids, _ = held_pair(t)
    bench.delete(0, "a", ids[:1])
    bench.commit(0)
    bench.delete(1, "a", ids[:1])
    (ready,) = bench.commit(1)
    assert ready.message.error is None
    bench.decide(ready.message)
    assert bench.value(0, bench.define(0, t.dense(ids[1:], [2]))).tolist() == [3.0, 3.0]
    bench.check_empty()


def test_a_key_deleted_after_the_sums_were_taken_is_left_out(t: Any) -> None:
    bench, ids, _ = held_pair(t)
    bench.commit(0)
    (ready,) = bench.commit(1)
    for rank in range(2):
        bench.delete(rank, "a", ids[:1])
    (new,) = bench.init("new", torch.zeros(2))
    plans = [bench.define(rank, t.dense([new], [2])) for rank in range(2)]
    for rank in range(2):
        bench.push(rank, plans[rank], ones(2), apply=False)
    bench.decide(ready.message)
    assert bench.info(0, [new]).rounds == [0]
    committed(bench)
    assert bench.value(0, plans[0]).tolist() == [2.0, 2.0]
    assert bench.info(0, [ids[1], new]).versions == [1, 1]
    bench.check_empty()


def test_mixed_flags_drop_the_round_for_everybody(t: Any) -> None:
    bench = t.Bench(2)
    ids = [bench.init(key, torch.zeros(1))[0] for key in "abc"]
    plan = bench.define(0, t.dense(ids, [1, 1, 1]))
    single = [bench.define(1, t.dense([each], [1])) for each in ids]
    bench.push(0, plan, ones(3), apply=False)
    bench.push(1, single[2], ones(1), apply=False)
    out = bench.push(1, single[0], ones(1))
    assert kinds(out) == [(0, "Fault"), (1, "Fault")]
    assert isinstance(t.error_of(out[0].message), CommitMismatch)
    bench.push(1, single[1], ones(1), apply=False)
    assert (bench.info(0, ids).rounds, bench.info(0, ids).versions) == ([1, 0, 0], [0, 0, 0])
    committed(bench)
    assert bench.value(0, plan).tolist() == [0.0, 2.0, 2.0]
    bench.check_empty()


@pytest.mark.parametrize("commit_first", [True, False])
def test_mixed_flags_mean_the_same_to_a_commit_in_every_order(t: Any, commit_first: bool) -> None:
    bench = t.Bench(2)
    (w,) = bench.init("w", torch.zeros(1))
    plans = [bench.define(rank, t.dense([w], [1])) for rank in range(2)]
    bench.push(0, plans[0], ones(1), apply=False)
    if commit_first:
        bench.commit(0)
        bench.push(1, plans[1], ones(1))
    else:
        bench.push(1, plans[1], ones(1))
        bench.commit(0)
    (ready,) = bench.commit(1)
    assert ready.message.error is None
    bench.check_empty()


# ---- leave -----------------------------------------------------------------------------------------


def test_who_has_left_is_waited_for_no_more_and_its_pushes_count(t: Any) -> None:
    bench = t.Bench(3)
    (w,) = bench.init("w", torch.zeros(1))
    plans = [bench.define(rank, t.dense([w], [1])) for rank in range(3)]
    bench.push(2, plans[2], ones(1, 4.0))
    bench.leave(2)
    bench.push(0, plans[0], ones(1))
    bench.send(0, m.Pull(plans[0], 60))
    out = bench.leave(1)
    assert kinds(out) == [(0, "Data"), (1, "Done")]
    assert out[0].payload[0].tensor.tolist() == [5.0]
    t.settle(out)
    bench.push(0, plans[0], ones(1))
    assert bench.value(0, plans[0]).tolist() == [1.0]
    bench.check_empty()


@pytest.mark.parametrize("merged", [False, True])
def test_uncommitted_pushes_of_who_leaves_are_dropped(t: Any, merged: bool) -> None:
    bench = t.Bench(2)
    (w,) = bench.init("w", torch.zeros(1))
    plans = [bench.define(rank, t.dense([w], [1])) for rank in range(2)]
    bench.push(1, plans[1], ones(1, 8.0), apply=False)
    if merged:
        bench.push(0, plans[0], ones(1), apply=False)
        bench.leave(1)
    else:
        bench.leave(1)
        bench.push(0, plans[0], ones(1), apply=False)
    committed(bench, ranks=(0,))
    assert bench.value(0, plans[0]).tolist() == [1.0]
    bench.check_empty()


def test_leaving_lets_a_commit_of_the_others_go_on(t: Any) -> None:
    bench = t.Bench(2)
    (w,) = bench.init("w", torch.zeros(1))
    plan = bench.define(0, t.dense([w], [1]))
    bench.push(0, plan, ones(1), apply=False)
    assert bench.commit(0) == []
    out = bench.leave(1)
    assert sorted(kinds(out)) == [(SCHEDULER, "CommitReady"), (1, "Done")]
    bench.decide(next(each.message for each in out if each.worker == SCHEDULER))
    assert bench.value(0, plan).tolist() == [1.0]
    bench.check_empty()


@pytest.mark.parametrize("error", [None, ("UpdaterError", "no")])
def test_a_flush_waits_for_the_decision_of_a_commit_that_is_complete(t: Any, error: Any) -> None:
    """Else a value could be saved on this server as it is before it, and on another as it is after."""
    bench, _, plans = held_pair(t)
    bench.commit(0)
    assert kinds(bench.send(0, m.Flush(90, 1))) == [(0, "Done")]
    (ready,) = bench.commit(1)
    for worker in (0, 1):
        assert bench.send(worker, m.Flush(91 + worker, 1)) == []
    bench.leave(0)
    ready.message.error = error
    out = bench.decide(ready.message)
    assert kinds(out)[-1] == (1, "Done")
    assert out[-1].message == m.Done(92)
    assert m.Done(91) not in [each.message for each in out]  # it has left
    assert bench.shard._flushes == []
    assert kinds(bench.send(1, m.Flush(93, 1))) == [(1, "Done")]
    if error is None:
        assert bench.value(1, plans[1]).tolist() == [3.0] * 4


@pytest.mark.parametrize("leaves", ["before", "after"])
def test_a_commit_that_was_asked_for_stands_when_its_worker_leaves(t: Any, leaves: str) -> None:
    """Its deadline passed, say. Servers may see the others' commit before or after, and must agree."""
    bench, _, plans = held_pair(t)
    bench.commit(0)
    if leaves == "before":
        bench.leave(0)
    (ready,) = bench.commit(1, max_norm=None)
    if leaves == "after":
        bench.leave(0)
    assert kinds(bench.decide(ready.message)) == [(1, "Committed")]
    assert bench.value(1, plans[1]).tolist() == [3.0] * 4
    bench.check_empty()


def test_a_commit_that_is_refused_drops_what_left_workers_had_asked_for(t: Any) -> None:
    bench, _, plans = held_pair(t)
    bench.commit(0, max_norm=1.0)
    bench.leave(0)
    (ready,) = bench.commit(1, max_norm=2.0)
    assert kinds(bench.decide(ready.message)) == [(1, "Failed")]
    committed(bench, ranks=(1,))
    assert bench.value(1, plans[1]).tolist() == [2.0] * 4
    bench.check_empty()


# ---- put -------------------------------------------------------------------------------------------


def test_a_put_waits_for_its_workers_round_and_comes_before_the_open_one(t: Any) -> None:
    bench = t.Bench(2)
    bench.set_updater(0, ADD)
    (w,) = bench.init("w", torch.zeros(2))
    mine, theirs = (bench.define(rank, t.dense([w], [2])) for rank in range(2))
    bench.push(0, mine, ones(2))
    assert bench.put(0, mine, ones(2, 10.0)) == []
    assert bench.pull(0, mine) == []
    assert kinds(bench.put(1, theirs, ones(2, 5.0))) == [(1, "Done")]  # has not pushed: at once
    out = bench.push(1, theirs, ones(2))
    assert kinds(out) == [(0, "Data"), (0, "Done")]  # the pull of round 1 is answered first
    t.settle(out[:1])
    assert bench.value(0, mine).tolist() == [10.0, 10.0]
    assert (bench.info(0, [w]).rounds, bench.info(0, [w]).versions) == ([1], [3])
    bench.check_empty()


def test_a_put_into_memory_that_is_being_sent_goes_to_fresh_memory(t: Any) -> None:
    bench = t.Bench(1)
    (w,) = bench.init("w", ones(2))
    plan = bench.define(0, t.dense([w], [2]))
    out = bench.pull(0, plan)
    bench.put(0, plan, ones(2, 7.0))
    assert out[0].payload[0].tensor.tolist() == [1.0, 1.0]
    t.settle(out)
    assert bench.value(0, plan).tolist() == [7.0, 7.0]


def test_a_put_ends_lockstep_and_is_cast(t: Any) -> None:
    bench = t.Bench(1)
    (w,) = bench.init("w", ones(2))
    plan = bench.define(0, t.dense([w], [2]))
    wide = bench.define(0, t.dense([w], [2], dtype="float64"))
    bench.push(0, plan, ones(2, 3.0))
    bench.put(0, wide, ones(2, 7.0, torch.float64))
    bench.push(0, plan, ones(2, 4.0))
    bench.put(0, wide, ones(2, 8.0, torch.float64))
    assert bench.value(0, plan).tolist() == [8.0, 8.0]
    assert (bench.info(0, [w]).rounds, bench.info(0, [w]).versions) == ([2], [4])
    bench.check_empty()


def test_a_put_ends_with_the_key_and_with_its_worker(t: Any) -> None:
    bench = t.Bench(2)
    (a,) = bench.init("a", ones(2))
    (b,) = bench.init("b", ones(2))
    plan = bench.define(0, t.dense([a, b], [2, 2]))
    bench.push(0, plan, ones(4))
    assert bench.put(0, plan, ones(4)) == []
    out = bench.delete(1, "a", [a])
    assert kinds(out) == [(1, "Done")]  # it still waits for the other key
    assert kinds(bench.push(1, bench.define(1, t.dense([b], [2])), ones(2))) == [(0, "Done")]
    assert bench.value(0, plan).tolist() == [1.0] * 4
    bench.push(0, plan, ones(4, 3.0))
    assert bench.put(0, plan, ones(4)) == []
    bench.leave(0)
    assert not bench.shard._waits


def test_a_put_says_whom_it_waits_for_and_needs_values(t: Any) -> None:
    bench = t.Bench(2)
    (w,) = bench.init("w", ones(2))
    plan, nothing = bench.define(0, t.dense([w], [2])), bench.define(0, t.absent([w], [2]))
    with pytest.raises(ProtocolError, match="no values"):
        bench.put(0, nothing)
    bench.push(0, plan, ones(2))
    bench.send(0, m.Put(plan, 0, 77), [ones(2)])
    (answer,) = bench.send(0, m.AskWaiting(77, 1))
    assert answer.message == m.Waiting(77, [1], "round 1 of 'w'")


# ---- what is not foreseen ------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [0, 12])
@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("optimizer", [False, True])
def test_what_torch_refuses_is_the_fault_of_the_round(
    t: Any, monkeypatch: pytest.MonkeyPatch, rounds: int, alike: bool, optimizer: bool
) -> None:
    """Whoever contributed is told; the round counts, the version does not, and the server goes on."""
    bench = t.Bench(2)
    ids = [bench.init(key, torch.zeros(2))[0] for key in "ab"]
    if optimizer:
        bench.set_updater(0, UpdaterSpec(type="named", name="add"))
    listed = [ids, ids if alike else ids[::-1]]  # in another order, each slice is added up on its own
    plans = [bench.define(worker, t.dense(listed[worker], [2, 2])) for worker in range(2)]
    for _ in range(rounds):
        for worker in range(2):
            assert bench.push(worker, plans[worker], torch.ones(4)) == []

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("add_cpu is not made for this")

    before = bench.value(0, plans[0])
    with monkeypatch.context() as patch:
        patch.setattr("tensorkv.server.updates.add_up", fail)
        assert bench.push(0, plans[0], torch.ones(4)) == []
        out = bench.push(1, plans[1], torch.ones(4))
    told = [
        (each.worker, slice_id, each.message.round) for each in out for slice_id in each.message.slice_ids
    ]
    assert sorted(told) == [(worker, each, rounds + 1) for worker in range(2) for each in ids]
    assert isinstance(t.error_of(out[0].message), UpdaterError)
    assert "RuntimeError: add_cpu is not made for this" in out[0].message.text
    info = bench.info(0, ids)
    assert (info.rounds, info.versions) == ([rounds + 1] * 2, [rounds] * 2)
    assert torch.equal(bench.value(0, plans[0]), before)
    for worker in range(2):
        assert bench.push(worker, plans[worker], torch.ones(4)) == []
    assert not torch.equal(bench.value(0, plans[0]), torch.zeros(4))
    bench.check_empty()


@pytest.mark.parametrize("rounds", [0, 3])  # 3: in lockstep
def test_a_value_without_memory_for_its_sum_is_as_before_and_the_others_are_assigned(
    t: Any, monkeypatch: pytest.MonkeyPatch, rounds: int
) -> None:
    """Values of a chunk lie in several runs of memory, and memory may run out at a later one."""
    bench = t.Bench(2)
    length = PACKED_BYTES // 4 + 1  # each in a slot of its own
    ids = [bench.init(key, torch.zeros(length))[0] for key in "abc"]
    plans = [bench.define(worker, t.dense(ids, [length] * 3)) for worker in range(2)]
    values = [torch.full((length,), value) for value in (1.0, 2.0, 3.0)]
    for _ in range(rounds):
        assert [bench.push(worker, plans[worker], *values) for worker in range(2)] == [[], []]
    before = bench.value(0, plans[0])
    add_up, calls = updates_module.add_up, itertools.count()

    def short_once(*args: Any, **kwargs: Any) -> torch.Tensor:
        if next(calls) == 1:
            raise MemoryError
        return add_up(*args, **kwargs)

    larger = [value * 10 for value in values]
    with monkeypatch.context() as patch:
        patch.setattr(updates_module, "add_up", short_once)
        assert bench.push(0, plans[0], *larger) == []
        out = bench.push(1, plans[1], *larger)
    told = [(each.worker, each.message.slice_ids, each.message.round, each.message.name) for each in out]
    assert told == [(worker, [ids[1]], rounds + 1, "MemoryLimitReached") for worker in range(2)]
    info = bench.info(0, ids)
    assert (info.rounds, info.versions) == ([rounds + 1] * 3, [rounds + 1, rounds, rounds + 1])
    expected = torch.cat([larger[0] * 2, before[length : 2 * length], larger[2] * 2])
    assert torch.equal(bench.value(0, plans[0]), expected)
    bench.check_empty()


@pytest.mark.parametrize("when", ["summed", "applied"])
def test_what_torch_refuses_in_a_commit_is_told_to_all(
    t: Any, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    bench = t.Bench(2)
    (w,) = bench.init("w", torch.zeros(2))
    plans = [bench.define(worker, t.dense([w], [2])) for worker in range(2)]
    for worker in range(2):
        bench.push(worker, plans[worker], torch.ones(2), apply=False)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("not made for this")

    with monkeypatch.context() as patch:
        patch.setattr("tensorkv.server.updates." + ("add_up" if when == "summed" else "apply_all"), fail)
        bench.commit(0)
        (ready,) = bench.commit(1)
        out = bench.decide(ready.message)
    kind = m.Failed if when == "summed" else m.Fault
    told = [each for each in out if isinstance(each.message, kind)]
    assert [each.worker for each in told] == [0, 1]
    assert all(isinstance(t.error_of(each.message), UpdaterError) for each in told)


def test_a_slice_with_the_id_of_a_deleted_one_is_another(t: Any) -> None:
    bench = t.Bench(1)
    (w,), (v,) = bench.init("w", torch.zeros(2)), bench.init("v", torch.zeros(2))
    old = bench.define(0, t.dense([w, v], [2, 2]))
    bench.push(0, old, torch.ones(4))
    layout = bench.shard.plans.chunks(0, old)[0].layout
    bench.delete(0, "w", [w])
    bench.send(0, m.InitSlices(90, 1, "x", (2,), "float32", [m.SliceEntry(w, 0, 0, 2)]), [torch.zeros(2)])
    new = bench.define(0, t.dense([w, v], [2, 2]))
    assert bench.shard.plans.chunks(0, new)[0].layout is not layout
    assert bench.value(0, new).tolist() == [0.0, 0.0, 1.0, 1.0]
    bench.push(0, new, torch.full((4,), 7.0))
    assert bench.value(0, new).tolist() == [7.0] * 4
    bench.check_empty()


def test_calls_that_wait_without_end_are_refused(t: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensorkv.server.shard.MAX_WAITS", 3)
    for what in ("pull", "merge", "put"):
        bench = t.Bench(2)
        (w,) = bench.init("w", torch.zeros(2))
        plans = [bench.define(worker, t.dense([w], [2])) for worker in range(2)]
        bench.push(0, plans[0], torch.ones(2))

        def ask(bench: Any = bench, plan: int = plans[0], what: str = what) -> None:
            request = next(bench.requests)
            message = {"pull": m.Pull(plan, request), "merge": m.WaitMerged(plan, request)}.get(what)
            if message is not None:
                bench.send(0, message)
            else:
                bench.send(0, m.Put(plan, 0, request), [torch.ones(2)])

        for _ in range(3):
            ask()
        with pytest.raises(ProtocolError, match="waits for"):
            ask()


@pytest.mark.parametrize("staleness", [None, 0])
def test_a_push_whose_reply_would_wait_too_long_changes_nothing(
    t: Any, monkeypatch: pytest.MonkeyPatch, staleness: int | None
) -> None:
    monkeypatch.setattr("tensorkv.server.shard.MAX_WAITS", 3)
    policy = "sync" if staleness is None else "async"
    bench = t.Bench(2, mean=True, policy=policy, staleness=staleness)
    ids = [bench.init(number, torch.zeros(1))[0] for number in range(5)]
    mine, theirs = ([bench.define(rank, t.dense([each], [1])) for each in ids] for rank in range(2))
    for number in range(3):
        bench.push(0, mine[number], torch.ones(1), reply=50 + number)
    with pytest.raises(ProtocolError, match="waits for 3 chunks already"):
        bench.push(0, mine[3], torch.ones(1), reply=53)
    assert bench.info(0, ids).versions == ([1, 1, 1, 0, 0] if staleness == 0 else [0] * 5)
    assert bench.push(0, mine[4], torch.ones(1), weight=2.0) == []  # asks for nothing
    for number in (0, 1, 2, 4):
        t.settle(bench.push(1, theirs[number], torch.ones(1)))
    bench.check_empty()


def test_an_init_without_memory_is_refused_and_changes_nothing(
    t: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = t.Bench(1)

    def fail(*_: Any) -> None:
        raise RuntimeError("not enough memory")

    message = m.InitSlices(1, 1, "w", (2,), "float32", [m.SliceEntry(7, 0, 0, 1), m.SliceEntry(8, 0, 1, 2)])
    with monkeypatch.context() as patch:
        patch.setattr(bench.shard._slots, "allocate", fail)
        (out,) = bench.send(0, message, [torch.ones(2)])
    assert isinstance(out.message, m.Failed)
    assert out.message.name == "MemoryLimitReached"
    assert "a server has no memory for 8 bytes of key 'w'" in out.message.text
    (out,) = bench.send(0, message, [torch.ones(2)])
    assert isinstance(out.message, m.Done)


# ---- a server short of memory ------------------------------------------------------------------------

NO_ROOM = MemoryLimitReached("server 0 has no memory")


def push_refused(bench: Any, worker: int, plan: int, *, apply: bool = True, reply: int = 0) -> Any:
    """A push for whose payload there was no memory."""
    message = m.Push(plan, 0, apply, reply)
    bench.state.payload_bytes(worker, message)
    return bench.state.handle(worker, message, refused=NO_ROOM)


def faults(out: Any) -> list[tuple[int, str]]:
    return [(each.worker, each.message.name) for each in out if isinstance(each.message, m.Fault)]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("rounds_before", [0, 12])
def test_a_push_without_memory_fails_its_round_for_all_and_the_next_counts(
    t: Any, first: bool, rounds_before: int
) -> None:
    """After twelve rounds the slices are in lockstep."""
    bench = t.Bench(2)
    (a,) = bench.init("a", torch.zeros(2))
    plans = [bench.define(rank, t.dense([a], [2])) for rank in range(2)]
    for _ in range(rounds_before):
        for rank in range(2):
            bench.push(rank, plans[rank], ones(2))
    before = bench.value(0, plans[0]).tolist()
    out = push_refused(bench, 0, plans[0]) if first else bench.push(1, plans[1], ones(2))
    assert faults(out) == []
    out = bench.push(1, plans[1], ones(2), reply=5) if first else push_refused(bench, 0, plans[0], reply=5)
    assert faults(out) == [(0, "MemoryLimitReached"), (1, "MemoryLimitReached")]
    assert [type(each.message) for each in out][-1] is m.Data
    t.settle(out)
    assert bench.value(0, plans[0]).tolist() == before
    for rank in range(2):
        bench.push(rank, plans[rank], ones(2, 4.0))
    assert bench.value(0, plans[0]).tolist() == [8.0, 8.0]
    assert bench.info(0, [a]).rounds == [rounds_before + 2]
    bench.check_empty()


def test_an_async_push_without_memory_is_its_workers_alone(t: Any) -> None:
    bench = t.Bench(2, policy="async")
    (a,) = bench.init("a", torch.zeros(2))
    plan = bench.define(0, t.dense([a], [2]))
    assert faults(push_refused(bench, 0, plan)) == [(0, "MemoryLimitReached")]
    bench.push(0, plan, ones(2))
    assert bench.value(0, plan).tolist() == [1.0, 1.0]
    bench.check_empty()


def test_other_keys_of_the_round_are_updated(t: Any) -> None:
    bench = t.Bench(2)
    (a,), (b,) = bench.init("a", torch.zeros(2)), bench.init("b", torch.zeros(2))
    only = bench.define(0, t.dense([a], [2]))
    other = bench.define(0, t.dense([b], [2]))
    both = bench.define(1, t.dense([a, b], [2, 2]))
    push_refused(bench, 0, only)
    bench.push(0, other, ones(2))
    out = bench.push(1, both, ones(4))
    assert faults(out) == [(0, "MemoryLimitReached"), (1, "MemoryLimitReached")]
    assert bench.value(1, both).tolist() == [0.0, 0.0, 2.0, 2.0]
    bench.check_empty()


def short(*_: Any, **__: Any) -> Any:
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes.")


@pytest.mark.parametrize("where", ["add_up", "updater"])
def test_a_round_for_which_there_is_no_memory_says_so(
    t: Any, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def updater(key: Any, pushed: torch.Tensor, stored: torch.Tensor) -> None:
        stored += pushed
        short()

    bench = t.Bench(1, functions={"f": updater})
    (a,) = bench.init("a", torch.zeros(2))
    plan = bench.define(0, t.dense([a], [2]))
    if where == "updater":
        bench.set_updater(0, UpdaterSpec(type="function", name="f"))
        out = bench.push(0, plan, ones(2))
    else:
        with monkeypatch.context() as patch:
            patch.setattr("tensorkv.server.updates.add_up", short)
            out = bench.push(0, plan, ones(2))
    assert faults(out) == [(0, "MemoryLimitReached")]
    assert "64 bytes" in next(each.message.text for each in out if isinstance(each.message, m.Fault))
    assert bench.value(0, plan).tolist() == [0.0, 0.0]


def test_a_put_or_a_save_without_memory_is_refused(t: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = t.Bench(1)
    (a,) = bench.init("a", torch.zeros(2))
    plan = bench.define(0, t.dense([a], [2]))
    with monkeypatch.context() as patch:
        patch.setattr("tensorkv.server.slots.Slot.make_writable", short)
        (out,) = bench.put(0, plan, ones(2))
        assert out.message.name == "MemoryLimitReached"
    with monkeypatch.context() as patch:
        patch.setattr("tensorkv.server.checkpoint.slice_state", short)
        name = f"tensorkv-{'0' * 16}-0-0.safetensors"
        for message in (m.AskSlice(3, 1, a), m.SaveSlices(4, 1, "/nowhere", name, [a])):
            (out,) = bench.send(0, message)
            assert (out.message.request, out.message.name) == (message.request, "MemoryLimitReached")
    bench.put(0, plan, ones(2))
    assert bench.value(0, plan).tolist() == [1.0, 1.0]


# ---- slices in memory that workers map -------------------------------------------------------------


def place(bench: Any, ids: list[int], offsets: list[int], size_bytes: int = 64) -> torch.Tensor:
    """Move slices to memory of so many bytes, and return it."""
    memory = torch.zeros(size_bytes, dtype=torch.uint8)
    message = m.PlaceSlices(next(bench.requests), 1, "/proc/1/fd/1", size_bytes, ids, offsets)
    assert kinds(bench.state.handle(0, message, Memory(memory))) == [(0, "Done")]
    return memory


def test_placed_slices_are_updated_where_they_lie_and_replies_are_copies(t: Any) -> None:
    bench = t.Bench(2)
    bench.set_updater(0, ADD)
    (a,), (b,) = bench.init("a", ones(2)), bench.init("b", ones(3, 2.0))
    plans = [bench.define(rank, t.dense([a, b], [2, 3])) for rank in range(2)]
    memory = place(bench, [a, b], [0, 32]).view(torch.float32)
    assert memory[:2].tolist() == [1.0] * 2
    assert memory[8:11].tolist() == [2.0] * 3
    sent = bench.pull(0, plans[0])
    for rank in range(2):
        bench.push(rank, plans[rank], ones(5))
    assert memory[:2].tolist() == [3.0] * 2  # in place, although a reply is on its way
    assert memory[8:11].tolist() == [4.0] * 3
    assert torch.cat([each.tensor for each in sent[0].payload]).tolist() == [1.0, 1.0, 2.0, 2.0, 2.0]
    assert bench.value(1, plans[1]).tolist() == [3.0, 3.0, 4.0, 4.0, 4.0]
    t.settle(sent)
    bench.check_empty()


def test_assigned_values_stay_where_they_were_placed(t: Any) -> None:
    bench = t.Bench(1)
    (w,) = bench.init("w", torch.zeros(PACKED_BYTES))  # it has a slot of its own
    plan = bench.define(0, t.dense([w], [PACKED_BYTES]))
    memory = place(bench, [w], [0], 4 * PACKED_BYTES).view(torch.float32)
    out = bench.pull(0, plan)
    bench.push(0, plan, ones(PACKED_BYTES, 7.0))
    assert memory.eq(7.0).all()
    t.settle(out)


@pytest.mark.parametrize("how", ["push", "commit", "skip"])
def test_a_put_of_placed_slices_is_made_when_their_round_is_complete(t: Any, how: str) -> None:
    bench = t.Bench(2)
    bench.set_updater(0, ADD)
    (a,), (b,) = bench.init("a", torch.zeros(2)), bench.init("b", torch.zeros(2))
    both = [bench.define(rank, t.dense([a, b], [2, 2])) for rank in range(2)]
    plan = bench.define(0, t.dense([a], [2]))
    memory = place(bench, [a, b], [0, 16]).view(torch.float32)
    assert kinds(bench.put(0, plan, ones(2, 10.0))) == [(0, "Done")]
    bench.push(0, both[0], ones(4), apply=how == "push")
    assert memory[:2].tolist() == [0.0, 0.0]  # the other worker may be computing
    bench.push(1, both[1], ones(4), apply=how == "push")
    if how != "push":
        assert bench.commit(0, skip=how == "skip") == []
        (ready,) = bench.commit(1)
        bench.decide(ready.message)
    expected = 10.0 if how == "skip" else 12.0
    assert memory[:2].tolist() == [expected] * 2
    assert memory[4:6].tolist() == [0.0 if how == "skip" else 2.0] * 2
    assert bench.info(0, [a, b]).versions == ([1, 0] if how == "skip" else [2, 1])
    assert not bench.shard._kept_puts
    bench.check_empty()


def test_a_put_of_placed_slices_ends_with_the_key(t: Any) -> None:
    bench = t.Bench(1)
    (w,) = bench.init("w", torch.zeros(2))
    plan = bench.define(0, t.dense([w], [2]))
    place(bench, [w], [0])
    bench.put(0, plan, ones(2))
    bench.delete(0, "w", [w])
    assert not bench.shard._kept_puts


@pytest.mark.parametrize(
    ("ids", "offsets"),
    [([0, 1], [0, 4]), ([0, 1], [8, 0]), ([0], [2]), ([0, 1], [0, 60]), ([0, 1], [0]), ([0], [-8])],
    ids=["overlap", "order", "alignment", "end", "number", "negative"],
)
def test_places_that_cannot_be_change_nothing(t: Any, ids: list[int], offsets: list[int]) -> None:
    bench = t.Bench(1)
    made = [*bench.init("a", ones(2)), *bench.init("b", ones(2, 2.0))]
    plan = bench.define(0, t.dense(made, [2, 2]))
    memory = torch.zeros(64, dtype=torch.uint8)
    message = m.PlaceSlices(next(bench.requests), 1, "", 64, [made[number] for number in ids], offsets)
    with pytest.raises(ProtocolError, match="cannot lie|do not fit"):
        bench.state.handle(0, message, Memory(memory))
    assert bench.value(0, plan).tolist() == [1.0, 1.0, 2.0, 2.0]


def test_a_slice_that_is_gone_is_not_placed(t: Any) -> None:
    bench = t.Bench(1)
    (w,) = bench.init("w", ones(2))
    message = m.PlaceSlices(next(bench.requests), 1, "", 64, [w, w + 100], [0, 8])
    (out,) = bench.state.handle(0, message, Memory(torch.zeros(64, dtype=torch.uint8)))
    assert isinstance(t.error_of(out.message), KeyDeleted)
