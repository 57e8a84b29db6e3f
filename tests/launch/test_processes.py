"""Real processes under a `ProcessGroup`: output, statuses, signals, and that nothing is left."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tensorkv.config import JobConfig
from tensorkv.launch import processes as module
from tensorkv.launch.forwarder import Forwarder
from tensorkv.launch.output import FileSink, Output
from tensorkv.launch.processes import ProcessGroup, ProcessSpec, Reaper, open_scheduler
from tensorkv.launch.supervisor import Node

LAUNCHER = """
import json, os, sys
from tensorkv.launch.processes import ProcessGroup, ProcessSpec
from tensorkv.launch.output import FileSink, Output
from tensorkv.launch.supervisor import Node

arguments = json.loads(sys.argv[1])
specs = [
    ProcessSpec(
        node=Node(role, rank), argv=tuple(argv), env=dict(os.environ), inherit_stdin=arguments["stdin"]
    )
    for role, rank, argv in arguments["specs"]
]
output = Output({"stdout": FileSink(sys.stdout), "stderr": FileSink(sys.stderr)})
grace_s = arguments["grace_s"]
sys.exit(ProcessGroup(specs, output, absent_servers=list, stop_servers=lambda: None, grace_s=grace_s).run())
"""

WAIT = "import signal; signal.pause()"
FAMILY = """
import os, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
print("pids", os.getpid(), child.pid, flush=True)
signal.pause()
"""
STUBBORN = """
import os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: os.write(1, b"not yet\\n"))
print("pids", os.getpid(), flush=True)
while True:
    signal.pause()
