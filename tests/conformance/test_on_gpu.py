"""The conformance suite with tensors on a GPU: its checks run with that as torch's default device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tensorkv.store import KVStore
from tensorkv.testing.conformance import Case, StoreMaker, applicable
from tensorkv.testing.makers import EMBEDDED, JOBS, LOCAL

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@dataclass(frozen=True)
class OnGpu:
    """Opens the stores of another maker for workers whose tensors are on a GPU."""

    maker: StoreMaker

    @property
    def kind(self) -> str:
        return self.maker.kind

    @property
    def max_workers(self) -> int:
        return self.maker.max_workers

    @property
    def distributed(self) -> bool:
        return self.maker.distributed

    @property
    def is_async(self) -> bool:
        return self.maker.is_async

    @property
    def other_kind(self) -> str:
        return self.maker.other_kind

    def open(self, kv: KVStore, kind: str, store: str, **create_options: Any) -> KVStore:
        return self.maker.open(kv, kind, store, **create_options)

    def run(self, fn: Callable[[KVStore], Any], num_workers: int = 1, **create_options: Any) -> list[Any]:
        def work(kv: KVStore) -> Any:
            with torch.device("cuda"):
                return fn(kv)

        return self.maker.run(work, num_workers, **create_options)


UNFIT = {
    "use_in_a_forked_child",  # which can make no tensor on a GPU
    "muon_for_matrices",  # it computes in bfloat16, and a GPU rounds in its own way
}
CASES = [
    pytest.param(OnGpu(maker), case, id=f"{maker.kind}-{type(maker).__name__}-{case.name}")
    for maker in [*LOCAL, *EMBEDDED, *JOBS]
    for case in applicable(maker)
    if case.name not in UNFIT
]


@pytest.mark.parametrize(("maker", "case"), CASES)
def test_conformance(maker: StoreMaker, case: Case) -> None:
    case.run(maker)
