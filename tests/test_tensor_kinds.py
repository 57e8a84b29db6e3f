"""Every kind of tensor that torch has, in every verb: it works with the right value, or is refused by name.

Whatever becomes of it, the store goes on, and so does everybody else of the job.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tensorkv
from tensorkv.errors import InvalidOut, InvalidValue, MemoryLimitReached, WaitTimeout
from tensorkv.store import KVStore
from tensorkv.testing.cluster import run_job

BASE = torch.arange(1.0, 7.0).reshape(2, 3)


class Named(torch.Tensor):
    """A subclass that changes nothing."""


class Parameter(torch.nn.Parameter):
    """A subclass of a parameter, as quantising libraries make them."""


class Refusing(torch.Tensor):
    """A subclass whose own functions refuse everything; its memory is as good as any."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise ValueError("refuses every function")


class Wrapper(torch.Tensor):
    """A tensor without memory of its own, around another."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, tensor: torch.Tensor) -> Wrapper:
        made: Wrapper = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, tensor.shape, dtype=tensor.dtype, device=tensor.device
        )
        made.inner = tensor
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(item: Any) -> Any:
            return item.inner if isinstance(item, Wrapper) else item

        found = func(*map(plain, args), **{name: plain(item) for name, item in (kwargs or {}).items()})
        return Wrapper(found) if isinstance(found, torch.Tensor) else found


class Quantised(Wrapper):
    """As the tensors of quantising libraries are."""

    def dequantize(self) -> torch.Tensor:
        return self.inner


class NoOperation(Wrapper):
    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError("no operation")


class Stored(torch.Tensor):
    """A tensor with memory of its own, each operation on which is Python's."""

    @staticmethod
    def __new__(cls, tensor: torch.Tensor) -> Stored:
        return torch.Tensor._make_subclass(cls, tensor)  # type: ignore[attr-defined,no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError("refuses every operation")


def _dtensor(tensor: torch.Tensor) -> torch.Tensor:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    made: torch.Tensor = distribute_tensor(tensor, init_device_mesh("cpu", (1,)), [Shard(0)])
    return made


def _of_collective(tensor: torch.Tensor) -> torch.Tensor:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    made: torch.Tensor = AsyncCollectiveTensor(tensor)
    return made


def _masked(tensor: torch.Tensor) -> torch.Tensor:
    from torch.masked import masked_tensor

    made: torch.Tensor = masked_tensor(tensor, tensor > 2)
    return made


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    made: torch.Tensor = FakeTensorMode().from_tensor(tensor)
    return made


def _functional(tensor: torch.Tensor) -> torch.Tensor:
    from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

    with FunctionalTensorMode():
        return FunctionalTensor.to_functional(tensor)


def _escaped_from(transform: Callable[..., Any], tensor: torch.Tensor) -> torch.Tensor:
    """Return what a function that is transformed got, after the transform has ended."""
    found: list[torch.Tensor] = []

    def note(given: torch.Tensor) -> torch.Tensor:
        found.append(given)
        return given.sum()

    transform(note)(tensor)
    return found[0]


def _freed(tensor: torch.Tensor, start: int = 0) -> torch.Tensor:
    flat = torch.cat([torch.zeros(start), tensor.flatten()])
    part = flat[start:].view(tensor.shape)
    flat.untyped_storage().resize_(0)
    return part


