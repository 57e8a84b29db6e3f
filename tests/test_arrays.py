"""Arrays at the door: what comes in, what can be written, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tensorkv.arrays import (
    accumulate_dtype,
    addresses_of,
    bytes_of,
    check_matches,
    check_summable,
    dtype_from_name,
    dtype_name,
    size_bytes,
    to_out,
    to_tensor,
)
from tensorkv.errors import DtypeMismatch, InvalidOut, InvalidValue, ShapeMismatch


class Foreign:
    """An array of some other library that speaks DLPack."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.tensor.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()


class Exporter:
    """An array of some other library, over NumPy's; before version 1.0 DLPack has no flags."""

    def __init__(self, array: np.ndarray[Any, Any], versioned: bool) -> None:
        self.array = array
        self.versioned = versioned

    def __dlpack__(self, **kwargs: Any) -> Any:
        if "max_version" in kwargs and not self.versioned:
            raise TypeError("unexpected keyword argument 'max_version'")
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


class Broken(Foreign):
    def __dlpack__(self, **kwargs: Any) -> Any:
        raise BufferError("not today")


Jax = type("ArrayImpl", (Foreign,), {"__module__": "jaxlib.xla_extension"})


class TestToTensor:
    def test_a_plain_tensor_passes(self) -> None:
        tensor = torch.ones(2)
        assert to_tensor(tensor, "w") is tensor

    def test_a_parameter_loses_its_history_and_keeps_its_memory(self) -> None:
        parameter = torch.nn.Parameter(torch.ones(2))
        tensor = to_tensor(parameter, "w")
        assert not tensor.requires_grad
        assert tensor.data_ptr() == parameter.data_ptr()

    @pytest.mark.parametrize("dtype", ["float64", "int8", "bool", "complex64", "uint16"])
    def test_numpy_shares_its_memory(self, dtype: str) -> None:
        array = np.zeros((2, 3), dtype)
        tensor = to_tensor(array, "w")
        array[1, 2] = 1
        assert tensor.shape == (2, 3)
        assert bool(tensor[1, 2])

    def test_a_read_only_array_can_be_read(self) -> None:
        array = np.arange(3.0)
        array.flags.writeable = False
        assert to_tensor(array, "w").tolist() == [0, 1, 2]

    @pytest.mark.parametrize(
        "array",
        [np.array(["a"]), np.array([object()]), np.arange(4)[::-1]],
        ids=["str", "object", "reversed"],
    )
    def test_an_array_that_torch_cannot_take(self, array: np.ndarray[Any, Any]) -> None:
        with pytest.raises(InvalidValue, match="'w'"):
            to_tensor(array, "w")

    def test_dlpack_shares_its_memory(self) -> None:
        foreign = Foreign(torch.zeros(3))
        tensor = to_tensor(foreign, 7)
        foreign.tensor[1] = 5
        assert tensor.tolist() == [0, 5, 0]

    def test_dlpack_that_fails(self) -> None:
        with pytest.raises(InvalidValue, match=r"Broken for key 7.*not today"):
            to_tensor(Broken(torch.zeros(1)), 7)

    @pytest.mark.parametrize(
        "error", [KeyError("k"), NotImplementedError("no"), AttributeError("a"), OSError()]
    )
    def test_dlpack_that_raises_anything(self, error: Exception) -> None:
        class Raising(Foreign):
            def __dlpack__(self, **kwargs: Any) -> Any:
                raise error

        for take in (to_tensor, to_out):
            with pytest.raises(InvalidValue, match=r"Raising for key 'w' cannot come in by DLPack"):
                take(Raising(torch.zeros(1)), "w")

    def test_a_class_is_no_array(self) -> None:
        with pytest.raises(InvalidValue, match="'w'"):
            to_tensor(torch.Tensor, "w")

    def test_an_array_of_another_byte_order_says_how_to_turn_it(self) -> None:
        array = np.ones(2, np.dtype(np.float32).newbyteorder())
        with pytest.raises(InvalidValue, match=r"'w' is [<>]f4.*pass array\.astype"):
            to_tensor(array, "w")
        assert to_tensor(array.astype(array.dtype.newbyteorder("=")), "w").tolist() == [1.0, 1.0]

    def test_a_masked_array_is_not_read_as_if_it_had_no_mask(self) -> None:
        masked = np.ma.array([1.0, 2.0], mask=[False, True])
        for take in (to_tensor, to_out):
            with pytest.raises(InvalidValue, match=r"'w' is masked.*filled"):
                take(masked, "w")

    @pytest.mark.parametrize(
        "array",
        [
            np.zeros(2, ">f4"),
            np.zeros(2, np.longdouble),
            np.zeros(2, "datetime64[s]"),
            np.zeros(2, [("a", "f4"), ("b", "i4")]),
            np.zeros(2, "S3"),
        ],
        ids=lambda array: str(array.dtype),
    )
    def test_a_dtype_that_torch_has_not(self, array: np.ndarray[Any, Any]) -> None:
        for take in (to_tensor, to_out):
            with pytest.raises(InvalidValue, match="'w'"):
                take(array, "w")

    @pytest.mark.parametrize("value", [None, 1.5, "x", object()])
    def test_what_is_no_array(self, value: Any) -> None:
        with pytest.raises(InvalidValue, match="'w'"):
            to_tensor(value, "w")

    def test_sparse_and_meta(self) -> None:
        with pytest.raises(InvalidValue, match="to_dense"):
            to_tensor(torch.eye(2).to_sparse(), "w")
        with pytest.raises(InvalidValue, match="meta"):
            to_tensor(torch.zeros(2, device="meta"), "w")


