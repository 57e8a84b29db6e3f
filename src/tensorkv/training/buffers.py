"""Buffers: running statistics and counters of a model, which every worker changes and all shall have
alike."""

from __future__ import annotations

from typing import Literal, final

import torch

from tensorkv.keys import ABSENT
from tensorkv.store import KVStore
from tensorkv.training.start import Meeting

Buffers = Literal["rank0", "mean"]


@final
class BufferExchange:
    """Gives all workers the same buffers after each step: rank 0's, or the mean of all.

    Only those that the first step has changed on some worker are exchanged: a model may have masks and tables
    that no step changes. Numbers that are no floats travel as float64.
    """

    def __init__(self, model: torch.nn.Module, kv: KVStore, which: Buffers) -> None:
        self._model = model
        self._kv = kv
        self._which = which
        self._names: list[str] = []  # of what is exchanged, once that is known
        self._before = {name: each.detach().clone() for name, each in model.named_buffers()}

    def agree(self, others: Meeting) -> None:
        """Find out with all workers what the first step has changed."""
        now = dict(self._model.named_buffers())
        # Values are compared, because BatchNorm changes its statistics without counting it in `_version`.
        changed = [name for name, each in now.items() if not _same(each, self._before.get(name))]
        self._before.clear()
        self._names = others.union(list(now), changed)
        if self._names:
            self._kv.init({name: self._value(name) for name in self._names})

    def close(self) -> None:
        """Leave the exchange."""
        self._kv.close()

    def exchange(self) -> None:
        """Make the buffers alike. Every worker calls it after each step."""
        names = self._names
        if not names:
            return
        pushes = self._which == "mean" or self._kv.rank == 0
        pushed = [self._value(name) if pushes else ABSENT for name in names]
        found = self._kv.pushpull(names, pushed)
        for name, value in zip(names, found, strict=True):
            buffer = self._model.get_buffer(name)
            buffer.copy_(value if buffer.is_floating_point() else value.round())

    def _value(self, name: str) -> torch.Tensor:
        buffer = self._model.get_buffer(name).detach()
        return buffer if buffer.is_floating_point() or buffer.is_complex() else buffer.double()


def _same(one: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and one.shape == other.shape and torch.equal(one, other)
