"""DistributedOptimizer: like the optimizer alone on the whole batch, and like a torch optimizer to a
script."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import tensorkv
from tensorkv.errors import (
    InvalidArgument,
    NotPicklable,
    NotSupported,
    SettingMismatch,
    StoreClosed,
    UnsupportedOptimizer,
)
from tensorkv.store import KVStore
from tensorkv.testing.cluster import run_job

DEADLINE_S = 30.0
ROWS = 12


torch.manual_seed(3)
MODEL = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def make_model(dtype: torch.dtype = torch.float64) -> nn.Module:
    return copy.deepcopy(MODEL).to(dtype)  # workers are threads, which share torch's generator


def rows(step: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    parameters = dict(model.named_parameters())
    decay = [each for name, each in parameters.items() if name.endswith("weight")]
    rest = [each for name, each in parameters.items() if name.endswith("bias")]
    return [{"params": decay, "weight_decay": 0.1}, {"params": rest, "lr": 0.02}]


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, amsgrad=True),
    "nadam": lambda groups: torch.optim.NAdam(groups, lr=0.01),
    "radam": lambda groups: torch.optim.RAdam(groups, lr=0.01),
    "adamax": lambda groups: torch.optim.Adamax(groups, lr=0.01),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.05, lr_decay=0.1),
    "adadelta": lambda groups: torch.optim.Adadelta(groups, lr=0.5),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, centered=True, momentum=0.5),
    "asgd": lambda groups: torch.optim.ASGD(groups, lr=0.05),
    "rprop": lambda groups: torch.optim.Rprop(
        [{key: each for key, each in group.items() if key != "weight_decay"} for group in groups], lr=0.01
    ),
}


def alone(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    steps: range,
    schedule: Any = None,
    part: slice = slice(None),
) -> None:
    for step in steps:
        inputs = rows(step, next(model.parameters()).dtype)[part]
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([each.detach().reshape(-1) for each in model.parameters()]).clone()


def as_workers(
    fn: Callable[[KVStore], Any], num_workers: int = 2, num_servers: int = 2, **options: Any
) -> list[Any]:
    """Run a function as each worker, whose store takes means."""
    options = {"reduction": "mean", "timeout_s": DEADLINE_S, **options}
    return run_job(fn, num_workers=num_workers, num_servers=num_servers, **options)


def part_of(kv: KVStore) -> slice:
    return slice(kv.rank, None, kv.num_workers)


@pytest.mark.parametrize("where", ["servers", "workers"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_trains_like_one_process_on_the_whole_batch(name: str, where: Any) -> None:
    expected = make_model()
    plain = OPTIMIZERS[name](groups_of(expected))
    alone(plain, expected, range(20), torch.optim.lr_scheduler.ExponentialLR(plain, 0.9))

    def work(kv: KVStore) -> torch.Tensor:
        model = make_model()
        inner = OPTIMIZERS[name](groups_of(model))
        optimizer = tensorkv.DistributedOptimizer(inner, model, kind=kv, where=where)
        alone(
            optimizer, model, range(20), torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), part_of(kv)
        )
        return weights(model)

    for num_workers, num_servers in ((1, 2), (2, 1), (3, 2)):
        results = as_workers(work, num_workers, num_servers)
        assert all(torch.equal(results[0], each) for each in results)
        assert torch.allclose(results[0], weights(expected), rtol=1e-10, atol=1e-12)


def test_in_one_process_it_has_the_same_bits() -> None:
    expected, model = make_model(torch.float32), make_model(torch.float32)
    alone(torch.optim.SGD(expected.parameters(), lr=0.1, foreach=False), expected, range(5))
    optimizer = tensorkv.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1, foreach=False), model
    )
    alone(optimizer, model, range(5))
    assert optimizer.store.kind == "local"
    assert torch.equal(weights(model), weights(expected))


# ---- a torch optimizer -------------------------------------------------------------------------


@pytest.fixture
def model() -> nn.Module:
    return make_model()


@pytest.fixture
def optimizer(model: nn.Module) -> Iterator[tensorkv.DistributedOptimizer]:
    inner = torch.optim.Adam(model.parameters(), lr=0.1)
    with tensorkv.DistributedOptimizer(inner, model) as made:
        yield made


def test_it_is_one_to_whoever_asks(optimizer: tensorkv.DistributedOptimizer, model: nn.Module) -> None:
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    assert optimizer.param_groups[0]["lr"] == 0.1
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=10)  # changes betas, by `defaults`
    assert optimizer.param_groups[0]["betas"] == (0.95, 0.999)
    optimizer.zero_grad()
    assert "Adam" in repr(optimizer)


def test_hooks_and_closures_run(optimizer: tensorkv.DistributedOptimizer, model: nn.Module) -> None:
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))

    @torch.enable_grad()
    def closure() -> torch.Tensor:
        called.append("closure")
        optimizer.zero_grad()
        loss = model(rows(0)).square().mean()
        loss.backward()
        return loss

    with torch.no_grad():
        first = optimizer.step(closure)
    assert first > optimizer.step(closure)
    assert called == ["before", "closure", "after"] * 2


def test_a_learning_rate_in_a_tensor_reaches_the_servers() -> None:
    expected, model = make_model(), make_model()
    alone(torch.optim.SGD(expected.parameters(), lr=0.25), expected, range(2))
    optimizer = tensorkv.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=torch.tensor(9.0)), model
    )
    optimizer.param_groups[0]["lr"].fill_(0.25)
    alone(optimizer, model, range(2))
    assert torch.allclose(weights(model), weights(expected))


def test_a_group_that_is_added_is_trained(model: nn.Module) -> None:
    expected = make_model()
    for each, wrap in ((expected, False), (model, True)):
        first, *rest = each.parameters()
        plain: Any = torch.optim.Adam([first], lr=0.1)
        if wrap:
            plain = tensorkv.DistributedOptimizer(plain, each)
        alone(plain, each, range(2))
        plain.add_param_group({"params": rest, "lr": 0.5})
        alone(plain, each, range(2, 4))
    assert torch.allclose(weights(model), weights(expected), rtol=1e-12)


def test_a_group_of_strangers_is_refused_and_not_added(
    optimizer: tensorkv.DistributedOptimizer, model: nn.Module
) -> None:
    with pytest.raises(InvalidArgument, match=r"parameter 0 of group 1, of shape \(2,\)"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert len(optimizer.param_groups) == 1
    alone(optimizer, model, range(1))


def test_frozen_parameters_are_not_in_the_store_until_they_are_trained() -> None:
    expected, model = make_model(), make_model()
    for each, wrap in ((expected, False), (model, True)):
        each[0].requires_grad_(False)
        plain: Any = torch.optim.Adam(each.parameters(), lr=0.1)
        if wrap:
            plain = tensorkv.DistributedOptimizer(plain, each)
            assert set(plain.store.keys()) == {"2.weight", "2.bias"}
        alone(plain, each, range(2))
        each[0].requires_grad_(True)
        alone(plain, each, range(2, 4))
    assert torch.allclose(weights(model), weights(expected), rtol=1e-12)


def test_a_parameter_without_a_gradient_stays() -> None:
    """Where some workers have one, the mean is over those; where none has, neither weight nor state
    changes."""

    def work(kv: KVStore) -> tuple[dict[str, list[float]], int]:
        model = nn.ParameterDict({name: nn.Parameter(torch.zeros(2)) for name in ("all", "one", "none")})
        optimizer = tensorkv.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.5), model, kind=kv
        )
        for _ in range(3):
            optimizer.zero_grad()
            used = ["all"] if kv.rank else ["all", "one"]
            torch.stack([model[each].sum() for each in used]).sum().backward()
            optimizer.step()
        return {name: each.tolist() for name, each in model.named_parameters()}, kv.info("none").version

    first, second = as_workers(work)
    assert first == second
    # 0 -> -1 -> -1.5 -> -1.75, with half of the weight as its decay
    assert first == ({"all": [-1.75] * 2, "one": [-1.75] * 2, "none": [0.0] * 2}, 0)


def test_sparse_gradients_and_graphs_are_pushed_as_they_count() -> None:
    expected = nn.Embedding(4, 2, sparse=True)
    model = copy.deepcopy(expected)
    for each, wrap in ((expected, False), (model, True)):
        plain: Any = torch.optim.SGD(each.parameters(), lr=0.5)
        if wrap:
            plain = tensorkv.DistributedOptimizer(plain, each)
        each(torch.tensor([1, 1, 3])).sum().backward()
        plain.step()
    assert torch.equal(model.weight, expected.weight)
    linear = nn.Linear(2, 1)
    optimizer = tensorkv.DistributedOptimizer(torch.optim.SGD(linear.parameters(), lr=0.5), linear)
    with warnings.catch_warnings(action="ignore"):  # of a cycle, which ends below
        linear(torch.ones(2)).square().sum().backward(create_graph=True)
    optimizer.step()
    for each in linear.parameters():
        each.grad = None


def test_two_optimizers_have_a_store_each() -> None:
    first, second = make_model(), make_model()
    with (
        tensorkv.DistributedOptimizer(torch.optim.SGD(first.parameters(), lr=1.0), first, name="gan") as one,
        tensorkv.DistributedOptimizer(
            torch.optim.SGD(second.parameters(), lr=1.0), second, name="gan"
        ) as other,
    ):
        assert one.store.name != other.store.name


# ---- the same start ----------------------------------------------------------------------------


def test_all_workers_start_from_rank_0() -> None:
    def work(kv: KVStore) -> list[torch.Tensor]:
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
        model.register_buffer("flags", torch.tensor([kv.rank == 0, False]))
        with torch.no_grad():
            for each in (*model.parameters(), *model.buffers()):
                each.add_(kv.rank) if each.dtype is not torch.bool else None
        model[2].requires_grad_(False)
        trained = [each for each in model.parameters() if each.requires_grad]
        tensorkv.DistributedOptimizer(torch.optim.SGD(trained, lr=0.1), model, kind=kv)
        return [each.detach().clone() for each in (*model.parameters(), *model.buffers())]

    torch.manual_seed(0)
    first, *others = as_workers(work, 3)
    for other in others:
        assert all(map(torch.equal, first, other))


DIFFERENCES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "shape": (lambda: nn.Linear(3, 1), "part 3 is 'weight: 1x3 of torch.float32.*1x2"),
    "dtype": (lambda: nn.Linear(2, 1).double(), "torch.float64"),
    "name": (
        lambda: nn.ParameterDict({"weight": torch.zeros(1, 2), "b": torch.zeros(1)}),
        "group 0: weight, b",
    ),
    "frozen": (lambda: nn.Linear(2, 1).requires_grad_(False), "requires_grad=False"),
    "more": (lambda: nn.Sequential(nn.Linear(2, 1), nn.Linear(2, 1)), "group 0: "),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_models_that_differ_are_one_error_on_every_worker(name: str) -> None:
    make, text = DIFFERENCES[name]

    def work(kv: KVStore) -> str:
        model = make() if kv.rank == 2 else nn.Linear(2, 1)
        with pytest.raises(SettingMismatch, match=f"of worker 2 is not that of rank 0: .*{text}") as caught:
            tensorkv.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, kind=kv)
        return str(caught.value)

    assert len(set(as_workers(work, 3))) == 1


def test_what_cannot_be_an_optimizer_is_refused() -> None:
    model = make_model()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    for arguments, text in (
        ((torch.optim.SGD, model), "pass one of torch.optim that was made"),
        ((inner, [*model.parameters()]), "pass the module"),
        ((inner, make_model()), "is no parameter of the model"),
        ((inner, copy.deepcopy(model).requires_grad_(False)), "is no parameter of the model"),
    ):
        with pytest.raises(InvalidArgument, match=text):
            tensorkv.DistributedOptimizer(*arguments)
    with pytest.raises(UnsupportedOptimizer):
        tensorkv.DistributedOptimizer(torch.optim.LBFGS(model.parameters()), model)
    model.requires_grad_(False)
    with pytest.raises(InvalidArgument, match="nothing to train"):
        tensorkv.DistributedOptimizer(inner, model)
    model.requires_grad_(True)
    with tensorkv.DistributedOptimizer(inner, model) as made, pytest.raises(InvalidArgument, match="already"):
        tensorkv.DistributedOptimizer(made, model)
    with pytest.raises(StoreClosed):
        made.step()


def test_it_is_not_copied(optimizer: tensorkv.DistributedOptimizer) -> None:
    for copier in (copy.deepcopy, pickle.dumps):
        with pytest.raises(NotPicklable, match="state_dict"):
            copier(optimizer)


# ---- weights and checkpoints -------------------------------------------------------------------


def test_weights_that_the_script_changes_are_sent() -> None:
    def work(kv: KVStore) -> torch.Tensor:
        model = make_model()
        optimizer = tensorkv.DistributedOptimizer(
            torch.optim.Adam(model.parameters(), lr=0.1), model, kind=kv
        )
        alone(optimizer, model, range(2), part=part_of(kv))
        model.load_state_dict({name: each * 0.5 for name, each in model.state_dict().items()})
        alone(optimizer, model, range(2, 3), part=part_of(kv))
        with torch.no_grad():
            model[0].bias.clamp_(-0.01, 0.01)
        alone(optimizer, model, range(3, 4), part=part_of(kv))
        return weights(model)

    expected = make_model()
    plain = torch.optim.Adam(expected.parameters(), lr=0.1)
    alone(plain, expected, range(2))
    expected.load_state_dict({name: each * 0.5 for name, each in expected.state_dict().items()})
    alone(plain, expected, range(2, 3))
    with torch.no_grad():
        expected[0].bias.clamp_(-0.01, 0.01)
    alone(plain, expected, range(3, 4))
    for result in as_workers(work):
        assert torch.allclose(result, weights(expected), rtol=1e-10)


def equal(one: Any, other: Any) -> bool:
    """Whether two parts of a checkpoint are the same, dtypes included."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and one == other


