"""A server without threads and sockets: messages in, messages out, and memory that tells of misuse."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import pytest
import torch

from tensorkv.arrays import bytes_of, dtype_name
from tensorkv.checkpoint.records import FileRecord, KeyRecord, PieceRecord, TensorRecord
from tensorkv.checkpoint.slices import SliceState, assemble, records_of
from tensorkv.errors import TensorKVError, from_wire
from tensorkv.plain import Key
from tensorkv.scheduler.catalog import CommitReduction
from tensorkv.server.checkpoint import StateFiles
from tensorkv.server.memory import Memory
from tensorkv.server.shard import Outgoing
from tensorkv.server.state import ServerState
from tensorkv.updaters.base import Updater
from tensorkv.updaters.settings import build
from tensorkv.updaters.spec import UpdaterSpec
from tensorkv.wire import messages as m

STORE = 1


class CheckedPool:
    """A BufferPool that knows what is out, and spoils what is given back: who still reads it gets NaN."""

    def __init__(self) -> None:
        self.out: dict[int, Memory] = {}

    def take(self, size_bytes: int) -> Memory:
        buffer = Memory(torch.zeros(size_bytes + 16, dtype=torch.uint8))
        self.out[id(buffer)] = buffer
        return buffer

    def give(self, buffer: Memory) -> None:
        assert self.out.pop(id(buffer), None) is buffer, "a buffer was given back that was not out"
        buffer.tensor.fill_(255)


class MemoryFiles(StateFiles):
    """The files of saves, in a dict."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}  # by what a record calls `stored`

    def write(
        self, folder: str, name: str, slices: Sequence[tuple[Key, int, int, SliceState]]
    ) -> tuple[FileRecord, list[PieceRecord]]:
        pieces: list[PieceRecord] = []
        for key, start, stop, each in slices:
            records, tensors, plain = records_of(each)
            stored = [
                msgspec.structs.replace(record, stored=f"{folder}/{name}/{key}[{start}]/{record.name}")
                for record in records
            ]
            for record, tensor in zip(stored, tensors, strict=True):
                self.tensors[record.stored] = tensor.clone()
            pieces.append(PieceRecord(start, stop, each.version, stored, plain, name))
        return FileRecord(len(self.tensors)), pieces

    def check(self, folder: str, files: Mapping[str, FileRecord]) -> None:
        """A dict is as it was."""

    @contextlib.contextmanager
    def open(self, folder: str) -> Iterator[MemoryFiles]:
        yield self

    def load(self, record: KeyRecord, start: int, stop: int) -> SliceState:
        def fetch(piece: int, tensor: TensorRecord, low: int, high: int) -> torch.Tensor:
            return self.tensors[tensor.stored].view(-1)[low:high]

        return assemble(record, start, stop, fetch)


def payload_of(tensors: Sequence[torch.Tensor], buffer: Memory) -> int:
    """Write the bytes of tensors one after the other into a buffer; return how many they are."""
    low = 0
    for tensor in tensors:
        data = bytes_of(tensor.contiguous())
        buffer.bytes[low : low + len(data)] = data
        low += len(data)
    return low


