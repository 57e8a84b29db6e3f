"""Signals in a worker: in this process, with calls of the test's own."""

from __future__ import annotations

import faulthandler
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from tensorkv.peer import deadlines
from tensorkv.peer.deadlines import Wait
from tensorkv.wire import messages as m
from tensorkv.worker import signals
from tensorkv.worker.signals import WorkerSignals, handles, in_store_call, is_free, report

DEADLINE_S = 20.0
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Begin without handlers (a coverage tool may have one), and put those of before back."""
    before = {signum: signal.signal(signum, signal.SIG_DFL) for signum in SIGNALS}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture
def installed() -> Iterator[WorkerSignals]:
    made = WorkerSignals("worker 3 (process 1 on node7)")
    yield made
    made.stop()


class Waiting(threading.Thread):
    """A call that waits in a thread, until it is ended."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name)
        self.wait = Wait("pull of 'w'", DEADLINE_S, lambda: None, self._ask)
        self.over = threading.Event()
        self.ticked = threading.Event()

    def _ask(self) -> None:
        self.wait.answered(m.Waiting(1, [3], "round 812 of 'w'"))

    def run(self) -> None:
        while not self.over.wait(0.05):
            self.wait.tick()
            self.ticked.set()


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waiting]:
    monkeypatch.setattr(deadlines, "_noted", type(deadlines._noted)())
    thread = Waiting("loader")
    thread.start()
    assert thread.ticked.wait(DEADLINE_S)
    yield thread
    thread.over.set()
    thread.join()


def spin_until(done: threading.Event) -> None:
    """Stay in user code, where signals are served, until `done`; the deadline is the test's own."""
    while not done.wait(0.01):
        pass


def test_a_report_asks_and_names_whom_each_call_waits_for(waiting: Waiting) -> None:
    lines = report("worker 3")
    assert lines[0] == "tensorkv: worker 3: 1 call waits"
    line = r"  loader: pull of 'w', since \d+ s: waiting for worker 3, round 812 of 'w'"
    assert re.fullmatch(line, lines[1])
    assert lines[2].startswith(f"  MainThread is at {__file__}:")
    assert lines[2].endswith("in test_a_report_asks_and_names_whom_each_call_waits_for")


def test_a_report_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines, "_noted", type(deadlines._noted)())
    assert report("worker 3")[0] == "tensorkv: worker 3: no call waits"


def test_an_answer_is_not_waited_for_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines, "_noted", type(deadlines._noted)())
    monkeypatch.setattr(signals, "ANSWER_S", 0.1)
    wait = Wait("pull of 'w'", DEADLINE_S, lambda: None, lambda: None, lambda: "server 1")
    wait.tick()
    assert report("worker 3")[1].endswith("waiting for server 1, which does not answer")


