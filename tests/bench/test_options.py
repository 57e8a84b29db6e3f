"""The options, checked before anything is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tensorkv.bench.options import BadOption, BenchOptions, make_options

DEFAULTS: dict[str, Any] = {
    "models": [],
    "sizes": None,
    "kind": "dist_sync",
    "transports": [],
    "num_workers": 2,
    "num_servers": 2,
    "optimizer": "assign",
    "dtype": "float32",
    "steps": 0,
    "seconds": 2.0,
    "with_floor": True,
    "json": None,
    "plot": None,
}


def make(**changed: Any) -> BenchOptions:
    return make_options(**{**DEFAULTS, **changed})


def test_nothing_given_is_resnet50_over_both_transports() -> None:
    found = make()
    assert [plan.tensors for plan in found.plans] == ["resnet50"]
    assert (found.transports, found.is_dist) == (("shm", "tcp"), True)


def test_models_and_sizes_together() -> None:
    found = make(
        models=["gpt2", "one", "gpt2"], sizes="1KB..4KB", optimizer="Adam", dtype="bfloat16", json="a"
    )
    assert [plan.tensors for plan in found.plans] == ["gpt2", "one", "1KB", "4KB"]
    assert {(plan.updater, plan.dtype) for plan in found.plans} == {("Adam", "bfloat16")}
    assert found.json_path == Path("a")


def test_a_store_in_one_process_has_one_worker_and_no_transport() -> None:
    found = make(kind="local", num_workers=4, transports=["tcp"])
    assert (found.num_workers, found.transports, found.is_dist) == (1, ("local",), False)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"models": ["resnet"]}, "--model 'resnet' is not known; use resnet50, "),
        ({"sizes": "4QB"}, "--sizes '4QB' is no size"),
        ({"kind": "dist"}, "--store 'dist' is not known; use dist_sync, dist_async, local"),
        ({"transports": ["rdma"]}, "--transport 'rdma' is not known; use shm, tcp"),
        ({"num_workers": 0}, "--workers 0: at least 1"),
        ({"num_servers": -1}, "--servers -1: at least 1"),
        ({"steps": -1}, "--steps -1: at least 0"),
        ({"seconds": 0.0}, "--seconds 0.0"),
        ({"seconds": float("nan")}, "--seconds nan"),
        ({"optimizer": "lbfgs"}, "--optimizer: LBFGS cannot run in a store"),
        (
            {"optimizer": "muon"},
            "--optimizer: optimizer 'muon' is not measured; use assign, or one of adadelta",
        ),
        ({"dtype": "int8"}, "--dtype 'int8' is not known; use float32"),
    ],
)
def test_what_has_no_meaning_is_refused(changed: dict[str, Any], text: str) -> None:
    with pytest.raises(BadOption, match=text):
        make(**changed)
