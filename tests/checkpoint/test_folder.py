"""How a save comes to count: processes that are killed at any step of it, and others that save beside it."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import tensorkv
from tensorkv.checkpoint import folder as folder_module
from tensorkv.checkpoint.folder import STALE_S, Saving, file_name, new_part
from tensorkv.checkpoint.records import INDEX_NAME, FileRecord
from tensorkv.checkpoint.tensorfile import write_all
from tensorkv.errors import LoadError, SaveError

DEADLINE_S = 40.0
STEPS = ("open", "write", "fsync", "rename", "remove", "listdir", "close")
"""What a save does to a folder, and where a process may be killed."""


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for no disk: what is killed here is a process, not the machine."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def save(folder: Path | str, number: int, parts: int = 2) -> dict[str, FileRecord]:
    """Make a save whose index and files tell a number."""
    with Saving(str(folder)) as saving:
        files: dict[str, FileRecord] = {}
        for part in range(parts):
            name = saving.file_name(part, 0)
            with new_part(str(folder), name) as descriptor:
                write_all(descriptor, b"%d" % number * 100)
                os.fsync(descriptor)
            files[name] = FileRecord(len(b"%d" % number) * 100)
        saving.publish("\n".join([str(number), *files]).encode(), files)
    return files


def load(folder: Path) -> int:
    """Return the number of the save in a folder, after reading all of it."""
    for _ in range(100):
        text = (folder / INDEX_NAME).read_text()
        number, *names = text.split()
        try:
            found = [(folder / name).read_text() for name in names]
        except FileNotFoundError:  # another has come to count meanwhile; else it is lost
            assert (folder / INDEX_NAME).read_text() != text, "a file that the index names is gone"
            continue
        assert found == [number * 100] * len(names)
        return int(number)
    raise AssertionError("no save lasts long enough to be read")


def names_in(folder: Path) -> set[str]:
    return {each.name for each in folder.iterdir()}


def forked(work: Callable[[], object]) -> int:
    """Do it in a process of its own; return its id. It ends with status 0 if nothing is raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it has one thread that goes on
        pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def status_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ---- kill --------------------------------------------------------------------------------------------


