"""Whole jobs through the command line: scheduler, servers and workers as real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

TRAIN = """
import torch
import tensorkv

with tensorkv.create("dist_sync") as kv:
    kv.init("w", torch.zeros(4))
    kv.set_optimizer(torch.optim.SGD, lr=0.5)
    for _ in range(3):
        kv.push("w", torch.full((4,), float(kv.rank + 1)))
    print(kv.rank, "of", kv.num_workers, kv.pull("w").tolist())
"""

ONE_FAILS = """
import sys
import torch
import tensorkv

kv = tensorkv.create("dist_sync")
kv.init("w", torch.zeros(4))
for step in range(100):
    if (kv.rank, step) == (1, 3):
        sys.exit(int(sys.argv[1]))
    kv.push("w", torch.ones(4))
    kv.pull("w")
"""

SERVER_DIES = """
import os
import signal
import torch
import tensorkv

def die(key, pushed, stored):
    os.kill(os.getpid(), signal.SIGKILL)

kv = tensorkv.create("dist_sync")
kv.set_updater(die)
kv.init("w", torch.zeros(4))
kv.push("w", torch.ones(4))
kv.pull("w")
"""


def run(tmp_path: Path, script: str, *options: str, arguments: tuple[str, ...] = ()) -> tuple[int, str, str]:
    """Run a job of `script`; return its status, its sorted stdout, its stderr."""
    path = tmp_path / "train.py"
    path.write_text(script)
    command = [sys.executable, "-m", "tensorkv", "run", *options, "--", sys.executable, str(path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    return done.returncode, "\n".join(sorted(done.stdout.splitlines())), done.stderr


def test_workers_share_a_value_through_servers(tmp_path: Path) -> None:
    status, out, err = run(tmp_path, TRAIN, "-n", "2", "-s", "2")
    assert "failed" not in err
    assert out.splitlines() == [
        "[worker 0] 0 of 2 [-4.5, -4.5, -4.5, -4.5]",
        "[worker 1] 1 of 2 [-4.5, -4.5, -4.5, -4.5]",
    ]
    assert status == 0


def test_the_worker_that_failed_first_is_named_whoever_follows_it(tmp_path: Path) -> None:
    status, _, err = run(tmp_path, ONE_FAILS, "-n", "3", arguments=("5",))
    assert err.splitlines()[-1] == "tensorkv: worker 1 failed with status 5; the job was ended"
    assert status == 5


def test_a_lost_server_is_status_1(tmp_path: Path) -> None:
    status, _, err = run(tmp_path, SERVER_DIES, "-n", "2")
    last = "tensorkv: server 0 failed with status 137 (SIGKILL); the job was ended"
    assert err.splitlines()[-1] == last
    assert status == 1
