"""Nothing that is committed tells of the machine it was written on."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FOLDERS = ("work", "farm", "opt", "home", "root", "tmp", "mnt", "Users")
ABSOLUTE = re.compile(rf"(?<![\w.\-/])/(?:{'|'.join(FOLDERS)})/[\w.]")
REGISTRIES = re.compile(r"pypi\.|pythonhosted|download\.pytorch|anaconda\.")


def _committed() -> list[Path]:
    command = ["git", "ls-files", "--cached", "-z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)
    if done.returncode != 0:
        pytest.skip("this is not a clone: there is no list of committed files")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_path_or_registry_of_a_machine() -> None:
    found = []
    for path in _committed():
        if path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if ABSOLUTE.search(line) or REGISTRIES.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert found == []


def test_the_search_finds_what_it_is_for() -> None:
    assert ABSOLUTE.search("open('" + "/home" + "/me/data')")
    assert not ABSOLUTE.search("src/home/x and https://host/home/x")


def test_no_large_or_generated_file() -> None:
    for path in _committed():
        assert path.stat().st_size < 500_000, path
        assert path.suffix not in {".pyc", ".so", ".egg-info"}, path
