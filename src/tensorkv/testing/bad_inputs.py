"""Table of user mistakes: the call, the error it must raise, and that it changes nothing."""

from __future__ import annotations

import os
import select
import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tensorkv import errors
from tensorkv.keys import ABSENT
from tensorkv.plain import Key
from tensorkv.store import KeyInfo, KVStore
from tensorkv.testing.suite import DEADLINE_S, StoreMaker, check, full, in_one, raises, same

Snapshot = dict[Key, tuple[torch.Tensor, KeyInfo]]


@dataclass(frozen=True, slots=True)
class BadInput:
    """A call that must be refused.

    `call(kv)` runs in a store with the str keys of `prepare`. It must raise `error`, a subclass of
    `standard` too, with every one of `texts` in its text.
    """

    name: str
    call: Callable[[KVStore], Any]
    error: type[errors.TensorKVError]
    standard: type[Exception]
    texts: tuple[str, ...] = ()

    def run(self, maker: StoreMaker) -> None:
        """Make the call in a store of its own and assert that nothing has changed."""
        in_one(maker, self._refused)

    def _refused(self, kv: KVStore) -> None:
        prepare(kv)
        before = snapshot(kv)
        error = raises(self.error, lambda: self.call(kv), *self.texts)
        assert isinstance(error, self.standard), f"{error!r} is no {self.standard.__name__}"
        assert_unchanged(kv, before)
        assert_usable(kv)


def prepare(kv: KVStore) -> None:
    """Give a store a matrix "w", a vector "b" and integers "n", and push "w" once."""
    kv.init({"w": full(1), "b": full(2, 3), "n": torch.tensor([3, 4])})
    kv.set_updater("add")
    kv.push("w", full(4))


def snapshot(kv: KVStore) -> Snapshot:
    """Return all values and all info of the keys."""
    return {key: (kv.pull(key), kv.info(key)) for key in kv.keys()}  # noqa: SIM118  (a store is no dict)


def assert_unchanged(kv: KVStore, before: Snapshot) -> None:
    """Assert that keys, values, versions and rounds are unchanged."""
    assert kv.keys() == list(before) and len(kv) == len(before), f"the keys are now {kv.keys()}"
    for key, (value, info) in before.items():
        same(kv.pull(key), value, f"{key!r} after the refused call")
        assert kv.info(key) == info, f"{kv.info(key)} after the refused call, {info} before"


def assert_usable(kv: KVStore) -> None:
    """Assert that the updater is still "add", and that the store works."""
    kv.push(["w", "n"], [full(1), torch.tensor([1, 1])])
    same(kv.pull("w"), 6.0, "w, after a good push")
    same(kv.pull("n"), torch.tensor([4, 5]), "n, after a good push")


def _readonly() -> np.ndarray[Any, Any]:
    array = np.zeros((2, 3), np.float32)
    array.flags.writeable = False
    return array


def _nested(layout: torch.layout = torch.strided) -> torch.Tensor:
    with warnings.catch_warnings():  # torch warns that they are a prototype
        warnings.simplefilter("ignore", UserWarning)
        return torch.nested.nested_tensor([full(1, 3), full(1, 2)], layout=layout)


def _inference() -> torch.Tensor:
    with torch.inference_mode():
        return full(0)


def _int(*shape: int) -> torch.Tensor:
    return torch.ones(shape or (2, 3), dtype=torch.int64)


def _raise_lr(kv: KVStore) -> None:
    kv.set_optimizer_options(lr=0.5)


