"""Copies between the host's memory and devices. Those that need a GPU are skipped without one."""

from __future__ import annotations

import pytest
import torch

from tensorkv.worker import devices
from tensorkv.worker.devices import copy_each, join_into, joined, no_grad, on, streams_of
from tensorkv.worker.plans import COALESCE_BYTES

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PLACES = ["cpu", pytest.param("cuda", marks=ON_GPU), pytest.param("both", marks=ON_GPU)]


def pieces(place: str, sizes: list[int]) -> list[torch.Tensor]:
    """Return flat tensors 0, 1, 2 ... all in all; on "both" every second one is on the GPU."""
    parts = torch.split(torch.arange(float(sum(sizes))), sizes)
    found = []
    for number, part in enumerate(parts):
        found.append(part.to(place if place != "both" else ["cpu", "cuda"][number % 2]))
    return found


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("sizes", [[5], [3, 4], [1, 2, 3]])
def test_pieces_of_any_device_are_joined_on_the_cpu(place: str, sizes: list[int]) -> None:
    expected = torch.arange(float(sum(sizes)))
    given = pieces(place, sizes)
    found = joined(given)
    assert found.is_cpu
    assert torch.equal(found, expected)
    target = torch.empty(sum(sizes))
    join_into(target, tuple(given))
    assert torch.equal(target, expected)


@pytest.mark.parametrize("how", [joined, lambda given: join_into(torch.empty(2), given)])
def test_what_torch_cannot_join_on_one_device_is_refused(how: object) -> None:
    assert callable(how)
    with pytest.raises(RuntimeError):
        how([torch.ones(1), torch.ones(1).to_sparse()])


@pytest.mark.parametrize("place", PLACES)
def test_small_and_large_ones_are_copied_to_where_they_belong(place: str) -> None:
    large = COALESCE_BYTES // 4 + 1
    shapes = [(2, 3), (large,), (), (0, 3), (large, 2), (4,)]
    sources = [torch.rand(shape) for shape in shapes]
    targets = []
    for number, shape in enumerate(shapes):
        device = place if place != "both" else ["cuda", "cpu"][number % 2]
        targets.append(torch.empty(shape, device=device, requires_grad=number == 0))
    copy_each(targets, sources)
    devices._copy_across([target.detach() for target in targets], [2 * each for each in sources])
    for target, source in zip(targets, sources, strict=True):
        assert torch.equal(target.detach().cpu(), 2 * source)
    copy_each(targets[::-1], sources[::-1])
    copy_each(targets[:1], [3 * sources[0]])
    for target, source in zip(targets, [3 * sources[0], *sources[1:]], strict=True):
        assert torch.equal(target.detach().cpu(), source)


def test_without_a_gpu_there_are_no_streams() -> None:
    assert streams_of([torch.ones(1)]) == ()
    with on(()):
        pass


@ON_GPU
def test_copies_go_through_the_streams_of_the_caller() -> None:
    mine = torch.cuda.Stream()
    with torch.cuda.stream(mine):
        tensor = torch.ones(1, device="cuda")
        streams = streams_of([tensor, torch.ones(1)])
    assert streams == (mine,)
    with on(streams):
        assert torch.cuda.current_stream() == mine
    assert torch.cuda.current_stream() != mine


def test_without_gradients_as_before() -> None:
    """Also within another call, after an error, and where gradients were off."""
    weight = torch.ones(2, requires_grad=True)

    @no_grad
    def call(then: object) -> bool:
        if callable(then):
            then()
        return torch.is_grad_enabled() or (weight * 2).requires_grad

    assert not call(None)
    assert not call(lambda: call(None))
    assert torch.is_grad_enabled()
    with pytest.raises(ZeroDivisionError):
        call(lambda: 1 // 0)
    assert torch.is_grad_enabled()
    with torch.no_grad():
        call(None)
        assert not torch.is_grad_enabled()
