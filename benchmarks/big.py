"""A store far bigger than what a worker holds of it: steps over all keys, every element checked.

    python benchmarks/big.py --gb 6

Each worker has memory for one key only, and goes through the keys one after the other. At the end each
process tells what it takes beside what it took before (PSS: shared pages are shared out).
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence

import torch

import tensorkv
from tensorkv.bench.machine import memory_bytes, this_machine
from tensorkv.bench.memory import pss_bytes, pss_of_job

KEY_BYTES = 256 << 20
FLOAT_BYTES = 4
NUM_WORKERS, NUM_SERVERS = 2, 2


class WrongValue(Exception):
    """A pulled value is not the sum of the pushed ones."""


def pushed(rank: int, key: int, step: int) -> float:
    """Return the value of every element of a gradient. Sums of these are exact."""
    return float(1000 * step + 10 * key + rank)


def taken(rank: int) -> dict[str, int]:
    """Return the PSS of this worker in bytes; on rank 0 also that of each server."""
    servers = pss_of_job() if rank == 0 else {}
    return servers | {f"worker {rank}": pss_bytes(os.getpid())}


def work(rank: int, num_keys: int, num_steps: int) -> None:
    """Create the keys and run the steps as one worker."""
    with tensorkv.create("dist_sync") as kv:
        kv.barrier()
        before = taken(rank)
        kv.barrier()
        grad = torch.zeros(KEY_BYTES // FLOAT_BYTES)
        for key in range(num_keys):
            kv.init(key, grad)
        start = time.perf_counter()
        for step in range(num_steps):
            for key in range(num_keys):
                kv.push(key, grad.fill_(pushed(rank, key, step)))
            for key in range(num_keys):
                kv.pull(key, grad)
                expected = sum(pushed(each, key, step) for each in range(kv.num_workers))
                low, high = (found.item() for found in torch.aminmax(grad))
                if low != expected or high != expected:
                    raise WrongValue(
                        f"key {key}, step {step}: values from {low} to {high}, expected {expected}"
                    )
            kv.barrier()
            if rank == 0:
                print(
                    f"step {step + 1}: {time.perf_counter() - start:.1f} s since the start, all values right"
                )
        for process, after in taken(rank).items():
            print(f"{process}: {(after - before[process]) / 1e9:.2f} GB more than before the first init")
        kv.barrier()


def main(argv: Sequence[str] | None = None) -> None:
    """Start the job."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=6.0, help="of all values together (%(default)s)")
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args(argv)
    num_keys = max(1, -(-int(arguments.gb * 1e9) // KEY_BYTES))
    needed_bytes = 2 * num_keys * KEY_BYTES  # during the pushes, windows hold both workers' keys
    print(this_machine().text())
    print(f"{num_keys} keys of {KEY_BYTES / 1e6:.0f} MB: {num_keys * KEY_BYTES / 1e9:.2f} GB")
    if needed_bytes > memory_bytes():
        parser.error(f"{arguments.gb:g} GB do not fit a machine of {memory_bytes() / 1e9:.0f} GB")
    tensorkv.spawn(work, num_workers=NUM_WORKERS, num_servers=NUM_SERVERS, args=(num_keys, arguments.steps))


if __name__ == "__main__":
    main()