def _keys() -> list[BadInput]:
    one = full(1)
    missing, type_error = errors.KeyNotInitialized, errors.InvalidKey
    return [
        BadInput("push_unknown", lambda kv: kv.push("x", one), missing, KeyError, ("'x'",)),
        BadInput("pull_unknown", lambda kv: kv.pull("x"), missing, KeyError, ("'x'",)),
        BadInput("pushpull_unknown", lambda kv: kv.pushpull("x", one), missing, KeyError, ("'x'",)),
        BadInput("info_unknown", lambda kv: kv.info("x"), missing, KeyError, ("'x'",)),
        BadInput("delete_unknown", lambda kv: kv.delete("x"), missing, KeyError, ("'x'",)),
        BadInput("delete_one_unknown", lambda kv: kv.delete(["w", "x"]), missing, KeyError, ("'x'",)),
        BadInput("push_one_unknown", lambda kv: kv.push(["w", "x"], [one, one]), missing, KeyError, ("'x'",)),
        BadInput("push_dict_unknown", lambda kv: kv.push({"w": one, "x": one}), missing, KeyError, ("'x'",)),
        BadInput("push_absent_unknown", lambda kv: kv.push("x", ABSENT), missing, KeyError, ("'x'",)),
        BadInput("pull_one_unknown", lambda kv: kv.pull(["w", "x"]), missing, KeyError, ("'x'",)),
        BadInput("put_unknown", lambda kv: kv.put("x", one), missing, KeyError, ("'x'",)),
        BadInput("put_one_unknown", lambda kv: kv.put(["w", "x"], [one, one]), missing, KeyError, ("'x'",)),
        BadInput("push_no_unicode", lambda kv: kv.push("\ud800", one), missing, KeyError, ("ud800",)),
        BadInput("pull_no_unicode", lambda kv: kv.pull("\ud800"), missing, KeyError, ("ud800",)),
        BadInput("info_no_unicode", lambda kv: kv.info("\ud800"), missing, KeyError, ("ud800",)),
        BadInput("delete_no_unicode", lambda kv: kv.delete(["w", "\ud800"]), missing, KeyError, ("ud800",)),
        BadInput("bool_key", lambda kv: kv.push(True, one), type_error, TypeError, ("True", "bool")),
        BadInput("none_key", lambda kv: kv.push(None, one), type_error, TypeError, ("None",)),
        BadInput("pull_nothing", lambda kv: kv.pull(), type_error, TypeError, ("None",)),
        BadInput("float_key", lambda kv: kv.pull(1.5), type_error, TypeError, ("1.5",)),
        BadInput("bytes_key", lambda kv: kv.init(b"k", one), type_error, TypeError, ("b'k'",)),
        BadInput("bool_info", lambda kv: kv.info(False), type_error, TypeError, ("False",)),
        BadInput("int_key", lambda kv: kv.push(3, one), type_error, TypeError, ("3", "str")),
        BadInput("init_int_key", lambda kv: kv.init(3, one), type_error, TypeError, ("3", "str")),
        BadInput("mixed_keys", lambda kv: kv.push(["w", 3], [one, one]), type_error, TypeError, ("3", "'w'")),
        BadInput("mixed_dict", lambda kv: kv.pull(out={"w": one, 3: one}), type_error, TypeError, ("3",)),
        BadInput("one_bool", lambda kv: kv.pull(["w", True]), type_error, TypeError, ("True",)),
    ]


