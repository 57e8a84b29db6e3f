"""Runs a whole job on this machine: scheduler, servers and workers. `tensorkv run` is `run_local`."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tensorkv.addresses import bare_host
from tensorkv.config import (
    STREAM_BYTES,
    JobConfig,
    Transport,
    check_transport,
    read_host,
    read_peer_timeout_s,
    read_slice_bound_bytes,
    read_timeout_s,
    read_transport,
)
from tensorkv.errors import InvalidArgument
from tensorkv.launch.output import FileSink, Output, Sink, Stream, prefix_text
from tensorkv.launch.processes import ProcessGroup, ProcessSpec, open_scheduler, scheduler_calls, server_spec
from tensorkv.launch.supervisor import Node
from tensorkv.transport.tcp import listening_socket

STREAMING = f"glibc.cpu.x86_non_temporal_threshold={STREAM_BYTES}"
"""Setting of the C library: minimum size of its non-temporal copies; see `tensorkv.worker.nontemporal`."""


class CommandNotFound(Exception):
    """The command does not exist or cannot be run. `status` is what a shell would return."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


def find_command(command: Sequence[str], environ: Mapping[str, str]) -> tuple[str, ...]:
    """Check that the first word of `command` can be run, and return the command.

    "python" becomes this interpreter if there is no python on the PATH.

    Raises:
        CommandNotFound: status 127 if the file does not exist, 126 if it is not executable.
    """
    name = command[0]
    path = environ.get("PATH", os.defpath)
    if shutil.which(name, path=path):
        return tuple(command)
    if name == "python":
        return (sys.executable, *command[1:])
    if os.sep in name and os.path.exists(name):
        raise CommandNotFound(f"{name}: is not an executable file", 126)
    raise CommandNotFound(f"{name}: command not found", 127)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """Options of `run_local`: `num_workers` workers that run `command`, and `num_servers` servers.

    `host` is the address everything binds to, `timeout_s` the deadline of a waiting call and
    `peer_timeout_s` how long a host may be silent; None takes them from the environment. `allow_import` are
    the modules servers may import; `prefix` says whether each output line names its process, and `torch_env`
    whether workers get the variables of `torch_variables`.

    Raises:
        InvalidArgument: a number is out of range, a module name is not valid, or the command is empty.
    """

    command: tuple[str, ...]
    num_workers: int
    num_servers: int
    host: str | None = None
    timeout_s: float | None = None
    peer_timeout_s: float | None = None
    allow_import: tuple[str, ...] = ()
    transport: Transport | None = None
    prefix: bool = True
    torch_env: bool = False

    def __post_init__(self) -> None:
        for name, number in (("workers", self.num_workers), ("servers", self.num_servers)):
            if number < 1:
                raise InvalidArgument(
                    f"num_{name}={number} is too few; a job needs at least one of its {name}"
                )
        for name, timeout_s in (("timeout", self.timeout_s), ("peer timeout", self.peer_timeout_s)):
            if timeout_s is not None and not timeout_s > 0:
                raise InvalidArgument(f"the {name} must be more than 0 seconds, but is {timeout_s:g}")
        for module in self.allow_import:
            if not all(part.isidentifier() for part in module.split(".")):
                raise InvalidArgument(f"{module!r} is not the name of a module")
        if self.transport is not None:
            check_transport("transport", self.transport)
        if not self.command:
            raise InvalidArgument("there is no command for the workers to run")


def job_config(
    options: JobOptions, environ: Mapping[str, str], *, scheduler: tuple[str, int], token: str
) -> JobConfig:
    """Return the config of worker 0; all others differ from it in role and rank only.

    `environ` gives the slice bound, and the host, timeouts and transport that `options` leave open.

    Raises:
        InvalidArgument: a variable in `environ` should hold a number and does not.
    """
    timeout_s = options.timeout_s
    if timeout_s is None:
        timeout_s = read_timeout_s(environ)
    return JobConfig(
        role="worker",
        rank=0,
        num_workers=options.num_workers,
        num_servers=options.num_servers,
        scheduler_host=scheduler[0],
        scheduler_port=scheduler[1],
        token=token,
        host=_host(options, environ),
        timeout_s=timeout_s,
        peer_timeout_s=_peer_timeout_s(options, environ),
        slice_bound_bytes=read_slice_bound_bytes(environ),
        allow_import=options.allow_import,
        transport=read_transport(environ) if options.transport is None else options.transport,
    )


