"""Random programs of one worker: a store in one process and one on servers give the same bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from tensorkv import ABSENT
from tensorkv.errors import TensorKVError
from tensorkv.store import KVStore
from tensorkv.testing.makers import Embedded, InProcess
from tensorkv.testing.suite import StoreMaker, keep_half, noise

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES: dict[torch.dtype, tuple[int, ...]] = {
    torch.float16: (21,),
    torch.bfloat16: (4, 5),
    torch.float32: (3, 7),
    torch.float64: (),
    torch.complex64: (17,),
    torch.int64: (5,),
}
"""A key per dtype, named after it, and its shape. Slices of the distributed store keep them whole."""

KEYS = [str(dtype) for dtype in SHAPES]
DTYPES = dict(zip(KEYS, SHAPES, strict=True))
FLOAT_KEYS = KEYS[: len(FLOATS)]
OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("sgd", {"lr": 0.25, "momentum": 0.5}),
    ("sgd", {"lr": 0.125, "momentum": 0.5}),
    ("adam", {"lr": 0.25}),
    ("adagrad", {"lr": 0.5}),
    ("adafactor", {"lr": 0.5}),
]

programs = hypothesis.settings(
    deadline=None,
    print_blob=True,
    derandomize=True,
    max_examples=40,
    phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
)

Call = Callable[[KVStore], Any]
Devices = list[tuple[int, torch.dtype | None]]
"""What is pushed of a key, a seed and a dtype per device; none stands for ABSENT."""


@dataclass(frozen=True)
class Step:
    """One call, or a push with the pull that shows what came of it. `text` is how to read it."""

    text: str
    call: Call

    def __repr__(self) -> str:
        return self.text


def _value(key: str, seed: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return numbers for a key, of very different size; `dtype` is another float to push.

    All are NaN for some seeds.
    """
    stored = DTYPES[key]
    if seed % 20 == 19 and stored != torch.int64:
        return torch.full(SHAPES[stored], float("nan"), dtype=dtype or stored)
    if stored == torch.int64:
        return torch.arange(5) * seed - 7
    if stored == torch.complex64:
        return torch.complex(noise(seed, *SHAPES[stored]), noise(seed + 1, *SHAPES[stored]))
    return noise(seed, *SHAPES[stored], dtype=dtype or stored)


def _values(names: list[str], pushed: list[Devices]) -> list[Any]:
    return [
        [_value(name, seed, dtype) for seed, dtype in devices] or ABSENT
        for name, devices in zip(names, pushed, strict=True)
    ]


@st.composite
def _pushed(draw: st.DrawFn, keys: list[str]) -> tuple[list[str], list[Devices]]:
    """What one call pushes; a key may stand twice in it."""
    names = draw(st.lists(st.sampled_from(keys), min_size=1, max_size=4))
    pushed = []
    for name in names:
        dtype = st.sampled_from(FLOATS) if name in FLOAT_KEYS else st.none()
        pushed.append(draw(st.lists(st.tuples(st.integers(0, 99), dtype), max_size=3)))
    return names, pushed


@st.composite
def _push_steps(draw: st.DrawFn, keys: list[str]) -> Step:
    names, pushed = draw(_pushed(keys))
    if draw(st.booleans()):
        return Step(f"pushpull {names} {pushed}", lambda kv: kv.pushpull(names, _values(names, pushed)))

    def push(kv: KVStore) -> Any:
        kv.push(names, _values(names, pushed))
        return kv.pull(list(dict.fromkeys(names)))

    return Step(f"push {names} {pushed}", push)