def _init() -> list[BadInput]:
    one = full(1)
    twice = errors.KeyAlreadyInitialized
    return [
        BadInput("init_twice", lambda kv: kv.init("w", one), twice, ValueError, ("'w'", "delete")),
        BadInput("init_one_twice", lambda kv: kv.init(["x", "w"], [one, one]), twice, ValueError, ("'w'",)),
        BadInput("broadcast_twice", lambda kv: kv.broadcast("w", one, full(0)), twice, ValueError, ("'w'",)),
        BadInput(
            "broadcast_same_key",
            lambda kv: kv.broadcast(["x", "x"], [one, one], [full(0), full(0)]),
            errors.DuplicateKey,
            ValueError,
            ("'x'",),
        ),
        BadInput(
            "broadcast_second_shape",
            lambda kv: kv.broadcast(["x", "y"], [one, one], [full(0), full(0, 3)]),
            errors.ShapeMismatch,
            ValueError,
            ("'y'", "(3,)", "(2, 3)"),
        ),
        BadInput(
            "broadcast_int",
            lambda kv: kv.broadcast("x", one, _int()),
            errors.DtypeMismatch,
            TypeError,
            ("'x'", "int64", "float32"),
        ),
        BadInput(
            "init_uint16",
            lambda kv: kv.init(["x", "y"], [one, torch.zeros(2, dtype=torch.uint16)]),
            errors.InvalidValue,
            TypeError,
            ("'y'", "uint16"),
        ),
        BadInput(
            "init_surrogate", lambda kv: kv.init("\ud800", one), errors.InvalidKey, TypeError, ("ud800",)
        ),
        BadInput(
            "init_same_key",
            lambda kv: kv.init(["x", "x"], [one, one]),
            errors.DuplicateKey,
            ValueError,
            ("'x'", "2"),
        ),
        BadInput(
            "init_devices", lambda kv: kv.init("x", [one, one]), errors.DuplicateKey, ValueError, ("'x'", "2")
        ),
        BadInput(
            "init_absent", lambda kv: kv.init("x", ABSENT), errors.InvalidArgument, ValueError, ("'x'",)
        ),
        BadInput(
            "broadcast_shape",
            lambda kv: kv.broadcast("x", one, full(0, 4)),
            errors.TensorKVError,
            ValueError,
            ("(4,)", "(2, 3)"),
        ),
    ]


def _shapes() -> list[BadInput]:
    one, turned = full(1), full(1, 3, 2)
    shape, dtype = errors.ShapeMismatch, errors.DtypeMismatch
    shapes, w = ("'w'", "(3, 2)", "(2, 3)"), "'w'"
    return [
        BadInput("push_shape", lambda kv: kv.push("w", turned), shape, ValueError, shapes),
        BadInput("push_device_shape", lambda kv: kv.push("w", [one, turned]), shape, ValueError, shapes),
        BadInput(
            "push_one_shape", lambda kv: kv.push({"b": full(1, 3), "w": turned}), shape, ValueError, shapes
        ),
        BadInput("push_broadcastable", lambda kv: kv.push("w", full(1, 1)), shape, ValueError, (w, "(1,)")),
        BadInput("push_scalar", lambda kv: kv.push("w", torch.tensor(1.0)), shape, ValueError, (w, "()")),
        BadInput("pushpull_shape", lambda kv: kv.pushpull("w", turned), shape, ValueError, shapes),
        BadInput("pushpull_out", lambda kv: kv.pushpull("w", one, turned), shape, ValueError, shapes),
        BadInput("put_shape", lambda kv: kv.put("w", turned), shape, ValueError, shapes),
        BadInput("put_int", lambda kv: kv.put("w", _int()), dtype, TypeError, (w, "int64", "float32")),
        BadInput("put_one_int", lambda kv: kv.put({"b": full(1, 3), "w": _int()}), dtype, TypeError, (w,)),
        BadInput("push_int", lambda kv: kv.push("w", _int()), dtype, TypeError, (w, "int64", "float32")),
        BadInput(
            "push_float", lambda kv: kv.push("n", full(1, 2)), dtype, TypeError, ("'n'", "float32", "int64")
        ),
        BadInput("push_int32", lambda kv: kv.push("n", _int(2).int()), dtype, TypeError, ("int32", "int64")),
        BadInput("push_complex", lambda kv: kv.push("w", one + 0j), dtype, TypeError, (w, "complex64")),
        BadInput("push_bool", lambda kv: kv.push("n", _int(2).bool()), dtype, TypeError, ("'n'", "bool")),
        BadInput("push_device_int", lambda kv: kv.push("w", [one, _int()]), dtype, TypeError, (w, "int64")),
        BadInput("pushpull_int", lambda kv: kv.pushpull("w", _int()), dtype, TypeError, (w, "int64")),
    ]


