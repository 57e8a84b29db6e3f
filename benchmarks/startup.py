"""How long a job of 2 workers and 2 servers takes to start: to the end of its first step.

    python benchmarks/startup.py --rounds=7

The yardstick is two processes side by side that only import torch. Its rounds and those of the job take
turns, so that what else the machine does weighs on both. The goal is twice the yardstick and one second
more: four processes of the job import torch, and the machine may have two cores.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from harness import SOURCE, JobFailed

TIMEOUT_S = 120.0
IMPORT = "import torch"
STEP = """
import os, time
import torch, tensorkv

with tensorkv.create("dist_sync") as kv:
    kv.init("w", torch.zeros(16))
    kv.push("w", torch.ones(16))
    assert kv.pull("w").tolist() == [2.0] * 16
    os.write(1, f"first step at {time.monotonic()}\\n".encode())
"""
LAUNCHER = """
import resource, sys
from tensorkv.cli.main import app

app(sys.argv[1:], standalone_mode=False)
memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(f"launcher: torch={'torch' in sys.modules} numpy={'numpy' in sys.modules} memory={memory_mb:.0f}")
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Seconds of one round."""

    imports_s: float
    job_s: float

    @property
    def allowed_s(self) -> float:
        """Maximum time of the job."""
        return 2 * self.imports_s + 1.0


def measure_imports() -> float:
    """Return the seconds that two concurrent processes take to import torch and end."""
    begin = time.monotonic()
    processes = [subprocess.Popen([sys.executable, "-c", IMPORT], env=_environ()) for _ in range(2)]
    statuses = [process.wait(TIMEOUT_S) for process in processes]
    if any(statuses):
        raise JobFailed("torch cannot be imported")
    return time.monotonic() - begin


def measure_job() -> float:
    """Return the seconds from the start of the launcher to the end of the first step of both workers."""
    begin = time.monotonic()
    printed = _run([sys.executable, "-m", "tensorkv", *_arguments()])
    ends = [float(found) for found in re.findall(r"first step at ([\d.]+)", printed)]
    if len(ends) != 2:
        raise JobFailed(f"not both workers have told of their step:\n{printed}")
    return max(ends) - begin


def launcher_modules() -> str:
    """Run a job, and return the imports and memory of its launcher, which includes the scheduler."""
    printed = _run([sys.executable, "-c", LAUNCHER, *_arguments()])
    found = re.search(r"launcher: (.+)", printed)
    if found is None:
        raise JobFailed(f"the launcher has not told what it imported:\n{printed}")
    return found[1]


def report(rounds: Sequence[Round]) -> list[str]:
    """Return the results as lines."""
    imports_s = statistics.median(each.imports_s for each in rounds)
    job_s = statistics.median(each.job_s for each in rounds)
    allowed_s = 2 * imports_s + 1.0
    used = statistics.median(each.job_s / each.allowed_s for each in rounds)
    return [
        f"two processes that import torch   {imports_s:6.2f} s",
        f"2 workers, 2 servers, first step  {job_s:6.2f} s   {job_s / imports_s:.2f} times as long",
        f"allowed, 2 times and 1 s          {allowed_s:6.2f} s   {used:.0%} of it used, reached: "
        f"{'yes' if used <= 1 else 'NO'}",
    ]


def _arguments() -> list[str]:
    return ["run", "-n", "2", "-s", "2", "--", sys.executable, "-c", STEP]


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(
        command, env=_environ(), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        raise JobFailed(f"status {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def _environ() -> dict[str, str]:
    """Return an environment that measures the source beside this folder, not an installed one."""
    paths = [str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    print(f"launcher and scheduler: {launcher_modules()} MB", flush=True)  # warms the disk cache, too
    rounds: list[Round] = []
    for number in range(1, options.rounds + 1):
        rounds.append(Round(imports_s=measure_imports(), job_s=measure_job()))
        last = rounds[-1]
        print(f"round {number}: imports {last.imports_s:.2f} s, job {last.job_s:.2f} s", flush=True)
    print("\n".join(report(rounds)))


if __name__ == "__main__":
    main()
