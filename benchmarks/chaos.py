"""Kills random processes of running jobs at random moments, and looks at what the others make of it.

    python benchmarks/chaos.py --kills 200 --seed 1

Each job is drawn by chance: kind, what the loss of a worker means, numbers of workers and servers, who is
killed and when (as it starts, or at a step). Then it is checked that

- nothing hangs: a job that must fail is gone within 8 s of the kill, with a status other than 0, and its
  workers that could still say so name the process that was lost; a job that goes on ends by itself;
- nothing is left: no process, no file in the folder for temporary files or in /dev/shm;
- nothing is wrong where the job goes on: by the integer ledgers of `chaosworker.py` every push of a worker
  that lived counts once in every element, of a killed one at least those that were acknowledged and at most
  those that it began.

It needs Linux: processes are found by their environment in /proc.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from chaosworker import LEDGER

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent / "src"
MARK = "TENSORKV_CHAOS_JOB"
GONE_S = 8.0
"""Maximum time from the kill to the end of a job that must fail."""

HANG_S = 120.0
"""Timeout after which a job counts as hanging. Generous: it includes the start on a busy machine."""

POLL_S = 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """The parameters and victims of one job. `at` are steps; -1 means during the start."""

    number: int
    kind: str
    on_worker_loss: str
    num_workers: int
    num_servers: int
    steps: int
    victims: tuple[tuple[str, int], ...]
    at: tuple[int, ...]

    @property
    def goes_on(self) -> bool:
        """Whether the job must go on without the victims."""
        return (
            self.on_worker_loss == "continue"
            and all(role == "worker" for role, _ in self.victims)
            and min(self.at) >= 0
        )

    def __str__(self) -> str:
        victims = ", ".join(
            f"{role} {rank} at {at}" for (role, rank), at in zip(self.victims, self.at, strict=True)
        )
        return (
            f"job {self.number}: {self.kind}, {self.on_worker_loss}, W={self.num_workers} "
            f"S={self.num_servers}, killed: {victims}"
        )


@dataclass(slots=True)
class Summary:
    """Results of all jobs."""

    kills: Counter[str] = field(default_factory=Counter)
    jobs: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    slowest_end_s: float = 0.0
    texts: list[str] = field(default_factory=list)

    def blame(self, what: str, draw: Draw, text: str) -> None:
        """Record a fault."""
        self.faults[what] += 1
        self.texts.append(f"{what}: {draw}: {text}")

    def lines(self) -> list[str]:
        """Return the summary as lines of Markdown."""
        kills = ", ".join(f"{number} {role}" for role, number in sorted(self.kills.items()))
        jobs = ", ".join(f"{number} {name}" for name, number in sorted(self.jobs.items()))
        names = ("hang", "leftover", "wrong value", "wrong end")
        return [
            f"- kills: {self.kills.total()} ({kills}) in {self.jobs.total()} jobs ({jobs})",
            *(f"- {name}s: {self.faults[name]}" for name in names),
            f"- slowest end of a job that had to fail: {self.slowest_end_s:.1f} s after the kill",
        ]


def draw_job(chance: random.Random, number: int, kills_left: int) -> Draw:
    """Draw a job and its victims."""
    kind, policy = chance.choice(
        [("dist_sync", "fail"), ("dist_async", "fail"), ("dist_sync", "continue"), ("dist_async", "continue")]
    )
    num_workers, num_servers = chance.randint(2, 4), chance.randint(1, 2)
    steps = chance.randint(40, 120)
    role = chance.choice(["worker", "worker", "worker", "server", "launcher"])
    victims = [(role, chance.randrange({"worker": num_workers, "server": num_servers, "launcher": 1}[role]))]
    at = [chance.choice([-1, *[chance.randrange(steps) for _ in range(5)]])]
    if policy == "continue" and role == "worker" and at[0] >= 0:
        others = [rank for rank in range(num_workers) if rank != victims[0][1]]
        for rank in chance.sample(others, min(chance.randint(0, num_workers - 2), kills_left - 1)):
            victims.append(("worker", rank))
            at.append(chance.randrange(steps))
    return Draw(
        number=number,
        kind=kind,
        on_worker_loss=policy,
        num_workers=num_workers,
        num_servers=num_servers,
        steps=steps,
        victims=tuple(victims),
        at=tuple(at),
    )


class ChaosJob:
    """A running job, in a folder of its own."""

    def __init__(self, draw: Draw, folder: Path, seed: int) -> None:
        self.draw = draw
        self.folder = folder
        self._seed = seed
        self._mark = f"{os.getpid()}-{draw.number}-{seed}"
        self._temp = folder / "tmp"
        self._temp.mkdir()
        self._shm = _shared_files()

    def start(self) -> subprocess.Popen[bytes]:
        """Start the launcher, with its output to a file."""
        draw = self.draw
        script = [
            sys.executable,
            str(HERE / "chaosworker.py"),
            f"--kind={draw.kind}",
            f"--on-worker-loss={draw.on_worker_loss}",
            f"--steps={draw.steps}",
            f"--seed={self._seed}",
            f"--folder={self.folder}",
        ]
        sizes = ["-n", str(draw.num_workers), "-s", str(draw.num_servers), "--"]
        path = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH", "")]))
        env = {**os.environ, "PYTHONPATH": path, MARK: self._mark, "TMPDIR": str(self._temp)}
        env |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        with (self.folder / "output").open("wb") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "tensorkv", "run", *sizes, *script],
                env=env,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def find(self, role: str, rank: int) -> int | None:
        """Return the process id of a worker or server, None if there is none yet."""
        for pid, env in self._processes().items():
            if env.get("TENSORKV_ROLE") == role and env.get("TENSORKV_RANK") == str(rank):
                return pid
        return None

    def left(self) -> list[int]:
        """Return the live processes of this job."""
        return sorted(self._processes())

    def _processes(self) -> dict[int, dict[str, str]]:
        found: dict[int, dict[str, str]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):  # it has ended, or belongs to another user
                    pairs = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                    env = dict(pair.partition("=")[::2] for pair in pairs)
                    if env.get(MARK) == self._mark:
                        found[int(entry.name)] = env
        return found

    def ledger(self, rank: int) -> tuple[int, int]:
        """Return the numbers of pushes that a worker has issued and got acknowledged."""
        with contextlib.suppress(FileNotFoundError):
            data = (self.folder / f"ledger-{rank}").read_bytes()
            if len(data) == LEDGER.size:
                issued, acknowledged = LEDGER.unpack(data)
                return issued, acknowledged
        return 0, 0

    def is_done(self, role: str, rank: int) -> bool:
        """Whether this is a worker that has written its result, and so will end soon."""
        return role == "worker" and (self.folder / f"result-{rank}.json").exists()

    def result(self, rank: int) -> dict[str, object]:
        """Return the result that a worker wrote at its end, an empty dict if there is none."""
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            result: dict[str, object] = json.loads((self.folder / f"result-{rank}.json").read_text())
            return result
        return {}

    def leftovers(self) -> list[str]:
        """Return the processes and files that the job has left behind."""
        deadline = time.monotonic() + GONE_S
        while self.left() and time.monotonic() < deadline:
            time.sleep(POLL_S)
        found = [f"process {pid}" for pid in self.left()]
        found += [f"file {path.name}" for path in self._temp.iterdir()]
        return found + [f"/dev/shm/{name}" for name in _shared_files() - self._shm]

    def output(self) -> str:
        """Return the last lines of the job's output."""
        return "\n".join((self.folder / "output").read_text(errors="replace").splitlines()[-25:])