def _lengths() -> list[BadInput]:
    one, out = full(1), full(0)
    error, value = errors.LengthMismatch, errors.InvalidValue
    return [
        BadInput(
            "push_short", lambda kv: kv.push(["w", "b"], [one]), error, ValueError, ("2 keys", "1 value")
        ),
        BadInput(
            "push_long", lambda kv: kv.push(["w"], [one, one]), error, ValueError, ("1 key", "2 values")
        ),
        BadInput("pull_short", lambda kv: kv.pull(["w", "b"], [out]), error, ValueError, ("2", "1")),
        BadInput("init_short", lambda kv: kv.init(["x", "y"], [one]), error, ValueError, ("2", "1")),
        BadInput("put_short", lambda kv: kv.put(["w", "b"], [one]), error, ValueError, ("2 keys", "1 value")),
        BadInput(
            "put_devices", lambda kv: kv.put("w", [one, one]), errors.DuplicateKey, ValueError, ("'w'", "2")
        ),
        BadInput(
            "put_absent",
            lambda kv: kv.put("w", ABSENT),
            errors.InvalidArgument,
            ValueError,
            ("'w'", "ABSENT"),
        ),
        BadInput("push_empty", lambda kv: kv.push([], []), error, ValueError, ("empty",)),
        BadInput("push_empty_dict", lambda kv: kv.push({}), error, ValueError, ("empty",)),
        BadInput("pull_empty", lambda kv: kv.pull([]), error, ValueError, ("empty",)),
        BadInput("pull_empty_dict", lambda kv: kv.pull(out={}), error, ValueError, ("empty",)),
        BadInput("init_empty", lambda kv: kv.init([], []), error, ValueError, ("empty",)),
        BadInput("delete_empty", lambda kv: kv.delete([]), error, ValueError, ("empty",)),
        BadInput("no_devices", lambda kv: kv.push("w", []), error, ValueError, ("'w'", "empty")),
        BadInput("no_outs", lambda kv: kv.pull("w", []), error, ValueError, ("'w'", "empty")),
        BadInput("tensor_for_list", lambda kv: kv.push(["w", "b"], one), value, TypeError, ("2 keys",)),
        BadInput("dict_and_value", lambda kv: kv.push({"w": one}, one), value, TypeError, ("dict",)),
        BadInput(
            "pushpull_other_keys",
            lambda kv: kv.pushpull({"w": one}, out={"b": full(0, 3)}),
            errors.InvalidArgument,
            ValueError,
        ),
    ]


