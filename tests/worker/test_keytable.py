"""What a worker knows of keys, and how it learns that it is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from tensorkv.errors import KeyNotInitialized, UpdaterError, to_wire
from tensorkv.wire import messages as m
from tensorkv.worker.keytable import KeyTable


def entry(key: str, key_id: int) -> m.KeyEntry:
    slices = [m.SliceEntry(10 * key_id + i, i, 2 * i, 2 * i + 2) for i in range(2)]
    return m.KeyEntry(key, key_id, (4,), "float32", m.EPOCH, slices)


class Bench:
    """A table that has learnt these keys."""

    def __init__(self, *entries: m.KeyEntry) -> None:
        self.table = KeyTable()
        self.table.learn(entries)

    def fault(self, slice_id: int, round_number: int, error: Exception) -> None:
        self.table.on_fault(m.Fault(1, [slice_id], round_number, *to_wire(error)))


def test_what_is_unknown_is_asked_about() -> None:
    bench = Bench(entry("a", 1), entry("b", 2))
    assert bench.table.unknown(["b", "c", "a", "d"]) == ["c", "d"]
    assert [state.key_id for state in bench.table.known(["b", "a"])] == [2, 1]
    with pytest.raises(KeyNotInitialized, match="'c' was deleted during the call"):
        bench.table.known(["a", "c"])


@pytest.mark.parametrize("key", ["\ud800", 2**63], ids=ascii)
def test_a_key_that_cannot_be_sent_is_not_asked_about(key: Any) -> None:
    bench = Bench(entry("a", 1))
    with pytest.raises(KeyNotInitialized):
        bench.table.unknown(["a", key])


def test_a_newer_key_takes_the_place_of_an_older_one_which_is_retired_later() -> None:
    """As after a load, if one thread initialises the key before the other has retired the old one."""
    bench = Bench()
    bench.table.learn([entry("a", 1)])
    (old,) = bench.table.known(["a"])
    bench.table.learn([entry("a", 5)])
    bench.table.learn([entry("a", 1)])  # what comes late is passed over
    assert bench.table.known(["a"])[0].key_id == 5
    assert not old.retired
    assert bench.table.retire([entry("a", 1)]) == ([entry("a", 1)], [old])
    assert old.retired
    assert bench.table.known(["a"])[0].key_id == 5


def test_a_key_is_retired_once() -> None:
    bench = Bench()
    bench.table.learn([entry("a", 1), entry("b", 2)])
    a, b = bench.table.known(["a", "b"])
    bench.table.begin_asking()
    assert bench.table.retire([a.entry]) == ([a.entry], [a])
    assert bench.table.retire([a.entry, b.entry]) == ([b.entry], [b])
    bench.table.end_asking()
    assert bench.table.those_known(None) == []
    bench.fault(10, 1, UpdaterError("of a retired key"))
    bench.table.raise_faults()


def test_a_reply_that_was_under_way_when_its_key_was_retired_is_not_learnt() -> None:
    bench = Bench()
    bench.table.begin_asking()  # about keys that this table does not know yet
    bench.table.retire([entry("a", 1)])
    bench.table.begin_asking()
    bench.table.learn([entry("a", 1), entry("b", 2)])
    bench.table.end_asking()
    bench.table.end_asking()
    assert [state.key for state in bench.table.those_known(None)] == ["b"]
    bench.table.retire([entry("b", 2)])
    assert bench.table._retired == set()  # nothing is kept if no reply is awaited


def test_names_that_are_forgotten_are_looked_up_again() -> None:
    bench = Bench(entry("a", 1))
    (a,) = bench.table.known(["a"])
    assert bench.table.forget_names() == [a]
    assert bench.table.unknown(["a"]) == ["a"]
    bench.table.learn([entry("a", 1)])
    assert bench.table.known(["a"]) == [a]  # the same object


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


def test_the_fault_of_a_key_goes_with_it() -> None:
    bench = Bench(entry("a", 1), entry("b", 2))
    bench.fault(10, 1, UpdaterError("of the old key"))
    bench.fault(20, 1, UpdaterError("of another"))
    bench.table.retire([entry("a", 1)])
    bench.table.learn([entry("a", 5)])
    bench.table.raise_faults(["a"])
    bench.fault(50, 1, UpdaterError("of the new one"))
    bench.table.retire([entry("b", 2)])
    with pytest.raises(UpdaterError, match="of the new one"):
        bench.table.raise_faults()


def test_several_faults_are_one_error_with_notes() -> None:
    bench = Bench()
    bench.table.learn([entry("a", 1), entry("b", 2)])
    bench.fault(10, 1, UpdaterError("first"))
    bench.fault(20, 1, UpdaterError("second"))
    with pytest.raises(UpdaterError, match="first") as caught:
        bench.table.raise_faults()
    assert caught.value.__notes__ == ["and second"]
