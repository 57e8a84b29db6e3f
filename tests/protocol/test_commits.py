"""Norms, finiteness and scaling of what a commit applies."""

from __future__ import annotations

import math

import pytest
import torch

from tensorkv.errors import DtypeMismatch
from tensorkv.protocol.commits import all_finite, norms_of, scale, unscalable

EIGHT_BITS = [torch.float8_e4m3fn, torch.float8_e5m2]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, *EIGHT_BITS]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8, torch.int64, torch.bool])
def test_norms_of_every_dtype(dtype: torch.dtype) -> None:
    ones = torch.ones(3, 3).to(dtype)
    assert norms_of([ones, ones[0], torch.empty(0).to(dtype), ones[0, 0]]) == [3.0, math.sqrt(3), 0.0, 1.0]
    assert all_finite([ones, torch.empty(0).to(dtype)])


def test_norms_of_complex_numbers() -> None:
    assert norms_of([torch.tensor([3 + 4j, 12j])]) == [13.0]
    assert not all_finite([torch.tensor([complex(1, math.inf)])])


def test_norms_are_taken_in_float64() -> None:
    assert norms_of([torch.tensor([3e38, 3e38])]) == [pytest.approx(3e38 * math.sqrt(2))]
    assert norms_of([torch.tensor([6e4, 6e4], dtype=torch.float16)]) == [
        pytest.approx(6e4 * math.sqrt(2), 1e-3)
    ]


@pytest.mark.parametrize("size", [1e200, 1e-200, 1e-155, 1e-320])
def test_no_square_overflows_or_vanishes(size: float) -> None:
    (norm,) = norms_of([torch.full((9,), size, dtype=torch.float64)])
    assert norm == pytest.approx(3 * size, rel=1e-9, abs=0)
    (norm,) = norms_of([torch.full((9,), -size, dtype=torch.complex128)])
    assert norm == pytest.approx(3 * size, rel=1e-9, abs=0)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.float8_e5m2])
def test_one_element_that_is_not_finite_shows(dtype: torch.dtype, bad: float) -> None:
    values = torch.ones(100).to(dtype)
    values[57] = bad
    assert not all_finite([torch.ones(2), values])
    assert not math.isfinite(norms_of([values])[0])


def test_large_elements_are_finite() -> None:
    assert all_finite([torch.full((9,), 1e308, dtype=torch.float64)])


@pytest.mark.parametrize("dtype", [*FLOATS, torch.complex64])
def test_scaling_is_in_place(dtype: torch.dtype) -> None:
    values = torch.full((3,), 3.0).to(dtype)
    assert unscalable("w", dtype) is None
    scale(values, 0.5)
    assert values.dtype == dtype
    assert values.to(torch.complex64).tolist() == [1.5] * 3


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_what_cannot_be_scaled_is_named(dtype: torch.dtype) -> None:
    error = unscalable("steps", dtype)
    assert isinstance(error, DtypeMismatch)
    for text in ("'steps'", str(dtype), "max_norm"):
        assert text in str(error)
