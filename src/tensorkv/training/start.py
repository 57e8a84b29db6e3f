"""The same start on every worker: models that differ are refused, and values become rank 0's."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import final

import torch

from tensorkv.errors import SettingMismatch, UsageError
from tensorkv.keys import ABSENT
from tensorkv.store import KVStore

MAX_TEXT_BYTES = 4096
"""Maximum length of the text about the first difference."""

BATCH_BYTES = 256 << 20
"""Size of the values that are shared at once. The servers hold them meanwhile."""


NUM_DIGESTS = 2
"""Number of the digests of a text."""

_MAX_DIGEST = 1 << 22
"""Digests are less than this: sums of them over many workers are exact in float64."""


def digests(text: str) -> torch.Tensor:
    """Return digests that are equal on all workers if, and almost only if, their means are.

    The mean of others may be that of one worker by chance, so there are two.
    """
    found = hashlib.blake2b(text.encode(errors="backslashreplace"), digest_size=8).digest()
    halves = [int.from_bytes(half) % _MAX_DIGEST for half in (found[:4], found[4:])]
    return torch.tensor(halves, dtype=torch.float64, device="cpu")


@final
class Meeting:
    """The workers of a store, who compare what they have and take over what rank 0 has. Every worker calls
    all."""

    def __init__(self, kv: KVStore) -> None:
        self._kv = kv
        self._num_calls = 0

    def check_alike(self, what: str, lines: Sequence[str]) -> None:
        """Raise on every worker if one of them has other lines than rank 0.

        Args:
            what: whose lines they are, for the text.
            lines: the description, a line for each part.

        Raises:
            SettingMismatch: with the first difference that the lowest differing rank has found.
        """
        kv = self._kv
        if kv.num_workers == 1:
            return
        text = "\n".join(lines).encode()
        theirs = self._from_rank_0(text)
        difference = "" if theirs == text else _difference(what, kv.rank, lines, theirs.decode().split("\n"))
        differing = self._sum_of_ones(bool(difference))
        if not differing.any():
            return
        lowest = int(differing.argmax())
        raise SettingMismatch(self._text_of(lowest, difference))

    def union(self, names: Sequence[str], mine: Sequence[str]) -> list[str]:
        """Return which of the names that all workers know some worker has passed as `mine`."""
        kv, key, chosen = self._kv, self._name("names"), set(mine)
        flags = torch.tensor([float(name in chosen) for name in names], device="cpu")
        if kv.num_workers > 1 and len(names):
            kv.init(key, torch.zeros_like(flags))
            kv.pushpull(key, flags, out=flags)
        return [name for name, flag in zip(names, flags.tolist(), strict=True) if flag]

    def numbers(self, mine: float) -> list[float]:
        """Return the number of each worker, by rank."""
        kv, key = self._kv, self._name("numbers")
        all_ = torch.zeros(kv.num_workers, dtype=torch.float64, device="cpu")
        kv.init(key, all_)
        all_[kv.rank] = mine
        kv.pushpull(key, all_, out=all_)
        found: list[float] = all_.tolist()
        return found

    def text_of_rank_0(self, mine: str) -> str:
        """Return the text that rank 0 has passed; "" if it has left."""
        return self._from_rank_0(mine.encode()).rstrip(b"\0").decode()

    def share(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Overwrite tensors by those of rank 0, under the same names. The workers have agreed on these."""
        kv = self._kv
        if kv.num_workers == 1:
            return
        for batch in _batches(tensors):
            names = [self._name(name) for name in batch]
            values = [tensors[name].detach() for name in batch]
            kv.broadcast(names, values, out=values)
            kv.delete(names)

    def _from_rank_0(self, data: bytes) -> bytes:
        length = int(self._broadcast(torch.tensor([len(data)], device="cpu")))
        mine = data if len(data) == length else bytes(length)  # rank 0's counts, or the lowest that is there
        return bytes(self._broadcast(_as_tensor(mine)).tolist())

    def _broadcast(self, value: torch.Tensor) -> torch.Tensor:
        found = self._kv.broadcast(self._name("broadcast"), value)
        assert isinstance(found, torch.Tensor)
        return found

    def _sum_of_ones(self, mine: bool) -> torch.Tensor:
        """Return for each rank whether it has called with True."""
        kv, name = self._kv, self._name("flags")
        flags = torch.zeros(kv.num_workers, dtype=torch.int64, device="cpu")
        kv.init(name, flags)
        flags[kv.rank] = mine
        found = kv.pushpull(name, flags)
        assert isinstance(found, torch.Tensor)
        return found

    def _text_of(self, rank: int, text: str) -> str:
        """Return the text of one rank."""
        kv, name = self._kv, self._name("text")
        data = text.encode()[:MAX_TEXT_BYTES].ljust(MAX_TEXT_BYTES, b"\0")
        kv.init(name, _as_tensor(bytes(MAX_TEXT_BYTES)))
        found = kv.pushpull(name, _as_tensor(data) if kv.rank == rank else ABSENT)
        return bytes(found.tolist()).rstrip(b"\0").decode(errors="replace")

    def _name(self, name: str) -> str:
        """Return a key that no earlier call has used."""
        self._num_calls += 1
        return f"{self._num_calls}.{name}"


_num_meetings: weakref.WeakKeyDictionary[KVStore, int] = weakref.WeakKeyDictionary()
"""How often the workers of a store have met: as often on all of them."""


@contextmanager
def meeting(kv: KVStore) -> Iterator[Meeting]:
    """Let the workers of a store meet, in a store beside it that goes when all have left the block.

    Each meeting has a name of its own: a worker may come to the next one while another has not left yet.
    """
    number = _num_meetings[kv] = _num_meetings.get(kv, 0) + 1
    beside = kv._open_beside(f"{kv.name}.start.{number}")
    try:
        yield Meeting(beside)
    except UsageError:  # raised on all workers alike: none waits for another
        beside.close()
        raise
    beside.close()


def describe(name: str, tensor: torch.Tensor) -> str:
    """Return a line about a tensor of a model that must be alike on all workers."""
    shape = "x".join(map(str, tensor.shape)) or "a number"
    return f"{name}: {shape} of {tensor.dtype}, requires_grad={tensor.requires_grad}"


def _difference(what: str, rank: int, mine: Sequence[str], theirs: Sequence[str]) -> str:
    for number, (my, their) in enumerate(zip(mine, theirs, strict=False)):
        if my != their:
            return (
                f"the {what} of worker {rank} is not that of rank 0: part {number} is {my!r} there, and "
                f"{their!r} on rank 0; build the same on every worker, in the same order"
            )
    longer = max(mine, theirs, key=len)
    return (
        f"the {what} of worker {rank} is not that of rank 0: it has {len(mine)} parts, and {len(theirs)} on "
        f"rank 0; the first that only one has is {longer[min(len(mine), len(theirs))]!r}"
    )


def _batches(tensors: Mapping[str, torch.Tensor]) -> Iterable[list[str]]:
    batch: list[str] = []
    num_bytes = 0
    for name, tensor in tensors.items():
        if batch and num_bytes + tensor.nbytes > BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
        batch.append(name)
        num_bytes += tensor.nbytes
    if batch:
        yield batch


def _as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
