#!/usr/bin/env bash
# torch==2.13.0: Optimizer.load_state_dict keeps the checkpoint's own tensors as its state where dtype and device fit
# already, although the helper that converts them is described as a deep copy. The next steps change them in place.
#
# Seen: after a load and one step, exp_avg in the checkpoint has changed with the optimizer's, and two optimizers that
# were loaded from one checkpoint in memory share their momentum: a step of one changes the state of the other. "step"
# is shared, too. A model's load_state_dict copies.
#
# Why it matters: an ensemble, a sweep or a restart that loads one checkpoint several times in a process trains with
# state that the others have moved on, and nothing is raised.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0

"$folder/venv/bin/python" - <<'PYTHON'
import copy
import sys

import torch


def trained(checkpoint=None):
    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.Adam([weight], lr=0.1)
    if checkpoint is not None:
        optimizer.load_state_dict(checkpoint)
    weight.grad = torch.ones(4)
    optimizer.step()
    return optimizer, weight


checkpoint = copy.deepcopy(trained()[0].state_dict())
before = copy.deepcopy(checkpoint["state"][0])
first, weight = trained(checkpoint)
moved = {name: not torch.equal(checkpoint["state"][0][name], before[name]) for name in before}
second, other = trained(checkpoint)
shared = first.state[weight]["exp_avg"].data_ptr() == second.state[other]["exp_avg"].data_ptr()
print("changed in the checkpoint:", moved)
print("two optimizers share exp_avg:", shared, "and count steps together:", first.state[weight]["step"].item())
as_stated = moved == {"step": True, "exp_avg": True, "exp_avg_sq": True} and shared
as_stated = as_stated and first.state[weight]["step"].item() == 3
sys.exit(0 if as_stated else "this has changed")
PYTHON
