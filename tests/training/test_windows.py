"""GradientWindows: a gradient lies in the window as soon as it is made, and is the same gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tensorkv.store import KVStore
from tensorkv.testing.cluster import run_job
from tensorkv.training import windows as windows_of
from tensorkv.training.windows import GradientWindows

SIDE = 64


def with_windows(work: Any) -> None:
    """Call `work` with a layer whose gradients move to windows, these, and where the window is."""

    def run(kv: KVStore) -> None:
        layer = nn.Linear(SIDE, SIDE)
        parameters = dict(layer.named_parameters())
        kv.init({name: each.detach() for name, each in parameters.items()})
        work(kv, layer, GradientWindows(kv, parameters))

    run_job(run, num_workers=1, num_servers=1, host="127.0.0.1", transport="shm", timeout_s=30.0)


def is_lent(kv: KVStore, tensor: torch.Tensor) -> bool:
    window = kv._job.window  # type: ignore[attr-defined]
    return window.where(tensor.data_ptr(), tensor.nbytes) is not None


@pytest.mark.parametrize("set_to_none", [False, True])
def test_gradients_are_in_the_window(set_to_none: bool) -> None:
    def work(kv: KVStore, layer: nn.Linear, windows: GradientWindows) -> None:
        for number in range(1, 4):
            layer.zero_grad(set_to_none=set_to_none)
            layer(torch.ones(1, SIDE)).sum().backward()
            layer(number * torch.ones(1, SIDE)).sum().backward()  # accumulates in the window
            assert layer.weight.grad is not None
            assert layer.bias.grad is not None
            assert is_lent(kv, layer.weight.grad)
            assert is_lent(kv, layer.bias.grad)
            assert torch.equal(layer.weight.grad, torch.full((SIDE, SIDE), 1.0 + number))
            assert torch.equal(layer.bias.grad, torch.full((SIDE,), 2.0))

    with_windows(work)


@pytest.mark.filterwarnings("ignore:Using backward")  # torch: with a graph it is a reference cycle
def test_gradients_with_a_graph_or_another_type_stay() -> None:
    def work(kv: KVStore, layer: nn.Linear, windows: GradientWindows) -> None:
        layer(torch.ones(1, SIDE)).square().sum().backward(create_graph=True)
        assert layer.weight.grad is not None
        assert layer.weight.grad.requires_grad
        layer.zero_grad()
        layer.double()(torch.ones(1, SIDE, dtype=torch.float64)).sum().backward()
        assert layer.weight.grad.dtype == torch.float64
        assert not is_lent(kv, layer.weight.grad)

    with_windows(work)


def test_the_heap_is_trimmed_of_large_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    trims: list[None] = []
    monkeypatch.setattr(windows_of, "trim_heap", lambda: trims.append(None))
    monkeypatch.setattr(windows_of, "TRIMMED_BYTES", 4 * SIDE * SIDE)

    def work(kv: KVStore, layer: nn.Linear, windows: GradientWindows) -> None:
        for number in range(1, 4):
            layer.zero_grad()
            layer(torch.ones(1, SIDE)).sum().backward()
            assert len(trims) == number  # of the weight; that of the bias is too small

    with_windows(work)


def test_after_close_gradients_stay() -> None:
    def work(kv: KVStore, layer: nn.Linear, windows: GradientWindows) -> None:
        windows.close()
        layer(torch.ones(1, SIDE)).sum().backward()
        assert layer.weight.grad is not None
        assert not is_lent(kv, layer.weight.grad)

    with_windows(work)
