"""WorkerCore: what a worker may send to the servers of one store, and what it knows from their replies.

The rules of `worker/__init__.py` that need no wait are decided here: which keys are busy, which plans a
server has to be told first, what a reply vouches for. Each method changes the state and queues its messages
in one go. What has to wait in between is a conversation (`conversations.py`), which calls these methods.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch

from tensorkv.config import MAX_SLICE_BYTES
from tensorkv.errors import UncommittedPush, closed_meanwhile
from tensorkv.plain import Key
from tensorkv.wire import messages as m
from tensorkv.worker.keytable import KeyTable
from tensorkv.worker.plancache import PlanCache, check_alive
from tensorkv.worker.plans import KeyState, Plan, build_plan
from tensorkv.worker.requests import Asked, Make, ServerPort, ask_each, replies_of
from tensorkv.worker.transfers import gathered

Frame = tuple[list[memoryview] | None, m.Placed | None, Callable[[], None] | None]
"""Payload of a frame of a push: its parts or its place in shared memory, and what to call once it is sent."""


@final
@dataclass(slots=True)
class SentCommit:
    """A commit that the servers were asked for, which they answer when all workers have asked."""

    asked: Asked
    key_ids: set[int]
    keys: list[Key]
    up_to: int  # number of pushes made before
    apply: bool


@final
@dataclass(frozen=True, slots=True)
class _Deferred:
    """The keys of a call that could not be sent yet, and whether it applies what it pushes."""

    key_ids: frozenset[int]
    apply: bool


@final
class WorkerCore:
    """The state of one store in one worker. Pure: the caller holds one lock, and no method waits.

    Without the lock one may read `held`, `num_deferred_commits`, and whether a collection is empty.

    Args:
        store: its number.
        policy: its policy.
        servers: the connections to them, by rank.
        plan_numbers: numbers of plans, which no other store of the process gets.
        left: numbers of the stores that this worker has left.
        notify: sends the scheduler a message that has no reply.
        max_chunk_bytes: maximum size of a chunk of several slices.
    """

    def __init__(
        self,
        store: int,
        policy: m.StorePolicy,
        servers: Sequence[ServerPort],
        plan_numbers: Iterator[int],
        left: set[int],
        notify: Callable[[m.Message], None],
        max_chunk_bytes: int = MAX_SLICE_BYTES,
    ) -> None:
        self.store = store
        self.servers = servers
        self.keys = KeyTable()
        self.plans = PlanCache(store, servers, plan_numbers, max_chunk_bytes)
        self.held = False  # whether changes are held back, because the store is being saved
        self.count = 0  # pushes queued so far
        self.uncommitted: set[int] = set()  # ids of keys that were pushed with apply=False
        self.num_retired = 0  # how often keys were retired
        self._left = left
        self._notify = notify
        self._rounds_wait = policy.rounds_wait
        self.unmerged: dict[int, int] = {}  # key id -> number of its last push, until it is known merged
        self._newest = 0  # the largest number in it since it was last empty
        self.deferred_calls: dict[Any, _Deferred] = {}  # in order; those that could not be sent yet
        self.num_deferred_commits = 0  # those among them that push with apply=False
        self._commit: SentCommit | None = None

    # ---- push ------------------------------------------------------------------------------------

    def busy(self, plan: Plan) -> set[int]:
        """Return the ids of the keys whose last push by this worker may not be merged, or is not sent yet."""
        found = self.unmerged.keys() & plan.key_ids
        return found.union(*(plan.key_ids & each.key_ids for each in self.deferred_calls.values()))

    def push(
        self,
        plan: Plan,
        frames: Sequence[Frame],
        apply: bool = True,
        weight: float | None = None,
        replies: Mapping[int, int] | None = None,
    ) -> bool:
        """Queue a push to all its servers.

        Returns False, and does nothing, if the last push of a key may not be merged, or changes are held
        back. The caller knows whether an earlier call on a key is deferred.

        Args:
            plan: what to push.
            frames: per frame of the plan, its payload.
            apply, weight: as in `KVStore.push`.
            replies: by server, the request that gets the values after the round.

        Raises:
            StoreClosed, KeyDeleted, UncommittedPush: by another thread, meanwhile.
        """
        if self.uncommitted and not plan.key_ids.isdisjoint(self.uncommitted):
            self.check_committed(plan.states, "push")
        if self.held or (self.unmerged and not plan.key_ids.isdisjoint(self.unmerged)):
            return False
        self.tell(plan)
        servers, reply = self.servers, 0
        for (server, number, _), (parts, placed, on_sent) in zip(plan.frames, frames, strict=True):
            if replies is not None:
                reply = replies[server]
            servers[server].put(m.Push(plan.number, number, apply, reply, placed, weight), parts, on_sent)
        self.count += 1
        if self._rounds_wait:
            self._newest = self.count
            self.unmerged.update(dict.fromkeys(plan.key_ids, self.count))
            if not apply:
                self.uncommitted |= plan.key_ids
        return True

    def merged(self, key_ids: frozenset[int] | set[int], up_to: int) -> None:
        """Note that the pushes of these keys up to this number are merged."""
        if self._newest <= up_to and self.unmerged.keys() == key_ids:  # the common case
            self.unmerged.clear()
            return
        for key_id in key_ids:
            if self.unmerged.get(key_id, up_to + 1) <= up_to:
                del self.unmerged[key_id]

    def unmerged_keys(self) -> list[KeyState]:
        """Return the keys whose last push may not be merged."""
        return self.keys.of_ids(self.unmerged)

    @property
    def settled(self) -> bool:
        """Whether every push of this worker is known to be merged. A commit may still have to apply it."""
        return self._rounds_wait and not (self.unmerged or self.deferred_calls)

    def tell(self, plan: Plan) -> None:
        """Queue what servers have to know before a message names this plan.

        Raises:
            StoreClosed, KeyDeleted: by another thread, meanwhile.
        """
        if self.store in self._left:
            self.check_open()
        self.plans.tell(plan)

    # ---- calls that cannot be sent yet -----------------------------------------------------------

    def defer(self, states: Sequence[KeyState], call: Any, apply: bool = True) -> list[Any]:
        """Note a call on these keys that cannot be sent yet; return the earlier ones that it waits for.

        Without `apply` it is a push that waits for a commit.
        """
        before = self.deferred(states)
        self.deferred_calls[call] = _Deferred(frozenset(state.key_id for state in states), apply)
        self.num_deferred_commits += not apply
        return before

    def deferred(self, states: Sequence[KeyState] | None) -> list[Any]:
        """Return the deferred calls on any of these keys (None: on any key), in order."""
        if states is None:
            return list(self.deferred_calls)
        key_ids = {state.key_id for state in states}
        return [call for call, each in self.deferred_calls.items() if not key_ids.isdisjoint(each.key_ids)]

    def end_deferred(self, call: Any) -> None:
        """Note that a deferred call has ended."""
        self.num_deferred_commits -= not self.deferred_calls.pop(call).apply

    # ---- put and init ----------------------------------------------------------------------------

    def put(self, plan: Plan, payloads: Sequence[list[memoryview]]) -> Asked:
        """Queue new values, with the payload of each frame of the plan."""
        self.tell(plan)
        asked: Asked = []
        for (server, number, _), payload in zip(plan.frames, payloads, strict=True):
            make = functools.partial(m.Put, plan.number, number)
            asked.append((server, *self.servers[server].ask(make, payload)))
        return asked

    def init(self, messages: Sequence[tuple[int, Make, list[memoryview]]]) -> Asked:
        """Queue the values of new keys; see `init_messages`."""
        self.check_open()
        return [(server, *self.servers[server].ask(make, payload)) for server, make, payload in messages]

    def place(self, places: Mapping[int, tuple[list[int], list[int]]], path: str, size_bytes: int) -> Asked:
        """Queue that slices move to shared memory: for each server their ids and offsets in bytes."""
        self.check_open()
        asked: Asked = []
        for server, (slice_ids, offsets) in places.items():

            def make(
                number: int, slice_ids: list[int] = slice_ids, offsets: list[int] = offsets
            ) -> m.Message:
                return m.PlaceSlices(number, self.store, path, size_bytes, slice_ids, offsets)

            asked.append((server, *self.servers[server].ask(make)))
        return asked

    # ---- commit ----------------------------------------------------------------------------------

    def commit(self, make: Make, apply: bool) -> SentCommit:
        """Queue a commit, or return the one that is under way: its last call was given up."""
        if self._commit is None:
            asked = self.ask_all(make)
            states = self.keys.of_ids(self.uncommitted)
            names = [state.key for state in states]
            self._commit = SentCommit(asked, set(self.uncommitted), names, self.count, apply)
        return self._commit

    def end_commit(self, sent: SentCommit) -> list[Any]:
        """Return the servers' answers to a commit, which is over.

        Raises:
            The first refusal; the keys still wait for a commit.
        """
        self._commit = None
        replies = replies_of(sent.asked)
        if not sent.apply:
            return replies
        self.uncommitted -= sent.key_ids
        self.merged(sent.key_ids, sent.up_to)
        return replies

    def check_may_use(self, states: Sequence[KeyState], call: str) -> None:
        """Raise UncommittedPush if one of the keys waits for this worker's commit, or will."""
        if self.uncommitted or self.num_deferred_commits:
            deferred = [each.key_ids for each in self.deferred_calls.values() if not each.apply]
            _check_none_of(self.uncommitted.union(*deferred), states, call)

    def check_committed(self, states: Sequence[KeyState] | None, call: str) -> None:
        """Raise UncommittedPush if one of the keys (None: any) waits for this worker's commit."""
        _check_none_of(
            self.uncommitted, self.keys.of_ids(self.uncommitted) if states is None else states, call
        )

    # ---- leaving ---------------------------------------------------------------------------------

    def retire(self, entries: Sequence[m.KeyEntry], deleted: Sequence[KeyState] = ()) -> Asked:
        """Tell the servers that this worker needs these keys no more.

        The scheduler is told which keys it has `deleted`; of those that a load has replaced, it knows.

        Raises:
            StoreClosed, KeyDeleted: by another thread, meanwhile.
        """
        self.check_open()
        check_alive(deleted)
        if deleted:  # first: a look-up of another thread, made after `retire`, must not name them
            self._notify(m.DeleteKeys(self.store, [(state.key, state.key_id) for state in deleted]))
        entries, states = self.keys.retire(entries)
        if states:
            gone = {state.key_id for state in states}
            self.num_retired += 1
            self.plans.forget(states)
            self.uncommitted -= gone
            self.merged(gone, self.count)
        self.plans.tell_dropped()
        asked: Asked = []
        for server, ids in by_server(entries):
            make = functools.partial(m.DeleteSlices, store=self.store, slice_ids=ids)
            asked.append((server, *self.servers[server].ask(make)))
        return asked

    def leave(self) -> Asked:
        """Leave the store: nothing more is queued for it, and calls that wait end."""
        asked = self.ask_all(lambda n: m.Leave(n, self.store))
        self._left.add(self.store)
        return asked

    def ask_all(self, make: Make) -> Asked:
        """Queue a request to every server."""
        self.check_open()
        return ask_each(self.servers, make)

    def tell_all(self, message: m.Message) -> None:
        """Queue a message to every server."""
        self.check_open()
        for server in self.servers:
            server.put(message)

    def check_open(self) -> None:
        """Raise StoreClosed if another thread has closed the store meanwhile."""
        if self.store in self._left:
            raise closed_meanwhile("a call")


