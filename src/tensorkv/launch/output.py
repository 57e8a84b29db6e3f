"""The output of many processes as lines of one terminal or file. Bytes go in, text comes out.

A finished line is written at once, behind a prefix that names its process. A line that its process
rewrites (by a carriage return, as progress bars do) is a *bar* until it is finished:

- on a terminal, bars stand below all finished lines, one line each, and are redrawn in place;
- elsewhere, only its last state is written, and what stood there at most every second.
"""

from __future__ import annotations

import codecs
import os
import re
import select
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, TextIO, final

from tensorkv.launch.supervisor import Node

Stream = Literal["stdout", "stderr"]
STREAMS: tuple[Stream, Stream] = ("stdout", "stderr")

MAX_LINE_CHARS = 1 << 16
"""An unfinished line longer than this is written as if it were finished."""

TAIL_LINES = 10
"""So many lines of a process's stderr are kept, to be shown if it fails."""

BAR_INTERVAL_S = 1.0
"""Time between two states of a bar where there is no terminal."""

# Moving the cursor would garble the lines of others; colours (final byte "m") may stay.
_CURSOR = re.compile(r"\x1b\[[0-?]*[ -/]*[@-ln-~]|\x08")
_ESCAPE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
_COLOURS = ("cyan", "green", "magenta", "yellow", "blue", "bright_cyan", "bright_green", "bright_magenta")


