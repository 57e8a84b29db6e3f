"""Sums: rank order bit by bit, half-width floats in float32, means, and where the result goes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tensorkv.server.sums import add_up, weigh

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.view(torch.uint8).tolist()


def expected(parts: list[torch.Tensor], dtype: torch.dtype, divisor: int) -> torch.Tensor:
    """The definition, one operation after the other."""
    wide = torch.float32 if dtype.itemsize < 4 else dtype
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part.to(wide)
    return (total / divisor if divisor != 1 else total).to(dtype)


@pytest.mark.parametrize("may_overwrite", [True, False])
@pytest.mark.parametrize("has_out", [True, False])
@pytest.mark.parametrize("num_parts", [1, 2, 4])
@pytest.mark.parametrize("divisor", [1, 3])
@pytest.mark.parametrize("pushed", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_way_gives_the_same_bits(
    dtype: torch.dtype, pushed: torch.dtype, divisor: int, num_parts: int, has_out: bool, may_overwrite: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    parts = [
        (torch.randn(37, generator=generator, dtype=torch.float64) * 10**i).to(pushed)
        for i in range(num_parts)
    ]
    wanted = expected(parts, dtype, divisor)
    before = [part.clone() for part in parts]
    out = torch.full((37,), 7.0, dtype=dtype) if has_out else None
    total = add_up(parts, dtype, divisor, out, may_overwrite=may_overwrite)
    assert total.dtype == dtype
    assert bits(total) == bits(wanted)
    assert out is None or total is out
    untouched = parts[1:] if may_overwrite else parts
    assert all(bits(a) == bits(b) for a, b in zip(untouched[::-1], before[::-1], strict=False))


def test_the_order_is_that_of_the_parts() -> None:
    parts = [torch.tensor([value]) for value in (1.0, 1e8, -1e8)]
    assert add_up(parts, torch.float32, may_overwrite=False).item() == 0.0
    assert add_up(parts[::-1], torch.float32).item() == 1.0


def test_half_width_sums_are_rounded_once() -> None:
    parts = [torch.tensor([value], dtype=torch.float16) for value in (2048.0, 0.75, 0.75)]
    assert add_up(parts, torch.float16).item() == 2050.0
    parts = [torch.tensor([60000.0], dtype=torch.float16)] * 2
    assert add_up(parts, torch.float16, 2).item() == 60000.0  # the sum itself is over the largest float16


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.complex64, torch.bool], ids=str)
def test_other_dtypes_are_added_as_they_are(dtype: torch.dtype) -> None:
    parts = [torch.tensor([1, 0, 1]).to(dtype) for _ in range(3)]
    total = add_up(parts, dtype)
    assert total.dtype == dtype
    assert (
        total.tolist()
        == (torch.tensor([3, 0, 3]) if dtype != torch.bool else torch.tensor([1, 0, 1])).to(dtype).tolist()
    )


def test_nothing_at_all_can_be_added() -> None:
    empty = torch.empty(0)
    assert add_up([empty, empty], torch.float32, 2, torch.empty(0)).numel() == 0


@pytest.mark.parametrize("has_out", [True, False])
@pytest.mark.parametrize("size", [1, 15, 16, 17, 31, 33, 1003])
@pytest.mark.parametrize("pushed", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_products_are_rounded_before_they_are_added(
    dtype: torch.dtype, pushed: torch.dtype, size: int, has_out: bool
) -> None:
    """Each alone, so that neither the size nor the processor shows; and no part is changed."""
    generator = torch.Generator().manual_seed(2)
    parts = [torch.randn(size, generator=generator, dtype=torch.float64).to(pushed) for _ in range(3)]
    before = [part.clone() for part in parts]
    factors = [0.1, 3.0, 1 / 7]
    wide = torch.float32 if dtype.itemsize < 4 else dtype
    elements = []
    for values in zip(*(part.to(wide) for part in parts), strict=True):  # one at a time
        products = [value * factor for value, factor in zip(values, factors, strict=True)]
        elements.append(((products[0] + products[1] + products[2]) / 4.2).to(dtype))
    out = torch.full((size,), 7.0, dtype=dtype) if has_out else None
    total = add_up(parts, dtype, 4.2, out, factors=factors)
    assert bits(total) == bits(torch.stack(elements))
    assert out is None or total is out
    assert all(bits(a) == bits(b) for a, b in zip(parts, before, strict=True))


def test_what_a_mean_divides_by() -> None:
    assert weigh([(None, 2), (None, 1)]) == (3, None)
    assert weigh([(5.0, 2), (None, 3)]) == (8.0, [2.5, 1.0])
    assert weigh([(5.0, 2)]) == (2, None)
    assert weigh([(0.1, 1)] * 10) == (1.0, [0.1] * 10)  # not 0.9999999999999999


def test_a_sum_that_fails_leaves_its_target_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """No part is cast, which takes memory, once the target has been written."""
    out = torch.full((4,), 7.0)
    parts = [torch.ones(4), torch.ones(4), torch.ones(4, dtype=torch.float16)]
    cast, left = torch.Tensor.to, [0, 0, 1]

    def short(self: torch.Tensor, *args: Any) -> torch.Tensor:
        if left.pop(0):
            raise MemoryError
        return cast(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", short)
        with pytest.raises(MemoryError):
            add_up(parts, torch.float32, 1, out, may_overwrite=False)
    assert out.tolist() == [7.0] * 4
    assert add_up(parts, torch.float32, 1, out).tolist() == [3.0] * 4
