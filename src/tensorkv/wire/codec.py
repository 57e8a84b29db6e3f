"""Frames: a fixed prefix, a message, and the payload's bytes after it.

    offset  bytes
         0      3  b"TKV"
         3      1  version of the protocol
         4      4  length of the encoded message, little-endian
         8      8  length of the payload, little-endian
        16         the message (MessagePack), then the payload

Lengths are checked before memory is allocated: the message's against `MAX_HEADER_BYTES` (4 KiB until the peer
has proved that it knows the token), the payload's by the code that interprets the message.
"""

from __future__ import annotations

import struct
from typing import Any, Generic, TypeVar

import msgspec

from tensorkv.errors import ProtocolError, ProtocolVersionError

VERSION = 1
MAGIC = b"TKV"
PREFIX = struct.Struct("<3sBIQ")
PREFIX_BYTES = PREFIX.size
MAX_HEADER_BYTES = 64 << 20
MAX_HANDSHAKE_BYTES = 4096
MAX_TEXT_CHARS = 200
"""Maximum number of characters shown of a text that a peer may have influenced."""


T = TypeVar("T")
_encoder = msgspec.msgpack.Encoder()


def encode(message: Any, payload_bytes: int = 0) -> bytes:
    """Return prefix and message of a frame whose payload has `payload_bytes` bytes."""
    body = _encoder.encode(message)
    return PREFIX.pack(MAGIC, VERSION, len(body), payload_bytes) + body


def decode_prefix(
    data: bytes | bytearray | memoryview, max_header_bytes: int, start: int = 0
) -> tuple[int, int]:
    """Return the lengths of message and payload, in bytes, from the prefix that begins at `start`.

    Raises:
        ProtocolVersionError: it is a frame of another version.
        ProtocolError: it is not a frame, or its message is longer than `max_header_bytes`.
    """
    try:
        magic, version, header_bytes, payload_bytes = PREFIX.unpack_from(data, start)
    except struct.error as exc:
        raise ProtocolError(f"a prefix of {len(data) - start} bytes: {exc}") from exc
    if magic != MAGIC:
        raise ProtocolError(f"the peer does not speak TensorKV: its frame begins with {magic!r}")
    if version != VERSION:
        raise ProtocolVersionError(
            f"the peer speaks version {version} of the protocol, this process version {VERSION}; "
            "use one version of tensorkv in the whole job"
        )
    if header_bytes > max_header_bytes:
        raise ProtocolError(f"a message of {header_bytes} bytes is over the limit of {max_header_bytes}")
    return header_bytes, payload_bytes


class Decoder(Generic[T]):
    """Decodes the messages of one side of a conversation, and rejects all others."""

    def __init__(self, union: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(union)

    def decode(self, body: bytes | bytearray | memoryview) -> T:
        """Return the message.

        Raises:
            ProtocolError: the bytes are not a message that this peer may send.
        """
        try:
            return self._decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, MemoryError) as exc:
            raise ProtocolError(f"a malformed message: {one_line(str(exc))}") from exc


def one_line(text: str) -> str:
    """Return a text that a peer may have influenced as a short line without control characters, for logs."""
    line = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text[:MAX_TEXT_CHARS])
    return line if len(text) <= MAX_TEXT_CHARS else line + "..."
