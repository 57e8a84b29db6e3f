"""The machine and date of a measurement."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import final


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine. `load` is its load average of the last minute."""

    cpu: str
    num_cores: int
    memory_gb: float
    system: str
    python: str
    date: str
    load: float

    def text(self) -> str:
        """Return the description as one line."""
        return (
            f"{self.date}, {self.cpu}, {self.num_cores} cores, {self.memory_gb:.0f} GB, {self.system}, "
            f"Python {self.python}; load before the start {self.load:.1f}"
        )


def this_machine() -> Machine:
    """Return the description of this machine, now."""
    return Machine(
        cpu=_cpu_model(),
        num_cores=len(os.sched_getaffinity(0)),
        memory_gb=memory_bytes() / 1e9,
        system=f"{platform.system()} {platform.release().partition('-')[0]}",
        python=platform.python_version(),
        date=datetime.now(UTC).date().isoformat(),
        load=os.getloadavg()[0],
    )


def memory_bytes() -> int:
    """Return the size of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
