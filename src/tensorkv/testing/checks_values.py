"""Checks of one worker: values in and out, in every form that the calls accept."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tensorkv.errors import InvalidKey, InvalidOut, KeyNotInitialized, LengthMismatch
from tensorkv.store import KVStore
from tensorkv.testing.suite import (
    StoreMaker,
    add_key,
    add_twice,
    check,
    full,
    in_one,
    raises,
    same,
)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OTHERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64, torch.complex128)


@check()
def check_tutorial(maker: StoreMaker) -> None:
    """MXNet's tutorial: init 2, push 8, four devices, an updater, lists of keys."""

    def work(kv: KVStore) -> None:
        kv.init(3, full(2))
        same(kv.pull(3), 2.0, "after init")
        kv.push(3, full(8))
        same(kv.pull(3), 8.0, "after push")
        kv.push(3, [full(1)] * 4)
        same(kv.pull(3), 4.0, "after four devices")
        kv.set_updater(add_twice)
        kv.push(3, full(1))
        same(kv.pull(3), 6.0, "after the updater stored += pushed * 2")
        keys = [5, 7, 9]
        kv.init(keys, [full(1)] * 3)
        kv.push(keys, [full(1)] * 3)
        outs = [[torch.empty(2, 3) for _ in range(4)] for _ in keys]
        kv.pull(keys, outs)
        for out in [each for devices in outs for each in devices]:
            same(out, 3.0, "after three keys")
        kv.push(keys, [[full(1)] * 4] * 3)
        kv.pull(keys, out=outs)
        for out in [each for devices in outs for each in devices]:
            same(out, 11.0, "after three keys from four devices")

    in_one(maker, work)


@check()
def check_assign_and_add(maker: StoreMaker) -> None:
    """By default a push replaces the value; "add" adds to it; None is "assign" again."""

    def work(kv: KVStore) -> None:
        kv.init("w", full(5))
        for value in (1.0, 2.0):
            kv.push("w", full(value))
            same(kv.pull("w"), value, "assign")
        kv.set_updater("add")
        kv.push("w", full(10))
        kv.push("w", full(10))
        same(kv.pull("w"), 22.0, "add")
        kv.set_updater(None)
        kv.push("w", full(3))
        same(kv.pull("w"), 3.0, "None")

    in_one(maker, work)


@check()
def check_empty_like(maker: StoreMaker) -> None:
    """Tensors of empty_like have their keys' shape and dtype; each push sends their current values."""

    def work(kv: KVStore) -> None:
        kv.init(["v", "w"], [full(5), torch.zeros(3, dtype=torch.float64)])
        found = kv.empty_like(["w", "v", "w"])
        assert isinstance(found, list)
        assert [(each.shape, each.dtype) for each in found] == [
            ((3,), torch.float64),
            ((2, 3), torch.float32),
            ((3,), torch.float64),
        ]
        alone = kv.empty_like("v")
        for step in range(3):
            alone.fill_(step)
            for number, each in enumerate(found):
                each.fill_(step + number)
            kv.push(["w", "v"], [[found[0], found[2]], found[1]])
            w, v = kv.pull(["w", "v"])
            same(w, 2.0 * step + 2, "two devices")
            same(v, step + 1.0, "one of a list")
            kv.push("v", alone)
            same(kv.pull("v", out=torch.empty(2, 3)), float(step), "alone")
        raises(KeyNotInitialized, lambda: kv.empty_like("x"), "'x'")
        raises(KeyNotInitialized, lambda: kv.empty_like(["v", "x"]), "'x'")
        raises(InvalidKey, lambda: kv.empty_like(None), "None")
        raises(LengthMismatch, lambda: kv.empty_like([]), "empty")

    in_one(maker, work)


@check()
def check_function_gets_the_key(maker: StoreMaker) -> None:
    """A function updater gets the key as the caller wrote it."""

    def work(kv: KVStore) -> None:
        kv.init([5, -7], [full(0), full(0)])
        kv.set_updater(add_key)
        kv.push([-7, 5], [full(1), full(2)])
        same(kv.pull(5), 10.0)
        same(kv.pull(-7), -7.0)

    in_one(maker, work)


