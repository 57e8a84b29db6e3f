"""Lines of many processes on one terminal or in one file."""

from __future__ import annotations

import os
import pty
import random
import re
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorkv.launch.output import MAX_LINE_CHARS, FileSink, LineAssembler, Output, last_lines
from tensorkv.launch.supervisor import Node

W0, W1, S0 = Node("worker", 0), Node("worker", 1), Node("server", 0)


class Paper:
    """A sink that keeps what was written."""

    def __init__(self, size: tuple[int, int] | None = None) -> None:
        self.size = size
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def take(self) -> str:
        text, self.text = self.text, ""
        return text


def screen_of(text: str) -> list[str]:
    """Return what a terminal shows after `text`: the few sequences that are used, without colours."""
    rows, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|.|\n", text, re.DOTALL):
        if token == "\n":
            row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
        elif token == "\r":
            column = 0
        elif token == "\x1b[K":
            rows[row] = rows[row][:column]
        elif token.startswith("\x1b["):
            assert token.endswith("m"), f"{token!r} moves the cursor"
        else:
            rows[row] = rows[row][:column].ljust(column) + token + rows[row][column + 1 :]
            column += 1
    return rows


def to_files(**options: bool) -> tuple[Output, Paper, Paper]:
    out, err = Paper(), Paper()
    return Output({"stdout": out, "stderr": err}, **options), out, err


def to_terminal(columns: int = 60, rows: int = 24, **options: bool) -> tuple[Output, Paper]:
    paper = Paper((columns, rows))
    return Output({"stdout": paper, "stderr": paper}, **options), paper


DEEP = ["Traceback (most recent call last):", *["  a frame"] * 30, "ValueError: no luck"]
REMOTE = ["Traceback (most recent call last):", "  a frame", "ValueError: bad"]
UPDATER = [
    "Traceback (most recent call last):",
    "  a frame",
    "tensorkv.errors.UpdaterError: updater raised",
    *REMOTE,
]
CAUSED = ["", "The above exception was the direct cause of the following exception:", ""]
HANDLING = ["", "During handling of the above exception, another exception occurred:", ""]
LOG = [f"step {number}" for number in range(20)]


@pytest.mark.parametrize(
    ("before", "last"),
    [
        ([], []),
        ([], ["no luck"]),
        (LOG[:10], LOG[10:]),
        (LOG, DEEP),
        (LOG, [*DEEP, *LOG[:9]]),
        ([*LOG, *DEEP, *LOG[:10]], LOG[10:]),
        (LOG, [*DEEP, *CAUSED, *DEEP, *HANDLING, *DEEP]),
        ([*DEEP, "caught, and goes on"], DEEP),
        (LOG, UPDATER),
    ],
)
def test_the_last_lines_have_a_traceback_whole(before: list[str], last: list[str]) -> None:
    assert last_lines(before + last) == last


