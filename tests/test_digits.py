"""The training example equals one process on the whole batch, whatever it is shared out over."""

from __future__ import annotations

import copy
import importlib.util
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensorkv
from tensorkv.testing.cluster import run_job

pytestmark = pytest.mark.timeout(300)  # whole trainings, which a busy machine slows down

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits.py"
BATCH = 64
TO_THE_END = 276
"""The steps of the example's 12 epochs."""

EPOCH = 23
"""The steps of one epoch."""

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.05}),
    "momentum": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    # With torch's eps of 1e-8 a float32 gradient that is all rounding, other on every kind of CPU, moves a
    # weight as far as a real one does.
    "adam": (torch.optim.Adam, {"lr": 1e-3, "eps": 1e-5}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-3}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 1e-3}),
}

CASES = [
    *(pytest.param(name, torch.float64, 3 * EPOCH, 1e-10, id=f"{name}-float64") for name in OPTIMIZERS),
    *(
        pytest.param(name, torch.float32, 50, 1e-5, id=f"{name}-float32")
        for name in ("sgd", "momentum", "adam")
    ),
]
WHOLE = pytest.param(
    "adam", torch.float64, TO_THE_END, 1e-10, id="adam-float64-whole", marks=pytest.mark.slow
)
"""A whole training by the optimizer with the most state: a difference that grows slowly shows there."""


def _load_example() -> Any:
    spec = importlib.util.spec_from_file_location("digits_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


digits = _load_example()


def _steps(data: Any, num_steps: int) -> list[Tensor]:
    """The batches of the first steps, over as many epochs as that takes."""
    chosen: list[Tensor] = []
    epoch = 1
    while len(chosen) < num_steps:
        chosen.extend(digits.batches(len(data.train_labels), BATCH, 0, epoch))
        epoch += 1
    return chosen[:num_steps]


def _flat(net: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().double().flatten() for parameter in net.parameters()])


@cache
def _alone(name: str, dtype: torch.dtype, num_steps: int) -> Tensor:
    """Train as plain torch would: one process, the whole batch, no store."""
    data, net = digits.load(dtype), digits.make_net(0, dtype)
    optimizer_class, options = OPTIMIZERS[name]
    optimizer = optimizer_class(net.parameters(), **options)
    for chosen in _steps(data, num_steps):
        optimizer.zero_grad()
        scores = net(data.train_images[chosen])
        nn.functional.cross_entropy(scores, data.train_labels[chosen]).backward()
        optimizer.step()
    return _flat(net)


def _on_devices(name: str, dtype: torch.dtype, num_steps: int) -> Tensor:
    """Train through a local store that three tensors per key, one per device, are pushed to."""
    data, net = digits.load(dtype), digits.make_net(0, dtype)
    weights = dict(net.named_parameters())
    optimizer_class, options = OPTIMIZERS[name]
    with tensorkv.create("local") as kv:
        kv.set_optimizer(optimizer_class, **options)
        kv.init(weights)
        for chosen in _steps(data, num_steps):
            shares = [chosen[device::3] for device in range(3)]
            pushed = [
                digits.gradients(net, data.train_images[mine], data.train_labels[mine], len(chosen))
                for mine in shares
            ]
            kv.push({key: [share[key] for share in pushed] for key in weights})
            kv.pull(out=weights)
    return _flat(net)


def _by_job(kind: str, name: str, dtype: torch.dtype, num_steps: int) -> list[Tensor]:
    """Train as the example does, 4 workers and 2 servers; return the weights of each worker."""
    data = digits.load(dtype)
    fresh = digits.make_net(0, dtype)  # here, because the workers are threads and share torch's seed
    optimizer_class, options = OPTIMIZERS[name]

    def work(kv: tensorkv.KVStore) -> Tensor:
        net = copy.deepcopy(fresh)
        kv.set_optimizer(optimizer_class, **options)
        kv.init(dict(net.named_parameters()))
        digits.train_epoch(kv, net, data, tuple(_steps(data, num_steps)))
        return _flat(net)

    return run_job(work, num_workers=4, num_servers=2, kind=kind)


@pytest.mark.parametrize(("name", "dtype", "num_steps", "tolerance"), CASES)
def test_devices_equal_one_process(name: str, dtype: torch.dtype, num_steps: int, tolerance: float) -> None:
    num_steps = min(num_steps, EPOCH)  # the jobs below go further
    difference = _on_devices(name, dtype, num_steps) - _alone(name, dtype, num_steps)
    assert difference.abs().max().item() <= tolerance


@pytest.mark.parametrize(("name", "dtype", "num_steps", "tolerance"), [*CASES, WHOLE])
def test_workers_equal_one_process(name: str, dtype: torch.dtype, num_steps: int, tolerance: float) -> None:
    by_rank = _by_job("dist_sync", name, dtype, num_steps)
    assert all(torch.equal(weights, by_rank[0]) for weights in by_rank)
    assert (by_rank[0] - _alone(name, dtype, num_steps)).abs().max().item() <= tolerance


