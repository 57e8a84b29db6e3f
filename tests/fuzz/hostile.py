"""Fuzzing a worker: its scheduler and servers are honest for a while, then send hostile frames.

The job has one worker and runs in this process. The real state machines make the frames for the worker, and
the fuzzer mutates them in flight; `meet` runs a program of many calls against that. Each call must end, with
a result or an error of the package, must not write outside the requested tensors, and no thread may die.

The servers may share memory with the worker. Then they also pass descriptors of wrong kinds and sizes, send
invalid places, and drop segments in use.
"""

from __future__ import annotations

import contextlib
import random
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, final

import msgspec
import torch
from frames import Mutator, framed
from hostilesharing import SEGMENT_BYTES, Descriptors

from tensorkv.checkpoint.records import FileRecord, SavedSettings
from tensorkv.config import JobConfig
from tensorkv.errors import ProtocolError, TensorKVError, WaitTimeout
from tensorkv.peer.code import updater_loader
from tensorkv.peer.handshake import accept, deadline_tick
from tensorkv.peer.shm import CONTROL_BYTES
from tensorkv.scheduler.membership import Membership
from tensorkv.server.memory import EMPTY, BufferPool, Memory
from tensorkv.server.shard import SCHEDULER, Outgoing
from tensorkv.server.shm import SharedValues, Sharing
from tensorkv.server.slots import allocate_private
from tensorkv.server.state import ServerState
from tensorkv.server.statefiles import FolderFiles
from tensorkv.store import KVStore
from tensorkv.stores.dist import DistStore
from tensorkv.transport import unix
from tensorkv.transport.base import Connection, Listener
from tensorkv.transport.endpoint import listen
from tensorkv.transport.inproc import InprocConnection
from tensorkv.transport.segments import MAX_SEGMENTS
from tensorkv.transport.unix import DescriptorHead, UnixConnection, UnixListener
from tensorkv.wire import messages as m
from tensorkv.wire.codec import MAX_HEADER_BYTES, PREFIX, PREFIX_BYTES, Decoder, decode_prefix, encode
from tensorkv.worker.session import Session

NUM_SERVERS = 2
SLICE_BOUND_BYTES = 1 << 12
DEADLINE_S = 30.0
READ_S = 0.02
"""Maximum time for the worker to read hostile frames before the connections end."""

WARM_JOBS = 50
MAX_GROWTH_MB = 100.0
MARGIN = 64
_BEFORE = 123.0
_to_server: Decoder[Any] = Decoder(m.ToServer)
_to_scheduler: Decoder[Any] = Decoder(m.ToScheduler)
_from_server: Decoder[Any] = Decoder(m.FromServer)
_from_scheduler: Decoder[Any] = Decoder(m.FromScheduler)


_OTHERS: list[Any] = [
    m.Joined(1, 1), m.InitReply(1, [], []), m.SettingReply(1, 1, True), m.Entries(1, []),
    m.TogetherReply(1, False, None), m.LoadReply(1, []), m.Done(1), m.Failed(1, "KeyError", "a text"),
    m.Waiting(1, [0], "a text"), m.Data(1, 0), m.Data(1, 1), m.Merged(1, [0]), m.Merged(1, [-1, 0, 0]),
    m.Committed(1, True, None), m.Info(1, [], [], [], [], "add"), m.SavedFile(1, FileRecord(1), []),
    m.SliceRecord(1, 1, [], {}), m.Settings(1, SavedSettings([], [])), m.Fault(1, [1], 1, "UpdaterError", ""),
    m.Welcome([]), m.Stop(), m.Gone(0), m.WorkerLost(0, "a host", "a cause", []),
    m.Lost("server", 0, "a host", "a cause"), m.CommitDecision(1, 1, True, 1.0, None),
]  # fmt: skip


class WorkerFault(Exception):
    """A worker failed on a hostile frame. The text has the seed of its job."""


# ---- the peers -------------------------------------------------------------------------------------


