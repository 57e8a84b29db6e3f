"""Train a small transformer on the reference of Python that CPython carries, and let it write some of it.

    tensorkv run -n 2 -s 1 -- python examples/characters.py      # 2 workers, 1 server on this machine
    python examples/characters.py                                # one process

The text, 0.5 MB, is what `help("topics")` shows. The model reads it character by character.
"""

import argparse
import math
from pydoc_data import topics

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import tensorkv

TEXT = "\n\n".join(topics.topics.values())
ALPHABET, CONTEXT = sorted(set(TEXT)), 128


def numbers_of(text: str) -> Tensor:
    return torch.tensor([ALPHABET.index(character) for character in text])


class Transformer(nn.Module):
    """Guesses each next character of a window."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(len(ALPHABET), width), nn.Embedding(CONTEXT, width)
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, len(ALPHABET))

    def forward(self, windows: Tensor) -> Tensor:
        """Return scores of shape (batch, length, len(ALPHABET)) for windows of shape (batch, length)."""
        length = windows.shape[1]
        hidden = self.characters(windows) + self.places.weight[:length]
        later = nn.Transformer.generate_square_subsequent_mask(length)
        return self.head(self.blocks(hidden, later, is_causal=True))


@torch.no_grad()
def write(model: nn.Module, start: str, length: int) -> str:
    """Return `start`, and as many characters more by the model."""
    for _ in range(length):
        scores = model(numbers_of(start[-CONTEXT:])[None])[0, -1]
        start += ALPHABET[torch.multinomial((scores / 0.7).softmax(0), 1)]
    return start


def main() -> None:
    """Train, and let rank 0 tell how it goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--written", type=int, default=400, help="characters written at the end")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = Transformer(width=128, depth=3)
    optimizer = tensorkv.DistributedOptimizer(torch.optim.AdamW(model.parameters()), model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, args.steps)
    mine = tensorkv.shard(numbers_of(TEXT).unfold(0, CONTEXT + 1, 1))  # every second window, say
    loader = DataLoader(mine, 32 // tensorkv.num_workers(), shuffle=True)
    for step, windows in zip(range(1, args.steps + 1), loader, strict=False):
        loss = nn.functional.cross_entropy(model(windows[:, :-1]).transpose(1, 2), windows[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 and tensorkv.rank() == 0:
            print(f"step {step:4}  {loss.item() / math.log(2):.3f} bits for each character", flush=True)
    if tensorkv.rank() == 0:
        print(write(model, "The statement ", args.written))


if __name__ == "__main__":
    main()
