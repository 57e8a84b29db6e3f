"""What a worker knows of keys, and how it learns that it is wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tensorkv.errors import KeyNotInitialized, UncommittedPush, UpdaterError, to_wire
from tensorkv.wire import messages as m
from tensorkv.worker.keytable import KeyTable
from tensorkv.worker.plans import KeyState


def entry(key: str, key_id: int) -> m.KeyEntry:
    slices = [m.SliceEntry(10 * key_id + i, i, 2 * i, 2 * i + 2) for i in range(2)]
    return m.KeyEntry(key, key_id, (4,), "float32", m.EPOCH, slices)


class Bench:
    """A table whose scheduler knows `entries`."""

    def __init__(self, *entries: m.KeyEntry) -> None:
        self.entries = {each.key: each for each in entries}
        self.lookups: list[list[Any]] = []
        self.retired: list[KeyState] = []
        job: Any = SimpleNamespace(control=SimpleNamespace(request=self._request))
        self.table = KeyTable(job, 1, 20.0, self.retired.extend)

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


def test_a_newer_key_takes_the_place_of_an_older_one_which_is_retired_later() -> None:
    """As after a load, if one thread initialises the key before the other has retired the old one."""
    bench = Bench()
    bench.table.learn([entry("a", 1)])
    (old,) = bench.table.known(["a"])
    bench.table.learn([entry("a", 5)])
    bench.table.learn([entry("a", 1)])  # what comes late is passed over
    assert bench.table.known(["a"])[0].key_id == 5
    assert not old.retired
    assert bench.table.retire([entry("a", 1)]) == [entry("a", 1)]
    assert old.retired
    assert bench.retired == [old]
    assert bench.table.known(["a"])[0].key_id == 5


def test_a_key_is_retired_once() -> None:
    bench = Bench()
    bench.table.learn([entry("a", 1), entry("b", 2)])
    a, b = bench.table.known(["a", "b"])
    with bench.table.asking():
        assert bench.table.retire([a.entry]) == [a.entry]
        assert bench.table.retire([a.entry, b.entry]) == [b.entry]
    assert bench.retired == [a, b]
    assert bench.table.those_known(None) == []
    bench.fault(10, 1, UpdaterError("of a retired key"))
    bench.table.raise_faults()


def test_a_reply_that_was_under_way_when_its_key_was_retired_is_not_learnt() -> None:
    bench = Bench()
    with bench.table.asking():  # about keys that this table does not know yet
        bench.table.retire([entry("a", 1)])
        with bench.table.asking():
            bench.table.learn([entry("a", 1), entry("b", 2)])
    assert [state.key for state in bench.table.those_known(None)] == ["b"]
    bench.table.retire([entry("b", 2)])
    assert bench.table._retired == set()  # nothing is kept if no reply is awaited


def test_a_look_up_that_is_overtaken_by_a_delete_fails() -> None:
    bench = Bench(entry("a", 1))
    request = bench._request

    def overtaken(*arguments: Any) -> Any:
        bench.table.retire([entry("a", 1)])
        return request(*arguments)

    bench.table._job.control.request = overtaken  # type: ignore[method-assign]
    with pytest.raises(KeyNotInitialized, match="'a' was deleted during the call"):
        bench.table.known(["a"])


def test_names_that_are_forgotten_are_looked_up_again() -> None:
    bench = Bench(entry("a", 1))
    (a,) = bench.table.known(["a"])
    bench.table.uncommitted.add(1)
    assert bench.table.forget_names() == [a]
    assert bench.table.known(["a"]) == [a]  # the same object
    assert bench.table.uncommitted == {1}
    assert len(bench.lookups) == 2


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


def test_keys_that_wait_for_a_commit() -> None:
    bench = Bench()
    bench.table.learn([entry("a", 1), entry("b", 2)])
    states = bench.table.known(["a", "b"])
    bench.table.check_committed(states, "push")
    bench.table.uncommitted.add(2)
    bench.table.check_committed(states[:1], "push")
    with pytest.raises(UncommittedPush, match="push: key 'b' was pushed with apply=False"):
        bench.table.check_committed(states, "push")
    bench.table.retire([state.entry for state in states])
    assert bench.table.uncommitted == set()
