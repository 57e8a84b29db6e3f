"""Equal to one process on the whole batch, whatever the number of workers and servers, and to DDP bit by
bit."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tensorkv
from tensorkv.store import KVStore
from tensorkv.testing.cluster import run_job

ROWS = 12  # a multiple of 1, 2 and 3
torch.manual_seed(5)
MODEL = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 2)).double()

ELEMENTWISE: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01, weight_decay=0.01, eps=1e-5),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, eps=1e-5),
    "nadam": lambda groups: torch.optim.NAdam(groups, lr=0.01, weight_decay=0.01, eps=1e-5),
    "radam": lambda groups: torch.optim.RAdam(groups, lr=0.01, weight_decay=0.01, eps=1e-5),
    "adamax": lambda groups: torch.optim.Adamax(groups, lr=0.01, weight_decay=0.01, eps=1e-5),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.05, weight_decay=0.01, eps=1e-5),
    "adadelta": lambda groups: torch.optim.Adadelta(groups, lr=0.5, weight_decay=0.01, eps=1e-5),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, weight_decay=0.01, eps=1e-5),
    "asgd": lambda groups: torch.optim.ASGD(groups, lr=0.05, weight_decay=0.01),
}
"""With an eps far above what rounding makes of a gradient that is zero; Rprop goes by signs, and has a test
of its own beside those of `test_optimizer`."""


def make_model(dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(MODEL).to(dtype)


def make_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    weights = [each for each in model.parameters() if each.dim() > 1]
    biases = [each for each in model.parameters() if each.dim() == 1]
    return ELEMENTWISE[name]([{"params": weights}, {"params": biases, "lr": 0.02, "weight_decay": 0.0}])


def loss_of(model: nn.Module, step: int, part: slice = slice(None)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(ROWS, 6, generator=generator, dtype=torch.float64)[part]
    dtype = next(model.parameters()).dtype
    loss: torch.Tensor = (model(inputs.to(dtype)) - inputs[:, :2].to(dtype)).square().mean()
    return loss


def train(
    optimizer: torch.optim.Optimizer, model: nn.Module, num_steps: int, part: slice = slice(None)
) -> None:
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for step in range(num_steps):
        optimizer.zero_grad()
        loss_of(model, step, part).backward()
        optimizer.step()
        schedule.step()


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([each.detach().reshape(-1) for each in model.parameters()]).clone()


def in_job(
    fn: Callable[[KVStore], torch.Tensor], num_workers: int, num_servers: int, **options: Any
) -> torch.Tensor:
    """Return what all workers have found, which is the same to the last bit."""
    found = run_job(
        fn, num_workers=num_workers, num_servers=num_servers, reduction="mean", timeout_s=30.0, **options
    )
    assert all(torch.equal(each, found[0]) for each in found)
    return found[0]


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize(
    ("dtype", "num_steps", "tolerance"), [(torch.float64, 100, 1e-10), (torch.float32, 50, 1e-5)]
)
def test_whole_trainings(name: str, dtype: torch.dtype, num_steps: int, tolerance: float) -> None:
    expected = make_model(dtype)
    train(make_optimizer(name, expected), expected, num_steps)

    def work(kv: KVStore) -> torch.Tensor:
        model = make_model(dtype)
        optimizer = tensorkv.DistributedOptimizer(make_optimizer(name, model), model, kind=kv)
        train(optimizer, model, num_steps, slice(kv.rank, None, kv.num_workers))
        return flat(model)

    for num_workers, num_servers in ((3, 1), (2, 3)):
        found = in_job(work, num_workers, num_servers, slice_bound_bytes=256)  # so that some are sliced
        scale = flat(expected).abs().max()
        assert (found - flat(expected)).abs().max() <= tolerance * scale


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_optimizers_of_whole_matrices(name: str) -> None:
    """The number of servers changes no bit: nothing is sliced."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        if name == "muon":
            return torch.optim.Muon([each for each in model.parameters() if each.dim() == 2], lr=0.05)
        return torch.optim.Adafactor(model.parameters(), lr=0.05)

    expected = make_model(torch.float64)
    train(make(expected), expected, 20)

    def work(kv: KVStore) -> torch.Tensor:
        model = make_model(torch.float64)
        train(
            tensorkv.DistributedOptimizer(make(model), model, kind=kv),
            model,
            20,
            slice(kv.rank, None, kv.num_workers),
        )
        assert kv.info("0.weight").num_slices == 1
        return flat(model)

    one, three = (in_job(work, 2, num_servers, slice_bound_bytes=64) for num_servers in (1, 3))
    assert torch.equal(one, three)
    assert torch.allclose(one, flat(expected), rtol=1e-2, atol=2e-3)  # Muon works in bfloat16


