"""ServerState: which store a message is for, what its payload must be, and when a store ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tensorkv.errors import ProtocolError
from tensorkv.server import shard
from tensorkv.wire import messages as m


def test_payloads_are_known_before_they_come(t: Any) -> None:
    bench = t.Bench(1)
    (w,) = bench.init("w", torch.zeros(6), 2)[:1]
    plan = bench.define(0, t.dense([w], [2], dtype="float64"), t.absent([w], [2]))
    size = bench.state.payload_bytes
    assert size(0, m.Push(plan, 0, True, 0)) == 16
    assert size(0, m.Push(plan, 1, True, 0)) == 0
    slices = [m.SliceEntry(8, 0, 2, 4), m.SliceEntry(9, 0, 6, 6)]
    assert size(0, m.InitSlices(1, 1, "k", (2, 3), "int16", slices)) == 4
    assert size(0, m.Pull(plan, 1)) == 0


@pytest.mark.parametrize(
    "message",
    [
        m.Push(7, 0, True, 0),
        m.Pull(7, 1),
        m.WaitMerged(7, 1),
        m.DropPlan(7),
        m.Flush(1, 99),
        m.DefinePlan(99, 1, []),
        m.Leave(1, 99),
    ],
    ids=lambda message: type(message).__name__,
)
def test_what_was_not_defined_cannot_be_used(t: Any, message: Any) -> None:
    with pytest.raises(ProtocolError):
        t.Bench(1).send(0, message)


def test_plans_belong_to_one_worker_and_are_dropped(t: Any) -> None:
    bench = t.Bench(2)
    (w,) = bench.init("w", torch.zeros(1))
    plan = bench.define(0, t.dense([w], [1]))
    with pytest.raises(ProtocolError, match="worker 1 has not defined plan"):
        bench.pull(1, plan)
    with pytest.raises(ProtocolError, match="defined"):
        bench.state.handle(0, m.DefinePlan(1, plan, []))
    bench.send(0, m.DropPlan(plan))
    with pytest.raises(ProtocolError):
        bench.pull(0, plan)


def test_stores_share_nothing(t: Any) -> None:
    bench = t.Bench(1)
    bench.state.handle(0, m.OpenStore(2, "other", m.StorePolicy("sync"), False))
    bench.init("w", torch.zeros(1))
    bench.send(0, m.Leave(1, 1))
    assert [type(each.message) for each in bench.send(0, m.Flush(2, 2))] == [m.Done]
    with pytest.raises(ProtocolError, match="store 1 is not open"):
        bench.send(0, m.Flush(3, 1))


def test_who_has_left_is_heard_no_more(t: Any) -> None:
    bench = t.Bench(2)
    (w,) = bench.init("w", torch.zeros(1))
    plan = bench.define(0, t.dense([w], [1]))
    bench.leave(0)
    for message in (m.Pull(plan, 1), m.Flush(2, 1), m.Leave(3, 1)):
        with pytest.raises(ProtocolError):
            bench.send(0, message)


def test_a_store_ends_with_its_last_worker_and_gives_its_memory_back(t: Any) -> None:
    bench = t.Bench(2)
    (w,) = bench.init("w", torch.zeros(1))
    bench.push(0, bench.define(0, t.dense([w], [1])), torch.ones(1), apply=False)
    bench.leave(1)
    assert [type(each.message) for each in bench.leave(0)] == [m.Done]
    assert bench.pool.out == {}
    with pytest.raises(ProtocolError, match="store 1 is not open"):
        bench.send(0, m.Flush(1, 1))
    assert bench.state.decide_commit(m.CommitDecision(1, 1, True, 0.0, None)) == []


def test_a_worker_that_is_gone_has_left_every_store_also_those_of_later(t: Any) -> None:
    bench = t.Bench(2, workers=[0])
    (w,) = bench.init("w", torch.zeros(1))
    plan = bench.define(0, t.dense([w], [1]))
    bench.push(0, plan, torch.ones(1))
    bench.pull(0, plan)
    (out,) = bench.state.worker_gone(1)
    assert out.payload[0].tensor.tolist() == [1.0]
    bench.state.handle(0, m.OpenStore(2, "later", m.StorePolicy("sync"), False))
    assert [bench.state._stores[2].has_left(worker) for worker in range(2)] == [False, True]
    assert bench.state.worker_gone(1) == []


def refused(bench: Any, message: Any, text: str) -> None:
    """Assert that a message is refused by what it announces, before its payload has come."""
    with pytest.raises(ProtocolError, match=text):
        bench.send(0, message)


def descriptor(dtype: str = "float32") -> m.PayloadDescriptor:
    return m.PayloadDescriptor("dense", dtype)


@pytest.mark.parametrize(
    ("shape", "slices", "text"),
    [
        ((1 << 55,), [(0, 1 << 55)], "over the"),
        ((1 << 58, 1 << 58), [(0, 1)], "more elements than can be numbered"),
        ((-1, -4), [(0, 4)], "a shape"),
        ((0, 1 << 60), [], "more elements"),
        ((1,) * 65, [(0, 1)], "65 dimensions"),
        ((4,), [(0, 4), (0, 4)], "after 4"),
        ((4,), [(2, 1)], "slice"),
        ((4,), [(-1, 1)], "slice"),
    ],
)
def test_an_init_is_refused_before_memory_is_taken(
    t: Any, shape: tuple[int, ...], slices: list[tuple[int, int]], text: str
) -> None:
    bench = t.Bench(1, max_payload_bytes=1 << 40)
    entries = [m.SliceEntry(number, 0, *bounds) for number, bounds in enumerate(slices)]
    refused(bench, m.InitSlices(1, 1, "k", shape, "float32", entries), text)


@pytest.mark.parametrize(
    "chunk",
    [
        m.ChunkEntry([9], [1 << 60], descriptor(), [1]),  # of a slice that is not there
        m.ChunkEntry([9, 10], [1 << 37, 1 << 38], descriptor(), [1, 1]),
        m.ChunkEntry([9], [-1], descriptor(), [1]),
        m.ChunkEntry([9], [1], descriptor(), [-1]),
        m.ChunkEntry([9], [1], descriptor(), [1 << 40]),
        m.ChunkEntry([9], [1], descriptor("bits8"), [1]),
        m.ChunkEntry([], [], descriptor(), []),
    ],
)
def test_a_plan_is_refused_before_memory_is_taken(t: Any, chunk: m.ChunkEntry) -> None:
    bench = t.Bench(1, max_payload_bytes=1 << 40)
    with pytest.raises(ProtocolError):
        bench.state.handle(0, m.DefinePlan(1, 1, [chunk]))
    with pytest.raises(ProtocolError, match="has not defined plan 1"):
        bench.state.payload_bytes(0, m.Push(1, 0, True, 0))


def test_plans_without_end_are_refused_unless_they_are_dropped(
    t: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tensorkv.server.planbook.MAX_PLANNED", 5 * 1100)
    bench = t.Bench(2)
    chunk = m.ChunkEntry(bench.init("w", torch.zeros(1)), [1], descriptor(), [1])
    for number in range(100):
        bench.state.handle(0, m.DefinePlan(1, number, [chunk]))
        bench.state.handle(0, m.DropPlan(number))
    for number in range(5):
        bench.state.handle(0, m.DefinePlan(1, number, [chunk]))
    with pytest.raises(ProtocolError, match="worker 0 has defined too many plans"):
        bench.state.handle(0, m.DefinePlan(1, 1 << 62, [chunk]))
    bench.state.handle(1, m.DefinePlan(1, 1, [chunk]))


def test_stores_without_end_are_refused(t: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensorkv.server.state.MAX_STORES", 3)
    bench = t.Bench(1)
    for number in (2, 3):
        bench.state.handle(0, m.OpenStore(number, "more", m.StorePolicy("sync"), False))
    with pytest.raises(ProtocolError, match="3 stores"):
        bench.state.handle(0, m.OpenStore(4, "more", m.StorePolicy("sync"), False))
    bench.send(0, m.Leave(1, 3))
    bench.state.handle(0, m.OpenStore(4, "more", m.StorePolicy("sync"), False))


def test_a_store_is_opened_by_all_alike(t: Any) -> None:
    bench = t.Bench(2)
    for policy, mean in (("async", False), ("sync", True)):
        with pytest.raises(ProtocolError, match="another policy or reduction"):
            bench.state.handle(1, m.OpenStore(1, "default", m.StorePolicy(policy), mean))


def test_of_a_lost_worker_counts_what_came_whole_and_is_not_to_be_committed(t: Any) -> None:
    bench = t.Bench(2)
    a, b, c = (bench.init(key, torch.zeros(1))[0] for key in "abc")
    plans = {(rank, i): bench.define(rank, t.dense([i], [1])) for rank in range(2) for i in (a, b, c)}
    bench.push(1, plans[1, a], torch.tensor([10.0]))
    bench.push(1, plans[1, c], torch.tensor([10.0]), apply=False)
    for each in (a, b):
        bench.push(0, plans[0, each], torch.ones(1))
    bench.push(0, plans[0, c], torch.ones(1), apply=False)
    bench.pull(0, plans[0, b])
    (answer,) = bench.state.worker_lost(m.WorkerLost(1, "host", "cause", []))
    assert answer.payload[0].tensor.tolist() == [1.0]  # it is waited for no more
    t.settle([answer])
    assert bench.value(0, plans[0, a]).tolist() == [11.0]
    (ready,) = bench.commit(0)
    (committed,) = bench.decide(ready.message)
    assert committed.message.applied
    assert bench.value(0, plans[0, c]).tolist() == [1.0]
    bench.check_empty()


def test_nothing_more_is_taken_of_a_lost_worker(t: Any) -> None:
    bench = t.Bench(2)
    (w,) = bench.init("w", torch.zeros(1))
    plan = bench.define(1, t.dense([w], [1]))
    assert not bench.state.is_gone(1)
    assert bench.state.worker_lost(m.WorkerLost(1, "host", "cause", [])) == []
    assert bench.state.is_gone(1)
    for message in (m.Push(plan, 0, True, 0), m.Pull(plan, 1), m.Commit(1, 1, None, False, False, True)):
        with pytest.raises(ProtocolError):
            bench.state.handle(1, message)


def test_what_a_lost_worker_was_about_to_create_goes(t: Any) -> None:
    bench = t.Bench(3)
    (new,) = bench.init("new", torch.zeros(1), worker=1)
    (kept,) = bench.init("kept", torch.zeros(1))
    dropped = [(1, [new, 99]), (7, [1])]
    assert bench.state.worker_lost(m.WorkerLost(1, "host", "cause", dropped)) == []
    assert bench.shard._slices.keys() == {kept}
    bench.check_empty()


def test_a_report_tells_whom_each_open_round_waits_for(t: Any) -> None:
    bench = t.Bench(3)
    (w,), (b,), _ = (bench.init(key, torch.zeros(1)) for key in ("w", "b", "c"))
    assert bench.state.report() == []
    plans = [bench.define(rank, t.dense([w], [1]), t.dense([b], [1])) for rank in range(3)]
    bench.push(0, plans[0], torch.ones(1))
    bench.push(0, plans[0], torch.ones(1), chunk=1, apply=False)
    bench.push(1, plans[1], torch.ones(1), chunk=1, apply=False)
    assert bench.state.report() == [
        "store 'default': round 1 of 'w' waits for workers 1, 2",
        "store 'default': round 1 of 'b' waits for worker 2",
    ]
    bench.push(2, plans[2], torch.ones(1), chunk=1, apply=False)
    bench.send(1, m.Commit(7, 1, None, False, False, True))
    assert bench.state.report() == [
        "store 'default': round 1 of 'w' waits for workers 1, 2",
        "store 'default': round 1 of 'b', to be committed waits for workers 0, 2",
        "store 'default': commit 1 waits for workers 0, 2",
    ]


def test_a_long_report_is_cut(t: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "MAX_REPORTED", 2)
    bench = t.Bench(2)
    ids = [bench.init(key, torch.zeros(1))[0] for key in "abcde"]
    bench.push(0, bench.define(0, t.dense(ids, [1] * 5)), torch.ones(5))
    assert bench.state.report()[1:] == [
        "store 'default': round 1 of 'b' waits for worker 1",
        "store 'default': and 3 more",
    ]
