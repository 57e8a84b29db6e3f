"""Rounds: counting pushes, merging when everybody is there, and who is missing."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tensorkv.server.rounds import Rounds


def made(num_workers: int, num_slices: int) -> tuple[Rounds, np.ndarray]:
    rounds = Rounds(num_workers)
    return rounds, np.array([rounds.add() for _ in range(num_slices)], np.int64)


def test_a_round_is_merged_by_its_last_push() -> None:
    rounds, slices = made(2, 3)
    assert rounds.push(0, slices).tolist() == []
    assert rounds.push(1, slices[[2, 0]]).tolist() == [2, 0]  # in the order pushed
    rounds.merge(slices[[2, 0]])
    assert rounds.may_push(0, slices).tolist() == [True, False, True]
    assert rounds.missing(1) == [1]
    rounds.apply(slices[[2, 0]])
    assert rounds.applied[slices].tolist() == [1, 0, 1]


def test_a_withdrawn_push_has_not_been() -> None:
    rounds, slices = made(2, 1)
    rounds.push(1, slices)
    rounds.withdraw(1, slices)
    rounds.left[1] = True
    assert rounds.mergeable(slices).tolist() == []
    assert rounds.push(0, slices).tolist() == [0]


def test_an_index_is_used_again_from_round_zero() -> None:
    rounds, slices = made(2, 2)
    rounds.push_alone(0, slices)
    rounds.apply(slices)
    rounds.version[slices] += 1
    rounds.remove(1)
    assert rounds.add() == 1
    assert (rounds.pushed[:, 1].tolist(), rounds.merged[1], rounds.applied[1], rounds.version[1]) == (
        [0, 0], 0, 0, 0,
    )  # fmt: skip
    assert rounds.pushed[0, 0] == 1


def test_tables_grow_and_keep_what_they_hold() -> None:
    rounds, slices = made(2, 64)
    rounds.push(1, slices)
    more = [rounds.add() for _ in range(100)]
    assert more == list(range(64, 164))
    assert rounds.pushed[1, :164].tolist() == [1] * 64 + [0] * 100
    assert rounds.merged.shape == rounds.applied.shape == rounds.version.shape == rounds.pushed[0].shape


@given(
    num_workers=st.integers(1, 3),
    events=st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["push", "push", "push", "leave"]))),
)
def test_a_round_has_all_that_did_not_leave_before(num_workers: int, events: list[tuple[int, str]]) -> None:
    rounds, one = made(num_workers, 1)
    pushed = [0] * num_workers
    for worker, event in events:
        if worker >= num_workers or rounds.left[worker]:
            continue
        if event == "leave":
            rounds.left[worker] = True
            merged = rounds.mergeable(one)
        elif rounds.may_push(worker, one).all():
            pushed[worker] += 1
            merged = rounds.push(worker, one)
        else:
            assert pushed[worker] == rounds.merged[0] + 1
            continue
        rounds.merge(merged)
        staying = [count for each, count in enumerate(pushed) if not rounds.left[each]]
        assert rounds.merged[0] == (min(staying) if staying else max(pushed))
        assert rounds.missing(0) == [
            each for each in range(num_workers) if not rounds.left[each] and pushed[each] == rounds.merged[0]
        ]
