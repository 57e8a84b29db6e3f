"""SharedWeights: parameters that are the servers' own memory, one copy for all processes of a host.

THEORY OF OPERATION
Rank 0 makes a segment with a place for each parameter, and the servers move their values there, where they
stay (`StoreShard.place_slices`). Every worker maps the segment and lets its parameters lie in it. So nothing
is pulled: when a round is applied, all workers have the new weights.

That is right because a round is applied only when every worker has pushed each weight of it, which it does in
`step`: nobody is computing with the old ones any more. And nobody goes on before it is applied, on all
servers (`KVStore._await_applied`).

The mapping is private: a page that the script writes becomes this worker's own, and the servers' updates do
not reach it any more. So each step looks for such pages, in /proc/self/pagemap, which tells shared pages from
others. Pages that hold what the servers have, as after weights were swapped and swapped back, rejoin by
MADV_DONTNEED. Others are changes of the script: rank 0's go to the servers, which make them when the next
round is complete (`StoreShard._keep_put`), and then all pages rejoin. Version counters alone would not do:
`p.data.copy_` moves none.

Gradients lie in windows (`windows`), so that a worker holds them once.

Before a worker leaves, its parameters become ordinary tensors, since the others train on.
"""

from __future__ import annotations

import errno
import mmap
import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
import torch

from tensorkv.errors import NotSupported, TensorKVError
from tensorkv.store import KVStore
from tensorkv.training.start import Meeting
from tensorkv.transport.memorylimits import trim_heap
from tensorkv.transport.segments import ALIGN_BYTES, Segment, open_path

_PAGE_BYTES = mmap.PAGESIZE
_PAGEMAP = "/proc/self/pagemap"
_PRESENT, _SWAPPED, _SHARED = np.uint64(1 << 63), np.uint64(1 << 62), np.uint64(1 << 61)
"""Bits of an entry of pagemap (Documentation/admin-guide/mm/pagemap.rst of Linux)."""


