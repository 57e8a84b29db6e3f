"""An optimizer that was made: its class, the options of its groups, and the keys they are for."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv.errors import InvalidArgument, InvalidOption, UnknownUpdater, UnsupportedOptimizer
from tensorkv.updaters.fusing import is_fused_right
from tensorkv.updaters.groups import OptimizerGroup, groups_of
from tensorkv.updaters.optimizer import (
    ELEMENTWISE_OPTIMIZERS,
    find_optimizer,
    is_optimizer_class,
    make_optimizer,
)

Class = type[torch.optim.Optimizer]

ALL = sorted(
    (each for each in vars(torch.optim).values() if is_optimizer_class(each)), key=lambda each: each.__name__
)
REFUSED = [torch.optim.LBFGS, torch.optim.SparseAdam]
TAKEN = [each for each in ALL if each not in REFUSED]
ELEMENTWISE = sorted(ELEMENTWISE_OPTIMIZERS, key=lambda each: each.__name__)

named = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6), reason="torch records no names of parameters"
)


def parameters(*shapes: tuple[int, ...]) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def ids(known: dict[str, torch.nn.Parameter]) -> dict[int, list[tensorkv.store.Key]]:
    return {id(each): [key] for key, each in known.items()}


@pytest.mark.parametrize("cls", TAKEN)
def test_an_optimizer_as_it_comes_has_no_options(cls: Class) -> None:
    """So the store chooses how to step, as for the class alone: `foreach=None` would be a choice."""
    made = cls(parameters((2, 2), (3, 3)))  # type: ignore[call-arg]
    assert groups_of(made, None, {}) == [OptimizerGroup(None, {})]
    assert groups_of(made, ("w", "b"), {}) == [OptimizerGroup(("w", "b"), {})]


@pytest.mark.parametrize("cls", TAKEN)
def test_what_was_chosen_is_among_the_options(cls: Class) -> None:
    made = make_optimizer(cls, parameters((2, 2)), {"lr": 0.375})
    (group,) = groups_of(made, None, {})
    assert group.options == {"lr": 0.375}
    for option, value in made.defaults.items():
        if isinstance(value, float) and option not in ("lr", "rho"):  # each on its own
            other = value * (2 if option == "d" else 0.5) or 0.25
            changed = make_optimizer(cls, parameters((2, 2)), {"lr": 0.375, option: other})
            (group,) = groups_of(changed, None, {})
            assert group.options == {"lr": 0.375, option: other}


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (torch.optim.SGD, {"momentum": 0.5, "nesterov": True, "weight_decay": 0.125}),
        (torch.optim.Adam, {"betas": (0.5, 0.75), "amsgrad": True, "decoupled_weight_decay": True}),
        (torch.optim.AdamW, {"weight_decay": 0.0, "maximize": True, "foreach": False}),
        (torch.optim.Adagrad, {"initial_accumulator_value": 0.5}),
        (torch.optim.Rprop, {"etas": (0.25, 1.5), "step_sizes": (1e-5, 10)}),
        (torch.optim.SGD, {"lr": 0.5, "fused": True}),
    ],
)
def test_options_of_each_type(cls: Class, options: dict[str, Any]) -> None:
    (group,) = groups_of(make_optimizer(cls, parameters((2,)), options), None, {})
    assert group.options == options


@pytest.mark.parametrize("lr", [torch.tensor(0.5), torch.tensor([0.5]), np.float64(0.5), np.float32(0.5)])
def test_a_number_in_a_tensor_is_a_number(lr: Any) -> None:
    (group,) = groups_of(torch.optim.SGD(parameters((2,)), lr=lr), None, {})
    assert group.options == {"lr": 0.5}
    assert type(group.options["lr"]) is float


def test_what_schedulers_and_users_put_into_groups_is_no_option() -> None:
    made = torch.optim.AdamW([{"params": parameters((2,)), "name": "encoder", "lr_scale": 0.5}], lr=0.25)
    torch.optim.lr_scheduler.OneCycleLR(made, max_lr=0.25, total_steps=10, div_factor=2)
    (group,) = groups_of(made, None, {})
    assert group.options == {"lr": 0.125, "betas": (0.95, 0.999)}


@pytest.mark.parametrize("by_name", [False, pytest.param(True, marks=named)])
def test_several_groups_are_for_the_keys_of_their_parameters(by_name: bool) -> None:
    weight, bias, scale = parameters((2, 2), (2,), (2,))
    given: Any = {"weight": weight, "bias": bias, "scale": scale}
    no_decay = [("bias", bias), ("scale", scale)] if by_name else [bias, scale]
    made = torch.optim.AdamW(
        [
            {"params": [("weight", weight)] if by_name else [weight]},
            {"params": no_decay, "weight_decay": 0.0},
        ],
        lr=0.5,
    )
    found = groups_of(made, None, {} if by_name else ids(given))
    assert found == [
        OptimizerGroup(("weight",), {"lr": 0.5}),
        OptimizerGroup(("bias", "scale"), {"lr": 0.5, "weight_decay": 0.0}),
    ]


@named
def test_what_a_parameter_was_initialised_as_counts_before_its_name() -> None:
    """A model within a model: its names have no prefix, the keys have."""
    weight, bias = parameters((2, 2), (2,))
    groups = [{"params": [("weight", weight)]}, {"params": [("bias", bias)], "lr": 0.25}]
    made = torch.optim.SGD(groups, lr=0.5)
    found = groups_of(made, None, ids({"head.weight": weight}))
    assert [each.keys for each in found] == [("head.weight",), ("bias",)]
    found = groups_of(made, None, {id(weight): ["average", "weight"]})
    assert [each.keys for each in found] == [("weight",), ("bias",)]


def test_groups_of_the_same_options_are_one() -> None:
    """Some make a group of each parameter; as long as all are alike it need not be known which is which."""
    first, second, third = parameters((2,), (2,), (2,))
    made = torch.optim.SGD([{"params": [first]}, {"params": [second]}], lr=0.5)
    assert groups_of(made, None, {}) == [OptimizerGroup(None, {"lr": 0.5})]
    made = torch.optim.SGD(
        [
            {"params": [first]},
            {"params": [second], "lr": 1.0},
            {"params": [third]},
            {"params": [], "lr": 2.0},
        ],
        lr=0.5,
    )
    assert groups_of(made, None, ids({"a": first, "b": second, "c": third})) == [
        OptimizerGroup(("a", "c"), {"lr": 0.5}),
        OptimizerGroup(("b",), {"lr": 1.0}),
    ]


def test_numbers_of_numpy_are_options() -> None:
    with tensorkv.create("local") as kv:
        kv.init("w", torch.ones(1))
        kv.set_optimizer("adam", lr=np.float64(0.5), betas=(np.float64(0.0), np.float32(0.5)))
        kv.set_optimizer_options(lr=np.float32(0.25))
        kv.push("w", torch.ones(1))
        assert kv.pull("w").item() == pytest.approx(0.75)


def test_groups_that_are_all_empty_are_refused() -> None:
    optimizer = torch.optim.SGD([{"params": []}, {"params": []}], lr=0.1)
    with pytest.raises(InvalidArgument, match="no group of this SGD has a parameter"):
        groups_of(optimizer, None, {})


def test_groups_that_cannot_be_told_apart_are_refused() -> None:
    first, second = parameters((2,), (3,))
    made = torch.optim.SGD([{"params": [first]}, {"params": [second], "lr": 1.0}], lr=0.5)
    with pytest.raises(InvalidArgument, match=r"parameter 0 of group 1 of the SGD, of shape \(3,\)"):
        groups_of(made, None, ids({"a": first}))
    with pytest.raises(InvalidArgument, match="leave keys away"):
        groups_of(made, ("a",), ids({"a": first, "b": second}))
    with pytest.raises(InvalidArgument, match="key 'w' is in groups 0 and 1"):
        groups_of(made, None, {id(first): ["w"], id(second): ["w"]})


@pytest.mark.parametrize("cls", TAKEN)
def test_an_optimizer_with_state_is_refused(cls: Class) -> None:
    """Its momentum would be lost. What it has from the beginning, as Adagrad, is nothing to lose."""
    (weight,) = parameters((2, 2))
    made = make_optimizer(cls, [weight], {"momentum": 0.5} if cls is torch.optim.SGD else {})
    weight.grad = torch.ones(2, 2)
    assert len(groups_of(made, None, {})) == 1
    made.step()
    with pytest.raises(InvalidArgument, match="has made steps"):
        groups_of(made, None, {})


@pytest.mark.parametrize("cls", REFUSED)
def test_those_a_store_cannot_run(cls: Class) -> None:
    with pytest.raises(UnsupportedOptimizer):
        groups_of(cls(parameters((2,))), None, {})  # type: ignore[call-arg]


def test_the_base_class_is_no_optimizer() -> None:
    with pytest.raises(UnknownUpdater):
        groups_of(torch.optim.Optimizer(parameters((2,)), {}), None, {})


class Careful(torch.optim.SGD):
    """Keeps what it was made with, and has a required option."""

    def __init__(self, params: Any, lr: float, *, first: float = 1.0) -> None:
        super().__init__(params, lr=lr)
        self.defaults["first"] = first
        for group in self.param_groups:
            group["first"] = first
        for each in self.param_groups[0]["params"]:
            self.state[each]["factor"] = torch.full_like(each, first)


class Forgetful(torch.optim.SGD):
    def __init__(self, params: Any, lr: float, first: float = 1.0) -> None:
        super().__init__(params, lr=lr * first)


class Halving(torch.optim.SGD):
    def __init__(self, params: Any, lr: float = 1.0) -> None:
        super().__init__(params, lr=lr / 2)


class Passing(torch.optim.AdamW):
    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)


def test_a_class_of_ones_own_is_made_again_of_its_groups() -> None:
    assert groups_of(Careful(parameters((2,)), 0.5), None, {}) == [OptimizerGroup(None, {"lr": 0.5})]
    (group,) = groups_of(Careful(parameters((2,)), 0.5, first=2.0), None, {})
    assert group.options == {"lr": 0.5, "first": 2.0}
    (group,) = groups_of(Passing(parameters((2,)), lr=0.5), None, {})
    assert group.options == {"lr": 0.5}


def test_options_that_a_class_of_ones_own_does_not_keep_are_asked_for() -> None:
    with pytest.raises(InvalidOption, match=r"'first'.*set_optimizer\(Forgetful, first="):
        groups_of(Forgetful(parameters((2,)), 0.5, 2.0), None, {})
    with pytest.raises(InvalidOption, match=r"lr=0.25.*does not lead to.*set_optimizer\(Halving"):
        groups_of(Halving(parameters((2,)), 0.5), None, {})
    with pytest.raises(InvalidOption, match="momentum=0.5"):
        groups_of(Careful([{"params": parameters((2,)), "momentum": 0.5}], 0.5), None, {})
    with pytest.raises(InvalidOption, match="label=.* cannot travel"):
        groups_of(Careful([{"params": parameters((2,)), "label": object()}], 0.5), None, {})


@pytest.mark.parametrize("cls", ELEMENTWISE)
def test_a_store_trains_as_torch_does_with_the_same_groups(cls: Class) -> None:
    """To the last bit: two groups, the second with options of its own, and one optimizer of torch."""
    shapes = {"weight": (5, 7), "bias": (7,), "scale": ()}
    started = dict(zip(shapes, parameters(*shapes.values()), strict=True))
    expected = {key: torch.nn.Parameter(each.detach().clone()) for key, each in started.items()}
    special = (
        {"weight_decay": 0.0} if "weight_decay" in make_optimizer(cls, parameters((2,)), {}).defaults else {}
    )
    fused = {"fused": True} if is_fused_right(cls, torch.float32, "cpu") else {}

    def groups(of: dict[str, torch.nn.Parameter]) -> list[dict[str, Any]]:
        rest = [each for key, each in of.items() if key != "weight"]
        return [{"params": [of["weight"]]}, {"params": rest, "lr": 0.03125, **special}]

    options = {"lr": 0.0625, **({"weight_decay": 0.125} if special else {})}
    alone = make_optimizer(cls, groups(expected), {**options, **fused})  # type: ignore[arg-type]
    with tensorkv.create("local") as kv:
        kv.init(started)
        kv.set_optimizer(make_optimizer(cls, groups(started), options))  # type: ignore[arg-type]
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            pushed = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
            for key, each in expected.items():
                each.grad = pushed[key].clone()
            alone.step()
            kv.push(pushed)
            kv.set_optimizer(make_optimizer(cls, groups(started), options))  # type: ignore[arg-type] # keeps state
            for key, each in expected.items():
                assert torch.equal(kv.pull(key), each), (key, step)


def test_what_is_refused_of_the_second_group_changes_nothing() -> None:
    weight, count = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2).int(), False)
    made = torch.optim.SGD([{"params": [weight]}, {"params": [count], "lr": 1.0}], lr=0.5)
    with tensorkv.create("local") as kv:
        kv.init({"weight": weight, "count": count})
        with pytest.raises(tensorkv.errors.InvalidValue, match="'count'"):
            kv.set_optimizer(made)
        assert {kv.info(key).updater for key in ("weight", "count")} == {"assign"}


def test_a_parameter_that_is_gone_or_whose_key_was_deleted_is_forgotten() -> None:
    first, second = parameters((2,), (2,))
    made = torch.optim.SGD([{"params": [first]}, {"params": [second], "lr": 1.0}], lr=0.5)
    with tensorkv.create("local") as kv:
        kv.init({"a": first, "b": second, "c": parameters((2,))[0]})
        gc.collect()
        kv.set_optimizer(made)
        kv.push({"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2)})
        assert kv.pull("a").tolist() == (first - 0.5).tolist()
        assert kv.pull("b").tolist() == (second - 1.0).tolist()
        assert kv.info("c").updater == "assign"
        kv.delete("b")
        with pytest.raises(InvalidArgument, match="group 1"):
            kv.set_optimizer(made)
        kv.init("b", second.detach().clone())
        with pytest.raises(InvalidArgument, match="group 1"):
            kv.set_optimizer(made)


def test_the_class_of_an_instance_is_found_as_the_class_is() -> None:
    assert find_optimizer(type(torch.optim.SGD(parameters((2,))))) is torch.optim.SGD
