"""Cohorts: slices with one history, and the rounds that they are in.

THEORY OF OPERATION
A training loop pushes the same keys in every step, so the same numbers stand for all their slices: which
round is open, and who has contributed to it. A cohort holds these numbers once for all of its slices. So a
push, a merge and an update of a thousand slices in one cohort cost as much bookkeeping as those of one slice.

What a cohort says is true of each of its slices. So a push that names part of a cohort first splits it, into
the slices that the push names and the rest; both go on with the same open round. Pulls and puts only look at
cohorts, and split none. The slices that nobody has pushed are in one cohort, however many they are.

Joining is the reverse. It is there for speed alone. Cohorts with the same members may join when they are at
rest, that is when no round of theirs is open or held and no call waits. Then they differ only in the numbers
of their rounds and updates, and each slice keeps the difference (`Slice.round_offset`,
`Slice.version_offset`). Where the policy counts pushes by peer, cohorts stay apart in which later pushes
would count differently. A layout joins the cohorts that it covers when a push has found them at rest for the
`patience`-th time, at first the second. When what a layout has joined is split, its patience doubles. So if a
store's keys are pushed in one list now and in others then, its cohorts soon stay as small as the smallest
list needs them. Otherwise each step would split and join a thousand of them.

RULES
1. The slices of a cohort have the same members, the same contributors in the open round, and the same
   numbers in `progress`.
2. `applied` counts rounds, also empty and failed ones; `updates` counts successful updates of the cohort.
   What differs by slice (a failed update, a put, a later start) is in the slice's offsets, and so is what
   differs in `num_late`.
3. A held round is merged but not applied: it waits for a commit.
4. A peer has at most one contribution to a cohort: to the open round, or to the held one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import msgspec

if TYPE_CHECKING:
    from tensorkv.server.layouts import Chunk, Contribution, Layout, Slice
    from tensorkv.server.memory import Memory

FIRST_PATIENCE = 2
"""Pushes that find the cohorts of their layout at rest before these are joined for the first time."""


@final
class Wait(msgspec.Struct, eq=False):
    """A chunk that a worker waits for. `late` counts the cohorts that have not reached what it needs.

    A pull is answered by the values of the chunk; `put` has those of a put.
    """

    worker: int
    request: int
    layout: Layout
    chunk: int
    late: int = 0
    put: tuple[Chunk, Memory] | None = None


@final
@dataclass(slots=True, eq=False)
class MergeWait:
    """Slices whose merging a worker waits for, each with its position in the worker's plan."""

    worker: int
    request: int
    layout: Layout
    numbers: dict[Slice, int]