def _host(options: JobOptions, environ: Mapping[str, str]) -> str:
    return read_host(environ) if options.host is None else bare_host(options.host)


def _peer_timeout_s(options: JobOptions, environ: Mapping[str, str]) -> float:
    if options.peer_timeout_s is not None:
        return options.peer_timeout_s
    return read_peer_timeout_s(environ)


def torch_variables(config: JobConfig, master_port: int) -> dict[str, str]:
    """Return what torchrun tells a worker, by which `init_process_group` finds the others."""
    rank, num_workers = str(config.rank), str(config.num_workers)
    return {
        **dict.fromkeys(("RANK", "LOCAL_RANK"), rank),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), num_workers),
        "MASTER_ADDR": config.scheduler_host,
        "MASTER_PORT": str(master_port),
    }


def _free_port(host: str) -> int:
    """Return a port that is free now; rank 0's process group will listen there."""
    with listening_socket(host) as sock:
        port: int = sock.getsockname()[1]
        return port


def plan(
    config: JobConfig, command: Sequence[str], environ: Mapping[str, str], master_port: int = 0
) -> list[ProcessSpec]:
    """Return the processes of a job, servers first; workers run `command`.

    All inherit `environ`. The workers divide the cores among them, unless it sets OMP_NUM_THREADS, and get
    `STREAMING` for their C library, unless it sets GLIBC_TUNABLES. A `master_port` other than 0 gives them
    `torch_variables`.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // config.num_workers)
    inherited = {"OMP_NUM_THREADS": str(threads), **environ, "PYTHONUNBUFFERED": "1"}

    servers = [server_spec(config, rank, inherited) for rank in range(config.num_servers)]
    workers = [
        ProcessSpec(
            node=Node("worker", each.rank),
            argv=tuple(command),
            env={
                "GLIBC_TUNABLES": STREAMING,
                **inherited,
                **each.to_env(),
                **(torch_variables(each, master_port) if master_port else {}),
            },
            inherit_stdin=config.num_workers == 1,
        )
        for each in (dataclasses.replace(config, rank=rank) for rank in range(config.num_workers))
    ]
    return servers + workers


def run_local(options: JobOptions, environ: Mapping[str, str]) -> int:
    """Run a job to its end; return the exit status.

    Blocks. Main thread only: meanwhile it handles SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGCHLD.

    Raises:
        CommandNotFound: the command cannot be run; nothing was started.
        InvalidArgument: a variable in `environ` should hold a number and does not.
        AddressUnavailable: the scheduler cannot listen at `host`.
        OSError: a process cannot be started.
    """
    command = find_command(options.command, environ)
    scheduler, config = open_scheduler(job_config(options, environ, scheduler=("", 0), token=""))
    scheduler.start()
    try:
        sinks: dict[Stream, Sink] = {"stdout": FileSink(sys.stdout), "stderr": FileSink(sys.stderr)}
        eager = options.num_workers == 1 and sys.stdin is not None and sys.stdin.isatty()
        output = Output(sinks, prefix=options.prefix, eager=eager)
        master_port = _free_port(config.scheduler_host) if options.torch_env else 0
        specs = plan(config, command, {**terminal_variables(options, sinks), **environ}, master_port)
        return ProcessGroup(specs, output, **scheduler_calls(scheduler, options.num_servers)).run()
    finally:
        scheduler.stop()


def terminal_variables(options: JobOptions, sinks: Mapping[Stream, Sink]) -> dict[str, str]:
    """Return COLUMNS, the width that the prefix leaves, if there is a terminal behind the pipes."""
    sizes = [sink.size for sink in sinks.values()]
    if sizes[0] is None or None in sizes:
        return {}
    prefix = prefix_text(Node("worker", options.num_workers - 1)) if options.prefix else ""
    return {"COLUMNS": str(max(sizes[0][0] - len(prefix) - 1, 20))}
