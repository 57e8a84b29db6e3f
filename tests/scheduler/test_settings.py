"""SettingLog: what is remembered of settings, and what of a forgotten one. More in test_catalog.py."""

from __future__ import annotations

import pytest

from tensorkv.errors import SettingMismatch
from tensorkv.scheduler.settings import SettingLog
from tensorkv.updaters.spec import UpdaterSpec
from tensorkv.wire.messages import SettingRecord


def option(lr: float) -> SettingRecord:
    spec = UpdaterSpec(type="optimizer", name="SGD", options={"lr": lr}, elementwise=True)
    return SettingRecord(None, updater=spec)


def function(elementwise: bool, *keys: str) -> SettingRecord:
    spec = UpdaterSpec(type="function", name="f", elementwise=elementwise)
    return SettingRecord(keys or None, updater=spec)


def make(log: SettingLog, record: SettingRecord, error: tuple[str, str] | None = None) -> None:
    """Let rank 0 make a setting in a store of its own: it is forgotten as soon as it is concluded."""
    log.conclude(0, log.begin(0, record), error, {0})
    assert not log._kept


def test_a_forgotten_updater_still_tells_which_keys_stay_whole() -> None:
    log = SettingLog()
    assert log.is_elementwise("a")
    make(log, function(False, "a"))
    assert (log.is_elementwise("a"), log.is_elementwise("b")) == (False, True)
    make(log, function(False))
    make(log, function(True, "b"))
    make(log, function(True), ("UnknownUpdater", "no"))
    assert (log.is_elementwise("a"), log.is_elementwise("b")) == (False, True)
    log.begin(0, function(True))
    assert log.is_elementwise("a")
    log.leave(0, {1})
    assert not log.is_elementwise("a")


def test_settings_under_way_are_kept_however_many_and_in_order() -> None:
    log = SettingLog()
    first, second = log.begin(0, option(1.0)), log.begin(0, option(2.0))
    log.conclude(0, second, None, {0})
    assert len(log._kept) == 2
    log.conclude(0, first, None, {0})
    assert (len(log._kept), log.num_begun, log.num_made(0)) == (0, 2, 2)


def test_all_settings_under_way_of_who_leaves_are_withdrawn() -> None:
    log = SettingLog()
    log.begin(0, option(1.0))
    log.begin(0, option(2.0))
    log.leave(0, {1})
    assert log.num_begun == 0


def test_after_a_load_everybody_counts_on_from_there() -> None:
    log = SettingLog()
    log.conclude(0, log.begin(0, option(1.0)), None, {0, 1})
    with pytest.raises(SettingMismatch, match="number 1 of rank 1 is updater 'SGD' with {'lr': 2.0} for"):
        log.match(1, option(2.0))
    late = log.begin(0, option(3.0))
    log.replace([function(False), function(True, "w")], 2)
    assert log.num_made(0) == log.num_made(1) == log.num_begun == 2
    assert (log.is_elementwise("w"), log.is_elementwise("v")) == (True, False)
    log.conclude(0, late, None, {0, 1})  # it was replaced, too
    assert log.begin(1, option(4.0)) == 2
