"""The policy of a store, from the options of `create`."""

from __future__ import annotations

from typing import Any

import pytest

from tensorkv.errors import InvalidArgument
from tensorkv.stores.policy import policy_of
from tensorkv.stores.registry import create
from tensorkv.wire.messages import StorePolicy


def test_each_kind_has_its_policy() -> None:
    assert policy_of("dist_sync") == policy_of("dist") == StorePolicy("sync")
    assert policy_of("dist_async") == StorePolicy("async")
    assert policy_of("dist_async", staleness=3) == StorePolicy("async", 3)
    assert policy_of("dist_sync", quorum=2) == StorePolicy("sync", None, 2)
    carried = policy_of("dist_sync", quorum=2, grace_s=1, late="carry")
    assert carried == StorePolicy("sync", None, 2, 1.0, "carry")
    assert type(carried.grace_s) is float


@pytest.mark.parametrize(
    ("kind", "options", "text"),
    [
        ("dist_sync", {"staleness": 1}, "staleness=1 makes no sense for kind 'dist_sync'"),
        ("dist_async", {"quorum": 1}, "quorum=1 makes no sense for kind 'dist_async'"),
        ("dist_async", {"quorum": 1, "staleness": 1}, "quorum=1 makes no sense"),
        ("dist_sync", {"grace_s": 1.0}, "grace_s=1.0 makes no sense without quorum"),
        ("dist_sync", {"late": "carry"}, "late='carry' makes no sense without quorum"),
        ("dist_sync", {"quorum": 1, "late": "wait"}, "late='wait' is not known; use 'drop' or 'carry'"),
        ("dist_sync", {"quorum": 1, "late": ["drop"]}, "is not known"),
    ],
)
def test_options_that_make_no_sense_are_refused(kind: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        policy_of(kind, **options)
    with pytest.raises(InvalidArgument, match=text):
        create(kind, embedded=True, **options)


@pytest.mark.parametrize("staleness", [-1, 1.5, True, "two", 2**63])
def test_a_staleness_that_cannot_be_is_refused(staleness: Any) -> None:
    with pytest.raises(InvalidArgument, match="not a number of pushes: pass an int, 0 or more"):
        policy_of("dist_async", staleness=staleness)


@pytest.mark.parametrize("quorum", [0, -1, 1.0, True, "two", 2**63])
def test_a_quorum_that_cannot_be_is_refused(quorum: Any) -> None:
    with pytest.raises(InvalidArgument, match="not a number of workers: pass an int, 1 or more"):
        policy_of("dist_sync", quorum=quorum)


@pytest.mark.parametrize("grace_s", [-0.1, float("nan"), float("inf"), "soon", None, 10**400])
def test_a_time_of_grace_that_cannot_be_is_refused(grace_s: Any) -> None:
    with pytest.raises(InvalidArgument, match="grace_s=.* is not a finite number, 0 or more"):
        policy_of("dist_sync", quorum=1, grace_s=grace_s)