@final
class LineAssembler:
    """Cuts one stream of bytes into lines. Undecodable bytes become U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""

    def feed(self, data: bytes, final: bool = False) -> list[str]:
        """Return the lines that `data` finishes; with `final` the unfinished one too."""
        text = _CURSOR.sub("", self._rest + self._decoder.decode(data, final))
        *lines, rest = text.split("\n")
        if len(rest) > MAX_LINE_CHARS or (final and _visible(rest)):
            lines.append(rest)
            rest = ""
        if "\r" in rest:  # only the last state matters
            rest = "\r" + _last_state(rest) + ("\r" if rest.endswith("\r") else "")
        self._rest = rest
        return [_visible(line) for line in lines]

    @property
    def bar(self) -> str | None:
        """What stands in the unfinished line, if its process has rewritten it; "" if it is blank."""
        return _visible(self._rest) if "\r" in self._rest else None

    @property
    def partial(self) -> str:
        """What stands in the unfinished line, blanks at its end included."""
        return _last_state(self._rest)


def _last_state(line: str) -> str:
    """Return what was written after the last carriage return that something follows."""
    return line.rstrip("\r").rpartition("\r")[2]


def _visible(line: str) -> str:
    return _last_state(line).rstrip(" ") if "\r" in line else line


class Sink(Protocol):
    """Where text goes."""

    @property
    def size(self) -> tuple[int, int] | None:
        """Columns and rows of the terminal, or None where it is not one."""
        ...

    def write(self, text: str) -> None:
        """Write all of `text` now."""
        ...


@final
class FileSink:
    """Writes to the file under `stream`, past all buffers of Python.

    A thread that is stuck in `write` therefore holds no lock that the end of the process needs.
    """

    def __init__(self, stream: TextIO) -> None:
        self._fd = stream.fileno()
        self._encoding = stream.encoding or "utf-8"
        self._terminal = stream.isatty() and not _is_dumb(stream)

    @property
    def size(self) -> tuple[int, int] | None:
        """Columns and rows of the terminal, or None where it is not one."""
        if not self._terminal:
            return None
        columns, rows = os.get_terminal_size(self._fd)
        return columns or 80, rows or 24  # a terminal nobody has sized says 0

    def write(self, text: str) -> None:
        """Write all of `text`; blocks while the reader is slow.

        Raises:
            OSError: the file cannot be written; BrokenPipeError if its reader is gone.
        """
        data = memoryview(text.encode(self._encoding, "replace"))
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:  # whoever gave us the file made it non-blocking
                select.select([], [self._fd], [])


@dataclass(slots=True)
class _Source:
    """One stream of one process."""

    node: Node
    stream: Stream
    lines: LineAssembler = field(default_factory=LineAssembler)
    bar: str = ""
    shown_at: float | None = None


@final
class Output:
    """Puts the streams of all processes together. Not safe for threads.

    Args:
        sinks: where the lines of either stream go. Those that are terminals are taken to be one.
        prefix: whether to name the process before each line.
        eager: show unfinished lines on a terminal too, for a process that asks its user something.
    """

    def __init__(self, sinks: Mapping[Stream, Sink], *, prefix: bool = True, eager: bool = False) -> None:
        self._sinks = sinks
        self._prefix = prefix
        self._eager = eager
        self._sources: dict[tuple[Node, Stream], _Source] = {}
        self._tails: dict[Node, deque[str]] = {}
        self._prefixes: dict[tuple[Node, bool], str] = {}
        self._last: tuple[Node, Stream] | None = None
        self._drawn = 0

    def feed(self, node: Node, stream: Stream, data: bytes, now: float) -> None:
        """Take bytes that `node` wrote, at time `now` in seconds."""
        source = self._sources.setdefault((node, stream), _Source(node, stream))
        self._take(source, source.lines.feed(data), now)

    def close(self, node: Node, stream: Stream, now: float) -> None:
        """Take note that nothing more comes: an unfinished line is finished."""
        source = self._sources.pop((node, stream), None)
        if source is not None:
            self._take(source, source.lines.feed(b"", final=True), now)

    def close_all(self, now: float) -> None:
        """Finish every unfinished line."""
        for node, stream in list(self._sources):
            self.close(node, stream, now)

    def say(self, text: str) -> None:
        """Write a line of the launcher itself."""
        self._write("stderr", f"tensorkv: {text}\n", None)

    def last_words(self, node: Node) -> list[str]:
        """Return the last lines `node` wrote to stderr, or [] if they are the last that was written."""
        return [] if self._last == (node, "stderr") else list(self._tails.get(node, ()))

    def _take(self, source: _Source, lines: list[str], now: float) -> None:
        if source.stream == "stderr":
            self._tails.setdefault(source.node, deque(maxlen=TAIL_LINES)).extend(lines)
        if self._sinks[source.stream].size is None:
            lines = lines + self._due_state(source, now, finished=bool(lines))
        else:
            state = source.lines.partial if self._eager else source.lines.bar or ""
            changed, source.bar = state != source.bar, state
            if changed and not lines:
                self._write(source.stream, "", self._last)
        if lines:
            prefix = self._prefix_of(source)
            text = "".join(f"{prefix}{line}\n" for line in lines)
            self._write(source.stream, text, (source.node, source.stream))

    def _due_state(self, source: _Source, now: float, finished: bool) -> list[str]:
        """Return the state of a bar if it is time to write it to a file."""
        state = source.lines.bar
        if state is None or finished or source.shown_at is None:
            source.shown_at = None if state is None else now
            return []
        if now - source.shown_at < BAR_INTERVAL_S or state in ("", source.bar):
            return []
        source.shown_at, source.bar = now, state
        return [state]

    def _write(self, stream: Stream, text: str, last: tuple[Node, Stream] | None) -> None:
        """Write finished lines, and redraw the bars below them."""
        sink = self._sinks[stream]
        self._last = last
        if sink.size is None:
            sink.write(text)
            return
        erase = "\r" + "\x1b[A" * (self._drawn - 1) + "\x1b[J" if self._drawn else ""
        bars = self._bars(sink.size)
        self._drawn = len(bars)
        sink.write(erase + text + "\n".join(bars))

    def _bars(self, size: tuple[int, int]) -> list[str]:
        columns, rows = size
        sources = sorted((s for s in self._sources.values() if s.bar), key=lambda s: (s.node, s.stream))
        shown = [s for s in sources if self._sinks[s.stream].size is not None][: max(rows - 1, 1)]
        room = columns - 1 - (len(prefix_text(shown[0].node)) if shown and self._prefix else 0)
        return [self._prefix_of(s) + _clip(s.bar, max(room, 1)) for s in shown]

    def _prefix_of(self, source: _Source) -> str:
        if not self._prefix:
            return ""
        key = source.node, self._sinks[source.stream].size is not None
        if key not in self._prefixes:
            text = prefix_text(source.node)
            self._prefixes[key] = _coloured(text, source.node) if key[1] else text
        return self._prefixes[key]


def _is_dumb(stream: TextIO) -> bool:
    """Whether the terminal under `stream` cannot move its cursor."""
    from rich.console import Console

    return Console(file=stream).is_dumb_terminal


def prefix_text(node: Node) -> str:
    """Return what stands before the lines of `node`, without colour."""
    return f"[{node}] "


def _coloured(text: str, node: Node) -> str:
    """Return `text` with the colour of its process; rich respects NO_COLOR and the like."""
    from rich.console import Console
    from rich.text import Text

    console = Console(force_terminal=True)
    style = "dim" if node.role == "server" else _COLOURS[node.rank % len(_COLOURS)]
    with console.capture() as capture:
        console.print(Text(text, style), end="", soft_wrap=True)
    return capture.get()


def _clip(text: str, columns: int) -> str:
    """Return `text` so that it takes no more than `columns`; one that must be cut loses its colours."""
    from rich.cells import cell_len, set_cell_size

    plain = _ESCAPE.sub("", text)
    if cell_len(plain) > columns:
        return set_cell_size(plain, columns)
    return text if plain == text else text + "\x1b[0m"
