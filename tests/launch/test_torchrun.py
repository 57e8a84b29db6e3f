"""A distributed store in scripts that torchrun has started, and what its variables mean."""

from __future__ import annotations

import dataclasses
import os
import resource
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from tensorkv.config import JobConfig
from tensorkv.errors import (
    AuthenticationError,
    InvalidArgument,
    NotInJob,
    PeerLostError,
    RankTaken,
    WaitTimeout,
)
from tensorkv.launch import torchrun
from tensorkv.launch.attempts import Board
from tensorkv.launch.sidecar import TOKEN_NAME, JobRecord
from tensorkv.launch.torchrun import Place, join_job, read_place, read_token
from tensorkv.scheduler.loop import SchedulerServer

DEADLINE_S = 100.0


def variables(rank: int, num_workers: int, port: int = 1, **more: str) -> dict[str, str]:
    """What torchrun would say to a worker, all on one host."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(num_workers),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(num_workers),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **more,
    }


AGENT = {
    "TORCHELASTIC_RUN_ID": "night",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}


class TestReadPlace:
    def test_what_torchrun_says(self) -> None:
        place = read_place({**variables(3, 4, 29500), **AGENT, "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"})
        assert place == Place(
            rank=3,
            num_workers=4,
            local_rank=3,
            local_workers=4,
            master=("127.0.0.1", 29500),
            agent_store=True,
            prefix="tensorkv/night",
        )
        assert place.one_host

    def test_the_six_variables_are_enough(self) -> None:
        place = read_place({**variables(5, 7), "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"})
        assert place is not None
        assert (place.one_host, place.agent_store, place.prefix) == (False, False, "tensorkv/")

    @pytest.mark.parametrize("address", ["::1", "[::1]"])
    def test_a_master_of_ipv6(self, address: str) -> None:
        place = read_place({**variables(0, 1, 29500), "MASTER_ADDR": address})
        assert place is not None
        assert place.master == ("::1", 29500)
        assert place.store_name == "torch's TCPStore at [::1]:29500"

    def test_agents_that_disagree_on_the_restart_count_are_in_one_place(self) -> None:
        counts = [{**AGENT, "TORCHELASTIC_RESTART_COUNT": count} for count in ("0", "1")]
        one, other = (read_place({**variables(1, 2), **told}) for told in counts)
        assert one == other

    def test_elsewhere_there_is_no_place(self) -> None:
        assert read_place({}) is None
        assert read_place({"RANK": "3"}) is None
        assert join_job({}) is None

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"LOCAL_RANK": None, "MASTER_PORT": None}, "but LOCAL_RANK, MASTER_PORT not"),
            ({"RANK": "first"}, "RANK='first', which is no number"),
            ({"RANK": "4"}, "RANK=4, WORLD_SIZE=4, .*ranks count from 0"),
            ({"LOCAL_RANK": "-1"}, "do not fit together"),
        ],
    )
    def test_variables_that_make_no_sense(self, changes: dict[str, str | None], text: str) -> None:
        told = {name: value for name, value in {**variables(1, 4), **changes}.items() if value is not None}
        with pytest.raises(NotInJob, match=text):
            read_place(told)


class TestReadToken:
    @contextmanager
    def opened(self, descriptor: int) -> Iterator[str]:
        yield f"/proc/{os.getpid()}/fd/{descriptor}"
        os.close(descriptor)

    def test_what_a_keeper_wrote(self) -> None:
        descriptor = os.memfd_create(TOKEN_NAME)
        os.write(descriptor, b"abc")
        with self.opened(descriptor) as path:
            assert read_token(path) == "abc"
        with pytest.raises(AuthenticationError, match="cannot be read .*; set TENSORKV_TOKEN") as gone:
            read_token(path)
        assert isinstance(gone.value.__cause__, FileNotFoundError)

    def test_of_another_user(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 4321)
        ours = self.opened(os.memfd_create(TOKEN_NAME))
        with ours as path, pytest.raises(AuthenticationError, match="no token that a process of this user"):
            read_token(path)

    def test_other_files_in_memory_and_elsewhere(self, tmp_path: Path) -> None:
        private = tmp_path / f"memfd:{TOKEN_NAME} (deleted)"
        private.touch(0o600)
        for descriptor in (os.memfd_create("tensorkv"), os.open(private, os.O_RDONLY)):
            with self.opened(descriptor) as path, pytest.raises(AuthenticationError, match="holds no token"):
                read_token(path)

    def test_a_pipe_is_not_waited_for(self) -> None:
        read, write = os.pipe()
        with self.opened(read) as path, pytest.raises(AuthenticationError, match="holds no token"):
            read_token(path)
        os.close(write)

    @pytest.mark.parametrize(
        "path", ["", "/run/tensorkv-x.token", "/proc/self/fd/3", "/proc/1/fd/../environ"]
    )
    def test_where_no_keeper_writes(self, path: str) -> None:
        with pytest.raises(AuthenticationError, match="where no sidecar writes it"):
            read_token(path)


AGENT_PROCESS = """
import sys
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def agent_port() -> Iterator[int]:
    """The port of a store in a process of its own, as torchrun's agent holds one."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", AGENT_PROCESS], stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())
        process.communicate(timeout=DEADLINE_S)


@pytest.fixture
def agent(agent_port: int, request: pytest.FixtureRequest) -> dict[str, str]:
    """The variables of an agent, for a run of its own."""
    return {**AGENT, "MASTER_PORT": str(agent_port), "TORCHELASTIC_RUN_ID": request.node.name}


@pytest.fixture
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process has not looked for its job yet."""
    monkeypatch.setattr(torchrun, "_found", {})


