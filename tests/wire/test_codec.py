"""Frames: their very bytes, and that whatever else comes is a ProtocolError and nothing else."""

from __future__ import annotations

import struct
import tracemalloc
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tensorkv.errors import ProtocolError, ProtocolVersionError
from tensorkv.updaters.functions import CodeRef
from tensorkv.updaters.spec import UpdaterSpec
from tensorkv.wire import messages as m
from tensorkv.wire.codec import MAX_HEADER_BYTES, PREFIX, VERSION, Decoder, decode_prefix, encode

GOLDEN = {
    "push": (
        m.Push(3, 1, True, 7), 4096,
        "544b5601" "08000000" "0010000000000000" "97" "18" "03" "01" "c3" "07" "c0" "c0",
    ),
    "push in place": (
        m.Push(3, 1, True, 7, m.Placed(2, [(1, 64, 128)])), 0,
        "544b5601" "0f000000" "0000000000000000"
        "97" "18" "03" "01" "c3" "07" "92" "02" "91" "93" "01" "40" "cc80" "c0",
    ),
    "challenge": (
        m.Challenge(b"\x00\xff"), 0,
        "544b5601" "06000000" "0000000000000000" "92" "01" "c402" "00ff",
    ),
    "plan": (
        m.DefinePlan(
            1, 2, [m.ChunkEntry([5, 300], [16, 0], m.PayloadDescriptor("dense", "float32"), [1, 2])]
        ), 0,
        "544b5601" "26000000" "0000000000000000"
        "94" "16" "01" "02" "91" "94"
        "9205cd012c" "921000" "93" "a564656e7365" "a7666c6f61743332" "a5706c61696e" "920102",
    ),
    "init": (
        m.InitSlices(9, 1, "w", (2, 3), "int8", [m.SliceEntry(4, 0, 0, 6)]), 6,
        "544b5601" "14000000" "0600000000000000"
        "97" "15" "09" "01" "a177" "920203" "a4696e7438" "91" "9404000006",
    ),
    "setting": (
        m.ActivateSetting(1, 2), 0,
        "544b5601" "04000000" "0000000000000000" "93" "1d" "01" "02",
    ),
}  # fmt: skip
ALL = m.HandshakeMessage | m.ToServer | m.FromServer | m.ToScheduler | m.FromScheduler
SETTING = m.PrepareSetting(
    1,
    1,
    0,
    m.SettingRecord(
        ("w", 3),
        UpdaterSpec(type="optimizer", name="torch.optim:SGD", options={"lr": 0.5}),
        CodeRef(module="torch.optim", name="SGD"),
    ),
)


@pytest.mark.parametrize("name", GOLDEN)
def test_the_very_bytes(name: str) -> None:
    message, payload_bytes, frame = GOLDEN[name]
    encoded = encode(message, payload_bytes)
    assert encoded.hex() == frame
    header_bytes, found_bytes = decode_prefix(encoded[:16], MAX_HEADER_BYTES)
    assert (header_bytes, found_bytes) == (len(encoded) - 16, payload_bytes)
    decoder: Decoder[Any] = Decoder(ALL)
    assert decoder.decode(memoryview(encoded)[16:]) == message


def test_the_prefix_of_another_version_says_which() -> None:
    for version in (0, VERSION + 1, 255):
        with pytest.raises(ProtocolVersionError, match=f"version {version} .* version {VERSION};"):
            decode_prefix(struct.pack("<3sBIQ", b"TKV", version, 1, 0), 10)


@pytest.mark.parametrize("prefix", [b"HTTP/1.1 400 Bad", bytes(16), b"tkv" + bytes(13)])
def test_what_is_no_frame_is_shown(prefix: bytes) -> None:
    with pytest.raises(ProtocolError, match="does not speak TensorKV"):
        decode_prefix(prefix, 10)


@pytest.mark.parametrize("size_bytes", [0, 15])
def test_a_prefix_has_its_size(size_bytes: int) -> None:
    with pytest.raises(ProtocolError, match=f"prefix of {size_bytes} bytes"):
        decode_prefix(bytes(size_bytes), 10)


