"""Copies through views of tensors' memory do what torch's copies do."""

from __future__ import annotations

import gc
import weakref
from operator import itemgetter

import pytest
import torch

from tensorkv.arrays import bytes_of
from tensorkv.worker.plans import COALESCE_BYTES
from tensorkv.worker.views import Viewed, Views, views_of

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn]


def values(dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.arange(number, 7 + number).to(dtype) for number in range(3)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bytes_of_some_tensors_are_gathered_in_order(dtype: torch.dtype) -> None:
    tensors = values(dtype)
    viewed = Viewed(tensors, Views(tensors))
    tensors[2].copy_(tensors[0])  # a view sees what its tensor holds now
    expected = b"".join(bytes(bytes_of(tensors[place])) for place in (2, 0))
    assert viewed.gather(itemgetter(2, 0)) == expected
    assert viewed.gather(itemgetter(slice(1, 2))) == bytes(bytes_of(tensors[1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_are_filled_and_autograd_is_told(dtype: torch.dtype) -> None:
    tensors, sources = [torch.zeros(7, dtype=dtype) for _ in range(3)], values(dtype)
    versions = [each._version for each in tensors]
    Viewed(tensors, Views(tensors)).fill(itemgetter(0, 2), list(map(bytes_of, sources[:2])))
    assert [torch.equal(tensors[place], sources[number]) for number, place in enumerate((0, 2))] == [True] * 2
    assert not tensors[1].any()
    assert [each._version - old for each, old in zip(tensors, versions, strict=True)] == [1, 0, 1]


def test_a_part_of_another_size_is_refused() -> None:
    tensors = values(torch.float32)
    with pytest.raises(ValueError, match="different structures"):
        Viewed(tensors, Views(tensors)).fill(itemgetter(slice(0, 1)), [memoryview(bytes(4))])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(8)[::2],
        torch.zeros(2, 3).t(),
        torch.zeros(0),
        torch.zeros(3, dtype=torch.float64),
        torch.zeros(COALESCE_BYTES),
        torch.zeros(3).to_sparse(),
        torch.zeros(3, device="meta"),
        torch.zeros(3, dtype=torch.complex64).imag,
        torch._neg_view(torch.zeros(3)),
        torch.nn.Buffer(torch.zeros(3)),
    ],
    ids=["strided", "turned", "empty", "dtype", "large", "sparse", "meta", "imaginary", "negative", "buffer"],
)
def test_only_small_plain_tensors_are_viewed(tensor: torch.Tensor) -> None:
    plain = torch.nn.Parameter(torch.zeros(3))
    assert views_of([plain], [torch.float32]) is not None
    is_plain_buffer = type(tensor) is torch.Tensor and isinstance(tensor, torch.nn.Buffer)
    assert (views_of([plain, tensor], [torch.float32] * 2) is not None) == is_plain_buffer


def test_inference_tensors_and_complex_ones_are_not_viewed() -> None:
    with torch.inference_mode():
        tensor = torch.zeros(3)
    assert views_of([tensor], [torch.float32]) is None
    assert views_of([torch.zeros(3, dtype=torch.complex64)], [torch.complex64]) is None


def test_views_keep_the_memory_and_not_the_tensor_and_let_it_be_resized() -> None:
    tensor = torch.ones(4)
    views = Views([tensor])
    gone = weakref.ref(tensor)
    tensor.resize_(1000)
    assert tensor.numel() == 1000
    del tensor
    gc.collect()
    assert gone() is None
    other = torch.full((4,), 2.0)
    views = Views([other])
    del other
    assert torch.frombuffer(bytearray(views.parts[0]), dtype=torch.float32).tolist() == [2.0] * 4
