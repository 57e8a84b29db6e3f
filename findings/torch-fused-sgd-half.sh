#!/usr/bin/env bash
# torch==2.13.0 (also 2.9.1): on a CPU, SGD(fused=True) leaves every full vector block of a bfloat16 or float16
# parameter as it was; only the elements after the last full block are updated. Nothing is raised.
#
# Seen, for a parameter of zeros, a gradient of ones and lr=1 (every element should become -1):
#     bfloat16: moved 1 of 1, 0 of 4096       float16: moved 1 of 1, 0 of 4096       float32: 1 of 1, 4096 of 4096
# 4096 is a multiple of a vector block on every processor (8 elements with NEON, 16 with AVX2, 32 with AVX-512).
#
# Why it matters: whoever turns on the fused optimizer for speed, by hand or for a user, trains half-precision
# weights on a CPU not at all, and the loss merely looks stuck. Reported as pytorch issue 191763.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0

"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch

moved = {}
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    for size in (1, 4096):
        weight = torch.zeros(size, dtype=dtype, requires_grad=True)
        weight.grad = torch.ones_like(weight)
        torch.optim.SGD([weight], lr=1.0, fused=True).step()
        moved[dtype, size] = int((weight == -1).sum())
        print(f"{dtype}: moved {moved[dtype, size]} of {size}")
stated = [1, 0, 1, 0, 1, 4096]
sys.exit(0 if list(moved.values()) == stated else f"this has changed: {stated} were seen when this was written")
PYTHON
