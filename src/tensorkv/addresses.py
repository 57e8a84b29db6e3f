"""Addresses as text: "10.0.0.1:4321", "host:4321", and "[fe80::1%eth0]:4321" with colons in the host."""

from __future__ import annotations

LOOPBACK = "localhost"
"""Host of this machine alone: 127.0.0.1, or ::1 where there is no other; no name service is asked."""

_WILDCARDS = ("0.0.0.0", "::")


def bare_host(host: str) -> str:
    """Return a host without the brackets that an IPv6 address may stand in.

    Example:
        >>> bare_host("[::1]")
        '::1'
    """
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def join_address(host: str, port: int) -> str:
    """Return host and port as one text, from which `split_address` gets both back."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_address(text: str) -> tuple[str, int]:
    """Return host, without brackets, and port.

    Raises:
        ValueError: there is no port, it is no number, or an IPv6 address stands without brackets.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit():
        raise ValueError(f"the address {text!r} does not end with the number of a port, as host:4321 does")
    bare = bare_host(host)
    if ":" in bare and bare == host:
        raise ValueError(f"the address {text!r} needs brackets around its host: [{host}]:{port}")
    return bare, int(port)


def is_wildcard(host: str) -> bool:
    """Return whether a host stands for every address of its machine, where one can only listen."""
    return host in _WILDCARDS
