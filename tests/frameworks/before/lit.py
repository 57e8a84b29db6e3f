"""A LightningModule that leaves the optimization to Lightning."""

import sys

import lightning
import torch


class Regression(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))

    def training_step(self, batch, number):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


torch.manual_seed(0)
path = "model.ckpt"
model = Regression()
data = torch.utils.data.TensorDataset(torch.randn(64, 4))
loader = torch.utils.data.DataLoader(data, int(sys.argv[1]))
options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
trainer = lightning.Trainer(max_epochs=2, **options)
trainer.fit(model, loader)
trainer.save_checkpoint(path)
model = Regression()
lightning.Trainer(max_epochs=3, **options).fit(model, loader, ckpt_path=path)
print("weights", [round(each.double().sum().item(), 5) for each in model.parameters()])