def test_two_runs_give_the_same_bits() -> None:
    first, second = (_by_job("dist_sync", "momentum", torch.float32, 12)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_training_changes_the_weights() -> None:
    """So that the comparisons above are not between untouched weights."""
    untouched = _flat(digits.make_net(0, torch.float64))
    assert (_alone("sgd", torch.float64, 5) - untouched).abs().max().item() > 1e-3


def test_split_is_whole_and_disjoint() -> None:
    data = digits.load()
    assert len(data.train_labels) + len(data.test_labels) == 1797
    chosen = torch.cat(digits.batches(len(data.train_labels), BATCH, 3, 1))
    assert torch.equal(chosen.sort().values, torch.arange(len(data.train_labels)))


def test_shares_add_up_also_where_one_is_empty() -> None:
    data, net = digits.load(torch.float64), digits.make_net(0, torch.float64)
    chosen = torch.arange(3)
    whole = digits.gradients(net, data.train_images[chosen], data.train_labels[chosen], 3)
    parts = []
    for rank in range(5):
        mine = chosen[rank::5]
        parts.append(digits.gradients(net, data.train_images[mine], data.train_labels[mine], 3))
    for key, gradient in whole.items():
        total = torch.stack([part[key] for part in parts]).sum(0)
        assert (total - gradient).abs().max().item() < 1e-14


def _epochs(command: list[str]) -> tuple[list[tuple[float, float]], list[str]]:
    """Run the script; return loss and accuracy in per cent of each epoch, and the last two lines."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr
    lines = re.findall(
        r"epoch +(\d+)  loss ([\d.]+)  test accuracy ([\d.]+)% +[\d,]+ images/s$", done.stdout, re.M
    )
    assert [int(number) for number, _, _ in lines] == list(range(1, len(lines) + 1))
    return [(float(loss), float(right)) for _, loss, right in lines], done.stdout.splitlines()[-2:]


def _held(who: str, rounds: int) -> str:
    """What the script says last: 38,282 weights of four bytes, and as much momentum."""
    return f"{who} 153,128 bytes of weights and 153,128 of optimizer state, after {rounds} rounds of pushes"


def test_script_goes_on_from_what_it_has_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for epochs in (1, 2):
        options = ["--store", "local", "--save", str(tmp_path / "saved"), "--epochs", str(epochs)]
        monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *options])
        digits.main()
        told = capsys.readouterr().out.splitlines()
        assert len(re.findall("epoch +[0-9]", "\n".join(told))) == 1, "that of the last run is not done again"
        assert told[-1] == _held("the store holds", 23)


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_script_in_one_process_recognises_97_per_cent() -> None:
    epochs, last = _epochs([sys.executable, str(EXAMPLE), "--store", "local"])
    assert len(epochs) == 12
    assert epochs[-1][1] >= 97
    right = f"local, 1 worker(s): {epochs[-1][1]:.2f}% of the test images right"
    assert last == [right, _held("the store holds", TO_THE_END)]


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(180)
@pytest.mark.parametrize("kind", ["dist_sync", "dist_async"])
def test_script_in_a_job(kind: str) -> None:
    job = [sys.executable, "-m", "tensorkv", "run", "-n", "2", "-s", "2", "--"]
    epochs, last = _epochs([*job, sys.executable, str(EXAMPLE), "--store", kind, "--epochs", "2"])
    assert len(epochs) == 2
    assert epochs[1][0] < epochs[0][0]
    right = f"[worker 0] {kind}, 2 worker(s): {epochs[1][1]:.2f}% of the test images right"
    assert last == [right, _held("[worker 0] the servers hold", {"dist_sync": 46, "dist_async": 92}[kind])]


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(180)
def test_script_under_torchrun() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    epochs, last = _epochs([*torchrun, str(EXAMPLE), "--epochs", "2"])
    assert len(epochs) == 2
    assert epochs[1][0] < epochs[0][0]
    right = f"dist_sync, 2 worker(s): {epochs[1][1]:.2f}% of the test images right"
    assert last == [right, _held("the servers hold", 46)]


def _weights(folder: Path) -> dict[str, Tensor]:
    with tensorkv.create("local") as kv:
        kv.load(folder)
        return {str(key): kv.pull(key) for key in kv.keys()}  # noqa: SIM118  (a store is no dict)


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(180)
def test_script_killed_in_the_middle_goes_on_where_it_was(tmp_path: Path) -> None:
    job = [sys.executable, "-m", "tensorkv", "run", "-n", "2", "-s", "2", "--", sys.executable, str(EXAMPLE)]
    job += ["--epochs", "6"]
    whole, last = _epochs([*job, "--save", str(tmp_path / "whole")])
    killed = [*job, "--save", str(tmp_path / "killed")]
    with subprocess.Popen(killed, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "epoch  2 " in line:  # is it saved already, or being saved? Either way the save is whole
                break
        process.kill()  # and with it, at once, all that it has started
    done = subprocess.run(killed, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2] == last[0]
    assert "epoch  1 " not in done.stdout
    assert "epoch  6 " in done.stdout  # however late it was killed, it was not the last
    assert len(whole) == 6
    expected, found = _weights(tmp_path / "whole"), _weights(tmp_path / "killed")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert int(found["epochs"]) == 6
