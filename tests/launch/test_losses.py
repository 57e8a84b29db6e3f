"""A process is lost while others wait for it: they are told, and soon nothing of the job is left."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(150)]

DEADLINE_S = 100.0
TOLD_S = 3.0  # both are promised
GONE_S = 8.0  # of `tensorkv run`
MARK = "LOSSES_JOB"
LAST_WORDS = "so far all is well"  # of worker 1
ROUND = "round 1 of 'w'"

TRAIN = """
import contextlib, logging, os, signal, sys, time
import tensorkv
from tensorkv.peer import deadlines

deadlines.LOG_EVERY_S = 0.5
how, order = sys.argv[1:]

def say(line):
    os.write(1, f"{line}\\n".encode())

def fails(call):
    try:
        call()
    except tensorkv.PeerLostError as error:
        say(f"rank {kv.rank} at {time.monotonic()}: {error}")

def work(rank=None):
    global kv
    import torch  # not in the parent under `tensorkv.spawn`: it takes a second

    if os.environ.get("TENSORKV_RANK", os.environ.get("RANK")) != "1":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # so that it tells, whatever the launcher does
    kv = tensorkv.create("dist_sync")
    logging.basicConfig(format=f"rank {kv.rank}: %(message)s")
    kv.init("w", torch.zeros(4))
    with kv if how == "with" else contextlib.nullcontext():
        kv.barrier()
        if kv.rank == 1:
            sys.stderr.write("so far all is well\\n")
            sys.stderr.flush()
            exec(open(order).read())
        kv.push("w", torch.ones(4))
        fails(lambda: kv.pull("w"))
        fails(lambda: kv.push("w", torch.ones(4)))
        fails(kv.barrier)
        kv.pull("w")

if __name__ == "__main__":
    if how == "spawn":
        tensorkv.spawn(work, num_workers=2)
    else:
        work()
"""

LAUNCHERS = {
    "run": ["-m", "tensorkv", "run", "-n", "{}", "--", sys.executable],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "{}"],
    "spawn": [],
}


class Started:
    """A job. Worker 1 has joined and waits for an order, the others wait for it in a pull."""

    def __init__(self, launcher: str, how: str, folder: Path, num_workers: int) -> None:
        script, self._order = folder / "train.py", folder / "order"
        script.write_text(TRAIN)
        os.mkfifo(self._order)
        self._mark = secrets.token_hex(8)
        self.others = {str(rank) for rank in range(num_workers)} - {"1"}
        started = [word.format(num_workers) for word in LAUNCHERS[launcher]]
        self.process = subprocess.Popen(
            [sys.executable, *started, str(script), how, str(self._order)],
            env={**os.environ, MARK: self._mark},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []

    def until_said(self, *patterns: str) -> None:
        """Read on until there was a line with each of these."""
        awaited = set(patterns)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            awaited -= {each for each in awaited if re.search(each, line)}
            if not awaited:
                return
        raise AssertionError(f"the job ended without {awaited}:\n{''.join(self.lines)}")

    def until_all_wait(self) -> None:
        waiting = [f"rank {rank}: pull of 'w': waiting for worker 1, {ROUND}, " for rank in self.others]
        self.until_said(*waiting, f"{LAST_WORDS}$")

    def order(self, code: str) -> None:
        """Have worker 1 execute this."""
        self._order.write_text(code)

    def processes(self) -> dict[int, dict[str, str]]:
        """Return the environment of each process of the job, the launcher and what it started, by number."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):  # it has ended meanwhile, or is another user's
                    pairs = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                    env = dict(pair.partition("=")[::2] for pair in pairs)
                    if env.get(MARK) == self._mark:
                        found[int(entry.name)] = env
        return found

    def with_variables(self, **wanted: str) -> int:
        """Return the one process that was started with these variables."""
        [pid] = [pid for pid, env in self.processes().items() if wanted.items() <= env.items()]
        return pid

    def left_after(self, timeout_s: float) -> list[str]:
        """Return the commands of processes that are still there after so many seconds."""
        deadline = time.monotonic() + timeout_s
        while pids := self.processes():
            with contextlib.suppress(ProcessLookupError):
                handle = os.pidfd_open(next(iter(pids)))
                ended, _, _ = select.select([handle], [], [], max(deadline - time.monotonic(), 0.0))
                os.close(handle)
                if not ended:
                    return [self._command(pid) for pid in pids]
        return []

    def _command(self, pid: int) -> str:
        with contextlib.suppress(OSError):
            return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        return "gone now"

    def end(self) -> tuple[int, list[str]]:
        """Return the status of the launcher and all lines of the job."""
        rest, _ = self.process.communicate(timeout=DEADLINE_S)
        return self.process.returncode, "".join([*self.lines, rest]).splitlines()

    def kill(self) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextmanager
def started(launcher: str, how: str, folder: Path, num_workers: int = 2) -> Iterator[Started]:
    job = Started(launcher, how, folder, num_workers)
    with job.process:
        try:
            job.until_all_wait()
            yield job
        finally:
            job.kill()


