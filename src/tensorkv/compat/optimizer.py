"""MXNet's optimizers as the user writes them: a class, or `create` with a name, and MXNet's arguments.

They are descriptions. The arithmetic is in `tensorkv.compat.arithmetic` and runs where the value lives.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from tensorkv.compat import arithmetic
from tensorkv.compat.base import mxnet_errors
from tensorkv.errors import NotSupported
from tensorkv.updaters.optimizer import optimizer_spec


class Optimizer:
    """An optimizer with its options, for `KVStore.set_optimizer`. It is immutable."""

    __slots__ = ("_options",)  # so setting an MXNet attribute that is not supported here raises

    torch_class: ClassVar[type[torch.optim.Optimizer]]
    """The torch optimizer that a store runs."""

    without_effect: ClassVar[frozenset[str]] = frozenset()
    """Arguments that MXNet accepts and this optimizer ignores."""

    def __init__(self, **options: Any) -> None:
        """Set the options, with MXNet's names.

        Raises:
            InvalidOption: an unknown option, or an invalid value.
            NotSupported: an MXNet option that a TensorKV store does not support.
        """
        with mxnet_errors():
            used = {name: value for name, value in options.items() if name not in self.without_effect}
            self._options = _without_neutral(type(self).__name__, used)
            optimizer_spec(self.torch_class, self._options)

    @property
    def options(self) -> dict[str, Any]:
        """The given options, for the torch optimizer."""
        return dict(self._options)

    @property
    def learning_rate(self) -> float:
        """The learning rate. To change it, set another optimizer."""
        return float(self._options.get("learning_rate", 0.01))

    lr = learning_rate

    def __repr__(self) -> str:
        listed = ", ".join(f"{name}={value!r}" for name, value in self._options.items())
        return f"{type(self).__name__}({listed})"


class SGD(Optimizer):
    """Gradient descent: learning_rate=0.01, momentum=0.0, wd=0.0, rescale_grad=1.0, clip_gradient=None."""

    __slots__ = ()
    torch_class = arithmetic.SGD
    without_effect = frozenset({"begin_num_update"})


class Adam(Optimizer):
    """Adam: learning_rate=0.001, beta1=0.9, beta2=0.999, epsilon=1e-8, begin_num_update=0, and SGD's
    arguments wd, rescale_grad, clip_gradient.
    """

    __slots__ = ()
    torch_class = arithmetic.Adam

    @property
    def learning_rate(self) -> float:
        """The learning rate. To change it, set another optimizer."""
        return float(self._options.get("learning_rate", 0.001))

    lr = learning_rate


class Test(Optimizer):
    """Adds rescale_grad times the gradient."""

    __slots__ = ()
    torch_class = arithmetic.Test
    without_effect = frozenset({"begin_num_update", "clip_gradient", "learning_rate", "wd"})


_KNOWN: dict[str, type[Optimizer]] = {"sgd": SGD, "adam": Adam, "test": Test}

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "lazy_update": (True, False),  # for sparse gradients, which do not occur
    "learning_rate": (None,),
    "multi_precision": (False,),
    "param_idx2name": (None, {}),
    "lr_scheduler": (None,),
    "sym": (None,),
    "param_dict": (None, {}),
}
"""Values of MXNet's arguments that have no effect, so that they are omitted."""


def create(name: str, **kwargs: Any) -> Optimizer:
    """Return the optimizer called `name`, in any case, with MXNet's arguments.

    Raises:
        MXNetValueError: the name is unknown here.
        InvalidOption, NotSupported: as from the class.
    """
    with mxnet_errors():
        if not isinstance(name, str):
            raise TypeError(f"{name!r} is not the name of an optimizer")
        if name.lower() not in _KNOWN:
            known = ", ".join(repr(each) for each in sorted(_KNOWN))
            raise ValueError(f"there is no optimizer {name!r} of MXNet's here; known are {known}")
        return _KNOWN[name.lower()](**kwargs)


def _without_neutral(optimizer: str, options: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, value in options.items():
        if name in _NEUTRAL and value in _NEUTRAL[name]:
            continue
        if name in _NEUTRAL and name != "learning_rate":
            raise NotSupported(
                f"{optimizer}: {name}={value!r} is not supported; per-key settings and schedules are "
                "calls of a TensorKV store: set_optimizer(..., keys=[...]), set_optimizer_options(...)"
            )
        kept[name] = value
    return kept
