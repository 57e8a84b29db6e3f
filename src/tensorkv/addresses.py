"""Addresses as text: "10.0.0.1:4321", "host:4321", and "[fe80::1%eth0]:4321" with colons in the host."""

from __future__ import annotations

LOOPBACK = "localhost"
"""Host of this machine only: 127.0.0.1, or ::1 if there is no other; resolved without a name service."""

_WILDCARDS = ("0.0.0.0", "::")


def bare_host(host: str) -> str:
    """Return a host without the brackets of an IPv6 address.

    Example:
        >>> bare_host("[::1]")
        '::1'
    """
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def join_address(host: str, port: int) -> str:
    """Return host and port as one text, which `split_address` splits again."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_address(text: str) -> tuple[str, int]:
    """Return host, without brackets, and port.

    Raises:
        ValueError: there is no port, it is not a number, or an IPv6 address has no brackets.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit():
        raise ValueError(f"the address {text!r} does not end with the number of a port, as host:4321 does")
    bare = bare_host(host)
    if ":" in bare and bare == host:
        raise ValueError(f"the address {text!r} needs brackets around its host: [{host}]:{port}")
    return bare, int(port)


def is_wildcard(host: str) -> bool:
    """Return whether a host stands for every address of its machine; it is valid for listening only."""
    return host in _WILDCARDS
