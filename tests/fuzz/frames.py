"""Recorded frames of real processes, and their mutations by a hostile peer.

A `Conversation` has all frames sent to one server or scheduler, with their senders, in the order of
arrival. A `Mutator` flips, cuts, splices, repeats and swaps its frames, and puts invalid numbers, texts
and lists into their messages. It is seeded: the same seed makes the same frames.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, final

import msgspec

from tensorkv.config import Role
from tensorkv.wire.codec import MAGIC, MAX_HANDSHAKE_BYTES, MAX_HEADER_BYTES, PREFIX, VERSION

SUFFIX = ".frames"
LENGTHS = (
    0, 1, 2, 15, 16, 17, 255, 256, MAX_HANDSHAKE_BYTES, MAX_HANDSHAKE_BYTES + 1, 65535, 1 << 20,
    MAX_HEADER_BYTES, MAX_HEADER_BYTES + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1,
)  # fmt: skip
PAYLOADS = (*LENGTHS, 1 << 40, 1 << 60, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
NUMBERS = (
    -1, 0, 1, 2, 3, 7, 63, 64, 255, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 50, 1 << 60, (1 << 63) - 1,
    1 << 63, (1 << 64) - 1, -(1 << 31), -(1 << 63),
)  # fmt: skip
FLOATS = (0.0, -1.0, 1e308, -1e308, 5e-324, float("nan"), float("inf"), float("-inf"))
TEXTS = (
    "", "w", "a" * 5000, "\n", "\x00", "\x1b[2J", "../x", "os:system", "subprocess:Popen", "builtins:eval",
    "torch.optim:../x", "torch.optim.sgd:os.system", "__main__", "_dynamo", "float32", "float64", "int64",
    "bool", "bfloat16", "float8_e4m3fn", "complex64", "quint8", "bits8", "uint16", "dense", "absent", "plain",
    "named", "function", "optimizer", "add", "assign", "sgd", "sync", "async", "mean", "sum",
)  # fmt: skip


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One whole frame, payload included, and the process that sent it."""

    role: Role
    rank: int
    frame: bytes


Conversation = list[Entry]
_decoder = msgspec.msgpack.Decoder(Conversation)


def save(path: Path, conversation: Conversation) -> None:
    """Write a conversation to a file."""
    path.write_bytes(msgspec.msgpack.encode(conversation))


def load(folder: Path, target: str) -> dict[str, Conversation]:
    """Return the recorded conversations with a target, "server" say, by file name."""
    return {
        path.stem: _decoder.decode(path.read_bytes()) for path in sorted(folder.glob(f"{target}-*{SUFFIX}"))
    }


def message_of(frame: bytes) -> bytes:
    """Return the encoded message of a whole frame."""
    return frame[PREFIX.size : PREFIX.size + PREFIX.unpack_from(frame)[2]]


def payload_of(frame: bytes) -> bytes:
    """Return the payload of a whole frame."""
    return frame[PREFIX.size + PREFIX.unpack_from(frame)[2] :]


def framed(message: bytes, payload: bytes = b"") -> bytes:
    """Return the frame of an encoded message."""
    return PREFIX.pack(MAGIC, VERSION, len(message), len(payload)) + message + payload


