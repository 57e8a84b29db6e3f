"""A job for the workers that torchrun, or a launcher which sets the same variables, has started.

Nobody starts scheduler and servers then: the workers do, when they open their first distributed store.
Rank 0 starts a keeper (see `keeper`) with the scheduler and the servers of its host, and tells the others
through the TCPStore at MASTER_ADDR:MASTER_PORT where the job is; local rank 0 of each other host starts a
keeper with the servers of that host. torchrun's agent holds that TCPStore; where no agent does, rank 0.

The job's token does not pass through the store. On one host it is in a file that only this user can read,
over several hosts in TENSORKV_TOKEN.
"""

from __future__ import annotations

import dataclasses
import os
import select
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import msgspec

from tensorkv.config import (
    DEFAULT_TIMEOUT_S,
    ENV_ALLOW_IMPORT,
    ENV_HOST,
    ENV_NUM_SERVERS,
    ENV_TOKEN,
    JobConfig,
    read_number,
    read_peer_timeout_s,
    read_slice_bound_bytes,
    read_timeout_s,
    read_transport,
)
from tensorkv.errors import AuthenticationError, NotInJob, PeerLostError
from tensorkv.launch.keeper import TOKEN_PREFIX, TOKEN_SUFFIX, JobRecord
from tensorkv.runtime.waits import Wait

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch has no __all__ there

