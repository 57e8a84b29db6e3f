"""MXNetError, and the errors of TensorKV as ones of its kind.

What a store raises under MXNet's names is caught by `except MXNetError` as well as by the error's own
class: `tensorkv.compat.base.KeyNotInitialized` is both `tensorkv.errors.KeyNotInitialized` and MXNetError.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tensorkv import errors


class MXNetError(RuntimeError):
    """Base of what is raised under MXNet's names."""


def _as_mxnet_class(error_class: type[errors.TensorKVError]) -> type[errors.TensorKVError]:
    body = {"__module__": __name__, "__doc__": error_class.__doc__}
    return type(error_class.__name__, (error_class, MXNetError), body)


_CLASSES: dict[type[errors.TensorKVError], type[errors.TensorKVError]] = {
    each: _as_mxnet_class(each)
    for each in vars(errors).values()
    if isinstance(each, type) and issubclass(each, errors.TensorKVError)
}
globals().update({each.__name__: each for each in _CLASSES.values()})  # where pickle looks for them


def translate(error: errors.TensorKVError) -> errors.TensorKVError:
    """Return `error` as one that is an MXNetError too, with the same text, cause and traceback."""
    if isinstance(error, MXNetError):
        return error
    translated = _CLASSES.get(type(error), _CLASSES[errors.TensorKVError])(*error.args)
    translated.__cause__ = error.__cause__
    return translated.with_traceback(error.__traceback__)


@contextmanager
def mxnet_errors() -> Iterator[None]:
    """Let errors of TensorKV leave the `with` as MXNetErrors."""
    try:
        yield
    except errors.TensorKVError as exc:
        translated = translate(exc)
        raise translated from translated.__cause__
