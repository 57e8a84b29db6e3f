"""One of four workers is five times slower: what does each policy make of it?

    tensorkv run -n 4 -s 1 -- python benchmarks/stragglers.py --plot docs/stragglers.png    # two minutes

Four workers train the network of examples/digits.py, each on images of its own. A step is a gradient of 16
images and a sleep of 10 ms; the slow worker, the last, sleeps 50 ms. Each policy gets the same seconds of
wall-clock, the same first weights and the same SGD without momentum. Worker 0 notes how many of the test
images are right after each fifth of a second. Printed and drawn is the accuracy over time, twice:

- the images are dealt out at random, so that three workers see much the same as four;
- the slow worker alone has all images of the digits 8 and 9, so that who drops its pushes cannot learn them.

"the fast alone" are the three others in a sync store of their own: what every other curve has to be compared
with. DDP is torch's DistributedDataParallel over gloo. Needs the extra `bench` for --plot.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import tensorkv

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
import digits

PAUSE_S = 0.01
SLOWNESS = 5
BATCH = 16
LEARNING_RATE = 0.1
SAMPLE_S = 0.2
"""Seconds between two looks at the test images."""

POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "sync": ("dist_sync", {}),
    "quorum 3, drop": ("dist_sync", {"quorum": 3, "late": "drop"}),
    "quorum 3, carry": ("dist_sync", {"quorum": 3, "late": "carry"}),
    "staleness 4": ("dist_async", {"staleness": 4}),
    "async": ("dist_async", {}),
    "the fast alone": ("dist_sync", {}),
}
COLORS = dict(zip([*POLICIES, "DDP"], ("C0", "C1", "C3", "C2", "C4", "black", "C7"), strict=True))

Curve = list[tuple[float, float]]
"""Seconds since the start, and the share of test images that are right."""


class Share(NamedTuple):
    """The images that one worker trains on, those that all are tested with, and how they were dealt out."""

    images: Tensor
    labels: Tensor
    data: digits.Digits
    title: str


AT_RANDOM, SKEWED = "images dealt out at random", "the slow worker has all 8s and 9s"


def deal(data: digits.Digits, rank: int, num_workers: int, title: str) -> Share:
    """Return a worker's share; skewed, the last worker has all images of 8 and 9, and no others."""
    mine, last = torch.arange(len(data.train_labels))[rank::num_workers], rank == num_workers - 1
    if title == SKEWED:
        mine = torch.nonzero((data.train_labels >= 8) == last).flatten()
        mine = mine if last else mine[rank :: num_workers - 1]
    return Share(data.train_images[mine], data.train_labels[mine], data, title)


def pause_s(rank: int, num_workers: int) -> float:
    """Return how long a worker sleeps in each step."""
    return PAUSE_S * (SLOWNESS if rank == num_workers - 1 else 1)


