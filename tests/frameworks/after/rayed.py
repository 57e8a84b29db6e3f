"""Ray Train's TorchTrainer."""

import sys

import ray.train
import ray.train.torch
import tensorkv
import torch


def train(config):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer = tensorkv.DistributedOptimizer(optimizer, model)
    data = torch.utils.data.TensorDataset(torch.randn(64, 4))
    loader = torch.utils.data.DataLoader(tensorkv.shard(data), config["batch_size"])
    for _ in range(3):
        for (inputs,) in loader:
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
    print("weights", [round(each.double().sum().item(), 5) for each in model.parameters()])


trainer = ray.train.torch.TorchTrainer(
    train,
    train_loop_config={"batch_size": int(sys.argv[1])},
    scaling_config=ray.train.ScalingConfig(num_workers=int(sys.argv[2])),
)
trainer.fit()
