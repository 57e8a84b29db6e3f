"""What a worker says when all agree, step by step, and when a step fails. All orders: interleavings."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from ports import Port

from tensorkv.checkpoint.records import SavedSettings
from tensorkv.errors import (
    InvalidOption,
    KeyDeleted,
    MemoryLimitReached,
    PeerLostError,
    ProtocolError,
    StoreClosed,
    TensorKVError,
    WaitTimeout,
    to_wire,
)
from tensorkv.interrupts import Interrupted
from tensorkv.updaters.base import named_spec
from tensorkv.wire import messages as m
from tensorkv.worker.conversations import (
    AskScheduler,
    AskServers,
    AwaitMerged,
    AwaitReplies,
    AwaitTurn,
    Change,
    Conversation,
    Deadline,
    Lead,
    Pause,
    Push,
    TellServers,
    WatchMerged,
    act_at_rest,
    act_together,
    await_merged,
    begin_save,
    commit,
    init_keys,
    leave,
    look_up,
    make_setting,
    meet,
    push_free,
    push_late,
    put,
    retire,
)
from tensorkv.worker.core import WorkerCore
from tensorkv.worker.plans import Plan

SPECS = [m.KeySpec(key, (2,), "float32", 4, False) for key in ("a", "b")]
ENTRIES = [
    m.KeyEntry("a", 7, (2,), "float32", 0, [m.SliceEntry(70, 0, 0, 1), m.SliceEntry(71, 1, 1, 2)]),
    m.KeyEntry("b", 8, (2,), "float32", 0, [m.SliceEntry(80, 0, 0, 2)]),
]
RECORD = m.SettingRecord(None, updater=named_spec("add"))
DONE = m.Done(1)


class Bench:
    """Store 3 in a job of two servers. What is queued to each, and what the scheduler is told, is kept."""

    def __init__(self, policy: Any = "sync") -> None:
        self.told: list[list[Any]] = [[], []]
        self.notified: list[Any] = []
        ports = [Port(lambda message, data, told=told: told.append(message)) for told in self.told]
        left: set[int] = set()
        self.core = WorkerCore(
            3, m.StorePolicy(policy), ports, itertools.count(1), left, self.notified.append
        )

    def plan(self, *keys: str) -> Plan:
        self.core.keys.learn(ENTRIES)
        return self.core.plans.plan_to_pull(self.core.keys.known(keys))

    def push(self, *keys: str) -> bool:
        plan = self.plan(*keys)
        return self.core.push(
            plan, [([memoryview(bytes(chunk.size_bytes))], None, None) for *_, chunk in plan.frames]
        )

    def busy(self) -> set[int]:
        return self.core.busy(self.plan("a", "b"))

    def messages(self, kind: type[Any]) -> list[list[Any]]:
        """Return what was queued of this kind, by server."""
        return [[each for each in told if isinstance(each, kind)] for told in self.told]


class Watch:
    """The last push of each key of a plan, as it is merged."""

    def __init__(self, plan: Plan, up_to: int) -> None:
        self.plan, self.up_to = plan, up_to
        self.left = len(plan.states)
        self.closed = False

    @property
    def is_over(self) -> bool:
        return self.left == 0

    def close(self) -> None:
        self.closed = True


def shown(step: Any) -> Any:
    """Requests are shown as messages with number 1, and a wait as whom it is for."""
    if isinstance(step, (AskScheduler, AskServers)):
        return step.make(1)
    if isinstance(step, AwaitReplies):
        return "replies", [server for server, _, _ in step.asked], step.keep, step.leaving
    return step


def say(conversation: Conversation[Any], *answers: Any) -> tuple[list[Any], Any]:
    """Answer the steps of a conversation in turn, an exception by raising it; return what it says.

    A Change is made, and not shown. With them comes the outcome, or the exception.
    """
    said: list[Any] = []
    answer: Any = None
    left = list(answers)
    while True:
        try:
            raised = isinstance(answer, BaseException)
            step = conversation.throw(answer) if raised else conversation.send(answer)
        except StopIteration as done:
            assert not left, f"it ended after {said}"
            return said, done.value
        except BaseException as exc:  # noqa: BLE001
            return said, exc
        if isinstance(step, Change):
            try:
                answer = step.call()
            except TensorKVError as exc:
                answer = exc
            continue
        assert left, f"it goes on with {step}"
        said.append(shown(step))
        answer = left.pop(0)


def refuse(bench: Bench, server: int, error: TensorKVError) -> None:
    """Let a server refuse the request that was made last."""
    table = bench.core.servers[server].requests  # type: ignore[attr-defined]
    number, exchange = list(table.exchanges.items())[-1]
    table.take(exchange, number, m.Failed(number, *to_wire(error)))


def value_of(key: Any) -> torch.Tensor:
    return torch.zeros(2)


def init(core: WorkerCore) -> Conversation[Any]:
    return init_keys(core, SPECS, value_of)


def test_an_init_that_another_rank_leads_is_one_question() -> None:
    reply = m.InitReply(1, ENTRIES, [False, False])
    said, (found, led) = say(init(Bench().core), reply)
    assert said == [m.ProposeInit(1, 3, SPECS)]
    assert found is reply
    assert led.error is None


def test_a_rank_stores_the_values_of_the_keys_that_it_leads_and_concludes() -> None:
    bench = Bench()
    said, (_, led) = say(init(bench.core), m.InitReply(1, ENTRIES, [False, True]), None, DONE)
    assert said[1:] == [("replies", [0], False, False), m.ConcludeInit(1, 3, [8], None)]
    assert bench.told == [[m.InitSlices(1, 3, "b", (2,), "float32", ENTRIES[1].slices)], []]
    assert led.error is None


def test_a_value_that_cannot_be_copied_ends_an_init_before_anything_is_sent() -> None:
    bench = Bench()

    def fail(key: Any) -> torch.Tensor:
        raise MemoryLimitReached(f"no memory for {key!r}")

    conversation = init_keys(bench.core, SPECS, fail)
    said, (_, led) = say(conversation, m.InitReply(1, ENTRIES, [False, True]), [DONE, DONE], DONE)
    assert bench.told == [[], []]
    assert said[1:] == [
        m.DropSlices(1, 3, [80]),
        m.ConcludeInit(1, 3, [8], ("MemoryLimitReached", "no memory for 'b'")),
    ]
    with pytest.raises(MemoryLimitReached):
        led.check()


@pytest.mark.parametrize(
    "error", [MemoryLimitReached("no memory"), WaitTimeout("late"), Interrupted("Ctrl-C")]
)
def test_what_an_init_has_stored_before_an_error_is_dropped(error: BaseException) -> None:
    reply = m.InitReply(1, ENTRIES, [True, True])
    said, (_, led) = say(init(Bench().core), reply, error, [DONE, DONE], DONE)
    assert said[2] == m.DropSlices(1, 3, [70, 71, 80])
    assert said[3] == m.ConcludeInit(1, 3, [7, 8], to_wire(error))
    with pytest.raises(type(error), match=str(error)):
        led.check()
    assert led.error is None  # it holds no tensors any more


def test_an_init_that_cannot_drop_what_it_has_stored_concludes_with_that() -> None:
    reply = m.InitReply(1, ENTRIES, [True, False])
    said, (_, led) = say(init(Bench().core), reply, WaitTimeout("late"), WaitTimeout("later"), DONE)
    assert said[-1] == m.ConcludeInit(1, 3, [7], ("WaitTimeout", "later"))
    assert str(led.error) == "later"


def test_a_bug_of_ours_is_concluded_too_and_nobody_is_asked_to_drop_anything() -> None:
    reply = m.InitReply(1, ENTRIES, [True, False])
    said, (_, led) = say(init(Bench().core), reply, KeyError("bug"), DONE)
    assert isinstance(said[-1], m.ConcludeInit)
    assert said[-1].error is not None
    assert isinstance(led.error, KeyError)


@pytest.mark.parametrize(
    "reply", [m.InitReply(1, ENTRIES[::-1], [True, True]), m.InitReply(1, ENTRIES, [True])]
)
def test_a_reply_about_other_keys_breaks_the_protocol(reply: m.InitReply) -> None:
    said, error = say(init(Bench().core), reply)
    assert len(said) == 1
    assert isinstance(error, ProtocolError)


def test_an_error_of_the_scheduler_ends_the_conversation() -> None:
    for conversation in (
        init(Bench().core),
        make_setting(Bench().core, RECORD),
        act_together(Bench().core, "save('x')"),
    ):
        said, error = say(conversation, WaitTimeout("nobody came"))
        assert len(said) == 1
        assert isinstance(error, WaitTimeout)


def test_a_setting_is_prepared_everywhere_before_it_is_activated_anywhere() -> None:
    lead = m.SettingReply(1, 5, True)
    said, led = say(make_setting(Bench().core, RECORD), lead, [DONE, DONE], None, [DONE, DONE], DONE)
    assert said == [
        m.ProposeSetting(1, 3, RECORD),
        m.PrepareSetting(1, 3, 5, RECORD),
        TellServers(m.ActivateSetting(3, 5)),
        m.Flush(1, 3),
        m.ConcludeSetting(1, 3, 5, None),
    ]
    assert led.error is None
    said, led = say(make_setting(Bench().core, RECORD), m.SettingReply(1, 5, False))
    assert len(said) == 1
    assert led.error is None


@pytest.mark.parametrize("num_done", [0, 1])
def test_a_setting_that_fails_before_it_is_on_its_way_fails_for_all(num_done: int) -> None:
    answers = [[DONE, DONE]] * num_done
    said, led = say(
        make_setting(Bench().core, RECORD), m.SettingReply(1, 5, True), *answers, InvalidOption("lr"), DONE
    )
    assert len(said) == 3 + num_done
    assert said[-1] == m.ConcludeSetting(1, 3, 5, ("InvalidOption", "lr"))
    assert isinstance(led.error, InvalidOption)


def test_a_setting_that_is_on_its_way_holds_though_its_rank_is_given_up() -> None:
    lead = m.SettingReply(1, 5, True)
    said, led = say(make_setting(Bench().core, RECORD), lead, [DONE, DONE], None, Interrupted("Ctrl-C"), DONE)
    assert said[-1] == m.ConcludeSetting(1, 3, 5, None)
    assert isinstance(led.error, Interrupted)


def test_the_rank_that_leads_a_collective_call_tells_how_it_went() -> None:
    last = m.TogetherReply(1, False, None)
    said, (reply, led) = say(
        act_together(Bench().core, "save('x')"), m.TogetherReply(1, True, None), None, last
    )
    assert said == [
        m.Together(1, 3, "save('x')", only_meet=False),
        Lead(),
        m.ConcludeTogether(1, 3, None, None),
    ]
    assert reply is last
    assert led.error is None
    error = MemoryLimitReached("disk")
    said, (_, led) = say(act_together(Bench().core, "save('x')"), m.TogetherReply(1, True, None), error, last)
    assert said[-1] == m.ConcludeTogether(1, 3, ("MemoryLimitReached", "disk"), None)
    assert led.error is error


def test_a_conversation_that_is_ended_says_nothing_more() -> None:
    """As when the job is broken: nobody waits for an answer then."""
    for error in (None, PeerLostError("server 0 was lost")):
        conversation = init(Bench().core)
        next(conversation)
        conversation.send(m.InitReply(1, ENTRIES, [True, True]))
        conversation.close()
        with pytest.raises(StopIteration if error is None else PeerLostError):
            next(conversation) if error is None else conversation.throw(error)


# ---- with the servers alone ------------------------------------------------------------------------


def test_keys_that_are_known_are_not_looked_up() -> None:
    bench = Bench()
    said, states = say(look_up(bench.core, ["b", "a"]), m.Entries(1, ENTRIES))
    assert said == [m.Lookup(1, 3, ["b", "a"])]
    assert [state.key_id for state in states] == [8, 7]
    assert say(look_up(bench.core, ["a"])) == ([], states[1:])


def test_free_keys_are_pushed_without_a_wait() -> None:
    bench = Bench()
    plan = bench.plan("a", "b")
    assert bench.push("a")
    assert say(push_free(bench.core, plan), True) == ([Push([1])], [0])
    assert say(push_free(bench.core, plan), False, True) == ([Push([1])] * 2, [0])  # another thread was first
    bench.core.held = True
    assert say(push_free(bench.core, plan)) == ([], [0, 1])


def test_a_busy_key_is_pushed_when_it_is_merged_and_anew_if_another_thread_was_first() -> None:
    bench = Bench()
    plan = bench.plan("a", "b")
    assert bench.push("a", "b")
    first, second = Watch(plan, bench.core.count), Watch(bench.plan("b"), bench.core.count)
    conversation = push_late(bench.core, plan, [0, 1])

    def merge(watch: Watch, *places: int) -> list[int]:
        watch.left -= len(places)
        return list(places)

    assert next(conversation) == AwaitTurn()
    assert conversation.send(None) == WatchMerged(plan.states)
    assert conversation.send(first) == AwaitMerged(first)
    change = conversation.send(merge(first, 1))
    assert isinstance(change, Change)
    assert conversation.send(change.call()) == Push([1])
    assert bench.busy() == {7}
    assert conversation.send(False) == AwaitMerged(first)
    change = conversation.send(merge(first, 0))
    assert conversation.send(change.call()) == Push([0])
    assert not first.closed
    assert conversation.send(True) == AwaitTurn()
    assert first.closed
    assert conversation.send(None) == WatchMerged(plan.states[1:])
    assert conversation.send(second) == AwaitMerged(second)
    change = conversation.send(merge(second, 0))
    assert conversation.send(change.call()) == Push([1])
    with pytest.raises(StopIteration):
        conversation.send(True)
    assert second.closed


def test_a_watch_is_given_up_with_its_call() -> None:
    bench = Bench()
    plan = bench.plan("a", "b")
    assert bench.push("a", "b")
    for conversation in (push_late(bench.core, plan, [0]), await_merged(bench.core)):
        watch = Watch(plan, 1)
        steps = [None, watch] if next(conversation) == AwaitTurn() else [plan.states, watch]
        for answer in steps:
            conversation.send(answer)
        with pytest.raises(WaitTimeout, match="late"):
            conversation.throw(WaitTimeout("late"))
        assert watch.closed


def test_waiting_for_all_merges_waits_for_what_was_pushed_by_then() -> None:
    bench = Bench()
    assert say(await_merged(bench.core)) == ([], None)
    assert bench.push("a")
    watch = Watch(bench.plan("a"), bench.core.count)
    conversation = await_merged(bench.core)
    step = next(conversation)
    assert isinstance(step, Change)
    assert conversation.send(step.call()) == WatchMerged(bench.plan("a").states)
    assert conversation.send(watch) == AwaitMerged(watch)
    watch.left = 0
    step = conversation.send([0])
    assert bench.push("b")  # by another thread, meanwhile
    with pytest.raises(StopIteration):
        conversation.send(step.call())  # type: ignore[union-attr]
    assert bench.busy() == {8}


def test_a_put_vouches_for_the_pushes_before_it() -> None:
    bench = Bench()
    plan = bench.plan("a")
    assert bench.push("a", "b")
    payloads = [[memoryview(bytes(4))]] * 2
    assert say(put(bench.core, plan, payloads), None) == ([("replies", [0, 1], False, False)], None)
    assert bench.messages(m.Put) == [[m.Put(plan.number, 0, 1)], [m.Put(plan.number, 0, 1)]]
    assert bench.busy() == {8}


def test_a_put_that_is_refused_vouches_for_nothing() -> None:
    bench = Bench()
    assert bench.push("a")
    conversation = put(bench.core, bench.plan("a"), [[memoryview(bytes(4))]] * 2)
    change = next(conversation)
    assert isinstance(change, Change)
    assert change.in_turn
    conversation.send(change.call())
    refuse(bench, 1, InvalidOption("no"))
    with pytest.raises(InvalidOption, match="no"):
        conversation.send(None)
    assert bench.busy() == {7}


def commit_of(bench: Bench) -> Conversation[Any]:
    return commit(bench.core, lambda n: m.Commit(n, 3, None, False, False, True), apply=True)


def test_a_commit_that_was_given_up_is_awaited_by_the_next_call() -> None:
    """Servers know one commit per worker at a time."""
    bench = Bench()
    plan = bench.plan("a")
    frames = [([memoryview(bytes(4))], None, None)] * 2
    assert bench.core.push(plan, frames, apply=False)
    said, error = say(commit_of(bench), WaitTimeout("late"))
    assert isinstance(error, WaitTimeout)
    assert said == [("replies", [0, 1], True, False)]
    assert bench.core.uncommitted == {7}
    said, (keys, _) = say(commit_of(bench), None)
    assert bench.messages(m.Commit) == [[m.Commit(1, 3, None, False, False, True)]] * 2  # not asked for again
    assert keys == ["a"]
    assert bench.core.uncommitted == set()
    assert bench.busy() == set()
    say(commit_of(bench), None)
    assert [len(each) for each in bench.messages(m.Commit)] == [2, 2]


def test_a_commit_that_is_refused_commits_nothing_and_is_over() -> None:
    bench = Bench()
    assert bench.core.push(bench.plan("a"), [([memoryview(bytes(4))], None, None)] * 2, apply=False)
    conversation = commit_of(bench)
    change = next(conversation)
    assert isinstance(change, Change)
    conversation.send(change.call())
    refuse(bench, 0, InvalidOption("max_norm"))
    last = conversation.send(None)
    assert isinstance(last, Change)
    with pytest.raises(InvalidOption, match="max_norm"):
        last.call()
    assert bench.core.uncommitted == {7}
    say(commit_of(bench), None)
    assert [len(each) for each in bench.messages(m.Commit)] == [2, 2]


def test_the_scheduler_hears_of_a_delete_and_servers_drop_plans_first() -> None:
    bench = Bench()
    plan = bench.plan("a", "b")
    assert bench.push("a", "b")
    states = plan.states[:1]
    said, _ = say(retire(bench.core, [ENTRIES[0]], states), None)
    assert said == [("replies", [0, 1], False, False)]
    assert bench.notified == [m.DeleteKeys(3, [("a", 7)])]
    assert [told[-2:] for told in bench.told] == [
        [m.DropPlan(plan.number), m.DeleteSlices(1, 3, [70])],
        [m.DropPlan(plan.number), m.DeleteSlices(1, 3, [71])],
    ]
    assert states[0].retired
    assert bench.core.num_retired == 1
    assert bench.core.settled is False  # "b" is unmerged
    _, error = say(retire(bench.core, [ENTRIES[0]], states))
    assert isinstance(error, KeyDeleted)


def test_nothing_is_queued_for_a_store_after_its_leave() -> None:
    bench = Bench()
    plan = bench.plan("a")
    said, _ = say(leave(bench.core), None, DONE)
    assert said == [("replies", [0, 1], False, True), m.LeaveStore(1, 3)]
    assert bench.told == [[m.Leave(1, 3)], [m.Leave(1, 3)]]
    for call in (
        lambda: bench.core.tell(plan),
        lambda: bench.push("a"),
        lambda: bench.core.tell_all(m.EndSave(3)),
        lambda: bench.core.retire([ENTRIES[0]]),
        bench.core.leave,
    ):
        with pytest.raises(StoreClosed):
            call()
    assert bench.told == [[m.Leave(1, 3)], [m.Leave(1, 3)]]


def begun(num_settings: int, num_open: int = 0) -> m.SaveBegun:
    return m.SaveBegun(1, num_open, num_settings, 0, SavedSettings([], []))


def test_a_save_alone_begins_when_all_servers_have_the_same_settings() -> None:
    answers = [[begun(1), begun(2)], None, [begun(2), begun(2)]]
    said, found = say(begin_save(Bench().core, lambda: False), "a deadline", *answers)
    assert [type(each) for each in said] == [Deadline, m.BeginSave, Pause, m.BeginSave]
    assert said[2] == Pause("a deadline")
    assert found == answers[-1]


def test_a_save_alone_does_not_begin_while_a_round_of_its_worker_is_open() -> None:
    assert say(begin_save(Bench().core, lambda: False), None, [begun(1), begun(1, num_open=1)])[1] is None


def test_a_save_alone_waits_for_no_setting_of_a_lost_worker() -> None:
    """Once the servers answer the same twice, what is missing is on its way to none of them."""
    answers = [[begun(1), begun(2)], None, [begun(1), begun(3)], None, [begun(1), begun(3)]]
    said, found = say(begin_save(Bench().core, lambda: True), None, *answers)
    assert len(said) == 6
    assert found == answers[-1]


def test_workers_meet_before_they_act_at_rest() -> None:
    core = Bench().core
    assert say(meet(core, "save('x')"), m.TogetherReply(1, False, None)) == (
        [m.Together(1, 3, "save('x')", only_meet=True)],
        None,
    )
    last = m.TogetherReply(1, False, None)
    said, (reply, _) = say(act_at_rest(core, "save('x')"), [DONE, DONE], last)
    assert said == [m.Flush(1, 3), m.Together(1, 3, "save('x')", only_meet=False)]
    assert reply is last


def test_what_changes_values_is_queued_when_nothing_is_held_back() -> None:
    bench = Bench()
    plan = bench.plan("a")
    for conversation in (
        put(bench.core, plan, [[memoryview(bytes(4))]] * 2),
        commit_of(bench),
        retire(bench.core, [ENTRIES[0]], plan.states),
        leave(bench.core),
    ):
        change = next(conversation)
        assert isinstance(change, Change)
        assert change.in_turn
