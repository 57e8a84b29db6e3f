"""What a worker may send, and what it knows: the rules that need no wait. All orders: interleavings."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from ports import Port

from tensorkv.errors import KeyDeleted, UncommittedPush
from tensorkv.wire import messages as m
from tensorkv.worker.core import WorkerCore, by_server, init_messages
from tensorkv.worker.plans import Plan

ENTRIES = [
    m.KeyEntry("a", 7, (2,), "float32", 0, [m.SliceEntry(70, 0, 0, 1), m.SliceEntry(71, 1, 1, 2)]),
    m.KeyEntry("b", 8, (2,), "float32", 0, [m.SliceEntry(80, 1, 0, 2)]),
    m.KeyEntry("c", 9, (2,), "float32", 0, [m.SliceEntry(90, 0, 0, 2)]),
]


class Bench:
    """Store 3 in a job of two servers. What is queued to each, with its payload, is kept."""

    def __init__(self, policy: Any = "sync") -> None:
        self.told: list[list[Any]] = [[], []]
        self.payloads: list[list[bytes]] = [[], []]
        self.ports = [Port(self._keep(server)) for server in range(2)]
        self.notified: list[Any] = []
        self.core = WorkerCore(
            3, m.StorePolicy(policy), self.ports, itertools.count(1), set(), self.notified.append
        )
        self.core.keys.learn(ENTRIES)

    def _keep(self, server: int) -> Any:
        def keep(message: Any, data: bytes) -> None:
            self.told[server].append(message)
            self.payloads[server].append(data)

        return keep

    def plan(self, *keys: str) -> Plan:
        return self.core.plans.plan_to_pull(self.core.keys.known(keys))

    def push(self, *keys: str, apply: bool = True, **options: Any) -> bool:
        plan = self.plan(*keys)
        frames = [([memoryview(bytes(chunk.size_bytes))], None, None) for _, _, chunk in plan.frames]
        return self.core.push(plan, frames, apply, **options)

    def busy(self, *keys: str) -> list[str]:
        plan = self.plan(*keys)
        ids = self.core.busy(plan)
        return [str(state.key) for state in plan.states if state.key_id in ids]


def test_a_push_goes_to_its_servers_after_its_plan() -> None:
    bench = Bench()
    assert bench.push("a", "b", weight=0.5, replies={0: 11, 1: 12})
    plan = bench.plan("a", "b")
    for server, number in ((0, 11), (1, 12)):
        kinds = [type(each) for each in bench.told[server]]
        assert kinds == [m.DefinePlan, m.Push]
        assert bench.told[server][1] == m.Push(plan.number, 0, True, number, None, 0.5)
    assert [each[1] for each in bench.payloads] == [bytes(4), bytes(12)]
    bench.core.merged(plan.key_ids, bench.core.count)
    assert bench.push("a", "b")
    assert [len(told) for told in bench.told] == [3, 3]  # the plan is known


def test_what_is_sent_is_counted_down() -> None:
    bench, sent = Bench(), []
    plan = bench.plan("c")
    assert bench.core.push(plan, [([memoryview(bytes(8))], None, lambda: sent.append(1))])
    assert sent == []  # the connection calls it


def test_a_worker_is_at_most_one_push_of_a_key_ahead() -> None:
    bench = Bench()
    assert bench.push("a", "b")
    told = [list(each) for each in bench.told]
    assert not bench.push("b", "c")
    assert bench.told == told
    assert bench.core.count == 1
    assert bench.busy("a", "b", "c") == ["a", "b"]
    assert bench.push("c")
    bench.core.merged(bench.plan("b", "c").key_ids, 1)
    assert bench.busy("a", "b", "c") == ["a", "c"]  # "c" was pushed later
    assert not bench.core.settled
    bench.core.merged(bench.plan("a", "b", "c").key_ids, bench.core.count)
    assert bench.core.settled
    assert not bench.core.unmerged
    assert bench.push("b", "c")


def test_without_rounds_nothing_is_busy_and_nothing_is_settled() -> None:
    bench = Bench("async")
    assert bench.push("a")
    assert bench.push("a")
    assert bench.busy("a") == []
    assert not bench.core.settled


def test_nothing_is_pushed_while_changes_are_held_back() -> None:
    bench = Bench()
    bench.core.held = True
    assert not bench.push("a")
    assert bench.told == [[], []]
    bench.core.held = False
    assert bench.push("a")


def test_a_deferred_call_makes_its_keys_busy_and_knows_whom_it_follows() -> None:
    bench = Bench()
    a, b = bench.plan("a").states, bench.plan("b").states
    assert bench.core.defer(a, "first") == []
    assert bench.core.defer([*a, *b], "second") == ["first"]
    assert bench.busy("a", "b", "c") == ["a", "b"]
    assert bench.core.defer(a, "third") == ["first", "second"]
    assert bench.core.deferred(b) == ["second"]
    bench.core.end_deferred("second")  # it has given up waiting for the first
    assert bench.busy("a", "b", "c") == ["a"]
    assert bench.core.deferred(None) == ["first", "third"]
    assert bench.push("a")  # the deferred call itself
    for call in ("first", "third"):
        bench.core.end_deferred(call)
    assert bench.core.deferred(None) == []
    assert not bench.core.settled


def test_a_deferred_push_that_waits_for_a_commit_keeps_its_keys_from_other_calls() -> None:
    """Else they would be sent behind it, and wait for a commit that comes after them."""
    bench = Bench()
    states = bench.plan("a", "b").states
    assert bench.push("a")
    bench.core.defer(states[:1], "later", apply=False)
    assert bench.core.num_deferred_commits == 1
    bench.core.check_may_use(states[1:], "pull")
    with pytest.raises(UncommittedPush, match="pull: key 'a' was pushed with apply=False"):
        bench.core.check_may_use(states, "pull")
    bench.core.check_committed(None, "save")  # it waits for deferred calls first
    bench.core.defer(states[1:], "given up", apply=False)
    bench.core.end_deferred("given up")
    bench.core.check_may_use(states[1:], "pull")
    bench.core.merged({7}, bench.core.count)
    assert bench.push("a", apply=False)
    bench.core.end_deferred("later")
    with pytest.raises(UncommittedPush):
        bench.core.check_may_use(states, "pull")
    bench.core.retire([ENTRIES[0]])
    assert bench.core.uncommitted == set()
    assert bench.core.num_deferred_commits == 0


def test_a_push_behind_one_of_another_thread_that_waits_for_a_commit_is_refused() -> None:
    bench = Bench()
    assert bench.push("a", apply=False)
    told = [list(each) for each in bench.told]
    for _ in range(2):  # also once it is merged: the server would take it for a mistake
        with pytest.raises(UncommittedPush, match="push: key 'a' was pushed with apply=False"):
            bench.push("a", "b")
        bench.core.merged({7}, bench.core.count)
    assert bench.told == told
    assert bench.push("b")


def test_keys_that_wait_for_a_commit() -> None:
    bench = Bench()
    states = bench.plan("a", "b").states
    bench.core.check_may_use(states, "push")
    assert bench.push("b", apply=False)
    bench.core.check_may_use(states[:1], "push")
    with pytest.raises(UncommittedPush, match="push: key 'b' was pushed with apply=False"):
        bench.core.check_may_use(states, "push")
    with pytest.raises(UncommittedPush, match="save: key 'b'"):
        bench.core.check_committed(None, "save")
    for apply, left in ((False, {8}), (True, set())):
        sent = bench.core.commit(lambda n, apply=apply: m.Commit(n, 1, None, False, False, apply), apply)  # type: ignore[misc]
        for _, _, exchange in sent.asked:
            exchange.take(m.Committed(1, applied=apply, norm=None))
        bench.core.end_commit(sent)
        assert bench.core.uncommitted == left
    assert bench.push("b", apply=False)
    bench.core.retire([state.entry for state in states], states)
    assert bench.core.uncommitted == set()
    assert bench.core.settled
    bench.core.check_committed(None, "save")


def test_a_key_that_was_deleted_meanwhile_is_not_pushed() -> None:
    bench = Bench()
    plan = bench.plan("a", "b")
    bench.core.retire([ENTRIES[0]], plan.states[:1])
    with pytest.raises(KeyDeleted, match="'a' was deleted by another thread"):
        bench.core.push(plan, [([memoryview(bytes(8))], None, None)] * 2)
    assert bench.core.count == 0
    assert [m.Push in map(type, told) for told in bench.told] == [False, False]


def test_a_load_that_replaces_keys_does_not_tell_the_scheduler_of_a_delete() -> None:
    bench = Bench()
    asked = bench.core.retire([ENTRIES[0], ENTRIES[2]])
    assert bench.notified == []
    assert bench.told == [[m.DeleteSlices(1, 3, [70, 90])], [m.DeleteSlices(1, 3, [71])]]
    assert [(server, number) for server, number, _ in asked] == [(0, 1), (1, 1)]


def test_a_new_value_travels_in_slices() -> None:
    value = torch.tensor([1.0, 2.0])
    found = list(init_messages(3, ENTRIES[0], value, 2))
    assert [server for server, _, _ in found] == [0, 1]
    for server, make, payload in found:
        assert make(5) == m.InitSlices(5, 3, "a", (2,), "float32", [ENTRIES[0].slices[server]])
        assert b"".join(payload) == value[server : server + 1].numpy().tobytes()


def test_slices_by_server() -> None:
    assert by_server(ENTRIES) == [(0, [70, 90]), (1, [71, 80])]
