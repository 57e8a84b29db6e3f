"""The sets of tensors that every benchmark moves, and the one rule for what is in them.

Imports nothing but the standard library: MXNet's environment has no torch.
"""

from __future__ import annotations

import math

Shape = tuple[int, ...]

FLOAT_BYTES = 4
"""All benchmarks move float32."""


def resnet50_shapes() -> list[Shape]:
    """Return the shapes of ResNet-50's 161 parameters: 25.6 million floats, 102 MB."""
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
    """A convolution without bias, and the scale and shift of the normalisation after it."""
    return [kernel, kernel[:1], kernel[:1]]


SETS: dict[str, list[Shape]] = {
    "resnet50": resnet50_shapes(),
    "tiny": [(64,)] * 1000,
    "one": [(64,)],
    "big": [(25_600_000,)],
    "quick": [(3, 5), (7,), (), (2000,)],
}
"""Name to shapes. "quick" is for the tests: it has a scalar and sizes that divide by nothing."""


def num_elems(shapes: list[Shape]) -> int:
    """Return the number of floats in all shapes together."""
    return sum(math.prod(shape) for shape in shapes)


def key_names(shapes: list[Shape]) -> list[str]:
    """Return a key for each shape, in order."""
    return [f"p{index}" for index in range(len(shapes))]
