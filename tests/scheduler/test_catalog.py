"""Catalog: who creates keys and makes settings, who must agree, and barriers of one store."""

from __future__ import annotations

from typing import Any

import pytest

from tensorkv.checkpoint.records import SavedSettings, SettingEntry
from tensorkv.errors import (
    CommitMismatch,
    InvalidValue,
    KeyAlreadyInitialized,
    KeyNotInitialized,
    LoadError,
    NotElementwise,
    ProtocolError,
    SettingMismatch,
    UpdaterError,
    WaitTimeout,
    from_wire,
    to_wire,
)
from tensorkv.scheduler import catalog
from tensorkv.scheduler import settings as settings_module
from tensorkv.scheduler.catalog import Catalog, CommitReduction, Placement
from tensorkv.updaters.spec import UpdaterSpec
from tensorkv.wire import messages as m

BOUND_BYTES = 256


class Desk:
    """A directory, with answers by rank."""

    def __init__(self, num_workers: int = 2, num_servers: int = 2) -> None:
        self.placement = Placement(BOUND_BYTES, 1 << 20, [0] * num_servers)
        opened = m.JoinStore(1, "default", m.StorePolicy("sync"), "sum", "fail")
        self.directory = Catalog(1, opened, num_workers, self.placement)
        self.request = 0

    def ask(self, method: str, rank: int, message: type, *fields: Any) -> list[tuple[int, Any]]:
        self.request += 1
        getattr(self.directory, method)(rank, message(self.request, 1, *fields))
        return self.taken()

    def taken(self) -> list[tuple[int, Any]]:
        out, self.directory.out = self.directory.out, []
        return out

    def init(self, rank: int, *specs: m.KeySpec) -> list[tuple[int, Any]]:
        return self.ask("propose_init", rank, m.ProposeInit, list(specs))

    def conclude(self, rank: int, reply: m.InitReply, error: Any = None) -> list[tuple[int, Any]]:
        ids = [entry.key_id for entry, lead in zip(reply.entries, reply.lead, strict=True) if lead]
        return self.ask("conclude_init", rank, m.ConcludeInit, ids, error)

    def create(self, *specs: m.KeySpec, rank: int = 0) -> list[m.KeyEntry]:
        ((_, reply),) = self.init(rank, *specs)
        assert reply.lead == [True] * len(specs)
        self.conclude(rank, reply)
        return list(reply.entries)

    def set(self, rank: int, record: m.SettingRecord) -> list[tuple[int, Any]]:
        return self.ask("propose_setting", rank, m.ProposeSetting, record)

    def conclude_set(self, rank: int, number: int, error: Any = None) -> list[tuple[int, Any]]:
        return self.ask("conclude_setting", rank, m.ConcludeSetting, number, error)

    def delete(self, rank: int, *entries: m.KeyEntry) -> list[tuple[int, Any]]:
        self.directory.delete(rank, m.DeleteKeys(1, [(entry.key, entry.key_id) for entry in entries]))
        return self.taken()

    def delete_by_all(self, *entries: m.KeyEntry) -> None:
        for rank in sorted(self.directory.members):
            self.delete(rank, *entries)

    def lookup(self, keys: list[Any] | None, rank: int = 0) -> Any:
        return self.ask("lookup", rank, m.Lookup, keys)[0][1]

    def count(self, rank: int, keys: list[Any] | None = None) -> int:
        return int(self.ask("count_keys", rank, m.CountKeys, keys)[0][1].number)


def spec(key: Any, *shape: int, whole: bool = False, dtype: str = "float32") -> m.KeySpec:
    return m.KeySpec(key, shape, dtype, 4, whole)


def named(name: str = "add", **more: Any) -> m.SettingRecord:
    return m.SettingRecord(None, updater=UpdaterSpec(type="named", name=name, **more))


WHOLE = m.SettingRecord(None, updater=UpdaterSpec(type="function", name="f", elementwise=False))


def error_of(out: list[tuple[int, Any]]) -> Any:
    ((_, message),) = out
    assert isinstance(message, m.Failed)
    return from_wire(message.name, message.text)


# ---- init ------------------------------------------------------------------------------------------


