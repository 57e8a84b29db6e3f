"""A host that vanishes without a word: a network namespace whose link goes down."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from link import HERE, THERE, NoLink, limited_link

from tensorkv.errors import PeerLostError
from tensorkv.launch.cluster import LocalCluster
from tensorkv.stores.dist import DistStore
from tensorkv.wire import messages as m

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

PEER_TIMEOUT_S = 3.0
SLACK_S = 3.0  # one more probe, and the 3 s in which every call is told

WORKER = """
import torch
import tensorkv

kv = tensorkv.create("dist_sync")
print("joined", flush=True)
try:
    kv.init("never", torch.zeros(1))  # waits for rank 0's
except tensorkv.PeerLostError as error:
    print(error, flush=True)
"""


@pytest.fixture
def namespace() -> Iterator[str]:
    """A network namespace at THERE, joined to HERE by a link named like itself."""
    try:
        with limited_link(mbit=1000) as link:
            yield link.namespace
    except NoLink as exc:
        pytest.skip(str(exc))


@pytest.mark.slow
def test_a_host_that_vanishes_while_it_does_not_read_is_noticed_as_soon(
    namespace: str, tmp_path: Path
) -> None:
    """More is to be sent to the process there than it takes: it is stopped, which alone is no loss."""
    names = [f"key number {number}" for number in range(5000)]
    script = tmp_path / "train.py"
    script.write_text(
        WORKER.replace('"never", torch.zeros(1)', f"{names!r}, [torch.zeros(1)] * {len(names)}")
    )
    cluster = LocalCluster(2, 1, host=HERE, timeout_s=100.0, peer_timeout_s=PEER_TIMEOUT_S)
    command = ["ip", "netns", "exec", namespace, sys.executable, str(script)]
    env = {**os.environ, **cluster.config("worker", 1).to_env(), "TENSORKV_HOST": THERE}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as there:
        assert there.stdout is not None
        job = cluster.join(0)
        kv = DistStore("dist_sync", job, store="default", reduction="sum", timeout_s=100.0)
        assert there.stdout.readline() == "joined\n"
        while "worker 1, in init" not in "".join(cluster.scheduler.report()):
            time.sleep(0.01)
        there.send_signal(signal.SIGSTOP)
        try:
            kv.init(names, [torch.zeros(1)] * len(names))
            time.sleep(2 * PEER_TIMEOUT_S)
            assert cluster.scheduler.lost is None

            subprocess.run(["ip", "link", "set", namespace, "down"], timeout=20, check=True)
            began = time.monotonic()
            with pytest.raises(
                PeerLostError, match=r"worker 1 on host .* was lost: its host does not answer"
            ):
                kv.barrier()
            assert time.monotonic() - began < PEER_TIMEOUT_S + SLACK_S
        finally:
            there.kill()  # else a failure would wait for a process that is stopped
    job.close(m.Abandon("the test is over"))
    cluster.stop()


@pytest.mark.slow
def test_both_sides_notice_within_the_timeout_asked_for(namespace: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(WORKER)
    cluster = LocalCluster(2, 1, host=HERE, timeout_s=100.0, peer_timeout_s=PEER_TIMEOUT_S)
    command = ["ip", "netns", "exec", namespace, sys.executable, str(script)]
    env = {**os.environ, **cluster.config("worker", 1).to_env(), "TENSORKV_HOST": THERE}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as there:
        assert there.stdout is not None
        job = cluster.join(0)
        kv = DistStore("dist_sync", job, store="default", reduction="sum", timeout_s=100.0)
        kv.init("w", torch.zeros(4))
        assert there.stdout.readline() == "joined\n"

        subprocess.run(["ip", "link", "set", namespace, "down"], timeout=20, check=True)
        began = time.monotonic()
        with pytest.raises(PeerLostError, match=r"worker 1 on host .* was lost: its host does not answer"):
            kv.barrier()
        with pytest.raises(PeerLostError, match="worker 1 on host"):
            kv.push("w", torch.ones(4))
        assert time.monotonic() - began < PEER_TIMEOUT_S + SLACK_S
        text, _ = there.communicate(timeout=60)
        assert text.startswith(f"the scheduler on host {HERE} is gone: its host does not answer")
    job.close(m.Abandon("the test is over"))
    cluster.stop()
