"""Policies: when a round is merged, and what a pull may see. One per store.

A policy is pure. The shard asks it at each push, at each call that may wait, when a worker leaves or deletes
keys, and when time has passed. It changes nothing but what it counts in a cohort: `progress`, `num_late` and
`due_s`.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from typing import final

from tensorkv.errors import ProtocolError
from tensorkv.server.cohorts import Cohort
from tensorkv.wire.messages import StorePolicy


class Policy(ABC):
    """The rules of one store. The peers whose pushes a round needs are the `members` of its cohort."""

    allows_commit = False
    """Whether a push may wait for a commit."""

    counts_pushes = False
    """Whether `count_push` must see each push."""

    pulls_wait_for_others = False
    """Whether pulls wait for pushes of other peers, which may come before their round is complete."""

    settings_wait = False
    """Whether a setting holds from its peer's next round on; else it holds on arrival."""

    saves_alone = False
    """Whether a peer can save alone: only a put changes a slice from its last round to its next push."""

    has_deadlines = False
    """Whether a round may merge because time has passed; the shard then calls `deadline_s`."""

    carries = False
    """Whether a late push counts in the open round. Its peer's pulls need not wait for that round."""

    @abstractmethod
    def merges(self, cohort: Cohort) -> bool:
        """Whether the open round is complete."""

    def count_push(self, cohort: Cohort, peer: int) -> bool:
        """Note a push, before it enters the inbox; return whether it counts. If not, the shard drops it."""
        return True

    def deadline_s(self, cohort: Cohort, now_s: float) -> float | None:
        """Return when the open round merges although it is not complete; None if that needs more pushes.

        The answer stays in `cohort.due_s`. `now_s` is of a clock that never goes back.
        """
        return None

    def last_round(self, cohort: Cohort, peer: int) -> int:
        """Return the round that a peer's last push belongs to. Its next put waits until that is applied."""
        return cohort.applied + 1 if peer in cohort.inbox else cohort.applied

    def needed(self, cohort: Cohort, peer: int) -> int | None:
        """Return what `reached` must be before a pull by this peer gets the value; None if it gets it now."""
        return cohort.applied + 1 if peer in cohort.inbox else None  # its last round

    def reached(self, cohort: Cohort) -> int:
        """Return how far the cohort has come, as `needed` counts."""
        return cohort.applied

    def missing(self, cohort: Cohort, needed: int) -> list[int]:
        """Return the peers that a call waits for, by rank, if it waits for this `needed`."""
        return sorted(cohort.members - cohort.inbox.keys())

    def alike(self, one: Cohort, other: Cohort) -> bool:
        """Whether two cohorts at rest may join: whether later pushes count alike in both."""
        return True


@final
class Sync(Policy):
    """A round has a push of every member. A pull waits for its peer's last round, so runs repeat."""

    allows_commit = True
    settings_wait = True
    saves_alone = True

    def merges(self, cohort: Cohort) -> bool:
        if len(cohort.inbox) < len(cohort.members):  # the usual answer
            return False
        return bool(cohort.inbox) and cohort.members <= cohort.inbox.keys()


@final
class Async(Policy):
    """Each push is a round of its own, applied as it arrives. So no call waits."""

    def merges(self, cohort: Cohort) -> bool:
        return bool(cohort.inbox)


@final
class BoundedStaleness(Policy):
    """Async, but a pull waits until no member is more than `staleness` pushes of the key behind its own peer.

    `progress` has the number of pushes by peer.

    Source: stale synchronous parallel (Ho et al., "More Effective Distributed ML via a Stale Synchronous
    Parallel Parameter Server", NIPS 2013), counted by key, not by clock.
    """

    counts_pushes = True
    pulls_wait_for_others = True

    def __init__(self, staleness: int) -> None:
        self.staleness = staleness

    def merges(self, cohort: Cohort) -> bool:
        return bool(cohort.inbox)

    def count_push(self, cohort: Cohort, peer: int) -> bool:
        cohort.progress[peer] = cohort.progress.get(peer, 0) + 1
        return True

    def needed(self, cohort: Cohort, peer: int) -> int | None:
        needed = cohort.progress.get(peer, 0) - self.staleness
        return needed if self.reached(cohort) < needed else None

    def reached(self, cohort: Cohort) -> int:
        return min((cohort.progress.get(peer, 0) for peer in cohort.members), default=sys.maxsize)

    def missing(self, cohort: Cohort, needed: int) -> list[int]:
        return sorted(peer for peer in cohort.members if cohort.progress.get(peer, 0) < needed)

    def alike(self, one: Cohort, other: Cohort) -> bool:
        return one.progress == other.progress


@final
class Quorum(Policy):
    """Sync, but a round does not wait for the slowest: it merges `grace_s` after its `quorum`-th push.

    A push belongs to the round after its peer's last. It is late if that round is merged already: then it is
    dropped, and its peer stands at the newest merged round; or, with `carries`, it counts for the open round.
    `progress` has the round at which each peer stands.

    Source: backup workers (Chen et al., "Revisiting Distributed Synchronous SGD", 2016), which drop what is
    late. They have no time of grace, and nothing is carried.
    """

    counts_pushes = True
    has_deadlines = True

    def __init__(self, quorum: int, grace_s: float, carries: bool) -> None:
        self.quorum = quorum
        self.grace_s = grace_s
        self.carries = carries

    def merges(self, cohort: Cohort) -> bool:
        if self.grace_s == 0.0 and len(cohort.inbox) >= self.quorum:
            return True
        return bool(cohort.inbox) and cohort.members <= cohort.inbox.keys()  # fewer than a quorum may be left

    def count_push(self, cohort: Cohort, peer: int) -> bool:
        if cohort.progress.get(peer, 0) >= cohort.applied:
            cohort.progress[peer] = cohort.applied + 1
            return True
        cohort.num_late += 1
        cohort.progress[peer] = cohort.applied + self.carries
        if self.carries:
            cohort.carried.add(peer)
        return self.carries

    def needed(self, cohort: Cohort, peer: int) -> int | None:
        # Nobody else may push again before the peer of a late push does: if each of several waited for the
        # round of the slice that it was late for, all would wait.
        return None if peer in cohort.carried else super().needed(cohort, peer)

    def deadline_s(self, cohort: Cohort, now_s: float) -> float | None:
        if cohort.due_s is None and len(cohort.inbox) >= self.quorum:
            cohort.due_s = now_s + self.grace_s
        return cohort.due_s

    def alike(self, one: Cohort, other: Cohort) -> bool:
        return self._behind(one) == self._behind(other)

    def _behind(self, cohort: Cohort) -> set[int]:
        return {peer for peer in cohort.members if cohort.progress.get(peer, 0) < cohort.applied}


def make_policy(spec: StorePolicy) -> Policy:
    """Return the policy of a store.

    Raises:
        ProtocolError: there is no such policy.
    """
    staleness, quorum = spec.staleness, spec.quorum
    if quorum is not None:
        if spec.name == "sync" and staleness is None and quorum >= 1 and 0 <= spec.grace_s < math.inf:
            return Quorum(quorum, spec.grace_s, spec.late == "carry")
    elif staleness is not None:
        if spec.name == "async" and staleness >= 0:
            return BoundedStaleness(staleness)
    elif spec.name == "sync":
        return Sync()
    else:
        return Async()
    raise ProtocolError(f"there is no policy with {spec}")