def reread(checkpoint: Any) -> Any:
    """Return a checkpoint as it is after a save to a file."""
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("where", ["servers", "workers"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_checkpoint_goes_both_ways(name: str, where: Any) -> None:
    """What one process has saved a job goes on with, and the other way round; each as if nothing had
    happened."""
    expected = make_model()
    plain = OPTIMIZERS[name](groups_of(expected))
    alone(plain, expected, range(3))
    saved = reread({"model": expected.state_dict(), "optimizer": plain.state_dict()})
    plain.load_state_dict(copy.deepcopy(saved["optimizer"]))  # torch gives some entries another dtype there
    kept = copy.deepcopy(plain.state_dict())
    alone(plain, expected, range(3, 6))

    def work(kv: KVStore) -> Any:
        model = make_model()
        inner = OPTIMIZERS[name](groups_of(model))
        optimizer = tensorkv.DistributedOptimizer(inner, model, kind=kv, where=where)
        alone(optimizer, model, range(5), part=part_of(kv))
        mine = copy.deepcopy(saved)  # torch keeps what it loads, and these workers are threads
        model.load_state_dict(mine["model"])
        optimizer.load_state_dict(mine["optimizer"])
        assert kv.rank or equal(optimizer.state_dict(), kept)
        alone(optimizer, model, range(3, 6), part=part_of(kv))
        found = {"model": model.state_dict(), "optimizer": optimizer.state_dict()} if kv.rank == 0 else None
        return weights(model), found

    (first, checkpoint), (second, _) = as_workers(work)
    assert torch.equal(first, second)
    assert torch.allclose(first, weights(expected), rtol=1e-10)
    alone(plain, expected, range(6, 9))
    again = make_model()
    other = OPTIMIZERS[name](groups_of(again))
    loaded = reread(checkpoint)
    again.load_state_dict(loaded["model"])
    other.load_state_dict(loaded["optimizer"])
    alone(other, again, range(6, 9))
    assert torch.allclose(weights(again), weights(expected), rtol=1e-9)


def test_it_saves_what_the_inner_optimizer_would_have(model: nn.Module) -> None:
    expected = make_model()
    plain = torch.optim.AdamW(groups_of(expected), lr=0.1)
    optimizer = tensorkv.DistributedOptimizer(torch.optim.AdamW(groups_of(model), lr=0.1), model)
    assert equal(optimizer.state_dict(), plain.state_dict())
    alone(plain, expected, range(2))
    alone(optimizer, model, range(2))
    found, wanted = optimizer.state_dict(), plain.state_dict()
    assert found["param_groups"] == wanted["param_groups"]
    assert {key: list(each) for key, each in found["state"].items()} == {
        key: list(each) for key, each in wanted["state"].items()
    }
    assert found["state"][0]["step"].dtype == wanted["state"][0]["step"].dtype
    assert optimizer.state[model[0].weight]["step"] == 2


def test_checkpoints_that_differ_are_one_error_on_every_worker() -> None:
    def work(kv: KVStore) -> str:
        model = make_model()
        optimizer = tensorkv.DistributedOptimizer(
            torch.optim.Adam(model.parameters(), lr=0.1), model, kind=kv
        )
        alone(optimizer, model, range(1), part=part_of(kv))
        saved = optimizer.state_dict()
        if kv.rank == 1:
            saved["state"][2]["exp_avg"] = saved["state"][2]["exp_avg"] + 1
        with pytest.raises(
            SettingMismatch, match="the checkpoint of worker 1 .* '2.weight: exp_avg"
        ) as caught:
            optimizer.load_state_dict(saved)
        return str(caught.value)

    assert len(set(as_workers(work))) == 1


@pytest.mark.parametrize("where", ["servers", "workers"])
def test_torchs_distributed_checkpoint_saves_and_loads_it(where: Any) -> None:
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    expected, model = make_model(), make_model()
    plain = torch.optim.Adam(expected.parameters(), lr=0.1)
    inner = torch.optim.Adam(model.parameters(), lr=0.1)
    optimizer = tensorkv.DistributedOptimizer(inner, model, where=where)
    optimizer.zero_grad()
    get_state_dict(model, optimizer)
    assert optimizer.store.info("0.weight").round == 0  # it has made no step
    alone(plain, expected, range(2))
    alone(optimizer, model, range(2))
    values, state = copy.deepcopy(get_state_dict(model, optimizer))  # the values are the model's own
    alone(plain, expected, range(2, 4))
    alone(optimizer, model, range(5))
    set_state_dict(model, optimizer, model_state_dict=values, optim_state_dict=state)
    alone(optimizer, model, range(2, 4))
    assert torch.allclose(weights(model), weights(expected), rtol=1e-12)


def test_a_load_leaves_the_checkpoint_alone(model: nn.Module) -> None:
    optimizer = tensorkv.DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=0.1), model)
    alone(optimizer, model, range(2))
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    alone(optimizer, model, range(2, 4))
    assert equal(saved, before)


