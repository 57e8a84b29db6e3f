"""The comparison of `make demo`, in two minutes: training with one slow worker, and memory; draws demo.png.

    python benchmarks/demo.py --plot demo.png

*Accuracy over time*: four workers train the network of examples/digits.py on images of their own; one of
them is five times slower (see `stragglers.py`). Beside them one process trains alone, with as many images in
a step as one worker has.

*Memory*: two workers train 151 million parameters with AdamW (see `training.py`): weights, gradients and
optimizer state of all processes together, as multiples of the model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import stragglers
import torch
import torch.distributed as dist
from harness import SOURCE, JobFailed, Process, python_script, run_job, threads_env
from rich.console import Console

import tensorkv
import training
from tensorkv.bench.steps import print_result

WORKERS = 4
COLORS = {"one process": "C7", "DDP": "C1", "TensorKV, sync": "C0", "TensorKV, async": "C2"}
SYSTEMS = {"shared": "TensorKV,\nshared weights", "zero": "DDP + ZeRO\noptimizer", "ddp": "DDP"}
JOB_TIMEOUT_S = 120.0


def train_alone(share: stragglers.Share, seconds: float) -> stragglers.Curve:
    """Train in this process, without any other; return its curve."""
    net = stragglers.digits.make_net(0)
    optimizer = torch.optim.SGD(net.parameters(), lr=stragglers.LEARNING_RATE)
    clock = stragglers.Clock(net, share)
    for _ in stragglers.steps(net, share, 0, stragglers.PAUSE_S):
        optimizer.step()
        clock.sample()
        if clock.now_s > seconds:
            break
    return clock.curve


def work(seconds: float) -> None:
    """Train as one worker in each way; rank 0 prints its curves."""
    torch.set_num_threads(1)
    with tensorkv.create("dist_sync", store="control") as control:
        stragglers.join_gloo(control)
        data = stragglers.digits.load()
        share = stragglers.deal(data, control.rank, control.num_workers, stragglers.AT_RANDOM)
        curves = {"one process": train_alone(share, seconds) if control.rank == 0 else []}
        control.barrier()
        curves["DDP"] = stragglers.train_ddp(control, share, seconds)
        for name in ("sync", "async"):
            curves[f"TensorKV, {name}"] = stragglers.train(name, control, share, seconds)
        dist.destroy_process_group()
        if control.rank == 0:
            print_result(curves)


def accuracy(seconds: float) -> dict[str, stragglers.Curve]:
    """Return the curve of each way to train."""
    script = python_script("demo.py", "--worker", f"--seconds={seconds}")
    launcher = [sys.executable, "-m", "tensorkv", "run", "-n", str(WORKERS), "-s", "1", "--", *script]
    env = {"PYTHONPATH": str(SOURCE), "GLOO_SOCKET_IFNAME": "lo", **threads_env(WORKERS)}
    found: dict[str, stragglers.Curve] = run_job(
        [Process(name="tensorkv run", command=launcher, env=env)], timeout_s=JOB_TIMEOUT_S
    )
    return found


def memory() -> dict[str, float]:
    """Return the peak of each system with two workers, in models."""
    found: dict[str, float] = {}
    for system in SYSTEMS:
        base_bytes, peak_bytes = training.peak_of(system, 2)
        found[system] = (peak_bytes - base_bytes) / training.MODEL_BYTES
    return found


def plot(curves: Mapping[str, stragglers.Curve], models: Mapping[str, float], path: Path) -> None:
    """Draw both panels."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(11, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    for name, curve in curves.items():
        left.plot(*zip(*curve, strict=True), color=COLORS[name], label=name)
    left.set_title("four workers, one of them five times slower", fontsize=10)
    left.set_xlabel("seconds")
    left.set_ylabel("test images recognised")
    left.set_ylim(0.0, 1.0)
    left.grid(visible=True, alpha=0.3)
    left.legend(fontsize=8, loc="lower right")
    bars = right.bar([SYSTEMS[system] for system in models], list(models.values()), color=["C0", "C7", "C1"])
    right.bar_label(bars, fmt="%.1f", fontsize=9)
    right.set_title("memory of two workers with AdamW, in models", fontsize=10)
    right.tick_params(axis="x", labelsize=8)
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and draw; or, with --worker, be one of the workers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="wall-clock of each way to train (10)")
    parser.add_argument("--plot", type=Path, help="PNG or SVG file to write")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        work(arguments.seconds)
        return
    console = Console(highlight=False)
    console.print("four workers train on digits; one of them is five times slower")
    curves = accuracy(arguments.seconds)
    for name, curve in curves.items():
        reached = next((at_s for at_s, right in curve if right >= 0.9), None)
        when = "not reached" if reached is None else f"after {reached:.1f} s"
        console.print(f"  {name:16} 90 % of the test images: {when}")
    console.print("two workers train 151 million parameters with AdamW")
    models = memory()
    for system, number in models.items():
        console.print(f"  {' '.join(SYSTEMS[system].split()):25} {number:.1f} models of memory")
    if arguments.plot is not None:
        plot(curves, models, arguments.plot)
        console.print(f"drawn in {arguments.plot}")


if __name__ == "__main__":
    try:
        main()
    except JobFailed as error:
        sys.exit(str(error))
