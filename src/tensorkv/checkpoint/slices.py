"""Slices with their state in memory: cut and joined, packed for the wire, and as the dict of a store.

`records` says what the records mean; `files` has the same for files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from tensorkv.arrays import bytes_of, dtype_from_name, dtype_name, size_bytes, to_tensor
from tensorkv.checkpoint.records import (
    FORMAT,
    VALUE,
    KeyRecord,
    Overlap,
    PieceRecord,
    SavedSettings,
    TensorRecord,
    check_alike,
    check_record,
    check_settings,
    check_states,
    from_plain,
    overlaps,
    version_of,
)
from tensorkv.errors import InvalidValue, LoadError, SaveError
from tensorkv.plain import Key, Plain, may_travel
from tensorkv.updaters.optimizer import check_state_names

DICT_VERSION = 1
"""Version of the format of a store's state dict."""

Fetch = Callable[[int, TensorRecord, int, int], torch.Tensor]
"""Called with piece, tensor, low and high; returns elements [low, high), flat; all if not elementwise."""


@dataclass(slots=True)
class SliceState:
    """A slice in memory: its flat value, its version, and the optimizer's state by name.

    A state tensor whose name is in `elementwise` is flat, too, with one element per element of the value.
    """

    value: torch.Tensor
    version: int
    state: dict[str, Any] = field(default_factory=dict)
    elementwise: frozenset[str] = frozenset()

    def optimizer_state(self, shape: Sequence[int]) -> dict[str, Any]:
        """Return the state as the optimizer keeps it, for a slice of this shape."""
        return {
            name: each.view(tuple(shape)) if name in self.elementwise else each
            for name, each in self.state.items()
        }


def state_bytes(state: Mapping[str, Any]) -> int:
    """Return the size in bytes of the tensors in an optimizer's state."""
    return sum(
        size_bytes(tuple(each.shape), each.dtype) for each in state.values() if isinstance(each, torch.Tensor)
    )


def slice_state(key: Key, value: torch.Tensor, version: int, state: dict[str, Any]) -> SliceState:
    """Return a copy of a slice, from the value of a store and the state of an optimizer.

    Raises:
        SaveError: the state holds something that is neither plain nor a tensor that can be copied.
    """
    copied: dict[str, Any] = {}
    elementwise: set[str] = set()
    for name, each in state.items():
        named = type(name) is str and name and may_travel(name)
        if named and isinstance(each, torch.Tensor):
            copied[name] = _copied(key, name, each)
            if each.shape == value.shape:
                elementwise.add(name)
                copied[name] = copied[name].view(-1)
        elif named and not isinstance(each, (list, tuple)) and may_travel(each):
            copied[name] = each
        else:
            raise SaveError(
                f"key {key!r}: the optimizer keeps {name!r}, a {type(each).__name__}, which cannot be saved; "
                "its state may hold tensors, numbers that fit in 64 bits, bools, strings and None"
            )
    flat = value.detach().to("cpu", copy=True).contiguous().view(-1)
    return SliceState(flat, version, copied, frozenset(elementwise))


def _copied(key: Key, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy of a tensor of the state on the CPU. Raises SaveError."""
    try:
        return to_tensor(tensor, key).to("cpu", copy=True).contiguous()
    except (InvalidValue, RuntimeError) as exc:  # torch cannot copy int4, for example
        raise SaveError(f"key {key!r}: the optimizer keeps {name!r}, which cannot be saved: {exc}") from exc


def records_of(each: SliceState) -> tuple[list[TensorRecord], list[torch.Tensor], dict[str, Plain]]:
    """Return the parts of a slice: the records of its tensors, the tensors themselves, and plain data."""
    tensors = {VALUE: each.value}
    tensors.update({name: t for name, t in each.state.items() if isinstance(t, torch.Tensor)})
    records = [
        TensorRecord(
            name, dtype_name(tensor.dtype), tuple(tensor.shape), name == VALUE or name in each.elementwise
        )
        for name, tensor in tensors.items()
    ]
    plain = {name: value for name, value in each.state.items() if not isinstance(value, torch.Tensor)}
    return records, list(tensors.values()), plain


def assemble(record: KeyRecord, start: int, stop: int, fetch: Fetch) -> SliceState:
    """Assemble elements [start, stop) of a key, with their state, from its pieces.

    State that belongs to a piece as a whole comes from the first piece: it is the same in all.

    Raises:
        LoadError: the pieces do not fit together; or whatever `fetch` raises.
    """
    parts = overlaps(record.pieces, start, stop)
    check_alike(record, parts)
    first = record.pieces[parts[0].piece]
    made: dict[str, Any] = {}
    for number, each in enumerate(first.tensors):
        if each.elementwise:
            made[each.name] = _join(record, parts, number, fetch)
        else:
            made[each.name] = fetch(parts[0].piece, each, 0, each.num_elems).reshape(each.shape).clone()
    value = made.pop(VALUE)
    elementwise = frozenset(each.name for each in first.tensors[1:] if each.elementwise)
    return SliceState(value, version_of(record, parts), {**made, **first.plain}, elementwise)


def _join(record: KeyRecord, parts: Sequence[Overlap], number: int, fetch: Fetch) -> torch.Tensor:
    """Return a flat copy of the elements of tensor `number` of these pieces."""
    found = [
        fetch(part.piece, record.pieces[part.piece].tensors[number], part.low, part.high) for part in parts
    ]
    return found[0].clone() if len(found) == 1 else torch.cat(found)


class MemoryPieces:
    """The pieces of a key in memory: `state_dict` joins them, and `load_state_dict` cuts them."""

    def __init__(self, key: Key, shape: Sequence[int], whole: bool) -> None:
        self._key, self._shape, self._whole = key, tuple(shape), whole
        self._pieces: list[PieceRecord] = []
        self._tensors: list[dict[str, torch.Tensor]] = []

    def add(self, start: int, stop: int, each: SliceState) -> None:
        """Add the next piece, in element order."""
        records, tensors, plain = records_of(each)
        self._pieces.append(PieceRecord(start, stop, each.version, records, plain))
        self._tensors.append({record.name: t for record, t in zip(records, tensors, strict=True)})

    @property
    def record(self) -> KeyRecord:
        """The record of the key."""
        dtype = self._pieces[0].tensors[0].dtype
        return KeyRecord(self._key, self._shape, dtype, self._whole, self._pieces)

    def fetch(self, piece: int, tensor: TensorRecord, low: int, high: int) -> torch.Tensor:
        """Return elements of a tensor of a piece."""
        return self._tensors[piece][tensor.name].view(-1)[low:high]


# ---- tensors as bytes, between worker and server -----------------------------------------------------


def pack(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Concatenate the bytes of tensors in one uint8 tensor."""
    parts = [torch.frombuffer(bytearray(bytes_of(t)), dtype=torch.uint8) for t in tensors if t.numel()]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device="cpu")


