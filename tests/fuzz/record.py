"""Record the conversations of `tests/corpus` again, after a change of the protocol.

    python tests/fuzz/record.py

Runs small jobs in this process, and writes all frames sent to their scheduler and server, and the server's
replies, to files. Findings of the fuzzer (`*-found-*`) stay unchanged.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import torch
from frames import SUFFIX, Conversation, Entry, framed, message_of, save

import tensorkv
from tensorkv.store import KVStore
from tensorkv.testing.cluster import run_job
from tensorkv.transport.inproc import InprocConnection
from tensorkv.wire import messages as m

CORPUS = Path(__file__).parents[1] / "corpus"
NO_FOLDER = os.path.join(os.devnull, "folder")
FOLDERS: dict[int, str] = {}  # by rank
ALL = msgspec.msgpack.Decoder(
    m.HandshakeMessage | m.ToServer | m.FromServer | m.ToScheduler | m.FromScheduler
)


def basic(kv: KVStore) -> None:
    kv.init("w", torch.zeros(3))
    kv.init({"a": torch.ones(2, 2), "b": torch.arange(5.0)})
    for _ in range(3):
        kv.push("w", [torch.ones(3)] * 2)
        kv.pull("w")
    kv.push({"a": torch.ones(2, 2), "b": torch.ones(5)})
    kv.pull(["a", "b"])
    kv.pushpull("w", torch.ones(3))
    kv.info("w")
    assert sorted(kv.keys()) == ["a", "b", "w"]
    kv.barrier()
    kv.delete("b")
    kv.init("b", torch.zeros(2))
    kv.barrier()


def optimizers(kv: KVStore) -> None:
    kv.init("w", torch.zeros(3))
    kv.set_optimizer("adam", lr=0.1)
    kv.push("w", torch.ones(3))
    kv.pull("w")
    kv.set_optimizer_options(lr=0.2)
    for _ in range(3):  # the second must wait for the first
        kv.push("w", torch.ones(3))
    kv.pull("w")
    kv.set_updater("add")
    kv.push("w", tensorkv.ABSENT)
    kv.pull("w")
    if kv.rank == 0:
        kv.put("w", torch.ones(3))
    kv.barrier()


def commits(kv: KVStore) -> None:
    kv.init("w", torch.zeros(3))
    kv.init("v", torch.zeros(2, dtype=torch.float64))
    for max_norm in (None, 1.0):
        kv.push("w", torch.ones(3), apply=False)
        kv.push("v", torch.ones(2), apply=False)
        kv.commit(max_norm=max_norm, check_finite=max_norm is not None)
        kv.pull("w")


def shapes(kv: KVStore) -> None:
    kv.init("big", torch.zeros(1500))
    kv.init("i", torch.zeros(2, dtype=torch.int64))
    kv.init("e", torch.zeros(0, 3))
    for number in range(12):
        kv.push("i", torch.ones(2, dtype=torch.int64))
        if number % 4:
            kv.pull("i")
    kv.pushpull("big", torch.ones(1500))
    kv.push("e", torch.zeros(0, 3))
    kv.pull("e")


def saving(kv: KVStore) -> None:
    kv.init("w", torch.zeros(3))
    kv.init("big", torch.zeros(1500))
    kv.set_optimizer("adam", lr=0.1)
    kv.push({"w": torch.ones(3), "big": torch.ones(1500)})
    with tempfile.TemporaryDirectory() if kv.rank == 0 else contextlib.nullcontext("") as folder:
        FOLDERS[kv.rank] = folder
        kv.barrier()
        kv.save(FOLDERS[0])
        kv.load(FOLDERS[0])
        kv.barrier()
    if kv.rank == 1:
        kv.state_dict(alone=True)
    state = kv.state_dict()
    kv.load_state_dict(state)
    kv.push("w", torch.ones(3))
    kv.pull("w")


class Recorder:
    """Records every frame that a connection of this process sends."""

    def __init__(self) -> None:
        self.sent: dict[str, Conversation] = {"server": [], "scheduler": [], "worker": []}
        self._senders: dict[InprocConnection, tuple[Any, int] | None] = {}  # None accepts, and is no peer
        self._lock = threading.Lock()
        self._real = InprocConnection.send_rest

    def send_rest(self, connection: InprocConnection, buffers: Any, *rest: Any) -> None:
        frame = b"".join(map(bytes, buffers))
        with self._lock:  # so that frames arrive in the recorded order
            self._note(connection, frame)
            self._real(connection, buffers, *rest)

    def _note(self, connection: InprocConnection, frame: bytes) -> None:
        message = ALL.decode(message_of(frame))
        if connection not in self._senders:
            hello = isinstance(message, m.Hello)
            self._senders[connection] = (message.role, message.rank) if hello else None
            return
        sender = self._senders[connection]
        if sender is None:
            if isinstance(message, m.FromServer):
                self.sent["worker"].append(Entry("server", 0, frame))
            return
        target = "server" if isinstance(message, m.ToServer) else "scheduler"
        self.sent[target].append(Entry(*sender, _portable(message, frame)))


def _portable(message: Any, frame: bytes) -> bytes:
    """Return the frame as if sent to another process: code by name, no name or path of this host."""
    if isinstance(message, m.Together):
        message.call = message.call.split()[0].partition("(")[0]
        return framed(msgspec.msgpack.encode(message))
    if isinstance(message, (m.SaveSlices, m.LoadSlices)):
        message.folder = NO_FOLDER
        return framed(msgspec.msgpack.encode(message))
    if isinstance(message, m.PrepareRestore):
        specs = message.settings.updaters
        message.codes = [_by_name(code, spec) for code, spec in zip(message.codes, specs, strict=True)]
        return framed(msgspec.msgpack.encode(message))
    if isinstance(message, m.Register):
        server = bool(message.host)
        return framed(msgspec.msgpack.encode(m.Register("127.0.0.1" * server, 1 * server, "host", 1)))
    record = getattr(message, "record", None)
    if record is None or record.code is None:
        return frame
    message.record = msgspec.structs.replace(record, code=_by_name(record.code, record.updater))
    return framed(msgspec.msgpack.encode(message))


def _by_name(code: Any, spec: Any) -> Any:
    """Return a reference to a class of torch.optim in place of an object of this process."""
    if code is None:
        return None
    return msgspec.structs.replace(code, module="torch.optim", name=spec.name.rpartition(":")[2])


def record(name: str, program: Callable[[KVStore], None], **job: Any) -> None:
    """Run a job of two workers and a server, and record the conversations."""
    recorder = Recorder()

    def send_rest(connection: InprocConnection, buffers: Any, *rest: Any) -> None:
        recorder.send_rest(connection, list(buffers), *rest)

    with mock.patch.object(InprocConnection, "send_rest", send_rest):
        run_job(program, num_workers=2, num_servers=1, slice_bound_bytes=1 << 12, **job)
    for target, conversation in recorder.sent.items():
        save(CORPUS / f"{target}-{name}{SUFFIX}", conversation)


def main() -> None:
    record("basic", basic)
    record("optimizers", optimizers)
    record("commits", commits)
    record("mean", commits, reduction="mean")
    record("shapes", shapes)
    record("saving", saving)
    record("async", basic, kind="dist_async")


if __name__ == "__main__":
    main()
