"""Tensors to frames and back: the copies of a push and of a pull, on the worker's side.

Large pieces go directly from and to the caller's memory. Small ones are gathered into one buffer and spread
from one: a few vector operations for a thousand keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import numpy as np
import torch

from tensorkv.arrays import bytes_of, new_tensor, unreadable
from tensorkv.errors import InvalidValue, ProtocolError, TensorKVError, from_wire
from tensorkv.wire import messages as m
from tensorkv.worker.devices import Tensors, copy_each, join_into, joined, no_grad, on, streams_of
from tensorkv.worker.nontemporal import stream
from tensorkv.worker.plans import KeyState, Piece, Pieces, Plan, PlanChunk, ServerPart, Staging
from tensorkv.worker.requests import Exchange
from tensorkv.worker.views import Viewed


def gather(chunk: PlanChunk, values: Sequence[torch.Tensor]) -> list[memoryview]:
    """Return the payload of a chunk. The views keep their memory alive.

    They show the caller's memory only if `chunk.lends`; it must then not change before the payload is sent.
    """
    if chunk.absent:
        return []
    if chunk.pick is not None:
        if isinstance(values, Viewed):
            return [memoryview(values.gather(chunk.pick))]
        picked = chunk.pick(values)
        if len(picked) == 1:
            return [memoryview(bytes_of(_plain(picked[0])).tobytes())]
        return [bytes_of(joined(picked if chunk.one_dim else [each.reshape(-1) for each in picked]))]
    parts: list[memoryview] = []
    small: list[torch.Tensor] = []
    for piece in chunk.pieces:
        flat = _flat_piece(piece, values)
        if piece.small:
            small.append(flat)
            continue
        if small:
            parts.append(bytes_of(joined(small)))
            small = []
        parts.append(bytes_of(_plain(flat)))
    if small:
        parts.append(bytes_of(joined(small)))
    return parts


def check_gathered(size_bytes: int, chunk: PlanChunk) -> None:
    """Raise InvalidValue if the copied pieces of a chunk have another size than the plan says.

    Nobody looks at the shapes of tensors that a store knows, and these may have changed in place.
    """
    if size_bytes != chunk.size_bytes:
        raise InvalidValue(f"pushed tensors have {size_bytes} bytes now, not {chunk.size_bytes}")


COPY_ERRORS = (RuntimeError, TypeError, ValueError, MemoryError)
"""Errors that torch and NumPy raise when they fail to copy a tensor."""


def failed_copy(
    exc: Exception, chunk: PlanChunk, states: Sequence[KeyState], values: Sequence[torch.Tensor]
) -> TensorKVError:
    """Return the error, naming the key, for a failure of torch to gather a chunk.

    Values were checked before, so the usual reason is a lack of memory for a copy.
    """
    number = _culprit(chunk, values)
    return unreadable(exc, states[number].key, values[number])


def gathered(plan: Plan, chunk: PlanChunk, values: Sequence[torch.Tensor]) -> list[memoryview]:
    """Return the payload of a chunk, like `gather`.

    Raises:
        InvalidValue, MemoryLimitReached: torch fails to copy a value; the text names it.
    """
    try:
        return gather(chunk, values)
    except COPY_ERRORS as exc:
        raise failed_copy(exc, chunk, plan.states, values) from exc


def _culprit(chunk: PlanChunk, values: Sequence[torch.Tensor]) -> int:
    """Return which value of a chunk torch fails to copy; the first if it can copy each alone."""
    for piece in chunk.pieces:
        try:
            _plain(_flat_piece(piece, values))
        except COPY_ERRORS:
            return piece.value
    return chunk.pieces[0].value


@no_grad  # a known value may require a gradient by now
def gather_into(target: torch.Tensor, chunk: PlanChunk, values: Sequence[torch.Tensor]) -> None:
    """Copy the payload of a chunk, which is not absent, to `target`: flat, in the chunk's dtype."""
    if chunk.pick is not None and isinstance(values, Viewed):
        bytes_of(target)[:] = values.gather(chunk.pick)
        return
    pieces: tuple[torch.Tensor, ...] | list[torch.Tensor]
    if chunk.pick is not None and chunk.one_dim:
        pieces = chunk.pick(values)
    else:
        pieces = [_flat_piece(piece, values) for piece in chunk.pieces]
    if chunk.streams and pieces[0].is_cpu and torch.get_num_threads() == 1:
        check_gathered(sum(piece.numel() for piece in pieces) * chunk.dtype.itemsize, chunk)
        for piece in pieces:
            stream(target[: piece.numel()], piece)
            target = target[piece.numel() :]
    else:
        join_into(target, pieces)
        check_gathered(target.numel() * chunk.dtype.itemsize, chunk)


