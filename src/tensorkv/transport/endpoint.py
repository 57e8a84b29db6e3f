"""Chooses the transport of an address: host "inproc" is this process, every other host is reached by TCP."""

from __future__ import annotations

from tensorkv.transport import inproc, tcp
from tensorkv.transport.base import Connection, Listener


def listen(host: str, port: int = 0) -> Listener:
    """Listen at an address of this host."""
    return inproc.InprocListener() if host == "inproc" else tcp.TcpListener(host, port)


def connect(host: str, port: int, timeout_s: float) -> Connection:
    """Connect to an address. Raises ConnectionError if that fails or takes more than `timeout_s` seconds."""
    if host == "inproc":
        return inproc.connect(host, port, timeout_s)
    return tcp.connect(host, port, timeout_s)
