"""Scripts of frameworks before and after a few lines were changed: two workers train what one process does.

`make test-frameworks` runs this in an environment of its own; without the frameworks most tests are skipped.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NEEDS = {
    "plain": (),
    "numpied": (),
    "trainer": ("transformers", "accelerate"),
    "sft": ("trl", "datasets"),
    "accelerated": ("accelerate",),
    "lit": ("lightning",),
    "lit_manual": ("lightning",),
    "optaxed": ("jax", "optax"),
}
MAX_ADDED_LINES = 4
BATCH = 8
SCRIPTS = [
    pytest.param(
        name, marks=pytest.mark.skipif(not all(map(importlib.util.find_spec, needed)), reason="not installed")
    )
    for name, needed in NEEDS.items()
]

pytestmark = pytest.mark.timeout(300)  # some take ten seconds to import


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def start(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "RAY_DEDUP_LOGS": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=250, check=False
    )


def run(folder: Path, *command: str) -> list[list[float]]:
    """Run a script; return the weights that each of its processes prints."""
    done = start(folder, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    # A list is written at once, but what two processes of torchrun print may lie between its line's parts.
    lines = re.findall(r"\[(-?[0-9][-+.e0-9]*(?:, -?[0-9][-+.e0-9]*)+)\]", done.stdout)
    return [[float(number) for number in line.split(",")] for line in lines]


def run_alone(folder: Path, name: str, *arguments: str) -> list[float]:
    (found,) = run(folder, sys.executable, str(HERE / "before" / f"{name}.py"), str(BATCH), *arguments)
    return found


def run_job(folder: Path, name: str, *arguments: str) -> list[list[float]]:
    job = (sys.executable, "-m", "tensorkv", "run", "-n", "2", "-s", "1", "--", sys.executable)
    return run(folder, *job, str(HERE / "after" / f"{name}.py"), str(BATCH // 2), *arguments)


@pytest.mark.e2e
@pytest.mark.parametrize("name", SCRIPTS)
def test_two_workers_train_what_one_process_does(name: str, tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    first, second = run_job(tmp_path / "job", name)
    assert first == second
    assert first == pytest.approx(run_alone(tmp_path, name), rel=1e-3, abs=2e-3)


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="not installed")
def test_ray_train_starts_the_workers_and_these_the_servers(tmp_path: Path) -> None:
    scripts = [str(HERE / version / "rayed.py") for version in ("before", "after")]
    expected = run(tmp_path, sys.executable, scripts[0], str(BATCH), "1")[0]
    found = run(tmp_path, sys.executable, scripts[1], str(BATCH // 2), "2")
    assert len(found) >= 2
    for each in found:
        assert each == found[0] == pytest.approx(expected, rel=1e-3, abs=2e-3)


@pytest.mark.e2e
@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="not installed")
def test_trainer_resumes_bit_by_bit(tmp_path: Path) -> None:
    expected = run_job(tmp_path, "trainer")
    for rank in range(2):
        (tmp_path / "out" / str(rank) / "checkpoint-6").rename(tmp_path / f"last{rank}")
    assert run_job(tmp_path, "trainer", "resume") == expected


@pytest.mark.e2e
@pytest.mark.parametrize("name", [each for each in SCRIPTS if each.values[0] in ("plain", "optaxed", "lit")])
def test_torchrun_starts_what_needs_no_framework(name: str, tmp_path: Path) -> None:
    script = str(HERE / "after" / f"{name}.py")
    first, second = run(tmp_path, *TORCHRUN, script, str(BATCH // 2))
    assert first == second
    assert first == pytest.approx(run_alone(tmp_path, name), rel=1e-3, abs=2e-3)


@pytest.mark.e2e
@pytest.mark.parametrize("name", [each for each in SCRIPTS if each.values[0] in ("trainer", "lit")])
def test_a_framework_that_averages_by_itself_is_refused(name: str, tmp_path: Path) -> None:
    script = (HERE / "after" / f"{name}.py").read_text()
    (tmp_path / "script.py").write_text(
        script.replace('"accelerator": "cpu",', '"accelerator": "cpu", "devices": 2,')
    )
    done = start(tmp_path, *TORCHRUN, "script.py", str(BATCH // 2))
    assert done.returncode != 0
    assert "start them with `tensorkv run" in done.stderr


@pytest.mark.e2e
@pytest.mark.slow
def test_a_script_of_ddp_goes_on_from_its_snapshot_with_either(tmp_path: Path) -> None:
    """Three epochs at once, and by turns: DDP, then the servers from its snapshot, then DDP from theirs."""
    scripts = [str(HERE / version / "ddp.py") for version in ("before", "after")]

    def weights(folder: str, script: str, epochs: int) -> list[float]:
        (tmp_path / folder).mkdir(exist_ok=True)
        first, second = run(tmp_path / folder, *TORCHRUN, script, str(BATCH), str(epochs))
        assert first == second
        return first

    expected = weights("whole", scripts[0], 3)
    assert weights("job", scripts[1], 3) == pytest.approx(expected, rel=1e-3, abs=2e-4)
    by_turns = [weights("turns", scripts[number % 2], number + 1) for number in range(3)]
    assert by_turns[-1] == pytest.approx(expected, rel=1e-3, abs=2e-4)


@pytest.mark.parametrize("name", [*NEEDS, "ddp", "rayed"])
def test_few_lines_are_changed(name: str) -> None:
    scripts = [str(HERE / version / f"{name}.py") for version in ("before", "after")]
    done = subprocess.run(
        ["git", "diff", "--no-index", "--numstat", *scripts],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert int(done.stdout.split()[0]) <= MAX_ADDED_LINES
