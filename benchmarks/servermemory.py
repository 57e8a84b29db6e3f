"""How many models a server holds: values, optimizer state, and what rounds need.

    python benchmarks/servermemory.py

One server and two workers make steps over a model of 1 GB, in keys of 10 MB, 400 KB and 4 KB, for longer than
a server waits until it returns freed memory to the system. What the server takes more than before the first
`init` is counted as its private memory and its own segments (`tensorkv.bench.memory.own_bytes`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch

import tensorkv
from tensorkv.bench.machine import this_machine
from tensorkv.bench.memory import own_of_job
from tensorkv.config import Transport

SIZES = [2_500_000] * 16 + [100_000] * 80 + [1_000] * 100
FLOAT_BYTES = 4
NUM_WORKERS = 2
WAYS: tuple[tuple[Transport, str], ...] = (
    ("shm", "assign"),
    ("shm", "adam"),
    ("tcp", "assign"),
    ("tcp", "adam"),
)


def work(rank: int, way: str, transport: str, times: int, wait_s: float) -> None:
    """Make steps as one worker; rank 0 prints what the server takes after the last one."""
    sizes = SIZES * times
    keys = list(range(len(sizes)))
    with tensorkv.create("dist_sync") as kv:
        kv.barrier()
        before = own_of_job() if rank == 0 else {}
        kv.barrier()
        if way == "adam":
            kv.set_optimizer("adam", lr=0.001)
        kv.init(keys, [torch.zeros(size) for size in sizes])
        gradients = [torch.ones(size) for size in sizes]
        pulled = [torch.zeros(size) for size in sizes]
        for number in range(6):
            if number == 4:
                time.sleep(wait_s)
            kv.pushpull(keys, gradients, out=pulled)
        kv.barrier()
        if rank == 0:
            model_bytes = sum(sizes) * FLOAT_BYTES
            taken = (own_of_job()["server 0"] - before["server 0"]) / model_bytes
            print(f"{transport}, {way}: the server takes {taken:.2f} models of {model_bytes / 1e6:.0f} MB")
        kv.barrier()


def main(argv: Sequence[str] | None = None) -> None:
    """Run a job for each transport and updater."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=5, help="size of the model in 192 MB (%(default)s)")
    parser.add_argument(
        "--wait-s", type=float, default=11.0, help="pause before the last steps (%(default)s)"
    )
    arguments = parser.parse_args(argv)
    print(this_machine().text())
    for transport, way in WAYS:
        tensorkv.spawn(
            work,
            num_workers=NUM_WORKERS,
            num_servers=1,
            transport=transport,
            args=(way, transport, arguments.times, arguments.wait_s),
        )


if __name__ == "__main__":
    main()
