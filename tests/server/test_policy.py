"""Policies: when a round is merged, and what a pull waits for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tensorkv.errors import ProtocolError
from tensorkv.server.cohorts import Cohort
from tensorkv.server.policy import Async, Sync, make_policy


def cohort(*contributed: int, held: bool = False) -> Cohort:
    made = Cohort()
    made.applied, made.held = 4, held
    made.inbox = dict.fromkeys(contributed, object())  # type: ignore[assignment]
    return made


def test_sync_merges_when_all_members_have_contributed() -> None:
    members = {0, 1, 2}
    policy = Sync(members)
    assert not policy.merges(cohort())
    assert not policy.merges(cohort(0, 2))
    assert policy.merges(cohort(2, 0, 1))
    assert policy.missing(cohort(1)) == [0, 2]
    members.discard(1)
    assert policy.merges(cohort(0, 2))
    assert not policy.merges(cohort(0, 1))  # who has left counts, but stands for nobody
    assert policy.merges(cohort(0, 1, 2))
    members.clear()
    assert policy.merges(cohort(1))
    assert not policy.merges(cohort())


def test_in_sync_a_pull_waits_for_its_own_last_push() -> None:
    policy = Sync({0, 1})
    assert policy.last_round(cohort(1), 0) == 4
    assert policy.last_round(cohort(1), 1) == 5
    assert policy.last_round(cohort(0, 1, held=True), 1) == 5
    assert policy.allows_commit


def test_async_merges_each_push_and_makes_nobody_wait() -> None:
    policy = Async({0, 1})
    assert policy.merges(cohort(1))
    assert not policy.merges(cohort())
    assert policy.last_round(cohort(), 1) == 4
    assert not policy.allows_commit


def test_a_policy_is_made_by_its_name() -> None:
    assert isinstance(make_policy("sync", set()), Sync)
    assert isinstance(make_policy("async", set()), Async)
    with pytest.raises(ProtocolError, match="no policy 'eventual'"):
        make_policy("eventual", set())


def test_only_sync_takes_pushes_for_a_commit(t: Any) -> None:
    bench = t.Bench(1, policy="async")
    plan = bench.define(0, t.dense(bench.init("w", torch.zeros(2)), [2]))
    with pytest.raises(ProtocolError, match="for a commit"):
        bench.push(0, plan, torch.ones(2), apply=False)
    assert bench.value(0, plan).tolist() == [0.0, 0.0]
    bench.check_empty()
