"""SettingSchedule: from which round which setting holds."""

from __future__ import annotations

from typing import Any, NamedTuple

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


def slices(**rounds: int) -> Any:
    """Slices of these keys, by key, which have had so many rounds."""
    default = schedule().newest("a")
    return [Held(index, KEYS[index], rounds[KEYS[index]], default) for index in KEYS if KEYS[index] in rounds]


class Held(NamedTuple):
    slice_id: int
    key: str
    applied: int
    setting: Any


def open_rounds(of: SettingSchedule, **rounds: int) -> tuple[int, list[str]]:
    """Number and names of the updaters of "a", "b" and another key in the open rounds of slices."""
    number, table = of.due_in_open_rounds(slices(**rounds))
    return number, [table.setting(key).updater.spec.name for key in ("a", "b", "c")]


def due(of: SettingSchedule, index: int, round_number: int) -> str | None:
    setting = of.due(index, KEYS[index], round_number)
    return None if setting is None else setting.updater.spec.name


def test_each_slice_waits_for_its_own_round() -> None:
    settings = schedule()
    assert not settings.pending
    make(settings, 0, named("add"), a=3, b=5)
    assert settings.newest("c").updater.spec.name == "add"
    assert [due(settings, 0, n) for n in (1, 2, 3, 4)] == [None, None, "add", None]
    settings.tidy()
    assert settings.pending
    assert due(settings, 1, 6) == "add"
    settings.tidy()
    assert not settings.pending


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
    assert not settings.pending


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


def test_what_holds_in_the_open_rounds() -> None:
    settings = schedule()
    assert open_rounds(settings, a=3, b=3) == (0, ["assign"] * 3)
    make(settings, 0, named("add"), a=4, b=4)
    assert open_rounds(settings, a=2, b=2) == (0, ["assign"] * 3)
    assert open_rounds(settings, a=3, b=3) == (1, ["add"] * 3)
    assert open_rounds(settings, a=3, b=2) == (1, ["add", "assign", "add"])
    assert open_rounds(settings, a=2, b=3) == (1, ["assign", "add", "add"])
    make(settings, 1, named("assign"), a=5, b=6)
    assert open_rounds(settings, a=3, b=3) == (1, ["add"] * 3)
    assert open_rounds(settings, a=2, b=2) == (0, ["assign"] * 3)
    assert open_rounds(settings, a=4, b=4) == (2, ["assign", "add", "assign"])
    assert open_rounds(settings) == (0, ["assign"] * 3)  # no slice is here: another server knows more
    assert [due(settings, 0, n) for n in (4, 5)] == ["add", "assign"]  # nothing has changed


def test_settings_are_counted() -> None:
    settings = schedule()
    make(settings, 0, named("add"), a=4, b=4)
    make(settings, 1, named("add"), a=5, b=5)
    assert settings.number == 2
    settings.install(settings.table())
    assert settings.number == 3
