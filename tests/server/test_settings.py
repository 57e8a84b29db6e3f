"""SettingSchedule: from which round which setting holds."""

from __future__ import annotations

from typing import Any

import pytest

from tensorkv.errors import ProtocolError, UnknownUpdater
from tensorkv.server.settings import SettingSchedule
from tensorkv.updaters.settings import build
from tensorkv.updaters.spec import UpdaterSpec
from tensorkv.wire.messages import SettingRecord

KEYS: dict[int, Any] = {0: "a", 1: "b"}


def schedule() -> SettingSchedule:
    return SettingSchedule(lambda record: build(record.updater))  # type: ignore[arg-type]


def named(name: str, *keys: str) -> SettingRecord:
    return SettingRecord(keys or None, updater=UpdaterSpec(type="named", name=name))


def make(to: SettingSchedule, number: int, record: SettingRecord, **rounds: int) -> None:
    to.prepare(number, record)
    to.activate(number, {index: rounds[key] for index, key in KEYS.items()}, KEYS)


def due(of: SettingSchedule, index: int, round_number: int) -> str | None:
    setting = of.due(index, KEYS[index], round_number)
    return None if setting is None else setting.updater.spec.name


def test_each_slice_waits_for_its_own_round() -> None:
    settings = schedule()
    assert not settings.has_pending
    make(settings, 0, named("add"), a=3, b=5)
    assert settings.newest("c").updater.spec.name == "add"
    assert [due(settings, 0, n) for n in (1, 2, 3, 4)] == [None, None, "add", None]
    settings.tidy()
    assert settings.has_pending
    assert due(settings, 1, 6) == "add"
    settings.tidy()
    assert not settings.has_pending


def test_the_last_one_made_wins() -> None:
    settings = schedule()
    make(settings, 0, named("add"), a=2, b=2)
    make(settings, 1, named("assign"), a=2, b=3)
    assert due(settings, 0, 2) == "assign"
    assert [due(settings, 1, n) for n in (2, 3)] == ["add", "assign"]


def test_an_earlier_setting_is_overtaken() -> None:
    settings = schedule()
    make(settings, 0, named("add"), a=9, b=9)
    make(settings, 1, named("assign"), a=2, b=2)
    assert [due(settings, 0, n) for n in (2, 9)] == ["assign", None]


def test_a_setting_for_one_key_does_not_concern_another() -> None:
    settings = schedule()
    make(settings, 0, named("add", "b"), a=1, b=4)
    assert due(settings, 0, 9) is None
    assert due(settings, 1, 4) == "add"


def test_a_deleted_slice_waits_no_more() -> None:
    settings = schedule()
    make(settings, 0, named("add"), a=9, b=9)
    for index in KEYS:
        settings.forget(index)
    settings.tidy()
    assert not settings.has_pending


def test_only_what_was_prepared_can_be_activated() -> None:
    settings = schedule()
    with pytest.raises(ProtocolError, match="setting 0"):
        settings.activate(0, {}, {})
    settings.prepare(0, named("add"))
    with pytest.raises(UnknownUpdater):
        settings.prepare(1, named("no such"))
    settings.prepare(1, named("add"))  # another rank's, after the first has left
    with pytest.raises(ProtocolError, match="setting 0"):
        settings.activate(0, {}, {})
    assert settings.newest("a").updater.spec.name == "assign"
    settings.activate(1, {}, {})
    with pytest.raises(ProtocolError, match="setting 1"):
        settings.activate(1, {}, {})
