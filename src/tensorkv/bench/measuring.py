"""Measuring as a worker of a job: set after set, each in a store of its own. `tensorkv bench` starts it.

Rank 0 reports what happens, as events; see `Event`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from tensorkv.bench.memory import pss_of_job
from tensorkv.bench.steps import Plan

MARK = "BENCH_EVENT "
TELL_EVERY_S = 0.1

Event = dict[str, Any]
"""{"event": "progress", "tensors", "way", "number", "num_steps"}, or {"event": "result", "tensors", "times_s"
by way, "memory" before and after by process, "num_workers"}."""


def measure_sets(
    kind: str,
    plans: Sequence[Plan],
    report: Callable[[Event], None],
    **create_options: Any,
) -> None:
    """Measure each plan in a store of its own; rank 0 reports.

    Raises:
        WrongResult: a result was wrong.
        What `tensorkv.create` raises.
    """
    # They need torch; the command that only reads the events of a job does without it.
    from tensorkv.bench.worker import measure
    from tensorkv.stores.registry import create

    for number, plan in enumerate(plans):
        with create(kind, store=f"bench {number}", **create_options) as kv:
            tell = _teller(plan, report) if kv.rank == 0 else lambda way, number, num_steps: None
            kv.barrier()
            before = pss_of_job() if kv.rank == 0 and kind.startswith("dist") else {}
            kv.barrier()
            times_s = measure(kv, plan, tell)
            kv.barrier()
            if kv.rank == 0:
                after = pss_of_job() if before else {}
                report(
                    {
                        "event": "result",
                        "tensors": plan.tensors,
                        "times_s": times_s,
                        "memory": {name: (before[name], after.get(name, 0)) for name in before},
                        "num_workers": kv.num_workers,
                    }
                )
            kv.barrier()


def _teller(plan: Plan, report: Callable[[Event], None]) -> Callable[[str, int, int], None]:
    told_at = 0.0

    def tell(way: str, number: int, num_steps: int) -> None:
        nonlocal told_at
        if time.monotonic() - told_at >= TELL_EVERY_S:
            told_at = time.monotonic()
            report(
                {
                    "event": "progress",
                    "tensors": plan.tensors,
                    "way": way,
                    "number": number,
                    "num_steps": num_steps,
                }
            )

    return tell


def print_event(event: Event) -> None:
    """Print an event as the line that `read_event` finds."""
    sys.stdout.write(f"{MARK}{json.dumps(event)}\n")
    sys.stdout.flush()


def read_event(line: str) -> Event | None:
    """Return the event in a line; None if the line has none."""
    _, mark, text = line.partition(MARK)
    if not mark:
        return None
    event: Event = json.loads(text)
    return event


def main() -> None:
    """Measure the plans of the command line, given as JSON, and print the events."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", required=True)
    parser.add_argument("--plan", action="append", required=True)
    arguments = parser.parse_args()
    plans = [Plan(**json.loads(each)) for each in arguments.plan]
    measure_sets(arguments.kind, plans, print_event)


if __name__ == "__main__":
    main()
