"""A loop with Accelerate, which accumulates gradients and saves."""

import sys

import torch
from accelerate import Accelerator
import tensorkv

torch.manual_seed(0)
folder = f"state{tensorkv.rank()}"
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
optimizer = tensorkv.DistributedOptimizer(optimizer, model)
data = torch.utils.data.TensorDataset(torch.randn(64, 4))
loader = torch.utils.data.DataLoader(tensorkv.shard(data), int(sys.argv[1]))
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
for epoch in range(3):
    for (inputs,) in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(inputs).square().mean())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    if epoch == 0:
        accelerator.save_state(folder)
    if epoch == 1:
        accelerator.load_state(folder)  # what the second epoch has done is undone
print("weights", [round(each.double().sum().item(), 5) for each in model.parameters()])
