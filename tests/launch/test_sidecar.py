"""The process that keeps scheduler and servers beside workers that know nothing of them."""

from __future__ import annotations

import dataclasses
import os
import secrets
import select
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from tensorkv.config import JobConfig
from tensorkv.errors import PeerLostError, RankTaken
from tensorkv.launch import processes
from tensorkv.launch import sidecar as module
from tensorkv.launch.sidecar import JobRecord, Sidecar
from tensorkv.peer.code import updater_loader
from tensorkv.server.loop import Server
from tensorkv.wire import messages as m
from tensorkv.worker.session import Session
from tensorkv.worker.signals import handles

DEADLINE_S = 50.0


def config(**changes: object) -> JobConfig:
    plain = JobConfig(
        role="scheduler", rank=0, num_workers=2, num_servers=1, scheduler_host="", scheduler_port=0, token=""
    )
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


class Parent:
    """A process that the sidecar takes for the worker that started it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
        self.pidfd = os.pidfd_open(self._process.pid)

    def end(self) -> None:
        self._process.communicate(timeout=DEADLINE_S)

    def __enter__(self) -> Parent:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        os.close(self.pidfd)


@contextmanager
def running(sidecar: Sidecar, parent: Parent) -> Iterator[threading.Thread]:
    """Run a sidecar in a thread; it ends with the parent at the latest."""
    thread = threading.Thread(target=sidecar.run, args=(parent.pidfd,))
    thread.start()
    try:
        yield thread
    finally:
        parent.end()
        thread.join(DEADLINE_S)
        assert not thread.is_alive(), "the sidecar stays"


def worker(sidecar: Sidecar, rank: int) -> Session:
    return Session(dataclasses.replace(sidecar.config, role="worker", rank=rank))


def test_it_makes_a_token_that_only_this_user_can_read() -> None:
    with Sidecar(config(), (), {}) as sidecar:
        sidecar.write_token()
        path = Path(sidecar.token_file)
        assert os.readlink(path).startswith("/memfd:"), "nobody need remove it, however this process ends"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.read_text() == sidecar.config.token
        assert len(sidecar.config.token) == 64
    assert not path.exists()


def test_a_token_that_is_given_stays() -> None:
    with Sidecar(config(token="given"), (), {}) as sidecar:
        assert sidecar.config.token == "given"


@contextmanager
def server(sidecar: Sidecar) -> Iterator[None]:
    """A server of the job, as threads of this process."""
    threads = Server(dataclasses.replace(sidecar.config, role="server"), updater_loader(()))
    threads.start()
    try:
        yield
    finally:
        threads.stop()


def test_it_stays_until_all_have_left_although_its_parent_is_gone() -> None:
    with Parent() as parent, Sidecar(config(), (), {}) as sidecar:
        sidecar.write_token()
        path = sidecar.token_file
        with running(sidecar, parent), server(sidecar):
            first, other = worker(sidecar, 0), worker(sidecar, 1)
            first.close(m.Goodbye())
            parent.end()
            assert other.failure() is None, "one has not left yet"
            with pytest.raises(RankTaken, match="worker 1"):  # who comes too many can still read the token
                worker(sidecar, 1)
            assert os.path.exists(path)
            other.close(m.Goodbye())
    assert not os.path.exists(path)


def test_a_lost_worker_ends_the_job() -> None:
    with Parent() as parent, Sidecar(config(), (), {}) as sidecar, running(sidecar, parent), server(sidecar):
        first, other = worker(sidecar, 0), worker(sidecar, 1)
        first.close(m.Abandon("for a test"))
        parent.end()

        def wait_for_the_first() -> None:
            opened = m.JoinStore(0, "default", m.StorePolicy("sync"), "sum", "fail")
            for message in (opened, m.Barrier(0, 1)):
                other.control.request(
                    lambda number, message=message: msgspec.structs.replace(message, request=number),
                    "a call",
                    DEADLINE_S,
                )

        with pytest.raises(PeerLostError, match="worker 0"):  # of the call that is under way then
            wait_for_the_first()
        other.close(m.Abandon("for a test"))


@pytest.mark.parametrize("rank", [0, 1])
def test_nobody_joins_a_job_whose_starter_is_gone(rank: int) -> None:
    """Not even in the moment before the sidecar has noticed: who comes is of the launcher's next attempt."""
    with Parent() as parent, Sidecar(config(), (), {}, parent.pidfd) as sidecar, server(sidecar):
        parent.end()
        with pytest.raises(PeerLostError, match="the job is over: worker 0"):
            worker(sidecar, rank)


