"""Our goals: faster than a peer by a factor, within a factor of the floor, or below a time."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harness import Times, ratio_of_rounds

from tensorkv.bench.report import three_digits

COLUMNS = ("case", "step", "asked", "found", "reached")


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A goal for one of our steps. Made by `faster`, `within` and `time`."""

    case: str
    step: tuple[str, str]  # system and way
    peer: tuple[str, str] | None = None
    at_least: float | None = None
    at_most: float | None = None
    median_ms: float | None = None
    p99_ms: float | None = None

    @classmethod
    def faster(cls, case: str, system: str, way: str, peer: str, peer_way: str, times: float) -> Goal:
        """Return the goal to be at least `times` as fast as the peer's step."""
        return cls(case=case, step=(system, way), peer=(peer, peer_way), at_least=times)

    @classmethod
    def within(cls, case: str, system: str, way: str, peer: str, peer_way: str, times: float) -> Goal:
        """Return the goal to take at most `times` as long as the peer's step."""
        return cls(case=case, step=(system, way), peer=(peer, peer_way), at_most=times)

    @classmethod
    def time(cls, case: str, system: str, way: str, *, median_ms: float, p99_ms: float | None = None) -> Goal:
        """Return the goal to take at most this long."""
        return cls(case=case, step=(system, way), median_ms=median_ms, p99_ms=p99_ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A goal and its measured result. `reached` is None if a job that it needs failed."""

    goal: Goal
    asked: str
    found: str
    reached: bool | None

    def cells(self) -> list[str]:
        """Return the texts of a row, one per column."""
        return [
            self.goal.case,
            ", ".join(self.goal.step),
            self.asked,
            self.found,
            "?" if self.reached is None else "yes" if self.reached else "NO",
        ]


def judge(goals: Sequence[Goal], times: Mapping[str, Mapping[str, Times]]) -> list[Verdict]:
    """Return a verdict for each goal whose systems were selected.

    Args:
        goals: the goals to judge.
        times: results of `measure`, by case. A system without times has failed.
    """
    found = []
    for goal in goals:
        systems = times.get(goal.case, {})
        steps = [goal.step] if goal.peer is None else [goal.step, goal.peer]
        if all(system in systems for system, _ in steps):
            found.append(_judge(goal, [systems[system].get(way, []) for system, way in steps]))
    return found


def _judge(goal: Goal, rounds: list[list[list[float]]]) -> Verdict:
    if not all(rounds):
        return Verdict(goal=goal, asked=_asked(goal), found="not measured", reached=None)
    return _in_time(goal, rounds[0]) if goal.peer is None else _against(goal, rounds[0], rounds[1])


def _asked(goal: Goal) -> str:
    peer = " ".join(goal.peer or ())
    if goal.at_least is not None:
        return f"≥ {goal.at_least:g} times as fast as {peer}"
    if goal.at_most is not None:
        return f"≤ {goal.at_most:g} times as long as {peer}"
    p99 = "" if goal.p99_ms is None else f", p99 ≤ {goal.p99_ms:g} ms"
    return f"≤ {goal.median_ms:g} ms{p99}"


def _against(goal: Goal, ours: list[list[float]], theirs: list[list[float]]) -> Verdict:
    if goal.at_least is not None:
        times = ratio_of_rounds(theirs, ours)
        reached = times >= goal.at_least
    else:
        assert goal.at_most is not None
        times = ratio_of_rounds(ours, theirs)
        reached = times <= goal.at_most
    return Verdict(goal=goal, asked=_asked(goal), found=three_digits(times), reached=reached)


def _in_time(goal: Goal, ours: list[list[float]]) -> Verdict:
    assert goal.median_ms is not None
    all_ms = sorted(time_s * 1e3 for times_s in ours for time_s in times_s)
    median_ms, p99_ms = statistics.median(all_ms), all_ms[min(len(all_ms) - 1, int(len(all_ms) * 0.99))]
    found, reached = f"{three_digits(median_ms)} ms", median_ms <= goal.median_ms
    if goal.p99_ms is not None:
        found += f", p99 {three_digits(p99_ms)} ms"
        reached = reached and p99_ms <= goal.p99_ms
    return Verdict(goal=goal, asked=_asked(goal), found=found, reached=reached)
