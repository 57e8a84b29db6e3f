"""Sender: sends frames on one connection, in order, without blocking the caller.

Frames go into a queue. The thread that calls `pump` sends as many as the connection takes without blocking;
the sender's own thread sends the rest. So a small frame costs no thread switch, and a peer that does not read
blocks only the sender's thread.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import final

from tensorkv.errors import ProtocolError
from tensorkv.transport.base import TICK_S, Buffer, Connection

Sent = Callable[[], None]
MAX_QUEUED_FRAMES = 1 << 18
"""Maximum number of frames queued for a peer that does not read."""


@final
class Sender:
    """Owns the sending side of a connection, and a thread that lives until `close`.

    `on_error` is called once, from any thread, when the connection fails; after that frames are dropped.
    More than `max_frames` queued frames are a failure, too: the peer asks, and does not read the answers.
    """

    def __init__(
        self,
        connection: Connection,
        name: str,
        on_error: Callable[[BaseException], None],
        max_frames: int = sys.maxsize,
    ) -> None:
        self._connection = connection
        self._on_error = on_error
        self._max_frames = max_frames
        self._frames: deque[tuple[Sequence[Buffer], Sent | None]] = deque()
        self._sending = threading.Lock()  # its holder sends, in the order of the queue
        self._work = threading.Event()
        self._failed = False
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"tensorkv-send-{name}", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether frames are dropped; set before the first one is."""
        return self._failed

    def put(self, buffers: Sequence[Buffer], on_sent: Sent | None = None) -> None:
        """Queue a frame. `on_sent` is called when the caller may change the buffers, also after a failure."""
        self._frames.append((buffers, on_sent))

    def send(self, buffers: Sequence[Buffer], on_sent: Sent | None = None) -> None:
        """Queue a frame and pump. In the common case, an empty queue, the frame bypasses it.

        No other thread may queue frames meanwhile.
        """
        if self._frames or self._failed or not self._sending.acquire(blocking=False):
            self._frames.append((buffers, on_sent))
            self.pump()
            return
        rest: list[Buffer] = []
        try:
            rest = self._connection.send_now(buffers)
            if rest:
                self._frames.append((rest, on_sent))
        except (OSError, EOFError) as exc:
            self._fail(exc)
        finally:
            self._sending.release()
        if rest:
            self._work.set()
        elif on_sent is not None:
            on_sent()

    def pump(self) -> None:
        """Send as much of the queue as possible without blocking."""
        try:
            while self._frames and self._sending.acquire(blocking=False):
                waits = not self._send_all(wait=False)
                self._sending.release()
                if waits:
                    self._work.set()
                    break
        except BaseException as exc:  # out of a signal handler: nobody knows how much was sent
            self._break_off(exc)  # with the lock still held, so that no thread resumes the frame
            raise
        if len(self._frames) > self._max_frames and not self._failed:
            self._failed = True  # `on_error` wakes the thread that sends at the moment, which drops the rest
            self._work.set()
            self._on_error(
                ProtocolError(f"it does not read: more than {self._max_frames} frames wait to be sent")
            )

    def close(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` seconds for the queue to drain, and end the thread."""
        self._closing = True
        self._work.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while not (self._closing and not self._frames):
            self._work.wait()
            self._work.clear()
            while self._frames:
                if self._sending.acquire(timeout=TICK_S):
                    try:
                        self._send_all(wait=True)
                    finally:
                        self._sending.release()
                elif self._failed:  # and the thread that was broken off still holds the lock
                    self._drop()

    def _send_all(self, wait: bool) -> bool:
        """Send queued frames; return False if the connection would block."""
        frames = self._frames
        while frames:
            if self._failed:
                self._drop()
                return True
            buffers, on_sent = frames[0]
            try:
                if wait:
                    self._connection.send_rest(buffers)
                elif rest := self._connection.send_now(buffers):
                    frames[0] = (rest, on_sent)
                    return False
            except (ConnectionError, EOFError) as exc:
                self._fail(exc)
                return True
            frames.popleft()
            if on_sent is not None:
                on_sent()
        return True

    def _break_off(self, exc: BaseException) -> None:
        """Fail, as a thread was broken off in a send; the sender's thread drops the rest."""
        told, self._failed = self._failed, True
        self._work.set()
        self._connection.shutdown()
        if not told:
            self._on_error(exc)

    def _fail(self, exc: Exception) -> None:
        """The connection has failed: drop the queue and call `on_error` once. Called with the lock held."""
        told, self._failed = self._failed, True
        self._drop()
        if not told:
            self._on_error(exc)

    def _drop(self) -> None:
        while self._frames:
            _, on_sent = self._frames.popleft()
            if on_sent is not None:
                on_sent()
