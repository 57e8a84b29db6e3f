"""Updaters that are no optimizers: named ones, and functions."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest
import torch

from tensorkv.errors import UnknownUpdater, UpdaterError
from tensorkv.updaters.base import Update, Updater, named_spec
from tensorkv.updaters.settings import build, build_from_argument
from tensorkv.updaters.spec import UpdaterSpec


def function(call: Any) -> Updater:
    return build(UpdaterSpec(type="function", name="tests:call", elementwise=False), call)


def step(updater: Updater, slot: int, pushed: torch.Tensor, stored: torch.Tensor, **options: Any) -> Any:
    return updater.apply([Update(slot, f"key {slot}", pushed, stored)], options)[0]


class TestNamed:
    def test_assign_and_add(self) -> None:
        stored = torch.tensor([5.0])
        assert step(build(named_spec("assign")), 0, torch.tensor([2.0]), stored) is None
        assert stored.item() == 2
        assert step(build(named_spec("add")), 0, torch.tensor([2.0]), stored) is None
        assert stored.item() == 4

    @pytest.mark.parametrize("name", ["replace", "", "Assign"])
    def test_an_unknown_name_lists_the_known(self, name: str) -> None:
        with pytest.raises(UnknownUpdater, match="'add', 'assign'"):
            build_from_argument(name, False)

    def test_none_is_assign(self) -> None:
        assert build_from_argument(None, False).spec.name == "assign"


class TestFunction:
    def test_it_is_named_by_where_it_lives(self) -> None:
        spec = build_from_argument(lambda key, pushed, stored: None, True).spec
        assert spec.type == "function"
        assert spec.name.startswith(f"{__name__}:TestFunction")
        assert spec.elementwise

    def test_an_object_that_can_be_called_has_the_name_of_its_class(self) -> None:
        class Scale:
            def __call__(self, key: Any, pushed: torch.Tensor, stored: torch.Tensor) -> None:
                stored += 2 * pushed

        updater = build_from_argument(Scale(), False)
        assert updater.spec.name.endswith("Scale")
        stored = torch.zeros(2)
        assert step(updater, 0, torch.ones(2), stored) is None
        assert stored.tolist() == [2, 2]

    def test_an_optimizer_is_told_where_it_belongs(self) -> None:
        with pytest.raises(
            UnknownUpdater, match="^the updater is an optimizer, SGD; pass it to set_optimizer$"
        ):
            build_from_argument(torch.optim.SGD([torch.zeros(1)]), False)  # type: ignore[arg-type]

    @pytest.mark.parametrize("wrong", [3, torch.optim.SGD, object()])
    def test_what_is_no_function(self, wrong: Any) -> None:
        with pytest.raises(UnknownUpdater):
            build_from_argument(wrong, False)

    def test_one_that_raises_leaves_the_value(self) -> None:
        def half_way(key: Any, pushed: torch.Tensor, stored: torch.Tensor) -> None:
            stored.fill_(99)
            raise ZeroDivisionError("by zero")

        stored = torch.zeros(2)
        failure = step(function(half_way), 3, torch.ones(2), stored)
        assert isinstance(failure, UpdaterError)
        assert isinstance(failure.__cause__, ZeroDivisionError)
        assert "'key 3'" in str(failure)
        assert "in half_way" in str(failure)  # the traceback
        assert "updaters/base.py" not in str(failure)  # what called it is left away
        assert stored.tolist() == [0, 0]

    def test_one_that_has_its_value_track_gradients(self) -> None:
        def descend(key: Any, pushed: torch.Tensor, stored: torch.Tensor) -> None:
            stored.requires_grad_()
            with torch.enable_grad():
                (stored * pushed).sum().backward()
            with torch.no_grad():
                stored.sub_(stored.grad)

        stored = torch.zeros(2)
        for _ in range(2):
            assert step(function(descend), 3, torch.ones(2), stored) is None
        assert stored.tolist() == [-2, -2]
        assert not stored.requires_grad

    @pytest.mark.parametrize("kind", [asyncio.CancelledError, GeneratorExit, MemoryError])
    def test_whatever_it_raises_is_of_its_key(self, kind: type[BaseException]) -> None:
        def raising(key: Any, pushed: torch.Tensor, stored: torch.Tensor) -> None:
            stored.fill_(99)
            raise kind

        stored = torch.zeros(2)
        failure = step(function(raising), 3, torch.ones(2), stored)
        assert isinstance(failure, UpdaterError)
        assert isinstance(failure.__cause__, kind)
        assert stored.tolist() == [0, 0]

    def test_ctrl_c_is_the_programs(self) -> None:
        def interrupted(key: Any, pushed: torch.Tensor, stored: torch.Tensor) -> None:
            stored.fill_(99)
            raise KeyboardInterrupt

        stored = torch.zeros(2)
        with pytest.raises(KeyboardInterrupt):
            step(function(interrupted), 3, torch.ones(2), stored)
        assert stored.tolist() == [0, 0]

    def test_one_that_wants_to_exit_is_one_that_raises(self) -> None:
        def leaving(key: Any, pushed: torch.Tensor, stored: torch.Tensor) -> None:
            sys.exit("I have had enough")

        stored = torch.zeros(2)
        failure = step(function(leaving), 3, torch.ones(2), stored)
        assert isinstance(failure, UpdaterError)
        assert "SystemExit" in str(failure)
        assert "I have had enough" in str(failure)

    @pytest.mark.parametrize("size", [1, 7])
    def test_one_that_resizes_the_value_fails(self, size: int) -> None:
        def resizing(key: Any, pushed: torch.Tensor, stored: torch.Tensor) -> None:
            stored.resize_(size)

        stored = torch.zeros(2)
        failure = step(function(resizing), 3, torch.ones(2), stored)
        assert isinstance(failure, UpdaterError)
        assert f"from (2,) to ({size},)" in str(failure)
        assert stored.tolist() == [0, 0]

    def test_what_it_is_given_is_its_own_to_keep(self) -> None:
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []

        def keep(key: Any, pushed: torch.Tensor, stored: torch.Tensor) -> None:
            stored.add_(pushed)
            kept.append((pushed, stored))

        updater, stored, memory = function(keep), torch.zeros(2), torch.zeros(2)
        for number in (1.0, 10.0):
            assert step(updater, 0, memory.fill_(number), stored) is None
        assert [pushed.tolist() for pushed, _ in kept] == [[1, 1], [10, 10]]
        assert [mine.tolist() for _, mine in kept] == [[1, 1], [11, 11]]
        kept[1][1].zero_()
        assert stored.tolist() == [11, 11]

    @pytest.mark.parametrize(
        "call",
        [
            lambda key, pushed, stored: stored + pushed,
            lambda key, pushed, stored: (stored + pushed).numpy(),
            lambda key, pushed, stored: pushed,
            lambda key, pushed, stored: [stored + pushed],
            lambda key, pushed, stored: 3.0,
        ],
        ids=["tensor", "array", "pushed", "list", "number"],
    )
    def test_one_that_returns_the_new_value_is_told_to_change_it_in_place(self, call: Any) -> None:
        stored = torch.zeros(2)
        failure = step(function(call), 3, torch.ones(2), stored)
        assert isinstance(failure, UpdaterError)
        assert "'key 3'" in str(failure)
        assert "change `stored` in place" in str(failure)
        assert stored.tolist() == [0, 0]

    @pytest.mark.parametrize(
        "call",
        [
            lambda key, pushed, stored: stored.add_(pushed),
            lambda key, pushed, stored: stored.view(-1).add_(pushed),
            lambda key, pushed, stored: stored.add_(pushed).data,
        ],
        ids=["itself", "a view", "its data"],
    )
    def test_one_that_returns_stored_itself_has_changed_it(self, call: Any) -> None:
        stored = torch.zeros(2)
        assert step(function(call), 3, torch.ones(2), stored) is None
        assert stored.tolist() == [1, 1]
