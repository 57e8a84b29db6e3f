"""Fuzzing: hostile frames against the codec, the state machines, servers over real sockets, and workers.

    python tests/fuzz/fuzz.py --frames 1000000 --seed 7
    python tests/fuzz/fuzz.py --frames 20000 --only worker

On any input, the codec and the state machines raise only ProtocolError, never allocate more memory than
allowed, and keep serving; a server or scheduler closes just that connection, with one line in its log
and no traceback. Otherwise the fuzzer raises a `Finding`, with the seed, and the conversation that
reproduces it, for the corpus. `hostile` states what a worker must guarantee.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import itertools
import logging
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager, suppress
from pathlib import Path
from typing import Any, final

import torch
from frames import SUFFIX, Conversation, Entry, Mutator, framed, load, message_of, save
from hostile import WorkerFault, fuzz_worker, resident_mb
from hostilesharing import Descriptors, is_shared, shared_conversations, with_descriptor

from tensorkv.config import JobConfig
from tensorkv.errors import PeerLostError, ProtocolError, ProtocolVersionError, TensorKVError
from tensorkv.peer.code import updater_loader
from tensorkv.peer.handshake import deadline_tick, introduce
from tensorkv.scheduler.loop import SchedulerServer
from tensorkv.scheduler.membership import Membership
from tensorkv.server.loop import Server
from tensorkv.server.memory import BufferPool, Memory
from tensorkv.server.state import ServerState
from tensorkv.server.statefiles import FolderFiles
from tensorkv.transport import unix
from tensorkv.transport.base import Connection
from tensorkv.transport.endpoint import connect
from tensorkv.wire import messages as m
from tensorkv.wire.codec import MAX_HEADER_BYTES, PREFIX, Decoder, decode_prefix, encode

CORPUS = Path(__file__).parents[1] / "corpus"
NUM_WORKERS = 2
MAX_PAYLOAD_BYTES = 1 << 22
DEADLINE_S = 30.0
UNUSED = 987_654_321_987
"""A number that no hostile message has."""

CHECK = "check"
"""Name of the honest worker's store."""

SOCKET_WAYS = (("server", False), ("scheduler", False), ("server", True))
"""Targets over sockets, fuzzed in turn, and whether they share memory."""

PLACES = 60
"""Number of workers of a job over sockets: the first process to authenticate in a place keeps it forever."""

TARGETS = ("server", "scheduler", "worker")
PHASES = ("codec", "server", "scheduler", "sockets", "worker")
_DECODERS: list[Decoder[Any]] = [
    Decoder(union) for union in (m.HandshakeMessage, m.ToServer, m.FromServer, m.ToScheduler, m.FromScheduler)
]
_to_server: Decoder[Any] = Decoder(m.ToServer)
_to_scheduler: Decoder[Any] = Decoder(m.ToScheduler)
_replies: Decoder[Any] = Decoder(m.FromServer | m.FromScheduler)
REFUSALS = (ProtocolError, ProtocolVersionError)


class Finding(Exception):
    """A guarantee did not hold. `conversation` has the frames sent to `target`."""

    def __init__(self, target: str, text: str, conversation: Conversation) -> None:
        super().__init__(f"{target}: {text}; the last of {len(conversation)} frames shows it")
        self.target = target
        self.conversation = conversation


# ---- the codec -------------------------------------------------------------------------------------


def feed_codec(data: bytes) -> None:
    """Decode bytes that may be a frame, as each side of each conversation does."""
    try:
        message_bytes, _ = decode_prefix(data, MAX_HEADER_BYTES)
    except REFUSALS:
        message_bytes = len(data)  # the rest may still be a message
    body = data[PREFIX.size : PREFIX.size + message_bytes]
    for decoder in _DECODERS:
        with suppress(ProtocolError):
            decoder.decode(body)


# ---- the state machines ----------------------------------------------------------------------------


