"""Every test run replays the corpus and tries 20,000 fresh hostile frames."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from frames import Entry, Mutator, load, save

from fuzz import Finding, feed_codec, fuzz, fuzz_sockets, fuzz_state, main, replay
from tensorkv.scheduler.membership import Membership
from tensorkv.server.loop import Server
from tensorkv.server.state import ServerState
from tensorkv.wire import messages as m
from tensorkv.wire.codec import encode

CORPUS = Path(__file__).parents[1] / "corpus"
KEPT = [(target, name) for target in ("server", "scheduler") for name in load(CORPUS, target)]


@pytest.mark.parametrize(("target", "name"), KEPT)
def test_what_was_found_stays_fixed(target: str, name: str) -> None:
    conversation = load(CORPUS, target)[name]
    for entry in conversation:
        feed_codec(entry.frame)
    replay(target, conversation)


def test_twenty_thousand_hostile_frames() -> None:
    """Every run has new ones. A failure prints the seed; `python tests/fuzz/fuzz.py` reruns it."""
    seed = random.SystemRandom().randrange(1 << 32)
    said: list[str] = []
    try:
        assert fuzz(CORPUS, seed, 20_000, said.append) >= 20_000
    except BaseException:
        print(f"the seed was {seed}; {said}")  # pytest shows it with the failure
        raise
    assert [line.split(":")[0] for line in said] == [
        "codec", "server", "scheduler", "sockets", "worker",
    ]  # fmt: skip


def good(target: str) -> list[Any]:
    return list(load(CORPUS, target).values())


def mutator(seed: int = 1) -> Mutator:
    return Mutator(seed, [entry.frame for conversation in good("server") for entry in conversation])


@pytest.mark.parametrize("fault", ["raises", "grows", "stops serving"])
def test_a_fault_of_a_server_is_found(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    real = ServerState.handle, ServerState.payload_bytes

    def handle(self: ServerState, worker: int, message: Any, payload: Any = None) -> Any:
        if fault == "raises" and isinstance(message, m.Flush) and message.request < 0:
            raise IndexError("list index out of range")
        if fault == "stops serving" and isinstance(message, m.Push) and message.reply == 9:
            return []
        return real[0](self, worker, message, payload)

    def payload_bytes(self: ServerState, worker: int, message: Any) -> int:
        if fault == "grows" and isinstance(message, m.InitSlices) and not message.slices:
            return 1 << 60
        return real[1](self, worker, message)

    monkeypatch.setattr(ServerState, "handle", handle)
    monkeypatch.setattr(ServerState, "payload_bytes", payload_bytes)
    with pytest.raises(Finding, match="server: ") as caught:
        fuzz_state("server", mutator(), good("server"), 20_000)
    with pytest.raises(Finding):
        replay("server", caught.value.conversation)
    monkeypatch.undo()
    replay("server", caught.value.conversation)


def test_a_fault_of_a_scheduler_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Membership.handle

    def handle(self: Membership, role: Any, rank: int, message: Any) -> None:
        if isinstance(message, m.LeaveStore) and message.request < 0:
            raise KeyError(rank)
        real(self, role, rank, message)

    monkeypatch.setattr(Membership, "handle", handle)
    with pytest.raises(Finding, match="scheduler: KeyError: "):
        fuzz_state("scheduler", mutator(), good("scheduler"), 20_000)


def test_a_traceback_in_the_log_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Server._place

    def place(self: Server, peer: Any, body: memoryview, payload_bytes: int) -> Any:
        if payload_bytes > 1 << 50:
            raise MemoryError
        return real(self, peer, body, payload_bytes)

    monkeypatch.setattr(Server, "_place", place)
    with pytest.raises(Finding, match="server: it has logged"):
        fuzz_sockets(mutator(), {target: good(target) for target in ("server", "scheduler")}, 20_000)


def test_the_command_keeps_what_it_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)  # this process runs other tests, too
    for target in ("server", "scheduler", "worker"):
        save(tmp_path / f"{target}-golden.frames", [Entry("worker", 0, encode(m.Goodbye()))])
    assert main(["--corpus", str(tmp_path), "--frames", "40", "--seed", "3"]) == 0
    assert "frames, nothing found" in capsys.readouterr().out

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Membership, "handle", fail)
    assert main(["--corpus", str(tmp_path), "--frames", "400", "--seed", "3"]) == 1
    assert "FOUND with seed 3: scheduler: " in capsys.readouterr().out
    assert len(list(tmp_path.glob("scheduler-found-*.frames"))) == 1
