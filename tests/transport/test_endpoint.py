"""The address chooses the transport."""

from __future__ import annotations

import pytest

from tensorkv.transport.base import Connection
from tensorkv.transport.endpoint import connect, listen
from tensorkv.transport.inproc import InprocConnection, InprocListener
from tensorkv.transport.tcp import TcpConnection, TcpListener


@pytest.mark.parametrize(
    ("host", "listener_type", "connection_type"),
    [("inproc", InprocListener, InprocConnection), ("127.0.0.1", TcpListener, TcpConnection)],
)
def test_the_host_says_which(
    host: str, listener_type: type[object], connection_type: type[Connection]
) -> None:
    listener = listen(host)
    assert isinstance(listener, listener_type)
    assert listener.address[0] == host
    one = connect(*listener.address, 10.0)
    other = listener.accept()
    assert isinstance(one, connection_type)
    assert isinstance(other, connection_type)
    for each in (one, other):
        each.close()
    listener.close()


def test_a_port_of_choice() -> None:
    first = listen("127.0.0.1")
    host, port = first.address
    first.close()
    again = listen(host, port)
    assert again.address == (host, port)
    again.close()
