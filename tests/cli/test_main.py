"""The command `tensorkv`, in this process and as a process of its own."""

from __future__ import annotations

import inspect
import json
import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import tensorkv
from tensorkv.cli.main import app, main
from tensorkv.config import ENV_SLICE_BOUND_BYTES, from_env

DEADLINE_S = 50.0
TELL = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"


def tensorkv_command(*arguments: str) -> int:
    """Run the command in this process; return its exit status."""
    with pytest.raises(SystemExit) as caught:
        app(list(arguments), prog_name="tensorkv")
    assert isinstance(caught.value.code, int)
    return caught.value.code


def told(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[list[str], dict[str, str]]:
    """Run one worker; return the arguments and the environment it was given."""
    assert tensorkv_command("run", "--no-prefix", *arguments) == 0
    argv, environ = json.loads(capfd.readouterr().out)
    return argv, environ


def test_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert tensorkv_command("--version") == 0
    assert capfd.readouterr().out == f"tensorkv {tensorkv.__version__}\n"


def test_main_is_the_installed_command(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["anything", "--version"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    assert capfd.readouterr().out == f"tensorkv {tensorkv.__version__}\n"


def test_help_names_the_options(capfd: pytest.CaptureFixture[str]) -> None:
    assert tensorkv_command("run", "--help") == 0
    out = capfd.readouterr().out
    options = ["--workers", "-n", "--servers", "-s", "--host", "--timeout", "--peer-timeout"]
    for option in (*options, "--allow-import"):
        assert option in out


def long_options(command: str) -> dict[str, str]:
    """Return the options of a command and the line of each, as its help tells them."""
    found = re.findall(r"^  (-[^-], )?(--[a-z-]+)(.*)$", help_of(command, 120), re.MULTILINE)
    return {long: (short + long + rest).split("  ")[0] for short, long, rest in found}


def help_of(command: str, columns: int) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tensorkv", *command.split(), "--help"],
        env={**os.environ, "COLUMNS": str(columns)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=True,
    )
    return done.stdout


def test_commands_call_the_same_thing_the_same() -> None:
    run, bench = long_options("run"), long_options("bench")
    assert run["--workers"] == bench["--workers"] == "-n, --workers <int>"
    assert run["--servers"] == bench["--servers"] == "-s, --servers <int>"
    parameters = inspect.signature(tensorkv.spawn).parameters
    for long in run.keys() - {"--host", "--prefix", "--help", "--peer-timeout", "--torch-env"}:
        name = long[2:].replace("-", "_")
        assert {name, f"num_{name}", f"{name}_s"} & parameters.keys(), f"spawn has no name for {long}"


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize(
    ("command", "examples"),
    [
        ("run", ["tensorkv run -n 4 -s 2 python train.py --epochs 3"]),
        (
            "bench",
            [
                "tensorkv bench --model bert-base --optimizer adam",
                "tensorkv bench --sizes 4KB..256MB --plot bandwidth.png",
                "tensorkv run -n 4 -s 2 tensorkv bench --model resnet50",
            ],
        ),
    ],
)
def test_help_keeps_the_lines_of_its_examples(columns: int, command: str, examples: list[str]) -> None:
    text = help_of(command, columns)
    lines = text.splitlines()
    for example in examples:
        assert f"      {example}" in lines
    assert max(map(len, lines)) <= columns
    assert "\b" not in text


@pytest.mark.parametrize(
    ("given", "command", "warned_of"),
    [
        ([], ["x.py", "-n", "2"], ["-n 2"]),
        ([], ["x.py", "--epochs", "3", "-n2", "--servers=3"], ["-n2", "--servers=3"]),
        ([], ["x.py", "--num-workers", "2", "-s", "1"], ["--num-workers 2", "-s 1"]),
        (["-n", "1"], ["x.py", "-n", "2"], []),
        (["--workers", "1"], ["x.py", "-n", "2", "-s", "4"], ["-s 4"]),
        (["--"], ["x.py", "-n", "2"], []),
        (["-s", "1"], ["x.py", "-n", "two", "-n", "-name", "-s"], []),
    ],
)
def test_options_behind_the_command_go_to_it_and_are_warned_of(
    given: list[str], command: list[str], warned_of: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert tensorkv_command("run", "--no-prefix", *given, "echo", *command) == 0
    out, err = capfd.readouterr()
    assert out == " ".join(command) + "\n"
    assert len(err.splitlines()) == len(warned_of)
    for written, line in zip(warned_of, err.splitlines(), strict=True):
        assert line.startswith(f"tensorkv: {written} stands after 'echo' and goes to that; ")
        assert line.endswith(f"put it before the command: tensorkv run {written} echo ...")


@pytest.mark.parametrize("separator", [[], ["--"]])
def test_what_follows_the_command_belongs_to_it(
    separator: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-c", TELL, "-n", "7", "--no-prefix", "--", "--help"]
    argv, environ = told(capfd, "-s", "2", *separator, *command)
    assert argv == ["-n", "7", "--no-prefix", "--", "--help"]
    config = from_env(environ)
    assert config is not None
    assert (config.role, config.rank, config.num_workers, config.num_servers) == ("worker", 0, 1, 2)


def test_options_reach_the_processes(capfd: pytest.CaptureFixture[str]) -> None:
    given = ["--timeout", "12.5", "--peer-timeout", "2.5", "--host", "127.0.0.1"]
    given += ["--allow-import", "a.b", "--allow-import", "c"]
    config = from_env(told(capfd, *given, sys.executable, "-c", TELL)[1])
    assert config is not None
    assert config.peer_timeout_s == 2.5
    assert (config.timeout_s, config.allow_import, config.host) == (12.5, ("a.b", "c"), "127.0.0.1")


@pytest.mark.parametrize("prefix", ["--", "--num-"])
def test_long_names_of_the_numbers(prefix: str, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["sh", "-c", "echo $TENSORKV_NUM_WORKERS $TENSORKV_NUM_SERVERS"]
    assert tensorkv_command("run", f"{prefix}workers", "2", f"{prefix}servers", "3", *command) == 0
    assert sorted(capfd.readouterr().out.splitlines()) == ["[worker 0] 2 3", "[worker 1] 2 3"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-n", "0", "true"], "'--workers' / '-n': 0 is too few"),
        (["-s", "0", "true"], "'--servers' / '-s': 0 is too few"),
        (["--timeout", "-1", "true"], "'--timeout': -1 is no time to wait; more than 0 seconds"),
        (["--peer-timeout", "0", "true"], "'--peer-timeout': 0 is no time to wait"),
        (["--allow-import", "not a module", "true"], "is not the name of a"),
        (["-n", "two", "true"], "'--workers' / '-n'"),
        ([], "Missing argument"),
        (["--nosuch", "true"], "No such option"),
    ],
)
def test_what_cannot_be_is_refused_with_2(
    arguments: list[str], text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert tensorkv_command("run", *arguments) == 2
    assert text in capfd.readouterr().err


def test_a_number_in_the_environment_that_is_none(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENV_SLICE_BOUND_BYTES, "many")
    assert tensorkv_command("run", "true") == 2
    assert capfd.readouterr().err.startswith(f"tensorkv: the environment says {ENV_SLICE_BOUND_BYTES}=many")


def test_a_command_that_is_not_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert tensorkv_command("run", "-n", "2", "nosuch-command", "--flag") == 127
    assert capfd.readouterr().err == "tensorkv: nosuch-command: command not found\n"
    path = tmp_path / "train.py"
    path.touch(0o600)
    assert tensorkv_command("run", str(path)) == 126
    assert capfd.readouterr().err == f"tensorkv: {path}: is not an executable file\n"


def test_an_address_that_is_not_of_this_host(capfd: pytest.CaptureFixture[str]) -> None:
    assert tensorkv_command("run", "--host", "192.0.2.1", "true") == 1
    assert "tensorkv: the job could not be started: " in capfd.readouterr().err


def test_the_first_failure_is_the_status_and_named_last(capfd: pytest.CaptureFixture[str]) -> None:
    script = 'test $TENSORKV_RANK = 2 && { echo "no luck" >&2; exit 3; }; exec sleep 1000'
    assert tensorkv_command("run", "-n", "3", "--", "sh", "-c", script) == 3
    assert capfd.readouterr().err.splitlines() == [
        "[worker 2] no luck",
        "tensorkv: worker 2 failed with status 3; the job was ended",
    ]


def test_ctrl_c_at_the_command() -> None:
    script = "echo pid $$; exec sleep 1000"
    command = [sys.executable, "-m", "tensorkv", "run", "-n", "2", "sh", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        handles = [os.pidfd_open(int(process.stdout.readline().split()[-1])) for _ in range(2)]
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert err == "tensorkv: ended by SIGINT; the job was ended\n"
    ended, _, _ = select.select(handles, [], [], 0)  # the launcher waits for them before it ends
    for handle in handles:
        os.close(handle)
    assert ended == handles, "a process was left running"


def test_the_command_line_does_without_torch() -> None:
    code = (
        "import sys\n"
        "from tensorkv.cli.main import app\n"
        "try:\n"
        "    app(['run', '-n', '1', '-s', '1', 'true'])\n"
        "except SystemExit as exc:\n"
        "    assert exc.code == 0, exc.code\n"
        "assert 'tensorkv.scheduler.loop' in sys.modules\n"
        "print(sorted({'torch', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


WRITES = "run -n 1 sh -c 'echo hi; echo ho >&2; exit 3'"
FULL = "tensorkv: the output cannot be written: No space left on device; the job was ended\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize(
    ("arguments", "status", "out", "err"),
    [
        (
            f"{WRITES} >&-",
            3,
            "",
            "[worker 0] ho\ntensorkv: worker 0 failed with status 3; the job was ended\n",
        ),
        (f"{WRITES} 2>&-", 3, "[worker 0] hi\n", ""),
        (f"{WRITES} >&- 2>&- <&-", 3, "", ""),
        ("run sh -c 'cat; ls -l /proc/self/fd/0 | grep -c null' <&-", 0, "[worker 0] 1\n", ""),
        ("run sh -c 'echo hi' >/dev/full", 1, "", FULL),
        ("run sh -c 'echo hi >&2; exec sleep 1000' 2>/dev/full", 1, "", ""),
        ("run nosuch 2>/dev/full", 127, "", ""),
        ("--version >&-", 0, "", ""),
        ("--version >/dev/full", 1, "", "tensorkv: [Errno 28] No space left on device\n"),
        ("bench --steps -1 >&- 2>&-", 2, "", ""),
    ],
)
def test_streams_that_are_closed_or_full(arguments: str, status: int, out: str, err: str) -> None:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        ["sh", "-c", f'"{sys.executable}" -m tensorkv {arguments}'],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        env=env,
    )
    assert (done.returncode, done.stdout, done.stderr) == (status, out, err)


def test_a_reader_that_has_gone_ends_the_job() -> None:
    command = [sys.executable, "-m", "tensorkv", "run", "sh", "-c", "echo hi; while echo ho; do :; done"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "[worker 0] hi\n"
        process.stdout.close()
        process.stdout = None
        _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 128 + signal.SIGPIPE
    assert err == "tensorkv: nobody reads the output; the job was ended\n"