@pytest.mark.usefixtures("_fresh")
class TestJoinJob:
    """One worker, in this process, and torch's own store."""

    def test_nobody_has_announced_a_job(self, agent: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torchrun, "_LEAST_CONNECT_S", DEADLINE_S)  # the agent's store may be slow
        with pytest.raises(
            WaitTimeout,
            match="finding the job .*: waiting for worker 0, which has not opened a distributed store",
        ):
            join_job({**variables(1, 2), **agent}, timeout_s=0.0)

    @pytest.mark.parametrize("key", ["round", f"{'0' * 32}/job"])
    def test_what_is_announced_is_not_ours(self, agent: dict[str, str], key: str) -> None:
        store = TCPStore("127.0.0.1", int(agent["MASTER_PORT"]), wait_for_workers=False)
        store.set(f"tensorkv/{agent['TORCHELASTIC_RUN_ID']}/round", "0" * 32)
        store.set(f"tensorkv/{agent['TORCHELASTIC_RUN_ID']}/{key}", "nonsense")
        told = {**variables(1, 2), **agent, "TORCHELASTIC_USE_AGENT_STORE": "False"}
        with pytest.raises(PeerLostError, match=f"under '.*{key}' is not of TensorKV"):
            join_job(told)

    def test_a_store_that_is_not_there(self) -> None:
        with free_port() as port, pytest.raises(PeerLostError, match=f"at 127.0.0.1:{port} cannot be used"):
            join_job({**variables(1, 2, port), **AGENT}, timeout_s=0.0)

    def test_several_hosts_want_a_token(self) -> None:
        several = {**variables(0, 3), "LOCAL_WORLD_SIZE": "2"}
        with pytest.raises(NotInJob, match=r"several hosts \(2 of its 3 .*: set TENSORKV_TOKEN to the same"):
            join_job(several)
        with pytest.raises(NotInJob, match="other hosts cannot reach; set TENSORKV_HOST"):
            join_job({**several, "TENSORKV_TOKEN": "t"})

    @pytest.mark.parametrize("host", ["0.0.0.0", "::"])
    def test_a_wildcard_is_no_address_for_other_hosts(self, host: str) -> None:
        several = {**variables(0, 2), "LOCAL_WORLD_SIZE": "1", "TENSORKV_TOKEN": "t", "TENSORKV_HOST": host}
        with pytest.raises(NotInJob, match="other hosts cannot reach; set TENSORKV_HOST"):
            join_job(several)

    @pytest.mark.parametrize(
        ("number", "text"), [("0", "at least 1 is needed"), ("two", "which is no number")]
    )
    def test_a_number_of_servers_that_is_none(self, number: str, text: str) -> None:
        with pytest.raises(InvalidArgument, match=f"TENSORKV_NUM_SERVERS={number}, .*{text}"):
            join_job({**variables(0, 1), "TENSORKV_NUM_SERVERS": number})

    def test_an_address_that_is_not_of_this_host(self, agent: dict[str, str]) -> None:
        told = {**variables(0, 1), **agent, "TENSORKV_HOST": "192.0.2.1"}
        with pytest.raises(PeerLostError, match=r"could not start .*192.0.2.1.*; set TENSORKV_HOST"):
            join_job({**os.environ, **told})
        for sidecar in torchrun._held:
            sidecar.wait(DEADLINE_S)
        torchrun._held.clear()

    def test_a_second_rank_0_where_the_first_holds_the_store(self, agent: dict[str, str]) -> None:
        store = TCPStore("127.0.0.1", int(agent["MASTER_PORT"]), wait_for_workers=False)
        store.set(f"tensorkv/{agent['TORCHELASTIC_RUN_ID']}/round", "0" * 32)
        told = {**variables(0, 2), **agent, "TORCHELASTIC_USE_AGENT_STORE": "False"}
        with pytest.raises(RankTaken, match="held by another process, which was started with RANK=0"):
            join_job(told)