def test_rank_0_leads_and_the_others_wait_and_agree() -> None:
    desk = Desk(3)
    assert desk.init(1, spec("w", 3)) == []
    ((rank, reply),) = desk.init(0, spec("w", 3), spec("b"))
    assert (rank, reply.lead) == (0, [True, True])
    assert [each.shape for each in reply.entries] == [(3,), ()]
    assert desk.init(2, spec("b")) == []
    out = desk.conclude(0, reply)
    assert [(each[0], type(each[1])) for each in out] == [(0, m.Done), (1, m.InitReply), (2, m.InitReply)]
    assert out[1][1].entries == reply.entries[:1]
    assert out[2][1].lead == [False]
    assert desk.lookup(["b", "w"]).entries == reply.entries[::-1]
    assert desk.lookup(None).entries == reply.entries


def test_a_list_that_cannot_be_led_whole_waits_whole() -> None:
    desk = Desk()
    ((_, reply),) = desk.init(0, spec("a", 1))
    assert desk.init(1, spec("a", 1), spec("b", 1)) == []
    desk.conclude(0, reply)
    assert desk.lookup(["a"]).entries[0].key == "a"
    desk.create(spec("b", 1))


@pytest.mark.parametrize("other", [spec("w", 4), spec("w", 3, dtype="int32"), spec("w", 3, whole=True)])
def test_another_rank_must_agree(other: m.KeySpec) -> None:
    desk = Desk()
    desk.create(spec("w", 3))
    assert isinstance(error_of(desk.init(1, other)), SettingMismatch)
    ((_, reply),) = desk.init(1, spec("w", 3))  # the refused call has not counted
    assert reply.lead == [False]


def test_a_key_is_initialised_once_by_every_rank() -> None:
    desk = Desk()
    desk.create(spec("w", 3))
    error = error_of(desk.init(0, spec("new", 1), spec("w", 3)))
    assert isinstance(error, KeyAlreadyInitialized)
    assert "(3,)" in str(error)
    assert isinstance(desk.lookup(["new"]), m.Failed)  # nothing of the refused list was made
    desk.init(1, spec("w", 3))
    assert isinstance(error_of(desk.init(1, spec("w", 3))), KeyAlreadyInitialized)


def test_a_key_that_some_have_deleted_is_there_for_the_others() -> None:
    desk = Desk(3)
    w, _ = desk.create(spec("w", 3), spec("b", 3))
    assert desk.delete(1, w) == []
    assert [[entry.key for entry in desk.lookup(None, rank).entries] for rank in (0, 1)] == [
        ["w", "b"],
        ["b"],
    ]
    assert [desk.count(rank) for rank in range(3)] == [2, 1, 2]
    assert [desk.count(rank, ["w", "b", "x"]) for rank in range(3)] == [2, 1, 2]
    refused = desk.lookup(["b", "w"], 1)
    error = from_wire(refused.name, refused.text)
    assert isinstance(error, KeyNotInitialized)
    assert "this worker has deleted it, and ranks [0, 2] have not yet" in str(error)
    ((_, reply),) = desk.init(2, spec("w", 3))  # its first
    assert reply.entries == [w]


def test_an_init_after_a_delete_waits_until_all_have_deleted() -> None:
    desk = Desk(3)
    (old,) = desk.create(spec("w", 3))
    desk.delete(0, old)
    assert desk.init(0, spec("b", 1), spec("w", 5)) == []
    waiting = desk.directory.waiting(0, desk.request)
    assert waiting == m.Waiting(desk.request, [1, 2], "init of 'w', which they have not deleted yet")
    assert desk.directory.report() == [
        "worker 0, in init of 'w', which they have not deleted yet, waits for worker 1, 2"
    ]
    assert isinstance(desk.lookup(["b"], 1), m.Failed)  # the list waits whole
    assert desk.delete(1, old) == []  # which it never initialised
    assert desk.init(1, spec("w", 5)) == []
    ((rank, reply),) = desk.delete(2, old)
    assert (rank, reply.lead) == (0, [True, True])
    new = reply.entries[1]
    assert new.key_id > old.key_id
    assert not {each.slice_id for each in new.slices} & {each.slice_id for each in old.slices}
    out = desk.conclude(0, reply)
    assert [(rank, type(message)) for rank, message in out] == [(0, m.Done), (1, m.InitReply)]
    assert out[1][1].entries == [new]
    assert isinstance(error_of(desk.init(1, spec("w", 5))), KeyAlreadyInitialized)


def test_an_init_after_a_delete_can_be_given_up() -> None:
    desk = Desk()
    (old,) = desk.create(spec("w", 3))
    desk.delete(0, old)
    assert desk.init(0, spec("w", 3)) == []
    desk.directory.give_up(0, desk.request)
    ((_, refused),) = desk.taken()
    assert isinstance(from_wire(refused.name, refused.text), WaitTimeout)
    assert desk.delete(1, old) == []
    assert isinstance(desk.lookup(["w"]), m.Failed)


