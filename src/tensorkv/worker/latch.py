"""Latch: opens after a number of events. Cheaper than a future if no thread waits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import final


@final
class Latch:
    """Counts down to zero, then stays open. Safe from any thread."""

    __slots__ = ("_left", "_lock", "_waiters")

    def __init__(self, number: int = 0) -> None:
        self._left = number
        self._lock = threading.Lock()
        self._waiters: list[Callable[[], None]] = []

    @property
    def open(self) -> bool:
        """Whether all events have happened."""
        return self._left == 0

    def up(self) -> None:
        """Wait for one event more; before any has happened."""
        self._left += 1

    def down(self) -> None:
        """Count one event."""
        with self._lock:
            self._left -= 1
            if self._left:
                return
            waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter()

    def then(self, call: Callable[[], None]) -> None:
        """Call `call` once the latch opens; at once if it is open."""
        with self._lock:
            if self._left:
                self._waiters.append(call)
                return
        call()

    def wait(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s` seconds; return whether the latch is open."""
        if self._left == 0:
            return True
        event = threading.Event()
        self.then(event.set)
        return event.wait(timeout_s)


OPEN = Latch(0)
"""An open latch, for when there is nothing to wait for."""
