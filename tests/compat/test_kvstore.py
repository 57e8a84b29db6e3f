"""MXNet's KVStore translates arguments and errors to those of the store underneath."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tensorkv import errors
from tensorkv.compat import mxnet as mx
from tensorkv.compat.kvstore import KVStore
from tensorkv.compat.ndarray import MXNetUpdater, NDArray
from tensorkv.updaters.functions import CodeRef, describe, load

SHAPE = (2, 3)


@pytest.fixture
def kv() -> Iterator[KVStore]:
    store = mx.kv.create("local")
    yield store
    store.close()


def pulled(kv: KVStore, key: Any) -> Any:
    out = mx.nd.zeros(SHAPE)
    kv.pull(key, out=out)
    assert (out.asnumpy() == out.asnumpy()[0, 0]).all()
    return out[0, 0].asscalar()


def test_who_it_is(kv: KVStore) -> None:
    assert (kv.type, kv.rank, kv.num_workers) == ("local", 0, 1)
    kv._barrier()
    assert mx.kv.create().type == "local"
    assert mx.kvstore.create("device").type == "device"


def test_push_of_one_several_and_the_same_value_several_times(kv: KVStore) -> None:
    kv.init("w", mx.nd.ones(SHAPE))
    kv.push("w", mx.nd.ones(SHAPE) * 3)
    assert pulled(kv, "w") == 3
    kv.push("w", [mx.nd.ones(SHAPE, mx.cpu(i)) for i in range(4)])
    assert pulled(kv, "w") == 4
    kv.push("w", [mx.nd.ones(SHAPE)] * 5)
    assert pulled(kv, "w") == 5


def test_lists_of_keys_with_grouped_values(kv: KVStore) -> None:
    keys = [5, 7]
    kv.init(keys, [mx.nd.ones(SHAPE)] * 2)
    kv.push(keys, [[mx.nd.ones(SHAPE)] * 2, [mx.nd.ones(SHAPE)] * 3])
    assert [pulled(kv, 5), pulled(kv, 7)] == [2, 3]
    outs = [[mx.nd.zeros(SHAPE, mx.cpu(i)) for i in range(2)] for _ in keys]
    kv.pull(keys, out=outs, priority=3, ignore_sparse=False)
    assert [[int(out[0, 0].asscalar()) for out in group] for group in outs] == [[2, 2], [3, 3]]
    kv.push([5, 5], [mx.nd.ones(SHAPE)] * 2)
    assert pulled(kv, 5) == 2


def test_pushpull_writes_into_out_or_into_the_value(kv: KVStore) -> None:
    kv.init(3, mx.nd.zeros(SHAPE))
    values, out = [mx.nd.ones(SHAPE) for _ in range(2)], mx.nd.zeros(SHAPE)
    kv.pushpull(3, values, out=out)
    assert (out[0, 0].asscalar(), values[0][0, 0].asscalar()) == (2, 1)
    kv.pushpull(3, values)
    assert [value[0, 0].asscalar() for value in values] == [2, 2]


def test_broadcast(kv: KVStore) -> None:
    outs = [mx.nd.zeros(SHAPE) for _ in range(2)]
    kv.broadcast("w", mx.nd.ones(SHAPE) * 4, outs)
    assert [out[0, 0].asscalar() for out in outs] == [4, 4]
    with pytest.raises(mx.MXNetError):
        kv.broadcast("w", mx.nd.ones(SHAPE), outs)


@pytest.mark.parametrize("key", [3, "w"])
def test_an_updater_gets_the_key_and_arrays_it_changes_in_place(kv: KVStore, key: Any) -> None:
    seen: list[Any] = []

    def update(key: Any, pushed: NDArray, stored: NDArray) -> None:
        seen.append((key, type(pushed), pushed.context))
        stored[:] = stored + pushed * 10

    kv.init(key, mx.nd.ones(SHAPE))
    kv._set_updater(update)
    pushed = mx.nd.ones(SHAPE)
    kv.push(key, [pushed, pushed])
    assert pulled(kv, key) == 21
    assert seen == [(key, NDArray, mx.cpu(0))]
    assert pushed[0, 0].asscalar() == 1


def test_an_updater_that_raises_changes_nothing(kv: KVStore) -> None:
    def update(key: Any, pushed: NDArray, stored: NDArray) -> None:
        stored[:] = 9
        raise ValueError("no good")

    kv.init(3, mx.nd.ones(SHAPE))
    kv._set_updater(update)
    with pytest.raises(errors.UpdaterError, match="no good") as info:
        kv.push(3, mx.nd.ones(SHAPE))
    assert isinstance(info.value, mx.MXNetError)
    assert pulled(kv, 3) == 1
    assert kv.store.info(3).updater.endswith("update")


def test_optimizers_run_in_the_store_and_keep_their_state(kv: KVStore) -> None:
    kv.init(3, mx.nd.zeros(SHAPE))
    kv.set_optimizer(mx.optimizer.SGD(learning_rate=1.0, momentum=0.5))
    kv.push(3, mx.nd.ones(SHAPE))
    kv.push(3, mx.nd.ones(SHAPE))
    assert pulled(kv, 3) == -2.5
    kv.set_optimizer(mx.optimizer.create("test", rescale_grad=2.0))
    kv.push(3, mx.nd.ones(SHAPE))
    assert pulled(kv, 3) == -0.5


def kinds() -> list[Any]:
    return [
        pytest.param("local", {}, id="local"),
        pytest.param("device", {}, id="device"),
        pytest.param("dist_sync", {"embedded": True, "num_servers": 2}, id="dist_sync"),
        pytest.param("dist_async", {"embedded": True, "num_servers": 2}, id="dist_async"),
    ]


@pytest.mark.parametrize(("kind", "options"), kinds())
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: mx.optimizer.SGD(learning_rate=1.0, momentum=0.5), [-1.0, -3.5, -6.5, -12.0, -17.0]),
        (lambda: mx.optimizer.Adam(learning_rate=1.0), [-1.0, -1.9652, -2.9652, -3.9625, -4.9625]),
        (lambda: mx.optimizer.Test(), [1.0, 3.0, 6.0, 10.0, 15.0]),
    ],
)
def test_an_optimizer_that_is_set_again_starts_afresh(
    kind: str, options: dict[str, Any], make: Any, expected: list[float]
) -> None:
    """The values are those of MXNet 1.9.1, whose optimizer is set before the first, third and fifth push."""
    store = mx.kv.create(kind, **options)
    store.init(3, mx.nd.zeros(SHAPE))
    got = []
    for number in range(1, 6):
        if number % 2:
            store.set_optimizer(make())
        store.push(3, mx.nd.ones(SHAPE) * number)
        got.append(pulled(store, 3))
    store.close()
    assert got == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda kv: kv.pull("lost", out=mx.nd.zeros(SHAPE)), errors.KeyNotInitialized),
        (lambda kv: kv.push("lost", mx.nd.zeros(SHAPE)), errors.KeyNotInitialized),
        (lambda kv: kv.init("w", mx.nd.zeros(SHAPE)), errors.KeyAlreadyInitialized),
        (lambda kv: kv.push("w", mx.nd.zeros((3,))), errors.ShapeMismatch),
        (lambda kv: kv.pull("w", out=mx.nd.zeros((3,))), errors.ShapeMismatch),
        (lambda kv: kv.pull("w", out=mx.nd.zeros(SHAPE, dtype="int32")), errors.DtypeMismatch),
        (lambda kv: kv.pull("w"), errors.InvalidOut),
        (lambda kv: kv.push(3, mx.nd.zeros(SHAPE)), errors.InvalidKey),
        (lambda kv: kv.push(["w"], []), errors.LengthMismatch),
        (lambda kv: kv.push("w", None), errors.InvalidValue),
        (lambda kv: kv.push("w", "text"), errors.InvalidValue),
        (lambda kv: kv.push(None, mx.nd.zeros(SHAPE)), errors.InvalidKey),
        (lambda kv: kv.init("v", 3), errors.InvalidValue),
        (lambda kv: kv.init(["v", "x"], [mx.nd.zeros(SHAPE)]), errors.LengthMismatch),
        (lambda kv: kv.init(["v", "v"], [mx.nd.zeros(SHAPE)] * 2), errors.DuplicateKey),
        (lambda kv: kv.pull("w", out=3), errors.InvalidValue),
        (lambda kv: kv.pushpull("w", mx.nd.zeros((3,))), errors.ShapeMismatch),
        (lambda kv: kv.pushpull("w", mx.nd.zeros(SHAPE), out=mx.nd.zeros((3,))), errors.ShapeMismatch),
        (lambda kv: kv.set_optimizer(3), errors.UnknownUpdater),
        (lambda kv: kv._set_updater(3), errors.UnknownUpdater),
        (lambda kv: mx.kv.create(3), TypeError),
        (lambda kv: mx.optimizer.create(3), TypeError),
        (lambda kv: mx.optimizer.create("nope"), ValueError),
        (lambda kv: mx.kv.create("nope"), errors.UnknownKind),
    ],
)
def test_errors_are_both_mxnets_and_tensorkvs(kv: KVStore, call: Any, error: type[Exception]) -> None:
    kv.init("w", mx.nd.ones(SHAPE))
    with pytest.raises(mx.MXNetError) as info:
        call(kv)
    assert isinstance(info.value, error)
    assert pulled(kv, "w") == 1


def test_a_distributed_store_outside_a_job() -> None:
    with pytest.raises(errors.NotInJob) as info:
        mx.kv.create("dist_sync")
    assert isinstance(info.value, mx.MXNetError)


def test_a_closed_store(kv: KVStore) -> None:
    kv.close()
    with pytest.raises(errors.StoreClosed) as info:
        kv.push(3, mx.nd.ones(SHAPE))
    assert isinstance(info.value, mx.MXNetError)
    with pytest.raises(TypeError, match="name must be a string"):
        mx.kv.create(3)  # type: ignore[arg-type]


def module_level_update(key: Any, pushed: NDArray, stored: NDArray) -> None:
    stored += pushed * 2


def test_an_updater_travels_to_servers_with_the_name_of_its_function() -> None:
    ref = describe(MXNetUpdater(module_level_update))
    assert ref == CodeRef(
        module=__name__, name="module_level_update", adapter="tensorkv.compat.ndarray:MXNetUpdater"
    )
    loaded = load(ref, [__name__])
    stored = mx.nd.ones(SHAPE)
    loaded(3, mx.nd.ones(SHAPE).tensor, stored.tensor)
    assert stored[0, 0].asscalar() == 3
    optimizer = mx.optimizer.SGD()
    assert load(describe(optimizer.torch_class), ()) is optimizer.torch_class
