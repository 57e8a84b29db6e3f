"""What training costs in memory and time: DistributedOptimizer beside DDP and ZeroRedundancyOptimizer.

    python benchmarks/training.py                       about 12 minutes
    python benchmarks/training.py --only memory

*Memory*, in models: (the highest PSS of all processes during step 4 - their PSS after a toy step) / the
model's size. PSS counts a page that n processes share as a n-th of a page in each. The model has 151 million
parameters, the optimizer is AdamW, one server.

*Time*: a transformer on two workers and one server, at a size where the gradients take longer to send than
to compute, and at one where they do not. *Overhead*: `step` beside a `pushpull` of the same 50 tensors of
1000 floats, the learning rate another in each step.

Systems take turns; a ratio is the median of the rounds'. What runs in the workers is in `trainingworker.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from harness import SOURCE, JobFailed, Process, middle, python_script, ratio_of_rounds, run_job, threads_env
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tensorkv.bench.machine import this_machine

SYSTEMS = {
    "shared": "TensorKV, shared weights",
    "tensorkv": "TensorKV",
    "ddp": "DDP",
    "zero": "DDP + ZeroRedundancyOptimizer",
}
WITH_OVERLAP = {
    "shared-backward": "TensorKV, shared weights, overlap backward",
    "backward": "TensorKV, overlap backward",
    "forward": "TensorKV, overlap forward",
}
MODEL_BYTES = 64 * 1536 * 1536 * 4
MEMORY_STEPS = 4
TIMED_STEPS = 24
WARMUP_STEPS = 4
OVERHEAD_STEPS = 300
JOB_TIMEOUT_S = 300.0
SAMPLE_S = 0.05
"""Seconds between two samples of memory."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the tables."""
    arguments = _parse(argv)
    console = Console()
    console.print(this_machine().text(), highlight=False)
    if arguments.only in (None, "memory"):
        console.print(memory())
    if arguments.only in (None, "time"):
        console.print(times(arguments.rounds))
    if arguments.only in (None, "overhead"):
        console.print(overhead(arguments.rounds))


# ---- memory --------------------------------------------------------------------------------------


def memory() -> Table:
    """Return the table of peaks, in models, for 1, 2 and 4 workers."""
    table = Table("memory, in models", "1 worker", "2 workers", "4 workers", box=SIMPLE_HEAD)
    for system, title in SYSTEMS.items():
        cells = []
        for num_workers in (1, 2, 4):
            base_bytes, peak_bytes = peak_of(system, num_workers)
            models = (peak_bytes - base_bytes) / MODEL_BYTES
            cells.append(f"{models:.1f} ({peak_bytes / 1e9:.1f} GB)")
        table.add_row(title, *cells)
    return table


def peak_of(system: str, num_workers: int, model: str = "memory") -> tuple[int, int]:
    """Return the PSS of a job after its toy step, and the highest during its last step, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        phases = Path(folder, "phase")
        phases.write_text("")
        with _sampled(phases) as highest:
            run_job([_job(system, model, num_workers, MEMORY_STEPS, phases)], timeout_s=JOB_TIMEOUT_S)
    return highest["baseline"], highest["last"]


@contextlib.contextmanager
def _sampled(phases: Path) -> Iterator[dict[str, int]]:
    """Within the block, note the highest PSS of this process's descendants in each phase."""
    highest: dict[str, int] = {}
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLE_S):
            phase = phases.read_text()
            size_bytes = sum(map(pss_bytes, descendants(os.getpid())))
            if phase and phases.read_text() == phase:
                highest[phase] = max(size_bytes, highest.get(phase, 0))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield highest
    finally:
        ended.set()
        thread.join()


def descendants(process_id: int) -> list[int]:
    """Return the children of a process, theirs, and so on."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended
                after_name = (entry / "stat").read_text().rpartition(")")[2]
                children.setdefault(int(after_name.split()[1]), []).append(int(entry.name))
    found = list(children.get(process_id, []))
    for each in found:
        found += children.get(each, [])
    return found


def pss_bytes(process_id: int) -> int:
    """Return the proportional set size of a process, 0 once it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process_id}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


# ---- time ----------------------------------------------------------------------------------------


def times(rounds: int) -> Table:
    """Return the table of step times of two workers."""
    table = Table("step, 2 workers", "compute", "step", "whole, ms", "beside shared", box=SIMPLE_HEAD)
    for model in ("communication", "compute"):
        titles = {**SYSTEMS, **WITH_OVERLAP}
        measured: dict[str, dict[str, list[list[float]]]] = {system: {} for system in titles}
        for _ in range(rounds):
            for system, parts in measured.items():
                job = _job(system, model, 2, TIMED_STEPS)
                for part, seconds in run_job([job], timeout_s=JOB_TIMEOUT_S).items():
                    parts.setdefault(part, []).append(seconds[WARMUP_STEPS:])
        ours = measured["shared"]["whole"]
        for system, parts in measured.items():
            cells = [_median_ms(parts[part]) for part in ("compute", "step", "whole")]
            table.add_row(
                f"{model}-bound, {titles[system]}",
                *(f"{cell:.1f}" for cell in cells),
                f"{ratio_of_rounds(parts['whole'], ours):.2f}",
            )
    return table


def overhead(rounds: int) -> Table:
    """Return the table of `step` beside a bare pushpull."""
    table = Table("50 tensors of 1000 floats", "step, ms", "pushpull, ms", "ratio", box=SIMPLE_HEAD)
    parts: dict[str, list[list[float]]] = {}
    for _ in range(rounds):
        job = _job("tensorkv", "overhead", 2, OVERHEAD_STEPS)
        for part, seconds in run_job([job], timeout_s=JOB_TIMEOUT_S).items():
            parts.setdefault(part, []).append(seconds[OVERHEAD_STEPS // 10 :])
    ratio = ratio_of_rounds(parts["step"], parts["pushpull"])
    cells = (f"{_median_ms(parts[part]):.2f}" for part in ("step", "pushpull"))
    table.add_row("2 workers, 1 server", *cells, f"{ratio:.2f}")
    return table


def _median_ms(rounds: Sequence[Sequence[float]]) -> float:
    return middle([sorted(seconds)[len(seconds) // 2] for seconds in rounds]) * 1e3


# ---- jobs ----------------------------------------------------------------------------------------


def _job(system: str, model: str, num_workers: int, steps: int, phases: Path | None = None) -> Process:
    """Return the launcher of a job, which starts the rest."""
    options = [f"--system={system}", f"--model={model}", f"--steps={steps}"]
    script = python_script("trainingworker.py", *options, *([f"--phases={phases}"] if phases else []))
    env: Mapping[str, str] = {
        "PYTHONPATH": str(SOURCE),
        "GLOO_SOCKET_IFNAME": "lo",
        **threads_env(num_workers),
    }
    if system not in ("ddp", "zero"):
        launcher = ["-m", "tensorkv", "run", "-n", str(num_workers), "-s", "1", "--"]
        return Process(name="tensorkv run", command=[sys.executable, *launcher, *script], env=env)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_workers}"]
    return Process(name="torchrun", command=[sys.executable, *launcher, *script[1:]], env=env)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["memory", "time", "overhead"])
    parser.add_argument("--rounds", type=int, default=5, help="rounds of time and overhead (5)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        main()
    except JobFailed as error:
        sys.exit(str(error))
