"""One worker of a soak: makes and deletes keys, opens and closes stores, pushes and pulls, for a given time.

All workers draw the same calls from the same seed; rank 0 says through a key when the time is over.
"""

from __future__ import annotations

import argparse
import random
import time

import torch

import tensorkv

MAX_KEYS = 60


def use(kv: tensorkv.KVStore, chance: random.Random, keys: dict[str, int]) -> None:
    """Make some keys, push and pull some, delete some. `keys` holds the sizes of those there are."""
    made = {f"k{chance.randrange(10_000)}": chance.choice([1, 64, 1000, 40_000, 600_000]) for _ in range(4)}
    made = {key: size for key, size in made.items() if key not in keys}
    if made:
        kv.init({key: torch.zeros(size) for key, size in made.items()})
    keys |= made
    chosen = chance.sample(sorted(keys), min(len(keys), chance.randint(1, 12)))
    kv.push({key: torch.ones(keys[key]) for key in chosen})
    pulled = kv.pull(chosen)
    if kv.kind == "dist_sync":
        wrong = [key for key, value in zip(chosen, pulled, strict=True) if value.max() > kv.num_workers]
        if wrong:
            raise RuntimeError(f"{wrong[0]!r} holds more than all workers have pushed")
    number = len(keys) // 2 if len(keys) > MAX_KEYS else chance.randint(0, min(5, len(keys)))
    gone = chance.sample(sorted(keys), number)
    if gone:
        kv.barrier()
        if kv.rank == 0:
            kv.delete(gone)
        kv.barrier()
    for key in gone:
        del keys[key]


def main() -> None:
    """Soak for the time asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    torch.manual_seed(arguments.seed)
    end = time.monotonic() + arguments.seconds
    cycles = 0
    with tensorkv.create("dist_sync", store="main") as kv:
        kv.init("goes on", torch.ones(1))
        keys: dict[str, int] = {}
        while True:
            use(kv, chance, keys)
            with tensorkv.create(chance.choice(["dist_sync", "dist_async"]), store="second") as second:
                there: dict[str, int] = {}
                for _ in range(chance.randint(1, 4)):
                    use(second, chance, there)
            cycles += 1
            goes_on = torch.tensor([float(kv.rank == 0 and time.monotonic() < end)])
            if not kv.pushpull("goes on", goes_on).item():
                break
    if kv.rank == 0:
        print(f"{cycles} cycles", flush=True)


if __name__ == "__main__":
    main()
