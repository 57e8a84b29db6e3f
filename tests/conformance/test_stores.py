"""Every kind of store passes the conformance suite and refuses every bad input."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import tensorkv
from tensorkv import errors
from tensorkv.store import KVStore
from tensorkv.testing import (
    bad_inputs,
    checks_agreement,
    checks_alone,
    checks_calls,
    checks_numbers,
    checks_policies,
    checks_rounds,
    checks_state,
    checks_updaters,
    checks_values,
)
from tensorkv.testing.conformance import BAD_INPUTS, CHECKS, BadInput, Case, StoreMaker, applicable
from tensorkv.testing.makers import EMBEDDED, JOBS, LOCAL, ON_SHM, ON_TCP
from tensorkv.testing.suite import full, in_one, same

MODULES = (
    bad_inputs,
    checks_agreement,
    checks_alone,
    checks_calls,
    checks_numbers,
    checks_policies,
    checks_rounds,
    checks_state,
    checks_updaters,
    checks_values,
)


def _named(maker: Any) -> str:
    return f"{maker.kind}-{type(maker).__name__}"


def _params(of: Any) -> list[Any]:
    """One parameter set per maker and line of its table."""
    return [
        pytest.param(maker, line, id=f"{_named(maker)}-{line.name}")
        for maker in [*LOCAL, *EMBEDDED, *JOBS]
        for line in of(maker)
    ]


def _on_sockets(of: Any) -> list[Any]:
    return [
        pytest.param(maker, line, id=f"{maker.kind}-{maker.transport}-{line.name}")
        for maker in [*ON_SHM, *ON_TCP]
        for line in of(maker)
    ]


@pytest.fixture
def all_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small payloads, too, stay in shared memory: the suite has no others."""
    monkeypatch.setattr("tensorkv.wire.messages.PLACED_BYTES", 1)


@pytest.mark.parametrize(("maker", "case"), _params(applicable))
def test_conformance(maker: StoreMaker, case: Case) -> None:
    case.run(maker)


@pytest.mark.parametrize(("maker", "bad"), _params(lambda maker: BAD_INPUTS))
def test_bad_input(maker: StoreMaker, bad: BadInput) -> None:
    bad.run(maker)


@pytest.mark.slow
@pytest.mark.usefixtures("all_in_place")
@pytest.mark.parametrize(("maker", "case"), _on_sockets(applicable))
def test_conformance_on_sockets(maker: StoreMaker, case: Case) -> None:
    case.run(maker)


@pytest.mark.slow
@pytest.mark.usefixtures("all_in_place")
@pytest.mark.parametrize(("maker", "bad"), _on_sockets(lambda maker: BAD_INPUTS))
def test_bad_input_on_sockets(maker: StoreMaker, bad: BadInput) -> None:
    bad.run(maker)


@pytest.mark.parametrize("maker", [*LOCAL, *EMBEDDED, *JOBS, *ON_SHM], ids=_named)
def test_calls_in_inference_mode(maker: StoreMaker) -> None:
    """Tensors made in inference mode can be pushed there, and pulled into; the store is not part of it."""

    def work(kv: KVStore) -> None:
        with torch.inference_mode():
            kv.init({"w": full(1), "b": full(1, 3)})
            kv.push("w", full(2))
            wide = torch.zeros(3, 2).t()
            for out in (full(0), wide, wide.double()):
                same(kv.pull("w", out).float(), 2.0)
                assert out.is_inference()
            kv.push("w", full(3))
            same(kv.pull("w", full(0), async_op=True).result(), 3.0)
            same(kv.pushpull("w", full(4), full(0)), 4.0)
        kv.push("w", full(5))
        same(kv.pull("w"), 5.0)

    in_one(maker, work)


def test_every_check_is_in_the_table() -> None:
    written = {
        function
        for module in MODULES
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if name.startswith("check_") and function.__module__ == module.__name__
    }
    assert {check.function for check in CHECKS} == written
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    assert len({bad.name for bad in BAD_INPUTS}) == len(BAD_INPUTS)
    for check in CHECKS:
        assert check.function.__doc__, check.name


@pytest.mark.parametrize("kind", ["Local", "dist_sync_", "nccl", "", None, 3])
def test_unknown_kind_lists_the_known(kind: Any) -> None:
    with pytest.raises(errors.UnknownKind, match="'dist_sync'.*'local'") as raised:
        tensorkv.create(kind)
    assert repr(kind) in str(raised.value)
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize("kind", ["local_update_cpu", "local_allreduce_cpu", "local_allreduce_device"])
def test_other_names_of_local_kinds(kind: str) -> None:
    with tensorkv.create(kind) as kv:
        kv.init("w", torch.ones(2))
        assert kv.kind == kind
        assert kv.pull("w").tolist() == [1.0, 1.0]