@final
class ServerTarget:
    """A ServerState, used like the loop of a server does, without the loop."""

    name = "server"

    def __init__(self) -> None:
        self._pool = BufferPool()
        self._state = ServerState(
            NUM_WORKERS, self._pool, updater_loader(()), FolderFiles(), MAX_PAYLOAD_BYTES
        )

    def feed(self, entry: Entry) -> None:
        """Handle a frame's message, with a payload of the required length.

        Raises:
            ProtocolError: it was refused.
        """
        message = _to_server.decode(message_of(entry.frame))
        if isinstance(message, (m.ShareSegment, m.DropSegment)):  # the loop handles these itself
            raise ProtocolError("shared memory, over a connection that cannot hand it over")
        size_bytes = self._state.payload_bytes(entry.rank, message)
        if size_bytes > MAX_PAYLOAD_BYTES:
            raise MemoryError(f"{type(message).__name__} may have a payload of {size_bytes} bytes")
        buffer = self._pool.take(size_bytes)
        payload = buffer if isinstance(message, m.Push) else Memory(buffer.tensor[:size_bytes].clone())
        for out in self._state.handle(entry.rank, message, payload):
            encode(out.message, sum(len(memory.bytes) for memory in out.payload))
            for lease in out.leases:
                lease.readers -= 1
            if isinstance(out.message, m.CommitReady):
                ready = out.message
                self._state.decide_commit(
                    m.CommitDecision(ready.store, ready.number, not ready.skip, 1.0, ready.error)
                )

    def check(self) -> None:
        """Raise unless a worker can still use a store of its own."""
        store = plan = slice_id = UNUSED
        chunk = m.ChunkEntry([slice_id], [2], m.PayloadDescriptor("dense", "float32"), [1])
        for message in (
            m.OpenStore(store, "check", m.StorePolicy("async"), False),
            m.InitSlices(1, store, "w", (2,), "float32", [m.SliceEntry(slice_id, 0, 0, 2)]),
            m.DefinePlan(store, plan, [chunk]),
            m.Push(plan, 0, True, 9),
        ):
            payload = Memory(self._pool.take(8).tensor[:8].zero_())
            out = self._state.handle(0, message, payload)
        if [type(each.message) for each in out] != [m.Data]:
            raise AssertionError(f"a push was answered by {out}")


@final
class SchedulerTarget:
    """A Membership, used like the threads of a scheduler do."""

    name = "scheduler"

    def __init__(self) -> None:
        self._membership = Membership(NUM_WORKERS, 1, 1 << 12)

    def feed(self, entry: Entry) -> None:
        """Handle a frame's message. Raises ProtocolError if it was refused."""
        self._membership.handle(entry.role, entry.rank, _to_scheduler.decode(message_of(entry.frame)))
        for _, _, message in self._membership.out:
            encode(message)
        self._membership.out.clear()

    def check(self) -> None:
        """Raise unless it still answers."""
        if not self._membership.has_joined("worker", 0):
            self._membership.handle("worker", 0, m.Register("", 0, "", 1))
        self._membership.out.clear()
        with suppress(ProtocolError):  # it may have said Goodbye
            self._membership.handle("worker", 0, m.AskWaiting(UNUSED, UNUSED))
            if self._membership.out != [("worker", 0, m.Waiting(UNUSED, [], ""))]:
                raise AssertionError(f"a question was answered by {self._membership.out}")


STATES: dict[str, Callable[[], ServerTarget | SchedulerTarget]] = {
    "server": ServerTarget,
    "scheduler": SchedulerTarget,
}


def replay(target: str, conversation: Conversation) -> None:
    """Replay a conversation to a state machine, continuing after refusals.

    Raises:
        Finding: it raised another error than ProtocolError, or no longer serves.
    """
    machine = STATES[target]()
    for number, entry in enumerate(conversation):
        _feed(machine, entry, conversation[: number + 1])
    _check(machine, conversation)


def _feed(machine: ServerTarget | SchedulerTarget, entry: Entry, so_far: Conversation) -> bool:
    """Return whether the machine has accepted the frame."""
    try:
        machine.feed(entry)
    except ProtocolError:
        return False
    except Exception as exc:
        raise Finding(machine.name, f"{type(exc).__name__}: {exc}", so_far) from exc
    return True


