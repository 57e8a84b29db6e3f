"""SeldomLog: warnings that strangers can cause, a few at a time. Whoever connects must not fill the log."""

from __future__ import annotations

import logging
import threading
import time
from typing import final

MAX_LINES = 10
"""Maximum lines in one interval; what is more is counted."""

INTERVAL_S = 60.0


@final
class SeldomLog:
    """Writes warnings of one kind, the first ones of each interval, and tells how many it has left out.

    Safe from any thread.

    Args:
        logger: where to.
        kind: what the lines are about, for the line that counts: "refused connections".
    """

    def __init__(self, logger: logging.Logger, kind: str) -> None:
        self._logger = logger
        self._kind = kind
        self._lock = threading.Lock()
        self._began = -INTERVAL_S
        self._num_lines = self._num_left_out = 0

    def warning(self, text: str, *args: object) -> None:
        """Write a line, or count it."""
        with self._lock:
            if time.monotonic() - self._began >= INTERVAL_S:
                self._tell()
                self._began, self._num_lines = time.monotonic(), 0
            self._num_lines += 1
            if self._num_lines > MAX_LINES:
                self._num_left_out += 1
                return
            more = f"; more {self._kind} are only counted for a while" if self._num_lines == MAX_LINES else ""
            self._logger.warning(f"{text}%s", *args, more)

    def end(self) -> None:
        """Tell what was left out last."""
        with self._lock:
            self._tell()

    def _tell(self) -> None:
        if self._num_left_out:
            self._logger.warning("%d more %s were left out here", self._num_left_out, self._kind)
            self._num_left_out = 0
