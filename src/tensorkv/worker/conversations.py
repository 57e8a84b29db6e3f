"""What a worker says in a call that takes several messages, or has to wait between them.

A conversation is a generator. It yields the next step, gets what came of it, or its error as an exception,
and returns the outcome. It sends nothing itself: `driver.py` carries steps out over connections, with
deadlines, and `tests/server/test_interleavings.py` over queues, in every order. If the job is broken, it is
ended where it is: nobody waits then.

What a call says to the servers alone (push behind a busy key, put, commit, delete, leave) is below. In
others all workers agree on something: a new key, a setting, a save or a load. The scheduler names one rank
that does it for all. That rank leads: it does the work at the servers, and then concludes at the scheduler,
with success or with its error, so that no other rank waits for it in vain.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, final

import torch

from tensorkv.checkpoint.records import SavedSettings
from tensorkv.errors import to_wire
from tensorkv.interrupts import GIVEN_UP, ORDERLY
from tensorkv.plain import Key
from tensorkv.wire import messages as m
from tensorkv.wire.validate import check_init
from tensorkv.worker.core import SentCommit, WorkerCore, init_messages
from tensorkv.worker.plans import KeyState, Plan
from tensorkv.worker.requests import Asked, Make, replies_of

Told = tuple[str, str] | None
"""An error as it is sent; None for success."""

T = TypeVar("T")


class Watch(Protocol):
    """Watches keys until the last push of each is merged; see `backpressure.py`."""

    plan: Plan
    up_to: int

    @property
    def is_over(self) -> bool:
        """Whether all are."""

    def close(self) -> None:
        """Give up."""


@final
@dataclass(frozen=True, slots=True)
class AskScheduler:
    """Send the scheduler a request. The result is its reply."""

    make: Make


@final
@dataclass(frozen=True, slots=True)
class AskServers:
    """Send every server a request. The result are their replies."""

    make: Make


@final
@dataclass(frozen=True, slots=True)
class TellServers:
    """Send every server a message that has no reply, at a moment when nothing is held back."""

    message: m.Message


@final
@dataclass(frozen=True, slots=True)
class Change:
    """Call a method of the core, and send what it queues. The result is what it returns.

    With `in_turn`, do so at a moment when nothing is held back.
    """

    call: Callable[[], Any]
    in_turn: bool = False


@final
@dataclass(frozen=True, slots=True)
class AwaitReplies:
    """Wait until these requests have ended. With `keep`, they stay open if the wait fails.

    `leaving`: they have left the store, which else would end the wait.
    """

    asked: Asked
    keep: bool = False
    leaving: bool = False


@final
@dataclass(frozen=True, slots=True)
class AwaitTurn:
    """Wait until nothing is held back."""


@final
@dataclass(frozen=True, slots=True)
class WatchMerged:
    """Ask the servers to report the merge of the last pushes of these keys. The result is a `Watch`."""

    states: Sequence[KeyState]


@final
@dataclass(frozen=True, slots=True)
class AwaitMerged:
    """Wait until more of these keys are merged. The result are their places among those watched."""

    watch: Watch


@final
@dataclass(frozen=True, slots=True)
class Deadline:
    """Set the deadline of a `Pause`, which is the result. `whom` is waited for, in texts."""

    whom: str


@final
@dataclass(frozen=True, slots=True)
class Pause:
    """Wait a moment before asking again, until the deadline."""

    deadline: Any


@final
@dataclass(frozen=True, slots=True)
class Push:
    """Push some of the values of a call, given by their places. The result tells whether they were queued."""

    places: Sequence[int]


@final
@dataclass(frozen=True, slots=True)
class Lead:
    """Do what this rank does for all. The result is what it returns."""


Step = (
    AskScheduler
    | AskServers
    | TellServers
    | Change
    | AwaitReplies
    | AwaitTurn
    | WatchMerged
    | AwaitMerged
    | Deadline
    | Pause
    | Push
    | Lead
)
Conversation = Generator[Step, Any, T]


# ---- with the servers alone ------------------------------------------------------------------------


def look_up(core: WorkerCore, keys: Sequence[Key]) -> Conversation[list[KeyState]]:
    """Return what is known of keys, asking the scheduler about the unknown ones.

    Raises KeyNotInitialized if one of them does not exist, or this worker has deleted it.
    """
    unknown = core.keys.unknown(keys)
    if unknown:
        reply = yield AskScheduler(lambda n: m.Lookup(n, core.store, unknown))
        yield Change(lambda: core.keys.learn(reply.entries))
    return core.keys.known(keys)


def push_free(core: WorkerCore, plan: Plan) -> Conversation[list[int]]:
    """Push the values of a plan whose keys are not busy; return the places of the others. Does not wait.

    Pushes none while changes are held back.
    """
    while not core.held:
        busy = yield Change(lambda: core.busy(plan))
        free = [place for place, state in enumerate(plan.states) if state.key_id not in busy]
        if not free or (yield Push(free)):
            return [place for place, state in enumerate(plan.states) if state.key_id in busy]
    return list(range(len(plan.states)))


def push_late(core: WorkerCore, plan: Plan, places: Sequence[int]) -> Conversation[None]:
    """Push these values of a plan, each when its key's last push is merged and nothing is held back."""
    while places:
        yield AwaitTurn()
        places = yield from _push_merged(core, plan, places)


