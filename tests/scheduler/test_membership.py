"""Membership: processes, losses, and stores by name."""

from __future__ import annotations

from typing import Any

import pytest

from tensorkv.errors import ProtocolError, StoreMismatch, from_wire
from tensorkv.scheduler.membership import Membership
from tensorkv.updaters.spec import UpdaterSpec
from tensorkv.wire import messages as m


def job(num_workers: int = 2, num_servers: int = 2, *, joined: bool = True) -> Membership:
    made = Membership(num_workers, num_servers, 1 << 20)
    if joined:
        for rank in range(num_servers):
            made.handle("server", rank, m.Register("here", 100 + rank, f"s{rank}", 1))
        for rank in range(num_workers):
            made.handle("worker", rank, m.Register("", 0, f"w{rank}", 1))
        taken(made)
    return made


def taken(of: Membership) -> list[Any]:
    out, of.out = of.out, []
    return out


def tell(to: Membership, rank: int, message: Any) -> list[Any]:
    to.handle("worker", rank, message)
    return taken(to)


def join(
    to: Membership,
    rank: int,
    name: str = "default",
    kind: str = "sync",
    reduction: str = "sum",
    on_worker_loss: Any = "fail",
) -> Any:
    ((_, found, reply),) = tell(
        to, rank, m.JoinStore(1, name, m.StorePolicy(kind), reduction, on_worker_loss)
    )
    assert found == rank
    return reply


def test_workers_are_welcome_when_all_servers_are_there() -> None:
    made = job(joined=False)
    made.handle("worker", 1, m.Register("", 0, "w1", 1))
    made.handle("server", 1, m.Register("b", 2, "s1", 1))
    assert taken(made) == []
    assert (made.has_joined("server", 1), made.has_joined("server", 0)) == (True, False)
    made.handle("server", 0, m.Register("a", 1, "s0", 1))
    welcome = m.Welcome([m.ServerAddress("a", 1), m.ServerAddress("b", 2)])
    assert taken(made) == [("worker", 1, welcome)]
    made.handle("worker", 0, m.Register("", 0, "w0", 1))
    assert taken(made) == [("worker", 0, welcome)]


@pytest.mark.parametrize(
    ("role", "rank", "message"),
    [
        ("worker", 0, m.Register("", 0, "", 1)),
        ("server", 0, m.JoinStore(1, "x", m.StorePolicy("sync"), "sum", "fail")),
        ("server", 1, m.AskWaiting(1, 1)),
        ("server", 0, m.Barrier(1, 1)),
        ("worker", 0, m.CommitReady(1, 1, [], True, False, None)),
        ("worker", 5, m.Goodbye()),
        ("worker", 5, m.JoinStore(1, "x", m.StorePolicy("sync"), "sum", "fail")),
    ],
    ids=lambda each: type(each).__name__ if isinstance(each, m.Message) else str(each),
)
def test_nobody_speaks_out_of_turn(role: Any, rank: int, message: Any) -> None:
    made = job()
    with pytest.raises(ProtocolError):
        made.handle(role, rank, message)
    assert taken(made) == []
    assert made.lost is None


def test_stores_are_found_by_name_and_must_agree() -> None:
    made = job()
    first = join(made, 0)
    assert join(made, 1) == first
    assert join(made, 0, "other", "async", "mean").store != first.store
    for wrong in (("default", "async", "sum"), ("default", "sync", "mean")):
        reply = join(made, 1, *wrong)
        assert isinstance(from_wire(reply.name, reply.text), StoreMismatch)
        assert "'default'" in reply.text


def test_a_name_is_free_when_all_have_left() -> None:
    made = job()
    first = join(made, 0)
    join(made, 1)
    assert tell(made, 0, m.LeaveStore(2, first.store)) == [("worker", 0, m.Done(2))]
    reply = join(made, 0)
    assert isinstance(from_wire(reply.name, reply.text), StoreMismatch)
    tell(made, 1, m.LeaveStore(2, first.store))
    again = join(made, 0, kind="async")
    assert again.store != first.store
    assert tell(made, 1, m.Barrier(3, first.store)) == [closed(1, 3)]