class TestToOut:
    def test_autograd_notices_a_write(self) -> None:
        parameter = torch.nn.Parameter(torch.ones(3))
        loss = (parameter * parameter).sum()
        to_out(parameter, "w").fill_(2)
        assert parameter.tolist() == [2, 2, 2]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_numpy_and_dlpack_are_written_through(self) -> None:
        array, foreign = np.zeros(2), Foreign(torch.zeros(2))
        to_out(array, "w").fill_(3)
        to_out(foreign, "w").fill_(4)
        assert array.tolist() == [3, 3]
        assert foreign.tensor.tolist() == [4, 4]

    def test_a_strided_view_is_fine(self) -> None:
        base = torch.zeros(4, 2)
        to_out(base.t()[:, ::2], "w").fill_(1)
        assert base.sum() == 4

    def test_one_element_may_be_expanded(self) -> None:
        assert to_out(torch.zeros(1).expand(1, 1), "w").shape == (1, 1)

    @pytest.mark.parametrize(
        "out", [torch.zeros(1).expand(3), torch.zeros(3, 1).expand(3, 2)], ids=["vector", "matrix"]
    )
    def test_an_expanded_tensor_is_refused(self, out: torch.Tensor) -> None:
        with pytest.raises(InvalidOut, match="expanded"):
            to_out(out, "w")

    def test_a_read_only_array_is_refused(self) -> None:
        array = np.zeros(2)
        array.flags.writeable = False
        with pytest.raises(InvalidOut, match="read-only"):
            to_out(array, "w")

    @pytest.mark.parametrize("versioned", [True, False])
    def test_read_only_memory_by_dlpack_is_refused(self, versioned: bool) -> None:
        """NumPy sets the flag of DLPack 1.0, and refuses to hand out such memory to who asks for less."""
        array = np.arange(3.0)
        array.flags.writeable = False
        exporter = Exporter(array, versioned)
        if versioned:
            assert to_tensor(exporter, "w").tolist() == [0, 1, 2]
        with pytest.raises((InvalidOut, InvalidValue), match=r"'w'.*(read-only|readonly)"):
            to_out(exporter, "w")
        assert array.tolist() == [0, 1, 2]

    @pytest.mark.parametrize("versioned", [True, False])
    def test_memory_by_dlpack_is_written_with_and_without_a_version(self, versioned: bool) -> None:
        array = np.zeros(3)
        to_out(Exporter(array, versioned), "w").fill_(2)
        assert array.tolist() == [2, 2, 2]

    def test_a_copy_by_dlpack_is_no_out(self) -> None:
        class Copying(Exporter):
            def __dlpack__(self, **kwargs: Any) -> Any:
                return self.array.__dlpack__(**kwargs | {"copy": True})

        with pytest.raises(InvalidOut, match=r"'w'.*copies"):
            to_out(Copying(np.zeros(3), True), "w")

    def test_dimensions_that_interlace_are_written_and_those_that_overlap_are_not(self) -> None:
        """0 2 4 and 3 5 7 are six places; 0 1 2 and 1 2 3 are four; 0 2 4 and 4 6 8 are five."""
        base = torch.zeros(12)
        to_out(base.as_strided((2, 3), (3, 2)), "w").fill_(1)
        assert base.sum() == 6
        for strides in ((1, 1), (4, 2), (0, 1)):
            with pytest.raises(InvalidOut, match="share memory"):
                to_out(base.as_strided((2, 3), strides), "w")
        assert to_out(base.as_strided((2, 0), (1, 1)), "w").numel() == 0

    def test_a_jax_array_is_refused(self) -> None:
        with pytest.raises(InvalidOut, match="JAX"):
            to_out(Jax(torch.zeros(2)), "w")

    def test_what_is_no_array(self) -> None:
        with pytest.raises(InvalidValue, match="None"):
            to_out(None, "w")


