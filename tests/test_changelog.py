"""The newest version in the changelog is the version of the package."""

from __future__ import annotations

import re
from pathlib import Path

import tensorkv

TEXT = (Path(__file__).parents[1] / "CHANGELOG.md").read_text(encoding="utf-8")


def test_newest_version_is_that_of_the_package() -> None:
    versions = re.findall(r"^## \[([^\]]+)\]", TEXT, re.MULTILINE)
    assert versions[0] == tensorkv.__version__
    assert len(versions) == len(set(versions))


def test_sections_are_known() -> None:
    known = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", TEXT, re.MULTILINE)) <= known