def kill_in_turn(
    job: ChaosJob, launcher: subprocess.Popen[bytes], chance: random.Random
) -> dict[tuple[str, int], float]:
    """Kill each victim at its step; return the killed processes, with the times.

    A worker that ended before its turn has done its steps, and does not count as killed.
    """
    killed: dict[tuple[str, int], float] = {}
    for (role, rank), at in sorted(zip(job.draw.victims, job.draw.at, strict=True), key=lambda each: each[1]):
        if at < 0:
            time.sleep(chance.uniform(0.0, 2.0))
        watched = rank if role == "worker" else 0
        deadline = time.monotonic() + HANG_S
        while job.ledger(watched)[0] < at and launcher.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
        time.sleep(chance.uniform(0.0, 0.01))
        pid = launcher.pid if role == "launcher" else job.find(role, rank)
        while pid is None and at < 0 and launcher.poll() is None and time.monotonic() < deadline:
            pid = job.find(role, rank)  # it has not started yet
        if pid is not None and launcher.poll() is None and not job.is_done(role, rank):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                killed[role, rank] = time.monotonic()
    return killed


def run_job(draw: Draw, seed: int, summary: Summary) -> None:
    """Run a job, kill, and check."""
    with tempfile.TemporaryDirectory(prefix="tensorkv-chaos-") as name:
        job = ChaosJob(draw, Path(name), seed)
        launcher = job.start()
        try:
            killed = kill_in_turn(job, launcher, random.Random(seed))
            try:
                status = launcher.wait(HANG_S)
            except subprocess.TimeoutExpired:
                summary.blame("hang", draw, f"processes {job.left()}\n{job.output()}")
                return
            finally:
                summary.kills.update(role for role, _ in killed)
            goes_on = draw.goes_on or not killed
            summary.jobs["that went on" if goes_on else "that had to fail"] += 1
            if goes_on:
                check_ledgers(job, {rank for _, rank in killed}, summary)
            else:
                check_end(job, killed, status, summary)
            for left in job.leftovers():
                summary.blame("leftover", draw, left)
        finally:
            for pid in job.left():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            launcher.wait()


