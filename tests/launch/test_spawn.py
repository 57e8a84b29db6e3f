"""`tensorkv.spawn`: a job whose workers call a function."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tensorkv.errors import InvalidArgument, JobFailed
from tensorkv.launch import processes as module
from tensorkv.launch.spawn import spawn

DEADLINE_S = 100.0

HEAD = """
import os, signal, sys, time
import tensorkv
if __name__ != "__main__":
    import torch  # in the workers: the parent does without it, as it takes a second

def say(line):
    os.write(1, f"{line}\\n".encode())

def double(key, pushed, stored):
    stored += 2 * pushed

def children(pid):
    return [int(word) for word in open(f"/proc/{pid}/task/{pid}/children").read().split()]
"""

SHARED = """
def work(rank, start, *, more=1):
    with tensorkv.create("dist_sync") as kv:
        kv.set_updater(double)
        kv.init("w", torch.full((2,), start))
        kv.push("w", torch.full((2,), rank + 1.0))
        say(f"{rank} {kv.rank} of {kv.num_workers}: {kv.pull('w').tolist()}")

if __name__ == "__main__":
    tensorkv.spawn(work, (10.0,), num_workers=2, num_servers=2)
    say(f"left: {len(children(os.getpid())) - 1}")  # all but multiprocessing's own helper
"""

FAILS = """
def work(rank, how):
    kv = tensorkv.create("dist_sync")
    kv.init("w", torch.zeros(2))
    if rank == 1:
        if how == "raise":
            raise ValueError("no luck")
        if how == "exit":
            sys.exit(3)
        os.kill(os.getpid(), signal.SIGKILL)
    kv.push("w", torch.ones(2))
    kv.pull("w")

if __name__ == "__main__":
    try:
        tensorkv.spawn(work, (sys.argv[1],), num_workers=2)
    except tensorkv.JobFailed as error:
        print(error)
        print(f"left: {len(children(os.getpid())) - 1}")
"""

GOES_ON = """
def work(rank):
    kv = tensorkv.create("dist_async")
    kv.init("w", torch.zeros(2))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    kv.barrier()
    kv.push("w", torch.ones(2))
    say(f"{rank}: {kv.pull('w').tolist()}")
    kv.close()

if __name__ == "__main__":
    tensorkv.spawn(work, num_workers=2)
"""

WAITS = """
def work(rank):
    kv = tensorkv.create("dist_sync")
    kv.barrier()
    if rank == 0:
        everybody = [pid for pid in children(os.getppid())]
        say("pids " + " ".join(map(str, everybody)))
    signal.pause()

if __name__ == "__main__":
    tensorkv.spawn(work, num_workers=2)
"""


def start(tmp_path: Path, text: str, *arguments: str, new_session: bool = False) -> subprocess.Popen[str]:
    path = tmp_path / "train.py"
    path.write_text(HEAD + text)
    pipe = subprocess.PIPE
    command = [sys.executable, str(path), *arguments]
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=new_session)


def run(tmp_path: Path, text: str, *arguments: str) -> tuple[int, list[str], str]:
    with start(tmp_path, text, *arguments) as process:
        try:
            out, err = process.communicate(timeout=DEADLINE_S)
        finally:
            process.kill()
    return process.returncode, out.splitlines(), err


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(120)
def test_workers_share_a_value_and_an_updater_of_the_script(tmp_path: Path) -> None:
    status, out, err = run(tmp_path, SHARED)
    assert (status, err) == (0, "")
    assert sorted(out) == ["0 0 of 2: [16.0, 16.0]", "1 1 of 2: [16.0, 16.0]", "left: 0"]


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("how", "first", "last"),
    [
        ("raise", "worker 1 failed with status 1; the job was ended", "ValueError: no luck"),
        ("exit", "worker 1 failed with status 3; the job was ended", None),
        ("kill", "worker 1 failed with status 137 (SIGKILL); the job was ended", None),
    ],
)
def test_the_first_failure_is_raised(tmp_path: Path, how: str, first: str, last: str | None) -> None:
    status, out, err = run(tmp_path, FAILS, how)
    assert (status, out[0], out[-1]) == (0, first, "left: 0"), err
    if last is None:
        assert len(out) == 2
    else:
        assert out[-2] == last
        assert any("in work" in line for line in out)


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(120)
def test_a_job_that_survives_a_failure_has_succeeded(tmp_path: Path) -> None:
    status, out, err = run(tmp_path, GOES_ON)
    text = "worker 1 failed with status 137 (SIGKILL); the job went on without it"
    assert (status, out, err.splitlines()[-1]) == (0, ["0: [1.0, 1.0]"], text)


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(120)
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_outlives_a_parent_that_is_ended(tmp_path: Path, signum: signal.Signals) -> None:
    with start(tmp_path, WAITS, new_session=True) as process:
        assert process.stdout is not None
        words = process.stdout.readline().split()
        assert words[:1] == ["pids"]
        handles = [os.pidfd_open(int(pid)) for pid in words[1:]]
        assert len(handles) == 4, "a server, two workers, multiprocessing's helper"
        if signum == signal.SIGINT:  # as a terminal does
            os.killpg(process.pid, signum)
        else:
            process.send_signal(signum)
        _, err = process.communicate(timeout=DEADLINE_S)
        for handle in handles:
            assert select.select([handle], [], [], DEADLINE_S)[0], "a process was left running"
            os.close(handle)
    if signum == signal.SIGINT:
        assert err.count("Traceback (most recent call last)") == 1, "the parent's alone"
        assert "\nKeyboardInterrupt\n" in err, "a server may tell, too, which worker it lost"


HANDED = """
import torch.multiprocessing

