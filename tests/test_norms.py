"""Norms of many tensors, put together."""

from __future__ import annotations

import math
import random
import subprocess
import sys

import pytest
import torch

from tensorkv.norms import clip_factor, total_norm


def test_the_parts_make_the_whole() -> None:
    assert total_norm([]) == total_norm([0.0, 0.0]) == 0.0
    assert total_norm([3.0, 4.0]) == 5.0
    assert total_norm([0.0, 0.1]) == 0.1


def test_order_and_grouping_do_not_show() -> None:
    generator = random.Random(1)
    norms = [generator.random() * 10.0 ** generator.randint(-9, 9) for _ in range(200)]
    expected = total_norm(norms)
    for _ in range(50):
        generator.shuffle(norms)
        assert total_norm(norms) == expected


@pytest.mark.parametrize("size", [1e200, 1e-200, 1e308, 5e-324])
def test_squares_neither_overflow_nor_vanish(size: float) -> None:
    assert total_norm([size]) == size
    assert total_norm([size, 0.0]) == size


def test_what_is_too_large_is_infinite() -> None:
    assert total_norm([1.7e308, 1.7e308]) == math.inf


def test_what_is_not_finite_shows() -> None:
    assert total_norm([1.0, math.inf]) == math.inf
    assert math.isnan(total_norm([math.nan, math.inf]))
    assert math.isnan(total_norm([1e308, 1e308, math.nan]))


@pytest.mark.parametrize("norm", [0.0, 0.5, 1.0, 2.0, 1e200, math.inf, math.nan])
def test_clipping_is_that_of_torch(norm: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    parameter.grad = torch.tensor([norm], dtype=torch.float64)
    expected = parameter.grad * clip_factor(norm, 1.0)
    torch.nn.utils.clip_grad_norm_([parameter], 1.0)
    assert torch.equal(parameter.grad.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert clip_factor(norm, None) == 1.0


def test_the_scheduler_needs_no_torch() -> None:
    code = "import sys, tensorkv.scheduler.catalog; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