# ---- clipping and skipping ---------------------------------------------------------------------


def clipped_alone(max_norm: float, steps: range) -> torch.Tensor:
    """Return the weights of one process that clips the gradients of whole batches."""
    expected = make_model()
    plain = torch.optim.Adam(expected.parameters(), lr=0.1)
    for step in steps:
        plain.zero_grad()
        (100 * expected(rows(step)).square().mean()).backward()
        nn.utils.clip_grad_norm_(expected.parameters(), max_norm)
        plain.step()
    return weights(expected)


@pytest.mark.parametrize("where", ["servers", "workers"])
@pytest.mark.parametrize("way", ["max_norm", "clip_grad_norm_"])
def test_clipping_is_that_of_the_whole_batch(way: str, where: Any) -> None:
    def work(kv: KVStore) -> torch.Tensor:
        model = make_model()
        options = {"max_norm": 0.5} if way == "max_norm" else {}
        inner = torch.optim.Adam(model.parameters(), lr=0.1)
        optimizer = tensorkv.DistributedOptimizer(inner, model, kind=kv, where=where, **options)
        for step in range(6):
            optimizer.zero_grad()
            (100 * model(rows(step)[part_of(kv)]).square().mean()).backward()
            if way == "clip_grad_norm_":
                norm = optimizer.clip_grad_norm_(0.5)
                if where == "servers":
                    assert torch.equal(norm, optimizer.clip_grad_norm_(0.5))  # it may be asked again
            optimizer.step()
            assert optimizer.grad_norm is not None
            assert optimizer.grad_norm > 0.5
        assert kv.info("0.weight").version == 6
        return weights(model)

    first, *others = as_workers(work, 3)
    assert all(torch.equal(first, each) for each in others)
    assert torch.allclose(first, clipped_alone(0.5, range(6)), rtol=1e-9)


