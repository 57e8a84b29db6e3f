"""Unix sockets: descriptors travel with their frame, and strangers are refused."""

from __future__ import annotations

import array
import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tensorkv.errors import ProtocolError
from tensorkv.transport import unix
from tensorkv.transport.unix import DescriptorHead, UnixConnection, UnixListener
from tensorkv.wire.codec import encode

DEADLINE_S = 20.0


@pytest.fixture
def listener() -> Iterator[UnixListener]:
    made = UnixListener()
    yield made
    made.close()


@pytest.fixture
def pair(listener: UnixListener) -> Iterator[tuple[UnixConnection, UnixConnection]]:
    one = unix.connect(listener.address[0], DEADLINE_S)
    other = listener.accept()
    assert isinstance(other, UnixConnection)
    yield one, other
    for end in (one, other):
        end.shutdown()
        end.close()


def _skip(body: memoryview, payload_bytes: int) -> list[memoryview]:
    return [memoryview(bytearray(payload_bytes))] if payload_bytes else []


def _file(folder: Path, text: str) -> int:
    path = folder / text
    path.write_text(text)
    return os.open(path, os.O_RDONLY)


def test_a_descriptor_comes_with_its_frame(
    pair: tuple[UnixConnection, UnixConnection], tmp_path: Path
) -> None:
    """Also where other frames, with payloads that fill several calls, come before it and after."""
    one, other = pair
    for number in range(3):
        descriptor = _file(tmp_path, f"file {number}")
        one.send(encode("before", 9000), [bytes(9000)])
        one.send(DescriptorHead.of(encode(number), descriptor))
        os.close(descriptor)
        one.send(encode("after"))
    for number in range(3):
        other.receive(_skip)
        other.receive(_skip)
        with open(other.claim_descriptor()) as file:
            assert file.read() == f"file {number}"
            assert not os.get_inheritable(file.fileno())
        other.receive(_skip)
    with pytest.raises(ProtocolError, match="announced a descriptor, and none came"):
        other.claim_descriptor()


def test_a_frame_that_is_sent_in_pieces_hands_its_descriptor_over_once(
    pair: tuple[UnixConnection, UnixConnection], tmp_path: Path
) -> None:
    one, other = pair
    descriptor = _file(tmp_path, "once")
    payload = bytes(8 << 20)
    rest = one.send_now([DescriptorHead.of(encode(1, len(payload)), descriptor), payload])
    assert rest
    got = bytearray(len(payload))
    while not other.receive_now(lambda body, size: [memoryview(got)]):
        rest = one.send_now(rest)
    os.close(descriptor)
    os.close(other.claim_descriptor())
    with pytest.raises(ProtocolError):
        other.claim_descriptor()


def test_what_nobody_claims_is_closed_with_the_connection(
    pair: tuple[UnixConnection, UnixConnection], tmp_path: Path, count_descriptors: Callable[[], int]
) -> None:
    one, other = pair
    descriptor = _file(tmp_path, "unclaimed")
    before = count_descriptors()
    one.send(DescriptorHead.of(encode(1), descriptor))
    other.receive(_skip)
    assert count_descriptors() == before + 1
    other.close()
    assert count_descriptors() == before - 1  # the socket is closed, too
    os.close(descriptor)


def test_a_peer_that_sends_many_descriptors_is_cut_off(
    pair: tuple[UnixConnection, UnixConnection], tmp_path: Path
) -> None:
    one, other = pair
    descriptor = _file(tmp_path, "many")
    for _ in range(unix.MAX_UNCLAIMED):
        one.send(DescriptorHead.of(encode(1), descriptor))
        other.receive(_skip)
    one.send(DescriptorHead.of(encode(1), descriptor))
    with pytest.raises(ProtocolError, match=f"more than {unix.MAX_UNCLAIMED} descriptors"):
        other.receive(_skip)
    assert other.broken
    os.close(descriptor)


def test_several_descriptors_at_once_are_not_taken(
    listener: UnixListener, tmp_path: Path, count_descriptors: Callable[[], int]
) -> None:
    """There is room for one; the system closes the others."""
    bare = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    bare.connect("\0" + listener.address[0][1:])
    other = listener.accept()
    assert isinstance(other, UnixConnection)
    descriptor = _file(tmp_path, "several")
    before = count_descriptors()
    rights = array.array("i", [descriptor] * 50)
    bare.sendmsg([encode(1)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    other.receive(_skip)
    assert count_descriptors() <= before + 2  # room is rounded up
    for each in (bare, other):
        each.close()
    os.close(descriptor)


def test_another_user_is_refused_on_both_sides(
    listener: UnixListener,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    count_descriptors: Callable[[], int],
) -> None:
    before = count_descriptors()
    stranger = os.geteuid() + 1
    with monkeypatch.context() as patch:
        patch.setattr(unix.os, "geteuid", lambda: stranger)
        with pytest.raises(ConnectionError, match=f"this one to user {stranger}"):
            unix.connect(listener.address[0], DEADLINE_S)
    listener.accept().close()  # of the one above, which has gone
    one = unix.connect(listener.address[0], DEADLINE_S)
    another = unix.connect(listener.address[0], DEADLINE_S)
    answers = iter([stranger, stranger])  # it is asked for the comparison, and for the text
    monkeypatch.setattr(unix.os, "geteuid", lambda: next(answers, stranger - 1))
    other = listener.accept()
    assert f"this one to user {stranger}" in caplog.text
    with pytest.raises(EOFError):
        one.receive(_skip)
    for each in (one, another, other):
        each.close()
    assert count_descriptors() == before


def test_nobody_listens_there() -> None:
    for name in ("@tensorkv-nobody", "@" + "x" * 200, "@"):
        with pytest.raises(ConnectionError, match="cannot connect to @"):
            unix.connect(name, DEADLINE_S)


def test_names_are_new_and_leave_nothing_behind(listener: UnixListener) -> None:
    other = UnixListener()
    assert other.address != listener.address
    assert other.address[0] in Path("/proc/net/unix").read_text()
    other.close()
    assert other.address[0] not in Path("/proc/net/unix").read_text()


def test_why_a_system_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unix.why_not() == ""
    with monkeypatch.context() as patch:
        patch.delattr(unix.os, "memfd_create")
        assert "memfd_create" in unix.why_not()

    def refuse(name: str, flags: int) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    with monkeypatch.context() as patch:
        patch.setattr(unix.os, "memfd_create", refuse)
        assert "Function not implemented" in unix.why_not()
    monkeypatch.setattr(unix.sys, "platform", "darwin")
    assert "darwin" in unix.why_not()
