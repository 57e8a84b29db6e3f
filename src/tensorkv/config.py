"""The configuration of a process of a job. The only module that reads environment variables.

`tensorkv run` sets the variables for each process it starts; other launchers build a `JobConfig`
themselves. Nothing here imports torch: the launcher and the scheduler do without it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar, get_args

from tensorkv.addresses import LOOPBACK, bare_host, join_address, split_address
from tensorkv.errors import InvalidArgument, NotInJob

Role = Literal["worker", "server", "scheduler"]
Transport = Literal["auto", "shm", "tcp"]
TRANSPORTS: tuple[Transport, ...] = get_args(Transport)
_Number = TypeVar("_Number", int, float)

DEFAULT_TIMEOUT_S = 1800.0
"""Default timeout of a waiting call, as in torch.distributed."""

DEFAULT_PEER_TIMEOUT_S = 10.0
"""Default timeout after which the processes of a silent host count as lost."""

MAX_SLICE_BYTES = 4 << 20
"""Maximum size of a slice of an elementwise value."""

SLICE_BOUND_BYTES = 1 << 20
"""Maximum size of a value on one server; larger ones are sliced over all if their updater allows it."""

STREAM_BYTES = 512 << 10
"""Minimum size of a piece that is copied with non-temporal stores, in copies of long lists of values."""

ENV_ROLE = "TENSORKV_ROLE"
ENV_RANK = "TENSORKV_RANK"
ENV_NUM_WORKERS = "TENSORKV_NUM_WORKERS"
ENV_NUM_SERVERS = "TENSORKV_NUM_SERVERS"
ENV_SCHEDULER = "TENSORKV_SCHEDULER"
ENV_TOKEN = "TENSORKV_TOKEN"
ENV_HOST = "TENSORKV_HOST"
ENV_TIMEOUT_S = "TENSORKV_TIMEOUT_S"
ENV_PEER_TIMEOUT_S = "TENSORKV_PEER_TIMEOUT_S"
ENV_SLICE_BOUND_BYTES = "TENSORKV_SLICE_BOUND_BYTES"
ENV_ALLOW_IMPORT = "TENSORKV_ALLOW_IMPORT"
ENV_TRANSPORT = "TENSORKV_TRANSPORT"
ENV_TRACEBACK = "TENSORKV_TRACEBACK"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobConfig:
    """The role and rank of a process in its job, and where the scheduler listens.

    `rank` counts from 0 within the role. `token` is the job's secret; it is kept out of the repr, never sent
    and never logged. `host` is the address this process binds to. `allow_import` names the modules that
    servers may import for updaters and optimizers, besides those that are always allowed. `timeout_s` is the
    deadline of a waiting call; `peer_timeout_s` is how long the host of the scheduler, or for the scheduler
    that of any process, may be silent before it counts as lost. `transport` says how workers reach servers:
    "auto" is shared memory within a host and TCP between hosts.
    """

    role: Role
    rank: int
    num_workers: int
    num_servers: int
    scheduler_host: str
    scheduler_port: int
    token: str = field(repr=False)
    host: str = LOOPBACK
    timeout_s: float = DEFAULT_TIMEOUT_S
    peer_timeout_s: float = DEFAULT_PEER_TIMEOUT_S
    slice_bound_bytes: int = SLICE_BOUND_BYTES
    allow_import: tuple[str, ...] = ()
    transport: Transport = "auto"

    def to_env(self) -> dict[str, str]:
        """Return the environment variables from which `from_env` rebuilds this config."""
        return {
            ENV_ROLE: self.role,
            ENV_RANK: str(self.rank),
            ENV_NUM_WORKERS: str(self.num_workers),
            ENV_NUM_SERVERS: str(self.num_servers),
            ENV_SCHEDULER: join_address(self.scheduler_host, self.scheduler_port),
            ENV_TOKEN: self.token,
            ENV_HOST: self.host,
            ENV_TIMEOUT_S: repr(self.timeout_s),
            ENV_PEER_TIMEOUT_S: repr(self.peer_timeout_s),
            ENV_SLICE_BOUND_BYTES: str(self.slice_bound_bytes),
            ENV_ALLOW_IMPORT: ",".join(self.allow_import),
            ENV_TRANSPORT: self.transport,
        }


def read_number(
    environ: Mapping[str, str], name: str, kind: type[_Number], default: _Number, least: float | None = None
) -> _Number:
    """Return the number that a variable holds, or the default.

    Raises:
        InvalidArgument: it does not hold a number, or holds NaN or a number below `least`.
    """
    try:
        number = kind(environ.get(name, default))
    except ValueError as exc:
        raise InvalidArgument(f"the environment says {name}={environ[name]}, which is no number") from exc
    if number != number:
        raise InvalidArgument(f"the environment says {name}={environ[name]}, which is no number")
    if least is not None and number < least:
        raise InvalidArgument(f"the environment says {name}={environ[name]}, but at least {least} is needed")
    return number


def read_timeout_s(environ: Mapping[str, str] | None = None) -> float:
    """Return the deadline of a waiting call. Raises InvalidArgument if it is not a positive number."""
    return _read_seconds(os.environ if environ is None else environ, ENV_TIMEOUT_S, DEFAULT_TIMEOUT_S)


def read_peer_timeout_s(environ: Mapping[str, str]) -> float:
    """Return the timeout of a silent host. Raises InvalidArgument if it is not a positive number."""
    return _read_seconds(environ, ENV_PEER_TIMEOUT_S, DEFAULT_PEER_TIMEOUT_S)


def read_slice_bound_bytes(environ: Mapping[str, str]) -> int:
    """Return the size above which values are sliced. Raises InvalidArgument if it is negative or no int."""
    return read_number(environ, ENV_SLICE_BOUND_BYTES, int, SLICE_BOUND_BYTES, least=0)


def full_tracebacks(environ: Mapping[str, str] | None = None) -> bool:
    """Whether to show uncaught exceptions of workers with all their frames."""
    return (os.environ if environ is None else environ).get(ENV_TRACEBACK) == "full"


def check_transport(name: str, transport: object) -> Transport:
    """Return the transport of this name. If there is none, raise InvalidArgument, which names `name`."""
    for known in TRANSPORTS:
        if transport == known:
            return known
    raise InvalidArgument(
        f"{name}={transport!r} is no transport; known are {', '.join(map(repr, TRANSPORTS))}"
    )


def read_host(environ: Mapping[str, str]) -> str:
    """Return the host that this process listens at, without the brackets of an IPv6 address."""
    return bare_host(environ.get(ENV_HOST, "")) or LOOPBACK


def read_transport(environ: Mapping[str, str]) -> Transport:
    """Return how workers reach servers. Raises InvalidArgument if the environment names no transport."""
    return check_transport(f"the environment says {ENV_TRANSPORT}", environ.get(ENV_TRANSPORT, "auto"))


def _read_seconds(environ: Mapping[str, str], name: str, default: float) -> float:
    number = read_number(environ, name, float, default)
    if not number > 0:
        raise InvalidArgument(
            f"the environment says {name}={environ[name]}, but more than 0 seconds are needed"
        )
    return number


def stray_variables(environ: Mapping[str, str] | None = None) -> str:
    """Return a sentence about variables of role and rank if no variable says which job; else ""."""
    environ = os.environ if environ is None else environ
    stray = [f"{name}={environ[name]}" for name in (ENV_ROLE, ENV_RANK, ENV_NUM_WORKERS) if name in environ]
    if not stray or ENV_SCHEDULER in environ:
        return ""
    return f"{', '.join(stray)} is set, but {ENV_SCHEDULER} is not; a launcher sets them together"


def from_env(environ: Mapping[str, str] | None = None) -> JobConfig | None:
    """Return the config of this process in its job, or None outside a job.

    Raises:
        NotInJob: some of the variables are set, but one is missing or unreadable.
    """
    environ = os.environ if environ is None else environ
    if ENV_SCHEDULER not in environ:
        return None
    try:
        scheduler_host, scheduler_port = split_address(environ[ENV_SCHEDULER])
        role = environ.get(ENV_ROLE, "worker")
        if role not in ("worker", "server", "scheduler"):
            raise ValueError(f"{ENV_ROLE}={role!r} is not worker, server or scheduler")
        return JobConfig(
            role=role,  # type: ignore[arg-type]  # checked above
            rank=int(environ[ENV_RANK]),
            num_workers=int(environ[ENV_NUM_WORKERS]),
            num_servers=int(environ[ENV_NUM_SERVERS]),
            scheduler_host=scheduler_host,
            scheduler_port=scheduler_port,
            token=environ.get(ENV_TOKEN, ""),
            host=read_host(environ),
            timeout_s=read_timeout_s(environ),
            peer_timeout_s=read_peer_timeout_s(environ),
            slice_bound_bytes=read_slice_bound_bytes(environ),
            allow_import=tuple(filter(None, environ.get(ENV_ALLOW_IMPORT, "").split(","))),
            transport=read_transport(environ),
        )
    except (KeyError, ValueError) as exc:
        raise NotInJob(
            f"the variables of a TensorKV job are incomplete or unreadable: {exc}; "
            "start the job with `tensorkv run -n WORKERS -s SERVERS python train.py`"
        ) from exc