def test_a_rank_that_leaves_has_deleted_all() -> None:
    desk = Desk()
    old, _ = desk.create(spec("w", 3), spec("b", 3))
    desk.delete(0, old)
    assert desk.init(0, spec("w", 5)) == []
    desk.directory.leave(1)
    ((rank, reply),) = desk.taken()
    assert (rank, reply.lead) == (0, [True])
    assert sum(desk.placement.load_bytes) == 12 + 20


def test_nothing_is_kept_of_a_key_that_all_have_deleted() -> None:
    desk = Desk()
    for step in range(3):
        entries = desk.create(spec("w", 3), spec(step, 200))
        desk.delete_by_all(*entries)
    assert desk.directory._keys == {}
    assert desk.directory._partly_deleted == set()
    assert desk.directory._under_way == set()
    assert desk.placement.load_bytes == [0, 0]


def test_what_never_became_a_key_is_not_remembered() -> None:
    desk = Desk(3)
    assert desk.init(1, spec("waits", 3)) == []
    ((_, reply),) = desk.init(0, spec("fails", 3))
    desk.conclude(0, reply, to_wire(UpdaterError("no")))
    desk.init(0, spec("left", 3))
    desk.directory.leave(0)
    assert desk.directory._under_way == {"waits"}  # which rank 1 creates now
    desk.directory.leave(1)
    assert desk.directory._under_way == set()
    assert desk.directory._keys == {}


def test_an_init_that_failed_has_not_been() -> None:
    desk = Desk()
    ((_, reply),) = desk.init(0, spec("w", 3))
    desk.conclude(0, reply, to_wire(UpdaterError("no")))
    assert isinstance(desk.lookup(["w"]), m.Failed)
    assert desk.placement.load_bytes == [0, 0]
    assert len(desk.create(spec("w", 4))) == 1


def test_who_leaves_while_it_creates_a_key_is_followed_by_the_next() -> None:
    desk = Desk(3)
    ((_, reply),) = desk.init(0, spec("w", 3))
    assert desk.init(1, spec("w", 3)) == []
    desk.directory.leave(0)
    ((rank, led),) = desk.taken()
    assert (rank, led.lead) == (1, [True])
    assert sum(desk.placement.load_bytes) == 12  # what the first has counted is given back
    desk.conclude(0, reply)  # too late
    assert isinstance(desk.lookup(["w"]), m.Failed)
    desk.conclude(1, led)
    assert desk.lookup(["w"]).entries == led.entries


@pytest.mark.parametrize(
    "specs",
    [[spec("w", 3), spec("w", 3)], [spec("w", -1)], [m.KeySpec("w", (1,), "float32", 0, False)]],
    ids=["twice", "shape", "itemsize"],
)
def test_an_init_that_makes_no_sense_is_refused(specs: list[m.KeySpec]) -> None:
    desk = Desk()
    with pytest.raises(ProtocolError):
        desk.init(0, *specs)
    assert desk.directory.waiting(0, 1) is None


def test_values_are_placed_by_their_updater() -> None:
    desk = Desk()
    (first,) = desk.create(spec("first", 200))
    assert [(each.server, each.start, each.stop) for each in first.slices] == [(0, 0, 64), (1, 64, 200)]
    assert desk.placement.load_bytes == [256, 544]
    (kept,) = desk.create(spec("kept", 200, whole=True))
    assert [(each.server, each.start, each.stop) for each in kept.slices] == [(0, 0, 200)]
    desk.delete_by_all(first)
    for_some = m.SettingRecord(("f",), updater=WHOLE.updater)
    ((_, reply),) = desk.set(0, for_some)
    desk.conclude_set(0, reply.number)
    entries = desk.create(spec("f", 200), spec("g", 200))
    assert [len(entry.slices) for entry in entries] == [1, 2]
    desk.delete_by_all(kept, *entries)
    assert desk.placement.load_bytes == [0, 0]


def test_an_updater_for_whole_values_keeps_later_values_whole_whoever_leads() -> None:
    desk = Desk()
    ((_, reply),) = desk.set(0, WHOLE)
    desk.conclude_set(0, reply.number)
    desk.directory.leave(0)
    desk.taken()
    (entry,) = desk.create(spec("w", 200), rank=1)  # which has made no setting itself
    assert [(each.start, each.stop) for each in entry.slices] == [(0, 200)]
    assert desk.directory.setting_rank == 1


