"""Workers withstand hostile peers, and the fuzzer detects those that do not."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import hostile
import pytest
import torch
from frames import Mutator, load
from hostile import WorkerFault, fuzz_worker, meet

from tensorkv.errors import KeyNotInitialized, to_wire
from tensorkv.server.shm import Sharing
from tensorkv.transport import unix
from tensorkv.wire import messages as m
from tensorkv.wire.codec import PREFIX, encode
from tensorkv.worker import window
from tensorkv.worker.control import ControlClient
from tensorkv.worker.requests import RequestTable
from tensorkv.worker.transfers import Destinations

CORPUS = Path(__file__).parents[1] / "corpus"
POOL = [entry.frame for conversation in load(CORPUS, "worker").values() for entry in conversation]


def test_a_hundred_hostile_frames() -> None:
    """Every run has new ones. A failure prints the seed of the job; `meet` reruns it."""
    assert fuzz_worker(random.Random(random.SystemRandom().randrange(1 << 32)), POOL, 100) >= 100


def test_a_frame_may_be_cut_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mutator, "frame", lambda self, frame: b"")
    assert fuzz_worker(random.Random(1), POOL, 100) >= 100


def test_a_frame_may_claim_more_than_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker cannot tell it from a slow frame, so the connection ends; otherwise a call would wait."""

    def longer(self: Mutator, frame: bytes) -> bytes:
        magic, version, message_bytes, payload_bytes = PREFIX.unpack_from(frame)
        return PREFIX.pack(magic, version, message_bytes + (1 << 15), payload_bytes) + frame[PREFIX.size :]

    monkeypatch.setattr(Mutator, "frame", longer)
    assert fuzz_worker(random.Random(1), POOL, 100) >= 100


def test_a_write_outside_of_what_was_asked_for_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def finish(self: Destinations) -> None:
        first = self._firsts[0]
        if first.storage_offset():
            torch.as_strided(first, (1,), (1,), first.storage_offset() - 1).fill_(0)

    monkeypatch.setattr(Destinations, "finish", finish)
    with pytest.raises(WorkerFault, match="has written outside of the tensors asked for"):
        fuzz_worker(random.Random(1), POOL, 100)


def test_an_error_of_another_class_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RequestTable, "find", lambda self, number: self.exchanges[number])
    with pytest.raises(WorkerFault, match="raised KeyError"):
        fuzz_worker(random.Random(1), POOL, 1000)


def test_a_thread_that_dies_and_a_call_that_hangs_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: ControlClient) -> Any:
        raise IndexError("list index out of range")

    monkeypatch.setattr(ControlClient, "_read", read)
    monkeypatch.setattr(hostile, "DEADLINE_S", 0.1)
    with pytest.raises(WorkerFault, match="joining waited to its deadline") as caught:
        meet(1, POOL)
    assert "thread tensorkv-control ended with IndexError: list index out of range" in str(caught.value)


@pytest.mark.skipif(bool(unix.why_not()), reason=unix.why_not())
def test_servers_share_memory_and_tell_places_that_there_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Honest values arrive through shared memory; the fuzzer detects a worker that trusts every place."""
    placed: list[bool] = []
    real = Sharing.reply

    def reply(self: Sharing, *arguments: Any) -> bool:
        placed.append(real(self, *arguments))
        return placed[-1]

    monkeypatch.setattr(Sharing, "reply", reply)
    assert sum(meet(seed, POOL) for seed in range(1, 41, 2)) > 0
    assert any(placed)

    def believe(segments: Any, segment: int, offset: int, size_bytes: int) -> torch.Tensor:
        return torch.from_numpy(segments[segment].bytes[offset : offset + size_bytes])

    monkeypatch.setattr(window, "tensor_at", believe)

    def meet_many() -> None:
        for seed in range(1, 401, 2):
            meet(seed, POOL)

    with pytest.raises(WorkerFault, match="KeyError"):
        meet_many()


def test_a_false_leader_is_noticed() -> None:
    """A worker waits for the leader it is told of, until its deadline: so the connection must end."""
    lead, follow = encode(m.TogetherReply(3, True, None)), encode(m.TogetherReply(3, False, None))
    assert hostile._tells_false_lead(lead, follow)
    assert hostile._tells_false_lead(follow, lead)
    failed = encode(m.Failed(3, *to_wire(KeyNotInitialized("key 'w'"))))
    assert hostile._tells_false_lead(lead, failed)
    assert not hostile._tells_false_lead(encode(m.Done(3)), failed)
    assert not hostile._tells_false_lead(lead, lead)
    assert not hostile._tells_false_lead(lead, encode(m.Done(3)))
    assert not hostile._tells_false_lead(encode(m.Done(3)), encode(m.Done(4)))
    assert not hostile._tells_false_lead(lead, lead[:-1])


def test_memory_that_grows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostile, "MAX_GROWTH_MB", -1e6)
    monkeypatch.setattr(hostile, "WARM_JOBS", 1)
    with pytest.raises(WorkerFault, match="memory has grown"):
        fuzz_worker(random.Random(1), POOL, 6)
