"""A training with DistributedDataParallel that torchrun starts, and that goes on from its snapshot."""

import os
import sys

import tensorkv
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

batch_size, num_epochs = map(int, sys.argv[1:3])
dist.init_process_group("gloo")
torch.manual_seed(0)
data = TensorDataset(torch.randn(64, 4))
sampler = DistributedSampler(data)
loader = DataLoader(data, batch_size, sampler=sampler)
module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
model = module
optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
optimizer = tensorkv.DistributedOptimizer(optimizer, module)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
first = 0
if os.path.exists("snapshot.pt"):
    snapshot = torch.load("snapshot.pt", weights_only=True)
    module.load_state_dict(snapshot["model"])
    optimizer.load_state_dict(snapshot["optimizer"])
    scheduler.load_state_dict(snapshot["scheduler"])
    first = snapshot["epoch"] + 1
for epoch in range(first, num_epochs):
    sampler.set_epoch(epoch)
    for (inputs,) in loader:
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    scheduler.step()
    if dist.get_rank() == 0:
        snapshot = {"model": module.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**snapshot, "scheduler": scheduler.state_dict(), "epoch": epoch}, "snapshot.pt")
weights = f"weights {[round(each.double().sum().item(), 5) for each in module.parameters()]}\n"
os.write(1, weights.encode())  # torchrun may mix what two processes print
dist.barrier()
dist.destroy_process_group()
