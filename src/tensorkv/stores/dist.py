"""DistStore: `dist_sync` and `dist_async`, a store whose values and updaters live on server processes.

This file turns the calls of the contract into messages, and their replies into results. What holds on
the other side stands in `tensorkv.protocol`: `shard` for rounds and updates, `directory` for keys,
settings and barriers.
"""

from __future__ import annotations

import concurrent.futures
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, final

import torch

from tensorkv.arrays import Key, check_matches, dtype_name
from tensorkv.config import DEFAULT_TIMEOUT_S, from_env
from tensorkv.errors import (
    DtypeMismatch,
    InvalidArgument,
    KeyDeleted,
    KeyNotInitialized,
    NotInJob,
    NotSupported,
    TensorKVError,
    UncommittedPush,
    from_wire,
    to_wire,
)
from tensorkv.keys import PullBatch, PushBatch, answer
from tensorkv.reduce import sum_devices, sum_dtype
from tensorkv.runtime.code import describe_code
from tensorkv.runtime.embedded import EmbeddedJob
from tensorkv.runtime.job import Job, join
from tensorkv.runtime.link import ServerLink, SingleReply
from tensorkv.runtime.plans import KeyState, Plan, build_plan
from tensorkv.runtime.pushes import MergeWatch
from tensorkv.runtime.transfers import Destinations, PullExchange, gather
from tensorkv.store import CommitResult, KeyInfo, KVStore, Reduction, UpdaterFunction
from tensorkv.transport.base import TICK_S
from tensorkv.updater import (
    SettingsTable,
    Updater,
    build,
    build_from_argument,
    find_optimizer,
    optimizer_spec,
)
from tensorkv.wire import messages as m
from tensorkv.work import Work

MAX_PLANS = 1024
POLICIES = ("fail", "continue")
PlanName = tuple[tuple[int, ...], tuple[torch.dtype, ...], tuple[int, ...]]


