"""Train a small convolutional network on handwritten digits, with weights and optimizer in a store.

    tensorkv run -n 4 -s 2 -- python examples/digits.py         # 4 workers, 2 servers on this machine
    python examples/digits.py --store local                     # one process

The data are the 1,797 images of 8 x 8 pixels in digits.csv.gz, beside this file. Every worker computes the
gradient of its share of each batch; the store adds the shares up and runs the optimizer where the
weights live. However many workers there are, each step is that of one process on the whole batch.

The images: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits (its test set), UCI Machine
Learning Repository, 1998, doi.org/10.24432/C50P49, licence CC BY 4.0. A row is 64 pixels and the digit.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich import get_console
from rich.progress import track
from torch import Tensor, nn

import tensorkv


class Digits(NamedTuple):
    """Images of shape (N, 1, 8, 8) between 0 and 1, and the digit on each; the split is always the same."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(dtype: torch.dtype = torch.float32) -> Digits:
    """Return the images, four fifths of them to train on."""
    rows = np.loadtxt(Path(__file__).with_name("digits.csv.gz"), delimiter=",", dtype=np.int64)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(rows[:, :64], dtype=dtype).reshape(-1, 1, 8, 8)[order] / 16
    labels = torch.tensor(rows[:, 64])[order]
    cut = len(rows) * 4 // 5
    return Digits(images[:cut], labels[:cut], images[cut:], labels[cut:])


def make_net(seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the network. It has no BatchNorm, whose statistics would be those of one worker's share."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
    head = [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)]
    return nn.Sequential(*layers, *head).to(dtype)


def batches(num_images: int, batch: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """Return which images are in each batch of an epoch. Every worker works out the same ones."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(num_images, generator=generator).split(batch)


def gradients(net: nn.Module, images: Tensor, labels: Tensor, batch: int) -> dict[str, Tensor]:
    """Return a share's part of the gradient of the mean loss over `batch` images: the parts add up to it."""
    net.zero_grad()
    (nn.functional.cross_entropy(net(images), labels, reduction="sum") / batch).backward()
    return {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}


@torch.no_grad()
def evaluate(net: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the mean loss and the share of images that are recognised."""
    scores = net(images)
    right = scores.argmax(1) == labels
    return nn.functional.cross_entropy(scores, labels).item(), right.double().mean().item()


def train_epoch(kv: tensorkv.KVStore, net: nn.Module, data: Digits, indices: tuple[Tensor, ...]) -> float:
    """Take a step per batch, on this worker's share of it. Return the seconds until all workers are done."""
    weights = dict(net.named_parameters())
    kv.barrier()
    start = time.perf_counter()
    shown = kv.rank == 0 and get_console().is_terminal  # without a terminal, a bar leaves a blank line
    for chosen in track(indices, "training", transient=True, disable=not shown):
        mine = chosen[kv.rank :: kv.num_workers]
        pushed = gradients(net, data.train_images[mine], data.train_labels[mine], len(chosen))
        kv.pushpull(pushed, out=weights)  # push the gradients, pull the new weights
    kv.barrier()
    kv.pull(out=weights)  # in dist_async others may have pushed since
    return time.perf_counter() - start


def main() -> None:
    """Train, and let rank 0 tell how it goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--store", default="dist_sync", choices=["local", "dist_sync", "dist_async"])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=64, help="images per step, over all workers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", metavar="DIR", help="save every epoch there; go on from what is there")
    args = parser.parse_args()
    data, net = load(), make_net(args.seed)
    num_images, weights = len(data.train_labels), dict(net.named_parameters())
    with tensorkv.create(args.store) as kv:
        kv.set_optimizer(torch.optim.SGD, keys=list(weights), lr=0.05, momentum=0.9)
        if args.save and Path(args.save, "tensorkv.json").exists():
            kv.load(args.save)
        kv.init({**weights, "epochs": torch.tensor(0)})  # keeps the values of a loaded save
        kv.pull(out=weights)  # every worker starts from rank 0's weights, or those of the save
        for epoch in range(int(kv.pull("epochs")) + 1, args.epochs + 1):
            seconds = train_epoch(kv, net, data, batches(num_images, args.batch, args.seed, epoch))
            if kv.rank == 0:
                loss, _ = evaluate(net, data.train_images, data.train_labels)
                _, right = evaluate(net, data.test_images, data.test_labels)
                speed = f"{num_images / seconds:6,.0f} images/s"
                print(f"epoch {epoch:2}  loss {loss:.4f}  test accuracy {right:.2%}  {speed}", flush=True)
                kv.put("epochs", torch.tensor(epoch))
            if args.save:
                kv.save(args.save)
        if kv.rank == 0:
            _, right = evaluate(net, data.test_images, data.test_labels)
            print(f"{kv.kind}, {kv.num_workers} worker(s): {right:.2%} of the test images right")
            infos = [kv.info(name) for name in weights]
            values, state = sum(i.value_bytes for i in infos), sum(i.state_bytes for i in infos)
            where = "the servers hold" if kv.kind.startswith("dist") else "the store holds"
            rounds = f"{infos[0].round} rounds of pushes"
            print(f"{where} {values:,} bytes of weights and {state:,} of optimizer state, after {rounds}")


if __name__ == "__main__":
    main()
