"""A distributed store in scripts that torchrun has started, and what its variables mean."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from tensorkv.errors import AuthenticationError, InvalidArgument, NotInJob, PeerLostError, WaitTimeout
from tensorkv.launch import torchrun
from tensorkv.launch.keeper import JobRecord
from tensorkv.launch.torchrun import Place, find_job, read_place, read_token

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
            host=0,
            num_hosts=1,
            master=("127.0.0.1", 29500),
            agent_store=True,
            prefix="tensorkv/night/2/4",
        )

    def test_hosts_are_counted_where_nobody_says_how_many(self) -> None:
        place = read_place({**variables(5, 8), "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"})
        assert place is not None
        assert (place.host, place.num_hosts, place.agent_store) == (1, 2, False)

    def test_elsewhere_there_is_no_place(self) -> None:
        assert read_place({}) is None
        assert read_place({"RANK": "3"}) is None
        assert find_job({}) is None

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"LOCAL_RANK": None, "MASTER_PORT": None}, "but LOCAL_RANK, MASTER_PORT not"),
            ({"RANK": "first"}, "RANK='first', which is no number"),
            ({"RANK": "4"}, "RANK=4, WORLD_SIZE=4"),
            ({"LOCAL_RANK": "-1"}, "do not fit together"),
        ],
    )
    def test_variables_that_make_no_sense(self, changes: dict[str, str | None], text: str) -> None:
        told = {name: value for name, value in {**variables(1, 4), **changes}.items() if value is not None}
        with pytest.raises(NotInJob, match=text):
            read_place(told)


class TestReadToken:
    def write(self, mode: int = 0o600, prefix: str = "tensorkv-") -> Path:
        descriptor, path = tempfile.mkstemp(prefix=prefix, suffix=".token")
        os.write(descriptor, b"abc")
        os.fchmod(descriptor, mode)
        os.close(descriptor)
        return Path(path)

    def test_what_a_keeper_wrote(self) -> None:
        path = self.write()
        assert read_token(str(path)) == "abc"
        path.unlink()

    @pytest.mark.parametrize(
        ("prefix", "mode", "text"),
        [("tensorkv-", 0o640, "nobody else can read"), ("key-", 0o600, "not in the temporary folder")],
    )
    def test_other_files(self, prefix: str, mode: int, text: str) -> None:
        path = self.write(mode, prefix)
        with pytest.raises(AuthenticationError, match=text):
            read_token(str(path))
        path.unlink()

    def test_a_link_and_a_file_elsewhere(self, tmp_path: Path) -> None:
        path = self.write()
        link = path.with_name(f"{path.stem}-link.token")
        link.symlink_to(path)
        with pytest.raises(AuthenticationError, match="cannot be read"):
            read_token(str(link))
        link.unlink()
        path.unlink()
        with pytest.raises(AuthenticationError, match="cannot be read"):
            read_token(str(path))
        with pytest.raises(AuthenticationError, match="not in the temporary folder"):
            read_token(str(tmp_path / path.name))


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


class Agent:
    """An agent and one run of it."""

    def __init__(self, port: int, run_id: str) -> None:
        self.variables = {**AGENT, "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": run_id}
        self._port, self._run_id = port, run_id

    def tell(self, value: str, attempt: int = 2) -> None:
        """Write what rank 0 of a job of two would have written."""
        store = TCPStore("127.0.0.1", self._port, wait_for_workers=False)
        store.set(f"tensorkv/{self._run_id}/{attempt}/2/job", value)


@pytest.fixture
def agent(agent_port: int, request: pytest.FixtureRequest) -> Agent:
    return Agent(agent_port, request.node.name)


@pytest.fixture
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process has not looked for its job yet."""
    monkeypatch.setattr(torchrun, "_found", {})