def _values() -> list[BadInput]:
    one = full(1)
    value, out = errors.InvalidValue, errors.InvalidOut
    words = np.array([["a", "b", "c"]] * 2)
    return [
        BadInput("none_value", lambda kv: kv.push("w", None), value, TypeError, ("'w'", "None")),
        BadInput("no_value", lambda kv: kv.push("w"), value, TypeError, ("'w'", "None")),
        BadInput("one_none", lambda kv: kv.push(["b", "w"], [full(1, 3), None]), value, TypeError, ("'w'",)),
        BadInput("device_none", lambda kv: kv.push("w", [one, None]), value, TypeError, ("'w'",)),
        BadInput("init_none", lambda kv: kv.init("x", None), value, TypeError, ("'x'",)),
        BadInput("number", lambda kv: kv.push("w", 1.0), value, TypeError, ("'w'", "float")),
        BadInput("object", lambda kv: kv.push("w", object()), value, TypeError, ("'w'", "object")),
        BadInput("numbers", lambda kv: kv.push("w", [1.0, 2.0]), value, TypeError, ("'w'", "float")),
        BadInput("text_array", lambda kv: kv.push("w", words), value, TypeError, ("'w'",)),
        BadInput("sparse", lambda kv: kv.push("w", one.to_sparse()), value, TypeError, ("'w'", "to_dense")),
        BadInput(
            "init_sparse", lambda kv: kv.init("x", one.to_sparse()), value, TypeError, ("'x'", "sparse")
        ),
        BadInput("meta", lambda kv: kv.push("w", one.to("meta")), value, TypeError, ("'w'", "meta")),
        BadInput("init_meta", lambda kv: kv.init("x", one.to("meta")), value, TypeError, ("'x'", "meta")),
        BadInput("nested", lambda kv: kv.push("w", _nested()), value, TypeError, ("'w'", "nested")),
        BadInput(
            "nested_device", lambda kv: kv.push("w", [one, _nested()]), value, TypeError, ("'w'", "nested")
        ),
        BadInput("init_nested", lambda kv: kv.init("x", _nested()), value, TypeError, ("'x'", "nested")),
        BadInput("put_nested", lambda kv: kv.put("w", _nested()), value, TypeError, ("'w'", "nested")),
        BadInput("out_nested", lambda kv: kv.pull("w", _nested()), value, TypeError, ("'w'", "nested")),
        BadInput(
            "jagged", lambda kv: kv.push("w", _nested(torch.jagged)), value, TypeError, ("'w'", "nested")
        ),
        BadInput(
            "out_inference", lambda kv: kv.pull("w", _inference()), out, ValueError, ("'w'", "inference")
        ),
        BadInput("out_readonly", lambda kv: kv.pull("w", _readonly()), out, ValueError, ("'w'", "read-only")),
        BadInput(
            "out_expanded", lambda kv: kv.pull("w", full(0, 1, 1).expand(2, 3)), out, ValueError, ("'w'",)
        ),
        BadInput(
            "out_shape", lambda kv: kv.pull("w", full(0, 3, 2)), errors.ShapeMismatch, ValueError, ("(3, 2)",)
        ),
        BadInput(
            "out_int", lambda kv: kv.pull("w", _int()), errors.DtypeMismatch, TypeError, ("'w'", "int64")
        ),
        BadInput("out_float", lambda kv: kv.pull("n", full(0, 2)), errors.DtypeMismatch, TypeError, ("'n'",)),
        BadInput("out_number", lambda kv: kv.pull("w", 3.0), value, TypeError, ("'w'", "float")),
        BadInput("out_meta", lambda kv: kv.pull("w", one.to("meta")), value, TypeError, ("'w'", "meta")),
        BadInput(
            "pushpull_out_readonly",
            lambda kv: kv.pushpull("w", one, _readonly()),
            out,
            ValueError,
            ("'w'", "read-only"),
        ),
    ]


