"""BoundStep: a training step whose tensors are worked out once. `KVStore.bind` makes it.

A store's verbs find out in each call which keys they were given, and whether their tensors are like those of
the last call. A step knows its keys, and needs to know only whether it reads the tensors it read last time.
If so it passes them on with the store's plan, as a batch that is `known`; else it does what the verb does.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, ItemsView, Iterator, Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Any, final

import torch
from torch.nn.parameter import is_lazy

from tensorkv.arguments import flag
from tensorkv.arrays import addresses_of
from tensorkv.errors import (
    DuplicateKey,
    InvalidArgument,
    KeyDeleted,
    KeyNotInitialized,
    LengthMismatch,
)
from tensorkv.keys import Form, PullBatch, PushBatch, check_keys, named_values, pull_batch, push_batch
from tensorkv.plain import Key
from tensorkv.tracers import opaque_methods
from tensorkv.work import Work

if TYPE_CHECKING:
    from tensorkv.store import KVStore


_dtype_of = attrgetter("dtype")
MAX_MISSES = 3
"""Number of calls in a row with other tensors than in the last; after that a step no longer compares them."""


@final
class _Named:
    """The tensors under the names of one argument of `bind`, as they are now."""

    def __init__(self, name: str, given: Any, key_type: type | None) -> None:
        if isinstance(given, (Iterator, ItemsView)):
            given = list(given)
        named = named_values(given)
        if named is None:
            raise InvalidArgument(
                f"bind({name}=...): pass a dict, pairs or a module, not {type(given).__name__}: a step needs "
                "the key of each tensor"
            )
        self.given = given
        self.keys = check_keys(named[0], key_type)
        if len(set(self.keys)) < len(self.keys):
            raise DuplicateKey(f"bind({name}=...): a key appears twice; give it a list of its tensors")
        self._name = name
        self._read = _reader(name, given, self.keys, named[1])
        self._last: list[weakref.ref[Any]] = []  # of the values of the last call: none is kept alive
        self._singles: list[torch.Tensor] | None = None  # what stands for them, if not they themselves
        self._views: Any = None  # of their memory, by the store
        self._addresses: list[int] = []
        self._dtypes: list[torch.dtype] = []
        self._plan: Any = None
        self._num_misses = 0
        self.values: list[Any] | None = None  # that a call is passing to the store, and did not know

    def read(self) -> list[Any]:
        """Return the present values.

        Raises:
            LengthMismatch: a name is gone, or the dict has others now.
        """
        try:
            return self._read()
        except KeyError as exc:
            raise LengthMismatch(
                f"bind({self._name}=...): {exc.args[0]!r} is gone from what was given; bind again"
            ) from None

    def plan_of(self, values: list[Any]) -> Any:
        """Return the plan by which the store knows these values, None if they are not those of last time.

        The same tensor may have other memory by now, as after `module.half()`, or none.
        """
        plan = self._plan
        if plan is None or plan.dropped:
            return None
        if not all(map(operator.is_, map(operator.call, self._last), values)):
            self._num_misses += 1
            return None
        if addresses_of(values) != self._addresses:  # also if a value is None, as a dead reference is
            return None
        if self._dtypes and not all(map(operator.is_, map(_dtype_of, values), self._dtypes)):
            return None
        self._num_misses = 0
        return plan

    def tensors_of(self, values: list[Any], store: KVStore, async_op: bool) -> list[torch.Tensor]:
        """Return what stands for values that `plan_of` has found.

        Without views if the call may copy when it has returned: the tensors may lie elsewhere then.
        """
        tensors = values if self._singles is None else self._singles
        return tensors if async_op or self._views is None else store._viewed(tensors, self._views)

    def note(self, singles: list[torch.Tensor] | None, plan: Any, store: KVStore) -> None:
        """Note what a call has passed to the store, one tensor per key, and the plan by which it knows them.

        It does not pay if the tensors are new in each call, like gradients after `zero_grad()`.
        """
        values, self.values, self._plan = self.values, None, None
        if values is None or plan is None or singles is None or self._num_misses >= MAX_MISSES:
            return
        others = None if all(map(operator.is_, values, singles)) else singles
        if others is not None and not all(isinstance(each, torch.nn.Parameter) for each in values):
            return  # an array, say, of which each call makes a tensor
        self._last, self._singles = list(map(weakref.ref, values)), others
        self._addresses = addresses_of(values)
        self._views = store._views_of(plan, singles, self._name == "push")
        # A view keeps its memory alive, so no tensor of another dtype can lie there.
        self._dtypes = list(map(_dtype_of, values)) if self._views is None else []
        self._plan = plan  # last: the rest counts only with a plan, and Ctrl-C may come in between


def _reader(name: str, given: Any, keys: tuple[Key, ...], values: list[Any]) -> Callable[[], list[Any]]:
    """Return a function that reads the present values of `given` under `keys`; `values` are those of now."""
    if isinstance(given, torch.nn.Module):
        return _ModuleReader(given, keys, grads=name == "push")
    if isinstance(given, Mapping):

        def read() -> list[Any]:
            if len(given) != len(keys):
                raise LengthMismatch(
                    f"bind({name}=...): the dict had {len(keys)} keys, and has {len(given)} now; bind again"
                )
            return list(get(given))

        get = operator.itemgetter(*keys) if len(keys) > 1 else lambda given: [given[keys[0]]]
        return read
    return lambda: values


@final
class _ModuleReader:
    """Reads the parameters of a module by their names, or their gradients."""

    def __init__(self, module: torch.nn.Module, keys: tuple[Key, ...], grads: bool) -> None:
        self._module = module
        self._keys = keys
        self._grads = grads
        self._find()

    def __call__(self) -> list[Any]:
        if not all(owners.get(name) is module for owners, name, module in self._modules):
            self._find()  # a submodule was replaced
        found = [owner[name] for owner, name in self._places]
        for key, each in zip(self._keys, found, strict=True):
            if each is None:
                raise KeyError(key)
        return list(map(_gradient, found)) if self._grads else found

    def _find(self) -> None:
        """Find the dicts that hold the parameters, and the submodules on the way to them."""
        modules: dict[int, tuple[dict[str, Any], str, Any]] = {}
        self._places: list[tuple[dict[str, Any], str]] = []
        for key in self._keys:
            owner, (*path, last) = self._module, str(key).split(".")
            for name in path:
                inner = owner._modules.get(name)
                if inner is None:
                    raise KeyError(key)
                modules[id(inner)] = owner._modules, name, inner
                owner = inner
            if last not in owner._parameters:
                raise KeyError(key)
            self._places.append((owner._parameters, last))
        self._modules = list(modules.values())


def _gradient(parameter: Any) -> Any:
    return parameter if is_lazy(parameter) else parameter.grad


@final
@opaque_methods
class BoundStep:
    """What a training step pushes and pulls, worked out once: see `KVStore.bind`, which makes it.

    Its calls raise what the store's verbs raise, and KeyDeleted once a key was deleted or a save was loaded.
    Between two calls, do not change shape, strides or dtype of a tensor that stays the same object in the
    same memory, as `resize_` and `t_` do. A step keeps the memory of small tensors alive that it used last.
    """

    def __init__(self, store: KVStore, push: Any, out: Any) -> None:
        if push is None and out is None:
            raise InvalidArgument("bind(): pass what to push, what to pull into (out), or both")
        self._store = store
        self._push = None if push is None else _Named("push", push, store._key_type)
        self._out = None if out is None else _Named("out", out, store._key_type)
        sides = [side for side in (self._push, self._out) if side is not None]
        self._keys = tuple(dict.fromkeys(key for side in sides for key in side.keys))
        self._num_retired = store.num_retired
        self._ids = store._ids_of(self._keys)

    def push(self, *, apply: bool = True, weight: float | None = None, async_op: bool = False) -> Work | None:
        """Push the bound tensors: `KVStore.push`.

        Example:
            ```python
            kv = tensorkv.create("local")
            kv.init("w", torch.zeros(2))
            step = kv.bind(push={"w": torch.ones(2)})
            step.push()
            print(kv.pull("w"))  # tensor([1., 1.])
            ```
        """
        store, side = self._store, self._begin("push")
        apply, async_op = flag("apply", apply), flag("async_op", async_op)
        batch = self._batch_to_push(side, async_op)
        found = store._push(store._ready_to_push("push", batch, weight), apply, async_op)
        self._note_push(side, batch)
        return found

    def pull(self, *, async_op: bool = False) -> Any:
        """Pull into the bound tensors: `KVStore.pull`. Returns what was bound as `out`, or a Work.

        Example:
            ```python
            kv = tensorkv.create("local")
            kv.init("w", torch.ones(2))
            mine = {"w": torch.zeros(2)}
            step = kv.bind(out=mine)
            step.pull()
            print(mine["w"])  # tensor([1., 1.])
            ```
        """
        side = self._begin("pull")
        async_op = flag("async_op", async_op)
        batch = self._batch_to_pull(side, async_op)
        found = self._store._pull(batch, async_op)
        self._note_pull(side, batch)
        return found

    def pushpull(self, *, weight: float | None = None, async_op: bool = False) -> Any:
        """Push the bound tensors, and pull the same keys into the bound `out`: `KVStore.pushpull`.

        Raises:
            InvalidArgument: `push` and `out` were not bound with the same keys.

        Example:
            ```python
            kv = tensorkv.create("local")
            kv.init("w", torch.zeros(2))
            kv.set_updater("add")
            mine = {"w": torch.zeros(2)}
            step = kv.bind(push={"w": torch.ones(2)}, out=mine)
            step.pushpull()
            step.pushpull()
            print(mine["w"])  # tensor([2., 2.])
            ```
        """
        store, pushed = self._store, self._begin("pushpull")
        pulled = self._out
        if pulled is None or (pushed.keys != pulled.keys and set(pushed.keys) != set(pulled.keys)):
            raise InvalidArgument("pushpull of a step: bind push and out with the same keys")
        async_op = flag("async_op", async_op)
        to_push, to_pull = self._batch_to_push(pushed, async_op), self._batch_to_pull(pulled, async_op)
        found = store._pushpull(store._ready_to_push("pushpull", to_push, weight), to_pull, async_op)
        self._note_push(pushed, to_push)
        self._note_pull(pulled, to_pull)
        return found

    def __repr__(self) -> str:
        return f"<a step of {len(self._keys)} keys of {self._store!r}>"

    def _begin(self, call: str) -> _Named:
        """Return the side that a call needs, after checking that its keys are those of `bind`."""
        store = self._store
        store._check_usable(call)
        num_retired = store.num_retired
        if num_retired != self._num_retired:
            self._check_keys(call)
            self._num_retired = num_retired
        side = self._out if call == "pull" else self._push
        if side is None:
            raise InvalidArgument(
                f"{call} of a step without {'out' if call == 'pull' else 'push'}: pass it to bind()"
            )
        return side

    def _check_keys(self, call: str) -> None:
        try:
            if self._store._ids_of(self._keys) == self._ids:
                return
        except KeyNotInitialized:
            pass  # the same, for who has bound it
        raise KeyDeleted(f"{call} of a step: a key was deleted, or loaded, after bind(); bind the new ones")

    def _batch_to_push(self, side: _Named, async_op: bool) -> PushBatch:
        values = side.read()
        plan = side.plan_of(values)
        if plan is not None:
            tensors = side.tensors_of(values, self._store, async_op)
            return PushBatch(side.keys, None, None, tensors, plan)
        side.values = values
        return push_batch(list(side.keys), values, self._store._key_type, self._store._plan_of_push)

    def _note_push(self, side: _Named, batch: PushBatch) -> None:
        """Note what was pushed: the next call knows it again."""
        if side.values is not None:
            plan = batch.known or self._store._plan_of_push(side.keys, batch.singles or [])
            side.note(batch.singles, plan, self._store)

    def _batch_to_pull(self, side: _Named, async_op: bool) -> PullBatch:
        outs = side.read()
        plan = side.plan_of(outs)
        if plan is not None:
            tensors = side.tensors_of(outs, self._store, async_op)
            return PullBatch(side.keys, None, Form.DICT, side.given, tensors, plan)
        side.values = outs
        batch = pull_batch(list(side.keys), outs, self._store._key_type, self._store._plan_of_pull)
        batch.form, batch.given = Form.DICT, side.given
        return batch

    def _note_pull(self, side: _Named, batch: PullBatch) -> None:
        if side.values is not None:
            plan = batch.known or self._store._plan_of_pull(side.keys, batch.singles or [])
            side.note(batch.singles, plan, self._store)
