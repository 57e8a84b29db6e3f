"""Admission: bounds the connections whose other end has not yet proved that it knows the token."""

from __future__ import annotations

import threading
from typing import final

from tensorkv.transport.base import TICK_S, Connection

SPARE_NEWCOMERS = 64
"""Number of connections beyond the processes of a job that may be in their handshake at one time."""


@final
class Admission:
    """At most `limit` connections, each with a thread that greets it. Safe from any thread.

    Strangers can connect and say nothing. Each has a deadline, and if there are too many, the oldest is
    evicted. So a process of the job, which needs only a moment, still gets in.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._here: dict[Connection, None] = {}  # oldest first
        self._changed = threading.Condition()
        self._ended = False

    def add(self, connection: Connection) -> bool:
        """Admit a connection; False after `end`, and then the caller closes it.

        If there are too many, it shuts down the oldest and waits the moment until that one is removed.
        """
        with self._changed:
            while len(self._here) >= self._limit and not self._ended:
                next(iter(self._here)).shutdown()
                self._changed.wait(TICK_S)
            if not self._ended:
                self._here[connection] = None
            return not self._ended

    def remove(self, connection: Connection) -> None:
        """Remove a connection: its handshake is over, whatever the outcome."""
        with self._changed:
            self._here.pop(connection, None)
            self._changed.notify_all()

    def end(self) -> None:
        """Shut down all connections, and admit no more."""
        with self._changed:
            self._ended = True
            for connection in self._here:
                connection.shutdown()
            self._changed.notify_all()
