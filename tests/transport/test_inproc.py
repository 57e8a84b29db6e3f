"""What only the transport inside a process does."""

from __future__ import annotations

import pytest

from tensorkv.transport import inproc
from tensorkv.wire.codec import encode


def test_a_frame_is_a_copy() -> None:
    listener = inproc.InprocListener()
    one = listener.meet()
    other = listener.accept()
    payload = bytearray(b"abc")
    one.send(encode(1, 3), [payload])
    payload[:] = b"xyz"
    got = bytearray(3)
    other.receive(lambda body, payload_bytes: [memoryview(got)])
    assert got == b"abc"
    one.close()
    other.close()
    listener.close()


def test_nobody_listens() -> None:
    listener = inproc.InprocListener()
    host, port = listener.address
    listener.close()
    with pytest.raises(ConnectionError, match=f"nobody listens at inproc:{port}"):
        inproc.connect(host, port, 1.0)


def test_ports_are_not_used_again() -> None:
    first, second = inproc.InprocListener(), inproc.InprocListener()
    assert first.address != second.address
    first.close()
    third = inproc.InprocListener()
    assert third.address not in (first.address, second.address)
    second.close()
    third.close()
