"""Gathering: who leads a call of all, what the others are told, and what a leaving rank does to it."""

from __future__ import annotations

from tensorkv.checkpoint.records import SavedSettings
from tensorkv.errors import PeerLostError, SettingMismatch, from_wire
from tensorkv.scheduler.collectives import Gathering
from tensorkv.wire import messages as m

SETTINGS = SavedSettings([], [])
REPLACED = {rank: [m.KeyEntry("w", rank, (), "float32", 0, [])] for rank in range(3)}  # as if they differed


def ask(gathering: Gathering, rank: int, call: str = "save('x')") -> None:
    gathering.add(rank, m.Together(10 + rank, 1, call, only_meet=False))


def test_the_lowest_rank_leads_when_all_are_there() -> None:
    gathering = Gathering()
    ask(gathering, 2)
    assert gathering.begin({1, 2}) == []
    assert gathering.waiting(2, 12, {1, 2}) == m.Waiting(12, [1], "save('x')")
    ask(gathering, 1)
    assert gathering.begin({1, 2}) == [(1, m.TogetherReply(11, True, None))]
    assert gathering.begin({1, 2}) == []
    assert gathering.waiting(2, 12, {1, 2}) == m.Waiting(12, [1], "save('x')")
    assert gathering.waiting(2, 13, {1, 2}) is None
    assert gathering.waiters() == [(2, 12)]
    assert gathering.conclude(None, SETTINGS, REPLACED.__getitem__) == [
        (2, m.TogetherReply(12, False, SETTINGS, REPLACED[2]))
    ]
    assert gathering.leader is None
    ask(gathering, 1)
    assert gathering.begin({1}) == [(1, m.TogetherReply(11, True, None))]


def test_an_error_of_the_leader_is_told_to_all() -> None:
    gathering = Gathering()
    for rank in range(3):
        ask(gathering, rank)
    gathering.begin({0, 1, 2})
    assert gathering.conclude(("SaveError", "no"), None, REPLACED.__getitem__) == [
        (1, m.Failed(11, "SaveError", "no")),
        (2, m.Failed(12, "SaveError", "no")),
    ]


def test_calls_that_differ_are_refused() -> None:
    gathering = Gathering()
    ask(gathering, 0)
    ask(gathering, 1, "load('x')")
    answers = gathering.begin({0, 1})
    assert [rank for rank, _ in answers] == [0, 1]
    for _, answer in answers:
        assert isinstance(answer, m.Failed)
        error = from_wire(answer.name, answer.text)
        assert isinstance(error, SettingMismatch)
        assert "rank 0 calls save('x'), rank 1 calls load('x')" in str(error)
    assert gathering.begin({0, 1}) == []


def test_one_that_leaves_is_not_waited_for_and_a_leader_is_missed() -> None:
    gathering = Gathering()
    ask(gathering, 1)
    ask(gathering, 2)
    assert gathering.leave(0) == []
    assert gathering.begin({1, 2}) == [(1, m.TogetherReply(11, True, None))]
    ((rank, answer),) = gathering.leave(1)
    assert rank == 2
    assert isinstance(answer, m.Failed)
    assert isinstance(from_wire(answer.name, answer.text), PeerLostError)
    assert gathering.leader is None


def test_one_that_gives_up_may_ask_again() -> None:
    gathering = Gathering()
    ask(gathering, 0)
    gathering.give_up(0, 99)
    assert gathering.waiting(0, 10, {0, 1}) is not None
    gathering.give_up(0, 10)
    assert gathering.waiting(0, 10, {0, 1}) is None


def test_one_that_gave_up_waits_for_the_next_call() -> None:
    gathering = Gathering()
    ask(gathering, 0, "load('x')")
    ask(gathering, 1, "load('x')")
    assert gathering.begin({0, 1}) == [(0, m.TogetherReply(10, True, None))]
    gathering.give_up(1, 11)
    ask(gathering, 1, "save('y')")
    assert gathering.waiting(1, 11, {0, 1}) == m.Waiting(11, [0], "save('y')")
    assert gathering.waiters() == [(1, 11)]
    assert gathering.conclude(None, SETTINGS, REPLACED.__getitem__) == []
    assert gathering.waiting(1, 11, {0, 1}) == m.Waiting(11, [0], "save('y')")
    ask(gathering, 0, "save('y')")
    assert gathering.begin({0, 1}) == [(0, m.TogetherReply(10, True, None))]
    gathering.give_up(1, 11)
    ask(gathering, 1)
    gathering.give_up(1, 11)
    assert gathering.waiters() == []
    ask(gathering, 1)
    assert gathering.leave(1) == []
    assert gathering.waiters() == []


def meet(gathering: Gathering, rank: int) -> None:
    gathering.add(rank, m.Together(20 + rank, 1, "save('x')", only_meet=True))


def test_those_that_only_meet_are_all_told_when_the_last_has_come() -> None:
    gathering = Gathering()
    meet(gathering, 1)
    assert gathering.begin({0, 1}) == []
    assert gathering.waiting(1, 21, {0, 1}) == m.Waiting(21, [0], "save('x')")
    meet(gathering, 0)
    assert gathering.begin({0, 1}) == [
        (0, m.TogetherReply(20, False, None)),
        (1, m.TogetherReply(21, False, None)),
    ]
    assert gathering.leader is None
    ask(gathering, 1)
    assert gathering.begin({0, 1}) == []  # now each has to come again
    ask(gathering, 0)
    assert gathering.begin({0, 1}) == [(0, m.TogetherReply(10, True, None))]


def test_meeting_and_calling_is_not_the_same() -> None:
    gathering = Gathering()
    ask(gathering, 0)
    meet(gathering, 1)
    answers = gathering.begin({0, 1})
    assert [rank for rank, _ in answers] == [0, 1]
    for _, answer in answers:
        assert isinstance(answer, m.Failed)
        assert "rank 0 calls save('x'), rank 1 begins save('x')" in answer.text
