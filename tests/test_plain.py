"""What can travel and be saved."""

from __future__ import annotations

import msgspec
import pytest

from tensorkv.plain import MAX_INT, may_travel


@pytest.mark.parametrize(
    "value",
    [0, MAX_INT, -MAX_INT - 1, True, None, 2.0**80, float("inf"), "", "größe", (0.9, [1, "x"])],
    ids=repr,
)
def test_what_may_travel_does(value: object) -> None:
    assert may_travel(value)
    msgspec.msgpack.encode(value)


@pytest.mark.parametrize(
    "value",
    [MAX_INT + 1, -MAX_INT - 2, 10**30, "\ud800", "x\udcff", [1, 10**30], 1j, {"a": 1}],
    ids=ascii,
)
def test_what_may_not(value: object) -> None:
    assert not may_travel(value)
