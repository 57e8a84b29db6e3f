"""One worker of a chaos job: pushes that can be counted, and a ledger of them that survives SIGKILL.

Worker r pushes 2 ** (15 * r) into every element of integer keys that are added up, so the sum in an
element tells how many pushes of each worker it holds. Before a push the ledger says "issued", after a later
pull or barrier "acknowledged". What is found at the end goes to `result-RANK.json` in the folder of the job.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import struct
from pathlib import Path

import torch

import tensorkv

BITS = 15
LEDGER = struct.Struct("<qq")  # pushes issued, pushes acknowledged
SHAPES = {"large": (300_000,), "small": (64,), "scalar": ()}


class Ledger:
    """Two counters in a file, written atomically."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_CREAT | os.O_WRONLY)
        self.issued = self.acknowledged = 0
        self.write()

    def write(self) -> None:
        """Write both counters."""
        os.pwrite(self._file, LEDGER.pack(self.issued, self.acknowledged), 0)


def counts(values: dict[str, torch.Tensor], num_workers: int) -> dict[str, list[list[int]]]:
    """Return for each key and worker the minimum and maximum number of pushes that an element holds."""
    found: dict[str, list[list[int]]] = {}
    for key, value in values.items():
        each = [(value >> (BITS * rank)) & ((1 << BITS) - 1) for rank in range(num_workers)]
        found[key] = [[int(number.min()), int(number.max())] for number in each]
    return found


def work(kv: tensorkv.KVStore, ledger: Ledger, num_steps: int, seed: int) -> dict[str, object]:
    """Push, and sometimes pull, `num_steps` times; return the final content of the store."""
    chance = random.Random(seed * 1000 + kv.rank)
    mine = {key: torch.full(shape, 1 << (BITS * kv.rank)) for key, shape in SHAPES.items()}
    values = {key: torch.empty(shape, dtype=torch.int64) for key, shape in SHAPES.items()}
    kv.set_updater("add")
    kv.init({key: torch.zeros(shape, dtype=torch.int64) for key, shape in SHAPES.items()})
    for _ in range(num_steps):
        ledger.issued += 1
        ledger.write()
        kv.push(mine)
        if chance.random() < 0.3:
            kv.pull(out=values)
            ledger.acknowledged = ledger.issued
            ledger.write()
    kv.barrier()
    kv.pull(out=values)
    return {"counts": counts(values, kv.num_workers)}


def main() -> None:
    """Work until all is done or the job is broken, and record which."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", required=True)
    parser.add_argument("--on-worker-loss", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    rank = int(os.environ["TENSORKV_RANK"])
    ledger = Ledger(arguments.folder / f"ledger-{rank}")
    result: dict[str, object] = {}
    try:
        with tensorkv.create(arguments.kind, on_worker_loss=arguments.on_worker_loss) as kv:
            result = work(kv, ledger, arguments.steps, arguments.seed)
    except tensorkv.PeerLostError as error:
        result = {"lost": str(error)}
        raise
    finally:
        text = json.dumps(result)
        (arguments.folder / f"result-{rank}.json").write_text(text)


if __name__ == "__main__":
    main()
