"""Attacks through shared memory: descriptors that a worker on the same host passes, and its writes.

It passes descriptors of wrong kinds, sizes and seals, or too many; invalid places; false counters.
"""

from __future__ import annotations

import fcntl
import os
import random
from collections.abc import Callable
from contextlib import suppress
from typing import final

from frames import Conversation, Entry, message_of

from tensorkv.errors import ProtocolError, ProtocolVersionError
from tensorkv.peer.shm import CONTROL_BYTES
from tensorkv.transport.unix import DescriptorHead, UnixConnection
from tensorkv.wire import messages as m
from tensorkv.wire.codec import PREFIX, Decoder, encode

NUM_ELEMS = 1 << 15
PUSH_BYTES = 4 * NUM_ELEMS
SEGMENT_BYTES = 2 * PUSH_BYTES
SEALED = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

_decoder: Decoder[m.ToServer] = Decoder(m.ToServer)


def shared_conversations(store_name: str) -> list[Conversation]:
    """Return the conversations of honest workers that share memory with their server.

    The first one creates the only slice. Each frame has its payload behind it.

    """
    chunk = m.ChunkEntry([5], [NUM_ELEMS], m.PayloadDescriptor("dense", "float32"), [1])
    init = m.InitSlices(1, 1, "v", (NUM_ELEMS,), "float32", [m.SliceEntry(5, 0, 0, NUM_ELEMS)])
    begin = [
        encode(m.OpenStore(1, store_name, m.StorePolicy("async"), False)),
        encode(m.ShareSegment(0, CONTROL_BYTES)),
        encode(m.ShareSegment(1, SEGMENT_BYTES)),
    ]
    rest = [
        encode(m.DefinePlan(1, 1, [chunk])),
        encode(m.Push(1, 0, True, 0, m.Placed(0, [(1, 0, PUSH_BYTES)]))),
        encode(m.Push(1, 0, True, 2, m.Placed(1, [(1, PUSH_BYTES, PUSH_BYTES)]))),
        encode(m.Pull(1, 3)),
        encode(m.DropSegment(1)),
    ]
    first = [*begin, encode(init, PUSH_BYTES) + bytes(PUSH_BYTES), *rest]
    return [[Entry("worker", 1, frame) for frame in frames] for frames in (first, [*begin, *rest])]


@final
class Descriptors:
    """Descriptors to pass, honest and others; owns those it has created until `close`."""

    def __init__(self, chance: random.Random) -> None:
        self._random = chance
        self._made: list[int] = []
        self._kinds: list[Callable[[], int]] = [
            lambda: self.memory(CONTROL_BYTES),
            lambda: self.memory(SEGMENT_BYTES),
            lambda: self.memory(SEGMENT_BYTES, seals=0),
            lambda: self.memory(SEGMENT_BYTES, seals=fcntl.F_SEAL_GROW),
            lambda: self.memory(SEGMENT_BYTES, seals=SEALED | fcntl.F_SEAL_WRITE),
            lambda: self.memory(0),
            lambda: self.memory(1),
            lambda: os.open("/dev/null", os.O_RDWR),
            lambda: os.open("/dev/zero", os.O_RDONLY),
            lambda: os.eventfd(0),
        ]

    def memory(self, size_bytes: int, seals: int = SEALED) -> int:
        """Return memory of this size with these seals."""
        descriptor = os.memfd_create("tensorkv-hostile", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, size_bytes)
        if seals:
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        return descriptor

    def any(self) -> int:
        """Return a descriptor of any kind."""
        return self._keep(self._random.choice(self._kinds)())

    def honest(self, message: m.ShareSegment) -> int:
        """Return the memory that a message announces, unless that is too much; with any content."""
        descriptor = self._keep(self.memory(max(0, min(message.size_bytes, SEGMENT_BYTES))))
        with suppress(OSError):
            os.pwrite(descriptor, self._random.randbytes(64), 0)
        return descriptor

    def _keep(self, descriptor: int) -> int:
        self._made.append(descriptor)
        return descriptor

    def close(self) -> None:
        """Close all."""
        while self._made:
            os.close(self._made.pop())


def with_descriptor(frame: bytes, descriptors: Descriptors, chance: random.Random) -> bytes:
    """Return a frame as a hostile worker sends it, with the descriptor it announces, another, or none."""
    message = _announcement(frame)
    if message is not None and chance.random() < 0.7:
        return DescriptorHead.of(frame, descriptors.honest(message))
    if chance.random() < 0.2:
        return DescriptorHead.of(frame, descriptors.any())
    return frame


def _announcement(frame: bytes) -> m.ShareSegment | None:
    if len(frame) < PREFIX.size:
        return None
    try:
        message = _decoder.decode(message_of(frame))
    except (ProtocolError, ProtocolVersionError):
        return None
    return message if isinstance(message, m.ShareSegment) else None


def is_shared(connection: object) -> bool:
    """Whether the connection can pass descriptors."""
    return isinstance(connection, UnixConnection)
