"""A server and what strangers, broken workers and a broken job do to it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tensorkv.config import JobConfig
from tensorkv.errors import AuthenticationError, PeerLostError, RankTaken
from tensorkv.launch.cluster import LocalCluster
from tensorkv.peer.handshake import introduce
from tensorkv.server import loop
from tensorkv.server.loop import Server
from tensorkv.transport.base import Connection
from tensorkv.transport.endpoint import connect
from tensorkv.transport.inproc import InprocConnection
from tensorkv.wire import messages as m
from tensorkv.wire.codec import PREFIX, encode

DEADLINE_S = 20.0
TINY = [m.SliceEntry(1, 0, 0, 2)]


@pytest.fixture(params=["inproc", "127.0.0.1"])
def cluster(request: pytest.FixtureRequest) -> Iterator[LocalCluster]:
    made = LocalCluster(3, 1, host=request.param, timeout_s=DEADLINE_S)
    yield made
    made.stop()


@pytest.fixture
def worker(cluster: LocalCluster, join_as: Callable[..., Any]) -> Callable[[int], Any]:
    """Connect to the server as a worker."""

    def join(rank: int) -> Any:
        config, address = cluster.config("worker", rank), cluster.servers[0].addresses[0]
        return join_as(config, address, m.FromServer)

    return join


def open_store(peer: Any) -> None:
    peer.say(m.OpenStore(1, "default", m.StorePolicy("sync"), False))
    peer.say(m.Flush(1, 1))
    assert peer.hear() == m.Done(1)


def until_the_end(connection: Connection) -> list[bytes]:
    """Receive until the other side ends the connection; return the messages that came."""
    said: list[bytes] = []

    def sink(body: memoryview, payload_bytes: int) -> list[memoryview]:
        said.append(bytes(body))
        return [memoryview(bytearray(payload_bytes))] if payload_bytes else []

    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            connection.receive(sink)
    return said


def lives(peer: Any) -> None:
    """Assert that the server still answers this worker."""
    peer.say(m.Flush(99, 1))
    assert peer.hear() == m.Done(99)


HUGE = m.ChunkEntry([1], [1 << 60], m.PayloadDescriptor("dense", "float32"), [1])
CHUNK = m.ChunkEntry([1], [2], m.PayloadDescriptor("dense", "float32"), [1])
NONSENSE = {
    "a push to an undefined plan": ([m.Push(7, 0, True, 0)], b"12345678", "has not defined plan 7"),
    "a pull of an undefined plan": ([m.Pull(7, 1)], b"", "has not defined plan 7"),
    "a chunk that is not there": ([m.DefinePlan(1, 1, [CHUNK]), m.Push(1, 5, True, 0)], b"", "no chunk 5"),
    "a payload that is too short": (
        [m.DefinePlan(1, 1, [CHUNK]), m.Push(1, 0, True, 0)],
        b"1234",
        "came with 4 bytes of payload, not 8",
    ),
    "a payload where none belongs": ([m.Flush(1, 1)], b"1234", "came with 4 bytes of payload, not 0"),
    "a store that is not open": ([m.Flush(1, 5)], b"", "store 5 is not open"),
    "a slice outside its value": (
        [m.InitSlices(1, 1, "v", (2,), "float32", [m.SliceEntry(9, 0, 1, 3)])],
        b"12345678",
        "slice",
    ),
    "a dtype that does not exist": ([m.InitSlices(1, 1, "v", (2,), "float1", TINY)], b"12345678", "float1"),
    "an init of petabytes": (
        [m.InitSlices(1, 1, "v", (1 << 51,), "float32", [m.SliceEntry(9, 0, 0, 1 << 51)])],
        b"",
        "over the",
    ),
    "a shape with an overflowing product": (
        [m.InitSlices(1, 1, "v", (1 << 40, 1 << 40), "float32", TINY)],
        b"",
        "more elements than can be numbered",
    ),
    "a plan of absurd lengths": ([m.DefinePlan(1, 1, [HUGE])], b"", "a chunk of 4611686018427387904 bytes"),
    "a chunk without slices": (
        [m.DefinePlan(1, 1, [m.ChunkEntry([], [], m.PayloadDescriptor("dense", "int8"), [])])],
        b"",
        "without slices",
    ),
    "a store of another policy": (
        [m.OpenStore(1, "default", m.StorePolicy("async"), False)],
        b"",
        "another policy",
    ),
    "a message of another conversation": ([m.Goodbye()], b"", "malformed message"),
    "a segment, where memory cannot be shared": ([m.ShareSegment(0, 65536)], b"", "shared memory, over a"),
    "a segment dropped, where memory cannot be shared": ([m.DropSegment(1)], b"", "shared memory, over a"),
    "a push in shared memory, where there is none": (
        [m.DefinePlan(1, 1, [CHUNK]), m.Push(1, 0, True, 0, m.Placed(0, [(1, 0, 8)]))],
        b"",
        "a push in shared memory",
    ),
    "a plan that was not defined is dropped": ([m.DropPlan(3)], b"", "has not defined plan 3"),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_ends_one_connection_with_one_line(
    worker: Callable[[int], Any], caplog: pytest.LogCaptureFixture, case: str
) -> None:
    messages, payload, text = NONSENSE[case]
    one, other = worker(0), worker(1)
    open_store(one)
    open_store(other)
    other.say(m.InitSlices(2, 1, "w", (2,), "float32", TINY), bytes(8))
    other.hear()
    with caplog.at_level(logging.WARNING):
        for message in messages[:-1]:
            one.say(message)
        one.say(messages[-1], *([payload] if payload else []))
        with pytest.raises((EOFError, ConnectionError)):
            one.hear()
        lives(other)
    assert len(caplog.records) == 1, caplog.text
    assert "worker 0" in caplog.text
    assert text in caplog.text


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"GET / HTTP/1.1\r\n\r\n" + bytes(14), "does not speak TensorKV"),
        (PREFIX.pack(b"TKV", 1, (64 << 20) + 1, 0), "over the limit"),
        (PREFIX.pack(b"TKV", 9, 0, 0), "version 9"),
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_bytes_that_are_no_frame(
    worker: Callable[[int], Any],
    cluster: LocalCluster,
    caplog: pytest.LogCaptureFixture,
    raw: bytes,
    text: str,
    known: bool,
) -> None:
    """From a worker and from a stranger."""
    other = worker(1)
    open_store(other)
    if known:
        connection = worker(0).connection
    else:
        connection = connect(*cluster.servers[0].addresses[0], DEADLINE_S)
    with caplog.at_level(logging.WARNING):
        connection.send(raw)
        until_the_end(connection)  # a stranger is sent a Challenge first
        lives(other)
    assert len(caplog.records) == 1, caplog.text
    assert text in caplog.text
    connection.shutdown()
    connection.close()


def test_the_memory_of_an_init_is_not_kept(worker: Callable[[int], Any], cluster: LocalCluster) -> None:
    """Nothing else of its size may ever come: a server would hold large values twice."""
    one = worker(0)
    open_store(one)
    value = bytes(range(200)) * 4
    one.say(m.InitSlices(2, 1, "v", (200,), "float32", [m.SliceEntry(1, 0, 0, 200)]), value)
    assert one.hear() == m.Done(2)
    server = cluster.servers[0]
    assert not any(server._pool._free.values())
    assert not server._peers[0].buffer.bytes
    plan = m.ChunkEntry([1], [200], m.PayloadDescriptor("dense", "float32"), [1])
    one.say(m.DefinePlan(1, 1, [plan]))
    one.say(m.Pull(1, 3))
    assert one.hear() == m.Data(3, 0)


def test_the_memory_of_a_push_that_does_not_come_whole_is_given_back(
    worker: Callable[[int], Any], cluster: LocalCluster
) -> None:
    if cluster.config("worker", 0).host == "inproc":
        pytest.skip("within a process frames come whole")
    one, other = worker(0), worker(1)
    open_store(one)
    open_store(other)
    one.say(m.InitSlices(2, 1, "w", (1 << 20,), "float32", [m.SliceEntry(1, 0, 0, 1 << 20)]), bytes(4 << 20))
    one.hear()
    one.say(m.DefinePlan(1, 1, [m.ChunkEntry([1], [1 << 20], m.PayloadDescriptor("dense", "float32"), [1])]))
    one.connection.send(encode(m.Push(1, 0, True, 0), 4 << 20), [bytes(100_000)])
    one.connection.shutdown()
    server = cluster.servers[0]
    give, given = server._pool.give, threading.Event()

    def note(buffer: Any) -> None:
        give(buffer)
        given.set()

    server._pool.give = note  # type: ignore[method-assign]
    if not any(server._pool._free.values()):
        assert given.wait(DEADLINE_S)
    assert [len(each.bytes) for free in server._pool._free.values() for each in free] == [4 << 20]
    lives(other)


def test_no_memory_for_a_payload_ends_one_connection_with_one_line(
    worker: Callable[[int], Any],
    cluster: LocalCluster,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = worker(0), worker(1)
    open_store(one)
    open_store(other)
    monkeypatch.setattr(cluster.servers[0]._state, "_max_payload_bytes", 1 << 62)
    with caplog.at_level(logging.WARNING):
        entries = [m.SliceEntry(9, 0, 0, 1 << 58)]
        one.connection.send(encode(m.InitSlices(1, 1, "v", (1 << 58,), "float32", entries), 1 << 60))
        with pytest.raises((EOFError, ConnectionError)):
            one.hear()
        lives(other)
    if cluster.config("worker", 0).host != "inproc":  # there, a payload is taken at its true length
        assert "no memory for a payload" in caplog.text
    assert len(caplog.records) == 1, caplog.text
    assert caplog.records[0].exc_info is None


def test_who_asks_and_does_not_read_is_ended_with_one_line(
    worker: Callable[[int], Any], cluster: LocalCluster, caplog: pytest.LogCaptureFixture
) -> None:
    """Else its answers would fill the server's memory."""
    if cluster.config("worker", 0).host == "inproc":
        pytest.skip("within a process nothing waits to be sent")
    one, other = worker(0), worker(1)
    open_store(one)
    open_store(other)
    server = cluster.servers[0]
    server._peers[0].sender._max_frames = 20
    one.say(m.InitSlices(2, 1, "v", (1 << 20,), "float32", [m.SliceEntry(1, 0, 0, 1 << 20)]), bytes(4 << 20))
    assert one.hear() == m.Done(2)
    one.say(m.DefinePlan(1, 1, [m.ChunkEntry([1], [1 << 20], m.PayloadDescriptor("dense", "float32"), [1])]))
    with caplog.at_level(logging.WARNING):
        with contextlib.suppress(ConnectionError):  # the later ones find it ended
            for number in range(200):
                one.say(m.Pull(1, 10 + number))
        until_the_end(one.connection)
        lives(other)
    assert len(caplog.records) == 1, caplog.text
    assert "worker 0: it does not read: more than 20 frames" in caplog.text


