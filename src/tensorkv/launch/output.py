"""Merges the output of many processes into the lines of one terminal or file. Bytes go in, text comes out.

A finished line is written at once, behind a prefix that names its process. A line that its process redraws,
by a carriage return as progress bars do, is written in its last state, once it is finished; until then

- a terminal shows the bar that changed last, in one line below all others;
- elsewhere its current state is written at most once a second.

A bar that clears itself leaves no line. Moves of the cursor are removed. Of bars one above the other, which
are redrawn by turns, the one that changed last is shown.
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
"""Maximum length of an unfinished line; a longer one is written as if it were finished."""

TAIL_LINES = 10
"""Number of lines of a process's stderr that are shown if it fails, unless a traceback ends there."""

MAX_TRACEBACK_LINES = 400
"""Maximum number of lines kept of a process's stderr, for a traceback at its end."""

BAR_INTERVAL_S = 1.0
"""Minimum interval between two states of a bar where there is no terminal."""

# Moving the cursor would garble the lines of others; colours (final byte "m") may stay.
_CURSOR = re.compile(r"\x1b\[[0-?]*[ -/]*[@-ln-~]|\x08")
_UP = re.compile(r"\x1b\[\d*[AF]")
_CLEAR = re.compile(r"\x1b\[[02]?K")
_PARTS = re.compile(r"([\n\r]|\x1b\[\d*[AF]|\x1b\[[02]?K)")
_INCOMPLETE = re.compile(r"\x1b(\[[0-?]*[ -/]*)?\Z")
_MAX_ROWS = 50
_ESCAPE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
_COLOURS = ("cyan", "green", "magenta", "yellow", "blue", "bright_cyan", "bright_green", "bright_magenta")


@final
class LineAssembler:
    """Cuts one stream of bytes into lines. Undecodable bytes become U+FFFD.

    A carriage return begins a new state of the line, if text follows it. Bars one above the other go up by
    as many rows as they come down by newlines, which finish no line: each line that such a newline ends is a
    bar, unless blanks have cleared the row before it was written, as tqdm does for text between bars.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._cut = ""  # the beginning of an escape sequence
        self._line = ""  # the state of the line that is not finished yet
        self._returned = False  # whether a carriage return came after that
        self._redrawn = False  # whether the line has had an earlier state
        self._was_blank = False  # whether that was of blanks
        self._rows_up = 0  # number of rows that the cursor is above the last one
        self._bar = ""  # the last bar that a newline has ended

    def feed(self, data: bytes, final: bool = False) -> list[str]:
        """Return the lines that `data` finishes; with `final` the unfinished one too."""
        text = self._cut + self._decoder.decode(data, final)
        cut = None if final else _INCOMPLETE.search(text)
        end = cut.start() if cut else len(text)
        self._cut = text[end:]
        lines: list[str] = []
        for part in _PARTS.split(text[:end]):
            if part == "\n":
                self._finish_line(lines)
            elif part == "\r":
                self._returned = True
            elif _UP.fullmatch(part):
                self._rows_up = min(self._rows_up + int(part[2:-1] or 1), _MAX_ROWS)
                self._returned = True
            elif _CLEAR.fullmatch(part):
                self._clear(part)
            else:
                self._write(_CURSOR.sub("", part))
        if len(self._line) > MAX_LINE_CHARS:
            self._finish_line(lines)
        if final:
            lines += [line for line in (self._bar, self._visible) if _has_text(line)]
            self._bar = self._line = ""
        return lines

    @property
    def bar(self) -> str:
        """The state of what its process redraws; empty if it redraws nothing or has cleared it."""
        is_bar = (self._redrawn or self._returned) and _has_text(self._line)
        return self._visible if is_bar else self._bar

    @property
    def partial(self) -> str:
        """The unfinished line, including trailing blanks."""
        return self._line

    @property
    def _visible(self) -> str:
        return self._line.rstrip(" ") if self._redrawn else self._line

    def _write(self, text: str) -> None:
        if not text:
            return
        if self._returned:
            self._was_blank = bool(self._line) and not _has_text(self._line)
            self._line, self._redrawn, self._returned = "", True, False
        self._line += text

    def _clear(self, part: str) -> None:
        """Take an escape sequence that erases the line, or the rest of it."""
        if self._returned or part == "\x1b[2K":
            self._line, self._redrawn, self._was_blank = "", True, False

    def _finish_line(self, lines: list[str]) -> None:
        line, redrawn, was_blank = self._visible, self._redrawn, self._was_blank
        self._line, self._returned, self._redrawn, self._was_blank = "", False, False, False
        if self._rows_up:
            self._rows_up -= 1
            if not was_blank:
                self._bar = line if _has_text(line) else self._bar
                return
        elif not redrawn:
            if self._bar:
                lines.append(self._bar)
            self._bar = ""
        if not redrawn or _has_text(line):
            lines.append(line)


def _has_text(line: str) -> bool:
    return bool(_ESCAPE.sub("", line).strip())


class Sink(Protocol):
    """A destination of text."""

    @property
    def size(self) -> tuple[int, int] | None:
        """Columns and rows of the terminal, or None where it is not one."""
        ...

    def write(self, text: str) -> None:
        """Write all of `text` now."""
        ...


@final
class FileSink:
    """Writes to the file under `stream`, bypassing Python's buffers.

    So a thread that is stuck in `write` holds no lock that the process needs to exit.
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
        return columns or 80, rows or 24  # a terminal without a size reports 0

    def write(self, text: str) -> None:
        """Write all of `text`; blocks while the reader is slow.

        Raises:
            OSError: the file cannot be written; BrokenPipeError if its reader is gone.
        """
        data = memoryview(text.encode(self._encoding, "replace"))
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:  # we inherited the file as non-blocking
                select.select([], [self._fd], [])