"""
DEADLINE_S = 30.0


def python(role: str, rank: int, code: str, *arguments: str) -> ProcessSpec:
    assert role in ("worker", "server")
    argv = (sys.executable, "-c", code, *arguments)
    return ProcessSpec(node=Node(role, rank), argv=argv, env=dict(os.environ))  # type: ignore[arg-type]


def job(
    *specs: ProcessSpec,
    absent_servers: Callable[[], Iterable[Node]] = list,
    stop_servers: Callable[[], None] = lambda: None,
    first_lost: Callable[[], Node | None] = lambda: None,
    goes_on: Callable[[Node, int], bool] = lambda node, returncode: False,
    **seconds: float,
) -> int:
    """Run a job in this process."""
    output = Output({"stdout": FileSink(sys.stdout), "stderr": FileSink(sys.stderr)})
    return ProcessGroup(
        specs,
        output,
        absent_servers=absent_servers,
        stop_servers=stop_servers,
        first_lost=first_lost,
        goes_on=goes_on,
        **seconds,
    ).run()


@contextmanager
def launcher(
    *specs: ProcessSpec,
    grace_s: float = 3.0,
    stdin: int | None = None,
    stdout: int = subprocess.PIPE,
    prelude: str = "",
) -> Iterator[subprocess.Popen[str]]:
    """Run a job in a process of its own."""
    arguments = {
        "specs": [(spec.node.role, spec.node.rank, spec.argv) for spec in specs],
        "grace_s": grace_s,
        "stdin": stdin is not None,
    }
    process = subprocess.Popen(
        [sys.executable, "-c", prelude + LAUNCHER, json.dumps(arguments)],
        stdin=subprocess.DEVNULL if stdin is None else stdin,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        with process:
            try:
                yield process
            finally:
                process.kill()
    finally:
        process.wait(DEADLINE_S)


def watch_pids(process: subprocess.Popen[str], count: int) -> list[int]:
    """Read the pids that processes print; return descriptors that tell when those have ended."""
    assert process.stdout is not None
    pids: list[int] = []
    while len(pids) < count:
        line = process.stdout.readline()
        assert line, "the launcher ended early"
        if "pids" in line:
            pids += [int(word) for word in line.split("pids")[1].split()]
    return [os.pidfd_open(pid) for pid in pids]


def assert_ended(handles: list[int]) -> None:
    for handle in handles:
        ready, _, _ = select.select([handle], [], [], DEADLINE_S)
        os.close(handle)
        assert ready, "a process was left running"


def fifo(tmp_path: Path) -> str:
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    return path


def release(path: str) -> None:
    """End the `open(path).read()` of a process."""
    with open(path, "w"):
        pass


def test_a_job_without_faults(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = fifo(tmp_path)

    status = job(
        python("server", 0, "import sys; open(sys.argv[1]).read(); print('server ends', end='')", path),
        python("worker", 0, "import sys; print('one\\ntwo'); print('warned', file=sys.stderr)"),
        python("worker", 1, "import sys; sys.stdout.buffer.write(b'\\xff half')"),
        stop_servers=lambda: release(path),
        server_stop_s=DEADLINE_S,
    )
    out, err = capfd.readouterr()
    assert status == 0
    assert sorted(out.splitlines()) == [
        "[server 0] server ends",
        "[worker 0] one",
        "[worker 0] two",
        "[worker 1] \ufffd half",
    ]
    assert out.index("one") < out.index("two") < out.index("server ends")
    assert err == "[worker 0] warned\n"


def test_the_first_failure_is_named_and_ends_the_others(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = fifo(tmp_path)
    last_words = (
        "import signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit('bye'))\n"
        "open(sys.argv[1], 'w').close()\n"
        "signal.pause()"
    )
    fail = "import sys; open(sys.argv[1]).read(); sys.stderr.write('Traceback\\nno luck\\n'); sys.exit(3)"
    status = job(
        python("server", 0, WAIT),
        python("worker", 0, last_words, path),
        python("worker", 1, fail, path),
        grace_s=DEADLINE_S,
    )
    assert status == 3
    assert capfd.readouterr().err.splitlines() == [
        "[worker 1] Traceback",
        "[worker 1] no luck",
        "[worker 0] bye",
        "tensorkv: the last lines of worker 1 on stderr were",
        "tensorkv:   Traceback",
        "tensorkv:   no luck",
        "tensorkv: worker 1 failed with status 3; the job was ended",
    ]


def test_last_lines_that_stand_there_already_are_not_repeated(capfd: pytest.CaptureFixture[str]) -> None:
    assert job(python("worker", 0, "raise SystemExit('no luck')")) == 1
    assert capfd.readouterr().err.splitlines() == [
        "[worker 0] no luck",
        "tensorkv: worker 0 failed with status 1; the job was ended",
    ]


@pytest.mark.parametrize(
    ("role", "code", "status"),
    [
        ("worker", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137),
        ("worker", "import os; os.abort()", 134),
        ("worker", "raise SystemExit(255)", 255),
        ("server", "raise SystemExit(7)", 1),
    ],
)
def test_the_status_of_a_job(role: str, code: str, status: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert job(python(role, 0, code), python("worker", 1, WAIT)) == status
    assert f"tensorkv: {role} 0 failed with status" in capfd.readouterr().err


def test_the_status_of_the_process_that_was_lost_first(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, slow = fifo(tmp_path), Node("worker", 1)
    asked = list[int]()

    def first_lost() -> Node:
        if not asked:
            release(path)
        asked.append(1)
        return slow

    status = job(
        python("worker", 0, "raise SystemExit(1)"),
        python("worker", 1, "import sys; open(sys.argv[1]).read(); sys.exit(9)", path),
        first_lost=first_lost,
        grace_s=DEADLINE_S,
    )
    assert status == 9
    assert "worker 1 failed with status 9" in capfd.readouterr().err


def test_a_worker_that_the_job_can_do_without_does_not_end_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = fifo(tmp_path)
    asked: list[tuple[Node, int]] = []

    def goes_on(node: Node, returncode: int) -> bool:
        asked.append((node, returncode))
        release(path)
        return True

    status = job(
        python("worker", 0, "import sys; sys.exit('so long')"),
        python("worker", 1, "import sys; open(sys.argv[1]).read(); print('done')", path),
        goes_on=goes_on,
    )
    assert status == 0  # of the others
    assert asked == [(Node("worker", 0), 1)]
    out, err = capfd.readouterr()
    assert out == "[worker 1] done\n"
    assert err.splitlines() == [
        "[worker 0] so long",
        "tensorkv: the last lines of worker 0 on stderr were",
        "tensorkv:   so long",
        "tensorkv: worker 0 failed with status 1; the job went on without it",
    ]


def test_once_the_job_is_ending_nobody_asks_whether_it_goes_on(tmp_path: Path) -> None:
    asked: list[Node] = []

    def goes_on(node: Node, returncode: int) -> bool:
        asked.append(node)
        return False

    assert (
        job(python("worker", 0, "import sys; sys.exit(3)"), python("worker", 1, WAIT), goes_on=goes_on) == 3
    )
    assert asked == [Node("worker", 0)]


def test_a_process_that_does_not_end_is_killed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = fifo(tmp_path)
    ignore = (
        "import signal, sys\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "open(sys.argv[1], 'w').close()\n"
        "signal.pause()"
    )
    fail = "import sys; open(sys.argv[1]).read(); sys.exit(2)"
    assert job(python("worker", 0, ignore, path), python("worker", 1, fail, path), grace_s=0.2) == 2
    assert capfd.readouterr().err.splitlines() == [
        "tensorkv: worker 0 did not end within 0.2 s and will be killed",
        "tensorkv: worker 1 failed with status 2; the job was ended",
    ]


def test_servers_that_do_not_end_are_killed_and_reported(capfd: pytest.CaptureFixture[str]) -> None:
    status = job(python("server", 0, WAIT), python("worker", 0, "pass"), server_stop_s=0.1)
    assert status == 0
    assert capfd.readouterr().err == "tensorkv: server 0 did not end within 0.1 s and will be killed\n"


def test_servers_that_have_not_started_yet_are_not_waited_for(capfd: pytest.CaptureFixture[str]) -> None:
    servers = [python("server", rank, WAIT) for rank in range(2)]
    nodes = [spec.node for spec in servers]
    worker = python("worker", 0, "pass")
    assert job(*servers, worker, absent_servers=lambda: nodes, server_stop_s=1000.0) == 0
    assert capfd.readouterr().err == ""


def test_servers_that_have_not_started_yet_end_before_the_others_are_told(tmp_path: Path) -> None:
    """The scheduler goes when it has told the others; a server that starts must not look for it then."""
    started, ended = tmp_path / "started", tmp_path / "ended"
    for path in (started, ended):
        os.mkfifo(path)
    code = (
        "import signal, sys\n"
        "def end(*_):\n    open(sys.argv[2], 'w').close()\n    sys.exit()\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "open(sys.argv[1], 'w').close()\n"
        "signal.pause()\n"
    )

    def absent() -> list[Node]:
        started.read_text()
        return [Node("server", 0)]

    def stop() -> None:
        ended.read_text()

    status = job(
        python("server", 0, code, str(started), str(ended)),
        python("worker", 0, "pass"),
        absent_servers=absent,
        stop_servers=stop,
        server_stop_s=DEADLINE_S,
    )
    assert status == 0


def test_a_process_that_cannot_be_started_leaves_no_other() -> None:
    huge = ProcessSpec(node=Node("worker", 1), argv=("true",), env={"PATH": os.defpath, "X": "x" * (1 << 20)})
    with pytest.raises(OSError, match="too long"):
        job(python("worker", 0, WAIT), huge)  # that worker 0 has ended is seen to by nothing_left


def test_a_file_that_is_no_program(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "program"
    path.write_text("not a program")
    path.chmod(0o755)
    assert job(ProcessSpec(node=Node("worker", 0), argv=(str(path),), env={})) == 126
    assert f"tensorkv: {path} cannot be run: Exec format error" in capfd.readouterr().err


def test_signals_are_as_the_command_would_find_them_in_a_shell(capfd: pytest.CaptureFixture[str]) -> None:
    argv = ("grep", "SigIgn", "/proc/self/status")
    assert job(ProcessSpec(node=Node("worker", 0), argv=argv, env=dict(os.environ))) == 0
    ignored = int(capfd.readouterr().out.split()[-1], 16)
    assert ignored & (1 << (signal.SIGPIPE - 1) | 1 << (signal.SIGXFSZ - 1)) == 0


def test_handlers_are_given_back(capfd: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
    job(python("worker", 0, "pass"))
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)] == before


def test_a_process_that_left_its_group_does_not_keep_the_job(capfd: pytest.CaptureFixture[str]) -> None:
    escape = (
        "import subprocess, sys\n"
        "wait = [sys.executable, '-c', 'import signal; signal.pause()']\n"
        "child = subprocess.Popen(wait, start_new_session=True)\n"
        "print(child.pid)"
    )
    assert job(python("worker", 0, escape)) == 0
    os.kill(int(capfd.readouterr().out.split()[-1]), signal.SIGKILL)


def test_lines_arrive_while_the_process_runs(tmp_path: Path) -> None:
    path = fifo(tmp_path)
    code = "import sys; print('started', flush=True); open(sys.argv[1]).read(); print('over')"
    with launcher(python("worker", 0, code, path)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "[worker 0] started\n"
        release(path)
        assert process.stdout.read() == "[worker 0] over\n"
        assert process.wait(DEADLINE_S) == 0


def test_what_a_slow_reader_has_not_read_is_not_lost() -> None:
    code = "print('\\n'.join(f'line {i}' for i in range(50000)))"
    with launcher(python("worker", 0, code)) as process:
        out, _ = process.communicate(timeout=DEADLINE_S)
        assert out.splitlines() == [f"[worker 0] line {i}" for i in range(50000)]
        assert process.returncode == 0


@pytest.mark.parametrize("inherit", [True, False])
def test_stdin(inherit: bool) -> None:
    code = "import sys; print(repr(sys.stdin.read()))"
    read, write = os.pipe()
    os.write(write, b"typed")
    os.close(write)
    with launcher(python("worker", 0, code), stdin=read if inherit else None) as process:
        os.close(read)
        out, _ = process.communicate(timeout=DEADLINE_S)
        assert out == ("[worker 0] 'typed'\n" if inherit else "[worker 0] ''\n")


@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_to_the_launcher_ends_everything(signum: signal.Signals, status: int) -> None:
    specs = [python("server", 0, FAMILY), python("worker", 0, FAMILY), python("worker", 1, FAMILY)]
    with launcher(*specs) as process:
        handles = watch_pids(process, 6)
        process.send_signal(signum)
        assert process.wait(DEADLINE_S) == status
        assert_ended(handles)
        assert process.stderr is not None
        assert process.stderr.read() == f"tensorkv: ended by {signum.name}; the job was ended\n"


def test_a_second_ctrl_c_kills_at_once() -> None:
    with launcher(python("worker", 0, STUBBORN), grace_s=1000.0) as process:
        handles = watch_pids(process, 1)
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.readline() == "[worker 0] not yet\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 130
        assert_ended(handles)


def test_an_ignored_hangup_stays_ignored(tmp_path: Path) -> None:
    path = fifo(tmp_path)
    code = "import sys; print('started', flush=True); open(sys.argv[1]).read()"
    nohup = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    with launcher(python("worker", 0, code, path), prelude=nohup) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "[worker 0] started\n"
        process.send_signal(signal.SIGHUP)
        release(path)
        assert process.wait(DEADLINE_S) == 0


def test_a_killed_launcher_leaves_nothing() -> None:
    with launcher(python("server", 0, FAMILY), python("worker", 0, FAMILY)) as process:
        handles = watch_pids(process, 4)
        helpers = [os.pidfd_open(pid) for pid in children(process.pid)]
        process.kill()
        assert process.wait(DEADLINE_S) == -signal.SIGKILL
        assert_ended(handles + helpers)


GUARD_KILLED = (
    r"tensorkv: the reaper of this job \(process (\d+)\) ended with status 137 \(SIGKILL\); "
    r"process (\d+) has taken its place\n"
)


def test_a_killed_guard_is_replaced_and_the_next_one_knows_whom_to_kill() -> None:
    """Grandchildren are what it is for: the kernel kills the children of a launcher that is killed."""
    with launcher(python("server", 0, FAMILY), python("worker", 0, FAMILY)) as process:
        handles = watch_pids(process, 4)
        reaper = next(pid for pid in children(process.pid) if b"reaper.py" in cmdline(pid))
        for _ in range(2):
            os.kill(reaper, signal.SIGKILL)
            assert process.stderr is not None
            told = re.fullmatch(GUARD_KILLED, process.stderr.readline())
            assert told is not None
            assert int(told[1]) == reaper
            reaper = int(told[2])
            assert reaper in children(process.pid)
        handles.append(os.pidfd_open(reaper))
        process.kill()
        assert process.wait(DEADLINE_S) == -signal.SIGKILL
        assert_ended(handles)


class TestGuard:
    def test_one_that_lives_is_left_alone(self) -> None:
        with Reaper() as reaper:
            assert reaper.check() is None

    def kill(self, reaper: Reaper) -> None:
        reaper._process.kill()
        os.waitid(os.P_PID, reaper._process.pid, os.WEXITED | os.WNOWAIT)

    def test_a_job_does_not_start_guards_without_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_MAX_GUARDS", 2)
        with Reaper() as reaper:
            self.kill(reaper)
            told = reaper.check()
            assert told is not None
            assert "has taken its place" in told
            self.kill(reaper)
            told = reaper.check()
            assert told is not None
            assert told.endswith("as those before it; the job goes on without one")
            assert reaper.check() is None
            reaper.add(os.getpid())
            reaper.remove(os.getpid())

    def test_a_system_without_room_for_another(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_process(*args: object, **options: object) -> None:
            raise BlockingIOError("no process to be had")

        with Reaper() as reaper:
            self.kill(reaper)
            monkeypatch.setattr(module.subprocess, "Popen", no_process)
            told = reaper.check()
            assert told is not None
            assert "no other can be started (no process to be had)" in told
            assert reaper.check() is None
            reaper.add(os.getpid())
            reaper.remove(os.getpid())


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_grandchildren_of_an_ended_worker_go_with_the_job(tmp_path: Path) -> None:
    path = fifo(tmp_path)
    code = FAMILY.removesuffix("signal.pause()\n") + "open(sys.argv[1]).read()"
    with launcher(python("worker", 0, code, path)) as process:
        handles = watch_pids(process, 2)
        release(path)
        assert process.wait(DEADLINE_S) == 0
        assert_ended(handles)


def test_a_reader_that_is_gone_ends_the_job() -> None:
    code = "import itertools\nfor i in itertools.count(): print(i)"
    with launcher(python("worker", 0, code), python("worker", 1, WAIT)) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(DEADLINE_S) == 141


def test_a_reader_that_does_not_read_does_not_stop_ctrl_c(tmp_path: Path) -> None:
    path = fifo(tmp_path)
    read, write = os.pipe()
    os.set_blocking(write, False)
    while select.select([], [write], [], 0)[1]:
        os.write(write, b"x" * 4096)
    os.set_blocking(write, True)
    code = "import os, sys; print(flush=True); print(os.getpid(), file=open(sys.argv[1], 'w')); " + WAIT
    with launcher(python("worker", 0, code, path), stdout=write) as process:
        os.close(write)
        handle = os.pidfd_open(int(Path(path).read_text()))
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 130
        assert_ended([handle])
    os.close(read)


def test_a_job_wants_the_main_thread() -> None:
    errors = list[BaseException]()

    def run() -> None:
        try:
            job(python("worker", 0, "pass"))
        except RuntimeError as exc:
            errors.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(DEADLINE_S)
    assert [str(error) for error in errors] == ["a job is run from the main thread, where signals arrive"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_last_lines_that_cannot_be_written_fail_the_job(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A process may end before its output is read: the launcher must not say that all went well."""
    run = Forwarder._run

    def run_late(forwarder: Forwarder) -> None:
        assert forwarder._finishing.wait(DEADLINE_S)
        run(forwarder)

    monkeypatch.setattr(Forwarder, "_run", run_late)
    with open("/dev/full", "w") as full:
        output = Output({"stdout": FileSink(full), "stderr": FileSink(sys.stderr)})
        status = ProcessGroup(
            [python("worker", 0, "print('hi')")],
            output,
            absent_servers=list,
            stop_servers=lambda: None,
            first_lost=lambda: None,
            goes_on=lambda node, returncode: False,
        ).run()
    assert status == 1
    assert capfd.readouterr().err.endswith(
        "the output cannot be written: No space left on device; the job was ended\n"
    )


def test_a_scheduler_is_opened_as_the_config_says(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, object] = {}

    class Scheduler:
        address = ("127.0.0.1", 4321)

        def __init__(self, **options: object) -> None:
            told.update(options)

    monkeypatch.setattr(module, "SchedulerServer", Scheduler)
    job_of_two = JobConfig(
        role="worker",
        rank=0,
        num_workers=2,
        num_servers=1,
        scheduler_host="",
        scheduler_port=0,
        token="",
        host="127.0.0.2",
        peer_timeout_s=2.5,
        slice_bound_bytes=100,
    )
    _, config = open_scheduler(job_of_two)
    assert (config.scheduler_host, config.scheduler_port) == Scheduler.address
    assert len(config.token) == 64
    given = {name: told[name] for name in ("num_workers", "num_servers", "token", "host")}
    assert given == {"num_workers": 2, "num_servers": 1, "token": config.token, "host": "127.0.0.2"}
    assert (told["peer_timeout_s"], told["slice_bound_bytes"]) == (2.5, 100)