def _settings() -> list[BadInput]:
    unknown, option, argument = errors.UnknownUpdater, errors.InvalidOption, errors.InvalidArgument
    refused, sgd = errors.UnsupportedOptimizer, torch.optim.SGD
    made = sgd([torch.nn.Parameter(full(1))], lr=0.1)
    groups = sgd([{"params": [torch.nn.Parameter(full(1))], "lr": lr} for lr in (0.1, 0.2)])
    return [
        BadInput(
            "updater_name", lambda kv: kv.set_updater("ad"), unknown, ValueError, ("'ad'", "add", "assign")
        ),
        BadInput(
            "optimizer_name", lambda kv: kv.set_optimizer("sdg"), unknown, ValueError, ("'sdg'", "'sgd'")
        ),
        BadInput(
            "optimizer_object", lambda kv: kv.set_optimizer(made, lr=0.2), option, TypeError, ("lr=", "SGD")
        ),
        BadInput(
            "optimizer_groups", lambda kv: kv.set_optimizer(groups), argument, ValueError, ("group 0", "SGD")
        ),
        BadInput("optimizer_class", lambda kv: kv.set_optimizer(dict), unknown, ValueError, ("dict",)),  # type: ignore[arg-type]
        BadInput(
            "option_name", lambda kv: kv.set_optimizer(sgd, rate=1), option, ValueError, ("rate", "SGD")
        ),
        BadInput(
            "option_value", lambda kv: kv.set_optimizer(sgd, lr=-1.0), option, ValueError, ("-1.0", "SGD")
        ),
        BadInput("option_type", lambda kv: kv.set_optimizer(sgd, lr="fast"), option, TypeError, ("fast",)),
        BadInput("option_object", lambda kv: kv.set_optimizer(sgd, lr=object()), option, TypeError, ("lr",)),
        BadInput("options_alone", _raise_lr, option, ValueError, ("lr", "set_optimizer")),
        BadInput(
            "options_keys", lambda kv: kv.set_optimizer_options(keys="w", lr=1), option, ValueError, ("w",)
        ),
        BadInput("lbfgs", lambda kv: kv.set_optimizer("lbfgs"), refused, ValueError, ("LBFGS", "closure")),
        BadInput(
            "sparse_adam",
            lambda kv: kv.set_optimizer(torch.optim.SparseAdam),
            refused,
            ValueError,
            ("SparseAdam", "sparse"),
        ),
        BadInput(
            "optimizer_keys",
            lambda kv: kv.set_optimizer(sgd, keys=[True], lr=1),
            errors.InvalidKey,
            TypeError,
            ("True",),
        ),
        BadInput(
            "option_long", lambda kv: kv.set_optimizer(sgd, lr=2**70), option, ValueError, ("lr", "64 bits")
        ),
        BadInput(
            "optimizer_keys_no_unicode",
            lambda kv: kv.set_optimizer(sgd, keys=["\ud800"], lr=1),
            errors.InvalidKey,
            TypeError,
            ("ud800",),
        ),
        BadInput(
            "max_norm_huge",
            lambda kv: kv.commit(max_norm=10**400),
            errors.InvalidArgument,
            ValueError,
            ("max_norm",),
        ),
        BadInput(
            "max_norm", lambda kv: kv.commit(max_norm=-1.0), errors.InvalidArgument, ValueError, ("-1.0",)
        ),
        BadInput(
            "barrier_timeout",
            lambda kv: kv.barrier(timeout_s=-1),
            errors.InvalidArgument,
            ValueError,
            ("timeout_s=-1",),
        ),
        BadInput(
            "max_norm_text",
            lambda kv: kv.commit(max_norm="1"),  # type: ignore[arg-type]
            errors.InvalidArgument,
            ValueError,
            ("'1'",),
        ),
        BadInput(
            "max_norms",
            lambda kv: kv.commit(max_norm=full(1)),  # type: ignore[arg-type]
            errors.InvalidArgument,
            ValueError,
            ("max_norm",),
        ),
    ]


def _folders() -> list[BadInput]:
    """Folders that no system call accepts, or whose path cannot be sent to the servers."""
    bad: dict[str, Any] = {
        "empty": "",
        "nul": "a\0b",
        "no_unicode": "/tmp/\udcff",
        "bytes": b"/tmp/\xff",
        "number": 3.5,
    }
    return [
        BadInput(
            f"{call}_{name}",
            lambda kv, call=call, folder=folder: getattr(kv, call)(folder),  # type: ignore[misc]
            errors.InvalidArgument,
            ValueError,
            (call,),
        )
        for call in ("save", "load")
        for name, folder in bad.items()
    ]


def _flags() -> list[BadInput]:
    """Flags take True or False only, not values that are merely truthy or falsy."""
    one: Any = full(1)
    bad: list[Any] = [1, 0, "no", None, torch.tensor(True), np.array([True])]
    calls: list[tuple[str, str, Callable[[KVStore, Any], Any]]] = [
        ("init", "whole", lambda kv, value: kv.init("x", one, whole=value)),
        ("push", "apply", lambda kv, value: kv.push("w", one, apply=value)),
        ("push", "async_op", lambda kv, value: kv.push("w", one, async_op=value)),
        ("pull", "async_op", lambda kv, value: kv.pull("w", async_op=value)),
        ("pushpull", "async_op", lambda kv, value: kv.pushpull("w", one, async_op=value)),
        ("commit", "skip", lambda kv, value: kv.commit(skip=value)),
        ("commit", "check_finite", lambda kv, value: kv.commit(check_finite=value)),
        ("commit", "apply", lambda kv, value: kv.commit(apply=value)),
        ("set_updater", "elementwise", lambda kv, value: kv.set_updater("assign", elementwise=value)),
    ]
    return [
        BadInput(
            f"{call}_{name}_{place}",
            lambda kv, make=make, value=value: make(kv, value),  # type: ignore[misc]
            errors.InvalidArgument,
            ValueError,
            (f"{name}={value!r}", "True"),
        )
        for call, name, make in calls
        for place, value in enumerate(bad)
    ]


