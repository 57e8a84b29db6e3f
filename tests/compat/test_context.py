"""Contexts behave as MXNet's."""

from __future__ import annotations

import threading

import pytest
import torch

from tensorkv.compat.base import MXNetError
from tensorkv.compat.context import (
    Context,
    context_of,
    cpu,
    cpu_pinned,
    current_context,
    gpu,
    num_gpus,
)


def test_contexts_are_compared_by_type_and_number() -> None:
    assert cpu(1) == Context("cpu", 1) == Context(cpu(1))
    assert hash(cpu(1)) == hash(Context("cpu", 1))
    assert cpu() == cpu(0) != cpu(1)
    assert cpu(0) != gpu(0)
    assert cpu(0) != "cpu(0)"
    assert (cpu(2).device_type, cpu(2).device_id) == ("cpu", 2)
    assert [cpu().device_typeid, gpu().device_typeid, cpu_pinned().device_typeid] == [1, 2, 3]
    assert [repr(cpu()), str(gpu(1)), repr(cpu_pinned(0))] == ["cpu(0)", "gpu(1)", "cpu_pinned(0)"]


def test_an_unknown_type_of_device() -> None:
    with pytest.raises(KeyError, match="tpu"):
        Context("tpu")


def test_with_sets_the_default_of_this_thread() -> None:
    seen = []
    with cpu(1) as outer:
        with cpu(2):
            assert current_context() == cpu(2)
            thread = threading.Thread(target=lambda: seen.append(current_context()))
            thread.start()
            thread.join(30)
        assert current_context() is outer
    assert current_context() == cpu(0)
    assert seen == [cpu(0)]


def test_every_cpu_is_the_memory_of_this_machine() -> None:
    assert cpu(3).torch_device() == cpu_pinned(1).torch_device() == torch.device("cpu")
    assert context_of(torch.zeros(1)) == cpu(0)


def test_a_gpu_that_is_not_there() -> None:
    assert num_gpus() == torch.cuda.device_count()
    missing = gpu(num_gpus())
    with pytest.raises(MXNetError, match=r"there is no gpu\(\d+\).*mx\.cpu\(i\)"):
        missing.torch_device()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu() -> None:
    assert gpu(0).torch_device() == torch.device("cuda", 0)
    assert context_of(torch.zeros(1, device="cuda")) == gpu(0)
