"""Ray Train's TorchTrainer."""

import sys

import ray.train
import ray.train.torch
import torch


def train(config):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    model = ray.train.torch.prepare_model(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    data = torch.utils.data.TensorDataset(torch.randn(64, 4))
    loader = torch.utils.data.DataLoader(data, config["batch_size"])
    loader = ray.train.torch.prepare_data_loader(loader)
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