def test_who_comes_late_may_join_when_worker_0_has_left_until_there_is_another() -> None:
    with Parent() as parent, Sidecar(config(), (), {}, parent.pidfd) as sidecar, server(sidecar):
        worker(sidecar, 0).close(m.Goodbye())
        parent.end()
        late = worker(sidecar, 1)
        with pytest.raises(PeerLostError, match="the job is over: worker 0"):
            worker(sidecar, 0)
        while late.failure() is None:
            os.sched_yield()
        assert "was lost: its process has ended" in str(late.failure())
        late.close(m.Abandon("for a test"))


def test_it_does_not_outlive_a_parent_that_never_joined() -> None:
    with Parent() as parent, Sidecar(config(), (), {}) as sidecar, running(sidecar, parent):
        pass


def test_those_who_never_joined_are_waited_for_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINGER_S", 0.0)
    with Parent() as parent, Sidecar(config(), (), {}) as sidecar, running(sidecar, parent), server(sidecar):
        worker(sidecar, 0).close(m.Goodbye())


def test_a_server_that_fails_at_its_start_is_a_lost_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "shielded", lambda argv, environ: ["false"])
    with Parent() as parent, Sidecar(config(), (0,), os.environ) as sidecar:
        sidecar.start_servers()
        with running(sidecar, parent), pytest.raises(PeerLostError, match="server 0"):
            worker(sidecar, 0)


def test_a_keeper_without_a_scheduler_ends_with_its_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "shielded", lambda argv, environ: ["true"])
    elsewhere = config(scheduler_host="127.0.0.1", scheduler_port=1, token="t")
    with Parent() as parent, Sidecar(elsewhere, (0,), os.environ) as sidecar:
        sidecar.start_servers()
        sidecar.run(parent.pidfd)


ASKED = """
import os, signal
signal.signal(signal.SIGUSR1, lambda *_: os._exit(os.write(2, b"asked\\n") - 6))
signal.pause()
"""
NOT_YET = "import signal; signal.pause()"


def test_it_tells_who_waits_and_has_its_servers_tell(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    scripts = iter([ASKED, NOT_YET])
    monkeypatch.setattr(processes, "shielded", lambda argv, environ: [sys.executable, "-c", next(scripts)])
    with Parent() as parent, Sidecar(config(num_servers=2), (0, 1), os.environ) as sidecar:
        sidecar.start_servers()
        asked, not_yet = sidecar._servers.values()
        with running(sidecar, parent):
            while not handles(asked.pid, signal.SIGUSR1):
                assert asked.poll() is None
            sidecar.ask_report()
            assert asked.wait(DEADLINE_S) == 0
            assert not_yet.poll() is None, "it would be killed by this signal"
    absent = ("worker 0", "worker 1", "server 0", "server 1")
    told = [*(f"tensorkv: {each} has not joined" for each in absent), "asked"]
    assert capfd.readouterr().err.splitlines() == told


def test_servers_that_nobody_tells_are_asked_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import signal; signal.pause()"
    monkeypatch.setattr(processes, "shielded", lambda argv, environ: [sys.executable, "-c", script])
    monkeypatch.setattr(module, "SERVER_STOP_S", DEADLINE_S)
    with Sidecar(config(scheduler_port=1, token="t"), (0, 1), os.environ) as sidecar:
        sidecar.start_servers()
    assert {server.returncode for server in sidecar._servers.values()} == {-signal.SIGTERM}


STARTER = """
import os, sys
import msgspec
from tensorkv.config import from_env
from tensorkv.launch.torchrun import start_sidecar

record = start_sidecar(from_env(), range(1), os.environ)
print(msgspec.json.encode(record).decode(), flush=True)
sys.stdin.read()
"""


@contextmanager
def starter() -> Iterator[tuple[subprocess.Popen[bytes], JobRecord, list[int]]]:
    """A process that has started a sidecar; what that reported; pidfds of the sidecar and of its server."""
    environ = {**os.environ, **config(token=secrets.token_hex(8)).to_env()}
    command = [sys.executable, "-c", STARTER]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environ, stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        record = msgspec.json.decode(process.stdout.readline(), type=JobRecord)
        [sidecar] = children(process.pid)
        [server] = children(sidecar)
        handles = [os.pidfd_open(sidecar), os.pidfd_open(server)]
        try:
            yield process, record, [sidecar, *handles]
        finally:
            process.kill()
            for handle in handles:
                assert select.select([handle], [], [], DEADLINE_S)[0], "a process was left running"
                os.close(handle)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.e2e
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_servers_go_with_a_keeper_that_is_killed(signum: signal.Signals) -> None:
    with starter() as (_, record, (sidecar, *handles)):
        assert (record.host, record.num_servers, record.token_file) == ("127.0.0.1", 1, "")
        os.kill(sidecar, signum)
        for handle in handles:
            assert select.select([handle], [], [], DEADLINE_S)[0]


@pytest.mark.e2e
def test_keeper_and_servers_go_with_a_worker_that_is_killed() -> None:
    with starter() as (process, _, _):
        process.kill()