def packed_bytes(records: Iterable[TensorRecord]) -> int:
    """Return the size of what `pack` returns for tensors like these."""
    return sum(each.num_elems * dtype_from_name(each.dtype).itemsize for each in records)


def unpack(
    data: torch.Tensor, records: Sequence[TensorRecord], version: int, plain: dict[str, Plain]
) -> SliceState:
    """Return the slice whose tensors `pack` packed."""
    made: dict[str, Any] = {}
    low = 0
    for each in records:
        dtype = dtype_from_name(each.dtype)
        size = each.num_elems * dtype.itemsize
        made[each.name] = data[low : low + size].clone().view(dtype).view(each.shape)
        low += size
    value = made.pop(VALUE)
    elementwise = frozenset(each.name for each in records if each.elementwise and each.name != VALUE)
    return SliceState(value, version, {**made, **plain}, elementwise)


# ---- as a dict --------------------------------------------------------------------------------------------


def to_state_dict(reduction: str, settings: SavedSettings, keys: Iterable[MemoryPieces]) -> dict[str, Any]:
    """Return the dict that `KVStore.state_dict` promises."""
    found: dict[str, Any] = {
        "format": FORMAT,
        "version": DICT_VERSION,
        "reduction": reduction,
        "settings": msgspec.to_builtins(settings),
        "whole": [],
        "values": {},
        "versions": {},
        "optimizer_state": {},
    }
    for pieces in keys:
        record = pieces.record
        each = assemble(record, 0, record.num_elems, pieces.fetch)
        found["values"][record.key] = each.value.view(record.shape)
        found["versions"][record.key] = each.version
        if record.whole:
            found["whole"].append(record.key)
        if each.state:
            found["optimizer_state"][record.key] = each.optimizer_state(record.shape)
    return found


def from_state_dict(data: Any) -> tuple[str, SavedSettings, list[MemoryPieces]]:
    """Return reduction, settings and keys of a state dict.

    Raises:
        LoadError: it is not the state dict of a store.
    """
    where = "the state dict"
    try:
        if (data["format"], data["version"]) != (FORMAT, DICT_VERSION) or data["reduction"] not in (
            "sum",
            "mean",
        ):
            raise LoadError(f"{where} is not one that state_dict() of this version of tensorkv has made")
        settings: SavedSettings = from_plain(data["settings"], SavedSettings)
        check_settings(settings, where)
        keys = [_pieces_of(data, key, value) for key, value in data["values"].items()]
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        if isinstance(exc, LoadError):
            raise
        raise LoadError(f"{where} is not one of a store: {type(exc).__name__}: {exc}") from exc
    for pieces in keys:
        check_record(pieces.record, where)
    records = [pieces.record for pieces in keys]
    check_states(settings, records, where)
    check_state_names(settings, records, where)
    return data["reduction"], settings, keys


def _pieces_of(data: Any, key: Any, value: Any) -> MemoryPieces:
    state = data["optimizer_state"].get(key, {})
    version = data["versions"][key]
    if type(key) not in (int, str) or type(version) is not int:
        raise LoadError(f"the state dict has key {key!r} with version {version!r}")
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        raise LoadError(f"the state dict has no tensor as value of key {key!r}")
    try:
        each = slice_state(key, value, version, state)
    except SaveError as exc:
        raise LoadError(str(exc)) from exc
    pieces = MemoryPieces(key, value.shape, key in data["whole"])
    pieces.add(0, value.numel(), each)
    return pieces
