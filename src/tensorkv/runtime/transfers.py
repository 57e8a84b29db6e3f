"""Tensors to frames and back: the copies of a push and of a pull, on the worker's side.

Large pieces go straight from and to the caller's memory. Small ones are gathered into one buffer and
spread from one, a few vector operations for a thousand keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch

from tensorkv.arrays import bytes_of
from tensorkv.errors import ProtocolError, TensorKVError, from_wire
from tensorkv.runtime.link import Exchange
from tensorkv.runtime.plans import KeyState, Piece, PlanChunk, ServerPart
from tensorkv.wire import messages as m


def gather(chunk: PlanChunk, values: Sequence[torch.Tensor]) -> list[memoryview]:
    """Return the payload of a chunk. The views keep alive whatever memory they show."""
    if chunk.absent:
        return []
    if chunk.pick is not None:
        picked = chunk.pick(values)
        return [bytes_of(torch.cat(picked if chunk.one_dim else [each.reshape(-1) for each in picked]))]
    parts: list[memoryview] = []
    small: list[torch.Tensor] = []
    for piece in chunk.pieces:
        value = values[piece.value]
        flat = value if value.dim() == 1 else value.reshape(-1)
        if not piece.whole:
            flat = flat[piece.start : piece.stop]
        if piece.small:
            small.append(flat)
            continue
        if small:
            parts.append(bytes_of(torch.cat(small)))
            small = []
        parts.append(bytes_of(flat.contiguous()))
    if small:
        parts.append(bytes_of(torch.cat(small)))
    return parts


@final
class Destinations:
    """Where the values of one pull go.

    `outs[i]` are the caller's tensors for value i, at least one. A value whose large pieces cannot be
    received straight into the first of them goes through memory of its own.
    """

    def __init__(self, states: Sequence[KeyState], outs: Sequence[list[torch.Tensor]]) -> None:
        self.states = states
        self.outs = outs
        self._flat: dict[int, torch.Tensor] = {}
        self._direct: set[int] = set()
        self._aliased: bool | None = None
        self._firsts = [each[0] for each in outs]
        self._plain = set(map(len, outs)) == {1} and not _share_memory(self._firsts)

    def flat(self, value: int) -> torch.Tensor:
        """Return contiguous memory, flat and in the stored dtype, for value number `value`."""
        found = self._flat.get(value)
        if found is None:
            out, state = self.outs[value][0], self.states[value]
            if (
                out.dtype == state.dtype
                and out.is_contiguous()
                and out.device.type == "cpu"
                and (self._plain or not self._is_aliased())
            ):
                found = out.view(-1)
                self._direct.add(value)
            else:
                found = torch.empty(state.num_elems, dtype=state.dtype)
            found = self._flat.setdefault(value, found)  # two links may receive parts of it at once
        return found

    def spread(self, chunk: PlanChunk, staging: list[torch.Tensor]) -> None:
        """Copy the small pieces of a chunk from where they were received."""
        if self._plain and chunk.pick is not None:
            torch._foreach_copy_(chunk.pick(self._firsts), staging)
            return
        targets: list[torch.Tensor] = []
        for piece in chunk.pieces:
            if piece.small:
                if piece.whole and self._plain:
                    targets.append(self._firsts[piece.value])
                else:
                    targets.append(self._small_target(piece))
        torch._foreach_copy_(targets, staging)

    def _small_target(self, piece: Piece) -> torch.Tensor:
        flat = self.flat(piece.value)
        return flat.view(self.states[piece.value].shape) if piece.whole else flat[piece.start : piece.stop]

    def _is_aliased(self) -> bool:
        """Whether two values go to the same memory: then the last one in list order must win."""
        if self._aliased is None:
            self._aliased = _share_memory([out for each in self.outs for out in each])
        return self._aliased

    def finish(self) -> None:
        """All has been received: fill what was not received in place, and tell autograd what was."""
        for value, flat in sorted(self._flat.items()):
            first, *others = self.outs[value]
            shaped = flat.view(self.states[value].shape)
            if value in self._direct:
                torch.autograd.graph.increment_version(first)
            else:
                first.copy_(shaped)
            for other in others:
                other.copy_(shaped)


@final
class PullExchange(Exchange):
    """A pull from one server: chunks arrive in any order and go to their destinations.

    `on_end` is called, by whoever receives the last frame, with the error or None.
    """

    def __init__(
        self,
        part: ServerPart,
        destinations: Destinations,
        on_end: Callable[[TensorKVError | None], None],
    ) -> None:
        self._part = part
        self._destinations = destinations
        self._on_end = on_end
        self._missing = len(part.chunks)
        self._staging: tuple[torch.Tensor, list[torch.Tensor]] | None = None

    def place(self, message: m.Data, payload_bytes: int) -> list[memoryview]:
        chunk = self._chunk(message)
        itemsize = chunk.stored_dtype.itemsize
        if payload_bytes != chunk.num_elems * itemsize:
            raise ProtocolError(f"a chunk of {chunk.num_elems} elements came with {payload_bytes} bytes")
        self._staging = _take_staging(chunk, self._destinations.states)
        staged = bytes_of(self._staging[0])
        buffers: list[memoryview] = []
        used = run = 0
        for piece in chunk.pieces:
            size_bytes = (piece.stop - piece.start) * itemsize
            if piece.small:
                used += size_bytes
                continue
            if used > run:
                buffers.append(staged[run:used])
                run = used
            flat = self._destinations.flat(piece.value)
            buffers.append(bytes_of(flat[piece.start : piece.stop]))
        if used > run:
            buffers.append(staged[run:used])
        return buffers

    def take(self, message: Any) -> bool:
        if isinstance(message, TensorKVError):
            self._on_end(message)
            return True
        if isinstance(message, m.Failed):
            self._on_end(from_wire(message.name, message.text))
            return True
        chunk = self._chunk(message)
        if self._staging is not None:
            if self._staging[1]:
                self._destinations.spread(chunk, self._staging[1])
            chunk.stagings.append(self._staging)
            self._staging = None
        self._missing -= 1
        if self._missing == 0:
            self._on_end(None)
        return self._missing == 0

    def _chunk(self, message: m.Data) -> PlanChunk:
        if not isinstance(message, m.Data) or not 0 <= message.chunk < len(self._part.chunks):
            raise ProtocolError(f"{message} is no reply to a pull of {len(self._part.chunks)} chunks")
        return self._part.chunks[message.chunk]


def _take_staging(chunk: PlanChunk, states: Sequence[KeyState]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return a buffer for the small pieces of a chunk, with a view for each; used again and again."""
    if chunk.stagings:
        return chunk.stagings.pop()
    small = [piece for piece in chunk.pieces if piece.small]
    buffer = torch.empty(sum(piece.stop - piece.start for piece in small), dtype=chunk.stored_dtype)
    views: list[torch.Tensor] = []
    low = 0
    for piece in small:
        high = low + piece.stop - piece.start
        view = buffer[low:high]
        views.append(view.view(states[piece.value].shape) if piece.whole else view)
        low = high
    return buffer, views


def _share_memory(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether two tensors begin at the same address; empty ones do not count."""
    pointers = list(map(torch.Tensor.data_ptr, tensors))
    return len(set(pointers)) < len(pointers) and len(set(filter(None, pointers))) < len(
        list(filter(None, pointers))
    )