@st.composite
def _commit_steps(draw: st.DrawFn, keys: list[str]) -> Step:
    names, pushed = draw(_pushed(keys))
    max_norm = draw(st.sampled_from([None, 0.1, 1.0, 1e9]))
    skip, check_finite = draw(st.booleans()), draw(st.booleans())

    def commit(kv: KVStore) -> Any:
        kv.push(names, _values(names, pushed), apply=False)
        refusal = ""
        try:
            result = kv.commit(max_norm=max_norm, skip=skip, check_finite=check_finite)
        except TensorKVError as exc:
            refusal = type(exc).__name__
            result = kv.commit()
        return [refusal, result, *kv.pull(list(dict.fromkeys(names)))]

    return Step(f"commit {names} {pushed} {max_norm=} {skip=} {check_finite=}", commit)


@st.composite
def _setting_steps(draw: st.DrawFn) -> Step:
    which = draw(st.sampled_from(["updater", "optimizer", "options"]))
    if which == "updater":
        updater: Any = draw(st.sampled_from(["add", "assign", keep_half]))
        return Step(f"set_updater {updater}", lambda kv: kv.set_updater(updater))
    keys = draw(st.none() | st.lists(st.sampled_from(FLOAT_KEYS), min_size=1, max_size=2))
    if which == "options":
        lr = draw(st.sampled_from([0.25, 0.125]))
        return Step(f"options {lr=} {keys}", lambda kv: kv.set_optimizer_options(keys=keys, lr=lr))
    name, options = draw(st.sampled_from(OPTIMIZERS))
    return Step(f"{name} {options} {keys}", lambda kv: kv.set_optimizer(name, keys=keys, **options))


@st.composite
def _pull_steps(draw: st.DrawFn, keys: list[str]) -> Step:
    key = draw(st.sampled_from(keys))
    dtype = draw(st.sampled_from(FLOATS)) if key in FLOAT_KEYS else DTYPES[key]
    return Step(
        f"pull {key} as {dtype}", lambda kv: kv.pull(key, torch.zeros(SHAPES[DTYPES[key]], dtype=dtype))
    )


@st.composite
def many_steps(draw: st.DrawFn, reduction: str) -> list[Step]:
    keys = KEYS if reduction == "sum" else KEYS[:-1]
    inits = {key: _value(key, index) for index, key in enumerate(keys)}
    first = Step("init", lambda kv: kv.init(inits))
    step = st.one_of(_push_steps(keys), _push_steps(keys), _commit_steps(keys), _setting_steps())
    steps = draw(st.lists(step | _pull_steps(keys), max_size=20))
    infos = Step(
        "infos", lambda kv: [(kv.info(key).round, kv.info(key).version, kv.info(key).updater) for key in keys]
    )
    return [first, *steps, infos]


def _run(maker: StoreMaker, steps: list[Step], reduction: str) -> list[Any]:
    def work(kv: KVStore) -> list[Any]:
        results = []
        for step in steps:
            try:
                results.append(step.call(kv))
            except TensorKVError as exc:
                results.append(type(exc).__name__)
        return results

    found: list[Any] = maker.run(work, reduction=reduction)[0]
    return found


def _bits(result: Any) -> Any:
    """Return something that is equal for results whose bits are; all NaN are one."""
    if isinstance(result, list):
        return [_bits(each) for each in result]
    if isinstance(result, torch.Tensor):
        numbers = torch.view_as_real(result) if result.is_complex() else result
        plain = numbers.where(~numbers.isnan(), 0) if numbers.is_floating_point() else numbers
        return (
            result.dtype,
            result.shape,
            plain.contiguous().reshape(-1).view(torch.uint8).tolist(),
            numbers.isnan().tolist(),
        )
    return repr(result)  # of a commit: its norm to the last bit


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_local_and_servers_agree(reduction: str) -> None:
    @programs
    @hypothesis.given(many_steps(reduction))
    def run(steps: list[Step]) -> None:
        expected = _run(InProcess("local"), steps, reduction)
        found = _run(Embedded("dist_sync", num_servers=2), steps, reduction)
        for number, step in enumerate(steps):
            assert _bits(found[number]) == _bits(expected[number]), f"step {number}: {step}"

    run()
