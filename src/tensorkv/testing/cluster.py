"""A whole job in one process: scheduler, servers and workers all run in threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from tensorkv.config import DEFAULT_TIMEOUT_S, SLICE_BOUND_BYTES, Transport
from tensorkv.errors import PeerLostError, StoreClosed
from tensorkv.launch.cluster import LocalCluster
from tensorkv.store import KVStore, Reduction
from tensorkv.stores.dist import DistStore
from tensorkv.stores.policy import policy_of
from tensorkv.wire import messages as m
from tensorkv.wire.messages import WorkerLossPolicy
from tensorkv.worker.session import Session

T = TypeVar("T")


def run_job(
    fn: Callable[[KVStore], T],
    *,
    num_workers: int,
    num_servers: int,
    kind: str = "dist_sync",
    store: str = "default",
    reduction: Reduction = "sum",
    timeout_s: float = DEFAULT_TIMEOUT_S,
    slice_bound_bytes: int = SLICE_BOUND_BYTES,
    host: str = "inproc",
    transport: Transport = "auto",
    on_worker_loss: WorkerLossPolicy | None = None,
    **options: Any,
) -> list[T]:
    """Run `fn(kv)` as each worker of a job and return the results by rank.

    Args:
        fn: called with its worker's store, which is closed when `fn` returns.
        num_workers, num_servers: size of the job.
        kind, store, reduction, timeout_s, on_worker_loss: as in `tensorkv.create`.
        options: those of the policy: staleness, quorum, grace_s, late.
        slice_bound_bytes: larger values are sliced where they may be.
        host: "inproc" for no sockets, "127.0.0.1" for real ones.
        transport: how workers reach servers, with real sockets.

    Raises:
        The first error of a worker. That worker counts as lost: no other worker waits for it.
    """
    cluster = LocalCluster(
        num_workers,
        num_servers,
        timeout_s=timeout_s,
        slice_bound_bytes=slice_bound_bytes,
        host=host,
        transport=transport,
    )
    policy = policy_of(kind, **options)
    results: list[Any] = [None] * num_workers
    errors: list[tuple[int, BaseException]] = []

    def work(rank: int) -> None:
        job: Session | None = None
        try:
            job = cluster.join(rank)
            kv = DistStore(
                kind,
                job,
                store=store,
                reduction=reduction,
                timeout_s=timeout_s,
                on_worker_loss=on_worker_loss,
                policy=policy,
            )
            results[rank] = fn(kv)
            kv.close()
            job.close(m.Goodbye())
        except BaseException as exc:  # noqa: BLE001  # raised again below, in the caller's thread
            errors.append((rank, exc))
            if job is not None:
                job.close(m.Abandon(f"{type(exc).__name__}: {exc}"))

    threads = [
        threading.Thread(target=work, args=(rank,), name=f"worker-{rank}") for rank in range(num_workers)
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        cluster.stop()
    if errors:
        causes = [exc for _, exc in errors if not isinstance(exc, (PeerLostError, StoreClosed))]
        raise causes[0] if causes else errors[0][1]
    return results
