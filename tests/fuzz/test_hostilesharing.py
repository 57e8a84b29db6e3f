"""A hostile worker's shared memory: its honest part works, so that the rest gets deep enough to do harm."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from frames import message_of
from hostilesharing import (
    NUM_ELEMS,
    SEGMENT_BYTES,
    Descriptors,
    is_shared,
    shared_conversations,
    with_descriptor,
)

from tensorkv.launch.cluster import LocalCluster
from tensorkv.peer.handshake import introduce
from tensorkv.transport import unix
from tensorkv.transport.unix import DescriptorHead
from tensorkv.wire import messages as m
from tensorkv.wire.codec import Decoder

DEADLINE_S = 20.0
_replies: Decoder[Any] = Decoder(m.FromServer)


def test_the_honest_conversations_reach_the_bottom() -> None:
    cluster = LocalCluster(2, 1, host="127.0.0.1", timeout_s=DEADLINE_S)
    server = cluster.servers[0]
    descriptors = Descriptors(random.Random(0))
    try:
        for rank, conversation in enumerate(shared_conversations("check")):
            connection = unix.connect(server.addresses[1][0], DEADLINE_S)
            config = cluster.config("worker", rank)
            introduce(connection, config.token, "worker", rank)
            for entry in conversation:
                message = Decoder(m.ToServer).decode(message_of(entry.frame))
                frame = entry.frame
                if isinstance(message, m.ShareSegment):
                    descriptor = descriptors.honest(message)
                    os.pwrite(descriptor, bytes(message.size_bytes), 0)
                    frame = DescriptorHead.of(frame, descriptor)
                    if message.segment == 1:
                        ones = torch.ones(SEGMENT_BYTES // 4).numpy().tobytes()
                        os.pwrite(descriptor, ones, 0)
                connection.send(frame)
            heard: list[Any] = []

            def sink(body: memoryview, payload_bytes: int, heard: list[Any] = heard) -> list[memoryview]:
                heard.append(_replies.decode(body))
                return [memoryview(bytearray(payload_bytes))] if payload_bytes else []

            while [type(each) for each in heard].count(m.Data) < 2:
                connection.receive(sink)
            assert all(each.placed is not None for each in heard if isinstance(each, m.Data))
            connection.shutdown()
            connection.close()
        (slot,) = {each.slot for each in server._state._stores[1].slices}
        assert slot.tensor[:NUM_ELEMS].unique().tolist() == [1.0]
    finally:
        descriptors.close()
        cluster.stop()


def test_descriptors_of_every_kind_are_made_and_closed(count_descriptors: Callable[[], int]) -> None:
    before = count_descriptors()
    descriptors = Descriptors(random.Random(1))
    made = [descriptors.any() for _ in range(200)]
    assert len(set(made)) == 200
    sizes = set()
    for descriptor in made:
        with contextlib.suppress(OSError):
            sizes.add(os.fstat(descriptor).st_size)
    assert {0, 1, SEGMENT_BYTES} <= sizes
    descriptors.close()
    assert count_descriptors() == before


def test_frames_are_sent_with_what_they_announce_with_another_or_none() -> None:
    chance = random.Random(2)
    descriptors = Descriptors(chance)
    share, push = (shared_conversations("check")[0][place].frame for place in (1, 5))
    counts: dict[bytes, int] = {}
    for frame in (share, push, b"short"):
        sent = [with_descriptor(frame, descriptors, chance) for _ in range(200)]
        counts[frame] = sum(isinstance(each, DescriptorHead) for each in sent)
    descriptors.close()
    assert counts[share] > 120
    assert 10 < counts[push] < 80
    assert 10 < counts[b"short"] < 80


@pytest.mark.parametrize("thing", [None, b""])
def test_only_unix_sockets_hand_descriptors_over(thing: object) -> None:
    assert not is_shared(thing)