@final
class HostilePeers:
    """A scheduler and servers in threads, until `stop`. `num_hostile` counts mutated frames.

    Args:
        mutator: makes hostile frames, and decides when to send them.
        shared: the servers share memory with the worker, over Unix sockets.
    """

    def __init__(self, mutator: Mutator, shared: bool = False) -> None:
        self.num_hostile = 0
        self.faults: list[str] = []
        self._mutator = mutator
        self._honest_left = mutator.random.randrange(40)
        self._token = secrets.token_hex(8)
        self._lock = threading.Lock()  # guards the state machines, and all sending
        self._pool = BufferPool()
        self._membership = Membership(1, NUM_SERVERS, SLICE_BOUND_BYTES)
        self._shared = [SharedValues() for _ in range(NUM_SERVERS if shared else 0)]
        self._sharings: dict[int, Sharing] = {}  # by server, once the worker has connected
        self._descriptors = Descriptors(mutator.random)
        self._servers = [self._server(rank) for rank in range(NUM_SERVERS)]
        self._connections: dict[int, Connection] = {}
        self._sent: dict[int, list[tuple[bytes, bytes]]] = {}
        self._stores = {1}  # the stores that the worker has joined, and its next one
        self._ended = False
        self._listeners: list[Listener] = [listen("inproc")]
        for rank in range(NUM_SERVERS):
            listener = UnixListener() if shared else listen("inproc")
            self._listeners.append(listener)
            address = ("127.0.0.1", 1) if shared else listener.address
            name = listener.address[0] if shared else ""
            self._membership.handle("server", rank, m.Register(*address, "a host", 1, name))
        self._membership.out.clear()
        self._threads = [
            threading.Thread(target=self._serve, args=(number - 1,), name=f"hostile-{number}", daemon=True)
            for number in range(1 + NUM_SERVERS)
        ]
        for thread in self._threads:
            thread.start()

    def _server(self, rank: int) -> ServerState:
        allocate = self._shared[rank].allocate if self._shared else allocate_private
        return ServerState(1, self._pool, updater_loader(()), FolderFiles(), allocate=allocate)

    def config(self) -> JobConfig:
        """Return the place of the worker."""
        host, port = self._listeners[0].address
        return JobConfig(
            role="worker",
            rank=0,
            num_workers=1,
            num_servers=NUM_SERVERS,
            scheduler_host=host,
            scheduler_port=port,
            token=self._token,
            timeout_s=DEADLINE_S,
            transport="shm" if self._shared else "auto",
        )

    def stop(self) -> None:
        """End all connections and threads."""
        self._end()
        for listener in self._listeners:
            listener.close()
        for thread in self._threads:
            thread.join()
        for connection in self._connections.values():
            connection.close()
        for values in self._shared:
            values.close()
        self._descriptors.close()

    def _serve(self, server: int) -> None:
        """Serve the worker, as the server with this rank or as the scheduler."""
        try:
            connection = self._listeners[server + 1].accept()
            self._connections[server] = connection
            accept(connection, self._token, lambda role, rank: None)
            if isinstance(connection, UnixConnection):
                values = self._shared[server]
                self._sharings[server] = values.share_with(
                    connection, lambda frame: self._send(server, frame, b"")
                )
            while True:
                self._receive(server, connection)
        except (EOFError, ConnectionError):
            self._end()  # the worker has ended it, or has itself sent an invalid frame
        except Exception as exc:  # noqa: BLE001  # told by `meet`
            self.faults.append(f"its peer {server} failed: {type(exc).__name__}: {exc}")
            self._end()

    def _receive(self, server: int, connection: Connection) -> None:
        messages: list[Any] = []
        payload = EMPTY

        def sink(body: memoryview, payload_bytes: int) -> list[memoryview]:
            nonlocal payload
            messages.append((_to_scheduler if server == SCHEDULER else _to_server).decode(body))
            expected = 0
            if server != SCHEDULER:
                with self._lock:
                    expected = self._servers[server].payload_bytes(0, messages[0])
            placed = messages[0].placed if isinstance(messages[0], m.Push) else None
            if placed is not None:
                payload = self._sharings[server].borrow(placed, expected)
                return []
            if payload_bytes != expected:
                raise ProtocolError(f"{payload_bytes} bytes, not {expected}")
            payload = self._pool.take(payload_bytes)
            if not isinstance(messages[0], m.Push):
                payload = Memory(payload.tensor[:payload_bytes].clone())
            return [payload.bytes[:payload_bytes]] if payload_bytes else []

        connection.receive(sink)
        with self._lock:
            if server == SCHEDULER:
                if getattr(messages[0], "store", 1) not in self._stores:
                    raise ProtocolError("it believes in a store that there is not: nobody would answer")
                self._membership.handle("worker", 0, messages[0])
                self._flush_scheduler()
            elif isinstance(messages[0], m.ShareSegment):
                self._sharings[server].attach(messages[0])
            elif isinstance(messages[0], m.DropSegment):
                self._sharings[server].drop(messages[0])
            else:
                for values in self._shared:
                    values.settle()
                self._answer(server, self._servers[server].handle(0, messages[0], payload))

    def _flush_scheduler(self) -> None:
        out = self._membership.out[:]
        self._membership.out.clear()
        for role, rank, message in out:
            if role == "worker":
                if isinstance(message, m.Joined):
                    self._stores.add(message.store)
                self._send(SCHEDULER, encode(message), b"")
            elif isinstance(message, m.CommitDecision):
                self._answer(rank, self._servers[rank].decide_commit(message))

    def _answer(self, server: int, out: list[Outgoing]) -> None:
        for each in out:
            if self._reply_in_place(server, each):
                continue
            payload = b"".join(bytes(memory.bytes) for memory in each.payload)
            for lease in each.leases:
                lease.readers -= 1
            if each.worker == SCHEDULER:
                self._membership.handle("server", server, each.message)
                self._flush_scheduler()
            else:
                self._send(server, encode(each.message, len(payload)), payload)

    def _reply_in_place(self, server: int, reply: Outgoing) -> bool:
        sharing = self._sharings.get(server)
        if sharing is None or not isinstance(reply.message, m.Data):
            return False
        return sharing.reply(reply.message, reply.payload, reply.leases)

    # ---- hostility -------------------------------------------------------------------------------

    def _send(self, server: int, head: bytes, payload: bytes) -> None:
        """Send a frame to the worker, perhaps mutated."""
        if self._ended:
            return
        connection, chance = self._connections[server], self._mutator.random.random
        self._honest_left -= 1
        frames, ends = [(head, payload)], False
        if self._honest_left < 0:
            self._honest_left = self._mutator.random.randrange(10)
            frames = self._changed(server, head, payload)
            self.num_hostile += len(frames)
            ends = chance() < 0.5
            ends = ends or any(_falls_short(*changed) for changed in frames)
            if server == SCHEDULER:
                ends = ends or any(_tells_false_lead(head, changed) for changed, _ in frames)
            if not ends:
                frames.insert(self._mutator.random.choice((0, len(frames))), (head, payload))
        self._sent.setdefault(server, []).append((head, payload))
        tick = deadline_tick(DEADLINE_S, "a worker that does not read")
        with contextlib.suppress(ConnectionError):  # the connection has ended
            for frame in frames:
                parts = [part for part in frame if part]
                if parts:  # the mutator may have cut the frame to nothing
                    connection.send_rest(parts, tick)
        if ends:
            self._end_when_read(connection)

    def _end_when_read(self, connection: Connection) -> None:
        """End all connections once the worker has read its frames, or after `READ_S`. Sockets buffer them."""
        if isinstance(connection, InprocConnection):
            deadline = time.monotonic() + READ_S
            while not connection._outgoing.empty() and time.monotonic() < deadline:
                time.sleep(READ_S / 50)
        self._end()

    def _changed(self, server: int, head: bytes, payload: bytes) -> list[tuple[bytes, bytes]]:
        if server in self._sharings and self._mutator.random.random() < 0.5:
            return [(self._false_sharing(head), b"")]
        chance, choose = self._mutator.random.random(), self._mutator.random.choice
        message = head[PREFIX.size :]
        before = self._sent.get(server) or [(head, payload)]
        if chance < 0.5:
            return [(framed(self._changed_message(server, message)), payload)]
        if chance < 0.65:  # mostly for the right request, but of another type
            request = msgspec.msgpack.decode(message)[1]
            kind = m.FromScheduler if server == SCHEDULER else m.FromServer
            other = msgspec.structs.replace(choose([each for each in _OTHERS if isinstance(each, kind)]))
            if hasattr(other, "request"):
                other.request = request
            return [(encode(other), choose((b"", payload)))]
        if chance < 0.7:
            lengths = (0, 1, 8, 4096, max(len(payload) - 1, 0), len(payload) + 1, len(payload) * 2)
            return [(head, (payload + bytes(4096))[: choose(lengths)])]
        if chance < 0.8:
            return [(head, payload)] * choose((2, 3))
        if chance < 0.9:
            return [choose(before) for _ in range(choose((1, 3)))]
        return [(self._mutator.frame(head), choose((b"", payload)))]

    def _false_sharing(self, head: bytes) -> bytes:
        """Return the head of a frame with false claims about shared memory."""
        choose, below = self._mutator.random.choice, self._mutator.random.randrange
        number = choose((0, 1, 2, 3, MAX_SEGMENTS, -1, 1 << 40))
        size_bytes = choose((0, 1, 4096, CONTROL_BYTES, SEGMENT_BYTES, 1 << 40, -1))
        message = msgspec.msgpack.decode(head[PREFIX.size :])
        offsets = (0, 64, 1 << 15, below(1 << 26), -1)
        lengths = (0, 1 << 14, below(1 << 16), 1 << 40)
        num_spans = choose((0, 1, 1, 2, 3))
        spans = [(choose((0, 1, 1, 1, 2)), choose(offsets), choose(lengths)) for _ in range(num_spans)]
        placed = m.Placed(choose((0, 1, 2, 3, below(20), -1)), spans)
        request = message[1] if len(message) > 1 and isinstance(message[1], int) else 1
        made = choose(
            (
                m.ShareSegment(number, size_bytes),
                m.DropSegment(number),
                m.Data(request, choose((0, 0, 1)), placed),
            )
        )
        frame = encode(made)
        if isinstance(made, m.ShareSegment) and self._mutator.random.random() < 0.5:
            return DescriptorHead.of(frame, self._descriptors.honest(made))
        if self._mutator.random.random() < 0.4:
            return DescriptorHead.of(frame, self._descriptors.any())
        return frame

    def _changed_message(self, server: int, message: bytes) -> bytes:
        """Return a mutated message that is mostly still valid, so that the worker believes it."""
        decoder = _from_scheduler if server == SCHEDULER else _from_server
        for _ in range(self._mutator.random.choice((1, 20))):
            changed = self._mutator.message(message)
            with contextlib.suppress(ProtocolError):
                decoder.decode(changed)
                if changed != message:
                    break
        return changed

    def _end(self) -> None:
        """End all connections: the scheduler's too, so that the worker does not wait for its report."""
        self._ended = True
        for connection in list(self._connections.values()):
            connection.shutdown()


