"""The contract of a transport: what a connection and a listener do.

`tensorkv.wire.codec` describes the bytes of a frame. A connection moves whole frames, first in first
out. One thread at a time sends and one thread at a time receives; the two may differ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

Buffer = bytes | bytearray | memoryview

Sink = Callable[[memoryview, int], Sequence[memoryview]]
"""Called with an encoded message and the length of its payload; returns the buffers for the payload.

Their sizes must add up to that length. If it raises, the payload is not received and the connection is no
longer usable.
"""

Tick = Callable[[], None]
"""Called several times a second while a call waits; it may raise to end the wait."""

TICK_S = 0.25
"""Interval between the ticks of a call that waits."""


def no_tick() -> None:
    """Keep waiting."""


class Connection(ABC):
    """One end of a connection.

    `max_header_bytes` is the maximum size of a received message. `peer` names the other end in texts.
    """

    max_header_bytes: int
    peer: str

    def send(self, head: bytes, parts: Sequence[Buffer] = (), tick: Tick = no_tick) -> None:
        """Send one frame: `head` (prefix and message) and the payload in `parts`.

        When it returns, the caller may change the buffers again. If it raises, part of the frame may have
        been sent and the connection is no longer usable.

        Raises:
            ConnectionError: the peer or this side has ended the connection.
        """
        self.send_rest([head, *parts], tick)

    @abstractmethod
    def send_now(self, buffers: Sequence[Buffer]) -> list[Buffer]:
        """Send as much of a frame as possible without blocking, and return the rest.

        The rest must be sent next, by `send_now` or `send_rest`. Raises what `send` raises.
        """

    @abstractmethod
    def send_rest(self, buffers: Sequence[Buffer], tick: Tick = no_tick) -> None:
        """Send all of `buffers`, blocking as long as it takes. Raises what `send` raises."""

    @abstractmethod
    def receive(self, sink: Sink, tick: Tick = no_tick) -> None:
        """Receive one frame; pass its message to `sink`, which returns the buffers for the payload.

        If `tick` raises before the first byte has arrived, the connection stays usable; see `broken`.

        Raises:
            EOFError: the peer has ended the connection between two frames.
            ConnectionError: it broke, or this side has ended it.
            ProtocolError, ProtocolVersionError: the bytes are not a frame of ours.
        """

    @abstractmethod
    def receive_now(self, sink: Sink) -> bool:
        """Receive as much of a frame as has arrived, and return whether the frame is complete.

        After False the next call resumes where this one stopped. `sink` is called once per frame. Raises
        what `receive` raises.
        """

    @property
    @abstractmethod
    def drained(self) -> bool:
        """Whether, as far as is known without a system call, nothing is left to receive."""

    @abstractmethod
    def fileno(self) -> int:
        """Return a descriptor that polls as readable when data, or the end of the connection, has arrived.

        It does not show bytes that were read ahead: call `receive_now` until it returns False first.
        """

    @abstractmethod
    def readable(self) -> bool:
        """Whether `receive` would not block: data, or the end of the connection, has arrived."""

    @property
    @abstractmethod
    def ended(self) -> bool:
        """Whether either side has ended the connection. Frames sent before may still have to be received."""

    @property
    @abstractmethod
    def broken(self) -> bool:
        """Whether a transfer stopped in the middle of a frame, so that the connection is unusable."""

    @property
    @abstractmethod
    def in_frame(self) -> bool:
        """For a `tick` of `receive`: whether part of a frame has arrived, so that raising would break it."""

    @abstractmethod
    def notice_silence(self, timeout_s: float) -> None:
        """Break the connection when the peer's host has not answered for `timeout_s` seconds.

        The kernel sends keepalive probes, also when neither side sends. A peer that is alive but does not
        read is not cut off. Frames are sent in pieces from now on, so use this for connections with little
        traffic. Does nothing within a process.
        """

    @abstractmethod
    def shutdown(self) -> None:
        """End the connection and wake the threads that wait in it. Safe from any thread, and idempotent."""

    @abstractmethod
    def close(self) -> None:
        """Free the connection's resources. No thread may be using it any more."""


class Listener(ABC):
    """Accepts connections at an address."""

    @property
    @abstractmethod
    def address(self) -> tuple[str, int]:
        """Host and port to connect to."""

    @abstractmethod
    def accept(self) -> Connection:
        """Wait for the next connection.

        Raises:
            ConnectionError: the listener was closed.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop listening, and wake the thread that waits in `accept`."""
