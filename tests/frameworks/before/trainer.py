"""A small GPT-2 trained by transformers' Trainer, which accumulates gradients, clips, and saves."""

import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

torch.manual_seed(0)
sizes = {"vocab_size": 32, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
off = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
model = GPT2LMHeadModel(GPT2Config(**sizes, **off, bos_token_id=1, eos_token_id=1))
tokens = torch.randint(0, 32, (64, 16))
data = [{"input_ids": each, "labels": each} for each in tokens]
own = {"output_dir": "out", "max_grad_norm": 0.5}
args = TrainingArguments(
    **own,
    per_device_train_batch_size=int(sys.argv[1]),
    gradient_accumulation_steps=2,
    max_steps=6,
    save_steps=3,
    train_sampling_strategy="sequential",
    use_cpu=True,
    report_to=[],
    disable_tqdm=True,
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 6)
trainer = Trainer(model, args, train_dataset=data, optimizers=(optimizer, scheduler))
trainer.train(resume_from_checkpoint="resume" in sys.argv)
print("weights", [round(each.double().sum().item(), 4) for each in model.parameters()])
