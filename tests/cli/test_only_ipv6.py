"""A host that has ::1 and no other address: a network namespace that others cannot see."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(150)]
DEADLINE_S = 120.0

STORE = """
import os
import torch
import tensorkv

def work(rank=None):
    with tensorkv.create("dist_sync", {options}) as kv:
        kv.init("w", torch.zeros(3))
        kv.push("w", torch.ones(3))
        os.write(1, f"pulled {{kv.pull('w').tolist()}}\\n".encode())

if __name__ == "__main__":
    {call}
"""


def inside(command: str, script: Path) -> list[str]:
    """Run a shell's command where there is only ::1; return its lines of stdout, sorted."""
    if os.geteuid() != 0:
        pytest.skip("making a network namespace needs root")
    for tool in ("unshare", "ip"):
        if shutil.which(tool) is None:
            pytest.skip(f"making a network namespace needs `{tool}`")
    lone = "ip link set lo up && ip addr del 127.0.0.1/8 dev lo && ip -6 addr show dev lo | grep -q ::1"
    if subprocess.run(["unshare", "-n", "sh", "-c", lone], capture_output=True, check=False).returncode:
        pytest.skip("this system makes no namespace with ::1 alone")
    env = {**os.environ, "PYTHON": sys.executable, "SCRIPT": str(script)}
    whole = f"{lone} && {command}"
    done = subprocess.run(
        ["unshare", "-n", "sh", "-c", whole], env=env, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode == 0, done.stderr
    return sorted(done.stdout.splitlines())


RUN = '"$PYTHON" -m tensorkv run --no-prefix {} -- "$PYTHON" "$SCRIPT"'

TORCHRUN = (
    '"$PYTHON" -m torch.distributed.run --nnodes 1 --nproc-per-node 2 --rdzv-backend c10d --rdzv-id job '
    '--rdzv-endpoint "[::1]:29400" --local-addr ::1 "$SCRIPT"'
)


@pytest.mark.parametrize(
    ("command", "call", "options", "workers"),
    [
        (RUN.format("-n 2 -s 2"), "work()", "", 2),
        (RUN.format("--host ::1 --transport tcp"), "work()", "", 1),
        ("TENSORKV_HOST=[::1] " + RUN.format(""), "work()", "", 1),
        (TORCHRUN, "work()", "", 2),
        ('"$PYTHON" "$SCRIPT"', "tensorkv.spawn(work, num_workers=2)", "", 2),
        ('"$PYTHON" "$SCRIPT"', "work()", "embedded=True, transport='tcp'", 1),
    ],
    ids=["run", "run --host", "TENSORKV_HOST", "torchrun", "spawn", "embedded"],
)
def test_a_job_runs(tmp_path: Path, command: str, call: str, options: str, workers: int) -> None:
    script = tmp_path / "train.py"
    script.write_text(STORE.format(call=call, options=options))
    assert inside(command, script) == [f"pulled {[float(workers)] * 3}"] * workers