def test_a_keeper_is_started_by_a_process_with_many_open_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """select() takes no descriptor above 1023."""
    monkeypatch.setattr(sys, "executable", "false")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as tidy:
        tidy.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
        while (opened := os.open(os.devnull, os.O_RDONLY)) < 1024:
            tidy.callback(os.close, opened)
        tidy.callback(os.close, opened)
        record = torchrun.start_sidecar(Rounds(tidy).config(0, num_servers=1), range(1), os.environ)
    assert "the process that runs them did not start" in record.error
    torchrun._held.pop().wait(DEADLINE_S)


# ---- rounds: the orders in which the workers of an attempt may come ----------------------------------


class Shelf:
    """A store as `rounds` needs one, in this process. `events` happen one by one, as workers look at it."""

    def __init__(self, *events: Callable[[], object]) -> None:
        self.values: dict[str, str] = {}
        self.events = list(events)
        self.announced: Callable[[str], object] = lambda name: None

    def check(self, keys: list[str]) -> bool:
        if self.events and keys[0].endswith("/round"):
            self.events.pop(0)()
        return all(key in self.values for key in keys)

    def get(self, key: str) -> bytes:
        return self.values[key].encode()

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def add(self, key: str, amount: int) -> int:
        total = int(self.values.get(key, "0")) + amount
        self.values[key] = str(total)
        return total

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        if self.values.get(key, "") == expected:
            self.values[key] = desired
            self.announced(desired)
        return self.values[key].encode()


