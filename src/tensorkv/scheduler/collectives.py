"""Collective calls: all workers of a store make them, and one carries them out (save, load).

A save takes two gatherings. In the first, all workers only meet. Then each blocks its other threads'
calls on the store, flushes what they have sent, and enters the second. So the leader sees a consistent
snapshot of every key, and no worker blocks its threads while another still needs them to arrive.

RULES
1. A call begins when every member has asked for it; all must have asked for the same.
2. The lowest rank leads: it is told to, carries out the call, and concludes. Then all others are told.
3. If the leader leaves before it concludes, the others get an error.
4. If they only meet, no rank leads, and all are answered at once.
5. A rank that arrives while another leads has given up its part in that call: it waits for the next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import final

from tensorkv.checkpoint.records import SavedSettings
from tensorkv.errors import PeerLostError, SettingMismatch, to_wire
from tensorkv.wire import messages as m

Answers = list[tuple[int, m.Message]]


@final
class Gathering:
    """The collective call of one store that is under way, if any."""

    def __init__(self) -> None:
        self.leader: int | None = None
        self._asked: dict[int, m.Together] = {}
        self._next: dict[int, m.Together] = {}

    def add(self, rank: int, message: m.Together) -> None:
        """Add a rank that has arrived."""
        asked = self._asked if self.leader is None else self._next
        asked[rank] = message

    def begin(self, members: set[int]) -> Answers:
        """If all have arrived, let the lowest rank lead, or refuse all."""
        if self.leader is not None or not self._asked or not members <= set(self._asked):
            return []
        asked = sorted(self._asked.items())
        if len({(each.call, each.only_meet) for _, each in asked}) > 1:
            differ = (
                len({each.only_meet for _, each in asked}) > 1
            )  # one rank has given the call up, and begins anew
            told = ", ".join(
                f"rank {rank} {'begins' if differ and each.only_meet else 'calls'} {each.call}"
                for rank, each in asked
            )
            return self._refuse(SettingMismatch(f"all workers have to make the same call, but {told}"))
        if asked[0][1].only_meet:
            self._asked.clear()
            return [(rank, m.TogetherReply(each.request, False, None)) for rank, each in asked]
        self.leader = min(self._asked)
        return [(self.leader, m.TogetherReply(self._asked[self.leader].request, True, None))]

    def conclude(
        self,
        error: tuple[str, str] | None,
        settings: SavedSettings | None,
        replaced_for: Callable[[int], list[m.KeyEntry]],
    ) -> Answers:
        """Tell the others that the leader is done, and the keys that a load has replaced, by rank."""
        answers: Answers = []
        for rank, each in sorted(self._asked.items()):
            if rank != self.leader:
                failed = None if error is None else m.Failed(each.request, *error)
                answers.append(
                    (rank, failed or m.TogetherReply(each.request, False, settings, replaced_for(rank)))
                )
        self._end()
        return answers

    def _end(self) -> None:
        self.leader = None
        self._asked, self._next = self._next, {}

    def leave(self, rank: int) -> Answers:
        """Remove a rank that has left. If it led, refuse the call of the others."""
        self._next.pop(rank, None)
        asked = self._asked.pop(rank, None)
        if asked is None or rank != self.leader:
            return []
        return self._refuse(
            PeerLostError(f"rank {rank} has left in the middle of {asked.call}, which it led")
        )

    def give_up(self, rank: int, request: int) -> None:
        """Withdraw a rank's call that has reached its deadline. A leader's call stays."""
        if rank in self._next and self._next[rank].request == request:
            del self._next[rank]
        elif rank != self.leader and rank in self._asked and self._asked[rank].request == request:
            del self._asked[rank]

    def waiting(self, rank: int, request: int, members: set[int]) -> m.Waiting | None:
        """Return which ranks a request waits for, None if it is not this call."""
        for asked in (self._asked, self._next):
            if rank in asked and asked[rank].request == request:
                missing = sorted(members - set(asked)) if self.leader is None else [self.leader]
                return m.Waiting(request, missing, asked[rank].call)
        return None

    def waiters(self) -> list[tuple[int, int]]:
        """Return rank and request of every waiting call: all but the leader's."""
        led = [(rank, each.request) for rank, each in sorted(self._asked.items()) if rank != self.leader]
        return led + [(rank, each.request) for rank, each in sorted(self._next.items())]

    def _refuse(self, error: Exception) -> Answers:
        answers: Answers = [
            (rank, m.Failed(each.request, *to_wire(error))) for rank, each in sorted(self._asked.items())
        ]
        self._end()
        return answers
