"""Window: the memory that a worker and the servers of its host share, as the worker sees it.

A pushed value is copied once, into the window, and the servers sum it from there. A pulled value is copied
once, out of the servers' own segments. `tensorkv.server.shm` is the other end.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch

from tensorkv.errors import MemoryLimitReached, ProtocolError
from tensorkv.peer.shm import CONTROL_BYTES, FLAGS_AT, MAX_LOANS, take_segment, tensor_at
from tensorkv.transport.segments import Arena, Segment
from tensorkv.transport.unix import DescriptorHead, UnixConnection
from tensorkv.wire import messages as m
from tensorkv.wire.codec import encode

RETURN_S = 0.05
"""Timeout in seconds for a loan to return; a push that waits for room then goes through the connection."""

LOOK_S = 0.0005
logger = logging.getLogger(__name__)
Put = Callable[[bytes, Callable[[], None] | None], None]
"""Queues the head of a frame to a server; calls the function once the head is sent, or will never be."""


@final
@dataclass(slots=True, eq=False)
class Loan:
    """Memory of the window that a server may read until it returns it. `tensors` keep it alive."""

    number: int
    tensors: Sequence[torch.Tensor]
    placed: m.Placed
    size_bytes: int


@final
class Window:
    """The segments of this worker that servers map. Safe from any thread."""

    def __init__(self) -> None:
        self._ends: list[WindowEnd] = []
        self._arena = Arena(
            others_may_write=False, for_long=False, on_segment=self._share, on_drop=self._drop
        )
        self.lends = False  # whether memory was ever handed out

    @property
    def shared(self) -> bool:
        """Whether any server shares the window."""
        return bool(self._ends)

    def hand_out(self, size_bytes: int) -> torch.Tensor:
        """Return memory of the window, uint8 and uninitialised, to be kept for as long as it is used.

        Raises:
            OSError, MemoryLimitReached: the system has none.
        """
        self.lends = True
        return torch.from_numpy(self._arena.take(size_bytes))

    def where(self, address: int, size_bytes: int) -> tuple[int, int] | None:
        """Return segment and offset of memory at this address; None if it is not in the window."""
        return self._arena.where(address, size_bytes)

    def open_to(self, connection: UnixConnection, put: Put) -> WindowEnd:
        """Share the window with one more server. Only before anything has been lent.

        Raises:
            OSError, MemoryLimitReached: the system has no memory or no descriptor for it.
        """
        end = WindowEnd(self._arena, connection, put)
        self._ends.append(end)
        return end

    def _share(self, segment: Segment, descriptor: int) -> None:
        """Hand a new segment over to all servers; the descriptor is closed after the last frame is sent."""
        left = len(self._ends)
        lock = threading.Lock()

        def sent() -> None:
            nonlocal left
            with lock:
                left -= 1
                last = left == 0
            if last:
                os.close(descriptor)

        for end in self._ends:
            end.announce(segment, descriptor, sent)

    def _drop(self, number: int) -> None:
        for end in self._ends:
            end.drop(number)


@final
class WindowEnd:
    """The window as shared with one server, and the server's memory that is mapped here.

    The methods for replies are for the thread that receives on the connection; the others are safe from any.
    """

    def __init__(self, arena: Arena, connection: UnixConnection, put: Put) -> None:
        self._arena = arena
        self._connection = connection
        self._put = put
        self._lock = threading.Lock()  # guards _out, _free and _next
        self._out: dict[int, Loan] = {}  # not returned when we last looked
        self._free: list[int] = []
        self._next = 0
        self.lent_bytes = 0  # in _out
        self._told = False  # whether a lack of memory was logged
        self._segments: dict[int, Segment] = {}  # of the server
        self._num_replies = 0
        control, descriptor = Segment.create(0, CONTROL_BYTES, others_may_write=True)
        self._control = control.bytes.data
        self._copied = self._control[:8].cast("Q")
        self.announce(control, descriptor, lambda: os.close(descriptor))

    def announce(self, segment: Segment, descriptor: int, on_sent: Callable[[], None]) -> None:
        """Queue the hand-over of a segment of ours."""
        head = encode(m.ShareSegment(segment.number, segment.size_bytes))
        self._put(DescriptorHead.of(head, descriptor), on_sent)

    def drop(self, number: int) -> None:
        """Queue the notice that a segment of ours is no longer used."""
        self._put(encode(m.DropSegment(number)), None)

    # ---- pushes ------------------------------------------------------------------------------------

    def lend(self, size_bytes: int, max_lent_bytes: int | None = None) -> Loan | None:
        """Return memory for a push; None if there is none: the push then travels through the connection.

        With `max_lent_bytes`, it waits while more than that would be lent, and the server returns some of
        it now and then.
        """
        if max_lent_bytes is not None and not self._await_room(max_lent_bytes - size_bytes):
            return None
        self.collect()  # so that returned memory is lent again before new memory
        try:
            array = self._arena.take(size_bytes)
        except (OSError, MemoryLimitReached) as exc:
            if not self._told:
                self._told = True
                logger.warning("no shared memory for a push of %d bytes: %s", size_bytes, str(exc))
            return None
        found = self._arena.where(array.ctypes.data, size_bytes)
        assert found is not None
        return self.lend_at((*found, size_bytes), [torch.from_numpy(array)])

    def lend_at(
        self, span: tuple[int, int, int], tensors: Sequence[torch.Tensor], max_lent_bytes: int | None = None
    ) -> Loan | None:
        """Lend memory that is already in the window, like `lend`; keep `tensors` until it is returned."""
        if max_lent_bytes is not None and not self._await_room(max_lent_bytes - span[2]):
            return None
        with self._lock:
            self._collect()
            number = self._free.pop() if self._free else self._next
            if number >= MAX_LOANS:
                return None
            if number == self._next:
                self._next += 1
            self._control[FLAGS_AT + number] = 0
            loan = Loan(number, tensors, m.Placed(number, [span]), span[2])
            self._out[number] = loan
            self.lent_bytes += span[2]
            return loan

    def _await_room(self, lent_bytes: int) -> bool:
        """Wait until no more than `lent_bytes` are lent; False if nothing is returned for `RETURN_S`.

        It polls, since a message for each return would cost both sides more.
        """
        self.collect()
        last_bytes, until = self.lent_bytes, time.monotonic() + RETURN_S
        while self.lent_bytes > lent_bytes and time.monotonic() < until:
            time.sleep(LOOK_S)
            self.collect()
            if self.lent_bytes < last_bytes:
                last_bytes, until = self.lent_bytes, time.monotonic() + RETURN_S
        return self.lent_bytes <= lent_bytes

    def give_back(self, loan: Loan) -> None:
        """Return a loan that is not pushed after all."""
        self._control[FLAGS_AT + loan.number] = 1

    def collect(self) -> None:
        """Collect the loans that the server has returned."""
        with self._lock:
            self._collect()

    def _collect(self) -> None:
        control = self._control
        for number in [number for number in self._out if control[FLAGS_AT + number]]:
            self.lent_bytes -= self._out.pop(number).size_bytes
            self._free.append(number)

    # ---- replies -----------------------------------------------------------------------------------

    def attach(self, message: m.ShareSegment) -> None:
        """Map a segment that the server has handed over. Raises ProtocolError if it is not one."""
        if message.segment == 0:
            raise ProtocolError("a server has no control segment")
        self._segments[message.segment] = take_segment(
            self._connection, message, self._segments, writable=False
        )

    def detach(self, message: m.DropSegment) -> None:
        """Forget a segment that the server no longer uses."""
        if self._segments.pop(message.segment, None) is None:
            raise ProtocolError(f"segment {message.segment} was dropped, which there is not")

    def view(self, placed: m.Placed) -> list[torch.Tensor]:
        """Return the memory of a reply, as uint8. It stays unchanged until `copied`.

        Raises:
            ProtocolError: there is no such memory, or it is not the next reply.
        """
        if placed.number != self._num_replies + 1:
            raise ProtocolError(f"reply {placed.number} in shared memory, after {self._num_replies}")
        self._num_replies += 1
        return [tensor_at(self._segments, *span) for span in placed.spans]

    def copied(self) -> None:
        """Tell the server that the last reply was copied, or is unwanted."""
        self._copied[0] = self._num_replies
