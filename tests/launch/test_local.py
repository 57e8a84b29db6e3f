"""What a job on this machine consists of, and what may be asked for."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from tensorkv import config as settings
from tensorkv.config import JobConfig
from tensorkv.errors import InvalidArgument
from tensorkv.launch.local import (
    CommandNotFound,
    JobOptions,
    find_command,
    job_config,
    plan,
    run_local,
    terminal_variables,
)
from tensorkv.launch.output import Sink, Stream
from tensorkv.launch.supervisor import Node

CORES = len(os.sched_getaffinity(0))


def options(**changes: object) -> JobOptions:
    given: dict[str, object] = {"command": ("python", "train.py"), "num_workers": 3, "num_servers": 2}
    return JobOptions(**{**given, **changes})  # type: ignore[arg-type]


def config(environ: dict[str, str] | None = None, **changes: object) -> JobConfig:
    return job_config(options(**changes), environ or {}, scheduler=("127.0.0.1", 4321), token="secret")


class TestFindCommand:
    def test_what_is_on_the_path_stays_as_it_was_typed(self, tmp_path: Path) -> None:
        program = tmp_path / "train"
        program.touch(stat.S_IRWXU)
        found = find_command(["train", "--epochs", "3"], {"PATH": str(tmp_path)})
        assert found == ("train", "--epochs", "3")
        assert find_command([str(program)], {"PATH": ""}) == (str(program),)

    def test_python_is_this_one_only_if_there_is_no_other(self, tmp_path: Path) -> None:
        environ = {"PATH": str(tmp_path)}
        assert find_command(["python", "x.py"], environ) == (sys.executable, "x.py")
        (tmp_path / "python").touch(stat.S_IRWXU)
        assert find_command(["python", "x.py"], environ) == ("python", "x.py")

    def test_a_shell_would_say_127_or_126(self, tmp_path: Path) -> None:
        with pytest.raises(CommandNotFound, match="nosuch: command not found") as caught:
            find_command(["nosuch"], {"PATH": str(tmp_path)})
        assert caught.value.status == 127
        path = tmp_path / "train.py"
        path.touch(stat.S_IRUSR)
        with pytest.raises(CommandNotFound, match="not an executable file") as caught:
            find_command([str(path)], {"PATH": str(tmp_path)})
        assert caught.value.status == 126


class TestJobOptions:
    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"num_workers": 0}, "num_workers=0 is too few"),
            ({"num_servers": -1}, "num_servers=-1 is too few"),
            ({"timeout_s": 0.0}, "more than 0 seconds, but is 0"),
            ({"timeout_s": float("nan")}, "more than 0 seconds"),
            ({"peer_timeout_s": 0.0}, "peer timeout must be more than 0 seconds"),
            ({"allow_import": ("torch", "not a.module")}, "'not a.module' is not the name"),
            ({"allow_import": ("",)}, "'' is not the name"),
            ({"command": ()}, "no command"),
        ],
    )
    def test_what_cannot_be(self, changes: dict[str, object], text: str) -> None:
        with pytest.raises(InvalidArgument, match=text):
            options(**changes)


class TestJobConfig:
    def test_options_become_the_config_of_worker_0(self) -> None:
        assert config(timeout_s=5.0, allow_import=("a.b", "c"), host="127.0.0.2") == JobConfig(
            role="worker",
            rank=0,
            num_workers=3,
            num_servers=2,
            scheduler_host="127.0.0.1",
            scheduler_port=4321,
            token="secret",
            host="127.0.0.2",
            timeout_s=5.0,
            allow_import=("a.b", "c"),
        )

    def test_the_environment_fills_in_what_options_leave_open(self) -> None:
        environ = {
            settings.ENV_PEER_TIMEOUT_S: "2.5",
            settings.ENV_TIMEOUT_S: "7.5",
            settings.ENV_SLICE_BOUND_BYTES: "100",
        }
        assert (config(environ).timeout_s, config(environ).slice_bound_bytes) == (7.5, 100)
        assert config(environ, timeout_s=5.0).timeout_s == 5.0
        assert config(environ).peer_timeout_s == 2.5
        assert config(environ, peer_timeout_s=5.0).peer_timeout_s == 5.0
        assert config().peer_timeout_s == settings.DEFAULT_PEER_TIMEOUT_S
        assert config().timeout_s == settings.DEFAULT_TIMEOUT_S

    @pytest.mark.parametrize(
        "name", [settings.ENV_TIMEOUT_S, settings.ENV_PEER_TIMEOUT_S, settings.ENV_SLICE_BOUND_BYTES]
    )
    def test_a_number_that_is_none(self, name: str) -> None:
        with pytest.raises(InvalidArgument, match=f"{name}=soon"):
            config({name: "soon"})


class TestPlan:
    def test_each_process_knows_who_it_is(self) -> None:
        specs = plan(config(allow_import=("my.optim",)), ("train",), {"HOME": "here"})
        servers = [Node("server", 0), Node("server", 1)]
        assert [spec.node for spec in specs] == [*servers, *(Node("worker", rank) for rank in range(3))]
        for spec in specs:
            told = settings.from_env(spec.env)
            assert told is not None
            assert (told.role, told.rank) == (spec.node.role, spec.node.rank)
            assert (told.num_workers, told.num_servers) == (3, 2)
            assert (told.scheduler_host, told.scheduler_port) == ("127.0.0.1", 4321)
            assert (told.token, told.allow_import) == ("secret", ("my.optim",))
            assert (spec.env["HOME"], spec.env["PYTHONUNBUFFERED"]) == ("here", "1")
        assert {spec.argv for spec in specs[2:]} == {("train",)}
        assert {spec.argv for spec in specs[:2]} == {(sys.executable, "-m", "tensorkv.server.loop")}

    @pytest.mark.parametrize("num_workers", [1, 2, CORES + 1])
    def test_the_cores_are_shared_out(self, num_workers: int) -> None:
        specs = plan(config(num_workers=num_workers), ("train",), {})
        expected = max(1, CORES // num_workers)
        assert [spec.env["OMP_NUM_THREADS"] for spec in specs] == ["1", "1", *[str(expected)] * num_workers]

    def test_who_sets_the_number_of_threads_is_respected(self) -> None:
        specs = plan(config(), ("train",), {"OMP_NUM_THREADS": "5"})
        assert [spec.env["OMP_NUM_THREADS"] for spec in specs] == ["1", "1", "5", "5", "5"]

    def test_large_copies_of_workers_go_past_the_caches_unless_the_user_says_how(self) -> None:
        def tunables(environ: dict[str, str]) -> list[str | None]:
            return [spec.env.get("GLIBC_TUNABLES") for spec in plan(config(), ("train",), environ)]

        assert tunables({}) == [None, None, *["glibc.cpu.x86_non_temporal_threshold=524288"] * 3]
        assert tunables({"GLIBC_TUNABLES": "glibc.malloc.check=1"}) == ["glibc.malloc.check=1"] * 5

    def test_an_outer_job_does_not_leak_in(self) -> None:
        outer = config(num_workers=9).to_env()
        told = settings.from_env(plan(config(), ("train",), outer)[-1].env)
        assert told is not None
        assert (told.rank, told.num_workers) == (2, 3)

    def test_workers_get_what_torchrun_tells_if_that_is_wanted(self) -> None:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        told = [tuple(map(spec.env.get, names)) for spec in plan(config(), ("train",), {}, 29500)]
        nothing = (None,) * 6
        workers = [(str(rank), "3", str(rank), "3", "127.0.0.1", "29500") for rank in range(3)]
        assert told == [nothing, nothing, *workers]

    def test_only_a_single_worker_reads_what_is_typed(self) -> None:
        assert [s.inherit_stdin for s in plan(config(num_workers=1), ("x",), {})] == [False, False, True]
        assert not any(s.inherit_stdin for s in plan(config(num_workers=2), ("x",), {}))


class Screen:
    """A sink of some size."""

    def __init__(self, size: tuple[int, int] | None) -> None:
        self.size = size

    def write(self, text: str) -> None:
        raise AssertionError("nothing is to be written")


class TestTerminalVariables:
    def test_bars_get_the_width_that_the_prefix_leaves(self) -> None:
        sinks: dict[Stream, Sink] = {"stdout": Screen((80, 24)), "stderr": Screen((80, 24))}
        told = terminal_variables(options(), sinks)
        assert told == {"COLUMNS": "68"}
        assert terminal_variables(options(num_workers=11), sinks)["COLUMNS"] == "67"
        assert terminal_variables(options(prefix=False), sinks)["COLUMNS"] == "79"

    def test_without_a_terminal_for_both_there_is_nothing_to_tell(self) -> None:
        sinks: dict[Stream, Sink] = {"stdout": Screen(None), "stderr": Screen((80, 24))}
        assert terminal_variables(options(), sinks) == {}
        assert (
            terminal_variables(options(), {**sinks, "stdout": Screen((80, 24)), "stderr": Screen(None)}) == {}
        )


class TestRunLocal:
    """Whole jobs through the launcher in this process; tests/cli has those through the command."""

    def test_workers_that_never_create_a_store(self, capfd: pytest.CaptureFixture[str]) -> None:
        command = ("sh", "-c", "echo $TENSORKV_ROLE $TENSORKV_RANK of $TENSORKV_NUM_WORKERS")
        assert run_local(options(command=command, num_workers=2), os.environ) == 0
        out, err = capfd.readouterr()
        assert sorted(out.splitlines()) == ["[worker 0] worker 0 of 2", "[worker 1] worker 1 of 2"]
        assert err == ""

    def test_a_script_makes_a_process_group(self, capfd: pytest.CaptureFixture[str]) -> None:
        code = (
            "import torch, torch.distributed as dist; dist.init_process_group('gloo'); "
            "one = torch.ones(1); dist.all_reduce(one); print(one.item()); dist.destroy_process_group()"
        )
        command = (sys.executable, "-c", code)
        assert run_local(options(command=command, num_workers=2, torch_env=True), os.environ) == 0
        assert sorted(capfd.readouterr().out.splitlines()) == ["[worker 0] 2.0", "[worker 1] 2.0"]

    def test_tokens_are_fresh(self, capfd: pytest.CaptureFixture[str]) -> None:
        tokens = set[str]()
        for _ in range(2):
            command = ("sh", "-c", "echo $TENSORKV_TOKEN")
            run_local(options(command=command, num_workers=1, num_servers=1, prefix=False), os.environ)
            tokens.add(capfd.readouterr().out.strip())
        assert len(tokens) == 2
        assert all(len(token) >= 32 for token in tokens)

    def test_the_status_of_a_worker(self, capfd: pytest.CaptureFixture[str]) -> None:
        command = ("sh", "-c", "exit 3")
        assert run_local(options(command=command, num_workers=1), os.environ) == 3
        assert capfd.readouterr().err == "tensorkv: worker 0 failed with status 3; the job was ended\n"

    def test_an_address_that_is_not_of_this_host(self) -> None:
        with pytest.raises(OSError, match="192.0.2.1"):
            run_local(options(command=("true",), host="192.0.2.1"), os.environ)

    def test_nothing_starts_without_a_command(self) -> None:
        with pytest.raises(CommandNotFound):
            run_local(options(command=("nosuch",)), {"PATH": ""})
