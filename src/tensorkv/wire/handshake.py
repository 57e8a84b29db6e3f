"""Messages of the handshake that begins each connection, at most 4 KiB until the token is proved."""

from __future__ import annotations

from tensorkv.config import Role
from tensorkv.wire.common import Message


class Challenge(Message, tag=1):
    """The accepting side's first message."""

    nonce: bytes


class Hello(Message, tag=2):
    """The connecting side's identity, with an HMAC over both nonces and that identity."""

    nonce: bytes
    proof: bytes
    role: Role
    rank: int


class Accept(Message, tag=3):
    """The accepting side's own proof."""

    proof: bytes


class Reject(Message, tag=4):
    """The accepting side refuses the connection, with `name` (an error class) and `text`."""

    name: str
    text: str
