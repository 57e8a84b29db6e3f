"""Checks of one worker: updaters and optimizers, their options, state and errors."""

from __future__ import annotations

from typing import Any

import torch

from tensorkv.errors import InvalidValue, UpdaterError
from tensorkv.store import KVStore
from tensorkv.testing.suite import (
    StoreMaker,
    add_twice,
    check,
    close,
    full,
    in_one,
    noise,
    raises,
    refuse_negative,
    same,
)

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    "Adam": {"lr": 0.1, "betas": (0.8, 0.9)},
    "AdamW": {"lr": 0.1, "amsgrad": True},
    "RMSprop": {"lr": 0.01, "momentum": 0.5},
    "Adagrad": {"lr": 0.1},
    "NAdam": {"lr": 0.1},
    "Adafactor": {"lr": 0.1},
}


class Twin:
    """The same optimization in torch alone: the result a store must reach."""

    def __init__(self, start: torch.Tensor, name: str, **options: Any) -> None:
        self.parameter = torch.nn.Parameter(start.clone())
        self.optimizer: torch.optim.Optimizer = getattr(torch.optim, name)([self.parameter], **options)

    def step(self, gradient: torch.Tensor) -> torch.Tensor:
        """Make a step along `gradient` and return the parameter."""
        self.parameter.grad = gradient.clone()
        self.optimizer.step()
        return self.parameter.detach()

    def set(self, **options: Any) -> None:
        """Change options, as set_optimizer_options does."""
        self.optimizer.param_groups[0].update(options)


@check()
def check_optimizers_by_class(maker: StoreMaker) -> None:
    """Torch's optimizers give the same results in a store as in torch."""

    def work(kv: KVStore) -> None:
        for name, options in OPTIMIZERS.items():
            if not hasattr(torch.optim, name):  # Adafactor came with torch 2.5
                continue
            start = noise(3, 4, 5, dtype=torch.float64)
            kv.init(name, start, whole=True)
            kv.set_optimizer(getattr(torch.optim, name), **options)
            twin = Twin(start, name, **options)
            for step in range(3):
                gradient = noise(step, 4, 5, dtype=torch.float64)
                kv.push(name, gradient)
                close(kv.pull(name), twin.step(gradient), f"{name} after step {step}", rtol=1e-9)

    in_one(maker, work)


@check()
def check_optimizer_by_name(maker: StoreMaker) -> None:
    """Names of optimizers are case-insensitive; float32 values agree with torch to rounding."""

    def work(kv: KVStore) -> None:
        kv.init(["w", "b"], [full(1), full(1, 3)])
        twins = [Twin(full(1), "AdamW", lr=0.1), Twin(full(1, 3), "AdamW", lr=0.1)]
        for name in ("adamw", "ADAMW", "AdamW"):  # the same setting, which keeps the state
            kv.set_optimizer(name, lr=0.1)
            gradients = [noise(len(name), 2, 3), noise(7, 3)]
            kv.push(["w", "b"], gradients)
            for key, twin, gradient in zip(("w", "b"), twins, gradients, strict=True):
                close(kv.pull(key), twin.step(gradient), key)
        assert "AdamW" in kv.info("w").updater

    in_one(maker, work)


@check()
def check_optimizer_with_its_groups(maker: StoreMaker) -> None:
    """A store takes an optimizer instance with its groups; an equal one keeps the state."""

    def work(kv: KVStore) -> None:
        weight, bias = torch.nn.Parameter(noise(1, 3, 4)), torch.nn.Parameter(noise(2, 4))
        kv.init({"w": weight, "b": bias, "n": full(1)})
        twins = {
            "w": Twin(weight.detach(), "AdamW", lr=0.5, weight_decay=0.125),
            "b": Twin(bias.detach(), "AdamW", lr=0.25, weight_decay=0.0),
        }
        groups: list[dict[str, Any]] = [
            {"params": [weight]},
            {"params": [bias], "lr": 0.25, "weight_decay": 0.0},
        ]
        for step in range(3):
            kv.set_optimizer(torch.optim.AdamW(groups, lr=0.5, weight_decay=0.125))
            pushed = {"w": noise(3 + step, 3, 4), "b": noise(13 + step, 4), "n": full(step)}
            kv.push(pushed)
            for key, twin in twins.items():
                close(kv.pull(key), twin.step(pushed[key]), f"{key} after step {step}")
        same(kv.pull("n"), 2.0, "the key of no group")
        kv.set_optimizer(torch.optim.SGD([weight], lr=0.5))
        kv.push("n", full(1))
        same(kv.pull("n"), 1.5, "after an optimizer of one group")

    in_one(maker, work)