def test_of_stuck_workers_one_that_waits_for_the_asker_is_named() -> None:
    made = job(num_workers=4)
    store, other = join(made, 0).store, join(made, 0, name="other").store
    for name in ("default", "other"):
        for rank in (1, 2, 3):
            join(made, rank, name=name)
    tell(made, 0, m.Barrier(1, store))
    tell(made, 2, m.Barrier(2, store))
    tell(made, 1, m.Barrier(3, other))
    tell(made, 0, m.Barrier(4, other))
    assert tell(made, 3, m.AskStuck(5, [1])) == [("worker", 3, m.Stuck(5, 1, "a barrier", [2, 3]))]
    assert tell(made, 1, m.AskStuck(6, [0, 2])) == [("worker", 1, m.Stuck(6, 0, "a barrier", [1, 3]))]
    # Worker 0 waits twice, and not for worker 2 in the first store.
    assert tell(made, 2, m.AskStuck(7, [0])) == [("worker", 2, m.Stuck(7, 0, "a barrier", [2, 3]))]


def test_keys_settings_and_barriers_go_to_the_store() -> None:
    made = job()
    store = join(made, 0).store
    spec = m.KeySpec("w", (2,), "float32", 4, False)
    ((_, _, reply),) = tell(made, 0, m.ProposeInit(1, store, [spec]))
    assert reply.lead == [True]
    assert tell(made, 1, m.ProposeInit(1, store, [spec])) == []
    out = tell(made, 0, m.ConcludeInit(2, store, [reply.entries[0].key_id], None))
    assert [(rank, type(message)) for _, rank, message in out] == [(0, m.Done), (1, m.InitReply)]
    record = m.SettingRecord(None, UpdaterSpec(type="named", name="add"))
    ((_, _, reply),) = tell(made, 0, m.ProposeSetting(3, store, record))
    tell(made, 0, m.ConcludeSetting(4, store, reply.number, None))
    ((_, _, entries),) = tell(made, 1, m.Lookup(5, store, None))
    assert tell(made, 1, m.Barrier(6, store)) == []
    assert tell(made, 0, m.AskWaiting(6, store)) == [("worker", 0, m.Waiting(6, [], ""))]
    assert tell(made, 1, m.AskWaiting(6, store)) == [("worker", 1, m.Waiting(6, [0], "a barrier"))]
    assert tell(made, 0, m.AskStuck(7, [0, 1])) == [("worker", 0, m.Stuck(7, 1, "a barrier", [0]))]
    assert tell(made, 0, m.AskStuck(8, [0])) == [("worker", 0, m.Stuck(8, 0, "", []))]
    given_up = m.Failed(6, "WaitTimeout", "a barrier was given up")
    assert tell(made, 1, m.GiveUp(store, 6)) == [("worker", 1, given_up)]
    assert tell(made, 1, m.GiveUp(store, 6)) == []
    (entry,) = entries.entries
    assert tell(made, 1, m.DeleteKeys(store, [("w", entry.key_id)])) == []
    assert tell(made, 1, m.CountKeys(8, store)) == [("worker", 1, m.NumKeys(8, 0))]


def test_commits_are_decided_for_all_servers() -> None:
    made = job()
    store = join(made, 0).store
    made.handle("server", 1, m.CommitReady(store, 1, [4.0], True, False, None))
    assert taken(made) == []
    made.handle("server", 0, m.CommitReady(store, 1, [3.0], True, False, None))
    decision = m.CommitDecision(store, 1, True, 5.0, None)
    assert taken(made) == [("server", 0, decision), ("server", 1, decision)]


def test_goodbye_leaves_every_store_also_those_of_later() -> None:
    made = job()
    store = join(made, 0).store
    tell(made, 0, m.Barrier(7, store))
    gone = m.Gone(1)
    assert tell(made, 1, m.Goodbye()) == [
        ("server", 0, gone), ("server", 1, gone), ("worker", 0, m.Done(7)),
    ]  # fmt: skip
    made.disconnected("worker", 1, "end of file")
    assert made.lost is None
    later = join(made, 0, "later").store
    assert tell(made, 0, m.Barrier(8, later)) == [("worker", 0, m.Done(8))]
    assert not made.finished
    tell(made, 0, m.Goodbye())
    assert made.finished


def test_a_server_that_comes_late_learns_who_has_gone() -> None:
    made = job(2, 1, joined=False)
    made.worker_exited(1)
    made.worker_exited(1)
    taken(made)
    made.handle("server", 0, m.Register("a", 1, "s0", 1))
    assert taken(made) == [("server", 0, m.Gone(1))]


