"""Lockstep: plain counters for a layout whose slices every worker pushes together, round after round.

Training loops do just that. The arrays of `rounds` then hold the same numbers for every slice of the
layout, and a few integers stand for them: a message costs a tenth of the array operations, which
shows where keys are few and small. The shard takes up lockstep when a layout is at rest (no round of it
is open) and ends it, writing everything back to the arrays, before anything else touches its slices.

RULES
1. While it lasts, each worker has pushed `round` times, or once more if `open[worker]` is there.
2. `round` counts merged and applied rounds alike. No slice is held for a commit, nobody has left.
3. Every push has apply=True, no setting waits for its round, and no update has failed.
"""

from __future__ import annotations

from typing import final

import numpy as np

from tensorkv.server.layouts import Chunk, Layout
from tensorkv.server.memory import Memory
from tensorkv.server.rounds import Rounds

MIN_ROUNDS = 8
"""A lockstep that another list of keys ends before this many rounds is not taken up again."""


@final
class Lockstep:
    """The state of one layout, from the moment it was at rest."""

    def __init__(self, layout: Layout, num_workers: int) -> None:
        self.layout = layout
        self.round = 0  # since the beginning
        self.version = 0
        self.open: list[tuple[Chunk, Memory] | None] = [None] * num_workers  # what each has pushed
        self.arrived = 0
        self.pulls: list[tuple[int, int, int]] = []  # worker, request, chunk: each waits for the open round

    def add(self, worker: int, chunk: Chunk, payload: Memory) -> bool:
        """Take in a push, and return whether it was the last of the round."""
        self.open[worker] = (chunk, payload)
        self.arrived += 1
        return self.arrived == len(self.open)

    def take(self) -> tuple[list[tuple[Chunk, Memory]], list[tuple[int, int, int]]]:
        """The round is complete: return what was pushed in rank order and who waits, and begin the next."""
        pushed, self.open = self.open, [None] * len(self.open)
        pulls, self.pulls = self.pulls, []
        self.arrived = 0
        self.round += 1
        return pushed, pulls  # type: ignore[return-value]  # complete: nobody's is missing

    def write_back(self, rounds: Rounds) -> None:
        """Write the counters of whole rounds to the arrays they stand for. Open pushes are the caller's."""
        index = self.layout.index
        rounds.pushed[:, index] += self.round
        rounds.merged[index] += self.round
        rounds.applied[index] += self.round
        rounds.version[index] += self.version


def is_at_rest(layout: Layout, rounds: Rounds) -> bool:
    """Whether no round of any slice is open or held, and all slices are in the same round."""
    index = layout.index
    applied = rounds.applied[index]
    return bool(
        (applied == applied[0]).all()
        and (rounds.merged[index] == applied).all()
        and (rounds.pushed[:, index] == applied).all()
        and not np.any(rounds.left)
    )
