"""The picture of bandwidth over size."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tensorkv.bench.plot import has_matplotlib, plot_bandwidth
from tensorkv.bench.report import Row, make_row


def rows() -> list[Row]:
    return [
        make_row(
            [size_bytes / 1e9],
            tensors=str(size_bytes),
            num_keys=1,
            size_bytes=size_bytes,
            transport=transport,
            way=way,
            num_workers=2,
            floor_ms=size_bytes / 2e6 if transport == "shm" else None,
        )
        for size_bytes in (4096, 1 << 20, 1 << 28)
        for transport in ("shm", "tcp")
        for way in ("push+pull", "pushpull")
    ]


def test_it_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    plot_bandwidth(rows(), path, "a title")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert int.from_bytes(content[16:20]) == 900  # the width
    assert len(content) < 150_000


def test_without_matplotlib_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_matplotlib()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not has_matplotlib()