class TestCheckMatches:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_floats_match_floats(self, dtype: torch.dtype) -> None:
        check_matches("out", torch.zeros(2, dtype=dtype), "w", (2,), torch.float32)

    def test_shapes(self) -> None:
        with pytest.raises(ShapeMismatch, match=r"out for key 'w' has shape \(2, 1\).*\(2,\)"):
            check_matches("out", torch.zeros(2, 1), "w", (2,), torch.float32)

    @pytest.mark.parametrize(
        ("given", "stored"),
        [
            (torch.int64, torch.float32),
            (torch.float32, torch.int64),
            (torch.int32, torch.int64),
            (torch.bool, torch.uint8),
            (torch.complex64, torch.complex128),
            (torch.complex64, torch.float32),
        ],
    )
    def test_other_dtypes_must_be_equal(self, given: torch.dtype, stored: torch.dtype) -> None:
        check_matches("value", torch.zeros(1, dtype=stored), "w", (1,), stored)
        with pytest.raises(DtypeMismatch, match=f"{given}.*{stored}"):
            check_matches("value", torch.zeros(1, dtype=given), "w", (1,), stored)


def test_accumulate_dtype() -> None:
    assert accumulate_dtype(torch.float16) is torch.float32
    assert accumulate_dtype(torch.bfloat16) is torch.float32
    for dtype in (torch.float32, torch.float64, torch.int8, torch.bool, torch.complex64):
        assert accumulate_dtype(dtype) is dtype


def test_size_bytes() -> None:
    assert size_bytes((2, 3), torch.float64) == 48
    assert size_bytes((), torch.int8) == 1
    assert size_bytes((5, 0), torch.float32) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex128])
def test_dtype_names(dtype: torch.dtype) -> None:
    assert "torch" not in dtype_name(dtype)
    assert dtype_from_name(dtype_name(dtype)) is dtype


@pytest.mark.parametrize("name", ["float31", "nn", "Tensor", ""])
def test_an_unknown_dtype_name(name: str) -> None:
    with pytest.raises(InvalidValue, match="no dtype"):
        dtype_from_name(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_bytes_of(dtype: torch.dtype) -> None:
    tensor = torch.zeros(2, 3, dtype=dtype)
    view = bytes_of(tensor)
    assert view.nbytes == 6 * dtype.itemsize
    view[0] = 1
    assert bool(tensor[0, 0] != 0)
    assert bytes_of(torch.zeros(0, 3)).nbytes == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e5m2, torch.bool, torch.int8, torch.complex64])
def test_what_torch_can_add_is_summable(dtype: torch.dtype) -> None:
    check_summable(dtype, "w")
    check_summable(dtype, "w", mean=True)  # that integers have none is for the store to say


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_what_torch_cannot_add_is_named() -> None:
    with pytest.raises(InvalidValue, match=r"add values of dtype torch.uint16, as key 'w'"):
        check_summable(torch.uint16, "w")
    check_summable(torch.complex32, "w")
    with pytest.raises(InvalidValue, match=r"mean of values of dtype torch.complex32, as key 'w'"):
        check_summable(torch.complex32, "w", mean=True)


@pytest.mark.parametrize(
    "view", [lambda: torch.ones(2, dtype=torch.complex64).conj(), lambda: torch.ones(2)._neg_view()]
)
def test_an_out_that_is_changed_as_it_is_read_is_refused(view: Any) -> None:
    with pytest.raises(InvalidOut, match="'w'.*resolve_conj"):
        to_out(view(), "w")


def test_an_inference_tensor_is_an_out_in_inference_mode_only() -> None:
    with torch.inference_mode():
        made = torch.zeros(2, 3).t()
        out = to_out(made, "w")
    assert not out.is_inference()
    out.fill_(2)
    assert (made.shape, made.tolist()) == ((3, 2), [[2.0, 2.0]] * 3)
    with pytest.raises(InvalidOut, match="'w'.*inference"):
        to_out(made, "w")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
    for call in (to_tensor, to_out):
        with pytest.raises(InvalidValue, match="'w' is nested"):
            call(nested, "w")
    if layout is torch.strided:
        with pytest.raises(InvalidValue, match="'w' is nested"):
            check_matches("the value", nested, "w", (2, 3), torch.float32)


def test_addresses_are_of_tensors_with_memory() -> None:
    tensors = [torch.zeros(2), torch.zeros(3)]
    assert addresses_of(tensors) == [each.data_ptr() for each in tensors]
    assert addresses_of([*tensors, None]) == []
    assert addresses_of([torch.zeros(2).to_sparse()]) == []
