"""The job of each system under test for a case: its processes and their environment."""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import SOURCE, Process, python_script, threads_env

from tensorkv.bench.steps import Plan

MANY_KEYS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One setup in which all systems are measured."""

    name: str
    title: str
    kind: str
    plan: Plan
    num_workers: int = 1
    num_servers: int = 0

    @property
    def is_dist(self) -> bool:
        """Whether it needs several processes."""
        return self.num_servers > 0


def tensorkv_job(case: Case, transport: str = "tcp", lent: bool = False) -> list[Process]:
    """Return TensorKV's job: the launcher, which starts the rest, or the script alone in one process.

    With `lent` it pushes from tensors of `empty_like`.
    """
    return _tensorkv_job(case, transport, [sys.executable, "-m", "tensorkv.bench.worker"], lent, SOURCE)


def turns_job(
    case: Case,
    transport: str,
    *,
    lent: bool,
    source: Path,
    fifos: Sequence[Path],
    turn: int,
    second: bool,
    bound: bool = False,
) -> list[Process]:
    """Return a TensorKV job that takes turns with another; see `turnsteps.py`.

    Args:
        case: the case to measure.
        transport: the transport of its messages.
        lent: whether it pushes from tensors of `empty_like`.
        source: the `src` folder of a checkout.
        fifos: the FIFOs of this job's turns, and of the other's.
        turn: number of steps in a turn.
        second: whether the other job begins.
        bound: whether its steps are those of `KVStore.bind`.
    """
    of_turns = [f"--mine={fifos[0]}", f"--others={fifos[1]}", f"--turn={turn}"]
    script = python_script("turnsteps.py", *of_turns, *(["--second"] if second else []))
    if bound:
        script.append("--bound")
    return _tensorkv_job(case, transport, script, lent, source)


def _tensorkv_job(
    case: Case, transport: str, script: Sequence[str], lent: bool, source: Path
) -> list[Process]:
    command = [*script, *(["--lent"] if lent else []), f"--kind={case.kind}", *case.plan.arguments()]
    env = _checkout_first(source) | threads_env(case.num_workers)
    if not case.is_dist:
        return [Process(name="tensorkv", command=command, env=env)]
    launcher = [sys.executable, "-m", "tensorkv", "run"]
    options = ["-n", str(case.num_workers), "-s", str(case.num_servers), "--transport", transport, "--"]
    return [Process(name="tensorkv run", command=[*launcher, *options, *command], env=env)]


def mxnet_job(case: Case, python: str) -> list[Process]:
    """Return MXNet's job, run by the interpreter `python`, which has MXNet 1.9.1."""
    script = python_script("mxnetsteps.py", f"--kind={case.kind}", *case.plan.arguments(), python=python)
    if not case.is_dist:
        return [Process(name="mxnet", command=script, env=_checkout_first())]
    job = {
        "DMLC_NUM_WORKER": str(case.num_workers),
        "DMLC_NUM_SERVER": str(case.num_servers),
        "DMLC_PS_ROOT_URI": "127.0.0.1",
        "DMLC_PS_ROOT_PORT": str(_free_port()),
        "DMLC_NODE_HOST": "127.0.0.1",
        **_checkout_first(),
        **threads_env(case.num_workers),
    }
    roles = ["scheduler"] + ["server"] * case.num_servers + ["worker"] * case.num_workers
    return [
        Process(
            name=f"mxnet {role}",
            command=script,
            env={**job, "DMLC_ROLE": role},
            helper=role != "worker",
        )
        for role in roles
    ]


def gloo_job(case: Case, folder: Path) -> list[Process]:
    """Return the ranks of a gloo all-reduce, which rendezvous by a file in the empty folder `folder`."""
    plan = case.plan
    if len(plan.shapes) > MANY_KEYS:  # one by one, keys take a thousand times as long as together
        plan = dataclasses.replace(plan, steps=min(plan.steps, 10))
    script = python_script("gloosteps.py", f"--meet={folder / 'meet'}", *plan.arguments())
    env = {
        "WORLD_SIZE": str(case.num_workers),
        **_checkout_first(),
        "GLOO_SOCKET_IFNAME": "lo",  # loopback, as for the other systems
        **threads_env(case.num_workers),
    }
    return [
        Process(name=f"gloo rank {rank}", command=script, env={**env, "RANK": str(rank)})
        for rank in range(case.num_workers)
    ]


def ray_job(case: Case, python: str, folder: Path) -> list[Process]:
    """Return the driver of Ray actors, run by the interpreter `python`, which has Ray; it starts the rest.

    Ray's logs and sockets go to the empty folder `folder`, whose path must be short.
    """
    sizes = [f"--workers={case.num_workers}", f"--servers={case.num_servers}"]
    options = [f"--folder={folder}", *sizes, *case.plan.arguments()]
    script = python_script("raysteps.py", *options, python=python)
    env = _checkout_first() | threads_env(case.num_workers) | {"RAY_USAGE_STATS_ENABLED": "0"}
    return [Process(name="ray", command=script, env=env)]


def floor_job(case: Case) -> list[Process]:
    """Return the floor: one process, which forks the others."""
    ways = ["--way=shm", "--way=tcp"] if case.is_dist else ["--way=local"]
    sizes = [f"--workers={case.num_workers}", f"--servers={max(1, case.num_servers)}"]
    script = python_script("floor.py", *ways, *sizes, *case.plan.arguments())
    env = _checkout_first() | threads_env(case.num_workers)
    return [Process(name="floor", command=script, env=env)]


JobMaker = Callable[[Case], list[Process]]


def _checkout_first(source: Path = SOURCE) -> dict[str, str]:
    """Return an environment that measures this source, not an installed one; by default the one beside us."""
    inherited = os.environ.get("PYTHONPATH")
    paths = [str(source.resolve()), *([inherited] if inherited else [])]
    return {"PYTHONPATH": os.pathsep.join(paths)}


def _free_port() -> int:
    """Return a currently free port. MXNet's scheduler cannot choose one itself."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
