"""The kinds of store by name, and `create`, which opens one."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, Literal

from tensorkv.arguments import flag, seconds
from tensorkv.config import Transport, check_transport, read_timeout_s
from tensorkv.errors import InvalidArgument, NotSupported, UnknownKind, did_you_mean
from tensorkv.store import KVStore, Reduction
from tensorkv.stores.local import LOCAL_KINDS, LocalStore
from tensorkv.tracers import opaque

Factory = Callable[..., KVStore]
"""Called as `factory(kind, **options)` with every option of `create`, as given or by default.

`timeout_s` is always a number: if none was given, that of the environment."""


@opaque
def create(
    kind: str = "local",
    *,
    store: str = "default",
    reduction: Reduction = "sum",
    timeout_s: float | None = None,
    embedded: bool = False,
    num_servers: int = 1,
    on_worker_loss: Literal["fail", "continue"] | None = None,
    transport: Transport | None = None,
    staleness: int | None = None,
    quorum: int | None = None,
    grace_s: float = 0.0,
    late: Literal["drop", "carry"] = "drop",
) -> KVStore:
    """Open a store.

    Args:
        kind: "local" and "device" work in this process, "dist_sync" and "dist_async" in a job with
            servers. The error for an unknown kind lists all kinds.
        store: name of the store within its job; workers that use the same name share it.
        reduction: "sum", or "mean" over all tensors that go into a round.
        timeout_s: timeout of a waiting call in seconds, joining the job included. None uses the launcher's
            (`tensorkv run --timeout`), or that in TENSORKV_TIMEOUT_S, else 1800.
        embedded: run a job of one worker in this process, servers included; for distributed kinds.
        num_servers: number of servers of an embedded job.
        on_worker_loss: how the other workers react to a lost one (killed, or ended by an exception).
            "fail", the default of dist_sync: each of their calls raises PeerLostError. "continue", the
            default of dist_async: they go on without it; its complete contributions count, the rest is
            dropped. All workers must pass the same. A lost server or scheduler always ends the job.
        transport: how this worker reaches the servers: "shm", shared memory, with servers on this host
            only; "tcp"; or "auto", shared memory where available. None uses the launcher's, else "auto".
            The first store of a process decides.
        staleness: bound for dist_async, in pushes: a worker that has pushed a key n times pulls it only when
            each other worker that has not left has pushed it n - staleness times. None is no bound. All
            workers must pass the same, and push every key equally often (ABSENT counts).
        quorum: number of workers, for dist_sync: a round of a key merges when all workers that have not left
            have pushed it, or `grace_s` seconds after the push of the `quorum`-th (ABSENT counts). It is
            capped by the number of workers that have not left. None waits for all. All workers must pass
            the same `quorum`, `grace_s` and `late`.
        grace_s: time in seconds, 0 or more, that a round with `quorum` still waits for the others.
        late: what happens to a push whose round has merged without it: "drop" does not count it, and its
            worker's next push is for the round after the newest merged one; "carry" counts it in the open
            round. `KVStore.info(key).late` counts such pushes.

    Returns:
        The store. Close it, or use it in a `with`.

    Raises:
        UnknownKind: no such kind, or not a str.
        NotSupported: a kind that is not built yet.
        InvalidArgument: an option is out of range, or makes no sense for the kind.
        NotInJob: a distributed kind outside a job, without `embedded`.
        StoreMismatch: another worker has opened the name with another kind, reduction, on_worker_loss,
            staleness, quorum, grace_s or late.
        TransportUnavailable: transport="shm", and a server shares no memory with this process.
        WaitTimeout, PeerLostError: of a distributed kind.

    A distributed kind blocks until the job's scheduler and servers have answered.

    Example:
        ```python
        with tensorkv.create("dist_sync", embedded=True, num_servers=2, reduction="mean") as kv:
            kv.init("w", torch.zeros(2))
            kv.push("w", [torch.ones(2), 3 * torch.ones(2)])
            print(kv.pull("w"))  # tensor([2., 2.])
        ```
    """
    factory = _FACTORIES.get(kind) if isinstance(kind, str) else None
    if factory is None:
        known = ", ".join(repr(name) for name in sorted(_FACTORIES))
        raise UnknownKind(
            f"there is no kind of store {kind!r}{did_you_mean(kind, _FACTORIES)}; known are {known}"
        )
    if type(num_servers) is not int:
        raise InvalidArgument(f"num_servers={num_servers!r} is not an int")
    return factory(
        kind,
        store=store,
        reduction=reduction,
        timeout_s=seconds("timeout_s", read_timeout_s() if timeout_s is None else timeout_s),
        embedded=flag("embedded", embedded),
        num_servers=num_servers,
        on_worker_loss=on_worker_loss,
        transport=None if transport is None else check_transport("transport", transport),
        staleness=staleness,
        quorum=quorum,
        grace_s=grace_s,
        late=late,
    )


def register(kind: str, factory: Factory) -> None:
    """Add a kind of store, for this process.

    Args:
        kind: its name, which must be new.
        factory: called as `factory(kind, **options)` with every option of `create`.

    Raises:
        InvalidArgument: `kind` is not a non-empty str or is taken, or `factory` cannot be called.

    Example:
        ```python
        def open_plain(kind, *, store, reduction, timeout_s, **for_jobs):
            return tensorkv.create("local", store=store, reduction=reduction, timeout_s=timeout_s)

        tensorkv.register("plain", open_plain)
        kv = tensorkv.create("plain", reduction="mean")
        print(kv.kind, kv.reduction)  # local mean
        ```
    """
    if not isinstance(kind, str) or not kind:
        raise InvalidArgument(f"kind={kind!r} is not a name; pass a non-empty string")
    if not callable(factory):
        raise InvalidArgument(f"the factory of kind {kind!r} is {factory!r}, which cannot be called")
    if kind in _FACTORIES:
        raise InvalidArgument(f"there is a kind {kind!r} already; choose another name")
    _FACTORIES[kind] = factory


_numbers: defaultdict[str, Iterator[int]] = defaultdict(lambda: itertools.count(1))
"""How many stores of a name `open_next` has opened: all workers open them in the same order."""


def open_next(kind: str, name: str, **options: Any) -> KVStore:
    """Open the next store of a name for what a script makes several of, such as optimizers.

    Args:
        kind: as in `create`; "auto" is "dist_sync" in a job and "local" outside one.
        name: the store's name. The second store of it is called `name.2`, and so on.
        **options: those of `create`.

    Raises and blocks as `create`.
    """
    if kind == "auto":
        from tensorkv.launch.place import find_place  # a store by its kind needs no launcher

        kind = "local" if find_place() is None and not options.get("embedded") else "dist_sync"
    number = next(_numbers[name])
    return create(kind, **{"store": name if number == 1 else f"{name}.{number}", **options})


_OPTIONS_OF_JOBS: dict[str, Any] = {
    "embedded": False,
    "num_servers": 1,
    "on_worker_loss": None,
    "transport": None,
    "staleness": None,
    "quorum": None,
    "grace_s": 0.0,
    "late": "drop",
}
"""Options that only the distributed kinds have, with their defaults."""


def _open_local(
    kind: str,
    *,
    store: str,
    reduction: Reduction,
    timeout_s: float,
    **for_jobs: Any,
) -> KVStore:
    for name, value in for_jobs.items():
        if value != _OPTIONS_OF_JOBS[name]:
            raise InvalidArgument(
                f"{name}={value!r} makes no sense for kind {kind!r}, which has no servers and no other "
                "workers; it is for the distributed kinds"
            )
    return LocalStore(kind, store=store, reduction=reduction, timeout_s=timeout_s)


def _open_dist(kind: str, **options: Any) -> KVStore:
    from tensorkv.stores.dist import open_dist  # a local store needs no sockets

    return open_dist(kind, **options)


def _not_yet(kind: str, **options: Any) -> KVStore:
    raise NotSupported(f"kind {kind!r} is not built yet; use 'dist_sync', which sums on servers")


_FACTORIES: dict[str, Factory] = {
    **dict.fromkeys(LOCAL_KINDS, _open_local),
    **dict.fromkeys(("dist", "dist_sync", "dist_async"), _open_dist),
    **dict.fromkeys(("dist_device_sync", "dist_sync_device"), _not_yet),
}