@pytest.mark.parametrize("where", ["servers", "workers"])
def test_a_step_that_is_left_out_after_clipping_leaves_nothing_behind(where: Any) -> None:
    def work(kv: KVStore) -> torch.Tensor:
        model = make_model()
        optimizer = tensorkv.DistributedOptimizer(
            torch.optim.Adam(model.parameters(), lr=0.1), model, kind=kv, where=where
        )
        for step in (7, 0, 8, 1):
            optimizer.zero_grad()
            (100 * model(rows(step)[part_of(kv)]).square().mean()).backward()
            optimizer.clip_grad_norm_(0.5)
            if step < 7:
                optimizer.step()
        return weights(model)

    for result in as_workers(work):
        assert torch.allclose(result, clipped_alone(0.5, range(2)), rtol=1e-9)


@pytest.mark.parametrize("where", ["servers", "workers"])
def test_a_step_with_a_nan_is_skipped_by_all(where: Any) -> None:
    def work(kv: KVStore) -> tuple[list[bool], torch.Tensor]:
        model = make_model()
        inner = torch.optim.Adam(model.parameters(), lr=0.1)
        optimizer = tensorkv.DistributedOptimizer(
            inner, model, kind=kv, skip_nonfinite=True, clip="local", where=where
        )
        skipped = []
        for step in (0, 5, 1):
            optimizer.zero_grad()
            model(rows(step)[part_of(kv)]).square().mean().backward()
            if step == 5 and kv.rank == 1:
                model[0].bias.grad[2] = torch.nan
            optimizer.step()
            skipped.append(optimizer.step_was_skipped)
        return skipped, weights(model)

    expected = make_model()
    alone(torch.optim.Adam(expected.parameters(), lr=0.1), expected, range(2))
    for skipped, result in as_workers(work):
        assert skipped == [False, True, False]
        assert torch.allclose(result, weights(expected), rtol=1e-10)