_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_KEEPER_START_S = 60.0
_CONNECT_S = 5.0  # a signal is seen only in between
_LEAST_CONNECT_S = 1.0  # torch before 2.6 takes whole seconds only
_POLL_S = 0.02
_MAX_TOKEN_BYTES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where torchrun has put this process. `host` counts the hosts from 0; `prefix` is of this attempt."""

    rank: int
    num_workers: int
    local_rank: int
    host: int
    num_hosts: int
    master: tuple[str, int]
    agent_store: bool
    prefix: str


def read_place(environ: Mapping[str, str]) -> Place | None:
    """Return the place that the variables of torchrun describe; None where RANK or WORLD_SIZE is not set.

    Raises:
        NotInJob: some of the variables are missing, or are no numbers that fit together.
    """
    if "RANK" not in environ or "WORLD_SIZE" not in environ:
        return None
    missing = [name for name in _NEEDED if name not in environ]
    if missing:
        raise NotInJob(
            f"RANK and WORLD_SIZE are set as by torchrun, but {', '.join(missing)} not; "
            "start the job with torchrun or `tensorkv run`, or unset them"
        )
    numbers = {
        name: _number(environ, name)
        for name in (*_NEEDED, "GROUP_RANK", "GROUP_WORLD_SIZE")
        if name != "MASTER_ADDR" and name in environ
    }
    rank, num_workers, local_workers = numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_WORLD_SIZE"]
    if not (0 <= rank < num_workers and 0 <= numbers["LOCAL_RANK"] < local_workers <= num_workers):
        told = ", ".join(f"{name}={environ[name]}" for name in _NEEDED[:4])
        raise NotInJob(f"the environment says {told}, which do not fit together")
    run_id = environ.get("TORCHELASTIC_RUN_ID", "")
    restart = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Place(
        rank=rank,
        num_workers=num_workers,
        local_rank=numbers["LOCAL_RANK"],
        host=numbers.get("GROUP_RANK", rank // local_workers),
        num_hosts=numbers.get("GROUP_WORLD_SIZE", -(-num_workers // local_workers)),
        master=(environ["MASTER_ADDR"], numbers["MASTER_PORT"]),
        agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        # A membership change restarts the workers without counting: the size tells such rounds apart.
        prefix=f"tensorkv/{run_id}/{restart}/{num_workers}",
    )


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError as exc:
        raise NotInJob(f"the environment says {name}={environ[name]!r}, which is no number") from exc


_lock = threading.Lock()
_found: dict[int, JobConfig] = {}  # by process id: a forked child asks for itself
_held: list[Any] = []  # a TCPStore that others read from, and keepers: both for as long as this process


def find_job(
    environ: Mapping[str, str] | None = None, timeout_s: float = DEFAULT_TIMEOUT_S
) -> JobConfig | None:
    """Return this worker's place in the job of its launcher, None if that was not torchrun or one like it.

    The first call of a process starts what this process has to start, and waits until rank 0 has told
    where the job is. Safe from any thread.

    Raises:
        NotInJob: the variables are incomplete, or a job over several hosts has no TENSORKV_TOKEN.
        InvalidArgument: a TENSORKV_ variable holds no number, or one out of its range.
        PeerLostError: rank 0, or a keeper, could not start its part.
        WaitTimeout: rank 0 has not told where the job is.
        AuthenticationError: the token's file is not what it should be.
    """
    environ = os.environ if environ is None else environ
    place = read_place(environ)
    if place is None:
        return None
    with _lock:
        config = _found.get(os.getpid())
        if config is None:
            config = _found[os.getpid()] = _find(place, environ, time.monotonic() + timeout_s)
        return config


def _find(place: Place, environ: Mapping[str, str], deadline: float) -> JobConfig:
    token = environ.get(ENV_TOKEN, "")
    if place.num_hosts > 1 and not token:
        raise NotInJob(
            f"this job runs on {place.num_hosts} hosts: set {ENV_TOKEN} to the same secret on all of them, "
            "for example the output of `openssl rand -hex 32`"
        )
    config = JobConfig(
        role="worker",
        rank=place.rank,
        num_workers=place.num_workers,
        num_servers=read_number(environ, ENV_NUM_SERVERS, int, place.num_hosts, least=1),
        scheduler_host=place.master[0],
        scheduler_port=0,
        token=token,
        host=_own_address(place, environ),
        timeout_s=read_timeout_s(environ),
        peer_timeout_s=read_peer_timeout_s(environ),
        slice_bound_bytes=read_slice_bound_bytes(environ),
        allow_import=tuple(filter(None, environ.get(ENV_ALLOW_IMPORT, "").split(","))),
        transport=read_transport(environ),
    )
    store = _open_store(place, deadline)
    record = _start_job(place, config, store, environ) if place.rank == 0 else None
    if record is None:
        record = _read_record(place, store, deadline)
    if record.error:
        raise PeerLostError(f"rank 0 could not start scheduler and servers: {record.error}")
    config = dataclasses.replace(
        config,
        num_servers=record.num_servers,
        scheduler_host=record.host,
        scheduler_port=record.port,
        token=token or read_token(record.token_file),
    )
    servers = range(place.host, config.num_servers, place.num_hosts)
    if place.rank != 0 and place.local_rank == 0 and servers and _first(store, place, f"host {place.host}"):
        answer = start_keeper(config, servers, environ)
        if answer.error:
            raise PeerLostError(f"the servers of host {place.host} could not be started: {answer.error}")
    return config


def _start_job(
    place: Place, config: JobConfig, store: TCPStore, environ: Mapping[str, str]
) -> JobRecord | None:
    """Start scheduler and servers of the first host and tell everybody; None if a parent has done so."""
    if not _first(store, place, "scheduler"):
        return None
    servers = range(0, config.num_servers, place.num_hosts)
    record = start_keeper(config, servers, environ)
    store.set(f"{place.prefix}/job", msgspec.json.encode(record).decode())
    return record


def _first(store: TCPStore, place: Place, what: str) -> bool:
    """Whether nobody has asked this before. A child of a worker inherits the variables of its parent."""
    return bool(store.add(f"{place.prefix}/{what}", 1) == 1)


def start_keeper(config: JobConfig, servers: range, environ: Mapping[str, str]) -> JobRecord:
    """Start a keeper as a child of this process, and return what it reports."""
    config = dataclasses.replace(config, role="scheduler", rank=0)
    read, write = os.pipe()
    ranks = ",".join(map(str, servers))
    command = [sys.executable, "-m", "tensorkv.launch.keeper", str(os.getpid()), str(write), ranks]
    with open(read, "rb") as report:
        try:
            process = subprocess.Popen(
                command,
                env={**environ, **config.to_env()},
                stdin=subprocess.DEVNULL,
                pass_fds=(write,),
                start_new_session=True,
            )
        except OSError as exc:
            return JobRecord(error=str(exc))
        finally:
            os.close(write)
        _held.append(process)
        ready, _, _ = select.select([report], [], [], _KEEPER_START_S)
        data = report.read() if ready else b""
    if not data:
        process.kill()
        return JobRecord(error="the process that runs them did not start; see its lines on stderr")
    return msgspec.json.decode(data, type=JobRecord)


def _open_store(place: Place, deadline: float) -> TCPStore:
    """Connect to the TCPStore of the job. Rank 0 holds it where torchrun's agent does not."""
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

    host, port = place.master
    hosting = place.rank == 0 and not place.agent_store
    while True:
        patience_s = max(min(_CONNECT_S, deadline - time.monotonic()), _LEAST_CONNECT_S)
        try:
            # multi_tenant: init_process_group of the same process uses the same port.
            store = TCPStore(
                host,
                port,
                is_master=hosting,
                wait_for_workers=False,
                multi_tenant=True,
                timeout=timedelta(seconds=patience_s),
            )
        except DistError as exc:
            if hosting or time.monotonic() > deadline:
                raise PeerLostError(f"torch's TCPStore at {host}:{port} cannot be used: {exc}") from exc
        else:
            if hosting:
                _held.append(store)
            return store


