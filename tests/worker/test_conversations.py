"""What a worker says when all agree, step by step, and when a step fails. All orders: interleavings."""

from __future__ import annotations

from typing import Any

import pytest

from tensorkv.errors import (
    InvalidOption,
    MemoryLimitReached,
    PeerLostError,
    ProtocolError,
    WaitTimeout,
    to_wire,
)
from tensorkv.interrupts import Interrupted
from tensorkv.updaters.base import named_spec
from tensorkv.wire import messages as m
from tensorkv.worker.conversations import (
    AskScheduler,
    AskServers,
    Conversation,
    Lead,
    StoreValues,
    TellServers,
    act_together,
    init_keys,
    make_setting,
)

SPECS = [m.KeySpec(key, (2,), "float32", 4, False) for key in ("a", "b")]
ENTRIES = [
    m.KeyEntry("a", 7, (2,), "float32", 0, [m.SliceEntry(70, 0, 0, 1), m.SliceEntry(71, 1, 1, 2)]),
    m.KeyEntry("b", 8, (2,), "float32", 0, [m.SliceEntry(80, 0, 0, 2)]),
]
RECORD = m.SettingRecord(None, updater=named_spec("add"))
DONE = m.Done(1)


def say(conversation: Conversation[Any], *answers: Any) -> tuple[list[Any], Any]:
    """Answer the steps of a conversation in turn, an exception by raising it; return what it says.

    Requests are shown as messages with number 1. With them comes the outcome, or the exception.
    """
    said: list[Any] = []
    answer: Any = None
    for number in range(len(answers) + 1):
        try:
            raised = isinstance(answer, BaseException)
            step = conversation.throw(answer) if raised else conversation.send(answer)
        except StopIteration as done:
            assert number == len(answers), f"it ended after {said}"
            return said, done.value
        except BaseException as exc:  # noqa: BLE001
            return said, exc
        assert number < len(answers), f"it goes on with {step}"
        said.append(step.make(1) if isinstance(step, (AskScheduler, AskServers)) else step)
        answer = answers[number]
    raise AssertionError("not reached")


def test_an_init_that_another_rank_leads_is_one_question() -> None:
    reply = m.InitReply(1, ENTRIES, [False, False])
    said, (found, led) = say(init_keys(3, SPECS), reply)
    assert said == [m.ProposeInit(1, 3, SPECS)]
    assert found is reply
    assert led.error is None


def test_a_rank_stores_the_values_of_the_keys_that_it_leads_and_concludes() -> None:
    said, (_, led) = say(init_keys(3, SPECS), m.InitReply(1, ENTRIES, [False, True]), None, DONE)
    assert said[1:] == [StoreValues([ENTRIES[1]]), m.ConcludeInit(1, 3, [8], None)]
    assert led.error is None


@pytest.mark.parametrize(
    "error", [MemoryLimitReached("no memory"), WaitTimeout("late"), Interrupted("Ctrl-C")]
)
def test_what_an_init_has_stored_before_an_error_is_dropped(error: BaseException) -> None:
    reply = m.InitReply(1, ENTRIES, [True, True])
    said, (_, led) = say(init_keys(3, SPECS), reply, error, [DONE, DONE], DONE)
    assert said[2] == m.DropSlices(1, 3, [70, 71, 80])
    assert said[3] == m.ConcludeInit(1, 3, [7, 8], to_wire(error))
    with pytest.raises(type(error), match=str(error)):
        led.check()
    assert led.error is None  # it holds no tensors any more


def test_an_init_that_cannot_drop_what_it_has_stored_concludes_with_that() -> None:
    reply = m.InitReply(1, ENTRIES, [True, False])
    said, (_, led) = say(init_keys(3, SPECS), reply, WaitTimeout("late"), WaitTimeout("later"), DONE)
    assert said[-1] == m.ConcludeInit(1, 3, [7], ("WaitTimeout", "later"))
    assert str(led.error) == "later"