def test_a_message_over_the_limit_is_refused_before_it_is_read() -> None:
    assert decode_prefix(PREFIX.pack(b"TKV", VERSION, 4096, 5), 4096) == (4096, 5)
    with pytest.raises(ProtocolError, match="4097 bytes is over the limit of 4096"):
        decode_prefix(PREFIX.pack(b"TKV", VERSION, 4097, 0), 4096)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc0",
        b"\x91\x18",
        msgspec.msgpack.encode([24, True, 1, True, 0]),  # a bool is no number
        msgspec.msgpack.encode([24, 1.0, 1, True, 0]),
        msgspec.msgpack.encode([24, 1, 1, 1, 0]),
        msgspec.msgpack.encode([24, 1, 1, None, 0]),
        msgspec.msgpack.encode([999, 1]),
        msgspec.msgpack.encode({"type": 24, "plan": 1}),
        msgspec.msgpack.encode([21, 1, 1, 1.5, [2], "int8", []]),  # a key is an int or str
        msgspec.msgpack.encode([2, b"", b"", "nobody", 0]),
        encode(m.Flush(1, 1))[16:] + b"\x00",
        b"\x94\x0b\x01\xa1\xff\xa1a",  # text that is no UTF-8
    ],
)
def test_malformed_messages_are_refused(body: bytes) -> None:
    decoder: Decoder[Any] = Decoder(ALL)
    with pytest.raises(ProtocolError, match="malformed"):
        decoder.decode(body)


def test_nothing_nests_too_deeply() -> None:
    body = encode(SETTING)[16:]
    place = body.rindex(b"\xa2lr") + 3
    decoder: Decoder[Any] = Decoder(m.ToServer)
    assert decoder.decode(body) == SETTING
    with pytest.raises(ProtocolError):
        decoder.decode(body[:place] + b"\x91" * 100_000 + b"\xc0" + body[place + 9 :])


@pytest.mark.parametrize("name", GOLDEN)
def test_every_cut_is_noticed(name: str) -> None:
    message, _, _ = GOLDEN[name]
    body = encode(message)[16:]
    decoder: Decoder[Any] = Decoder(ALL)
    for length in range(len(body)):
        with pytest.raises(ProtocolError):
            decoder.decode(body[:length])


@given(prefix=st.binary(max_size=20) | st.binary(min_size=13, max_size=13).map(lambda rest: b"TKV" + rest))
def test_any_prefix_is_read_or_refused(prefix: bytes) -> None:
    try:
        header_bytes, _ = decode_prefix(prefix, 4096)
    except (ProtocolError, ProtocolVersionError):
        return
    assert prefix[:4] == b"TKV\x01"
    assert header_bytes <= 4096


@given(body=st.binary(max_size=60))
@example(body=b"\x93\x0c\xcf\xff\xff\xff\xff\xff\xff\xff\xff\x00")
def test_any_bytes_are_a_message_or_refused(body: bytes) -> None:
    check_refused_or_sound(body)


@given(
    frame=st.sampled_from([encode(each[0])[16:] for each in GOLDEN.values()] + [encode(SETTING)[16:]]),
    changes=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_any_change_of_a_message_is_a_message_or_refused(frame: bytes, changes: list[Any]) -> None:
    body = bytearray(frame)
    for place, byte in changes:
        body[place % len(body)] = byte
    check_refused_or_sound(bytes(body))


def check_refused_or_sound(body: bytes) -> None:
    decoder: Decoder[Any] = Decoder(ALL)
    try:
        message = decoder.decode(body)
    except ProtocolError:
        return
    assert isinstance(message, m.Message)


@pytest.mark.parametrize("text", ["wor\nker", "wor\x1b[2Jker", "\u2028", "w" * 5000])
def test_what_a_peer_says_stays_one_short_line_of_a_log(text: str) -> None:
    """Else it could write lines of its own into the log."""
    body = msgspec.msgpack.encode([2, b"nonce", b"proof", text, 1])
    with pytest.raises(ProtocolError) as caught:
        Decoder(m.HandshakeMessage).decode(body)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("count", [b"\xdd\xff\xff\xff\xff", b"\xdd\x40\x00\x00\x00", b"\xdc\xff\xff"])
def test_a_huge_count_takes_no_memory(count: bytes) -> None:
    """The list of AskInfo says that it has so many elements; then the message ends."""
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match="malformed"):
            Decoder(m.ToServer).decode(b"\x94\x20\x01\x01" + count)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