def test_a_refused_updater_does_not_keep_values_whole() -> None:
    desk = Desk()
    ((_, reply),) = desk.set(0, WHOLE)
    desk.conclude_set(0, reply.number, ("UnknownUpdater", "no"))
    (entry,) = desk.create(spec("w", 200))
    assert len(entry.slices) == 2


# ---- keys ------------------------------------------------------------------------------------------


def test_what_a_rank_is_about_to_create_is_known_until_it_concludes() -> None:
    desk = Desk()
    ((_, reply),) = desk.init(0, spec("new", 200))
    slice_ids = [each.slice_id for each in reply.entries[0].slices]
    assert len(slice_ids) > 1
    assert desk.directory.unfinished(0) == slice_ids
    assert desk.directory.unfinished(1) == []
    desk.conclude(0, reply)
    assert desk.directory.unfinished(0) == []


def test_a_delete_of_what_is_not_there_any_more_does_nothing() -> None:
    desk = Desk()
    (old,) = desk.create(spec("w", 3))
    desk.delete_by_all(old)
    (new,) = desk.create(spec("w", 3))
    assert desk.delete(1, old) == []
    assert desk.lookup(["w"], 1).entries == [new]


def test_a_delete_that_names_a_key_twice_deletes_it_once() -> None:
    desk = Desk(1)
    (old,) = desk.create(spec("w", 3))
    assert desk.delete(0, old, old) == []
    assert desk.placement.load_bytes == [0, 0]


def test_a_late_conclusion_of_a_load_brings_nothing() -> None:
    desk = Desk()
    lead_load(desk, ADD, spec("w", 4))
    ((rank, reply),) = desk.ask("conclude_together", 1, m.ConcludeTogether, None, ADD)
    assert (rank, reply.settings, reply.replaced) == (1, None, [])
    assert desk.directory._keys == {}


def test_a_lookup_of_what_is_not_there() -> None:
    desk = Desk()
    desk.create(spec("a", 1))
    reply = desk.lookup(["a", "b"])
    assert isinstance(from_wire(reply.name, reply.text), KeyNotInitialized)
    assert "'b'" in reply.text


def test_a_store_that_ends_gives_its_place_back() -> None:
    desk = Desk()
    desk.create(spec("a", 200), spec("b", 3))
    desk.directory.close()
    assert desk.placement.load_bytes == [0, 0]


# ---- settings --------------------------------------------------------------------------------------


def test_settings_are_matched_one_by_one() -> None:
    desk = Desk(3)
    assert desk.set(1, named("add")) == []
    ((rank, reply),) = desk.set(0, named("add"))
    assert (rank, reply.number, reply.lead) == (0, 0, True)
    out = desk.conclude_set(0, 0)
    assert [(each[0], type(each[1])) for each in out] == [(0, m.Done), (1, m.SettingReply)]
    assert (out[1][1].number, out[1][1].lead) == (0, False)
    ((_, reply),) = desk.set(0, named("assign"))
    desk.conclude_set(0, reply.number)
    error = error_of(desk.set(2, named("assign")))
    assert isinstance(error, SettingMismatch)
    assert "'assign'" in str(error)
    assert "'add'" in str(error)
    for number, name in enumerate(("add", "assign")):  # the refused call has not counted
        ((_, reply),) = desk.set(2, named(name))
        assert (reply.number, reply.lead) == (number, False)


def test_what_the_servers_refuse_is_refused_to_all() -> None:
    desk = Desk()
    ((_, reply),) = desk.set(0, named())
    desk.conclude_set(0, reply.number, ("UpdaterError", "cannot load"))
    assert str(error_of(desk.set(1, named()))) == "cannot load"
    ((_, reply),) = desk.set(0, named())
    assert reply.number == 1


def some(*keys: str, **options: float) -> m.SettingRecord:
    spec = UpdaterSpec(type="optimizer", name="SGD", options=options)
    return m.SettingRecord(keys or ("w",), updater=spec)


def test_options_are_described_in_a_mismatch() -> None:
    desk = Desk()
    ((_, reply),) = desk.set(0, named(options={"lr": 0.5}))
    text = str(error_of(desk.set(1, some(lr=0.25))))
    assert "with {'lr': 0.25} for keys ['w']" in text
    assert "with {'lr': 0.5} for all keys" in text
    assert reply.lead


