"""SeldomLog: rate-limits warnings that strangers can cause, so that they cannot flood the log."""

from __future__ import annotations

import logging
import threading
import time
from typing import final

MAX_LINES = 10
"""Maximum number of lines in one interval; further ones are only counted."""

INTERVAL_S = 60.0


@final
class SeldomLog:
    """Logs the first warnings of each interval, all of one kind, and then how many it has left out.

    Safe from any thread.

    Args:
        logger: where the lines go.
        kind: the subject of the lines, as in "refused connections"; the summary line names it.
    """

    def __init__(self, logger: logging.Logger, kind: str) -> None:
        self._logger = logger
        self._kind = kind
        self._lock = threading.Lock()
        self._began = -INTERVAL_S
        self._num_lines = self._num_left_out = 0

    def warning(self, text: str, *args: object) -> None:
        """Log a line, or only count it."""
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
        """Log how many lines the last interval left out."""
        with self._lock:
            self._tell()

    def _tell(self) -> None:
        if self._num_left_out:
            self._logger.warning("%d more %s were left out here", self._num_left_out, self._kind)
            self._num_left_out = 0
