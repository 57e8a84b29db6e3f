"""A loop of plain torch."""

import sys

import torch

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
data = torch.utils.data.TensorDataset(torch.randn(64, 4))
loader = torch.utils.data.DataLoader(data, int(sys.argv[1]))
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
for _ in range(3):
    for (inputs,) in loader:
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    scheduler.step()
print("weights", [round(each.double().sum().item(), 5) for each in model.parameters()])
