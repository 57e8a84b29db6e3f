"""A worker's connection to a server without the connection: what is queued is shown to a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from tensorkv.wire import messages as m
from tensorkv.worker.requests import Exchange, Make, RequestTable, SingleReply


class Port:
    """A ServerPort. `send` gets each message with its payload, as its codec carries it."""

    def __init__(self, send: Callable[[Any, bytes], None]) -> None:
        self.requests = RequestTable()
        self.open, self.drop = self.requests.open, self.requests.drop
        self.send = send

    def ask(self, make: Make, parts: list[memoryview] | None = None) -> tuple[int, SingleReply]:
        exchange = SingleReply()
        number, message = self.requests.request(make, exchange)
        self.put(message, parts)
        return number, exchange

    def put(self, message: Any, parts: list[memoryview] | None = None, on_sent: Any = None) -> None:
        body = msgspec.msgpack.encode(message)
        self.send(msgspec.msgpack.decode(body, type=m.ToServer), b"".join(parts or []))

    def take(self, message: Any, data: bytes = b"") -> None:
        """Take a reply as `ServerLink` does: its payload goes where the exchange says."""
        exchange: Exchange | None = self.requests.find(message.request)
        if exchange is None:
            return
        low = 0
        for buffer in exchange.place(message, len(data)) if data else []:
            buffer[:] = data[low : low + len(buffer)]
            low += len(buffer)
        assert low == len(data)
        self.requests.take(exchange, message.request, message)