@no_grad
def _stream_each(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        stream(target, source)


def _flat_piece(piece: Piece, values: Sequence[torch.Tensor]) -> torch.Tensor:
    value = values[piece.value]
    flat = value if value.dim() == 1 else value.reshape(-1)
    return flat if piece.whole else flat[piece.start : piece.stop]


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the CPU whose memory holds its elements in order, unmodified."""
    if tensor.is_neg() or tensor.is_conj():
        tensor = tensor.resolve_conj().resolve_neg()
    return tensor.contiguous().cpu()


@final
class Destinations:
    """Where the values of one pull go.

    `firsts[i]` is the caller's tensor for value i, and `others[i]` are further ones for it. `sizes_bytes` are
    the sizes of `firsts`, if all are contiguous. `plain` tells that each value is known to have one tensor,
    and none to share memory. A value whose large pieces cannot be received directly into the first tensor
    goes through memory of its own. Pieces that lie in shared memory, or were received with others, are copied
    from there to a device. `unmerged` says that a server answered before this worker's last push was merged.
    """

    unmerged = False

    def __init__(
        self,
        states: Sequence[KeyState],
        firsts: Sequence[torch.Tensor],
        others: Sequence[Sequence[torch.Tensor]] | None = None,
        sizes_bytes: np.ndarray[Any, Any] | None = None,
        plain: bool = False,
    ) -> None:
        self.states = states
        self._firsts = firsts
        self._others = others
        self._flat: dict[int, torch.Tensor] = {}
        self._direct: set[int] = set()
        self._of_device: dict[int, list[Piece]] = {}  # with pieces that were received in memory of their own
        self._streams = streams_of(out for each in [firsts, *(others or ())] for out in each)
        self._aliased: bool | None = None
        # One tensor for each value, and none shares memory with another.
        self.plain = plain or (
            others is None and (len(firsts) == 1 or not _share_memory(firsts, sizes_bytes))
        )

    @classmethod
    def per_device(cls, states: Sequence[KeyState], outs: Sequence[list[torch.Tensor]]) -> Destinations:
        """Return destinations; `outs[i]` are the caller's tensors for value i, at least one."""
        others = [each[1:] for each in outs]
        return cls(states, [each[0] for each in outs], others if any(others) else None)

    def memory_for(self, piece: Piece) -> torch.Tensor:
        """Return memory on the CPU to receive a piece in, flat and in the stored dtype."""
        if not self._firsts[piece.value].is_cpu and self._takes_pieces(piece.value):
            self._of_device.setdefault(piece.value, []).append(piece)
        return self._flat_of(piece.value)[piece.start : piece.stop]

    def _flat_of(self, value: int) -> torch.Tensor:
        """Return the memory on the CPU of value number `value`: the caller's if possible."""
        found = self._flat.get(value)
        if found is None:
            out, state = self._firsts[value], self.states[value]
            if out.is_cpu and self._takes_pieces(value):
                found = _flattened(out)
                self._direct.add(value)
            else:
                found = new_tensor(state.key, (state.num_elems,), state.dtype)
            found = self._flat.setdefault(value, found)  # two links may receive parts of it at once
        return found

    def _takes_pieces(self, value: int) -> bool:
        """Whether a pulled value can go to the caller's tensor piece by piece."""
        out = self._firsts[value]
        alike = out.dtype == self.states[value].dtype and out.is_contiguous()
        return alike and (self.plain or not self._is_aliased())

    def spread(self, chunk: PlanChunk, staging: Staging) -> None:
        """Copy the small pieces of a chunk from the memory that received them."""
        if self.plain and chunk.pick is not None:
            self._copy_whole(chunk.pick, staging)
            return
        targets: list[torch.Tensor] = []
        for piece in chunk.pieces:
            if piece.small:
                if piece.whole and self.plain:
                    targets.append(self._firsts[piece.value])
                else:
                    targets.append(self._target_of(piece))
        self._copy_each(targets, staging.views)

    def copy_from(self, chunk: PlanChunk, pieces: Pieces) -> None:
        """Copy the pieces of a chunk: whole ones have the shape of their value."""
        if self.plain and chunk.pick is not None:
            self._copy_whole(chunk.pick, pieces)
            return
        sources = pieces.views
        targets = [
            self._firsts[piece.value] if piece.whole and self.plain else self._target_of(piece)
            for piece in chunk.pieces
        ]
        if chunk.streams and targets[0].is_cpu and torch.get_num_threads() == 1:
            with on(self._streams):
                _stream_each(targets, sources)
        else:
            self._copy_each(targets, sources)

    def _copy_whole(self, pick: Callable[[Any], Any], pieces: Pieces) -> None:
        """Copy a chunk of small whole values."""
        if isinstance(self._firsts, Viewed):
            self._firsts.fill(pick, pieces.parts)
        else:
            self._copy_each(pick(self._firsts), pieces.views)

    def _copy_each(self, targets: Tensors, sources: Tensors) -> None:
        if self._streams:
            with on(self._streams):
                copy_each(targets, sources)
        else:  # a small copy takes as long as the block
            copy_each(targets, sources)

    def _target_of(self, piece: Piece) -> torch.Tensor:
        """Return where to copy a piece: the caller's tensor if possible, on any device."""
        if not self._firsts[piece.value].is_cpu and self._takes_pieces(piece.value):
            self._of_device.setdefault(piece.value, [])
            flat = _flattened(self._firsts[piece.value])
        else:
            flat = self._flat_of(piece.value)
        return flat.view(self.states[piece.value].shape) if piece.whole else flat[piece.start : piece.stop]

    def _is_aliased(self) -> bool:
        """Whether two values go to the same memory: then the last one in list order must win."""
        if self._aliased is None:
            others = [out for each in self._others or () for out in each]
            self._aliased = _share_memory([*self._firsts, *others])
        return self._aliased

    def finish(self) -> None:
        """After the last reply: fill what was not received in place, and tell autograd what was."""
        if self._flat or self._of_device:
            with on(self._streams):
                self._fill_all()

    @no_grad
    def _fill_all(self) -> None:
        for value in sorted(self._flat.keys() | self._of_device.keys()):
            try:
                whole = self._fill(value)
                for other in self._others[value] if self._others else ():
                    other.copy_(whole)
            except (RuntimeError, MemoryError) as exc:
                raise unreadable(exc, self.states[value].key, self._firsts[value]) from exc

    def _fill(self, value: int) -> torch.Tensor:
        """Fill the caller's first tensor for a value, and return the whole value as received."""
        first, flat = self._firsts[value], self._flat.get(value)
        if value in self._direct:
            torch.autograd.graph.increment_version(first)
            return first
        if value in self._of_device:
            for piece in self._of_device[value]:
                assert flat is not None
                first.view(-1)[piece.start : piece.stop].copy_(flat[piece.start : piece.stop])
            return first
        assert flat is not None
        whole = flat.view(self.states[value].shape)
        first.copy_(whole)
        return whole


def _flattened(out: torch.Tensor) -> torch.Tensor:
    """Return a flat view of the memory of a contiguous tensor, hidden from autograd."""
    return (out.detach() if out.requires_grad else out).view(-1)


@final
class PullExchange(Exchange):
    """A pull from one server: chunks arrive in any order and go to their destinations.

    `on_end` is called, by the thread that receives the last frame, with the error or None.
    """

    def __init__(
        self,
        part: ServerPart,
        destinations: Destinations,
        on_end: Callable[[TensorKVError | None], None],
    ) -> None:
        self._chunks = part.chunks
        self._destinations = destinations
        self._on_end = on_end
        self._missing = (1 << len(part.chunks)) - 1  # a bit for each chunk

    _staging: Staging | None = None  # what receives the current chunk
    _copied = False  # whether the current chunk is in place

    def place(self, message: m.Data, payload_bytes: int) -> list[memoryview]:
        chunk = self._chunk(message)
        itemsize = chunk.stored_dtype.itemsize
        if payload_bytes != chunk.num_elems * itemsize:
            raise ProtocolError(f"a chunk of {chunk.num_elems} elements came with {payload_bytes} bytes")
        stagings = chunk.stagings
        self._staging = stagings.pop() if stagings else Staging(chunk, self._destinations.states)
        staged = self._staging.bytes
        if len(staged) == payload_bytes:
            return [staged]
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
            buffers.append(bytes_of(self._destinations.memory_for(piece)))
        if used > run:
            buffers.append(staged[run:used])
        return buffers

    def copy(self, message: m.Data, parts: list[torch.Tensor]) -> None:
        chunk = self._chunk(message)
        spans = [] if message.placed is None else message.placed.spans
        if chunk.sources is None or chunk.sources[0] != spans:
            chunk.sources = (spans, Pieces(_pieces_of(chunk, parts, self._destinations.states)))
        self._destinations.copy_from(chunk, chunk.sources[1])
        self._copied = True

    def take(self, message: Any) -> bool:
        if type(message) is not m.Data:
            if isinstance(message, m.Failed):
                message = from_wire(message.name, message.text)
            if not isinstance(message, TensorKVError):
                raise ProtocolError(f"{message} is no reply to a pull of {len(self._chunks)} chunks")
            self._on_end(message)
            return True
        chunk = self._chunk(message)
        if message.unmerged:
            self._destinations.unmerged = True
        staging, self._staging = self._staging, None
        if self._copied:
            self._copied = False
        elif staging is not None:
            if staging.views:
                self._destinations.spread(chunk, staging)
            chunk.stagings.append(staging)
        elif chunk.num_elems:
            raise ProtocolError(f"a chunk of {chunk.num_elems} elements came without them")
        self._missing ^= 1 << message.chunk
        if self._missing:
            return False
        self._on_end(None)
        return True

    def _chunk(self, message: m.Data) -> PlanChunk:
        if not 0 <= message.chunk < len(self._chunks) or not self._missing >> message.chunk & 1:
            raise ProtocolError(f"{message} is no reply to a pull of {len(self._chunks)} chunks, or twice")
        return self._chunks[message.chunk]


def _pieces_of(chunk: PlanChunk, parts: list[torch.Tensor], states: Sequence[KeyState]) -> list[torch.Tensor]:
    """Return views of the pieces of a chunk in `parts`, each of which holds one or more whole pieces.

    Raises:
        ProtocolError: the parts do not hold the chunk so.
    """
    itemsize, dtype = chunk.stored_dtype.itemsize, chunk.stored_dtype
    pieces: list[torch.Tensor] = []
    empty = torch.empty(0, dtype=torch.uint8, device="cpu")
    rest = iter([part for part in parts if part.numel()])
    part, low = empty, 0
    for piece in chunk.pieces:
        size_bytes = (piece.stop - piece.start) * itemsize
        if size_bytes and low == part.numel():
            part, low = next(rest, empty), 0
        if low + size_bytes > part.numel():
            raise ProtocolError(f"a chunk of {chunk.num_elems} elements came in parts that cut its slices")
        view = part[low : low + size_bytes].view(dtype)
        pieces.append(view.view(states[piece.value].shape) if piece.whole else view)
        low += size_bytes
    if low != part.numel() or next(rest, None) is not None:
        raise ProtocolError(f"more came than a chunk of {chunk.num_elems} elements")
    return pieces


def _share_memory(tensors: Sequence[torch.Tensor], sizes_bytes: np.ndarray[Any, Any] | None = None) -> bool:
    """Whether two tensors may share memory. `sizes_bytes`: their sizes, if all are contiguous."""
    starts = np.fromiter(map(torch.Tensor.data_ptr, tensors), np.int64, len(tensors))
    if sizes_bytes is None:
        sizes_bytes = np.fromiter(map(_extent_bytes, tensors), np.int64, len(tensors))
    starts, sizes_bytes = starts[sizes_bytes > 0], sizes_bytes[sizes_bytes > 0]
    order = starts.argsort()
    stops = starts[order] + sizes_bytes[order]
    return bool((stops[:-1] > starts[order][1:]).any())


def _extent_bytes(tensor: torch.Tensor) -> int:
    """Return the size from the first byte of a tensor to its last, including gaps between its elements."""
    if tensor.is_contiguous():
        return tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.itemsize if tensor.numel() else 0
