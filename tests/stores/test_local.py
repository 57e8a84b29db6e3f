"""LocalStore beyond the conformance suite: whose memory is whose, corners of dtypes, settings, threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tensorkv.errors import (
    DtypeMismatch,
    InvalidValue,
    KeyAlreadyInitialized,
    KeyNotInitialized,
    MemoryLimitReached,
    ShapeMismatch,
    StoreClosed,
    UncommittedPush,
    UpdaterError,
)
from tensorkv.keys import ABSENT
from tensorkv.store import KVStore
from tensorkv.stores.local import CPU_KINDS, DEVICE_KINDS, LocalStore
from tensorkv.updaters.undecorated import step
from tensorkv.work import Work

ONE = torch.ones(3)
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")


def make(kind: str = "local", reduction: Any = "sum") -> KVStore:
    return LocalStore(kind, store="default", reduction=reduction, timeout_s=60)


@pytest.fixture(params=["local", "device"])
def kv(request: pytest.FixtureRequest) -> Iterator[KVStore]:
    with make(request.param) as store:
        yield store


def refuse(key: Any, pushed: torch.Tensor, stored: torch.Tensor) -> None:
    stored.fill_(-1)
    if pushed.sum() < 0:
        raise ValueError(f"negative sum on {key}")


class TestMemory:
    """The store never keeps the caller's memory, and never writes to what was pushed."""

    @pytest.mark.parametrize(
        "settings", ["assign", "add", "function", "sgd", "adam", pytest.param("muon", marks=needs_muon)]
    )
    @pytest.mark.parametrize("devices", [1, 3])
    @pytest.mark.parametrize("reduction", ["sum", "mean"])
    def test_pushed_tensors_stay_as_they_are_and_may_change_afterwards(
        self, settings: str, devices: int, reduction: str
    ) -> None:
        def use_up(key: Any, pushed: torch.Tensor, stored: torch.Tensor) -> None:
            stored -= pushed.mul_(0.5)

        with make(reduction=reduction) as kv:
            first = torch.zeros(4, 4)
            kv.init("w", first)
            if settings == "function":
                kv.set_updater(use_up)
            elif settings in ("assign", "add"):
                kv.set_updater(settings)
            else:
                kv.set_optimizer(settings, lr=0.1)
            grads = [torch.eye(4) for _ in range(devices)]
            for _ in range(2):
                kv.push("w", grads)
                assert all(torch.equal(grad, torch.eye(4)) for grad in grads)
            value = kv.pull("w")
            for tensor in (first, *grads):
                tensor.fill_(77)
            assert torch.equal(kv.pull("w"), value)
            value.fill_(88)
            assert not torch.equal(kv.pull("w"), value)

    def test_a_known_optimizer_reads_a_single_tensor_in_place(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """No copy is made where none is needed: the store then holds no buffer of its own."""
        kv = make()
        kv.init("w", ONE)
        kv.set_optimizer("sgd", lr=0.1)

        def no_copy(*args: Any) -> None:
            pytest.fail("the pushed tensor was copied")

        monkeypatch.setattr(LocalStore, "_merge", no_copy)
        kv.push("w", ONE)
        assert kv.pull("w")[0].item() == pytest.approx(0.9)

    @pytest.mark.parametrize(
        "grad",
        [
            torch.ones(3, 2).t(),
            torch.ones(1, 1).expand(2, 3),
            torch.ones(2, 3).double(),
            torch.ones(2, 3).half(),
        ],
        ids=["transposed", "expanded", "wider", "narrower"],
    )
    @pytest.mark.parametrize("name", ["sgd", "adam", "rprop"])
    def test_other_layouts_and_dtypes_are_copied_first(self, grad: torch.Tensor, name: str) -> None:
        kv, plain = make(), make()
        for store, pushed in ((kv, grad), (plain, torch.ones(2, 3))):
            store.init("w", torch.zeros(2, 3))
            store.set_optimizer(name, lr=0.1)
            store.push("w", pushed)
        assert torch.equal(kv.pull("w"), plain.pull("w"))

    def test_a_foreach_optimizer_gets_a_copy(self) -> None:
        kv, grad = make(), torch.ones(3)
        kv.init("w", torch.zeros(3))
        kv.set_optimizer("sgd", lr=0.1, momentum=0.9, nesterov=True, foreach=True)
        for _ in range(3):
            kv.push("w", grad)
        assert grad.tolist() == [1, 1, 1]

    def test_the_same_buffer_serves_every_push(self, monkeypatch: pytest.MonkeyPatch) -> None:
        kv, places = make(), []

        def note(optimizer: torch.optim.Optimizer) -> None:
            places.extend(each.grad.data_ptr() for each in optimizer.param_groups[0]["params"])
            step(optimizer)

        kv.init("w", torch.zeros(3))
        kv.set_optimizer("sgd", lr=0.1)
        kv.push("w", [ONE, ONE])  # torch's kernel is tried out
        monkeypatch.setattr("tensorkv.updaters.optimizer.step", note)
        for _ in range(3):
            kv.push("w", [ONE, ONE])
        assert len(places) == 3
        assert len(set(places)) == 1

    def test_what_inference_mode_made_can_be_changed_later(self) -> None:
        kv = make()
        kv.set_optimizer("sgd", lr=1.0, momentum=0.5)
        with torch.inference_mode():
            kv.init("w", torch.zeros(3))
            kv.push("w", torch.ones(3))
            inner = torch.ones(3)
        kv.push("w", inner)
        kv.push("w", [inner, inner], apply=False)
        kv.commit()
        assert kv.pull("w")[0].item() == -1 - 1.5 - 2.75


class TestValues:
    @pytest.mark.parametrize(
        "dtype",
        [
            torch.int8,
            torch.int64,
            torch.bool,
            torch.complex64,
            torch.float16,
            torch.bfloat16,
            torch.float8_e5m2,
        ],
        ids=str,
    )
    @pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 3)], ids=str)
    def test_any_dtype_and_shape(self, kv: KVStore, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        one = torch.ones(shape).to(dtype)
        kv.init("w", torch.zeros(shape).to(dtype))
        kv.push("w", [one, one])
        value = kv.pull("w")
        assert (value.shape, value.dtype) == (shape, dtype)
        assert torch.equal(
            value.to(torch.complex64), (one.to(torch.complex64) * (1 if dtype is torch.bool else 2))
        )

    def test_float_casts_round_to_the_pushed_dtype_first(self, kv: KVStore) -> None:
        kv.init("w", torch.zeros(1, dtype=torch.float64))
        kv.push("w", [torch.ones(1).half(), torch.full((1,), 2**-12).half()])
        assert kv.pull("w").item() == 1
        kv.push("w", [torch.ones(1), torch.full((1,), 2**-12)])
        assert kv.pull("w").item() == 1 + 2**-12

    def test_outs_of_every_sort(self, kv: KVStore) -> None:
        kv.init("w", torch.arange(6.0).view(2, 3))
        parameter = torch.nn.Parameter(torch.zeros(2, 3))
        array, half, transposed = np.zeros((2, 3)), torch.zeros(2, 3).half(), torch.zeros(3, 2).t()
        outs = [parameter, array, half, transposed]
        version = parameter._version
        assert kv.pull("w", out=outs) is outs
        for out in outs:
            assert torch.as_tensor(out).tolist() == [[0, 1, 2], [3, 4, 5]]
        assert parameter._version > version

    def test_a_refused_pull_writes_nothing(self, kv: KVStore) -> None:
        kv.init(["w", "b"], [ONE, ONE])
        good, bad = torch.zeros(3), torch.zeros(4)
        with pytest.raises(ShapeMismatch):
            kv.pull(["w", "b"], out=[good, bad])
        with pytest.raises(DtypeMismatch):
            kv.pull("w", out=[good, torch.zeros(3, dtype=torch.int64)])
        assert good.tolist() == [0, 0, 0]

    def test_a_refused_push_changes_nothing(self, kv: KVStore) -> None:
        kv.init(["w", "b"], [ONE, ONE])
        with pytest.raises(ShapeMismatch):
            kv.push(["w", "b"], [2 * ONE, torch.ones(1)])
        with pytest.raises(DtypeMismatch):
            kv.push(["w", "b"], [2 * ONE, [ONE, ONE.long()]])
        with pytest.raises(KeyNotInitialized, match="'v'"):
            kv.push(["w", "v"], [2 * ONE, ONE])
        assert kv.pull("w").tolist() == [1, 1, 1]
        assert kv.info("w").round == kv.info("w").version == 0

    def test_a_refused_init_creates_nothing(self, kv: KVStore) -> None:
        kv.init("w", ONE)
        with pytest.raises(KeyAlreadyInitialized, match=r"'w'.*\(3,\)"):
            kv.init(["v", "w"], [ONE, ONE])
        assert kv.keys() == ["w"]


class TestMean:
    def test_it_divides_by_the_tensors_that_went_in(self) -> None:
        with make(reduction="mean") as kv:
            kv.init("w", torch.zeros(1))
            for pushed, expected in (([3.0, 5.0], 4.0), ([7.0], 7.0)):
                kv.push("w", [torch.tensor([each]) for each in pushed])
                assert kv.pull("w").item() == expected
            twice = [[torch.tensor([1.0]), torch.tensor([2.0])], torch.tensor([3.0])]
            kv.push(["w", "w"], twice)  # one push of it, with at most two devices
            assert kv.pull("w").item() == 3.0
            kv.push("w", ABSENT)
            assert kv.pull("w").item() == 3.0

    def test_halves_are_divided_in_float32(self) -> None:
        with make(reduction="mean") as kv:
            kv.init("w", torch.zeros(1, dtype=torch.bfloat16))
            kv.push("w", [torch.tensor([each]).bfloat16() for each in (1.0, 2.0, 3.0)])
            assert kv.pull("w").item() == 2
            kv.push("w", [torch.tensor([each]) for each in (1.0, 1.0, 2.0)])
            assert kv.pull("w").item() == torch.tensor(4 / 3).bfloat16().item()

    @pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
    def test_whole_numbers_are_refused(self, dtype: torch.dtype) -> None:
        with make(reduction="mean") as kv:
            with pytest.raises(DtypeMismatch, match=f"'n' has dtype {dtype}"):
                kv.init(["w", "n"], [ONE, torch.zeros(2, dtype=dtype)])
            assert len(kv) == 0


class TestUpdaterErrors:
    def test_the_push_raises_and_the_other_keys_are_applied(self, kv: KVStore) -> None:
        kv.init(["a", "b", "c"], [ONE, ONE, ONE])
        kv.set_updater(refuse)
        with pytest.raises(UpdaterError, match="negative sum on b"):
            kv.push(["a", "b", "c"], [ONE, -ONE, ONE])
        assert [kv.pull(key)[0].item() for key in "abc"] == [-1, 1, -1]
        assert [kv.info(key).round for key in "abc"] == [1, 1, 1]
        assert [kv.info(key).version for key in "abc"] == [1, 0, 1]
        kv.push("b", ONE)  # raised once
        assert kv.info("b").version == 1

    def test_several_failures_come_in_one_error(self, kv: KVStore) -> None:
        kv.init([1, 2], [ONE, ONE])
        kv.set_updater(refuse)
        with pytest.raises(UpdaterError, match=r"on 1") as raised:
            kv.push([1, 2], [-ONE, -ONE])
        (note,) = raised.value.__notes__
        assert "on 2" in note

    def test_a_work_holds_the_error(self, kv: KVStore) -> None:
        kv.init("w", ONE)
        kv.set_updater(refuse)
        work = kv.push("w", -ONE, async_op=True)
        assert isinstance(work, Work)
        assert work.is_completed()
        with pytest.raises(UpdaterError):
            work.wait()
        with pytest.raises(ShapeMismatch):  # but what the call itself does not accept is raised by it
            kv.push("w", torch.ones(1), async_op=True)

    def test_works_have_the_results_of_the_calls(self, kv: KVStore) -> None:
        kv.init("w", ONE)
        pull = kv.pull("w", async_op=True)
        both = kv.pushpull("w", ONE * 2, async_op=True)
        assert pull.result().tolist() == [1, 1, 1]
        assert both.result().tolist() == [2, 2, 2]


class TestCommit:
    def push(self, kv: KVStore, grads: list[torch.Tensor]) -> None:
        keys = list(range(len(grads)))
        kv.init(keys, [torch.zeros_like(grad) for grad in grads])
        kv.set_updater("add")
        kv.push(keys, grads, apply=False)

    @pytest.mark.parametrize("max_norm", [0.5, 1e6])
    def test_it_clips_as_torch_does(self, kv: KVStore, max_norm: float) -> None:
        grads = [torch.randn(300, 1000), torch.randn(()), torch.randn(7).to(torch.complex64), torch.zeros(0)]
        self.push(kv, grads)
        parameters = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad.clone()
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        exact = sum(float(grad.to(torch.complex128).abs().square().sum()) for grad in grads) ** 0.5
        result = kv.commit(max_norm=max_norm)
        assert result.applied
        assert result.norm == pytest.approx(exact, rel=1e-12)  # torch's own is a float32
        for key, parameter in enumerate(parameters):
            torch.testing.assert_close(kv.pull(key), parameter.grad)

    def test_the_norm_is_added_up_in_float64(self, kv: KVStore) -> None:
        self.push(kv, [torch.full((2,), 3e30), torch.tensor([4e30] * 2, dtype=torch.bfloat16)])
        assert kv.commit(check_finite=True).norm == pytest.approx(50**0.5 * 1e30, rel=1e-2)

    def test_without_a_question_there_is_no_norm(self, kv: KVStore) -> None:
        self.push(kv, [ONE])
        assert kv.commit().norm is None
        assert kv.commit(check_finite=True).norm == 0  # nothing was pushed

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_check_finite_drops_the_round(self, kv: KVStore, bad: float) -> None:
        self.push(kv, [ONE, torch.tensor([bad, 1.0])])
        assert not kv.commit(check_finite=True).applied
        assert kv.pull(0).tolist() == [0, 0, 0]
        assert (kv.info(1).round, kv.info(1).version) == (1, 0)

    def test_large_but_finite_is_finite(self, kv: KVStore) -> None:
        self.push(kv, [torch.tensor([1e200], dtype=torch.float64)])
        assert kv.commit(check_finite=True).applied

    def test_skip_drops_the_round(self, kv: KVStore) -> None:
        self.push(kv, [ONE])
        result = kv.commit(skip=True, max_norm=1.0)
        assert not result.applied
        assert result.norm == pytest.approx(3**0.5)
        assert kv.pull(0).tolist() == [0, 0, 0]
        kv.push(0, ONE, apply=False)
        assert kv.commit().applied
        assert (kv.info(0).round, kv.info(0).version) == (2, 1)

    def test_until_then_the_key_cannot_be_used(self, kv: KVStore) -> None:
        self.push(kv, [ONE])
        kv.init(1, ONE)
        for call in (
            lambda: kv.push(0, ONE),
            lambda: kv.push(0, ONE, apply=False),
            lambda: kv.pull([1, 0]),
            lambda: kv.pushpull(0, ONE),
        ):
            with pytest.raises(UncommittedPush, match=r"key 0 .*commit\(\)"):
                call()
        assert kv.info(0).round == 0
        kv.push(1, ONE)

    def test_absent_takes_part(self, kv: KVStore) -> None:
        kv.init("w", ONE)
        kv.set_updater(refuse)
        kv.push("w", ABSENT, apply=False)
        with pytest.raises(UncommittedPush):
            kv.pull("w")
        assert kv.commit().applied
        assert (kv.info("w").round, kv.info("w").version) == (1, 0)
        assert kv.pull("w").tolist() == [1, 1, 1]

    def test_whole_numbers_cannot_be_scaled(self, kv: KVStore) -> None:
        self.push(kv, [torch.ones(2, dtype=torch.int64)])
        with pytest.raises(DtypeMismatch, match="max_norm"):
            kv.commit(max_norm=0.1)
        assert kv.commit(check_finite=True).norm == pytest.approx(2**0.5)
        assert kv.pull(0).tolist() == [1, 1]

    def test_an_updater_that_raises(self, kv: KVStore) -> None:
        kv.init(["a", "b"], [ONE, ONE])
        kv.set_updater(refuse)
        kv.push(["a", "b"], [-ONE, ONE], apply=False)
        with pytest.raises(UpdaterError, match="on a"):
            kv.commit()
        assert [kv.info(key).version for key in "ab"] == [0, 1]
        kv.push("a", ONE)

    def test_the_setting_at_the_push_holds(self, kv: KVStore) -> None:
        kv.init("w", torch.zeros(3))
        kv.set_optimizer("sgd", lr=1.0, momentum=0.5)
        kv.push("w", ONE)
        kv.push("w", ONE, apply=False)
        kv.set_updater("assign")
        kv.commit()
        assert kv.pull("w")[0].item() == -2.5
        kv.push("w", ONE)
        assert kv.pull("w")[0].item() == 1


class TestSettings:
    def test_another_optimizer_starts_afresh(self, kv: KVStore) -> None:
        kv.init(["w", "b"], [torch.zeros(1), torch.zeros(1)])
        sgd: dict[str, Any] = {"lr": 1.0, "momentum": 0.5}
        kv.set_optimizer("sgd", **sgd)
        kv.push(["w", "b"], [torch.ones(1)] * 2)
        kv.set_optimizer("SGD", **sgd)  # the same again: nothing is lost
        kv.set_updater("add")
        kv.set_optimizer("sgd", **sgd)
        kv.push(["w", "b"], [torch.ones(1)] * 2)
        assert kv.pull("w").item() == -2
        kv.set_optimizer("adam", keys="w")
        kv.set_optimizer("sgd", keys="w", **sgd)  # an equal one serves "b", whose state stays
        kv.push(["w", "b"], [torch.ones(1)] * 2)
        assert [kv.pull(key).item() for key in "wb"] == [-3, -3.5]

    def test_repeating_the_setting_keeps_the_state(self, kv: KVStore) -> None:
        kv.init("w", torch.zeros(1))
        for _ in range(2):
            kv.set_optimizer("sgd", lr=1.0, momentum=0.5)
            kv.push("w", torch.ones(1))
        assert kv.pull("w").item() == -2.5

    @needs_muon
    def test_values_are_checked_at_init_and_at_the_setting(self, kv: KVStore) -> None:
        kv.init(["m", "v"], [torch.zeros(2, 2), ONE])
        with pytest.raises(InvalidValue, match="'v'"):
            kv.set_optimizer("muon")
        assert kv.info("m").updater == "assign"
        kv.set_optimizer("muon", keys=["m", "later"])
        assert kv.info("v").updater == "assign"
        with pytest.raises(InvalidValue, match="'later'"):
            kv.init(["fine", "later"], [ONE, ONE])
        assert kv.keys() == ["m", "v"]
        kv.init("later", torch.zeros(2, 3))
        kv.push("later", torch.ones(2, 3))
        assert kv.info("later").version == 1

    def test_info_names_the_updater(self, kv: KVStore) -> None:
        kv.init("w", ONE)
        kv.set_updater(refuse)
        assert kv.info("w").updater == f"{__name__}:refuse"
        kv.set_optimizer("adam")
        assert kv.info("w").updater.endswith(":Adam")

    def test_a_deleted_key_leaves_no_state(self, kv: KVStore) -> None:
        kv.init(["w", "b"], [torch.zeros(1), torch.zeros(1)])
        kv.set_optimizer("sgd", lr=1.0, momentum=0.5)
        kv.push("w", torch.ones(1))
        kv.push("w", torch.ones(1), apply=False)
        kv.delete(["w", "w"])
        with pytest.raises(KeyNotInitialized):
            kv.pull("w")
        kv.init("w", torch.zeros(1))
        assert (kv.info("w").round, kv.info("w").version) == (0, 0)
        kv.push("w", torch.ones(1))
        assert kv.pull("w").item() == -1

    def test_a_refused_delete_deletes_nothing(self, kv: KVStore) -> None:
        kv.init("w", ONE)
        with pytest.raises(KeyNotInitialized, match="'v'"):
            kv.delete(["w", "v"])
        assert "w" in kv


class TestThreads:
    def test_pushes_of_many_threads_all_count(self) -> None:
        kv, threads = make(), 4
        kv.init("w", torch.zeros(3))
        kv.set_updater("add")

        def work() -> None:
            for _ in range(50):
                kv.push("w", [ONE, ONE])
                value = kv.pull("w")
                assert bool((value == value[0]).all())  # never half of an update

        running = [threading.Thread(target=work) for _ in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join(50)
        assert kv.pull("w").tolist() == [400.0] * 3
        assert kv.info("w").version == 200

    def test_of_many_threads_one_initialises(self) -> None:
        kv, outcomes = make(), []

        def work(key: Any) -> None:
            try:
                kv.init(key, ONE)
                outcomes.append("made")
            except (KeyAlreadyInitialized, TypeError) as exc:
                outcomes.append(type(exc).__name__)

        running = [threading.Thread(target=work, args=("w",)) for _ in range(4)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join(50)
        assert sorted(outcomes) == ["KeyAlreadyInitialized"] * 3 + ["made"]

    def test_an_updater_may_use_its_store(self) -> None:
        kv = make()
        kv.init(["w", "scale"], [ONE, torch.tensor(3.0)])

        def scaled(key: Any, pushed: torch.Tensor, stored: torch.Tensor) -> None:
            stored += pushed * kv.pull("scale")

        kv.set_updater(scaled)
        kv.push("w", ONE)
        assert kv.pull("w").tolist() == [4, 4, 4]

    def test_a_call_that_another_thread_closes_while_it_waits(self) -> None:
        kv = make()
        kv.init("w", ONE)
        lock = kv._lock  # type: ignore[attr-defined]

        class ClosedMeanwhile:
            def __enter__(self) -> None:
                kv._lock = lock  # type: ignore[attr-defined]
                kv.close()
                lock.acquire()

            def __exit__(self, *exc: object) -> None:
                lock.release()

        kv._lock = ClosedMeanwhile()  # type: ignore[attr-defined]
        with pytest.raises(StoreClosed, match="during the call"):
            kv.pull("w")


def test_who_and_what(kv: KVStore) -> None:
    assert (kv.rank, kv.num_workers, kv.world_size) == (0, 1, 1)
    kv.barrier(timeout_s=1)
    kv.init([2, 1], [ONE, ONE])
    assert kv.keys() == [2, 1]


def test_leaving_by_an_error_closes() -> None:
    kv = make()
    with pytest.raises(ZeroDivisionError), kv:
        raise ZeroDivisionError
    assert kv.closed
    with pytest.raises(StoreClosed):
        kv.keys()


def test_large_values_go_in_blocks(kv: KVStore) -> None:
    """Values larger than a cache take another path through the sums and the copies."""
    value = torch.arange(3_000_000.0)
    outs = [torch.empty(3_000_000) for _ in range(2)]
    kv.init("w", torch.zeros(3_000_000))
    kv.pushpull("w", [value, value, value], out=outs)
    assert all(torch.equal(out, value * 3) for out in outs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestGpu:
    @pytest.mark.parametrize("kind", DEVICE_KINDS)
    def test_values_live_on_the_gpus_they_are_pushed_from(self, kind: str) -> None:
        gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        keys = list(range(2 * len(gpus)))
        with make(kind) as kv:
            kv.init(keys, [torch.zeros(10) for _ in keys])
            kv.set_optimizer("sgd", lr=1.0, momentum=0.5)
            for _ in range(2):
                kv.push(keys, [[torch.ones(10, device=gpu) for gpu in gpus] for _ in keys])
            values = kv.pull(keys)
            assert isinstance(kv, LocalStore)
            homes = [slot.value.device for slot in kv._slots.values()]
        assert {homes.count(gpu) for gpu in gpus} == {2}
        assert all(value.device == gpus[0] for value in values)
        assert all(value[0].item() == -2.5 * len(gpus) for value in values)

    @pytest.mark.parametrize("kind", CPU_KINDS)
    def test_values_live_on_the_cpu(self, kind: str) -> None:
        out = torch.zeros(3, device="cuda")
        with make(kind) as kv:
            kv.init("w", ONE.cuda())
            kv.push("w", [ONE.cuda(), ONE])
            assert kv.pull("w").is_cpu
            kv.pull("w", out=[out])
        assert out.tolist() == [2, 2, 2]


def test_an_init_without_memory_says_so() -> None:
    num_elems = 1 << 46  # more bytes than a process has addresses for
    with LocalStore("local", store="s", reduction="sum", timeout_s=20) as kv:
        kv.init("w", torch.ones(2))
        with pytest.raises(MemoryLimitReached, match=f"no memory .* {4 * num_elems} bytes, .* 'h'"):
            kv.init(["a", "h"], [torch.ones(2), torch.zeros(1).expand(num_elems)])
        assert kv.keys() == ["w"]
