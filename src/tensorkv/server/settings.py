"""The settings of one store on one server, and from which round each holds.

In sync mode a setting holds, for every key, from the first round that the setting rank pushes after the
call. Setting and pushes arrive in order on one connection, so that round is known when the setting arrives,
and is the same for every order of arrival. In async mode a setting holds at once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from tensorkv.checkpoint.records import SavedSettings, check_settings
from tensorkv.errors import ProtocolError
from tensorkv.peer.code import LoadUpdater
from tensorkv.plain import Key
from tensorkv.updaters.base import Updater
from tensorkv.updaters.functions import CodeRef
from tensorkv.updaters.settings import Setting, SettingsTable, build_saved
from tensorkv.updaters.spec import UpdaterSpec
from tensorkv.wire.messages import SettingRecord

if TYPE_CHECKING:
    from tensorkv.server.layouts import Slice


@final
@dataclass(slots=True)
class _Pending:
    number: int
    before: SettingsTable
    table: SettingsTable
    from_round: dict[int, int]  # by slice id; the slices in here wait for their round


@final
class SettingSchedule:
    """The newest settings, and those that wait for their round.

    `number` counts the settings that were made: all servers get them in the same order.
    """

    def __init__(self, load: LoadUpdater) -> None:
        self.number = 0
        self._load = load
        self._latest = SettingsTable()
        self._prepared: dict[int, tuple[SettingsTable, tuple[Key, ...] | None]] = {}
        self.pending: list[_Pending] = []  # settings that wait for their round
        self._restored: SettingsTable | None = None

    def prepare(self, number: int, record: SettingRecord) -> None:
        """Load what a setting needs and apply it to a copy of the newest settings.

        Raises what the loader raises, or InvalidOption; nothing has changed then.
        """
        table = self._latest.copy()
        table.set_updater(self._load(record), record.keys)
        self._prepared = {number: (table, record.keys)}

    def keys_of(self, number: int) -> tuple[Key, ...] | None:
        """Return the keys that a prepared setting is for, None if it is for all, or not prepared."""
        return self._prepared[number][1] if number in self._prepared else None

    def prepared(self, number: int, key: Key) -> Setting:
        """Return what will hold for `key` once this prepared setting is activated."""
        return self._prepared[number][0].setting(key)

    def activate(self, number: int, from_round: dict[int, int], keys: dict[int, Key]) -> None:
        """Make the prepared setting the newest; the slices that it is for get it from these rounds on.

        Args:
            number: number of the setting.
            from_round: first round of each slice that it may be for, by slice id.
            keys: key of each slice, by slice id.

        Raises:
            ProtocolError: it was not prepared.
        """
        if number not in self._prepared:
            raise ProtocolError(f"setting {number} was activated but not prepared")
        self.replace(self._prepared.pop(number)[0], from_round, keys)

    def replace(self, table: SettingsTable, from_round: dict[int, int], keys: dict[int, Key]) -> None:
        """Make these settings the newest; the slices for which they change get theirs from these rounds on.

        Args:
            table: the settings.
            from_round: first round of each slice that may be concerned, by slice id; none for those that
                have their setting already.
            keys: key of each slice, by slice id.
        """
        before, self._latest = self._latest, table
        self.number += 1
        changed = {
            slice_id: first
            for slice_id, first in from_round.items()
            if self._latest.setting(keys[slice_id]) is not before.setting(keys[slice_id])
        }
        if changed:
            self.pending.append(_Pending(self.number, before, table, changed))

    def table(self) -> SettingsTable:
        """Return the newest settings."""
        return self._latest

    def prepare_restore(self, saved: SavedSettings, codes: Sequence[CodeRef | None]) -> None:
        """Load what the settings of a save need, and keep them until `take_restored`.

        Raises what the loader raises, LoadError or InvalidOption.
        """
        check_settings(saved, "the save")
        if len(codes) != len(saved.updaters):
            raise ProtocolError(f"{len(saved.updaters)} updaters came with {len(codes)} places of code")

        def load(number: int, spec: UpdaterSpec) -> Updater:
            code = codes[number]
            if code is None:
                return build_saved(spec, None)
            return self._load(SettingRecord(None, updater=spec, code=code))

        self._restored = SettingsTable.restore(saved, load)

    def take_restored(self) -> SettingsTable:
        """Return the settings that `prepare_restore` has loaded, once. Raises ProtocolError if it has not."""
        if self._restored is None:
            raise ProtocolError("a load was finished that was not prepared")
        table, self._restored = self._restored, None
        return table

    def install(self, table: SettingsTable) -> None:
        """Make these settings the newest and the only ones: drop those prepared or waiting for a round."""
        self._latest = table
        self.number += 1
        self._prepared = {}
        self.pending = []

    def newest(self, key: Key) -> Setting:
        """Return the setting of a new slice of `key`."""
        return self._latest.setting(key)

    def due(self, slice_id: int, key: Key, round_number: int) -> Setting | None:
        """Return the setting that holds for a slice from this round on, if one has waited for it.

        It supersedes a setting that was made earlier and waits for a later round: the rank that made that
        one was ahead and has left.
        """
        found: Setting | None = None
        for number, pending in enumerate(self.pending):
            if pending.from_round.get(slice_id, round_number + 1) <= round_number:
                found = pending.table.setting(key)
                for overtaken in self.pending[: number + 1]:
                    overtaken.from_round.pop(slice_id, None)
        return found

    def due_in_open_rounds(self, slices: Collection[Slice]) -> tuple[int, SettingsTable]:
        """Return the settings that hold in the open round of each of these slices; changes nothing.

        Settings that all slices wait for are left out for other keys, too; the number is that of the last
        setting that is not left out.
        """
        number, table = self.number, self._latest
        open_rounds = {each.slice_id: each.applied + 1 for each in slices}
        for pending in reversed(self.pending):
            if any(first <= open_rounds.get(slice_id, 0) for slice_id, first in pending.from_round.items()):
                break
            number, table = pending.number - 1, pending.before
        found = table.copy()
        for each in slices:
            setting = each.setting
            for pending in self.pending:
                first = pending.from_round.get(each.slice_id)
                if first is not None and first <= each.applied + 1:
                    setting = pending.table.setting(each.key)
            found.keep(each.key, setting)
        return number, found

    def forget(self, slice_id: int) -> None:
        """Forget a deleted slice."""
        for pending in self.pending:
            pending.from_round.pop(slice_id, None)

    def tidy(self) -> None:
        """Drop settings that no slice waits for."""
        self.pending = [each for each in self.pending if each.from_round]
