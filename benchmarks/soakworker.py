"""One worker of a soak: makes and deletes keys, opens and closes stores, pushes and pulls, for a given time.

All workers draw the same calls from the same seed, so each knows what every value must be: seven elements of
it are kept beside the store and updated in torch by the same rule, and the value repeats them to its size.
Every element of every pull is compared with them. Rank 0 says through a key when the time is over, and when
all are to rest: then every key is deleted, and nobody does anything for a while, so that what the processes
still hold can be compared with what they held in other rests.
"""

from __future__ import annotations

import argparse
import collections
import gc
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import tensorkv
from tensorkv.errors import KeyNotInitialized, ShapeMismatch

RAMP = torch.arange(1.0, 8.0, dtype=torch.float64)
SIZES = [1, 64, 1000, 40_000, 600_000, 1_500_000]
"""Sizes of values in elements. The last two are sliced over the servers."""

SIZE_WEIGHTS = [4, 4, 4, 4, 1, 1]
MAX_KEYS = 30
BUSY_S = 12.0
REST_S = 4.0
"""Duration of a rest of all workers, after `BUSY_S` of work. It is more than `soak.LEAST` of the time."""

TIMEOUT_S = 120.0


class WrongValue(Exception):
    """A value is not the result of all pushes."""


def keep_half(key: Any, pushed: torch.Tensor, stored: torch.Tensor) -> None:
    """An updater: half of the stored value plus the pushed one."""
    stored.mul_(0.5).add_(pushed)


RULES: dict[str, dict[str, float]] = {
    "assign": {},
    "add": {},
    "function": {},
    "sgd": {"lr": 0.125, "momentum": 0.5},
    "adam": {"lr": 0.125},
}
"""Updaters, with the options of optimizers."""

IN_ANY_ORDER: dict[str, dict[str, float]] = {"assign": {}, "add": {}, "sgd": {"lr": 0.125}}
"""Updaters for async mode: the order of pushes does not matter, or only the last one counts."""


