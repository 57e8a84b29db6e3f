"""Semantic validation of the keys, settings and slices that a peer sent.

msgspec checks types; values are checked here. A worker checks the replies of scheduler and servers; a server
checks a slice that is restored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from tensorkv.arrays import REFUSED_DTYPES, check_summable, dtype_from_name
from tensorkv.checkpoint.records import VALUE, SavedSettings, TensorRecord, check_settings
from tensorkv.checkpoint.slices import packed_bytes
from tensorkv.errors import InvalidValue, LoadError, ProtocolError
from tensorkv.plain import MAX_INT, Plain
from tensorkv.wire import messages as m

MAX_STATE_TENSORS = 64
MAX_STATE_BYTES = 1 << 30
"""Maximum size of all state of a slice that is not elementwise."""

MAX_DIMS = 64
MAX_ELEMS = (1 << 59) - 1
"""Maximum number of elements of a tensor; the bytes of more could not be counted in 63 bits."""


def check_reply(message: Any, num_servers: int) -> None:
    """Check the contents of a reply of the scheduler.

    Raises:
        ProtocolError: a key or a setting in it is not valid.
    """
    match message:
        case m.InitReply() | m.Entries() | m.LoadReply():
            check_entries(message.entries, num_servers)
        case m.TogetherReply():
            check_entries(message.replaced, num_servers)
            if message.settings is not None:
                check_saved(message.settings)


def check_entries(entries: Sequence[m.KeyEntry], num_servers: int) -> None:
    """Check that the slices of each key make up its value.

    Raises:
        ProtocolError: they do not.
    """
    for entry in entries:
        if not entry.slices:
            raise ProtocolError(f"key {entry.key!r} was told without slices")
        sent_dtype(entry.dtype)
        low, whole = 0, sent_size(entry.shape)
        for each in sorted(entry.slices, key=lambda each: (each.start, each.stop)):
            if each.start != low or each.stop < low or not 0 <= each.server < num_servers:
                where = f"on server {each.server}, after {low}"
                raise ProtocolError(f"slice [{each.start}, {each.stop}) of {whole} elements {where}")
            low = each.stop
        if low != whole:
            raise ProtocolError(f"slices of {low} elements for a value of {whole}")


def check_init(reply: m.InitReply, specs: Sequence[m.KeySpec]) -> None:
    """Check that the reply to an init is about its keys.

    Raises:
        ProtocolError: it is not.
    """
    told = [(entry.key, entry.shape, entry.dtype) for entry in reply.entries]
    if told != [(spec.key, spec.shape, spec.dtype) for spec in specs] or len(reply.lead) != len(specs):
        raise ProtocolError(f"an init of {len(specs)} keys was answered by {len(told)}, or by others")


def check_saved(settings: SavedSettings) -> None:
    """Check that settings are complete.

    Raises:
        ProtocolError: they are not.
    """
    try:
        check_settings(settings, "settings that were sent")
    except LoadError as exc:
        raise ProtocolError(str(exc)) from exc


def check_slice(
    start: int,
    stop: int,
    shape: tuple[int, ...],
    version: int,
    tensors: Sequence[TensorRecord],
    plain: dict[str, Plain],
) -> int:
    """Check the records of a slice and its state; return their total size in bytes.

    Raises:
        ProtocolError: they are inconsistent or too large.
    """
    if not 0 <= start <= stop <= sent_size(shape):
        raise ProtocolError(f"slice [{start}, {stop}) of shape {shape}")
    if not 0 <= version <= MAX_INT:
        raise ProtocolError(f"a slice came with version {version}")
    if not tensors or tensors[0].name != VALUE or not tensors[0].elementwise:
        raise ProtocolError("a slice came without its value")
    names = [each.name for each in tensors]
    if len({*names, *plain}) < len(names) + len(plain):
        raise ProtocolError("a slice came with state of one name twice")
    for each in tensors:
        sent_dtype(each.dtype)
        size = sent_size(each.shape)
        if each.elementwise and size != stop - start:
            raise ProtocolError(f"{each.name!r} of a slice of {stop - start} elements has shape {each.shape}")
    other_bytes = packed_bytes(each for each in tensors if not each.elementwise)
    if len(tensors) > MAX_STATE_TENSORS or other_bytes > MAX_STATE_BYTES:
        raise ProtocolError(f"a slice came with {len(tensors)} tensors of state, or with too large ones")
    return packed_bytes(tensors)


def sent_dtype(name: str) -> torch.dtype:
    """Return the dtype that a message names.

    Raises:
        ProtocolError: there is no such dtype, or its values cannot be added.
    """
    try:
        dtype = dtype_from_name(name)
        if dtype in REFUSED_DTYPES:
            raise ProtocolError(f"values of dtype {name!r} are not stored")
        check_summable(dtype, "")
    except InvalidValue as exc:
        raise ProtocolError(str(exc)) from exc
    return dtype


def sent_size(shape: tuple[int, ...]) -> int:
    """Return the number of elements of a shape in a message.

    Raises:
        ProtocolError: no tensor can have this shape.
    """
    if len(shape) > MAX_DIMS or any(size < 0 for size in shape):
        raise ProtocolError(f"a shape of {len(shape)} dimensions, the smallest {min(shape)}")
    if math.prod(max(size, 1) for size in shape) > MAX_ELEMS:  # torch multiplies the sizes for its strides
        raise ProtocolError(f"a shape of {len(shape)} dimensions with more elements than can be numbered")
    return math.prod(shape)
