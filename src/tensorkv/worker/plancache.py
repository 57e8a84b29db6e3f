"""PlanCache: the plans of one store on a worker, and which servers know them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import final

import torch

from tensorkv.config import MAX_SLICE_BYTES
from tensorkv.errors import KeyDeleted
from tensorkv.plain import Key
from tensorkv.wire import messages as m
from tensorkv.worker.plans import KeyState, Plan, build_plan
from tensorkv.worker.requests import ServerPort

MAX_PLANS = 1024
"""Maximum number of plans kept; the least recently used is evicted first."""

_Name = tuple[tuple[int, ...], tuple[torch.dtype, ...], tuple[int, ...]]


@final
class PlanCache:
    """Finds the plan of a list of keys, the same one each time. Pure: the caller holds the lock of the core.

    `last_push` and `last_pull` map the keys of a call to its plan, and may be read at any time. The caller
    checks whether the tensors of a new call are like those of the last.

    Args:
        store: its number.
        servers: the connections to them, by rank.
        numbers: of the plans, which no other store of the process has.
        max_chunk_bytes: maximum size of a chunk of several slices.
    """

    def __init__(
        self,
        store: int,
        servers: Sequence[ServerPort],
        numbers: Iterator[int],
        max_chunk_bytes: int = MAX_SLICE_BYTES,
    ) -> None:
        self.last_push: dict[tuple[Key, ...], Plan] = {}
        self.last_pull: dict[tuple[Key, ...], Plan] = {}
        self._store = store
        self._servers = servers
        self._numbers = numbers
        self._max_chunk_bytes = max_chunk_bytes
        self._plans: OrderedDict[_Name, Plan] = OrderedDict()
        self._dropped: list[Plan] = []
        self._alone: set[int] = set()  # keys whose slices make chunks of their own

    def plan(self, states: Sequence[KeyState], dtypes: Sequence[torch.dtype], counts: Sequence[int]) -> Plan:
        """Return the plan of pushing values of `dtypes` with these counts; a count of 0 stands for absent.

        Raises:
            KeyDeleted: another thread has deleted one of the keys.
        """
        name = (tuple(state.key_id for state in states), tuple(dtypes), tuple(counts))
        plan = self._plans.get(name)
        if plan is not None:
            self._plans.move_to_end(name)
            return plan
        check_alive(states)
        number, num_servers = next(self._numbers), len(self._servers)
        plan = build_plan(number, states, dtypes, counts, num_servers, self._alone, self._max_chunk_bytes)
        self._plans[name] = plan
        if len(self._plans) > MAX_PLANS:
            self._drop(self._plans.popitem(last=False)[1])
        return plan

    def cut_alone(self, states: Sequence[KeyState]) -> None:
        """Let slices of those keys that have several make chunks of their own, in pushes and pulls.

        In a tensor of `empty_like` such a slice is adjacent to no other value.
        """
        found = [state for state in states if len(state.entry.slices) > 1 and state.key_id not in self._alone]
        if found:
            self.forget(found)
            self._alone.update(state.key_id for state in found)

    def plan_to_pull(self, states: Sequence[KeyState]) -> Plan:
        """Return the plan of pulling keys, as if values of the stored dtype were pushed."""
        return self.plan(states, [state.dtype for state in states], [1] * len(states))

    def part_of(self, plan: Plan, places: Sequence[int]) -> Plan:
        """Return the plan of some of the values of a plan."""
        return self.plan(
            [plan.states[place] for place in places],
            [plan.dtypes[place] for place in places],
            [plan.counts[place] for place in places],
        )

    def remember_push(self, keys: tuple[Key, ...], plan: Plan) -> None:
        """Map the keys of a call to this plan in `last_push`."""
        self._remember(self.last_push, plan.pushed_as, keys, plan)

    def remember_pull(self, keys: tuple[Key, ...], plan: Plan) -> None:
        """Map the keys of a call to this plan in `last_pull`."""
        self._remember(self.last_pull, plan.pulled_as, keys, plan)

    def _remember(
        self,
        last: dict[tuple[Key, ...], Plan],
        names: set[tuple[Key, ...]],
        keys: tuple[Key, ...],
        plan: Plan,
    ) -> None:
        if not plan.dropped:  # another thread may have deleted a key since the plan was found
            last[keys] = plan
            names.add(keys)

    def tell(self, plan: Plan) -> None:
        """Queue the definition of a plan to the servers that lack it.

        Raises:
            KeyDeleted: another thread has deleted a key meanwhile.
        """
        if self._dropped:
            self.tell_dropped()
        if len(plan.known_to) == len(plan.parts):
            return
        check_alive(plan.states)
        if plan.dropped:  # it was evicted since its caller found it
            self._dropped.append(plan)
        for part in plan.parts:
            if part.server not in plan.known_to:
                plan.known_to.add(part.server)
                self._servers[part.server].put(m.DefinePlan(self._store, plan.number, part.entries))

    def tell_dropped(self) -> None:
        """Queue to the servers which plans they need no more."""
        while self._dropped:
            dropped = self._dropped.pop()
            for server in dropped.known_to:
                self._servers[server].put(m.DropPlan(dropped.number))
            dropped.known_to.clear()

    def forget(self, states: Sequence[KeyState]) -> None:
        """Drop the plans that contain these keys, which are deleted or are to be looked up anew."""
        gone = {state.key_id for state in states}
        self._alone -= gone
        for name in [name for name, plan in self._plans.items() if not plan.key_ids.isdisjoint(gone)]:
            self._drop(self._plans.pop(name))

    def _drop(self, plan: Plan) -> None:
        """Drop a plan; the next `tell` makes the servers drop it, too."""
        plan.dropped = True
        self._dropped.append(plan)
        for last, names in ((self.last_push, plan.pushed_as), (self.last_pull, plan.pulled_as)):
            for keys in names:
                if last.get(keys) is plan:
                    del last[keys]


def check_alive(states: Sequence[KeyState]) -> None:
    """Raise KeyDeleted if this worker needs one of these keys no more."""
    for state in states:
        if state.retired:
            raise KeyDeleted(
                f"key {state.key!r} was deleted by another thread of this worker, or replaced by a load, "
                "during the call"
            )
