"""Plots bandwidth over size. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tensorkv.bench.report import Row
from tensorkv.bench.shapes import format_size

INCHES = (9.0, 5.0)
NO_MATPLOTLIB = "--plot needs matplotlib: pip install matplotlib"


def has_matplotlib() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def plot_bandwidth(rows: Sequence[Row], path: Path, title: str) -> None:
    """Plot the bandwidth of one worker over the bytes of a step, a line per transport and way."""
    import matplotlib.figure
    import matplotlib.ticker

    figure = matplotlib.figure.Figure(figsize=INCHES, layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[tuple[int, float]]] = {}
    floors: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        lines.setdefault(f"{row.transport}, {row.way}", []).append((row.size_bytes, row.gb_per_s))
        if row.floor_ms is not None:
            point = (row.size_bytes, 2 * row.size_bytes / row.floor_ms / 1e6)
            points = floors.setdefault(f"{row.transport}, floor", [])
            if point not in points:
                points.append(point)
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    for label, points in floors.items():
        axes.plot(*zip(*sorted(points), strict=True), marker=".", linestyle=":", color="gray", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(_size_label))
    axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.set_xlabel("values of one step")
    axes.set_ylabel("GB/s pushed and pulled by each worker")
    axes.set_title(title)
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)


def _size_label(size_bytes: float, position: int) -> str:
    return format_size(max(1, int(size_bytes)))
