"""Every code block of README.md and docs/ is run, and every example in a docstring of a public name.

How a block is read:

- ```python blocks of one file run in order and share their names, as if typed one after the other. What
  they print must be what stands in the comment behind each print and in the comment lines right below it.
- A ```python block after `<!-- file: train.py -->` is not run but saved under that name.
- A ```console block holds commands after `$ `. They run in a folder of their own, with the files saved so
  far in it and the repository's `examples/`, and must succeed. The lines below a command must be among the
  lines it prints, in any order; `...` at the end of a line stands for any rest.
- A ```console block after `<!-- not run: why -->` is only shown. There is no such way out for python.
- ```text blocks are for everything that is no code, ```mermaid blocks are drawings.

The blocks below `Example:` in a docstring are read in the same way. They find `torch` and `tensorkv`
imported, and say what comes out: by a print with its comment, an assert, or the lines below a command.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import tensorkv
from tensorkv.stores import registry

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "tensorkv"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTED = {
    "stores/registry.py": ("create", "register"),
    "launch/place.py": ("rank", "num_workers"),
    "launch/spawn.py": ("spawn",),
    "store.py": ("KVStore",),
    "training/averaging.py": ("average",),
    "training/optimizer.py": ("DistributedOptimizer",),
    "training/sharding.py": ("shard",),
    "work.py": ("Work",),
}
"""The functions whose docstrings have examples, and the classes of whose public methods each has."""

FENCE = re.compile(r"^(?:<!-- (?P<mark>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    """A fenced block: its language, its text, the mark above it, and the line it starts on."""

    language: str
    text: str
    mark: str
    line: int


def _blocks(whole: str, first_line: int = 1) -> list[Block]:
    return [
        Block(
            found["language"],
            found["text"],
            found["mark"] or "",
            whole.count("\n", 0, found.start("text")) + first_line,
        )
        for found in FENCE.finditer(whole)
    ]


class Docstring(NamedTuple):
    """The docstring of a public name, and where it stands."""

    name: str
    text: str
    source: Path
    line: int

    def examples(self) -> list[Block]:
        """Return the blocks of its section `Example:`, which is the last."""
        before, mark, section = self.text.partition("\n\nExample:\n")
        return _blocks(textwrap.dedent(section), self.line + (before + mark).count("\n"))


def _docstrings() -> list[Docstring]:
    found: list[Docstring] = []
    for place, names in DOCUMENTED.items():
        source = PACKAGE / place
        tree = ast.parse(source.read_text(encoding="utf-8"))
        nodes = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        for name in names:
            node = nodes[name]
            parts = [node] if isinstance(node, ast.FunctionDef) else _public_methods(node)
            for part in parts:
                whole_name = name if part is node else f"{name}.{part.name}"
                text = ast.get_docstring(part) or ""
                found.append(Docstring(whole_name, text, source, part.body[0].lineno))
    return found


def _is_setter(node: ast.FunctionDef) -> bool:
    """Whether it is the setter of a property, whose getter has the docstring."""
    return any(isinstance(each, ast.Attribute) and each.attr == "setter" for each in node.decorator_list)


def _public_methods(node: ast.ClassDef) -> list[ast.FunctionDef]:
    methods = [part for part in node.body if isinstance(part, ast.FunctionDef) and not _is_setter(part)]
    return [
        each for each in methods if not each.name.startswith("_") or each.name in ("__contains__", "__len__")
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


def _run(blocks: list[Block], page: Path, folder: Path, names: dict[str, Any]) -> None:
    for block in blocks:
        if block.mark.startswith("file: "):
            (folder / block.mark.removeprefix("file: ")).write_text(block.text)
        elif block.language == "python":
            _run_python(block, page, names)
        elif block.language == "console" and not block.mark.startswith("not run: "):
            _run_console(block, page, folder)
        else:
            assert block.language in ("text", "console", "mermaid", "diff"), (
                f"{page.name}:{block.line}: which language?"
            )


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow if page.name == "launching.md" else ()) for page in PAGES],
    ids=lambda page: page.name,
)
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": f"docs_{page.stem.replace('-', '_')}"}
    _run(_blocks(page.read_text(encoding="utf-8")), page, tmp_path, names)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "docstring",
    [pytest.param(each, marks=pytest.mark.slow if each.name == "spawn" else ()) for each in _docstrings()],
    ids=lambda docstring: docstring.name,
)
def test_example_in_docstring_runs(
    docstring: Docstring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = docstring.examples()
    assert blocks, f"{docstring.name} has no example: write a ```python block below a last section `Example:`"
    assert docstring.text.count("```") == 2 * len(blocks), f"{docstring.name} has a block that is not run"
    assert any(_says_what_comes_out(block) for block in blocks), f"{docstring.name}: what comes out?"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))  # one registers a kind
    _run(
        blocks, docstring.source, tmp_path, {"__name__": "docs_example", "torch": torch, "tensorkv": tensorkv}
    )


def _says_what_comes_out(block: Block) -> bool:
    if block.language == "console":
        return all(expected for _, expected in _commands(block))
    return bool(_expected_output(block.text)) or "assert " in block.text


def test_docstrings_of_every_public_method_are_found() -> None:
    names = {docstring.name for docstring in _docstrings()}
    for cls in (tensorkv.KVStore, tensorkv.Work):
        assert {f"{cls.__name__}.{name}" for name in vars(cls) if not name.startswith("_")} <= names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_found(page: Path) -> None:
    """A fence that is never closed, or is indented, would hide its code from the tests."""
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"^\s*```", text, re.M)) == 2 * len(_blocks(text))


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_site_has_every_page() -> None:
    """Each page of docs/ is in the menu of the site that `make docs` builds, and nothing else is."""
    menu = re.findall(r"^ +- [^:\n]+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    assert sorted(menu) == sorted(page.name for page in PAGES[1:])


def test_reference_has_every_public_name() -> None:
    reference = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.M)
    errors = {name for name in tensorkv.__all__ if inspect.isclass(getattr(tensorkv, name))}
    errors = {name for name in errors if issubclass(getattr(tensorkv, name), Exception)}
    public = {f"tensorkv.{name}" for name in set(tensorkv.__all__) - errors - {"__version__"}}
    assert public <= set(reference)


def test_readme_says_at_once_what_this_is() -> None:
    first = PAGES[0].read_text(encoding="utf-8").splitlines()[0]
    assert "parameter server" in first
    assert "not a KV cache" in first


def test_expected_output_is_read_from_comments() -> None:
    text = "print(1)  # 1\nx = 2  # no output\nprint(x)  # 2\n# and more\n\n# not output\n"
    assert _expected_output(text) == ["1", "2", "and more"]
