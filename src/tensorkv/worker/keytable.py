"""KeyTable: what a worker knows of the keys of one store, and what servers have reported about them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import final

from tensorkv.errors import (
    KeyNotInitialized,
    TensorKVError,
    UncommittedPush,
    from_wire,
    not_initialized,
)
from tensorkv.plain import Key, may_travel
from tensorkv.wire import messages as m
from tensorkv.worker.plans import KeyState
from tensorkv.worker.session import Session


@final
class KeyTable:
    """The keys that this worker knows. Safe from any thread.

    `on_retire` is called, with the lock held, with the keys that this worker has deleted.
    `uncommitted` are the ids of keys that were pushed with apply=False.
    """

    def __init__(
        self, job: Session, store: int, timeout_s: float, on_retire: Callable[[Sequence[KeyState]], None]
    ) -> None:
        self.lock = threading.Lock()
        self.states: dict[Key, KeyState] = {}
        self.uncommitted: set[int] = set()
        self.faults: dict[Key | None, TensorKVError] = {}  # None: of the next call, on whatever key
        self._job = job
        self._store = store
        self._timeout_s = timeout_s
        self._on_retire = on_retire
        self._of_slice: dict[int, KeyState] = {}
        self._of_id: dict[int, KeyState] = {}
        self._num_asking = 0  # requests under way whose replies may name a key that is retired meanwhile
        self._retired: set[int] = set()  # ids of keys that were retired during one of them
        self._raised_change = 0  # the last change of options that a server has reported
        self._raised: dict[int, int] = {}  # key id -> the last round whose fault was reported

    def known(self, keys: Sequence[Key]) -> list[KeyState]:
        """Return what is known of keys, asking the scheduler about the unknown ones.

        Raises:
            KeyNotInitialized: one of them does not exist, or this worker has deleted it.
        """
        unknown = [key for key in keys if key not in self.states]
        if unknown:
            for key in unknown:
                if not may_travel(key):  # so it cannot be sent, and no rank can have initialised it
                    raise not_initialized(key)
            what = f"lookup of {unknown[0]!r}"
            with self.asking():
                reply = self._job.control.request(
                    lambda n: m.Lookup(n, self._store, unknown), what, self._timeout_s, self._store
                )
                self.learn(reply.entries)
        try:
            return [self.states[key] for key in keys]
        except KeyError as exc:  # another thread of this worker has deleted it meanwhile
            raise KeyNotInitialized(f"key {exc.args[0]!r} was deleted during the call") from exc

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Make a request to the scheduler and learn from its reply, in which a key may be retired already."""
        with self.lock:
            self._num_asking += 1
        try:
            yield
        finally:
            with self.lock:
                self._num_asking -= 1
                if not self._num_asking:
                    self._retired.clear()

    def learn(self, entries: Sequence[m.KeyEntry]) -> None:
        """Remember the keys of a reply, within `asking`; skip those that were retired since it was made."""
        with self.lock:
            for entry in entries:
                known = self.states.get(entry.key)
                if entry.key_id in self._retired or (known is not None and known.key_id >= entry.key_id):
                    continue
                state = self._of_id.get(entry.key_id) or KeyState.of(entry)  # one object per id
                self.states[entry.key] = self._of_id[entry.key_id] = state
                for each in entry.slices:
                    self._of_slice[each.slice_id] = state

    def retire(self, entries: Sequence[m.KeyEntry]) -> list[m.KeyEntry]:
        """Forget keys for good, as this worker has deleted them or a load has replaced them.

        Called with the job's order held. Returns those of which the servers are still to be told.
        """
        with self.lock:
            found = [entry for entry in entries if entry.key_id not in self._retired]
            if self._num_asking:
                self._retired.update(entry.key_id for entry in found)
            states = [self._of_id[entry.key_id] for entry in found if entry.key_id in self._of_id]
            for state in states:
                self._remove(state)  # first: an interrupt here ends the job, and the next call is to say so
                state.retired = True
            if states:
                self._on_retire(states)
        return found

    def forget_names(self) -> list[KeyState]:
        """Ask the scheduler anew about every key, as a load may have replaced it; return what was known."""
        with self.lock:
            states = list(self.states.values())
            self.states.clear()
        return states

    def _remove(self, state: KeyState) -> None:
        if self.states.get(state.key) is state:
            del self.states[state.key]
        for each in state.entry.slices:
            self._of_slice.pop(each.slice_id, None)
        self._of_id.pop(state.key_id, None)
        self.uncommitted.discard(state.key_id)
        self._raised.pop(state.key_id, None)

    def those_known(self, keys: Sequence[Key] | None) -> list[KeyState]:
        """Return what is known of these keys (None: all), without asking the scheduler."""
        with self.lock:
            if keys is None:
                return list(self.states.values())
            return [self.states[key] for key in keys if key in self.states]

    def names_of(self, key_ids: Iterable[int]) -> list[Key]:
        """Return the keys with these ids, without the unknown ones."""
        with self.lock:
            return [self._of_id[key_id].key for key_id in key_ids if key_id in self._of_id]

    def check_committed(self, states: Sequence[KeyState], call: str) -> None:
        """Raise UncommittedPush if one of the keys waits for this worker's commit."""
        if self.uncommitted:
            for state in states:
                if state.key_id in self.uncommitted:
                    raise UncommittedPush(
                        f"{call}: key {state.key!r} was pushed with apply=False; call commit() first"
                    )

    def check_all_committed(self, call: str) -> None:
        """Raise UncommittedPush if any key waits for this worker's commit."""
        with self.lock:
            found = [state for key_id in self.uncommitted if (state := self._of_id.get(key_id)) is not None]
        self.check_committed(found, call)

    def on_fault(self, fault: m.Fault) -> None:
        """Note a failed round that this worker contributed to; its next call on the key raises the error."""
        error = from_wire(fault.name, fault.text)
        with self.lock:
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
        with self.lock:
            self._raised_change = 0

    def drop_faults(self, keys: Sequence[Key]) -> None:
        """Forget the errors of keys that were deleted."""
        with self.lock:
            for key in keys:
                self.faults.pop(key, None)

    def raise_faults(self, keys: Sequence[Key] | None = None) -> None:
        """Raise the errors that servers have reported for these keys (None: all), each once."""
        if not self.faults:
            return
        with self.lock:
            names = list(self.faults) if keys is None else [None, *dict.fromkeys(keys)]
            found = [self.faults.pop(key) for key in names if key in self.faults]
        if found:
            for other in found[1:]:
                found[0].add_note(f"and {other}")
            raise found[0]
