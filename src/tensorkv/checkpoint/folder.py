"""The folder of a save: how a save is published atomically, and how leftovers of others are removed.

At any moment the folder holds a complete save, whatever crashes or saves at the same time:

1. The leader chooses a new random id, creates a *claim*, a file with that id in its name, and locks it. All
   files of the save have the id in their names, so no save writes to the files of another.
2. When all files are on disk, the leader writes the index to the claim and renames the claim to the name of
   the index. This one step publishes the save, supersedes the previous one and removes the claim.
3. A file of another id is removed in two cases. Its claim exists, but the claim's process is dead: then the
   claim is removed first; from then on renaming it fails, so that save can never be published. Or its claim
   does not exist: then the save was published or abandoned before we looked, and since an id is published
   only once, the file is needed only if the index, read after that, names it.

So concurrent saves do not wait for each other, and the folder holds the one published last.

A claim is dead if its lock is free: the system releases the lock of a process that ends, however it ends.
Locks may not work across a shared file system. So a claim of another machine, even with a free lock, or a
claim where there are no locks is dead only if it has not been touched for `STALE_S`.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path

from tensorkv.checkpoint.records import INDEX_NAME, FileRecord
from tensorkv.checkpoint.tensorfile import new_file, open_regular, write_all
from tensorkv.errors import SaveError

STALE_S = 600.0
"""Timeout after which an untouched claim is dead, where its lock proves nothing."""

MAX_INDEX_BYTES = 1 << 32
"""Maximum size of an index, in writing and in reading; enough for some millions of keys."""

_TRIES = 20
_OURS = re.compile(r"tensorkv-([0-9a-f]{16})-(?:[0-9]+-[0-9]+\.safetensors(?:\.tmp)?|([0-9a-f]{16})\.saving)")
"""Name of a file of a save: its id and, for a claim, the machine. Earlier versions wrote to .tmp names."""

_OLD_INDEX = f"{INDEX_NAME}.tmp"
"""The name to which earlier versions wrote their index."""


def file_name(save_id: str, server: int, number: int) -> str:
    """Return the name of a file of a save."""
    return f"tensorkv-{save_id}-{server}-{number}.safetensors"


def order_of(name: str) -> tuple[int, ...]:
    """Sort key of the files of a save: server and number."""
    return tuple(int(part) for part in name.removesuffix(".safetensors").split("-")[2:])


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """Turn an OSError of the block into a SaveError."""
    try:
        yield
    except SaveError:
        raise
    except OSError as exc:
        raise SaveError(f"{path} cannot be written on host {os.uname().nodename}: {exc}") from exc


@contextlib.contextmanager
def new_part(folder: str, name: str) -> Iterator[int]:
    """Create a file of a save that another process leads; yield its descriptor. Remove it if the block fails.

    A process that sees the claim, whose name is random, sees the leader's own folder. The check comes after
    the file is created, because that refreshes the host's cached listing of a shared folder.

    Raises:
        SaveError: it cannot be written, or this save is not, or no longer, in progress in the folder.
    """
    path = os.path.join(folder, name)
    if not os.path.isdir(folder):
        raise _not_shared(folder, name)
    with writing(path):
        descriptor = new_file(path)
        try:
            _check_claim(folder, name)
            yield descriptor
            _check_claim(folder, name)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(path)
            raise
        finally:
            os.close(descriptor)


def _check_claim(folder: str, name: str) -> None:
    start = f"tensorkv-{name.split('-')[1]}-"
    if not any(each.startswith(start) and each.endswith(".saving") for each in os.listdir(folder)):
        raise _not_shared(folder, name)


def _not_shared(folder: str, name: str) -> SaveError:
    who = f"server {order_of(name)[0]} on host {os.uname().nodename}"
    return SaveError(
        f"{who} does not see the save that is being made in {folder}: the servers write the files of a "
        "save, so the folder has to be on a file system that they all share"
    )


class Saving:
    """A save in progress. A context manager; at its end it removes a save that was not published.

    Raises:
        SaveError: the folder cannot be written.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._made = False
        self._file = -1
        self._claim = ""
        self.save_id = ""

    def __enter__(self) -> Saving:
        with writing(self._folder):
            self._make_claim()
        try:
            self._remove_leftovers(superseded=False)  # first, since the disk may be too full for one more
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(OSError):  # the claim is gone if the save was published
            os.remove(self._claim)
            for name in os.listdir(self._folder):
                if name.startswith(f"tensorkv-{self.save_id}-"):
                    self._remove(name)
            if self._made:
                os.rmdir(self._folder)
        os.close(self._file)

    def file_name(self, server: int, number: int) -> str:
        """Return the name of a file of this save."""
        return file_name(self.save_id, server, number)

    def touch(self) -> None:
        """Show other machines that this save is alive. Call it more often than every `STALE_S`."""
        with contextlib.suppress(OSError):
            os.utime(self._file)

    def _make_claim(self) -> None:
        for _ in range(_TRIES):
            if not os.path.isdir(self._folder):
                os.makedirs(self._folder, exist_ok=True)
                self._made = True
            self.save_id = secrets.token_hex(8)
            self._claim = os.path.join(self._folder, f"tensorkv-{self.save_id}-{_machine()}.saving")
            try:
                self._file = new_file(self._claim)
            except FileNotFoundError:  # a save that failed has removed the folder, which it had created
                continue
            if self._lock():
                return
            with contextlib.suppress(OSError):
                os.remove(self._claim)
            os.close(self._file)
        raise SaveError(f"{self._folder}: other saves have removed the claim of this one {_TRIES} times")

    def _lock(self) -> bool:
        """Lock the claim; return whether it still exists. Unlocked, it looks like that of a dead process."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # there are no locks here
            pass
        return os.fstat(self._file).st_nlink > 0

    def publish(self, index: bytes, files: Mapping[str, FileRecord]) -> None:
        """Publish the save, and remove leftovers of others. All its files are on disk.

        Raises:
            SaveError: it cannot be written, or its files are not visible here; the previous save is intact.
        """
        path = os.path.join(self._folder, INDEX_NAME)
        with writing(path):
            for name, file in files.items():
                self._check_seen(name, file)
            if len(index) > MAX_INDEX_BYTES:
                raise SaveError(f"{path} would have {len(index)} bytes, of at most {MAX_INDEX_BYTES}")
            write_all(self._file, index)
            os.fsync(self._file)
            _sync(self._folder)  # the names of the files reach the disk before the index that lists them
            try:
                os.rename(self._claim, path)
            except FileNotFoundError as exc:
                raise SaveError(
                    f"{self._folder}: another save has taken this one for dead and removed {self._claim}"
                ) from exc
            _sync(self._folder)
        self._remove_leftovers(superseded=True)

    def _check_seen(self, name: str, file: FileRecord) -> None:
        path = os.path.join(self._folder, name)
        with contextlib.suppress(FileNotFoundError):
            if os.lstat(path).st_size == file.size_bytes:
                return
        raise SaveError(
            f"server {order_of(name)[0]} has written {name}, {file.size_bytes} bytes, but the worker on host "
            f"{os.uname().nodename} does not see that in {self._folder}: the servers write the files of a "
            "save, so the folder has to be on a file system that they all share"
        )

    def _remove_leftovers(self, *, superseded: bool) -> None:
        """Remove the files of saves that crashed; with `superseded` also those of superseded saves.

        The order matters: files, then claims, then the index. A file that cannot be removed stays: it does no
        harm, and the next save tries again.
        """
        with contextlib.suppress(OSError):
            files = [found for name in os.listdir(self._folder) if (found := _OURS.fullmatch(name))]
            claims = {
                found[1]: name
                for name in os.listdir(self._folder)
                if (found := _OURS.fullmatch(name)) and found[2]
            }
            gone = {save_id for save_id, name in claims.items() if self._remove_if_dead(name)}
            if superseded:
                gone |= {found[1] for found in files} - claims.keys() - self._named()
            for found in files:
                if found[1] in gone:
                    self._remove(found[0])
            if superseded:
                self._remove(_OLD_INDEX)

    def _remove(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.remove(os.path.join(self._folder, name))

    def _named(self) -> set[str]:
        """Return the ids that the index names. Raises OSError."""
        path = os.path.join(self._folder, INDEX_NAME)
        if os.path.samestat(os.lstat(path), os.fstat(self._file)):
            return {self.save_id}
        return {found[1] for found in _OURS.finditer(Path(path).read_text("utf-8", "replace"))}

    def _remove_if_dead(self, claim: str) -> bool:
        """Remove a claim if its save is dead; return whether this call removed it."""
        path = os.path.join(self._folder, claim)
        descriptor = -1
        try:
            with contextlib.suppress(PermissionError):
                descriptor = open_regular(path)
            free = _is_free(descriptor)
            here = claim.endswith(f"-{_machine()}.saving")
            idle_s = os.fstat(self._file).st_mtime - os.lstat(path).st_mtime  # from one clock
            if (free and here) or (free is not False and idle_s > STALE_S):
                os.remove(path)  # while we hold the lock, so that a process that just created it notices
                return True
        except OSError:
            return False
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        return False


def _is_free(descriptor: int) -> bool | None:
    """Try to lock the claim of another save; return whether its lock was free, None if that is unknown."""
    if descriptor < 0:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # on NFS, LOCK_EX needs write access
    except BlockingIOError:
        return False
    except OSError:  # there are no locks here
        return None
    return True


@functools.cache
def _machine() -> str:
    """Return an id of this machine since its boot. Locks work between all processes with the same id."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text("ascii")
    except OSError:
        text = os.uname().nodename
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _sync(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
