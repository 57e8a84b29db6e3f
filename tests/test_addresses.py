"""Hosts and ports as one text, and back."""

from __future__ import annotations

import pytest

from tensorkv.addresses import bare_host, is_wildcard, join_address, split_address


@pytest.mark.parametrize(
    ("host", "text"),
    [
        ("127.0.0.1", "127.0.0.1:4321"),
        ("node-3.cluster.example", "node-3.cluster.example:4321"),
        ("::1", "[::1]:4321"),
        ("::", "[::]:4321"),
        ("fe80::1%eth0", "[fe80::1%eth0]:4321"),
        ("::ffff:10.0.0.1", "[::ffff:10.0.0.1]:4321"),
        ("inproc", "inproc:4321"),
        ("", ":4321"),
    ],
)
def test_an_address_is_one_text_and_comes_back(host: str, text: str) -> None:
    assert join_address(host, 4321) == text
    assert split_address(text) == (host, 4321)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "does not end with the number of a port"),
        ("host", "does not end with the number of a port"),
        ("host:", "does not end with the number of a port"),
        ("host:http", "does not end with the number of a port"),
        ("host:-1", "does not end with the number of a port"),
        ("[::1]", "does not end with the number of a port"),
        ("::1:4321", r"needs brackets around its host: \[::1\]:4321"),
        ("::1", r"needs brackets around its host: \[:\]:1"),
    ],
)
def test_what_is_no_address(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        split_address(text)


def test_brackets_are_taken_off() -> None:
    assert [bare_host(host) for host in ("[::1]", "::1", "host", "[")] == ["::1", "::1", "host", "["]


def test_wildcards() -> None:
    assert [is_wildcard(host) for host in ("0.0.0.0", "::", "::1", "localhost")] == [True, True, False, False]
