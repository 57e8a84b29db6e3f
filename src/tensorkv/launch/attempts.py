"""Rounds: how the workers of one attempt of a job find each other through the store of their launcher.

RULES
1. Rank 0 names a round: it announces a new random name. Nothing else tells attempts apart: torchrun's
   agents do not agree on the restart count, and their store outlives each attempt, with everything that
   earlier attempts have written.
2. A round writes under its own name. A worker of a new attempt may still find the previous name announced;
   then it finds the scheduler of that round gone, or its job over, and looks again.
3. Workers enlist, so that rank 0 can count the hosts: the worker with LOCAL_RANK 0 represents its host. All
   hosts are known when their workers, LOCAL_WORLD_SIZE each, add up to the job.

Anybody can write to the store: nothing in it is trusted, and no token passes through it.
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
"""Maximum number of entries read in a round, since anybody can write to the store."""

_NAME = re.compile(r"[0-9a-f]{32}")


class Store(Protocol):
    """The part of torch's TCPStore that is used here."""

    def set(self, key: str, value: str) -> None:
        """Set the value of a key."""

    def get(self, key: str) -> bytes:
        """Return the value of a key."""

    def check(self, keys: list[str]) -> bool:
        """Whether all of these keys exist."""

    def add(self, key: str, amount: int) -> int:
        """Add to a counter, which starts at 0, and return the sum."""

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Write if the value is `expected`, or there is none and `expected` is ""; return the value then."""


class Enlisted(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A worker that has enlisted, and what it knows of its host."""

    rank: int
    num_workers: int
    local_rank: int
    local_workers: int


@final
@dataclass(frozen=True, slots=True)
class Board:
    """The part of a store in which rounds are announced. Errors of the store pass through.

    Raises:
        PeerLostError: the store holds something that TensorKV has not written.
    """

    store: Store
    prefix: str

    def current(self) -> str:
        """Return the name of the round announced last, "" if there is none."""
        key = f"{self.prefix}/round"
        if not self.store.check([key]):
            return ""
        name = self.store.get(key).decode("ascii", "replace")
        if not _NAME.fullmatch(name):
            raise self._foreign(key)
        return name

    def announce(self, instead_of: str) -> str:
        """Announce a new round and return its name; "" if another was announced meanwhile."""
        name = secrets.token_hex(16)
        found = self.store.compare_set(f"{self.prefix}/round", instead_of, name)
        return name if found == name.encode() else ""

    def enlist(self, name: str, worker: Enlisted) -> None:
        """Register a worker with rank 0 of this round. Idempotent."""
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
        """Publish where the job of a round is."""
        self.store.set(f"{self.prefix}/{name}/job", msgspec.json.encode(record).decode())

    def read(self, name: str) -> JobRecord | None:
        """Return where the job of a round is, None while that is unknown."""
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
    """Return the rank that represents each host, in order; None while there may be more hosts."""
    by_rank = {each.rank: each for each in enlisted}
    first = {rank: each.local_workers for rank, each in by_rank.items() if each.local_rank == 0}
    if sum(first.values()) < num_workers and len(by_rank) < num_workers:
        return None
    return sorted(first) or [0]