def _read_record(place: Place, store: TCPStore, deadline: float) -> JobRecord:
    """Wait until rank 0 has told where the job is."""
    key = f"{place.prefix}/job"
    wait = Wait(
        "finding the job",
        max(deadline - time.monotonic(), 0.0),
        failure=lambda: None,
        whom=lambda: "worker 0, which has not opened a distributed store; every rank has to",
    )
    while not store.check([key]):
        wait.tick()
        time.sleep(_POLL_S)
    try:
        return msgspec.json.decode(store.get(key), type=JobRecord)
    except msgspec.DecodeError as exc:
        raise PeerLostError(f"what torch's TCPStore holds under {key!r} is not of TensorKV: {exc}") from exc


def read_token(path: str) -> str:
    """Return the token in a file that a keeper of this user has written.

    The path came through a store that anybody may write to, so it is checked.

    Raises:
        AuthenticationError: it is no such file, or others could read it.
    """
    folder, name = os.path.split(path)
    named = name.startswith(TOKEN_PREFIX) and name.endswith(TOKEN_SUFFIX)
    if not named or folder != tempfile.gettempdir():
        raise AuthenticationError(
            f"the job's token is said to be in {path!r}, not in the temporary folder "
            f"{tempfile.gettempdir()}; set the same {ENV_TOKEN} for all workers, or the same TMPDIR"
        )
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as exc:
        raise AuthenticationError(f"the job's token cannot be read from {path}: {exc.strerror}") from exc
    with open(descriptor, "rb") as file:
        about = os.fstat(descriptor)
        private = stat.S_ISREG(about.st_mode) and stat.S_IMODE(about.st_mode) == 0o600
        if not private or about.st_uid != os.geteuid():
            raise AuthenticationError(f"{path} is not a file of this user that nobody else can read")
        return file.read(_MAX_TOKEN_BYTES).decode("ascii", "replace")


def _own_address(place: Place, environ: Mapping[str, str]) -> str:
    """Return the address to bind to: TENSORKV_HOST, or, on several hosts, that on the way to the master."""
    if environ.get(ENV_HOST):
        return environ[ENV_HOST]
    if place.num_hosts == 1:
        return "127.0.0.1"
    host, port = place.master
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing: it only asks the routing table
            own = str(probe.getsockname()[0])
    except OSError as exc:
        raise NotInJob(f"MASTER_ADDR={host} cannot be reached: {exc}; set {ENV_HOST} on each host") from exc
    if own.startswith("127.") or own == "::1":
        raise NotInJob(
            f"MASTER_ADDR={host} is {own} here, which other hosts cannot reach; "
            f"set {ENV_HOST} to the address of this host, on each host its own"
        )
    return own
