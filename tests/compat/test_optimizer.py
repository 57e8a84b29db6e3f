"""MXNet's optimizers as they are written down."""

from __future__ import annotations

from typing import Any

import pytest

from tensorkv.compat import arithmetic, optimizer
from tensorkv.compat.base import MXNetError
from tensorkv.errors import InvalidOption, NotSupported


@pytest.mark.parametrize(
    ("name", "cls", "torch_class"),
    [
        ("sgd", optimizer.SGD, arithmetic.SGD),
        ("Adam", optimizer.Adam, arithmetic.Adam),
        ("TEST", optimizer.Test, arithmetic.Test),
    ],
)
def test_create_takes_names_in_any_case(name: str, cls: type, torch_class: type) -> None:
    made = optimizer.create(name)
    assert type(made) is cls
    assert made.torch_class is torch_class
    assert made.options == {}


def test_create_lists_the_known_names() -> None:
    with pytest.raises(ValueError, match="'nope'.*'adam', 'sgd', 'test'"):
        optimizer.create("nope")


def test_options_and_learning_rate() -> None:
    made = optimizer.SGD(learning_rate=0.5, momentum=0.9, clip_gradient=None)
    assert made.options == {"learning_rate": 0.5, "momentum": 0.9, "clip_gradient": None}
    assert (made.learning_rate, made.lr) == (0.5, 0.5)
    assert (optimizer.SGD().lr, optimizer.Adam().lr, optimizer.Adam(learning_rate=2).lr) == (0.01, 0.001, 2.0)
    assert repr(made) == "SGD(learning_rate=0.5, momentum=0.9, clip_gradient=None)"
    made.options["momentum"] = 0
    assert made.options["momentum"] == 0.9


def test_arguments_that_change_nothing_are_left_away() -> None:
    made = optimizer.SGD(
        learning_rate=None, lazy_update=True, multi_precision=False, param_idx2name={}, begin_num_update=3
    )
    assert made.options == {}
    assert optimizer.Test(learning_rate=0.1, wd=0.1, rescale_grad=2).options == {"rescale_grad": 2}
    assert optimizer.Adam(begin_num_update=3).options == {"begin_num_update": 3}


@pytest.mark.parametrize(
    "argument",
    [
        {"lr_scheduler": object()},
        {"multi_precision": True},
        {"param_idx2name": {0: "w"}},
        {"param_dict": {0: "w"}},
        {"sym": object()},
    ],
)
def test_arguments_a_store_cannot_honour_are_refused(argument: dict[str, Any]) -> None:
    with pytest.raises(NotSupported, match=next(iter(argument))) as info:
        optimizer.SGD(**argument)
    assert isinstance(info.value, MXNetError)


@pytest.mark.parametrize("name", ["rescale_grad", "lr", "learning_rate", "wd_mult"])
def test_attributes_that_would_be_ignored_cannot_be_set(name: str) -> None:
    with pytest.raises(AttributeError):
        setattr(optimizer.SGD(), name, 0.5)


@pytest.mark.parametrize("options", [{"foo": 1}, {"learning_rate": "fast"}, {"wd": [1]}, {"beta1": 0.9}])
def test_wrong_options_are_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption) as info:
        optimizer.SGD(**options)
    assert isinstance(info.value, MXNetError)