def _push_merged(core: WorkerCore, plan: Plan, places: Sequence[int]) -> Conversation[list[int]]:
    """Push each value when its key's last push is merged; return those where another thread was first."""
    again: list[int] = []
    watch: Watch = yield WatchMerged([plan.states[place] for place in places])
    try:
        while not watch.is_over:
            free = [places[number] for number in (yield from _next_merged(core, watch))]
            if not (yield Push(free)):
                again += free
    finally:
        watch.close()
    return again


def await_merged(core: WorkerCore) -> Conversation[None]:
    """Wait until everything that this worker has pushed so far is merged. Later pushes go on."""
    states = yield Change(core.unmerged_keys)
    if states:
        watch: Watch = yield WatchMerged(states)
        try:
            while not watch.is_over:
                yield from _next_merged(core, watch)
        finally:
            watch.close()


def _next_merged(core: WorkerCore, watch: Watch) -> Conversation[list[int]]:
    merged: list[int] = yield AwaitMerged(watch)
    key_ids = {watch.plan.states[number].key_id for number in merged}
    yield Change(lambda: core.merged(key_ids, watch.up_to))
    return merged


def put(core: WorkerCore, plan: Plan, payloads: Sequence[list[memoryview]]) -> Conversation[None]:
    """Put values, with the payload of each frame, and wait until the servers have them."""
    asked, up_to = yield Change(lambda: (core.put(plan, payloads), core.count), in_turn=True)
    yield from _replies(asked)
    yield Change(lambda: core.merged(plan.key_ids, up_to))


def place(
    core: WorkerCore, places: Mapping[int, tuple[list[int], list[int]]], path: str, size_bytes: int
) -> Conversation[None]:
    """Let the servers move slices to shared memory; see `WorkerCore.place`."""
    asked = yield Change(lambda: core.place(places, path, size_bytes), in_turn=True)
    yield from _replies(asked)


def commit(core: WorkerCore, make: Make, apply: bool) -> Conversation[tuple[list[Key], list[Any]]]:
    """Commit what was pushed with apply=False, or measure it; return its keys and the servers' answers.

    What is committed is known only when nothing is held back. If the wait is given up, the next call awaits
    the same commit: servers know one per worker at a time.
    """
    sent: SentCommit = yield Change(lambda: core.commit(make, apply), in_turn=True)
    yield AwaitReplies(sent.asked, keep=True)
    replies = yield Change(lambda: core.end_commit(sent))
    return sent.keys, replies


def retire(
    core: WorkerCore, entries: Sequence[m.KeyEntry], deleted: Sequence[KeyState] = ()
) -> Conversation[None]:
    """Tell the servers that this worker needs these keys no more; see `WorkerCore.retire`."""
    asked = yield Change(lambda: core.retire(entries, deleted), in_turn=True)  # it changes values
    yield from _replies(asked)


def leave(core: WorkerCore) -> Conversation[None]:
    """Leave the store."""
    asked = yield Change(core.leave, in_turn=True)  # it completes rounds, and so changes values
    yield AwaitReplies(asked, leaving=True)
    replies_of(asked)
    yield AskScheduler(lambda n: m.LeaveStore(n, core.store))


def begin_save(core: WorkerCore, is_lost: Callable[[], bool]) -> Conversation[list[m.SaveBegun] | None]:
    """Begin a save by this worker alone; return the servers' answers. See `StoreShard.begin_save`.

    Returns None if a round that this worker has pushed is not applied. Its changes are held back meanwhile,
    and so this waits for no other worker. It only waits until all servers have been given the same settings:
    one may be on its way to some of them. A worker's that `is_lost` may never come; then the save has what
    each server has.
    """
    deadline = yield Deadline("a server that lacks the newest setting")
    before: list[int] = []
    while True:
        begun: list[m.SaveBegun] = yield AskServers(lambda n: m.BeginSave(n, core.store))
        if any(each.num_open for each in begun):
            return None
        numbers = [each.num_settings for each in begun]
        if len(set(numbers)) == 1 or (is_lost() and numbers == before):
            return begun
        before = numbers
        yield Pause(deadline)


def _replies(asked: Asked) -> Conversation[list[Any]]:
    yield AwaitReplies(asked)
    return replies_of(asked)


