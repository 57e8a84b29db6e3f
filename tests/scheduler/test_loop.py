"""The scheduler and what its processes, and strangers, do to it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tensorkv.config import JobConfig
from tensorkv.errors import NotInJob, RankTaken
from tensorkv.scheduler import loop
from tensorkv.scheduler.loop import SchedulerServer
from tensorkv.transport.endpoint import connect
from tensorkv.wire import messages as m

DEADLINE_S = 20.0


@pytest.fixture(params=["inproc", "127.0.0.1"])
def scheduler(request: pytest.FixtureRequest) -> Iterator[SchedulerServer]:
    made = SchedulerServer(num_workers=2, num_servers=1, token="t", host=request.param)
    made.start()
    yield made
    made.stop()


@pytest.fixture
def member(scheduler: SchedulerServer, join_as: Callable[..., Any]) -> Callable[..., Any]:
    """Connect to the scheduler as a process of the job."""

    def join(role: Any, rank: int, register: bool = True) -> Any:
        host, port = scheduler.address
        config = JobConfig(
            role=role,
            rank=rank,
            num_workers=2,
            num_servers=1,
            scheduler_host=host,
            scheduler_port=port,
            token="t",
        )
        peer = join_as(config, scheduler.address, m.FromScheduler)
        if register:
            peer.say(m.Register("host", 7, "node", 1))
        return peer

    return join


@pytest.mark.parametrize("size", [(0, 1), (1, 0), (-1, 1)])
def test_a_job_has_workers_and_servers(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="a job needs workers and servers"):
        SchedulerServer(num_workers=size[0], num_servers=size[1], token="t")


def test_workers_are_welcome_once_all_servers_are_there(
    scheduler: SchedulerServer, member: Callable[..., Any]
) -> None:
    worker = member("worker", 0)
    member("server", 0)
    assert worker.hear() == m.Welcome([m.ServerAddress("host", 7)])
    assert member("worker", 1).hear() == m.Welcome([m.ServerAddress("host", 7)])
    assert scheduler.has_joined("worker", 1)
    assert not scheduler.has_joined("server", 1)
    assert scheduler.lost is None


@pytest.mark.parametrize("register", [True, False])
def test_a_place_is_given_away_once(member: Callable[..., Any], register: bool) -> None:
    """Also before its process has registered."""
    first = member("worker", 0, register)
    if register:
        member("server", 0)
        first.hear()  # the scheduler has taken in that it is there
    whom = "process 1 on host node" if register else "another process"
    with pytest.raises(RankTaken, match=f"worker 0 of this job is taken by {whom}; .* a rank of its own"):
        member("worker", 0)


@pytest.mark.parametrize(("role", "rank"), [("worker", 2), ("worker", -1), ("server", 1), ("scheduler", 0)])
def test_places_that_are_not_there(member: Callable[..., Any], role: str, rank: int) -> None:
    with pytest.raises(NotInJob, match=f"there is no {role} {rank} in this job"):
        member(role, rank)


@pytest.mark.parametrize("how", ["ends", "abandons", "talks nonsense", "says what is not its to say"])
def test_a_process_that_is_lost_is_told_to_the_others(
    scheduler: SchedulerServer, member: Callable[..., Any], caplog: pytest.LogCaptureFixture, how: str
) -> None:
    member("server", 0)
    workers = [member("worker", rank) for rank in range(2)]
    for each in workers:
        each.hear()
    with caplog.at_level(logging.WARNING):
        match how:
            case "ends":
                workers[1].connection.shutdown()
                cause = "its connection ended without a goodbye"
            case "abandons":
                workers[1].say(m.Abandon("it fell over"))
                cause = "it fell over"
            case "talks nonsense":
                workers[1].say(m.Flush(1, 1))
                cause = "its connection ended: a malformed message"
            case _:
                workers[1].say(m.Barrier(1, 1), b"payload")
                cause = "a payload of 7 bytes where none belongs"
        lost = workers[0].hear()
    assert (lost.role, lost.rank, lost.hostname) == ("worker", 1, "node")
    assert cause in lost.cause
    assert scheduler.lost == lost
    assert len(caplog.records) == (1 if how.startswith(("talks", "says")) else 0)


def test_a_message_that_cannot_be_handled_ends_its_process_only(
    scheduler: SchedulerServer,
    member: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    member("server", 0)
    workers = [member("worker", rank) for rank in range(2)]
    for each in workers:
        each.hear()
    real = scheduler._membership.handle

    def handle(role: Any, rank: int, message: Any) -> None:
        if isinstance(message, m.GiveUp):
            raise KeyError("a bug")
        real(role, rank, message)

    monkeypatch.setattr(scheduler._membership, "handle", handle)
    with caplog.at_level(logging.ERROR):
        workers[1].say(m.GiveUp(1, 1))
        lost = workers[0].hear()
    assert "could not handle its message: KeyError: 'a bug'" in lost.cause
    assert caplog.records[0].exc_info is not None
    workers[0].say(m.JoinStore(5, "default", m.StorePolicy("sync"), "sum", "fail"))
    assert workers[0].hear().request == 5


def test_a_goodbye_is_no_loss(scheduler: SchedulerServer, member: Callable[..., Any]) -> None:
    server, worker, other = member("server", 0), member("worker", 0), member("worker", 1)
    worker.say(m.Goodbye())
    worker.connection.shutdown()
    assert server.hear() == m.Gone(0)
    other.hear()
    other.say(m.JoinStore(5, "default", m.StorePolicy("sync"), "sum", "fail"))
    assert other.hear() == m.Joined(5, 1)
    assert scheduler.lost is None


def test_a_worker_that_never_joined_has_left(scheduler: SchedulerServer, member: Callable[..., Any]) -> None:
    server, worker = member("server", 0), member("worker", 0)
    worker.hear()
    scheduler.worker_exited(0)  # it has joined: what it says itself counts
    scheduler.worker_exited(1)
    assert server.hear() == m.Gone(1)
    worker.say(m.JoinStore(5, "default", m.StorePolicy("sync"), "sum", "fail"))
    number = worker.hear().store
    worker.say(m.Barrier(6, number))
    assert worker.hear() == m.Done(6)


def open_store(worker: Any, on_worker_loss: Any) -> int:
    worker.hear()
    worker.say(m.JoinStore(5, "default", m.StorePolicy("sync"), "sum", on_worker_loss))
    return int(worker.hear().store)


def test_a_worker_that_can_be_done_without_is_lost_to_the_others_only(
    scheduler: SchedulerServer, member: Callable[..., Any]
) -> None:
    server, worker, other = member("server", 0), member("worker", 0), member("worker", 1)
    store = open_store(worker, "continue")
    other.hear()
    worker.say(m.Barrier(6, store))
    other.say(m.Abandon("it fell over"))
    lost = m.WorkerLost(1, "node", "it fell over", [])
    assert server.hear() == lost
    assert worker.hear() == lost
    assert worker.hear() == m.Done(6)
    other.connection.shutdown()
    assert scheduler.worker_failed(1, "it ended with status 1")
    assert scheduler.lost is None
    with pytest.raises(RankTaken, match="worker 1 of this job is taken by .*, which is lost"):
        member("worker", 1)  # it cannot come back


@pytest.mark.parametrize("policy", ["continue", "fail"])
@pytest.mark.parametrize("goodbye", [True, False])
def test_what_the_launcher_saw_is_a_loss_also_of_one_that_said_goodbye(
    scheduler: SchedulerServer, member: Callable[..., Any], policy: str, goodbye: bool
) -> None:
    server, worker, other = member("server", 0), member("worker", 0), member("worker", 1)
    open_store(worker, policy)
    other.hear()
    if goodbye:
        other.say(m.Goodbye())
        assert server.hear() == m.Gone(1)
    other.connection.shutdown()
    goes_on = scheduler.worker_failed(1, "it ended with status 3")
    told = worker.hear()
    assert (goes_on, type(told)) == ((True, m.WorkerLost) if policy == "continue" else (False, m.Lost))
    assert told.rank == 1
    if goodbye:
        assert told.cause == "it ended with status 3"
    else:  # what the scheduler saw itself came first
        assert told.cause.startswith("its connection ended")


def test_a_worker_whose_connection_its_children_hold_is_lost_all_the_same(
    scheduler: SchedulerServer, member: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "LAST_WORDS_S", 0.01)
    member("server", 0)
    worker, other = member("worker", 0), member("worker", 1)
    open_store(worker, "continue")
    other.hear()
    assert scheduler.worker_failed(1, "it ended with status 137 (SIGKILL)")
    assert worker.hear() == m.WorkerLost(1, "node", "it ended with status 137 (SIGKILL)", [])


def test_the_job_does_not_go_on_without_one_that_never_joined(
    scheduler: SchedulerServer, member: Callable[..., Any]
) -> None:
    member("server", 0)
    open_store(member("worker", 0), "continue")
    assert not scheduler.worker_failed(1, "it ended with status 1")
    assert scheduler.lost is None  # nobody waits in vain for a process that the launcher ends now


def test_servers_are_told_that_the_job_is_over(
    scheduler: SchedulerServer, member: Callable[..., Any]
) -> None:
    server = member("server", 0)
    worker = member("worker", 0)
    worker.hear()
    scheduler.stop()
    assert server.hear() == m.Stop()
    with pytest.raises((EOFError, ConnectionError)):
        worker.hear()
    assert scheduler.lost is None


def test_strangers_are_refused_with_one_line(
    scheduler: SchedulerServer, member: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        stranger = connect(*scheduler.address, DEADLINE_S)
        stranger.send(b"GET / HTTP/1.1\r\n" + bytes(16))

        def until_the_end() -> None:
            while True:
                stranger.receive(lambda body, payload_bytes: [])

        with pytest.raises((EOFError, ConnectionError)):
            until_the_end()
    stranger.close()
    assert len(caplog.records) == 1
    assert "refused" in caplog.text
    member("server", 0)
    assert member("worker", 0).hear() == m.Welcome([m.ServerAddress("host", 7)])


def test_who_asks_and_does_not_read_is_ended_with_one_line(
    scheduler: SchedulerServer, member: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Else its answers would fill the scheduler's memory."""
    if scheduler.address[0] == "inproc":
        pytest.skip("within a process nothing waits to be sent")
    member("server", 0)
    workers = [member("worker", rank) for rank in range(2)]
    for each in workers:
        each.hear()
    workers[0].say(m.JoinStore(1, "default", m.StorePolicy("sync"), "sum", "fail"))
    store = workers[0].hear().store
    keys = [m.KeySpec(f"{number:01000}", (2,), "float32", 4, False) for number in range(100)]
    workers[0].say(m.ProposeInit(2, store, keys))
    entries = workers[0].hear().entries
    workers[0].say(m.ConcludeInit(3, store, [each.key_id for each in entries], None))
    assert workers[0].hear() == m.Done(3)
    scheduler._peers["worker", 1].sender._max_frames = 10
    with caplog.at_level(logging.WARNING):
        with contextlib.suppress(ConnectionError):
            for number in range(1000):  # 100 KB each
                workers[1].say(m.Lookup(number, store, None))
        lost = workers[0].hear()
    assert (lost.role, lost.rank) == ("worker", 1)
    assert len(caplog.records) == 1, caplog.text
    assert "it does not read: more than 10 frames" in caplog.text


def test_strangers_without_end_do_not_keep_a_process_out(
    scheduler: SchedulerServer, member: Callable[..., Any]
) -> None:
    scheduler._newcomers._limit = 5
    strangers = [connect(*scheduler.address, DEADLINE_S) for _ in range(40)]
    member("server", 0)
    assert member("worker", 0).hear() == m.Welcome([m.ServerAddress("host", 7)])
    assert len(scheduler._newcomers._here) <= 5
    for stranger in strangers:
        stranger.shutdown()
        stranger.close()
