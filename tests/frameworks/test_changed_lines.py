"""The pages show the lines of each script that change, and the front page how many."""

from __future__ import annotations

import difflib
import re
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SCRIPTS = sorted(path.stem for path in (HERE / "after").glob("*.py"))
PAGES = {"ddp": "from-ddp.md"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_front_page_has_the_count(name: str) -> None:
    scripts = [str(HERE / version / f"{name}.py") for version in ("before", "after")]
    command = ["git", "diff", "--no-index", "--numstat", *scripts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    added, removed, *_ = done.stdout.split()
    row = rf"^\| \[.*\]\(tests/frameworks/after/{name}\.py\) \| {added} \| {removed} \|$"
    assert re.search(row, (ROOT / "README.md").read_text(), re.MULTILINE), f"{added} added, {removed} removed"


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "plain"])
def test_a_page_shows_the_lines_that_are_changed(name: str) -> None:
    scripts = [(HERE / version / f"{name}.py").read_text().splitlines() for version in ("before", "after")]
    page = (ROOT / "docs" / PAGES.get(name, "frameworks.md")).read_text()
    for line in difflib.unified_diff(*scripts, n=0, lineterm=""):
        if not line.startswith(("---", "+++", "@@")):
            assert f"\n{line}\n" in page
