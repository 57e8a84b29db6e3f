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

names = [f"key number {{number}}" for number in range(int(sys.argv[1]))]
values = [torch.zeros(2)] * len(names)
"""

CASES = {
    # The reply of the init, which rank 0 makes meanwhile, is more than the worker's socket holds.
    "worker": """
kv = tensorkv.create("dist_sync")
if kv.rank == 1:
    me = os.getpid()
    stopping = f"time.sleep(1); os.kill({me}, 19); time.sleep({stopped_s}); os.kill({me}, 18)"
    subprocess.Popen([sys.executable, "-c", f"import os, time; {stopping}"])
else:
    time.sleep(2)
kv.init(names, values)
kv.barrier()
""",
    # The question of the init is more than the scheduler's socket holds.
    "scheduler": """
kv = tensorkv.create("dist_sync")
if kv.rank == 0:
    stop(os.getppid())
kv.init(names, values)
kv.barrier()
""",
    # The values of the init are more than the server's socket holds.
    "server": """
kv = tensorkv.create("dist_sync")
if kv.rank == 0:
    stop(server_of(os.getppid()))
kv.init(names, values)
kv.barrier()
""",
    # Before anybody has joined: the handshakes wait.
    "scheduler at the start": """
if os.environ["TENSORKV_RANK"] == "0":
    stop(os.getppid())
kv = tensorkv.create("dist_sync")
kv.init(names, values)
kv.barrier()
""",
    "server at the start": """
if os.environ["TENSORKV_RANK"] == "0":
    time.sleep(1)
    stop(server_of(os.getppid()))
kv = tensorkv.create("dist_sync")
kv.init(names, values)
kv.barrier()
""",
}


@pytest.mark.parametrize(
    ("case", "transport", "num_keys"),
    [
        ("worker", "tcp", 5_000),
        ("scheduler", "tcp", 20_000),
        ("server", "tcp", 1_000),
        ("server", "shm", 1_000),
        ("scheduler at the start", "tcp", 10),
        ("server at the start", "shm", 10),
    ],
)
def test_a_stopped_process_is_waited_for(case: str, transport: str, num_keys: int, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(f"{STOP}{CASES[case]}print(f'rank {{kv.rank}} has {{len(names)}} keys')\n")
    options = ["-n", "2", "-s", "1", "--peer-timeout", str(PEER_TIMEOUT_S), "--transport", transport]
    worker = [sys.executable, str(script), str(num_keys)]
    command = [sys.executable, "-m", "tensorkv", "run", *options, *worker]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(2):
        assert f"rank {rank} has {num_keys} keys" in done.stdout
    assert "lost" not in done.stderr
