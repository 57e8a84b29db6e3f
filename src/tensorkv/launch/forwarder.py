"""The thread that forwards the output of the processes to the user."""

from __future__ import annotations

import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import IO, final

from tensorkv.launch.output import Output, Stream
from tensorkv.launch.supervisor import Node

_READ_BYTES = 1 << 16

_LAST_READS = 32
"""Maximum number of reads of each pipe after its process has ended; together more than a pipe holds."""


@final
class Forwarder:
    """Reads the pipes of all processes and feeds an `Output`, in its own thread.

    So a terminal that does not read (a pager, for example) blocks neither Ctrl-C nor the supervision.

    Args:
        output: belongs to the thread from `start` until `done`.
        notify: called by the thread when it ends, whatever the reason, but never after `close`. Must not
            block.
    """

    def __init__(self, output: Output, notify: Callable[[], None]) -> None:
        self._output = output
        self._notify = notify
        self._selector = selectors.DefaultSelector()
        self._pipes: dict[int, IO[bytes]] = {}
        self._said: deque[str] = deque()
        self._wake_read, self._wake_write = os.pipe()
        self._finishing = threading.Event()
        self._done = threading.Event()
        self._ending = threading.Lock()  # held to notify: `notify` may use things that are gone after `close`
        self._thread = threading.Thread(target=self._run, name="tensorkv-output", daemon=True)
        self.error: OSError | None = None

    @property
    def done(self) -> bool:
        """Whether the thread has ended: all output is written, or `error` says why not."""
        return self._done.is_set()

    def add(self, node: Node, stream: Stream, pipe: IO[bytes]) -> None:
        """Read `pipe`; the forwarder closes it. Before `start` only."""
        os.set_blocking(pipe.fileno(), False)
        self._pipes[pipe.fileno()] = pipe
        self._selector.register(pipe.fileno(), selectors.EVENT_READ, (node, stream))

    def start(self) -> None:
        """Start the thread."""
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._thread.start()

    def say(self, text: str) -> None:
        """Have the thread write a line of the launcher's own. Never blocks."""
        self._said.append(text)
        os.write(self._wake_write, b"\0")

    def finish(self) -> None:
        """Have the thread drain the pipes and end. Does not wait for it.

        The thread does not wait for end of file: a process that escaped from its group may keep a pipe open
        for ever.
        """
        self._finishing.set()
        os.write(self._wake_write, b"\0")

    def close(self) -> None:
        """Free the forwarder's resources, unless its thread is stuck in a write and still needs them."""
        with self._ending:
            self._notify = lambda: None
            if self._thread.ident is not None and not self.done:
                return
        for pipe in self._pipes.values():
            pipe.close()
        self._selector.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _run(self) -> None:
        try:
            while not self._finishing.is_set():
                self._read_ready(timeout_s=None)
            for _ in range(_LAST_READS):
                if not self._read_ready(timeout_s=0):
                    break
            self._output.close_all(time.monotonic())
        except OSError as exc:
            self.error = exc
        finally:
            with self._ending:
                self._done.set()
                self._notify()

    def _read_ready(self, timeout_s: float | None) -> bool:
        """Forward what the pipes hold; return whether there was anything."""
        found = False
        for key, _ in self._selector.select(timeout_s):
            if key.data is None:
                os.read(self._wake_read, _READ_BYTES)
                while self._said:
                    self._output.say(self._said.popleft())
                continue
            found = True
            node, stream = key.data
            data = os.read(key.fd, _READ_BYTES)
            if data:
                self._output.feed(node, stream, data, time.monotonic())
            else:
                self._selector.unregister(key.fd)
                self._pipes.pop(key.fd).close()
                self._output.close(node, stream, time.monotonic())
        return found
