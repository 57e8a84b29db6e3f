"""Both ends of shared memory, over a real connection: what is lent, returned, copied and refused."""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tensorkv.errors import ProtocolError
from tensorkv.peer.shm import CONTROL_BYTES, MAX_LOANS
from tensorkv.server import shm
from tensorkv.server.memory import BufferPool, Memory
from tensorkv.server.shm import SharedValues, Sharing
from tensorkv.server.slots import Lease, Slot
from tensorkv.transport import segments, unix
from tensorkv.transport.segments import SEGMENT_BYTES, Segment
from tensorkv.transport.unix import DescriptorHead, UnixConnection, UnixListener
from tensorkv.wire import messages as m
from tensorkv.wire.codec import Decoder, encode
from tensorkv.worker.window import Loan, Window, WindowEnd

DEADLINE_S = 20.0
LARGE_BYTES = 1 << 20


@dataclass
class Pair:
    """A worker and a server that share memory. What one has queued the other takes in by `exchange`."""

    worker_side: UnixConnection
    server_side: UnixConnection

    def __post_init__(self) -> None:
        self.values = SharedValues()
        self.server: Sharing = self.values.share_with(self.server_side, self.server_side.send)
        self.window = Window()
        self.worker: WindowEnd = self.window.open_to(self.worker_side, self._send)
        self.data: list[m.Data] = []

    def _send(self, frame: bytes, on_sent: Any) -> None:
        self.worker_side.send(frame)
        if on_sent is not None:
            on_sent()

    def exchange(self) -> None:
        """Let both take in what has come."""
        while self.server_side.readable():
            message = _receive(self.server_side, m.ToServer)
            self.server.attach(message) if isinstance(message, m.ShareSegment) else self.server.drop(message)
        while self.worker_side.readable():
            message = _receive(self.worker_side, m.FromServer)
            if isinstance(message, m.Data):
                self.data.append(message)
            elif isinstance(message, m.ShareSegment):
                self.worker.attach(message)
            else:
                self.worker.detach(message)

    def lend(self, size_bytes: int = LARGE_BYTES) -> Loan:
        loan = self.worker.lend(size_bytes)
        assert loan is not None
        self.exchange()
        return loan

    def reply(self, payload: list[Memory], leases: list[Lease]) -> m.Placed:
        for lease in leases:
            lease.readers += 1
        assert self.server.reply(m.Data(5, 6), payload, leases)
        self.exchange()
        data = self.data.pop()
        assert (data.request, data.chunk) == (5, 6)
        assert data.placed is not None
        return data.placed


def _receive(connection: UnixConnection, union: Any) -> Any:
    found: list[Any] = []

    def sink(body: memoryview, payload_bytes: int) -> list[memoryview]:
        found.append(Decoder(union).decode(body))
        return []

    connection.receive(sink)
    return found[0]


@pytest.fixture
def pair() -> Iterator[Pair]:
    before = len(os.listdir("/proc/self/fd"))
    listener = UnixListener()
    one = unix.connect(listener.address[0], DEADLINE_S)
    other = listener.accept()
    assert isinstance(other, UnixConnection)
    made = Pair(one, other)
    made.exchange()
    yield made
    listener.close()
    for end in (one, other):
        end.shutdown()
        end.close()
    made.server.end()
    made.values.close()
    made.__dict__.clear()
    if len(os.listdir("/proc/self/fd")) > before:  # mostly all is gone by itself; collecting takes long
        gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


# ---- pushes ----------------------------------------------------------------------------------------


def test_a_push_is_read_where_the_worker_wrote_it(pair: Pair) -> None:
    loan = pair.lend()
    loan.tensors[0].fill_(7)
    memory = pair.server.borrow(loan.placed, LARGE_BYTES)
    assert memory.borrowed
    assert bool((memory.tensor == 7).all())
    assert memory.elements(torch.int16, 0, 2).tolist() == [0x0707, 0x0707]
    loan.tensors[0][0] = 8
    assert memory.tensor[0] == 8  # the very same memory