def check_last_lines(lines: list[str]) -> None:
    """The last of worker 1, its traceback if it has one, is repeated at the end, or stands there already."""
    raised = f"tensorkv:   {ORDERS[0][3]}"
    assert SHOWN in lines or lines[-2] == raised or lines[-2].startswith("[worker 1]")


def check_told(job: Started, lines: list[str], lost_at: float, text: str) -> None:
    """Each other worker was told in time, in its pull, in a push after it and in a barrier, alike."""
    pattern = r"(?:\[worker \d\] )?rank (\d) at ([\d.]+): (.*)"
    told = [found.groups() for line in lines if (found := re.fullmatch(pattern, line))]
    assert sorted(rank for rank, _, _ in told) == sorted([*job.others] * 3), lines
    for _, at, words in told:
        assert re.match(text, words), words
        assert float(at) - lost_at < TOLD_S


SHOWN = f"tensorkv:   {LAST_WORDS}"  # once more, at the end
KILLED = "its connection ended without a goodbye"
LATE = "was lost, and had not ended 3 s later"  # on a machine with too much to do
ORDERS = [
    ("with", "raise ArithmeticError('a nan')", f"(failed with status 1|{LATE})", "ArithmeticError: a nan"),
    ("plain", "os._exit(0)", "was lost, although it ended with status 0", KILLED),
]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code", "ended", "cause"), ORDERS, ids=["raise", "exit"])
def test_a_worker_that_fails_ends_the_job(
    tmp_path: Path, how: str, code: str, ended: str, cause: str
) -> None:
    with started("run", how, tmp_path) as job:
        lost_at = time.monotonic()
        job.order(code)
        assert job.left_after(GONE_S) == []
        status, lines = job.end()
    check_told(job, lines, lost_at, f"worker 1 on host .+ was lost: {cause}")
    assert re.fullmatch(f"tensorkv: worker 1 {ended}; the job was ended", lines[-1])
    check_last_lines(lines)
    assert status == 1


@pytest.mark.slow
@pytest.mark.parametrize(("role", "rank", "expected"), [("worker", 1, 137), ("server", 0, 1)])
def test_a_killed_process_ends_the_job(tmp_path: Path, role: str, rank: int, expected: int) -> None:
    with started("run", "plain", tmp_path, num_workers=3 if role == "worker" else 2) as job:
        pid = job.with_variables(TENSORKV_ROLE=role, TENSORKV_RANK=str(rank))
        lost_at = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        assert job.left_after(GONE_S) == []
        status, lines = job.end()
    check_told(job, lines, lost_at, f"{role} {rank} on host .+ was lost: {KILLED}")
    assert lines[-1] == f"tensorkv: {role} {rank} failed with status 137 (SIGKILL); the job was ended"
    assert (SHOWN in lines) == (role == "worker")
    assert status == expected


@pytest.mark.slow
def test_a_killed_launcher_takes_all_with_it(tmp_path: Path) -> None:
    with started("run", "plain", tmp_path) as job:
        assert len(job.processes()) >= 4  # itself, two workers, a server
        job.process.kill()
        assert job.left_after(GONE_S) == []
        status, _ = job.end()
    assert status == -signal.SIGKILL


@pytest.mark.slow
def test_a_failure_under_spawn_ends_the_job(tmp_path: Path) -> None:
    with started("spawn", "spawn", tmp_path) as job:
        lost_at = time.monotonic()
        job.order("raise ArithmeticError('a nan')")
        assert job.left_after(DEADLINE_S) == []
        status, lines = job.end()
    check_told(job, lines, lost_at, "worker 1 on host .+ was lost: it ended with ArithmeticError: a nan")
    assert "tensorkv.errors.JobFailed: worker 1 failed with status 1; the job was ended" in lines
    assert lines[-1] == "ArithmeticError: a nan"
    assert status == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lost", "text"),
    [
        ("server", f"server 0 on host .+ was lost: {KILLED}"),
        ("scheduler", f"the scheduler on host 127.0.0.1 is gone: {KILLED}"),
    ],
    ids=["server", "sidecar"],
)
def test_a_killed_process_under_torchrun_ends_the_job(tmp_path: Path, lost: str, text: str) -> None:
    """The sidecar has the scheduler, and keeps the servers. It survives being asked who waits for whom."""
    with started("torchrun", "plain", tmp_path) as job:
        os.kill(job.with_variables(TENSORKV_ROLE="scheduler"), signal.SIGUSR1)
        told = f"^  store 'default': {ROUND} waits for worker 1$"
        job.until_said("^tensorkv: nothing waits at the scheduler$", told)
        pid = job.with_variables(TENSORKV_ROLE=lost)
        lost_at = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        assert job.left_after(DEADLINE_S) == []
        status, lines = job.end()
    check_told(job, lines, lost_at, text)
    assert status == 1
