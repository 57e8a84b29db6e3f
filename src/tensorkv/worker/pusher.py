"""Pusher: the pushes of one store on a worker, and what must wait before a key may be pushed again.

A push is sent at once, unless an earlier push of the same key is not merged yet; then only that key waits.
A call with `async_op` that must wait does so in a thread of its own. Later calls on its keys wait for it, so
that calls take effect in program order.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol, final

import torch

from tensorkv.errors import TensorKVError, WaitTimeout, again
from tensorkv.peer.deadlines import ASK_GRACE_S
from tensorkv.transport.base import TICK_S
from tensorkv.wire import messages as m
from tensorkv.work import Work
from tensorkv.worker.backpressure import Backpressure
from tensorkv.worker.hold import Hold
from tensorkv.worker.keytable import KeyTable
from tensorkv.worker.latch import OPEN, Latch
from tensorkv.worker.lending import spans_of
from tensorkv.worker.link import ServerLink
from tensorkv.worker.plancache import PlanCache
from tensorkv.worker.plans import KeyState, Plan, PlanChunk, Span
from tensorkv.worker.session import Session
from tensorkv.worker.transfers import COPY_ERRORS, check_gathered, failed_copy, gather, gather_into
from tensorkv.worker.window import Loan, WindowEnd

MAX_LENT_BYTES = 64 << 20
"""Maximum size of an async worker's pushes in shared memory, per server, until they are applied.

