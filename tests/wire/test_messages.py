"""Messages: every one travels, its tag is its own and stays, and each side takes only what is for it."""

from __future__ import annotations

import typing
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorkv.checkpoint.records import SavedSettings, SettingEntry
from tensorkv.errors import ProtocolError
from tensorkv.updaters.functions import CodeRef
from tensorkv.updaters.spec import UpdaterSpec
from tensorkv.wire import messages as m
from tensorkv.wire.codec import MAX_HANDSHAKE_BYTES, Decoder, encode

UNIONS = {
    "handshake": m.HandshakeMessage,
    "to server": m.ToServer,
    "from server": m.FromServer,
    "to scheduler": m.ToScheduler,
    "from scheduler": m.FromScheduler,
}
CLASSES = sorted(
    {each for union in UNIONS.values() for each in typing.get_args(union)}, key=lambda each: each.__name__
)
TAGS = {
    1: "Challenge", 2: "Hello", 3: "Accept", 4: "Reject",
    10: "Done", 11: "Failed", 12: "AskWaiting", 13: "Waiting", 14: "AskStuck", 15: "Stuck",
    20: "OpenStore", 21: "InitSlices", 22: "DefinePlan", 23: "DropPlan", 24: "Push", 25: "Pull",
    26: "WaitMerged", 27: "Commit", 28: "PrepareSetting", 29: "ActivateSetting", 30: "DeleteSlices",
    31: "Flush", 32: "AskInfo", 33: "Leave", 34: "Put", 35: "ChangeOptions", 36: "DropSlices",
    37: "PlaceSlices",
    40: "Data", 41: "Merged", 42: "Committed", 43: "Info", 44: "Fault",
    45: "ShareSegment", 46: "DropSegment",
    50: "Register", 51: "Welcome", 52: "JoinStore", 53: "Joined", 54: "ProposeInit", 55: "InitReply",
    56: "ConcludeInit", 57: "ProposeSetting", 58: "SettingReply", 59: "ConcludeSetting", 60: "Lookup",
    61: "Entries", 62: "DeleteKeys", 64: "Barrier", 65: "LeaveStore", 66: "Goodbye",
    67: "Abandon", 68: "CommitReady", 69: "CommitDecision", 70: "Lost", 71: "Stop", 72: "GiveUp", 73: "Gone",
    74: "WorkerLost", 76: "CountKeys", 77: "NumKeys",
    80: "SaveSlices", 81: "AskSlice", 82: "AskSettings", 83: "PrepareRestore", 84: "LoadSlices",
    85: "RestoreSlice", 86: "FinishRestore", 87: "BeginSave", 88: "EndSave",
    90: "SavedFile", 91: "SliceRecord", 92: "Settings", 93: "SaveBegun",
    100: "Together", 101: "TogetherReply", 102: "ConcludeTogether", 103: "ProposeLoad", 104: "LoadReply",
}  # fmt: skip

INT = st.integers(-(1 << 63), (1 << 64) - 1)
KEY = INT | st.text(max_size=8)
TEXT = st.text(max_size=8)
PLAIN = st.none() | st.booleans() | INT | st.floats(allow_nan=False) | TEXT
OPTIONS = st.dictionaries(TEXT, PLAIN | st.lists(PLAIN, max_size=3), max_size=3)


