"""Receiving long answers from several servers at once, in the one thread that waits for them.

Receiving from one server after the other is slower over a network: while the answers of the first server
arrive, those of the second fill the system's buffers and stall, and the network is only half used.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from tensorkv.peer.deadlines import Wait
from tensorkv.transport.base import TICK_S
from tensorkv.worker.link import ServerLink

MIN_BYTES = 1 << 20
"""Minimum size of answers received in turn; smaller ones fit in the system's buffers and do not stall."""


def pays(numbers: Sequence[tuple[ServerLink, int]], size_bytes: int) -> bool:
    """Whether answers of this size arrive faster in turn. Those in shared memory do not travel."""
    return size_bytes >= MIN_BYTES and len(numbers) > 1 and all(link.carries_values for link, _ in numbers)


def receive_in_turn(
    numbers: Sequence[tuple[ServerLink, int]], wait: Wait, turn_to: Callable[[int], None]
) -> None:
    """Receive frames from several servers, one from each in turn, until only one still has to answer.

    This thread leads all their links meanwhile. If another thread leads one of them, this does nothing.

    Args:
        numbers: the exchanges to wait for, each with its link.
        wait: the deadline.
        turn_to: called with the index of the first exchange that has not ended.

    Raises:
        What `wait.tick` and `ServerLink.receive_one` raise.
    """
    links = list(dict.fromkeys(link for link, _ in numbers))
    led: list[ServerLink] = []
    try:
        for link in links:
            if not link.begin_to_lead(wait.tick):
                return
            led.append(link)
        _receive_leading(links, numbers, wait, turn_to)
    finally:
        for link in led:
            link.end_leading()


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
            ready = [link for link in links if link.readable()]  # also those that only others wait for
            if not ready:
                _sleep_until_readable(links)
            for link in ready:
                link.receive_one()
            wait.tick()


def _sleep_until_readable(links: Sequence[ServerLink]) -> None:
    poll = select.poll()
    for link in links:
        descriptor = link.fileno()
        if descriptor < 0:  # another thread has closed it; the next check shows that
            return
        poll.register(descriptor, select.POLLIN | select.POLLRDHUP)
    poll.poll(TICK_S * 1000)
