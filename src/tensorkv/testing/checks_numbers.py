"""Checks of one worker: dtypes and shapes, sums and means, many and large values, the keys."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import numpy as np
import torch

from tensorkv.errors import InvalidArgument, KeyNotInitialized
from tensorkv.keys import ABSENT
from tensorkv.store import KVStore
from tensorkv.testing.suite import (
    StoreMaker,
    check,
    close,
    full,
    in_one,
    noise,
    raises,
    same,
)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OTHERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64, torch.complex128)


@check()
def check_small_shapes(maker: StoreMaker) -> None:
    """Scalars (0-dim) and empty tensors are ordinary values."""

    def work(kv: KVStore) -> None:
        kv.init(["scalar", "empty", "flat"], [torch.tensor(1.5), torch.zeros(2, 0, 3), torch.zeros(0)])
        kv.set_updater("add")
        kv.push(["empty", "scalar", "flat"], [torch.zeros(2, 0, 3), [torch.tensor(1.0)] * 2, torch.zeros(0)])
        same(kv.pull("scalar"), torch.tensor(3.5))
        same(kv.pull("empty"), torch.zeros(2, 0, 3))
        out = torch.zeros(())
        kv.pull("scalar", out)
        same(out, torch.tensor(3.5))
        kv.set_optimizer("sgd", lr=0.5)
        kv.push(["empty", "scalar"], [torch.zeros(2, 0, 3), torch.tensor(1.0)])
        same(kv.pull("scalar"), torch.tensor(3.0))
        assert kv.info("empty").version == 2 and kv.info("empty").shape == (2, 0, 3)

    in_one(maker, work)


@check()
def check_dtypes(maker: StoreMaker) -> None:
    """Every dtype torch can add is stored, summed and returned unchanged."""

    def work(kv: KVStore) -> None:
        dtypes = FLOATS + OTHERS
        names = [str(dtype) for dtype in dtypes]
        kv.init(names, [full(1, 3, dtype=dtype) for dtype in dtypes])
        kv.set_updater("add")
        kv.push(names, [[full(2, 3, dtype=dtype), full(3, 3, dtype=dtype)] for dtype in dtypes])
        for name, dtype, value in zip(names, dtypes, kv.pull(names), strict=True):
            same(value, full(6, 3, dtype=dtype), name)
            assert kv.info(name).dtype == dtype
        flags = torch.tensor([True, False, False])
        kv.init("bool", flags)
        kv.set_updater("assign")
        kv.push("bool", [torch.tensor([True, True, False]), torch.tensor([True, False, False])])
        same(kv.pull("bool"), torch.tensor([True, True, False]), "bool")

    in_one(maker, work)


@check()
def check_half_floats_accumulate_wide(maker: StoreMaker) -> None:
    """float16 and bfloat16 accumulate in float32: 2048 + 1 + 1 is 2050, and 256 + 1 + 1 is 258."""

    def work(kv: KVStore) -> None:
        for dtype, start in ((torch.float16, 2048), (torch.bfloat16, 256)):
            kv.init(str(dtype), full(0, 5, dtype=dtype))
            kv.push(str(dtype), [full(value, 5, dtype=dtype) for value in (start, 1, 1)])
            same(kv.pull(str(dtype)), full(start + 2, 5, dtype=dtype), str(dtype))

    in_one(maker, work)


@check()
def check_eight_bit_floats(maker: StoreMaker) -> None:
    """float8 is stored, accumulated in float32, added to the stored value, and averaged."""

    def work(kv: KVStore) -> None:
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            key, one = str(dtype), full(1, 3, dtype=torch.float32).to(dtype)
            kv.init(key, one)
            kv.set_updater("assign")
            kv.push(key, [one, full(2, 3)])
            same(kv.pull(key, full(0, 3)), 1.5 if kv.reduction == "mean" else 3.0, key)
            kv.set_updater("add")
            kv.push(key, one)
            same(kv.pull(key, full(0, 3)), 2.5 if kv.reduction == "mean" else 4.0, key)
            assert kv.pull(key).dtype == dtype

    in_one(maker, work)
    in_one(maker, work, reduction="mean")


@check()
def check_float_casts(maker: StoreMaker) -> None:
    """Any float dtype may be pushed and pulled into; the stored dtype stays as initialised."""

    def work(kv: KVStore) -> None:
        for stored in FLOATS:
            key = str(stored)
            kv.init(key, full(0, 3, dtype=stored))
            for other in FLOATS:
                kv.push(key, [full(1.5, 3, dtype=other), full(2, 3, dtype=stored)])
                same(kv.pull(key), full(3.5, 3, dtype=stored), f"{other} pushed into {stored}")
                same(kv.pull(key, full(0, 3, dtype=other)), full(3.5, 3, dtype=other), f"{stored} in {other}")
        kv.push("torch.float32", full(1 / 3, 3, dtype=torch.float64))
        same(kv.pull("torch.float32"), full(1 / 3, 3), "float64 rounded to float32")

    in_one(maker, work)


@check()
def check_sums_in_list_order(maker: StoreMaker) -> None:
    """Devices are added in list order, so the sum is the same to the last bit each time."""

    def work(kv: KVStore) -> None:
        kv.init("w", torch.zeros(1000))
        kv.init("b", torch.zeros(3))
        for count in (2, 3, 4, 5, 9):
            values = [noise(seed, 1000) for seed in range(count)]
            expected = values[0].clone()
            for value in values[1:]:
                expected += value
            kv.push("w", values)
            same(kv.pull("w"), expected, f"sum of {count}")
            kv.push(["b"] + ["w"] * count, [torch.zeros(3), *values])
            same(kv.pull("w"), expected, f"sum of the same key {count} times")
        kv.push("b", [full(1e8, 3), full(1, 3), full(-1e8, 3)])
        same(kv.pull("b"), full(0, 3), "(1e8 + 1) - 1e8")

    in_one(maker, work)


@check()
def check_mean(maker: StoreMaker) -> None:
    """reduction="mean" divides by the number of tensors; a key twice in a push counts one."""

    def work(kv: KVStore) -> None:
        kv.init("w", full(0))
        kv.push("w", [full(1), full(2), full(6)])
        same(kv.pull("w"), 3.0, "mean of three devices")
        kv.push("w", full(5))
        same(kv.pull("w"), 5.0, "mean of one")
        kv.push(["w", "w"], [full(1), full(2)])
        same(kv.pull("w"), 3.0, "the same key twice is one push of the sum")
        kv.push("w", ABSENT)
        same(kv.pull("w"), 3.0, "absent")
        raises(TypeError, lambda: kv.init("n", torch.zeros(2, dtype=torch.int64)), "'n'", "mean")
        assert kv.keys() == ["w"]
        assert kv.reduction == "mean"

    in_one(maker, work, reduction="mean")


@check()
def check_weight_of_the_only_push(maker: StoreMaker) -> None:
    """The weight of a round's only push cancels out bitwise; 0 is like ABSENT."""

    def work(kv: KVStore) -> None:
        kv.init("w", full(9))
        value = noise(1, 2, 3)
        weights: tuple[Any, ...] = (
            1,
            0.3,
            7,
            1e18,
            1e-18,
            np.int64(3),
            np.float32(0.1),
            torch.tensor(5),
            True,
        )
        for weight in weights:
            kv.push("w", value, weight=weight)
            same(kv.pull("w"), value, f"weight {weight!r}")
            same(kv.pushpull("w", [value, value * 3], weight=weight), (value + value * 3) / 2, f"{weight!r}")
        version = kv.info("w").version
        kv.push("w", full(float("nan")), weight=0)
        kv.push({"w": [full(1), full(2)]}, weight=0.0)
        assert kv.info("w").version == version
        same(kv.pushpull("w", full(1), weight=0), (value + value * 3) / 2, "weight 0")

    in_one(maker, work, reduction="mean")


