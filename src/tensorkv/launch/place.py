"""Where this process stands in its job: its rank, and how many workers there are. Joins nothing."""

from __future__ import annotations

import os

from tensorkv.config import from_env
from tensorkv.launch.torchrun import read_place


def find_place() -> tuple[int, int] | None:
    """Return rank and number of workers of this process, as its launcher says; None outside a job.

    Raises:
        NotInJob: this process is no worker, or its launcher's variables do not fit together.
    """
    config = from_env()
    if config is not None:
        return (config.rank, config.num_workers) if config.role == "worker" else None
    place = read_place(os.environ)
    return None if place is None else (place.rank, place.num_workers)


def rank() -> int:
    """Return the rank of this process among the workers of its job; 0 outside a job.

    It reads what the launcher (`tensorkv run`, `tensorkv.spawn`, torchrun or one like it) has told this
    process, and does not wait for anybody.

    Raises:
        NotInJob: the launcher's variables are incomplete.

    Example:
        ```python
        print(tensorkv.rank(), tensorkv.num_workers())  # 0 1
        ```
    """
    place = find_place()
    return 0 if place is None else place[0]


def num_workers() -> int:
    """Return the number of workers that the job of this process was started with; 1 outside a job.

    Raises:
        NotInJob: the launcher's variables are incomplete.

    Example:
        ```python
        batch_size = 256 // tensorkv.num_workers()
        print(batch_size)  # 256
        ```
    """
    place = find_place()
    return 1 if place is None else place[1]
