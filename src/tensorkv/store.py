"""KVStore: the contract of every store, and the only place that states its promises.

Each public method does the checks common to all kinds (closed, forked, keys, forms of arguments), then
calls one abstract method, which each kind implements. `tensorkv.stores` lists the kinds;
`tensorkv.testing`, one suite for all, checks that they keep the promises.

Terms: a worker's n-th push of a key belongs to round n of that key. A round is open while
contributions arrive, merged when every worker that must contribute has done so, applied when the updater
has run. `round` counts rounds, `version` counts updates.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import torch

from tensorkv.arguments import flag, number, positive, seconds
from tensorkv.arrays import check_matches, check_summable, shape_of, size_bytes
from tensorkv.bound import BoundStep
from tensorkv.errors import (
    DuplicateKey,
    InvalidArgument,
    InvalidOption,
    NotPicklable,
    NotSupported,
    StoreClosed,
)
from tensorkv.interrupts import ctrl_c
from tensorkv.keys import (
    PullBatch,
    PushBatch,
    check_keys,
    check_new_keys,
    pull_batch,
    pull_batch_of,
    push_batch,
    split_keys,
)
from tensorkv.plain import Key, may_travel
from tensorkv.tracers import check_traced, opaque, opaque_methods
from tensorkv.updaters.groups import OptimizerGroup, groups_of, plain_options
from tensorkv.updaters.parameters import ParameterTable
from tensorkv.work import Work

Reduction = Literal["sum", "mean"]
UpdaterFunction = Callable[[Key, torch.Tensor, torch.Tensor], None]
Names = Key | Iterable[Key] | None

opaque_methods(Work)  # here, because work.py does not import torch

MIN_WEIGHT, MAX_WEIGHT = 1e-18, 1e18
"""Minimum and maximum weight of a push: weighted values overflow hardly sooner than the values do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyInfo:
    """Information about a key.

    `version` counts applied updates, `round` rounds, including empty ones; of a sliced value both are the
    minimum over its slices. `num_slices` is 1 for a whole value. `state_bytes` is the size of the optimizer's
    state of the key, momentum say, over all slices; it lives with the value. `value_bytes` is the size of the
    value itself. `late` counts the pushes of all workers that came after their round had merged without them,
    of a sliced value the maximum over its slices; only a store with `quorum` merges so.
    """

    key: Key
    shape: tuple[int, ...]
    dtype: torch.dtype
    version: int
    round: int
    updater: str
    num_slices: int = 1
    state_bytes: int = 0
    late: int = 0

    @property
    def value_bytes(self) -> int:
        """Size of the value."""
        return size_bytes(self.shape, self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitResult:
    """Outcome of a commit.

    `applied` is False if some worker asked to skip or, with `check_finite`, an element was not finite;
    then no value changed; nor did it with `apply=False`. `norm` is the Euclidean norm of all pushed values,
    before clipping; None if it was not needed.
    """

    applied: bool
    norm: float | None


@opaque_methods
class KVStore(ABC):
    """A place to share tensors across devices and machines.

    The keys of a store are either ints or strings. Values are dense tensors of a fixed shape and
    dtype. Every verb takes one key, a list of keys with a list of values, or a dict; each value
    may also be a list of values, one per device. A store accepts torch tensors, NumPy arrays and arrays
    with `__dlpack__`, and never keeps the caller's memory.

    Instead of a dict, a verb also takes pairs, `model.named_parameters()` say, or a module. A module stands
    for its parameters under the names of `named_parameters()`: frozen ones included, a tied one under its
    first name. In `push` and `pushpull`, which expect gradients, it stands for the `.grad` of each. Buffers
    are excluded: most are not floats, and none has a gradient. Share them with
    `kv.init(model.named_buffers())` and `kv.put(model.named_buffers())`, or both with `model.state_dict()`.

    A store is a context manager. A refused call changes nothing. Several threads may call methods;
    one thread's calls on one key take effect in program order.
    """

    _allows_commit = True  # whether a push may wait for a commit
    _defers_ctrl_c = False  # whether calls have messages that Ctrl-C must not come between

    def __init__(self, kind: str, *, store: str, reduction: Reduction, timeout_s: float) -> None:
        if reduction not in ("sum", "mean"):
            raise InvalidArgument(f"reduction={reduction!r} is not known; use 'sum' or 'mean'")
        if not isinstance(store, str) or not store:
            raise InvalidArgument(f"store={store!r} is not a name; pass a non-empty string")
        if not may_travel(str(store)):
            raise InvalidArgument(f"store={store!r} is not valid Unicode: it holds half of a surrogate pair")
        self._kind = kind
        self._name = store
        self._reduction: Reduction = reduction
        self._timeout_s = seconds("timeout_s", timeout_s)
        self._parameters = ParameterTable()
        self._watched = self._parameters.watched  # an alias: a repeated push is a fast path
        self._key_type: type | None = None  # int or str once the store has a key
        self.num_retired = 0  # how often keys were deleted or replaced: `BoundStep` then looks at its own
        self._closed = False
        self._pid = os.getpid()

    # ---- who and what ----------------------------------------------------------------------------

    @property
    def kind(self) -> str:
        """Kind of the store, as given to `create`.

        Example:
            ```python
            with tensorkv.create("dist_async", embedded=True) as kv:
                print(kv.kind)  # dist_async
            ```
        """
        return self._kind

    @property
    def name(self) -> str:
        """Name of the store within its job, as given to `create(store=...)`.

        Example:
            ```python
            kv = tensorkv.create("local", store="statistics")
            print(kv.name)  # statistics
            print(tensorkv.create("local").name)  # default
            ```
        """
        return self._name

    @property
    def reduction(self) -> Reduction:
        """ "sum", or "mean" over all tensors of a round.

        Example:
            ```python
            kv = tensorkv.create("local", reduction="mean")
            print(kv.reduction)  # mean
            print(tensorkv.create("local").reduction)  # sum
            ```
        """
        return self._reduction

    @property
    @abstractmethod
    def rank(self) -> int:
        """Number of this worker in its job, from 0, in the launcher's order.

        Example:
            ```python
            kv = tensorkv.create("local")
            samples = list(range(6))
            print(kv.rank)  # 0
            print(samples[kv.rank :: kv.num_workers])  # [0, 1, 2, 3, 4, 5]
            ```
        """

    @property
    @abstractmethod
    def num_workers(self) -> int:
        """Number of workers in the job.

        Example:
            ```python
            with tensorkv.create("dist_sync", embedded=True, num_servers=2) as kv:
                print(kv.num_workers)  # 1
            ```
        """

    @property
    def world_size(self) -> int:
        """Number of workers, under torch.distributed's name for it.

        Example:
            ```python
            kv = tensorkv.create("local")
            print(kv.world_size)  # 1
            assert kv.world_size == kv.num_workers
            ```
        """
        return self.num_workers

    # ---- values ----------------------------------------------------------------------------------

    def init(self, key: Any, value: Any = None, *, whole: bool = False) -> None:
        """Create keys with copies of their initial values.

        Rank 0's value counts. On another rank the call waits for rank 0's and compares shape and
        dtype. You can initialise a key once. After `delete` you can initialise it again, as another key: the
        call then waits until every worker has deleted the old one.

        Args:
            key: a key, a list of keys, a dict of key to value, pairs, or a module for its parameters.
            value: a tensor of any shape and device for each key; it fixes the value's shape and dtype.
            whole: keep each value on one server, even if its updater would allow slicing it.

        Raises:
            KeyAlreadyInitialized: one of the keys exists; none is created.
            DuplicateKey: a key appears twice in the call.
            SettingMismatch: shape, dtype or `whole` differ from rank 0's.
            InvalidKey: also for an int of more than 64 bits, or text that is not valid Unicode.
            InvalidValue: a tensor that is not dense or keeps its data elsewhere, a DTensor say; a dtype that
                torch cannot add, uint16 say, or cannot average.
            MemoryLimitReached: no memory to make a value contiguous.
            InvalidArgument, LengthMismatch, WaitTimeout, PeerLostError.

        Blocks until the values are stored.

        Example:
            ```python
            kv = tensorkv.create("local")
            kv.init("w", torch.ones(2))
            kv.init({"b": torch.zeros(1), "c": torch.zeros(3)})
            kv.init(torch.nn.Linear(3, 1))  # its parameters
            print(kv.keys())  # ['w', 'b', 'c', 'weight', 'bias']
            ```
        """
        self._check_usable("init", key)
        whole = flag("whole", whole)
        self._create(*self._init_batch(key, value), whole)

    def _create(self, batch: PushBatch, given: list[Any], whole: bool) -> None:
        self._init(batch.keys, [each[0] for each in batch.tensors], whole)
        self._key_type = type(batch.keys[0])
        self._parameters.learn(batch.keys, given, watch=self.rank == 0)

    def push(
        self,
        key: Any,
        value: Any = None,
        *,
        apply: bool = True,
        weight: float | None = None,
        async_op: bool = False,
    ) -> Work | None:
        """Add values to the current round of their keys.

        The store sums the values of several devices first, in list order; then the workers' sums, in rank
        order. The updater combines the result with the stored value. In `dist_async` every push is a
        round of its own.

        The default updater replaces the value by the result. Rank 0 gets one UserWarning if no updater or
        optimizer was set and nothing loaded, it initialised a key with a parameter that requires a gradient,
        and it pushes anything but that parameter to the key: gradients, most likely.

        Args:
            key: a key, a list of keys, a dict of key to value, pairs, or a module for the gradients of its
                parameters. The same key twice is the sum.
            value: per key a tensor, a list of tensors (one per device), or `tensorkv.ABSENT` to take
                part without a value, if a parameter has no gradient say. Shapes as initialised; floats
                are cast to the stored dtype.
            apply: False only merges; `commit` then applies.
            weight: with reduction="mean", the weight of each key of this push in the mean of its round,
                whatever the number of its tensors: its number of samples, say. None counts each
                tensor as one. 0 is like ABSENT. If no other worker pushes to the round, as in one process
                and in `dist_async`, the weight makes no difference.
            async_op: return a `Work` at once; the tensors must not change until it is complete.

        Returns:
            None, or the Work if `async_op`.

        Raises:
            KeyNotInitialized, ShapeMismatch, DtypeMismatch, UncommittedPush: nothing was pushed.
            UpdaterError: the updater raised in an earlier round this worker contributed to.
            KeyDeleted, InvalidKey, InvalidValue, InvalidArgument, LengthMismatch, PeerLostError.

        Returns once the caller may change its tensors. Waits for other workers only if an earlier
        push of the same key is not merged yet.

        Example:
            ```python
            kv = tensorkv.create("local")
            kv.init(["w", "b"], [torch.zeros(2), torch.zeros(1)])
            kv.set_updater("add")
            kv.push("w", [torch.ones(2), torch.ones(2)])  # a tensor per device
            kv.push({"w": torch.ones(2), "b": tensorkv.ABSENT})
            print(kv.pull(["w", "b"]))  # [tensor([3., 3.]), tensor([0.])]
            ```
        """
        self._check_usable("push", key)
        if apply is not True or async_op is not False:  # mostly neither
            apply, async_op = flag("apply", apply), flag("async_op", async_op)
        batch = push_batch(key, value, self._key_type, self._plan_of_push, grads=True)
        return self._push(self._ready_to_push("push", batch, weight), apply, async_op)

    def _ready_to_push(self, call: str, batch: PushBatch, weight: float | None) -> PushBatch:
        """Return a batch with its weight, after the checks that need the batch as a whole."""
        if weight is not None:
            batch = self._weighted(call, batch, weight)
        if self._watched:
            self._parameters.check_push(batch)
        return batch

    def pull(self, key: Any = None, out: Any = None, *, async_op: bool = False) -> Any:
        """Copy the current values of keys out of the store.

        In `dist_sync` a worker that has pushed a key n times gets exactly the value after round n; the
        call waits for that round. In `dist_async` it gets the newest value, each slice read whole;
        with `staleness` it may wait for workers that are too far behind. With `quorum` it gets the newest
        value that holds its worker's last push, or no longer can.

        Args:
            key: a key or a list of keys; omit it if `out` is a dict of key to destination, pairs, or a
                module whose parameters to write.
            out: per key a tensor, or a list of tensors (one per device), of the initialised shape; any
                float dtype for a float value. Without it, pull creates new tensors on the CPU.
            async_op: return a `Work` whose `result()` is the value.

        Returns:
            `out` if given; else a tensor, or a list of tensors for a list of keys; or the Work.

        Raises:
            KeyNotInitialized, ShapeMismatch, DtypeMismatch, InvalidOut: nothing was written. Read-only
                memory is refused if its owner marks it so: NumPy's flag, DLPack since 1.0, JAX.
            UncommittedPush: this worker pushed the key with `apply=False` and has not committed.
            UpdaterError: the updater raised in a round this worker contributed to.
            WaitTimeout: the round was not complete in time; `out` may be partly written.
            KeyDeleted, InvalidKey, InvalidValue, InvalidArgument, LengthMismatch, PeerLostError.

        Blocks until `out` is written.

        Example:
            ```python
            kv = tensorkv.create("local")
            kv.init({"w": torch.ones(2), "b": torch.zeros(1)})
            print(kv.pull(["w", "b"]))  # [tensor([1., 1.]), tensor([0.])]
            mine = torch.empty(2)
            kv.pull("w", out=mine)
            print(mine)  # tensor([1., 1.])
            ```
        """
        self._check_usable("pull", key)
        if async_op is not False:
            async_op = flag("async_op", async_op)
        return self._pull(pull_batch(key, out, self._key_type, self._plan_of_pull), async_op)

    def pushpull(
        self,
        key: Any,
        value: Any = None,
        out: Any = None,
        *,
        weight: float | None = None,
        async_op: bool = False,
    ) -> Any:
        """Push, then pull the same keys, in one exchange with each server.

        Args:
            key, value, weight: as in `push`.
            out: as in `pull`, a destination per distinct key in the order of their first appearance; a
                dict, pairs or a module if `key` is one of them. Without it, new tensors are returned.
            async_op: return a `Work` whose `result()` is the value.

        Returns:
            As `pull`; a dict if `key` is a dict, pairs or a module and there is no `out`.

        Raises:
            What `push` and `pull` raise.

        Blocks until the round of each key is applied.

        Example:
            ```python
            kv = tensorkv.create("local")
            kv.init("w", torch.zeros(2))
            kv.set_optimizer("sgd", lr=0.5)
            print(kv.pushpull("w", torch.ones(2)))  # tensor([-0.5000, -0.5000])
            print(kv.pushpull({"w": torch.ones(2)}))  # {'w': tensor([-1., -1.])}
            ```
        """
        self._check_usable("pushpull", key)
        if async_op is not False:
            async_op = flag("async_op", async_op)
        pushed = push_batch(key, value, self._key_type, self._plan_of_push, grads=True)
        pulled = pull_batch_of(pushed, key, out, self._key_type, self._plan_of_pull)
        return self._pushpull(self._ready_to_push("pushpull", pushed, weight), pulled, async_op)

    def bind(self, *, push: Any = None, out: Any = None) -> BoundStep:
        """Work out a training step once: which tensors it pushes, and which it pulls into.

        The step's own `push`, `pull` and `pushpull` do what the store's do, with less work in each call: a
        step of a thousand small keys takes a tenth less time. It reads dict and module anew in each
        call, so tensors may be replaced, as `zero_grad()` does with gradients; but their names are
        those of now.

        Args:
            push: what to push: a dict of key to tensor (or list of tensors, one per device, or ABSENT),
                pairs, or a module for the gradients of its parameters.
            out: what to pull into: a dict, pairs, or a module for its parameters.

        Returns:
            The step. It ends with the keys: after `delete` or `load` its calls raise KeyDeleted.

        Raises:
            KeyNotInitialized, InvalidKey, LengthMismatch.
            InvalidArgument: neither `push` nor `out` is given, or one is no dict, pairs or module.
            DuplicateKey: a key appears twice in pairs.

        Example:
            ```python
            model = torch.nn.Linear(2, 1)
            kv = tensorkv.create("local")
            kv.broadcast(model, out=model)
            kv.set_optimizer("sgd", lr=0.1)
            step = kv.bind(push=model, out=model)
            for _ in range(3):
                model.zero_grad()
                model(torch.ones(4, 2)).sum().backward()
                step.pushpull()
            print(kv.info("bias").round)  # 3
            ```
        """
        self._check_usable("bind")
        return BoundStep(self, push, out)

    def empty_like(self, key: Any) -> Any:
        """Return new CPU tensors to push from, uninitialised, with the shape and dtype of keys.

        If workers and servers share memory (see `create`), the tensors lie in it, and a push of them is
        zero-copy: it lends them to the servers, which read them in place. So after a push, do not change
        them until this worker's pull of their keys has returned. Otherwise they are ordinary tensors,
        pushed like any other.

        Args:
            key: a key or a list of keys. Push the tensors in the order of that list: those under 4 MiB are
                copied if they are pushed in another order, or between other tensors.

        Returns:
            A tensor, or a list of tensors for a list of keys. Dropping them frees their memory.

        Raises:
            KeyNotInitialized, InvalidKey, LengthMismatch.
            MemoryLimitReached: the system has no memory for them.

        Example:
            ```python
            with tensorkv.create("dist_sync", embedded=True) as kv:
                kv.init("w", torch.zeros(2, 3))
                gradient = kv.empty_like("w")
                print(gradient.shape, gradient.dtype)  # torch.Size([2, 3]) torch.float32
                kv.push("w", gradient.fill_(1.0))
                print(kv.pull("w")[0])  # tensor([1., 1., 1.])
            ```
        """
        self._check_usable("empty_like", key)
        is_list = isinstance(key, (list, tuple))
        found = self._empty_like(check_keys(key if is_list else [key], self._key_type))
        return found if is_list else found[0]

    def broadcast(self, key: Any, value: Any = None, out: Any = None) -> Any:
        """Init, then pull into `out`, so that every worker has rank 0's value. Once per key, like `init`.

        Args, returns and errors are those of `init` and `pull`; `broadcast(model, out=model)` gives every
        worker rank 0's parameters.

        Example:
            ```python
            kv = tensorkv.create("local")
            mine = torch.zeros(2)
            kv.broadcast("w", torch.tensor([1.0, 2.0]), out=mine)
            print(mine)  # tensor([1., 2.])
            ```
        """
        self._check_usable("broadcast", key)
        values, given = self._init_batch(key, value)
        asked = pull_batch_of(values, key, out, self._key_type)  # refuse a bad out before anything is created
        item_of = {name: item for name, (item,) in zip(values.keys, values.tensors, strict=True)}
        for name, outs in zip(asked.keys, asked.outs, strict=True):
            for destination in outs:
                item = item_of[name]
                check_matches("broadcast: out", destination, name, item.shape, item.dtype)
        self._create(values, given, False)
        return self._pull(asked, False)

    def put(self, key: Any, value: Any = None) -> None:
        """Replace values outside rounds: this worker alone sets them.

        For restoring, publishing and statistics. No updater runs; `round` and the optimizer's state stay,
        `version` goes up by one. A put is atomic per slice: it takes effect after this worker's own last
        push of the key is applied, and before any round that is still open. No other worker need call it.

        Args:
            key: a key, a list of keys, a dict of key to value, pairs, or a module for its parameters.
            value: one tensor for each key, of the initialised shape; floats are cast to the stored dtype.

        Raises:
            KeyNotInitialized, ShapeMismatch, DtypeMismatch, UncommittedPush: no value was changed.
            DuplicateKey: a key appears twice in the call, or has values of several devices.
            UpdaterError: the updater raised in an earlier round this worker contributed to.
            KeyDeleted: another thread of this worker has deleted a key during the call; nothing is replaced.
            InvalidKey, InvalidValue, InvalidArgument, LengthMismatch, WaitTimeout, PeerLostError.

        Blocks until every server has replaced its part.

        Example:
            ```python
            kv = tensorkv.create("local")
            kv.init("w", torch.zeros(2))
            kv.set_optimizer("sgd", lr=0.5)
            kv.put("w", torch.ones(2))  # no step is made
            print(kv.pull("w"))  # tensor([1., 1.])
            print(kv.info("w").version, kv.info("w").round)  # 1 0
            ```
        """
        self._check_usable("put", key)
        batch = push_batch(key, value, self._key_type)
        _check_one_each("put", batch)
        self._put(batch.keys, [each[0] for each in batch.tensors])

    def commit(
        self,
        *,
        max_norm: float | None = None,
        skip: bool = False,
        check_finite: bool = False,
        apply: bool = True,
    ) -> CommitResult:
        """Apply all pushes made with `apply=False`, on all workers together.

        Norm and clipping use the sum of each round (or its mean) as passed to the updater: rounded to the
        stored dtype of the key. Squares are accumulated in float64, so neither float16 nor a huge element
        makes the norm overflow. For values that are not sliced, the norm is bitwise equal in every kind of
        store.

        Args:
            max_norm: maximum Euclidean norm over all keys; scales all pushed values down to it, as
                torch.nn.utils.clip_grad_norm_ does.
            skip: drop the round instead; OR-ed over the workers.
            check_finite: drop the round if an element of it is infinite or NaN.
            apply: False only returns the norm: the pushes stay, for a later commit.

        Returns:
            Whether it was applied, and the norm.

        Raises:
            CommitMismatch: the workers' keys, `max_norm`, `check_finite` or `apply` differ; every worker
                gets this and nothing is committed.
            InvalidArgument: another argument beside apply=False.
            DtypeMismatch: `max_norm` is given and a pushed key is neither float nor complex; every worker
                gets this, nothing is committed, and you may call commit again without it.
            NotSupported: in `dist_async`, which has no rounds to commit.
            WaitTimeout: the commit stays asked for; the next call waits for it, whatever its arguments.
            UpdaterError, PeerLostError.

        Blocks until the updates are applied.

        Example:
            ```python
            kv = tensorkv.create("local")
            kv.init({"w": torch.zeros(1), "b": torch.zeros(1)})
            kv.push({"w": torch.tensor([3.0]), "b": torch.tensor([4.0])}, apply=False)
            print(kv.commit(max_norm=10.0))  # CommitResult(applied=True, norm=5.0)
            print(kv.pull("w"))  # tensor([3.])
            ```
        """
        self._check_usable("commit")
        bound = None if max_norm is None else positive("max_norm", max_norm)
        skip, check_finite = flag("skip", skip), flag("check_finite", check_finite)
        if not flag("apply", apply) and (bound is not None or skip or check_finite):
            raise InvalidArgument(
                "commit(apply=False) only measures: pass max_norm, skip and check_finite to the commit that "
                "applies"
            )
        return self._commit(bound, skip, check_finite, apply)

    # ---- settings --------------------------------------------------------------------------------

    def set_updater(self, updater: UpdaterFunction | str | None, *, elementwise: bool = False) -> None:
        """Set the function that combines a round's sum with the stored value, for all keys.

        Args:
            updater: `fn(key, pushed, stored)`, which changes `stored` in place, by `stored.add_(pushed)` say;
                or a name: "assign" (also None; the default), "add". A function runs on a copy that is kept
                only if it succeeds; functions run one at a time, in list order. The function may keep both
                tensors: neither changes after the call. Returning anything but `stored` or None is an
                error (UpdaterError, raised by the push). Rebinding `stored`, as in
                `stored = stored + pushed`, changes nothing and cannot be detected.
            elementwise: the function treats each element on its own, so values may be sliced.

        In a distributed store rank 0's setting counts, and all ranks that make it must agree; it
        applies from rank 0's next push of each key. Servers must find the function by name: at the top
        level of the script or in a module.

        Raises:
            UnknownUpdater, NotShippable, NotElementwise, SettingMismatch, WaitTimeout, PeerLostError.

        Blocks until every server has the setting.

        Example:
            ```python
            def add_half(key, pushed, stored):
                stored.add_(pushed, alpha=0.5)

            kv = tensorkv.create("local")
            kv.init("w", torch.zeros(2))
            kv.set_updater(add_half)
            kv.push("w", torch.ones(2))
            print(kv.pull("w"))  # tensor([0.5000, 0.5000])
            ```
        """
        self._check_usable("set_updater")
        self._set_updater(updater, flag("elementwise", elementwise))
        self._parameters.stop_watching()

    def set_optimizer(
        self,
        optimizer: type[torch.optim.Optimizer] | torch.optim.Optimizer | str,
        *,
        keys: Names = None,
        **options: Any,
    ) -> None:
        """Use a torch optimizer as the updater: workers push gradients, the store holds parameters.

        Its state lives with the value. A key keeps its state if the call asks for the setting in force
        (the same optimizer with the same options), or repeats the last call made for the key; any other
        call starts afresh.

        An optimizer instance stands for its class and the current options of its groups; nothing else of it
        goes to the servers, and the call does not change it. One group, or several with the same options,
        applies to all keys. Otherwise each group applies to the keys of its parameters: those that `init`
        was given the parameter for, else its name, if torch has recorded it (`named_parameters()`); other
        keys stay as they are. A learning rate scheduler changes only the local object: update the servers
        with `set_optimizer_options(lr=...)`.

            decay, rest = [net.weight], [net.bias]
            groups = [{"params": decay}, {"params": rest, "weight_decay": 0.0}]
            kv.init(net)
            kv.set_optimizer(torch.optim.AdamW(groups, lr=1e-3))

        Args:
            optimizer: a class, `torch.optim.SGD` say, its name in any case, "sgd", or an instance that has
                made no step.
            keys: for these keys only, whether they exist yet or not; None means for all, including future
                ones. A later call for all replaces those for some.
            **options: its options, `lr=0.1, momentum=0.9` say: plain numbers, bools, strings, None or
                tuples of those. An instance has its own.

        Raises:
            UnknownUpdater: no such optimizer; the text lists the known names.
            UnsupportedOptimizer: LBFGS (needs a closure), SparseAdam (needs sparse gradients).
            InvalidOption: the optimizer refuses an option; or the groups of an instance do not show its
                options (a custom class may not keep them there): pass the class.
            InvalidArgument: the instance has made steps, so its state would be lost; or the keys of its
                groups are unknown. No group's setting is made then.
            InvalidValue: it does not accept the dtype or shape of a key.
            NotElementwise: it needs whole values and one of its keys is sliced.
            NotShippable, SettingMismatch, WaitTimeout, PeerLostError.

        Blocks until every server has the setting. Applies from the same round as `set_updater`.

        Example:
            ```python
            kv = tensorkv.create("local")
            kv.init({"w": torch.zeros(2), "b": torch.zeros(1)})
            kv.set_optimizer(torch.optim.SGD, lr=0.5)
            kv.set_optimizer("sgd", keys="b", lr=2.0)
            print(kv.pushpull("w", torch.ones(2)))  # tensor([-0.5000, -0.5000])
            print(kv.pushpull("b", torch.ones(1)))  # tensor([-2.])
            ```
        """
        self._check_usable("set_optimizer")
        if not isinstance(optimizer, torch.optim.Optimizer):
            self._set_optimizer(optimizer, [OptimizerGroup(self._names(keys), plain_options(options))])
            self._parameters.stop_watching()
            return
        if options:
            raise InvalidOption(
                f"{next(iter(options))}= beside a {type(optimizer).__name__} that was made, and has its "
                f"options in its groups; leave it away, or pass the class, {type(optimizer).__name__}"
            )
        self._set_instance(optimizer, self._names(keys), self._parameters.keys_by_id())

    def _set_instance(
        self,
        optimizer: torch.optim.Optimizer,
        keys: tuple[Key, ...] | None,
        keys_by_id: Mapping[int, Sequence[Key]],
    ) -> None:
        """Use an optimizer that was made: its single group for `keys`, or each group for those of its
        parameters."""
        groups = groups_of(optimizer, keys, keys_by_id)
        checked = [OptimizerGroup(self._names(each.keys), each.options) for each in groups]
        self._set_optimizer(type(optimizer), checked)
        self._parameters.stop_watching()

    def set_optimizer_options(self, *, keys: Names = None, **options: Any) -> None:
        """Change options of the optimizer, the learning rate say, and keep its state.

        Args:
            keys: for these keys only, whether they exist yet or not; None means for all.
            **options: as in `set_optimizer`.

        Raises:
            InvalidOption: no optimizer is set for a key, or it refuses an option.
            SettingMismatch: an earlier change of this rank differs from rank 0's; this one is not made.
            PeerLostError.

        Waits for no other worker. It holds from this rank's next push of each key on if this is the lowest
        rank; the same change by other ranks is compared with it, and a later call raises if it differs.

        Example:
            ```python
            kv = tensorkv.create("local")
            kv.init("w", torch.zeros(1))
            kv.set_optimizer("sgd", lr=1.0)
            print(kv.pushpull("w", torch.ones(1)))  # tensor([-1.])
            kv.set_optimizer_options(lr=0.5)
            print(kv.pushpull("w", torch.ones(1)))  # tensor([-1.5000])
            ```
        """
        self._check_usable("set_optimizer_options")
        self._set_optimizer_options(self._names(keys), plain_options(options))

    # ---- state -----------------------------------------------------------------------------------

    def state_dict(self, *, alone: bool = False) -> dict[str, Any]:
        """Return copies of values, optimizer state, versions and settings, for `load_state_dict`.

        It is a plain dict that `torch.save` writes and `torch.load(weights_only=True)` reads: "values" and
        "versions" by key; "optimizer_state" by key and name, per-element tensors in the shape of the value,
        however it was sliced; "settings" and "reduction" as plain data.

        Every worker that has not left must call it, like a barrier. Rank 0 (the lowest that has not left)
        gets the dict, the others an empty one. The dict excludes rounds that wait for a worker or for a
        commit. It is a consistent snapshot of each key, as in `save`.

        Args:
            alone: only this worker calls it, and gets the dict, as of the last rounds that it has pushed: see
                `save`.

        Raises:
            SaveError: an optimizer's state is neither tensors nor plain data.
            SettingMismatch: another worker has made another call of this kind.
            UncommittedPush, NotSupported: as for `save`, with `alone`.
            WaitTimeout, PeerLostError.

        Blocks until rank 0, or this worker if it is alone, has everything.

        Example:
            ```python
            kv = tensorkv.create("local")
            kv.init("w", torch.zeros(2))
            kv.push("w", torch.ones(2))
            state = kv.state_dict()
            print(state["values"], state["versions"])  # {'w': tensor([1., 1.])} {'w': 1}
            ```
        """
        self._check_usable("state_dict")
        return self._state_dict(flag("alone", alone))

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` has returned, in a job of any size and in any kind of store.

        Keys are created, or replaced if they exist with the same shape and dtype; others stay as they
        are. Rounds of loaded keys start at 0, and versions go on; a replaced key counts as deleted by every
        worker. Each worker's next `init` of such a key checks shape and dtype and keeps the value. The
        settings of the store are replaced; a `set_optimizer` that repeats the setting in force keeps the
        state. The dict holds a function, or an optimizer that is not torch's own, by name only: set it before
        or after.

        Every worker that has not left must call it. Rank 0's dict counts; others may pass an empty one.

        Raises:
            LoadError: the dict is invalid; every worker gets this, and nothing has changed.
            ShapeMismatch, DtypeMismatch: a key exists with another shape or dtype; nothing has changed.
            SettingMismatch, WaitTimeout, PeerLostError.

        Blocks until the servers have everything.

        Example:
            ```python
            kv = tensorkv.create("local")
            kv.init("w", torch.ones(2))
            with tensorkv.create("dist_sync", embedded=True) as other:
                other.load_state_dict(kv.state_dict())
                print(other.pull("w"))  # tensor([1., 1.])
            ```
        """
        self._check_usable("load_state_dict")
        self._load_state_dict(state_dict)
        self._after_load()

    def save(self, directory: str | os.PathLike[str], *, alone: bool = False) -> None:
        """Write values, optimizer state, versions and settings to a folder, as safetensors and an index.

        Each server writes its part, so all servers and rank 0 must share the file system of the folder,
        which is created if missing. A crash at any moment leaves an earlier save in the folder intact; its
        files, and any left by crashes, are removed once the new save is complete. No other files are
        touched. Concurrent saves into the folder are safe: the last one wins. Rank 0 shows a progress bar on
        a terminal if there is much to write.

        Every worker that has not left must call it, with the same folder, like a barrier: the save includes
        all earlier pushes, but not rounds that wait for a worker or for a commit. It is a consistent
        snapshot of each key: other threads' calls that change the store wait meanwhile.

        With `alone` one worker saves, and no other is told or waits. It saves each key as of the last round
        that it has pushed, and first waits for that round, as a pull does. From then on the key stays as it
        is, however far the others have pushed: its next round needs this worker's push. The save has the
        settings of that next round, not what others have already set for later ones. Only another worker's
        `put` may be in it in part. This worker takes the place of rank 0 above.

        Args:
            directory: the folder.
            alone: only this worker calls it.

        Raises:
            SaveError: a file cannot be written, a server does not share the folder, or an optimizer's
                state cannot be saved; every worker gets this, and an earlier save stays intact.
            SettingMismatch: the workers name different folders, or make different calls.
            UncommittedPush: with `alone`, a key that this worker has pushed with apply=False awaits its
                commit. A commit that another thread has begun is waited for.
            NotSupported: `alone` in `dist_async` or with a quorum, where rounds go on without this worker.
            WaitTimeout, PeerLostError.

        Blocks until the save is on disk.

        Example:
            ```python
            import os

            kv = tensorkv.create("local")
            kv.init("w", torch.ones(2))
            kv.save("checkpoint")
            print(len(os.listdir("checkpoint")) > 0)  # True

            with tensorkv.create("dist_sync", embedded=True) as job:
                job.init("w", torch.zeros(2))
                job.push("w", torch.ones(2))
                if job.rank == 0:
                    job.save("checkpoint", alone=True)
            kv.load("checkpoint")
            print(kv.pull("w"))  # tensor([1., 1.])
            ```
        """
        self._check_usable("save")
        self._save(_folder("save", directory), flag("alone", alone))

    def load(self, directory: str | os.PathLike[str]) -> None:
        """Restore what `save` has written, with any number of workers and servers, in any kind of store.

        See `load_state_dict` for its effect on keys, rounds, versions and settings. Every worker that
        has not left must call it, with the same folder.

        Raises:
            LoadError: there is no save, or it is corrupt; every worker gets this, and nothing has changed.
            ShapeMismatch, DtypeMismatch: a key exists with another shape or dtype; nothing has changed.
            SettingMismatch: the workers name different folders, or make different calls.
            WaitTimeout, PeerLostError.

        Blocks until the servers have everything.

        Example:
            ```python
            kv = tensorkv.create("local")
            kv.init("w", torch.ones(2))
            kv.save("checkpoint")
            again = tensorkv.create("local", store="again")
            again.load("checkpoint")
            print(again.pull("w"))  # tensor([1., 1.])
            ```
        """
        self._check_usable("load")
        self._load(_folder("load", directory))
        self._after_load()

    def _after_load(self) -> None:
        self.num_retired += 1
        self._parameters.stop_watching()
        keys = self._keys()
        if keys:
            self._key_type = type(keys[0])

    # ---- together --------------------------------------------------------------------------------

    def barrier(self, *, timeout_s: float | None = None) -> None:
        """Wait until every worker that has not left this store has called barrier equally often.

        By then all earlier pushes are applied, or belong to a round that still waits for a worker.

        Args:
            timeout_s: timeout in seconds; None means the store's own.

        Raises:
            WaitTimeout: the text names the missing ranks.
            InvalidArgument: `timeout_s` is not a positive number.
            UpdaterError: the updater raised in a round this worker contributed to.
            PeerLostError.

        Example:
            ```python
            with tensorkv.create("dist_sync", embedded=True) as kv:
                kv.init("w", torch.zeros(2))
                kv.push("w", torch.ones(2))
                kv.barrier(timeout_s=30)  # the servers have applied the push
                print(kv.info("w").version)  # 1
            ```
        """
        self._check_usable("barrier")
        self._barrier(self._timeout_s if timeout_s is None else seconds("timeout_s", timeout_s))

    # ---- the keys --------------------------------------------------------------------------------

    def keys(self) -> list[Key]:
        """Return the keys of the store, in the order of their init.

        Example:
            ```python
            kv = tensorkv.create("local")
            kv.init(["w", "b"], [torch.zeros(2), torch.zeros(1)])
            print(kv.keys())  # ['w', 'b']
            ```
        """
        self._check_usable("keys")
        return self._keys()

    def info(self, key: Key) -> KeyInfo:
        """Return shape, dtype, version, sizes and more of a key.

        Raises:
            KeyNotInitialized, InvalidKey.

        Example:
            ```python
            kv = tensorkv.create("local")
            kv.init("w", torch.zeros(2, 3))
            info = kv.info("w")
            print(info.shape, info.dtype, info.value_bytes)  # (2, 3) torch.float32 24
            print(info.version, info.updater)  # 0 assign
            ```
        """
        self._check_usable("info", key)
        check_keys([key], self._key_type)
        return self._info(key)

    def delete(self, key: Any) -> None:
        """Delete a key, or a list of keys: this worker needs them no more.

        For these keys this worker has left, as after `close`: its earlier pushes count, those that wait for
        a commit are dropped, and later rounds and pulls with bounded staleness do not wait for it.
        Here the keys are not initialised any more; other workers go on with them. The store drops a key,
        with value and optimizer state, when every worker has deleted it, has left or was lost. So every
        worker must delete it, also one that has never used it or has not created the store yet; until then
        its memory stays in use. Nothing else waits for that but an `init` of the same key, and its text says
        which ranks have not deleted it.

        An earlier pull of the key that another thread or a Work still waits for is answered as if the key
        were there. A push of it that another thread waits to make raises KeyDeleted.

        Raises:
            KeyNotInitialized: a key does not exist, or this worker has deleted it; nothing is deleted.
            KeyDeleted: another thread of this worker has deleted it during the call; nothing is deleted.
            WaitTimeout: an earlier call has not ended, and nothing is deleted; or a server has not answered,
                and the keys are deleted here all the same.
            InvalidKey, LengthMismatch, PeerLostError.

        Does not wait for other workers; only for earlier calls of this worker with `async_op` on these keys
        that have to wait themselves, and until the servers have taken note.

        Example:
            ```python
            kv = tensorkv.create("local")
            kv.init({"w": torch.zeros(2), "b": torch.zeros(1)})
            kv.delete("w")
            print(kv.keys())  # ['b']
            ```
        """
        self._check_usable("delete", key)
        names = key if isinstance(key, (list, tuple)) else [key]
        checked = check_keys(names, self._key_type)
        self.num_retired += 1
        self._delete(checked)
        self._parameters.forget(checked)

    def __contains__(self, key: object) -> bool:
        """Whether `key` is initialised. Takes constant time.

        Example:
            ```python
            kv = tensorkv.create("local")
            kv.init("w", torch.zeros(2))
            print("w" in kv, "b" in kv)  # True False
            ```
        """
        self._check_usable("in")
        if isinstance(key, (int, str)) and type(key) in (int, str):
            return self._has(key)
        return False  # a bool, say, is not a key

    def __len__(self) -> int:
        """Number of keys. Takes constant time.

        Example:
            ```python
            kv = tensorkv.create("local")
            kv.init({"w": torch.zeros(2), "b": torch.zeros(1)})
            print(len(kv))  # 2
            ```
        """
        self._check_usable("len")
        return self._num_keys()

    # ---- the end ---------------------------------------------------------------------------------

    @property
    @opaque
    def closed(self) -> bool:
        """Whether the store was closed, or belongs to the process this one was forked from.

        Example:
            ```python
            kv = tensorkv.create("local")
            print(kv.closed)  # False
            kv.close()
            print(kv.closed)  # True
            ```
        """
        return self._closed or self._pid != os.getpid()

    def close(self) -> None:
        """Leave the store. This worker's pushes count; those not committed are dropped.

        Raises errors that only the servers knew: an UpdaterError, say. A second close does nothing.

        Example:
            ```python
            kv = tensorkv.create("local")
            kv.init("w", torch.zeros(2))
            kv.close()
            kv.close()  # does nothing
            print(kv.closed)  # True
            ```
        """
        if self.closed:
            return
        self._closed = True
        self._close()

    def __enter__(self) -> Self:
        self._check_usable("with")
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close. After an exception, sys.exit(0) excepted, the worker counts as lost, not as having left."""
        if exc_type is None or (isinstance(exc, SystemExit) and exc.code in (None, 0)):
            self.close()
        elif not self.closed:
            self._closed = True
            self._abandon(f"{exc_type.__name__}: {exc}")

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse: a store is a place in a job, or memory of this process, and cannot be copied or sent."""
        raise NotPicklable(
            f"store {self._name!r} of kind {self._kind!r} cannot be pickled or copied: it belongs to this "
            "process. Call tensorkv.create in the process that uses it, in a function given to "
            "tensorkv.spawn say; where an object that holds it is copied, leave it out (__getstate__) and "
            "share it"
        )

    def __repr__(self) -> str:
        state = ", closed" if self.closed else ""
        return f"<tensorkv store {self._name!r}, kind {self._kind!r}, rank {self.rank}{state}>"

    # ---- what a kind of store may do better ------------------------------------------------------

    def _open_beside(self, name: str, kind: str = "dist_sync", reduction: Reduction = "sum") -> KVStore:
        """Return another store of the same workers, under a name that they all use; in one process a local
        one."""
        raise NotSupported(f"a store of kind {self.kind!r} opens no other one for its workers")

    @property
    def _why_no_sharing(self) -> str | None:
        """Why workers cannot map the stored values; "" if they can, None if there is nobody to share with."""
        return None

    def _place_values(
        self, keys: Sequence[Key], offsets_bytes: Sequence[int], path: str, size_bytes: int
    ) -> None:
        """Let the servers move values to the segment at `path`, each to its offset, where they stay. Rank 0
        calls it, while no worker reads them."""
        raise NotSupported(f"a store of kind {self.kind!r} shares no values")

    def _await_applied(self, what: str) -> None:
        """Wait until everything that this worker has pushed is applied. Raises as a pull of it would."""
        raise NotSupported(f"a store of kind {self.kind!r} shares no values")

    def _empty_like(self, keys: tuple[Key, ...]) -> list[torch.Tensor]:
        return [torch.empty(info.shape, dtype=info.dtype, device="cpu") for info in map(self._info, keys)]

    def _plan_of_push(self, keys: tuple[Key, ...], values: list[Any]) -> Any:
        """Return the plan of an earlier push of these keys with tensors of these dtypes and shapes, or None.

        `_push` and `_pushpull` then get a batch that is `known` by it. It has an attribute `dropped`, which
        becomes true when a key is gone.
        """
        return None

    def _plan_of_pull(self, keys: tuple[Key, ...], outs: list[Any]) -> Any:
        """Return the plan of an earlier pull of these keys into the same tensor objects, or None.

        `_pull` and `_pushpull` then get a batch that is `known` by it.
        """
        return None

    def _views_of(self, plan: Any, tensors: list[torch.Tensor], pushed: bool) -> Any:
        """Return views of the memory of tensors that a step passes by this plan, or None.

        Later calls with the same tensors at the same addresses pass what `_viewed` makes of both.
        """
        return None

    def _viewed(self, tensors: list[torch.Tensor], views: Any) -> list[torch.Tensor]:
        """Return tensors with their views."""
        return tensors

    # ---- what a kind of store implements ---------------------------------------------------------

    @abstractmethod
    def _init(self, keys: tuple[Key, ...], values: list[torch.Tensor], whole: bool) -> None: ...

    @abstractmethod
    def _check_push(self, batch: PushBatch) -> Any:
        """Raise if the batch cannot be pushed."""

    @abstractmethod
    def _push(self, batch: PushBatch, apply: bool, async_op: bool) -> Work | None: ...

    @abstractmethod
    def _pull(self, batch: PullBatch, async_op: bool) -> Any: ...

    @abstractmethod
    def _pushpull(self, pushed: PushBatch, pulled: PullBatch, async_op: bool) -> Any: ...

    @abstractmethod
    def _put(self, keys: tuple[Key, ...], values: list[torch.Tensor]) -> None: ...

    @abstractmethod
    def _commit(
        self, max_norm: float | None, skip: bool, check_finite: bool, apply: bool
    ) -> CommitResult: ...

    @abstractmethod
    def _set_updater(self, updater: UpdaterFunction | str | None, elementwise: bool) -> None: ...

    @abstractmethod
    def _set_optimizer(
        self, optimizer: type[torch.optim.Optimizer] | str, groups: Sequence[OptimizerGroup]
    ) -> None: ...

    @abstractmethod
    def _set_optimizer_options(self, keys: tuple[Key, ...] | None, options: dict[str, Any]) -> None: ...

    @abstractmethod
    def _state_dict(self, alone: bool) -> dict[str, Any]: ...

    def _state_now(self) -> dict[str, Any]:
        """Return what `state_dict(alone=True)` does or, where it cannot, each slice as of one moment."""
        return self._state_dict(True)

    @abstractmethod
    def _load_state_dict(self, state_dict: Mapping[str, Any]) -> None: ...

    @abstractmethod
    def _save(self, folder: str, alone: bool) -> None: ...

    @abstractmethod
    def _load(self, folder: str) -> None: ...

    @abstractmethod
    def _barrier(self, timeout_s: float) -> None: ...

    @abstractmethod
    def _keys(self) -> list[Key]: ...

    @abstractmethod
    def _has(self, key: Key) -> bool: ...

    @abstractmethod
    def _num_keys(self) -> int: ...

    @abstractmethod
    def _info(self, key: Key) -> KeyInfo: ...

    @abstractmethod
    def _ids_of(self, keys: tuple[Key, ...]) -> tuple[int, ...]:
        """Return a number for each key that no later key of its name has. Raises KeyNotInitialized."""

    @abstractmethod
    def _delete(self, keys: tuple[Key, ...]) -> None: ...

    @abstractmethod
    def _close(self) -> None: ...

    @abstractmethod
    def _abandon(self, why: str) -> None: ...

    # ---- checks ----------------------------------------------------------------------------------

    def _check_usable(self, call: str, key: Any = None) -> None:
        check_traced(call, key)
        if self._closed:
            raise StoreClosed(f"{call}: store {self._name!r} is closed; create it again")
        if self._pid != os.getpid():
            raise StoreClosed(
                f"{call}: store {self._name!r} belongs to process {self._pid}, and this is its forked child "
                f"{os.getpid()}; create a store of its own, or start the process by 'spawn'"
            )
        if self._defers_ctrl_c:
            ctrl_c.begin_call()

    def _weighted(self, call: str, batch: PushBatch, weight: Any) -> PushBatch:
        """Return a push with a weight. Raises the errors of the push itself and of `_checked_weight`."""
        number = self._checked_weight(call, batch.keys, weight)
        if not number:
            self._check_push(batch)  # weight 0 pushes nothing, but a mistake must still raise
        return batch.weighted(number)

    def _checked_weight(self, call: str, keys: tuple[Key, ...], weight: Any) -> float:
        """Return the weight of a push. Raises InvalidArgument if it is invalid, or the store has no mean."""
        if self._reduction != "mean":
            raise InvalidArgument(
                f"{call} of key {keys[0]!r}: weight={weight!r} is for a mean, and this store has "
                f'reduction={self._reduction!r}; create it with reduction="mean", or multiply the values'
            )
        found = weight if type(weight) in (int, float) else number(weight)
        if not (found == 0 or MIN_WEIGHT <= found <= MAX_WEIGHT):
            raise InvalidArgument(
                f"{call} of key {keys[0]!r}: weight={weight!r} is not a number from {MIN_WEIGHT:g} to "
                f"{MAX_WEIGHT:g}, nor 0"
            )
        return float(found)

    def _names(self, keys: Names) -> tuple[Key, ...] | None:
        if keys is None:
            return None
        names = [keys] if isinstance(keys, (int, str)) else list(keys)
        checked = tuple(dict.fromkeys(check_keys(names, self._key_type)))
        check_new_keys(checked)
        return checked

    def _init_batch(self, key: Any, value: Any) -> tuple[PushBatch, list[Any]]:
        """Check the arguments of an init: one value per key, of a supported shape and dtype.

        Return them, and the value of each key as given.
        """
        names, given, _ = split_keys(key, value)
        batch = push_batch(names, given, self._key_type)
        _check_one_each("init", batch)
        check_new_keys(batch.keys)
        for name, (tensor,) in zip(batch.keys, batch.tensors, strict=True):
            shape_of(tensor, name)
            check_summable(tensor.dtype, name, mean=self._reduction == "mean")
        return batch, given


def _check_one_each(call: str, batch: PushBatch) -> None:
    """Raise if a key of an init or put has more than one value, or none."""
    for key, tensors in zip(batch.keys, batch.tensors, strict=True):
        if not tensors:
            raise InvalidArgument(f"{call}: key {key!r} has no value; ABSENT is for push")
        if len(tensors) != 1:
            raise DuplicateKey(f"{call}: key {key!r} has {len(tensors)} values in one call; pass one")


def _folder(call: str, directory: Any) -> str:
    """Return the absolute path of a folder. Every kind of store refuses a path that cannot be sent."""
    try:
        folder = os.path.abspath(os.fsdecode(directory))
    except TypeError as exc:
        raise InvalidArgument(f"{call}: {directory!r} is not a path") from exc
    if not directory:
        raise InvalidArgument(f"{call}: an empty path; '.' is the current folder")
    if "\0" in folder or not may_travel(str(folder)):
        raise InvalidArgument(
            f"{call}: {folder!r} cannot be a folder of saves: it holds a NUL, or no valid Unicode"
        )
    return folder