@check()
def check_weights_that_are_refused(maker: StoreMaker) -> None:
    """A weight is 0 or from 1e-18 to 1e18, in a store with a mean; otherwise nothing is pushed."""

    def work(kv: KVStore) -> None:
        kv.init("w", full(9))
        weights: tuple[Any, ...] = (
            -1,
            float("nan"),
            float("inf"),
            1e-19,
            1e19,
            10**400,
            "3",
            [1],
            full(1),
            1j,
        )
        for weight, call in itertools.product(weights, (kv.push, kv.pushpull)):
            raises(ValueError, partial(call, "w", full(1), weight=weight), "'w'", "weight=")
        assert kv.info("w").round == 0
        same(kv.pull("w"), 9.0)

    def work_of_sums(kv: KVStore) -> None:
        kv.init("w", full(9))
        for call in (kv.push, kv.pushpull):
            raises(InvalidArgument, partial(call, "w", full(1), weight=2), "'w'", 'reduction="mean"')
        assert kv.info("w").round == 0

    in_one(maker, work, reduction="mean")
    in_one(maker, work_of_sums)


@check()
def check_absent(maker: StoreMaker) -> None:
    """ABSENT makes a round without an update: round counts, version and value do not change."""

    def work(kv: KVStore) -> None:
        kv.init(["a", "b"], [full(1), full(2)])
        kv.push("a", ABSENT)
        kv.push(["a", "b"], [ABSENT, full(3)])
        same(kv.pull("a"), 1.0)
        same(kv.pull("b"), 3.0)
        assert (kv.info("a").round, kv.info("a").version) == (2, 0)
        assert (kv.info("b").round, kv.info("b").version) == (1, 1)
        same(kv.pushpull("a", ABSENT), 1.0)
        kv.push(["a", "a"], [ABSENT, full(4)])
        same(kv.pull("a"), 4.0, "absent and a value")
        assert (kv.info("a").round, kv.info("a").version) == (4, 1)

    in_one(maker, work)