def test_a_worker_that_has_gone_without_its_answers_is_the_schedulers_to_tell(
    worker: Callable[[int], Any],
    cluster: LocalCluster,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = worker(0), worker(1)
    open_store(one)
    open_store(other)
    state, gone = cluster.servers[0]._state, threading.Event()
    handle = state.handle

    def handle_later(*arguments: Any) -> Any:
        assert gone.wait(DEADLINE_S)
        return handle(*arguments)

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(state, "handle", handle_later)
        for number in range(3):
            one.say(m.Flush(2 + number, 1))
        one.connection.shutdown()
        gone.set()
        while not cluster.servers[0]._peers[0].ended:
            lives(other)
    assert "this side has ended" not in caplog.text


def test_a_fault_of_ours_ends_one_connection_and_shows_where(
    worker: Callable[[int], Any],
    cluster: LocalCluster,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = worker(0), worker(1)
    open_store(one)
    open_store(other)
    state = cluster.servers[0]._state

    def fail(*arguments: Any) -> Any:
        raise KeyError("a bug")

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(state, "handle", fail)
        one.say(m.Flush(2, 1))
        with pytest.raises((EOFError, ConnectionError)):
            one.hear()
    assert caplog.records[0].exc_info is not None
    lives(other)


@pytest.mark.parametrize(
    ("role", "rank", "text"),
    [
        ("worker", 3, "there is no worker 3"),
        ("worker", -1, "there is no worker -1"),
        ("server", 0, "there is no server 0"),
    ],
)
def test_places_that_are_not_there(
    cluster: LocalCluster, join_as: Callable[..., Any], role: Any, rank: int, text: str
) -> None:
    with pytest.raises(AuthenticationError, match=text):
        join_as(cluster.config(role, rank), cluster.servers[0].addresses[0], m.FromServer)


def test_a_place_is_given_away_once(worker: Callable[[int], Any]) -> None:
    first = worker(2)
    with pytest.raises(RankTaken, match="worker 2 is connected already"):
        worker(2)
    open_store(first)


def test_a_replayed_handshake_is_refused_with_one_line(
    cluster: LocalCluster, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever has seen a worker prove itself has nothing to prove itself with."""
    address = cluster.servers[0].addresses[0]
    first = connect(*address, DEADLINE_S)
    seen: list[bytes] = []
    real = first.send

    def send(head: bytes, *rest: Any) -> None:
        seen.append(bytes(head))
        real(head, *rest)

    first.send = send  # type: ignore[method-assign]
    introduce(first, cluster.config("worker", 0).token, "worker", 0)
    with caplog.at_level(logging.WARNING):
        replay = connect(*address, DEADLINE_S)
        replay.send(seen[0])
        said = until_the_end(replay)
    assert b"AuthenticationError" in said[-1]
    assert len(caplog.records) == 1, caplog.text
    assert "does not hold the token" in caplog.text
    for each in (first, replay):
        each.shutdown()
        each.close()


def test_a_stranger_that_says_nothing_is_dropped_with_one_line(
    cluster: LocalCluster,
    worker: Callable[[int], Any],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tensorkv.peer.handshake.HANDSHAKE_TIMEOUT_S", 0.0)
    with caplog.at_level(logging.WARNING):
        stranger = connect(*cluster.servers[0].addresses[0], DEADLINE_S)
        stranger.receive(lambda body, payload_bytes: [])  # the Challenge
        until_the_end(stranger)
    assert len(caplog.records) == 1, caplog.text
    assert "did not finish within" in caplog.text
    stranger.shutdown()
    stranger.close()


def test_strangers_without_end_do_not_keep_a_worker_out(
    cluster: LocalCluster, worker: Callable[[int], Any], caplog: pytest.LogCaptureFixture
) -> None:
    server = cluster.servers[0]
    server._newcomers._limit = 5
    before = threading.active_count()
    strangers = [connect(*server.addresses[0], DEADLINE_S) for _ in range(40)]
    with caplog.at_level(logging.WARNING):
        one = worker(0)
        open_store(one)
    assert len(server._newcomers._here) <= 5
    assert threading.active_count() - before <= 5 + 2 + 3  # also those that are just ending, and the worker's
    assert len(caplog.records) <= 40
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    for stranger in strangers:
        stranger.shutdown()
        stranger.close()


def test_stop_with_strangers_and_workers_connected(
    cluster: LocalCluster, worker: Callable[[int], Any]
) -> None:
    """Nothing is left, whoever is in which state: the suite looks for threads and sockets."""
    worker(0)
    strangers = [connect(*cluster.servers[0].addresses[0], DEADLINE_S) for _ in range(2)]
    strangers += [connect(*cluster.scheduler.address, DEADLINE_S) for _ in range(2)]
    cluster.stop()
    cluster.stop()
    for stranger in strangers:
        stranger.shutdown()
        stranger.close()


def test_a_server_ends_with_its_scheduler() -> None:
    cluster = LocalCluster(1, 1, host="127.0.0.1", timeout_s=DEADLINE_S)
    job = cluster.join(0)
    cluster.scheduler._peers["server", 0].connection.shutdown()  # as if the scheduler's host had gone
    failure = cluster.servers[0].wait()
    assert isinstance(failure, PeerLostError)
    assert "the scheduler on host 127.0.0.1 is gone: " in str(failure)
    job.close(m.Goodbye())
    cluster.stop()


def test_a_server_ends_when_a_process_is_lost() -> None:
    cluster = LocalCluster(2, 1, timeout_s=DEADLINE_S)
    job = cluster.join(0)
    job.close(m.Abandon("it fell over"))
    failure = cluster.servers[0].wait()
    assert "worker 0" in str(failure)
    assert "it fell over" in str(failure)
    cluster.stop()


def lose(cluster: LocalCluster, rank: int, **fields: Any) -> None:
    """Let the scheduler say that a worker is lost."""
    peer = cluster.scheduler._peers["server", 0]
    peer.sender.put([encode(m.WorkerLost(rank, "host", "cause", fields.get("dropped", [])))])
    peer.sender.pump()


@pytest.fixture
def registered(cluster: LocalCluster) -> Iterator[LocalCluster]:
    """A cluster whose server the scheduler knows."""
    job = cluster.join(2)
    yield cluster
    job.close(m.Goodbye())


def test_of_a_lost_worker_all_that_has_come_counts_and_nothing_after(
    registered: LocalCluster,
    worker: Callable[[int], Any],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = worker(0), worker(1)
    lose(registered, 2)
    open_store(one)
    one.say(m.InitSlices(2, 1, "w", (2,), "float32", TINY), bytes(8))
    one.hear()
    open_store(other)
    server = registered.servers[0]
    with caplog.at_level(logging.WARNING):
        for peer in (one, other):
            peer.say(m.DefinePlan(1, 1, [CHUNK]))
        one.say(m.Push(1, 0, True, 0), np.ones(2, np.float32).tobytes())
        lives(one)
        read = server._read

        def read_late(peer: Any, to_the_end: bool = False) -> bool:
            """Leave what worker 1 sends from now on where it is, until it is lost."""
            return (peer.worker != 1 or to_the_end) and read(peer, to_the_end)

        monkeypatch.setattr(server, "_read", read_late)
        for _ in range(loop.FRAMES_PER_TURN + 4):
            other.say(m.Flush(9, 1))
        other.say(m.Push(1, 0, True, 0), np.full(2, 10, np.float32).tobytes())
        whole = encode(m.Push(1, 0, True, 0), 8)
        if not isinstance(other.connection, InprocConnection):  # there, frames come whole
            other.connection.send(whole[:-2])
        lose(registered, 1)
        one.say(m.Pull(1, 3))
        assert one.hear() == m.Data(3, 0)
        assert np.frombuffer(one.heard, np.float32).tolist() == [11.0, 11.0]

        def until_the_end() -> None:
            while True:
                other.hear()

        with pytest.raises((EOFError, ConnectionError)):
            until_the_end()
    assert caplog.records == []


def test_a_lost_worker_that_sends_on_does_not_hold_the_others_up(
    registered: LocalCluster,
    worker: Callable[[int], Any],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = worker(0), worker(1)
    open_store(one)
    open_store(other)
    server = registered.servers[0]
    read = server._read

    def read_more(peer: Any, to_the_end: bool = False) -> bool:
        """As if worker 1 had always sent more."""
        return read(peer, to_the_end) or (peer.worker == 1 and to_the_end)

    monkeypatch.setattr(server, "_read", read_more)
    monkeypatch.setattr(loop, "LAST_WORDS_S", 0.0)
    with caplog.at_level(logging.WARNING):
        lose(registered, 1)
        until_the_end(other.connection)
        lives(one)
    assert [record.getMessage() for record in caplog.records] == [
        "server 0: worker 1 is lost, and sends on: no more of it is read"
    ]


def test_a_lost_worker_is_let_in_no_more(registered: LocalCluster, worker: Callable[[int], Any]) -> None:
    one = worker(0)
    open_store(one)
    lose(registered, 1)
    for number in range(5):  # the server has taken that in
        one.say(m.Flush(number, 1))
        assert one.hear() == m.Done(number)
    other = worker(1)
    with pytest.raises((EOFError, ConnectionError)):
        other.hear()
    lives(one)


def test_a_server_ends_in_good_order_with_the_job() -> None:
    cluster = LocalCluster(1, 1, timeout_s=DEADLINE_S)
    try:
        cluster.join(0).close(m.Goodbye())  # by then the server has registered, so that `stop` reaches it
        cluster.scheduler.stop()
        assert cluster.servers[0].wait() is None
    finally:
        cluster.stop()


def test_a_fault_while_the_scheduler_speaks_ends_the_server(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = cluster.servers[0]
    job = cluster.join(0)  # then the server is there, too

    def fail(decision: Any) -> Any:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(server._state, "decide_commit", fail)
    peer = cluster.scheduler._peers["server", 0]
    peer.sender.put([encode(m.CommitDecision(1, 1, True, 0.0, None))])
    peer.sender.pump()
    failure = server.wait()
    assert "ZeroDivisionError: a bug" in str(failure)
    job.close(m.Goodbye())


def test_a_loop_that_ends_in_any_way_ends_the_server(
    worker: Callable[[int], Any],
    cluster: LocalCluster,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Else its workers would wait for their deadlines: an optimizer of the user that calls sys.exit, say."""

    def leave(*arguments: Any) -> Any:
        raise SystemExit(4)

    monkeypatch.setattr(cluster.servers[0]._state, "handle", leave)
    peer = worker(0)
    peer.say(m.Flush(1, 1))
    assert "SystemExit: 4" in str(cluster.servers[0].wait())
    assert until_the_end(peer.connection) == []  # a server that is a thread of the worker tells it, too
    assert "cannot go on" in caplog.text


def test_a_server_that_cannot_join_leaves_nothing() -> None:
    cluster = LocalCluster(1, 1, host="127.0.0.1", timeout_s=DEADLINE_S)
    taken = Server(cluster.config("server", 0), lambda record: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(RankTaken, match="server 0 of this job is taken"):
        taken.start()
    taken.stop()
    cluster.stop()


# ---- the process -------------------------------------------------------------------------------------


def test_main_outside_a_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert loop.main() == 1
    assert "tensorkv server: a server process is started by `tensorkv run" in capsys.readouterr().err


@pytest.mark.e2e
def test_the_module_outside_a_job() -> None:
    command = [sys.executable, "-m", "tensorkv.server.loop"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "tensorkv server: a server process is started by `tensorkv run -n WORKERS -s SERVERS ...`"
    ]


@pytest.fixture
def in_job(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[JobConfig], None]]:
    before = {each: signal.getsignal(each) for each in (signal.SIGUSR1, signal.SIGTERM)}
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)  # this process is not the server's

    def enter(config: JobConfig) -> None:
        os.environ.update(config.to_env())

    yield enter
    for signum, handler in before.items():
        signal.signal(signum, handler)


def test_main_serves_until_the_job_is_over(
    in_job: Callable[[JobConfig], None], capsys: pytest.CaptureFixture[str]
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from tensorkv.scheduler.loop import SchedulerServer
    from tensorkv.worker.session import Session

    for last_words, status in ((m.Goodbye(), 0), (m.Abandon("it fell over"), 1)):
        scheduler = SchedulerServer(num_workers=1, num_servers=1, token="t")
        scheduler.start()
        host, port = scheduler.address
        places = {
            role: JobConfig(
                role=role,  # type: ignore[arg-type]
                rank=0,
                num_workers=1,
                num_servers=1,
                scheduler_host=host,
                scheduler_port=port,
                token="t",
            )
            for role in ("worker", "server")
        }
        in_job(places["server"])
        with ThreadPoolExecutor(1) as pool:
            ended = pool.submit(loop.main)
            Session(places["worker"]).close(last_words)
            if status == 0:
                scheduler.stop()
            assert ended.result(DEADLINE_S) == status
        scheduler.stop()
    assert "tensorkv server 0: worker 0 on host" in capsys.readouterr().err


def test_main_without_a_scheduler(
    in_job: Callable[[JobConfig], None], capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = LocalCluster(1, 1, host="127.0.0.1")
    cluster.stop()
    in_job(cluster.config("server", 0))
    assert loop.main() == 1
    assert "the scheduler at 127.0.0.1" in capsys.readouterr().err


def test_a_system_without_shared_memory_is_served_over_tcp(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line says so, and why."""
    monkeypatch.setattr(loop.unix, "why_not", lambda: "this system has none")
    cluster = LocalCluster(1, 1, host="127.0.0.1")
    assert len(cluster.servers[0].addresses) == 1
    cluster.stop()
    assert caplog.messages == ["server 0: workers of this host are served over TCP: this system has none"]


def test_the_heap_is_trimmed_if_the_process_is_the_servers(cluster: LocalCluster) -> None:
    server = cluster.servers[0]
    assert server._trim is None  # it is a thread of somebody else's process
    trimmed = threading.Event()
    server._trim_at_s, server._trim = 0.0, trimmed.set
    assert trimmed.wait(DEADLINE_S)
