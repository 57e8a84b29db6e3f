"""Latch: opens when a number of things have happened. Cheaper than a future where nobody waits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import final


@final
class Latch:
    """Counts down to zero, then is open for good. Safe from any thread."""

    __slots__ = ("_left", "_lock", "_waiters")

    def __init__(self, number: int) -> None:
        self._left = number
        self._lock = threading.Lock()
        self._waiters: list[Callable[[], None]] = []

    @property
    def open(self) -> bool:
        """Whether all has happened."""
        return self._left == 0

    def down(self) -> None:
        """One of the things has happened."""
        with self._lock:
            self._left -= 1
            if self._left:
                return
            waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter()

    def then(self, call: Callable[[], None]) -> None:
        """Have `call` called once the latch opens; at once if it is open."""
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
"""Where there is nothing to wait for."""