@check()
def check_caller_keeps_its_memory(maker: StoreMaker) -> None:
    """Changing a tensor that was passed in or returned does not change the stored value."""

    def work(kv: KVStore) -> None:
        for size in (6, 50_000):
            value, pushed, array = torch.ones(size), torch.full((size,), 2.0), np.full(size, 3, np.float32)
            kv.init(f"w{size}", value)
            value.fill_(-1)
            same(kv.pull(f"w{size}"), torch.ones(size), "after changing what was given to init")
            kv.push(f"w{size}", pushed)
            pushed.fill_(-1)
            same(kv.pull(f"w{size}"), torch.full((size,), 2.0), "after changing what was pushed")
            kv.push(f"w{size}", [array, torch.zeros(size)])
            array[:] = -1
            pulled = kv.pull(f"w{size}")
            same(pulled, torch.full((size,), 3.0), "after changing a pushed array")
            pulled.fill_(-1)
            out = torch.empty(size)
            kv.pull(f"w{size}", out)
            out.fill_(-1)
            same(kv.pull(f"w{size}"), torch.full((size,), 3.0), "after changing what was pulled")
            pushpulled = torch.full((size,), 4.0)
            kv.pushpull(f"w{size}", pushpulled, pushpulled).fill_(-1)
            same(kv.pull(f"w{size}"), torch.full((size,), 4.0), "after changing a pushpulled tensor")

    in_one(maker, work)


@check()
def check_many_keys(maker: StoreMaker) -> None:
    """A thousand keys in one call."""

    def work(kv: KVStore) -> None:
        names = [f"layer{index}.weight" for index in range(1000)]
        kv.init(names, [full(index, 8) for index in range(1000)])
        kv.set_updater("add")
        values = kv.pushpull(dict.fromkeys(names, full(1, 8)))
        assert len(values) == len(kv) == 1000 and kv.keys() == names
        found = torch.stack([values[name] for name in names])
        same(found, torch.arange(1.0, 1001.0)[:, None].expand(1000, 8), "the values")

    in_one(maker, work)


@check()
def check_large_values(maker: StoreMaker) -> None:
    """Values of several MB, of odd length, sliced or whole, with updaters and optimizers."""

    def work(kv: KVStore) -> None:
        size = 600_011
        first, second = noise(1, size), noise(2, size)
        kv.init(["cut", "odd"], [first, first.reshape(1, size)])
        kv.init("whole", first, whole=True)
        assert kv.info("whole").num_slices == 1
        for key in ("cut", "odd", "whole"):
            shape = kv.info(key).shape
            kv.push(key, [first.reshape(shape), second.reshape(shape)])
            same(kv.pull(key), (first + second).reshape(shape), key)
        kv.set_optimizer("sgd", lr=0.5)
        kv.push({"cut": second, "whole": second})
        expected = first + second - 0.5 * second
        for key, value in zip(("cut", "whole"), kv.pull(["cut", "whole"]), strict=True):
            close(value, expected, key)
        assert (kv.info("cut").version, kv.info("cut").round) == (2, 2)

    in_one(maker, work)


@check()
def check_directory(maker: StoreMaker) -> None:
    """keys, len, in, info; delete and init again."""

    def work(kv: KVStore) -> None:
        assert kv.keys() == [] and len(kv) == 0 and "w" not in kv
        kv.init(["w", "b"], [full(1), full(2, 4, dtype=torch.float64)])
        assert kv.keys() == ["w", "b"] and len(kv) == 2 and "w" in kv and "x" not in kv and 3 not in kv
        info = kv.info("b")
        assert (info.key, info.shape, info.dtype) == ("b", (4,), torch.float64)
        assert (info.version, info.round, info.num_slices) == (0, 0, 1)
        assert info.updater == "assign"
        kv.push("b", full(0, 4))
        assert (kv.info("b").version, kv.info("b").round) == (1, 1)
        kv.delete("b")
        assert kv.keys() == ["w"] and "b" not in kv
        for call in (kv.pull, kv.info, kv.delete, lambda key: kv.push(key, full(0, 4))):
            raises(KeyNotInitialized, partial(call, "b"), "'b'")
        kv.init("b", full(7, 2))
        same(kv.pull("b"), full(7, 2), "after delete and init")
        info = kv.info("b")
        assert (info.version, info.round, info.shape) == (0, 0, (2,))
        assert kv.keys() == ["w", "b"]
        kv.delete(["w", "b"])
        assert len(kv) == 0

    in_one(maker, work)


@check()
def check_delete_forgets_optimizer_state(maker: StoreMaker) -> None:
    """A key that is initialised again starts without momentum."""

    def work(kv: KVStore) -> None:
        kv.set_optimizer("sgd", lr=1.0, momentum=0.5)
        for turn in (1, 2):
            kv.init("w", full(0))
            kv.push("w", full(1))
            same(kv.pull("w"), -1.0, f"turn {turn}")
            kv.push("w", full(1))
            same(kv.pull("w"), -2.5, f"turn {turn}")
            kv.delete("w")

    in_one(maker, work)
