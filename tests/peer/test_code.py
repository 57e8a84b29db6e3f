"""From a setting to an updater."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tensorkv.errors import NotShippable, UnknownUpdater
from tensorkv.peer.code import CodeTable, describe_code, updater_loader
from tensorkv.updaters.base import Assign
from tensorkv.updaters.functions import CodeRef
from tensorkv.updaters.optimizer import optimizer_spec
from tensorkv.updaters.settings import build_from_argument
from tensorkv.updaters.spec import UpdaterSpec
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


EVIL = [
    CodeRef(module="os", name="system"),
    CodeRef(module="os:system", name="system"),
    CodeRef(module="subprocess", name="Popen"),
    CodeRef(module="builtins", name="eval"),
    CodeRef(module="tripwire", name="SGD"),
    CodeRef(module="torch.optim:../tripwire", name="SGD"),
    CodeRef(module="torch.optim/../tripwire", name="SGD"),
    CodeRef(module="torch.optim.sgd:tripwire", name="SGD"),
    CodeRef(module="torch.optim.sgd", name="os:system"),
    CodeRef(module="torch.optim.sgd", name="os.system"),
    CodeRef(module="torch.optim.sgd", name="tripwire"),
    CodeRef(module="torch.optim.tripwire", name="SGD"),
    CodeRef(module="torch.optim", name="SGD", adapter="tripwire:SGD"),
    CodeRef(module="torch.optim", name="SGD", adapter="os:system"),
    CodeRef(module="<this process>", name="_0"),
    CodeRef(module="<this process>", name="_x"),
    CodeRef(module="<this process>", name="x" * 10),
    CodeRef(module="<this process>", name="_" + "9" * 30),
    None,
]


@pytest.mark.parametrize("ref", EVIL, ids=lambda ref: ref and f"{ref.module}-{ref.name}-{ref.adapter}")
@pytest.mark.parametrize("kind", ["function", "optimizer"])
@pytest.mark.parametrize("table", [None, CodeTable()])
def test_nothing_is_imported_or_run_for_a_name_that_is_not_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ref: Any, kind: Any, table: CodeTable | None
) -> None:
    """A module lies in wait that leaves a trace when it is imported. The spec's name is not looked at."""
    (tmp_path / "tripwire.py").write_text("open(__file__ + '.was-run', 'w').close()\nSGD = print\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    load = updater_loader((), table)
    record = SettingRecord(None, UpdaterSpec(type=kind, name="os:system", options={"lr": 1}), ref)
    before = set(sys.modules)
    with pytest.raises(NotShippable):
        load(record)
    assert {name for name in set(sys.modules) - before if not name.startswith("torch")} == set()
    assert "tripwire" not in sys.modules
    assert [each.name for each in tmp_path.iterdir()] == ["tripwire.py"]


@pytest.mark.parametrize("name", ["os:system", "subprocess:Popen", "builtins:eval", "sgd", "torch.optim:SGD"])
def test_a_named_updater_is_one_of_a_table(name: str) -> None:
    record = SettingRecord(None, UpdaterSpec(type="named", name=name))
    with pytest.raises(UnknownUpdater):
        updater_loader(())(record)


def test_a_class_that_is_no_optimizer_is_never_called() -> None:
    for ref in (
        CodeRef(module="tensorkv.server.loop", name="Server"),
        CodeRef(module="tensorkv.config", name="from_env"),
        CodeRef(module="torch.optim", name="Optimizer"),
    ):
        record = SettingRecord(None, UpdaterSpec(type="optimizer", name="x"), ref)
        with pytest.raises(UnknownUpdater, match="is not an optimizer"):
            updater_loader(())(record)
