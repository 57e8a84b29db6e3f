"""Sharing: the server's side of the memory that it shares with one worker of its host.

A push lies in the worker's window; the server adds it up from there, then marks its loan as returned. A
reply names places in the server's own segments; the worker copies the values from there, and counts. Both
marks are in the control segment, which the worker created: a message for each would be too expensive.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import final

import torch

from tensorkv.errors import MemoryLimitReached, ProtocolError
from tensorkv.peer.shm import CONTROL_BYTES, FLAGS_AT, MAX_LOANS, map_segment, tensor_at
from tensorkv.server.memory import Memory
from tensorkv.server.slots import Lease
from tensorkv.transport.segments import Arena, Segment
from tensorkv.transport.unix import DescriptorHead, UnixConnection
from tensorkv.wire import messages as m
from tensorkv.wire.codec import encode

Send = Callable[[bytes], None]

MAX_KNOWN_PLACES = 256
"""Maximum number of places of a worker's pushes that are cached as tensors, plus as many older ones. A step
that pushes up to a gigabyte to one server finds all its places again. Each takes 2 KB."""


@final
class SharedValues:
    """The segments of a server's values, from which workers of its host can copy.

    Only the server's loop uses it, except `share_with`. Owns a descriptor of each segment, until `close`.
    """

    def __init__(self) -> None:
        self._arena = Arena(others_may_write=False, for_long=True, on_segment=self._keep, on_drop=self._drop)
        self._segments: dict[int, tuple[Segment, int]] = {}  # with their descriptors
        self._sharings: list[Sharing] = []

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """Return memory for values, uint8. Raises OSError if there is none."""
        return torch.from_numpy(self._arena.take(size_bytes))

    def drop_unused(self) -> None:
        """Drop the segments that hold no values any more."""
        self._arena.drop_unused()

    def share_with(self, connection: UnixConnection, send: Send) -> Sharing:
        """Share with a worker. `send` sends it a frame of one part. Safe from any thread."""
        sharing = Sharing(connection, send, self)
        self._sharings.append(sharing)
        return sharing

    def settle(self) -> None:
        """End the leases of replies that workers have copied."""
        for sharing in self._sharings:
            sharing.settle()

    def end(self, sharing: Sharing) -> None:
        """Stop sharing with a worker."""
        if sharing in self._sharings:
            self._sharings.remove(sharing)

    def close(self) -> None:
        """Close the descriptors; afterwards no other worker can map the segments."""
        while self._segments:
            os.close(self._segments.popitem()[1][1])

    def spans_of(self, payload: Sequence[Memory]) -> list[tuple[int, int, int]] | None:
        """Return where a payload lies, None if part of it is not in these segments."""
        spans: list[tuple[int, int, int]] = []
        for memory in payload:
            if memory.place is None:
                found = self._arena.where(memory.tensor.data_ptr(), len(memory.bytes))
                memory.place = (*(found or (0, 0)), len(memory.bytes))
            if not memory.place[0]:
                return None
            spans.append(memory.place)
        return spans

    def announcement(self, number: int) -> bytes:
        """Return the frame that hands over a segment."""
        segment, descriptor = self._segments[number]
        return DescriptorHead.of(encode(m.ShareSegment(number, segment.size_bytes)), descriptor)

    def _keep(self, segment: Segment, descriptor: int) -> None:
        self._segments[segment.number] = (segment, descriptor)

    def _drop(self, number: int) -> None:
        os.close(self._segments.pop(number)[1])
        for sharing in self._sharings:
            sharing.forget(number)


@final
class Sharing:
    """The memory shared with one worker. Only the server's loop uses it."""

    def __init__(self, connection: UnixConnection, send: Send, values: SharedValues) -> None:
        self._connection = connection
        self._send = send
        self._values = values
        self._told: set[int] = set()  # segments of values that were announced to the worker
        self._segments: dict[int, Segment] = {}
        self._unmapped: dict[int, tuple[m.ShareSegment, int]] = {}  # for lack of memory, with the descriptor
        self._control: memoryview | None = None
        self._copied: memoryview | None = None
        self._known: dict[tuple[int, int, int, int], Memory] = {}  # recent places of pushes
        self._known_before: dict[tuple[int, int, int, int], Memory] = {}
        self._lent: deque[tuple[list[Lease], list[Memory]]] = deque()  # replies not copied yet
        self._settled = 0  # number of replies found copied so far

    def attach(self, message: m.ShareSegment) -> None:
        """Map a segment that the worker has handed over.

        Raises:
            ProtocolError: it is not a valid segment, or not a new one.
        """
        descriptor = self._connection.claim_descriptor()
        with contextlib.suppress(MemoryLimitReached):  # a push there tries again, and reports it
            self._map(message, descriptor)

    def _map(self, message: m.ShareSegment, descriptor: int) -> None:
        """Map a segment; without memory, keep its descriptor. Raises MemoryLimitReached, ProtocolError."""
        kept = os.dup(descriptor)
        try:
            segment = map_segment(message, descriptor, self._segments, writable=message.segment == 0)
        except MemoryLimitReached:
            self._unmapped[message.segment] = (message, kept)
            raise
        except BaseException:
            os.close(kept)
            raise
        os.close(kept)
        if segment.number == 0:
            if segment.size_bytes != CONTROL_BYTES:
                raise ProtocolError(f"a control segment of {segment.size_bytes} bytes, not {CONTROL_BYTES}")
            self._control = segment.bytes.data
            self._copied = self._control[:8].cast("Q")
        self._segments[segment.number] = segment

    def drop(self, message: m.DropSegment) -> None:
        """Drop a segment that the worker no longer uses."""
        if (unmapped := self._unmapped.pop(message.segment, None)) is not None:
            os.close(unmapped[1])
            return
        if message.segment == 0 or self._segments.pop(message.segment, None) is None:
            raise ProtocolError(f"segment {message.segment} was dropped, which there is not")
        for known in (self._known, self._known_before):
            for name in [name for name in known if name[1] == message.segment]:
                del known[name]

    # ---- pushes ------------------------------------------------------------------------------------

    def borrow(self, placed: m.Placed, size_bytes: int) -> Memory:
        """Return the memory of a push. Giving it back returns the loan.

        Raises:
            ProtocolError: there is no such place, or its size is not `size_bytes`.
            MemoryLimitReached: there is no memory to map it; the loan is returned.
        """
        if len(placed.spans) != 1:
            raise ProtocolError(f"a push in {len(placed.spans)} places")
        segment, offset, length = placed.spans[0]
        if segment in self._unmapped:
            try:
                self._map(*self._unmapped.pop(segment))
            except MemoryLimitReached:
                self._return_of(placed.number)()
                raise
        if length != size_bytes:
            raise ProtocolError(f"a push of {length} bytes, not of {size_bytes}")
        name = (placed.number, segment, offset, length)
        memory = self._known.get(name)
        if memory is None:
            memory = self._known_before.pop(name, None)
            if memory is None:
                give_back = self._return_of(placed.number)
                memory = Memory(tensor_at(self._segments, segment, offset, length), give_back)
            if len(self._known) >= MAX_KNOWN_PLACES:  # places still in use move back from there
                self._known_before, self._known = self._known, {}
            self._known[name] = memory
        return memory

    def _return_of(self, loan: int) -> functools.partial[None]:
        if self._control is None or not 0 <= loan < MAX_LOANS:
            raise ProtocolError(f"loan {loan}: there is no such one")
        return functools.partial(self._control.__setitem__, FLAGS_AT + loan, 1)

    # ---- replies -----------------------------------------------------------------------------------

    def reply(self, data: m.Data, payload: list[Memory], leases: list[Lease]) -> bool:
        """Tell the worker where its requested values lie; return False if they must be sent instead.

        The leases are held until it has copied them.
        """
        if self._copied is None or sum(len(memory.bytes) for memory in payload) < m.PLACED_BYTES:
            return False
        spans = self._values.spans_of(payload)
        if spans is None:
            return False
        for number in {span[0] for span in spans} - self._told:
            self._send(self._values.announcement(number))
            self._told.add(number)
        self._lent.append((leases, payload))
        placed = m.Placed(self._settled + len(self._lent), spans)
        self._send(encode(m.Data(data.request, data.chunk, placed, data.unmerged)))
        return True

    def forget(self, number: int) -> None:
        """Tell the worker that a segment of values is no longer used."""
        if number in self._told:
            self._told.discard(number)
            self._send(encode(m.DropSegment(number)))

    def settle(self) -> None:
        """End the leases of replies that the worker has copied."""
        if not self._lent:
            return
        assert self._copied is not None
        copied = self._copied[0]
        while self._lent and self._settled < copied:
            self._settled += 1
            for lease in self._lent.popleft()[0]:
                lease.readers -= 1

    def end(self) -> None:
        """Stop sharing after the connection is shut down. The worker uses no later copy, see `ServerLink`."""
        self._values.end(self)
        while self._lent:
            for lease in self._lent.popleft()[0]:
                lease.readers -= 1
        while self._unmapped:
            os.close(self._unmapped.popitem()[1][1])
        self._segments.clear()  # pushes stay mapped until they are used up
        self._known.clear()
        self._known_before.clear()
