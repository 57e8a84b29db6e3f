"""MXNet's own gluon.Trainer through a store trains what it trains with MXNet's `local`.

`make test-mxnet` runs this in an environment of its own, for a NumPy that MXNet 1.9.1 can import.
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
ROOT = HERE.parents[1]
BATCH = 32
JOB = (sys.executable, "-m", "tensorkv", "run", "-n", "2", "-s", "2", "--", sys.executable)

needs_mxnet = pytest.mark.skipif(not importlib.util.find_spec("mxnet"), reason="MXNet is not installed")
pytestmark = pytest.mark.timeout(300)


def run(*command: str) -> list[list[float]]:
    """Run a script; return the weights that each of its processes prints."""
    environment = {**os.environ, "DIGITS": str(ROOT / "examples" / "digits.csv.gz")}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=250, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = re.findall(r"weights \[(.*)\]", done.stdout)
    return [[float(number) for number in line.split(",")] for line in lines]


def script(version: str) -> str:
    return str(HERE / version / "gluoned.py")


@pytest.mark.e2e
@needs_mxnet
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "nag"])
def test_it_trains_what_mxnets_local_store_trains(optimizer: str) -> None:
    """SGD and Adam run on the servers, and NAG on the workers."""
    (expected,) = run(sys.executable, script("before"), str(BATCH), optimizer)
    first, second = run(*JOB, script("after"), str(BATCH // 2), optimizer)
    assert first == second
    assert first == pytest.approx(expected, rel=1e-4)
    (alone,) = run(sys.executable, script("after"), str(BATCH), optimizer)
    assert alone == pytest.approx(expected, rel=1e-4)


@pytest.mark.e2e
@needs_mxnet
def test_what_else_a_trainer_does() -> None:
    (found,) = run(sys.executable, str(HERE / "gluon_calls.py"))
    assert found == [1.0]


def test_few_lines_are_changed() -> None:
    done = subprocess.run(
        ["git", "diff", "--no-index", "--numstat", script("before"), script("after")],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert int(done.stdout.split()[0]) <= 4