@pytest.mark.parametrize("where", ["servers", "workers"])
@pytest.mark.parametrize("unscaled", [False, True])
def test_a_scaler_skips_and_scales_alike_on_all_workers(unscaled: bool, where: Any) -> None:
    def work(kv: KVStore) -> tuple[list[float], torch.Tensor]:
        model = make_model(torch.float32)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = tensorkv.DistributedOptimizer(inner, model, kind=kv, where=where)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        scales = []
        for step in (0, 5, 1, 2):
            optimizer.zero_grad()
            scaler.scale(model(rows(step, torch.float32)[part_of(kv)]).square().mean()).backward()
            if step == 5 and kv.rank == 1:
                model[0].bias.grad[2] = torch.inf
            if unscaled:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            assert optimizer.step_was_skipped == (step == 5)
            scaler.update()
            scales.append(scaler.get_scale())
        return scales, weights(model)

    expected = make_model(torch.float32)
    alone(torch.optim.SGD(expected.parameters(), lr=0.1), expected, range(3))
    for scales, result in as_workers(work):
        assert scales == [1024.0, 512.0, 512.0, 1024.0]
        assert torch.allclose(result, weights(expected), rtol=1e-4, atol=1e-6)


def test_without_rounds_a_scaler_skips_its_own_worker_only() -> None:
    def work(kv: KVStore) -> int:
        model = make_model(torch.float32)
        optimizer = tensorkv.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, kind=kv)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(model(rows(0, torch.float32)).square().mean()).backward()
        if kv.rank == 1:
            model[0].bias.grad[2] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        kv.barrier()
        assert optimizer.step_was_skipped == (kv.rank == 1)
        for ask in (lambda: optimizer.clip_grad_norm_(1.0), lambda: wrap(model, kv)):
            with pytest.raises(NotSupported, match="dist_async"):
                ask()
        return kv.info("0.weight").version

    def wrap(model: nn.Module, kv: KVStore) -> None:
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        tensorkv.DistributedOptimizer(inner, model, kind=kv, max_norm=1.0)

    assert as_workers(work, kind="dist_async") == [1, 1]


@pytest.mark.parametrize("way", ["local", "other", "said"])
def test_clipping_of_ones_own_gradients_is_said_once(way: str) -> None:
    def work(kv: KVStore) -> list[str]:
        model = make_model()
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        clip = "local" if way == "local" else None
        optimizer = tensorkv.DistributedOptimizer(inner, model, kind=kv, clip=clip)
        for step in range(5):
            optimizer.zero_grad()
            for _ in range(2):  # accumulated
                (50 * model(rows(step)[part_of(kv)]).square().mean()).backward()
            if way != "other":
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        return []

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        as_workers(work)
    texts = [str(each.message) for each in caught if "is not to clip" in str(each.message)]
    assert len(texts) == (2 if way == "said" else 0)  # one by each worker, which are threads here


# ---- the update on the workers -----------------------------------------------------------------


def test_lbfgs_searches_along_one_line_on_all_workers() -> None:
    def closure_of(
        model: nn.Module, optimizer: torch.optim.Optimizer, part: slice
    ) -> Callable[[], torch.Tensor]:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss: torch.Tensor = (model(rows(0)[part]) - 1).square().mean()
            loss.backward()
            return loss

        return closure

    expected = make_model()
    plain = torch.optim.LBFGS(expected.parameters(), lr=0.5, max_iter=4, line_search_fn="strong_wolfe")
    losses = [plain.step(closure_of(expected, plain, slice(None))).item() for _ in range(3)]

    def work(kv: KVStore) -> tuple[list[float], torch.Tensor]:
        model = make_model()
        inner = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4, line_search_fn="strong_wolfe")
        optimizer = tensorkv.DistributedOptimizer(inner, model, kind=kv, where="workers")
        found = [optimizer.step(closure_of(model, optimizer, part_of(kv))).item() for _ in range(3)]
        return found, weights(model)

    (first, values), (second, others) = as_workers(work)
    assert first == second
    assert torch.equal(values, others)
    assert first == pytest.approx(losses, rel=1e-9)
    assert torch.allclose(values, weights(expected), rtol=1e-7, atol=1e-9)