@pytest.mark.parametrize("how", ["disconnected", "abandon", "declared"])
def test_the_first_loss_is_the_cause_that_all_are_told(how: str) -> None:
    made = job()
    if how == "disconnected":
        made.disconnected("worker", 1, "cause")
    elif how == "abandon":
        made.handle("worker", 1, m.Abandon("cause"))
    else:
        made.declare_lost("worker", 1, "cause")
    lost = m.Lost("worker", 1, "w1", "cause")
    assert made.lost == lost
    assert taken(made) == [("server", 0, lost), ("server", 1, lost), ("worker", 0, lost)]
    made.disconnected("worker", 1, "once more")
    made.disconnected("server", 0, "another")
    assert (made.lost, taken(made)) == (lost, [])


class TestGoingOn:
    """A worker is lost, and every store it is in says on_worker_loss="continue"."""

    def test_it_has_left_every_store_and_everybody_is_told(self) -> None:
        made = job(3)
        store = join(made, 0, on_worker_loss="continue").store
        tell(made, 0, m.Barrier(7, store))
        tell(made, 2, m.Barrier(8, store))
        made.disconnected("worker", 1, "cause")
        lost = m.WorkerLost(1, "w1", "cause", [])
        assert taken(made) == [
            ("server", 0, lost), ("server", 1, lost), ("worker", 0, lost), ("worker", 2, lost),
            ("worker", 0, m.Done(7)), ("worker", 2, m.Done(8)),
        ]  # fmt: skip
        assert made.lost is None
        assert (made.is_dropped(1), made.is_dropped(0)) == (True, False)
        later = join(made, 0, "later", on_worker_loss="fail").store
        tell(made, 0, m.Barrier(9, later))
        assert tell(made, 2, m.Barrier(9, later)) == [
            ("worker", 0, m.Done(9)), ("worker", 2, m.Done(9)),
        ]  # fmt: skip
        for rank in (0, 2):
            tell(made, rank, m.Goodbye())
        assert made.finished

    def test_what_it_still_says_is_not_heard(self) -> None:
        made = job(3)
        store = join(made, 0, on_worker_loss="continue").store
        made.handle("worker", 1, m.Abandon("cause"))
        taken(made)
        assert tell(made, 1, m.Barrier(1, store)) == []
        assert tell(made, 1, m.Goodbye()) == []
        made.disconnected("worker", 1, "end of file")
        made.declare_lost("worker", 1, "it ended with status 1")
        assert taken(made) == []
        with pytest.raises(ProtocolError):
            made.handle("worker", 1, m.Register("", 0, "w1", 2))

    def test_who_comes_late_learns_of_it(self) -> None:
        made = job(3, 2, joined=False)
        made.handle("server", 0, m.Register("a", 1, "s0", 1))
        made.handle("worker", 0, m.Register("", 0, "w0", 1))
        made.handle("worker", 1, m.Register("", 0, "w1", 1))
        join(made, 0, on_worker_loss="continue")
        made.disconnected("worker", 1, "cause")
        taken(made)
        lost = m.WorkerLost(1, "w1", "cause", [])
        made.handle("worker", 2, m.Register("", 0, "w2", 1))
        assert taken(made) == [("worker", 2, lost)]
        made.handle("server", 1, m.Register("b", 2, "s1", 1))
        assert taken(made)[0] == ("server", 1, lost)

    def test_one_store_that_says_fail_is_enough_to_end_the_job(self) -> None:
        made = job(3)
        join(made, 0, on_worker_loss="continue")
        strict = join(made, 0, "strict", on_worker_loss="fail").store
        tell(made, 1, m.LeaveStore(2, strict))  # it says nothing about worker 1 any more
        made.disconnected("worker", 1, "cause")
        assert made.lost is None
        made.disconnected("worker", 2, "cause")  # it has never opened it, and is a member
        assert made.lost == m.Lost("worker", 2, "w2", "cause")
        assert not made.is_dropped(2)

    def test_who_has_left_all_stores_is_judged_by_those_that_are_open(self) -> None:
        for policy, goes_on in (("continue", True), ("fail", False)):
            made = job(3)
            store = join(made, 0, on_worker_loss=policy).store
            tell(made, 1, m.LeaveStore(2, store))
            made.disconnected("worker", 1, "cause")
            assert made.is_dropped(1) == goes_on
            assert (made.lost is None) == goes_on

    def test_without_a_store_the_job_ends(self) -> None:
        made = job(3)
        made.disconnected("worker", 1, "cause")
        assert made.lost == m.Lost("worker", 1, "w1", "cause")

    def test_who_never_joined_ends_the_job(self) -> None:
        made = job(2, joined=False)
        for rank in range(2):
            made.handle("server", rank, m.Register("a", 1, "s", 1))
        made.handle("worker", 0, m.Register("", 0, "w0", 1))
        taken(made)
        join(made, 0, on_worker_loss="continue")
        made.disconnected("worker", 1, "cause")
        assert made.lost == m.Lost("worker", 1, "", "cause")

    def test_a_server_is_never_spared(self) -> None:
        made = job(3)
        join(made, 0, on_worker_loss="continue")
        made.disconnected("worker", 1, "cause")
        made.disconnected("server", 1, "cause")
        assert made.lost == m.Lost("server", 1, "s1", "cause")

    def test_the_last_one_has_nobody_who_goes_on(self) -> None:
        made = job(3)
        join(made, 0, on_worker_loss="continue")
        made.disconnected("worker", 1, "cause")
        tell(made, 0, m.Goodbye())
        made.disconnected("worker", 2, "cause")
        assert made.lost == m.Lost("worker", 2, "w2", "cause")

    def test_an_end_with_another_status_than_0_is_a_loss_also_after_goodbye(self) -> None:
        for policy, goes_on in (("continue", True), ("fail", False)):
            made = job(3)
            join(made, 0, on_worker_loss=policy)
            tell(made, 1, m.Goodbye())
            made.declare_lost("worker", 1, "it ended with status 3")
            assert made.is_dropped(1) == goes_on
            (message,) = {type(message) for _, _, message in taken(made)}
            assert message is (m.WorkerLost if goes_on else m.Lost)

    def test_servers_are_told_what_it_was_about_to_create(self) -> None:
        made = job(2)
        store = join(made, 0, on_worker_loss="continue").store
        other = join(made, 0, "other", on_worker_loss="continue").store
        specs = [m.KeySpec(key, (2,), "float32", 4, False) for key in ("done", "half")]
        entries = {}
        for number, spec in enumerate(specs):
            ((_, _, reply),) = tell(made, 0, m.ProposeInit(number, store, [spec]))
            entries[spec.key] = reply.entries[0]
            if spec.key != "half":
                tell(made, 0, m.ConcludeInit(number, store, [reply.entries[0].key_id], None))
        tell(made, 1, m.DeleteKeys(store, [("done", entries["done"].key_id)]))
        tell(made, 0, m.ProposeInit(5, other, [specs[0]]))
        made.disconnected("worker", 0, "cause")
        told = {role: message for role, _, message in taken(made)}
        ((first, slice_ids), (second, _)) = told["server"].dropped
        assert (first, second) == (store, other)
        assert slice_ids == [each.slice_id for each in entries["half"].slices]
        assert told["worker"].dropped == []
        assert made._placement.load_bytes == [0, 0]
        ((_, _, reply),) = tell(made, 1, m.ProposeInit(1, store, specs))
        assert reply.lead == [True, True]  # the lost worker has deleted all

    def test_ranks_must_agree_on_it(self) -> None:
        made = job()
        join(made, 0, on_worker_loss="continue")
        reply = join(made, 1, on_worker_loss="fail")
        assert isinstance(from_wire(reply.name, reply.text), StoreMismatch)
        assert "on_worker_loss 'continue', but rank 1 asks for" in reply.text
        assert "on_worker_loss 'fail'; all ranks must agree" in reply.text


