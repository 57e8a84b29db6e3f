"""Every code block of README.md and docs/ is run.

How a block is read:

- ```python blocks of one file run in order and share their names, as if typed one after the other. What
  they print must be what stands in the comment behind each print and in the comment lines right below it.
- A ```python block after `<!-- file: train.py -->` is not run but saved under that name.
- A ```console block holds commands after `$ `. They run in a folder of their own, with the files saved so
  far in it and the repository's `examples/`, and must succeed. The lines below a command must be among the
  lines it prints, in any order; `...` at the end of a line stands for any rest.
- A ```console block after `<!-- not run: why -->` is only shown. There is no such way out for python.
- ```text blocks are for everything that is no code.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^(?:<!-- (?P<mark>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    """A fenced block: its language, its text, the mark above it, and the line it starts on."""

    language: str
    text: str
    mark: str
    line: int


def _blocks(page: Path) -> list[Block]:
    whole = page.read_text(encoding="utf-8")
    return [
        Block(
            found["language"],
            found["text"],
            found["mark"] or "",
            whole.count("\n", 0, found.start("text")) + 1,
        )
        for found in FENCE.finditer(whole)
    ]


def _expected_output(text: str) -> list[str]:
    """Return what the comments say: those behind a print, and the comment lines right below one."""
    expected: list[str] = []
    below_print = False
    for line in text.splitlines():
        code, mark, comment = line.partition("  # ")
        if code.lstrip().startswith("print("):
            expected.extend([comment] if mark else [])
            below_print = True
        elif below_print and line.lstrip().startswith("# "):
            expected.append(line.lstrip().removeprefix("# "))
        else:
            below_print = False
    return expected


def _run_python(block: Block, page: Path, names: dict[str, Any]) -> None:
    code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, names)
    assert printed.getvalue().splitlines() == _expected_output(block.text), f"{page.name}:{block.line}"


def _commands(block: Block) -> list[tuple[str, list[str]]]:
    commands: list[tuple[str, list[str]]] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            commands.append((line.removeprefix("$ "), []))
        elif line.strip():
            commands[-1][1].append(line)
    return commands


def _tools(folder: Path) -> None:
    """Put `python`, `tensorkv` and `torchrun` of this very environment into `folder`, installed or not."""
    folder.mkdir()
    python = shlex.quote(sys.executable)
    run_main = "import sys; from tensorkv.cli.main import main; sys.exit(main())"
    commands = {
        "python": python,
        "tensorkv": f"{python} -c {shlex.quote(run_main)}",
        "torchrun": f"{python} -m torch.distributed.run",
    }
    for name, command in commands.items():
        (folder / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (folder / name).chmod(0o755)


def _run_console(block: Block, page: Path, folder: Path) -> None:
    tools = folder / ".tools"
    if not tools.exists():
        _tools(tools)
        (folder / "examples").symlink_to(ROOT / "examples")
    environ = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    for command, expected in _commands(block):
        done = subprocess.run(
            command,
            shell=True,
            cwd=folder,
            env=environ,
            capture_output=True,
            text=True,
            timeout=170,
            check=False,
        )
        where = f"{page.name}:{block.line}: {command}\n{done.stdout}\n{done.stderr}"
        assert done.returncode == 0, where
        for line in expected:
            assert any(_matches(line, printed) for printed in done.stdout.splitlines()), f"{line!r}: {where}"


def _matches(expected: str, printed: str) -> bool:
    expected, printed = expected.rstrip(), printed.rstrip()
    if expected.endswith("..."):
        return printed.startswith(expected.removesuffix("..."))
    return printed == expected


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow if page.name == "launching.md" else ()) for page in PAGES],
    ids=lambda page: page.name,
)
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": f"docs_{page.stem.replace('-', '_')}"}
    for block in _blocks(page):
        if block.mark.startswith("file: "):
            (tmp_path / block.mark.removeprefix("file: ")).write_text(block.text)
        elif block.language == "python":
            _run_python(block, page, names)
        elif block.language == "console" and not block.mark.startswith("not run: "):
            _run_console(block, page, tmp_path)
        else:
            assert block.language in ("text", "console"), f"{page.name}:{block.line}: which language?"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_found(page: Path) -> None:
    """A fence that is never closed, or is indented, would hide its code from the tests."""
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"^\s*```", text, re.M)) == 2 * len(_blocks(page))


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_readme_says_at_once_what_this_is() -> None:
    first = PAGES[0].read_text(encoding="utf-8").splitlines()[0]
    assert "parameter server" in first
    assert "not a KV cache" in first


def test_expected_output_is_read_from_comments() -> None:
    text = "print(1)  # 1\nx = 2  # no output\nprint(x)  # 2\n# and more\n\n# not output\n"
    assert _expected_output(text) == ["1", "2", "and more"]
