"""Runs a job for a long time and watches the memory, threads and files of each of its processes.

    python benchmarks/soak.py --minutes 20 --plot docs/soak.png

4 workers and 2 servers make and delete keys and open and close stores at random, and rest now and then with
no key and no store but the main one (`soakworker.py`, which also says how each value is checked).
Printed is, for each process, what each figure was at least, early and late: what nine of ten looks from 20 %
to 40 % of the time, and of its last 20 %, do not fall below. What the job holds varies by chance, by more
than a tenth within a minute, but in the rests it holds the same, and what is lost is never given back, and so
raises the least. A figure is flat if that has not grown in between; resident memory may by 5 %, and how much
of it is shared is only told. The status is 1 if one is not flat, or the job failed. The scheduler is a thread
of the launcher, so both are watched as one process.

It needs Linux (/proc), and for --plot the extra `bench`: pip install -c constraints.txt -e '.[bench]'
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent / "src"
MARK = "TENSORKV_SOAK_JOB"
END_S = 120.0
"""Timeout for a job to end after its time is over."""

MEMORY = "resident memory, MB"
SHARED = "of it shared, MB"
MAY_GROW = {MEMORY: 0.05}
"""Maximum relative growth of a figure that still counts as flat."""

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "2"}
"""glibc's initial settings, pinned: freed large memory goes back to the system. By default glibc adapts and
keeps more and more of it, and resident memory no longer shows what the job holds."""

EARLY = (0.2, 0.4)
LATE = (0.8, 1.0)
LEAST = 0.1
"""The compared parts of all samples, and the quantile of each that counts."""

LAUNCHER = "launcher, scheduler"


@dataclass(slots=True)
class Track:
    """Samples of one process: seconds since the start, and figures by name."""

    times_s: list[float] = field(default_factory=list)
    figures: dict[str, list[float]] = field(default_factory=dict)

    def add(self, time_s: float, figures: dict[str, float]) -> None:
        """Add a sample."""
        self.times_s.append(time_s)
        for name, figure in figures.items():
            self.figures.setdefault(name, []).append(figure)

    def least(self, name: str, part: tuple[float, float]) -> float:
        """Return the value that nine of ten samples in a part of all do not fall below."""
        figures = self.figures[name]
        low, high = (int(share * len(figures)) for share in part)
        found = sorted(figures[low : max(high, low + 1)])
        return found[int(LEAST * len(found))]


def is_flat(name: str, early: float, late: float) -> bool:
    """Whether a figure has not grown. Shared memory counts only as a part of resident memory."""
    return name == SHARED or late <= early * (1 + MAY_GROW.get(name, 0.0))


def look(pid: int) -> dict[str, float]:
    """Return resident memory, its shared part, threads and open files of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    lines = dict(line.split(":", 1) for line in status.splitlines())
    return {
        MEMORY: int(lines["VmRSS"].split()[0]) * 1024 / 1e6,
        SHARED: int(lines["RssShmem"].split()[0]) * 1024 / 1e6,
        "threads": float(lines["Threads"]),
        "open files": float(len(os.listdir(f"/proc/{pid}/fd"))),
    }