def test_a_process_that_comes_after_a_loss_learns_of_it() -> None:
    made = job(joined=False)
    made.handle("server", 0, m.Register("a", 1, "s0", 1))
    made.disconnected("server", 0, "cause")
    taken(made)
    made.handle("worker", 0, m.Register("", 0, "w0", 1))
    assert taken(made) == [("worker", 0, m.Lost("server", 0, "s0", "cause"))]


def test_what_ends_after_the_last_goodbye_is_no_loss() -> None:
    made = job(1, 1)
    tell(made, 0, m.Goodbye())
    made.disconnected("server", 0, "it was told to stop")
    assert made.lost is None
    made.stop()
    assert taken(made) == [("server", 0, m.Stop())]


def test_a_server_that_said_goodbye_is_not_lost() -> None:
    made = job()
    made.handle("server", 0, m.Goodbye())
    made.disconnected("server", 0, "end of file")
    assert made.lost is None


@pytest.mark.parametrize(
    "message",
    [
        m.Register("", -1, "", 1),
        m.Register("", 1 << 16, "", 1),
        m.Register("h" * 300, 1, "", 1),
        m.Register("", 1, "n" * 300, 1),
    ],
)
def test_an_address_that_cannot_be_one_is_refused(message: m.Register) -> None:
    made = job(joined=False)
    with pytest.raises(ProtocolError, match="an address of server 0"):
        made.handle("server", 0, message)
    assert not made.has_joined("server", 0)