BAD_INPUTS: list[BadInput] = [
    *_keys(),
    *_init(),
    *_shapes(),
    *_lengths(),
    *_values(),
    *_settings(),
    *_folders(),
    *_flags(),
]
"""Every mistake that one worker can make in one call."""


# ---- mistakes that take more than a call -------------------------------------------------------------


@check()
def check_bad_options_keep_the_optimizer(maker: StoreMaker) -> None:
    """A refused option leaves optimizer, options and momentum as they were, for every key."""

    def work(kv: KVStore) -> None:
        kv.init(["w", "b"], [full(0), full(0)])
        kv.set_optimizer("sgd", lr=1.0, momentum=0.5)
        kv.push("w", full(1))
        for bad in ({"lr": -1.0}, {"rate": 1.0}, {"lr": 0.5, "momentum": -1.0}, {"lr": "x"}):
            raises(errors.InvalidOption, lambda bad=bad: kv.set_optimizer_options(**bad))  # type: ignore[misc]
            raises(errors.InvalidOption, lambda bad=bad: kv.set_optimizer("sgd", **bad))  # type: ignore[misc]
        raises(errors.UnknownUpdater, lambda: kv.set_updater("?"))
        kv.push("w", full(1))
        same(kv.pull("w"), -2.5, "momentum and learning rate")

    in_one(maker, work)


@check()
def check_numpy_bools(maker: StoreMaker) -> None:
    """Flags accept NumPy's True and False."""

    def work(kv: KVStore) -> None:
        yes: Any = np.bool_(True)
        no: Any = np.bool_(False)
        kv.init("w", full(1), whole=yes)
        assert kv.push("w", full(2), apply=yes, async_op=no) is None
        same(kv.pull("w", async_op=yes).result(), 2.0)
        same(kv.pushpull("w", full(3), async_op=no), 3.0)

    in_one(maker, work)


@check()
def check_create_arguments(maker: StoreMaker) -> None:
    """create refuses a reduction, a store name and a timeout that make no sense."""
    options: list[dict[str, Any]] = [
        {"reduction": "max"},
        {"store": ""},
        {"store": 3},
        {"store": "\ud800"},
        {"timeout_s": 0},
        {"timeout_s": -1.0},
        {"timeout_s": "x"},
        {"timeout_s": 10**400},
    ]
    for option in options:
        raises(errors.InvalidArgument, lambda option=option: in_one(maker, _nothing, **option))  # type: ignore[misc]


@check()
def check_long_deadlines(maker: StoreMaker) -> None:
    """A timeout may be infinite."""

    def work(kv: KVStore) -> None:
        kv.init("w", full(1))
        kv.set_updater("add")
        kv.push("w", full(2))
        same(kv.pull("w", async_op=True).result(), 3.0)
        kv.barrier(timeout_s=1e300)

    in_one(maker, work, timeout_s=float("inf"))


@check()
def check_keys_that_do_not_fit(maker: StoreMaker) -> None:
    """An int key of more than 64 bits is refused when it is created; the largest that fit are fine."""

    def work(kv: KVStore) -> None:
        for key in (2**63, -(2**63) - 1, 2**80):
            raises(errors.InvalidKey, lambda key=key: kv.init(key, full(1)), "64 bits")  # type: ignore[misc]
        for key in (2**63 - 1, -(2**63)):
            kv.init(key, full(1))
            same(kv.pushpull(key, full(2)), 2.0)

    in_one(maker, work)


