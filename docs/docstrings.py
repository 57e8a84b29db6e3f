"""How the site reads a docstring: mkdocs.yml names this extension of griffe, which parses the docstrings.

Our sections are shorter than those griffe knows. `Args:` may describe several names in one item, and
`Raises:` may list errors that need no words, or none by name. The extension writes them out for the site:

    key, value: as in `push`.       ->  an item for `key` and one for `value`
    KeyDeleted, PeerLostError.      ->  an item for `KeyDeleted` and one for `PeerLostError`, without words
    What `push` and `pull` raise.   ->  an item for `Exception` with these words
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

ITEM = re.compile(r"^    (?P<names>[*\w]+(?:, [*\w]+)*)[:.](?P<words>(?: .*)?)$")


class WrittenOut(Extension):
    """Gives every argument and every error an item of its own."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite the docstring of an object. Griffe calls this for each."""
        if obj.docstring is not None and obj.package.name == "tensorkv":
            obj.docstring.value = written_out(obj.docstring.value)


def written_out(text: str) -> str:
    """Return a docstring with its sections written out; all else stays as it is."""
    lines: list[str] = []
    section = ""
    items: list[str] = []  # the names of the item whose words are read, and the words
    words: list[str] = []
    for line in [*text.splitlines(), ""]:
        if section and line.startswith("     ") and items:
            words.append(line)
            continue
        for item in items:
            lines += [f"    {item}:{words[0]}", *words[1:]]
        items, words = [], []
        if section and line.startswith("    "):
            items, words = _item(line)
            continue
        section = line if line in ("Args:", "Raises:") else ""
        lines.append(line)
    return "\n".join(lines[:-1])


def _item(line: str) -> tuple[list[str], list[str]]:
    """Return the names of an item and its first line of words."""
    found = ITEM.match(line)
    if found is None:
        return ["Exception"], [f" {line.strip()}"]
    return found["names"].split(", "), [found["words"]]