@check()
def check_push_forms(maker: StoreMaker) -> None:
    """One key, a list or tuple of keys, a dict; per-device lists; the same tensor several times."""

    def work(kv: KVStore) -> None:
        kv.init({"a": full(0), "b": full(0, 4)})
        same(kv.pull("b"), full(0, 4))
        one = full(1)
        forms: list[tuple[Any, Any, float, float]] = [
            (["a", "b"], [full(1), full(2, 4)], 1, 2),
            (("b", "a"), ([full(3, 4)], (full(4), full(4))), 8, 3),
            ({"a": full(5), "b": [full(6, 4), full(1, 4)]}, None, 5, 7),
            (["a", "b"], [[one] * 3, full(9, 4)], 3, 9),
            (["a", "a", "b"], [one, [one, one], full(1, 4)], 3, 1),
        ]
        for key, value, a, b in forms:
            kv.push(key, value)
            same(kv.pull("a"), a, f"a after push({key!r})")
            same(kv.pull("b"), full(b, 4), f"b after push({key!r})")
        same(one, 1.0, "the pushed tensor")

    in_one(maker, work)


@check()
def check_pull_forms(maker: StoreMaker) -> None:
    """Without out, pull returns new tensors; else it writes to and returns `out`, in each form."""

    def work(kv: KVStore) -> None:
        kv.init(["a", "b"], [full(1), full(2)])
        listed = kv.pull(["b", "a", "b"])
        assert isinstance(listed, list) and len(listed) == 3
        for value, expected in zip(listed, (2.0, 1.0, 2.0), strict=True):
            same(value, expected)
        assert listed[0].data_ptr() != listed[2].data_ptr(), "two new tensors share memory"
        out = torch.empty(2, 3)
        assert kv.pull("a", out) is out and kv.pull("a", out=out) is out
        same(out, 1.0)
        outs = [torch.empty(2, 3), [torch.empty(2, 3), torch.empty(2, 3)]]
        assert kv.pull(["a", "b"], outs) is outs
        same(outs[0], 1.0)
        same(outs[1][0], 2.0)
        same(outs[1][1], 2.0)
        named = {"b": torch.empty(2, 3), "a": torch.empty(2, 3)}
        assert kv.pull(out=named) is named
        same(named["a"], 1.0)
        same(named["b"], 2.0)

    in_one(maker, work)


@check()
def check_aliased_outs(maker: StoreMaker) -> None:
    """A destination may appear several times; if it does for several keys, the last in list order wins."""

    def work(kv: KVStore) -> None:
        kv.init(["a", "b"], [full(1), full(2)])
        out = torch.empty(2, 3)
        kv.pull("a", [out] * 3)
        same(out, 1.0)
        kv.pull(["a", "b"], [out, out])
        same(out, 2.0, "the last key")
        kv.pull(["b", "a"], [[out, out], [out]])
        same(out, 1.0, "the last key")

    in_one(maker, work)


@check()
def check_pushpull(maker: StoreMaker) -> None:
    """pushpull is push then pull, in each form; even into the pushed tensors."""

    def work(kv: KVStore) -> None:
        kv.init(["a", "b"], [full(0), full(0)])
        kv.set_updater("add")
        same(kv.pushpull("a", full(1)), 1.0)
        out = torch.empty(2, 3)
        assert kv.pushpull("a", [full(1), full(1)], out) is out
        same(out, 3.0)
        listed = kv.pushpull(["b", "a"], [full(5), full(1)])
        same(listed[0], 5.0)
        same(listed[1], 4.0)
        named = kv.pushpull({"a": full(1), "b": full(1)})
        assert list(named) == ["a", "b"]
        same(named["a"], 5.0)
        same(named["b"], 6.0)
        grads = [full(10) for _ in range(3)]
        kv.pushpull("a", grads, out=grads)
        for each in grads:
            same(each, 35.0, "pulled into what was pushed")
        into = {"a": torch.empty(2, 3), "b": torch.empty(2, 3)}
        assert kv.pushpull({"b": full(1), "a": full(1)}, out=into) is into
        same(into["a"], 36.0)
        same(into["b"], 7.0)
        repeated = kv.pushpull(["a", "a"], [full(1), full(1)])
        assert len(repeated) == 1, "one result per distinct key"
        same(repeated[0], 38.0)

    in_one(maker, work)


@check()
def check_broadcast(maker: StoreMaker) -> None:
    """broadcast is init, then pull."""

    def work(kv: KVStore) -> None:
        outs = [torch.empty(2, 3) for _ in range(2)]
        assert kv.broadcast("a", full(3), outs) is outs
        for out in outs:
            same(out, 3.0)
        pair = [torch.empty(2, 3), torch.empty(4)]
        kv.broadcast(["b", "c"], [full(1), full(2, 4)], pair)
        same(pair[0], 1.0)
        same(pair[1], full(2, 4))
        same(kv.broadcast("d", full(7)), 7.0)
        assert kv.keys() == ["a", "b", "c", "d"]

    in_one(maker, work)