def test_means_may_be_looked_at_and_changed_before_the_step() -> None:
    def work(kv: KVStore) -> torch.Tensor:
        model = make_model()
        inner = torch.optim.SGD(model.parameters(), lr=0.5)
        optimizer = tensorkv.DistributedOptimizer(inner, model, kind=kv, where="workers")
        for step in range(3):
            optimizer.zero_grad(set_to_none=step == 1)
            model(rows(step)[part_of(kv)]).square().mean().backward()
            optimizer.allreduce_grads()
            optimizer.allreduce_grads()  # they are means already
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
        assert kv.info("0.weight").round == 3
        return weights(model)

    expected = make_model()
    plain = torch.optim.SGD(expected.parameters(), lr=0.5)
    for step in range(3):
        plain.zero_grad()
        expected(rows(step)).square().mean().backward()
        nn.utils.clip_grad_norm_(expected.parameters(), 0.01)
        plain.step()
    for result in as_workers(work):
        assert torch.allclose(result, weights(expected), rtol=1e-10)


def test_on_workers_a_parameter_that_some_use_gets_their_mean_and_one_that_none_uses_stays() -> None:
    def work(kv: KVStore) -> list[Any]:
        model = nn.ParameterDict({name: nn.Parameter(torch.zeros(2)) for name in ("all", "one", "none")})
        model["late"] = nn.Parameter(torch.zeros(1), requires_grad=False)
        inner = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.5)
        optimizer = tensorkv.DistributedOptimizer(inner, model, kind=kv, where="workers")
        for step in range(3):
            model["late"].requires_grad_(step == 2)
            optimizer.zero_grad()
            used = ["all", "late"][: 1 + (step == 2)] + ["one"] * (kv.rank == 0)
            torch.stack([model[each].sum() for each in used]).sum().backward()
            optimizer.step()
        assert model["none"].grad is None
        return [model[name].tolist() for name in ("all", "one", "none", "late")]

    for found in as_workers(work):
        assert found == [[-1.75] * 2, [-1.75] * 2, [0.0] * 2, [-1.0]]


@pytest.mark.parametrize("short", [False, True])
def test_the_last_backward_of_a_step_takes_the_mean(short: bool) -> None:
    """So a framework that clips before the step clips the mean. A group that is short is reduced by
    `step`."""

    def passes(model: nn.Module, step: int, part: slice) -> None:
        for number in range(1 if short and step == 2 else 2):
            model(rows(10 * step + number)[part]).square().mean().backward()

    def work(kv: KVStore) -> torch.Tensor:
        model = make_model()
        inner = torch.optim.SGD(model.parameters(), lr=0.5)
        optimizer = tensorkv.DistributedOptimizer(inner, model, kind=kv, where="workers", accumulate=2)
        for step in range(4):
            optimizer.zero_grad()
            passes(model, step, part_of(kv))
            if not (short and step == 2):
                nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
        assert kv.info("0.weight").round == 4
        return weights(model)

    expected = make_model()
    plain = torch.optim.SGD(expected.parameters(), lr=0.5)
    for step in range(4):
        plain.zero_grad()
        passes(expected, step, slice(None))
        if not (short and step == 2):
            nn.utils.clip_grad_norm_(expected.parameters(), 0.01)
        plain.step()
    for result in as_workers(work):
        assert torch.allclose(result, weights(expected), rtol=1e-9)


def test_where_is_checked() -> None:
    model = make_model()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InvalidArgument, match="where='gpu'"):
        tensorkv.DistributedOptimizer(inner, model, where="gpu")  # type: ignore[arg-type]
    for options in (
        {"accumulate": 2},
        {"accumulate": 0, "where": "workers"},
        {"accumulate": True, "where": "workers"},
    ):
        with pytest.raises(InvalidArgument, match="accumulate="):
            tensorkv.DistributedOptimizer(inner, model, **options)
    with (
        tensorkv.create("dist_async", embedded=True) as kv,
        pytest.raises(NotSupported, match="where='workers'"),
    ):
        tensorkv.DistributedOptimizer(inner, model, kind=kv, where="workers")
    with (
        tensorkv.DistributedOptimizer(inner, model) as optimizer,
        pytest.raises(NotSupported, match="where="),
    ):
        optimizer.allreduce_grads()


def test_workers_with_the_same_data_are_told_once() -> None:
    def work(kv: KVStore) -> None:
        model = make_model()
        optimizer = tensorkv.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, kind=kv)
        alone(optimizer, model, range(3))

    with pytest.warns(UserWarning, match="workers 0, 1 have pushed the very same gradients") as caught:
        as_workers(work)
    assert len(caught) == 1


@pytest.mark.parametrize(
    "options", [{"kind": "dist_async"}, {"kind": "dist_async", "staleness": 1}, {"quorum": 1}]
)
def test_without_common_rounds_it_trains_saves_and_loads(options: dict[str, Any]) -> None:
    def work(kv: KVStore) -> float:
        model = make_model()
        inner = torch.optim.Adam(model.parameters(), lr=0.01)  # slow enough for any order of steps
        with tensorkv.DistributedOptimizer(inner, model, kind=kv) as optimizer:
            first = model(rows(0)).square().mean().item()
            alone(optimizer, model, range(20), part=part_of(kv))
            saved = optimizer.state_dict()  # by each alone, while others go on
            assert saved["state"].keys() == {0, 1, 2, 3}
            assert saved["state"][0]["exp_avg"].shape == model[0].weight.shape
            kv.barrier()
            optimizer.load_state_dict(saved if kv.num_workers == 1 else alone_state())
            alone(optimizer, model, range(20, 30), part=part_of(kv))
            assert optimizer.state[model[0].weight]["step"] > 3
            return model(rows(0)).square().mean().item() / first

    def alone_state() -> dict[str, Any]:
        expected = make_model()
        plain = torch.optim.Adam(expected.parameters(), lr=0.01)
        alone(plain, expected, range(3))
        return plain.state_dict()

    for ratio in as_workers(work, **options):
        assert ratio < 0.5


