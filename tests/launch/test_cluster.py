"""A job in this process: it stands, it ends, and it leaves nothing when it cannot begin."""

from __future__ import annotations

import errno
import os

import pytest

from tensorkv.errors import MemoryLimitReached, PeerLostError
from tensorkv.launch import cluster as cluster_module
from tensorkv.launch.cluster import LocalCluster
from tensorkv.server.loop import Server
from tensorkv.wire import messages as m

DEADLINE_S = 20.0


@pytest.mark.parametrize("host", ["inproc", "127.0.0.1"])
def test_workers_join_and_leave(host: str) -> None:
    cluster = LocalCluster(2, 3, host=host, timeout_s=DEADLINE_S)
    jobs = [cluster.join(rank) for rank in range(2)]
    assert [len(job.links) for job in jobs] == [3, 3]
    assert [job.config.rank for job in jobs] == [0, 1]
    for job in jobs:
        job.close(m.Goodbye())
    assert cluster.scheduler.lost is None
    cluster.stop()
    with pytest.raises(PeerLostError, match="the scheduler at .* cannot be reached"):
        cluster.join(0)


def test_two_jobs_have_two_tokens() -> None:
    one, other = LocalCluster(1, 1), LocalCluster(1, 1)
    assert one.config("worker", 0).token != other.config("worker", 0).token
    one.stop()
    other.stop()


def test_a_server_that_cannot_start_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite looks for threads and sockets."""

    class Second:
        made = 0

        def __new__(cls, *arguments: object) -> Server:  # type: ignore[misc]
            cls.made += 1
            if cls.made == 2:
                raise OSError("no more descriptors")
            return Server(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(cluster_module, "Server", Second)
    with pytest.raises(OSError, match="no more descriptors"):
        LocalCluster(1, 2, host="127.0.0.1")


def test_a_job_without_descriptors_says_what_to_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*args: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("tensorkv.server.loop.os.eventfd", none_left)
    with pytest.raises(MemoryLimitReached, match=r"cannot be started: .*Too many open files.*ulimit -n"):
        LocalCluster(1, 1, timeout_s=DEADLINE_S)
