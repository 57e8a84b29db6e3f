"""ServerState: all stores of one server, what each message does to them, and how long its payload must be."""

from __future__ import annotations

from typing import Any, final

from tensorkv.errors import MemoryLimitReached, ProtocolError, TensorKVError, to_wire
from tensorkv.peer.code import LoadUpdater
from tensorkv.server import checkpoint
from tensorkv.server.checkpoint import StateFiles
from tensorkv.server.layouts import Chunk
from tensorkv.server.memory import EMPTY, BufferPool, Memory, NoMemory, no_memory, short_of
from tensorkv.server.shard import Outgoing, StoreShard
from tensorkv.server.slots import Allocate, allocate_private
from tensorkv.wire import messages as m
from tensorkv.wire.validate import check_slice, sent_dtype, sent_size

MAX_STORES = 4096
"""Maximum number of stores that are open at one time."""


_ANSWERED = (*m.REPLIES, m.AskSlice, m.WaitMerged, m.Pull)
"""Requests; a refused one gets the reply Failed."""


@final
class ServerState:
    """The stores that a server serves. One thread at a time.

    A payload of more than `max_payload_bytes` is refused before memory is allocated for it. `allocate`
    returns the memory of values.
    """

    def __init__(
        self,
        num_workers: int,
        pool: BufferPool,
        load_updater: LoadUpdater,
        files: StateFiles,
        max_payload_bytes: int = 1 << 62,
        allocate: Allocate = allocate_private,
        error_of: NoMemory = no_memory,
    ) -> None:
        self._num_workers = num_workers
        self._max_payload_bytes = max_payload_bytes
        self._pool = pool
        self._allocate = allocate
        self._no_memory = error_of
        self._load_updater = load_updater
        self._files = files
        self._stores: dict[int, StoreShard] = {}
        self.timed: list[StoreShard] = []  # those that `tick` concerns
        self._store_of_plan: dict[tuple[int, int], StoreShard] = {}
        self._gone: set[int] = set()
        self._asked: Any = None  # the message whose chunk was looked up last
        self._found: tuple[StoreShard, Chunk] | None = None  # its result

    def payload_bytes(self, worker: int, message: Any) -> int:
        """Return how many payload bytes `message` must carry, before any memory is allocated for them.

        Raises:
            ProtocolError: the message names something this worker has not defined.
        """
        kind = type(message)
        if kind is m.Push:  # the messages of every step come first
            return self._find(worker, message)[1].payload_bytes
        if kind is m.Pull:
            return 0
        match message:
            case m.Put():
                return self._find(worker, message)[1].payload_bytes
            case m.RestoreSlice():
                return _restored_bytes(message, self._max_payload_bytes)
            case m.InitSlices():
                return self._init_bytes(message)
            case _:
                return 0

    def _init_bytes(self, message: m.InitSlices) -> int:
        itemsize = sent_dtype(message.dtype).itemsize
        whole, low = sent_size(message.shape), 0
        for entry in message.slices:  # must ascend, so that no element occurs twice
            if not low <= entry.start <= entry.stop <= whole:
                raise ProtocolError(f"slice [{entry.start}, {entry.stop}) of {whole} elements, after {low}")
            low = entry.stop
        size_bytes = sum(entry.stop - entry.start for entry in message.slices) * itemsize
        if size_bytes > self._max_payload_bytes:
            raise ProtocolError(
                f"an init of {size_bytes} bytes is over the {self._max_payload_bytes} that this server has"
            )
        return size_bytes

    def handle(
        self,
        worker: int,
        message: Any,
        payload: Memory = EMPTY,
        refused: MemoryLimitReached | None = None,
    ) -> list[Outgoing]:
        """Process a worker's message, and return the messages to send, in order.

        The store owns the payload of a push from now on, unless the push is refused. `refused` says that
        there was no memory for the payload.

        Raises:
            ProtocolError: the worker has broken the protocol; a push, put, plan or init had no effect.
        """
        kind = type(message)
        if kind is m.Push:  # the messages of every step come first
            found = self._found if message is self._asked else None
            shard, chunk = found or self._find(worker, message)
            shard.push(worker, message, chunk, payload, refused)
            out, shard.out = shard.out, []
            return out
        if kind is m.OpenStore:
            self._open(message)
            return []
        shard = self._plan(worker, message.plan) if kind is m.Pull else self._shard(worker, message)
        try:
            if refused is not None:
                raise refused
            if kind is m.Pull:
                shard.pull(worker, message)
            else:
                self._dispatch(shard, worker, message, payload)
        except ProtocolError:
            raise
        except TensorKVError as error:
            shard.out.append(Outgoing(worker, m.Failed(message.request, *to_wire(error))))
        except (MemoryError, RuntimeError, OSError) as exc:
            short = short_of(exc, f"a message {type(message).__name__}", self._no_memory)
            if short is None or type(message) not in _ANSWERED:
                raise
            shard.out.append(Outgoing(worker, m.Failed(message.request, *to_wire(short))))
        out, shard.out = shard.out, []
        return out

    def _open(self, message: m.OpenStore) -> None:
        shard = self._stores.get(message.store)
        if shard is not None:
            if (shard.opened.policy, shard.opened.mean) != (message.policy, message.mean):
                raise ProtocolError(f"store {message.store} is open with another policy or reduction")
            return
        if len(self._stores) >= MAX_STORES:
            raise ProtocolError(f"there are {MAX_STORES} stores already")
        shard = StoreShard(
            message,
            self._num_workers,
            self._pool,
            self._load_updater,
            self._max_payload_bytes,
            self._allocate,
            self._no_memory,
        )
        for gone in self._gone:
            shard.leave(gone)
        self._stores[message.store] = shard
        if shard.is_timed:
            self.timed.append(shard)

    def _dispatch(self, shard: StoreShard, worker: int, message: Any, payload: Memory) -> None:
        match message:
            case m.Put():
                shard.put(worker, message, payload)
            case m.DefinePlan():
                if (worker, message.plan) in self._store_of_plan:
                    raise ProtocolError(f"worker {worker} has defined plan {message.plan} already")
                shard.plans.define(worker, message)
                self._store_of_plan[worker, message.plan] = shard
            case m.DropPlan():
                shard.plans.drop(worker, message.plan)
                self._asked = self._found = None
                del self._store_of_plan[worker, message.plan]
            case m.WaitMerged():
                shard.wait_merged(worker, message)
            case m.Commit():
                shard.commit(worker, message)
            case m.ChangeOptions():
                shard.change_options(worker, message)
            case m.InitSlices():
                shard.init_slices(worker, message, payload)
            case m.PlaceSlices():
                shard.place_slices(worker, message, payload)
            case m.PrepareSetting():
                shard.prepare_setting(worker, message)
            case m.ActivateSetting():
                shard.activate_setting(worker, message)
            case m.DeleteSlices():
                shard.delete_slices(worker, message)
            case m.DropSlices():
                shard.drop_slices(worker, message)
            case m.Flush():
                shard.flush(worker, message)
            case m.AskInfo():
                shard.info(worker, message)
            case m.AskWaiting():
                shard.waiting(worker, message)
            case m.SaveSlices():
                checkpoint.save_slices(shard, self._files, worker, message)
            case m.AskSlice():
                checkpoint.ask_slice(shard, worker, message)
            case m.AskSettings():
                checkpoint.ask_settings(shard, worker, message)
            case m.BeginSave():
                checkpoint.begin_save(shard, worker, message)
            case m.EndSave():
                shard.end_save(worker)
            case m.PrepareRestore():
                checkpoint.prepare_restore(shard, worker, message)
            case m.LoadSlices():
                checkpoint.load_slices(shard, self._files, worker, message)
            case m.RestoreSlice():
                checkpoint.restore_slice(shard, worker, message, payload)
            case m.FinishRestore():
                checkpoint.finish_restore(shard, worker, message)
            case m.Leave():
                self._leave(shard, worker)
                shard.out.append(Outgoing(worker, m.Done(message.request)))

    def tick(self, now_s: float) -> tuple[list[Outgoing], float | None]:
        """Merge the rounds whose deadline has passed; return messages to send, and the next deadline.

        `now_s` is of a clock that never goes back; None says that there is no deadline. Without `timed`
        stores there is nothing to do.
        """
        out: list[Outgoing] = []
        deadlines: list[float] = []
        for shard in self.timed:
            due_s = shard.tick(now_s)
            deadlines += [] if due_s is None else [due_s]
            out += shard.out
            shard.out = []
        return out, min(deadlines, default=None)

    def worker_lost(self, lost: m.WorkerLost) -> list[Outgoing]:
        """Handle a lost worker while the job goes on: its complete messages count, and no more come.

        The keys that it was about to create are dropped.
        """
        out = self.worker_gone(lost.rank)
        for store, slice_ids in lost.dropped:
            shard = self._stores.get(store)
            if shard is not None:
                shard.drop(slice_ids)
                out += shard.out
                shard.out = []
        return out

    def is_gone(self, worker: int) -> bool:
        """Whether a worker has left the job, or is lost."""
        return worker in self._gone

    def worker_gone(self, worker: int) -> list[Outgoing]:
        """A worker has left the job: it leaves every store, also those that it never opened."""
        self._gone.add(worker)
        out: list[Outgoing] = []
        for shard in list(self._stores.values()):
            if not shard.has_left(worker):
                self._leave(shard, worker)
                out += shard.out
                shard.out = []
        return out

    def _leave(self, shard: StoreShard, worker: int) -> None:
        for name in shard.leave(worker):
            del self._store_of_plan[name]
        self._asked = self._found = None  # its memory may be that of a key that nobody needs any more
        if shard.is_over:
            del self._stores[shard.opened.store]
            self.timed = [each for each in self.timed if each is not shard]

    def report(self) -> list[str]:
        """Return which workers the open rounds of each store wait for, a line per key and round."""
        return [
            f"store {shard.opened.name!r}: {line}"
            for shard in list(self._stores.values())
            for line in shard.report()
        ]

    def decide_commit(self, decision: m.CommitDecision) -> list[Outgoing]:
        """Carry out the scheduler's decision on a commit."""
        shard = self._stores.get(decision.store)
        if shard is None:
            return []
        shard.decide_commit(decision)
        out, shard.out = shard.out, []
        return out

    def _shard(self, worker: int, message: Any) -> StoreShard:
        if isinstance(message, (m.Put, m.DropPlan, m.WaitMerged)):
            return self._plan(worker, message.plan)
        shard = self._stores.get(message.store)
        if shard is None:
            raise ProtocolError(f"store {message.store} is not open")
        if shard.has_left(worker):
            raise ProtocolError(f"worker {worker} has left store {message.store}")
        return shard

    def _find(self, worker: int, message: m.Push | m.Put) -> tuple[StoreShard, Chunk]:
        """Return the chunk that a message names, and its store.

        It is looked up twice: before memory is allocated for the payload, and when that is complete.
        """
        if message is not self._asked or self._found is None:
            shard = self._store_of_plan.get((worker, message.plan)) or self._plan(worker, message.plan)
            self._found = shard, shard.plans.chunk(worker, message.plan, message.chunk)
            self._asked = message
        return self._found

    def _plan(self, worker: int, plan: int) -> StoreShard:
        shard = self._store_of_plan.get((worker, plan))
        if shard is None:
            raise ProtocolError(f"worker {worker} has not defined plan {plan}")
        return shard


def _restored_bytes(message: m.RestoreSlice, max_payload_bytes: int) -> int:
    """Return the payload size of a slice with its state, after checking the sizes of its tensors."""
    entry = message.entry
    size_bytes = check_slice(
        entry.start, entry.stop, message.shape, message.version, message.tensors, message.plain
    )
    if size_bytes > max_payload_bytes:
        raise ProtocolError(f"a slice of {size_bytes} bytes is over {max_payload_bytes}")
    return size_bytes