class Rounds:
    """A job of three workers on two hosts, in this process; schedulers of its rounds, in threads."""

    def __init__(self, tidy: ExitStack) -> None:
        self.shelf = Shelf()
        self.board = Board(self.shelf, "tensorkv/run")
        self.started: list[SchedulerServer] = []
        self.gone: set[SchedulerServer] = set()  # those whose worker 0 has ended
        self.served: list[list[int]] = []  # ranks of servers that rank 0's sidecars were to start
        self._tidy = tidy

    def place(self, rank: int, agent: bool = True, num_workers: int = 3) -> Place:
        return Place(
            rank=rank,
            num_workers=num_workers,
            local_rank=rank % 2,
            local_workers=1 if rank == 2 else 2,
            master=("127.0.0.1", 1),
            agent_store=agent,
            prefix="tensorkv/run",
        )

    def config(self, rank: int, **changes: Any) -> JobConfig:
        plain = JobConfig(
            role="worker",
            rank=rank,
            num_workers=3,
            num_servers=0,
            scheduler_host="",
            scheduler_port=0,
            token="secret",
        )
        return dataclasses.replace(plain, **changes)

    def start_sidecar(self, config: JobConfig, servers: range, environ: Mapping[str, str]) -> JobRecord:
        """What a sidecar of rank 0 does, in this process."""
        made: list[SchedulerServer] = []
        scheduler = SchedulerServer(
            num_workers=config.num_workers,
            num_servers=config.num_servers,
            token=config.token,
            starter_gone=lambda: made[0] in self.gone,
        )
        made.append(scheduler)
        scheduler.start()
        self._tidy.callback(scheduler.stop)
        self.started.append(scheduler)
        self.served.append(list(servers))
        host, port = scheduler.address
        return JobRecord(host=host, port=port, num_workers=3, num_servers=config.num_servers)

    def announce(self, token: str = "secret", **changes: Any) -> SchedulerServer:
        """Rank 0 begins a round, with one server."""
        name = self.board.announce(self.shelf.values.get("tensorkv/run/round", ""))
        config = self.config(0, num_servers=1, token=torchrun.round_token(token, name))
        record = self.start_sidecar(config, range(1), {})
        self.board.tell(name, msgspec.structs.replace(record, sidecars=(0, 2), **changes))
        return self.started[-1]

    def end(self, scheduler: SchedulerServer) -> None:
        """Worker 0 of a round is gone, and its scheduler soon; here while it is still there."""
        self.gone.add(scheduler)

    def join(self, rank: int, *, agent: bool = True, timeout_s: float = DEADLINE_S, **changes: Any) -> int:
        """Join as this rank; return which round it is."""
        place, config = self.place(rank, agent), self.config(rank, **changes)
        search = torchrun._Search(place, timeout_s)
        if rank == 0:
            found, connection = torchrun._lead(place, config, {}, self.board, search, is_anothers=False)
        else:
            _, found, connection = torchrun._follow(place, config, self.board, search)
        self._tidy.callback(connection.close)
        self._tidy.callback(connection.shutdown)
        [number] = [
            number
            for number, each in enumerate(self.started)
            if each.address == (found.scheduler_host, found.scheduler_port)
        ]
        return number


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rounds]:
    with ExitStack() as tidy:
        made = Rounds(tidy)
        monkeypatch.setattr(torchrun, "start_sidecar", made.start_sidecar)
        monkeypatch.setattr(torchrun, "_LEAST_PAUSE_S", 0.0)
        monkeypatch.setattr(torchrun, "_MOST_PAUSE_S", 0.0)
        yield made


NOBODY = JobRecord(host="127.0.0.1", port=1, num_workers=3, num_servers=1)