def _check_none_of(uncommitted: set[int], states: Sequence[KeyState], call: str) -> None:
    for state in states:
        if state.key_id in uncommitted:
            raise UncommittedPush(
                f"{call}: key {state.key!r} was pushed with apply=False; call commit() first"
            )


def init_messages(
    store: int, entry: m.KeyEntry, value: torch.Tensor, num_servers: int
) -> Iterator[tuple[int, Make, list[memoryview]]]:
    """Yield the message of a new key to each of its servers, with its payload.

    Args:
        store: its number.
        entry: the key.
        value: of its shape and dtype, on the CPU.
        num_servers: in the job.

    Raises:
        InvalidValue, MemoryLimitReached: torch fails to copy the value.
    """
    plan = build_plan(0, [KeyState.of(entry)], [value.dtype], [1], num_servers)
    for part in plan.parts:
        make = functools.partial(
            m.InitSlices,
            store=store,
            key=entry.key,
            shape=entry.shape,
            dtype=entry.dtype,
            slices=[each for each in entry.slices if each.server == part.server],
        )
        yield part.server, make, [v for chunk in part.chunks for v in gathered(plan, chunk, [value])]


def by_server(entries: Sequence[m.KeyEntry]) -> list[tuple[int, list[int]]]:
    """Return the slices of keys, by the server that holds them, in the order of servers."""
    found: dict[int, list[int]] = {}
    for entry in entries:
        for each in entry.slices:
            found.setdefault(each.server, []).append(each.slice_id)
    return sorted(found.items())