@final
class Mutator:
    """Mutates valid frames into hostile ones.

    Args:
        seed: the same seed makes the same frames.
        pool: frames to take parts from.
    """

    def __init__(self, seed: int, pool: Sequence[bytes]) -> None:
        self.random = random.Random(seed)
        self._pool = pool
        self._of_frames: list[Callable[[bytes], bytes]] = [
            self._flip, self._truncate, self._splice, self._lengths, self._version, self._noise,
            self._another,
        ]  # fmt: skip
        self._of_messages: list[Callable[[bytes], bytes]] = [
            self._leaf, self._leaf, self._leaf, self._leaf, self._count, self._nest, self._flip_message,
        ]  # fmt: skip

    def frame(self, good: bytes) -> bytes:
        """Return bytes that may no longer be a frame."""
        if self.random.random() < 0.5:
            return self.random.choice(self._of_frames)(good)
        return framed(self.message(message_of(good)), payload_of(good))

    def message(self, good: bytes) -> bytes:
        """Return bytes that may no longer be an encoded message."""
        return self.random.choice(self._of_messages)(good)

    def connection(self, good: Sequence[bytes]) -> Iterator[bytes]:
        """Yield the frames of a hostile peer on one connection, mutated from those of an honest one."""
        begin = self.random.randrange(len(good))
        frames = list(good[begin : begin + self.random.randint(1, 12)])
        if self.random.random() < 0.3:
            self.random.shuffle(frames)
        for frame in frames:
            what = self.random.random()
            if what < 0.5:
                yield self.frame(frame)
            elif what < 0.6:
                yield from [frame] * self.random.randint(2, 20)
            elif what < 0.9:
                yield frame

    # ---- of frames -------------------------------------------------------------------------------

    def _flip(self, frame: bytes) -> bytes:
        changed = bytearray(frame)
        for _ in range(self.random.choice((1, 1, 1, 2, 8))):
            near = min(len(changed), 64) if self.random.random() < 0.8 else len(changed)
            changed[self.random.randrange(near)] ^= 1 << self.random.randrange(8)
        return bytes(changed)

    def _truncate(self, frame: bytes) -> bytes:
        return frame[: self.random.randrange(len(frame))]

    def _splice(self, frame: bytes) -> bytes:
        other = self.random.choice(self._pool)
        return frame[: self.random.randrange(len(frame))] + other[self.random.randrange(len(other)) :]

    def _lengths(self, frame: bytes) -> bytes:
        magic, version, message_bytes, payload_bytes = PREFIX.unpack_from(frame)
        if self.random.random() < 0.5:
            message_bytes = self.random.choice((*LENGTHS, message_bytes - 1, message_bytes + 1))
        else:
            payload_bytes = self.random.choice((*PAYLOADS, max(payload_bytes - 1, 0), payload_bytes + 1))
        return PREFIX.pack(magic, version, message_bytes, payload_bytes) + frame[PREFIX.size :]

    def _version(self, frame: bytes) -> bytes:
        magic = MAGIC if self.random.random() < 0.5 else self.random.randbytes(3)
        return magic + bytes([self.random.randrange(256)]) + frame[4:]

    def _noise(self, frame: bytes) -> bytes:
        return self.random.randbytes(self.random.choice((1, 15, 16, 17, 40, 300)))

    def _another(self, frame: bytes) -> bytes:
        return self.random.choice(self._pool)

    # ---- of messages -----------------------------------------------------------------------------

    def _leaf(self, message: bytes) -> bytes:
        """Change one field, at any depth."""
        try:
            tree = msgspec.msgpack.decode(message)
        except (
            msgspec.DecodeError,
            UnicodeDecodeError,
            RecursionError,
        ):  # the message is hostile already: it comes from a finding
            return self._flip(message)
        places: list[tuple[Any, Any]] = []
        _find_places(tree, places)
        if not places:
            return message
        for _ in range(self.random.choice((1, 1, 1, 2, 3))):
            where, name = self.random.choice(places)
            if isinstance(where, dict) or name < len(where):
                where[name] = self._value(where[name])
        return msgspec.msgpack.encode(tree)

    def _value(self, value: Any) -> Any:
        if self.random.random() < 0.1:
            return self.random.choice((None, True, b"", "", 0, 1.5, [], {}, [[]], {"a": 1}))
        match value:
            case bool():
                return not value
            case int():
                return self.random.choice((*NUMBERS, max(value - 1, 0), min(value + 1, (1 << 64) - 1)))
            case float():
                return self.random.choice(FLOATS)
            case str():
                return self.random.choice(TEXTS)
            case bytes():
                return self.random.randbytes(self.random.choice((0, 1, 32, 5000)))
            case list():
                return self._list(value)
            case _:
                return self.random.choice((None, 1, 0.5, "w", [1], {}))

    def _list(self, value: list[Any]) -> list[Any]:
        match self.random.randrange(5):
            case 0:
                return []
            case 1:
                return value * self.random.choice((2, 50))
            case 2:
                return value[:-1]
            case 3:
                return value[::-1]
            case _:
                return [*value, self.random.choice(NUMBERS)]

    def _count(self, message: bytes) -> bytes:
        """Claim far more elements for a list, map, text or bytes than it has."""
        heads = [at for at, byte in enumerate(message) if 0x80 <= byte <= 0xBF or byte in (0xC4, 0xD9, 0xDC)]
        if not heads:
            return message
        at = self.random.choice(heads)
        head = self.random.choice((b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9"))
        count = self.random.choice((1 << 16, 1 << 24, (1 << 31) - 1, (1 << 32) - 1))
        return message[:at] + head + count.to_bytes(4, "big") + message[at + 1 :]

    def _nest(self, message: bytes) -> bytes:
        at = self.random.randrange(len(message))
        return message[:at] + b"\x91" * self.random.choice((2, 100, 3000)) + message[at:]

    def _flip_message(self, message: bytes) -> bytes:
        return self._flip(message)


def _find_places(tree: Any, places: list[tuple[Any, Any]]) -> None:
    """Collect every container of a decoded message with each index or key in it."""
    items: Any = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in items:
        places.append((tree, name))
        _find_places(value, places)
