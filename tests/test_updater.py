"""Updaters: named ones, functions, torch's optimizers; and which of them holds for a key."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from tensorkv.errors import (
    InvalidOption,
    InvalidValue,
    LoadError,
    UnknownUpdater,
    UnsupportedOptimizer,
    UpdaterError,
)
from tensorkv.savedstate import VALUE, KeyRecord, PieceRecord, SavedSettings, SettingEntry, TensorRecord
from tensorkv.updater import (
    ELEMENTWISE_OPTIMIZERS,
    FunctionUpdater,
    OptimizerUpdater,
    Setting,
    SettingsTable,
    Update,
    Updater,
    apply_all,
    build,
    build_from_argument,
    check_state_names,
    find_optimizer,
    make_optimizer,
    named_spec,
    optimizer_spec,
    restored_settings,
)
from tensorkv.updaterspec import UpdaterSpec

OPTIONS: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}}


def optimizer(name: str, **options: Any) -> OptimizerUpdater:
    cls = find_optimizer(name)
    updater = build(optimizer_spec(cls, options), cls)
    assert isinstance(updater, OptimizerUpdater)
    return updater


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


@pytest.mark.parametrize("cls", sorted(ELEMENTWISE_OPTIMIZERS, key=str))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_optimizer_does_what_torch_does(cls: type[torch.optim.Optimizer], dtype: torch.dtype) -> None:
    options = OPTIONS.get(cls.__name__.lower(), {})
    updater = build(optimizer_spec(cls, options), cls)
    start = [torch.randn(4, 3, dtype=dtype), torch.randn((), dtype=dtype), torch.zeros(0, dtype=dtype)]
    expected = [torch.nn.Parameter(each.clone()) for each in start]
    reference = cls(expected, **options)
    for _ in range(5):
        grads = [torch.randn_like(each) for each in start]
        for parameter, grad in zip(expected, grads, strict=True):
            parameter.grad = grad.clone()
        reference.step()
        updates = [
            Update(i, i, grad.clone(), each) for i, (grad, each) in enumerate(zip(grads, start, strict=True))
        ]
        assert updater.apply(updates, options) == [None] * 3
    for each, parameter in zip(start, expected, strict=True):
        torch.testing.assert_close(each, parameter.detach(), rtol=1e-6, atol=1e-7)


class TestOptimizer:
    @pytest.mark.parametrize("name", ["sgd", "SGD", "AdamW", "rmsprop"])
    def test_names_in_any_case(self, name: str) -> None:
        assert find_optimizer(name).__name__.lower() == name.lower()

    def test_state_that_is_made_when_the_optimizer_is_built(self) -> None:
        """As torch's Adagrad does it; before torch 2.13 it knew no other way."""

        class Counting(torch.optim.SGD):
            def __init__(self, params: Any, lr: float, first: float = 1.0) -> None:
                super().__init__(params, lr=lr)
                for parameter in self.param_groups[0]["params"]:
                    self.state[parameter]["factor"] = torch.full_like(parameter, first)

            def step(self, closure: Any = None) -> None:
                for parameter in self.param_groups[0]["params"]:
                    parameter.sub_(parameter.grad * self.state[parameter]["factor"])
                    self.state[parameter]["factor"] += 1

        updater = build(optimizer_spec(Counting, {"lr": 0.5, "first": 10.0}), Counting)
        values = [torch.zeros(2), torch.zeros(3)]
        for _ in range(2):
            updates = [Update(i, i, torch.ones_like(each), each) for i, each in enumerate(values)]
            assert updater.apply(updates, {"lr": 0.5}) == [None, None]
        assert [each.tolist() for each in values] == [[-21.0] * 2, [-21.0] * 3]

    def test_a_class_is_taken_as_it_is(self) -> None:
        class Mine(torch.optim.SGD):
            pass

        assert find_optimizer(Mine) is Mine
        assert not optimizer_spec(Mine, {}).elementwise

    @pytest.mark.parametrize("wrong", ["sgdd", "optimizer", torch.optim.Optimizer, torch.nn.Linear, 3])
    def test_what_is_no_optimizer(self, wrong: Any) -> None:
        with pytest.raises(UnknownUpdater):
            find_optimizer(wrong)

    def test_an_object_made_from_a_class_is_none(self) -> None:
        made: Any = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
        with pytest.raises(UnknownUpdater, match="not an object"):
            find_optimizer(made)

    @pytest.mark.parametrize("name", ["lbfgs", "SparseAdam"])
    def test_those_a_store_cannot_run(self, name: str) -> None:
        with pytest.raises(UnsupportedOptimizer):
            find_optimizer(name)

    @pytest.mark.parametrize(
        "options",
        [
            {"lr": -1.0},
            {"speed": 3},
            {"lr": "fast"},
            {"lr": torch.tensor(0.1)},
            {"momentum": [0.9, object()]},
        ],
        ids=["range", "unknown", "type", "tensor", "object"],
    )
    def test_refused_options(self, options: dict[str, Any]) -> None:
        with pytest.raises(InvalidOption, match="SGD"):
            optimizer_spec(torch.optim.SGD, options)

    def test_lists_become_tuples(self) -> None:
        assert step(optimizer("adam", betas=[0.8, 0.9]), 0, torch.ones(2), torch.ones(2)) is None

    def test_slots_with_and_without_momentum_go_in_one_call(self) -> None:
        updater, values = optimizer("sgd", lr=1.0, momentum=0.5), [torch.zeros(2), torch.zeros(2)]
        options = {"lr": 1.0, "momentum": 0.5}
        step(updater, 0, torch.ones(2), values[0], **options)
        both = [Update(i, i, torch.ones(2), values[i]) for i in (1, 0)]
        assert updater.apply(both, options) == [None, None]
        assert values[0].tolist() == [-2.5, -2.5]
        assert values[1].tolist() == [-1, -1]

    def test_options_of_the_call_win(self) -> None:
        updater, stored = optimizer("sgd", lr=1.0), torch.zeros(1)
        step(updater, 0, torch.ones(1), stored, lr=0.25)
        assert stored.item() == -0.25

    def test_foreach_may_be_asked_for(self) -> None:
        updater, stored = optimizer("adam", lr=0.1), torch.zeros(3)
        assert step(updater, 0, torch.ones(3), stored, lr=0.1, foreach=True) is None
        assert stored[0].item() == pytest.approx(-0.1)

    def test_forgetting_starts_afresh(self) -> None:
        updater, stored = optimizer("sgd", lr=1.0, momentum=0.5), torch.zeros(1)
        options = {"lr": 1.0, "momentum": 0.5}
        step(updater, 0, torch.ones(1), stored, **options)
        updater.forget(0)
        updater.forget(17)  # one without state
        step(updater, 0, torch.ones(1), stored, **options)
        assert stored.item() == -2

    def test_a_value_may_move(self) -> None:
        updater, stored = optimizer("sgd", lr=1.0, momentum=0.5), torch.zeros(1)
        options = {"lr": 1.0, "momentum": 0.5}
        step(updater, 0, torch.ones(1), stored, **options)
        moved = stored.clone()
        step(updater, 0, torch.ones(1), moved, **options)
        assert (stored.item(), moved.item()) == (-1, -2.5)

    def test_one_off_the_list_runs_on_a_copy(self) -> None:
        class Moody(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                super().step()
                if self.param_groups[0]["params"][0].grad.sum() < 0:
                    raise RuntimeError("not in the mood")

        updater = build(optimizer_spec(Moody, {"lr": 1.0, "momentum": 0.5}), Moody)
        options, stored = {"lr": 1.0, "momentum": 0.5}, torch.zeros(1)
        assert step(updater, 0, torch.ones(1), stored, **options) is None
        failure = step(updater, 0, -torch.ones(1), stored, **options)
        assert isinstance(failure, UpdaterError)
        assert stored.item() == -1
        assert step(updater, 0, torch.ones(1), stored, **options) is None
        assert stored.item() == -2.5  # momentum as if the failed step had not been

    def test_what_it_raises_is_reported_for_each_slot(self) -> None:
        updater, stored = optimizer("adam"), [torch.ones(2), torch.ones(2)]
        updates = [Update(i, i, torch.ones(2), stored[i]) for i in range(2)]
        updater.apply(updates, {})
        failures = updater.apply(updates, {"amsgrad": True, "foreach": False})  # it has no such state
        assert [type(failure) for failure in failures] == [UpdaterError, UpdaterError]

    def test_an_integer_value_fails_alone(self) -> None:
        updater = optimizer("sgd", lr=0.5)
        floats, ints = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
        updates = [Update(0, "i", ints + 1, ints), Update(1, "f", floats + 1, floats)]
        failures = updater.apply(updates, {"lr": 0.5})
        assert isinstance(failures[0], UpdaterError)
        assert failures[1] is None
        assert (ints.item(), floats.item()) == (0, -0.5)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_the_company_of_others_does_not_change_how_a_slot_is_rounded(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(1)
        value, pushed = torch.randn(2, 200, generator=generator).to(dtype)
        options = {"lr": 0.25, "momentum": 0.5}
        alone, beside = value.clone(), value.clone()
        step(optimizer("sgd", **options), 0, pushed.clone(), alone, **options)
        other = torch.ones(3, dtype=torch.complex64)
        updates = [Update(0, "c", other.clone(), other), Update(1, "w", pushed.clone(), beside)]
        assert optimizer("sgd", **options).apply(updates, options) == [None, None]
        assert torch.equal(alone, beside)
        assert other.tolist() == [0.75] * 3

    @pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
    def test_muon_takes_matrices_only(self) -> None:
        updater = optimizer("muon")
        updater.check_value("m", (3, 4), torch.float32)
        with pytest.raises(InvalidValue, match=r"'v' of shape \(3,\).*keys="):
            updater.check_value("v", (3,), torch.float32)


class TestSettingsTable:
    def test_assign_holds_at_first(self) -> None:
        assert SettingsTable().setting("w").updater.spec.name == "assign"

    def test_the_last_one_that_names_a_key_holds(self) -> None:
        table, sgd, adam = SettingsTable(), optimizer("sgd"), optimizer("adam")
        table.set_updater(sgd, None)
        table.set_updater(adam, ("w",))
        assert table.setting("w").updater is adam
        assert table.setting("b").updater is sgd
        table.set_updater(sgd, None)
        assert table.setting("w").updater is sgd

    def test_an_equal_updater_is_kept(self) -> None:
        table, first = SettingsTable(), optimizer("sgd", lr=0.1)
        table.set_updater(first, None)
        table.set_updater(optimizer("sgd", lr=0.1), None)
        assert table.setting("w").updater is first
        table.set_updater(optimizer("sgd", lr=0.2), None)
        assert table.setting("w").updater is not first

    def test_what_holds_already_or_was_asked_last_keeps_its_updater(self) -> None:
        table, first = SettingsTable(), optimizer("sgd", lr=0.1)
        table.set_updater(first, None)
        table.set_options({"lr": 0.01}, None)
        table.set_updater(optimizer("sgd", lr=0.01), None)
        assert table.setting("w").updater is first
        table.set_options({"lr": 0.001}, None)
        table.set_updater(optimizer("sgd", lr=0.01), None)
        assert (table.setting("w").updater, table.setting("w").options) == (first, {"lr": 0.01})
        table.set_updater(optimizer("sgd", lr=0.1), None)  # neither
        assert table.setting("w").updater is not first

    def test_a_kept_updater_forgets_the_options_of_earlier_calls(self) -> None:
        table, first = SettingsTable(), optimizer("sgd", lr=1.0, momentum=0.5)
        table.set_updater(first, None)
        table.set_options({"momentum": 0.0}, None)
        for _ in range(2):
            table.set_updater(optimizer("sgd", lr=1.0), None)
            assert table.setting("w").updater is first
            assert table.setting("w").options == {"lr": 1.0, "momentum": 0}
            table.set_options({"momentum": 0.25}, None)

    def test_each_key_is_asked_for_itself(self) -> None:
        table, first = SettingsTable(), optimizer("sgd", lr=0.1)
        table.set_updater(first, None)
        table.set_options({"lr": 0.01}, ("w",))
        table.set_updater(optimizer("sgd", lr=0.01), None)
        assert table.setting("w").updater is first
        assert table.setting("b").updater is not first
        table.set_updater(optimizer("adam"), ("w",))
        table.set_updater(optimizer("sgd", lr=0.01), ("w",))
        assert table.setting("w").updater not in (first, table.setting("b").updater)

    def test_lists_and_tuples_are_the_same_option(self) -> None:
        table, first = SettingsTable(), optimizer("adam", betas=(0.8, 0.9))
        table.set_updater(first, None)
        table.set_updater(optimizer("adam", betas=[0.8, 0.9]), None)
        assert table.setting("w").updater is first

    def test_an_option_that_is_no_default_counts(self) -> None:
        class Scaled(torch.optim.SGD):
            def __init__(self, params: Any, scale: float = 1.0) -> None:
                super().__init__(params, lr=scale)
                self.scale = scale

        table = SettingsTable()
        for scale, kept in ((1.0, False), (1.0, True), (2.0, False)):
            before = table.setting("w").updater
            table.set_updater(build(optimizer_spec(Scaled, {"scale": scale}), Scaled), None)
            assert (table.setting("w").updater is before) is kept

    def test_functions_are_equal_if_they_are_the_same(self) -> None:
        table = SettingsTable()

        def call(key: Any, pushed: torch.Tensor, stored: torch.Tensor) -> None:
            stored += pushed

        first, again, other = function(call), function(call), function(lambda key, pushed, stored: None)
        table.set_updater(first, None)
        table.set_updater(again, None)
        assert table.setting("w").updater is first
        table.set_updater(other, None)
        held = table.setting("w").updater
        assert isinstance(held, FunctionUpdater)
        assert held is other

    def test_options_for_all_and_for_some(self) -> None:
        table = SettingsTable()
        table.set_updater(optimizer("sgd", lr=0.1), None)
        table.set_options({"lr": 0.5}, ("w",))
        assert table.setting("w").options["lr"] == 0.5
        assert table.setting("b").options["lr"] == 0.1
        table.set_options({"lr": 0.7}, None)
        assert table.setting("w").options["lr"] == table.setting("b").options["lr"] == 0.7
        assert table.setting("w").updater is table.setting("b").updater

    @pytest.mark.parametrize("options", [{"speed": 1}, {"lr": -1.0}])
    def test_refused_options_change_nothing(self, options: dict[str, Any]) -> None:
        table = SettingsTable()
        table.set_updater(optimizer("sgd", lr=0.1), None)
        with pytest.raises(InvalidOption):
            table.set_options({**options}, None)
        assert table.setting("w").options == {"lr": 0.1}

    def test_options_need_an_optimizer(self) -> None:
        table = SettingsTable()
        with pytest.raises(InvalidOption, match="set_optimizer first"):
            table.set_options({"lr": 1.0}, None)
        table.set_updater(optimizer("sgd"), ("w",))
        with pytest.raises(InvalidOption):
            table.set_options({"lr": 1.0}, ("w", "b"))
        table.set_options({"lr": 1.0}, None)  # for those that have one

    def test_a_copy_is_on_its_own(self) -> None:
        table = SettingsTable()
        other = table.copy()
        other.set_updater(optimizer("sgd"), ("w",))
        assert table.setting("w").updater.spec.name == "assign"
        assert other.setting("w").updater.spec.type == "optimizer"


def test_apply_all_gives_each_update_its_own_answer() -> None:
    def refuse(key: Any, pushed: torch.Tensor, stored: torch.Tensor) -> None:
        raise ValueError(f"no {key}")

    good, bad = Setting(build(named_spec("add"))), Setting(function(refuse))
    values = [torch.zeros(1) for _ in range(4)]
    settings = [good, bad, good, bad]
    updates = [(setting, Update(i, i, torch.ones(1), values[i])) for i, setting in enumerate(settings)]
    failures = apply_all(updates)
    assert [failure is None for failure in failures] == [True, False, True, False]
    assert "no 3" in str(failures[3])
    assert [value.item() for value in values] == [1, 0, 1, 0]


@pytest.mark.parametrize("betas", [(0.9,), (), 0.5, "ab"])
def test_whatever_an_optimizer_raises_at_its_options_is_an_invalid_option(betas: Any) -> None:
    """Adam looks at betas[1] before it looks at how many there are."""
    with pytest.raises(InvalidOption, match="Adam refuses"):
        make_optimizer(torch.optim.Adam, [torch.nn.Parameter(torch.zeros(2))], {"betas": betas})


class TestSavedSettings:
    def test_a_table_comes_back_with_its_options_and_calls(self) -> None:
        table = SettingsTable()
        table.set_updater(optimizer("sgd", lr=0.1, momentum=0.5), None)
        table.set_options({"lr": 0.2}, ("w",))
        table.set_updater(optimizer("adam", betas=(0.5, 0.75)), ("a", "b"))
        saved = table.describe()
        assert [spec.name.rpartition(":")[2] for spec in saved.updaters] == ["SGD", "Adam"]
        assert [entry.keys for entry in saved.entries] == [None, ("w",), ("a", "b")]
        back = restored_settings(saved, SettingsTable())
        assert back.describe() == saved
        assert back.setting("w").updater is back.setting("other").updater
        assert back.setting("w").options == {"lr": 0.2, "momentum": 0.5}
        kept = back.setting("a").updater
        back.set_updater(optimizer("adam", betas=[0.5, 0.75]), ("a",))  # as it comes when it has travelled
        assert back.setting("a").updater is kept

    def test_options_that_are_refused(self) -> None:
        table = SettingsTable()
        table.set_updater(optimizer("sgd", lr=0.1), None)
        (entry,) = table.describe().entries
        bad = SavedSettings(table.describe().updaters, [SettingEntry(None, 0, {"lr": -1.0}, entry.asked)])
        with pytest.raises(LoadError, match="SGD"):
            restored_settings(bad, SettingsTable())

    def test_state_goes_on_bit_for_bit(self) -> None:
        def step(updater: OptimizerUpdater, slot: int, value: torch.Tensor) -> None:
            (failure,) = updater.apply([Update(slot, "w", torch.ones(4), value)], {"lr": 0.1})
            assert failure is None

        first, value = optimizer("adam", lr=0.1), torch.arange(4.0)
        step(first, 1, value)
        state = {name: each.clone() for name, each in first.state(1).items()}
        second, copied = optimizer("adam", lr=0.1), value.clone()
        second.restore(7, state)
        assert second.state(7) is state
        step(first, 1, value)
        step(second, 7, copied)
        assert torch.equal(value, copied)
        assert float(second.state(7)["step"]) == 2
        second.restore(7, {})
        assert second.state(7) == {}
        assert second.state(8) == {}

    def test_what_is_awaited_refuses_and_keeps_its_state(self) -> None:
        class Mine(torch.optim.SGD):
            pass

        made = build(optimizer_spec(Mine, {"lr": 1.0, "momentum": 0.5}), Mine)
        table = SettingsTable()
        table.set_updater(made, None)
        back = restored_settings(table.describe(), SettingsTable())
        awaited = back.setting("w").updater
        awaited.restore(3, {"momentum_buffer": torch.ones(2)})
        (failure,) = awaited.apply([Update(3, "w", torch.ones(2), torch.zeros(2))], {})
        assert isinstance(failure, UpdaterError)
        assert "set_optimizer" in str(failure)
        back.set_updater(build(optimizer_spec(Mine, {"lr": 1.0, "momentum": 0.5}), Mine), None)
        value = torch.zeros(2)
        setting = back.setting("w")
        assert setting.updater.apply([Update(3, "w", torch.ones(2), value)], setting.options) == [None]
        assert value.tolist() == [-1.5, -1.5]
        assert restored_settings(table.describe(), table).setting("w").updater.spec == made.spec

    def test_an_updater_without_state_is_given_none(self) -> None:
        build(named_spec("add")).restore(1, {})
        with pytest.raises(LoadError, match="'add' keeps no state"):
            build(named_spec("add")).restore(1, {"step": 1})


@pytest.mark.parametrize(
    "optimizer_class",
    sorted(ELEMENTWISE_OPTIMIZERS, key=lambda each: each.__name__),
    ids=lambda each: each.__name__,
)
def test_state_of_another_optimizer_is_not_loaded(optimizer_class: type[torch.optim.Optimizer]) -> None:
    """What an optimizer has kept is taken, or nothing at all; what it would miss or not know is not."""
    spec = optimizer_spec(optimizer_class, {})
    updater = build(spec, optimizer_class)
    assert updater.apply([Update(0, "w", torch.ones(2), torch.zeros(2))], {"momentum": 0.5}) == [None]
    settings = SavedSettings([spec], [SettingEntry(None, 0, {}, None)])

    def check(names: set[str]) -> None:
        tensors = [TensorRecord(name, "float32", (2,), True) for name in (VALUE, *sorted(names))]
        check_state_names(
            settings, [KeyRecord("w", (2,), "float32", False, [PieceRecord(0, 2, 1, tensors)])], "it"
        )

    names = set(updater.state(0))
    check(names)
    check(set())
    for other in ({*names, "x"}, {"x"}, {*list(names)[1:], "x"}):
        with pytest.raises(LoadError, match=f"'w'.*'x'.*{optimizer_class.__name__}"):
            check(other)
    if optimizer_class is not torch.optim.SGD:
        with pytest.raises(LoadError, match="'w'"):
            check(names - {"step"})


def test_an_optimizer_that_torch_does_not_have_is_not_awaited() -> None:
    for name, awaited in (("torch.optim.adam:Nope", False), ("mine:Nope", True)):
        spec = UpdaterSpec(type="optimizer", name=name)
        saved = SavedSettings([spec], [SettingEntry(None, 0, {}, None)])
        if awaited:
            restored_settings(saved, SettingsTable())
        else:
            with pytest.raises(LoadError, match="Nope"):
                restored_settings(saved, SettingsTable())
