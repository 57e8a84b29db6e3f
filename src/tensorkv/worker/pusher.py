"""Pusher: the pushes of one store on a worker, and what must wait before a key may be pushed again.

A push is sent at once, unless an earlier push of the same key is not merged yet; then only that key waits.
A call with `async_op` that must wait does so in a thread of its own. Later calls on its keys wait for it, so
that calls take effect in program order.
"""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol, final

import torch

from tensorkv.errors import TensorKVError, WaitTimeout, again
from tensorkv.peer.deadlines import ASK_GRACE_S
from tensorkv.transport.base import TICK_S
from tensorkv.wire import messages as m
from tensorkv.work import Work
from tensorkv.worker.conversations import await_merged, push_free, push_late
from tensorkv.worker.core import Frame, WorkerCore
from tensorkv.worker.driver import Driver
from tensorkv.worker.latch import OPEN, Latch
from tensorkv.worker.lending import spans_of
from tensorkv.worker.link import ServerLink
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

    Leaving the block returns the loans, unless they were pushed. `sent` opens when the values may be changed:
    copied frames need no wait, except in async mode, where only the connection provides backpressure.

    Args:
        plan: what to push.
        values: per key of the plan.
        links: by server.
        spans: per frame, its place in the window; None if it has to be copied.
        is_async: lend each server at most `MAX_LENT_BYTES`, or one push if that is larger.
    """

    def __init__(
        self,
        plan: Plan,
        values: Sequence[torch.Tensor],
        links: Sequence[ServerLink],
        spans: Sequence[Span | None],
        is_async: bool,
    ) -> None:
        self.pushed = False
        self.frames: list[Frame] = []
        self.sent = OPEN
        self._loans: list[tuple[WindowEnd, Loan]] = []
        try:
            for (server, _, chunk), span in zip(plan.frames, spans, strict=True):
                most = max(MAX_LENT_BYTES, plan.sent_bytes[server]) if is_async else None
                loan = self._lend(chunk, values, links[server].shared, span, most)
                parts, placed = None, None
                if loan is None:
                    parts = gather(chunk, values)
                    check_gathered(sum(map(len, parts)), chunk)
                else:
                    placed = loan.placed
                is_awaited = is_async or (chunk.lends and loan is None)
                self.frames.append((parts, placed, self._await_one() if is_awaited else None))
        except BaseException as exc:
            self.__exit__()
            if isinstance(exc, COPY_ERRORS) and not isinstance(exc, TensorKVError):
                raise failed_copy(exc, chunk, plan.states, values) from exc
            raise

    def _await_one(self) -> Callable[[], None]:
        if self.sent is OPEN:
            self.sent = Latch()
        self.sent.up()
        return self.sent.down

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

    def __init__(self, job: Session, core: WorkerCore, driver: Driver, policy: m.StorePolicy) -> None:
        self._job = job
        self._core = core
        self._driver = driver
        self._store = core.store
        self._is_async = not policy.rounds_wait

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
        job, core = self._job, self._core
        window = job.window
        spans = spans_of(window, plan, values) if window.lends else [None] * len(plan.frames)
        payloads = _Payloads(plan, values, job.links, spans, self._is_async)
        replies = None if asks is None else asks.replies
        with payloads, job.order, job.whole:
            if not core.push(plan, payloads.frames, apply, weight, replies):
                return None
            payloads.pushed = True
            if asks is not None:
                asks.up_to = core.count
        if job.num_changes_queued:
            job.pump()
        for part in plan.parts:
            job.links[part.server].pump()
        return payloads.sent

    def await_sent(self, sent: Latch, what: str) -> None:
        """Wait until a push has been handed to the system. Raises WaitTimeout, PeerLostError."""
        if not sent.open:
            wait = self._job.wait(what, self._driver.timeout_s, store=self._store, whom=lambda: _NOT_TAKEN)
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
        return Work(done, what, self._driver.timeout_s, lambda: f"waiting for {_NOT_TAKEN}")

    # ---- calls that cannot be sent yet -----------------------------------------------------------

    def busy(self, plan: Plan) -> bool:
        """Whether the last push of a key of this plan may not be merged, or is not sent yet."""
        core = self._core
        if not (core.unmerged or core.deferred_calls):
            return False
        with self._job.order:
            return bool(core.busy(plan))

    def deferred(self, states: Sequence[KeyState]) -> bool:
        """Whether an earlier call with `async_op` on one of these keys is still deferred."""
        if not self._core.deferred_calls:
            return False
        with self._job.order:
            return bool(self._core.deferred(states))

    def await_deferred(
        self, states: Sequence[KeyState] | None, what: str, timeout_s: float | None = None
    ) -> list[concurrent.futures.Future[Any]]:
        """Wait until the deferred calls on these keys (None: on any) have ended, and return them."""
        if not self._core.deferred_calls:
            return []
        with self._job.order:
            found: list[concurrent.futures.Future[Any]] = self._core.deferred(states)
        self._await_futures(found, what, timeout_s)
        return found

    def await_all_deferred(self, what: str, timeout_s: float) -> None:
        """Wait for all calls that are deferred now. One that times out ends this call, too.

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

        timeout_s = self._driver.timeout_s if timeout_s is None else timeout_s
        wait = self._job.wait(what, timeout_s, ask, self._store, whom)
        for future in dict.fromkeys(futures):
            while not concurrent.futures.wait([future], TICK_S).done:
                wait.tick()

    def later_work(
        self, states: Sequence[KeyState], call: Callable[[], Any], what: str, apply: bool = True
    ) -> Work:
        """Return the work of a call that must wait; see `run_later`.

        Such a call has deadlines of its own, and gets the time to report whom it waited for.
        """
        done = self.run_later(states, call, what, apply)
        return Work(done, what, self._driver.timeout_s + LAST_WORD_S)

    def run_later(
        self, states: Sequence[KeyState], call: Callable[[], Any], what: str, apply: bool = True
    ) -> concurrent.futures.Future[Any]:
        """Run a call that must wait in a thread of its own; later calls on its keys wait for it.

        Args:
            states: the keys of the call; it runs after earlier deferred calls on them.
            call: makes the call, blocking.
            what: for texts.
            apply: False if the call is a push that waits for a commit.
        """
        done: concurrent.futures.Future[Any] = concurrent.futures.Future()
        with self._job.order:
            before = self._core.defer(states, done, apply)

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
        with self._job.order:
            self._core.end_deferred(done)

    # ---- pushing behind an unmerged push ---------------------------------------------------------

    def push_around(
        self, plan: Plan, values: Sequence[torch.Tensor], apply: bool, weight: float | None = None
    ) -> tuple[list[Latch], list[int]]:
        """Push the keys of a plan that are not busy; return their latches and the indices of the others.

        Pushes none while pushes are held back.
        """
        sent: list[Latch] = []

        def push(places: Sequence[int]) -> bool:
            latch = self._send_part(plan, places, values, apply, weight)
            sent.extend([] if latch is None else [latch])
            return latch is not None

        late = self._driver.converse(push_free(self._core, plan), "push", push)
        return sent, late

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

        def push(places: Sequence[int]) -> bool:
            latch = self._send_part(plan, places, values, apply, weight)
            if latch is not None:
                self.await_sent(latch, what)
            return latch is not None

        self._driver.converse(push_late(self._core, plan, places), what, push)

    def await_merged(self, what: str) -> None:
        """Wait until everything that this worker has pushed so far is merged. Later pushes go on."""
        self._driver.converse(await_merged(self._core), what)

    def _send_part(
        self,
        plan: Plan,
        places: Sequence[int],
        values: Sequence[torch.Tensor],
        apply: bool,
        weight: float | None,
    ) -> Latch | None:
        with self._job.order:
            part = self._core.plans.part_of(plan, places)
        return self.send(part, [values[place] for place in places], apply, weight=weight)
