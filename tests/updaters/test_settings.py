"""Which updater holds for which key, with which options; and what a save has of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tensorkv.checkpoint.records import SavedSettings, SettingEntry
from tensorkv.errors import InvalidOption, LoadError, UpdaterError
from tensorkv.updaters.base import FunctionUpdater, Update, Updater, named_spec
from tensorkv.updaters.optimizer import OptimizerUpdater, find_optimizer, optimizer_spec
from tensorkv.updaters.settings import Setting, SettingsTable, apply_all, build, restored_settings
from tensorkv.updaters.spec import UpdaterSpec


def optimizer(name: str, **options: Any) -> OptimizerUpdater:
    cls = find_optimizer(name)
    updater = build(optimizer_spec(cls, options), cls)
    assert isinstance(updater, OptimizerUpdater)
    return updater


def step(updater: Updater, slot: int, pushed: torch.Tensor, stored: torch.Tensor, **options: Any) -> Any:
    return updater.apply([Update(slot, f"key {slot}", pushed, stored)], options)[0]


def function(call: Any) -> Updater:
    return build(UpdaterSpec(type="function", name="tests:call", elementwise=False), call)


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


def test_an_optimizer_that_torch_does_not_have_is_not_awaited() -> None:
    for name, awaited in (("torch.optim.adam:Nope", False), ("mine:Nope", True)):
        spec = UpdaterSpec(type="optimizer", name=name)
        saved = SavedSettings([spec], [SettingEntry(None, 0, {}, None)])
        if awaited:
            restored_settings(saved, SettingsTable())
        else:
            with pytest.raises(LoadError, match="Nope"):
                restored_settings(saved, SettingsTable())
