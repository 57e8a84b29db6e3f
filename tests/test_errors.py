"""The tree of errors: what its picture says, what a leaf is, and that it survives pickle and the wire."""

from __future__ import annotations

import builtins
import inspect
import pickle
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tensorkv import errors
from tensorkv.errors import (
    MAX_HINTS,
    Hints,
    JobBroken,
    KeyNotInitialized,
    TensorKVError,
    UpdaterError,
    UsageError,
    from_wire,
    to_wire,
)

CLASSES = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, TensorKVError) and value is not TensorKVError
]


def pictured() -> dict[str, set[str]]:
    """Return the errors drawn in the docstring of the module, each with its bases."""
    assert errors.__doc__ is not None
    tree: dict[str, set[str]] = {}
    base = ""
    for line in errors.__doc__.splitlines():
        found = re.search(r"^( *│? *)[├└]── ([A-Z]\w+)(?: \(([\w, ]+)\))?", line)
        if not found:
            continue
        standard = {name.strip() for name in (found[3] or "").split(",")} - {""}
        is_leaf = len(found[1]) > 4
        base = base if is_leaf else found[2]
        tree[found[2]] = standard | {base if is_leaf else "TensorKVError"}
    return tree


def test_the_picture_shows_every_error_once() -> None:
    assert set(pictured()) == {cls.__name__ for cls in CLASSES}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_class_has_the_bases_of_the_picture(cls: type[TensorKVError]) -> None:
    assert {base.__name__ for base in cls.__bases__} == pictured()[cls.__name__]
    standard = {name for name in pictured()[cls.__name__] if hasattr(builtins, name)}
    assert all(issubclass(cls, getattr(builtins, name)) for name in standard)


def test_a_mistake_and_the_end_of_a_job_are_caught_by_their_bases() -> None:
    with pytest.raises(UsageError):
        raise from_wire("ShapeMismatch", "key 'w': shape (3,) is not (4,)")
    with pytest.raises(JobBroken):
        raise from_wire("PeerLostError", "server 1 is gone")
    assert not issubclass(UpdaterError, (UsageError, JobBroken))
    assert not issubclass(JobBroken, UsageError)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_leaf_keeps_its_text(cls: type[TensorKVError]) -> None:
    text = "key 'w': 3 is not 4"
    assert str(cls(text)) == text  # a plain KeyError would add quotes
    again = pickle.loads(pickle.dumps(cls(text)))
    assert type(again) is cls
    assert str(again) == text
    sent = from_wire(*to_wire(cls(text)))
    assert type(sent) is cls
    assert str(sent) == text


def test_an_error_without_text_is_empty() -> None:
    assert str(KeyNotInitialized()) == ""


def test_a_foreign_error_travels_with_its_type_in_the_text() -> None:
    name, text = to_wire(ZeroDivisionError("by zero"))
    assert (name, text) == ("TensorKVError", "ZeroDivisionError: by zero")
    assert type(from_wire(name, text)) is TensorKVError


def test_an_unknown_name_from_the_wire_is_a_plain_error() -> None:
    error = from_wire("SystemExit", "boom")
    assert type(error) is TensorKVError
    assert str(error) == "boom"


def test_a_subclass_of_the_user_travels_as_what_it_is_called() -> None:
    class Mine(UpdaterError):
        pass

    assert type(from_wire(*to_wire(Mine("x")))) is TensorKVError


@pytest.mark.parametrize(
    ("name", "text"),
    [("dist_snyc", "; did you mean 'dist_sync'?"), ("LOCAL", "; did you mean 'local'?"), (3, "")],
)
def test_a_typo_is_told_what_was_meant(name: object, text: str) -> None:
    assert errors.did_you_mean(name, ["dist_sync", "local"]) == text


NAMES = [f"layers.{number}.{name}" for number in range(200) for name in ("weight", "bias")]


class TestHints:
    @pytest.mark.parametrize(
        ("key", "meant"),
        [
            ("layers.123.wieght", "layers.123.weight"),
            ("layers.123.weigh", "layers.123.weight"),
            ("layer.123.weight", "layers.123.weight"),
            ("Layers.7.bias", "layers.7.bias"),
            ("module.layers.7.bias", "layers.7.bias"),
            ("_orig_mod.layers.7.bias", "layers.7.bias"),
            ("7.bias", "layers.7.bias"),
        ],
    )
    def test_the_key_that_was_meant_comes_first(self, key: str, meant: str) -> None:
        assert Hints().near(key, NAMES)[0] == meant

    @pytest.mark.parametrize("key", ["", "x", "optimizer", 7])
    def test_nothing_is_like_it(self, key: Any) -> None:
        assert Hints().near(key, NAMES) == []
        assert Hints().near(key, [1, 2, 3]) == []
        assert Hints().near(key, []) == []

    def test_a_program_that_asks_for_each_key_first_pays_for_a_few(self) -> None:
        looks = 0

        def known() -> Iterator[str]:
            nonlocal looks
            looks += 1
            yield from NAMES

        hints = Hints()
        for number in range(1000):
            hints.near(f"layers.{number}.scale", known())
        assert looks == MAX_HINTS
