"""The sweeps as one picture: a panel each, with the step time over the varied parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.figure
import matplotlib.ticker
from sweeps import Found, Sweep, medians_ms

from tensorkv.bench.shapes import format_size, parse_size

STYLES = {
    "tensorkv": {"color": "tab:blue", "marker": "o"},
    "tensorkv-shm": {"color": "tab:green", "marker": "o"},
    "mxnet": {"color": "tab:red", "marker": "s"},
    "gloo": {"color": "tab:orange", "marker": "^"},
    "floor, shm": {"color": "tab:green", "marker": ".", "linestyle": ":"},
    "floor, tcp": {"color": "tab:blue", "marker": ".", "linestyle": ":"},
}
PANEL_INCHES = (4.6, 3.6)


def plot_sweeps(sweeps: Sequence[Sweep], found: Mapping[str, Found], path: Path) -> None:
    """Plot the measured sweeps with numeric values, two panels a row, on logarithmic axes."""
    drawn = [sweep for sweep in sweeps if sweep.name in found and sweep.name != "updates"]
    rows = (len(drawn) + 1) // 2
    width, height = PANEL_INCHES
    figure = matplotlib.figure.Figure(figsize=(2 * width, rows * height), layout="constrained")
    for panel, sweep in zip(figure.subplots(rows, 2, squeeze=False).flat, drawn, strict=False):
        is_bytes = sweep.name == "bytes"
        for name, of_value in medians_ms(found[sweep.name]).items():
            xs = [parse_size(value) if is_bytes else int(value) for value in of_value]
            panel.plot(xs, list(of_value.values()), label=name, **STYLES[name])
        panel.set_xscale("log", base=10 if sweep.name == "keys" else 2)
        panel.set_yscale("log")
        panel.set_xticks([parse_size(value) if is_bytes else int(value) for value in found[sweep.name]])
        panel.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        panel.xaxis.set_major_formatter(
            matplotlib.ticker.FuncFormatter(lambda x, _: format_size(int(x)))
            if is_bytes
            else matplotlib.ticker.FormatStrFormatter("%d")
        )
        panel.yaxis.set_minor_locator(matplotlib.ticker.LogLocator(subs=(2, 5)))
        for set_formatter in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
            set_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        panel.set_xlabel(sweep.axis)
        panel.set_ylabel("ms a step")
        panel.set_title(sweep.title, fontsize=10)
        panel.grid(visible=True, which="both", alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=100)