@check(only="sync")
def check_of_several_mistakes_the_same_is_told(maker: StoreMaker) -> None:
    """An unknown key comes before a push that awaits commit, and that before a wrong shape, in any order."""

    def work(kv: KVStore) -> None:
        kv.init({"w": full(1), "b": full(1, 3)})
        kv.push("w", full(2), apply=False)
        bad = {"b": full(1, 4), "w": full(1), "x": full(1)}
        for keys in (["b", "w", "x"], ["x", "w", "b"], ["w", "b", "x"]):
            values = [bad[key] for key in keys]
            for call in (kv.push, kv.pull, kv.pushpull, kv.put):
                raises(errors.KeyNotInitialized, lambda c=call, k=keys, v=values: c(k, v), "'x'")  # type: ignore[misc]
        for keys in (["b", "w"], ["w", "b"]):
            values = [bad[key] for key in keys]
            for call in (kv.push, kv.pull, kv.pushpull, kv.put):
                raises(errors.UncommittedPush, lambda c=call, k=keys, v=values: c(k, v), "'w'")  # type: ignore[misc]

    in_one(maker, work)


def _nothing(kv: KVStore) -> None:
    pass


@check()
def check_use_after_close(maker: StoreMaker) -> None:
    """Every call on a closed store raises StoreClosed; closing again is fine."""

    def work(kv: KVStore) -> None:
        kv.init("w", full(1))
        kv.close()
        kv.close()
        for call in _every_call(kv):
            error = raises(errors.StoreClosed, call, "closed")
            assert isinstance(error, RuntimeError)
        assert kv.closed and "closed" in repr(kv)

    in_one(maker, work)


@check()
def check_use_in_a_forked_child(maker: StoreMaker) -> None:
    """In a forked child every call is refused, and the parent's store goes on unharmed."""

    def work(kv: KVStore) -> None:
        kv.init("w", full(1))
        assert _in_fork(lambda: _refused_in_child(kv)) == 0, "a forked child could use the store"
        kv.push("w", full(2))
        same(kv.pull("w"), 2.0, "in the parent, after the child ended")

    if hasattr(os, "fork"):
        in_one(maker, work)


def _every_call(kv: KVStore) -> list[Callable[[], Any]]:
    return [
        lambda: kv.init("x", full(1)),
        lambda: kv.push("w", full(1)),
        lambda: kv.pull("w"),
        lambda: kv.pushpull("w", full(1)),
        lambda: kv.broadcast("x", full(1), full(1)),
        lambda: kv.commit(),
        lambda: kv.set_updater("add"),
        lambda: kv.set_optimizer("sgd", lr=1.0),
        lambda: kv.set_optimizer_options(lr=1.0),
        lambda: kv.barrier(),
        lambda: kv.keys(),
        lambda: kv.info("w"),
        lambda: kv.delete("w"),
        lambda: len(kv),
        lambda: "w" in kv,
        lambda: kv.__enter__(),
    ]


def _refused_in_child(kv: KVStore) -> int:
    """Return how many calls on the parent's store were not refused."""
    allowed = 0
    for call in _every_call(kv):
        try:
            call()
        except errors.StoreClosed as exc:
            allowed += str(os.getpid()) not in str(exc)
        else:
            allowed += 1
    kv.close()
    return allowed + (not kv.closed)


def _in_fork(child: Callable[[], int]) -> int:
    """Run `child` in a forked process and return the exit status it returns; 255 after an error."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():  # this test forks beside threads on purpose
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        status = 255
        try:
            status = child()
        finally:
            os._exit(status)  # skips clean-up of the parent's resources
    os.close(writer)
    ended, _, _ = select.select([reader], [], [], DEADLINE_S)  # end of file once the child has ended
    os.close(reader)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
