"""DistStore: `dist_sync` and `dist_async`, a store whose values and updaters live on server processes.

This file checks the calls of the contract and makes results of what `tensorkv.worker` brings: `core` decides
what may be sent, `driver` carries out what takes several messages, `pusher` and `pullcall` send pushes and
pulls. On the other side, `tensorkv.server.shard` holds rounds and updates, and `tensorkv.scheduler.catalog`
keys, settings and barriers.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar, final

import torch

from tensorkv.addresses import LOOPBACK
from tensorkv.arrays import check_has_mean, check_matches, dtype_name, new_tensor, unreadable
from tensorkv.checkpoint.records import SavedSettings
from tensorkv.config import DEFAULT_TIMEOUT_S, ENV_ROLE, Transport, from_env, stray_variables
from tensorkv.errors import (
    InvalidArgument,
    InvalidValue,
    MemoryLimitReached,
    NotInJob,
    NotSupported,
    ProtocolError,
    TensorKVError,
    WaitTimeout,
    not_elementwise,
)
from tensorkv.interrupts import GIVEN_UP
from tensorkv.keys import PullBatch, PushBatch, answer
from tensorkv.peer.code import describe_code
from tensorkv.peer.deadlines import Taken
from tensorkv.plain import Key, may_travel
from tensorkv.reduce import sum_devices, sum_dtype
from tensorkv.store import CommitResult, KeyInfo, KVStore, Reduction, UpdaterFunction
from tensorkv.stores.policy import policy_of
from tensorkv.updaters.base import Updater
from tensorkv.updaters.groups import OptimizerGroup
from tensorkv.updaters.optimizer import find_optimizer, optimizer_spec
from tensorkv.updaters.settings import SettingsTable, build, build_from_argument, restored_settings
from tensorkv.wire import messages as m
from tensorkv.work import Work
from tensorkv.worker.checkpoint import Contents, StateTransfer
from tensorkv.worker.conversations import (
    Conversation,
    Led,
    act_at_rest,
    act_together,
    commit,
    init_keys,
    leave,
    look_up,
    make_setting,
    meet,
    place,
    put,
    retire,
)
from tensorkv.worker.core import WorkerCore, by_server
from tensorkv.worker.driver import Driver
from tensorkv.worker.hold import Hold
from tensorkv.worker.lending import empty_tensors
from tensorkv.worker.plans import KeyState, Plan
from tensorkv.worker.pullcall import PullCall
from tensorkv.worker.pusher import Pusher
from tensorkv.worker.session import Session, join
from tensorkv.worker.transfers import Destinations, gathered
from tensorkv.worker.views import Viewed, Views, views_of

MAX_QUEUED_CHANGES = 64
"""Maximum number of changes of options that wait for a push to take them along."""

if TYPE_CHECKING:  # only an embedded job imports the scheduler and servers
    from tensorkv.launch.cluster import LocalCluster


@final
class DistStore(KVStore):
    """A store on servers. The contract is that of `KVStore`."""

    _defers_ctrl_c = True

    def __init__(
        self,
        kind: str,
        job: Session,
        *,
        store: str,
        reduction: Reduction,
        timeout_s: float,
        on_worker_loss: m.WorkerLossPolicy | None = None,
        policy: m.StorePolicy | None = None,
        embedded: LocalCluster | None = None,
    ) -> None:
        super().__init__(kind, store=store, reduction=reduction, timeout_s=timeout_s)
        self._job = job
        self._embedded = embedded
        self._policy = policy = policy or policy_of(kind)
        self._allows_commit = policy.allows_commit
        self._rounds_wait = policy.rounds_wait  # a plain attribute, since every push reads it
        self._setting = threading.Lock()  # held while making a setting: each builds on the previous one
        # Held during a barrier or a commit: scheduler and servers know one such call per worker, not one
        # per thread.
        self._at_barrier = threading.Lock()
        self._committing = threading.Lock()
        self._settings = SettingsTable()
        self._on_worker_loss = at_loss = on_worker_loss or ("fail" if self._rounds_wait else "continue")
        joined = job.control.request(
            lambda n: m.JoinStore(n, store, policy, reduction, at_loss),
            f"opening store {store!r}",
            timeout_s,
        )
        self._store: int = joined.store
        self._core = core = WorkerCore(
            self._store, policy, job.links, job.plan_numbers, job.left, job.control.notify
        )
        self._plans, self._faults = core.plans, core.keys.faults
        self._hold = Hold(job, core, timeout_s)
        self._driver = Driver(job, core, self._hold, timeout_s)
        self._pusher = Pusher(job, core, self._driver, policy)
        self._transfer = StateTransfer(job, core, self._driver, reduction, timeout_s)
        job.enter(self._store, self, weakly=embedded is not None)
        with job.order, job.whole:
            for link in job.links:
                link.put(m.OpenStore(self._store, store, policy, reduction == "mean"))

    @property
    def rank(self) -> int:
        """Number of this worker, in the launcher's order."""
        return self._job.config.rank

    @property
    def num_workers(self) -> int:
        """Number of workers in the job."""
        return self._job.config.num_workers

    def _open_beside(self, name: str, kind: str = "dist_sync", reduction: Reduction = "sum") -> KVStore:
        return DistStore(
            kind,
            self._job,
            store=name,
            reduction=reduction,
            timeout_s=self._timeout_s,
            on_worker_loss=self._on_worker_loss,
        )

    @property
    def _why_no_sharing(self) -> str:
        if not self._policy.allows_commit:
            return "its values change while other workers compute with them"
        if self._on_worker_loss == "continue":
            return "it goes on without a lost worker, which may be in the middle of a step"
        if any(link.shared is None for link in self._job.links):
            return "a server of it shares no memory with this worker"
        return ""

    def _place_values(
        self, keys: Sequence[Key], offsets_bytes: Sequence[int], path: str, size_bytes: int
    ) -> None:
        places: dict[int, tuple[list[int], list[int]]] = {}
        for state, offset in zip(self._known(keys), offsets_bytes, strict=True):
            for each in state.entry.slices:
                slice_ids, offsets = places.setdefault(each.server, ([], []))
                slice_ids.append(each.slice_id)
                offsets.append(offset + each.start * state.dtype.itemsize)
        self._driver.converse(place(self._core, places, path, size_bytes), "share_weights")

    def _await_applied(self, what: str) -> None:
        self._pusher.await_merged(what)
        self._raise_faults()

    def on_fault(self, fault: m.Fault) -> None:
        """Record that a round this worker contributed to has failed. Its next call on the key raises it."""
        with self._job.order:
            self._core.keys.on_fault(fault)

    def _raise_faults(self, keys: Sequence[Key] | None = None) -> None:
        """Raise the errors that servers have reported for these keys (None: all), each once."""
        if self._faults:
            with self._job.order:
                self._core.keys.raise_faults(keys)

    def _check_may_use(self, states: Sequence[KeyState], call: str) -> None:
        with self._job.order:
            self._core.check_may_use(states, call)

    # ---- init ------------------------------------------------------------------------------------

    def _init(self, keys: tuple[Key, ...], values: list[torch.Tensor], whole: bool) -> None:
        for key, value in zip(keys, values, strict=True):
            self._check_new(key, value)
        specs = [
            m.KeySpec(key, tuple(value.shape), dtype_name(value.dtype), value.dtype.itemsize, whole)
            for key, value in zip(keys, values, strict=True)
        ]
        value_of = dict(zip(keys, values, strict=True))
        what = f"init of {keys[0]!r}"

        def on_cpu(key: Key) -> torch.Tensor:
            return _on_cpu(value_of[key], key)

        with self._job.whole, self._driver.asking():
            reply, led = self._driver.converse(init_keys(self._core, specs, on_cpu), what)
            if led.error is None:
                with self._job.order:
                    self._core.keys.learn(reply.entries)
        led.check()

    def _check_new(self, key: Key, value: torch.Tensor) -> None:
        if self._reduction == "mean":
            check_has_mean(key, value.dtype)
        self._settings.setting(key).check_value(key, value.shape, value.dtype)

    # ---- keys ------------------------------------------------------------------------------------

    def _known(self, keys: Sequence[Key]) -> list[KeyState]:
        """Return what is known of keys, asking the scheduler about the unknown ones."""
        table = self._core.keys
        unknown = table.unknown(keys)
        if not unknown:
            return table.known(keys)
        with self._driver.asking():
            return self._driver.converse(look_up(self._core, keys), f"lookup of {unknown[0]!r}")

    def _keys(self) -> list[Key]:
        reply = self._job.control.request(
            lambda n: m.Lookup(n, self._store, None), "keys", self._timeout_s, self._store
        )
        return [entry.key for entry in reply.entries]

    def _has(self, key: Key) -> bool:
        if not may_travel(key):  # it cannot be sent, so no worker can have initialised it
            return False
        reply = self._job.control.request(
            lambda n: m.CountKeys(n, self._store, [key]), f"{key!r} in", self._timeout_s, self._store
        )
        return int(reply.number) == 1

    def _num_keys(self) -> int:
        reply = self._job.control.request(
            lambda n: m.CountKeys(n, self._store), "len", self._timeout_s, self._store
        )
        number: int = reply.number
        return number

    def _info(self, key: Key) -> KeyInfo:
        state = self._known([key])[0]
        replies = self._ask_info(state)
        return KeyInfo(
            key=key,
            shape=tuple(state.shape),
            dtype=state.dtype,
            version=min(number for reply in replies for number in reply.versions),
            round=min(number for reply in replies for number in reply.rounds),
            updater=replies[0].updater,
            num_slices=len(state.entry.slices),
            state_bytes=sum(number for reply in replies for number in reply.state_bytes),
            late=max(number for reply in replies for number in reply.late),
        )

    def _ask_info(self, state: KeyState) -> list[m.Info]:
        slices_of = dict(by_server([state.entry]))
        slices = iter(slices_of.values())
        replies: list[m.Info] = self._job.ask_all(
            lambda n: m.AskInfo(n, self._store, next(slices)),
            f"info of {state.key!r}",
            self._timeout_s,
            self._store,
            list(slices_of),
        )
        for rank, reply in zip(slices_of, replies, strict=True):
            number = len(slices_of[rank])
            told = (reply.rounds, reply.versions, reply.late, reply.state_bytes)
            least = min([*reply.state_bytes, *reply.late], default=0)
            if any(len(each) != number for each in told) or least < 0:
                raise ProtocolError(f"server {rank} told {told} of {number} slices")
        return replies

    def _delete(self, keys: tuple[Key, ...]) -> None:
        states = self._known(list(dict.fromkeys(keys)))
        what = f"delete of {keys[0]!r}"
        self._pusher.await_deferred(states, what)
        self._retire([state.entry for state in states], what, states)

    def _retire(self, entries: Sequence[m.KeyEntry], what: str, deleted: Sequence[KeyState] = ()) -> None:
        try:
            self._driver.converse(retire(self._core, entries, deleted), what)
        finally:
            with self._job.order:
                self.num_retired = self._core.num_retired

    # ---- push ------------------------------------------------------------------------------------

    def _plan_of_push(self, keys: tuple[Key, ...], values: list[Any]) -> Plan | None:
        plan = self._plans.last_push.get(keys)
        return plan if plan is not None and plan.fits(values) else None

    def _views_of(self, plan: Plan, tensors: list[torch.Tensor], pushed: bool) -> Views | None:
        return views_of(tensors, plan.dtypes if pushed else [state.dtype for state in plan.states])

    def _viewed(self, tensors: list[torch.Tensor], views: Views) -> list[torch.Tensor]:
        return Viewed(tensors, views)

    def _ids_of(self, keys: tuple[Key, ...]) -> tuple[int, ...]:
        return tuple(state.key_id for state in self._known(keys))

    def _push(self, batch: PushBatch, apply: bool, async_op: bool) -> Work | None:
        if not apply:
            self._check_commits("push(apply=False)")
        return _gathered(batch, lambda batch: self._push_batch(batch, apply, async_op))

    def _push_batch(self, batch: PushBatch, apply: bool, async_op: bool) -> Work | None:
        plan, values = self._check_push(batch)
        what = f"push of {batch.keys[0]!r}"
        weight = batch.weight
        sent = None if self._pusher.busy(plan) else self._pusher.send(plan, values, apply, None, weight)
        if sent is None:
            if batch.known is not None:  # part of it may be sent before torch refuses the rest
                plan, values = self._check_push(batch.checked())
            return self._push_busy(plan, values, apply, weight, async_op, what)
        if not async_op:
            self._pusher.await_sent(sent, what)
            return None
        return self._pusher.work_of(sent, what)

    def _push_busy(
        self,
        plan: Plan,
        values: list[torch.Tensor],
        apply: bool,
        weight: float | None,
        async_op: bool,
        what: str,
    ) -> Work | None:
        """Push the free keys of a list at once, and each busy one when its last push is merged."""
        values = _all_on_cpu(plan, values)
        sent, late = self._pusher.push_around(plan, values, apply, weight)
        states = [plan.states[place] for place in late]

        def push_rest() -> None:
            self._pusher.push_late(plan, late, values, apply, what, weight)
            for latch in sent:
                self._pusher.await_sent(latch, what)

        if async_op:
            return self._pusher.later_work(states, push_rest, what, apply)
        self._pusher.await_deferred(states, what)
        push_rest()
        return None

    def _check_push(self, batch: PushBatch) -> tuple[Plan, list[torch.Tensor]]:
        """Check a whole push, sum over devices, and return its plan and a tensor per key, on any device."""
        if not self._rounds_wait:  # else, a pull or the wait for a merge delivers the faults
            self._job.poll()
        if self._faults:  # as every call that a step makes: a call in between costs more than the look
            self._raise_faults(batch.keys)
        plan, singles = batch.known, batch.singles
        if plan is None and singles:
            plan = self._plan_of_push(batch.keys, singles)
        core = self._core
        if (
            plan is not None
            and singles
            and not (plan.dropped or core.uncommitted or core.num_deferred_commits)
        ):
            return plan, singles
        batch = batch.checked()
        states = self._known(batch.keys)
        self._check_may_use(states, "push")
        for state, tensors in zip(states, batch.tensors, strict=True):
            for tensor in tensors:
                check_matches("the pushed tensor", tensor, state.key, state.shape, state.dtype)
        dtypes = [
            sum_dtype(tensors) if tensors else state.dtype
            for state, tensors in zip(states, batch.tensors, strict=True)
        ]
        values = [_summed(key, tensors) for key, tensors in zip(batch.keys, batch.tensors, strict=True)]
        with self._job.order:
            plan = self._plans.plan(states, dtypes, batch.counts)
            if set(map(len, batch.tensors)) == {1} and set(batch.counts) == {1}:
                self._plans.remember_push(batch.keys, plan)
        return plan, values

    def _empty_like(self, keys: tuple[Key, ...]) -> list[torch.Tensor]:
        states, window = self._known(keys), self._job.window
        if window.shared:
            with self._job.order:
                self._plans.cut_alone(states)
        return empty_tensors(window, states)

    # ---- put -------------------------------------------------------------------------------------

    def _put(self, keys: tuple[Key, ...], values: list[torch.Tensor]) -> None:
        if not self._rounds_wait:
            self._job.poll()
        self._raise_faults(keys)
        states = self._known(keys)
        self._check_may_use(states, "put")
        for state, value in zip(states, values, strict=True):
            check_matches("the value", value, state.key, state.shape, state.dtype)
        what = f"put of {keys[0]!r}"
        self._pusher.await_deferred(states, what)
        with self._job.order:
            plan = self._plans.plan(states, [value.dtype for value in values], [1] * len(values))
        values = _all_on_cpu(plan, values)
        payloads = [gathered(plan, chunk, values) for _, _, chunk in plan.frames]
        self._driver.converse(put(self._core, plan, payloads), what)
        self._raise_faults(keys)

    # ---- pull ------------------------------------------------------------------------------------

    def _plan_of_pull(self, keys: tuple[Key, ...], outs: list[Any]) -> Plan | None:
        plan = self._plans.last_pull.get(keys)
        return plan if plan is not None and plan.fits_outs(outs) else None

    def _pull(self, batch: PullBatch, async_op: bool) -> Any:
        call = self._prepare_pull(batch)
        what = f"pull of {batch.keys[0]!r}"
        if self._pusher.deferred(call.plan.states):
            return self._after_deferred(call.plan, lambda: self._run_pull(call, what), async_op, what)
        call.ask(self._job, self._core)
        if async_op:
            return self._pull_work(call, what)
        return self._await_call(call, what)

    def _pushpull(self, pushed: PushBatch, pulled: PullBatch, async_op: bool) -> Any:
        return _gathered(pushed, lambda pushed: self._pushpull_batch(pushed, pulled, async_op))

    def _pushpull_batch(self, pushed: PushBatch, pulled: PullBatch, async_op: bool) -> Any:
        plan, values = self._check_push(pushed)
        call = self._prepare_pull(pulled)
        what = f"pushpull of {pushed.keys[0]!r}"
        if self._pusher.busy(plan) or not self._send_pushpull(call, plan, values, pushed, pulled):
            if pushed.known is not None:  # as in `_push_batch`
                plan, values = self._check_push(pushed.checked())

            late = _all_on_cpu(plan, values)

            def push_and_pull() -> Any:
                self._pusher.push_late(plan, range(len(plan.states)), late, True, what, pushed.weight)
                return self._run_pull(call, what)

            return self._after_deferred(plan, push_and_pull, async_op, what)
        if async_op:
            return self._pull_work(call, what)
        return self._await_call(call, what)

    def _send_pushpull(
        self, call: PullCall, plan: Plan, values: list[torch.Tensor], pushed: PushBatch, pulled: PullBatch
    ) -> bool:
        """Send a push and request the values after it. If a key is busy, do nothing and return False."""
        if pushed.keys == pulled.keys and (pushed.singles is not None or 0 not in pushed.counts):
            call.plan = plan
            return call.push(self._job, self._pusher, values, pushed.weight)
        if self._pusher.send(plan, values, True, None, pushed.weight) is None:
            return False
        call.ask(self._job, self._core)
        return True

    def _after_deferred(self, plan: Plan, call: Callable[[], Any], async_op: bool, what: str) -> Any:
        """Run a call that must wait before it can be sent."""
        if async_op:
            return self._pusher.later_work(plan.states, call, what)
        self._pusher.await_deferred(plan.states, what)
        return call()

    def _pull_work(self, call: PullCall, what: str) -> Work:
        job, numbers, store = self._job, call.numbers, self._store  # not the call: it holds memory
        return Work(call.watch(), what, self._timeout_s, lambda: job.whom(numbers, what, store))

    def _run_pull(self, call: PullCall, what: str) -> Any:
        call.ask(self._job, self._core)
        return self._await_call(call, what)

    def _await_call(self, call: PullCall, what: str) -> Any:
        self._job.await_replies(call.numbers, what, self._timeout_s, self._store, call.plan.total_bytes)
        return call.result()

    def _prepare_pull(self, batch: PullBatch) -> PullCall:
        """Check a whole pull, and return the call to send."""
        if self._faults:
            self._raise_faults(batch.keys)
        known, singles = batch.known is not None, batch.singles
        plan = batch.known if known else self._plans.last_pull.get(batch.keys)
        if (
            plan
            and singles
            and not (plan.dropped or self._core.uncommitted or self._core.num_deferred_commits)
            and (known or plan.fits(singles))
        ):
            destinations = Destinations(plan.states, singles, None, plan.sizes_bytes, plain=known)
            if destinations.plain and not known:
                plan.remember_outs(singles)
            return self._pull_call(batch, plan, destinations, [])
        batch = batch.checked()
        keys = tuple(dict.fromkeys(batch.keys))
        states = self._known(keys)
        self._check_may_use(states, "pull")
        outs_of: dict[Key, list[torch.Tensor]] = {key: [] for key in keys}
        state_of = dict(zip(keys, states, strict=True))
        for key, outs in zip(batch.keys, batch.outs, strict=True):
            for out in outs:
                check_matches("out", out, key, state_of[key].shape, state_of[key].dtype)
            outs_of[key] += outs
        made: list[torch.Tensor] = []
        if batch.given is None:
            made = [new_tensor(key, state_of[key].shape, state_of[key].dtype) for key in batch.keys]
            for key, tensor in zip(batch.keys, made, strict=True):
                outs_of[key].append(tensor)
        with self._job.order:
            plan = self._plans.plan_to_pull(states)
            if len(keys) == len(batch.keys):
                self._plans.remember_pull(keys, plan)
        destinations = Destinations.per_device(states, list(outs_of.values()))
        return self._pull_call(batch, plan, destinations, made)

    def _pull_call(
        self, batch: PullBatch, plan: Plan, destinations: Destinations, made: list[torch.Tensor]
    ) -> PullCall:
        def finish(call: PullCall, error: TensorKVError | None) -> Any:
            if error is not None:
                raise error
            call.destinations.finish()
            if self._core.unmerged and not call.destinations.unmerged:
                with self._job.order:
                    self._core.merged(plan.key_ids, call.up_to)
            if self._faults:
                self._raise_faults(batch.keys)
            return answer(batch, made)

        return PullCall(plan, destinations, finish)

    # ---- commit ----------------------------------------------------------------------------------

    def _commit(self, max_norm: float | None, skip: bool, check_finite: bool, apply: bool) -> CommitResult:
        self._check_commits("commit")
        with self._one_at_a_time(self._committing, "commit", self._timeout_s):
            return self._commit_all(max_norm, skip, check_finite, apply)

    def _check_commits(self, what: str) -> None:
        if self._policy.allows_commit:
            return
        if self._rounds_wait:
            why = f"with quorum={self._policy.quorum} a round may lack a worker's push; a commit needs all"
        else:
            why = "dist_async has no rounds to commit"
        raise NotSupported(f"{what}: {why}")

    def _commit_all(
        self, max_norm: float | None, skip: bool, check_finite: bool, apply: bool
    ) -> CommitResult:
        self._pusher.await_deferred(None, "commit")

        def make(number: int) -> m.Message:
            return m.Commit(number, self._store, max_norm, skip, check_finite, apply)

        keys, replies = self._driver.converse(commit(self._core, make, apply), "commit")
        self._raise_faults(keys)
        return CommitResult(applied=replies[0].applied, norm=replies[0].norm)

    # ---- settings --------------------------------------------------------------------------------

    def _set_updater(self, updater: UpdaterFunction | str | None, elementwise: bool) -> None:
        built = build_from_argument(updater, elementwise)
        code = None if built.spec.type == "named" else describe_code(updater, self._job.code_table)
        self._make_setting(m.SettingRecord(keys=None, updater=built.spec, code=code), built)

    def _set_optimizer(
        self, optimizer: type[torch.optim.Optimizer] | str, groups: Sequence[OptimizerGroup]
    ) -> None:
        optimizer_class = find_optimizer(optimizer)
        specs = [optimizer_spec(optimizer_class, group.options) for group in groups]
        built = [build(spec, optimizer_class) for spec in specs]
        for updater, group in zip(built, groups, strict=True):
            for state in self._those_known(group.keys):
                updater.check_value(state.key, state.shape, state.dtype, group.options)
                num_slices = len(state.entry.slices)
                if num_slices > 1 and not updater.spec.elementwise:
                    raise not_elementwise(updater.spec.name, state.key, state.shape, num_slices)
        code = describe_code(optimizer_class, self._job.code_table)
        for updater, group in zip(built, groups, strict=True):
            self._make_setting(m.SettingRecord(keys=group.keys, updater=updater.spec, code=code), updater)

    def _set_optimizer_options(self, keys: tuple[Key, ...] | None, options: dict[str, Any]) -> None:
        """Change options: they travel with the next message to each server, which compares the workers'."""
        self._raise_faults(())
        with self._one_setting():
            table = self._settings.copy()
            table.set_options(options, keys)
            if options.get("fused"):
                self._check_fused(table, keys)
            message = m.ChangeOptions(self._store, keys, options)
            with self._hold.turn("a setting"):
                self._core.tell_all(message)
                self._job.num_changes_queued += 1
            self._settings = table
        if not self._policy.settings_wait:  # else another rank's push could overtake it
            self._flush(self._timeout_s, "a setting")
        elif self._job.num_changes_queued >= MAX_QUEUED_CHANGES:
            self._job.pump()

    def _make_setting(self, record: m.SettingRecord, built: Updater) -> None:
        """Make a setting if this is the setting rank; otherwise check that it agrees with that rank's."""
        with self._one_setting():
            table = self._settings.copy()
            table.set_updater(built, record.keys)
            with self._job.whole:
                led = self._driver.converse(make_setting(self._core, record), "a setting")
            led.check()
            self._settings = table

    def _those_known(self, keys: Sequence[Key] | None) -> list[KeyState]:
        with self._job.order:
            return self._core.keys.those_known(keys)

    def _one_setting(self) -> AbstractContextManager[None]:
        return self._one_at_a_time(self._setting, "a setting", self._timeout_s)

    def _one_at_a_time(
        self, lock: threading.Lock, what: str, timeout_s: float
    ) -> AbstractContextManager[None]:
        """Serialize such calls: a second thread waits for the first, up to its deadline."""
        whom = f"another thread, which is in {what}"
        return Taken(lock, lambda: self._job.wait(what, timeout_s, store=self._store, whom=lambda: whom))

    def _check_fused(self, table: SettingsTable, keys: tuple[Key, ...] | None) -> None:
        for state in self._those_known(keys):
            setting = table.setting(state.key)
            if setting is not self._settings.setting(state.key):
                setting.check_value(state.key, state.shape, state.dtype)

    # ---- state -----------------------------------------------------------------------------------

    def _state_dict(self, alone: bool) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def save(contents: Contents) -> None:
            found.update(self._transfer.state_dict(contents))

        if alone:
            self._alone("state_dict(alone=True)", save)
        else:
            self._at_rest("state_dict()", lambda: save(self._transfer.newest()))
        return found

    def _state_now(self) -> dict[str, Any]:
        if self._policy.saves_alone:
            return self._state_dict(True)
        self._pusher.await_deferred(None, "state_dict")
        return self._transfer.state_dict(self._transfer.newest())

    def _load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._together(
            "load_state_dict()", lambda: self._transfer.load_state_dict(state_dict, self._settings)
        )

    def _save(self, folder: str, alone: bool) -> None:
        def save(contents: Contents) -> None:
            self._transfer.save(folder, contents)

        if alone:
            self._alone(f"save({folder!r}, alone=True)", save)
        else:
            self._at_rest(f"save({folder!r})", lambda: save(self._transfer.newest()))

    def _load(self, folder: str) -> None:
        self._together(f"load({folder!r})", lambda: self._transfer.load(folder, self._settings))

    def _alone(self, call: str, save: Callable[[Contents], None]) -> None:
        """Save what this worker's last rounds made, without the others.

        It blocks this worker's other threads only while there is nothing to wait for: the others may need
        what those push before they come to the round that is saved.
        """
        if not self._policy.saves_alone:
            raise NotSupported(
                f"{call}: a store of {self._policy} may change without this worker's push, so what it saves "
                "alone would be of no one moment; let all workers make the call, without alone=True"
            )
        whom = "other threads of this worker, which push on"
        wait = self._job.wait(call, self._timeout_s, store=self._store, whom=lambda: whom)
        led: Led | None = None
        while led is None:
            self._pusher.await_deferred(None, call)
            with self._after_commit(call), self._job.order:
                self._core.check_committed(None, call)
            self._pusher.await_merged(call)
            with self._hold.one_call(call), self._job.whole, self._hold.back(), self._transfer.alone():
                led = self._try_alone(save)
            if led is None:
                wait.tick()
        led.check()

    def _after_commit(self, call: str) -> AbstractContextManager[None]:
        """Wait for a commit that another thread has asked for, and let none begin within the block."""
        whom = "another thread, which is in commit"
        return Taken(
            self._committing,
            lambda: self._job.wait(call, self._timeout_s, store=self._store, whom=lambda: whom),
        )

    def _try_alone(self, save: Callable[[Contents], None]) -> Led | None:
        """Save while changes are held back; do nothing and return None if there is a round to wait for."""
        try:
            contents = self._transfer.begin()
            if contents is None:
                return None
            save(contents)
        except (Exception, *GIVEN_UP) as error:
            if self._job.failure() is not None:
                raise
            return Led(error)
        return Led()

    def _at_rest(self, call: str, lead: Callable[[], None]) -> None:
        """Run a collective call, like `_together`, while no thread of any worker changes the store.

        A worker blocks its other threads only once all workers have arrived: until then, its own earlier
        calls, and so its arrival, may need what others push.
        """
        with self._hold.one_call(call):
            self._pusher.await_deferred(None, call)
            self._driver.converse(meet(self._core, call), call)
            with self._job.whole, self._hold.back():
                led = self._lead_or_follow(act_at_rest(self._core, call), call, lead)
        led.check()

    def _together(self, call: str, lead: Callable[[], SavedSettings | None]) -> None:
        """Run a collective call: all workers arrive, the lowest rank leads, and all learn the outcome."""
        with self._hold.one_call(call):
            self._pusher.await_deferred(None, call)
            self._flush(self._timeout_s, call)  # this worker's pushes have reached the servers
            with self._job.whole:
                try:
                    led = self._lead_or_follow(act_together(self._core, call), call, lead)
                except (WaitTimeout, *GIVEN_UP):  # whether keys were replaced is not known
                    with self._job.order:
                        self._plans.forget(self._core.keys.forget_names())
                    raise
        led.check()

    def _lead_or_follow(
        self,
        conversation: Conversation[tuple[m.TogetherReply, Led]],
        call: str,
        lead: Callable[[], SavedSettings | None],
    ) -> Led:
        """Return the outcome if this rank led; raise the error if another rank led and failed."""
        with self._driver.asking():
            reply, led = self._driver.converse(conversation, call, lead)
            if reply.settings is not None:
                self._take_over(reply.settings, reply.replaced, call)
        return led

    def _take_over(self, settings: SavedSettings, replaced: Sequence[m.KeyEntry], call: str) -> None:
        """Go on with what a load has brought."""
        with self._one_setting():
            self._settings = restored_settings(settings, self._settings)
        with self._job.order:
            self._core.keys.restart_changes()
        if replaced:
            self._retire(replaced, call)

    # ---- together --------------------------------------------------------------------------------

    def _barrier(self, timeout_s: float) -> None:
        with self._one_at_a_time(self._at_barrier, "barrier", timeout_s):
            self._meet(timeout_s)

    def _meet(self, timeout_s: float) -> None:
        self._pusher.await_all_deferred("barrier", timeout_s)
        settled = self._core.settled  # if so, no server has anything to report
        if not settled:
            self._flush(timeout_s)
        self._job.control.request(lambda n: m.Barrier(n, self._store), "barrier", timeout_s, self._store)
        if not settled:
            self._flush(timeout_s)  # earlier pushes of others may have failed a round of ours
        self._raise_faults()

    def _flush(self, timeout_s: float, call: str = "barrier") -> None:
        """Wait until the servers have handled all that this worker has sent."""
        self._job.ask_all(lambda n: m.Flush(n, self._store), call, timeout_s, self._store)

    def _close(self) -> None:
        try:
            self._pusher.await_all_deferred("close", self._timeout_s)
            self._driver.converse(leave(self._core), "close")
        finally:
            self._job.forget(self._store)
            self._end_embedded(m.Goodbye())
        self._raise_faults()

    def _abandon(self, why: str) -> None:
        self._job.forget(self._store)
        self._job.close(m.Abandon(why))
        self._end_embedded(m.Abandon(why))

    def _end_embedded(self, last_words: m.Message) -> None:
        if self._embedded is not None:
            self._job.close(last_words)
            self._embedded.stop()


