"""Lending: tensors in the window, which are pushed without a copy.

`empty_like` returns them. When they are pushed, the servers of this host read them in place. A chunk is lent
in place if its pieces are adjacent; so tensors are laid out as the chunks of a push of their list hold them.
In another order, or with others between them, they are copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tensorkv.errors import MemoryLimitReached
from tensorkv.worker.plans import KeyState, Known, Lent, Plan, PlanChunk, Span
from tensorkv.worker.window import Window


def empty_tensors(window: Window, states: Sequence[KeyState]) -> list[torch.Tensor]:
    """Return a new, uninitialised tensor for each key, in the window if a server shares it.

    Whole values of one server and dtype are adjacent in list order, as they are in a chunk (`build_plan`);
    slices of others make chunks of their own (`PlanCache.cut_alone`).

    Raises:
        MemoryLimitReached: there is no memory for them.
    """
    if not window.shared:
        return [torch.empty(state.shape, dtype=state.dtype, device="cpu") for state in states]
    groups: dict[object, list[int]] = {}
    for place, state in enumerate(states):
        slices = state.entry.slices
        group = (slices[0].server, state.dtype) if len(slices) == 1 else place
        groups.setdefault(group, []).append(place)
    found: dict[int, torch.Tensor] = {}
    for places in groups.values():
        sizes = [states[place].num_elems for place in places]
        dtype = states[places[0]].dtype
        size_bytes = sum(sizes) * dtype.itemsize
        try:
            flat = window.hand_out(size_bytes).view(dtype)
        except OSError as exc:
            raise MemoryLimitReached(f"empty_like: no shared memory of {size_bytes} bytes: {exc}") from exc
        for place, part in zip(places, torch.split(flat, sizes), strict=True):
            found[place] = part.view(states[place].shape)
    return [found[place] for place in range(len(states))]


def spans_of(window: Window, plan: Plan, values: Sequence[torch.Tensor]) -> list[Span | None]:
    """Return where each frame of a push lies in the window; None for one that has to be copied.

    Steps push the same tensors, so only the first step checks them one by one.
    """
    spans = _known_spans(plan, values)
    if spans is None:
        addresses = [_address(value) for value in values]
        spans = [_span(window, chunk, addresses) for _, _, chunk in plan.frames]
        plan.lent = Lent(Known.of(values), spans) if all(addresses) else None
    return spans


def _known_spans(plan: Plan, values: Sequence[torch.Tensor]) -> list[Span | None] | None:
    """Return where the frames lie if these are the tensors of the last push, unchanged in layout."""
    lent = plan.lent  # another thread may replace it
    if lent is None or not lent.values.are(values) or not all(map(torch.Tensor.is_contiguous, values)):
        return None
    return lent.spans


def _address(value: torch.Tensor) -> int:
    """Return the address of a value; 0 unless its memory holds its elements in order, unmodified."""
    if not value.is_cpu or value.layout != torch.strided:
        return 0
    if not value.is_contiguous() or value.is_neg() or value.is_conj():
        return 0
    return value.data_ptr()


def _span(window: Window, chunk: PlanChunk, addresses: Sequence[int]) -> Span | None:
    itemsize = chunk.dtype.itemsize
    first = chunk.pieces[0]
    start = addresses[first.value] + first.start * itemsize
    for piece in chunk.pieces:
        address = addresses[piece.value]
        if not address or address + piece.start * itemsize != start + piece.low * itemsize:
            return None
    found = window.where(start, chunk.size_bytes)
    return None if found is None or chunk.absent else (*found, chunk.size_bytes)
