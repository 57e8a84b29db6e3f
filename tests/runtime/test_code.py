"""From a setting to an updater."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from tensorkv.errors import NotShippable
from tensorkv.runtime.code import CodeTable, describe_code, updater_loader
from tensorkv.updater import Assign, build_from_argument, optimizer_spec
from tensorkv.wire.messages import SettingRecord


def double(key: Any, pushed: torch.Tensor, stored: torch.Tensor) -> None:
    stored.copy_(2 * pushed)


def record(updater: Any, table: CodeTable | None) -> SettingRecord:
    built = build_from_argument(updater, False)
    code = None if built.spec.type == "named" else describe_code(updater, table)
    return SettingRecord(keys=None, updater=built.spec, code=code)


def test_a_named_updater_needs_no_code() -> None:
    assert isinstance(updater_loader(())(record("assign", None)), Assign)


def test_any_function_of_this_process() -> None:
    table = CodeTable()
    load = updater_loader((), table)
    seen: list[Any] = []
    updater = load(record(lambda key, pushed, stored: seen.append(key), table))
    assert updater.spec.type != "named"
    closure = partial(double)
    assert describe_code(closure, table) == describe_code(closure, table)
    assert table.find(describe_code(closure, table)) is closure
    assert table.find(describe_code(double, table)) is double
    assert describe_code(double, table) != describe_code(closure, table)


def test_functions_of_other_processes_are_found_by_name_or_not_at_all() -> None:
    with pytest.raises(NotShippable):
        describe_code(lambda key, pushed, stored: None, None)
    spec = record("assign", None)
    assert spec.updater is not None
    table = CodeTable()
    foreign = SettingRecord(keys=None, updater=record(double, table).updater, code=None)
    with pytest.raises(NotShippable, match="came without saying where its code is"):
        updater_loader(())(foreign)


def test_an_optimizer_of_torch_may_always_be_imported() -> None:
    spec = optimizer_spec(torch.optim.SGD, {"lr": 0.5})
    setting = SettingRecord(keys=None, updater=spec, code=describe_code(torch.optim.SGD, None))
    assert updater_loader(())(setting).spec == spec


def test_code_of_a_table_means_nothing_elsewhere() -> None:
    setting = record(double, CodeTable())
    with pytest.raises(NotShippable):
        updater_loader(())(setting)