def _falls_short(head: bytes, payload: bytes) -> bool:
    """Whether a frame has fewer bytes than its prefix claims, or an incomplete prefix.

    The worker waits for the rest. Only the end of the connection shows that there is none.
    """
    if len(head) < PREFIX_BYTES:
        return True
    with contextlib.suppress(ProtocolError):
        message_bytes, payload_bytes = decode_prefix(head, MAX_HEADER_BYTES)
        return PREFIX_BYTES + message_bytes + payload_bytes > len(head) + len(payload)
    return False


def _tells_false_lead(honest: bytes, frame: bytes) -> bool:
    """Whether a frame gives the worker a false answer on whether it leads a call.

    The worker cannot tell. If no rank leads, all wait to their deadlines, unless the connection ends.
    """
    lead = getattr(_from_scheduler.decode(honest[PREFIX.size :]), "lead", None)
    with contextlib.suppress(ProtocolError):
        told = _from_scheduler.decode(frame[PREFIX.size :])
        if isinstance(told, m.Failed):  # so it does not lead, and others may wait for it
            return lead is not None
        return getattr(told, "lead", lead) is not lead
    return False


# ---- the worker ------------------------------------------------------------------------------------


@final
class _Guarded:
    """Tensors to pull into, with guard memory around them that must stay unchanged."""

    def __init__(self) -> None:
        self._all: list[torch.Tensor] = []

    def tensor(self, num_elems: int) -> torch.Tensor:
        """Return a flat tensor of floats."""
        whole = torch.full((num_elems + 2 * MARGIN,), _BEFORE)
        self._all.append(whole)
        return whole[MARGIN:-MARGIN]

    def intact(self) -> bool:
        """Whether the guard memory is unchanged."""
        return all(
            bool((each[:MARGIN] == _BEFORE).all() and (each[-MARGIN:] == _BEFORE).all()) for each in self._all
        )


