"""EarlyPushes: gradients that leave while backward makes the next ones (`overlap`).

Parameters are in buckets, from the last to the first, as backward usually comes to them. A hook notices each
gradient, and when those of a bucket are there, it pushes them. `step` pushes the rest: buckets in which a
parameter got no gradient, or not as many as `accumulate` says. So the order in which backward makes gradients
changes when they leave, never what is summed.

What has left cannot be changed any more. A gradient that backward makes once more before `step`, or that the
script scales or replaces, is an error, and so are options and weights that change in between
(`ServerSteps._check_unchanged`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, final

import torch

from tensorkv.errors import InvalidValue
from tensorkv.keys import ABSENT
from tensorkv.store import KVStore
from tensorkv.training.gradients import Marks, call_after_accumulation, pushed_gradient
from tensorkv.training.windows import GradientWindows

BUCKET_BYTES = 1 << 20
"""Size in bytes from which on a bucket takes no further parameter. Small ones share the cost of a message."""

_CHANGED = (
    "the gradient of {names} has changed after it was sent to the servers, which overlap does during "
    "backward: {how}. Or pass overlap=False"
)
_AGAIN = (
    "if several backward passes make a step, pass accumulate=their number or run all but the last under "
    "optimizer.no_sync(); make a step after every backward; and let checkpoints be use_reentrant=False"
)
_IN_PLACE = "clip by max_norm=..., leave gradients as backward has made them, and step after every backward"


@final
class EarlyPushes:
    """Pushes the gradients of some parameters, each as early as it can.

    Args:
        kv: the store that has the parameters.
        parameters: by key.
        accumulate: number of backward passes in a step.
        begin: called before each push in a backward; returns False if `step` has to make it.
        apply: as in `KVStore.push`.
        uses_windows: whether gradients move to windows, which must not change until the weights are here.
    """

    def __init__(
        self,
        kv: KVStore,
        parameters: Mapping[str, torch.nn.Parameter],
        accumulate: int,
        begin: Callable[[], bool],
        apply: bool,
        uses_windows: bool,
    ) -> None:
        self.is_paused = False  # during a backward pass that does not count
        self._accumulate = accumulate
        self._begin = begin
        self._apply = apply
        parts = list(_cut(parameters))
        self._windows = GradientWindows(kv, *parts) if uses_windows else None
        self._buckets = [_Bucket(kv, part) for part in parts]
        self._bucket_of = {
            id(each): bucket for bucket in self._buckets for each in bucket.parameters.values()
        }
        self._num_passes = dict.fromkeys(self._bucket_of, 0)
        self._hooks = [call_after_accumulation(each, self._on_gradient) for each in parameters.values()]

    def _on_gradient(self, parameter: torch.Tensor) -> None:
        identity = id(parameter)
        bucket = self._bucket_of[identity]
        if bucket.sent is not None:
            name = next(name for name, each in bucket.parameters.items() if each is parameter)
            raise InvalidValue(_CHANGED.format(names=repr(name), how=_AGAIN))
        if self.is_paused:
            return
        self._num_passes[identity] += 1
        if self._num_passes[identity] != self._accumulate:
            return
        bucket.num_missing -= 1
        if not bucket.num_missing and self._begin():
            bucket.push(self._apply)

    def finish(self) -> None:
        """Push what is not pushed yet; the next gradients are those of the next step.

        Raises:
            InvalidValue: a gradient has changed since it was pushed.
        """
        for bucket in self._buckets:
            bucket.check()
        for bucket in self._buckets:
            if bucket.sent is None:
                bucket.push(self._apply)
            bucket.reset()
        self._num_passes = dict.fromkeys(self._num_passes, 0)

    def close(self) -> None:
        """Push nothing any more in a backward."""
        for hook in self._hooks:
            hook.remove()
        if self._windows is not None:
            self._windows.close()


@final
class _Bucket:
    """Parameters whose gradients leave in one push."""

    def __init__(self, kv: KVStore, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self.parameters = parameters
        self.sent: Marks | None = None  # of the gradients that are pushed
        self._gradients: dict[str, Any] = dict.fromkeys(parameters, ABSENT)
        self._step = kv.bind(push=self._gradients)
        self.reset()

    def reset(self) -> None:
        self.num_missing = len(self.parameters)
        self.sent = None

    def push(self, apply: bool) -> None:
        for name, each in self.parameters.items():
            self._gradients[name] = pushed_gradient(each)
        self._step.push(apply=apply)
        self.sent = Marks(list(self.parameters.values()))

    def check(self) -> None:
        """Raise InvalidValue if a gradient has changed since it was pushed."""
        if self.sent is not None and not self.sent.hold():
            names = " or ".join(map(repr, self.parameters))
            raise InvalidValue(_CHANGED.format(names=names, how=_IN_PLACE))


def _cut(parameters: Mapping[str, torch.nn.Parameter]) -> Iterator[dict[str, torch.nn.Parameter]]:
    """Yield buckets, from the last parameter to the first."""
    bucket: dict[str, torch.nn.Parameter] = {}
    for name, each in reversed(list(parameters.items())):
        bucket[name] = each
        if sum(each.nbytes for each in bucket.values()) >= BUCKET_BYTES:
            yield bucket
            bucket = {}
    if bucket:
        yield bucket