def test_who_leaves_while_it_makes_a_setting_is_followed_by_the_next() -> None:
    desk = Desk()
    ((_, first),) = desk.set(0, named())
    assert desk.set(1, named()) == []
    desk.directory.leave(0)
    ((rank, reply),) = desk.taken()
    assert (rank, reply.number, reply.lead) == (1, 0, True)
    desk.conclude_set(0, first.number, ("UpdaterError", "too late"))
    desk.conclude_set(1, reply.number)
    assert desk.directory._settings.num_begun == 1


def test_an_updater_for_whole_values_is_refused_to_every_rank_where_a_key_is_sliced() -> None:
    """The ranks that are not the setting rank must not wait for a setting that is never made."""
    desk = Desk()
    desk.create(spec("big", 200), spec("small", 3))
    for rank in (1, 0):
        error = error_of(desk.set(rank, WHOLE))
        assert isinstance(error, NotElementwise)
        assert "'big'" in str(error)
    some = m.SettingRecord(("small",), updater=WHOLE.updater)
    ((_, reply),) = desk.set(0, some)
    assert reply.lead


@pytest.mark.parametrize("all_make_it", [True, False], ids=["all ranks", "rank 0 alone"])
def test_a_setting_in_every_step_takes_no_memory(monkeypatch: pytest.MonkeyPatch, all_make_it: bool) -> None:
    monkeypatch.setattr(settings_module, "MAX_REMEMBERED_SETTINGS", 10)
    desk = Desk(3)
    for step in range(100):
        record = some(lr=float(step))
        ((_, reply),) = desk.set(0, record)
        assert (reply.number, reply.lead) == (step, True)
        desk.conclude_set(0, step)
        for rank in (1, 2) if all_make_it else ():
            ((_, reply),) = desk.set(rank, record)
            assert (reply.number, reply.lead) == (step, False)
    assert len(desk.directory._settings._kept) == (0 if all_make_it else 10)
    if not all_make_it:  # who is late goes on at its first, and must agree with what is remembered
        for step in range(100):
            if step == 90:
                assert isinstance(error_of(desk.set(2, named())), SettingMismatch)
            ((_, reply),) = desk.set(2, some(lr=float(step)))
            assert (reply.number, reply.lead) == (step, False)
        assert desk.set(2, named()) == []
    ((_, reply),) = desk.set(0, named())
    assert reply.number == 100


def test_who_leaves_holds_no_setting_back() -> None:
    desk = Desk(3)
    desk.set(0, named())
    desk.conclude_set(0, 0)
    desk.set(1, named())
    assert len(desk.directory._settings._kept) == 1
    desk.directory.leave(2)
    assert len(desk.directory._settings._kept) == 0


# ---- waiting ---------------------------------------------------------------------------------------


def given_up(request: int, where: str) -> m.Failed:
    return m.Failed(request, "WaitTimeout", f"{where} was given up")


def test_who_gives_up_what_was_made_meanwhile_is_told_nothing_but_its_reply() -> None:
    desk = Desk()
    assert desk.ask("barrier", 1, m.Barrier) == []
    assert desk.ask("barrier", 0, m.Barrier) == [(0, m.Done(2)), (1, m.Done(1))]
    desk.directory.give_up(1, 1)
    desk.set(1, named())
    ((_, reply),) = desk.set(0, named())
    assert (1, m.SettingReply(3, reply.number, False)) in desk.conclude_set(0, reply.number)
    desk.directory.give_up(1, 3)
    assert desk.taken() == []


def test_a_call_under_way_is_not_taken_back_by_its_leader() -> None:
    desk = Desk()
    for rank in (1, 0):
        told = desk.ask("together", rank, m.Together, "save('x')", False)
    assert told == [(0, m.TogetherReply(2, True, None))]
    desk.directory.give_up(0, 2)
    assert desk.taken() == []
    desk.directory.give_up(1, 1)
    assert desk.taken() == [(1, given_up(1, "save('x')"))]


def test_a_barrier_needs_all_that_have_not_left() -> None:
    desk = Desk(3)
    assert desk.ask("barrier", 2, m.Barrier) == []
    assert desk.ask("barrier", 0, m.Barrier) == []
    assert desk.directory.waiting(0, 2) == m.Waiting(2, [1], "a barrier")
    desk.directory.leave(1)
    assert desk.taken() == [(0, m.Done(2)), (2, m.Done(1))]
    assert desk.ask("barrier", 0, m.Barrier) == []  # the next one begins anew