BIG = 1 << 14
"""Number of elements of a value large enough for each server to place its part in shared memory."""


def _calls(kv: KVStore, guarded: _Guarded, folder: str) -> list[Callable[[], object]]:
    """Return a program, call by call."""
    w, big = guarded.tensor(3), guarded.tensor(BIG)
    values = {"a": torch.ones(2, 2), "b": torch.arange(5.0), "big": torch.ones(BIG)}
    state: dict[str, Any] = {}
    return [
        lambda: kv.init("w", torch.zeros(3)),
        lambda: kv.init(values),
        lambda: kv.push("w", torch.ones(3)),
        lambda: kv.pull("w", out=w),
        lambda: kv.push(values),
        lambda: kv.push(values),  # waits until the first push is merged
        lambda: kv.pull(["a", "big", "w"], out=[torch.empty(2, 2), big, w]),
        lambda: kv.pull("big"),
        lambda: kv.pushpull("w", torch.ones(3), out=w),
        lambda: kv.set_optimizer("adam", lr=0.1),
        lambda: kv.pushpull("big", torch.ones(BIG), out=big),
        lambda: kv.info("big"),
        lambda: kv.keys(),
        lambda: kv.set_optimizer_options(lr=0.2),
        lambda: kv.push("w", torch.ones(3), apply=False),
        lambda: kv.commit(max_norm=1.0, check_finite=True),
        lambda: kv.pull("w", out=w, async_op=True).wait(),
        lambda: kv.put("big", torch.zeros(BIG)),
        lambda: state.update(kv.state_dict()),
        lambda: kv.save(folder),
        lambda: kv.state_dict(alone=True),
        lambda: kv.load(folder),
        lambda: kv.load_state_dict(state) if state else None,
        lambda: kv.barrier(),
        lambda: kv.delete("a"),
        lambda: "w" in kv,
        lambda: kv.push("big", torch.ones(BIG)),
        lambda: kv.pull("big", out=big),
        lambda: kv.close(),
    ]


