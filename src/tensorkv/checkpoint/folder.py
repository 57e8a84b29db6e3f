"""The folder of a save: how a save comes to count, and what others have left there.

A save is made so that at any moment, whoever crashes or saves beside it, the folder holds a whole one:

1. Whoever leads takes a new random id and makes a *claim*, a file of that id, and locks it. What is written
   then has that id in its name, so nobody writes to the file of another save.
2. When all files are on disk the claim is filled with the index and renamed to the name of the index. In
   this one step the save counts, the one before it does not any more, and the claim is gone.
3. A file of another id is removed in two cases. Its claim is there, but whoever made it is dead: then the
   claim is removed first, and as a rename of it fails from then on, that save can never count. Or its claim
   is not there: then it counted or was given up before we looked, and as an id counts only once, it is
   needed only if the index, read after that, names it.

So two that save at once do not wait for each other, and the folder has the save that counted last.

A claim is dead if its lock is free: the system drops the lock of a process that ends, however it ends.
Locks may not reach as far as a shared file system does. Of a claim of another machine, or where there are
no locks, that is believed only if nobody has touched it for a while.
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
"""Time after which a claim that nobody touches is dead, where its lock may not tell."""

MAX_INDEX_BYTES = 1 << 32
"""Maximum size of an index that is written or read: that of some millions of keys."""

_TRIES = 20
_OURS = re.compile(r"tensorkv-([0-9a-f]{16})-(?:[0-9]+-[0-9]+\.safetensors(?:\.tmp)?|([0-9a-f]{16})\.saving)")
"""A file of a save: its id, and if it is a claim the machine. Earlier versions wrote to names in .tmp."""

_OLD_INDEX = f"{INDEX_NAME}.tmp"
"""The name to which those wrote their index."""


def file_name(save_id: str, server: int, number: int) -> str:
    """Return the name of a file of a save."""
    return f"tensorkv-{save_id}-{server}-{number}.safetensors"


def order_of(name: str) -> tuple[int, ...]:
    """Sort key of the files of a save: server and number."""
    return tuple(int(part) for part in name.removesuffix(".safetensors").split("-")[2:])


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """Let what cannot be written be a SaveError."""
    try:
        yield
    except SaveError:
        raise
    except OSError as exc:
        raise SaveError(f"{path} cannot be written on host {os.uname().nodename}: {exc}") from exc


@contextlib.contextmanager
def new_part(folder: str, name: str) -> Iterator[int]:
    """Make a file of a save that somebody else leads, as descriptor. It is removed if the block fails.

    Whoever sees the claim, whose name is random, sees the very folder that the leader has made it in. That
    is asked when the file is made: what a host has kept of a shared folder's content is old no more then.

    Raises:
        SaveError: it cannot be written; there is no such save in the folder, or not any more.
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
        f"{who} does not see the save that rank 0 is making in {folder}: the servers write the files of a "
        "save, so the folder has to be on a file system that they all share"
    )


class Saving:
    """A save that is being made. A context manager; what is not published by its end is removed.

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
            self._remove_leftovers(superseded=False)  # before, for there may be no room for one more
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(OSError):  # it is gone if the save counts
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
        """Tell other machines that this save is alive. To be called now and then."""
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
            except FileNotFoundError:  # a save that failed has removed the folder that it had made
                continue
            if self._lock():
                return
            with contextlib.suppress(OSError):
                os.remove(self._claim)
            os.close(self._file)
        raise SaveError(f"{self._folder}: other saves have removed the claim of this one {_TRIES} times")

    def _lock(self) -> bool:
        """Lock the claim; return whether it is there yet. Before, it looks like that of one who has died."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # there are no locks here
            pass
        return os.fstat(self._file).st_nlink > 0

    def publish(self, index: bytes, files: Mapping[str, FileRecord]) -> None:
        """Let the save count, and remove what is left of others. All its files are on disk.

        Raises:
            SaveError: it cannot be written, or its files are not to be seen here; the save before is whole.
        """
        path = os.path.join(self._folder, INDEX_NAME)
        with writing(path):
            for name, file in files.items():
                self._check_seen(name, file)
            if len(index) > MAX_INDEX_BYTES:
                raise SaveError(f"{path} would have {len(index)} bytes, of at most {MAX_INDEX_BYTES}")
            write_all(self._file, index)
            os.fsync(self._file)
            _sync(self._folder)  # the names of the files are on disk before the index that tells of them
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
            f"server {order_of(name)[0]} has written {name}, {file.size_bytes} bytes, but rank 0 on host "
            f"{os.uname().nodename} does not see that in {self._folder}: the servers write the files of a "
            "save, so the folder has to be on a file system that they all share"
        )

    def _remove_leftovers(self, *, superseded: bool) -> None:
        """Remove the files of saves that crashed; with `superseded` also those that count no more.

        The order matters: files, then claims, then the index. What cannot be removed stays: it is in
        nobody's way, and the next save tries again.
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
        """Remove the claim of a save that has died; return whether it was there to be removed."""
        path = os.path.join(self._folder, claim)
        descriptor = -1
        try:
            with contextlib.suppress(PermissionError):
                descriptor = open_regular(path)
            free = _is_free(descriptor)
            here = claim.endswith(f"-{_machine()}.saving")
            idle_s = os.fstat(self._file).st_mtime - os.lstat(path).st_mtime  # both by one clock
            if (free and here) or (free is not False and idle_s > STALE_S):
                os.remove(path)  # while it is locked: whoever has just made it sees that
                return True
        except OSError:
            return False
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        return False


def _is_free(descriptor: int) -> bool | None:
    """Lock a claim that another save may hold; return whether none does, None if that cannot be known."""
    if descriptor < 0:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # on NFS, EX is for those who may write
    except BlockingIOError:
        return False
    except OSError:  # there are no locks here
        return None
    return True


@functools.cache
def _machine() -> str:
    """Return what distinguishes this machine, from when it has started: locks reach all of its processes."""
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
