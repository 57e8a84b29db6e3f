"""The contract of a transport: what a connection and a listener do.

A frame is the bytes `tensorkv.wire.codec` describes. A connection moves whole frames, first in first
out. Frames are sent by one thread at a time and received by one thread at a time; the two may differ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

Buffer = bytes | bytearray | memoryview

Sink = Callable[[memoryview, int], Sequence[memoryview]]
"""Called with an encoded message and the length of its payload; returns where the payload goes.

The buffers must have that many bytes together. It may raise: then the payload is not received, and the
connection is of no further use.
"""

Tick = Callable[[], None]
"""Called several times a second while a call waits; it may raise to end the waiting."""

TICK_S = 0.25
"""How long a call waits before it looks up."""


def no_tick() -> None:
    """Wait on."""


class Connection(ABC):
    """One end of a connection.

    `max_header_bytes` bounds the messages that are received. `peer` names the other end for people.
    """

    max_header_bytes: int
    peer: str

    def send(self, head: bytes, parts: Sequence[Buffer] = (), tick: Tick = no_tick) -> None:
        """Send one frame: `head` (prefix and message) and the payload in `parts`.

        Returns when the buffers may be changed again. If it raises, some of the frame may have been sent
        and the connection is of no further use.

        Raises:
            ConnectionError: the peer or this side has ended the connection.
        """
        self.send_rest([head, *parts], tick)

    @abstractmethod
    def send_now(self, buffers: Sequence[Buffer]) -> list[Buffer]:
        """Send as much of a frame as goes without waiting, and return the rest.

        The rest must be sent next, by `send_now` or `send_rest`. Errors as `send`.
        """

    @abstractmethod
    def send_rest(self, buffers: Sequence[Buffer], tick: Tick = no_tick) -> None:
        """Send all of `buffers`, waiting as long as it takes. Errors as `send`."""

    @abstractmethod
    def receive(self, sink: Sink, tick: Tick = no_tick) -> None:
        """Receive one frame; its message and payload go where `sink` says.

        If `tick` raises before the first byte has come, the connection stays good; `broken` tells.

        Raises:
            EOFError: the peer has ended the connection between two frames.
            ConnectionError: it broke, or this side has ended it.
            ProtocolError, ProtocolVersionError: the bytes are no frame of ours.
        """

    @abstractmethod
    def receive_now(self, sink: Sink) -> bool:
        """Receive as much of a frame as has come, and return whether it is whole.

        False means that more must come first; the next call goes on where this one stopped. `sink` is
        called once per frame. Errors as `receive`.
        """

    @property
    @abstractmethod
    def drained(self) -> bool:
        """Whether, as far as can be told without asking the system, nothing more has come."""

    @abstractmethod
    def fileno(self) -> int:
        """Return a descriptor that polls as readable when something has come, or the end.

        What was received ahead does not show there: call `receive_now` until it returns False first.
        """

    @abstractmethod
    def readable(self) -> bool:
        """Whether `receive` would find something without waiting; also the connection's end."""

    @property
    @abstractmethod
    def ended(self) -> bool:
        """Whether a side has ended the connection. What was sent before may still be to be received."""

    @property
    @abstractmethod
    def broken(self) -> bool:
        """Whether a frame was left in the middle, so that nothing more can be sent or received."""

    @property
    @abstractmethod
    def in_frame(self) -> bool:
        """For a `tick` of `receive`: whether a part of a frame is here, so that raising would break it."""

    @abstractmethod
    def notice_silence(self, timeout_s: float) -> None:
        """Have the connection break when its peer's host has not answered for `timeout_s` seconds.

        The system asks by itself, also when nobody sends. A peer that lives but does not read stays. What is
        sent goes in pieces, so this is for connections that carry little. Does nothing within a process.
        """

    @abstractmethod
    def shutdown(self) -> None:
        """End the connection and wake whoever waits in it. Safe from any thread, more than once."""

    @abstractmethod
    def close(self) -> None:
        """Free what the connection holds. Nobody may be in it any more."""


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
        """Stop listening, and wake who waits in `accept`."""