def test_usr1_writes_the_report_to_stderr(
    installed: WorkerSignals, waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = threading.Event()

    class Paper(io.StringIO):
        def flush(self) -> None:
            written.set()

    paper = Paper()
    monkeypatch.setattr(sys, "stderr", paper)
    os.kill(os.getpid(), signal.SIGUSR1)
    spin_until(written)
    assert paper.getvalue().startswith(
        "tensorkv: worker 3 (process 1 on node7): 1 call waits\n  loader: pull"
    )


def test_term_leaves_at_once_where_no_call_is_under_way(installed: WorkerSignals) -> None:

    def user_code() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        spin_until(threading.Event())

    with pytest.raises(SystemExit) as caught:
        user_code()
    assert caught.value.code == 0
    os.kill(os.getpid(), signal.SIGTERM)  # sent once more, by a wrapper say: it is leaving already
    assert installed.taken


def store_call(body: str) -> object:
    """Return a function that runs `body` as if it were a part of a store."""
    names: dict[str, object] = {"__name__": "tensorkv.stores.dist", "os": os, "signal": signal, "time": time}
    exec(f"def call(event):\n    {body}", names)  # a frame with another module's name
    return names["call"]


def test_term_does_not_interrupt_a_process_that_an_exception_ends(installed: WorkerSignals) -> None:
    """What runs at its exit, the goodbye to the job among it, would end in the middle."""
    installed.leaving()
    signal.raise_signal(signal.SIGTERM)


def test_term_lets_a_call_finish(installed: WorkerSignals) -> None:
    """The call returns its value; the exit comes right behind it."""
    call = store_call("os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.2); event.append('finished')")
    finished: list[str] = []

    def user_code() -> None:
        call(finished)  # type: ignore[operator]
        spin_until(threading.Event())

    with pytest.raises(SystemExit) as caught:
        user_code()
    assert caught.value.code == 0
    assert finished == ["finished"]


def test_term_breaks_off_a_call_that_does_not_finish(
    installed: WorkerSignals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "LEAVE_CALL_S", 0.2)
    call = store_call("os.kill(os.getpid(), signal.SIGTERM); time.sleep(1000); event.append('finished')")
    finished: list[str] = []
    with pytest.raises(SystemExit):
        call(finished)  # type: ignore[operator]
    assert finished == []


def test_a_handler_of_the_users_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(signum: int, frame: object) -> None: ...

    signal.signal(signal.SIGTERM, mine)
    made = WorkerSignals("worker 3")
    assert made.taken == [signal.SIGUSR1]
    assert signal.getsignal(signal.SIGTERM) is mine
    signal.signal(signal.SIGUSR1, mine)  # set later: it stays, too
    made.stop()
    assert [signal.getsignal(signum) for signum in SIGNALS] == [mine, mine]


def test_a_handler_below_python_is_one() -> None:
    assert is_free(signal.SIGUSR1)
    faulthandler.register(signal.SIGUSR1, file=sys.__stderr__)
    try:
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
        assert not is_free(signal.SIGUSR1)
    finally:
        faulthandler.unregister(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    assert not is_free(signal.SIGUSR1)


def test_only_the_main_thread_takes_signals() -> None:
    made: list[WorkerSignals] = []
    thread = threading.Thread(target=lambda: made.append(WorkerSignals("worker 3")))
    thread.start()
    thread.join()
    assert made[0].taken == []
    made[0].stop()
    assert is_free(signal.SIGTERM)


def test_afterwards_term_kills_and_usr1_does_nothing() -> None:
    made = WorkerSignals("worker 3")
    assert made.taken == [*SIGNALS]
    made.stop()
    made.stop()
    assert [signal.getsignal(each) for each in SIGNALS] == [signal.SIG_IGN, signal.SIG_DFL]


def test_a_nudge_that_comes_late_finds_a_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread sees a call that goes on, and nudges only when the process has left it and all else."""
    nudge = signal.pthread_kill

    def leave(made: WorkerSignals) -> None:
        asked = threading.Event()

        def late(thread: int, signum: int) -> None:
            asked.set()
            while not made._stopping:
                time.sleep(0.001)
            nudge(thread, signum)

        monkeypatch.setattr(signal, "pthread_kill", late)
        store_call("os.kill(os.getpid(), signal.SIGTERM); event.wait()")(asked)  # type: ignore[operator]
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
        made.stop()

    pid = os.fork()  # a process of its own, for the wrong action ends it
    if pid == 0:
        status = 1
        try:
            leave(WorkerSignals("worker 3"))
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_forked_child_has_the_default(installed: WorkerSignals) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit([signal.getsignal(each) for each in SIGNALS] != [signal.SIG_DFL] * 2)
    assert os.waitpid(pid, 0)[1] == 0
    assert installed.taken == [*SIGNALS]


def test_whether_another_process_has_a_handler() -> None:
    code = "import signal; signal.signal(signal.SIGUSR1, lambda *_: 0); print(flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert handles(process.pid, signal.SIGUSR1)
        assert not handles(process.pid, signal.SIGUSR2)
        process.kill()
        process.wait()
        assert not handles(process.pid, signal.SIGUSR1)


def test_which_frames_are_a_call_of_a_store() -> None:
    assert not in_store_call(sys._getframe())
    assert not in_store_call(None)
    found: list[bool] = []
    names: dict[str, object] = {"__name__": "tensorkv.worker.link"}
    exec("def call(back):\n    back()", names)  # a frame with another module's name
    names["call"](lambda: found.append(in_store_call(sys._getframe())))  # type: ignore[operator]
    assert found == [True]