@check()
def check_optimizer_for_some_keys(maker: StoreMaker) -> None:
    """An optimizer for some keys leaves the others unchanged, even when set before init."""

    def work(kv: KVStore) -> None:
        kv.set_optimizer("sgd", keys=["late"], lr=1.0)
        kv.init(["w", "b", "late"], [full(1), full(1), full(1)])
        kv.set_optimizer("sgd", keys="w", lr=0.5)
        kv.push(["w", "b", "late"], [full(1), full(1), full(1)])
        same(kv.pull("w"), 0.5)
        same(kv.pull("b"), 1.0, "the key with no optimizer")
        same(kv.pull("late"), 0.0)
        kv.set_optimizer("sgd", lr=2.0)
        kv.push(["w", "b"], [full(1), full(1)])
        same(kv.pull("w"), -1.5, "after an optimizer for all keys")
        same(kv.pull("b"), -1.0, "after an optimizer for all keys")
        kv.set_updater("assign")
        kv.push(["w", "late"], [full(9), full(9)])
        same(kv.pull("w"), 9.0)
        same(kv.pull("late"), 9.0)

    in_one(maker, work)


@check()
def check_muon_for_matrices(maker: StoreMaker) -> None:
    """Muon runs on the matrices it is set for, whole and with their shape."""

    def work(kv: KVStore) -> None:
        start, gradient = noise(1, 8, 6), noise(2, 8, 6)
        kv.set_optimizer("muon", keys=["matrix"], lr=0.1)
        kv.init({"matrix": start, "bias": full(1, 6)})
        kv.push({"matrix": gradient, "bias": full(2, 6)})
        close(kv.pull("matrix"), Twin(start, "Muon", lr=0.1).step(gradient), "matrix")
        same(kv.pull("bias"), full(2, 6))

    if hasattr(torch.optim, "Muon"):
        in_one(maker, work)


@check()
def check_options_change_later(maker: StoreMaker) -> None:
    """set_optimizer_options changes options, for all keys or some, and keeps the state."""

    def work(kv: KVStore) -> None:
        options: dict[str, Any] = {"lr": 0.5, "momentum": 0.5}
        kv.init(["w", "b"], [full(0), full(0)])
        kv.set_optimizer("sgd", **options)
        twins = {key: Twin(full(0), "SGD", **options) for key in ("w", "b")}

        def step(value: float) -> None:
            kv.push(["w", "b"], [full(value), full(value)])
            for key, twin in twins.items():
                close(kv.pull(key), twin.step(full(value)), key)

        step(1.0)
        kv.set_optimizer_options(lr=0.25)
        for twin in twins.values():
            twin.set(lr=0.25)
        step(2.0)
        kv.set_optimizer_options(keys=["b"], lr=0.125, momentum=0.0)
        twins["b"].set(lr=0.125, momentum=0.0)
        step(3.0)
        kv.set_optimizer_options(lr=1.0)
        for twin in twins.values():
            twin.set(lr=1.0)
        step(4.0)

    in_one(maker, work)


