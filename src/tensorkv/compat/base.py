"""MXNetError, and subclasses of it for the errors of TensorKV and of Python.

Both `except MXNetError` and the error's own class catch the errors of MXNet's API:
`tensorkv.compat.base.KeyNotInitialized` is both `tensorkv.errors.KeyNotInitialized` and MXNetError, and
`MXNetIndexError` both IndexError and MXNetError.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tensorkv import errors


class MXNetError(RuntimeError):
    """Base of all errors of MXNet's API."""


def _as_mxnet_class(error_class: type[errors.TensorKVError]) -> type[errors.TensorKVError]:
    body = {"__module__": __name__, "__doc__": error_class.__doc__}
    return type(error_class.__name__, (error_class, MXNetError), body)


_CLASSES: dict[type[errors.TensorKVError], type[errors.TensorKVError]] = {
    each: _as_mxnet_class(each)
    for each in vars(errors).values()
    if isinstance(each, type) and issubclass(each, errors.TensorKVError)
}
globals().update({each.__name__: each for each in _CLASSES.values()})  # where pickle looks for them


class MXNetIndexError(MXNetError, IndexError):
    """An element that does not exist."""


class MXNetKeyError(MXNetError, KeyError):
    """An unknown name."""

    __str__ = Exception.__str__  # KeyError shows its text in quotes


class MXNetOverflowError(MXNetError, OverflowError):
    """A number that is too large."""


class MXNetTypeError(MXNetError, TypeError):
    """A value of an unsupported type."""


class MXNetValueError(MXNetError, ValueError):
    """An unsupported value."""


_STANDARD: dict[type[Exception], type[MXNetError]] = {
    IndexError: MXNetIndexError,
    KeyError: MXNetKeyError,
    OverflowError: MXNetOverflowError,
    TypeError: MXNetTypeError,
    ValueError: MXNetValueError,
    RuntimeError: MXNetError,
    ArithmeticError: MXNetError,
}
"""Python's errors and their MXNet classes. RuntimeError is torch's, ArithmeticError a division by zero."""

_TRANSLATED: tuple[type[Exception], ...] = (errors.TensorKVError, *_STANDARD)


def translate(error: Exception) -> Exception:
    """Return `error` as an MXNetError, with the same text, cause and traceback."""
    if isinstance(error, MXNetError):
        return error
    translated: Exception
    if isinstance(error, errors.TensorKVError):
        translated = _CLASSES.get(type(error), _CLASSES[errors.TensorKVError])(*error.args)
    else:
        of_its_kind = next(each for base, each in _STANDARD.items() if isinstance(error, base))
        translated = of_its_kind(*error.args)
    translated.__cause__ = error.__cause__
    return translated.with_traceback(error.__traceback__)


@contextmanager
def mxnet_errors() -> Iterator[None]:
    """Translate errors that leave the `with`, or the decorated function, to MXNetErrors."""
    try:
        yield
    except _TRANSLATED as exc:
        translated = translate(exc)
        raise translated from translated.__cause__
