"""Rows: what is derived, and how it is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tensorkv.bench.machine import this_machine
from tensorkv.bench.report import COLUMNS, MemoryRow, Row, make_row, size_text, three_digits, write_json


def row(floor_ms: float | None = 5.0) -> Row:
    return make_row(
        [0.010, 0.020, 0.012],
        tensors="resnet50",
        num_keys=161,
        size_bytes=120_000_000,
        transport="shm",
        way="pushpull",
        num_workers=4,
        floor_ms=floor_ms,
    )


def test_a_row_tells_bandwidth_and_the_fraction_of_the_floor() -> None:
    found = row()
    assert (found.median_ms, found.min_ms, found.p99_ms, found.num_steps) == (12.0, 10.0, 20.0, 3)
    assert found.gb_per_s == pytest.approx(20.0)
    assert found.total_gb_per_s == pytest.approx(80.0)
    assert found.of_floor == pytest.approx(5 / 12)
    assert found.cells() == [
        "resnet50", "161", "120 MB", "shm", "pushpull", "12", "10", "20", "20", "80", "5", "42%",
    ]  # fmt: skip
    assert len(COLUMNS) == len(found.cells())


def test_without_a_floor_nothing_is_told_of_it() -> None:
    assert row(None).of_floor is None
    assert row(None).cells()[-2:] == ["", ""]


def test_everything_is_written_as_plain_data(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    memory = MemoryRow(tensors="t", transport="shm", process="server 0", grown_bytes=300, model_bytes=200)
    write_json(path, [row()], [memory], this_machine(), {"kind": "dist_sync"})
    found = json.loads(path.read_text())
    assert found["rows"][0]["gb_per_s"] == pytest.approx(20.0)
    assert found["memory"][0]["models"] == 1.5
    assert found["options"] == {"kind": "dist_sync"}
    assert found["machine"]["num_cores"] >= 1


def test_numbers_for_readers() -> None:
    assert [three_digits(each) for each in (0.01234, 1.234, 99.96, 123.4)] == ["0.0123", "1.23", "100", "123"]
    assert [size_text(each) for each in (256, 4096, 1 << 20, 5 << 30)] == [
        "256 B",
        "4.1 kB",
        "1.05 MB",
        "5.37 GB",
    ]
