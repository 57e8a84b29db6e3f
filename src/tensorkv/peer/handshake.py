"""The handshake: each side proves that it knows the job's token without sending it.

    accepting side                      connecting side
    Challenge(nonce)          ->
                              <-        Hello(nonce, HMAC(token, "hello" both nonces, role, rank), role, rank)
    Accept(HMAC(token, "accept" ...)) ->

Until then a peer may send 4 KiB. A replayed Hello fails: the accepting side's nonce is new each time.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import time
from collections.abc import Callable
from typing import Any, TypeVar

from tensorkv.addresses import join_address
from tensorkv.config import JobConfig, Role
from tensorkv.errors import (
    AuthenticationError,
    PeerLostError,
    ProtocolError,
    TensorKVError,
    TransportUnavailable,
    WaitTimeout,
    from_wire,
    to_wire,
)
from tensorkv.peer.deadlines import Wait
from tensorkv.transport import unix
from tensorkv.transport.base import Connection, Tick, no_tick
from tensorkv.transport.endpoint import connect
from tensorkv.wire import messages as m
from tensorkv.wire.codec import MAX_HEADER_BYTES, Decoder, encode

logger = logging.getLogger(__name__)
CONNECT_TIMEOUT_S = 10.0
HANDSHAKE_TIMEOUT_S = 120.0
"""Timeout of the accepting side; long enough not to lose a process of the job that is stopped meanwhile."""

_NONCE_BYTES = 32
_decoder: Decoder[m.HandshakeMessage] = Decoder(m.HandshakeMessage)
T = TypeVar("T")
Failure = Callable[[], TensorKVError | None]


def receive_message(connection: Connection, decoder: Decoder[T], tick: Tick = no_tick) -> T:
    """Receive one message that has no payload."""
    messages: list[T] = []

    def sink(body: memoryview, payload_bytes: int) -> list[memoryview]:
        if payload_bytes:
            raise ProtocolError(f"a payload of {payload_bytes} bytes where none belongs")
        messages.append(decoder.decode(body))
        return []

    connection.receive(sink, tick)
    return messages[0]


def accept(
    connection: Connection, token: str, check: Callable[[Role, int], TensorKVError | None]
) -> tuple[Role, int]:
    """Authenticate a peer and return its role and rank. `check` may refuse them.

    Raises:
        AuthenticationError, ProtocolError, ProtocolVersionError, EOFError, ConnectionError: the peer is
            refused; the caller closes the connection.
    """
    tick = deadline_tick(HANDSHAKE_TIMEOUT_S, f"the handshake with {connection.peer}")
    nonce = secrets.token_bytes(_NONCE_BYTES)
    connection.send(encode(m.Challenge(nonce)), (), tick)
    hello = receive_message(connection, _decoder, tick)
    if not isinstance(hello, m.Hello):
        raise ProtocolError(f"{connection.peer} began with {type(hello).__name__} instead of Hello")
    _check_nonce(connection, hello.nonce)
    expected = _proof(token, b"hello", nonce, hello)
    if not token or not hmac.compare_digest(expected, hello.proof):
        error: TensorKVError = AuthenticationError(
            f"{connection.peer} ({hello.role} {hello.rank}) does not hold the token of this job; "
            "TENSORKV_TOKEN must be the same in all its processes"
        )
        _reject(connection, error, tick)
        raise error
    refused = check(hello.role, hello.rank)
    if refused is not None:
        _reject(connection, refused, tick)
        raise refused
    connection.send(encode(m.Accept(_proof(token, b"accept", nonce, hello))), (), tick)
    connection.max_header_bytes = MAX_HEADER_BYTES
    return hello.role, hello.rank


def introduce(connection: Connection, token: str, role: Role, rank: int, tick: Tick = no_tick) -> None:
    """Prove to the accepting side that we know the token, and verify that it does.

    Raises:
        AuthenticationError: one of the two does not.
        ProtocolVersionError: it speaks another version.
        ProtocolError, EOFError, ConnectionError, and what `tick` raises.
    """
    if not token:
        raise AuthenticationError("this process has no token of a job: TENSORKV_TOKEN is not set or empty")
    challenge = receive_message(connection, _decoder, tick)
    if not isinstance(challenge, m.Challenge):
        raise ProtocolError(f"{connection.peer} began with {type(challenge).__name__} instead of Challenge")
    _check_nonce(connection, challenge.nonce)
    hello = m.Hello(secrets.token_bytes(_NONCE_BYTES), b"", role, rank)
    hello.proof = _proof(token, b"hello", challenge.nonce, hello)
    connection.send(encode(hello), (), tick)
    answer: Any = receive_message(connection, _decoder, tick)
    if isinstance(answer, m.Reject):
        raise from_wire(answer.name, answer.text)
    expected = _proof(token, b"accept", challenge.nonce, hello)
    if not isinstance(answer, m.Accept) or not hmac.compare_digest(expected, answer.proof):
        raise AuthenticationError(f"{connection.peer} does not hold the token of this job")
    connection.max_header_bytes = MAX_HEADER_BYTES


def connect_as(
    config: JobConfig,
    name: str,
    host: str,
    port: int,
    failure: Failure = lambda: None,
    silence_s: float | None = None,
) -> Connection:
    """Connect to a process of the job, as the process that `config` describes.

    If it is stopped or busy, wait for it up to the job's timeout, and log that every ten seconds.

    Args:
        name: the process, for texts, such as "server 1".
        failure: returns why the job is broken, None while it is not.
        silence_s: end the connection, from the handshake on, when its host has not answered for so long.

    Raises:
        PeerLostError: it cannot be reached, or has ended the connection.
        WaitTimeout: it does not answer in time.
        AuthenticationError, ProtocolVersionError, ProtocolError.
    """
    where = f"{name} at {join_address(host, port)}"
    try:
        connection = connect(host, port, CONNECT_TIMEOUT_S)
    except ConnectionError as exc:
        raise PeerLostError(f"{where} cannot be reached: {exc}") from None
    if silence_s is not None:
        connection.notice_silence(silence_s)
    return _introduced(connection, config, where, failure)


def _introduced(connection: Connection, config: JobConfig, where: str, failure: Failure) -> Connection:
    """Do the handshake and return the connection; close it if the handshake fails."""
    wait = Wait("joining the job", config.timeout_s, failure, whom=lambda: f"{where}, which does not answer")
    try:
        introduce(connection, config.token, config.role, config.rank, wait.tick)
    except BaseException as exc:
        connection.shutdown()
        connection.close()
        if isinstance(exc, (EOFError, ConnectionError)) and not isinstance(exc, TensorKVError):
            raise PeerLostError(f"{where} cannot be joined: {exc}") from None
        raise
    return connection


def connect_to_server(config: JobConfig, rank: int, address: m.ServerAddress, failure: Failure) -> Connection:
    """Connect a worker to a server of its job: by its Unix socket if it is reachable, else by TCP.

    `failure` returns why the job is broken, None while it is not.

    Raises:
        TransportUnavailable: `config.transport` asks for shared memory, and the two cannot share any.
        As `connect_as`.
    """
    name = f"server {rank}"
    if config.transport == "tcp" or address.host == "inproc":
        return connect_as(config, name, address.host, address.port, failure)
    try:
        if not address.socket_name:
            raise ConnectionError("it offers none (its own transport is 'tcp', or its system has none)")
        if why := unix.why_not():
            raise ConnectionError(why)
        connection = unix.connect(address.socket_name, CONNECT_TIMEOUT_S)
    except ConnectionError as exc:
        if config.transport == "shm":
            raise TransportUnavailable(
                f"transport='shm': {name} at {join_address(address.host, address.port)} shares no memory "
                f"with this process: {exc}; transport='auto' goes over TCP there"
            ) from None
        logger.debug("%s is reached by TCP: %s", name, exc)
        return connect_as(config, name, address.host, address.port, failure)
    return _introduced(connection, config, f"{name} at {address.socket_name}", failure)


def connect_to_scheduler(config: JobConfig, failure: Failure = lambda: None) -> Connection:
    """Connect to the job's scheduler; the connection ends if the scheduler's host falls silent.

    `failure` returns why not to wait any longer, None while there is no reason.

    Raises:
        As `connect_as`.
    """
    host, port = config.scheduler_host, config.scheduler_port
    return connect_as(config, "the scheduler", host, port, failure, config.peer_timeout_s)


def deadline_tick(timeout_s: float, what: str) -> Tick:
    """Return a tick that raises WaitTimeout once `timeout_s` seconds have passed."""
    end = time.monotonic() + timeout_s

    def tick() -> None:
        if time.monotonic() > end:
            raise WaitTimeout(f"{what} did not finish within {timeout_s} s")

    return tick


def _check_nonce(connection: Connection, nonce: bytes) -> None:
    if len(nonce) != _NONCE_BYTES:
        raise ProtocolError(f"{connection.peer} sent a nonce of {len(nonce)} bytes, not {_NONCE_BYTES}")


def _proof(token: str, purpose: bytes, nonce: bytes, hello: m.Hello) -> bytes:
    text = b"|".join((purpose, nonce, hello.nonce, hello.role.encode(), str(hello.rank).encode()))
    return hmac.digest(token.encode(), text, "sha256")


def _reject(connection: Connection, error: TensorKVError, tick: Tick) -> None:
    connection.send(encode(m.Reject(*to_wire(error))), (), tick)
