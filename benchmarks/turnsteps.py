"""A worker of a job that is measured in turn with another job: a few steps here, a few there, and so on.

Both jobs run all the time, and one of them waits in a barrier. So whatever else the machine does weighs on
both alike, down to some hundredths of a second. Runs on the `tensorkv` that PYTHONPATH names.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from tensorkv.bench.steps import expectation, parse_plan, plan_parser, print_result, run
from tensorkv.bench.worker import TensorKVSystem, TorchExpected
from tensorkv.stores.registry import create


class Turns:
    """This job's turns: call `next` before each step; it waits after every `num_steps` of them.

    Args:
        mine: the FIFO in which a byte gives this job the turn.
        others: the FIFO of the other job.
        num_steps: number of steps in a turn.
        second: whether the other job begins, once this one is ready.
    """

    def __init__(self, mine: str, others: str, num_steps: int, second: bool) -> None:
        # Open read-write, so that neither open nor write waits for the other job, or fails after its end.
        self._mine = os.open(mine, os.O_RDWR | os.O_CLOEXEC)
        self._others = os.open(others, os.O_RDWR | os.O_CLOEXEC)
        self._num_steps = num_steps
        self._left = 0
        self._is_mine = second

    def next(self) -> None:
        """Wait until this job may run a step."""
        if not self._left:
            if self._is_mine:
                self.end()
            os.read(self._mine, 1)
            self._is_mine = True
            self._left = self._num_steps
        self._left -= 1

    def end(self) -> None:
        """Pass the turn to the other job."""
        os.write(self._others, b"1")


def after(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    """Return a function that calls both."""

    def both() -> None:
        first()
        second()

    return both


def main() -> None:
    """Measure in turn and, on rank 0, print the result."""
    parser = plan_parser(__doc__)
    parser.add_argument("--kind", required=True)
    parser.add_argument("--lent", action="store_true", help="push from tensors of empty_like")
    parser.add_argument("--bound", action="store_true", help="take the steps through kv.bind")
    parser.add_argument("--mine", required=True, help="the FIFO of this job's turns")
    parser.add_argument("--others", required=True, help="the FIFO of the other job's")
    parser.add_argument("--turn", type=int, required=True, help="steps in a turn")
    parser.add_argument("--second", action="store_true", help="the other job begins")
    arguments = parser.parse_args()
    plan = parse_plan(arguments)
    with create(arguments.kind) as kv:
        system = TensorKVSystem(kv, plan, arguments.lent)
        if arguments.bound:
            system.bind()
        num_tensors = 1 if plan.pushes else kv.num_workers * plan.num_devices
        of_one = None if plan.updater == "assign" else TorchExpected(plan, num_tensors)
        expected = expectation(plan, kv.num_workers, of_one)
        if kv.rank != 0:  # the others wait for rank 0 in the barriers
            run(system, plan, expected, pull=system.pull)
            return
        turns = Turns(arguments.mine, arguments.others, arguments.turn, arguments.second)
        system.barrier = after(turns.next, system.barrier)  # type: ignore[method-assign]
        times_s = run(system, plan, expected, pull=system.pull)
        turns.end()
        print_result(times_s)


if __name__ == "__main__":
    main()
