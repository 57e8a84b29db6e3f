"""Policies: when a round is merged, who may push, and what a pull may see. One per store.

A policy is pure. It looks at cohorts, and changes none; the shard asks it at each push, pull and leave.
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

    def __init__(self, members: set[int]) -> None:
        self.members = members

    @abstractmethod
    def merges(self, cohort: Cohort) -> bool:
        """Whether the open round is complete."""

    def last_round(self, cohort: Cohort, peer: int) -> int:
        """Return the round that a peer's last push belongs to: its next setting holds after that.

        A pull or put by this peer waits until that round is applied.
        """
        return cohort.applied + 1 if peer in cohort.inbox else cohort.applied

    def missing(self, cohort: Cohort) -> list[int]:
        """Return the peers that the open round waits for, by rank."""
        return sorted(self.members - cohort.inbox.keys())


@final
class Sync(Policy):
    """A round has a push of every member. A pull waits for its peer's last round, so runs repeat."""

    allows_commit = True

    def merges(self, cohort: Cohort) -> bool:
        inbox = cohort.inbox
        return len(inbox) >= len(self.members) and bool(inbox) and self.members <= inbox.keys()


@final
class Async(Policy):
    """Each push is a round of its own, applied as it comes. So nobody waits."""

    def merges(self, cohort: Cohort) -> bool:
        return bool(cohort.inbox)


_POLICIES: dict[str, type[Policy]] = {"sync": Sync, "async": Async}


def make_policy(name: str, members: set[int]) -> Policy:
    """Return the policy of a store.

    Raises:
        ProtocolError: there is none of this name.
    """
    found = _POLICIES.get(name)
    if found is None:
        raise ProtocolError(f"there is no policy {name!r}")
    return found(members)
