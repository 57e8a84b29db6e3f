"""A script that has set torch's default device uses a store like any other.

The device here is "meta", whose tensors have no memory: what the store took from the default by mistake fails
at once, on any machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tensorkv.keys import ABSENT
from tensorkv.store import KVStore
from tensorkv.testing.conformance import StoreMaker
from tensorkv.testing.makers import EMBEDDED, JOBS, LOCAL

CPU = torch.device("cpu")
LARGE = 300_000
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")

MAKERS = pytest.mark.parametrize(
    "maker", [*LOCAL, *EMBEDDED, *JOBS], ids=lambda maker: f"{maker.kind}-{type(maker).__name__}"
)


def full(value: float, *shape: int) -> torch.Tensor:
    return torch.full(shape or (4,), float(value), device=CPU)


def seen(value: Any) -> Any:
    """Return what a tensor is full of."""
    assert value.is_cpu
    first = value.flatten()[0]
    assert (value == first).all()
    return first.item()


@MAKERS
def test_values(maker: StoreMaker) -> None:
    def work(kv: KVStore) -> None:
        with torch.device("meta"):
            kv.init({"a": full(1), "b": full(2, 3, 2), "big": full(3, LARGE)})
            kv.init("n", np.ones(4, dtype=np.float32))
            assert [seen(each) for each in kv.pull(["a", "b", "big", "n"])] == [1, 2, 3, 1]
            wide = full(0, 2, 3).t()
            assert [seen(each) for each in kv.pull(["a", "b"], out=[[full(0), full(0)], wide])[0]] == [1, 1]
            assert seen(wide) == 2
            kv.push(["a", "big"], [[full(1), full(4)], full(6, LARGE)])
            if not maker.is_async:
                kv.push("b", ABSENT)
                kv.commit()
            assert [seen(each) for each in kv.pull(["a", "big"], [full(0), full(0, LARGE)])] == [5, 6]
            assert seen(kv.pushpull("a", full(7).half(), full(0).double())) == 7
            kv.put("a", full(8))
            kv.delete("n")
            assert seen(kv.pull("a")) == 8

    maker.run(work)


@MAKERS
@pytest.mark.parametrize("name", ["sgd", "adam", "adagrad", pytest.param("muon", marks=needs_muon)])
def test_state(maker: StoreMaker, name: str, tmp_path: Path) -> None:
    def work(kv: KVStore) -> None:
        kv.init("w", full(1, 4, 2))
        kv.set_optimizer(name, lr=0.5)

        def steps() -> torch.Tensor:
            for _ in range(3):
                kv.push("w", full(1, 4, 2))
            pulled = kv.pull("w")
            assert isinstance(pulled, torch.Tensor)
            return pulled

        with torch.device("meta"):
            steps()
            state = kv.state_dict()
            kv.save(tmp_path)
            expected = steps()
            assert expected.is_cpu
            kv.load_state_dict(state)
            torch.testing.assert_close(steps(), expected)
            kv.load(tmp_path)
            torch.testing.assert_close(steps(), expected)

    maker.run(work)
