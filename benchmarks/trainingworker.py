"""One worker of a training measured by `training.py`: the same model under one of several systems.

    tensorkv    DistributedOptimizer, started by `tensorkv run`
    shared      the same with share_weights=True
    backward, forward, shared-backward    the same with overlap
    ddp         DistributedDataParallel over gloo, started by torchrun
    zero        the same with ZeroRedundancyOptimizer

Rank 0 writes the phase that it is in to a file, for the sampler of `training.py`, and prints the seconds of
its steps.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import tensorkv
from tensorkv.bench.steps import print_result

SYSTEMS = ("tensorkv", "shared", "backward", "forward", "shared-backward", "ddp", "zero")
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    # 151 million parameters, none over 1.6 % of them; a batch of 8.
    "memory": (lambda: nn.Sequential(*(nn.Linear(1536, 1536, bias=False) for _ in range(64))), (8, 1536)),
    # 19 million parameters, 16 tokens: the gradients take longer to send than to compute.
    "communication": (lambda: _transformer(512, 6), (1, 16, 512)),
    # 3 million parameters, 1024 tokens.
    "compute": (lambda: _transformer(256, 4), (8, 128, 256)),
}
"""The model of each measurement, and the shape of a batch."""

BASELINE_S = 1.5
"""Time in seconds that all processes stay as they are after a toy step, for the sampler."""


def _transformer(width: int, depth: int) -> nn.Module:
    block = nn.TransformerEncoderLayer(width, 8, 4 * width, 0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(block, depth, enable_nested_tensor=False)


def prepare(system: str, model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return what a script trains with: the model, wrapped perhaps, and the optimizer."""
    if system not in ("ddp", "zero"):
        inner = torch.optim.AdamW(model.parameters(), lr=1e-4)
        overlap: Any = next((each for each in ("backward", "forward") if each in system), False)
        shares = system.startswith("shared")
        return model, tensorkv.DistributedOptimizer(inner, model, share_weights=shares, overlap=overlap)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if dist.is_initialized() else model
    if system == "zero":
        return wrapped, ZeroRedundancyOptimizer(
            wrapped.parameters(), optimizer_class=torch.optim.AdamW, lr=1e-4
        )
    return wrapped, torch.optim.AdamW(wrapped.parameters(), lr=1e-4)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> tuple[float, float]:
    """Take a step; return the seconds of forward and backward, and of `step`."""
    start = time.perf_counter()
    model(batch).square().mean().backward()
    between = time.perf_counter()
    optimizer.step()
    end = time.perf_counter()
    optimizer.zero_grad()
    return between - start, end - between


def train(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Take the steps; return the seconds of each by part."""

    def tell(phase: str) -> None:
        if arguments.phases is not None and tensorkv.rank() == 0:
            arguments.phases.write_text(phase)

    toy = nn.Linear(4, 4)
    step(*prepare(arguments.system, toy), torch.ones(1, 4))
    tell("baseline")
    time.sleep(BASELINE_S if arguments.phases is not None else 0)
    tell("start")
    make, shape = MODELS[arguments.model]
    model, optimizer = prepare(arguments.system, make())
    batch = torch.randn(shape)
    parts: dict[str, list[float]] = {"whole": [], "compute": [], "step": []}
    for number in range(arguments.steps):
        tell("last" if number == arguments.steps - 1 else "steps")
        compute_s, step_s = step(model, optimizer, batch)
        for part, seconds in (("whole", compute_s + step_s), ("compute", compute_s), ("step", step_s)):
            parts[part].append(seconds)
    tell("end")
    return parts


def overhead(steps: int) -> dict[str, list[float]]:
    """Time `step` with another learning rate each time, and a bare pushpull of the same tensors, in turn."""
    model = nn.ParameterList(nn.Parameter(torch.zeros(1000)) for _ in range(50))
    optimizer = tensorkv.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    bare = tensorkv.create("dist_sync", store="bare", reduction="mean")
    values = {name: each.detach().clone() for name, each in model.named_parameters()}
    bare.init(values)
    bare.set_optimizer(torch.optim.SGD, lr=0.1)
    keys, gradients, outs = list(values), [torch.ones(1000) for _ in values], list(values.values())
    parts: dict[str, list[float]] = {"step": [], "pushpull": []}
    for _ in range(steps):
        for parameter, gradient in zip(model, gradients, strict=True):
            parameter.grad = gradient
        start = time.perf_counter()
        optimizer.step()
        parts["step"].append(time.perf_counter() - start)
        schedule.step()
        start = time.perf_counter()
        bare.pushpull(keys, gradients, out=outs)
        parts["pushpull"].append(time.perf_counter() - start)
    return parts


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and let rank 0 print the times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--system", choices=SYSTEMS, required=True)
    parser.add_argument("--model", choices=[*MODELS, "overhead"], required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--phases", type=Path, help="the file for the phases")
    arguments = parser.parse_args(argv)
    needs_group = arguments.system in ("ddp", "zero") and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if needs_group or arguments.system == "zero":
        dist.init_process_group("gloo")
    times: Any = overhead(arguments.steps) if arguments.model == "overhead" else train(arguments)
    if tensorkv.rank() == 0:
        print_result(times)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