@pytest.fixture
def silent() -> Iterator[JobRecord]:
    """A scheduler that lets everybody connect, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield msgspec.structs.replace(NOBODY, port=listener.getsockname()[1])


class TestRounds:
    def test_all_join_what_rank_0_has_announced(self, rounds: Rounds) -> None:
        rounds.announce()
        assert [rounds.join(rank) for rank in (2, 1)] == [0, 0]

    def test_others_come_first(self, rounds: Rounds) -> None:
        rounds.shelf.events = [lambda: None, lambda: None, rounds.announce]
        assert rounds.join(1) == 0

    @pytest.mark.parametrize("how", ["ended", "stopped", "worker lost", "nobody joined"])
    @pytest.mark.parametrize("rank", [0, 1, 2])
    def test_a_round_before_is_not_joined(self, rounds: Rounds, how: str, rank: int) -> None:
        """Whatever is left of it, in whatever order they come."""
        old = rounds.announce()
        if how != "nobody joined":
            assert rounds.join(1) == 0
        if how == "stopped":
            old.stop()
        elif how == "worker lost":
            with old._lock:
                old._membership.declare_lost("worker", 1, "it ended with status 1")
        else:
            rounds.end(old)
        if rank:
            rounds.shelf.events = [lambda: None, lambda: None, rounds.announce]
        else:
            self.others_enlist(rounds)
        assert rounds.join(rank) == 1

    def others_enlist(self, rounds: Rounds) -> None:
        """As soon as rank 0 has begun a round, the others are there."""

        def enlist(name: str) -> None:
            for rank in (2, 1):
                rounds.board.enlist(name, torchrun._enlisted(rounds.place(rank)))

        rounds.shelf.announced = enlist

    def test_a_round_whose_scheduler_port_nobody_has(self, rounds: Rounds) -> None:
        name = rounds.board.announce("")
        rounds.board.tell(name, NOBODY)
        rounds.shelf.events = [lambda: None, rounds.announce]
        assert rounds.join(1) == 0

    def test_a_round_before_whose_scheduler_does_not_answer(self, rounds: Rounds, silent: JobRecord) -> None:
        """It is stopped, or its port is another's now: the next round is looked for meanwhile."""
        rounds.board.tell(rounds.board.announce(""), silent)
        rounds.shelf.events = [lambda: None, rounds.announce]
        assert rounds.join(1) == 0

    def test_rank_0_does_not_wait_long_for_a_round_before(self, rounds: Rounds, silent: JobRecord) -> None:
        rounds.board.tell(rounds.board.announce(""), silent)
        self.others_enlist(rounds)
        assert rounds.join(0, peer_timeout_s=0.5) == 0

    def test_two_attempts_that_end_at_once(self, rounds: Rounds) -> None:
        def in_vain() -> None:
            rounds.end(rounds.announce())

        in_vain()
        rounds.shelf.events = [lambda: None, in_vain, lambda: None, rounds.announce]
        assert rounds.join(2) == 2

    def test_a_job_of_another_size_is_of_another_attempt(self, rounds: Rounds) -> None:
        rounds.announce(num_workers=4)
        rounds.shelf.events = [lambda: None, rounds.announce]
        assert rounds.join(1) == 1

    def test_a_round_that_could_not_be_started(self, rounds: Rounds) -> None:
        rounds.announce(error="no memory")
        rounds.shelf.events = [lambda: None, rounds.announce]
        assert rounds.join(1) == 1

    def test_a_process_of_the_round_before_that_still_counts_as_there(self, rounds: Rounds) -> None:
        rounds.announce()
        assert rounds.join(1) == 0
        rounds.shelf.events = [lambda: None, rounds.announce]
        assert rounds.join(1) == 1

    def test_a_rank_that_stays_taken(self, rounds: Rounds) -> None:
        rounds.announce()
        rounds.join(1)
        with pytest.raises(RankTaken, match="worker 1 of this job is taken by"):
            rounds.join(1, peer_timeout_s=0.0)

    def test_a_secret_of_another_job(self, rounds: Rounds) -> None:
        """Or the port of another job."""
        rounds.announce(token="another")
        with pytest.raises(AuthenticationError, match="does not hold the token"):
            rounds.join(1, peer_timeout_s=0.0)
        rounds.shelf.events = [lambda: None, rounds.announce]
        assert rounds.join(1) == 1

    def test_another_round_with_the_same_secret_and_port(self, rounds: Rounds) -> None:
        scheduler = rounds.announce()
        host, port = scheduler.address
        name = rounds.board.announce(rounds.board.current())
        rounds.board.tell(name, msgspec.structs.replace(NOBODY, host=host, port=port))
        with pytest.raises(AuthenticationError, match="does not hold the token"):
            rounds.join(1, peer_timeout_s=0.0)

    def test_at_the_deadline_it_is_told_what_was_wrong_with_the_last(self, rounds: Rounds) -> None:
        rounds.end(rounds.announce())
        with pytest.raises(WaitTimeout, match="waiting for worker 0, .*announced last: .*worker 0 .*ended"):
            rounds.join(1, timeout_s=0.05)

    @pytest.mark.parametrize(
        ("changes", "error", "text"),
        [
            ({"num_workers": 4}, NotInJob, "WORLD_SIZE=3 here, but 4 for rank 0"),
            ({"error": "no memory"}, PeerLostError, "rank 0 could not start .*no memory"),
            ({"port": 1}, PeerLostError, "cannot be reached"),
        ],
    )
    def test_without_an_agent_nothing_gets_better(
        self, rounds: Rounds, changes: dict[str, Any], error: type[Exception], text: str
    ) -> None:
        rounds.announce(**changes)
        with pytest.raises(error, match=text):
            rounds.join(1, agent=False)

    def test_without_an_agent_a_taken_rank_is_told_at_once(self, rounds: Rounds) -> None:
        rounds.announce()
        rounds.join(1, agent=False)
        with pytest.raises(RankTaken):
            rounds.join(1, agent=False)

    def test_a_child_of_rank_0_finds_the_round_of_its_parent(self, rounds: Rounds) -> None:
        rounds.announce()
        assert rounds.join(0) == 0
        with pytest.raises(RankTaken, match="worker 0 of this job is taken"):
            rounds.join(0)
        assert rounds.started[0].lost is None, "the job of the first goes on"

    def test_another_rank_0_that_begins_anew(self, rounds: Rounds) -> None:
        rounds.shelf.events = [lambda: None, rounds.announce]
        with pytest.raises(RankTaken, match="another process that was started with RANK=0 has begun"):
            rounds.join(0)

    def test_another_rank_0_that_begins_anew_while_the_servers_are_started(self, rounds: Rounds) -> None:
        """The others may have followed that one: this one would wait for them for ever."""
        self.others_enlist(rounds)
        rounds.shelf.events = [lambda: None, rounds.announce]
        with pytest.raises(RankTaken, match="another process that was started with RANK=0 has begun"):
            rounds.join(0)
        assert rounds.served == [[0], [0]]

    def test_hosts_of_unequal_numbers_of_workers_have_a_server_each(self, rounds: Rounds) -> None:
        self.others_enlist(rounds)
        assert rounds.join(0) == 0
        record = rounds.board.read(rounds.board.current())
        assert record is not None
        assert (record.num_servers, record.sidecars, rounds.served) == (2, (0, 2), [[0]])

    def test_servers_are_dealt_out_over_the_hosts(self, rounds: Rounds) -> None:
        self.others_enlist(rounds)
        assert rounds.join(0, num_servers=5) == 0
        assert rounds.served == [[0, 2, 4]]
        assert list(torchrun._servers_of(2, (0, 2), 5)) == [1, 3]
        assert list(torchrun._servers_of(1, (0, 2), 5)) == []

    def test_workers_that_were_told_of_another_size(self, rounds: Rounds) -> None:
        """Rank 0 would wait for a host that there is not; the others are told why it does not."""
        other = torchrun._enlisted(rounds.place(1, num_workers=2))
        rounds.shelf.announced = lambda name: rounds.board.enlist(name, other)
        with pytest.raises(NotInJob, match="WORLD_SIZE=3 here, but 2 for rank 1; it must be the same"):
            rounds.join(0)
        with pytest.raises(PeerLostError, match="could not start .*WORLD_SIZE=3 here, but 2 for rank 1"):
            rounds.join(2, agent=False)

    def test_who_has_not_come_is_told(self, rounds: Rounds) -> None:
        with pytest.raises(WaitTimeout, match="of 3 workers only 0 have opened a distributed store"):
            rounds.join(0, timeout_s=0.05)


