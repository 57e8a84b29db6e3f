"""A small GPT-2 trained by TRL's SFTTrainer on sentences of letters."""

import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
import tensorkv

torch.manual_seed(0)
letters = "abcdefgh"
words = {word: number for number, word in enumerate(["<pad>", "<eos>", *letters])}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
sizes = {"vocab_size": 16, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
off = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
model = GPT2LMHeadModel(GPT2Config(**sizes, **off, bos_token_id=1, eos_token_id=1))
data = Dataset.from_dict(
    {"text": [" ".join(letters[each] for each in row) for row in torch.randint(0, 8, (32, 6))]}
)
own = {"output_dir": f"out/{tensorkv.rank()}", "max_grad_norm": 0}
args = SFTConfig(
    **own,
    per_device_train_batch_size=int(sys.argv[1]),
    max_steps=4,
    train_sampling_strategy="sequential",
    gradient_checkpointing=False,
    use_cpu=True,
    bf16=False,
    report_to=[],
    disable_tqdm=True,
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
optimizer = tensorkv.DistributedOptimizer(optimizer, model, max_norm=0.5)
trainer = SFTTrainer(
    model, args, train_dataset=tensorkv.shard(data), processing_class=tokenizer, optimizers=(optimizer, None)
)
trainer.train()
print("weights", [round(each.double().sum().item(), 4) for each in model.parameters()])
