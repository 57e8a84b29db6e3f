"""The thread between the pipes of the processes and the output."""

from __future__ import annotations

import os
import threading
from typing import IO

from tensorkv.launch.forwarder import Forwarder
from tensorkv.launch.output import Output
from tensorkv.launch.supervisor import Node

W0, W1 = Node("worker", 0), Node("worker", 1)
DEADLINE_S = 30.0


class Paper:
    """A sink; with an error, one that cannot be written."""

    size = None

    def __init__(self, error: OSError | None = None) -> None:
        self.text = ""
        self.error = error
        self.written = threading.Semaphore(0)

    def write(self, text: str) -> None:
        if self.error is not None:
            raise self.error
        self.text += text
        self.written.release()


def pipe() -> tuple[IO[bytes], IO[bytes]]:
    read, write = os.pipe()
    return open(read, "rb", buffering=0), open(write, "wb", buffering=0)


def test_everything_that_was_written_arrives() -> None:
    paper, over = Paper(), threading.Event()
    forwarder = Forwarder(Output({"stdout": paper, "stderr": paper}), over.set)
    read0, write0 = pipe()
    read1, write1 = pipe()
    forwarder.add(W0, "stdout", read0)
    forwarder.add(W1, "stderr", read1)
    forwarder.start()
    write0.write(b"at once\n")
    assert paper.written.acquire(timeout=DEADLINE_S)
    assert paper.text == "[worker 0] at once\n"
    with write0:
        write0.write(b"half")
    assert paper.written.acquire(timeout=DEADLINE_S), "the end of a pipe finishes its line"
    write1.write(b"still open")
    assert not forwarder.done
    forwarder.finish()
    assert over.wait(DEADLINE_S)
    assert forwarder.done
    assert forwarder.error is None
    assert paper.text == "[worker 0] at once\n[worker 0] half\n[worker 1] still open\n"
    forwarder.close()
    assert read0.closed
    assert read1.closed
    write1.close()


def test_a_process_that_writes_for_ever_does_not_keep_it() -> None:
    paper, over = Paper(), threading.Event()
    forwarder = Forwarder(Output({"stdout": paper, "stderr": paper}), over.set)
    read, write = pipe()
    forwarder.add(W0, "stdout", read)

    def flood() -> None:
        with write:
            try:
                while True:
                    write.write(b"more\n" * 1000)
            except BrokenPipeError:
                return

    thread = threading.Thread(target=flood)
    thread.start()
    forwarder.start()
    forwarder.finish()
    assert over.wait(DEADLINE_S)
    forwarder.close()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


def test_an_output_that_cannot_be_written_is_told() -> None:
    error, over = BrokenPipeError(), threading.Event()
    forwarder = Forwarder(Output({"stdout": Paper(error), "stderr": Paper()}), over.set)
    read, write = pipe()
    forwarder.add(W0, "stdout", read)
    forwarder.start()
    with write:
        write.write(b"line\n")
    assert over.wait(DEADLINE_S)
    assert forwarder.error is error
    forwarder.close()


def test_one_that_was_never_started_is_closed_too() -> None:
    forwarder = Forwarder(Output({"stdout": Paper(), "stderr": Paper()}), lambda: None)
    read, write = pipe()
    forwarder.add(W0, "stdout", read)
    forwarder.close()
    assert read.closed
    write.close()


def test_the_launcher_says_a_line_meanwhile() -> None:
    paper, over = Paper(), threading.Event()
    forwarder = Forwarder(Output({"stdout": paper, "stderr": paper}), over.set)
    forwarder.start()
    forwarder.say("nothing waits")
    assert paper.written.acquire(timeout=DEADLINE_S)
    assert paper.text == "tensorkv: nothing waits\n"
    forwarder.finish()
    assert over.wait(DEADLINE_S)
    forwarder.close()


def test_it_notifies_before_it_is_closed_or_never() -> None:
    """What `notify` writes to is gone after `close`: a descriptor of that number may be another's."""
    closed, notified = threading.Event(), list[bool]()
    forwarder = Forwarder(
        Output({"stdout": Paper(), "stderr": Paper()}), lambda: notified.append(closed.is_set())
    )
    told = threading.Event()

    class Done(threading.Event):
        def set(self) -> None:
            super().set()
            told.set()
            closed.wait(0.2)  # time enough for the launcher, which has seen it, to close

    forwarder._done = Done()
    forwarder.start()
    forwarder.finish()
    assert told.wait(DEADLINE_S)
    forwarder.close()
    closed.set()
    forwarder._thread.join(DEADLINE_S)
    assert notified == [False]


def test_one_that_is_stuck_in_a_write_notifies_nobody_later() -> None:
    stuck, free = threading.Event(), threading.Event()

    class Full(Paper):
        def write(self, text: str) -> None:
            stuck.set()
            assert free.wait(DEADLINE_S)

    notified = list[int]()
    forwarder = Forwarder(Output({"stdout": Full(), "stderr": Paper()}), lambda: notified.append(1))
    read, write = pipe()
    forwarder.add(W0, "stdout", read)
    forwarder.start()
    with write:
        write.write(b"line\n")
    assert stuck.wait(DEADLINE_S)
    forwarder.finish()
    forwarder.close()
    free.set()
    forwarder._thread.join(DEADLINE_S)
    assert forwarder.done
    assert notified == []
    forwarder.close()  # now it is free