@pytest.mark.parametrize(
    "message",
    [
        m.JoinStore(1, "late", m.StorePolicy("sync"), "sum", "fail"),
        m.Goodbye(),
        m.Abandon("no"),
        m.Barrier(1, 1),
    ],
)
def test_nothing_comes_after_a_goodbye(message: Any) -> None:
    made = job()
    tell(made, 1, m.Goodbye())
    with pytest.raises(ProtocolError, match="which has said Goodbye"):
        tell(made, 1, message)
    assert made.lost is None


def test_who_has_left_a_store_is_not_heard_there() -> None:
    made = job()
    store = join(made, 0).store
    tell(made, 1, m.LeaveStore(1, store))
    spec = m.KeySpec("w", (2,), "float32", 4, False)
    for number in range(2, 5):
        assert tell(made, 1, m.ProposeInit(number, store, [spec])) == [closed(1, number)]
    assert made._stores[store]._waiting_inits == []
    assert tell(made, 1, m.GiveUp(store, 4)) == []
    assert tell(made, 1, m.LeaveStore(9, store)) == [("worker", 1, m.Done(9))]
    tell(made, 0, m.LeaveStore(1, store))
    assert tell(made, 0, m.Barrier(2, store)) == [closed(0, 2)]


def closed(rank: int, request: int) -> tuple[str, int, m.Failed]:
    text = "the store was closed by another thread during the call"
    return "worker", rank, m.Failed(request, "StoreClosed", text)


def test_calls_that_wait_end_when_another_thread_closes_the_store() -> None:
    made = job()
    store = join(made, 0).store
    for waiting in (
        m.ProposeInit(2, store, [m.KeySpec("w", (2,), "float32", 4, False)]),
        m.ProposeSetting(3, store, m.SettingRecord(None, UpdaterSpec(type="named", name="add"))),
        m.Barrier(4, store),
        m.Together(5, store, "save('x')", only_meet=True),
    ):
        assert tell(made, 1, waiting) == []
    told = tell(made, 1, m.LeaveStore(6, store))
    assert sorted(told[:-1], key=lambda each: each[2].request) == [closed(1, each) for each in range(2, 6)]
    assert told[-1] == ("worker", 1, m.Done(6))


def test_stores_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensorkv.scheduler.membership.MAX_STORES", 2)
    made = job()
    first = join(made, 0, "a").store
    join(made, 0, "b")
    refused = join(made, 0, "c")
    assert isinstance(from_wire(refused.name, refused.text), StoreMismatch)
    assert "close some first" in refused.text
    assert join(made, 1, "a") == m.Joined(1, first)
    for rank in range(2):
        tell(made, rank, m.LeaveStore(2, first))
    assert isinstance(join(made, 0, "c"), m.Joined)


def test_commits_that_make_no_sense_leave_nothing() -> None:
    made = job()
    store = join(made, 0).store
    made.handle("server", 0, m.CommitReady(77, 1, [], True, False, None))  # of no store
    made.handle("server", 0, m.CommitReady(store, 1, [], True, False, None))
    for message in (
        m.CommitReady(store, 2, [], True, False, None),
        m.CommitReady(store, 1, [-1.0], True, False, None),
    ):
        with pytest.raises(ProtocolError):
            made.handle("server", 1, message)
    for rank in range(2):
        tell(made, rank, m.LeaveStore(2, store))
    assert made._commits._ready == {}
    assert taken(made) == []


def test_workers_are_counted_that_have_come_and_that_are_there() -> None:
    of = job(joined=False)
    assert of.count_workers() == (0, 0)
    for rank in range(2):
        of.handle("server", rank, m.Register("here", 100 + rank, "s", 1))
    of.handle("worker", 1, m.Register("", 0, "w1", 1))
    assert of.count_workers() == (1, 1)
    of.handle("worker", 0, m.Register("", 0, "w0", 1))
    tell(of, 1, m.Goodbye())
    assert of.count_workers() == (2, 1)
    of.disconnected("worker", 0, "its connection ended")
    assert of.count_workers() == (2, 0)


def test_a_report_tells_who_is_absent_and_who_waits() -> None:
    made = job(joined=False)
    made.handle("worker", 1, m.Register("", 0, "w1", 1))
    assert made.report() == [f"{who} has not joined" for who in ("worker 0", "server 0", "server 1")]
    made = job()
    join(made, 1, "weights")
    tell(made, 1, m.Barrier(2, 1))
    assert made.report() == ["store 'weights': worker 1, in a barrier, waits for worker 0"]
