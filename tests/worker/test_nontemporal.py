"""Copies past the caches do what torch's do, of whatever and into whatever."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tensorkv.config import STREAM_BYTES
from tensorkv.store import KVStore
from tensorkv.testing.cluster import run_job
from tensorkv.worker import nontemporal
from tensorkv.worker.nontemporal import MIN_LIST_BYTES, pays, stream

NUM_ELEMS = 24


def ramp(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(1, NUM_ELEMS + 1, dtype=torch.float64).to(dtype).view(4, 6)


def wide(dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(4, 12, dtype=dtype)[:, ::2]


SOURCES: dict[str, Callable[[], torch.Tensor]] = {
    "float32": lambda: ramp(torch.float32),
    "bfloat16": lambda: ramp(torch.bfloat16),
    "float16": lambda: ramp(torch.float16),
    "float64": lambda: ramp(torch.float64),
    "int8": lambda: ramp(torch.int8),
    "bool": lambda: ramp(torch.float32) > 7,
    "not contiguous": lambda: wide(torch.float32).copy_(ramp(torch.float32)),
    "negated": lambda: torch._neg_view(ramp(torch.float32)),
    "with a gradient": lambda: ramp(torch.float32).requires_grad_(),
    "a parameter": lambda: torch.nn.Parameter(ramp(torch.float32)),
    "expanded": lambda: torch.full((1, 6), 3.0).expand(4, 6),
}
TARGETS: dict[str, Callable[[torch.dtype], torch.Tensor]] = {
    "like it": lambda dtype: torch.zeros(4, 6, dtype=dtype),
    "float64": lambda dtype: torch.zeros(4, 6, dtype=torch.float64),
    "not contiguous": wide,
    "transposed": lambda dtype: torch.zeros(6, 4, dtype=dtype).t(),
    "negated": lambda dtype: torch._neg_view(torch.zeros(4, 6)),
}


@pytest.fixture(autouse=True)
def _everything_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nontemporal, "STREAM_BYTES", 1)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("target", TARGETS)
def test_it_does_what_torch_does(source: str, target: str) -> None:
    made = SOURCES[source]()
    expected, found = TARGETS[target](made.dtype), TARGETS[target](made.dtype)
    version = found._version
    with torch.no_grad():
        expected.copy_(made)
        stream(found, made)
    assert torch.equal(expected, found)
    assert found._version > version  # autograd sees that it was written


def test_a_shape_is_broadcast_as_torch_does() -> None:
    found = torch.zeros(4, 6)
    stream(found, torch.ones(6))
    assert found.eq(1).all()


def test_what_torch_does_not_write_is_refused() -> None:
    with torch.inference_mode():
        found = torch.zeros(4, 6)
    for copy in (torch.Tensor.copy_, stream):
        with pytest.raises(RuntimeError, match="nference"), torch.no_grad():
            copy(found, ramp(torch.float32))
    with torch.inference_mode():
        stream(found, ramp(torch.float32))
        assert torch.equal(found, ramp(torch.float32))


def test_it_pays_for_long_pieces_of_long_lists() -> None:
    floats = (torch.float32, torch.float32)
    assert pays(MIN_LIST_BYTES, floats, STREAM_BYTES)
    assert not pays(MIN_LIST_BYTES - 1, floats, STREAM_BYTES)
    assert not pays(MIN_LIST_BYTES, floats, nontemporal.STREAM_BYTES - 1)
    assert pays(MIN_LIST_BYTES, (torch.bfloat16, torch.float64), STREAM_BYTES)
    assert not pays(MIN_LIST_BYTES, (torch.complex64, torch.complex64), STREAM_BYTES)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.complex64])
def test_a_list_that_is_streamed_is_pushed_and_pulled_right(
    dtype: torch.dtype, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nontemporal, "MIN_LIST_BYTES", 1)
    streamed: list[int] = []

    def counting(target: torch.Tensor, source: torch.Tensor) -> None:
        streamed.append(source.nbytes)
        stream(target, source)

    monkeypatch.setattr("tensorkv.worker.transfers.stream", counting)
    sizes = [10, 700_000, 3, 20_000, 40_000]  # sliced, and whole
    keys = [f"k{size}" for size in sizes]

    def value(size: int, rank: int, step: int) -> torch.Tensor:
        return (torch.arange(size) % 7 + 10 * rank + step).to(dtype)

    def work(kv: KVStore) -> None:
        kv.init(keys, [torch.zeros(size, dtype=dtype) for size in sizes])
        outs: list[Any] = [torch.zeros(size, dtype=dtype) for size in sizes]
        outs[1] = torch.zeros(2 * sizes[1], dtype=dtype)[::2]
        for step in range(3):
            values = [value(size, kv.rank, step) for size in sizes]
            if step:
                kv.push(keys, values)
                kv.pull(keys, outs)
            else:
                kv.pushpull(keys, values, outs)
            for size, out in zip(sizes, outs, strict=True):
                assert torch.equal(out, value(size, 0, step) + value(size, 1, step))

    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        run_job(work, num_workers=2, num_servers=2, host="127.0.0.1", transport="shm")
    finally:
        torch.set_num_threads(threads)
    assert bool(streamed) == (num_threads == 1 and not dtype.is_complex)
