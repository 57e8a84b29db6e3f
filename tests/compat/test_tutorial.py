"""MXNet's tutorial on its key-value store runs as it stands and prints what it says there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tensorkv

TUTORIAL = Path(__file__).with_name("tutorial.py")
SOURCE = Path(tensorkv.__file__).parents[1]


def filled(value: float) -> str:
    return str([[float(value)] * 3] * 2)


VALUES = [
    f"init {filled(2)}",
    f"push {filled(8)}",
    f"devices {filled(4)}",
    f"before update {filled(4)}",
    f"updated {filled(6)}",
    f"pulled {filled(6)} cpu(1)",
    f"keys {filled(3)}",
    f"keys and devices {filled(11)}",
]
"""What the worker prints."""

UPDATES = [3, 5, 7, 9, 5, 7, 9]
"""The keys that are updated, in order."""


def run(arguments: list[str]) -> list[str]:
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=50,
    )
    return done.stdout.splitlines()


def test_in_one_process() -> None:
    updates = [f"update on key: {key}" for key in UPDATES]
    expected = [*VALUES[:4], updates[0], *VALUES[4:6], *updates[1:4], VALUES[6], *updates[4:], VALUES[7]]
    assert run([str(TUTORIAL)]) == expected


@pytest.mark.e2e
def test_in_a_job_whose_updater_prints_on_the_servers() -> None:
    lines = run(
        ["-m", "tensorkv", "run", "-n", "1", "-s", "2", "--", sys.executable, str(TUTORIAL), "dist_sync"]
    )
    printed: dict[str, list[str]] = {}
    for line in lines:
        found = re.fullmatch(r"\[(worker|server) (\d+)\] (.*)", line)
        if found is not None:
            printed.setdefault(f"{found[1]} {found[2]}", []).append(found[3])
    assert printed.pop("worker 0") == VALUES
    on_servers = [
        [int(line.removeprefix("update on key: ")) for line in lines if line.startswith("update on key: ")]
        for lines in printed.values()
    ]
    assert sorted(key for server in on_servers for key in server) == sorted(UPDATES)
    for server in on_servers:  # a key lives on one server, which prints its keys in the order of the pushes
        assert server == [key for key in UPDATES if key in server]