def meet(seed: int, pool: Sequence[bytes]) -> int:
    """Run one worker against hostile peers; return the number of hostile frames they sent.

    Args:
        seed: decides the frames and their times. With an odd seed the servers share memory with the worker.
        pool: frames to take parts from.

    Raises:
        WorkerFault: the worker broke a guarantee.
    """
    faults: list[str] = []
    peers = HostilePeers(Mutator(seed, pool), shared=seed % 2 == 1 and not unix.why_not())
    guarded = _Guarded()
    with _thread_faults(faults), tempfile.TemporaryDirectory() as folder:
        try:
            _work(peers, guarded, folder, faults)
        finally:
            peers.stop()
    faults += peers.faults
    if not guarded.intact():
        faults.append("it has written outside of the tensors asked for")
    if faults:
        raise WorkerFault(f"job {seed}: {'; '.join(faults)}")
    return peers.num_hostile


def _work(peers: HostilePeers, guarded: _Guarded, folder: str, faults: list[str]) -> None:
    job: Session | None = None
    failed = 0
    calls: Iterator[Callable[[], object]] = iter(())
    try:
        job = Session(peers.config())
        kv = DistStore("dist_sync", job, store="fuzzed", reduction="sum", timeout_s=DEADLINE_S)
        calls = iter(_calls(kv, guarded, folder))
    except TensorKVError as error:
        _note(error, "joining", faults)
    except Exception as exc:  # noqa: BLE001  # any error is a finding
        faults.append(f"joining raised {type(exc).__name__}: {exc}")
    for number, call in enumerate(calls):
        try:
            call()
        except TensorKVError as error:
            _note(error, f"call {number}", faults)
            failed += 1
            if failed == 3:
                break
        except Exception as exc:  # noqa: BLE001  # any error is a finding
            faults.append(f"call {number} raised {type(exc).__name__}: {exc}")
            break
    if job is not None:
        job.close(m.Abandon("the end of a job that was fuzzed"))


def _note(error: TensorKVError, what: str, faults: list[str]) -> None:
    if isinstance(error, WaitTimeout):
        faults.append(f"{what} waited to its deadline: {error}")


@contextlib.contextmanager
def _thread_faults(faults: list[str]) -> Iterator[None]:
    """Record exceptions that end a thread."""

    def note(args: Any) -> None:
        name = args.thread.name if args.thread else "?"
        faults.append(f"thread {name} ended with {args.exc_type.__name__}: {args.exc_value}")

    before, threading.excepthook = threading.excepthook, note
    try:
        yield
    finally:
        threading.excepthook = before


def fuzz_worker(source: random.Random, pool: Sequence[bytes], num_frames: int) -> int:
    """Run workers against hostile peers until these have sent so many hostile frames; return how many.

    Raises:
        WorkerFault: as in `meet`, or the memory of this process has grown.
    """
    met = jobs = 0
    begin_mb = 0.0
    while met < num_frames:
        met += meet(source.randrange(1 << 32), pool)
        jobs += 1
        if jobs == WARM_JOBS:
            begin_mb = resident_mb()
    if jobs > WARM_JOBS and resident_mb() > begin_mb + MAX_GROWTH_MB:
        raise WorkerFault(f"{jobs} jobs: memory has grown from {begin_mb:.0f} to {resident_mb():.0f} MB")
    return met


def resident_mb() -> float:
    """Return the resident memory of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no VmRSS")
