"""Limits of this process: how much memory and how many descriptors it may still take, and what it gives back.

The kernel allocates a page of shared memory when a process first touches it, and kills the process if the
page exceeds the container's limit. So the limits are checked beforehand.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

from tensorkv.errors import MemoryLimitReached

PROC = Path("/proc/self")
CGROUPS = Path("/sys/fs/cgroup")
DESCRIPTORS_A_SEGMENT = 2
"""Number of descriptors of one segment: its own and that of its mapping."""


def check_room(size_bytes: int) -> None:
    """Raise MemoryLimitReached if a segment of this size would exceed a limit of this process.

    It reserves nothing: other processes may take the memory meanwhile.
    """
    _check_descriptors(size_bytes)
    _check_address_space(size_bytes)
    for name, used_bytes, limit_bytes in _cgroups():
        if used_bytes + size_bytes > limit_bytes:
            raise _error(size_bytes, f"the control group {name}", used_bytes, limit_bytes)


def with_the_way_out(exc: BaseException) -> str:
    """Return the text of a system error; if descriptors have run out, add the remedy."""
    if isinstance(exc, OSError) and exc.errno in (errno.EMFILE, errno.ENFILE):
        return f"{exc}; raise the limit on open files (ulimit -n)"
    return str(exc)


def limits() -> str:
    """Return each memory limit and how much of it is in use, for error texts."""
    found = [(name, used, limit) for name, used, limit in _cgroups()]
    limit_bytes, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit_bytes != resource.RLIM_INFINITY:
        used_bytes = int((PROC / "statm").read_text().split()[0]) * resource.getpagesize()
        found.append(("the address space of the process (ulimit -v)", used_bytes, limit_bytes))
    if not found:
        pages, free = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_AVPHYS_PAGES")
        found.append(("the host", (pages - free) * resource.getpagesize(), pages * resource.getpagesize()))
    return ", ".join(f"{used} of {limit} bytes of {name} are in use" for name, used, limit in found)


def _check_descriptors(size_bytes: int) -> None:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return
    used = len(os.listdir(PROC / "fd")) - 1  # without the descriptor of the listing
    if used + DESCRIPTORS_A_SEGMENT > limit:
        raise MemoryLimitReached(
            f"no file descriptor for {size_bytes} bytes of shared memory: {used} of {limit} are in use; "
            "raise the limit (ulimit -n)"
        )


def _check_address_space(size_bytes: int) -> None:
    limit_bytes, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit_bytes == resource.RLIM_INFINITY:
        return
    used_bytes = int((PROC / "statm").read_text().split()[0]) * resource.getpagesize()
    if used_bytes + size_bytes > limit_bytes:
        raise _error(size_bytes, "the address space of this process (ulimit -v)", used_bytes, limit_bytes)


def _error(size_bytes: int, what: str, used_bytes: int, limit_bytes: int) -> MemoryLimitReached:
    return MemoryLimitReached(
        f"{size_bytes} bytes of shared memory are too many for {what}: "
        f"{used_bytes} of {limit_bytes} bytes are in use"
    )


def _cgroups() -> Iterator[tuple[str, int, int]]:
    """Yield name, bytes in use and limit of each cgroup (v1 or v2) that limits the memory of this process.

    The page cache does not count as in use, since the kernel can reclaim it.
    """
    for line in _lines(PROC / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _limits(CGROUPS, path, "memory.current", "memory.max")
        elif "memory" in controllers.split(","):
            yield from _limits(CGROUPS / "memory", path, "memory.usage_in_bytes", "memory.limit_in_bytes")


def _limits(root: Path, path: str, used: str, limit: str) -> Iterator[tuple[str, int, int]]:
    """Yield the limits of a cgroup and of its ancestors. A container may see none but its own."""
    group = root / path.lstrip("/")
    for folder in [group, *group.parents]:
        found = _lines(folder / limit)
        if found and found[0] != "max":
            stat = dict(line.split() for line in _lines(folder / "memory.stat"))
            cached_bytes = sum(int(stat.get(name, 0)) for name in ("inactive_file", "active_file"))
            yield str(folder), int(_lines(folder / used)[0]) - cached_bytes, int(found[0])
        if folder == root:
            return


def _lines(path: Path) -> list[str]:
    """Return the lines of a kernel file; an empty list if it does not exist or is not readable."""
    try:
        return path.read_text().splitlines()
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        return []


def trim_heap() -> None:
    """Let the C library of this process return freed memory to the system.

    glibc keeps what is freed in pieces of up to 32 MiB: a server with a model of 1 GB kept 0.8 GB beside it.
    It keeps less if told to (M_MMAP_THRESHOLD), but then each temporary tensor of a step is made of fresh
    pages, and an Adam step over bf16 keys takes twice as long. Other C libraries may have nothing to trim.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