def test_who_leaves_or_gives_up_is_not_at_the_barrier() -> None:
    desk = Desk(3)
    for rank in (0, 1):
        desk.ask("barrier", rank, m.Barrier)
    desk.directory.give_up(0, 99)
    assert desk.taken() == []
    desk.directory.give_up(0, 1)
    assert desk.taken() == [(0, given_up(1, "a barrier"))]
    desk.directory.leave(1)
    assert desk.ask("barrier", 2, m.Barrier) == []
    assert desk.ask("barrier", 0, m.Barrier) == [(0, m.Done(4)), (2, m.Done(3))]


def test_who_gives_up_is_told_so_and_not_answered_any_more() -> None:
    desk = Desk()
    desk.init(1, spec("w", 3))
    desk.set(1, named())
    assert desk.directory.waiting(1, 1) == m.Waiting(1, [0], "init of 'w'")
    assert desk.directory.waiting(1, 2) == m.Waiting(2, [0], "setting number 1")
    desk.directory.give_up(1, 1)
    desk.directory.give_up(1, 2)
    assert desk.taken() == [(1, given_up(1, "init of 'w'")), (1, given_up(2, "setting number 1"))]
    desk.create(spec("w", 3))
    ((_, reply),) = desk.set(0, named())
    assert [rank for rank, _ in desk.conclude_set(0, reply.number)] == [0]
    assert desk.directory.waiting(1, 1) is None


# ---- commit ----------------------------------------------------------------------------------------


def ready(norms: list[float], *, finite: bool = True, skip: bool = False, error: Any = None) -> m.CommitReady:
    return m.CommitReady(1, 1, norms, finite, skip, error)


def test_a_commit_is_decided_when_all_servers_are_ready() -> None:
    reduction = CommitReduction(2)
    assert reduction.add(1, ready([3.0])) is None
    decision = reduction.add(0, ready([4.0]))
    assert decision == m.CommitDecision(1, 1, True, 5.0, None)
    assert reduction.add(0, ready([])) is None  # it is forgotten


@pytest.mark.parametrize(
    "other", [{"finite": False}, {"skip": True}, {"error": to_wire(CommitMismatch("x"))}]
)
def test_one_server_is_enough_to_keep_all_from_it(other: dict[str, Any]) -> None:
    for order in ((0, 1), (1, 0)):
        reduction = CommitReduction(2)
        says = [ready([1.0]), ready([1.0], **other)]
        assert reduction.add(order[0], says[order[0]]) is None
        decision = reduction.add(order[1], says[order[1]])
        assert decision is not None
        assert not decision.apply
        assert decision.error == other.get("error")


@pytest.mark.parametrize(
    ("shape", "itemsize"),
    [((1 << 60,), 4), ((1 << 40, 1 << 40), 4), ((0, 1 << 60), 4), ((1,) * 65, 4), ((2,), 0), ((2,), 1 << 40)],
)
def test_an_init_that_cannot_be_is_refused(shape: tuple[int, ...], itemsize: int) -> None:
    with pytest.raises(ProtocolError, match="cannot be"):
        Desk().init(0, m.KeySpec("w", shape, "float32", itemsize, False))


def test_an_init_of_more_than_a_job_may_hold_is_refused_and_takes_nothing() -> None:
    """A slice is at most 4 MiB: the list of them alone would fill the memory."""
    desk = Desk()
    ((_, refusal),) = desk.init(0, m.KeySpec("w", (1 << 50,), "float32", 4, False))
    error = from_wire(refusal.name, refusal.text)
    assert isinstance(error, InvalidValue)
    assert "the first 'w'" in str(error)
    assert desk.placement.load_bytes == [0, 0]
    assert len(desk.create(m.KeySpec("w", (2,), "float32", 4, False))) == 1


def test_an_init_is_concluded_by_who_makes_it() -> None:
    desk = Desk()
    ((_, reply),) = desk.init(0, m.KeySpec("w", (2,), "float32", 4, False))
    for error in (None, ("ValueError", "no")):
        with pytest.raises(ProtocolError, match="rank 1 concludes an init that rank 0 makes"):
            desk.conclude(1, reply, error)
    assert desk.conclude(0, reply) == [(0, m.Done(desk.request))]
    assert len(desk.ask("lookup", 0, m.Lookup, ["w"])[0][1].entries) == 1


def test_a_setting_is_concluded_once() -> None:
    desk = Desk()
    record = m.SettingRecord(None, UpdaterSpec(type="named", name="add"))
    desk.set(0, record)
    desk.ask("conclude_setting", 0, m.ConcludeSetting, 0, None)
    desk.ask("conclude_setting", 0, m.ConcludeSetting, 0, ("ValueError", "no"))
    assert desk.set(1, record) == [(1, m.SettingReply(desk.request, 0, False))]