@check()
def check_repeated_setting_keeps_state(maker: StoreMaker) -> None:
    """Setting the same optimizer again keeps its momentum; another one, or other options, start afresh."""

    def work(kv: KVStore) -> None:
        kv.init("w", full(0))
        kv.set_optimizer("sgd", lr=1.0, momentum=0.5)
        kv.push("w", full(1))
        same(kv.pull("w"), -1.0)
        kv.set_optimizer(torch.optim.SGD, momentum=0.5, lr=1.0)
        kv.push("w", full(1))
        same(kv.pull("w"), -2.5, "with momentum kept")
        kv.set_optimizer("adagrad", lr=0.0)
        kv.push("w", full(1))
        same(kv.pull("w"), -2.5)
        kv.set_optimizer("sgd", lr=1.0, momentum=0.5)
        kv.push("w", full(1))
        same(kv.pull("w"), -3.5, "after another optimizer: fresh")
        kv.set_optimizer("sgd", lr=1.0, momentum=0.25)
        kv.push("w", full(1))
        same(kv.pull("w"), -4.5, "with other options: fresh")

    in_one(maker, work)


@check()
def check_options_as_they_are_keep_state(maker: StoreMaker) -> None:
    """Repeating the setting in force keeps the state; so does repeating the last call."""

    def work(kv: KVStore) -> None:
        kv.init("w", full(0))
        value = 0.0

        def step(change: float, what: str) -> None:
            nonlocal value
            value -= change
            kv.push("w", full(1))
            same(kv.pull("w"), value, what)

        kv.set_optimizer("sgd", lr=1.0, momentum=0.5)
        step(1.0, "the first step")
        kv.set_optimizer_options(lr=2.0)
        kv.set_optimizer("sgd", lr=2.0, momentum=0.5)
        step(3.0, "options that hold already: kept")
        kv.set_optimizer_options(lr=4.0)
        kv.set_optimizer("sgd", lr=2.0, momentum=0.5)
        step(3.5, "the last call again: kept, with its options")
        kv.set_optimizer("sgd", lr=1.0, momentum=0.5)
        step(1.0, "the first call again, which is not the last one: fresh")
        kv.set_optimizer("sgd", lr=1.0, momentum=0.5, dampening=0.0)
        step(1.5, "a default written out: kept")
        kv.set_optimizer_options(momentum=0.0)
        kv.set_optimizer("sgd", lr=1.0)
        step(1.0, "momentum stays 0, as was asked for")
        kv.set_optimizer_options(momentum=0.5)
        kv.set_optimizer("sgd", lr=1.0)
        step(1.0, "the last call again: no momentum")
        kv.set_updater("add")
        kv.set_optimizer("sgd", lr=1.0, momentum=0.5)
        step(1.0, "after another updater: fresh")

    in_one(maker, work)


@check()
def check_each_key_keeps_its_own_state(maker: StoreMaker) -> None:
    """Whether a setting keeps the state is decided per key, by the setting in force for that key."""

    def work(kv: KVStore) -> None:
        kv.init(["a", "b"], [full(0), full(0)])
        values = {"a": 0.0, "b": 0.0}

        def step(a: float, b: float, what: str) -> None:
            values["a"] -= a
            values["b"] -= b
            kv.push(["a", "b"], [full(1), full(1)])
            for key, value in values.items():
                same(kv.pull(key), value, f"{key}, {what}")

        kv.set_optimizer("sgd", lr=1.0, momentum=0.5)
        step(1.0, 1.0, "the first step")
        kv.set_optimizer_options(keys=["b"], lr=2.0)
        kv.set_optimizer("sgd", lr=2.0, momentum=0.5)
        step(2.0, 3.0, "one set for both: only b had it")
        kv.set_optimizer("sgd", keys=["b"], lr=2.0, momentum=0.5)
        step(3.0, 3.5, "set for b again")
        kv.set_updater("add")
        kv.set_optimizer("sgd", lr=2.0, momentum=0.5)
        kv.set_updater("add")
        kv.set_optimizer("sgd", keys=["a"], lr=1.0, momentum=0.5)
        kv.set_optimizer("sgd", keys=["b"], lr=1.0, momentum=0.5)
        step(1.0, 1.0, "after another updater")
        kv.set_optimizer("adagrad", keys=["a"], lr=0.0)
        kv.set_optimizer("sgd", keys=["a"], lr=1.0, momentum=0.5)
        step(1.0, 1.5, "a had another optimizer between")
        kv.set_optimizer("sgd", lr=1.0, momentum=0.5)
        step(1.5, 1.75, "the same for all keys")

    in_one(maker, work)


