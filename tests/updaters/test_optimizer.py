"""torch's optimizers as updaters: the same numbers, whatever is cut where; who fails, fails alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tensorkv.checkpoint.records import (
    VALUE,
    KeyRecord,
    PieceRecord,
    SavedSettings,
    SettingEntry,
    TensorRecord,
)
from tensorkv.errors import (
    InvalidOption,
    InvalidValue,
    LoadError,
    UnknownUpdater,
    UnsupportedOptimizer,
    UpdaterError,
)
from tensorkv.updaters.base import Update, Updater
from tensorkv.updaters.optimizer import (
    ELEMENTWISE_OPTIMIZERS,
    OptimizerUpdater,
    check_state_names,
    find_optimizer,
    make_optimizer,
    optimizer_spec,
    option_names,
)
from tensorkv.updaters.settings import build

OPTIONS: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}}


def optimizer(name: str, **options: Any) -> OptimizerUpdater:
    cls = find_optimizer(name)
    updater = build(optimizer_spec(cls, options), cls)
    assert isinstance(updater, OptimizerUpdater)
    return updater


def step(updater: Updater, slot: int, pushed: torch.Tensor, stored: torch.Tensor, **options: Any) -> Any:
    return updater.apply([Update(slot, f"key {slot}", pushed, stored)], options)[0]


@pytest.mark.parametrize("cls", sorted(ELEMENTWISE_OPTIMIZERS, key=str))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_optimizer_does_what_torch_does(cls: type[torch.optim.Optimizer], dtype: torch.dtype) -> None:
    options = OPTIONS.get(cls.__name__.lower(), {})
    updater = build(optimizer_spec(cls, options), cls)
    start = [torch.randn(4, 3, dtype=dtype), torch.randn((), dtype=dtype), torch.zeros(0, dtype=dtype)]
    expected = [torch.nn.Parameter(each.clone()) for each in start]
    reference = cls(expected, **options)
    for _ in range(5):
        grads = [torch.randn_like(each) for each in start]
        for parameter, grad in zip(expected, grads, strict=True):
            parameter.grad = grad.clone()
        reference.step()
        updates = [
            Update(i, i, grad.clone(), each) for i, (grad, each) in enumerate(zip(grads, start, strict=True))
        ]
        assert updater.apply(updates, options) == [None] * 3
    for each, parameter in zip(start, expected, strict=True):
        torch.testing.assert_close(each, parameter.detach(), rtol=1e-6, atol=1e-7)


VARIANTS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.SGD, {}),
    (torch.optim.SGD, {"momentum": 0.5}),
    (torch.optim.SGD, {"momentum": 0.5, "dampening": 0.25, "maximize": True}),
    (torch.optim.SGD, {"momentum": 0.5, "nesterov": True, "weight_decay": 0.125}),
    (torch.optim.Adam, {}),
    (torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.125}),
    (torch.optim.Adam, {"decoupled_weight_decay": True, "weight_decay": 0.125, "maximize": True}),
    (torch.optim.AdamW, {}),
    (torch.optim.AdamW, {"amsgrad": True}),
    (torch.optim.NAdam, {"weight_decay": 0.125}),
    (torch.optim.RAdam, {"weight_decay": 0.125}),
    (torch.optim.Adamax, {"weight_decay": 0.125}),
    (torch.optim.Adagrad, {}),
    (torch.optim.Adagrad, {"lr_decay": 0.25, "weight_decay": 0.125}),
    (torch.optim.Adadelta, {"weight_decay": 0.125}),
    (torch.optim.RMSprop, {}),
    (torch.optim.RMSprop, {"momentum": 0.5, "weight_decay": 0.125}),
    (torch.optim.RMSprop, {"momentum": 0.5, "centered": True}),
    (torch.optim.ASGD, {"weight_decay": 0.125, "t0": 2.0}),
    (torch.optim.Rprop, {}),
]
"""Every optimizer that goes element by element, with the options that lead to other arithmetic."""

HALVES = [torch.bfloat16, torch.float16]
FLOATS = [*HALVES, torch.float32]
SIZES = [1, 15, 16, 17, 31, 32, 33, 100, 1003]

each_variant = pytest.mark.parametrize(
    ("cls", "extra"), VARIANTS, ids=[f"{cls.__name__}-{'-'.join(extra)}" for cls, extra in VARIANTS]
)


def options_of(cls: type[torch.optim.Optimizer], extra: dict[str, Any], lr: float = 0.25) -> dict[str, Any]:
    """Return the options of a variant; half floats have no eps of 1e-8."""
    names = option_names(cls)
    assert names is not None
    return {"lr": lr, **({"eps": 0.125} if "eps" in names else {}), **extra}


def noise(seed: int, num_elems: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_elems, generator=generator).to(dtype)


def trained(
    updater: OptimizerUpdater,
    values: list[torch.Tensor],
    options: dict[str, Any],
    cuts: list[int] | None = None,
    steps: range = range(3),
) -> None:
    """Update values, or the slices of one value between `cuts`, in one call per step."""
    for number in steps:
        if cuts is None:
            pushed = [noise(100 * number + index, len(v), v.dtype) for index, v in enumerate(values)]
        else:
            whole = noise(100 * number, cuts[-1], values[0].dtype)
            pushed = [whole[low:high].clone() for low, high in itertools.pairwise(cuts)]
        updates = [
            Update(i, i, grad, value) for i, (grad, value) in enumerate(zip(pushed, values, strict=True))
        ]
        assert updater.apply(updates, options) == [None] * len(values)


@each_variant
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_what_the_store_chooses_does_what_the_loop_does(
    cls: type[torch.optim.Optimizer], extra: dict[str, Any], dtype: torch.dtype
) -> None:
    """Fused where torch has a kernel that is right; a full vector holds 16 or 32 halves."""
    options = options_of(cls, extra)
    found = [noise(-1, size, dtype) for size in SIZES]
    expected = [torch.nn.Parameter(each.clone()) for each in found]
    reference = cls(expected, foreach=False, **options)  # type: ignore[call-arg]
    for number in range(3):
        for index, parameter in enumerate(expected):
            parameter.grad = noise(100 * number + index, len(parameter), dtype)
        reference.step()
    trained(optimizer(cls.__name__, **options), found, options)
    tolerance = 8 * torch.finfo(dtype).eps
    for each, parameter in zip(found, expected, strict=True):
        torch.testing.assert_close(each, parameter.detach(), rtol=tolerance, atol=tolerance)


@each_variant
@pytest.mark.parametrize("dtype", [*FLOATS, torch.complex64])
def test_neither_slices_nor_threads_change_a_bit(
    cls: type[torch.optim.Optimizer], extra: dict[str, Any], dtype: torch.dtype
) -> None:
    """Whole or in slices, with one thread or several, saved between two steps and cut in another way."""
    options, num_elems = options_of(cls, extra), 70_001
    start = noise(-1, num_elems, dtype)
    cuts = [
        [0, num_elems],
        [0, 64, 128, 35_008, 35_072, num_elems],
        [0, 50_048, 70_000 // 64 * 64, num_elems],
    ]
    found: list[torch.Tensor] = []
    for threads, first, then in [(1, 0, 0), (2, 0, 1), (3, 0, 0), (1, 1, 2), (1, 2, 0)]:
        value, before = start.clone(), torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            updater = optimizer(cls.__name__, **options)
            views = [value[low:high] for low, high in itertools.pairwise(cuts[first])]
            trained(updater, views, options, cuts[first], range(2))
            states = [updater.state(slot) for slot in range(len(views))]
            updater = optimizer(cls.__name__, **options)
            views = [value[low:high] for low, high in itertools.pairwise(cuts[then])]
            if states[0]:
                joined = {
                    name: torch.cat([state[name] for state in states]) if each.dim() else each
                    for name, each in states[0].items()
                }
                for slot, (low, high) in enumerate(itertools.pairwise(cuts[then])):
                    mine = {n: (e[low:high] if e.dim() else e).clone() for n, e in joined.items()}
                    updater.restore(slot, mine)
            trained(updater, views, options, cuts[then], range(2, 4))
        finally:
            torch.set_num_threads(before)
        found.append(value)
    for each in found[1:]:
        assert torch.equal(each.view(torch.uint8), found[0].view(torch.uint8))


@each_variant
def test_state_of_blocks_is_that_of_the_value(
    cls: type[torch.optim.Optimizer], extra: dict[str, Any]
) -> None:
    """In the shape of the value; and options that take it out of its blocks, and back, keep it."""
    options, shape = options_of(cls, extra), (3, 30_000)
    values = [noise(-1, 90_000, torch.bfloat16).view(shape) for _ in range(2)]
    updaters = [optimizer(cls.__name__, **options) for _ in values]
    for number in range(3):
        for way, updater, value in zip(({}, {"foreach": False}), updaters, values, strict=True):
            pushed = noise(number, 90_000, torch.bfloat16).view(shape)
            chosen = {**options, **way} if number == 1 else options
            assert updater.apply([Update(0, "w", pushed, value)], chosen) == [None]
    state = updaters[1].state(0)
    assert all(each.shape in (shape, ()) for each in state.values())
    assert state.keys() == updaters[0].state(0).keys()
    torch.testing.assert_close(values[1].float(), values[0].float(), rtol=0.1, atol=0.1)
    updaters[1].forget(0)
    assert updaters[1].state(0) == {}


LOOPS = sorted(ELEMENTWISE_OPTIMIZERS, key=lambda each: each.__name__)
FUSED = {"SGD": "_fused_sgd_", "Adam": "_fused_adam_", "AdamW": "_fused_adamw_", "Adagrad": "_fused_adagrad_"}


def check_one_fails(updater: OptimizerUpdater, options: dict[str, Any], known: bool, heal: Any) -> None:
    """Update four keys, the third of which fails once; compare with one that never does."""
    values = [noise(-i, 5, torch.float32) for i in range(4)]
    pushed = [[noise(10 * number + i, 5, torch.float32) for i in range(4)] for number in range(3)]

    def push(number: int, slots: list[int], target: OptimizerUpdater, into: list[torch.Tensor]) -> list[Any]:
        updates = [Update(i, f"k{i}", pushed[number][i].clone(), into[i]) for i in slots]
        return target.apply(updates, options)

    heal(True)
    expected, model = (
        [value.clone() for value in values],
        optimizer(updater.optimizer_class.__name__, **options),
    )
    if known:
        assert push(0, [0, 1, 2, 3], updater, values) == push(0, [0, 1, 2, 3], model, expected) == [None] * 4
    assert push(1, [0, 1, 3], model, expected) == [None] * 3
    heal(False)
    failures = push(1, [0, 1, 2, 3], updater, values)
    heal(True)
    assert [failure is None for failure in failures] == [True, True, False, True]
    assert isinstance(failures[2], UpdaterError)
    assert "'k2'" in str(failures[2])
    for slot in range(4):
        assert torch.equal(values[slot], expected[slot])
        assert same_state(updater.state(slot), model.state(slot))
    assert push(2, [0, 1, 2, 3], updater, values) == push(2, [0, 1, 2, 3], model, expected) == [None] * 4
    assert all(map(torch.equal, values, expected))


def same_state(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(each, other[name]) for name, each in one.items())


@pytest.mark.parametrize("cls", LOOPS)
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("known", [False, True], ids=["first", "later"])
def test_a_step_that_fails_midway_changes_only_those_that_succeed(
    cls: type[torch.optim.Optimizer], foreach: bool, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when memory runs out in the middle: values and state of all have changed by then."""
    options = {**options_of(cls, {}), "foreach": foreach}
    real, broken = cls.step, [False]

    def step(self: torch.optim.Optimizer, closure: Any = None) -> None:
        real(self)
        bad = noise(12, 5, torch.float32)
        for parameter in self.param_groups[0]["params"]:
            if broken[0] and torch.equal(parameter.grad, bad):
                raise RuntimeError("out of memory")

    monkeypatch.setattr(cls, "step", step)
    check_one_fails(
        optimizer(cls.__name__, **options), options, known, lambda well: broken.__setitem__(0, not well)
    )


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("known", [False, True], ids=["first", "later"])
def test_a_kernel_that_refuses_changes_only_the_others(
    name: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fused kernel looks at its arguments first; the steps are counted by then."""
    options = {"lr": 0.25, **({"momentum": 0.5} if name == "SGD" else {})}
    updater = optimizer(name, **options)
    real, broken = getattr(torch, FUSED[name]), [False]

    def kernel(parameters: list[torch.Tensor], grads: list[torch.Tensor], *others: Any, **more: Any) -> None:
        if broken[0] and any(torch.equal(grad, noise(12, 5, torch.float32)) for grad in grads):
            raise RuntimeError("no")
        real(parameters, grads, *others, **more)

    monkeypatch.setattr(torch, FUSED[name], kernel)
    check_one_fails(updater, options, known, lambda well: broken.__setitem__(0, not well))


def test_a_learning_rate_that_half_floats_do_not_have_fails_them_only() -> None:
    updater, options = optimizer("sgd", lr=1e5), {"lr": 1e5}
    values = [torch.zeros(4, dtype=dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    updates = [Update(i, f"k{i}", torch.ones_like(value), value) for i, value in enumerate(values)]
    failures = updater.apply(updates, options)
    assert [failure is None for failure in failures] == [True, False, True]
    assert "'k1'" in str(failures[1])
    assert [value[0].item() for value in values] == [-1e5, 0, -99840]


def test_a_division_by_zero_at_one_key_s_step_leaves_it_as_before() -> None:
    options = {"lr": 0.25, "lambd": -2.0}  # at its second step 1 + lambd * lr * step is zero
    updater, values = optimizer("asgd", **options), [torch.ones(4), torch.ones(4)]
    assert updater.apply([Update(0, "old", torch.ones(4), values[0])], options) == [None]
    value, state = values[0].clone(), {name: each.clone() for name, each in updater.state(0).items()}
    updates = [Update(i, name, torch.ones(4), values[i]) for i, name in enumerate(("old", "new"))]
    failures = updater.apply(updates, options)
    assert [failure is None for failure in failures] == [False, True]
    assert "ZeroDivisionError on key 'old'" in str(failures[0])
    assert torch.equal(values[0], value)
    assert same_state(updater.state(0), state)
    assert values[1][0].item() != 1


def test_an_option_that_some_have_no_state_for_fails_those() -> None:
    updater, values = optimizer("adam", lr=0.5), [torch.ones(4), torch.ones(4)]
    assert step(updater, 0, torch.ones(4), values[0], lr=0.5) is None
    assert step(updater, 1, torch.ones(4), values[1], lr=0.5, amsgrad=True) is None
    before = values[0].clone()
    updates = [Update(i, f"k{i}", torch.ones(4), values[i]) for i in range(2)]
    failures = updater.apply(updates, {"lr": 0.5, "amsgrad": True})
    assert [failure is None for failure in failures] == [False, True]
    assert torch.equal(values[0], before)
    assert values[1][0].item() == pytest.approx(0, abs=1e-6)
    assert float(updater.state(0)["step"]) == 1


@pytest.mark.parametrize("dtype", HALVES)
def test_fused_where_it_is_wrong_is_refused(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tensorkv.updaters.optimizer.is_fused_right", lambda cls, dtype, device: dtype not in HALVES
    )
    updater, stored = optimizer("sgd", lr=0.5, fused=True), torch.zeros(40, dtype=dtype)
    updater.check_value("w", (40,), torch.float32)
    updater.check_value("w", (40,), dtype, device_type=None)  # it is not known yet where it will be
    with pytest.raises(InvalidOption, match=f"fused=True: key 'w' is {dtype}"):
        updater.check_value("w", (40,), dtype)
    failure = step(updater, 0, torch.ones(40, dtype=dtype), stored, lr=0.5, fused=True)
    assert isinstance(failure, UpdaterError)
    assert "fused=True: key 'key 0'" in str(failure)
    assert not stored.any()
    other = torch.zeros(40)
    assert step(updater, 1, torch.ones(40), other, lr=0.5, fused=True) is None
    assert (other == -0.5).all()


def test_a_kernel_may_use_the_gradients_of_its_own_call_only() -> None:
    """foreach takes them as scratch memory; those that a worker has lent stay as they are."""
    updater, options = (
        optimizer("sgd", lr=0.5, momentum=0.5, nesterov=True),
        {
            "lr": 0.5,
            "momentum": 0.5,
            "nesterov": True,
            "foreach": True,
        },
    )
    stored, pushed = torch.zeros(4), torch.ones(4)
    for _ in range(2):
        assert updater.apply([Update(0, "w", pushed, stored)], options) == [None]
    assert (pushed == 1).all()


class TestOptimizer:
    @pytest.mark.parametrize("name", ["sgd", "SGD", "AdamW", "rmsprop"])
    def test_names_in_any_case(self, name: str) -> None:
        assert find_optimizer(name).__name__.lower() == name.lower()

    def test_state_that_is_made_when_the_optimizer_is_built(self) -> None:
        """As torch's Adagrad does it; before torch 2.13 it knew no other way."""

        class Counting(torch.optim.SGD):
            def __init__(self, params: Any, lr: float, first: float = 1.0) -> None:
                super().__init__(params, lr=lr)
                for parameter in self.param_groups[0]["params"]:
                    self.state[parameter]["factor"] = torch.full_like(parameter, first)

            def step(self, closure: Any = None) -> None:
                for parameter in self.param_groups[0]["params"]:
                    parameter.sub_(parameter.grad * self.state[parameter]["factor"])
                    self.state[parameter]["factor"] += 1

        updater = build(optimizer_spec(Counting, {"lr": 0.5, "first": 10.0}), Counting)
        values = [torch.zeros(2), torch.zeros(3)]
        for _ in range(2):
            updates = [Update(i, i, torch.ones_like(each), each) for i, each in enumerate(values)]
            assert updater.apply(updates, {"lr": 0.5}) == [None, None]
        assert [each.tolist() for each in values] == [[-21.0] * 2, [-21.0] * 3]

    def test_a_class_is_taken_as_it_is(self) -> None:
        class Mine(torch.optim.SGD):
            pass

        assert find_optimizer(Mine) is Mine
        assert not optimizer_spec(Mine, {}).elementwise

    @pytest.mark.parametrize("wrong", ["sgdd", "optimizer", torch.optim.Optimizer, torch.nn.Linear, 3])
    def test_what_is_no_optimizer(self, wrong: Any) -> None:
        with pytest.raises(UnknownUpdater):
            find_optimizer(wrong)

    @pytest.mark.parametrize("name", ["lbfgs", "SparseAdam"])
    def test_those_a_store_cannot_run(self, name: str) -> None:
        with pytest.raises(UnsupportedOptimizer):
            find_optimizer(name)

    @pytest.mark.parametrize(
        "options",
        [
            {"lr": -1.0},
            {"speed": 3},
            {"lr": "fast"},
            {"lr": torch.tensor(0.1)},
            {"momentum": [0.9, object()]},
        ],
        ids=["range", "unknown", "type", "tensor", "object"],
    )
    def test_refused_options(self, options: dict[str, Any]) -> None:
        with pytest.raises(InvalidOption, match="SGD"):
            optimizer_spec(torch.optim.SGD, options)

    def test_lists_become_tuples(self) -> None:
        assert step(optimizer("adam", betas=[0.8, 0.9]), 0, torch.ones(2), torch.ones(2)) is None

    def test_slots_with_and_without_momentum_go_in_one_call(self) -> None:
        updater, values = optimizer("sgd", lr=1.0, momentum=0.5), [torch.zeros(2), torch.zeros(2)]
        options = {"lr": 1.0, "momentum": 0.5}
        step(updater, 0, torch.ones(2), values[0], **options)
        both = [Update(i, i, torch.ones(2), values[i]) for i in (1, 0)]
        assert updater.apply(both, options) == [None, None]
        assert values[0].tolist() == [-2.5, -2.5]
        assert values[1].tolist() == [-1, -1]

    def test_options_of_the_call_win(self) -> None:
        updater, stored = optimizer("sgd", lr=1.0), torch.zeros(1)
        step(updater, 0, torch.ones(1), stored, lr=0.25)
        assert stored.item() == -0.25

    def test_foreach_may_be_asked_for(self) -> None:
        updater, stored = optimizer("adam", lr=0.1), torch.zeros(3)
        assert step(updater, 0, torch.ones(3), stored, lr=0.1, foreach=True) is None
        assert stored[0].item() == pytest.approx(-0.1)

    def test_forgetting_starts_afresh(self) -> None:
        updater, stored = optimizer("sgd", lr=1.0, momentum=0.5), torch.zeros(1)
        options = {"lr": 1.0, "momentum": 0.5}
        step(updater, 0, torch.ones(1), stored, **options)
        updater.forget(0)
        updater.forget(17)  # one without state
        step(updater, 0, torch.ones(1), stored, **options)
        assert stored.item() == -2

    def test_a_value_may_move(self) -> None:
        updater, stored = optimizer("sgd", lr=1.0, momentum=0.5), torch.zeros(1)
        options = {"lr": 1.0, "momentum": 0.5}
        step(updater, 0, torch.ones(1), stored, **options)
        moved = stored.clone()
        step(updater, 0, torch.ones(1), moved, **options)
        assert (stored.item(), moved.item()) == (-1, -2.5)

    def test_one_off_the_list_runs_on_a_copy(self) -> None:
        class Moody(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                super().step()
                if self.param_groups[0]["params"][0].grad.sum() < 0:
                    raise RuntimeError("not in the mood")

        updater = build(optimizer_spec(Moody, {"lr": 1.0, "momentum": 0.5}), Moody)
        options, stored = {"lr": 1.0, "momentum": 0.5}, torch.zeros(1)
        assert step(updater, 0, torch.ones(1), stored, **options) is None
        failure = step(updater, 0, -torch.ones(1), stored, **options)
        assert isinstance(failure, UpdaterError)
        assert stored.item() == -1
        assert step(updater, 0, torch.ones(1), stored, **options) is None
        assert stored.item() == -2.5  # momentum as if the failed step had not been

    def test_what_it_raises_is_reported_for_each_slot(self) -> None:
        updater, stored = optimizer("adam"), [torch.ones(2), torch.ones(2)]
        updates = [Update(i, i, torch.ones(2), stored[i]) for i in range(2)]
        updater.apply(updates, {})
        failures = updater.apply(updates, {"amsgrad": True, "foreach": False})  # it has no such state
        assert [type(failure) for failure in failures] == [UpdaterError, UpdaterError]

    @pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn])
    @pytest.mark.parametrize("cls", sorted(ELEMENTWISE_OPTIMIZERS, key=str))
    def test_what_it_does_not_take_is_refused_and_fails_alone(
        self, cls: type[torch.optim.Optimizer], dtype: torch.dtype
    ) -> None:
        updater = optimizer(cls.__name__, lr=0.5)
        with pytest.raises(InvalidValue, match=rf"'n' of dtype {dtype}.*keys=.*float32"):
            updater.check_value("n", (1,), dtype)
        floats, other = torch.ones(1), torch.ones(1).to(dtype)
        updates = [Update(0, "n", other.clone(), other), Update(1, "f", floats + 1, floats)]
        failures = updater.apply(updates, {"lr": 0.5})
        assert isinstance(failures[0], UpdaterError)
        assert "'n'" in str(failures[0])
        assert failures[1] is None
        assert other.float().item() == 1
        assert floats.item() < 1

    @pytest.mark.parametrize(
        "dtype",
        [*FLOATS, torch.float64, torch.complex64, torch.complex128],
    )
    @pytest.mark.parametrize("cls", sorted(ELEMENTWISE_OPTIMIZERS, key=str))
    def test_all_other_dtypes_are_taken(self, cls: type[torch.optim.Optimizer], dtype: torch.dtype) -> None:
        updater, stored = optimizer(cls.__name__, lr=0.5), torch.zeros(3).to(dtype)
        updater.check_value("w", (3,), dtype)
        assert step(updater, 0, torch.ones(3).to(dtype), stored) is None
        assert (stored != 0).all()

    def test_a_stranger_is_tried_on_what_others_do_not_take(self) -> None:
        class Voting(torch.optim.Optimizer):
            def __init__(self, params: Any) -> None:
                super().__init__(params, {})

            def step(self, closure: Any = None) -> None:
                for parameter in self.param_groups[0]["params"]:
                    parameter.sub_(parameter.grad)

        updater = build(optimizer_spec(Voting, {}), Voting)
        updater.check_value("n", (3,), torch.int64)
        with pytest.raises(InvalidValue, match="'n' of dtype torch.float8_e4m3fn"):
            updater.check_value("n", (3,), torch.float8_e4m3fn)
        with pytest.raises(InvalidValue, match="Adafactor cannot update key 'c' of dtype torch.complex64"):
            optimizer("adafactor").check_value("c", (3,), torch.complex64)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_the_company_of_others_does_not_change_how_a_slot_is_rounded(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(1)
        value, pushed = torch.randn(2, 200, generator=generator).to(dtype)
        options = {"lr": 0.25, "momentum": 0.5}
        alone, beside = value.clone(), value.clone()
        step(optimizer("sgd", **options), 0, pushed.clone(), alone, **options)
        other = torch.ones(3, dtype=torch.complex64)
        updates = [Update(0, "c", other.clone(), other), Update(1, "w", pushed.clone(), beside)]
        assert optimizer("sgd", **options).apply(updates, options) == [None, None]
        assert torch.equal(alone, beside)
        assert other.tolist() == [0.75] * 3

    @pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
    def test_muon_takes_matrices_only(self) -> None:
        updater = optimizer("muon")
        updater.check_value("m", (3, 4), torch.float32)
        with pytest.raises(InvalidValue, match=r"'v' of shape \(3,\).*keys="):
            updater.check_value("v", (3,), torch.float32)


@pytest.mark.parametrize("betas", [(0.9,), (), 0.5, "ab"])
def test_whatever_an_optimizer_raises_at_its_options_is_an_invalid_option(betas: Any) -> None:
    """Adam looks at betas[1] before it looks at how many there are."""
    with pytest.raises(InvalidOption, match="Adam refuses"):
        make_optimizer(torch.optim.Adam, [torch.nn.Parameter(torch.zeros(2))], {"betas": betas})


@pytest.mark.parametrize(
    "optimizer_class",
    sorted(ELEMENTWISE_OPTIMIZERS, key=lambda each: each.__name__),
    ids=lambda each: each.__name__,
)
def test_state_of_another_optimizer_is_not_loaded(optimizer_class: type[torch.optim.Optimizer]) -> None:
    """What an optimizer has kept is taken, or nothing at all; what it would miss or not know is not."""
    spec = optimizer_spec(optimizer_class, {})
    updater = build(spec, optimizer_class)
    assert updater.apply([Update(0, "w", torch.ones(2), torch.zeros(2))], {"momentum": 0.5}) == [None]
    settings = SavedSettings([spec], [SettingEntry(None, 0, {}, None)])

    def check(names: set[str]) -> None:
        tensors = [TensorRecord(name, "float32", (2,), True) for name in (VALUE, *sorted(names))]
        check_state_names(
            settings, [KeyRecord("w", (2,), "float32", False, [PieceRecord(0, 2, 1, tensors)])], "it"
        )

    names = set(updater.state(0))
    check(names)
    check(set())
    for other in ({*names, "x"}, {"x"}, {*list(names)[1:], "x"}):
        with pytest.raises(LoadError, match=f"'w'.*'x'.*{optimizer_class.__name__}"):
            check(other)
    if optimizer_class is not torch.optim.SGD:
        with pytest.raises(LoadError, match="'w'"):
            check(names - {"step"})


def test_a_step_of_a_scalar_value_is_not_of_its_dtype_but_a_momentum_is() -> None:
    spec = optimizer_spec(torch.optim.Adam, {})
    settings = SavedSettings([spec], [SettingEntry(None, 0, {}, None)])

    def check(dtypes: dict[str, str], shape: tuple[int, ...] = ()) -> None:
        tensors = [TensorRecord(VALUE, "bfloat16", (1,), True)]
        tensors += [TensorRecord(name, dtype, (1,), True) for name, dtype in dtypes.items()]
        record = KeyRecord("w", shape, "bfloat16", False, [PieceRecord(0, 1, 1, tensors)])
        check_state_names(settings, [record], "it")

    fits = {"step": "float32", "exp_avg": "bfloat16", "exp_avg_sq": "bfloat16"}
    check(fits)
    check({**fits, "step": "bfloat16"})
    with pytest.raises(LoadError, match="'exp_avg' is float32"):
        check({**fits, "exp_avg": "float32"})
    with pytest.raises(LoadError, match="'step' is float32"):
        check(fits, (1,))  # where a shape tells it from a momentum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize(
    "options",
    [{name: True} for name in ("capturable", "foreach", "differentiable")]
    + [{"foreach": True, "capturable": True}],
    ids=lambda each: "-".join(each),
)
@pytest.mark.parametrize("name", ["adam", "adamw", "rmsprop", "nadam", "asgd"])
def test_an_implementation_that_refuses_a_dtype_is_refused_before_the_first_push(
    name: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    try:
        updater = optimizer(name, lr=0.5, **options)
        updater.check_value("w", (3,), dtype)
    except InvalidOption as exc:
        assert "capturable" in str(exc)  # noqa: PT017  # the others run everywhere
        assert "'w'" in str(exc)  # noqa: PT017
        assert "capturable" in options
        return
    assert (
        step(updater, 0, torch.ones(3, dtype=dtype), torch.zeros(3, dtype=dtype), lr=0.5, **options) is None
    )


def test_adafactor_takes_no_tensor_without_elements() -> None:
    """It would divide by their number."""
    updater = optimizer("adafactor", lr=0.5)
    updater.check_value("w", (3,), torch.float32)
    with pytest.raises(InvalidValue, match=r"'w' of shape \(0, 3\)"):
        updater.check_value("w", (0, 3), torch.float32)