@dataclass(slots=True)
class _Source:
    """One stream of one process."""

    node: Node
    stream: Stream
    lines: LineAssembler = field(default_factory=LineAssembler)
    bar: str = ""  # as it was shown last
    shown_at: float | None = None


@final
class Output:
    """Merges the streams of all processes. Not thread-safe.

    Args:
        sinks: where the lines of each stream go. If both are terminals, they count as the same one.
        prefix: whether to name the process before each line.
        eager: on a terminal, show unfinished lines too, for a process that prompts its user.
    """

    def __init__(self, sinks: Mapping[Stream, Sink], *, prefix: bool = True, eager: bool = False) -> None:
        self._sinks = sinks
        self._prefix = prefix
        self._eager = eager
        self._sources: dict[tuple[Node, Stream], _Source] = {}
        self._tails: dict[Node, deque[str]] = {}
        self._prefixes: dict[tuple[Node, bool], str] = {}
        self._last: tuple[Node, Stream] | None = None
        self._lines_in_a_row = 0  # from `_last`
        self._bottom: _Source | None = None  # whose bar stands below all lines of the terminal
        self._drawn = False  # whether a bar stands there

    def feed(self, node: Node, stream: Stream, data: bytes, now: float) -> None:
        """Take bytes that `node` wrote, at time `now` in seconds."""
        source = self._sources.setdefault((node, stream), _Source(node, stream))
        self._take(source, source.lines.feed(data), now)

    def close(self, node: Node, stream: Stream, now: float) -> None:
        """Note the end of a stream: finish its unfinished line."""
        source = self._sources.pop((node, stream), None)
        if source is not None:
            self._take(source, source.lines.feed(b"", final=True), now)

    def close_all(self, now: float) -> None:
        """Finish every unfinished line."""
        for node, stream in list(self._sources):
            self.close(node, stream, now)

    def say(self, text: str) -> None:
        """Write a line of the launcher's own."""
        self._write("stderr", f"tensorkv: {text}\n", None)

    def last_words(self, node: Node) -> list[str]:
        """Return the last lines `node` wrote to stderr, or [] if they are the last lines of all output.

        A traceback at the end is returned whole, with those that led to it.
        """
        words = last_lines(list(self._tails.get(node, ())))
        return [] if self._last == (node, "stderr") and self._lines_in_a_row >= len(words) else words

    def _take(self, source: _Source, lines: list[str], now: float) -> None:
        if source.stream == "stderr":
            self._tails.setdefault(source.node, deque(maxlen=MAX_TRACEBACK_LINES)).extend(lines)
        if self._sinks[source.stream].size is None:
            lines = lines + self._due_state(source, now, finished=bool(lines))
        else:
            self._note_bar(source)
        if lines:
            prefix = self._prefix_of(source)
            text = "".join(f"{prefix}{line}\n" for line in lines)
            self._write(source.stream, text, (source.node, source.stream))

    def _note_bar(self, source: _Source) -> None:
        """Show a bar that has changed in the bottom line of the terminal; clear the line if it is gone."""
        bar = source.lines.bar or (source.lines.partial if self._eager else "")
        if bar == source.bar:
            return
        source.bar = bar
        if bar or self._bottom is source:
            self._bottom = source if bar else None
            self._write(source.stream, "", self._last)

    def _due_state(self, source: _Source, now: float, finished: bool) -> list[str]:
        """Return the state of a bar if it is due to be written to a file."""
        bar = source.lines.bar
        if not bar or finished or source.shown_at is None:
            source.shown_at = now if bar else None
            return []
        if now - source.shown_at < BAR_INTERVAL_S or bar == source.bar:
            return []
        source.shown_at, source.bar = now, bar
        return [bar]

    def _write(self, stream: Stream, text: str, last: tuple[Node, Stream] | None) -> None:
        """Write finished lines, and below them the bar that changed last."""
        sink = self._sinks[stream]
        if last != self._last:
            self._last, self._lines_in_a_row = last, 0
        self._lines_in_a_row += text.count("\n")
        if sink.size is None:
            sink.write(text)
        else:
            erase, below = "\r\x1b[K" if self._drawn else "", self._bottom_line(sink.size[0])
            self._drawn = bool(below)
            sink.write(erase + text + below)

    def _bottom_line(self, columns: int) -> str:
        source = self._bottom
        if source is None:
            return ""
        taken = len(prefix_text(source.node)) if self._prefix else 0
        return self._prefix_of(source) + _clip(source.bar, max(columns - 1 - taken, 1))

    def _prefix_of(self, source: _Source) -> str:
        if not self._prefix:
            return ""
        key = source.node, self._sinks[source.stream].size is not None
        if key not in self._prefixes:
            text = prefix_text(source.node)
            self._prefixes[key] = _coloured(text, source.node) if key[1] else text
        return self._prefixes[key]