def test_calls_that_wait_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "MAX_WAITS", 3)
    desk = Desk(3)
    spec = m.KeySpec("w", (2,), "float32", 4, False)
    record = m.SettingRecord(None, UpdaterSpec(type="named", name="add"))
    for ask in (lambda rank: desk.init(rank, spec), lambda rank: desk.set(rank, record)):
        for _ in range(3):
            assert ask(1) == []
        with pytest.raises(ProtocolError, match="rank 1 waits for 3 answers already"):
            ask(1)
        assert ask(2) == []


def test_a_report_tells_which_calls_wait_and_for_whom() -> None:
    desk = Desk(3)
    assert desk.directory.report() == []
    desk.ask("barrier", 0, m.Barrier)
    desk.init(2, m.KeySpec("w", (2,), "float32", 4, False))
    desk.ask("propose_setting", 1, m.ProposeSetting, some(lr=1.0))
    assert desk.directory.report() == [
        "worker 0, in a barrier, waits for worker 1, 2",
        "worker 2, in init of 'w', waits for worker 0",
        "worker 1, in setting number 1, waits for worker 0",
    ]


# ---- loading -----------------------------------------------------------------------------------------

ADD = SavedSettings([UpdaterSpec(type="named", name="add")], [SettingEntry(None, 0, {}, None)])
MUON = SavedSettings(
    [UpdaterSpec(type="optimizer", name="torch.optim:Muon", elementwise=False)],
    [SettingEntry(None, 0, {}, None)],
)


def lead_load(desk: Desk, settings: SavedSettings, *specs: m.KeySpec) -> Any:
    """Let all ranks call load, and the lowest propose the keys; return what it is answered."""
    for rank in sorted(desk.directory.members):
        desk.ask("together", rank, m.Together, "load('x')", False)
    ((_, reply),) = desk.ask("propose_load", 0, m.ProposeLoad, list(specs), settings)
    return reply


def test_a_load_replaces_keys_for_all_and_their_init_only_checks() -> None:
    desk = Desk(3)
    old, _ = desk.create(spec("w", 4), spec("other", 1))
    desk.delete(2, old)
    reply = lead_load(desk, ADD, spec("w", 4, whole=True), spec("v", 1000))
    assert desk.lookup(["w"]).entries == [old]  # not before it is concluded
    out = desk.ask("conclude_together", 0, m.ConcludeTogether, None, ADD)
    assert [(rank, answer.lead, answer.settings) for rank, answer in out] == [
        (1, False, ADD), (2, False, ADD), (0, False, ADD),
    ]  # fmt: skip
    assert [answer.replaced for _, answer in out] == [[old], [], [old]]  # rank 2 had deleted it
    assert [entry.key for entry in desk.lookup(None, 2).entries] == ["other", "w", "v"]
    assert sum(desk.placement.load_bytes) == 16 + 4 + 4000
    assert desk.directory._partly_deleted == set()
    for rank in (2, 1, 0):
        ((_, agreed),) = desk.init(rank, spec("w", 4), spec("v", 1000))
        assert (agreed.lead, agreed.entries) == ([False, False], reply.entries)
    ((_, refused),) = desk.init(0, spec("v", 1000))
    assert isinstance(from_wire(refused.name, refused.text), KeyAlreadyInitialized)


def test_a_loaded_key_that_is_deleted_can_be_made_anew() -> None:
    desk = Desk()
    reply = lead_load(desk, ADD, spec("w", 4))
    desk.ask("conclude_together", 0, m.ConcludeTogether, None, ADD)
    desk.delete_by_all(*reply.entries)
    (made,) = desk.create(spec("w", 5))
    ((_, agreed),) = desk.init(1, spec("w", 5))
    assert agreed.entries == [made]


@pytest.mark.parametrize("leaves", [False, True])
def test_a_load_that_fails_has_not_been(leaves: bool) -> None:
    desk = Desk()
    (old,) = desk.create(spec("w", 4))
    reply = lead_load(desk, ADD, spec("w", 4), spec("v", 1000))
    if leaves:
        created = [each.slice_id for entry in reply.entries for each in entry.slices]
        assert desk.directory.unfinished(0) == created
        desk.directory.leave(0)
        (told,) = desk.taken()
    else:
        told = desk.ask("conclude_together", 0, m.ConcludeTogether, ("LoadError", "torn"), None)[0]
    assert told[0] == 1
    assert isinstance(told[1], m.Failed)
    assert desk.lookup(None).entries == [old]
    assert sum(desk.placement.load_bytes) == 16