@check()
def check_numpy_and_dlpack(maker: StoreMaker) -> None:
    """NumPy arrays and arrays with __dlpack__ come in, and NumPy arrays and DLPack tensors go out."""

    class Exporter:
        """An array that supports only DLPack."""

        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

        def __dlpack__(self, **options: Any) -> Any:
            return self.tensor.__dlpack__(**options)

        def __dlpack_device__(self) -> Any:
            return self.tensor.__dlpack_device__()

    def work(kv: KVStore) -> None:
        kv.init("a", np.full((2, 3), 2, np.float32))
        same(kv.pull("a"), 2.0)
        readonly = np.full((2, 3), 3, np.float32)
        readonly.flags.writeable = False
        kv.push("a", [readonly, full(1), Exporter(full(2))])
        out = np.zeros((2, 3), np.float32)
        assert kv.pull("a", out) is out
        assert (out == 6).all(), f"NumPy out is {out}"
        wide = np.zeros((3, 4), np.float64)
        kv.pull("a", wide.T[1:3])
        assert (wide[:, 1:3] == 6).all() and wide.sum() == 36, f"a view of NumPy as out: {wide}"
        target = Exporter(torch.zeros(2, 3))
        kv.pull("a", target)
        same(target.tensor, 6.0)

    in_one(maker, work)


@check()
def check_parameters(maker: StoreMaker) -> None:
    """Pulling into a parameter keeps it a leaf, and autograd notices that it changed."""

    def work(kv: KVStore) -> None:
        parameter = torch.nn.Parameter(full(1))
        kv.init("w", parameter)
        kv.set_updater("assign")  # the default; set it to avoid the warning
        kv.push("w", parameter * 2)  # has an autograd history; the store takes only the numbers
        before = parameter._version
        loss = (parameter * parameter).sum()
        kv.pull("w", [parameter])
        same(parameter.detach(), 2.0)
        assert parameter.is_leaf and parameter.requires_grad
        assert parameter._version > before, "autograd was not told of the change"
        raises(RuntimeError, loss.backward, "modified by an inplace operation")

    in_one(maker, work)


@check()
def check_state_dict(maker: StoreMaker) -> None:
    """A model goes in as a dict and comes back by pull(out=model.state_dict())."""

    def work(kv: KVStore) -> None:
        source, target = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
        kv.init(dict(source.named_parameters()))
        kv.pull(out=target.state_dict())
        for name, parameter in source.named_parameters():
            same(target.state_dict()[name], parameter.detach(), name)
        kv.pull(list(kv.keys()), out=list(target.parameters()))

    in_one(maker, work)


@check()
def check_views_that_cannot_be_out(maker: StoreMaker) -> None:
    """A store accepts a conjugated view in push, and refuses it as out without writing anything."""

    def work(kv: KVStore) -> None:
        number = full(1, 2) + 2j
        kv.init("w", number.conj())
        same(kv.pull("w"), full(1, 2) - 2j)
        kv.push("w", [number.conj(), number.conj()])
        same(kv.pull("w"), full(2, 2) - 4j)
        for call in (kv.pull, lambda key, out: kv.pushpull(key, number, out)):
            raises(InvalidOut, lambda call=call: call("w", number.conj()), "'w'", "resolve_conj")  # type: ignore[misc]
        same(number, full(1, 2) + 2j)
        same(kv.pull("w"), full(2, 2) - 4j)

    in_one(maker, work)


@check()
def check_views(maker: StoreMaker) -> None:
    """Transposed, strided and partial tensors work in push and pull; memory beside them does not change."""

    def work(kv: KVStore) -> None:
        base = torch.arange(24.0).reshape(4, 6)
        kv.init("t", base.t())
        same(kv.pull("t"), base.t().contiguous())
        kv.init("s", base[::2, 1::2])
        kv.push("s", [base[::2, 1::2], base[1::2, ::2]])
        same(kv.pull("s"), base[::2, 1::2] + base[1::2, ::2])
        big = torch.full((6, 4), -1.0)
        kv.pull("s", big[1:5:2, :3])
        same(big[1:5:2, :3], base[::2, 1::2] + base[1::2, ::2])
        assert int((big == -1).sum()) == 24 - 6, "a pull wrote beside its out"
        wide = torch.empty(4, 6)
        kv.pull("t", wide.t())
        same(wide, base)
        kv.push("t", full(2, 1, 1).expand(6, 4))
        same(kv.pull("t"), full(2, 6, 4))

    in_one(maker, work)