@dataclass(slots=True)
class Expected:
    """The expected value of a key: seven elements, which it repeats to its size."""

    num_elems: int
    value: torch.Tensor
    optimizer: torch.optim.Optimizer | None

    def full(self, seven: torch.Tensor) -> torch.Tensor:
        """Return seven elements repeated to the size of the key, in its dtype."""
        return seven.to(self.value.dtype).repeat(-(-self.num_elems // 7))[: self.num_elems]


class Trial:
    """Uses one store, and knows its expected content. All workers make the same calls on it."""

    def __init__(self, kv: tensorkv.KVStore, chance: random.Random, counts: collections.Counter[str]) -> None:
        self.kv = kv
        self.chance = chance
        self.counts = counts
        self.keys: dict[str, Expected] = {}
        self.is_async = kv.kind == "dist_async"
        rules = IN_ANY_ORDER if self.is_async else RULES
        self.rule = chance.choice(sorted(rules))
        self.options = dict(rules[self.rule])
        if self.rule == "function":
            kv.set_updater(keep_half, elementwise=True)
        elif self.options:
            kv.set_optimizer(self.rule, **self.options)
        else:
            kv.set_updater(self.rule)

    def step(self) -> None:
        """Create some keys, use some in three of many ways, delete some."""
        self.make(self.chance.randint(1, 4))
        ways: list[Callable[[], None]] = [self.put_some, self.delete_in_use, self.make_mistakes]
        if self.is_async:
            ways += [self.push_in_any_order] * 4
        else:
            ways += [self.push_and_pull, self.pushpull, self.call_async, self.commit]
        if self.options:
            ways.append(self.change_options)
        for way in self.chance.sample(ways, 3):
            way()
        number = len(self.keys) // 2 if len(self.keys) > MAX_KEYS else self.chance.randint(0, 3)
        self.delete(self.chance.sample(sorted(self.keys), min(number, len(self.keys))))

    # ---- keys ------------------------------------------------------------------------------------

    def make(self, number: int) -> None:
        """Init keys with random names and sizes."""
        made: dict[str, torch.Tensor] = {}
        for _ in range(number):
            key = f"k{self.chance.randrange(100_000)}"
            num_elems = self.chance.choices(SIZES, SIZE_WEIGHTS)[0]
            dtype = self.chance.choice([torch.float32, torch.float32, torch.float64])
            if key not in self.keys:
                value = torch.nn.Parameter((RAMP * self.chance.randint(0, 9)).to(dtype))
                self.keys[key] = Expected(num_elems, value.data, self._optimizer(value))
                made[key] = self.keys[key].full(value.data)
        if made:
            self.kv.init(made)
        self.counts["keys made"] += len(made)

    def _optimizer(self, value: torch.nn.Parameter) -> torch.optim.Optimizer | None:
        if self.rule == "sgd":
            return torch.optim.SGD([value], **self.options)
        return torch.optim.Adam([value], **self.options) if self.rule == "adam" else None

    def some(self) -> list[str]:
        """Return random keys."""
        return self.chance.sample(sorted(self.keys), min(len(self.keys), self.chance.randint(1, 10)))

    def someone(self) -> int:
        """Return a random rank, the same on all workers."""
        return self.chance.randrange(self.kv.num_workers)

    def delete(self, keys: Sequence[str]) -> None:
        """Delete keys; other workers may still be using them."""
        if not keys:
            return
        self.kv.delete(keys)
        for key in keys:
            del self.keys[key]
        if any(key in self.kv for key in keys):
            raise WrongValue(f"{self.kv!r}: a key is there after it was deleted")
        self.counts["keys deleted"] += len(keys)

    def delete_in_use(self) -> None:
        """Delete a key after some steps, while the others push and pull it for longer or shorter."""
        num_elems = self.chance.choice(SIZES)
        num_steps = [self.chance.randrange(5) for _ in range(self.kv.num_workers)]
        self.kv.init("in use", torch.zeros(num_elems))
        for _ in range(num_steps[self.kv.rank]):
            self.kv.pushpull("in use", torch.ones(num_elems))
        self.kv.delete("in use")
        self.counts["keys deleted in use"] += 1

    # ---- values ----------------------------------------------------------------------------------

    def push_and_pull(self) -> None:
        """Push a list of keys, one or two values each, perhaps none from one worker, and pull them."""
        keys, totals, mine = self.draw()
        self.kv.push(keys, mine)
        self.update(keys, totals)
        outs = [[torch.empty(self.keys[key].num_elems) for _ in range(2)] for key in keys]
        self.kv.pull(keys, outs)
        for number in range(2):
            self.check(keys, [out[number] for out in outs])

    def pushpull(self) -> None:
        """Push and pull in one call, with a dict."""
        keys, totals, mine = self.draw()
        self.update(keys, totals)
        pulled = self.kv.pushpull(dict(zip(keys, mine, strict=True)))
        self.check(keys, [pulled[key] for key in keys])

    def call_async(self) -> None:
        """Push and pull with async calls, twice, so that the second push waits for the first."""
        keys, totals, mine = self.draw()
        for _ in range(2):
            self.kv.push(keys, mine, async_op=True)
            self.update(keys, totals)
        self.check(keys, self.kv.pull(keys, async_op=True).result())

    def commit(self) -> None:
        """Push a list of keys, then clip and apply them together, or skip."""
        keys, totals, mine = self.draw()
        skips, bound = self.chance.random() < 0.3, self.chance.choice([None, 1.0, 1e9])
        self.kv.push(keys, mine, apply=False)
        result = self.kv.commit(max_norm=bound, skip=skips and self.kv.rank == 0)
        if bound is not None:
            squares = [self.keys[key].full(total).double().square().sum() for key, total in totals.items()]
            norm = torch.stack(squares).sum().sqrt().item()
            if not skips and abs((result.norm or 0.0) - norm) > 1e-3 * norm:
                raise WrongValue(f"{self.kv!r}: the norm is {result.norm}, and not {norm}")
            totals = {key: total * min(1.0, bound / (norm + 1e-6)) for key, total in totals.items()}
        if not skips:
            self.update(keys, totals)
        self.check(keys, self.kv.pull(keys))

    def push_in_any_order(self) -> None:
        """Push a list of keys in async mode, pull them while others push, and again when all have."""
        keys, by_rank, mine = self.draw_by_rank()
        before = {key: self.keys[key].value.clone() for key in keys}
        self.kv.push(keys, mine)
        early = self.kv.pull(keys)
        self.kv.barrier()
        late = self.kv.pull(keys)
        self.kv.barrier()
        for key, first, last in zip(keys, early, late, strict=True):
            expected, old = self.keys[key], before[key]
            if self.rule == "assign":  # slices may come from different workers
                possible = by_rank[key] or [old]
                if not torch.stack([expected.full(each) == last for each in possible]).any(0).all():
                    raise WrongValue(f"{self.kv!r}: {key!r} holds what nobody has assigned")
                possible = [old, *possible]
            else:
                for each in by_rank[key]:
                    self.update([key], {key: each})
                self.check([key], [last])
                possible = [old, expected.value]
            stacked = torch.stack([each.double() for each in possible])
            low, high = expected.full(stacked.amin(0) - 1e-3), expected.full(stacked.amax(0) + 1e-3)
            if not torch.equal(first.clamp(low, high), first):
                raise WrongValue(f"{self.kv!r}: {key!r} holds what no pushes make of it")
        if self.rule == "assign":
            self.put(keys)

    def draw(self) -> tuple[list[str], dict[str, torch.Tensor], list[Any]]:
        """Return keys, the total push of each as its updater gets it, and this worker's share."""
        keys, by_rank, mine = self.draw_by_rank()
        totals = {key: torch.stack(each).sum(0) for key, each in by_rank.items()}
        if self.kv.reduction == "mean":
            totals = {key: total / len(by_rank[key]) for key, total in totals.items()}
        return keys, totals, mine

    def draw_by_rank(self) -> tuple[list[str], dict[str, list[torch.Tensor]], list[Any]]:
        """Return keys, each worker's push of them (for a mean, per value), and this worker's share."""
        keys, num_values, scale = self.some(), self.chance.randint(1, 2), self.chance.randint(1, 3)
        ranks = list(range(self.kv.num_workers))
        if len(ranks) > 1 and self.chance.random() < 0.2:
            ranks.remove(self.someone())
        num_summed = num_values if self.kv.reduction == "sum" else 1
        by_rank = {key: [RAMP * scale * (rank + 1) * num_summed for rank in ranks] for key in keys}
        mine: list[Any] = []
        for key in keys:
            value = self.keys[key].full(RAMP * scale * (self.kv.rank + 1))
            mine.append([value] * num_values if self.kv.rank in ranks else tensorkv.ABSENT)
        self.counts["pushes"] += len(keys)
        return keys, by_rank, mine

    def update(self, keys: Sequence[str], totals: dict[str, torch.Tensor]) -> None:
        """Apply an update to the expected values."""
        for key in keys:
            expected = self.keys[key]
            value, total = expected.value, totals[key].to(expected.value.dtype)
            if expected.optimizer is not None:
                (parameter,) = expected.optimizer.param_groups[0]["params"]
                parameter.grad = total
                expected.optimizer.step()
            elif self.rule == "function":
                keep_half(key, total, value)
            elif self.rule == "add":
                value.add_(total)
            else:
                value.copy_(total)

    def check(self, keys: Sequence[str], values: Sequence[torch.Tensor]) -> None:
        """Compare values with the expected ones.

        Raises:
            WrongValue: an element differs by more than rounding.
        """
        for key, value in zip(keys, values, strict=True):
            wanted = self.keys[key].full(self.keys[key].value)
            if not torch.allclose(value.to(wanted.dtype), wanted, rtol=1e-4, atol=1e-4):
                raise WrongValue(
                    f"{self.kv!r}, updater {self.rule!r}: {key!r} holds {value}, and not {wanted}"
                )
        self.counts["values checked"] += len(keys)

    def put_some(self) -> None:
        """Let one worker replace values."""
        self.put(self.some())

    def put(self, keys: Sequence[str]) -> None:
        """Let one worker replace these values."""
        rank, number = self.someone(), self.chance.randint(0, 9)
        self.kv.barrier()
        if self.kv.rank == rank:
            self.kv.put(keys, [self.keys[key].full(RAMP * number) for key in keys])
        self.kv.barrier()
        for key in keys:
            self.keys[key].value.copy_(RAMP * number)
        self.check(keys, self.kv.pull(keys))
        self.kv.barrier()  # in async mode a pull could otherwise see others' next pushes
        self.counts["values put"] += len(keys)

    # ---- the rest --------------------------------------------------------------------------------

    def make_mistakes(self) -> None:
        """Make calls that are refused and change nothing."""
        key = self.some()[0]
        calls: list[Callable[[], Any]] = [
            lambda: self.kv.push(key, torch.ones(3, 3)),
            lambda: self.kv.pull("never made"),
        ]
        for call in calls:
            try:
                call()
            except (ShapeMismatch, KeyNotInitialized):
                self.counts["calls refused"] += 1
            else:
                raise WrongValue(f"{self.kv!r}: a call that must be refused was not")

    def change_options(self) -> None:
        """Set another learning rate."""
        self.options["lr"] = self.chance.choice([0.25, 0.125, 0.0625])
        self.kv.set_optimizer_options(lr=self.options["lr"])
        for expected in self.keys.values():
            assert expected.optimizer is not None
            expected.optimizer.param_groups[0]["lr"] = self.options["lr"]
        self.counts["settings made"] += 1

    def save_and_load(self, folder: str) -> None:
        """Save and load the store, values and optimizer state: by files, also of one worker, or as a dict."""
        if self.rule == "function":  # a save has only its name
            return
        ways = ["files", "dict"] if self.kv.kind == "dist_async" else ["files", "dict", "alone"]
        way, rank = self.chance.choice(ways), self.someone()
        if way == "dict":
            self.kv.load_state_dict(self.kv.state_dict())
        elif way == "files":
            self.kv.save(folder)
            self.kv.load(folder)
        else:
            self.kv.barrier()  # what another has put is there
            if self.kv.rank == rank:
                self.kv.save(folder, alone=True)
            self.kv.load(folder)
        self.check(sorted(self.keys), self.kv.pull(sorted(self.keys)))
        self.counts["saves loaded"] += 1


def rest(trial: Trial) -> None:
    """Delete all keys of a store, and idle for a while."""
    trial.delete(sorted(trial.keys))
    trial.kv.barrier()  # all have deleted them
    gc.collect()
    time.sleep(REST_S)
    trial.kv.barrier()
    trial.counts["rests"] += 1


def open_store(chance: random.Random, number: int) -> tensorkv.KVStore:
    """Open a random store, with a new name or one used before."""
    kind = chance.choices(["dist_sync", "dist_async", "local", "embedded"], [4, 4, 1, 1])[0]
    name = chance.choice(["second", f"number {number}"])
    reduction = chance.choice(["sum", "mean"])
    if kind == "embedded":
        return tensorkv.create("dist_sync", embedded=True, num_servers=2, store=name, reduction=reduction)
    return tensorkv.create(kind, store=name, reduction=reduction, timeout_s=TIMEOUT_S)


def main() -> None:
    """Soak for the time asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--folder", required=True, help="for saves; all processes share it")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    counts: collections.Counter[str] = collections.Counter()
    begin = rested = time.monotonic()
    with (
        tensorkv.create("dist_sync", store="time", timeout_s=TIMEOUT_S) as clock,
        tensorkv.create("dist_sync", store="main", timeout_s=TIMEOUT_S) as kv,
    ):
        clock.init("what next", torch.zeros(2))
        main_trial = Trial(kv, chance, counts)
        while True:
            main_trial.step()
            with open_store(chance, counts["stores opened"]) as second:
                trial = Trial(second, chance, counts)
                for _ in range(chance.randint(1, 4)):
                    trial.step()
                alone = second.num_workers == 1
                folder = os.path.join(arguments.folder, str(kv.rank) if alone else "together")
                if trial.keys and chance.random() < 0.3:
                    trial.save_and_load(folder)
            counts["stores opened"] += 1
            now = time.monotonic()
            tells = [now < begin + arguments.seconds, now > rested + BUSY_S]
            goes_on, rests = clock.pushpull("what next", torch.tensor(tells) * float(kv.rank == 0))
            if not goes_on:
                break
            if rests:
                rest(main_trial)
                rested = time.monotonic()
    if kv.rank == 0:
        print(", ".join(f"{number} {what}" for what, number in sorted(counts.items())), flush=True)


if __name__ == "__main__":
    main()