def _special() -> dict[type, st.SearchStrategy[Any]]:
    """Fields of type Any cannot be drawn from the type alone."""
    spec = st.builds(
        UpdaterSpec, type=st.sampled_from(["named", "function", "optimizer"]), name=TEXT, options=OPTIONS
    )
    code = st.builds(CodeRef, module=TEXT, name=TEXT, script=TEXT, sha256=TEXT, package=TEXT, adapter=TEXT)
    record = st.builds(
        m.SettingRecord,
        keys=st.none() | st.lists(KEY, max_size=3).map(tuple),
        updater=spec,
        code=st.none() | code,
    )
    entry = st.builds(
        SettingEntry,
        keys=st.none() | st.lists(KEY, max_size=3).map(tuple),
        updater=INT,
        options=OPTIONS,
        asked=st.none() | OPTIONS,
    )
    settings = st.builds(
        SavedSettings, updaters=st.lists(spec, max_size=3), entries=st.lists(entry, max_size=3)
    )
    change = st.builds(
        m.ChangeOptions,
        store=INT,
        keys=st.none() | st.lists(KEY, max_size=3).map(tuple),
        options=OPTIONS,
    )
    return {m.SettingRecord: record, CodeRef: code, SavedSettings: settings, m.ChangeOptions: change}


def value_for(annotation: Any) -> st.SearchStrategy[Any]:
    """Return values of a field's type, as far as messages use types."""
    special = _special()
    if annotation in special:
        return special[annotation]
    simple = {
        int: INT,
        str: TEXT,
        bytes: st.binary(max_size=40),
        bool: st.booleans(),
        float: st.floats(allow_nan=False),
        type(None): st.none(),
    }
    if annotation in simple:
        return simple[annotation]
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin is dict:
        return st.dictionaries(value_for(args[0]), value_for(args[1]), max_size=3)
    if origin is list:
        return st.lists(value_for(args[0]), max_size=3)
    if origin is tuple and args[-1] is ...:
        return st.lists(value_for(args[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(value_for, args))
    if args:  # a union
        return st.one_of(*map(value_for, args))
    hints = typing.get_type_hints(annotation)
    fields = [each.name for each in msgspec.structs.fields(annotation)]
    return st.builds(annotation, **{name: value_for(hints[name]) for name in fields})


def test_tags_are_never_reassigned() -> None:
    found = {each.__struct_config__.tag: each.__name__ for each in CLASSES}
    assert len(found) == len(CLASSES)
    assert found == TAGS


@pytest.mark.parametrize("union", UNIONS)
def test_every_message_comes_back_as_it_was(union: str) -> None:
    decoder: Decoder[Any] = Decoder(UNIONS[union])

    @settings(max_examples=60)
    @given(message=st.one_of(*map(value_for, typing.get_args(UNIONS[union]))))
    def check(message: Any) -> None:
        found = decoder.decode(encode(message)[16:])
        assert type(found) is type(message)
        assert found == message

    check()


@pytest.mark.parametrize("union", UNIONS)
def test_what_is_not_for_this_side_is_refused(union: str) -> None:
    decoder: Decoder[Any] = Decoder(UNIONS[union])
    mine = typing.get_args(UNIONS[union])
    others = [each for each in CLASSES if each not in mine]
    assert others
    for each in others:
        body = msgspec.msgpack.encode([each.__struct_config__.tag])
        with pytest.raises(ProtocolError, match="malformed"):
            decoder.decode(body)


@pytest.mark.parametrize("each", CLASSES, ids=lambda each: each.__name__)
def test_fields_are_neither_missing_nor_more(each: Any) -> None:
    union = next(union for union in UNIONS.values() if each in typing.get_args(union))
    decoder: Decoder[Any] = Decoder(union)

    @settings(max_examples=3)
    @given(message=value_for(each))
    def check(message: Any) -> None:
        items = msgspec.msgpack.decode(msgspec.msgpack.encode(message))
        with pytest.raises(ProtocolError):
            decoder.decode(msgspec.msgpack.encode([*items, 0]))
        if len(items) > 1 and not each.__struct_defaults__:  # those stand at the end
            with pytest.raises(ProtocolError):
                decoder.decode(msgspec.msgpack.encode(items[:-1]))

    check()


def test_a_handshake_fits_into_what_a_stranger_may_send() -> None:
    for message in (m.Challenge(bytes(32)), m.Hello(bytes(32), bytes(32), "scheduler", 1 << 31)):
        assert len(encode(message)) < MAX_HANDSHAKE_BYTES
