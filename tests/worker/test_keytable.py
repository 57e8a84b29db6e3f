"""What a worker knows of keys, and how it learns that it is wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tensorkv.errors import KeyDeleted, KeyNotInitialized, UncommittedPush, UpdaterError, to_wire
from tensorkv.wire import messages as m
from tensorkv.worker import keytable
from tensorkv.worker.keytable import KeyTable
from tensorkv.worker.plans import KeyState


def entry(key: str, key_id: int, generation: int = 1) -> m.KeyEntry:
    slices = [m.SliceEntry(10 * key_id + i, i, 2 * i, 2 * i + 2) for i in range(2)]
    return m.KeyEntry(key, key_id, generation, (4,), "float32", m.EPOCH, slices)


class Bench:
    """A table whose scheduler knows `entries`."""

    def __init__(self, *entries: m.KeyEntry) -> None:
        self.entries = {each.key: each for each in entries}
        self.lookups: list[list[Any]] = []
        self.forgotten: list[KeyState] = []
        job: Any = SimpleNamespace(control=SimpleNamespace(request=self._request))
        self.table = KeyTable(job, 1, 20.0, self.forgotten.extend)

    def _request(self, make: Any, what: str, timeout_s: float, store: int) -> m.Entries:
        keys = make(1).keys
        self.lookups.append(keys)
        missing = [key for key in keys if key not in self.entries]
        if missing:
            raise KeyNotInitialized(f"key {missing[0]!r}")
        return m.Entries(1, [self.entries[key] for key in keys])

    def fault(self, slice_id: int, round_number: int, error: Exception) -> None:
        self.table.on_fault(m.Fault(1, [slice_id], round_number, *to_wire(error)))


def test_unknown_keys_are_looked_up_once() -> None:
    bench = Bench(entry("a", 1), entry("b", 2))
    for _ in range(2):
        assert [state.key_id for state in bench.table.known(["b", "a"])] == [2, 1]
    assert bench.lookups == [["b", "a"]]
    with pytest.raises(KeyNotInitialized):
        bench.table.known(["a", "c"])


@pytest.mark.parametrize("key", ["\ud800", 2**63], ids=ascii)
def test_a_key_that_cannot_be_sent_is_not_asked_about(key: Any) -> None:
    bench = Bench(entry("a", 1))
    with pytest.raises(KeyNotInitialized):
        bench.table.known(["a", key])
    assert bench.lookups == []


def test_a_newer_generation_takes_the_place_of_an_older_one() -> None:
    bench = Bench()
    bench.table.learn([entry("a", 1)])
    bench.table.learn([entry("a", 5, generation=2)])
    assert [state.key_id for state in bench.forgotten] == [1]
    bench.table.learn([entry("a", 1)])  # what comes late is passed over
    assert bench.table.known(["a"])[0].key_id == 5
    bench.table.learn([entry("a", 7, generation=1)])  # the scheduler counts a forgotten name from 1 again
    assert bench.table.known(["a"])[0].key_id == 7


def test_a_fault_is_raised_once_however_many_slices_tell_it() -> None:
    bench = Bench()
    bench.table.learn([entry("a", 1), entry("b", 2)])
    for slice_id in (10, 11):
        bench.fault(slice_id, 3, UpdaterError("a nan"))
    bench.table.raise_faults(["b"])
    with pytest.raises(UpdaterError, match="a nan"):
        bench.table.raise_faults(["b", "a"])
    bench.fault(11, 3, UpdaterError("a nan"))  # the last slice of that round
    bench.table.raise_faults()
    bench.fault(10, 4, UpdaterError("again"))
    with pytest.raises(UpdaterError, match="again"):
        bench.table.raise_faults()


def test_several_faults_are_one_error_with_notes() -> None:
    bench = Bench()
    bench.table.learn([entry("a", 1), entry("b", 2)])
    bench.fault(10, 1, UpdaterError("first"))
    bench.fault(20, 1, UpdaterError("second"))
    with pytest.raises(UpdaterError, match="first") as caught:
        bench.table.raise_faults()
    assert caught.value.__notes__ == ["and second"]


def test_a_deleted_key_is_forgotten_and_told() -> None:
    bench = Bench()
    bench.table.learn([entry("a", 1)])
    bench.fault(10, 0, KeyDeleted("deleted by rank 2"))
    bench.fault(11, 0, KeyDeleted("deleted by rank 2"))
    bench.fault(99, 0, KeyDeleted("of a key nobody knows"))
    with pytest.raises(KeyDeleted, match="deleted by rank 2"):
        bench.table.raise_faults(["a"])
    bench.table.raise_faults()
    with pytest.raises(KeyNotInitialized):
        bench.table.known(["a"])


def test_keys_that_wait_for_a_commit() -> None:
    bench = Bench()
    bench.table.learn([entry("a", 1), entry("b", 2)])
    states = bench.table.known(["a", "b"])
    bench.table.check_committed(states, "push")
    bench.table.uncommitted.add(2)
    bench.table.check_committed(states[:1], "push")
    with pytest.raises(UncommittedPush, match="push: key 'b' was pushed with apply=False"):
        bench.table.check_committed(states, "push")
    bench.table.forget(states)
    assert bench.table.uncommitted == set()


def test_what_others_deleted_stays_known_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keytable, "MAX_GONE", 2)
    bench = Bench(*(entry(name, number) for number, name in enumerate("abcd", start=1)))
    a, b, c, _ = bench.table.known(list("abcd"))
    assert bench.table.gone([1, 2, 77]) == [a, b]
    assert bench.forgotten == []
    assert bench.table.known(["a"]) == [a]  # its next push is told that it was deleted
    assert bench.table.gone([3]) == [c]
    assert bench.forgotten == [a]
    assert "a" not in bench.table.states
