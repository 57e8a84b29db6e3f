"""RequestTable: the requests in flight on one connection, each with the object that takes its replies.

The connections to the servers and to the scheduler have one each. A table numbers its requests from one
counter and reuses no number. So a reply to a number that was never handed out is a mistake of the peer, and a
reply to one that is not in flight any more belongs to a caller that has given up.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol, final

import torch

from tensorkv.errors import ProtocolError, TensorKVError, again, from_wire, to_wire
from tensorkv.wire import messages as m

Make = Callable[[int], m.Message]
"""Builds a request from its number."""


class Exchange(ABC):
    """A request until it is answered. The thread that receives calls its methods."""

    def place(self, message: m.Data, payload_bytes: int) -> list[memoryview]:
        """Return where the payload of `message` goes."""
        raise ProtocolError("a payload where none belongs")

    def copy(self, message: m.Data, parts: list[torch.Tensor]) -> None:
        """Copy a payload from `parts` (uint8, memory of another process) to its destination."""
        size_bytes = sum(part.nbytes for part in parts)
        buffers = self.place(message, size_bytes)
        payload = torch.cat(parts) if len(parts) > 1 else parts[0]
        low = 0
        for buffer in buffers:
            torch.frombuffer(buffer, dtype=torch.uint8).copy_(payload[low : low + len(buffer)])
            low += len(buffer)

    @abstractmethod
    def take(self, message: Any) -> bool:
        """Handle a reply whose payload is in place, and return whether it was the last.

        `message` may also be a TensorKVError instead of a reply; then it is the last.
        """


class SingleReply(Exchange):
    """A request that has one reply without payload, of class `kind`."""

    def __init__(self, kind: type[m.Message] = m.Done) -> None:
        self.kind = kind
        self.message: Any = None

    def take(self, message: Any) -> bool:
        if not isinstance(message, (self.kind, m.Failed, TensorKVError)):
            raise ProtocolError(f"{type(message).__name__} where {self.kind.__name__} belongs")
        self.message = message
        return True

    def check(self) -> None:
        """Raise if the request was refused, or its connection has ended."""
        if isinstance(self.message, TensorKVError):
            raise again(self.message) from None
        if isinstance(self.message, m.Failed):
            raise from_wire(self.message.name, self.message.text)


class ServerPort(Protocol):
    """What the pure part of a worker needs of the connection to a server. Nothing here waits."""

    def open(self, exchange: Exchange) -> int:
        """Return a new request number; `exchange` gets the replies to it."""

    def ask(self, make: Make, parts: list[memoryview] | None = None) -> tuple[int, SingleReply]:
        """Queue a request that has a single reply; return its number and exchange."""

    def put(
        self,
        message: m.Message,
        parts: list[memoryview] | None = None,
        on_sent: Callable[[], None] | None = None,
    ) -> None:
        """Queue a message with its payload."""

    def drop(self, number: int) -> None:
        """Give up an exchange."""


Asked = list[tuple[int, int, SingleReply]]
"""Requests to servers with a single reply each: the server's rank, the request's number, the exchange."""


def replies_of(asked: Asked) -> list[Any]:
    """Return the replies to requests that have ended, or raise the first refusal."""
    for _, _, exchange in asked:
        exchange.check()
    return [exchange.message for _, _, exchange in asked]


def ask_each(servers: Sequence[ServerPort], make: Make) -> Asked:
    """Queue a request with a single reply to every server."""
    return [(rank, *server.ask(make)) for rank, server in enumerate(servers)]


@final
class RequestTable:
    """The requests in flight on one connection. One thread at a time hands replies on."""

    def __init__(self) -> None:
        self.exchanges: dict[int, Exchange] = {}
        self._numbers = itertools.count(1)

    def number(self) -> int:
        """Return a new number, of a message whose answer is not awaited as a reply."""
        return next(self._numbers)

    def open(self, exchange: Exchange) -> int:
        """Return a new request number; `exchange` gets the replies to it."""
        number = next(self._numbers)
        self.exchanges[number] = exchange
        return number

    def request(self, make: Make, exchange: SingleReply) -> tuple[int, m.Message]:
        """Open a request that has a single reply, `exchange`; return its number and message."""
        number = self.open(exchange)
        message = make(number)
        exchange.kind = m.REPLIES[type(message)]
        return number, message

    def drop(self, number: int) -> None:
        """Give up an exchange: its later replies are received and discarded."""
        self.exchanges.pop(number, None)

    def find(self, number: int) -> Exchange | None:
        """Return the exchange that takes a reply; None if its caller has given up.

        Raises:
            ProtocolError: no request with this number was ever made.
        """
        exchange = self.exchanges.get(number)
        if exchange is None and not 0 < number < next(self._numbers):
            raise ProtocolError(f"a reply to request {number}, which was never made")
        return exchange

    def take(self, exchange: Exchange, number: int, message: Any) -> bool:
        """Pass a reply to its exchange, and return whether that has ended.

        A failure there is that exchange's error, not the receiver's, unless the reply breaks the protocol.
        """
        try:
            ended = exchange.take(message)
        except ProtocolError:
            raise
        except Exception as exc:  # noqa: BLE001  # e.g. unwritable memory
            ended = exchange.take(error_of(exc))
        if ended:
            self.exchanges.pop(number, None)
        return ended

    def end_all(self, error: TensorKVError) -> None:
        """End every exchange with this error, as nothing more will arrive."""
        for number in list(self.exchanges):
            exchange = self.exchanges.pop(number, None)
            if exchange is not None:
                exchange.take(error)


def error_of(exc: Exception) -> TensorKVError:
    """Return the error of an exchange that could not take its reply."""
    error = from_wire(*to_wire(exc))
    error.__cause__ = exc
    return error