def _made_in_inference_mode(tensor: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return tensor.clone()


def _per_channel(tensor: torch.Tensor) -> torch.Tensor:
    scales, zeros = torch.tensor([0.1, 0.1]), torch.tensor([0, 0])
    return torch.quantize_per_channel(tensor, scales, zeros, 0, torch.quint8)


@dataclass(frozen=True)
class Kind:
    """A kind of tensor, made of BASE, and what becomes of it.

    Torch itself reads freed memory, and dies of it. A store looks whether a tensor has any, but not again at
    each tensor of a list that was pushed before.
    """

    make: Callable[[torch.Tensor], Any]
    reads: bool = True
    writes: bool = True
    text: str = ""  # of the error
    value: torch.Tensor | None = None  # what it reads as, if not BASE
    looked_at: bool = True  # also in a list of keys that was pushed before


def _refused(make: Callable[[torch.Tensor], Any], text: str, looked_at: bool = True) -> Kind:
    return Kind(make, reads=False, writes=False, text=text, looked_at=looked_at)


KINDS: dict[str, Kind] = {
    "plain": Kind(torch.Tensor.clone),
    "parameter": Kind(torch.nn.Parameter),
    "frozen parameter": Kind(lambda t: torch.nn.Parameter(t, requires_grad=False)),
    "buffer": Kind(torch.nn.Buffer),
    "subclass of parameter": Kind(Parameter),
    "subclass": Kind(lambda t: t.as_subclass(Named)),
    "subclass whose functions raise": Kind(lambda t: t.as_subclass(Refusing)),
    "with a history": Kind(lambda t: t.requires_grad_() * 1),
    "of inference mode": Kind(_made_in_inference_mode, writes=False, text="inference"),
    "transposed": Kind(lambda t: t.t().contiguous().t()),
    "strided": Kind(lambda t: torch.stack([t, t], -1)[..., 0]),
    "interlaced": Kind(
        lambda t: torch.zeros(12).as_strided((2, 3), (3, 2)).copy_(t),  # 0 2 4 and 3 5 7
    ),
    "view": Kind(lambda t: torch.stack([t, t])[1]),
    "result of a collective": Kind(_of_collective),
    "negated": Kind(lambda t: torch._neg_view(-t), writes=False, text="negates"),
    "imaginary part": Kind(lambda t: torch.complex(t * 0, -t).conj().imag, writes=False, text="resolve_neg"),
    "expanded": Kind(
        lambda t: t[:1].expand(2, 3), writes=False, text="share memory", value=BASE[:1].expand(2, 3)
    ),
    "sliding window": Kind(
        lambda t: torch.arange(10.0).as_strided((2, 3), (1, 1)),
        writes=False,
        text="share memory",
        value=torch.tensor([[0.0, 1.0, 2.0], [1.0, 2.0, 3.0]]),
    ),
    "zeros without memory": Kind(
        lambda t: torch._efficientzerotensor(t.shape), writes=False, text="zeros", value=torch.zeros(2, 3)
    ),
    "DTensor": _refused(_dtensor, "full_tensor\\(\\).*to_local\\(\\)"),
    "parameter of a DTensor": _refused(lambda t: torch.nn.Parameter(_dtensor(t)), "full_tensor\\(\\)"),
    "masked": _refused(_masked, "get_data\\(\\)"),
    "quantised": _refused(lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "dequantize\\(\\)"),
    "quantised by channel": _refused(_per_channel, "dequantize\\(\\)"),
    "quantised by a library": _refused(Quantised, "dequantize\\(\\)"),
    "wrapper": _refused(Wrapper, "wraps"),
    "wrapper without operations": _refused(NoOperation, "wraps"),
    "subclass without operations": _refused(Stored, "plain tensor"),
    "nested": _refused(lambda t: torch.nested.nested_tensor([t, t[:1]]), "nested"),
    "jagged": _refused(lambda t: torch.nested.nested_tensor([t, t[:1]], layout=torch.jagged), "nested"),
    "COO": _refused(torch.Tensor.to_sparse, "to_dense\\(\\)"),
    "CSR": _refused(torch.Tensor.to_sparse_csr, "to_dense\\(\\)"),
    "CSC": _refused(torch.Tensor.to_sparse_csc, "to_dense\\(\\)"),
    "BSR": _refused(lambda t: t.to_sparse_bsr((1, 1)), "to_dense\\(\\)"),
    "BSC": _refused(lambda t: t.to_sparse_bsc((1, 1)), "to_dense\\(\\)"),
    "mkldnn": _refused(torch.Tensor.to_mkldnn, "to_dense\\(\\)"),
    "meta": _refused(lambda t: t.to("meta"), "meta"),
    "fake": _refused(_fake, "FakeTensorMode"),
    "functional": _refused(_functional, "wraps"),
    "functional, wrapped": _refused(torch._to_functional_tensor, "no memory"),
    "of func.grad, after it": Kind(lambda t: _escaped_from(torch.func.grad, t)),
    "of vmap": _refused(lambda t: _escaped_from(torch.vmap, torch.stack([t, t])), "torch.vmap"),
    "freed": _refused(_freed, "freed", looked_at=False),
    "part of what was freed": _refused(
        lambda t: _freed(t.transpose(0, 1).contiguous().t(), 5), "freed", looked_at=False
    ),
    "lazy parameter": _refused(lambda t: torch.nn.LazyLinear(3).weight, "call forward once"),
    "lazy buffer": _refused(lambda t: torch.nn.LazyBatchNorm1d().running_mean, "call forward once"),
    "nothing": _refused(lambda t: None, ""),
    "number": _refused(lambda t: 1.5, "float"),
}

STORES: dict[str, dict[str, Any]] = {
    "local": {},
    "device": {},
    "dist_sync": {"embedded": True, "num_servers": 2},
    "dist_async": {"embedded": True, "transport": "shm"},
}


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """A process group of this process alone, without which torch makes no DTensor."""
    # Not gloo: a cache of DTensor's, of this thread, outlives the test with the group in it. A child that
    # another thread forks drops the cache, and waits for ever for the group's threads, which it has not got.
    fake = importlib.import_module("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(params=STORES)
def kv(request: pytest.FixtureRequest) -> Iterator[KVStore]:
    """A store of each kind that meets all kinds of tensor, one after the other, and goes on."""
    with tensorkv.create(request.param, timeout_s=50, **STORES[request.param]) as made:
        made.init(["w", "b"], [torch.zeros(2, 3), torch.zeros(2, 3)])
        yield made


@contextmanager
def naming(kind: object) -> Iterator[None]:
    """Say of which kind a test was true until then."""
    try:
        yield
    except BaseException as exc:
        exc.add_note(f"the kind is {kind!r}")
        raise


def make(name: str) -> Any:
    with warnings.catch_warnings():  # some kinds are prototypes
        warnings.simplefilter("ignore")
        return KINDS[name].make(BASE.clone())


def reading(kv: KVStore, key: str, value: Any) -> dict[str, Callable[[], Any]]:
    """Return calls that read `value` as that of `key`, which is there unless the call is an init."""
    return {
        "push": lambda: kv.push(key, value),
        "push of a list": lambda: kv.push(["b", key], [BASE, value]),
        "push again": lambda: kv.push(["b", key], [BASE, value]),
        "push of a dict": lambda: kv.push({key: value}),
        "pushpull": lambda: kv.pushpull(key, value),
        "pushpull of a list": lambda: kv.pushpull(["b", key], [BASE, value]),
        "pushpull later": lambda: kv.pushpull(key, value, async_op=True).wait(),
        "put": lambda: kv.put(key, value),
    }


def creating(kv: KVStore, value: Any) -> dict[str, Callable[[], Any]]:
    """Return calls that make the keys they are named by, and read `value`."""
    return {
        "init": lambda: kv.init("init", value),
        "init2": lambda: kv.init(["init2", "more"], [value, BASE]),
        "init3": lambda: kv.init({"init3": value}),
        "broadcast": lambda: kv.broadcast("broadcast", value, torch.zeros(2, 3)),
    }


def writing(kv: KVStore, out: Any) -> dict[str, Callable[[], Any]]:
    """Return calls that write the value of "w" to `out`."""
    return {
        "pull": lambda: kv.pull("w", out),
        "pull into a dict": lambda: kv.pull(out={"w": out}),
        "pull into a list": lambda: kv.pull(["b", "w"], [torch.zeros(2, 3), out]),
        "pull into devices": lambda: kv.pull("w", [torch.zeros(2, 3), out]),
        "pull later": lambda: kv.pull("w", out, async_op=True).wait(),
        "pushpull": lambda: kv.pushpull("w", BASE, out),
        "broadcast": lambda: kv.broadcast("new w", BASE, out),
    }


def good_calls(kv: KVStore) -> None:
    """Make calls that are known later, and leave BASE in both keys."""
    for _ in range(2):
        kv.push(["b", "w"], [BASE, BASE])
        kv.pushpull(["b", "w"], [BASE, BASE], [torch.zeros(2, 3), torch.zeros(2, 3)])
    assert all(each.equal(BASE) for each in kv.pull(["b", "w"]))


@pytest.mark.parametrize("names", [list(KINDS)[start::3] for start in range(3)], ids="abc")
def test_a_value_of_any_kind(kv: KVStore, names: list[str]) -> None:
    for name in names:
        with naming(name):
            check_value(kv, KINDS[name], make(name))


def check_value(kv: KVStore, kind: Kind, value: Any) -> None:
    expected = BASE if kind.value is None else kind.value
    for what, call in creating(kv, value).items():
        if kind.reads:
            call()
            assert kv.pull(what).equal(expected), what
            kv.delete([what, "more"] if what == "init2" else what)
        else:
            with pytest.raises(InvalidValue, match=f"'{what}'.*{kind.text}"):
                call()
            assert kv.keys() == ["w", "b"]
    key = "w"
    for what in reading(kv, key, value):
        if kind.looked_at:
            good_calls(kv)
        else:  # in a list that was never pushed before
            key = f"new {what}"
            kv.init(key, BASE)
        call = reading(kv, key, value)[what]
        if kind.reads:
            call()
            assert kv.pull(key).equal(expected), what
        else:
            with pytest.raises(InvalidValue, match=f"'{key}'.*{kind.text}"):
                call()
            assert kv.pull(key).equal(BASE), what
        if key != "w":
            kv.delete(key)
    for devices in ([BASE, value], [value, BASE]):
        if kind.reads:
            kv.push("w", devices)
            assert kv.pull("w").equal(BASE + expected)
        else:
            with pytest.raises(InvalidValue, match=f"'w'.*{kind.text}"):
                kv.push("w", devices)
    good_calls(kv)


@pytest.mark.parametrize("names", [list(KINDS)[start::3] for start in range(3)], ids="abc")
def test_an_out_of_any_kind(kv: KVStore, names: list[str]) -> None:
    for name in names:
        if name != "nothing":  # None asks for a new tensor
            with naming(name):
                check_out(kv, KINDS[name], make(name))


def check_out(kv: KVStore, kind: Kind, out: Any) -> None:
    good_calls(kv)
    for what, call in writing(kv, out).items():
        if kind.writes:
            with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
                torch.Tensor.zero_(out)
            call()
            with torch._C.DisableTorchFunctionSubclass():
                assert torch.equal(out.detach().as_subclass(torch.Tensor), BASE), what
        else:
            with pytest.raises((InvalidValue, InvalidOut), match=f"w'.*{kind.text}"):
                call()
    if kind.writes:
        kv.delete("new w")
    assert kv.keys() == ["w", "b"]
    good_calls(kv)


DTYPES = sorted({each for each in vars(torch).values() if isinstance(each, torch.dtype)}, key=str)


@pytest.mark.filterwarnings("ignore")  # some dtypes are experimental, or deprecated
def test_a_value_of_any_dtype_and_shape(kv: KVStore) -> None:
    """What `init` takes, the other verbs take, too, and every bit comes back."""
    for dtype in DTYPES:
        for shape in ((), (0,), (5,), (2, 3)):
            with naming((dtype, shape)):
                check_dtype(kv, of_dtype(dtype, shape))


def check_dtype(kv: KVStore, value: torch.Tensor) -> None:
    if is_refused(lambda: kv.init("new", value)):
        assert kv.keys() == ["w", "b"]
        return
    outs = torch.zeros_like(value), torch.zeros_like(value)
    kv.pull("new", outs)
    kv.put("new", value)
    for found in (*outs, kv.pull("new"), kv.pushpull("new", value)):
        assert found.dtype is value.dtype
        assert found.reshape(-1).view(torch.uint8).equal(value.reshape(-1).view(torch.uint8))
    kv.delete("new")


def of_dtype(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if dtype.is_complex:
        return torch.complex(torch.ones(shape), torch.full(shape, -2.0)).to(dtype)
    try:
        return torch.ones(shape).to(dtype)
    except RuntimeError:  # torch can make it, and nothing else
        return torch.empty(shape, dtype=dtype)


def is_refused(init: Callable[[], Any]) -> bool:
    try:
        init()
    except InvalidValue as exc:
        return "'new'" in str(exc)
    return False


NO_MEMORY = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: 140 bytes"


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Return a value that is not contiguous, and for a copy of which there is no memory."""
    shape, copy, flatten, lay_out = (
        (5, 7),
        torch.Tensor.copy_,
        torch.Tensor.reshape,
        torch.Tensor.contiguous,
    )

    def fail(tensor: torch.Tensor) -> None:
        if tensor.shape == shape and not tensor.is_contiguous():
            raise RuntimeError(NO_MEMORY)

    def copy_(tensor: torch.Tensor, source: torch.Tensor, *args: Any) -> torch.Tensor:
        fail(source)
        return copy(tensor, source, *args)

    def reshape(tensor: torch.Tensor, *to: Any) -> torch.Tensor:
        fail(tensor)
        return flatten(tensor, *to)

    def contiguous(tensor: torch.Tensor) -> torch.Tensor:
        fail(tensor)
        return lay_out(tensor)

    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    monkeypatch.setattr(torch.Tensor, "contiguous", contiguous)
    monkeypatch.setattr(torch.Tensor, "reshape", reshape)
    return torch.ones(7, 5).t()


def test_no_memory_for_a_copy_ends_the_call_alone(kv: KVStore, no_memory: torch.Tensor) -> None:
    before = torch.zeros(5, 7)
    kv.init("m", before)
    calls = {"init": lambda: kv.init(["more", "init"], [BASE, no_memory])}
    for what, call in (calls | reading(kv, "m", no_memory)).items():
        with pytest.raises(MemoryLimitReached, match="'init'" if what == "init" else "'m'") as caught:
            call()
        assert isinstance(caught.value, MemoryError)
    assert kv.keys() == ["w", "b", "m"]
    assert kv.pull("m").equal(before)
    good_calls(kv)
    kv.push("m", before + 1)
    assert kv.pull("m").equal(before + 1)
    kv.delete("m")


@pytest.mark.parametrize("name", ["a subclass", "no memory"])
def test_an_init_that_rank_0_fails_at_is_made_again_for_all(name: str, no_memory: torch.Tensor) -> None:
    """The others wait meanwhile for a value of rank 0, and get it when it makes the call again."""
    bad: Any = no_memory if name == "no memory" else Wrapper(torch.ones(5, 7))
    good = torch.full((5, 7), 3.0)

    def work(kv: KVStore) -> torch.Tensor:
        if kv.rank == 0:
            with pytest.raises((InvalidValue, MemoryLimitReached), match="'d'"):
                kv.init({"c": good, "d": bad})
            assert kv.keys() == []
        kv.init({"c": good, "d": good})
        found: torch.Tensor = kv.pull("d")
        kv.barrier()
        return found

    assert all(found.equal(good) for found in run_job(work, num_workers=2, num_servers=2))


def test_who_waits_for_an_init_that_rank_0_gave_up_is_told_of_rank_0() -> None:
    def work(kv: KVStore) -> None:
        kv.init("w", BASE)
        if kv.rank == 0:
            with pytest.raises(InvalidValue):
                kv.init("d", Wrapper(BASE))
        else:
            with pytest.raises(WaitTimeout, match="'d'.*worker 0"):
                kv.init("d", BASE)
        kv.barrier(timeout_s=50)
        assert kv.pull("w").equal(BASE)

    run_job(work, num_workers=2, num_servers=1, timeout_s=1.0)