@final
class DistStore(KVStore):
    """A store on servers. The contract is that of `KVStore`.

    `_lock` guards what this worker knows of keys, plans and faults; it is never held while waiting.
    """

    def __init__(
        self,
        kind: str,
        job: Job,
        *,
        store: str,
        reduction: Reduction,
        timeout_s: float,
        embedded: EmbeddedJob | None = None,
    ) -> None:
        super().__init__(kind, store=store, reduction=reduction, timeout_s=timeout_s)
        self._job = job
        self._embedded = embedded
        self._is_async = kind == "dist_async"
        self._lock = threading.Lock()
        self._states: dict[Key, KeyState] = {}
        self._plans: OrderedDict[PlanName, Plan] = OrderedDict()
        self._last_push: dict[tuple[Key, ...], Plan] = {}  # by the keys of a call
        self._last_pull: dict[tuple[Key, ...], Plan] = {}
        self._dropped: list[Plan] = []
        self._unmerged: dict[int, frozenset[int]] = {}  # number of a push -> the keys it pushed
        self._pushes = 0
        self._uncommitted: set[int] = set()  # key ids
        self._key_of_slice: dict[int, KeyState] = {}
        self._faults: dict[Key, tuple[int, TensorKVError]] = {}
        self._raised: dict[int, int] = {}  # key id -> the last round whose fault was raised
        self._deferred: dict[int, concurrent.futures.Future[Any]] = {}  # key id -> push still to go
        self._settings = SettingsTable()
        policy = "async" if self._is_async else "sync"
        joined = job.control.request(
            lambda n: m.JoinStore(n, store, policy, reduction), f"opening store {store!r}", timeout_s
        )
        self._store: int = joined.store
        job.stores[self._store] = self
        with job.order:
            for link in job.links:
                link.put(m.OpenStore(self._store, store, self._is_async, reduction == "mean"))

    @property
    def rank(self) -> int:
        """The number of this worker, in the order of the launcher."""
        return self._job.config.rank

    @property
    def num_workers(self) -> int:
        """The number of workers in the job."""
        return self._job.config.num_workers

    # ---- init ------------------------------------------------------------------------------------

    def _init(self, keys: tuple[Key, ...], values: list[torch.Tensor], whole: bool) -> None:
        for key, value in zip(keys, values, strict=True):
            self._check_new(key, value)
        specs = [
            m.KeySpec(key, tuple(value.shape), dtype_name(value.dtype), value.dtype.itemsize, whole)
            for key, value in zip(keys, values, strict=True)
        ]
        what = f"init of {keys[0]!r}"
        reply = self._job.control.request(
            lambda n: m.ProposeInit(n, self._store, specs), what, self._timeout_s, self._store
        )
        mine = [
            (entry, value)
            for entry, value, lead in zip(reply.entries, values, reply.lead, strict=True)
            if lead
        ]
        if mine:
            self._lead_init(mine, what)
        with self._lock:
            for entry in reply.entries:
                self._learn(entry)

    def _check_new(self, key: Key, value: torch.Tensor) -> None:
        if self._reduction == "mean" and not (value.dtype.is_floating_point or value.dtype.is_complex):
            raise DtypeMismatch(
                f"key {key!r} has dtype {value.dtype}, of which a store with reduction='mean' takes no mean; "
                "use a float dtype, or reduction='sum'"
            )
        self._settings.setting(key).updater.check_value(key, value.shape, value.dtype)

    def _lead_init(self, created: list[tuple[m.KeyEntry, torch.Tensor]], what: str) -> None:
        """Store the values of keys this rank creates on the servers, and tell the scheduler."""
        key_ids = [entry.key_id for entry, _ in created]
        try:
            self._send_values(created, what)
        except TensorKVError as error:
            self._conclude(m.ConcludeInit(0, self._store, key_ids, to_wire(error)), what)
            raise
        self._conclude(m.ConcludeInit(0, self._store, key_ids, None), what)

    def _conclude(self, message: m.ConcludeInit | m.ConcludeSetting, what: str) -> None:
        """Tell the scheduler how what this rank leads has ended, and wait until it knows."""

        def make(number: int) -> m.Message:
            message.request = number
            return message

        self._job.control.request(make, what, self._timeout_s, self._store)

    def _send_values(self, created: list[tuple[m.KeyEntry, torch.Tensor]], what: str) -> None:
        """Send each value as a push of one key would be, one message per key and server."""
        exchanges = []
        with self._job.order:
            for entry, value in created:
                state = KeyState.of(entry)
                plan = build_plan(0, [state], [value.dtype], [1], len(self._job.links))
                flat = [_prepared(value)]
                for part in plan.parts:
                    link = self._job.links[part.server]
                    slices = [each for each in entry.slices if each.server == part.server]
                    payload = [view for chunk in part.chunks for view in gather(chunk, flat)]
                    exchange = SingleReply()
                    number = link.open(exchange)
                    exchanges.append((link, number, exchange))
                    link.put(
                        m.InitSlices(number, self._store, entry.key, entry.shape, entry.dtype, slices),
                        payload,
                    )
        for link in self._job.links:
            link.pump()
        waits = [(link, number) for link, number, _ in exchanges]
        self._job.await_replies(waits, what, self._timeout_s, self._store)
        for _, _, exchange in exchanges:
            exchange.check()

    def _learn(self, entry: m.KeyEntry) -> KeyState:
        """Remember a key. With the lock held."""
        known = self._states.get(entry.key)
        if known is not None:
            if known.entry.generation >= entry.generation:
                return known
            self._forget(known)
        state = KeyState.of(entry)
        self._states[entry.key] = state
        for each in entry.slices:
            self._key_of_slice[each.slice_id] = state
        if self._key_type is None:
            self._key_type = type(entry.key)
        return state

    def _forget(self, state: KeyState) -> None:
        """Forget a generation of a key. With the lock held."""
        if self._states.get(state.key) is state:
            del self._states[state.key]
        for each in state.entry.slices:
            self._key_of_slice.pop(each.slice_id, None)
        self._uncommitted.discard(state.key_id)
        self._raised.pop(state.key_id, None)
        self._unmerged = {n: ids - {state.key_id} for n, ids in self._unmerged.items()}
        for last in (self._last_push, self._last_pull):
            for keys in [keys for keys, plan in last.items() if state.key_id in plan.key_ids]:
                del last[keys]
        for name in [name for name, plan in self._plans.items() if state.key_id in plan.key_ids]:
            self._drop_plan(self._plans.pop(name))

    # ---- keys ------------------------------------------------------------------------------------

    def _known(self, keys: Sequence[Key]) -> list[KeyState]:
        """Return what is known of keys, asking the scheduler about those this rank did not init."""
        states = self._states
        unknown = [key for key in keys if key not in states]
        if unknown:
            what = f"lookup of {unknown[0]!r}"
            reply = self._job.control.request(
                lambda n: m.Lookup(n, self._store, unknown), what, self._timeout_s, self._store
            )
            with self._lock:
                for entry in reply.entries:
                    self._learn(entry)
        try:
            return [states[key] for key in keys]
        except KeyError as exc:  # another thread of this worker has deleted it meanwhile
            raise KeyNotInitialized(f"key {exc.args[0]!r} was deleted during the call") from exc

    def _raise_faults(self, keys: Sequence[Key]) -> None:
        """Raise what servers have reported about these keys, each once."""
        if not self._faults:
            return
        with self._lock:
            found = [self._faults.pop(key) for key in dict.fromkeys(keys) if key in self._faults]
        if found:
            first = found[0][1]
            for _, other in found[1:]:
                first.add_note(f"and {other}")
            raise first

    def on_fault(self, fault: m.Fault) -> None:
        """A round that this worker contributed to has failed; its next call on the key raises it."""
        error = from_wire(fault.name, fault.text)
        with self._lock:
            for slice_id in fault.slice_ids:
                state = self._key_of_slice.get(slice_id)
                if state is None:
                    continue
                if isinstance(error, KeyDeleted):
                    self._forget(state)
                elif self._raised.get(state.key_id, 0) >= fault.round:
                    continue  # another slice of the same round has reported it
                else:
                    self._raised[state.key_id] = fault.round
                self._faults.setdefault(state.key, (fault.round, error))

    def _keys(self) -> list[Key]:
        reply = self._job.control.request(
            lambda n: m.Lookup(n, self._store, None), "keys", self._timeout_s, self._store
        )
        return [entry.key for entry in reply.entries]

    def _info(self, key: Key) -> KeyInfo:
        state = self._known([key])[0]
        entries = state.entry.slices
        servers = sorted({each.server for each in entries})
        by_server = {s: [each.slice_id for each in entries if each.server == s] for s in servers}
        remaining = iter(servers)
        replies = self._job.ask_all(
            lambda n: m.AskInfo(n, self._store, by_server[next(remaining)]),
            f"info of {key!r}",
            self._timeout_s,
            self._store,
            servers,
        )
        rounds = [number for reply in replies for number in reply.rounds]
        if min(rounds) < 0:
            with self._lock:
                self._forget(state)
            raise KeyDeleted(f"key {key!r} was deleted by another rank")
        return KeyInfo(
            key=key,
            shape=tuple(state.shape),
            dtype=state.dtype,
            version=min(number for reply in replies for number in reply.versions),
            round=min(rounds),
            updater=replies[0].updater,
            num_slices=len(entries),
            generation=state.entry.generation,
        )

    def _delete(self, keys: tuple[Key, ...]) -> None:
        states = self._known(list(dict.fromkeys(keys)))
        names = [(state.key, state.key_id) for state in states]
        what = f"delete of {keys[0]!r}"
        reply = self._job.control.request(
            lambda n: m.DeleteKeys(n, self._store, names), what, self._timeout_s, self._store
        )
        for entry in reply.entries:
            self._delete_slices(entry, what)
        with self._lock:
            for state in states:
                self._forget(state)
                self._faults.pop(state.key, None)

    def _delete_slices(self, entry: m.KeyEntry, what: str) -> None:
        ids = [each.slice_id for each in entry.slices]
        self._job.ask_all(
            lambda n: m.DeleteSlices(n, self._store, entry.key, self.rank, ids),
            what,
            self._timeout_s,
            self._store,
        )

    # ---- plans -----------------------------------------------------------------------------------

    def _plan(self, states: Sequence[KeyState], dtypes: Sequence[torch.dtype], counts: Sequence[int]) -> Plan:
        """Return the plan of a list of keys, the same one each time."""
        name = (tuple(state.key_id for state in states), tuple(dtypes), tuple(counts))
        with self._lock:
            plan = self._plans.get(name)
            if plan is None:
                number = next(self._job.plan_numbers)
                plan = build_plan(number, states, dtypes, counts, len(self._job.links))
                self._plans[name] = plan
                if len(self._plans) > MAX_PLANS:
                    self._drop_plan(self._plans.popitem(last=False)[1])
            else:
                self._plans.move_to_end(name)
        return plan

    def _drop_plan(self, plan: Plan) -> None:
        """Let the servers forget a plan, when they are next told something. With the lock held."""
        self._dropped.append(plan)
        for last in (self._last_push, self._last_pull):
            for keys in [keys for keys, each in last.items() if each is plan]:
                del last[keys]

    def _tell(self, plan: Plan) -> None:
        """Define a plan on the servers that do not know it. With the order held."""
        while self._dropped:
            dropped = self._dropped.pop()
            for server in dropped.known_to:
                self._job.links[server].put(m.DropPlan(dropped.number))
            dropped.known_to.clear()
        for part in plan.parts:
            if part.server not in plan.known_to:
                plan.known_to.add(part.server)
                self._job.links[part.server].put(m.DefinePlan(self._store, plan.number, part.entries))

    # ---- push ------------------------------------------------------------------------------------

    def _push(self, batch: PushBatch, apply: bool, async_op: bool) -> Work | None:
        plan, values = self._check_push(batch)
        if not apply and self._is_async:
            raise NotSupported("push(apply=False): dist_async has no rounds to commit")
        busy = self._busy(plan)
        if busy:
            return self._push_behind(plan, values, apply, busy, async_op)
        sent = self._send(plan, values, apply)
        if async_op:
            return Work(sent, f"push of {batch.keys[0]!r}", self._timeout_s)
        self._await_future(sent, f"push of {batch.keys[0]!r}")
        return None

    def _check_push(self, batch: PushBatch) -> tuple[Plan, list[torch.Tensor]]:
        """Check a push wholly, sum over devices, and return its plan and one tensor per key."""
        self._job.poll()
        if self._faults:
            self._raise_faults(batch.keys)
        last = self._last_push.get(batch.keys)
        if last is not None and not self._uncommitted and _alike(last, batch.tensors):
            return last, _all_prepared([each[0] for each in batch.tensors])
        states = self._known(batch.keys)
        self._check_committed(states, "push")
        for state, tensors in zip(states, batch.tensors, strict=True):
            for tensor in tensors:
                check_matches("the pushed tensor", tensor, state.key, state.shape, state.dtype)
        dtypes = [
            sum_dtype(tensors) if tensors else state.dtype
            for state, tensors in zip(states, batch.tensors, strict=True)
        ]
        plan = self._plan(states, dtypes, batch.counts)
        if all(len(each) == 1 for each in batch.tensors) and set(batch.counts) == {1}:
            self._last_push[batch.keys] = plan
        return plan, [_summed(tensors) for tensors in batch.tensors]

    def _check_committed(self, states: Sequence[KeyState], call: str) -> None:
        if self._uncommitted:
            for state in states:
                if state.key_id in self._uncommitted:
                    raise UncommittedPush(
                        f"{call}: key {state.key!r} was pushed with apply=False; call commit() first"
                    )

    def _busy(self, plan: Plan) -> set[int]:
        """Return the keys of a plan whose last push by this worker may not be merged, or not gone yet."""
        busy: set[int] = set()
        if self._unmerged or self._deferred:
            with self._lock:
                for ids in self._unmerged.values():
                    busy |= ids & plan.key_ids
                busy |= plan.key_ids & self._deferred.keys()
        return busy

    def _send(
        self,
        plan: Plan,
        values: Sequence[torch.Tensor],
        apply: bool,
        call: _PullCall | None = None,
    ) -> concurrent.futures.Future[Any]:
        """Queue a push to all its servers, and return a future that is done when all has been sent."""
        sent: concurrent.futures.Future[Any] = concurrent.futures.Future()
        count = _CountDown(sum(len(part.chunks) for part in plan.parts), lambda: sent.set_result(None))
        payloads = [[gather(chunk, values) for chunk in part.chunks] for part in plan.parts]
        with self._job.order:
            self._tell(plan)
            for part, chunks in zip(plan.parts, payloads, strict=True):
                link = self._job.links[part.server]
                reply = call.request_of[part.server] if call else 0
                for number, payload in enumerate(chunks):
                    link.put(m.Push(plan.number, number, apply, reply), payload, count.down)
            self._note_push(plan, apply)
            if call is not None:
                call.after_push = self._pushes
        for part in plan.parts:
            self._job.links[part.server].pump()
        return sent

    def _note_push(self, plan: Plan, apply: bool) -> None:
        if self._is_async:
            return
        with self._lock:
            self._pushes += 1
            self._unmerged[self._pushes] = plan.key_ids
            if not apply:
                self._uncommitted |= plan.key_ids

    def _await_future(self, future: concurrent.futures.Future[Any], what: str) -> Any:
        if not future.done():
            wait = self._job.wait(what, self._timeout_s)
            while not _done_soon(future):
                wait.tick()
        failure = self._job.failure()
        if failure is not None:
            raise failure
        return future.result()

    def _push_behind(
        self, plan: Plan, values: list[torch.Tensor], apply: bool, busy: set[int], async_op: bool
    ) -> Work | None:
        """Push the free keys of a list at once, and each other one when its last push is merged."""
        what = f"push of {plan.states[0].key!r}"
        free = [i for i, state in enumerate(plan.states) if state.key_id not in busy]
        late = [i for i, state in enumerate(plan.states) if state.key_id in busy]
        sent: list[concurrent.futures.Future[Any]] = []
        if free:
            sent.append(self._send(self._part_of(plan, free), [values[i] for i in free], apply))
        if not async_op:
            self._push_late(plan, late, values, apply)
            for future in sent:
                self._await_future(future, what)
            return None
        done: concurrent.futures.Future[Any] = concurrent.futures.Future()
        with self._lock:
            before = {f for i in late if (f := self._deferred.get(plan.states[i].key_id)) is not None}
            self._deferred.update(dict.fromkeys((plan.states[i].key_id for i in late), done))

        def run() -> None:
            try:
                for future in before:
                    self._await_future(future, what)
                self._push_late(plan, late, values, apply, deferred=done)
                for future in sent:
                    self._await_future(future, what)
            except Exception as exc:  # noqa: BLE001  # the work raises it
                done.set_exception(exc)
            else:
                done.set_result(None)
            finally:
                with self._lock:
                    self._deferred = {k: f for k, f in self._deferred.items() if f is not done}

        threading.Thread(target=run, name="tensorkv-push", daemon=True).start()
        return Work(done, what, self._timeout_s)

    def _push_late(
        self,
        plan: Plan,
        late: list[int],
        values: list[torch.Tensor],
        apply: bool,
        deferred: concurrent.futures.Future[Any] | None = None,
    ) -> None:
        """Push these values of a plan, key by key as their last pushes are merged."""
        what = f"push of {plan.states[late[0]].key!r}"
        if deferred is None:
            with self._lock:
                futures = [f for i in late if (f := self._deferred.get(plan.states[i].key_id))]
            for future in dict.fromkeys(futures):
                self._await_future(future, what)
        asked = self._plan(
            [plan.states[i] for i in late], [plan.states[i].dtype for i in late], [1] * len(late)
        )
        watch = MergeWatch(self._job, self._store, asked, self._timeout_s, what)
        with self._job.order:
            self._tell(asked)
            watch.ask()
        try:
            for merged in watch.ready():
                places = [late[number] for number in merged]
                self._forget_unmerged({plan.states[i].key_id for i in places})
                part = self._part_of(plan, places)
                self._await_future(self._send(part, [values[i] for i in places], apply), what)
        finally:
            watch.close()

    def _part_of(self, plan: Plan, places: list[int]) -> Plan:
        """Return the plan of some of the values of a plan."""
        return self._plan(
            [plan.states[i] for i in places],
            [plan.dtypes[i] for i in places],
            [plan.counts[i] for i in places],
        )

    def _forget_unmerged(self, key_ids: set[int], up_to: int | None = None) -> None:
        """These keys are merged, as far as pushes up to this number go."""
        with self._lock:
            left: dict[int, frozenset[int]] = {}
            for number, ids in self._unmerged.items():
                rest = ids if up_to is not None and number > up_to else ids - key_ids
                if rest:
                    left[number] = rest
            self._unmerged = left

    # ---- pull ------------------------------------------------------------------------------------

    def _pull(self, batch: PullBatch, async_op: bool) -> Any:
        call = self._prepare_pull(batch)
        call.send(None)
        return self._finish_pull(call, async_op)

    def _prepare_pull(self, batch: PullBatch) -> _PullCall:
        if self._faults:
            self._raise_faults(batch.keys)
        last = self._last_pull.get(batch.keys)
        if last is not None and not self._uncommitted and _alike(last, batch.outs):
            self._wait_deferred(last.states)
            return _PullCall(self, batch, last, Destinations(last.states, batch.outs), [])
        keys = tuple(dict.fromkeys(batch.keys))
        states = self._known(keys)
        self._check_committed(states, "pull")
        for key, outs in zip(batch.keys, batch.outs, strict=True):
            state = self._states[key]
            for out in outs:
                if out.shape != state.shape or out.dtype != state.dtype:
                    check_matches("out", out, key, state.shape, state.dtype)
        outs_of: dict[Key, list[torch.Tensor]] = {key: [] for key in keys}
        for key, outs in zip(batch.keys, batch.outs, strict=True):
            outs_of[key] += outs
        made: list[torch.Tensor] = []
        if batch.given is None:
            for state in states:
                outs_of[state.key] = [torch.empty(state.shape, dtype=state.dtype)]
            made = _copies_for_repeats(batch.keys, outs_of)
        self._wait_deferred(states)
        plan = self._plan(states, [state.dtype for state in states], [1] * len(states))
        if len(keys) == len(batch.keys):
            self._last_pull[keys] = plan
        return _PullCall(self, batch, plan, Destinations(states, list(outs_of.values())), made)

    def _wait_deferred(self, states: Sequence[KeyState]) -> None:
        """An earlier push with async_op may not have gone yet; what comes after it must wait."""
        if self._deferred:
            with self._lock:
                futures = [f for state in states if (f := self._deferred.get(state.key_id))]
            for future in dict.fromkeys(futures):
                self._await_future(future, "an earlier push")

    def _finish_pull(self, call: _PullCall, async_op: bool) -> Any:
        what = f"pull of {call.batch.keys[0]!r}"
        if async_op:
            call.watch()
            return Work(call.future, what, self._timeout_s)
        self._job.await_replies(call.numbers, what, self._timeout_s, self._store)
        return self._await_future(call.future, what)

    def _pull_done(self, call: _PullCall, error: TensorKVError | None) -> Any:
        """All replies of a pull are in: raise what went wrong, else return what the call returns."""
        if error is not None:
            if isinstance(error, KeyDeleted):
                self._forget_deleted(call.plan.states)
            raise error
        call.destinations.finish()
        self._forget_unmerged(set(call.plan.key_ids), call.after_push)
        self._raise_faults(call.batch.keys)
        return answer(call.batch, call.made)

    def _forget_deleted(self, states: Sequence[KeyState]) -> None:
        """One of these keys is gone, the error does not say which: the next call asks for all anew."""
        with self._lock:
            for state in states:
                uncommitted = state.key_id in self._uncommitted
                self._forget(state)
                if uncommitted:
                    self._uncommitted.add(state.key_id)

    def _pushpull(self, pushed: PushBatch, pulled: PullBatch, async_op: bool) -> Any:
        plan, values = self._check_push(pushed)
        in_order = list(pushed.keys) == list(pulled.keys)
        if not in_order or self._busy(plan) or any(count == 0 for count in pushed.counts):
            call = self._prepare_pull(pulled)  # refuse a bad out before anything is pushed
            self._push(pushed, True, False)
            call.send(None)
            return self._finish_pull(call, async_op)
        call = self._prepare_pull(pulled)
        call.plan = plan
        call.send(values)
        return self._finish_pull(call, async_op)

    # ---- commit ----------------------------------------------------------------------------------

    def _commit(self, max_norm: float | None, skip: bool, check_finite: bool) -> CommitResult:
        if self._is_async:
            raise NotSupported("commit: dist_async has no rounds to commit")
        with self._lock:
            committed = set(self._uncommitted)
        keys = [state.key for state in self._states.values() if state.key_id in committed]
        replies = self._job.ask_all(
            lambda n: m.Commit(n, self._store, max_norm, skip, check_finite),
            "commit",
            self._timeout_s,
            self._store,
        )
        with self._lock:
            self._uncommitted -= committed
        self._forget_unmerged(committed)
        self._raise_faults(keys)
        return CommitResult(applied=replies[0].applied, norm=replies[0].norm)

    # ---- settings --------------------------------------------------------------------------------

    def _set_updater(self, updater: UpdaterFunction | str | None, elementwise: bool) -> None:
        built = build_from_argument(updater, elementwise)
        code = None if built.spec.type == "named" else describe_code(updater, self._job.code_table)
        self._make_setting(m.SettingRecord(keys=None, updater=built.spec, code=code), built)

    def _set_optimizer(
        self,
        optimizer: type[torch.optim.Optimizer] | str,
        keys: tuple[Key, ...] | None,
        options: dict[str, Any],
    ) -> None:
        optimizer_class = find_optimizer(optimizer)
        built = build(optimizer_spec(optimizer_class, options), optimizer_class)
        for state in list(self._states.values()):
            if keys is None or state.key in keys:
                built.check_value(state.key, state.shape, state.dtype)
        code = describe_code(optimizer_class, self._job.code_table)
        self._make_setting(m.SettingRecord(keys=keys, updater=built.spec, code=code), built)

    def _set_optimizer_options(self, keys: tuple[Key, ...] | None, options: dict[str, Any]) -> None:
        self._make_setting(m.SettingRecord(keys=keys, options=options), None)

    def _make_setting(self, record: m.SettingRecord, built: Updater | None) -> None:
        """Make a setting if this is the setting rank, else see that it agrees with that rank's."""
        table = self._settings.copy()
        if built is not None:
            table.set_updater(built, record.keys)
        if record.options is not None:
            self._check_options(table, record)
        reply = self._job.control.request(
            lambda n: m.ProposeSetting(n, self._store, record), "a setting", self._timeout_s, self._store
        )
        if reply.lead:
            self._lead_setting(reply.number, record)
        self._settings = table

    def _check_options(self, table: SettingsTable, record: m.SettingRecord) -> None:
        assert record.options is not None
        table.set_options(record.options, record.keys)

    def _lead_setting(self, number: int, record: m.SettingRecord) -> None:
        """Make a setting on all servers, and tell the scheduler."""
        what = "a setting"
        try:
            self._job.ask_all(
                lambda n: m.PrepareSetting(n, self._store, number, record), what, self._timeout_s, self._store
            )
        except TensorKVError as error:
            self._conclude(m.ConcludeSetting(0, self._store, number, to_wire(error)), what)
            raise
        with self._job.order:
            for link in self._job.links:
                link.put(m.ActivateSetting(self._store, number))
        # In async mode another rank's push may come before the setting, unless it waits for this.
        self._job.ask_all(lambda n: m.Flush(n, self._store), what, self._timeout_s, self._store)
        self._conclude(m.ConcludeSetting(0, self._store, number, None), what)

    # ---- together --------------------------------------------------------------------------------

    def _barrier(self, timeout_s: float) -> None:
        self._wait_deferred(list(self._states.values()))
        self._job.ask_all(lambda n: m.Flush(n, self._store), "barrier", timeout_s, self._store)
        self._job.control.request(lambda n: m.Barrier(n, self._store), "barrier", timeout_s, self._store)
        self._job.ask_all(lambda n: m.Flush(n, self._store), "barrier", timeout_s, self._store)
        self._raise_faults(list(self._faults))

    def _close(self) -> None:
        self._job.stores.pop(self._store, None)
        try:
            self._wait_deferred(list(self._states.values()))
            self._job.ask_all(lambda n: m.Leave(n, self._store), "close", self._timeout_s, self._store)
            self._job.control.request(
                lambda n: m.LeaveStore(n, self._store), "close", self._timeout_s, self._store
            )
        finally:
            self._end_embedded(m.Goodbye())
        self._raise_faults(list(self._faults))

    def _abandon(self, why: str) -> None:
        self._job.stores.pop(self._store, None)
        self._job.close(m.Abandon(why))
        self._end_embedded(m.Abandon(why))

    def _end_embedded(self, last_words: m.Message) -> None:
        if self._embedded is not None:
            self._job.close(last_words)
            self._embedded.stop()