def find(mark: str) -> dict[str, int]:
    """Return the processes of a job by name: "worker 0", "server 1"."""
    found: dict[str, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it has ended, or belongs to another user
            pairs = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
            env = dict(pair.partition("=")[::2] for pair in pairs)
            if env.get(MARK) == mark and "TENSORKV_ROLE" in env:
                found[f"{env['TENSORKV_ROLE']} {env['TENSORKV_RANK']}"] = int(entry.name)
    return found


def watch(
    job: subprocess.Popen[bytes],
    *,
    mark: str,
    num_processes: int,
    total_s: float,
    every_s: float,
    show: Callable[[str], None],
) -> dict[str, Track]:
    """Sample every process periodically until the job has ended. Drops samples of an incomplete job.

    Raises:
        TimeoutError: the job still runs long after its time is over.
    """
    tracks: dict[str, Track] = {}
    start = time.monotonic()
    while job.poll() is None:
        time_s = time.monotonic() - start
        if time_s > total_s + END_S:
            raise TimeoutError(f"the job has not ended {END_S:g} s after its time")
        seen: dict[str, dict[str, float]] = {}
        for name, pid in sorted({**find(mark), LAUNCHER: job.pid}.items()):
            with contextlib.suppress(OSError, KeyError):  # it is just ending
                seen[name] = look(pid)
        if len(seen) == num_processes:  # otherwise some are still starting, or ending
            for name, figures in seen.items():
                tracks.setdefault(name, Track()).add(time_s, figures)
        show(f"{time_s / 60:.1f} of {total_s / 60:g} minutes, {len(seen)} processes")
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(every_s)
    return tracks


def table(tracks: dict[str, Track]) -> tuple[list[str], bool]:
    """Return a Markdown table of each figure early and late, and whether all are flat."""
    names = list(next(iter(tracks.values())).figures)
    lines = ["| process | " + " | ".join(names) + " | flat |"]
    lines.append("| --- |" + " ---: |" * len(names) + " --- |")
    all_flat = True
    for process, track in sorted(tracks.items()):
        cells: list[str] = []
        grown: list[str] = []
        for name in names:
            early, late = (track.least(name, part) for part in (EARLY, LATE))
            cells.append(f"{early:.4g} → {late:.4g}")
            if not is_flat(name, early, late):
                grown.append(name.partition(",")[0])
        all_flat = all_flat and not grown
        verdict = "NO: " + ", ".join(grown) if grown else "yes"
        lines.append(f"| {process} | " + " | ".join(cells) + f" | {verdict} |")
    return lines, all_flat


def plot(tracks: dict[str, Track], path: Path, title: str) -> None:
    """Plot each figure over time, from 0, a line per process. 900 pixels wide."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(next(iter(tracks.values())).figures)
    figure, all_axes = pyplot.subplots(
        len(names), 1, sharex=True, figsize=(9, 10), height_ratios=[2, 1, 1, 1]
    )
    for axes, name in zip(all_axes, names, strict=True):
        for number, (process, track) in enumerate(sorted(tracks.items())):
            minutes = [time_s / 60 for time_s in track.times_s]
            # Dashes, so that lower lines show through the gaps of overlapping ones.
            dashes = (2.0 * number, (6, 2)) if number else "solid"
            axes.plot(minutes, track.figures[name], label=process, linewidth=1.3, linestyle=dashes)
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
        axes.margins(x=0.01)
        axes.grid(visible=True, alpha=0.3)
    all_axes[0].legend(ncols=len(tracks), fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0))
    all_axes[-1].set_xlabel("minutes since the start")
    figure.suptitle(title, fontsize="medium")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def soak(arguments: argparse.Namespace) -> tuple[int, dict[str, Track]]:
    """Run the job; return its status and samples."""
    total_s = arguments.minutes * 60
    mark = f"{os.getpid()}-{arguments.seed}"
    path = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH", "")]))
    env = {**os.environ, **MALLOC, MARK: mark, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    launcher = [sys.executable, "-m", "tensorkv", "run"]
    sizes = ["-n", str(arguments.workers), "-s", str(arguments.servers), "--"]
    worker = [sys.executable, str(HERE / "soakworker.py"), f"--seconds={total_s}", f"--seed={arguments.seed}"]
    with tempfile.TemporaryDirectory(prefix="tensorkv-soak-") as folder:
        job = subprocess.Popen([*launcher, *sizes, *worker, f"--folder={folder}"], env=env)
        try:
            tracks = watch(
                job,
                mark=mark,
                num_processes=arguments.workers + arguments.servers + 1,
                total_s=total_s,
                every_s=arguments.every_s,
                show=functools.partial(print, end="\r", flush=True),
            )
        finally:
            job.terminate()
            job.wait()
    return job.returncode, tracks


def main(argv: Sequence[str] | None = None) -> int:
    """Soak; return 0 if the job has succeeded and all figures are flat, else 1."""
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
    if arguments.plot is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install -c constraints.txt -e '.[bench]'")
    status, tracks = soak(arguments)
    if status != 0:
        print(f"\nthe job ended with status {status}")
        return 1
    if not tracks or tracks[LAUNCHER].times_s[-1] < LATE[0] * arguments.minutes * 60:
        print("\nnot all processes of the job were there to the end")
        return 1
    lines, all_flat = table(tracks)
    print("\n".join(["", *lines, "", "all flat" if all_flat else "NOT FLAT"]))
    if arguments.plot is not None:
        sizes = f"{arguments.workers} workers, {arguments.servers} servers"
        plot(tracks, arguments.plot, f"{sizes}, random keys and stores for {arguments.minutes:g} minutes")
    return 0 if all_flat else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that exiting ends the job
    sys.exit(main())