class TestLineAssembler:
    def test_lines_are_cut_wherever_the_bytes_are(self) -> None:
        lines = LineAssembler()
        assert lines.feed(b"one\ntw") == ["one"]
        assert lines.feed(b"o\n\nthree") == ["two", ""]
        assert lines.feed(b"", final=True) == ["three"]
        assert lines.feed(b"", final=True) == []

    def test_a_character_may_come_in_pieces_and_garbage_is_marked(self) -> None:
        lines = LineAssembler()
        data = "größer €".encode()
        assert [lines.feed(data[i : i + 1]) for i in range(len(data))] == [[]] * len(data)
        assert lines.feed(b" \xff\xfe!\n") == ["größer € \ufffd\ufffd!"]
        assert lines.feed(b"\xe2\x82", final=True) == ["\ufffd"]

    def test_windows_line_ends(self) -> None:
        lines = LineAssembler()
        assert lines.feed(b"a\r\n\r\nb\r\n") == ["a", "", "b"]
        assert lines.feed(b"one\r\ntwo\r") == ["one"]
        assert lines.feed(b"\nthree\r\n") == ["two", "three"]

    def test_a_rewritten_line_ends_as_its_last_state(self) -> None:
        lines = LineAssembler()
        assert lines.feed(b"\r 10%") == []
        assert lines.bar == " 10%"
        lines.feed(b"\r 20%\r 30%")
        assert lines.bar == " 30%"
        assert lines.feed(b"\r100%\n") == ["100%"]
        assert lines.bar == ""

    def test_a_state_may_end_with_the_carriage_return(self) -> None:
        lines = LineAssembler()
        lines.feed(b"10%\r")
        assert lines.bar == "10%"
        lines.feed(b"20%\r")
        assert lines.bar == "20%"
        assert lines.feed(b"\n") == ["20%"]

    def test_a_bar_that_clears_itself_leaves_nothing(self) -> None:
        lines = LineAssembler()
        lines.feed(b"\r 50%")
        lines.feed(b"\r     \r")
        assert lines.bar == ""
        assert lines.feed(b"ready\n") == ["ready"]
        lines.feed(b"\r 50%\r     \r")
        assert lines.feed(b"", final=True) == []

    @pytest.mark.parametrize(
        "erased",
        [
            b"50%\r   \r\n",
            b"\r50%\r\x1b[2K\n",
            b"50%\r\x1b[K\r\n",
            b"\r50%\r\x1b[0K\n",
            b"50%\x1b[2K\n",
            b"\r50%\r\x1b[0m   \x1b[0m\n",
        ],
    )
    def test_a_bar_that_clears_itself_and_ends_its_line_leaves_none(self, erased: bytes) -> None:
        for pieces in ([erased], [erased[i : i + 1] for i in range(len(erased))]):
            lines = LineAssembler()
            assert [line for piece in pieces for line in lines.feed(piece)] == []
            assert lines.feed(b"ready\n\nnext\n") == ["ready", "", "next"], "blank lines of its own stay"
            lines.feed(erased.rstrip(b"\n"))
            assert lines.feed(b"", final=True) == []

    def test_only_what_was_rewritten_is_a_bar(self) -> None:
        lines = LineAssembler()
        lines.feed(b"loading ...")
        assert lines.bar == ""
        assert lines.partial == "loading ..."

    def test_moves_of_the_cursor_go_and_colours_stay(self) -> None:
        lines = LineAssembler()
        assert lines.feed(b"\x1b[2K\x1b[3C\x1b[31mred\x1b[0m\x1b[?25l\x08\n") == ["\x1b[31mred\x1b[0m"]
        lines.feed(b"a\x1b[")
        assert lines.feed(b"0Kb\n") == ["ab"]

    def test_memory_is_bounded(self) -> None:
        lines = LineAssembler()
        assert lines.feed(b"x" * MAX_LINE_CHARS) == []
        assert lines.feed(b"y") == ["x" * MAX_LINE_CHARS + "y"]
        for number in range(1000):
            lines.feed(b"\r" + b"%d" % number * 100)
        assert len(lines._line) < 500

    def test_bars_one_above_the_other_are_written_like_one(self) -> None:
        lines, written = LineAssembler(), list[str]()
        for step in range(6):  # what tqdm does with two bars
            written += lines.feed(b"\router %d" % (step // 3))
            written += lines.feed(b"\n\rinner %d\x1b[A" % (step % 3))
            assert lines.bar == f"inner {step % 3}"
        assert written == ["outer 0"], "once, before it was known"
        assert lines.feed(b"\router end\n\rinner end\na\nb\n") == ["inner end", "outer end", "a", "b"]
        assert lines.bar == ""
        assert lines.feed(b"\r1\n\r2\n") == ["1", "2"], "they are bars of their own again"

    def test_text_between_bars_one_above_the_other_is_not_lost(self) -> None:
        """tqdm.write clears its bars, writes the text where the first one was, and draws them again."""
        lines, written = LineAssembler(), list[str]()
        for step in range(5):
            written += lines.feed(b"\router %d\n\rinner %d\x1b[A" % (step, step))
            written += lines.feed(b"\n\r       \r\x1b[A\r       \r")
            written += lines.feed(b"loss %d\n" % step)
        assert [line for line in written if line.startswith("loss")] == [f"loss {step}" for step in range(5)]

    def test_windows_line_ends_after_a_move_up(self) -> None:
        lines = LineAssembler()
        assert lines.feed(b"text\x1b[A more\n") == []
        assert lines.feed(b"log 1\r\nlog 2\r\n\r\nlog 3\r\n") == [" more", "log 1", "log 2", "", "log 3"]

    def test_a_block_of_rows_that_is_erased_and_written_again(self) -> None:
        lines, written = LineAssembler(), list[str]()
        written += lines.feed(b"a 0\nb 0\nc 0")
        for step in range(1, 4):  # what rich does with three rows
            erase = b"\r\x1b[2K" + b"\x1b[1A\x1b[2K" * 2
            written += lines.feed(erase + b"a %d\nb %d\nc %d" % (step, step, step))
        assert written == ["a 0", "b 0"], "once, before it was known"
        assert lines.bar == "b 3", "the last that a newline has ended"
        assert lines.feed(b"\ndone\n") == ["b 3", "c 3", "done"]

    @given(st.text(alphabet="ab\r\n é\u20ac\x1b[2AKJm", max_size=40), st.integers(0, 2**32))
    def test_the_cuts_between_reads_do_not_matter(self, text: str, seed: int) -> None:
        data, pieces, rng = text.encode(), list[bytes](), random.Random(seed)
        while data:
            cut = rng.randint(1, len(data))
            pieces.append(data[:cut])
            data = data[cut:]
        whole, cut_up = LineAssembler(), LineAssembler()
        expected = whole.feed(text.encode()) + whole.feed(b"", final=True)
        lines = [line for piece in pieces for line in cut_up.feed(piece)]
        assert lines + cut_up.feed(b"", final=True) == expected


class TestFiles:
    def test_each_line_names_its_process(self) -> None:
        output, out, err = to_files()
        output.feed(W0, "stdout", b"hello\nwor", 0.0)
        output.feed(S0, "stderr", b"listening\n", 0.0)
        output.feed(W1, "stdout", b"ld\n", 0.0)
        output.feed(W0, "stdout", b"ld\n", 0.0)
        assert out.text == "[worker 0] hello\n[worker 1] ld\n[worker 0] world\n"
        assert err.text == "[server 0] listening\n"

    def test_without_prefix(self) -> None:
        output, out, _ = to_files(prefix=False)
        output.feed(W0, "stdout", b"a\nb\n", 0.0)
        assert out.text == "a\nb\n"

    def test_an_unfinished_line_is_finished_at_the_end(self) -> None:
        output, out, err = to_files()
        output.feed(W0, "stdout", b"half", 0.0)
        output.feed(W1, "stderr", b"other", 0.0)
        output.close(W0, "stdout", 0.0)
        assert out.text == "[worker 0] half\n"
        output.close_all(0.0)
        output.close(W0, "stdout", 0.0)
        assert out.text + err.text == "[worker 0] half\n[worker 1] other\n"

    def test_of_a_bar_only_the_end_and_a_state_each_second_are_written(self) -> None:
        output, _, err = to_files()
        for tenth in range(25):
            output.feed(W0, "stderr", b"\rstep %d" % tenth, tenth / 10)
        output.feed(W1, "stderr", b"a line\n", 2.5)
        output.feed(W0, "stderr", b"\rdone\n", 2.5)
        assert err.text.splitlines() == [
            "[worker 0] step 10",
            "[worker 0] step 20",
            "[worker 1] a line",
            "[worker 0] done",
        ]

    def test_a_bar_that_stands_still_is_written_once(self) -> None:
        output, _, err = to_files()
        for second in range(5):
            output.feed(W0, "stderr", b"\rstuck", float(second))
        output.feed(W0, "stderr", b"\r     ", 9.0)
        assert err.text == "[worker 0] stuck\n"

    def test_the_second_begins_anew_with_each_bar(self) -> None:
        output, _, err = to_files()
        output.feed(W0, "stderr", b"\r1", 0.0)
        output.feed(W0, "stderr", b"\rend\n", 0.9)
        output.feed(W0, "stderr", b"\r2", 1.5)
        assert err.text == "[worker 0] end\n"

    def test_what_the_launcher_says(self) -> None:
        output, out, err = to_files()
        output.say("it is over")
        assert (out.text, err.text) == ("", "tensorkv: it is over\n")

    def test_the_last_words_of_a_process_are_kept(self) -> None:
        output, _, _ = to_files()
        output.feed(W0, "stderr", b"".join(b"line %d\n" % i for i in range(30)), 0.0)
        assert output.last_words(W0) == [], "they stand there already"
        output.feed(W1, "stdout", b"more\n", 0.0)
        assert output.last_words(W0) == [f"line {i}" for i in range(20, 30)]
        assert output.last_words(W1) == [], "only stderr counts"


class TestTerminal:
    def test_last_words_that_others_came_between_are_told_again(self) -> None:
        output, _, _ = to_files()
        for line in range(3):
            output.feed(W0, "stderr", b"line %d\n" % line, 0.0)
        assert output.last_words(W0) == []
        output.feed(W1, "stderr", b"between\n", 0.0)
        output.feed(W0, "stderr", b"line 3\n", 0.0)
        assert output.last_words(W0) == ["line 0", "line 1", "line 2", "line 3"]

    def test_prefixes_are_coloured_and_differ(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setenv("TERM", "xterm-256color")
        output, paper = to_terminal()
        output.feed(W0, "stdout", b"x\n", 0.0)
        first = paper.take()
        output.feed(W1, "stdout", b"x\n", 0.0)
        second = paper.take()
        assert re.fullmatch(r"\x1b\[[0-9;]+m\[worker 0\] \x1b\[0mx\n", first)
        assert first.split("[worker")[0] != second.split("[worker")[0]

    def test_no_color_is_respected(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NO_COLOR", "1")
        output, paper = to_terminal()
        output.feed(W0, "stdout", b"x\n", 0.0)
        assert "\x1b[3" not in paper.text

    def test_a_bar_is_redrawn_in_place_below_the_lines_of_others(self) -> None:
        output, paper = to_terminal()
        output.feed(W0, "stderr", b"\r 10%", 0.0)
        assert screen_of(paper.text) == ["[worker 0]  10%"]
        output.feed(W1, "stdout", b"a line\n", 0.0)
        assert screen_of(paper.text) == ["[worker 1] a line", "[worker 0]  10%"]
        output.feed(W0, "stderr", b"\r 90%", 0.0)
        assert screen_of(paper.text) == ["[worker 1] a line", "[worker 0]  90%"]
        output.feed(W0, "stderr", b"\r100%\nnext\n", 0.0)
        assert screen_of(paper.text) == ["[worker 1] a line", "[worker 0] 100%", "[worker 0] next", ""]

    def test_of_several_bars_the_one_that_changed_last_is_shown(self) -> None:
        output, paper = to_terminal()
        output.feed(W1, "stderr", b"\rone", 0.0)
        output.feed(W0, "stderr", b"\rzero", 0.0)
        assert screen_of(paper.text) == ["[worker 0] zero"]
        output.feed(W1, "stderr", b"\rONE", 0.0)
        output.feed(W1, "stdout", b"line\n", 0.0)
        assert screen_of(paper.text) == ["[worker 1] line", "[worker 1] ONE"]
        output.close(W1, "stderr", 0.0)
        assert screen_of(paper.text) == ["[worker 1] line", "[worker 1] ONE", ""]
        output.close_all(0.0)
        assert screen_of(paper.text) == ["[worker 1] line", "[worker 1] ONE", "[worker 0] zero", ""]

    def test_a_bar_that_clears_itself_goes(self) -> None:
        output, paper = to_terminal()
        output.feed(W0, "stderr", b"\r 10%", 0.0)
        output.feed(W0, "stderr", b"\r    \r", 0.0)
        assert screen_of(paper.text) == [""]
        output.say("over")
        assert screen_of(paper.text) == ["tensorkv: over", ""]

    def test_a_bar_never_wraps(self) -> None:
        output, paper = to_terminal(columns=30, rows=3)
        output.feed(W0, "stderr", b"\r\x1b[31m" + "長".encode() * 40, 0.0)
        (row,) = screen_of(paper.text)
        assert row.startswith("[worker 0] 長")
        assert len(row) + row.count("長") <= 29

    def test_the_colours_of_a_bar_end_with_it(self) -> None:
        output, paper = to_terminal()
        output.feed(W0, "stderr", b"\r\x1b[31mred", 0.0)
        assert paper.text.endswith("\x1b[31mred\x1b[0m")

    def test_a_question_is_shown_before_its_line_is_finished(self) -> None:
        output, paper = to_terminal(eager=True)
        output.feed(W0, "stdout", b"(Pdb) ", 0.0)
        assert screen_of(paper.text) == ["[worker 0] (Pdb) "]

    def test_other_unfinished_lines_wait(self) -> None:
        output, paper = to_terminal()
        output.feed(W0, "stdout", b"loading ... ", 0.0)
        assert paper.text == ""
        output.feed(W0, "stdout", b"done\n", 0.0)
        assert screen_of(paper.text) == ["[worker 0] loading ... done", ""]

    def test_a_file_beside_the_terminal_gets_no_bars(self) -> None:
        out, err = Paper(), Paper((60, 24))
        output = Output({"stdout": out, "stderr": err})
        output.feed(W0, "stderr", b"\r 10%", 0.0)
        output.feed(W0, "stdout", b"\rx", 0.0)
        output.feed(W0, "stdout", b"result\n", 0.0)
        assert out.text == "[worker 0] xresult\n"
        assert screen_of(err.text) == ["[worker 0]  10%"]


class TestFileSink:
    def test_a_file_is_written_at_once_and_no_terminal(self, tmp_path: os.PathLike[str]) -> None:
        path = os.path.join(tmp_path, "out")
        with open(path, "w", encoding="ascii") as stream:
            sink = FileSink(stream)
            sink.write("größer\n")
            with open(path, encoding="ascii") as reader:
                assert reader.read() == "gr??er\n"
            assert sink.size is None

    def test_a_terminal_tells_its_size(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TERM", "xterm")
        master, slave = pty.openpty()
        with open(master, "rb", buffering=0) as _, open(slave, "w") as stream:
            assert FileSink(stream).size == (80, 24), "a new one says 0 by 0"
            monkeypatch.setenv("TERM", "dumb")
            assert FileSink(stream).size is None

    def test_a_full_pipe_is_waited_for_even_if_it_does_not_block(self) -> None:
        read, write = os.pipe()
        os.set_blocking(write, False)
        received = bytearray()

        def drain() -> None:
            while data := os.read(read, 1 << 16):
                received.extend(data)

        thread = threading.Thread(target=drain)
        with open(write, "w") as stream:
            thread.start()
            FileSink(stream).write("x" * (1 << 20))
        thread.join(30)
        os.close(read)
        assert len(received) == 1 << 20
