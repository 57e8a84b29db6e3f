"""Merges the output of many processes into the lines of one terminal or file. Bytes go in, text comes out.

A finished line is written at once, behind a prefix that names its process. A line that its process
rewrites (by a carriage return, as progress bars do) is a *bar* until it is finished:

- on a terminal, bars stand below all finished lines, one line each, and are redrawn in place;
- elsewhere, only the last state of a bar is written, and its current state at most once a second.

A bar that clears itself leaves no line.
"""

from __future__ import annotations

import codecs
import os
import re
import select
from collections import deque
from collections.abc import Iterable, Mapping
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
_MOVE = re.compile(r"\n|\x1b\[(\d*)([ABEFJK])")
_INCOMPLETE = re.compile(r"\x1b(\[[0-?]*[ -/]*)?\Z")
_ESCAPE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
_MAX_ROWS = 50
_LINES_ABOVE_BARS = 3  # maximum number of lines written along with bars before the bars count as finished
_COLOURS = ("cyan", "green", "magenta", "yellow", "blue", "bright_cyan", "bright_green", "bright_magenta")


@final
class LineAssembler:
    """Cuts one stream of bytes into lines. Undecodable bytes become U+FFFD.

    It follows nested progress bars, which go up some rows and rewrite them. From then on it holds that many
    rows back as bars, until more lines than that have arrived without another move up.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._cut = ""  # the beginning of an escape sequence
        self._rows = [""]  # not finished yet
        self._row = 0  # where the cursor is
        self._height = 0  # number of rows above the cursor that are held back
        self._lines_since_up = 0

    def feed(self, data: bytes, final: bool = False) -> list[str]:
        """Return the lines that `data` finishes; with `final` the unfinished ones too."""
        text = self._cut + self._decoder.decode(data, final)
        cut = _INCOMPLETE.search(text)
        end = cut.start() if cut else len(text)
        self._cut = text[end:]
        lines: list[str] = []
        position = 0
        for move in _MOVE.finditer(text, 0, end):
            self._write(text[position : move.start()])
            self._move(move, lines)
            position = move.end()
        self._write(text[position:end])
        if len(self._rows[self._row]) > MAX_LINE_CHARS:
            self._down(lines)
        if final:
            lines += _not_blank(self._rows)
            self._rows, self._row = [""], 0
        return lines

    @property
    def bars(self) -> list[str]:
        """The unfinished lines that their process rewrites, without blank ones."""
        if self._height == 0 and "\r" not in self._rows[0]:
            return []
        return _not_blank(self._rows)

    @property
    def partial(self) -> str:
        """The unfinished line, including trailing blanks."""
        return _last_state(self._rows[self._row])

    def _write(self, text: str) -> None:
        line = self._rows[self._row] + _CURSOR.sub("", text)
        if "\r" in line:  # only the last state matters
            line = "\r" + _last_state(line) + ("\r" if line.endswith("\r") else "")
        self._rows[self._row] = line

    def _move(self, move: re.Match[str], lines: list[str]) -> None:
        count = min(int(move[1] or 1), _MAX_ROWS)
        match move[2]:
            case "A" | "F":
                self._up(count)
            case "K":
                at_begin = self._rows[self._row].endswith("\r")
                if move[1] == "2" or (at_begin and move[1] in ("", "0", None)):
                    self._rows[self._row] = "\r"
            case "J":
                del self._rows[self._row + 1 :]
            case _:  # a newline, or a move down
                for _ in range(count):
                    self._down(lines)

    def _up(self, count: int) -> None:
        missing = min(count - self._row, _MAX_ROWS - len(self._rows))  # rows that are finished already
        self._rows[:0] = [""] * missing
        self._row = max(self._row - count, 0)
        self._height = max(self._height, len(self._rows) - 1 - self._row)
        self._lines_since_up = 0
        self._rows[self._row] += "\r"

    def _down(self, lines: list[str]) -> None:
        self._row += 1
        if self._row == len(self._rows):
            self._rows.append("")
        else:
            self._rows[self._row] += "\r"
        self._lines_since_up += 1
        if self._lines_since_up > self._height + _LINES_ABOVE_BARS:
            self._height = 0
        excess = self._row - self._height
        if excess > 0:
            for row in self._rows[:excess]:  # a bar that has cleared itself is no line
                lines += _not_blank([row]) if "\r" in row else [row]
            del self._rows[:excess]
            self._row -= excess


def _last_state(line: str) -> str:
    """Return the text after the last carriage return that is followed by any."""
    return line.rstrip("\r").rpartition("\r")[2]


def _not_blank(rows: Iterable[str]) -> list[str]:
    return [line for line in map(_visible, rows) if _ESCAPE.sub("", line).strip()]


def _visible(line: str) -> str:
    return _last_state(line).rstrip(" ") if "\r" in line else line


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
    bars: list[str] = field(default_factory=list)
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
        self._drawn = 0

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
            state = source.lines.bars
            if self._eager and not state and source.lines.partial:
                state = [source.lines.partial]
            changed, source.bars = state != source.bars, state
            if changed and not lines:
                self._write(source.stream, "", self._last)
        if lines:
            prefix = self._prefix_of(source)
            text = "".join(f"{prefix}{line}\n" for line in lines)
            self._write(source.stream, text, (source.node, source.stream))

    def _due_state(self, source: _Source, now: float, finished: bool) -> list[str]:
        """Return the state of a bar if it is due to be written to a file."""
        state = source.lines.bars
        if not state or finished or source.shown_at is None:
            source.shown_at = now if state else None
            return []
        if now - source.shown_at < BAR_INTERVAL_S or state == source.bars:
            return []
        source.shown_at, source.bars = now, state
        return state

    def _write(self, stream: Stream, text: str, last: tuple[Node, Stream] | None) -> None:
        """Write finished lines, and redraw the bars below them."""
        sink = self._sinks[stream]
        if last != self._last:
            self._last, self._lines_in_a_row = last, 0
        self._lines_in_a_row += text.count("\n")
        if sink.size is None:
            sink.write(text)
            return
        erase = "\r" + "\x1b[A" * (self._drawn - 1) + "\x1b[J" if self._drawn else ""
        bars = self._bars(sink.size)
        self._drawn = len(bars)
        sink.write(erase + text + "\n".join(bars))

    def _bars(self, size: tuple[int, int]) -> list[str]:
        columns, rows = size
        drawn: list[str] = []
        for source in sorted(self._sources.values(), key=lambda each: (each.node, each.stream)):
            if source.bars and self._sinks[source.stream].size is not None:
                taken = len(prefix_text(source.node)) if self._prefix else 0
                room = max(columns - 1 - taken, 1)
                drawn += [self._prefix_of(source) + _clip(bar, room) for bar in source.bars]
        return drawn[: max(rows - 1, 1)]

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
