"""The conformance suite's makers of TensorKV's own kinds of store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tensorkv.config import DEFAULT_TIMEOUT_S, Transport
from tensorkv.store import KVStore
from tensorkv.stores.dist import DistStore
from tensorkv.stores.registry import create
from tensorkv.testing.cluster import run_job


@dataclass(frozen=True)
class InProcess:
    """`local` and `device`: one worker, with the store in its process."""

    kind: str
    max_workers: int = 1
    distributed: bool = False
    is_async: bool = False
    has_policies: bool = False

    @property
    def other_kind(self) -> str:
        return "device" if self.kind == "local" else "local"

    def open(self, kv: KVStore, kind: str, store: str, **create_options: Any) -> KVStore:
        return create(kind, store=store, **create_options)

    def run(self, fn: Callable[[KVStore], Any], num_workers: int = 1, **create_options: Any) -> list[Any]:
        assert num_workers == 1
        with create(self.kind, **create_options) as kv:
            return [fn(kv)]


@dataclass(frozen=True)
class _OnServers:
    """Base of the distributed kinds."""

    kind: str
    num_servers: int = 2
    max_workers: int = 1
    distributed: bool = True
    has_policies: bool = True

    @property
    def is_async(self) -> bool:
        return self.kind == "dist_async"

    @property
    def other_kind(self) -> str:
        return "dist_sync" if self.is_async else "dist_async"

    def open(self, kv: KVStore, kind: str, store: str, **create_options: Any) -> KVStore:
        assert isinstance(kv, DistStore)
        options = {"reduction": "sum", "timeout_s": DEFAULT_TIMEOUT_S, **create_options}
        return DistStore(kind, kv._job, store=store, **options)


@dataclass(frozen=True)
class Embedded(_OnServers):
    """A distributed store with its scheduler and servers in this process, for one worker."""

    def run(self, fn: Callable[[KVStore], Any], num_workers: int = 1, **create_options: Any) -> list[Any]:
        assert num_workers == 1
        options = {"embedded": True, "num_servers": self.num_servers, **create_options}
        with create(self.kind, **options) as kv:
            return [fn(kv)]


@dataclass(frozen=True)
class WholeJob(_OnServers):
    """A job in this process, each worker a thread; with `host` "127.0.0.1" they use real sockets.

    `transport` then selects the transport.
    """

    max_workers: int = 3
    host: str = "inproc"
    transport: Transport = "auto"

    def run(self, fn: Callable[[KVStore], Any], num_workers: int = 1, **create_options: Any) -> list[Any]:
        options = {
            "num_servers": self.num_servers,
            "kind": self.kind,
            "host": self.host,
            "transport": self.transport,
            **create_options,
        }
        return run_job(fn, num_workers=num_workers, **options)


LOCAL = [InProcess("local"), InProcess("device")]
JOBS = [WholeJob("dist_sync"), WholeJob("dist_async")]
ON_SHM = [WholeJob(kind, host="127.0.0.1", transport="shm") for kind in ("dist_sync", "dist_async")]
ON_TCP = [WholeJob(kind, host="127.0.0.1", transport="tcp") for kind in ("dist_sync", "dist_async")]
EMBEDDED = [Embedded("dist_sync")]
