"""What we ask of ourselves: so many times as fast as a peer, within so much of the floor, or in time."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harness import Times

from tensorkv.bench.report import three_digits

COLUMNS = ("case", "step", "asked", "found", "reached")


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """Something asked of one step of ours. Made by `faster`, `within` and `time`."""

    case: str
    step: tuple[str, str]  # system and way
    peer: tuple[str, str] | None = None
    at_least: float | None = None
    at_most: float | None = None
    median_ms: float | None = None
    p99_ms: float | None = None

    @classmethod
    def faster(cls, case: str, system: str, way: str, peer: str, peer_way: str, times: float) -> Goal:
        """Return: at least so many times as fast as the peer's step."""
        return cls(case=case, step=(system, way), peer=(peer, peer_way), at_least=times)

    @classmethod
    def within(cls, case: str, system: str, way: str, peer: str, peer_way: str, times: float) -> Goal:
        """Return: at most so many times as long as the peer's step."""
        return cls(case=case, step=(system, way), peer=(peer, peer_way), at_most=times)

    @classmethod
    def time(cls, case: str, system: str, way: str, *, median_ms: float, p99_ms: float | None = None) -> Goal:
        """Return: at most so long."""
        return cls(case=case, step=(system, way), median_ms=median_ms, p99_ms=p99_ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A goal, and what was found."""

    goal: Goal
    asked: str
    found: str
    reached: bool

    def cells(self) -> list[str]:
        """Return the texts of a row, one per column."""
        return [
            self.goal.case,
            ", ".join(self.goal.step),
            self.asked,
            self.found,
            "yes" if self.reached else "NO",
        ]


def judge(goals: Sequence[Goal], times: Mapping[str, Mapping[str, Times]]) -> list[Verdict]:
    """Return a verdict for each goal whose systems were measured.

    Args:
        goals: what is asked.
        times: what `measure` returned, by case.
    """
    found = []
    for goal in goals:
        systems = times.get(goal.case, {})
        ours = _rounds(systems, goal.step)
        theirs = None if goal.peer is None else _rounds(systems, goal.peer)
        if ours and (goal.peer is None or theirs):
            found.append(_in_time(goal, ours) if theirs is None else _against(goal, ours, theirs))
    return found


def _rounds(systems: Mapping[str, Times], step: tuple[str, str]) -> list[list[float]] | None:
    system, way = step
    return systems.get(system, {}).get(way)


def _against(goal: Goal, ours: list[list[float]], theirs: list[list[float]]) -> Verdict:
    """Compare round by round: a round's jobs have run within a minute, on a machine that drifts."""
    assert goal.peer is not None
    peer = " ".join(goal.peer)
    times = statistics.median(
        statistics.median(each) / statistics.median(base) for each, base in zip(theirs, ours, strict=True)
    )
    if goal.at_least is not None:
        return Verdict(
            goal=goal,
            asked=f"≥ {goal.at_least:g} times as fast as {peer}",
            found=three_digits(times),
            reached=times >= goal.at_least,
        )
    assert goal.at_most is not None
    return Verdict(
        goal=goal,
        asked=f"≤ {goal.at_most:g} times as long as {peer}",
        found=three_digits(1 / times),
        reached=1 / times <= goal.at_most,
    )


def _in_time(goal: Goal, ours: list[list[float]]) -> Verdict:
    assert goal.median_ms is not None
    all_ms = sorted(time_s * 1e3 for times_s in ours for time_s in times_s)
    median_ms, p99_ms = statistics.median(all_ms), all_ms[min(len(all_ms) - 1, int(len(all_ms) * 0.99))]
    asked, found = f"≤ {goal.median_ms:g} ms", f"{three_digits(median_ms)} ms"
    reached = median_ms <= goal.median_ms
    if goal.p99_ms is not None:
        asked += f", p99 ≤ {goal.p99_ms:g} ms"
        found += f", p99 {three_digits(p99_ms)} ms"
        reached = reached and p99_ms <= goal.p99_ms
    return Verdict(goal=goal, asked=asked, found=found, reached=reached)
