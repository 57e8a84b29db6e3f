"""The corpus, and that the same seed makes the same hostile frames from it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from frames import Entry, Mutator, framed, load, message_of, payload_of, save

from tensorkv.errors import ProtocolError, ProtocolVersionError
from tensorkv.wire import messages as m
from tensorkv.wire.codec import MAX_HEADER_BYTES, Decoder, decode_prefix, encode

CORPUS = Path(__file__).parents[1] / "corpus"
GOOD = [encode(m.Push(1, 0, True, 3), 8) + bytes(8), encode(m.Info(1, [1, 2], [3, 4], [0, 1], [0, 8], "sgd"))]


def test_a_conversation_survives_its_file(tmp_path: Path) -> None:
    conversation = [Entry("worker", 1, GOOD[0]), Entry("server", 0, GOOD[1])]
    save(tmp_path / "server-x.frames", conversation)
    save(tmp_path / "scheduler-x.frames", conversation[:1])
    assert load(tmp_path, "server") == {"server-x": conversation}
    assert load(tmp_path, "worker") == {}


def test_parts_of_a_frame() -> None:
    frame = GOOD[0]
    assert Decoder(m.ToServer).decode(message_of(frame)) == m.Push(1, 0, True, 3)
    assert payload_of(frame) == bytes(8)
    assert framed(message_of(frame), payload_of(frame)) == frame


def test_the_same_seed_makes_the_same_frames() -> None:
    def made(seed: int) -> list[bytes]:
        mutator = Mutator(seed, GOOD)
        return [mutator.frame(GOOD[0]) for _ in range(200)] + list(mutator.connection(GOOD))

    assert made(7) == made(7)
    assert made(7) != made(8)


def test_what_is_made_is_refused_in_many_ways_and_taken_in_many() -> None:
    """A mutator that makes only noise, or nothing new, finds nothing."""
    mutator, decoder = Mutator(1, GOOD), Decoder(m.ToServer | m.FromServer)
    refusals: set[str] = set()
    taken: set[bytes] = set()
    for number in range(3000):
        data = mutator.frame(GOOD[number % 2])
        try:
            decode_prefix(data, MAX_HEADER_BYTES)
            taken.add(msgspec.msgpack.encode(decoder.decode(message_of(data))))
        except (ProtocolError, ProtocolVersionError) as exc:
            refusals.add(str(exc)[:40])
    assert len(refusals) > 20
    assert len(taken) > 50


@pytest.mark.parametrize("target", ["server", "scheduler", "worker"])
def test_the_corpus_is_of_this_version(target: str) -> None:
    """It also has most messages; mutation makes the rare ones, a refusal say."""
    union = {"server": m.ToServer, "scheduler": m.ToScheduler, "worker": m.FromServer}[target]
    decoder = Decoder(union)
    seen: set[str] = set()
    for name, conversation in load(CORPUS, target).items():
        if "-found-" not in name:
            for entry in conversation:
                try:
                    seen.add(type(decoder.decode(message_of(entry.frame))).__name__)
                except ProtocolError as exc:
                    pytest.fail(f"{name}: {exc}; after a change of messages run tests/fuzz/record.py")
    assert len(seen) >= {"server": 13, "scheduler": 9, "worker": 5}[target], seen
