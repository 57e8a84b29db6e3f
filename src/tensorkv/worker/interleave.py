"""Receiving long answers from several servers at once, by the one thread that waits for them.

One after the other would be slower over a network: while the answers of the first server come, those of
the second fill what the system holds of them and stop, and the link carries only half of what it could.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from tensorkv.peer.deadlines import Wait
from tensorkv.transport.base import TICK_S
from tensorkv.worker.link import ServerLink

MIN_BYTES = 1 << 20
"""Answers under this size are not stopped: the system holds them until they are asked for."""


def pays(numbers: Sequence[tuple[ServerLink, int]], size_bytes: int) -> bool:
    """Whether answers of so many bytes come quicker in turn. Those in shared memory do not travel."""
    return size_bytes >= MIN_BYTES and len(numbers) > 1 and all(link.carries_values for link, _ in numbers)


def receive_in_turn(
    numbers: Sequence[tuple[ServerLink, int]], wait: Wait, turn_to: Callable[[int], None]
) -> None:
    """Take in the frames of several servers, one of each in turn, until only one still has to answer.

    Meanwhile this thread leads all their links. Where another thread leads one of them nothing is done.

    Args:
        numbers: links and the exchanges that are waited for there.
        wait: the deadline.
        turn_to: hears the place of the first exchange that has not ended.

    Raises:
        What `wait.tick` and `ServerLink.receive_one` raise.
    """
    links = list(dict.fromkeys(link for link, _ in numbers))
    led: list[ServerLink] = []
    try:
        try:
            for link in links:
                if not link.begin_to_lead(wait.tick):
                    return
                led += [link]
        except BaseException as exc:  # Ctrl-C: between the two nobody knows of the lead
            links[0].broken_off(exc)
            raise
        _receive_leading(links, numbers, wait, turn_to)
    finally:
        try:
            for link in led:
                link.end_leading()
        except BaseException as exc:  # Ctrl-C: nobody would give the others back
            links[0].broken_off(exc)
            raise


def _receive_leading(
    links: Sequence[ServerLink],
    numbers: Sequence[tuple[ServerLink, int]],
    wait: Wait,
    turn_to: Callable[[int], None],
) -> None:
    with ExitStack() as stack:
        for link, number in numbers:
            stack.enter_context(link.answering(number, wait))
        while True:
            missing = [place for place, (link, number) in enumerate(numbers) if link.is_open(number)]
            if len({numbers[place][0] for place in missing}) < 2:
                return
            turn_to(missing[0])
            ready = [link for link in links if link.readable()]  # also those that others wait for
            if not ready:
                _sleep_until_readable(links)
            for link in ready:
                link.receive_one()
            wait.tick()


def _sleep_until_readable(links: Sequence[ServerLink]) -> None:
    poll = select.poll()
    for link in links:
        descriptor = link.fileno()
        if descriptor < 0:  # another thread has closed it: the next look tells
            return
        poll.register(descriptor, select.POLLIN | select.POLLRDHUP)
    poll.poll(TICK_S * 1000)
