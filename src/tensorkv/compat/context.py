"""MXNet's contexts: the device of an array.

`cpu(i)` with any i is memory of this machine: as in MXNet, several of them stand in for devices on a
machine without a GPU. `gpu(i)` is CUDA device i.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import ClassVar, final

import torch

from tensorkv.compat.base import MXNetError, MXNetKeyError


@final
class Context:
    """The device of an array: `Context("cpu", 1)`, or for short `cpu(1)`. In a `with` it is the default."""

    devtype2num: ClassVar[dict[str, int]] = {"cpu": 1, "gpu": 2, "cpu_pinned": 3, "cpu_shared": 5}
    _default = threading.local()

    def __init__(self, device_type: str | Context, device_id: int = 0) -> None:
        same = device_type if isinstance(device_type, Context) else None
        self.device_type: str = same.device_type if same else str(device_type)
        self.device_id: int = same.device_id if same else device_id
        if self.device_type not in self.devtype2num:
            raise MXNetKeyError(f"there is no type of device {device_type!r}")

    @classmethod
    def default_ctx(cls) -> Context:
        """Return the context of the innermost `with` of this thread, else `cpu(0)`."""
        stack: list[Context] = getattr(cls._default, "stack", [])
        return stack[-1] if stack else cls("cpu", 0)

    @property
    def device_typeid(self) -> int:
        """MXNet's number of the device type."""
        return self.devtype2num[self.device_type]

    def torch_device(self) -> torch.device:
        """Return the torch device of this context.

        Raises:
            MXNetError: this machine has no such GPU.
        """
        if self.device_type != "gpu":
            return torch.device("cpu")
        if not 0 <= self.device_id < torch.cuda.device_count():
            raise MXNetError(
                f"there is no {self}: torch sees {torch.cuda.device_count()} GPUs here; "
                "mx.cpu(i) can stand for a device"
            )
        return torch.device("cuda", self.device_id)

    def __enter__(self) -> Context:
        if not hasattr(self._default, "stack"):
            self._default.stack = []
        self._default.stack.append(self)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._default.stack.pop()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Context) and (self.device_type, self.device_id) == (
            other.device_type,
            other.device_id,
        )

    def __hash__(self) -> int:
        return hash((self.device_type, self.device_id))

    def __repr__(self) -> str:
        return f"{self.device_type}({self.device_id})"


def cpu(device_id: int = 0) -> Context:
    """Return a context of this machine's memory."""
    return Context("cpu", device_id)


def cpu_pinned(device_id: int = 0) -> Context:
    """Return a context of this machine's memory; the same as `cpu` here."""
    return Context("cpu_pinned", device_id)


def gpu(device_id: int = 0) -> Context:
    """Return the context of a GPU. Its existence is checked only when an array is created there."""
    return Context("gpu", device_id)


def num_gpus() -> int:
    """Return the number of GPUs torch sees."""
    return torch.cuda.device_count()


def current_context() -> Context:
    """Return the default context of new arrays."""
    return Context.default_ctx()


def context_of(tensor: torch.Tensor) -> Context:
    """Return the context of a tensor's device."""
    return gpu(tensor.device.index or 0) if tensor.device.type == "cuda" else cpu(0)