@pytest.mark.parametrize(
    ("name", "dtype"),  # AdamW's squares of small gradients are 0 in float16, in one process, too
    [("sgd", torch.bfloat16), ("sgd", torch.float16), ("adamw", torch.bfloat16)],
)
def test_weights_of_16_bits_get_the_mean_of_32(name: str, dtype: torch.dtype) -> None:
    """To the last bit what one process computes that adds up the workers' gradients in float32."""
    num_workers = 3
    parts = [slice(rank, None, num_workers) for rank in range(num_workers)]
    expected = make_model(dtype)
    plain = make_optimizer(name, expected)
    for step in range(10):
        gradients = []
        for part in parts:
            plain.zero_grad()
            loss_of(expected, step, part).backward()
            gradients.append([each.grad for each in expected.parameters()])
        for parameter, *each in zip(expected.parameters(), *gradients, strict=True):
            total = each[0].float()
            for other in each[1:]:
                total = total + other.float()
            parameter.grad = (total / num_workers).to(dtype)
        plain.step()

    def work(kv: KVStore) -> torch.Tensor:
        model = make_model(dtype)
        optimizer = tensorkv.DistributedOptimizer(make_optimizer(name, model), model, kind=kv)
        for step in range(10):
            optimizer.zero_grad()
            loss_of(model, step, parts[kv.rank]).backward()
            optimizer.step()
        return flat(model)

    found = in_job(work, num_workers, 2, slice_bound_bytes=64)
    tolerance = 4 * torch.finfo(dtype).eps * flat(expected).abs().max()
    assert (found - flat(expected)).abs().max() <= tolerance


def test_runs_and_transports_give_the_same_bits() -> None:
    def work(kv: KVStore) -> torch.Tensor:
        model = make_model(torch.float32)
        inner = make_optimizer("adamw", model)
        optimizer = tensorkv.DistributedOptimizer(inner, model, kind=kv, max_norm=0.5)
        train(optimizer, model, 10, slice(kv.rank, None, kv.num_workers))
        return flat(model)

    ways: list[dict[str, Any]] = [
        {},
        {},
        {"host": "127.0.0.1", "transport": "tcp"},
        {"host": "127.0.0.1", "transport": "shm"},
    ]
    first, *others = [in_job(work, 3, 2, slice_bound_bytes=64, **way) for way in ways]
    assert all(torch.equal(first, each) for each in others)


SCRIPT = """
import os
import sys
import torch
way, name, dtype = sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3])
if way == "ddp":
    import torch.distributed as dist
    dist.init_process_group("gloo")
    rank = dist.get_rank()
else:
    import tensorkv
    rank = tensorkv.rank()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(6, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1)).to(dtype)
inputs = torch.randn(5, 2, 8, 6).to(dtype)
trained = torch.nn.parallel.DistributedDataParallel(model) if way == "ddp" else model
options = {"momentum": 0.9} if name == "SGD" else {}
optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01, foreach=False, **options)
if way != "ddp":
    optimizer = tensorkv.DistributedOptimizer(optimizer, model)
for step in range(5):
    optimizer.zero_grad()
    trained(inputs[step, rank]).square().mean().backward()
    optimizer.step()
bits = b"".join(each.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for each in model.parameters())
import hashlib
print(hashlib.sha256(bits).hexdigest(), flush=True)
if way == "ddp":  # gloo's threads may end the process at its exit
    dist.barrier()
    os._exit(0)
"""


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize(("name", "dtype"), [("SGD", "float32"), ("AdamW", "float32")])
def test_two_workers_have_the_bits_of_ddp(name: str, dtype: str, tmp_path: Path) -> None:
    """A sum of two has one order, and halves are exact. `foreach=False` is the loop that torch uses by
    itself.

    Without it the servers use torch's fused kernels, which round otherwise. Of 16 bits DDP adds up in 16
    bits.
    """
    (tmp_path / "script.py").write_text(SCRIPT)
    starts = {
        "ddp": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        "servers": ["tensorkv", "run", "-n", "2", "-s", "1", "--no-prefix", "--", sys.executable],
    }
    found = set()
    for way, start in starts.items():
        command = [sys.executable, "-m", *start, "script.py", way, name, dtype]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=90, check=False)
        assert done.returncode == 0, done.stderr
        each = re.findall(r"[0-9a-f]{64}", done.stdout)  # torchrun may print two on one line
        assert len(each) == 2
        found.update(each)
    assert len(found) == 1
