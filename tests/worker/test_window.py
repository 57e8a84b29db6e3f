"""The window towards several servers. What one server and one worker share is tried in test_sharing.py."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from tensorkv.transport import unix
from tensorkv.transport.unix import DescriptorHead, UnixConnection, UnixListener
from tensorkv.worker.window import Window


def _connections() -> list[UnixConnection]:
    listener = UnixListener()
    one = unix.connect(listener.address[0], 10.0)
    other = listener.accept()
    assert isinstance(other, UnixConnection)
    listener.close()
    return [one, other]


def test_every_server_is_handed_every_segment_and_the_last_frame_closes_it(
    count_descriptors: Callable[[], int],
) -> None:
    connections = _connections()
    before = count_descriptors()
    frames: list[tuple[int, bytes, Callable[[], None] | None]] = []

    def put(server: int) -> Any:
        return lambda frame, on_sent: frames.append((server, frame, on_sent))

    window = Window()
    ends = [window.open_to(connections[0], put(server)) for server in range(3)]
    assert [server for server, _, _ in frames] == [0, 1, 2]  # the control segment of each
    assert ends[1].lend(1 << 20) is not None
    assert [server for server, _, _ in frames[3:]] == [0, 1, 2]
    heads = [frame for _, frame, _ in frames]
    assert all(isinstance(head, DescriptorHead) for head in heads)
    assert len({head.descriptor for head in heads[3:] if isinstance(head, DescriptorHead)}) == 1
    for _, _, on_sent in frames:
        assert on_sent is not None
        on_sent()
    frames.clear()
    mapped = 4  # a mapping holds a descriptor of its own
    assert count_descriptors() == before + mapped
    ends.clear()
    del window
    gc.collect()
    assert count_descriptors() == before
    for connection in connections:
        connection.close()


def test_loans_of_one_server_do_not_hold_up_another() -> None:
    connections = _connections()
    window = Window()
    one, other = (window.open_to(connections[0], lambda frame, sent: sent and sent()) for _ in range(2))
    lent = [one.lend(1000), other.lend(1000), one.lend(1000)]
    assert [loan and loan.number for loan in lent] == [0, 0, 1]
    assert len({loan.placed.spans[0] for loan in lent if loan}) == 3
    assert (one.lent_bytes, other.lent_bytes) == (2000, 1000)
    for connection in connections:
        connection.close()