def open_dist(
    kind: str,
    *,
    store: str = "default",
    reduction: Reduction = "sum",
    timeout_s: float = DEFAULT_TIMEOUT_S,
    embedded: bool = False,
    num_servers: int = 1,
    on_worker_loss: m.WorkerLossPolicy | None = None,
    transport: Transport | None = None,
    staleness: int | None = None,
    quorum: int | None = None,
    grace_s: float = 0.0,
    late: m.Late = "drop",
) -> KVStore:
    """Open a distributed store in this process's job or, if `embedded`, in a job of its own.

    Raises:
        NotInJob: this process was not started as a worker of a job, and `embedded` is False.
        StoreMismatch: other workers have opened the name with other options.
        InvalidArgument, NotSupported, TransportUnavailable, AuthenticationError, ProtocolVersionError,
        PeerLostError.
    """
    if on_worker_loss not in (None, "fail", "continue"):
        raise InvalidArgument(f"on_worker_loss={on_worker_loss!r} is not known; use 'fail' or 'continue'")
    policy = policy_of(kind, staleness, quorum, grace_s, late)
    if embedded:
        if num_servers < 1:
            raise InvalidArgument(f"num_servers={num_servers} is too few; a job needs at least one server")
        from tensorkv.launch.cluster import LocalCluster

        host = "inproc" if transport is None else LOOPBACK
        cluster = LocalCluster(1, num_servers, timeout_s=timeout_s, host=host, transport=transport or "auto")
        return _open_embedded(kind, cluster, store, reduction, timeout_s, on_worker_loss, policy)
    config = from_env()
    job = _job_of_launcher(timeout_s, transport) if config is None else None
    if job is None and (config is None or config.role != "worker"):
        told = stray_variables() if config is None else f"here is {ENV_ROLE}={config.role}"
        why = f" ({told})" if told else ""
        raise NotInJob(
            f"create({kind!r}) needs a job of workers and servers{why}. Start one on this machine with\n"
            "    tensorkv run -n WORKERS -s SERVERS python train.py\n"
            "    torchrun --nproc-per-node WORKERS train.py\n"
            "or with tensorkv.spawn(function, num_workers=..., num_servers=...) from a script; or pass\n"
            "embedded=True for a job of one worker in this process, servers and all"
        )
    if config is not None:
        changes = {} if transport is None else {"transport": transport}
        job = join(dataclasses.replace(config, timeout_s=timeout_s, **changes))  # type: ignore[arg-type]
    assert job is not None
    if transport is not None and job.config.transport != transport:
        raise InvalidArgument(
            f"transport={transport!r}, but an earlier store of this process has joined the job with "
            f"transport={job.config.transport!r}; its connections serve all stores"
        )
    return DistStore(
        kind,
        job,
        store=store,
        reduction=reduction,
        timeout_s=timeout_s,
        on_worker_loss=on_worker_loss,
        policy=policy,
    )


