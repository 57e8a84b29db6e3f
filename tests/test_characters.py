"""The example that trains a transformer on the reference of Python, with few steps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "characters.py"
JOB = (sys.executable, "-m", "tensorkv", "run", "-n", "2", "-s", "1", "--no-prefix", "--")


@pytest.mark.e2e
@pytest.mark.parametrize("job", [(), JOB], ids=["alone", "job"])
def test_it_trains_and_writes(job: tuple[str, ...]) -> None:
    command = [*job, sys.executable, str(EXAMPLE), "--steps", "2", "--written", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The statement ")
    assert len(done.stdout.rstrip("\n")) == len("The statement ") + 20


def test_it_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 80