@pytest.mark.usefixtures("_fresh")
class TestFindJob:
    """Rank 1 of a job, in this process: rank 0 is what the test writes into the store."""

    def told(self, agent: Agent, **more: str) -> dict[str, str]:
        return {**variables(1, 2), **agent.variables, **more}

    def test_it_finds_what_rank_0_has_told(self, agent: Agent) -> None:
        record = JobRecord(host="127.0.0.1", port=4321, num_servers=3)
        agent.tell(msgspec.json.encode(record).decode())
        more = {"TENSORKV_TOKEN": "secret", "TENSORKV_TIMEOUT_S": "7", "TENSORKV_ALLOW_IMPORT": "a,b"}
        config = find_job(self.told(agent, **more))
        assert config is not None
        assert (config.role, config.rank, config.num_workers, config.num_servers) == ("worker", 1, 2, 3)
        assert (config.scheduler_host, config.scheduler_port) == ("127.0.0.1", 4321)
        assert (config.token, config.host, config.timeout_s) == ("secret", "127.0.0.1", 7.0)
        assert config.allow_import == ("a", "b")
        assert find_job(self.told(agent)) is config, "it looks once"

    def test_another_attempt_is_another_job(self, agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torchrun, "_LEAST_CONNECT_S", DEADLINE_S)  # the agent's store may be slow
        agent.tell(msgspec.json.encode(JobRecord(host="old", port=1)).decode(), attempt=1)
        with pytest.raises(
            WaitTimeout,
            match="finding the job .*: waiting for worker 0, which has not opened a distributed store",
        ):
            find_job(self.told(agent), timeout_s=0.0)

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            ('{"error": "no memory"}', "rank 0 could not start .*no memory"),
            ("nonsense", "is not of TensorKV"),
        ],
    )
    def test_a_job_that_is_none(self, agent: Agent, value: str, text: str) -> None:
        agent.tell(value)
        with pytest.raises(PeerLostError, match=text):
            find_job(self.told(agent))

    def test_a_store_that_is_not_there(self) -> None:
        with free_port() as port, pytest.raises(PeerLostError, match=f"at 127.0.0.1:{port} cannot be used"):
            find_job({**variables(1, 2, port), **AGENT}, timeout_s=0.0)

    def test_several_hosts_want_a_token(self) -> None:
        several = {**variables(0, 2), "LOCAL_WORLD_SIZE": "1"}
        with pytest.raises(NotInJob, match="runs on 2 hosts: set TENSORKV_TOKEN to the same secret"):
            find_job(several)
        with pytest.raises(NotInJob, match="other hosts cannot reach; set TENSORKV_HOST"):
            find_job({**several, "TENSORKV_TOKEN": "t"})

    @pytest.mark.parametrize(
        ("number", "text"), [("0", "at least 1 is needed"), ("two", "which is no number")]
    )
    def test_a_number_of_servers_that_is_none(self, number: str, text: str) -> None:
        with pytest.raises(InvalidArgument, match=f"TENSORKV_NUM_SERVERS={number}, .*{text}"):
            find_job({**variables(0, 1), "TENSORKV_NUM_SERVERS": number})

    def test_an_address_that_is_not_of_this_host(self, agent: Agent) -> None:
        told = {**variables(0, 1), **agent.variables, "TENSORKV_HOST": "192.0.2.1"}
        with pytest.raises(PeerLostError, match=r"could not start .*192.0.2.1"):
            find_job({**os.environ, **told})
        for keeper in torchrun._held:
            keeper.wait(DEADLINE_S)
        torchrun._held.clear()


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
    [keeper] = children(os.getpid())
    (folder / f"pids{attempt}").write_text(" ".join(map(str, [keeper, *children(keeper)])))
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


def finish(process: subprocess.Popen[str]) -> tuple[int, list[str], str]:
    """Return status, sorted lines of stdout, and stderr."""
    try:
        out, err = process.communicate(timeout=DEADLINE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return process.returncode, sorted(out.splitlines()), err


def run_torchrun(*arguments: str, environ: Mapping[str, str] | None = None) -> tuple[int, list[str], str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments]
    return finish(start(command, environ))


@contextmanager
def free_port() -> Iterator[int]:
    """A port of nobody, kept from others until the block ends: SO_REUSEADDR lets a listener in."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", 0))
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
        assert len(pids) == 2, "a keeper and a server"
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
        ends = [finish(worker) for worker in workers]
    assert [(status, out) for status, out, _ in ends] == [
        (0, ["0 of 2 [-3.0, -3.0]"]),
        (0, ["1 of 2 [-3.0, -3.0]"]),
    ], ends


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(150)
@pytest.mark.parametrize(("asked", "expected"), [(None, 2), ("3", 3)])
def test_each_host_has_servers(tmp_path: Path, agent: Agent, asked: str | None, expected: int) -> None:
    """Two hosts that are one machine: what makes them two is what the variables say."""
    text = SUM + "shared('one')\nfrom tensorkv.launch.torchrun import find_job\nsay(find_job().num_servers)\n"
    path = script(tmp_path, text)
    more = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "TENSORKV_TOKEN": "t", "TENSORKV_HOST": "127.0.0.1"}
    if asked is not None:
        more["TENSORKV_NUM_SERVERS"] = asked
    told = [{**variables(rank, 2), **agent.variables, **more} for rank in range(2)]
    workers = [start([sys.executable, path], environ) for environ in told]
    for rank, (status, out, err) in enumerate([finish(worker) for worker in workers]):
        assert (status, out) == (0, [f"{rank} of 2 [-3.0, -3.0]", str(expected)]), err


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
