"""The tensors that benchmarks move."""

from __future__ import annotations

import pytest

from tensorkv.bench.shapes import (
    MODELS,
    format_size,
    key_names,
    num_elems,
    parse_size,
    parse_sizes,
    shapes_of,
)


@pytest.mark.parametrize(
    ("model", "num_keys", "elems"),
    [
        ("resnet50", 161, 25_557_032),
        ("vgg16", 32, 138_357_544),
        ("bert-base", 199, 109_482_240),
        ("gpt2", 148, 124_439_808),
        ("llama-7b-layer", 9, 202_383_360),
    ],
)
def test_models_have_their_parameters(model: str, num_keys: int, elems: int) -> None:
    """As their publishers count them."""
    assert len(MODELS[model]) == num_keys
    assert num_elems(MODELS[model]) == elems


def test_every_model_is_counted_above() -> None:
    assert len(MODELS) == 5


def test_a_size_is_one_vector_of_so_many_bytes() -> None:
    assert shapes_of("4KB") == [(1024,)]
    assert shapes_of("1MB", 2) == [(1 << 19,)]
    assert shapes_of("1B") == [(1,)]
    assert shapes_of("one") == [(64,)]
    assert shapes_of("3x4KB") == [(1024,)] * 3
    assert key_names(shapes_of("quick")) == ["p0", "p1", "p2", "p3"]


@pytest.mark.parametrize("text", ["", "4", "KB", "-4KB", "0KB", "4TB", "2000000GB", "1.5MB", "4KB..8KB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


def test_ranges_and_lists() -> None:
    assert parse_sizes("4KB..256MB") == [
        "4KB",
        "16KB",
        "64KB",
        "256KB",
        "1MB",
        "4MB",
        "16MB",
        "64MB",
        "256MB",
    ]
    assert parse_sizes("3KB..10KB") == ["3KB", "10KB"]
    assert parse_sizes("1MB..1mb") == ["1MB"]
    assert parse_sizes("1024B, 4 MB") == ["1KB", "4MB"]
    with pytest.raises(ValueError, match="the first size is over the last"):
        parse_sizes("1MB..1KB")
    assert [parse_size(format_size(each)) for each in (1, 1000, 1 << 30)] == [1, 1000, 1 << 30]
