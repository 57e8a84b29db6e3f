"""Sums over, and copies to, the devices of one process."""

from __future__ import annotations

import pytest
import torch

from tensorkv import reduce
from tensorkv.errors import DtypeMismatch
from tensorkv.reduce import broadcast, lightest, sum_devices, sum_dtype

DTYPES = [torch.float32, torch.float64, torch.int64, torch.uint8, torch.complex64]


@pytest.fixture(params=["whole", "in blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test with tensors as they are, and once more as if they were larger than a cache."""
    if request.param == "in blocks":
        monkeypatch.setattr(reduce, "BLOCK_BYTES", 24)


def in_list_order(tensors: list[torch.Tensor]) -> torch.Tensor:
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total = total + tensor
    return total


@pytest.mark.usefixtures("blocks")
class TestSum:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("number", [1, 2, 3, 5])
    def test_in_list_order_bitwise(self, dtype: torch.dtype, number: int) -> None:
        tensors = [(torch.randn(5, 7) * 1e3).to(dtype) for _ in range(number)]
        before = [tensor.clone() for tensor in tensors]
        out = torch.empty(5, 7, dtype=dtype)
        assert sum_devices(tensors, out=out) is out
        assert torch.equal(out, in_list_order(tensors))
        assert torch.equal(sum_devices(tensors), out)
        assert all(map(torch.equal, tensors, before))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_width_floats_are_rounded_once(self, dtype: torch.dtype) -> None:
        tensors = [torch.full((50,), value, dtype=dtype) for value in (1.0, 2**-12, 2**-12, 2**-9)]
        expected = in_list_order([tensor.float() for tensor in tensors]).to(dtype)
        total = sum_devices(tensors)
        assert total.dtype is dtype
        assert torch.equal(total, expected)
        small = torch.full((50,), 2**-12, dtype=torch.float16)
        many = [torch.ones(50, dtype=torch.float16), *[small] * 16]
        assert not torch.equal(sum_devices(many), in_list_order(many))  # float16 alone would lose them

    def test_into_another_float_the_sum_is_rounded_first(self) -> None:
        tensors = [torch.tensor([1.0] * 20, dtype=torch.float16), torch.full((20,), 2**-12).half()]
        wide = torch.empty(20, dtype=torch.float64)
        assert sum_devices(tensors, out=wide).tolist() == [1.0] * 20  # 1 + 2**-12 is no float16
        half = torch.empty(20, dtype=torch.float16)
        exact = [torch.full((20,), 1.0), torch.full((20,), 0.25)]
        assert sum_devices(exact, out=half).tolist() == [1.25] * 20

    def test_mixed_floats_add_up_in_the_widest(self) -> None:
        tensors = [torch.ones(20).half(), torch.full((20,), 2**-20), torch.ones(20).bfloat16()]
        total = sum_devices(tensors)
        assert total.dtype is torch.float32
        assert total.tolist() == [2 + 2**-20] * 20

    def test_eight_bit_floats(self) -> None:
        tensors = [torch.ones(30).to(torch.float8_e4m3fn), torch.full((30,), 0.5).to(torch.float8_e4m3fn)]
        total = sum_devices(tensors)
        assert total.dtype is torch.float8_e4m3fn
        assert total.float().tolist() == [1.5] * 30

    def test_bools_are_or_ed(self) -> None:
        tensors = [torch.tensor([True, True, False] * 9), torch.tensor([True, False, False] * 9)]
        assert sum_devices(tensors).tolist() == [True, True, False] * 9

    def test_strides_do_not_matter(self) -> None:
        plain = torch.arange(35.0).view(5, 7)
        transposed = torch.arange(35.0).view(7, 5).t()
        expected = plain + transposed + 1
        tensors = [plain, transposed, torch.ones(1, 1).expand(5, 7)]
        assert torch.equal(sum_devices(tensors), expected)
        strided = torch.zeros(5, 14)[:, ::2]
        assert torch.equal(sum_devices(tensors, out=strided), expected)

    def test_conjugate_views(self) -> None:
        value = torch.full((20,), 1 + 2j)
        assert torch.equal(sum_devices([value.conj(), value]), torch.full((20,), 2 + 0j))

    @pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2)])
    def test_scalars_and_empty_tensors(self, shape: tuple[int, ...]) -> None:
        total = sum_devices([torch.ones(shape), torch.ones(shape)], out=torch.zeros(shape))
        assert torch.equal(total, torch.full(shape, 2.0))

    def test_the_same_tensor_several_times(self) -> None:
        tensor = torch.ones(20)
        assert sum_devices([tensor] * 4).tolist() == [4.0] * 20
        assert tensor.tolist() == [1.0] * 20


def test_a_single_tensor_is_its_own_sum() -> None:
    tensor = torch.ones(3)
    assert sum_devices([tensor]) is tensor


def test_dtypes_that_cannot_be_summed() -> None:
    with pytest.raises(DtypeMismatch, match=r"torch\.float32.*torch\.int64"):
        sum_devices([torch.ones(2), torch.ones(2, dtype=torch.int64)])
    with pytest.raises(DtypeMismatch):
        sum_devices([torch.ones(2, dtype=torch.int32), torch.ones(2, dtype=torch.int64)])


def test_sum_dtype_is_torchs_for_floats() -> None:
    floats = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    for one in floats:
        for other in floats:
            tensors = [torch.zeros(1, dtype=one), torch.zeros(1, dtype=other)]
            assert sum_dtype(tensors) is torch.promote_types(one, other)


@pytest.mark.usefixtures("blocks")
class TestBroadcast:
    def test_each_out_gets_the_value_in_its_own_dtype_and_layout(self) -> None:
        value = torch.randn(5, 7)
        outs = [torch.zeros(5, 7), torch.zeros(5, 7, dtype=torch.float16), torch.zeros(7, 5).t()]
        broadcast(value, outs)
        assert torch.equal(outs[0], value)
        assert torch.equal(outs[1], value.half())
        assert torch.equal(outs[2], value)

    def test_outs_in_blocks(self) -> None:
        value, outs = torch.randn(50), [torch.zeros(50), torch.zeros(50), torch.zeros(50)]
        broadcast(value, outs)
        assert all(torch.equal(out, value) for out in outs)

    def test_of_overlapping_outs_the_last_wins(self) -> None:
        memory = torch.zeros(60)
        broadcast(torch.arange(50.0), [memory[:50], memory[10:]])
        assert memory.tolist() == [*range(10), *range(50)]

    def test_no_outs(self) -> None:
        broadcast(torch.ones(3), [])


def test_keys_spread_over_gpus_by_bytes() -> None:
    gpus = [torch.device("cuda", index) for index in range(3)]
    load: dict[torch.device, int] = {}
    for num_bytes in (100, 60, 50, 30, 10, 10):
        gpu = lightest(load, gpus)
        load[gpu] = load.get(gpu, 0) + num_bytes
    assert load == {gpus[0]: 100, gpus[1]: 80, gpus[2]: 80}


def test_only_the_devices_asked_for_are_chosen() -> None:
    load = {torch.device("cuda", 0): 0, torch.device("cuda", 1): 5}
    assert lightest(load, [torch.device("cuda", 1)]) == torch.device("cuda", 1)
