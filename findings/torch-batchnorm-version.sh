#!/usr/bin/env bash
# torch==2.13.0: in training mode BatchNorm changes its running_mean and running_var in place without counting it in
# their version counters (Tensor._version). num_batches_tracked, of the same module, is counted, and so are
# the running statistics of InstanceNorm.
#
# Seen, versions before and after one forward on a CPU; the values of all four have changed:
#     BatchNorm1d.running_mean 1 1    BatchNorm1d.num_batches_tracked 1 2    InstanceNorm1d.running_mean 1 2
#
# Why it matters: whoever finds out by version counters which tensors of a model have changed, to send or to save
# only these, leaves out the statistics, and evaluates with those of the start.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0

"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch

batch_norm = torch.nn.BatchNorm1d(2)
instance_norm = torch.nn.InstanceNorm1d(2, track_running_stats=True)
buffers = {
    "BatchNorm1d.running_mean": batch_norm.running_mean,
    "BatchNorm1d.running_var": batch_norm.running_var,
    "BatchNorm1d.num_batches_tracked": batch_norm.num_batches_tracked,
    "InstanceNorm1d.running_mean": instance_norm.running_mean,
}
before = {name: (each._version, each.clone()) for name, each in buffers.items()}
inputs = torch.arange(32.0).reshape(4, 2, 4)
batch_norm(inputs)
instance_norm(inputs)
counted = {}
for name, each in buffers.items():
    version, value = before[name]
    assert not torch.equal(each, value), f"{name} has not changed"
    counted[name] = each._version > version
    print(name, version, each._version)
stated = [False, False, True, True]
sys.exit(0 if list(counted.values()) == stated else f"this has changed: {stated} were seen when this was written")
PYTHON
