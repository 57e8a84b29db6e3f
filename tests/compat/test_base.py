"""Errors under MXNet's names are caught as MXNetError and as TensorKV's own."""

from __future__ import annotations

import pickle

import pytest

from tensorkv import errors
from tensorkv.compat.base import MXNetError, mxnet_errors, translate

ALL = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, Exception)]


@pytest.mark.parametrize("error_class", ALL, ids=lambda each: each.__name__)
def test_every_error_is_both_and_survives_pickle(error_class: type[errors.TensorKVError]) -> None:
    translated = translate(error_class("the text"))
    again = pickle.loads(pickle.dumps(translated))
    for error in (translated, again):
        assert isinstance(error, MXNetError)
        assert isinstance(error, error_class)
        assert str(error) == "the text"
        assert type(error).__name__ == error_class.__name__
    assert errors.to_wire(translated) == errors.to_wire(error_class("the text"))


def test_cause_and_traceback_are_kept() -> None:
    cause = ValueError("why")

    def fail() -> None:
        raise errors.UpdaterError("what") from cause

    with pytest.raises(MXNetError) as info, mxnet_errors():
        fail()
    assert info.value.__cause__ is cause
    assert "fail" in [entry.name for entry in info.traceback]


@pytest.mark.parametrize(
    "error_class",
    [IndexError, KeyError, OverflowError, TypeError, ValueError, RuntimeError, ZeroDivisionError],
)
def test_errors_of_python_are_mxnet_errors_of_their_kind(error_class: type[Exception]) -> None:
    with pytest.raises(MXNetError) as info, mxnet_errors():
        raise error_class("the text")
    assert isinstance(info.value, error_class) or error_class is ZeroDivisionError
    again = pickle.loads(pickle.dumps(info.value))
    assert (type(again), str(again)) == (type(info.value), "the text")


def test_other_errors_pass_as_they_are() -> None:
    for error in (AssertionError("mine"), MXNetError("mine"), translate(errors.StoreClosed("mine"))):
        with pytest.raises(type(error)) as info, mxnet_errors():
            raise error
        assert info.value is error


def test_a_class_of_somebody_else_is_an_mxnet_error_all_the_same() -> None:
    class Own(errors.TensorKVError): ...

    assert isinstance(translate(Own("x")), MXNetError)