# ---- whole jobs ----------------------------------------------------------------------------------

SUM = """
import torch
import torch.distributed as dist
import tensorkv

def beside():
    dist.init_process_group("gloo")
    ones = torch.ones(2)
    dist.all_reduce(ones)
    assert ones.tolist() == [2.0, 2.0]

def shared(name):
    with tensorkv.create("dist_sync", store=name) as kv:
        kv.init("w", torch.zeros(2))
        kv.set_optimizer("sgd", lr=1.0)
        kv.push("w", torch.full((2,), kv.rank + 1.0))
        say(f"{kv.rank} of {kv.num_workers} {kv.pull('w').tolist()}")
"""

KILLED = """
import os, signal, sys
from pathlib import Path
import torch
import tensorkv

def children(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

folder, victim = Path(sys.argv[1]), int(sys.argv[2])
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends the others at once; here they tell why first
kv = tensorkv.create("dist_sync")
if kv.rank == 0:
    [sidecar] = children(os.getpid())
    (folder / f"pids{attempt}").write_text(" ".join(map(str, [sidecar, *children(sidecar)])))
kv.init("w", torch.zeros(2))
kv.push("w", torch.ones(2))
kv.pull("w")
(folder / f"ready{attempt}{kv.rank}").touch()
if attempt == "0" and kv.rank == victim:
    while not (folder / f"ready0{1 - victim}").exists():
        os.sched_yield()  # the other one may still be in its first pull
    os.kill(os.getpid(), signal.SIGKILL)
if attempt == "0":
    try:
        kv.push("w", torch.ones(2))
        kv.pull("w")
    except tensorkv.PeerLostError as error:
        (folder / "error").write_text(str(error))
        raise
kv.push("w", torch.ones(2))
say(f"attempt {attempt} rank {kv.rank} {kv.pull('w').tolist()}")
kv.close()
"""