# ---- among all workers -----------------------------------------------------------------------------


@final
class Led:
    """Outcome of an operation that this rank performs for all; also that of one that it did not lead."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error

    def told(self) -> Told:
        """Return the error in the form sent to the scheduler."""
        return None if self.error is None else to_wire(self.error)

    def check(self) -> None:
        """Raise the error if there was one. Drop our reference: its traceback holds the sent tensors."""
        error, self.error = self.error, None
        if error is not None:
            try:
                raise error
            finally:
                del error


def init_keys(
    core: WorkerCore, specs: Sequence[m.KeySpec], value_of: Callable[[Key], torch.Tensor]
) -> Conversation[tuple[m.InitReply, Led]]:
    """Create keys, or agree with the rank that has; return what the scheduler knows of them.

    `value_of` returns a value of this rank, on the CPU. What was stored before an error is dropped again.
    """
    store = core.store
    reply = yield AskScheduler(lambda n: m.ProposeInit(n, store, list(specs)))
    check_init(reply, specs)
    created = [entry for entry, lead in zip(reply.entries, reply.lead, strict=True) if lead]
    led = Led()
    if created:
        led = yield from _outcome(_store_values(core, created, value_of))
        ids, told = [entry.key_id for entry in created], led.told()
        yield AskScheduler(lambda n: m.ConcludeInit(n, store, ids, told))
    return reply, led


def make_setting(core: WorkerCore, record: m.SettingRecord) -> Conversation[Led]:
    """Make a setting, or agree with the rank that has."""
    store = core.store
    reply = yield AskScheduler(lambda n: m.ProposeSetting(n, store, record))
    if not reply.lead:
        return Led()
    number = reply.number
    led = arrived = yield from _outcome(_activate(store, number, record))
    if led.error is None:
        # In async mode another rank's push could overtake the setting unless that rank waits for this flush.
        # A setting is concluded once it is no longer in flight: losing this worker undoes nothing.
        arrived = yield from _outcome(_ask_servers(lambda n: m.Flush(n, store)))
    told = led.told()
    yield AskScheduler(lambda n: m.ConcludeSetting(n, store, number, told))
    return arrived


def meet(core: WorkerCore, call: str) -> Conversation[None]:
    """Wait until all workers make this collective call."""
    yield AskScheduler(lambda n: m.Together(n, core.store, call, only_meet=True))


def act_at_rest(core: WorkerCore, call: str) -> Conversation[tuple[m.TogetherReply, Led]]:
    """Make a collective call, as `act_together`, when what was queued before has reached every server."""
    yield AskServers(lambda n: m.Flush(n, core.store))
    return (yield from act_together(core, call))


def act_together(core: WorkerCore, call: str) -> Conversation[tuple[m.TogetherReply, Led]]:
    """Make a collective call: all workers arrive, the lowest rank leads, and all learn the outcome.

    Raises the error of another rank that led.
    """
    store = core.store
    reply = yield AskScheduler(lambda n: m.Together(n, store, call, only_meet=False))
    led = Led()
    if reply.lead:
        settings: SavedSettings | None = None
        try:
            settings = yield Lead()
        except (Exception, *GIVEN_UP) as error:  # noqa: BLE001  # whatever it is, the scheduler is told
            led = Led(error)
        told = led.told()
        reply = yield AskScheduler(lambda n: m.ConcludeTogether(n, store, told, settings))
    return reply, led


def _store_values(
    core: WorkerCore, created: list[m.KeyEntry], value_of: Callable[[Key], torch.Tensor]
) -> Conversation[None]:
    """Send each value like a push of one key: one message per key and server."""
    store, num_servers = core.store, len(core.servers)
    try:
        messages = [
            each
            for entry in created
            for each in init_messages(store, entry, value_of(entry.key), num_servers)
        ]
        asked = yield Change(lambda: core.init(messages))
        yield from _replies(asked)
    except ORDERLY:
        gone = [each.slice_id for entry in created for each in entry.slices]
        yield AskServers(lambda n: m.DropSlices(n, store, gone))
        raise


def _activate(store: int, number: int, record: m.SettingRecord) -> Conversation[None]:
    yield AskServers(lambda n: m.PrepareSetting(n, store, number, record))
    yield TellServers(m.ActivateSetting(store, number))


def _ask_servers(make: Make) -> Conversation[None]:
    yield AskServers(make)


def _outcome(work: Conversation[None]) -> Conversation[Led]:
    """Run what this rank leads, and return the outcome.

    Ctrl-C counts as an error too: the scheduler is told, so that no rank waits for this one.
    """
    try:
        yield from work
    except (Exception, *GIVEN_UP) as error:  # noqa: BLE001  # whatever it is, the scheduler is told
        return Led(error)
    return Led()