@final
class _PullCall:
    """A pull under way: exchanges with its servers, and the future of its result."""

    def __init__(
        self,
        store: DistStore,
        batch: PullBatch,
        plan: Plan,
        destinations: Destinations,
        made: list[torch.Tensor],
    ) -> None:
        self.batch = batch
        self.plan = plan
        self.destinations = destinations
        self.made = made
        self.future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self.numbers: list[tuple[ServerLink, int]] = []
        self.request_of: dict[int, int] = {}  # by server
        self.after_push = 0  # pushes up to this number were queued before
        self._store = store
        self._errors: list[TensorKVError] = []
        self._lock = threading.Lock()

    def send(self, values: Sequence[torch.Tensor] | None) -> None:
        """Ask every server; with `values` push them in the same frames."""
        job = self._store._job
        self._left = len(self.plan.parts)
        for part in self.plan.parts:
            link = job.links[part.server]
            number = link.open(PullExchange(part, self.destinations, self._ended))
            self.request_of[part.server] = number
            self.numbers.append((link, number))
        if values is not None:
            self._store._send(self.plan, values, True, self)
        else:
            with job.order:
                self._store._tell(self.plan)
                for part in self.plan.parts:
                    job.links[part.server].put(m.Pull(self.plan.number, self.request_of[part.server]))
                self.after_push = self._store._pushes
            for link, _ in self.numbers:
                link.pump()

    def watch(self) -> None:
        """See to it that the call ends although nobody waits for it."""
        for link, number in self.numbers:
            link.watch(number)

    def _ended(self, error: TensorKVError | None) -> None:
        """One server has answered all, or refused."""
        with self._lock:
            self._left -= 1
            if error is not None:
                self._errors.append(error)
            if self._left:
                return
        try:
            self.future.set_result(self._store._pull_done(self, self._errors[0] if self._errors else None))
        except TensorKVError as exc:
            self.future.set_exception(exc)


