"""What both ends of shared memory have in common: the control segment, and places in the peer's segments."""

from __future__ import annotations

import torch

from tensorkv.errors import ProtocolError
from tensorkv.transport.segments import MAX_SEGMENTS, Segment
from tensorkv.transport.unix import UnixConnection
from tensorkv.wire import messages as m

CONTROL_BYTES = 64 << 10
"""Size of the control segment, number 0: the number of copied replies (8 bytes) and, from `FLAGS_AT` on, a
byte for each loan, 1 when it is returned."""

FLAGS_AT = 64
MAX_LOANS = CONTROL_BYTES - FLAGS_AT


def take_segment(
    connection: UnixConnection, message: m.ShareSegment, known: dict[int, Segment], *, writable: bool
) -> Segment:
    """Map a segment whose descriptor came with `message`.

    Raises:
        MemoryLimitReached: there is no memory to map it.
        ProtocolError: it is not a valid segment, or `known` has its number already or is full.
    """
    return map_segment(message, connection.claim_descriptor(), known, writable=writable)


def map_segment(
    message: m.ShareSegment, descriptor: int, known: dict[int, Segment], *, writable: bool
) -> Segment:
    """Map a segment, and close its descriptor.

    Raises:
        MemoryLimitReached: there is no memory to map it.
        ProtocolError: it is not a valid segment, or `known` has its number already or is full.
    """
    segment = Segment.attach(message.segment, message.size_bytes, descriptor, writable=writable)
    if message.segment in known or len(known) >= MAX_SEGMENTS:
        raise ProtocolError(f"segment {message.segment} is there already, or there are too many")
    return segment


def tensor_at(segments: dict[int, Segment], segment: int, offset: int, size_bytes: int) -> torch.Tensor:
    """Return a uint8 tensor over memory of a peer.

    Raises:
        ProtocolError: there is no such place.
    """
    found = segments.get(segment)
    if found is None or segment == 0:
        raise ProtocolError(f"there is no place at byte {offset} of segment {segment}")
    return torch.from_numpy(found.place(offset, size_bytes))