class Clock:
    """Samples the accuracy of a network every `SAMPLE_S` seconds, from its creation on."""

    def __init__(self, net: nn.Module, share: Share) -> None:
        self._net, self._share = net, share
        self._start_s = time.perf_counter()
        self.curve: Curve = []
        self.sample()

    @property
    def now_s(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start_s

    def sample(self) -> None:
        """Note the accuracy if it is time to."""
        if self.now_s >= len(self.curve) * SAMPLE_S:
            data = self._share.data
            _, right = digits.evaluate(self._net, data.test_images, data.test_labels)
            self.curve.append((self.now_s, right))


def steps(net: nn.Module, share: Share, seed: int, nap_s: float) -> Any:
    """Yield without end, each time with the gradients of a batch in `net`."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(share.labels), generator=generator).split(BATCH):
            net.zero_grad()
            nn.functional.cross_entropy(net(share.images[chosen]), share.labels[chosen]).backward()
            time.sleep(nap_s)
            yield


def train(name: str, control: tensorkv.KVStore, share: Share, seconds: float) -> Curve:
    """Train with one policy for so many seconds; return the curve of this worker."""
    kind, options = POLICIES[name]
    rank, num_workers = control.rank, control.num_workers
    net = digits.make_net(0)
    weights = dict(net.named_parameters())
    with tensorkv.create(kind, store=f"{name}, {share.title}", reduction="mean", **options) as kv:
        kv.set_optimizer(torch.optim.SGD, lr=LEARNING_RATE)
        kv.init(weights)
        control.barrier()
        clock = Clock(net, share)
        if name == "the fast alone" and rank == num_workers - 1:
            return clock.curve  # leaving the store lets the others go on alone
        for _ in steps(net, share, rank, pause_s(rank, num_workers)):
            kv.push(net)
            kv.pull(out=weights)
            clock.sample()
            if clock.now_s > seconds:
                return clock.curve
    raise AssertionError("the steps have no end")


def train_ddp(control: tensorkv.KVStore, share: Share, seconds: float) -> Curve:
    """Train with DDP, in as many steps as the slow worker's naps leave time for."""
    rank, num_workers = control.rank, control.num_workers
    ddp = DistributedDataParallel(digits.make_net(0))
    optimizer = torch.optim.SGD(ddp.parameters(), lr=LEARNING_RATE)
    control.barrier()
    clock = Clock(ddp.module, share)
    going_on = torch.ones(1)
    for _ in steps(ddp, share, rank, pause_s(rank, num_workers)):
        optimizer.step()
        clock.sample()
        going_on.fill_(clock.now_s <= seconds)
        dist.broadcast(going_on, 0)  # all stop after the same step
        if not going_on:
            return clock.curve
    raise AssertionError("the steps have no end")


def join_gloo(control: tensorkv.KVStore) -> None:
    """Make a process group of all workers; they meet in a file whose name rank 0 chooses."""
    control.init("file", torch.tensor(time.time_ns()))
    path = Path(tempfile.gettempdir()) / f"stragglers-{int(control.pull('file'))}"
    file = dist.FileStore(str(path), control.num_workers)
    dist.init_process_group("gloo", store=file, rank=control.rank, world_size=control.num_workers)


def measure(control: tensorkv.KVStore, seconds: float) -> dict[str, dict[str, Curve]]:
    """Return this worker's curve for each way to deal out the images, and each policy."""
    found: dict[str, dict[str, Curve]] = {}
    data = digits.load()
    for title in (AT_RANDOM, SKEWED):
        share = deal(data, control.rank, control.num_workers, title)
        found[title] = {name: train(name, control, share, seconds) for name in POLICIES}
        found[title]["DDP"] = train_ddp(control, share, seconds)
    return found


def print_curves(found: dict[str, dict[str, Curve]]) -> None:
    """Print the accuracy half way and at the end, each as the mean of a second."""
    for title, curves in found.items():
        print(f"{title}:")
        for name, curve in curves.items():
            half, end = mean_before(curve, curve[-1][0] / 2), mean_before(curve, curve[-1][0])
            print(f"  {name:16} {half:4.0%} half way, {end:4.0%} at the end")


def mean_before(curve: Curve, time_s: float) -> float:
    """Return the mean accuracy in the second before a time; NaN if none was measured then."""
    found = [right for at_s, right in curve if time_s - 1.0 < at_s <= time_s]
    return sum(found) / len(found) if found else math.nan


def plot(found: dict[str, dict[str, Curve]], path: Path) -> None:
    """Draw a panel for each way to deal out the images."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(11, 4.2), layout="constrained")
    for panel, (title, curves) in zip(
        figure.subplots(1, len(found), sharey=True), found.items(), strict=True
    ):
        for name, curve in curves.items():
            style = "--" if name in ("the fast alone", "DDP") else "-"
            panel.plot(*zip(*curve, strict=True), style, color=COLORS[name], label=name)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("seconds")
        panel.set_ylim(0.0, 1.0)
        panel.grid(visible=True, alpha=0.3)
    figure.axes[0].set_ylabel("test images recognised")
    figure.axes[0].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and let rank 0 print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=7.0, help="wall-clock of each policy")
    parser.add_argument("--plot", type=Path, help="PNG or SVG file to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tensorkv.create("dist_sync", store="control") as control:
        join_gloo(control)
        found = measure(control, args.seconds)
        dist.destroy_process_group()
        if control.rank == 0:
            print_curves(found)
            if args.plot is not None:
                plot(found, args.plot)


if __name__ == "__main__":
    main()
