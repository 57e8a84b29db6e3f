"""A job for workers started by torchrun, or by a launcher that sets the same variables.

Such a launcher starts neither scheduler nor servers: the workers do, when they open their first distributed
store. Rank 0 announces a round (see `attempts`) in the TCPStore at MASTER_ADDR:MASTER_PORT, starts a sidecar
with the scheduler and the servers of its host, and publishes where it is. The others join the scheduler of
that round; if it is gone, or belongs to an earlier attempt, they look again. The worker that represents
another host starts a sidecar with the servers of that host. torchrun's agent holds the TCPStore; without an
agent, rank 0 does.

The job's token does not pass through the store. On one host it is in a file that only this user can read
and that vanishes with the sidecar. Over several hosts it is derived from TENSORKV_TOKEN and the round's name,
so that nobody mistakes a scheduler of another round, or of another job with the same secret, for this one's.
"""

from __future__ import annotations

import dataclasses
import hmac
import logging
import os
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, final

import msgspec

from tensorkv.addresses import LOOPBACK, bare_host, is_wildcard, join_address
from tensorkv.config import (
    DEFAULT_TIMEOUT_S,
    ENV_ALLOW_IMPORT,
    ENV_HOST,
    ENV_NUM_SERVERS,
    ENV_TOKEN,
    JobConfig,
    Transport,
    read_host,
    read_number,
    read_peer_timeout_s,
    read_slice_bound_bytes,
    read_transport,
)
from tensorkv.errors import AuthenticationError, NotInJob, PeerLostError, RankTaken, TensorKVError
from tensorkv.launch.attempts import Board, Enlisted, hosts
from tensorkv.launch.sidecar import TOKEN_NAME, JobRecord
from tensorkv.peer.deadlines import Wait
from tensorkv.peer.handshake import Failure, connect_to_scheduler
from tensorkv.transport.base import Connection
from tensorkv.transport.tcp import own_host_towards

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch has no __all__ there

    from tensorkv.worker.session import Session

logger = logging.getLogger(__name__)
_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_KEEPER_START_S = 60.0
_CONNECT_S = 5.0  # signals are handled only between attempts
_LEAST_CONNECT_S = 1.0  # torch before 2.6 takes whole seconds only
_LEAST_POLL_S, _MOST_POLL_S = 0.02, 0.25
"""Minimum and maximum pause between two polls of the store, which may serve many workers; it backs off."""

_LEAST_PAUSE_S, _MOST_PAUSE_S = 0.1, 2.0
"""Minimum and maximum pause between two attempts to join one round; it doubles each time."""