@final
class Cohort:
    """Slices with one history.

    `members` are the peers that contribute: all that have neither left the store nor deleted these slices. As
    long as nobody has deleted any, it is the set of the store itself. `inbox` has the contributions of the
    open round, or of the held one, by peer. `progress` and `due_s` are the policy's: a number for each peer,
    and the time at which the open round merges, None if there is none. `num_late` counts pushes that came
    after their round had merged, `carried` has the peers of those that count in the open round. `waits` has
    the calls that wait, each with the number that the policy must reach first; `merge_waits` those that wait
    for the open round to merge.
    """

    __slots__ = (
        "applied",
        "carried",
        "due_s",
        "held",
        "inbox",
        "joined_by",
        "members",
        "merge_waits",
        "num_late",
        "progress",
        "slices",
        "updates",
        "waits",
    )

    def __init__(self, members: set[int]) -> None:
        self.members = members
        self.slices: dict[Slice, None] = {}  # in the order in which they came
        self.applied = 0
        self.updates = 0
        self.held = False
        self.inbox: dict[int, Contribution] = {}
        self.progress: dict[int, int] = {}
        self.due_s: float | None = None
        self.num_late = 0
        self.carried: set[int] = set()
        self.waits: list[tuple[int, Wait]] = []
        self.merge_waits: list[MergeWait] = []
        self.joined_by: Layout | None = None

    @property
    def merged(self) -> int:
        """The number of merged rounds."""
        return self.applied + self.held

    @property
    def is_new(self) -> bool:
        """Whether no slice was ever pushed, so that a new slice has the same history."""
        return not self.applied and self.at_rest and self.joined_by is None

    @property
    def at_rest(self) -> bool:
        """Whether no round is open or held, and nobody waits."""
        return not (self.inbox or self.held or self.waits or self.merge_waits)

    def contributions(self) -> list[Contribution]:
        """Return what was contributed to the open or held round, by rank: the order of every sum."""
        inbox = self.inbox
        return list(map(inbox.__getitem__, sorted(inbox)))

    def finish_round(self) -> None:
        """The round is applied, whatever came of it; the next one is open."""
        self.applied += 1
        self.held = False
        self.inbox = {}
        self.due_s = None
        if self.carried:
            self.carried = set()

    def add(self, each: Slice) -> None:
        """Take in a slice that has the history of the others."""
        each.cohort = self
        self.slices[each] = None

    def end(self) -> None:
        """Drop all slices: no member needs them, nobody waits, and nothing is contributed.

        This ends the reference cycles that would keep their memory until gc finds them.
        """
        self.slices = {}
        self.joined_by = None
        self.due_s = None

    def split(self, slices: Iterable[Slice]) -> Cohort:
        """Move slices to a cohort of their own, with the same history, and return it."""
        part = Cohort(self.members)
        part.applied, part.updates, part.held = self.applied, self.updates, self.held
        part.inbox, part.progress = dict(self.inbox), dict(self.progress)
        part.due_s, part.num_late, part.carried = self.due_s, self.num_late, set(self.carried)
        for each in slices:
            del self.slices[each]
            part.add(each)
        if self.waits:
            waits, self.waits = self.waits, []
            for need, wait in waits:
                concerned = self._concerned(wait, part)
                wait.late += len(concerned) - 1
                for cohort in concerned:
                    cohort.waits.append((need, wait))
        if self.merge_waits:
            merge_waits, self.merge_waits = self.merge_waits, []
            for merge_wait in merge_waits:
                for cohort in self._concerned(merge_wait, part):
                    cohort.merge_waits.append(merge_wait)
        if self.joined_by is not None:
            self.joined_by.patience *= 2
            self.joined_by = None
        return part

    def _concerned(self, wait: Wait | MergeWait, part: Cohort) -> list[Cohort]:
        """Return those of this cohort and a part split from it that a call waits for."""
        position = wait.layout.position
        return [each for each in (self, part) if any(slice_ in position for slice_ in each.slices)]

    def join(self, other: Cohort) -> None:
        """Take over the slices of another cohort. Both must be at rest."""
        rounds, updates = other.applied - self.applied, other.updates - self.updates
        num_late = other.num_late - self.num_late
        for each in other.slices:
            each.round_offset += rounds
            each.version_offset += updates
            each.late_offset += num_late
            self.add(each)
        other.slices = {}


def cohorts_of(slices: Iterable[Slice]) -> list[Cohort]:
    """Return the cohorts of slices, each once, in the order of the slices."""
    return list(dict.fromkeys(each.cohort for each in slices))


def split_for(slices: Iterable[Slice]) -> list[Cohort]:
    """Split cohorts of which only some slices are named; return those that have just these slices."""
    named: dict[Cohort, list[Slice]] = {}
    for each in slices:
        named.setdefault(each.cohort, []).append(each)
    return [
        cohort if len(found) == len(cohort.slices) else cohort.split(found) for cohort, found in named.items()
    ]


def join_for(
    layout: Layout, cohorts: Sequence[Cohort], alike: Callable[[Cohort, Cohort], bool]
) -> Cohort | None:
    """Join the cohorts that a layout covers, if they are at rest, and it has found them so often enough.

    `alike` says whether the policy lets two of them join.
    """
    first = cohorts[0]
    if not all(each.at_rest and each.members == first.members and alike(first, each) for each in cohorts):
        return None
    layout.found_at_rest += 1
    if layout.found_at_rest < layout.patience:
        return None
    layout.found_at_rest = 0
    for other in cohorts[1:]:
        first.join(other)
    first.joined_by = layout
    return first
