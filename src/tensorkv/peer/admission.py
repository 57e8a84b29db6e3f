"""Admission: connections whose other end has not yet proved that it knows the token."""

from __future__ import annotations

import threading
from typing import final

from tensorkv.transport.base import TICK_S, Connection

SPARE_NEWCOMERS = 64
"""So many more than the processes of a job may be in their handshake at one time."""


@final
class Admission:
    """At most `limit` connections, each with a thread that greets it. Safe from any thread.

    Strangers can connect and say nothing. Each has a deadline, and where there are too many the one that
    has been here longest goes, so that a process of the job, which needs a moment only, still gets in.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._here: dict[Connection, None] = {}  # in the order in which they came
        self._changed = threading.Condition()
        self._ended = False

    def add(self, connection: Connection) -> bool:
        """Take in a connection; False after `end`, and then it is the caller's to close.

        Waits, if there are too many, until the one that was here first has gone; its connection is shut
        down, so that takes a moment only.
        """
        with self._changed:
            while len(self._here) >= self._limit and not self._ended:
                next(iter(self._here)).shutdown()
                self._changed.wait(TICK_S)
            if not self._ended:
                self._here[connection] = None
            return not self._ended

    def remove(self, connection: Connection) -> None:
        """The handshake with this one is over, whatever came of it."""
        with self._changed:
            self._here.pop(connection, None)
            self._changed.notify_all()

    def end(self) -> None:
        """Shut all of them down, and take in no other."""
        with self._changed:
            self._ended = True
            for connection in self._here:
                connection.shutdown()
            self._changed.notify_all()
