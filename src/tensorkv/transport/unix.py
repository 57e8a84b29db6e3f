"""Unix sockets: connections within a host, which can pass descriptors, such as those of shared memory.

Names are abstract: they leave nothing in the file system, and a peer that can reach one shares the network
namespace, so it is on this host. They have no permissions, so each side asks the kernel for the other's user.
"""

from __future__ import annotations

import array
import os
import secrets
import socket
import struct
import sys
from collections import deque
from collections.abc import Sequence
from typing import Any, final

from tensorkv.errors import ProtocolError
from tensorkv.transport.base import Buffer, Connection
from tensorkv.transport.memorylimits import with_the_way_out
from tensorkv.transport.stream import StreamConnection, StreamListener

NAME_PREFIX = "@tensorkv-"
"""Prefix of our abstract names. The "@" stands for their leading zero byte, as in the system's tools."""

MAX_UNCLAIMED = 64
"""Maximum number of received descriptors that no frame has claimed."""

_ONE_DESCRIPTOR = socket.CMSG_SPACE(array.array("i").itemsize)
_CMSG_CLOEXEC = int(socket.MSG_CMSG_CLOEXEC)
_CREDENTIALS = struct.Struct("3i")  # process, user, group


@final
class DescriptorHead(bytes):
    """The head of a frame that passes `descriptor`; the receiver gets a copy of it."""

    descriptor: int

    @classmethod
    def of(cls, head: bytes, descriptor: int) -> DescriptorHead:
        """Attach a descriptor to `head`. It must stay open until the frame is sent."""
        made = cls(head)
        made.descriptor = descriptor
        return made


@final
class UnixConnection(StreamConnection):
    """A connected Unix socket. Owns the received descriptors, too, until they are claimed."""

    def __init__(self, sock: socket.socket) -> None:
        process, self.user, _ = _peer_of(sock)
        super().__init__(sock, f"process {process} of this host")
        self._unclaimed: deque[int] = deque()

    def claim_descriptor(self) -> int:
        """Return the descriptor that came with the frame just received; the caller owns it.

        Raises:
            ProtocolError: the frame came without one.
        """
        if not self._unclaimed:
            raise ProtocolError(
                f"{self.peer} announced a descriptor, and none came: it sent none, or this process may not "
                "have one more (ulimit -n)"
            )
        return self._unclaimed.popleft()

    def _sendmsg(
        self, buffers: Sequence[Buffer], flags: int, ancillary: Sequence[tuple[int, int, Any]] = ()
    ) -> int:
        head = buffers[0]
        if isinstance(head, DescriptorHead):
            rights = array.array("i", [head.descriptor])
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
        return super()._sendmsg(buffers, flags, ancillary)

    def _receive_ahead(self, buffer: memoryview, flags: int) -> int:
        got, ancillary = self._receive_with(buffer, _ONE_DESCRIPTOR, flags | _CMSG_CLOEXEC)
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                found = array.array("i")
                found.frombytes(data[: len(data) - len(data) % found.itemsize])
                self._unclaimed.extend(found)
        if len(self._unclaimed) > MAX_UNCLAIMED:
            self._broken = True
            raise ProtocolError(f"{self.peer} sent more than {MAX_UNCLAIMED} descriptors that belong nowhere")
        return got

    def notice_silence(self, timeout_s: float) -> None:
        """Do nothing: both ends are on one host."""

    def close(self) -> None:
        while self._unclaimed:
            os.close(self._unclaimed.popleft())
        super().close()


@final
class UnixListener(StreamListener):
    """Listens at a new abstract name, for processes of the same user."""

    def __init__(self) -> None:
        self._name = NAME_PREFIX + secrets.token_hex(16)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(_abstract(self._name))
            sock.listen(1024)
        except BaseException:
            sock.close()
            raise
        super().__init__(sock)

    @property
    def address(self) -> tuple[str, int]:
        return (self._name, 0)

    def _connection(self, sock: socket.socket, name: Any) -> Connection:
        return _of_same_user(sock)


def why_not() -> str:
    """Return why this system lacks abstract names or anonymous shared memory; "" if it has both."""
    if not sys.platform.startswith("linux"):
        return f"{sys.platform} has no abstract Unix sockets"
    try:
        os.close(os.memfd_create("tensorkv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    except (AttributeError, OSError) as exc:
        return f"this system makes no anonymous shared memory (memfd_create): {exc}"
    return ""


def connect(name: str, timeout_s: float) -> UnixConnection:
    """Connect to a listener of this host.

    Raises:
        ConnectionError: no listener on this host has this name (or this network namespace cannot reach
            it), it does not answer within `timeout_s` seconds, or it belongs to another user.
    """
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError as exc:
        raise ConnectionError(f"cannot connect to {name}: {with_the_way_out(exc)}") from exc
    try:
        sock.settimeout(timeout_s)
        sock.connect(_abstract(name))
    except OSError as exc:
        sock.close()
        raise ConnectionError(f"cannot connect to {name}: {with_the_way_out(exc)}") from exc
    try:
        return _of_same_user(sock)
    except OSError as exc:
        raise ConnectionError(f"cannot connect to {name}: {exc}") from exc


def _of_same_user(sock: socket.socket) -> UnixConnection:
    """Return the connection of a socket. Closes it and raises PermissionError if the peer is another user."""
    try:
        process, user, _ = _peer_of(sock)
        if user != os.geteuid():
            raise PermissionError(
                f"process {process} at the other end belongs to user {user}, this one to user {os.geteuid()}"
            )
        return UnixConnection(sock)
    except BaseException:
        sock.close()
        raise


def _peer_of(sock: socket.socket) -> tuple[int, int, int]:
    """Return process, user and group of the other end, as they were when it connected or listened."""
    found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process, user, group = _CREDENTIALS.unpack(found)
    return process, user, group


def _abstract(name: str) -> str:
    return "\0" + name[1:]