def work(rank, queue, simple, event, lock, conditions, semaphore, barrier, value, array, ends, seen, tensors):
    barrier.wait(100)
    with lock, conditions[0], conditions[1], semaphore:
        value.value += 1
        array[rank] = rank + 1
        for tensor in tensors.values():
            tensor[rank] += 1
    seen[rank] = "here"
    if rank == 0:
        queue.put(torch.full((2,), 7.0))  # has to live until it is taken out
        ends[1].send("piped")
        simple.put("put")
        assert event.wait(100)
    else:
        assert torch.equal(queue.get(timeout=100), torch.full((2,), 7.0))
        assert (ends[0].recv(), simple.get()) == ("piped", "put")
        event.set()

if __name__ == "__main__":
    made = torch.multiprocessing.get_context("spawn")
    value, array = made.Value("i", 0), made.Array("i", 2)
    dtypes = (torch.float32, torch.bfloat16, torch.int64)
    tensors = {dtype: torch.zeros(2, dtype=dtype) for dtype in dtypes}
    locks = made.Lock(), (made.Condition(), made.Condition(made.RLock())), made.BoundedSemaphore(1)
    with made.Manager() as manager:
        seen = manager.dict()
        handed = (made.Queue(), made.SimpleQueue(), made.Event(), *locks, made.Barrier(2), value, array)
        tensorkv.spawn(work, (*handed, made.Pipe(duplex=False), seen, tensors), num_workers=2)
        say(f"{value.value} {list(array)} {dict(sorted(seen.items()))}")
    say([tensor.tolist() for tensor in tensors.values()])
"""


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(120)
def test_what_torch_hands_to_new_processes_is_handed_over(tmp_path: Path) -> None:
    status, out, err = run(tmp_path, HANDED)
    told = ["2 [1, 2] {0: 'here', 1: 'here'}", "[[1.0, 1.0], [1.0, 1.0], [1, 1]]"]
    assert (status, out) == (0, told), err


def plain(rank: int) -> None:
    """A worker that does nothing."""


class Awkward:
    """Cannot be pickled."""

    def __reduce__(self) -> Any:
        raise RuntimeError("not me")


class TestBadArguments:
    @pytest.mark.parametrize(
        ("fn", "args", "text"),
        [
            ("work", (), "which cannot be called"),
            (plain, [1], "args is a list; pass a tuple"),
            (lambda rank: None, (), "cannot be handed to another process"),
            (plain, (Awkward(),), "cannot be handed to another process: not me"),
            (plain, (threading.Lock(),), "cannot be handed to another process: cannot pickle"),
            (plain, (multiprocessing.get_context("fork").Lock(),), "get_context\\('spawn'\\)"),
        ],
    )
    @pytest.mark.e2e
    def test_what_cannot_be_handed_over(self, fn: Any, args: Any, text: str) -> None:
        with pytest.raises(InvalidArgument, match=text):
            spawn(fn, args, num_workers=1)

    def test_a_function_of_a_notebook(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plain, "__module__", "__main__")
        monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
        with pytest.raises(InvalidArgument, match="notebook.*move it to a module"):
            spawn(plain, num_workers=1)

    def test_numbers(self) -> None:
        with pytest.raises(InvalidArgument, match="at least one of its servers"):
            spawn(signal.Signals, num_workers=1, num_servers=0)


@pytest.mark.e2e
@pytest.mark.timeout(120)
def test_a_server_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    command: Callable[..., list[str]] = lambda argv, environ: ["sh", "-c", "exit 7"]  # noqa: E731
    monkeypatch.setattr(module, "shielded", command)
    with pytest.raises(JobFailed, match="server 0 failed with status 7; the job was ended"):
        spawn(signal.strsignal, num_workers=1)