def test_who_leads_a_load_may_begin_it_anew() -> None:
    """With another save, that has come to count meanwhile: what was proposed before is withdrawn."""
    desk = Desk()
    desk.create(spec("w", 4))
    first = lead_load(desk, ADD, spec("w", 4), spec("v", 1000))
    ((_, again),) = desk.ask("propose_load", 0, m.ProposeLoad, [spec("u", 10), spec("w", 4)], ADD)
    ids = [{each.slice_id for entry in reply.entries for each in entry.slices} for reply in (first, again)]
    assert not ids[0] & ids[1]
    desk.ask("conclude_together", 0, m.ConcludeTogether, None, ADD)
    assert sorted(desk.lookup(None).entries, key=lambda e: e.key_id) == sorted(
        again.entries, key=lambda e: e.key_id
    )
    assert sum(desk.placement.load_bytes) == 16 + 40
    assert len(desk.create(spec("v", 1000))) == 1


def test_settings_of_a_load_say_what_may_be_sliced() -> None:
    desk = Desk()
    reply = lead_load(desk, MUON, spec("w", 1000))
    assert len(reply.entries[0].slices) == 1
    desk.ask("conclude_together", 0, m.ConcludeTogether, None, MUON)
    assert len(desk.create(spec("v", 1000))[0].slices) == 1


def test_a_load_is_refused_where_its_updater_cannot_work() -> None:
    desk = Desk()
    desk.create(spec("large", 1000))
    refused = lead_load(desk, MUON, spec("w", 4))
    assert isinstance(from_wire(refused.name, refused.text), NotElementwise)
    desk.ask("conclude_together", 0, m.ConcludeTogether, to_wire(NotElementwise("no")), None)
    assert len(lead_load(desk, MUON, spec("large", 1000)).entries) == 1  # it is replaced


def test_settings_are_counted_anew_after_a_load() -> None:
    desk = Desk()
    record = m.SettingRecord(None, updater=UpdaterSpec(type="named", name="assign"))
    desk.set(0, record)
    desk.conclude_set(0, 0)  # rank 1 makes none
    lead_load(desk, ADD)
    desk.ask("conclude_together", 0, m.ConcludeTogether, None, ADD)
    other = some(lr=1.0)
    ((_, reply),) = desk.set(0, other)
    assert reply.lead
    desk.conclude_set(0, reply.number)
    ((rank, agreed),) = desk.set(1, other)
    assert (rank, agreed.lead) == (1, False)


def test_who_does_not_lead_cannot_load() -> None:
    desk = Desk()
    with pytest.raises(ProtocolError, match="does not lead"):
        desk.ask("propose_load", 0, m.ProposeLoad, [spec("w", 4)], ADD)
    lead_load(desk, ADD, spec("w", 4))
    with pytest.raises(ProtocolError, match="does not lead"):
        desk.ask("propose_load", 1, m.ProposeLoad, [spec("v", 4)], ADD)


def test_settings_that_no_save_has_are_refused() -> None:
    """Whatever the leader sends: the answers of the scheduler are for it alone."""
    desk = Desk(1)
    spec = m.KeySpec("w", (2,), "float32", 4, False)
    listed = [UpdaterSpec(type="named", name="add")]
    good = SavedSettings(listed, [SettingEntry(None, 0, {}, None)])
    for bad in (
        SavedSettings([], [SettingEntry(None, 0, {}, None)]),
        SavedSettings(listed, []),
        SavedSettings(listed, [SettingEntry(None, -1, {}, None)]),
    ):
        out = desk.ask("together", 0, m.Together, "load", False)
        assert [type(reply) for _, reply in out] == [m.TogetherReply]
        ((_, refusal),) = desk.ask("propose_load", 0, m.ProposeLoad, [spec], bad)
        assert isinstance(from_wire(refusal.name, refusal.text), LoadError)
        with pytest.raises(ProtocolError, match="the load"):
            desk.ask("conclude_together", 0, m.ConcludeTogether, None, bad)
        desk.ask("conclude_together", 0, m.ConcludeTogether, ("LoadError", "no"), None)
    desk.ask("together", 0, m.Together, "load", False)
    ((_, reply),) = desk.ask("propose_load", 0, m.ProposeLoad, [spec], good)
    assert isinstance(reply, m.LoadReply)
