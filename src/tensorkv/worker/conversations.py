"""What a worker says when all workers agree on something: a new key, a setting, a save or a load.

The scheduler names one rank that does it for all. That rank leads: it does the work at the servers, and then
concludes at the scheduler, with success or with its error, so that no other rank waits for it in vain.

A conversation is a generator. It yields the next step, gets what came of it, or its error as an exception,
and returns the outcome. It sends nothing itself: `stores/dist.py` carries steps out over connections, with
deadlines, and `tests/server/test_interleavings.py` over queues, in every order. If the job is broken, it is
ended where it is: nobody waits then.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, final

from tensorkv.checkpoint.records import SavedSettings
from tensorkv.errors import to_wire
from tensorkv.interrupts import GIVEN_UP, ORDERLY
from tensorkv.wire import messages as m
from tensorkv.wire.validate import check_init

Make = Callable[[int], m.Message]
"""Builds a request from its number."""

Told = tuple[str, str] | None
"""An error as it is sent; None for success."""

T = TypeVar("T")


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
class StoreValues:
    """Store this rank's values of keys that it creates, and wait until the servers have them."""

    entries: list[m.KeyEntry]


@final
@dataclass(frozen=True, slots=True)
class Lead:
    """Do what this rank does for all. The result is what it returns."""


Step = AskScheduler | AskServers | TellServers | StoreValues | Lead
Conversation = Generator[Step, Any, T]


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


def init_keys(store: int, specs: Sequence[m.KeySpec]) -> Conversation[tuple[m.InitReply, Led]]:
    """Create keys, or agree with the rank that has; return what the scheduler knows of them.

    What was stored before an error is dropped again.
    """
    reply = yield AskScheduler(lambda n: m.ProposeInit(n, store, list(specs)))
    check_init(reply, specs)
    created = [entry for entry, lead in zip(reply.entries, reply.lead, strict=True) if lead]
    led = Led()
    if created:
        led = yield from _outcome(_store_values(store, created))
        ids, told = [entry.key_id for entry in created], led.told()
        yield AskScheduler(lambda n: m.ConcludeInit(n, store, ids, told))
    return reply, led


def make_setting(store: int, record: m.SettingRecord) -> Conversation[Led]:
    """Make a setting, or agree with the rank that has."""
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


def act_together(store: int, call: str) -> Conversation[tuple[m.TogetherReply, Led]]:
    """Make a collective call: all workers arrive, the lowest rank leads, and all learn the outcome.

    Raises the error of another rank that led.
    """
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


def _store_values(store: int, created: list[m.KeyEntry]) -> Conversation[None]:
    try:
        yield StoreValues(created)
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