def _check(machine: ServerTarget | SchedulerTarget, so_far: Conversation) -> None:
    try:
        machine.check()
    except Exception as exc:
        raise Finding(machine.name, f"it serves no more: {exc}", so_far) from exc


def fuzz_state(target: str, mutator: Mutator, good: Sequence[Conversation], num_frames: int) -> int:
    """Feed at least so many hostile messages to state machines; return how many.

    Raises:
        Finding: as `replay`.
    """
    fed = 0
    chance = mutator.random.random
    while fed < num_frames:
        conversation = mutator.random.choice(good)
        machine = STATES[target]()
        sent: Conversation = []
        hostility = mutator.random.choice((0.05, 0.2, 0.6))
        for entry in conversation:
            hostile = chance() < hostility
            if hostile and chance() < 0.2:
                entry = Entry(entry.role, mutator.random.randrange(NUM_WORKERS), entry.frame)
            elif hostile and chance() < 0.3:
                entry = mutator.random.choice(conversation)  # out of turn
            elif hostile:
                message = mutator.message(message_of(entry.frame))
                entry = Entry(entry.role, entry.rank, framed(message))
            sent.append(entry)
            fed += hostile
            if not _feed(machine, entry, sent) and chance() < 0.2:
                break
        _check(machine, sent)
    return fed


# ---- over sockets ----------------------------------------------------------------------------------


