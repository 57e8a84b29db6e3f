"""Decides which server holds which part of which value. The only such rule; nothing here imports torch.

A value of at most `bound_bytes`, and every value that must stay whole, lives on one server: the one with the
fewest bytes so far, large values first. A larger value is cut evenly over all servers, and each server's part
into slices of at most `max_slice_bytes`. Cuts are at multiples of 64 elements, so that torch's vector loops
never see a tail inside a value: they process two vectors at a time, of 32 halves each with AVX-512, and round
the tail differently.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

CUT_ELEMS = 64
"""Number of elements of which every cut is at a multiple."""


@dataclass(frozen=True, slots=True)
class ValueSize:
    """The properties of a value that the rule needs. `sliceable`: its updater is elementwise."""

    num_elems: int
    itemsize_bytes: int
    sliceable: bool

    @property
    def size_bytes(self) -> int:
        """Size of the whole value."""
        return self.num_elems * self.itemsize_bytes


@dataclass(frozen=True, slots=True)
class Part:
    """Elements [start, stop) of a flattened value, on one server."""

    server: int
    start: int
    stop: int


def place(
    sizes: Sequence[ValueSize], load_bytes: Sequence[int], *, bound_bytes: int, max_slice_bytes: int
) -> list[list[Part]]:
    """Return the parts of each value, in element order.

    Args:
        sizes: the new values, in list order.
        load_bytes: the bytes each server holds already.
        bound_bytes: maximum size of a value that stays on one server; larger sliceable ones are cut over all.
        max_slice_bytes: maximum size of a slice of a sliceable value.
    """
    num_servers = len(load_bytes)
    load = list(load_bytes)
    lightest = [(size_bytes, server) for server, size_bytes in enumerate(load)]
    heapq.heapify(lightest)  # has one current pair per server; outdated ones are skipped
    parts: list[list[Part]] = [[] for _ in sizes]
    largest_first = sorted(range(len(sizes)), key=lambda index: -sizes[index].size_bytes)
    for index in largest_first:
        size = sizes[index]
        if size.sliceable and size.size_bytes > bound_bytes and num_servers > 1:
            ranges = _cut_evenly(size.num_elems, num_servers)
        else:
            while lightest[0][0] != load[lightest[0][1]]:
                heapq.heappop(lightest)
            server = lightest[0][1]
            ranges = [(server, 0, size.num_elems)]
        for server, start, stop in ranges:
            load[server] += (stop - start) * size.itemsize_bytes
            heapq.heappush(lightest, (load[server], server))
            parts[index] += _slices(server, start, stop, size, max_slice_bytes)
    return parts


def _cut_evenly(num_elems: int, num_servers: int) -> list[tuple[int, int, int]]:
    """Cut [0, num_elems) into one range per server; servers whose range is empty get none."""
    cuts = [num_elems * i // num_servers // CUT_ELEMS * CUT_ELEMS for i in range(num_servers)] + [num_elems]
    return [(i, cuts[i], cuts[i + 1]) for i in range(num_servers) if cuts[i + 1] > cuts[i]]


def _slices(server: int, start: int, stop: int, size: ValueSize, max_slice_bytes: int) -> list[Part]:
    step = max(max_slice_bytes // size.itemsize_bytes // CUT_ELEMS * CUT_ELEMS, CUT_ELEMS)
    if not size.sliceable or stop - start <= step:
        return [Part(server, start, stop)]
    return [Part(server, low, min(low + step, stop)) for low in range(start, stop, step)]
