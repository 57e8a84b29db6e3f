"""Whole jobs through the command line: scheduler, servers and workers as real processes."""

from __future__ import annotations

import socket
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

ONE_RAISES = """
import torch
import tensorkv

def step(kv, number):
    if (kv.rank, number) == (1, 2):
        raise ValueError("no luck")
    kv.push("w", torch.ones(4))
    kv.pull("w")

kv = tensorkv.create("dist_sync")
kv.init("w", torch.zeros(4))
for number in range(100):
    step(kv, number)
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


@pytest.mark.slow
def test_who_raised_is_told_last_and_whole_and_the_others_in_a_line_each(tmp_path: Path) -> None:
    status, _, err = run(tmp_path, ONE_RAISES, "-n", "3")
    assert status == 1
    lines = err.splitlines()
    for rank in (0, 2):  # if the launcher lets them say it
        said = [line for line in lines if line.startswith(f"[worker {rank}]")]
        assert len(said) <= 1
        assert all(
            f"worker 1 on host {socket.gethostname()} was lost: it ended with ValueError: no luck (" in line
            for line in said
        )
    own = [line.removeprefix("[worker 1] ") for line in lines if line.startswith("[worker 1]")]
    assert own[0] == "Traceback (most recent call last):"
    assert own[-1] == "ValueError: no luck"
    assert lines[-1].startswith("tensorkv: worker 1 ")
    last = [
        line.removeprefix("[worker 1] ").removeprefix("tensorkv:   ") for line in lines[-1 - len(own) : -1]
    ]
    assert last == own


def test_a_lost_server_is_status_1(tmp_path: Path) -> None:
    status, _, err = run(tmp_path, SERVER_DIES, "-n", "2")
    last = "tensorkv: server 0 failed with status 137 (SIGKILL); the job was ended"
    assert err.splitlines()[-1] == last
    assert status == 1


WAITS = """
import signal
import torch
import tensorkv

tensorkv.create("dist_sync", store="first", timeout_s=100)  # servers take their time to start
kv = tensorkv.create("dist_sync", store="second")
if kv.rank == 1:
    signal.pause()
kv.barrier()
"""


def test_the_timeout_of_the_launcher_bounds_a_call(tmp_path: Path) -> None:
    status, _, err = run(tmp_path, WAITS, "-n", "2", "--timeout", "2")
    assert "WaitTimeout: barrier did not finish within 2 s: waiting for worker 1, a barrier" in err
    assert status == 1


KILLED = """
import os
import signal
import sys
import torch
import tensorkv

kind, policy = sys.argv[1:]
kv = tensorkv.create(kind, **({"on_worker_loss": policy} if policy else {}))
kv.set_updater("add")
kv.init("w", torch.zeros(4))
for step in range(1, 11):
    kv.push("w", torch.full((4,), 10.0**kv.rank))
    kv.pull("w")  # so the push is acknowledged
    if (kv.rank, step) == (1, 3):
        os.kill(os.getpid(), signal.SIGKILL)
kv.barrier()  # of those that are left
print("sum", int(kv.pull("w")[0]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "policy"), [("dist_async", ""), ("dist_sync", "continue")])
def test_where_stores_say_so_the_others_go_on_and_the_job_succeeds(
    tmp_path: Path, kind: str, policy: str
) -> None:
    """Each rank counts in a digit place of its own: 10 steps, but 3 of the worker that was lost."""
    status, out, err = run(tmp_path, KILLED, "-n", "3", "-s", "2", arguments=(kind, policy))
    assert out.splitlines() == ["[worker 0] sum 1040", "[worker 2] sum 1040"]
    last = "tensorkv: worker 1 failed with status 137 (SIGKILL); the job went on without it"
    assert err.splitlines()[-1] == last
    told = [line for line in err.splitlines() if "was lost" in line]
    assert sorted(line[:10] for line in told) == ["[worker 0]", "[worker 2]"]
    assert all("worker 1 on host" in line and "the job goes on without it" in line for line in told)
    assert status == 0


LEFT = """
import sys
import torch
import tensorkv

kv = tensorkv.create("dist_sync")
kv.init("w", torch.zeros(4))
kv.barrier()
if kv.rank == 1:
    sys.exit(5)
kv.push("w", torch.ones(4))
try:
    kv.push("w", torch.ones(4))
    kv.barrier()
except tensorkv.PeerLostError as error:
    print(error, flush=True)
    raise
"""


@pytest.mark.slow
def test_a_status_that_only_the_launcher_sees_is_told_to_the_others(tmp_path: Path) -> None:
    """The worker that failed first is named last, whoever follows it."""
    status, out, err = run(tmp_path, LEFT, "-n", "3")
    assert err.splitlines()[-1] == "tensorkv: worker 1 failed with status 5; the job was ended"
    assert status == 5
    for line in out.splitlines():  # the launcher may end them before they say it
        assert f"worker 1 on host {socket.gethostname()} was lost: it ended with status 5" in line