_MAX_TOKEN_BYTES = 1024
_TOKEN_PATH = re.compile(r"/proc/[0-9]+/fd/[0-9]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The place of this process in its launcher's job. `prefix` is the job's part of the store."""

    rank: int
    num_workers: int
    local_rank: int
    local_workers: int
    master: tuple[str, int]
    agent_store: bool
    prefix: str

    @property
    def one_host(self) -> bool:
        """Whether all workers are on this host."""
        return self.local_workers == self.num_workers

    @property
    def store_name(self) -> str:
        """The store through which the workers meet, for texts."""
        return f"torch's TCPStore at {join_address(*self.master)}"


def read_place(environ: Mapping[str, str]) -> Place | None:
    """Return the place that torchrun's variables describe; None if RANK or WORLD_SIZE is not set.

    Raises:
        NotInJob: some of the variables are missing, are not numbers, or do not fit together.
    """
    if "RANK" not in environ or "WORLD_SIZE" not in environ:
        return None
    missing = [name for name in _NEEDED if name not in environ]
    if missing:
        raise NotInJob(
            f"RANK and WORLD_SIZE are set as by torchrun, but {', '.join(missing)} not; "
            "start the job with torchrun or `tensorkv run`, or unset them"
        )
    numbers = {name: _number(environ, name) for name in _NEEDED if name != "MASTER_ADDR"}
    rank, num_workers, local_workers = numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_WORLD_SIZE"]
    if not (0 <= rank < num_workers and 0 <= numbers["LOCAL_RANK"] < local_workers <= num_workers):
        told = ", ".join(f"{name}={environ[name]}" for name in _NEEDED[:4])
        raise NotInJob(
            f"the environment says {told}, which do not fit together: ranks count from 0 and are less than "
            "the size, and no host has more workers than the job"
        )
    return Place(
        rank=rank,
        num_workers=num_workers,
        local_rank=numbers["LOCAL_RANK"],
        local_workers=local_workers,
        master=(bare_host(environ["MASTER_ADDR"]), numbers["MASTER_PORT"]),
        agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        prefix=f"tensorkv/{environ.get('TORCHELASTIC_RUN_ID', '')}",
    )


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError as exc:
        raise NotInJob(f"the environment says {name}={environ[name]!r}, which is no number") from exc


_lock = threading.Lock()
_found: dict[int, JobConfig] = {}  # by process id: a forked child looks for itself
_held: list[Any] = []  # kept as long as this process: a TCPStore that others read from, and sidecars


def join_job(
    environ: Mapping[str, str] | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    transport: Transport | None = None,
) -> Session | None:
    """Join the job of this worker's launcher; None if that is not torchrun or one like it.

    The first call in a process starts whatever this worker has to start, waits until rank 0 has published
    where the job is, and joins it. Safe from any thread.

    Args:
        environ: the variables to read instead of the process's own.
        timeout_s: maximum number of seconds for all of this.
        transport: how this worker reaches servers; None for what the environment says. Only the first call's
            value counts.

    Raises:
        NotInJob: the variables are incomplete, do not fit those of the others, or a job over several hosts
            has no TENSORKV_TOKEN; or this process was forked from a worker.
        InvalidArgument: a TENSORKV_ variable holds no number, or one out of range.
        RankTaken: another process has this rank.
        PeerLostError: rank 0, or a sidecar, could not start its part; the store or the job is unreachable.
        WaitTimeout: rank 0 has not published where the job is.
        AuthenticationError: the tokens differ, or the token's file is not what it should be.
        What `Session` raises.
    """
    environ = os.environ if environ is None else environ
    place = read_place(environ)
    if place is None:
        return None
    from tensorkv.worker.session import check_not_forked, join

    with _lock:
        config = _found.get(os.getpid())
        if config is not None:
            return join(config)
        config = _read_config(place, environ, timeout_s, transport)
        check_not_forked(config)
        config, connection = _enter(place, config, environ, timeout_s)
        _found[os.getpid()] = config
        return join(config, connection)


def _read_config(
    place: Place, environ: Mapping[str, str], timeout_s: float, transport: Transport | None
) -> JobConfig:
    """Return the config of this worker as far as it is known: without the scheduler.

    `num_servers` is 0 if it depends on the number of hosts. The token is the secret shared by all rounds.
    """
    token = environ.get(ENV_TOKEN, "")
    if not place.one_host and not token:
        raise NotInJob(
            f"this job runs on several hosts ({place.local_workers} of its {place.num_workers} workers on "
            f"this one): set {ENV_TOKEN} to the same secret on all of them, for example the output of "
            "`openssl rand -hex 32`"
        )
    asked = ENV_NUM_SERVERS in environ
    return JobConfig(
        role="worker",
        rank=place.rank,
        num_workers=place.num_workers,
        num_servers=read_number(environ, ENV_NUM_SERVERS, int, 1, least=1) if asked else 0,
        scheduler_host=place.master[0],
        scheduler_port=0,
        token=token,
        host=_own_host(place, environ),
        timeout_s=timeout_s,
        peer_timeout_s=read_peer_timeout_s(environ),
        slice_bound_bytes=read_slice_bound_bytes(environ),
        allow_import=tuple(filter(None, environ.get(ENV_ALLOW_IMPORT, "").split(","))),
        transport=read_transport(environ) if transport is None else transport,
    )


@final
class _Search:
    """This worker's search for its job: the deadline, and whom it waits for, for texts."""

    def __init__(self, place: Place, timeout_s: float) -> None:
        self.deadline = time.monotonic() + timeout_s
        self.whom = "worker 0, which has not opened a distributed store; every rank has to"
        self._last = ""
        self._poll_s = _LEAST_POLL_S
        self._wait = Wait("finding the job", timeout_s, lambda: None, whom=self._describe)

    def pause(self) -> None:
        """Sleep a little. Raises WaitTimeout after the deadline."""
        self._wait.tick()
        time.sleep(self._poll_s)
        self._poll_s = min(1.1 * self._poll_s, _MOST_POLL_S)

    def failed(self, exc: TensorKVError) -> None:
        """Note why the job announced last cannot be joined; another may be announced."""
        self._last = str(exc)
        logger.debug("the job announced last cannot be joined: %s", exc)

    def _describe(self) -> str:
        return f"{self.whom} (of the job announced last: {self._last})" if self._last else self.whom


def _enter(
    place: Place, config: JobConfig, environ: Mapping[str, str], timeout_s: float
) -> tuple[JobConfig, Connection]:
    """Find the job; return this worker's config and its connection to the scheduler, after the handshake."""
    from torch.distributed import DistError

    search = _Search(place, timeout_s)
    store, is_anothers = _open_store(place, search)
    board = Board(store, place.prefix)
    try:
        if place.rank == 0:
            return _lead(place, config, environ, board, search, is_anothers)
        record, config, connection = _follow(place, config, board, search)
    except DistError as exc:
        raise PeerLostError(f"{place.store_name} is gone, with the process that held it: {exc}") from exc
    try:
        _keep_servers(place, config, record.sidecars, environ)
    except BaseException:
        connection.shutdown()  # the scheduler tells the others that this worker is lost
        connection.close()
        raise
    return config, connection


def _lead(
    place: Place,
    config: JobConfig,
    environ: Mapping[str, str],
    board: Board,
    search: _Search,
    is_anothers: bool,
) -> tuple[JobConfig, Connection]:
    """As rank 0, begin a round and join it; or join one that a parent of this process has just begun.

    `is_anothers`: another process holds the store, although rank 0 should.
    """
    name = ""
    while not name:
        last = board.current()
        record = board.read(last) if last else None
        try:
            if record is not None:
                return _attempt(place, config, last, record, _late_after(config.peer_timeout_s))
        except RankTaken:
            raise
        except TensorKVError as exc:
            logger.debug("round %s was of an attempt before: %s", last, exc)
        if is_anothers:
            raise RankTaken(
                f"{place.store_name} is held by another process, which was started with RANK=0 too or has "
                "started this one; start each worker with a rank of its own"
            )
        name = board.announce(last)
    sidecars = _count_hosts(place, board, name, search)
    num_servers = config.num_servers or len(sidecars)
    job = dataclasses.replace(config, num_servers=num_servers, token=round_token(config.token, name))
    record = start_sidecar(job, _servers_of(0, sidecars, num_servers), environ)
    record = msgspec.structs.replace(record, sidecars=tuple(sidecars))
    board.tell(name, record)
    if board.current() != name:
        raise _begun_anew()
    return _attempt(place, config, name, record)


def _begun_anew() -> RankTaken:
    return RankTaken("another process that was started with RANK=0 has begun this job anew")


def _late_after(timeout_s: float) -> Failure:
    """Return a deadline for the scheduler of an earlier round: it may be stopped, or its port another's."""
    end = time.monotonic() + timeout_s
    late = PeerLostError(f"the scheduler announced last has not answered for {timeout_s:g} s")
    return lambda: late if time.monotonic() >= end else None


def _count_hosts(place: Place, board: Board, name: str, search: _Search) -> list[int]:
    """Wait until all hosts are known; return the rank that starts the sidecar of each."""
    if place.one_host:
        return [0]
    board.enlist(name, _enlisted(place))
    known: dict[int, Enlisted] = {}
    while True:
        board.enlisted(name, known)
        for each in known.values():
            if each.num_workers != place.num_workers:
                error = _size_mismatch(place.num_workers, each.num_workers, f"rank {each.rank}")
                board.tell(name, JobRecord(error=str(error)))
                raise error
        found = hosts(list(known.values()), place.num_workers)
        if found is not None:
            return found
        if board.current() != name:
            raise _begun_anew()
        ranks = sorted({each.rank for each in known.values()})
        search.whom = (
            f"workers of other hosts; of {place.num_workers} workers only {', '.join(map(str, ranks))} "
            "have opened a distributed store, and LOCAL_RANK 0 of each host has to"
        )
        search.pause()


def _follow(
    place: Place, config: JobConfig, board: Board, search: _Search
) -> tuple[JobRecord, JobConfig, Connection]:
    """As another rank, wait until a round is announced that this worker can join, and join it.

    Under an agent the round may belong to an earlier attempt, whose scheduler is gone or about to go: then
    rank 0 will announce another, and this worker retries. Without an agent every failure is final.
    """
    name, again_at, pause_s, doubted_at = "", 0.0, _LEAST_PAUSE_S, None
    while True:
        if (current := board.current()) != name:
            name, again_at, pause_s, doubted_at = current, 0.0, _LEAST_PAUSE_S, None
            if not place.one_host:
                board.enlist(name, _enlisted(place))
        now = time.monotonic()
        record = board.read(name) if name and now >= again_at else None
        if record is not None:
            try:
                return record, *_attempt(place, config, name, record, _until_another(board, name))
            except TensorKVError as exc:
                doubted_at = None if _is_of_the_past(exc) else doubted_at or now
                in_doubt = doubted_at is None or now < doubted_at + config.peer_timeout_s
                if not place.agent_store or not in_doubt:
                    raise
                search.failed(exc)
                again_at, pause_s = now + pause_s, min(2 * pause_s, _MOST_PAUSE_S)
        search.pause()


def _until_another(board: Board, name: str) -> Failure:
    """Return a check that ends the wait for a silent scheduler once another round is announced."""
    over = PeerLostError("rank 0 has begun this job anew")
    return lambda: over if board.current() != name else None


def _is_of_the_past(exc: TensorKVError) -> bool:
    """Whether this failure means that the round belongs to an earlier attempt, if there can be one.

    If not, a process of that attempt may still count as present, or another job may have its port.
    """
    return isinstance(exc, (PeerLostError, NotInJob)) or isinstance(exc.__cause__, FileNotFoundError)


def _attempt(
    place: Place, config: JobConfig, name: str, record: JobRecord, failure: Failure = lambda: None
) -> tuple[JobConfig, Connection]:
    """Join the scheduler of a round. While it is silent, `failure` may return why not to wait any longer.

    Raises:
        RankTaken: another process has this rank.
        PeerLostError: the scheduler is gone, or that job is over or was never started.
        NotInJob: the job has another size.
        AuthenticationError, ProtocolError, ProtocolVersionError: the scheduler is of another round, or is not
            TensorKV's.
    """
    if record.error:
        raise PeerLostError(f"rank 0 could not start scheduler and servers: {record.error}")
    if record.num_workers != place.num_workers:
        raise _size_mismatch(place.num_workers, record.num_workers, "rank 0")
    config = dataclasses.replace(
        config,
        num_servers=record.num_servers,
        scheduler_host=record.host,
        scheduler_port=record.port,
        token=round_token(config.token, name) or read_token(record.token_file),
    )
    return config, connect_to_scheduler(config, failure)


def _size_mismatch(here: int, there: int, where: str) -> NotInJob:
    return NotInJob(
        f"WORLD_SIZE={here} here, but {there} for {where}; it must be the same for all workers of a job"
    )


def _enlisted(place: Place) -> Enlisted:
    return Enlisted(
        rank=place.rank,
        num_workers=place.num_workers,
        local_rank=place.local_rank,
        local_workers=place.local_workers,
    )


def _servers_of(rank: int, sidecars: Sequence[int], num_servers: int) -> range:
    """Return the servers of this worker's sidecar; the hosts take turns as the servers are dealt out."""
    return range(sidecars.index(rank), num_servers, len(sidecars)) if rank in sidecars else range(0)


def _keep_servers(
    place: Place, config: JobConfig, sidecars: Sequence[int], environ: Mapping[str, str]
) -> None:
    """Start the servers of this host, if this worker represents it."""
    servers = _servers_of(place.rank, sidecars, config.num_servers)
    answer = start_sidecar(config, servers, environ) if servers else JobRecord()
    if answer.error:
        raise PeerLostError(f"the servers of worker {place.rank}'s host could not be started: {answer.error}")


def round_token(token: str, name: str) -> str:
    """Return the token of one round, derived from the secret of all rounds; "" if there is none."""
    return hmac.new(token.encode(), f"round {name}".encode(), "sha256").hexdigest() if token else ""


def start_sidecar(config: JobConfig, servers: range, environ: Mapping[str, str]) -> JobRecord:
    """Start a sidecar as a child of this process, and return its report."""
    config = dataclasses.replace(config, role="scheduler", rank=0)
    read, write = os.pipe()
    ranks = ",".join(map(str, servers))
    command = [sys.executable, "-m", "tensorkv.launch.sidecar", str(os.getpid()), str(write), ranks]
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
        poller = select.poll()  # select() refuses descriptors above 1023
        poller.register(report, select.POLLIN)
        data = report.read() if poller.poll(_KEEPER_START_S * 1000) else b""
    if not data:
        process.kill()
        return JobRecord(error="the process that runs them did not start; see its lines on stderr")
    return msgspec.json.decode(data, type=JobRecord)


def _open_store(place: Place, search: _Search) -> tuple[TCPStore, bool]:
    """Connect to the job's TCPStore; return it, and whether another process holds it although rank 0 should.

    Rank 0 holds the store if torchrun's agent does not.
    """
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

    host, port = place.master
    hosting = place.rank == 0 and not place.agent_store
    refused: DistError | None = None
    while True:
        patience_s = max(min(_CONNECT_S, search.deadline - time.monotonic()), _LEAST_CONNECT_S)
        try:
            # multi_tenant: init_process_group in the same process uses the same port.
            store = TCPStore(
                host,
                port,
                is_master=hosting and refused is None,
                wait_for_workers=False,
                multi_tenant=True,
                timeout=timedelta(seconds=patience_s),
            )
        except DistError as exc:
            if hosting and refused is None:
                refused = exc  # another process listens there: a second rank 0?
            elif hosting or time.monotonic() > search.deadline:
                raise PeerLostError(f"{place.store_name} cannot be used: {refused or exc}") from exc
        else:
            if hosting and refused is None:
                _held.append(store)
            return store, refused is not None


def read_token(path: str) -> str:
    """Return the token that a sidecar of this user has written; see `Sidecar.write_token`.

    The path came through a store that anybody can write to, so it is checked.

    Raises:
        AuthenticationError: there is no such file, or it belongs to another user or is not a token's.
    """
    if not _TOKEN_PATH.fullmatch(path):
        raise AuthenticationError(f"the job's token is said to be in {path!r}, where no sidecar writes it")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        raise AuthenticationError(
            f"the job's token cannot be read from {path}: {exc.strerror}; set {ENV_TOKEN} to the same secret "
            "for all workers"
        ) from exc
    with open(descriptor, "rb") as file:
        is_token = os.readlink(f"/proc/self/fd/{descriptor}") == f"/memfd:{TOKEN_NAME} (deleted)"
        if not is_token or os.fstat(descriptor).st_uid != os.geteuid():
            raise AuthenticationError(f"{path} holds no token that a process of this user has written")
        return file.read(_MAX_TOKEN_BYTES).decode("ascii", "replace")


def _own_host(place: Place, environ: Mapping[str, str]) -> str:
    """Return the host to listen at: TENSORKV_HOST or, on several hosts, the address that the master sees.

    If TENSORKV_HOST is a wildcard it is the latter, too: other hosts need a real address.
    """
    told = read_host(environ)
    if environ.get(ENV_HOST) and (place.one_host or not is_wildcard(told)):
        return told
    if place.one_host:
        return LOOPBACK
    host, port = place.master
    try:
        own = own_host_towards(host, port)
    except OSError as exc:
        raise NotInJob(f"MASTER_ADDR={host} cannot be reached: {exc}; set {ENV_HOST} on each host") from exc
    if own.startswith("127.") or own == "::1":
        raise NotInJob(
            f"MASTER_ADDR={host} is {own} here, which other hosts cannot reach; "
            f"set {ENV_HOST} to the address of this host, on each host its own"
        )
    return own
