"""Runs a job for a long time and watches the memory, threads and files of each of its processes.

    python benchmarks/soak.py --minutes 20 --plot docs/soak.png

4 workers and 2 servers make and delete keys and open and close stores at random (`soakworker.py`). Printed
are, for each process, the figures after the first quarter of the time and at the end: they should be
equal. It needs Linux (/proc).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent / "src"
MARK = "TENSORKV_SOAK_JOB"
END_S = 60.0
"""Time that a job has to end after its time is over."""


@dataclass(slots=True)
class Track:
    """What was seen of one process: seconds since the start, and figures by their names."""

    times_s: list[float] = field(default_factory=list)
    figures: dict[str, list[float]] = field(default_factory=dict)

    def add(self, time_s: float, figures: dict[str, float]) -> None:
        """Take down one look."""
        self.times_s.append(time_s)
        for name, figure in figures.items():
            self.figures.setdefault(name, []).append(figure)

    def quarter(self, name: str, number: int) -> float:
        """Return the median of a figure in one quarter of the looks, 0 to 3."""
        figures = self.figures[name]
        size = max(1, len(figures) // 4)
        start = min(number * size, len(figures) - 1)
        return statistics.median(figures[start : start + size] if number < 3 else figures[start:])


def look(pid: int) -> dict[str, float]:
    """Return resident memory in MB, threads and open files of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    lines = dict(line.split(":", 1) for line in status.splitlines())
    return {
        "resident memory, MB": int(lines["VmRSS"].split()[0]) / 1024,
        "threads": float(lines["Threads"]),
        "open files": float(len(os.listdir(f"/proc/{pid}/fd"))),
    }


def find(mark: str) -> dict[str, int]:
    """Return the processes of a job by name: "worker 0", "server 1", "launcher"."""
    found: dict[str, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it has ended meanwhile, or is another user's
            pairs = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
            env = dict(pair.partition("=")[::2] for pair in pairs)
            if env.get(MARK) == mark and "TENSORKV_ROLE" in env:
                found[f"{env['TENSORKV_ROLE']} {env['TENSORKV_RANK']}"] = int(entry.name)
    return found


def watch(
    job: subprocess.Popen[bytes], mark: str, minutes: float, every_s: float, show: Callable[[str], None]
) -> dict[str, Track]:
    """Look at every process now and then until the job has ended."""
    tracks: dict[str, Track] = {}
    start = time.monotonic()
    while job.poll() is None:
        time_s = time.monotonic() - start
        if time_s > minutes * 60 + END_S:
            raise TimeoutError(f"the job has not ended {END_S:g} s after its time")
        for name, pid in sorted({**find(mark), "launcher": job.pid}.items()):
            with contextlib.suppress(OSError, KeyError):  # it is just ending
                tracks.setdefault(name, Track()).add(time_s, look(pid))
        show(f"{time_s / 60:.1f} of {minutes:g} minutes, {len(tracks)} processes")
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(every_s)
    return tracks


def table(tracks: dict[str, Track]) -> list[str]:
    """Return a Markdown table: each figure in the second quarter of the time and in the last."""
    names = list(next(iter(tracks.values())).figures)
    lines = ["| process | " + " | ".join(f"{name}: 2nd quarter, last" for name in names) + " |"]
    lines.append("| --- |" + " ---: |" * len(names))
    for process, track in sorted(tracks.items()):
        cells = [f"{track.quarter(name, 1):.4g}, {track.quarter(name, 3):.4g}" for name in names]
        lines.append(f"| {process} | " + " | ".join(cells) + " |")
    return lines


def plot(tracks: dict[str, Track], path: Path) -> None:
    """Draw each figure over time, a line per process."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(next(iter(tracks.values())).figures)
    figure, all_axes = pyplot.subplots(len(names), 1, sharex=True, figsize=(8, 9))
    for axes, name in zip(all_axes, names, strict=True):
        for process, track in sorted(tracks.items()):
            axes.plot([time_s / 60 for time_s in track.times_s], track.figures[name], label=process)
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
        axes.grid(visible=True, alpha=0.3)
    all_axes[0].legend(ncols=4, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0))
    all_axes[-1].set_xlabel("minutes")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Soak; return the status of the job."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--every-s", type=float, default=2.0, help="seconds between looks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    arguments = parser.parse_args(argv)
    worker = [sys.executable, str(HERE / "soakworker.py")]
    worker += [f"--seconds={arguments.minutes * 60}", f"--seed={arguments.seed}"]
    launcher = [sys.executable, "-m", "tensorkv", "run"]
    sizes = ["-n", str(arguments.workers), "-s", str(arguments.servers), "--"]
    mark = f"{os.getpid()}-{arguments.seed}"
    path = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH", "")]))
    env = {**os.environ, MARK: mark, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    job = subprocess.Popen([*launcher, *sizes, *worker], env=env)
    try:
        tracks = watch(job, mark, arguments.minutes, arguments.every_s, lambda text: print(text, end="\r"))
    finally:
        job.terminate()
        job.wait()
    print("\n".join(["", *table(tracks)]))
    if arguments.plot is not None:
        plot(tracks, arguments.plot)
    return job.returncode


if __name__ == "__main__":
    sys.exit(main())