def test_a_bug_of_ours_is_concluded_too_and_nobody_is_asked_to_drop_anything() -> None:
    reply = m.InitReply(1, ENTRIES, [True, False])
    said, (_, led) = say(init_keys(3, SPECS), reply, KeyError("bug"), DONE)
    assert isinstance(said[-1], m.ConcludeInit)
    assert said[-1].error is not None
    assert isinstance(led.error, KeyError)


@pytest.mark.parametrize(
    "reply", [m.InitReply(1, ENTRIES[::-1], [True, True]), m.InitReply(1, ENTRIES, [True])]
)
def test_a_reply_about_other_keys_breaks_the_protocol(reply: m.InitReply) -> None:
    said, error = say(init_keys(3, SPECS), reply)
    assert len(said) == 1
    assert isinstance(error, ProtocolError)


def test_an_error_of_the_scheduler_ends_the_conversation() -> None:
    for conversation in (init_keys(3, SPECS), make_setting(3, RECORD), act_together(3, "save('x')")):
        said, error = say(conversation, WaitTimeout("nobody came"))
        assert len(said) == 1
        assert isinstance(error, WaitTimeout)


def test_a_setting_is_prepared_everywhere_before_it_is_activated_anywhere() -> None:
    lead = m.SettingReply(1, 5, True)
    said, led = say(make_setting(3, RECORD), lead, [DONE, DONE], None, [DONE, DONE], DONE)
    assert said == [
        m.ProposeSetting(1, 3, RECORD),
        m.PrepareSetting(1, 3, 5, RECORD),
        TellServers(m.ActivateSetting(3, 5)),
        m.Flush(1, 3),
        m.ConcludeSetting(1, 3, 5, None),
    ]
    assert led.error is None
    said, led = say(make_setting(3, RECORD), m.SettingReply(1, 5, False))
    assert len(said) == 1
    assert led.error is None


@pytest.mark.parametrize("num_done", [0, 1])
def test_a_setting_that_fails_before_it_is_on_its_way_fails_for_all(num_done: int) -> None:
    answers = [[DONE, DONE]] * num_done
    said, led = say(make_setting(3, RECORD), m.SettingReply(1, 5, True), *answers, InvalidOption("lr"), DONE)
    assert len(said) == 3 + num_done
    assert said[-1] == m.ConcludeSetting(1, 3, 5, ("InvalidOption", "lr"))
    assert isinstance(led.error, InvalidOption)


def test_a_setting_that_is_on_its_way_holds_though_its_rank_is_given_up() -> None:
    lead = m.SettingReply(1, 5, True)
    said, led = say(make_setting(3, RECORD), lead, [DONE, DONE], None, Interrupted("Ctrl-C"), DONE)
    assert said[-1] == m.ConcludeSetting(1, 3, 5, None)
    assert isinstance(led.error, Interrupted)


def test_the_rank_that_leads_a_collective_call_tells_how_it_went() -> None:
    last = m.TogetherReply(1, False, None)
    said, (reply, led) = say(act_together(3, "save('x')"), m.TogetherReply(1, True, None), None, last)
    assert said == [
        m.Together(1, 3, "save('x')", only_meet=False),
        Lead(),
        m.ConcludeTogether(1, 3, None, None),
    ]
    assert reply is last
    assert led.error is None
    error = MemoryLimitReached("disk")
    said, (_, led) = say(act_together(3, "save('x')"), m.TogetherReply(1, True, None), error, last)
    assert said[-1] == m.ConcludeTogether(1, 3, ("MemoryLimitReached", "disk"), None)
    assert led.error is error


def test_a_conversation_that_is_ended_says_nothing_more() -> None:
    """As when the job is broken: nobody waits for an answer then."""
    for error in (None, PeerLostError("server 0 was lost")):
        conversation = init_keys(3, SPECS)
        next(conversation)
        conversation.send(m.InitReply(1, ENTRIES, [True, True]))
        conversation.close()
        with pytest.raises(StopIteration if error is None else PeerLostError):
            next(conversation) if error is None else conversation.throw(error)