@check()
def check_updater_error(maker: StoreMaker) -> None:
    """An updater's error is raised once, with its traceback; the value is unchanged, the round counts."""

    def work(kv: KVStore) -> None:
        kv.init(["a", "b"], [full(1), full(1)])
        kv.set_updater(refuse_negative)

        def fail() -> None:
            kv.push(["a", "b"], [full(-5), full(2)])
            kv.pull("a")

        raises(
            UpdaterError, fail, "'a'", "negative gradient", "ArithmeticError", "refuse_negative", "Traceback"
        )
        same(kv.pull("a"), 1.0, "the value after the updater raised")
        same(kv.pull("b"), 3.0, "the other key of the push")
        assert (kv.info("a").round, kv.info("a").version) == (1, 0)
        assert (kv.info("b").round, kv.info("b").version) == (1, 1)
        kv.push("a", full(1))
        same(kv.pull("a"), 2.0)
        kv.barrier()

        raises(UpdaterError, lambda: kv.pushpull("a", full(-1)), "negative gradient")
        same(kv.pull("a"), 2.0)

    in_one(maker, work)


@check()
def check_updater_errors_of_several_keys(maker: StoreMaker) -> None:
    """If the updater raises for several keys of a call, the call raises the first; the others are notes."""

    def work(kv: KVStore) -> None:
        kv.init(["a", "b", "c"], [full(1), full(1), full(1)])
        kv.set_updater(refuse_negative)

        error = raises(
            UpdaterError,
            lambda: kv.pushpull(["b", "c", "a"], [full(-1), full(1), full(-1)]),
            "'b'",
            "Traceback",
        )
        (note,) = error.__notes__
        assert "'a'" in note and "negative gradient" in note, note
        same(kv.pull("a"), 1.0)
        same(kv.pull("c"), 2.0)
        kv.barrier()

    in_one(maker, work)


@check()
def check_optimizer_error(maker: StoreMaker) -> None:
    """set_optimizer refuses what an optimizer does not support; a failing update names its key."""

    def work(kv: KVStore) -> None:
        kv.init("n", torch.ones(3, dtype=torch.int64))
        raises(InvalidValue, lambda: kv.set_optimizer("sgd", lr=0.5), "'n'", "int64", "keys=")
        kv.set_optimizer("sgd", keys=["w", "h"], lr=1e5)  # float16 has no such number
        kv.init(["w", "h"], [full(1), torch.ones(3, dtype=torch.float16)])

        def push() -> None:
            kv.push(["w", "h"], [full(1), torch.ones(3)])
            kv.pull("h")

        raises(UpdaterError, push, "'h'")
        same(kv.pull("h"), torch.ones(3, dtype=torch.float16))
        same(kv.pull("w"), 1 - 1e5)
        same(kv.pull("n"), torch.ones(3, dtype=torch.int64))

    in_one(maker, work)


@check()
def check_updater_error_at_barrier(maker: StoreMaker) -> None:
    """The barrier raises an updater's error that no call on the key has raised, unless the push did."""

    def work(kv: KVStore) -> None:
        kv.init("a", full(1))
        kv.set_updater(refuse_negative)

        def fail() -> None:
            kv.push("a", full(-5))
            kv.barrier()

        raises(UpdaterError, fail, "'a'", "negative gradient")
        kv.barrier()
        same(kv.pull("a"), 1.0)

    in_one(maker, work)


@check()
def check_function_on_every_key_in_order(maker: StoreMaker) -> None:
    """A function updater runs once per key of a list."""

    def work(kv: KVStore) -> None:
        keys = [9, 5, 7]
        kv.init(keys, [full(key) for key in keys])
        kv.set_updater(add_twice)
        kv.push(keys, [full(1)] * 3)
        for key, value in zip(keys, kv.pull(keys), strict=True):
            same(value, key + 2.0, str(key))

    in_one(maker, work)