def _job_of_launcher(timeout_s: float, transport: Transport | None) -> Session | None:
    from tensorkv.launch.torchrun import join_job  # imported late: few jobs use torchrun

    return join_job(timeout_s=timeout_s, transport=transport)


def _open_embedded(
    kind: str,
    cluster: LocalCluster,
    store: str,
    reduction: Reduction,
    timeout_s: float,
    on_worker_loss: m.WorkerLossPolicy | None,
    policy: m.StorePolicy,
) -> KVStore:
    job: Session | None = None
    try:
        job = cluster.join(0)
        kv = DistStore(
            kind,
            job,
            store=store,
            reduction=reduction,
            timeout_s=timeout_s,
            on_worker_loss=on_worker_loss,
            policy=policy,
            embedded=cluster,
        )
        cluster.end_with(kv, job)
        return kv
    except BaseException:
        if job is not None:
            job.close(m.Goodbye())
        cluster.stop()
        raise


_Pushed = TypeVar("_Pushed")


def _gathered(batch: PushBatch, push: Callable[[PushBatch], _Pushed]) -> _Pushed:
    """Push a batch that may be known. If torch refuses its tensors, check each of them and push again.

    Tensors of a known batch have the right dtypes and shapes. Torch finds one that requires a gradient
    faster than checking each would.
    """
    try:
        return push(batch)
    except (InvalidValue, MemoryLimitReached):
        if batch.known is None:
            raise
    return push(batch.checked())


def _on_cpu(tensor: torch.Tensor, key: Key) -> torch.Tensor:
    if tensor.is_cpu:
        return tensor
    try:
        return tensor.cpu()
    except (RuntimeError, MemoryError) as exc:
        raise unreadable(exc, key, tensor) from exc


def _all_on_cpu(plan: Plan, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [_on_cpu(value, state.key) for state, value in zip(plan.states, values, strict=True)]


def _summed(key: Key, tensors: list[torch.Tensor]) -> torch.Tensor:
    try:
        return sum_devices(tensors) if tensors else torch.empty(0, device="cpu")
    except (RuntimeError, MemoryError) as exc:
        raise unreadable(exc, key, tensors[0]) from exc