def check_end(job: ChaosJob, killed: dict[tuple[str, int], float], status: int, summary: Summary) -> None:
    """Check that the job failed in time, and that workers able to report why named the process."""
    draw = job.draw
    (role, rank), when = next(iter(killed.items()))
    while job.left() and time.monotonic() - when < HANG_S:
        time.sleep(POLL_S)
    took_s = time.monotonic() - when
    summary.slowest_end_s = max(summary.slowest_end_s, took_s)
    if took_s > GONE_S:
        summary.blame("hang", draw, f"gone only {took_s:.1f} s after the kill\n{job.output()}")
    if status == 0:
        summary.blame("wrong end", draw, f"status 0\n{job.output()}")
    for each in range(draw.num_workers):
        text = job.result(each).get("lost")
        if text is not None and role != "launcher" and f"{role} {rank}" not in str(text):
            summary.blame("wrong end", draw, f"worker {each} says: {text}")


def check_ledgers(job: ChaosJob, killed: set[int], summary: Summary) -> None:
    """Check that the job went on, and that each element agrees with the ledgers."""
    draw = job.draw
    alive = [rank for rank in range(draw.num_workers) if rank not in killed]
    for rank in alive:
        found = job.result(rank).get("counts")
        if not isinstance(found, dict):
            summary.blame(
                "wrong end", draw, f"worker {rank} has no result: {job.result(rank)}\n{job.output()}"
            )
            continue
        for key, by_worker in found.items():
            for worker, (fewest, most) in enumerate(by_worker):
                issued, acknowledged = job.ledger(worker)
                low = issued if worker in alive else acknowledged
                if not low <= fewest <= most <= issued:
                    text = f"{fewest} to {most} pushes of {worker} in {key!r}, seen by {rank}"
                    text += f", not {low} to {issued}"
                    summary.blame("wrong value", draw, text)


def _shared_files() -> set[str]:
    with contextlib.suppress(FileNotFoundError):
        return set(os.listdir("/dev/shm"))
    return set()


def run(kills: int, seed: int) -> Summary:
    """Run jobs until so many kills are done, and print each."""
    chance = random.Random(seed)
    summary = Summary()
    number = 0
    while summary.kills.total() < kills:
        number += 1
        draw = draw_job(chance, number, kills - summary.kills.total())
        before = len(summary.texts)
        run_job(draw, chance.randrange(1 << 30), summary)
        print(f"{summary.kills.total():4}/{kills} {draw}", flush=True)
        for text in summary.texts[before:]:
            print(f"     {text}", flush=True)
    return summary


def main() -> int:
    """Run the chaos and return 1 if anything was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0, help="the same seed draws the same jobs")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the summary as markdown")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}")
    summary = run(arguments.kills, arguments.seed)
    lines = summary.lines()
    print("\n".join(lines))
    if arguments.markdown is not None:
        command = f"python benchmarks/chaos.py --kills {arguments.kills} --seed {arguments.seed}"
        arguments.markdown.write_text("\n".join([f"    {command}", "", *lines, ""]))
    return 1 if summary.texts else 0


if __name__ == "__main__":
    sys.exit(main())
