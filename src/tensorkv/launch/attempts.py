"""Rounds: what the workers of one attempt of a job tell each other through the store of their launcher.

RULES
1. A round is named by rank 0, which announces a new random name. Nothing else tells attempts apart:
   agents of torchrun do not agree on the restart count, and their store, with all that the attempts
   before have written, outlives each of them.
2. What a round writes stands under its name. A worker of a new attempt may still find the last one's
   name announced; it finds the scheduler of that round gone, or over, and looks again.
3. Hosts are counted by enlisting: a worker with LOCAL_RANK 0 stands for its host. All hosts are known
   when the workers that they speak of, LOCAL_WORLD_SIZE each, make up the job.

What the store holds may come from anybody: nothing of it is trusted, and no token passes through it.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import Any, Protocol, final

import msgspec

from tensorkv.errors import PeerLostError
from tensorkv.launch.sidecar import JobRecord

MAX_ENLISTED = 1 << 20
"""Maximum number of entries of a round that are read: anybody may write to the store."""

_NAME = re.compile(r"[0-9a-f]{32}")


class Store(Protocol):
    """What is used of torch's TCPStore."""

    def set(self, key: str, value: str) -> None:
        """Write, also over what is there."""

    def get(self, key: str) -> bytes:
        """Read what is there."""

    def check(self, keys: list[str]) -> bool:
        """Whether all of these are there."""

    def add(self, key: str, amount: int) -> int:
        """Count up, from 0, and return the sum."""

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Write if `expected` is there, or nothing and it is ""; return what is there then."""


class Enlisted(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A worker that is there, and what it knows of its host."""

    rank: int
    num_workers: int
    local_rank: int
    local_workers: int


@final
@dataclass(frozen=True, slots=True)
class Board:
    """Where rounds are announced: a part of a store. Errors of the store pass through.

    Raises:
        PeerLostError: what stands there is not of TensorKV.
    """

    store: Store
    prefix: str

    def current(self) -> str:
        """Return the name of the round that was announced last, "" if none was."""
        key = f"{self.prefix}/round"
        if not self.store.check([key]):
            return ""
        name = self.store.get(key).decode("ascii", "replace")
        if not _NAME.fullmatch(name):
            raise self._foreign(key)
        return name

    def announce(self, instead_of: str) -> str:
        """Announce a new round, and return its name; "" if another one was announced meanwhile."""
        name = secrets.token_hex(16)
        found = self.store.compare_set(f"{self.prefix}/round", instead_of, name)
        return name if found == name.encode() else ""

    def enlist(self, name: str, worker: Enlisted) -> None:
        """Tell rank 0 of this round of a worker that is there. More than once does no harm."""
        number = self.store.add(f"{self.prefix}/{name}/enlisted", 1)
        self.store.set(f"{self.prefix}/{name}/enlisted/{number}", msgspec.json.encode(worker).decode())

    def enlisted(self, name: str, known: dict[int, Enlisted]) -> None:
        """Add to `known`, by number, the workers that have enlisted since."""
        count = self.store.add(f"{self.prefix}/{name}/enlisted", 0)
        if not 0 <= count <= MAX_ENLISTED:
            raise self._foreign(f"{self.prefix}/{name}/enlisted")
        for number in range(1, count + 1):
            key = f"{self.prefix}/{name}/enlisted/{number}"
            if number not in known and self.store.check([key]):
                known[number] = self._decode(key, Enlisted)

    def tell(self, name: str, record: JobRecord) -> None:
        """Tell everybody where the job of a round is."""
        self.store.set(f"{self.prefix}/{name}/job", msgspec.json.encode(record).decode())

    def read(self, name: str) -> JobRecord | None:
        """Return where the job of a round is, None while that is not known."""
        key = f"{self.prefix}/{name}/job"
        return self._decode(key, JobRecord) if self.store.check([key]) else None

    def _decode(self, key: str, kind: type[Any]) -> Any:
        try:
            return msgspec.json.decode(self.store.get(key), type=kind)
        except msgspec.DecodeError as exc:
            raise self._foreign(key) from exc

    def _foreign(self, key: str) -> PeerLostError:
        return PeerLostError(f"what torch's TCPStore holds under {key!r} is not of TensorKV")


def hosts(enlisted: list[Enlisted], num_workers: int) -> list[int] | None:
    """Return the rank that stands for each host, in order; None while there may be more hosts."""
    by_rank = {each.rank: each for each in enlisted}
    first = {rank: each.local_workers for rank, each in by_rank.items() if each.local_rank == 0}
    if sum(first.values()) < num_workers and len(by_rank) < num_workers:
        return None
    return sorted(first) or [0]
