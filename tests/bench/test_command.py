"""`tensorkv bench` from the command line: alone, in a job, and when something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tensorkv.bench import command
from tensorkv.bench.command import BenchFailed
from tensorkv.bench.options import make_options
from tensorkv.bench.steps import Plan

BENCH = [sys.executable, "-m", "tensorkv", "bench"]
QUICK = ["--model=quick", "--steps=2"]


def run(*arguments: str, timeout_s: float = 150) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, capture_output=True, text=True, timeout=timeout_s, check=False, stdin=subprocess.DEVNULL
    )


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(170)
def test_alone_it_starts_jobs_and_writes_what_it_finds(tmp_path: Path) -> None:
    path, picture = tmp_path / "out.json", tmp_path / "out.png"
    done = run(*BENCH, *QUICK, "--sizes=64MB", f"--json={path}", f"--plot={picture}")
    assert done.returncode == 0, done.stderr
    assert "dist_sync, 2 workers, 2 servers, assign, float32" in done.stdout
    assert "all results were checked" in done.stdout
    found = json.loads(path.read_text())
    names = [(row["tensors"], row["transport"], row["way"]) for row in found["rows"]]
    ways = ("push+pull", "pushpull")
    assert names == [(t, by, way) for by in ("shm", "tcp") for t in ("quick", "64MB") for way in ways]
    assert all(row["floor_ms"] > 0 for row in found["rows"])
    processes = ["server 0", "server 1", "worker 0", "worker 1"]
    assert [row["process"] for row in found["memory"]] == processes * 2
    assert all(0.4 < row["models"] < 6 for row in found["memory"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_store_in_one_process(tmp_path: Path) -> None:
    done = run(*BENCH, *QUICK, "--store=local", "--optimizer=adam", "--dtype=bfloat16")
    assert done.returncode == 0, done.stderr
    assert "local, 1 worker, adam, bfloat16" in done.stdout


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(170)
def test_in_a_job_every_worker_measures_and_rank_0_reports() -> None:
    launcher = [sys.executable, "-m", "tensorkv", "run", "-n", "3", "--transport", "tcp", "--"]
    done = run(*launcher, *BENCH, *QUICK)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all results were checked") == 1
    assert "dist_sync, 3 workers" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(["--model=resnet"], "--model 'resnet' is not known"), (["--workers=0"], "0 is too few; at least one")],
)
def test_a_bad_option_is_status_2(arguments: list[str], text: str) -> None:
    done = run(*BENCH, *arguments)
    assert (done.returncode, text in done.stderr) == (2, True), done.stderr


@pytest.mark.slow
def test_a_job_that_fails_is_status_1_and_says_why() -> None:
    done = run(*BENCH, *QUICK, "--transport=tcp", "--workers=1", "--servers=1", "--sizes=900GB")
    assert done.returncode == 1
    assert "tensorkv bench: the job ended with status 1 after 1 of 2 results" in done.stdout


def test_a_job_is_ended_with_whoever_follows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while it runs: the launcher is told, and ends its own."""
    started: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen

    def start(*arguments: object, **options: object) -> subprocess.Popen[str]:
        started.append(popen([sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, text=True))
        return started[-1]

    def follow(event: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command.subprocess, "Popen", start)
    with pytest.raises(KeyboardInterrupt):
        command._run_job(options(), "tcp", follow)
    assert started[0].returncode == -15


SLEEPER = """
import time
print('BENCH_EVENT {"event": "progress"}', flush=True)
time.sleep(300)
"""


def options() -> command.BenchOptions:
    return make_options(
        models=["quick"],
        sizes=None,
        kind="dist_sync",
        transports=["tcp"],
        num_workers=1,
        num_servers=1,
        optimizer="assign",
        dtype="float64",
        steps=2,
        seconds=1.0,
        with_floor=True,
        json=None,
        plot=None,
    )


def test_the_floor_of_another_dtype_moves_as_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run_floor(arguments: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(arguments)
        return subprocess.CompletedProcess(arguments, 0, 'BENCH_RESULT {"tcp": [0.001, 0.003, 0.002]}', "")

    monkeypatch.setattr(command.subprocess, "run", run_floor)
    plan = Plan(tensors="4KB", dtype="float64")
    assert command._floor_ms(options(), plan, "tcp") == 2.0
    assert "--set=4KB" in asked[0]


def test_a_floor_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "no memory")
    monkeypatch.setattr(command.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(BenchFailed, match="(?s)the floor of quick could not be measured.*no memory"):
        command._floor_ms(options(), Plan(), "shm")


def test_a_picture_without_matplotlib_is_refused_before_anything_starts(tmp_path: Path) -> None:
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    done = subprocess.run(
        [*BENCH, "--plot=out.png"], env=environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, "--plot needs matplotlib" in done.stdout) == (2, True), done.stderr
