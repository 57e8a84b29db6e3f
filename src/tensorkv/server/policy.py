"""Policies: when a round is merged, and what a pull may see. One per store.

A policy is pure: it sees cohorts, and changes none. The shard asks it at each push and at each call that may
wait, and when a worker leaves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

from tensorkv.errors import ProtocolError
from tensorkv.server.cohorts import Cohort


class Policy(ABC):
    """The rules of one store. `members` are the peers that contribute and have not left."""

    allows_commit = False
    """Whether a push may wait for a commit."""

    pulls_wait_for_others = False
    """Whether pulls wait for pushes of other peers. The cohorts then count the pushes of each peer."""

    def __init__(self, members: set[int]) -> None:
        self.members = members

    @abstractmethod
    def merges(self, cohort: Cohort) -> bool:
        """Whether the open round is complete."""

    def last_round(self, cohort: Cohort, peer: int) -> int:
        """Return the round that a peer's last push belongs to: its next setting holds after that.

        A put by this peer waits until that round is applied.
        """
        return cohort.applied + 1 if peer in cohort.inbox else cohort.applied

    def needed(self, cohort: Cohort, peer: int) -> int:
        """Return what `reached` must be before a pull by this peer gets the value."""
        return cohort.applied + 1 if peer in cohort.inbox else cohort.applied  # its last round

    def reached(self, cohort: Cohort) -> int:
        """Return how far the cohort has come, as `needed` counts."""
        return cohort.applied

    def missing(self, cohort: Cohort, needed: int) -> list[int]:
        """Return the peers that a call waits for, by rank, if it waits for this `needed`."""
        return sorted(self.members - cohort.inbox.keys())


@final
class Sync(Policy):
    """A round has a push of every member. A pull waits for its peer's last round, so runs repeat."""

    allows_commit = True

    def merges(self, cohort: Cohort) -> bool:
        if len(cohort.inbox) < len(self.members):  # the usual answer
            return False
        return bool(cohort.inbox) and self.members <= cohort.inbox.keys()


@final
class Async(Policy):
    """Each push is a round of its own, applied as it arrives. So no call waits."""

    def merges(self, cohort: Cohort) -> bool:
        return bool(cohort.inbox)


@final
class BoundedStaleness(Policy):
    """Async, but a pull waits until no member is more than `staleness` pushes of the key behind its own peer.

    Source: stale synchronous parallel (Ho et al., "More Effective Distributed ML via a Stale Synchronous
    Parallel Parameter Server", NIPS 2013), counted by key, not by clock.
    """

    pulls_wait_for_others = True

    def __init__(self, members: set[int], staleness: int) -> None:
        super().__init__(members)
        self.staleness = staleness

    def merges(self, cohort: Cohort) -> bool:
        return bool(cohort.inbox)

    def needed(self, cohort: Cohort, peer: int) -> int:
        return cohort.pushed.get(peer, 0) - self.staleness

    def reached(self, cohort: Cohort) -> int:
        return min((cohort.pushed.get(peer, 0) for peer in self.members), default=0)

    def missing(self, cohort: Cohort, needed: int) -> list[int]:
        return sorted(peer for peer in self.members if cohort.pushed.get(peer, 0) < needed)


def make_policy(name: str, members: set[int], staleness: int | None = None) -> Policy:
    """Return the policy of a store.

    Raises:
        ProtocolError: there is no such policy.
    """
    if staleness is not None:
        if name != "async" or staleness < 0:
            raise ProtocolError(f"there is no policy {name!r} with staleness {staleness}")
        return BoundedStaleness(members, staleness)
    if name == "sync":
        return Sync(members)
    if name == "async":
        return Async(members)
    raise ProtocolError(f"there is no policy {name!r}")
