"""The command `tensorkv`, in this process and as a process of its own."""

from __future__ import annotations

import json
import os
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
    options = ["--num-workers", "-n", "--num-servers", "-s", "--host", "--timeout", "--peer-timeout"]
    for option in (*options, "--allow-import"):
        assert option in out


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


def test_long_names_of_the_numbers(capfd: pytest.CaptureFixture[str]) -> None:
    command = ["sh", "-c", "echo $TENSORKV_NUM_WORKERS $TENSORKV_NUM_SERVERS"]
    assert tensorkv_command("run", "--num-workers", "2", "--num-servers", "3", *command) == 0
    assert sorted(capfd.readouterr().out.splitlines()) == ["[worker 0] 2 3", "[worker 1] 2 3"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-n", "0", "true"], "at least one of its workers, but 0"),
        (["-s", "0", "true"], "at least one of its servers, but 0"),
        (["--timeout", "-1", "true"], "more than 0 seconds"),
        (["--peer-timeout", "0", "true"], "more than 0 seconds"),
        (["--allow-import", "not a module", "true"], "is not the name of a"),
        (["-n", "two", "true"], "'--num-workers' / '-n'"),
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
        "assert 'tensorkv.runtime.scheduler' in sys.modules\n"
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
    done = subprocess.run(
        ["sh", "-c", f'"{sys.executable}" -m tensorkv {arguments}'],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
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