def script(tmp_path: Path, text: str) -> str:
    """Write a script. It tells by `say`: workers write to one pipe, and torchrun runs `python -u`."""
    path = tmp_path / "train.py"
    path.write_text("import os\ndef say(line): os.write(1, f'{line}\\n'.encode())\n" + text)
    return str(path)


def start(command: list[str], environ: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    told = {**os.environ, **(environ or {})}
    return subprocess.Popen(command, env=told, stdout=pipe, stderr=pipe, text=True)


End = tuple[int, list[str], str]
"""How a process has ended: status, sorted lines of stdout, and stderr."""


def finish(*processes: subprocess.Popen[str], deadline_s: float = DEADLINE_S) -> list[End]:
    """Wait for processes; where one does not end in time, end all of them, and what torchrun has started."""
    ends: list[End] = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=deadline_s)
            ends.append((process.returncode, sorted(out.splitlines()), err))
    finally:
        for process in processes[len(ends) :]:
            process.terminate()
        for process in processes[len(ends) :]:
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=DEADLINE_S / 2)
            process.kill()
            process.communicate()
    return ends


def run_torchrun(*arguments: str, environ: Mapping[str, str] | None = None) -> End:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments]
    [end] = finish(start(command, environ))
    return end


@contextmanager
def free_port(address: str = "127.0.0.1") -> Iterator[int]:
    """A port of nobody, kept from others until the block ends: SO_REUSEADDR lets a listener in."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, 0))
        except OSError as exc:
            pytest.skip(f"this system has no {address}: {exc}")
        yield probe.getsockname()[1]


def assert_ended(pids: list[int]) -> None:
    for pid in pids:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        ready, _, _ = select.select([handle], [], [], 30)
        os.close(handle)
        assert ready, "a process was left running"


@pytest.fixture
def temp_folder(tmp_path: Path) -> Path:
    """A folder for the temporary files of one job: those of other jobs of this host are not in it."""
    folder = tmp_path / "temp"
    folder.mkdir()
    return folder


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(150)
def test_torchrun_starts_all_that_is_needed_beside_a_process_group(tmp_path: Path) -> None:
    path = script(tmp_path, SUM + 'shared("one")\nbeside()\nshared("two")\n')
    status, out, err = run_torchrun("--nproc-per-node", "2", path)
    assert status == 0, err
    assert out == [f"{rank} of 2 [-3.0, -3.0]" for rank in (0, 0, 1, 1)]


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(150)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_worker_is_named_and_the_next_attempt_is_a_new_job(
    tmp_path: Path, temp_folder: Path, victim: int
) -> None:
    path = script(tmp_path, KILLED)
    arguments = ("--nproc-per-node", "2", "--max-restarts", "1", path, str(tmp_path), str(victim))
    status, out, err = run_torchrun(*arguments, environ={"TMPDIR": str(temp_folder)})
    assert status == 0, err
    assert out == [f"attempt 1 rank {rank} [2.0, 2.0]" for rank in (0, 1)]
    assert f"worker {victim}" in (tmp_path / "error").read_text()
    for attempt in ("0", "1"):
        pids = (tmp_path / f"pids{attempt}").read_text().split()
        assert len(pids) == 2, "a sidecar and a server"
        assert_ended([int(pid) for pid in pids])
    assert not list(temp_folder.glob("tensorkv-*"))


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(150)
@pytest.mark.parametrize("order", ["beside(); shared('one')", "shared('one'); beside()"])
def test_rank_0_holds_the_store_where_no_agent_does(tmp_path: Path, order: str) -> None:
    path = script(tmp_path, SUM + order)
    with free_port() as port:
        told = [variables(rank, 2, port) for rank in range(2)]
        workers = [start([sys.executable, path], environ) for environ in told]
        ends = finish(*workers)
    assert [(status, out) for status, out, _ in ends] == [
        (0, ["0 of 2 [-3.0, -3.0]"]),
        (0, ["1 of 2 [-3.0, -3.0]"]),
    ], ends


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(150)
@pytest.mark.parametrize(
    ("sizes", "address", "asked", "expected"),
    [((2, 1), "127.0.0.1", None, 2), ((1, 2), "::1", "3", 3)],
)
def test_each_host_has_servers_however_many_workers(
    tmp_path: Path, sizes: tuple[int, ...], address: str, asked: str | None, expected: int
) -> None:
    """Hosts that are one machine: what makes them several is what the variables say. No agent is there."""
    last = "with tensorkv.create('dist_sync', store='two') as kv: say(kv._job.config.num_servers)\n"
    path = script(tmp_path, SUM + "shared('one')\n" + last)
    more = {"TENSORKV_TOKEN": "t", "TENSORKV_HOST": address, "MASTER_ADDR": address}
    if asked is not None:
        more["TENSORKV_NUM_SERVERS"] = asked
    places = [(local_rank, size) for size in sizes for local_rank in range(size)]
    with free_port(address) as port:
        workers = [
            start(
                [sys.executable, path],
                {
                    **variables(rank, len(places), port),
                    **more,
                    "LOCAL_RANK": str(local_rank),
                    "LOCAL_WORLD_SIZE": str(size),
                },
            )
            for rank, (local_rank, size) in enumerate(places)
        ]
        ends = finish(*workers)
    for rank, (status, out, err) in enumerate(ends):
        assert (status, out) == (0, sorted([f"{rank} of 3 [-6.0, -6.0]", str(expected)])), err


LOST_ONCE = """
import signal, sys
from pathlib import Path
import torch
import tensorkv