def test_memory_is_lent_again_only_when_it_was_returned(pair: Pair) -> None:
    first = pair.lend()
    memory = pair.server.borrow(first.placed, LARGE_BYTES)
    second = pair.lend()
    assert second.placed != first.placed
    assert pair.worker.lent_bytes == 2 * LARGE_BYTES
    BufferPool().give(memory)
    placed, address = first.placed, first.tensors[0].data_ptr()
    del first
    third = pair.lend()
    assert (third.placed, third.tensors[0].data_ptr()) == (placed, address)
    assert pair.server.borrow(third.placed, LARGE_BYTES) is memory  # what was looked up is kept
    assert pair.worker.lent_bytes == 2 * LARGE_BYTES


def test_what_is_not_pushed_after_all_comes_back(pair: Pair) -> None:
    for _ in range(3):
        pair.worker.give_back(pair.lend())
    pair.worker.collect()
    assert pair.worker.lent_bytes == 0


def test_no_more_is_lent_than_there_are_flags(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensorkv.worker.window.MAX_LOANS", 2)
    loans = [pair.lend(10), pair.lend(10)]
    assert pair.worker.lend(10) is None
    pair.worker.give_back(loans[0])
    assert pair.worker.lend(10) is not None


def test_no_more_is_lent_than_was_allowed(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits as long as now and then something is returned; nothing is, so that it gives up."""
    loan = pair.worker.lend(100, 150)
    assert loan is not None
    looks: list[float] = []
    monkeypatch.setattr("tensorkv.worker.window.time.sleep", looks.append)
    assert pair.worker.lend(51, 150) is None
    assert looks
    assert pair.worker.lend(50, 150) is not None
    monkeypatch.setattr("tensorkv.worker.window.time.sleep", lambda _: pair.worker.give_back(loan))
    assert pair.worker.lend(100, 150) is not None


def test_without_memory_nothing_is_lent_and_one_line_says_so(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(name: str, flags: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(segments.os, "memfd_create", refuse)
        assert pair.worker.lend(1000) is None
        assert pair.worker.lend(1000) is None
    (line,) = caplog.messages
    assert line == "no shared memory for a push of 1000 bytes: [Errno 24] Too many open files"
    assert pair.lend(1000).number == 0


def test_places_that_every_step_pushes_from_stay_known_and_others_do_not(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shm, "MAX_KNOWN_PLACES", 4)
    loan = pair.lend()

    def borrow(offset: int) -> Memory:
        return pair.server.borrow(m.Placed(loan.number, [(1, offset, 64)]), 64)

    first = borrow(0)
    gone = borrow(64)
    for step in range(2, 20):
        borrow(64 * step)
        assert borrow(0) is first
        assert len(pair.server._known) + len(pair.server._known_before) <= 8
    assert borrow(64) is not gone


def test_a_large_window_that_is_not_in_use_any_more_is_dropped(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    loans = [pair.lend(SEGMENT_BYTES + 1) for _ in range(3)]
    assert set(pair.server._segments) == {0, 1, 2, 3}
    while loans:
        pair.worker.give_back(loans.pop())
    pair.worker.collect()
    gc.collect()
    pair.lend(10)
    assert set(pair.server._segments) == {0, 1, 2, 3}  # the next step may need it again
    monkeypatch.setattr(segments, "SWEEP_S", 0.0)
    for _ in range(2):
        pair.lend(10)
    assert set(pair.server._segments) == {0, 1, 2}


def test_places_of_a_segment_go_with_it(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm, "MAX_KNOWN_PLACES", 1)
    loan = pair.lend()
    for offset in (0, 64):
        pair.server.borrow(m.Placed(loan.number, [(1, offset, 64)]), 64)
    pair.server.drop(m.DropSegment(1))
    for offset in (0, 64):
        with pytest.raises(ProtocolError, match="segment 1"):
            pair.server.borrow(m.Placed(loan.number, [(1, offset, 64)]), 64)


@pytest.mark.parametrize(
    ("number", "spans", "size_bytes", "text"),
    [
        (0, [], 64, "in 0 places"),
        (0, [(1, 0, 64), (1, 64, 64)], 128, "in 2 places"),
        (0, [(1, 0, 64)], 65, "a push of 64 bytes, not of 65"),
        (0, [(1, -64, 64)], 64, "of segment 1"),
        (0, [(1, SEGMENT_BYTES, 64)], 64, "of segment 1"),
        (0, [(2, 0, 64)], 64, "no place at byte 0 of segment 2"),
        (0, [(0, 0, 64)], 64, "no place at byte 0 of segment 0"),
        (-1, [(1, 0, 64)], 64, "loan -1"),
        (MAX_LOANS, [(1, 0, 64)], 64, f"loan {MAX_LOANS}"),
    ],
)
def test_a_push_from_a_place_that_is_none_is_refused(
    pair: Pair, number: int, spans: list[tuple[int, int, int]], size_bytes: int, text: str
) -> None:
    pair.lend()
    with pytest.raises(ProtocolError, match=text):
        pair.server.borrow(m.Placed(number, spans), size_bytes)


# ---- replies ---------------------------------------------------------------------------------------


def _slot(pair: Pair, value: int, size_bytes: int = LARGE_BYTES) -> Slot:
    slot = Slot(pair.values.allocate(size_bytes), pair.values.allocate)
    slot.tensor.fill_(value)
    return slot


def test_a_reply_is_copied_from_where_the_value_is_stored(pair: Pair) -> None:
    slots = [_slot(pair, 3), _slot(pair, 4, 100)]
    payload = [Memory(slot.tensor) for slot in slots]
    placed = pair.reply(payload, [slot.lease for slot in slots])
    parts = pair.worker.view(placed)
    assert [part.unique().tolist() for part in parts] == [[3], [4]]
    assert [part.numel() for part in parts] == [LARGE_BYTES, 100]


def test_a_slow_reader_sees_a_whole_value_and_stops_no_writer(pair: Pair) -> None:
    """Of ten updates while it reads the first goes to fresh memory; the others find that free."""
    slot = _slot(pair, 1)
    old = slot.tensor.data_ptr()
    parts = pair.worker.view(pair.reply([Memory(slot.tensor)], [slot.lease]))
    places = set()
    for number in range(2, 12):
        pair.values.settle()
        slot.make_writable()
        slot.tensor.fill_(number)
        places.add(slot.tensor.data_ptr())
        assert parts[0].unique().tolist() == [1]
    assert len(places) == 1
    assert old not in places
    pair.worker.copied()
    pair.values.settle()
    parts.clear()
    gc.collect()
    assert pair.values.allocate(LARGE_BYTES).data_ptr() == old  # it is free again


def test_leases_end_in_the_order_of_the_replies(pair: Pair) -> None:
    slots = [_slot(pair, 1), _slot(pair, 2)]
    leases = [slot.lease for slot in slots]
    for slot in slots:
        pair.worker.view(pair.reply([Memory(slot.tensor)], [slot.lease]))
    pair.values.settle()
    assert [lease.readers for lease in leases] == [1, 1]
    pair.worker._copied[0] = 1
    pair.values.settle()
    assert [lease.readers for lease in leases] == [0, 1]
    pair.worker.copied()
    pair.values.settle()
    assert [lease.readers for lease in leases] == [0, 0]


def test_the_leases_of_a_worker_that_is_gone_end(pair: Pair) -> None:
    slot = _slot(pair, 1)
    pair.reply([Memory(slot.tensor)], [slot.lease])
    pair.server.end()
    assert slot.lease.readers == 0


def test_what_is_small_or_elsewhere_travels_in_the_frame(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    small, private = _slot(pair, 1, 100), Memory(torch.zeros(LARGE_BYTES, dtype=torch.uint8))
    assert not pair.server.reply(m.Data(1, 1), [Memory(small.tensor)], [small.lease])
    assert not pair.server.reply(m.Data(1, 1), [private], [])
    monkeypatch.setattr("tensorkv.wire.messages.PLACED_BYTES", 100)
    assert pair.server.reply(m.Data(1, 1), [Memory(small.tensor)], [small.lease])


def test_a_worker_that_shares_nothing_gets_its_replies_in_frames(pair: Pair) -> None:
    other = pair.values.share_with(pair.server_side, pair.server_side.send)
    slot = _slot(pair, 1)
    assert not other.reply(m.Data(1, 1), [Memory(slot.tensor)], [slot.lease])
    other.end()


def test_segments_that_values_have_left_are_dropped(pair: Pair) -> None:
    slots = [_slot(pair, number, SEGMENT_BYTES + 1) for number in range(3)]
    for slot in slots:
        pair.worker.view(pair.reply([Memory(slot.tensor)], [slot.lease]))
        pair.worker.copied()
    pair.values.settle()
    assert len(pair.worker._segments) == 3
    del slots, slot
    gc.collect()
    _slot(pair, 1)
    pair.exchange()
    assert len(pair.worker._segments) == 1


@pytest.mark.parametrize("number", [0, 2, -1, 1 << 62])
def test_replies_come_in_order(pair: Pair, number: int) -> None:
    placed = pair.reply([Memory(_slot(pair, 1).tensor)], [])
    with pytest.raises(ProtocolError, match=f"reply {number} in shared memory, after 0"):
        pair.worker.view(m.Placed(number, placed.spans))


def test_a_reply_that_lies_nowhere_is_refused(pair: Pair) -> None:
    pair.reply([Memory(_slot(pair, 1).tensor)], [])
    for number, span in enumerate([(9, 0, 1), (1, -1, 1), (1, SEGMENT_BYTES, 1)], 1):
        with pytest.raises(ProtocolError, match="segment"):
            pair.worker.view(m.Placed(number, [span]))


# ---- segments --------------------------------------------------------------------------------------


def _hand_over(
    sender: UnixConnection, number: int, size_bytes: int, *, others_may_write: bool = True
) -> None:
    segment, descriptor = Segment.create(number, size_bytes, others_may_write=others_may_write)
    sender.send(DescriptorHead.of(encode(m.ShareSegment(number, segment.size_bytes)), descriptor))
    os.close(descriptor)


def test_segments_that_make_no_sense_are_refused(pair: Pair) -> None:
    _hand_over(pair.worker_side, 0, CONTROL_BYTES)
    with pytest.raises(ProtocolError, match="segment 0 is there already"):
        pair.exchange()
    pair.worker_side.send(encode(m.ShareSegment(1, 4096)))
    with pytest.raises(ProtocolError, match="announced a descriptor, and none came"):
        pair.exchange()
    _hand_over(pair.server_side, 0, CONTROL_BYTES)
    with pytest.raises(ProtocolError, match="no control segment"):
        pair.exchange()
    for message in (m.DropSegment(0), m.DropSegment(7)):
        with pytest.raises(ProtocolError, match="was dropped, which there is not"):
            pair.server.drop(message)
        with pytest.raises(ProtocolError, match="was dropped, which there is not"):
            pair.worker.detach(message)
    os.close(pair.worker_side.claim_descriptor())


def test_a_control_segment_of_another_size_is_refused(pair: Pair) -> None:
    other = pair.values.share_with(pair.server_side, pair.server_side.send)
    _hand_over(pair.worker_side, 0, 2 * CONTROL_BYTES)
    with pytest.raises(ProtocolError, match=f"a control segment of {2 * CONTROL_BYTES} bytes"):
        other.attach(_receive(pair.server_side, m.ToServer))
    other.end()
