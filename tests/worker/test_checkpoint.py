"""Saves of whole jobs: resumed in jobs of other sizes, and what is left when a part of one fails."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tensorkv
from tensorkv.checkpoint import folder as folder_module
from tensorkv.checkpoint import records, tensorfile
from tensorkv.errors import LoadError, PeerLostError, ProtocolError, SaveError, StoreClosed, TensorKVError
from tensorkv.server import checkpoint as server_checkpoint
from tensorkv.server import statefiles
from tensorkv.server.state import ServerState
from tensorkv.stores.dist import DistStore
from tensorkv.testing.cluster import run_job
from tensorkv.wire import messages as m
from tensorkv.worker import checkpoint

LARGE = 5000
SAVES = 10
DEADLINE_S = 40.0
Work = Callable[[tensorkv.KVStore], tuple[Tensor, Tensor]]
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "momentum": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True, "betas": (0.8, 0.9)}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
    "nadam": (torch.optim.NAdam, {"lr": 0.01}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.01}),
    "rprop": (torch.optim.Rprop, {"lr": 0.01}),
    "asgd": (torch.optim.ASGD, {"lr": 0.01}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.5}),
}
if hasattr(torch.optim, "Adafactor"):  # not element by element: values stay whole
    OPTIMIZERS["adafactor"] = (torch.optim.Adafactor, {"lr": 0.01})


def start(kv: tensorkv.KVStore, name: str, folder: str | None, dtype: torch.dtype) -> None:
    optimizer, options = OPTIMIZERS[name]
    kv.set_optimizer(optimizer, **options)
    if folder is not None:
        kv.load(folder)
    kv.init({"large": torch.ones(LARGE // 10, 10, dtype=dtype), "small": torch.ones(3, dtype=dtype)})


def steps(kv: tensorkv.KVStore, first: int, last: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Steps [first, last), each shared out over the workers: their sum is the same however many they are."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        shares = torch.randn(4, LARGE, generator=generator, dtype=torch.float64).to(dtype)
        mine = shares[kv.rank :: kv.num_workers].sum(0)
        kv.push({"large": mine.view(-1, 10), "small": mine[:3]})
    kv.barrier()
    return kv.pull("large"), kv.pull("small")


def interrupted(name: str, folder: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Save in the middle of a run of 4 workers and 2 servers; return what it ends with."""

    def work(kv: tensorkv.KVStore) -> tuple[Tensor, Tensor]:
        start(kv, name, None, dtype)
        steps(kv, 0, 3, dtype)
        kv.save(folder)
        return steps(kv, 3, 6, dtype)

    found: tuple[Tensor, Tensor] = run_job(work, num_workers=4, num_servers=2, slice_bound_bytes=8000)[0]
    return found