def children(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

folder, victim = Path(sys.argv[1]), int(sys.argv[2])
again = (folder / "lost").exists()
with tensorkv.create("dist_sync") as kv:
    kv.init("w", torch.zeros(3))
    kv.push("w", torch.ones(3) * (kv.rank + 1))
    assert kv.pull("w").tolist() == [3.0] * 3
    say(f"{'second' if again else 'first'} {kv.rank}")
    [sidecar] = children(os.getpid())
    (folder / f"pids-{again}-{kv.rank}").write_text(" ".join(map(str, [sidecar, *children(sidecar)])))
    (folder / f"pulled{kv.rank}").touch()
    if not again and kv.rank == victim:
        while not (folder / f"pulled{1 - victim}").exists():
            os.sched_yield()
        (folder / "lost").touch()
        os._exit(7)
    if not again:
        signal.pause()  # busy with something else: its agent ends it, and does not count that
    kv.barrier()
"""


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(300)
@pytest.mark.parametrize("victim", [0, 1])
def test_agents_of_two_hosts_that_count_restarts_differently(tmp_path: Path, victim: int) -> None:
    """Each counts the failures of its own worker; with one restart, that is all there may be."""
    path = script(tmp_path, LOST_ONCE)
    told = {"TENSORKV_TOKEN": "t", "TENSORKV_HOST": "127.0.0.1"}
    with free_port() as port:
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-id", "job", "--rdzv-endpoint", f"127.0.0.1:{port}"]
        options = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "1"]
        command = [sys.executable, "-m", "torch.distributed.run", *options, *rendezvous]
        command += ["--local-addr", "127.0.0.1", path, str(tmp_path), str(victim)]
        ends = finish(start(command, told), start(command, told), deadline_s=200.0)
    assert [status for status, _, _ in ends] == [0, 0], ends
    lines = sorted(line for _, out, _ in ends for line in out)
    assert lines == [f"{attempt} {rank}" for attempt in ("first", "second") for rank in (0, 1)]
    started = [file.read_text().split() for file in tmp_path.glob("pids-*")]
    assert list(map(len, started)) == [2, 2, 2, 2], "a sidecar and a server, on each host, in each attempt"
    assert_ended([int(pid) for pids in started for pid in pids])


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(150)
def test_a_torchrun_that_is_ended_leaves_nothing(tmp_path: Path, temp_folder: Path) -> None:
    text = KILLED.split("kv.init")[0] + "say('ready')\nkv.barrier()\nsignal.pause()\n"
    path = script(tmp_path, text.replace("signal.signal(", "# signal.signal("))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", path]
    process = start([*command, str(tmp_path), "0"], {"TMPDIR": str(temp_folder)})
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    finish(process)
    assert_ended([int(pid) for pid in (tmp_path / "pids0").read_text().split()])
    assert not list(temp_folder.glob("tensorkv-*"))
