"""UpdaterSpec: plain data that may travel."""

from __future__ import annotations

import msgspec
import pytest

from tensorkv.updaters.spec import UpdaterSpec

SPEC = UpdaterSpec(type="optimizer", name="torch.optim.sgd:SGD", options={"lr": 0.1, "nesterov": False})


def test_it_travels() -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(SPEC), type=UpdaterSpec) == SPEC


def test_equal_specs_are_equal() -> None:
    assert UpdaterSpec(type="named", name="add") == UpdaterSpec(type="named", name="add")
    assert UpdaterSpec(type="named", name="add") != UpdaterSpec(type="function", name="add")


def test_another_type_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"type": "pickle", "name": "x"}, UpdaterSpec)