def resumed(
    name: str, folder: str, dtype: torch.dtype
) -> Callable[[tensorkv.KVStore], tuple[Tensor, Tensor]]:
    def work(kv: tensorkv.KVStore) -> tuple[Tensor, Tensor]:
        start(kv, name, folder, dtype)
        return steps(kv, 3, 6, dtype)

    return work


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_run_goes_on_bit_for_bit_on_other_servers(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = str(tmp_path)
    expected = interrupted(name, folder, dtype)
    for servers, bound in ((3, 3000), (1, 100_000)):
        work = resumed(name, folder, dtype)
        for found in run_job(work, num_workers=4, num_servers=servers, slice_bound_bytes=bound):
            assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", ["momentum", "adam", "rprop"])
def test_with_fewer_workers_it_goes_on_but_for_rounding(name: str, tmp_path: Path) -> None:
    folder = str(tmp_path)
    expected = interrupted(name, folder, torch.float64)
    work = resumed(name, folder, torch.float64)
    found = run_job(work, num_workers=2, num_servers=3, slice_bound_bytes=3000)[0]
    with tensorkv.create("local") as kv:
        alone = work(kv)
    for one, other, wanted in zip(found, alone, expected, strict=True):
        assert (one - wanted).abs().max().item() <= 1e-10
        assert (other - wanted).abs().max().item() <= 1e-10
    assert not torch.equal(expected[0], torch.ones_like(expected[0]))


def test_a_save_of_one_process_is_loaded_in_a_job(tmp_path: Path) -> None:
    folder, dtype = str(tmp_path), torch.float32
    with tensorkv.create("local") as kv:
        start(kv, "adam", None, dtype)
        steps(kv, 0, 3, dtype)
        kv.save(folder)
        expected = steps(kv, 3, 6, dtype)
    assert len(list(tmp_path.iterdir())) == 2
    work = resumed("adam", folder, dtype)
    (found,) = run_job(work, num_workers=1, num_servers=3, slice_bound_bytes=3000)
    assert all(map(torch.equal, found, expected))


def test_a_save_in_many_files_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every slice were large: each server writes and reads in turns."""

    def one_each(sizes: list[int]) -> list[list[int]]:
        return records.batches(sizes, 1)

    monkeypatch.setattr(checkpoint, "batches", one_each)
    expected = interrupted("adamw", str(tmp_path), torch.float32)
    assert len(list(tmp_path.glob("*-*-1.safetensors"))) == 1  # the small value's server has two slices
    work = resumed("adamw", str(tmp_path), torch.float32)
    found = run_job(work, num_workers=4, num_servers=2, slice_bound_bytes=8000)[0]
    assert all(map(torch.equal, found, expected))


def _failing(monkeypatch: pytest.MonkeyPatch, error: TensorKVError, number: int) -> None:
    """Let the n-th slice that a server makes of a load fail."""
    made: list[int] = []
    restore = server_checkpoint.restore

    def fail(*args: Any) -> None:
        made.append(1)
        if len(made) == number:
            raise error
        restore(*args)

    monkeypatch.setattr(server_checkpoint, "restore", fail)


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("as_dict", [False, True], ids=["files", "dict"])
def test_a_load_that_fails_on_a_server_changes_nothing(
    number: int, as_dict: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = torch.float32

    def work(kv: tensorkv.KVStore) -> tuple[Tensor, Tensor]:
        start(kv, "adam", None, dtype)
        steps(kv, 0, 1, dtype)
        kv.save(str(tmp_path))
        state = kv.state_dict()
        values = steps(kv, 1, 2, dtype)
        infos = [kv.info(key) for key in kv.keys()]  # noqa: SIM118  (a store is no dict)
        if kv.rank == 0:
            _failing(monkeypatch, LoadError("torn"), number)
        kv.barrier()
        call = (
            functools.partial(kv.load_state_dict, state) if as_dict else functools.partial(kv.load, tmp_path)
        )
        with pytest.raises(LoadError, match="torn"):
            call()
        assert infos == [kv.info(key) for key in kv.keys()]  # noqa: SIM118
        assert all(map(torch.equal, values, (kv.pull("large"), kv.pull("small"))))
        kv.load(str(tmp_path))  # only one was to fail
        assert kv.info("large").version == 1
        return steps(kv, 1, 2, dtype), values

    for found, expected in run_job(work, num_workers=2, num_servers=2, slice_bound_bytes=8000):
        assert all(map(torch.equal, found, expected))


def _flip(one: Path, other: Path) -> None:
    data = bytearray(one.read_bytes())
    data[-100] ^= 4  # in a tensor: the header comes first
    one.write_bytes(data)


def _truncate(one: Path, other: Path) -> None:
    os.truncate(one, one.stat().st_size - 1)


def _swap(one: Path, other: Path) -> None:
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)


@pytest.mark.parametrize("num_servers", [2, 3])
@pytest.mark.parametrize("damage", [_flip, _truncate, _swap])
def test_a_file_that_is_not_as_it_was_saved_is_named_and_nothing_changes(
    damage: Callable[[Path, Path], None], num_servers: int, tmp_path: Path
) -> None:
    def save(kv: tensorkv.KVStore) -> None:
        start(kv, "adam", None, torch.float32)
        steps(kv, 0, 1, torch.float32)
        kv.save(str(tmp_path))

    run_job(save, num_workers=2, num_servers=2, slice_bound_bytes=8000)
    one, other = sorted(tmp_path.glob("*.safetensors"))
    damage(one, other)

    def load(kv: tensorkv.KVStore) -> None:
        kv.init("large", torch.ones(500, 10))
        kv.barrier()
        with pytest.raises(LoadError, match=rf"({one.name}|{other.name}).*as it was saved"):
            kv.load(str(tmp_path))
        assert list(kv.keys()) == ["large"]
        assert kv.pull("large").eq(1).all()

    run_job(load, num_workers=2, num_servers=num_servers, slice_bound_bytes=8000)
    with tensorkv.create("local") as kv, pytest.raises(LoadError, match="as it was saved"):
        kv.load(str(tmp_path))


@pytest.mark.parametrize("num_requests", [[2, 1], [1], [1, 0, 3, 2]])
def test_each_file_is_checked_once(num_requests: list[int]) -> None:
    names = [
        folder_module.file_name("0123456789abcdef", server, number) for server in (10, 9) for number in (1, 0)
    ]
    files = {name: records.FileRecord(number, number) for number, name in enumerate(names)}
    shares = checkpoint._shared_out(files, num_requests)
    assert set(shares) == {(server, n) for server, count in enumerate(num_requests) for n in range(count)}
    assert sorted(name for share in shares.values() for name in share) == sorted(files)
    assert all(files[name] == file for share in shares.values() for name, file in share.items())
    assert next(iter(shares[0, 0])) == names[3]  # server 9's first


def test_a_big_save_and_load_show_a_progress_bar_that_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bars: list[Any] = []

    def watched(total_bytes: int) -> Any:
        bars.append(progress(total_bytes))
        return bars[-1]

    progress = checkpoint._progress
    monkeypatch.setattr(checkpoint, "_progress", watched)
    monkeypatch.setattr(records.batches, "__defaults__", (4000,))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)

    def work(kv: tensorkv.KVStore) -> None:
        kv.init({"a": torch.ones(1000), "b": torch.ones(1000), "c": torch.ones(1000)})
        kv.save(str(tmp_path))
        kv.load(str(tmp_path))

    run_job(work, num_workers=1, num_servers=1)
    assert [bar.disable for bar in bars] == [True, True]
    assert capsys.readouterr().err == ""
    bars.clear()
    monkeypatch.setattr(checkpoint, "PROGRESS_BYTES", 12000)
    run_job(work, num_workers=1, num_servers=1)
    assert [bar.disable for bar in bars] == [False, False]
    assert [bar.tasks[0].description for bar in bars] == ["saving", "loading"]
    assert all(bar.finished and not bar.live.is_started for bar in bars)
    assert [bar.tasks[0].total for bar in bars] == [12000, 12000]
    shown = capsys.readouterr().err
    assert "saving" in shown
    assert "loading" in shown


def test_a_save_that_fails_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    def work(kv: tensorkv.KVStore) -> None:
        kv.init("w", torch.ones(3))
        kv.save(str(tmp_path))
        before = sorted(os.listdir(tmp_path))
        kv.barrier()
        if kv.rank == 0:
            monkeypatch.setattr(tensorfile, "write_all", no_space)
        kv.barrier()
        with pytest.raises(SaveError, match="No space left"):
            kv.save(str(tmp_path))
        kv.barrier()
        assert sorted(os.listdir(tmp_path)) == before
        kv.put("w", torch.zeros(3))
        kv.barrier()
        kv.load(str(tmp_path))
        assert kv.pull("w").tolist() == [1.0, 1.0, 1.0]

    run_job(work, num_workers=2, num_servers=2)


def test_a_server_that_does_not_see_the_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Server 1 has one of the same name that it does not share with rank 0; then they do share it."""
    shared, other = tmp_path / "shared", tmp_path / "other"
    other.mkdir()
    write = statefiles.write_slices

    def write_elsewhere(folder: str, name: str, slices: Any) -> Any:
        return write(str(other) if folder_module.order_of(name)[0] == 1 else folder, name, slices)

    def work(kv: tensorkv.KVStore) -> None:
        kv.init({"w": torch.ones(3), "v": torch.ones(3)})
        if kv.rank == 0:
            monkeypatch.setattr(statefiles, "write_slices", write_elsewhere)
        kv.barrier()
        where = f"server 1 on host {os.uname().nodename}.*file system that they all share"
        with pytest.raises(SaveError, match=where):
            kv.save(shared)
        kv.barrier()
        assert not shared.exists()
        assert list(other.iterdir()) == []
        if kv.rank == 0:
            monkeypatch.setattr(statefiles, "write_slices", write)
        kv.barrier()
        kv.save(shared)

    run_job(work, num_workers=2, num_servers=2)
    with tensorkv.create("local") as kv:
        kv.load(shared)
        assert sorted(kv.keys()) == ["v", "w"]


def test_two_jobs_that_save_into_one_folder_at_once(tmp_path: Path) -> None:
    """Whoever has returned: the folder has the save of one of them, whole, also for those that load it."""

    def work(kv: tensorkv.KVStore, value: float) -> None:
        kv.init("w", torch.full((300,), value))
        for _ in range(8):
            kv.save(tmp_path)
            kv.load(tmp_path)
            assert kv.pull("w").unique().numel() == 1

    def job(value: float) -> None:
        run_job(functools.partial(work, value=value), num_workers=2, num_servers=2, slice_bound_bytes=400)

    with ThreadPoolExecutor(2) as pool:
        for each in [pool.submit(job, value) for value in (1.0, 2.0)]:
            each.result(DEADLINE_S)
    with tensorkv.create("local") as kv:
        kv.load(tmp_path)
        assert kv.pull("w").unique().item() in (1.0, 2.0)
    assert len(list(tmp_path.iterdir())) == 3  # the index and a file of each server


@pytest.mark.parametrize("kind", ["dist_async", "dist_sync"])
def test_a_save_is_of_one_moment_while_threads_push(kind: str, tmp_path: Path) -> None:
    """Whoever pushes adds one to every element: so a key has one number in all of them, or was torn."""

    def work(kv: tensorkv.KVStore) -> None:
        kv.set_updater("add")
        kv.init({"large": torch.zeros(LARGE), "other": torch.zeros(LARGE)})
        kv.barrier()
        done = threading.Event()

        def keep_pushing() -> None:
            ones = torch.ones(LARGE)
            while not done.is_set():
                kv.push({"large": ones, "other": ones})
                kv.push("large", ones)
                kv.pull("large")  # what it has pushed cannot pile up then

        with ThreadPoolExecutor(1) as pool:
            pushing = pool.submit(keep_pushing)
            try:
                for number in range(SAVES):
                    kv.save(tmp_path / str(number))
            finally:
                done.set()
            if kv.rank == 0 or kind == "dist_async":
                pushing.result(DEADLINE_S)
            else:
                kv.close()  # the other's last push waits for nobody then
                with contextlib.suppress(StoreClosed):
                    pushing.result(DEADLINE_S)

    run_job(work, num_workers=2, num_servers=2, kind=kind, slice_bound_bytes=3000, host="127.0.0.1")
    for number in range(SAVES):
        with tensorkv.create("local") as kv:
            kv.load(tmp_path / str(number))
            for key in ("large", "other"):
                value = kv.pull(key)
                assert value.unique().numel() == 1, f"save {number} of {key!r}: {value.unique()}"
                assert value[0].item() >= kv.info(key).version


# ---- one worker alone ------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["inproc", "tcp", "shm"])
def test_a_save_alone_is_of_one_moment_while_threads_push(
    transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A push adds one to every element of both keys: so all have one number, or the save was torn."""
    monkeypatch.setattr(m, "PLACED_BYTES", 1)
    over = threading.Event()

    def work(kv: tensorkv.KVStore) -> None:
        kv.set_updater("add")
        kv.init({"large": torch.zeros(LARGE), "other": torch.zeros(LARGE)})
        kv.barrier()
        done = threading.Event()

        def keep_pushing() -> None:
            ones = torch.ones(LARGE)
            while not done.is_set():
                kv.push({"large": ones, "other": ones})
                kv.pull(["large", "other"])  # else the next push may have to wait with one of them

        with ThreadPoolExecutor(1) as pool:
            pushing = pool.submit(keep_pushing)
            try:
                for number in range(SAVES if kv.rank == 0 else 0):
                    kv.save(tmp_path / str(number), alone=True)
                if kv.rank == 1:
                    assert over.wait(DEADLINE_S)  # it goes on pushing, and nobody asks it
            finally:
                done.set()
            pushing.result(DEADLINE_S)
        over.set()

    options = {} if transport == "inproc" else {"host": "127.0.0.1", "transport": transport}
    run_job(work, num_workers=2, num_servers=2, slice_bound_bytes=3000, **options)
    for number in range(SAVES):
        with tensorkv.create("local") as kv:
            kv.load(tmp_path / str(number))
            found = torch.cat([kv.pull("large"), kv.pull("other")]).unique()
            assert found.numel() == 1, f"save {number}: {found}"
            assert found.item() == 2 * kv.info("large").version


def test_a_commit_that_another_thread_has_asked_for_is_in_a_save_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, saving = threading.Event(), threading.Event()
    commit_all, after_commit = DistStore._commit_all, DistStore._after_commit

    def tell(kv: DistStore, *args: Any) -> Any:
        asked.set()
        return commit_all(kv, *args)

    def tell_too(kv: DistStore, call: str) -> Any:
        saving.set()
        return after_commit(kv, call)

    monkeypatch.setattr(DistStore, "_commit_all", tell)
    monkeypatch.setattr(DistStore, "_after_commit", tell_too)

    def work(kv: tensorkv.KVStore) -> None:
        kv.init("w", torch.zeros(3))
        kv.push("w", torch.ones(3), apply=False)
        if kv.rank == 1:
            assert saving.wait(DEADLINE_S)
            kv.commit()
            return
        with ThreadPoolExecutor(1) as pool:
            committed = pool.submit(kv.commit)
            assert asked.wait(DEADLINE_S)
            assert kv.state_dict(alone=True)["values"]["w"].tolist() == [2.0] * 3
            assert committed.result(DEADLINE_S).applied

    run_job(work, num_workers=2, num_servers=2)


def test_what_a_save_alone_waits_for_is_told_when_that_worker_is_lost(tmp_path: Path) -> None:
    def work(kv: tensorkv.KVStore) -> None:
        kv.init("w", torch.zeros(3))
        kv.barrier()
        if kv.rank == 1:
            kv._abandon("a test")  # type: ignore[attr-defined]
            return
        kv.push("w", torch.ones(3))
        with pytest.raises(PeerLostError, match="worker 1.*a test"):
            kv.save(tmp_path / "run", alone=True)
        assert not (tmp_path / "run").exists()

    with pytest.raises(PeerLostError):  # of one whose close comes after the loss
        run_job(work, num_workers=2, num_servers=1)


def test_a_save_alone_goes_on_without_a_setting_that_a_lost_worker_has_sent_to_some_servers() -> None:
    sent = threading.Event()

    def work(kv: tensorkv.KVStore) -> None:
        assert isinstance(kv, DistStore)
        kv.set_optimizer("sgd", lr=1.0)
        kv.init({"a": torch.zeros(3), "b": torch.zeros(3)})  # on different servers
        kv.barrier()
        if kv.rank == 0:
            link = kv._job.links[0]
            link.put(m.ChangeOptions(kv._store, None, {"lr": 0.5}))
            link.pump()
            kv.info("a"), kv.info("b")
            sent.set()
            kv._abandon("a test")
            kv._closed = True
            return
        assert sent.wait(DEADLINE_S)
        kv.pushpull(["a", "b"], [torch.ones(3), torch.ones(3)])
        state = kv.state_dict(alone=True)
        settings = records.from_plain(state["settings"], records.SavedSettings)
        rates = {each.options["lr"] for each in settings.entries}
        assert rates == {-value[0].item() for value in state["values"].values()} == {0.5, 1.0}

    run_job(work, num_workers=2, num_servers=2, on_worker_loss="continue")


def test_a_save_alone_that_fails_lets_the_worker_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    def work(kv: tensorkv.KVStore) -> None:
        kv.set_updater("add")
        kv.init("w", torch.zeros(3))
        kv.barrier()
        with monkeypatch.context() as patch:
            patch.setattr(tensorfile, "write_all", no_space)
            with pytest.raises(SaveError, match="No space left"):
                kv.save(tmp_path / "run", alone=True)
        assert list(tmp_path.iterdir()) == []
        kv.push("w", torch.ones(3))
        kv.save(tmp_path / "run", alone=True)
        assert kv.pull("w").tolist() == [1.0] * 3

    run_job(work, num_workers=1, num_servers=2)


# ---- what servers tell -----------------------------------------------------------------------------

PART = m.SliceEntry(1, 0, 2, 6)
ENTRY = m.KeyEntry("w", 1, (8,), "float32", 0, [m.SliceEntry(2, 1, 0, 2), PART, m.SliceEntry(3, 1, 6, 8)])
RECORD = m.SliceRecord(1, 3, [records.TensorRecord(records.VALUE, "float32", (4,), True)], {})


def test_a_slice_and_its_bytes() -> None:
    exchange = checkpoint._SliceExchange(ENTRY, PART)
    assert not exchange.take(RECORD)
    [buffer] = exchange.place(m.Data(1, 0), 16)
    buffer[:] = bytes(16)
    assert exchange.take(m.Data(1, 0))
    assert exchange.result().value.tolist() == [0.0] * 4


def test_a_slice_that_is_none() -> None:
    other = m.SliceRecord(1, 3, [records.TensorRecord(records.VALUE, "float64", (4,), True)], {})
    exchange = checkpoint._SliceExchange(ENTRY, PART)
    for call in (
        lambda: exchange.place(m.Data(1, 0), 16),
        lambda: exchange.take(m.Data(1, 0)),
        lambda: exchange.take(other),
        lambda: exchange.take(m.Done(1)),
    ):
        with pytest.raises(ProtocolError):
            call()
    assert not exchange.take(RECORD)
    for call in (
        lambda: exchange.take(RECORD),
        lambda: exchange.take(m.Data(1, 0)),
        lambda: exchange.place(m.Data(1, 0), 15),
    ):
        with pytest.raises(ProtocolError):
            call()


@pytest.mark.parametrize("kind", [m.Info, m.SavedFile, m.Settings, m.SaveBegun])
def test_a_server_that_tells_of_other_slices(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: type[Any]
) -> None:
    real = ServerState.handle
    nothing = {"rounds": [], "pieces": [], "settings": records.SavedSettings([], [])}

    def handle(*arguments: Any) -> Any:
        out = real(*arguments)
        for message in [each.message for each in out if isinstance(each.message, kind)]:
            for name in nothing.keys() & set(message.__struct_fields__):
                setattr(message, name, nothing[name])
        return out

    monkeypatch.setattr(ServerState, "handle", handle)

    def work(kv: tensorkv.KVStore) -> None:
        kv.init("w", torch.zeros(4))
        with pytest.raises(ProtocolError):
            kv.info("w") if kind is m.Info else kv.save(str(tmp_path), alone=kind is m.SaveBegun)

    run_job(work, num_workers=1, num_servers=1)
