"""Driver: carries out the steps of a store's conversations over the connections of its job."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, final

from tensorkv.interrupts import GIVEN_UP
from tensorkv.transport.base import TICK_S
from tensorkv.worker.backpressure import Backpressure, watch_merged
from tensorkv.worker.conversations import (
    AskScheduler,
    AskServers,
    AwaitMerged,
    AwaitReplies,
    AwaitTurn,
    Change,
    Conversation,
    Deadline,
    Lead,
    Pause,
    Push,
    Step,
    TellServers,
    WatchMerged,
)
from tensorkv.worker.core import WorkerCore
from tensorkv.worker.hold import Hold
from tensorkv.worker.session import Session

ASK_AGAIN_S = 0.01
"""Time in seconds before servers are asked the same again."""

Outcome = TypeVar("Outcome")


@final
class Driver:
    """Carries out conversations. Safe from any thread; each wait ends after `timeout_s` seconds."""

    def __init__(self, job: Session, core: WorkerCore, hold: Hold, timeout_s: float) -> None:
        self._job = job
        self._core = core
        self._hold = hold
        self.timeout_s = timeout_s

    def converse(
        self, conversation: Conversation[Outcome], what: str, act: Callable[..., Any] | None = None
    ) -> Outcome:
        """Carry out the steps of a conversation, one after the other, and return its outcome.

        Args:
            conversation: what to say.
            what: the call, for texts.
            act: carries out the step `Lead`, or `Push` with its places.

        Raises:
            The error of a step, if the job is broken or the conversation does not handle it.
        """
        result: Any = None
        error: BaseException | None = None
        try:
            while True:
                step = conversation.send(result) if error is None else conversation.throw(error)
                result = error = None
                try:
                    result = self._carry_out(step, what, act)
                except (Exception, *GIVEN_UP) as exc:
                    if self._job.failure() is not None:
                        raise
                    error = exc
        except StopIteration as done:
            outcome: Outcome = done.value
            return outcome
        finally:
            error = None  # its traceback holds this frame
            conversation.close()

    def _carry_out(self, step: Step, what: str, act: Callable[..., Any] | None) -> Any:
        job, core = self._job, self._core
        match step:
            case AskScheduler(make):
                return job.control.request(make, what, self.timeout_s, core.store)
            case AskServers(make):
                return job.ask_all(make, what, self.timeout_s, core.store)
            case TellServers(message):
                return self._change(lambda: core.tell_all(message), what, in_turn=True)
            case Change(call, in_turn):
                return self._change(call, what, in_turn)
            case AwaitReplies(asked, keep, leaving):
                job.await_asked(asked, what, self.timeout_s, 0 if leaving else core.store, keep)
            case AwaitTurn():
                self._hold.wait(what)
            case WatchMerged(states):
                return self._watch(self._change(lambda: watch_merged(core, states), what), what)
            case AwaitMerged(watch):
                assert isinstance(watch, Backpressure)
                return self._await_merged(watch)
            case Deadline(whom):
                return job.wait(what, self.timeout_s, store=core.store, whom=lambda: whom)
            case Pause(deadline):
                deadline.tick()
                time.sleep(ASK_AGAIN_S)
            case Push(places):
                assert act is not None
                return act(places)
            case Lead():
                assert act is not None
                return act()
        return None

    def _change(self, call: Callable[[], Any], what: str, in_turn: bool = False) -> Any:
        if in_turn:
            with self._hold.turn(what):
                result = call()
        else:
            with self._job.order, self._job.whole:
                result = call()
        self._job.pump()
        return result

    def _watch(self, watch: Backpressure, what: str) -> Backpressure:
        job, store = self._job, self._core.store
        links = [(job.links[server], number) for server, number in watch.asked]

        def ask() -> None:
            for link, number in links:
                job.ask_waiting(link, number, store)

        def whom() -> str:
            return ", ".join(link.name for link, _ in links)

        try:
            watch.wait = job.wait(what, self.timeout_s, ask, store, whom)
            for link, number in links:
                link.watch(number, watch.wait)
        except BaseException:  # no thread can be started, say
            watch.close()
            raise
        return watch

    def _await_merged(self, watch: Backpressure) -> list[int]:
        assert watch.wait is not None
        while not (merged := watch.news(TICK_S)):
            watch.wait.tick()
        return merged

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Make requests to the scheduler and learn from a reply, in which a key may be retired already."""
        with self._job.order:
            self._core.keys.begin_asking()
        try:
            yield
        finally:
            with self._job.order:
                self._core.keys.end_asking()