@final
class SharedWeights:
    """Parameters that lie in a segment which the servers write to.

    Every worker makes one, with the same parameters, while no round is open.

    Args:
        kv: the store that has the parameters, with the values that they have here.
        parameters: by key.
        others: the meeting of all workers.

    Raises:
        NotSupported: not possible here; on every worker alike.
    """

    def __init__(self, kv: KVStore, parameters: Mapping[str, torch.nn.Parameter], others: Meeting) -> None:
        self._parameters = dict(parameters)
        self._dtypes = [each.dtype for each in parameters.values()]
        self._close: weakref.finalize[..., Any] | None = None  # rank 0's descriptor, by which others find it
        sizes = [each.nbytes for each in parameters.values()]
        aligned = [-(-size // ALIGN_BYTES) * ALIGN_BYTES for size in sizes]
        *self._offsets, size_bytes = np.cumsum([0, *aligned]).tolist()
        _agree(others, _why_not(kv, parameters))
        path, failure = "", ""
        if kv.rank == 0:
            try:
                path = self._place(kv, size_bytes)
            except (TensorKVError, OSError) as exc:
                failure = str(exc)
        path = others.text_of_rank_0(path or "none")
        _agree(others, failure)
        if path == "none":
            raise NotSupported("share_weights=True: rank 0 has left, and nobody else shares new parameters")
        size_bytes = -(-size_bytes // _PAGE_BYTES) * _PAGE_BYTES
        self._map(path, size_bytes)
        trim_heap()  # of the memory that the parameters had

    def _place(self, kv: KVStore, size_bytes: int) -> str:
        """Make the segment and let the servers move there; return its path."""
        segment, descriptor = Segment.create(0, size_bytes, others_may_write=True)
        self._close = weakref.finalize(self, os.close, descriptor)
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
        kv._place_values(list(self._parameters), self._offsets, path, segment.size_bytes)
        return path

    def _map(self, path: str, size_bytes: int) -> None:
        """Let the parameters lie in the segment."""
        descriptor = open_path(path, os.O_RDONLY)
        try:
            self._servers = Segment.attach(0, size_bytes, os.dup(descriptor), writable=False)  # checks it
            writable = mmap.PROT_READ | mmap.PROT_WRITE
            self._private = mmap.mmap(descriptor, size_bytes, mmap.MAP_PRIVATE, writable)
        finally:
            os.close(descriptor)
        self._address = np.frombuffer(self._private, np.uint8).ctypes.data
        for each, offset in zip(self._parameters.values(), self._offsets, strict=True):
            if each.numel():
                self._lay(each, offset)

    def _lay(self, parameter: torch.nn.Parameter, offset: int) -> None:
        """Let a parameter lie in the segment, in a storage of exactly its bytes: `torch.save` writes that."""
        count = parameter.numel()
        flat = torch.frombuffer(self._private, dtype=parameter.dtype, count=count, offset=offset)
        parameter.data = flat.view(parameter.shape)

    # ---- a step ----------------------------------------------------------------------------------

    def changed(self) -> dict[str, torch.Tensor]:
        """Return the parameters that the script has changed, by name, until `rejoin`.

        Raises:
            NotSupported: one has another dtype or device now.
        """
        found: dict[str, torch.Tensor] = {}
        written = self._written()
        for (name, each), offset, dtype in zip(
            self._parameters.items(), self._offsets, self._dtypes, strict=True
        ):
            if each.dtype != dtype or not each.is_cpu:
                raise NotSupported(
                    _OTHER.format(name=name, dtype=dtype, now=f"{each.dtype} on {each.device}")
                )
            if not self._lies_at(each, offset):
                found[name] = each.detach().contiguous()
            elif len(written) and self._differs(written * _PAGE_BYTES, offset, offset + each.nbytes):
                found[name] = each.detach()
        if len(written) and not found:
            self.rejoin()
        return found

    def _differs(self, pages: np.ndarray[Any, Any], start: int, stop: int) -> bool:
        """Whether a part differs from what the servers have; it can if one of these pages is in it."""
        first, last = np.searchsorted(pages, [start - _PAGE_BYTES + 1, stop])
        mine = np.frombuffer(self._private, np.uint8)[start:stop]
        return bool(first < last) and not np.array_equal(mine, self._servers.bytes[start:stop])

    def rejoin(self) -> None:
        """Let all parameters be what the servers have."""
        for page in self._written().tolist():
            self._private.madvise(mmap.MADV_DONTNEED, page * _PAGE_BYTES, _PAGE_BYTES)
        for each, offset in zip(self._parameters.values(), self._offsets, strict=True):
            if not self._lies_at(each, offset):
                self._lay(each, offset)

    def _lies_at(self, parameter: torch.Tensor, offset: int) -> bool:
        if not parameter.numel():
            return True
        return parameter.data_ptr() == self._address + offset and parameter.is_contiguous()

    def _written(self) -> np.ndarray[Any, Any]:
        """Return the numbers of the pages that this process has written."""
        entries = np.empty(len(self._private) // _PAGE_BYTES, np.uint64)
        with open(_PAGEMAP, "rb") as pagemap:
            pagemap.seek(self._address // _PAGE_BYTES * entries.itemsize)
            if pagemap.readinto(entries.data) != entries.nbytes:
                raise OSError(errno.EIO, "fewer entries than pages", _PAGEMAP)
        return np.flatnonzero((entries & (_PRESENT | _SWAPPED) != 0) & (entries & _SHARED == 0))

    def note_update(self) -> None:
        """Tell autograd that the servers have changed the parameters."""
        torch.autograd.graph.increment_version(list(self._parameters.values()))

    def release(self) -> None:
        """Make the parameters ordinary tensors, with their present values."""
        for each in self._parameters.values():
            each.data = each.data.clone()
        if self._close is not None:
            self._close()


_OTHER = (
    "parameter {name!r} is shared with all processes of this host as {dtype}, and is {now} now: convert the "
    "model before DistributedOptimizer is made, or pass share_weights=False"
)


def all_can_share(kv: KVStore, parameters: Mapping[str, torch.nn.Parameter], others: Meeting) -> bool:
    """Return whether no worker has a reason not to share. Every worker calls it."""
    return not any(others.numbers(bool(_why_not(kv, parameters))))


def _why_not(kv: KVStore, parameters: Mapping[str, torch.nn.Parameter]) -> str:
    reason = kv._why_no_sharing
    if reason:
        return f"{kv!r} cannot share its values: {reason}"
    if not os.access(_PAGEMAP, os.R_OK):
        return f"{_PAGEMAP} cannot be read here, which shows the pages that a script has written"
    for name, each in parameters.items():
        if not each.is_cpu or not each.is_contiguous():
            return (
                f"parameter {name!r} is on {each.device}, or its memory does not hold its elements in order"
            )
    return ""


def _agree(others: Meeting, reason: str) -> None:
    """Raise on all workers if one has a reason not to share."""
    ranks: Sequence[int] = [rank for rank, flag in enumerate(others.numbers(bool(reason))) if flag]
    if ranks:
        told = reason or f"worker {ranks[0]} says why"
        raise NotSupported(f"share_weights=True is not possible here: {told}; pass share_weights=False")
