"""The example that factorises ratings, on ratings that two factors explain."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "movielens.py"
JOB = (sys.executable, "-m", "tensorkv", "run", "-n", "2", "-s", "1", "--no-prefix", "--")


@pytest.mark.e2e
@pytest.mark.parametrize("job", [(), JOB], ids=["alone", "job"])
def test_it_learns_ratings(job: tuple[str, ...], tmp_path: Path) -> None:
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    lines += [
        f"{user}\t{film}\t{1 + 4 * ((user + film) % 2)}\t0" for user in range(1, 61) for film in range(1, 61)
    ]
    ratings = tmp_path / "ratings"
    ratings.write_text("\n".join(lines) + "\n")
    command = [*job, sys.executable, str(EXAMPLE), "--file", str(ratings), "--epochs", "40"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    errors = [float(each) for each in re.findall(r"RMSE ([\d.]+)", done.stdout)]
    assert len(errors) == 40
    assert errors[0] > 1.5  # ratings of 1 and 5, guessed as their mean
    assert errors[-1] < 0.5


def test_it_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 80
