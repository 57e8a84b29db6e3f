"""The tensors that benchmarks move: the shapes of models, and sizes.

Imports only the standard library: environments of other systems have no torch.
"""

from __future__ import annotations

import math
import re

Shape = tuple[int, ...]

FLOAT_BYTES = 4
MAX_SIZE_BYTES = 1 << 40
_UNITS = {"B": 1, "KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30}


def resnet50_shapes() -> list[Shape]:
    """Return the shapes of ResNet-50's 161 parameters: 25.6 million."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    num_in = 64
    for num_blocks, width, num_out in ((3, 64, 256), (4, 128, 512), (6, 256, 1024), (3, 512, 2048)):
        for block in range(num_blocks):
            shapes += _with_norm((width, num_in, 1, 1))
            shapes += _with_norm((width, width, 3, 3))
            shapes += _with_norm((num_out, width, 1, 1))
            if block == 0:  # the shortcut changes the number of channels here
                shapes += _with_norm((num_out, num_in, 1, 1))
            num_in = num_out
    return [*shapes, (1000, 2048), (1000,)]


def _with_norm(kernel: Shape) -> list[Shape]:
    """Return the shapes of a convolution without bias and of the scale and shift of its normalisation."""
    return [kernel, kernel[:1], kernel[:1]]


def vgg16_shapes() -> list[Shape]:
    """Return the shapes of VGG-16's 32 parameters: 138 million, most of them in one matrix."""
    shapes: list[Shape] = []
    num_in = 3
    for num_out in (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512):
        shapes += [(num_out, num_in, 3, 3), (num_out,)]
        num_in = num_out
    return shapes + _linear(4096, 25_088) + _linear(4096, 4096) + _linear(1000, 4096)


def bert_base_shapes() -> list[Shape]:
    """Return the shapes of BERT-base's 199 parameters: 109 million (uncased, with its pooler)."""
    shapes: list[Shape] = [(30_522, 768), (512, 768), (2, 768), *_norm(768)]
    for _ in range(12):
        shapes += _linear(768, 768) * 4 + _norm(768)  # query, key, value, output
        shapes += _linear(3072, 768) + _linear(768, 3072) + _norm(768)
    return shapes + _linear(768, 768)


def gpt2_shapes() -> list[Shape]:
    """Return the shapes of GPT-2's 148 parameters: 124 million."""
    shapes: list[Shape] = [(50_257, 768), (1024, 768)]
    for _ in range(12):
        shapes += _norm(768) + _linear(2304, 768) + _linear(768, 768)
        shapes += _norm(768) + _linear(3072, 768) + _linear(768, 3072)
    return shapes + _norm(768)


def llama_7b_layer_shapes() -> list[Shape]:
    """Return the shapes of the 9 parameters of one of the 32 layers of Llama-7B: 202 million."""
    attention: list[Shape] = [(4096, 4096)] * 4
    return [*attention, (11_008, 4096), (11_008, 4096), (4096, 11_008), (4096,), (4096,)]


def _linear(num_out: int, num_in: int) -> list[Shape]:
    return [(num_out, num_in), (num_out,)]


def _norm(width: int) -> list[Shape]:
    return [(width,), (width,)]


MODELS: dict[str, list[Shape]] = {
    "resnet50": resnet50_shapes(),
    "vgg16": vgg16_shapes(),
    "bert-base": bert_base_shapes(),
    "gpt2": gpt2_shapes(),
    "llama-7b-layer": llama_7b_layer_shapes(),
}
"""Name to the shapes of the parameters."""

SETS: dict[str, list[Shape]] = {
    **MODELS,
    "tiny": [(64,)] * 1000,
    "one": [(64,)],
    "big": [(25_600_000,)],
    "quick": [(3, 5), (7,), (), (2000,)],
}
"""The models, and sets that test something else. "quick" is for the tests: a scalar and awkward sizes."""


def shapes_of(name: str, itemsize: int = FLOAT_BYTES) -> list[Shape]:
    """Return the shapes of a set; for a size like "4MB" a vector of that size, for "100x4MB" 100 of them.

    Raises:
        ValueError: it is neither a set nor a size.
    """
    found = SETS.get(name)
    if found is not None:
        return found
    match = re.fullmatch(r"(\d{1,6})x(.+)", name)
    number, size = (int(match[1]), match[2]) if match else (1, name)
    return [(max(1, parse_size(size) // itemsize),)] * number


def parse_size(text: str) -> int:
    """Return the bytes of a size like "4KB", in units of 1024.

    Raises:
        ValueError: it is not a size.
    """
    match = re.fullmatch(r"(\d+)\s*([KMG]?B)", text.strip(), re.IGNORECASE)
    size_bytes = int(match[1]) * _UNITS[match[2].upper()] if match else 0
    if not 0 < size_bytes <= MAX_SIZE_BYTES:
        raise ValueError(
            f"{text!r} is no size; write one like 64KB, 4MB or 1GB, or a name of {', '.join(SETS)}"
        )
    return size_bytes


def parse_sizes(text: str) -> list[str]:
    """Return the sizes of a list, "4KB,1MB", or of a range, "4KB..256MB": each four times the one before.

    Raises:
        ValueError: one of them is not a size, or the range is empty.
    """
    first, dots, last = text.partition("..")
    if not dots:
        return [format_size(parse_size(each)) for each in text.split(",")]
    size_bytes, last_bytes = parse_size(first), parse_size(last)
    if size_bytes > last_bytes:
        raise ValueError(f"{text!r}: the first size is over the last")
    found: list[str] = []
    while size_bytes < last_bytes:
        found.append(format_size(size_bytes))
        size_bytes *= 4
    return [*found, format_size(last_bytes)]


def format_size(size_bytes: int) -> str:
    """Return a size as text that `parse_size` understands."""
    unit = next(unit for unit in reversed(_UNITS) if size_bytes % _UNITS[unit] == 0)
    return f"{size_bytes // _UNITS[unit]}{unit}"


def num_elems(shapes: list[Shape]) -> int:
    """Return the number of elements of all shapes together."""
    return sum(math.prod(shape) for shape in shapes)


def key_names(shapes: list[Shape]) -> list[str]:
    """Return a key for each shape, in order."""
    return [f"p{index}" for index in range(len(shapes))]
