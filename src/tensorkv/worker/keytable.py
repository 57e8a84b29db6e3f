"""KeyTable: what a worker knows of the keys of one store, and what servers have reported about them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import final

from tensorkv.errors import KeyNotInitialized, TensorKVError, from_wire, not_initialized
from tensorkv.plain import Key, may_travel
from tensorkv.wire import messages as m
from tensorkv.worker.plans import KeyState


@final
class KeyTable:
    """The keys that this worker knows. Pure: the caller holds the lock of the core to change it.

    `states` may be read at any time. `faults` are errors that the next call on their key raises.
    """

    def __init__(self) -> None:
        self.states: dict[Key, KeyState] = {}
        self.faults: dict[Key | None, TensorKVError] = {}  # None: of the next call, on whatever key
        self._of_slice: dict[int, KeyState] = {}
        self._of_id: dict[int, KeyState] = {}
        self._num_asking = 0  # requests under way whose replies may name a key that is retired meanwhile
        self._retired: set[int] = set()  # ids of keys that were retired during one of them
        self._raised_change = 0  # the last change of options that a server has reported
        self._raised: dict[int, int] = {}  # key id -> the last round whose fault was reported

    def unknown(self, keys: Sequence[Key]) -> list[Key]:
        """Return those of these keys that the scheduler has to be asked about.

        Raises:
            KeyNotInitialized: one of them cannot be sent, and so no rank can have initialised it.
        """
        unknown = [key for key in keys if key not in self.states]
        for key in unknown:
            if not may_travel(key):
                raise not_initialized(key)
        return unknown

    def known(self, keys: Sequence[Key]) -> list[KeyState]:
        """Return what is known of keys that were looked up.

        Raises:
            KeyNotInitialized: another thread of this worker has deleted one of them meanwhile.
        """
        try:
            return [self.states[key] for key in keys]
        except KeyError as exc:
            raise KeyNotInitialized(f"key {exc.args[0]!r} was deleted during the call") from exc

    def begin_asking(self) -> None:
        """Note that the scheduler is asked something; its reply may name a key that is retired by then."""
        self._num_asking += 1

    def end_asking(self) -> None:
        """Note that such a request has ended, and its reply is learnt."""
        self._num_asking -= 1
        if not self._num_asking:
            self._retired.clear()

    def learn(self, entries: Sequence[m.KeyEntry]) -> None:
        """Remember the keys of a reply, before `end_asking`; skip those retired since it was made."""
        for entry in entries:
            known = self.states.get(entry.key)
            if entry.key_id in self._retired or (known is not None and known.key_id >= entry.key_id):
                continue
            state = self._of_id.get(entry.key_id) or KeyState.of(entry)  # one object per id
            self.states[entry.key] = self._of_id[entry.key_id] = state
            for each in entry.slices:
                self._of_slice[each.slice_id] = state

    def retire(self, entries: Sequence[m.KeyEntry]) -> tuple[list[m.KeyEntry], list[KeyState]]:
        """Forget keys for good, as this worker has deleted them or a load has replaced them.

        Returns those of which the servers are still to be told, and what was known of them.
        """
        found = [entry for entry in entries if entry.key_id not in self._retired]
        if self._num_asking:
            self._retired.update(entry.key_id for entry in found)
        states = [self._of_id[entry.key_id] for entry in found if entry.key_id in self._of_id]
        for state in states:
            self._remove(state)  # first: an interrupt here ends the job, and the next call is to say so
            state.retired = True
        return found, states

    def forget_names(self) -> list[KeyState]:
        """Forget which key has which name, as a load may have replaced it; return what was known."""
        states = list(self.states.values())
        self.states.clear()
        return states

    def _remove(self, state: KeyState) -> None:
        if self.states.get(state.key, state) is state:
            self.states.pop(state.key, None)
            self.faults.pop(state.key, None)
        for each in state.entry.slices:
            self._of_slice.pop(each.slice_id, None)
        self._of_id.pop(state.key_id, None)
        self._raised.pop(state.key_id, None)

    def those_known(self, keys: Sequence[Key] | None) -> list[KeyState]:
        """Return what is known of these keys (None: all), without asking the scheduler."""
        if keys is None:
            return list(self.states.values())
        return [self.states[key] for key in keys if key in self.states]

    def of_ids(self, key_ids: Iterable[int]) -> list[KeyState]:
        """Return the keys with these ids, without the unknown ones."""
        return [self._of_id[key_id] for key_id in key_ids if key_id in self._of_id]

    def on_fault(self, fault: m.Fault) -> None:
        """Note a failed round that this worker contributed to; its next call on the key raises the error."""
        error = from_wire(fault.name, fault.text)
        if not fault.slice_ids and fault.round > self._raised_change:
            self._raised_change = fault.round  # other servers report the same
            self.faults.setdefault(None, error)
        for slice_id in fault.slice_ids:
            state = self._of_slice.get(slice_id)
            if state is None:
                continue
            if self._raised.get(state.key_id, 0) >= fault.round:
                continue  # another slice of the same round has reported it
            self._raised[state.key_id] = fault.round
            self.faults.setdefault(state.key, error)

    def restart_changes(self) -> None:
        """Changes of options are counted from 1 again: a save was loaded."""
        self._raised_change = 0

    def raise_faults(self, keys: Sequence[Key] | None = None) -> None:
        """Raise the errors that servers have reported for these keys (None: all), each once."""
        names = list(self.faults) if keys is None else [None, *dict.fromkeys(keys)]
        found = [self.faults.pop(key) for key in names if key in self.faults]
        if found:
            for other in found[1:]:
                found[0].add_note(f"and {other}")
            raise found[0]