@final
class _CountDown:
    """Calls `at_zero` when `down` has been called as often as said. Safe from any thread."""

    def __init__(self, number: int, at_zero: Callable[[], None]) -> None:
        self._left = number
        self._at_zero = at_zero
        self._lock = threading.Lock()

    def down(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left:
                return
        self._at_zero()


def open_dist(
    kind: str,
    *,
    store: str = "default",
    reduction: Reduction = "sum",
    timeout_s: float = DEFAULT_TIMEOUT_S,
    embedded: bool = False,
    num_servers: int = 1,
    on_worker_loss: str | None = None,
) -> KVStore:
    """Open a distributed store in the job this process belongs to, or, `embedded`, in one of its own.

    Raises:
        NotInJob: this process was not started as a worker of a job, and `embedded` is False.
        StoreMismatch: other workers have opened the name with another kind or reduction.
        InvalidArgument, NotSupported, AuthenticationError, ProtocolVersionError, PeerLostError.
    """
    if on_worker_loss not in (None, "fail"):
        if on_worker_loss == "continue":
            raise NotSupported("on_worker_loss='continue' is not built yet; a lost worker ends the job")
        raise InvalidArgument(f"on_worker_loss={on_worker_loss!r} is not known; use 'fail' or 'continue'")
    if embedded:
        if num_servers < 1:
            raise InvalidArgument(f"num_servers={num_servers} is too few; a job needs at least one server")
        cluster = EmbeddedJob(1, num_servers, timeout_s=timeout_s)
        return _open_embedded(kind, cluster, store, reduction, timeout_s)
    config = from_env()
    if config is None or config.role != "worker":
        raise NotInJob(
            f"create({kind!r}) needs a job of workers and servers. Start one on this machine with\n"
            "    tensorkv run -n WORKERS -s SERVERS python train.py\n"
            "or pass embedded=True for a job of one worker in this process, servers and all"
        )
    return DistStore(kind, join(config), store=store, reduction=reduction, timeout_s=timeout_s)


def _open_embedded(
    kind: str, cluster: EmbeddedJob, store: str, reduction: Reduction, timeout_s: float
) -> KVStore:
    job: Job | None = None
    try:
        job = cluster.join(0)
        return DistStore(kind, job, store=store, reduction=reduction, timeout_s=timeout_s, embedded=cluster)
    except BaseException:
        if job is not None:
            job.close(m.Goodbye())
        cluster.stop()
        raise


def _prepared(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor with plain memory on the CPU, as it can be sent."""
    if tensor.device.type != "cpu":
        tensor = tensor.cpu()
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    return tensor


def _summed(tensors: list[torch.Tensor]) -> torch.Tensor:
    return _prepared(sum_devices(tensors)) if tensors else torch.empty(0)


def _all_prepared(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return `_prepared` of each; a few vector operations if none needs it."""
    if (
        all(map(attrgetter("is_cpu"), tensors))
        and not any(map(torch.Tensor.is_conj, tensors))
        and not any(map(torch.Tensor.is_neg, tensors))
    ):
        return tensors
    return [_prepared(tensor) for tensor in tensors]


def _alike(plan: Plan, tensors: list[list[torch.Tensor]]) -> bool:
    """Whether there is one tensor per key of a plan, of the very shape and dtype."""
    if set(map(len, tensors)) != {1}:
        return False
    firsts = [each[0] for each in tensors]
    return [each.dtype for each in firsts] == plan.dtypes and [each.shape for each in firsts] == plan.shapes


def _copies_for_repeats(keys: tuple[Key, ...], outs_of: dict[Key, list[torch.Tensor]]) -> list[torch.Tensor]:
    """Return a new tensor per key of a call in call order; a key that repeats gets one each time."""
    used: set[Key] = set()
    made: list[torch.Tensor] = []
    for key in keys:
        if key in used:
            outs_of[key].append(torch.empty_like(outs_of[key][0]))
            made.append(outs_of[key][-1])
        else:
            used.add(key)
            made.append(outs_of[key][0])
    return made


def _done_soon(future: concurrent.futures.Future[Any]) -> bool:
    return bool(concurrent.futures.wait([future], TICK_S).done)
