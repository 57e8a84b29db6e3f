"""Buffers: running statistics and counters of a model, which every worker changes and all shall have
alike."""

from __future__ import annotations

from typing import Any, Literal, final

import torch

from tensorkv.keys import ABSENT
from tensorkv.store import KVStore
from tensorkv.training.start import Meeting

Buffers = Literal["rank0", "mean"]


_CLOCK = "tensorkv.clock"


@final
class BufferExchange:
    """Gives all workers the same buffers after each step: rank 0's, or the mean of all.

    Only those that the first step has changed on some worker are exchanged: a model may have masks and tables
    that no step changes. Numbers that are no floats travel as float64.

    One worker sends its buffers, rank 0 first, and with them a clock. If nobody has set the clock in a round,
    that worker is gone: all see it in the same round, keep what they have, and expect the next rank to send.
    """

    def __init__(self, model: torch.nn.Module, kv: KVStore, which: Buffers) -> None:
        self._model = model
        self._kv = kv
        self._which = which
        self._names: list[str] = []  # of what is exchanged, once that is known
        self._sender = 0  # the rank that sends its buffers
        self._num_rounds = 0  # that this worker has taken part in
        self._clock = 0.0  # what the sender has set it to last
        self._before = {name: each.detach().clone() for name, each in model.named_buffers()}

    def agree(self, others: Meeting) -> None:
        """Find out with all workers what the first step has changed."""
        now = dict(self._model.named_buffers())
        # Values are compared, because BatchNorm changes its statistics without counting it in `_version`.
        changed = [name for name, each in now.items() if not _same(each, self._before.get(name))]
        self._before.clear()
        self._names = others.union(list(now), changed)
        if self._names:
            clock = torch.zeros(1, dtype=torch.float64, device="cpu")
            self._kv.init({**{name: self._value(name) for name in self._names}, _CLOCK: clock})

    def close(self) -> None:
        """Leave the exchange."""
        self._kv.close()

    def exchange(self) -> None:
        """Make the buffers alike. Every worker calls it after each step."""
        names = self._names
        if not names:
            return
        kv = self._kv
        self._num_rounds += 1
        pushed: dict[str, Any] = dict.fromkeys([*names, _CLOCK], ABSENT)
        if self._which == "mean" or kv.rank == self._sender:
            pushed = {name: self._value(name) for name in names}
            pushed[_CLOCK] = torch.tensor([float(self._num_rounds)], dtype=torch.float64, device="cpu")
        *found, clock = kv.pushpull(list(pushed), list(pushed.values()))
        before, self._clock = self._clock, clock.item()
        if self._clock == before:
            if kv._allows_commit:  # without rounds, the sender may only be slower
                self._sender = (self._sender + 1) % kv.num_workers
            return
        for name, value in zip(names, found, strict=True):
            buffer = self._model.get_buffer(name)
            buffer.copy_(value if buffer.is_floating_point() else value.round())

    def _value(self, name: str) -> torch.Tensor:
        buffer = self._model.get_buffer(name).detach()
        return buffer if buffer.is_floating_point() or buffer.is_complex() else buffer.double()


def _same(one: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and one.shape == other.shape and torch.equal(one, other)
