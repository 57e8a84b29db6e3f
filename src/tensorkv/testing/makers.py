"""How the conformance suite opens a store of each kind that comes with TensorKV."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tensorkv
from tensorkv.store import KVStore

HAS_CLUSTER = importlib.util.find_spec("tensorkv.testing.cluster") is not None


@dataclass(frozen=True)
class InProcess:
    """`local` and `device`: one worker, and the store in its process."""

    kind: str
    max_workers: int = 1
    distributed: bool = False
    is_async: bool = False

    def run(self, fn: Callable[[KVStore], Any], num_workers: int = 1, **create_options: Any) -> list[Any]:
        assert num_workers == 1
        with tensorkv.create(self.kind, **create_options) as kv:
            return [fn(kv)]


@dataclass(frozen=True)
class Embedded:
    """A distributed store with its scheduler and servers in this process, for one worker."""

    kind: str
    num_servers: int = 2
    max_workers: int = 1
    distributed: bool = True

    @property
    def is_async(self) -> bool:
        return self.kind == "dist_async"

    def run(self, fn: Callable[[KVStore], Any], num_workers: int = 1, **create_options: Any) -> list[Any]:
        assert num_workers == 1
        options = {"embedded": True, "num_servers": self.num_servers, **create_options}
        with tensorkv.create(self.kind, **options) as kv:
            return [fn(kv)]


@dataclass(frozen=True)
class WholeJob:
    """A job in this process, each worker a thread."""

    kind: str
    num_servers: int = 2
    max_workers: int = 3
    distributed: bool = True

    @property
    def is_async(self) -> bool:
        return self.kind == "dist_async"

    def run(self, fn: Callable[[KVStore], Any], num_workers: int = 1, **create_options: Any) -> list[Any]:
        from tensorkv.testing.cluster import run_job

        return run_job(
            fn, num_workers=num_workers, num_servers=self.num_servers, kind=self.kind, **create_options
        )


LOCAL = [InProcess("local"), InProcess("device")]
JOBS = [WholeJob("dist_sync"), WholeJob("dist_async")]
EMBEDDED = [Embedded("dist_sync")]