In sync there is at most one push per key. The rest goes through the connection, which provides backpressure
for a worker that pushes faster than the server applies.
"""

LAST_WORD_S = ASK_GRACE_S + 1.0
"""Time in seconds past its deadline that a deferred call has to report whom it waited for."""

_NOT_TAKEN = "a server, which does not take it in"


class Asks(Protocol):
    """A call that requests the values after a push: each server's request, and the push's number."""

    replies: dict[int, int]
    up_to: int


@final
class _Payloads:
    """The payloads of a push, one per frame: parts to send, or a loan of shared memory.

    Leaving the block returns the loans, unless they were pushed.

    Args:
        plan: what to push.
        values: per key of the plan.
        links: by server.
        spans: per frame, its place in the window; None if it has to be copied.
        bounded: lend each server at most `MAX_LENT_BYTES`, or one push if that is larger.
    """

    def __init__(
        self,
        plan: Plan,
        values: Sequence[torch.Tensor],
        links: Sequence[ServerLink],
        spans: Sequence[Span | None],
        bounded: bool,
    ) -> None:
        self.pushed = False
        self.frames: list[tuple[list[memoryview] | None, Loan | None]] = []
        self.num_lending = 0  # frames that lend the caller's memory
        self._loans: list[tuple[WindowEnd, Loan]] = []
        try:
            for (server, _, chunk), span in zip(plan.frames, spans, strict=True):
                most = max(MAX_LENT_BYTES, plan.sent_bytes[server]) if bounded else None
                loan = self._lend(chunk, values, links[server].shared, span, most)
                parts = gather(chunk, values) if loan is None else None
                if parts is not None:
                    check_gathered(sum(map(len, parts)), chunk)
                self.frames.append((parts, loan))
                self.num_lending += chunk.lends and loan is None
        except BaseException as exc:
            self.__exit__()
            if isinstance(exc, COPY_ERRORS) and not isinstance(exc, TensorKVError):
                raise failed_copy(exc, chunk, plan.states, values) from exc
            raise

    def _lend(
        self,
        chunk: PlanChunk,
        values: Sequence[torch.Tensor],
        shared: WindowEnd | None,
        span: Span | None,
        max_lent_bytes: int | None,
    ) -> Loan | None:
        """Lend a chunk, copied to shared memory unless it is already there; None if it has to be sent."""
        if shared is None or chunk.size_bytes < m.PLACED_BYTES:
            return None
        if span is not None:
            tensors = [values[piece.value] for piece in chunk.pieces]
            loan = shared.lend_at(span, tensors, max_lent_bytes)
        else:
            loan = shared.lend(chunk.size_bytes, max_lent_bytes)
        if loan is not None:
            self._loans.append((shared, loan))
            if span is None:
                gather_into(loan.tensors[0].view(chunk.dtype), chunk, values)
        return loan

    def __enter__(self) -> None:
        """The payloads are gathered already."""

    def __exit__(self, *exc: object) -> None:
        if not self.pushed:
            for shared, loan in self._loans:
                shared.give_back(loan)


@final
class Pusher:
    """Sends pushes. Safe from any thread."""

    def __init__(
        self,
        job: Session,
        store: int,
        timeout_s: float,
        policy: m.StorePolicy,
        keys: KeyTable,
        plans: PlanCache,
        hold: Hold,
    ) -> None:
        self._job = job
        self._store = store
        self._timeout_s = timeout_s
        self._waits_for_merge = policy.rounds_wait
        self._keys = keys
        self._plans = plans
        self._hold = hold
        self._lock = threading.Lock()  # guards _unmerged and _deferred
        self._unmerged: dict[int, int] = {}  # key id -> number of its last push, until it is known merged
        self._newest = 0  # the largest number in it since it was last empty
        self._deferred: dict[int, concurrent.futures.Future[Any]] = {}  # key id -> deferred call
        self.count = 0  # pushes queued so far; read and written with the job's order held

    def send(
        self,
        plan: Plan,
        values: Sequence[torch.Tensor],
        apply: bool,
        asks: Asks | None = None,
        weight: float | None = None,
    ) -> Latch | None:
        """Queue a push to all its servers; the latch opens when the values may be changed.

        Returns None, and does nothing, if the last push of one of the keys may not be merged, or pushes
        are held back: another thread may have pushed the key, or begun a save, since the caller checked.

        Args:
            plan: what to push.
            values: per key of the plan, on any device.
            apply, weight: as in `push`.
            asks: requests the values after the round, too; gets the number of the push.

        Raises:
            InvalidValue, MemoryLimitReached: torch fails to copy a value.
        """
        links = self._job.links
        window = self._job.window
        spans = spans_of(window, plan, values) if window.lends else [None] * len(plan.frames)
        payloads = _Payloads(plan, values, links, spans, bounded=not self._waits_for_merge)
        # Copied frames need no wait, except in async mode, where only the connection provides backpressure.
        num_awaited = payloads.num_lending if self._waits_for_merge else len(plan.frames)
        sent = Latch(num_awaited) if num_awaited else OPEN
        with payloads, self._job.order, self._job.whole:
            if self._hold.on or (self._unmerged and self._unmerged_of(plan)):
                return None
            self._plans.tell(plan)
            for (server, number, chunk), (parts, loan) in zip(plan.frames, payloads.frames, strict=True):
                reply = 0 if asks is None else asks.replies[server]
                lends = chunk.lends and loan is None
                on_sent = sent.down if lends or not self._waits_for_merge else None
                placed = None if loan is None else loan.placed
                links[server].put(m.Push(plan.number, number, apply, reply, placed, weight), parts, on_sent)
            payloads.pushed = True
            self._note(plan, apply)
            if asks is not None:
                asks.up_to = self.count
        if self._job.num_changes_queued:
            self._job.send_changes()
        for part in plan.parts:
            links[part.server].pump()
        return sent

    def _note(self, plan: Plan, apply: bool) -> None:
        self.count += 1
        if not self._waits_for_merge:
            return
        with self._lock:
            self._newest = self.count
            self._unmerged.update(dict.fromkeys(plan.key_ids, self.count))
        if not apply:
            with self._keys.lock:
                self._keys.uncommitted |= plan.key_ids

    def await_sent(self, sent: Latch, what: str) -> None:
        """Wait until a push has been handed to the system. Raises WaitTimeout, PeerLostError."""
        if not sent.open:
            wait = self._job.wait(what, self._timeout_s, store=self._store, whom=lambda: _NOT_TAKEN)
            while not sent.wait(TICK_S):
                wait.tick()
        failure = self._job.failure()
        if failure is not None:
            raise again(failure) from None

    def work_of(self, sent: Latch, what: str) -> Work:
        """Return a work that completes when a push has been handed to the system, or could not be."""
        done: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def settle() -> None:
            error = self._job.failure() or next(
                filter(None, (each.cut_off for each in self._job.links)), None
            )
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(again(error))

        sent.then(settle)
        return Work(done, what, self._timeout_s, lambda: f"waiting for {_NOT_TAKEN}")

    @property
    def settled(self) -> bool:
        """Whether every push of this worker is known, from pulls, to be applied or to have failed."""
        return self._waits_for_merge and not (self._unmerged or self._deferred)

    # ---- busy keys -------------------------------------------------------------------------------

    def busy(self, plan: Plan) -> set[int]:
        """Return the keys of a plan whose last push by this worker may not be merged, or is not sent yet."""
        if not (self._unmerged or self._deferred):
            return set()
        found = self._unmerged_of(plan)
        with self._lock:
            found |= plan.key_ids & self._deferred.keys()
        return found

    def _unmerged_of(self, plan: Plan) -> set[int]:
        with self._lock:
            return self._unmerged.keys() & plan.key_ids

    def merged(self, key_ids: frozenset[int] | set[int], up_to: int) -> None:
        """Note that the pushes of these keys up to this number are merged."""
        if not self._unmerged:
            return
        with self._lock:
            if self._newest <= up_to and self._unmerged.keys() == key_ids:  # the common case
                self._unmerged.clear()
                return
            for key_id in key_ids:
                if self._unmerged.get(key_id, up_to + 1) <= up_to:
                    del self._unmerged[key_id]

    def forget(self, states: Sequence[KeyState]) -> None:
        """Forget keys that are retired. Called with the job's order held."""
        self.merged({state.key_id for state in states}, self.count)

    def deferred(self, states: Sequence[KeyState]) -> bool:
        """Whether an earlier call with `async_op` on one of these keys is still deferred."""
        return bool(self._deferred) and any(state.key_id in self._deferred for state in states)

    def await_deferred(
        self, states: Sequence[KeyState] | None, what: str, timeout_s: float | None = None
    ) -> list[concurrent.futures.Future[Any]]:
        """Wait until the deferred calls on these keys (None: on any) have ended, and return them."""
        if not self._deferred:
            return []
        with self._lock:
            if states is None:
                found = list(self._deferred.values())
            else:
                found = [f for state in states if (f := self._deferred.get(state.key_id)) is not None]
        self._await_futures(found, what, timeout_s)
        return found

    def await_all_deferred(self, what: str, timeout_s: float) -> None:
        """Wait for all deferred calls; one that times out may not have pushed everything, and ends this call.

        Raises:
            WaitTimeout: also that of such a call, whose text names the missing ranks.
        """
        for future in self.await_deferred(None, what, timeout_s):
            error = future.exception()
            if isinstance(error, WaitTimeout):
                raise WaitTimeout(f"{what}: an earlier {error}")

    def _await_futures(
        self,
        futures: Sequence[concurrent.futures.Future[Any]],
        what: str,
        timeout_s: float | None = None,
    ) -> None:
        def ask() -> None:
            """Do nothing: these calls ask for themselves, and get the time to report why they gave up."""

        def whom() -> str:
            return "an earlier call with async_op on its keys"

        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        wait = self._job.wait(what, timeout_s, ask, self._store, whom)
        for future in dict.fromkeys(futures):
            while not concurrent.futures.wait([future], TICK_S).done:
                wait.tick()

    def later_work(self, states: Sequence[KeyState], call: Callable[[], Any], what: str) -> Work:
        """Return the work of a call that must wait; see `run_later`.

        Such a call has deadlines of its own, and gets the time to report whom it waited for.
        """
        return Work(self.run_later(states, call, what), what, self._timeout_s + LAST_WORD_S)

    def run_later(
        self, states: Sequence[KeyState], call: Callable[[], Any], what: str
    ) -> concurrent.futures.Future[Any]:
        """Run a call that must wait in a thread of its own; later calls on its keys wait for it.

        Args:
            states: the keys of the call; it runs after earlier deferred calls on them.
            call: makes the call, blocking.
            what: for texts.
        """
        done: concurrent.futures.Future[Any] = concurrent.futures.Future()
        with self._lock:
            before = [f for state in states if (f := self._deferred.get(state.key_id)) is not None]
            self._deferred.update(dict.fromkeys((state.key_id for state in states), done))

        def run() -> None:
            try:
                self._await_futures(before, what)
                result = call()
            except Exception as exc:  # noqa: BLE001  # the work raises it
                self._gone(done)
                done.set_exception(exc)
            else:
                self._gone(done)
                done.set_result(result)

        try:
            threading.Thread(target=run, name="tensorkv-later", daemon=True).start()
        except BaseException:  # the system has no thread for it: later calls must not wait for this one
            self._gone(done)
            done.cancel()
            raise
        return done

    def _gone(self, done: concurrent.futures.Future[Any]) -> None:
        with self._lock:
            self._deferred = {k: f for k, f in self._deferred.items() if f is not done}

    # ---- pushing behind an unmerged push ---------------------------------------------------------

    def push_around(
        self, plan: Plan, values: Sequence[torch.Tensor], apply: bool, weight: float | None = None
    ) -> tuple[list[Latch], list[int]]:
        """Push the keys of a plan that are not busy; return their latches and the indices of the others.

        Pushes none while pushes are held back.
        """
        while not self._hold.on:
            busy = self.busy(plan)
            free = [place for place, state in enumerate(plan.states) if state.key_id not in busy]
            late = [place for place, state in enumerate(plan.states) if state.key_id in busy]
            if not free:
                return [], late
            sent = self._send_part(plan, free, values, apply, weight)
            if sent is not None:
                return [sent], late
        return [], list(range(len(plan.states)))

    def push_late(
        self,
        plan: Plan,
        places: Sequence[int],
        values: Sequence[torch.Tensor],
        apply: bool,
        what: str,
        weight: float | None = None,
    ) -> None:
        """Push these values of a plan, each when its key's last push is merged and pushes are not held back.

        Blocks.
        """
        while places:
            self._hold.wait(what)
            places = self._push_merged(plan, places, values, apply, what, weight)

    def _push_merged(
        self,
        plan: Plan,
        places: Sequence[int],
        values: Sequence[torch.Tensor],
        apply: bool,
        what: str,
        weight: float | None,
    ) -> list[int]:
        """Push each value when its key's last push is merged; return those where another thread was first."""
        again: list[int] = []
        with contextlib.closing(self._merging([plan.states[place] for place in places], what)) as merging:
            for merged in merging:
                free = [places[number] for number in merged]
                sent = self._send_part(plan, free, values, apply, weight)
                if sent is None:
                    again += free
                else:
                    self.await_sent(sent, what)
        return again

    def await_merged(self, what: str) -> None:
        """Wait until everything that this worker has pushed so far is merged. Later pushes go on."""
        with self._lock:
            unmerged = set(self._unmerged)
        states = [state for state in self._keys.those_known(None) if state.key_id in unmerged]
        if states:
            for _ in self._merging(states, what):
                pass

    def _merging(self, states: Sequence[KeyState], what: str) -> Generator[list[int], None, None]:
        """Yield the numbers of these keys as the last push of each is merged, until all are."""
        asked = self._plans.plan_to_pull(states)
        watch = Backpressure(self._job, self._store, asked, self._timeout_s, what)
        with self._job.order, self._job.whole:
            up_to = self.count
            self._plans.tell(asked)
            watch.ask()
        try:
            for merged in watch.ready():
                self.merged({states[number].key_id for number in merged}, up_to)
                yield merged
        finally:
            watch.close()

    def _send_part(
        self,
        plan: Plan,
        places: Sequence[int],
        values: Sequence[torch.Tensor],
        apply: bool,
        weight: float | None,
    ) -> Latch | None:
        part = self._plans.part_of(plan, places)
        return self.send(part, [values[place] for place in places], apply, weight=weight)
