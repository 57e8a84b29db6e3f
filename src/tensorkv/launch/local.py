"""Runs a whole job on this machine: scheduler, servers and workers. `tensorkv run` is `run_local`."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tensorkv.config import DEFAULT_TIMEOUT_S, ENV_SLICE_BOUND_BYTES, ENV_TIMEOUT_S, JobConfig
from tensorkv.errors import InvalidArgument
from tensorkv.launch.job import Job, ProcessSpec
from tensorkv.launch.output import FileSink, Output, Sink, Stream, prefix_text
from tensorkv.launch.supervisor import Node

ENV_ALLOW_IMPORT = "TENSORKV_ALLOW_IMPORT"
"""Modules, joined by commas, that servers may import for updaters and optimizers."""


class CommandNotFound(Exception):
    """There is no such command, or it cannot be run. `status` is what a shell returns then."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


def find_command(command: Sequence[str], environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return `command`, checked: its first word can be run.

    "python" becomes this interpreter if there is no python on the PATH.

    Raises:
        CommandNotFound: status 127 if there is no such file, 126 if it is not executable.
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
    """What `run_local` is told: W workers that run `command`, and S servers.

    `host` is the address everything binds to; `timeout_s` the deadline of a waiting call, None for
    what the environment says; `allow_import` the modules servers may import; `prefix` whether lines
    are named.

    Raises:
        InvalidArgument: a number is out of its range, a module has no module's name, or the command is empty.
    """

    command: tuple[str, ...]
    num_workers: int
    num_servers: int
    host: str = "127.0.0.1"
    timeout_s: float | None = None
    allow_import: tuple[str, ...] = ()
    prefix: bool = True

    def __post_init__(self) -> None:
        for name, number in (("workers", self.num_workers), ("servers", self.num_servers)):
            if number < 1:
                raise InvalidArgument(f"a job needs at least 1 of its {name}, but {number} were asked for")
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise InvalidArgument(f"the timeout must be more than 0 seconds, but is {self.timeout_s:g}")
        for module in self.allow_import:
            if not all(part.isidentifier() for part in module.split(".")):
                raise InvalidArgument(f"{module!r} is not the name of a module")
        if not self.command:
            raise InvalidArgument("there is no command for the workers to run")


def plan(
    options: JobOptions, environ: Mapping[str, str], *, scheduler: tuple[str, int], token: str
) -> list[ProcessSpec]:
    """Return the processes of a job whose scheduler listens at `scheduler`, servers first.

    `environ` is what they inherit; a thread count, a timeout and a slice bound in it are respected.
    """
    server_argv = (sys.executable, "-m", "tensorkv.runtime.server")
    command = find_command(options.command, environ)
    timeout_s = options.timeout_s or float(environ.get(ENV_TIMEOUT_S, DEFAULT_TIMEOUT_S))
    inherited = {name: environ[name] for name in (ENV_SLICE_BOUND_BYTES,) if name in environ}
    worker_threads = max(1, len(os.sched_getaffinity(0)) // options.num_workers)

    def spec(role: Literal["worker", "server"], rank: int) -> ProcessSpec:
        config = JobConfig(
            role=role,
            rank=rank,
            num_workers=options.num_workers,
            num_servers=options.num_servers,
            scheduler_host=scheduler[0],
            scheduler_port=scheduler[1],
            token=token,
            host=options.host,
            timeout_s=timeout_s,
        )
        env = {"OMP_NUM_THREADS": str(worker_threads), **environ, **config.to_env(), **inherited}
        env["PYTHONUNBUFFERED"] = "1"
        if role == "server":
            env["OMP_NUM_THREADS"] = "1"
        if options.allow_import:
            env[ENV_ALLOW_IMPORT] = ",".join(options.allow_import)
        return ProcessSpec(
            node=Node(role, rank),
            argv=command if role == "worker" else server_argv,
            env=env,
            inherit_stdin=role == "worker" and options.num_workers == 1,
        )

    servers = [spec("server", rank) for rank in range(options.num_servers)]
    return servers + [spec("worker", rank) for rank in range(options.num_workers)]


def run_local(options: JobOptions, environ: Mapping[str, str]) -> int:
    """Run a job to its end; return the exit status.

    Blocks. In the main thread only: it takes over SIGINT, SIGTERM, SIGHUP and SIGCHLD meanwhile.

    Raises:
        CommandNotFound: the command cannot be run; nothing was started.
        OSError: the scheduler cannot listen on `host`, or a process cannot be started.
    """
    find_command(options.command, environ)
    from tensorkv.runtime.scheduler import SchedulerServer

    token = secrets.token_hex(32)
    scheduler = SchedulerServer(
        num_workers=options.num_workers, num_servers=options.num_servers, token=token, host=options.host
    )
    scheduler.start()
    try:
        sinks: dict[Stream, Sink] = {"stdout": FileSink(sys.stdout), "stderr": FileSink(sys.stderr)}
        eager = options.num_workers == 1 and sys.stdin is not None and sys.stdin.isatty()
        output = Output(sinks, prefix=options.prefix, eager=eager)
        environ = {**_columns(options, sinks), **environ}
        specs = plan(options, environ, scheduler=scheduler.address, token=token)
        return Job(specs, output, stop_servers=scheduler.stop).run()
    finally:
        scheduler.stop()


def _columns(options: JobOptions, sinks: Mapping[Stream, Sink]) -> dict[str, str]:
    """Return the variable that tells progress bars how wide they may be, if there is a terminal."""
    sizes = [sink.size for sink in sinks.values() if sink.size is not None]
    if not sizes:
        return {}
    prefix = prefix_text(Node("worker", options.num_workers - 1)) if options.prefix else ""
    return {"COLUMNS": str(max(sizes[0][0] - len(prefix) - 1, 20))}