# ---- what scripts do between steps -------------------------------------------------------------


@pytest.mark.parametrize("where", ["servers", "workers"])
def test_a_group_that_is_added_after_a_change_of_the_rate_keeps_all_state(where: Any) -> None:
    """As when an epoch has ended and a layer is unfrozen."""

    def train(model: nn.Module, wrap: Callable[[Any], Any], part: slice) -> torch.Tensor:
        optimizer = wrap(torch.optim.Adam(model[0].parameters(), lr=0.01))
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        for step in range(3):
            alone(optimizer, model, range(step, step + 1), part=part)
            schedule.step()
        optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.1})
        alone(optimizer, model, range(3, 5), part=part)
        assert optimizer.state[model[0].weight]["step"] == 5
        return weights(model)

    def work(kv: KVStore) -> torch.Tensor:
        model = make_model()
        return train(
            model,
            lambda inner: tensorkv.DistributedOptimizer(inner, model, kind=kv, where=where),
            part_of(kv),
        )

    expected = train(make_model(), lambda inner: inner, slice(None))
    for result in as_workers(work):
        assert torch.allclose(result, expected, rtol=1e-10)


@pytest.mark.parametrize("where", ["servers", "workers"])
def test_a_layer_that_the_model_gets_later_is_trained(where: Any) -> None:
    def work(kv: KVStore) -> torch.Tensor:
        model = make_model()
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = tensorkv.DistributedOptimizer(inner, model, kind=kv, where=where)
        model.append(nn.Linear(3, 2).double())
        with torch.no_grad():
            for each in model[3].parameters():
                each.fill_(0.5)
        optimizer.add_param_group({"params": model[3].parameters(), "lr": 0.2})
        alone(optimizer, model, range(2), part=part_of(kv))
        return weights(model)

    first, second = as_workers(work)
    assert torch.equal(first, second)
    assert not (first[-2:] == 0.5).any()


def test_options_that_differ_are_refused_at_the_start_and_on_workers_in_each_step() -> None:
    def work(kv: KVStore) -> None:
        model = make_model()
        for where in ("servers", "workers"):
            inner = torch.optim.SGD(model.parameters(), lr=0.1 * (1 + kv.rank))
            with pytest.raises(SettingMismatch, match=r"options of group 0: \{'lr': 0.2"):
                tensorkv.DistributedOptimizer(inner, model, kind=kv, where=where)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = tensorkv.DistributedOptimizer(inner, model, kind=kv, where="workers")
        alone(optimizer, model, range(2), part=part_of(kv))
        if kv.rank == 1:
            optimizer.param_groups[0]["lr"] = 0.3
        with pytest.raises(SettingMismatch, match="options of the workers' optimizers differ"):
            alone(optimizer, model, range(2, 3), part=part_of(kv))
        optimizer.param_groups[0]["lr"] = 0.3
        alone(optimizer, model, range(3, 4), part=part_of(kv))

    as_workers(work)


def test_on_workers_weights_that_rank_0_changes_are_those_of_all() -> None:
    def work(kv: KVStore) -> torch.Tensor:
        model = make_model()
        inner = torch.optim.Adam(model.parameters(), lr=0.1)
        optimizer = tensorkv.DistributedOptimizer(inner, model, kind=kv, where="workers")
        for step in range(4):
            if step == 2 and kv.rank == 0:
                with torch.no_grad():
                    model[0].weight.mul_(0.5)
            alone(optimizer, model, range(step, step + 1), part=part_of(kv))
        return weights(model)

    first, *others = as_workers(work, 3)
    assert all(torch.equal(first, each) for each in others)


def test_on_workers_state_that_only_one_has_is_refused() -> None:
    def work(kv: KVStore) -> None:
        model = make_model()
        inner = torch.optim.Adam(model.parameters(), lr=0.1)
        if kv.rank == 0:
            alone(inner, model, range(1))
        with pytest.raises(
            SettingMismatch, match="the state of the optimizer of worker 1 is not that of rank 0"
        ):
            tensorkv.DistributedOptimizer(inner, model, kind=kv, where="workers")

    as_workers(work)


def test_on_workers_a_closure_with_a_nan_is_skipped() -> None:
    def work(kv: KVStore) -> tuple[list[bool], torch.Tensor]:
        model = make_model()
        inner = torch.optim.Adam(model.parameters(), lr=0.1)
        optimizer = tensorkv.DistributedOptimizer(inner, model, kind=kv, where="workers", skip_nonfinite=True)
        skipped = []
        for step in (0, 5, 1):

            def closure(step: int = step) -> torch.Tensor:
                optimizer.zero_grad()
                loss: torch.Tensor = model(rows(step)[part_of(kv)]).square().mean()
                (loss * (torch.nan if step == 5 and kv.rank else 1)).backward()
                return loss

            optimizer.step(closure)
            skipped.append(optimizer.step_was_skipped)
        return skipped, weights(model)

    expected = make_model()
    alone(torch.optim.Adam(expected.parameters(), lr=0.1), expected, range(2))
    for skipped, result in as_workers(work):
        assert skipped == [False, True, False]
        assert torch.allclose(result, weights(expected), rtol=1e-10)


