"""Which fused kernels are used: those that were found to do what the loop does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tensorkv.updaters import fusing
from tensorkv.updaters.fusing import is_fused_right


@pytest.fixture(autouse=True)
def nothing_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusing, "_found", {})


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_what_is_fast_for_floats_stays_fused(name: str) -> None:
    assert is_fused_right(getattr(torch.optim, name), torch.float32, "cpu")


@pytest.mark.parametrize(
    ("name", "dtype"), [("RMSprop", torch.float32), ("SGD", torch.complex64), ("Adam", torch.int64)]
)
def test_what_has_no_kernel(name: str, dtype: torch.dtype) -> None:
    assert not is_fused_right(getattr(torch.optim, name), dtype, "cpu")


def skip_full_vectors(
    parameters: list[torch.Tensor], grads: list[torch.Tensor], *_: Any, **options: Any
) -> None:
    for parameter, grad in zip(parameters, grads, strict=True):
        tail = parameter.numel() // 16 * 16
        parameter[tail:] -= options["lr"] * grad[tail:]


def forget_nesterov(
    parameters: list[torch.Tensor], grads: list[torch.Tensor], *rest: Any, **options: Any
) -> None:
    REAL(parameters, grads, *rest, **{**options, "nesterov": False})


REAL = torch._fused_sgd_


@pytest.mark.parametrize("wrong", [skip_full_vectors, forget_nesterov])
def test_a_kernel_that_is_wrong_is_found(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_fused_sgd_", wrong)
    assert not is_fused_right(torch.optim.SGD, torch.float32, "cpu")
    monkeypatch.setattr(torch, "_fused_sgd_", REAL)
    assert not is_fused_right(torch.optim.SGD, torch.float32, "cpu")  # tried once


def test_it_is_tried_on_the_cpu_whatever_the_mode_and_the_default() -> None:
    with torch.inference_mode(), torch.device("meta"):
        assert is_fused_right(torch.optim.Adam, torch.float32, "cpu")
