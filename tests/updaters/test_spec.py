"""UpdaterSpec: plain data that may travel."""

from __future__ import annotations

import msgspec
import pytest

from tensorkv.updaters.spec import MAX_INT, UpdaterSpec, may_travel

SPEC = UpdaterSpec(type="optimizer", name="torch.optim.sgd:SGD", options={"lr": 0.1, "nesterov": False})


def test_it_travels() -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(SPEC), type=UpdaterSpec) == SPEC


def test_equal_specs_are_equal() -> None:
    assert UpdaterSpec(type="named", name="add") == UpdaterSpec(type="named", name="add")
    assert UpdaterSpec(type="named", name="add") != UpdaterSpec(type="function", name="add")


def test_another_type_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"type": "pickle", "name": "x"}, UpdaterSpec)


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