@pytest.mark.parametrize("where", ["servers", "workers"])
def test_hooks_and_schedules_made_before_the_wrap_count(model: nn.Module, where: Any) -> None:
    inner = torch.optim.Adam(model.parameters(), lr=0.1)
    called: list[str] = []
    handle = inner.register_step_pre_hook(lambda *_: called.append("before"))
    inner.register_step_post_hook(lambda *_: called.append("after"))
    inner.register_state_dict_post_hook(lambda *_: called.append("state"))
    schedule = torch.optim.lr_scheduler.StepLR(inner, 1)
    with tensorkv.DistributedOptimizer(inner, model, where=where) as optimizer:
        alone(optimizer, model, range(1))
        schedule.step()  # torch warns, which is an error here, if it thinks that no step came before
        optimizer.state_dict()
        handle.remove()
        alone(optimizer, model, range(1))
    assert called == ["before", "after", "state", "after"]


def test_a_rate_that_changes_between_clipping_and_step_is_that_of_the_step() -> None:
    def work(kv: KVStore) -> torch.Tensor:
        model = make_model()
        inner = torch.optim.SGD(model.parameters(), lr=9.0)
        optimizer = tensorkv.DistributedOptimizer(inner, model, kind=kv)
        model(rows(0)[part_of(kv)]).square().mean().backward()
        optimizer.clip_grad_norm_(1e9)
        optimizer.param_groups[0]["lr"] = 0.1
        optimizer.step()
        return weights(model)

    expected = make_model()
    alone(torch.optim.SGD(expected.parameters(), lr=0.1), expected, range(1))
    for result in as_workers(work):
        assert torch.allclose(result, weights(expected), rtol=1e-10)


def test_on_workers_gradients_that_are_assigned_after_a_mean_are_averaged() -> None:
    def work(kv: KVStore) -> torch.Tensor:
        model = make_model()
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = tensorkv.DistributedOptimizer(inner, model, kind=kv, where="workers")
        alone(optimizer, model, range(1), part=part_of(kv))
        optimizer.allreduce_grads()
        loss = model(rows(1)[part_of(kv)]).square().mean()
        parameters = list(model.parameters())
        for parameter, found in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = found  # no hook of backward runs
        optimizer.step()
        return weights(model)

    first, second = as_workers(work)
    assert torch.equal(first, second)


@pytest.mark.parametrize("where", ["servers", "workers"])
def test_a_load_gives_all_what_rank_0_has_frozen_parameters_too(where: Any) -> None:
    def work(kv: KVStore) -> torch.Tensor:
        model = make_model()
        model[0].requires_grad_(False)
        trained = model[2].parameters()
        optimizer = tensorkv.DistributedOptimizer(
            torch.optim.Adam(trained, lr=0.1), model, kind=kv, where=where
        )
        alone(optimizer, model, range(2), part=part_of(kv))
        saved = optimizer.state_dict()
        if kv.rank == 0:
            model.load_state_dict({name: each + 1 for name, each in model.state_dict().items()})
        kv.barrier()
        optimizer.load_state_dict(saved)
        return weights(model)

    first, second = as_workers(work)
    assert torch.equal(first, second)


def test_state_on_servers_is_not_removed(optimizer: tensorkv.DistributedOptimizer, model: nn.Module) -> None:
    alone(optimizer, model, range(1))

    def replace() -> None:
        optimizer.state = {}

    for call in (optimizer.state.clear, replace, lambda: optimizer.state.pop(model[0].weight)):
        with pytest.raises(NotSupported, match="on the servers"):
            call()
    optimizer.state[model[0].weight] = {}  # as frameworks do that move it to a device
    assert optimizer.state[model[0].weight]["step"] == 1
    optimizer.param_groups.append({"params": [], **optimizer.defaults})
    with pytest.raises(InvalidArgument, match="add_param_group"):
        optimizer.step()


@pytest.mark.parametrize("where", ["servers", "workers"])
def test_after_rank_0_has_left_others_load_and_add_groups(where: Any) -> None:
    def work(kv: KVStore) -> torch.Tensor | None:
        model = make_model()
        inner = torch.optim.Adam(model[0].parameters(), lr=0.1)
        optimizer = tensorkv.DistributedOptimizer(inner, model, kind=kv, where=where)
        alone(optimizer, model, range(2), part=part_of(kv))
        saved = optimizer.state_dict()
        if kv.rank == 0:
            optimizer.close()
            return None
        optimizer.load_state_dict(saved)
        optimizer.add_param_group({"params": list(model[2].parameters())})
        alone(optimizer, model, range(2, 4), part=part_of(kv))
        return weights(model)

    _, second, third = as_workers(work, 3)
    assert torch.equal(second, third)


def test_an_optimizer_that_is_closed_and_dropped_is_freed() -> None:
    def work(kv: KVStore) -> bool:
        for where in ("servers", "workers"):
            model = make_model()
            reference = weakref.ref(model[0].weight)
            store = kv._open_beside(f"of {where}", "dist_sync", "mean")
            inner = torch.optim.SGD(model.parameters(), lr=0.1)
            optimizer = tensorkv.DistributedOptimizer(inner, model, kind=store, where=where)
            alone(optimizer, model, range(1), part=part_of(kv))
            optimizer.close()
            del optimizer, inner, model
            gc.collect()
            if reference() is not None:
                return False
        return True

    assert as_workers(work) == [True, True]