class Bench:
    """One server and its workers. Every call returns what the server sends in answer."""

    def __init__(
        self,
        num_workers: int = 2,
        *,
        policy: str = "sync",
        mean: bool = False,
        functions: dict[str, Callable[..., None]] | None = None,
        workers: Sequence[int] | None = None,
        max_payload_bytes: int = 1 << 62,
        **options: Any,
    ) -> None:
        self.pool = CheckedPool()
        self.functions = functions or {}
        self.files = MemoryFiles()
        self.state = ServerState(num_workers, self.pool, self._load, self.files, max_payload_bytes)  # type: ignore[arg-type]
        self.requests = itertools.count(1)
        self.ids = itertools.count(1)
        self.numbers = itertools.count(1)  # of plans
        self.plans: dict[int, tuple[int, list[m.ChunkEntry]]] = {}
        self.settings = itertools.count(0)
        spec = m.StorePolicy(policy, **options)  # type: ignore[arg-type]
        for worker in range(num_workers) if workers is None else workers:
            self.state.handle(worker, m.OpenStore(STORE, "default", spec, mean))

    def _load(self, record: m.SettingRecord) -> Updater:
        assert record.updater is not None
        code: Any = self.functions.get(record.updater.name)
        if record.updater.type == "optimizer":
            code = getattr(torch.optim, record.updater.name.rpartition(":")[2])
        return build(record.updater, code)

    def send(self, worker: int, message: Any, tensors: Sequence[torch.Tensor] = ()) -> list[Outgoing]:
        """Hand over a message as the server's receiving thread does."""
        expected = self.state.payload_bytes(worker, message)
        if not isinstance(message, (m.Push, m.Put, m.InitSlices, m.RestoreSlice)):
            assert expected == 0
            return self.state.handle(worker, message)
        buffer = self.pool.take(expected)
        size_bytes = payload_of(tensors, buffer)
        assert size_bytes == expected
        is_push = isinstance(message, m.Push)
        try:
            return self.state.handle(
                worker, message, buffer if is_push else Memory(buffer.tensor[:size_bytes].clone())
            )
        except BaseException:
            is_push = False  # refused: it is still the caller's
            raise
        finally:
            if not is_push:
                self.pool.give(buffer)

    def init(self, key: Key, value: torch.Tensor, *cuts: int, worker: int = 0) -> list[int]:
        """Create a key in slices; return their ids."""
        bounds = [0, *cuts, value.numel()]
        entries = [m.SliceEntry(next(self.ids), 0, low, high) for low, high in itertools.pairwise(bounds)]
        message = m.InitSlices(
            next(self.requests), STORE, key, tuple(value.shape), dtype_name(value.dtype), entries
        )
        out = self.send(worker, message, [value.reshape(-1)])
        assert [type(each.message) for each in out] == [m.Done]
        return [each.slice_id for each in entries]

    def define(self, worker: int, *chunks: m.ChunkEntry) -> int:
        """Define a plan; return its number."""
        number = next(self.numbers)
        self.plans[number] = (worker, list(chunks))
        assert self.state.handle(worker, m.DefinePlan(STORE, number, list(chunks))) == []
        return number

    def push(
        self,
        worker: int,
        plan: int,
        *tensors: torch.Tensor,
        apply: bool = True,
        reply: int = 0,
        chunk: int = 0,
        weight: float | None = None,
    ) -> list[Outgoing]:
        """Push one chunk of a plan."""
        return self.send(worker, m.Push(plan, chunk, apply, reply, None, weight), tensors)

    def put(self, worker: int, plan: int, *tensors: torch.Tensor) -> list[Outgoing]:
        """Put the first chunk of a plan."""
        return self.send(worker, m.Put(plan, 0, next(self.requests)), tensors)

    def pull(self, worker: int, plan: int) -> list[Outgoing]:
        """Ask for the values of a plan."""
        return self.send(worker, m.Pull(plan, next(self.requests)))

    def value(self, worker: int, plan: int) -> torch.Tensor:
        """Return the values of a one-chunk plan, which must be there at once, flat and in one tensor."""
        (out,) = self.pull(worker, plan)
        assert isinstance(out.message, m.Data)
        value = torch.cat([each.tensor.reshape(-1) for each in out.payload])
        settle([out])
        return value

    def set_updater(self, worker: int, spec: UpdaterSpec, keys: tuple[Key, ...] | None = None) -> None:
        """Make a setting, all of it at once."""
        self.setting(worker, m.SettingRecord(keys, updater=spec))

    def setting(self, worker: int, record: m.SettingRecord) -> None:
        """Prepare and activate a setting."""
        number = next(self.settings)
        prepared = self.send(worker, m.PrepareSetting(next(self.requests), STORE, number, record))
        assert [type(each.message) for each in prepared] == [m.Done], prepared
        assert self.send(worker, m.ActivateSetting(STORE, number)) == []

    def commit(self, worker: int, **arguments: Any) -> list[Outgoing]:
        """Ask for a commit."""
        message = {"max_norm": None, "skip": False, "check_finite": False, "apply": True, **arguments}
        return self.send(worker, m.Commit(next(self.requests), STORE, **message))

    def decide(self, ready: m.CommitReady) -> list[Outgoing]:
        """Decide as the scheduler of a job with one server does."""
        decision = CommitReduction(1).add(0, ready)
        assert decision is not None
        return self.state.decide_commit(decision)

    def tick(self, now_s: float) -> tuple[list[Outgoing], float | None]:
        """Say what time it is; return what the server sends, and its next deadline."""
        return self.state.tick(now_s)

    def info(self, worker: int, ids: Sequence[int]) -> m.Info:
        """Return rounds and versions of slices."""
        (out,) = self.send(worker, m.AskInfo(next(self.requests), STORE, list(ids)))
        assert isinstance(out.message, m.Info)
        return out.message

    def delete(self, worker: int, key: Key, ids: Sequence[int]) -> list[Outgoing]:
        """Let a worker delete the slices of a key, after it has dropped its plans that name them."""
        for plan, (owner, chunks) in list(self.plans.items()):
            if owner == worker and any(not set(ids).isdisjoint(chunk.slice_ids) for chunk in chunks):
                assert self.send(worker, m.DropPlan(plan)) == []
                del self.plans[plan]
        return self.send(worker, m.DeleteSlices(next(self.requests), STORE, list(ids)))

    def leave(self, worker: int) -> list[Outgoing]:
        """Let a worker leave the store."""
        return self.send(worker, m.Leave(next(self.requests), STORE))

    @property
    def shard(self) -> Any:
        """The store's insides, to see that nothing is left in them."""
        return self.state._stores[STORE]

    def check_empty(self) -> None:
        """Fail if a buffer, a contribution or a waiting call is left."""
        assert self.pool.out == {}
        for name in ("_to_commit", "_replies", "_waits", "_merge_waits"):
            assert not getattr(self.shard, name), name
        assert all(each.cohort.at_rest for each in self.shard.slices)


def settle(out: Sequence[Outgoing]) -> None:
    """The payloads have been sent: give the leases back, as the server does."""
    for each in out:
        for lease in each.leases:
            lease.readers -= 1


def dense(
    ids: Sequence[int],
    lengths: Sequence[int],
    dtype: str = "float32",
    counts: Sequence[int] | None = None,
) -> m.ChunkEntry:
    """Return a chunk that carries values."""
    return m.ChunkEntry(
        list(ids), list(lengths), m.PayloadDescriptor("dense", dtype), list(counts or [1] * len(ids))
    )


def absent(ids: Sequence[int], lengths: Sequence[int], dtype: str = "float32") -> m.ChunkEntry:
    """Return a chunk without bytes."""
    return m.ChunkEntry(list(ids), list(lengths), m.PayloadDescriptor("absent", dtype), [0] * len(ids))


def error_of(message: Any) -> TensorKVError:
    """Return the error that a Failed or Fault carries."""
    return from_wire(message.name, message.text)


class Tools:
    """What the tests of this folder share."""

    Bench = Bench
    CheckedPool = CheckedPool
    MemoryFiles = MemoryFiles
    settle = staticmethod(settle)
    dense = staticmethod(dense)
    absent = staticmethod(absent)
    error_of = staticmethod(error_of)


@pytest.fixture(scope="session")
def t() -> type[Tools]:
    """The tools, under a short name."""
    return Tools