def _kill_at(number: int) -> None:
    """Let this process be killed at the step with this number: before it, or in the middle of a write."""
    done = 0

    def hooked(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal done
            if done == number:
                if name == "write":
                    real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1
            return real(*arguments, **options)

        return call

    for name in STEPS:
        setattr(os, name, hooked(name, getattr(os, name)))


@pytest.mark.parametrize("before", [True, False], ids=["second", "first"])
def test_a_process_killed_at_any_step_leaves_a_whole_save(before: bool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    steps = 0
    while True:
        if before:
            save(folder, 1, parts=3)
        status = status_of(forked(lambda step=steps: (_kill_at(step), save(folder, 2))))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        if before or (folder / INDEX_NAME).exists():
            assert load(folder) in (1, 2)
        files = save(folder, 3, parts=1)
        assert load(folder) == 3
        assert names_in(folder) == {INDEX_NAME, *files}, f"what was killed at step {steps} has left files"
        if not before:
            for name in names_in(folder):
                os.remove(folder / name)
        steps += 1
    assert steps > 25
    assert load(folder) == 2


def test_a_store_killed_at_any_step_of_a_save(tmp_path: Path) -> None:
    """The same of a store, whose save has been loaded before and is loaded after."""

    def store(value: float) -> tensorkv.KVStore:
        kv = tensorkv.create("local")
        kv.init({"w": torch.full((300,), value), "n": torch.tensor(3)})
        return kv

    def found() -> float:
        with tensorkv.create("local") as kv:
            kv.load(tmp_path)
            value = kv.pull("w")
        assert value.unique().numel() == 1
        return float(value[0])

    def until_killed(step: int) -> None:
        kv = store(2.0)
        _kill_at(step)
        kv.save(tmp_path)

    other = store(1.0)
    steps = 0
    other.save(tmp_path)
    while (status := status_of(forked(lambda step=steps: until_killed(step)))) != 0:
        assert status == -signal.SIGKILL
        assert found() in (1.0, 2.0)
        other.save(tmp_path)
        assert found() == 1.0
        assert len(names_in(tmp_path)) == 2
        steps += 1
    assert steps > 18
    assert found() == 2.0


def test_what_earlier_versions_have_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    mine = {"mine.safetensors", "tensorkv-x.safetensors", "model.pt", "tensorkv-0123456789abcdef.txt"}
    left = {f"tensorkv-0123456789abcdef-0-{end}" for end in ("0.safetensors", "1.safetensors.tmp")}
    for name in (*mine, *left, f"{INDEX_NAME}.tmp"):
        (tmp_path / name).write_text("")
    files = save(tmp_path, 1)
    assert names_in(tmp_path) == {INDEX_NAME, *files, *mine}


# ---- race --------------------------------------------------------------------------------------------


def test_threads_that_save_and_load_at_once(tmp_path: Path) -> None:
    save(tmp_path, 0)
    start = threading.Barrier(5)
    done = threading.Event()

    def keep_saving(number: int) -> None:
        start.wait(DEADLINE_S)
        for each in range(30):
            save(tmp_path, number * 100 + each)

    def keep_loading() -> int:
        start.wait(DEADLINE_S)
        loads = 0
        while not done.is_set():
            load(tmp_path)
            loads += 1
        return loads

    with ThreadPoolExecutor(5) as pool:
        loading = pool.submit(keep_loading)
        savings = [pool.submit(keep_saving, number) for number in range(1, 5)]
        try:
            for saving in savings:
                saving.result(DEADLINE_S)
        finally:
            done.set()
        assert loading.result(DEADLINE_S) > 0
    assert load(tmp_path) % 100 == 29
    assert len(names_in(tmp_path)) == 3


def test_processes_that_save_at_once_some_of_them_killed(tmp_path: Path) -> None:
    save(tmp_path, 0)

    def keep_saving(number: int) -> None:
        for each in range(15):
            save(tmp_path, number * 100 + each)

    def until_killed(number: int) -> None:
        _kill_at(200 + 17 * number)
        keep_saving(number)

    pids = [forked(lambda number=number: keep_saving(number)) for number in (1, 2)]
    killed = [forked(lambda number=number: until_killed(number)) for number in (3, 4, 5)]
    loads = 0
    while pids:
        load(tmp_path)
        loads += 1
        pid, status = os.waitpid(pids[0], os.WNOHANG)
        if pid:
            assert status == 0
            del pids[0]
    assert [status_of(pid) for pid in killed] == [-signal.SIGKILL] * 3
    assert loads > 0
    files = save(tmp_path, 9)
    assert names_in(tmp_path) == {INDEX_NAME, *files}


def test_two_stores_that_save_into_one_folder_at_once(tmp_path: Path) -> None:
    """Whoever has returned: the folder has one of both, whole."""
    stores = [tensorkv.create("local") for _ in range(2)]
    for number, kv in enumerate(stores):
        kv.init("w", torch.full((5000,), float(number)))
    with ThreadPoolExecutor(2) as pool:
        for trial in range(15):
            start = threading.Barrier(2)

            def save_one(kv: tensorkv.KVStore, start: threading.Barrier = start, trial: int = trial) -> None:
                start.wait(DEADLINE_S)
                kv.save(tmp_path / str(trial))

            for saving in [pool.submit(save_one, kv) for kv in stores]:
                saving.result(DEADLINE_S)
            with tensorkv.create("local") as again:
                again.load(tmp_path / str(trial))
                assert again.pull("w").unique().numel() == 1
            assert len(names_in(tmp_path / str(trial))) == 2


def test_a_store_is_loaded_whoever_saves_meanwhile(tmp_path: Path) -> None:
    saver = tensorkv.create("local")
    saver.init("w", torch.zeros(100))
    saver.save(tmp_path)
    done = threading.Event()

    def keep_saving() -> None:
        while not done.is_set():
            saver.save(tmp_path)

    with ThreadPoolExecutor(1) as pool:
        saving = pool.submit(keep_saving)
        try:
            for _ in range(40):
                with tensorkv.create("local") as kv:
                    kv.load(tmp_path)
        finally:
            done.set()
        saving.result(DEADLINE_S)


# ---- claims ------------------------------------------------------------------------------------------


def _claim(folder: Path) -> Path:
    (found,) = folder.glob("*.saving")
    return found


def test_the_files_of_a_save_that_is_being_made_stay(tmp_path: Path) -> None:
    with Saving(str(tmp_path)) as saving:
        name = saving.file_name(0, 0)
        with new_part(str(tmp_path), name) as descriptor:
            write_all(descriptor, b"x" * 100)
        os.utime(_claim(tmp_path), (0, 0))  # its lock is what counts
        save(tmp_path, 3)
        assert name in names_in(tmp_path)
        saving.publish(f"x {name}".encode(), {name: FileRecord(100)})
    assert names_in(tmp_path) == {INDEX_NAME, name}


def _left_by_a_crash(folder: Path, machine: str, age_s: float) -> set[str]:
    """Make the claim and a file of a save that has crashed; return their names."""
    claim, name = f"tensorkv-0123456789abcdef-{machine}.saving", file_name("0123456789abcdef", 0, 0)
    (folder / name).write_text("")
    (folder / claim).write_text("")
    now = (folder / claim).stat().st_mtime
    os.utime(folder / claim, (now - age_s, now - age_s))
    return {claim, name}


@pytest.mark.parametrize(
    ("here", "locks", "age_s", "removed"),
    [
        (True, True, 0, True),
        (False, True, STALE_S / 2, False),
        (False, True, STALE_S * 2, True),
        (True, False, STALE_S / 2, False),
        (True, False, STALE_S * 2, True),
    ],
)
def test_which_claims_are_dead(
    here: bool, locks: bool, age_s: float, removed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its lock says nothing, on another machine or without locks, a claim is dead after a while."""
    left = _left_by_a_crash(tmp_path, folder_module._machine() if here else "f" * 16, age_s)

    def no_locks(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if not locks:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    files = save(tmp_path, 1)
    assert names_in(tmp_path) == {INDEX_NAME, *files} | (set() if removed else left)


def test_room_is_made_before_anything_is_written(tmp_path: Path) -> None:
    """If the save fails as well, what a crash has left is gone all the same."""
    _left_by_a_crash(tmp_path, folder_module._machine(), 0)
    with Saving(str(tmp_path)):
        assert names_in(tmp_path) == {_claim(tmp_path).name}
    assert names_in(tmp_path) == set()


def test_a_save_that_was_taken_for_dead_does_not_count(tmp_path: Path) -> None:
    save(tmp_path, 1)

    def taken_for_dead() -> None:
        with Saving(str(tmp_path)) as saving:
            os.remove(_claim(tmp_path))
            saving.publish(b"2", {})

    with pytest.raises(SaveError, match="taken this one for dead"):
        taken_for_dead()
    assert load(tmp_path) == 1


def test_a_claim_that_others_look_at_as_it_is_made_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is locked it looks like that of one who has died: they may be about to remove it."""
    real = fcntl.flock
    tries: list[int] = []

    def flock(descriptor: int, how: int) -> None:
        tries.append(how)
        if len(tries) == 1:
            raise BlockingIOError
        if len(tries) == 2:
            os.remove(_claim(tmp_path))
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    files = save(tmp_path, 1)
    assert tries.count(fcntl.LOCK_EX | fcntl.LOCK_NB) == 3
    assert names_in(tmp_path) == {INDEX_NAME, *files}


def test_all_is_on_disk_before_the_index_tells_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the machine fails: files, then their names, then the index, then its name."""
    done: list[str] = []
    rename = os.rename
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
    )
    monkeypatch.setattr(os, "rename", lambda *names: (done.append("renamed"), rename(*names)))
    one, other = save(tmp_path, 1)
    assert done[2].endswith(".saving")
    assert done == [one, other, done[2], tmp_path.name, "renamed", tmp_path.name]


# ---- folders -----------------------------------------------------------------------------------------


def test_a_save_that_fails_leaves_nothing_not_even_its_folder(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        with Saving(str(folder)) as saving, new_part(str(folder), saving.file_name(0, 0)):
            raise SaveError("full")

    with pytest.raises(SaveError, match="full"):
        fails(tmp_path / "new" / "save")
    assert names_in(tmp_path / "new") == set()
    files = save(tmp_path, 1)
    with pytest.raises(SaveError, match="full"):
        fails(tmp_path)
    assert names_in(tmp_path) == {INDEX_NAME, *files, "new"}


def test_a_server_that_sees_another_folder_is_named(tmp_path: Path) -> None:
    """Of the same name, on a host that does not share it: there is no such save in it."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    host = os.uname().nodename
    with Saving(str(tmp_path / "a")) as saving:
        name = saving.file_name(2, 0)
        with (
            pytest.raises(
                SaveError, match=f"server 2 on host {host} does not see .*{tmp_path / 'b'}: .*share"
            ),
            new_part(str(tmp_path / "b"), name),
        ):
            pass
        assert names_in(tmp_path / "b") == set()
        with pytest.raises(SaveError, match=f"server 2 has written {name}.*the worker on host {host}.*share"):
            saving.publish(b"", {name: FileRecord(100)})
        with new_part(str(tmp_path / "a"), name) as descriptor:
            write_all(descriptor, b"x")
        with pytest.raises(SaveError, match="server 2 has written"):
            saving.publish(b"", {name: FileRecord(100)})
    assert names_in(tmp_path / "a") == set()


def test_a_server_that_writes_on_after_its_save_was_given_up_leaves_nothing(tmp_path: Path) -> None:
    with Saving(str(tmp_path)) as saving:
        name = saving.file_name(0, 0)
        part = new_part(str(tmp_path), name)
        part.__enter__()
    assert names_in(tmp_path) == set()
    with pytest.raises(SaveError, match="does not see the save"):
        part.__exit__(None, None, None)
    with pytest.raises(SaveError, match="does not see the save"), new_part(str(tmp_path), name):
        pass
    assert names_in(tmp_path) == set()


def test_links_are_not_followed(tmp_path: Path) -> None:
    """Nothing outside the folder is written to, nor removed."""
    outside, folder = tmp_path / "outside", tmp_path / "save"
    outside.write_text("kept")
    folder.mkdir()
    for name in (INDEX_NAME, f"{INDEX_NAME}.tmp", file_name("0123456789abcdef", 0, 0)):
        (folder / name).symlink_to(outside)
    files = save(folder, 1)
    assert outside.read_text() == "kept"
    assert not (folder / INDEX_NAME).is_symlink()
    assert names_in(folder) == {INDEX_NAME, *files}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_all_files_of_a_store_have_the_mode_that_open_would_give(
    umask: int, mode: int, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        with tensorkv.create("local") as kv:
            kv.init("w", torch.ones(3))
            kv.save(tmp_path / "run")
    finally:
        os.umask(before)
    modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in (tmp_path / "run").iterdir()}
    assert len(modes) == 2
    assert set(modes.values()) == {mode}


def test_folders_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="cannot be written"):
        save(tmp_path / "file" / "save", 1)
    (tmp_path / "run" / INDEX_NAME).mkdir(parents=True)
    with pytest.raises(SaveError, match="cannot be written"):
        save(tmp_path / "run", 1)
    assert names_in(tmp_path / "run") == {INDEX_NAME}
    with tensorkv.create("local") as kv, pytest.raises(LoadError, match="cannot be read"):
        kv.load(tmp_path / "run")
