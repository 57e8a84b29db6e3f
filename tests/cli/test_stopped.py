"""A process that is stopped is not lost, also when more is sent to it meanwhile than its socket holds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(180)]

PEER_TIMEOUT_S = 1
STOPPED_S = 4 * PEER_TIMEOUT_S

STOP = f"""
import os, signal, subprocess, sys, threading, time
import torch
import tensorkv

stopped_s = {STOPPED_S}

def children(parent):
    found = []
    for task in os.listdir(f"/proc/{{parent}}/task"):
        found += open(f"/proc/{{parent}}/task/{{task}}/children").read().split()
    return [int(each) for each in found]

def server_of(launcher):
    programs = {{each: open(f"/proc/{{each}}/cmdline", "rb").read() for each in children(launcher)}}
    (found,) = [each for each, program in programs.items() if b"tensorkv.server.loop" in program]
    return found

def stop(process):
    '''Stop a process, and let it go on later.'''
    os.kill(process, signal.SIGSTOP)
    threading.Timer(stopped_s, os.kill, (process, signal.SIGCONT)).start()

def init(case, num_keys):
    kv.init([f"key number {{number}}, {{case}}" for number in range(num_keys)], [torch.zeros(2)] * num_keys)
    kv.barrier()
    print(f"rank {{kv.rank}} has {{num_keys}} keys, {{case}}", flush=True)
"""

SERVER = """
# The values of the init are more than the server's socket holds.
if kv.rank == 0:
    stop(server_of(os.getppid()))
init("server", 1_000)
"""

TCP = f"""
# Before anybody has joined: the handshakes wait.
if os.environ["TENSORKV_RANK"] == "0":
    stop(os.getppid())
kv = tensorkv.create("dist_sync")
init("scheduler at the start", 10)
{SERVER}
# The reply of the init, which rank 0 makes meanwhile, is more than the worker's socket holds.
if kv.rank == 1:
    me = os.getpid()
    stopping = f"time.sleep(1); os.kill({{me}}, 19); time.sleep({{stopped_s}}); os.kill({{me}}, 18)"
    stopper = subprocess.Popen([sys.executable, "-c", f"import os, time; {{stopping}}"])
else:
    time.sleep(2)
init("worker", 5_000)

# The question of the init is more than the scheduler's socket holds.
if kv.rank == 0:
    stop(os.getppid())
init("scheduler", 20_000)
"""

SHM = f"""
if os.environ["TENSORKV_RANK"] == "0":
    time.sleep(1)
    stop(server_of(os.getppid()))
kv = tensorkv.create("dist_sync")
init("server at the start", 10)
{SERVER}
"""


@pytest.mark.parametrize(
    ("transport", "script", "keys"),
    [
        (
            "tcp",
            TCP,
            {"scheduler at the start": 10, "server": 1_000, "worker": 5_000, "scheduler": 20_000},
        ),
        ("shm", SHM, {"server at the start": 10, "server": 1_000}),
    ],
    ids=["tcp", "shm"],
)
def test_a_stopped_process_is_waited_for(
    transport: str, script: str, keys: dict[str, int], tmp_path: Path
) -> None:
    """One process after the other of a job is stopped; that of the case whose lines are missing was lost."""
    path = tmp_path / "train.py"
    path.write_text(STOP + script)
    options = ["-n", "2", "-s", "1", "--peer-timeout", str(PEER_TIMEOUT_S), "--transport", transport]
    command = [sys.executable, "-m", "tensorkv", "run", *options, sys.executable, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = [
        f"[worker {rank}] rank {rank} has {num} keys, {case}" for case, num in keys.items() for rank in (0, 1)
    ]
    assert sorted(done.stdout.splitlines()) == sorted(told)
    assert "lost" not in done.stderr