@final
class _Log(logging.Handler):
    """Collects what TensorKV logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def _logged() -> Iterator[list[logging.LogRecord]]:
    log, logger = _Log(), logging.getLogger("tensorkv")
    logger.addHandler(log)
    propagate, logger.propagate = logger.propagate, False
    try:
        yield log.records
    finally:
        logger.removeHandler(log)
        logger.propagate = propagate


@final
class SocketTarget:
    """A server, or only a scheduler, that listens on loopback, and an honest worker that watches it.

    With `shared`, hostile workers connect to the server's Unix socket, and may share memory with it. They do
    not connect to its scheduler, which would declare them lost, and end the job.
    """

    def __init__(self, name: str, shared: bool = False) -> None:
        self.name = name
        self._shared = shared
        self._token = secrets.token_hex(16)
        self._scheduler = SchedulerServer(num_workers=PLACES, num_servers=1, token=self._token)
        self._scheduler.start()
        self._address = self._scheduler.address
        self._server: Server | None = None
        if name == "server":
            self._server = Server(self._config(), updater_loader(()))
            self._server.start()
            self._address = self._server.addresses[0]
        self._ranks = iter(range(PLACES))
        self._numbers = itertools.count(1)
        honest = self.hostile()
        assert honest is not None
        self._honest = honest
        self._say(
            m.OpenStore(1, CHECK, m.StorePolicy("async"), False) if self._server else m.Register("", 0, "", 1)
        )
        self.serves()

    def _config(self) -> JobConfig:
        host, port = self._scheduler.address
        return JobConfig(
            role="server",
            rank=0,
            num_workers=PLACES,
            num_servers=1,
            scheduler_host=host,
            scheduler_port=port,
            token=self._token,
            transport="auto" if self._shared else "tcp",
        )

    def stop(self) -> None:
        """End everything."""
        self._honest.shutdown()
        self._honest.close()
        self._scheduler.stop()
        if self._server is not None:
            self._server.stop()

    def hostile(self) -> Connection | None:
        """Return a connection past its handshake, None if no place is free, or the job is over."""
        rank = next(self._ranks, None)
        if rank is None:
            return None
        connection = self.stranger()
        try:
            introduce(connection, self._token, "worker", rank)
        except PeerLostError:  # an earlier one was lost before it had opened a store that goes on without it
            connection.shutdown()
            connection.close()
            return None
        return connection

    def stranger(self) -> Connection:
        """Return an unauthenticated connection."""
        if self._shared and self._server is not None:
            return unix.connect(self._server.addresses[1][0], DEADLINE_S)
        return connect(*self._address, DEADLINE_S)

    def serves(self) -> None:
        """Raise unless the honest worker gets answers."""
        number = next(self._numbers)
        if self._server is not None:
            self._say(m.Flush(number, 1))
            self._hear(m.Done(number))
        else:
            self._say(m.AskWaiting(number, 1))
            self._hear(m.Waiting(number, [], ""))

    def _say(self, message: Any) -> None:
        self._honest.send(encode(message), (), deadline_tick(DEADLINE_S, "the honest worker"))

    def _hear(self, expected: Any) -> None:
        """Receive until the expected reply arrives: a scheduler also reports lost processes."""
        heard: list[Any] = [None]

        def sink(body: memoryview, payload_bytes: int) -> list[memoryview]:
            heard[0] = _replies.decode(body)
            return []

        while heard[0] != expected:
            self._honest.receive(sink, deadline_tick(DEADLINE_S, "the answer to the honest worker"))


def fuzz_sockets(mutator: Mutator, good: dict[str, list[Conversation]], num_frames: int) -> int:
    """Send at least so many hostile frames to a scheduler and a server; return how many.

    The scheduler gets them over TCP; the server over TCP and, where available, through shared memory.

    Raises:
        Finding: one of them no longer answers, or has logged more than one line, or a traceback.
    """
    sent = 0
    ways = itertools.cycle(SOCKET_WAYS if not unix.why_not() else SOCKET_WAYS[:2])
    with _logged() as records:
        while sent < num_frames:
            records.clear()
            name, shared = next(ways)
            target = SocketTarget(name, shared)
            conversations = good[name]
            if shared:  # half of all
                conversations = conversations + shared_conversations(CHECK) * (len(conversations) // 2)
            try:
                sent += _fuzz_one(target, mutator, conversations, num_frames - sent, records)
            finally:
                target.stop()
    return sent


def _fuzz_one(
    target: SocketTarget,
    mutator: Mutator,
    good: list[Conversation],
    num_frames: int,
    records: list[logging.LogRecord],
) -> int:
    """Send frames until this job has no free place; return how many."""
    sent = 0
    while sent < num_frames:
        connection = target.stranger() if mutator.random.random() < 0.3 else target.hostile()
        if connection is None:
            break
        conversation = mutator.random.choice(good)
        frames = list(mutator.connection([entry.frame for entry in conversation]))
        _send_all(connection, frames, mutator)
        sent += len(frames)
        _check_after(target, connection, frames, records)
    return sent


def _send_all(connection: Connection, frames: Sequence[bytes], mutator: Mutator) -> None:
    tick = deadline_tick(DEADLINE_S, "sending")
    descriptors = Descriptors(mutator.random)
    try:
        for frame in frames:
            if is_shared(connection):
                frame = with_descriptor(frame, descriptors, mutator.random)
            connection.send(frame, (), tick)
        connection.send(bytes(64), (), tick)  # not a frame: a peer that still listens ends the connection
    except ConnectionError:
        pass  # the peer ended it before all frames were sent
    finally:
        descriptors.close()


def _check_after(
    target: SocketTarget,
    connection: Connection,
    frames: Sequence[bytes],
    records: list[logging.LogRecord],
) -> None:
    so_far = [Entry("worker", 1, frame) for frame in frames]
    try:
        target.serves()
        _until_the_end(connection, target)
        target.serves()
    except (TensorKVError, OSError, EOFError) as exc:
        raise Finding(target.name, f"it serves no more: {type(exc).__name__}: {exc}", so_far) from exc
    _check_log(target.name, records, so_far)


def _check_log(name: str, records: list[logging.LogRecord], so_far: Conversation) -> None:
    """Raise unless each connection has at most one log line, a warning without a traceback."""
    records = list(records)  # a copy, as the target's threads still log
    lines = [record.getMessage() for record in records]
    about = [
        line.split(": ")[:2] for line in lines
    ]  # "server 0: worker 5: ...", "scheduler: refused HOST:PORT: ..."
    unnamed = ["server 0", f"refused process {os.getpid()} of this host"]  # strangers from one process
    for record, subject in zip(records, about, strict=True):
        repeated = about.count(subject) > 1 and subject != unnamed
        if repeated or record.exc_info or record.levelno > logging.WARNING:
            raise Finding(name, f"it has logged {lines}", so_far)


def _until_the_end(connection: Connection, target: SocketTarget) -> None:
    """Wait until the other side has ended the connection; end it if a frame is incomplete."""

    def sink(body: memoryview, payload_bytes: int) -> list[memoryview]:
        return [memoryview(bytearray(payload_bytes))] if payload_bytes else []

    connection.max_header_bytes = MAX_HEADER_BYTES
    with suppress(EOFError, ConnectionError):
        for _ in range(20):
            while connection.receive_now(sink):
                pass
            target.serves()
    connection.shutdown()
    connection.close()


# ---- all together ----------------------------------------------------------------------------------


def fuzz(
    corpus: Path, seed: int, num_frames: int, say: Callable[[str], None], only: str | None = None
) -> int:
    """Run so many frames against all targets, or one of `PHASES`, and return their number.

    Three quarters go to the codec, most others to the state machines, one in a hundred over sockets, one in
    four hundred to workers. The fuzzer runs in an empty folder: a server writes files where an
    authenticated worker tells it to.

    Raises:
        Finding, WorkerFault: a guarantee did not hold.
    """
    kept = {target: list(load(corpus, target).values()) for target in TARGETS}
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        return _fuzz_all(kept, seed, num_frames, say, only)


def _fuzz_all(
    kept: dict[str, list[Conversation]],
    seed: int,
    num_frames: int,
    say: Callable[[str], None],
    only: str | None,
) -> int:
    frames = [entry.frame for each in kept.values() for conversation in each for entry in conversation]
    mutator = Mutator(seed, frames)
    total = 0
    for name, share in _shares(num_frames, only).items():
        begin = time.monotonic()
        match name:
            case "codec":
                count = _fuzz_codec(mutator, frames, share)
            case "sockets":
                count = fuzz_sockets(mutator, kept, share)
            case "worker":
                count = fuzz_worker(mutator.random, frames, share)
            case _:
                count = fuzz_state(name, mutator, kept[name], share)
        gc.collect()
        say(f"{name}: {count} frames in {time.monotonic() - begin:.1f} s, {resident_mb():.0f} MB resident")
        total += count
    return total


def _shares(num_frames: int, only: str | None) -> dict[str, int]:
    """Return the number of frames of each phase."""
    if only is not None:
        return {only: num_frames}
    shares = {"sockets": max(num_frames // 100, 1), "worker": max(num_frames // 400, 1)}
    of_states = num_frames // 4 - sum(shares.values())
    halves = {"server": of_states // 2, "scheduler": of_states - of_states // 2}
    return {"codec": num_frames - num_frames // 4, **halves, **shares}


def _fuzz_codec(mutator: Mutator, frames: Sequence[bytes], num_frames: int) -> int:
    for number in range(num_frames):
        data = mutator.frame(frames[number % len(frames)])
        try:
            feed_codec(data)
        except Exception as exc:
            raise Finding("codec", f"{type(exc).__name__}: {exc}", [Entry("worker", 0, data)]) from exc
    return num_frames


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz as the command line says. On a finding, write it to the corpus folder and return 1."""
    parser = argparse.ArgumentParser(prog="python tests/fuzz/fuzz.py", description="hostile frames")
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="folder of kept conversations")
    parser.add_argument("--frames", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=PHASES, help="all frames to one of these")
    parsed = parser.parse_args(arguments)
    torch.set_num_threads(1)
    _say(f"seed {parsed.seed}")
    try:
        total = fuzz(parsed.corpus, parsed.seed, parsed.frames, _say, parsed.only)
    except Finding as finding:
        digest = hashlib.sha256(finding.conversation[-1].frame).hexdigest()[:8]
        path = parsed.corpus / f"{finding.target}-found-{digest}{SUFFIX}"
        save(path, finding.conversation)
        _say(f"FOUND with seed {parsed.seed}: {finding}\nkept as {path}")
        return 1
    except WorkerFault as fault:
        _say(f"FOUND with seed {parsed.seed}: worker: {fault}")
        return 1
    _say(f"{total} frames, nothing found")
    return 0


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