_TRACEBACK = "Traceback (most recent call last):"
_GOES_ON = re.compile(
    r"During handling of the above exception|The above exception was the direct cause|[\w.]*UpdaterError: "
)


def last_lines(lines: list[str]) -> list[str]:
    """Return the last `TAIL_LINES` lines, or a traceback near the end with those that led to it."""
    starts = [place for place, line in enumerate(lines) if line.startswith(_TRACEBACK)]
    if not starts:
        return lines[-TAIL_LINES:]
    start = starts.pop()
    if sum(not line.startswith(" ") for line in lines[start + 1 :]) > TAIL_LINES:  # much has come after it
        return lines[-TAIL_LINES:]
    while starts and any(map(_GOES_ON.match, lines[max(start - 2, 0) : start])):
        start = starts.pop()
    return lines[start:]


def _is_dumb(stream: TextIO) -> bool:
    """Whether the terminal under `stream` cannot move its cursor."""
    from rich.console import Console

    return Console(file=stream).is_dumb_terminal


def prefix_text(node: Node) -> str:
    """Return the prefix of the lines of `node`, without colour."""
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
    """Return `text` in at most `columns` columns; if it has to be cut, it loses its colours."""
    from rich.cells import cell_len, set_cell_size

    plain = _ESCAPE.sub("", text)
    if cell_len(plain) > columns:
        return set_cell_size(plain, columns)
    return text if plain == text else text + "\x1b[0m"
