"""Checks of put, save and load: changes to values and their state outside rounds."""

from __future__ import annotations

import io
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tensorkv.checkpoint.records import INDEX_NAME
from tensorkv.errors import (
    InvalidArgument,
    InvalidValue,
    KeyAlreadyInitialized,
    LoadError,
    SaveError,
    SettingMismatch,
    ShapeMismatch,
    UpdaterError,
    WaitTimeout,
)
from tensorkv.store import KVStore
from tensorkv.testing.bad_inputs import assert_unchanged, prepare, snapshot
from tensorkv.testing.suite import (
    Meeting,
    StoreMaker,
    add_twice,
    arrived,
    check,
    full,
    in_one,
    in_workers,
    noise,
    raises,
    same,
)


@check()
def check_put(maker: StoreMaker) -> None:
    """put replaces values in every form; rounds stay, the version goes up by one, no updater runs."""

    def work(kv: KVStore) -> None:
        kv.init({"a": full(1), "b": full(2, 4), "n": torch.tensor([1, 2])})
        kv.set_updater("add")
        kv.push("a", full(1))
        one = full(5)
        kv.put("a", one)
        one.zero_()  # the store does not keep the caller's memory
        same(kv.pull("a"), 5.0, "a")
        info = kv.info("a")
        assert (info.round, info.version) == (1, 2), info
        kv.put(["b", "n"], [full(6, 4), torch.tensor([7, 8])])
        kv.put({"a": full(9).t().contiguous().t()})
        same(kv.pull("a"), 9.0, "a")
        same(kv.pull("b"), full(6, 4), "b")
        same(kv.pull("n"), torch.tensor([7, 8]), "n")
        kv.put("a", full(0.5, dtype=torch.float64))
        same(kv.pull("a"), full(0.5), "a, put as float64")
        kv.push("a", full(1))
        same(kv.pull("a"), 1.5, "a, after the next push")
        info = kv.info("a")
        assert (info.round, info.version) == (2, 5), info

    in_one(maker, work)


@check()
def check_put_keeps_optimizer_state(maker: StoreMaker) -> None:
    """The optimizer continues from the put value, with its state."""

    def work(kv: KVStore) -> None:
        kv.set_optimizer(torch.optim.SGD, lr=1.0, momentum=0.5)
        kv.init("w", full(0))
        kv.push("w", full(1))
        kv.put("w", full(10))
        kv.push("w", full(1))
        same(kv.pull("w"), 8.5)

    in_one(maker, work)


@check()
def check_put_of_large_values(maker: StoreMaker) -> None:
    """put replaces values in many slices, from views too, completely."""
    wide = noise(1, 1500, 1000)

    def work(kv: KVStore) -> None:
        kv.init(["w", "v"], [torch.zeros(1000, 1500), torch.zeros(1_300_000)])
        kv.put(["w", "v"], [wide.t(), wide.flatten()[:1_300_000]])
        same(kv.pull("w"), wide.t().contiguous(), "w")
        same(kv.pull("v"), wide.flatten()[:1_300_000], "v")
        assert kv.info("w").version == 1

    in_one(maker, work)


@check(workers=(2, 3))
def check_put_of_one_worker(maker: StoreMaker, workers: int) -> None:
    """One worker puts; the others see it, and the next round builds on it."""

    def work(kv: KVStore, meeting: Meeting) -> Any:
        kv.init("w", full(1))
        kv.set_updater("add")
        meeting.everybody()
        if kv.rank == workers - 1:
            kv.put("w", full(10))
        meeting.everybody()
        same(kv.pull("w"), 10.0, "after the put")
        meeting.everybody()
        kv.push("w", full(1))
        kv.barrier()
        same(kv.pull("w"), 10.0 + workers, "after the next round")

    in_workers(maker, workers, work)


@check(workers=(2,), only="sync")
def check_put_in_an_open_round(maker: StoreMaker, workers: int) -> None:
    """A put while a round is open takes effect before that round does."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init("w", full(1))
        kv.set_updater("add")
        meeting.everybody()
        if kv.rank == 1:
            kv.push("w", full(2))
            arrived(kv, "w")
            meeting.everybody()
        else:
            meeting.everybody()
            kv.put("w", full(100))
            kv.push("w", full(3))
        same(kv.pull("w"), 105.0)
        info = kv.info("w")
        assert (info.round, info.version) == (1, 2), info

    in_workers(maker, workers, work)


@check(workers=(2,), only="sync")
def check_put_after_own_push(maker: StoreMaker, workers: int) -> None:
    """A put comes after this worker's earlier pushes, even if their round waits for another worker."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init("w", full(1))
        kv.set_updater("add")
        meeting.everybody()
        if kv.rank == 0:
            kv.push("w", full(2))
            kv.put("w", full(50))
            meeting.everybody()
        else:
            kv.push("w", full(3))
            meeting.everybody()
        same(kv.pull("w"), 50.0)

    in_workers(maker, workers, work)


# ---- saving and loading --------------------------------------------------------------------------------


def _start(kv: KVStore, folder: str = "") -> None:
    """Two optimizers, one with state for each element and as a whole, on small and large values."""
    kv.set_optimizer(torch.optim.SGD, lr=0.5, momentum=0.5)
    kv.set_optimizer("adam", keys=["large"], lr=0.25, betas=(0.5, 0.75))
    if folder:
        kv.load(folder)
        kv.set_optimizer("adam", keys=["large"], lr=0.25, betas=(0.5, 0.75))
    kv.init({"w": noise(1, 2, 3), "s": torch.tensor(3.0), "large": noise(2, 300_000)})


def _steps(kv: KVStore, first: int, last: int) -> dict[str, torch.Tensor]:
    """Push the gradients of steps [first, last), and return all values."""
    shapes = {"w": (2, 3), "s": (), "large": (300_000,)}
    for step in range(first, last):
        kv.push({key: noise(100 * step + kv.rank, *shape) for key, shape in shapes.items() if key != "w"})
        kv.push("w", noise(1000 + step, 2, 3))
    kv.barrier()
    return {key: kv.pull(key) for key in shapes}


def _same_values(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for key, value in expected.items():
        same(found[key], value, key)


@contextmanager
def _folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        yield os.path.join(folder, "save")


@check()
def check_bytes_held(maker: StoreMaker) -> None:
    """info has the bytes of a value and of its optimizer state: none, a copy, two copies and a number."""

    def run(kv: KVStore) -> None:
        kv.init(
            {"w": torch.zeros(2, 3), "h": torch.zeros(5, dtype=torch.float16), "large": torch.zeros(600_000)}
        )
        names = ["w", "h", "large"]

        def held() -> list[tuple[int, int]]:
            return [(kv.info(name).value_bytes, kv.info(name).state_bytes) for name in names]

        def push() -> None:
            kv.push({name: torch.ones(kv.info(name).shape, dtype=kv.info(name).dtype) for name in names})
            kv.pull("w")

        sizes = [24, 10, 2_400_000]
        assert held() == [(size, 0) for size in sizes], held()
        kv.set_optimizer("sgd", lr=0.1, momentum=0.9)
        push()
        assert held() == [(size, size) for size in sizes], held()
        kv.set_optimizer("sgd", lr=0.1, momentum=0.9)
        assert held() == [(size, size) for size in sizes], held()
        kv.set_optimizer("adam", lr=0.1, keys=["large"])
        push()
        numbers = 4 * kv.info("large").num_slices  # the step count, once per slice
        assert held() == [(24, 24), (10, 10), (2_400_000, 4_800_000 + numbers)], held()
        kv.set_updater("add")
        push()
        assert held() == [(size, 0) for size in sizes], held()

    in_one(maker, run)


@check(workers=(1, 2, 3))
def check_bytes_held_of_workers(maker: StoreMaker, workers: int) -> None:
    """Every worker gets the same sizes, for any number of workers: state lives with the value, once."""

    def run(kv: KVStore, meeting: Meeting) -> tuple[int, int]:
        kv.init("w", torch.zeros(600_000))
        kv.set_optimizer("sgd", lr=0.1, momentum=0.9)
        kv.push("w", torch.ones(600_000))
        kv.pull("w")
        meeting.everybody()
        info = kv.info("w")
        return info.value_bytes, info.state_bytes

    assert in_workers(maker, workers, run) == [(2_400_000, 2_400_000)] * workers


@check()
def check_saved_state_as_dict(maker: StoreMaker) -> None:
    """state_dict is what torch.save writes; another store that loads it goes on bit for bit."""

    def first(kv: KVStore) -> tuple[Any, dict[str, torch.Tensor]]:
        _start(kv)
        _steps(kv, 0, 3)
        state = kv.state_dict()
        return state, _steps(kv, 3, 6)

    def second(kv: KVStore) -> None:
        kv.load_state_dict(torch.load(file, weights_only=True))
        info = kv.info("large")
        assert (info.round, info.version) == (0, 3), info
        assert "Adam" in info.updater and "SGD" in kv.info("w").updater
        assert sorted(kv.keys()) == ["large", "s", "w"]
        _same_values(_steps(kv, 3, 6), expected)
        assert kv.info("w").version == 6

    state, expected = in_one(maker, first)
    assert state["versions"] == {"w": 3, "s": 3, "large": 3} and state["reduction"] == "sum"
    assert state["optimizer_state"]["w"]["momentum_buffer"].shape == (2, 3)
    adam = state["optimizer_state"]["large"]
    assert adam["exp_avg"].shape == (300_000,) and float(adam["step"]) == 3
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    in_one(maker, second)


@check(workers=(1, 2, 3))
def check_save_and_load(maker: StoreMaker, workers: int) -> None:
    """A saved and resumed run ends bitwise equal to an uninterrupted one."""

    def first(kv: KVStore, meeting: Meeting) -> Any:
        _start(kv)
        _steps(kv, 0, 3)
        kv.save(folder)
        return _steps(kv, 3, 5)

    def second(kv: KVStore, meeting: Meeting) -> None:
        _start(kv, folder)  # init keeps the loaded values
        meeting.everybody()
        info = kv.info("w")
        assert info.round == 0 and info.version == 3 * (workers if maker.is_async else 1), info
        meeting.everybody()
        found = _steps(kv, 3, 5)
        if workers == 1 or not maker.is_async:  # otherwise the result depends on the order of arrival
            _same_values(found, expected)

    with _folder() as folder:
        expected = in_workers(maker, workers, first)[0]
        in_workers(maker, workers, second)


@check()
def check_settings_are_saved(maker: StoreMaker) -> None:
    """Changed options survive a load, even those for some keys; so does the state."""

    def first(kv: KVStore) -> tuple[torch.Tensor, torch.Tensor]:
        kv.set_optimizer(torch.optim.SGD, lr=1.0, momentum=0.5)
        kv.init({"a": full(0), "b": full(0)})
        kv.set_optimizer_options(lr=0.5)
        kv.set_optimizer_options(keys=["b"], lr=0.25)
        kv.push({"a": full(1), "b": full(1)})
        kv.save(folder)
        kv.push({"a": full(1), "b": full(1)})
        return kv.pull("a"), kv.pull("b")

    def second(kv: KVStore) -> None:
        kv.load(folder)
        kv.push({"a": full(1), "b": full(1)})
        same(kv.pull("a"), a, "a")
        same(kv.pull("b"), b, "b")
        kv.set_optimizer_options(lr=0.125)
        kv.set_optimizer(torch.optim.SGD, lr=1.0, momentum=0.5)  # repeats the original call
        kv.push("a", full(0))
        same(kv.pull("a"), -2.0, "a, whose momentum was halved to 0.75")

    def fresh(kv: KVStore) -> None:
        kv.load(folder)
        kv.set_optimizer("adam", lr=1.0)
        assert "Adam" in kv.info("a").updater

    with _folder() as folder:
        a, b = in_one(maker, first)
        same(a, -1.25, "a")
        in_one(maker, second)
        in_one(maker, fresh)


@check()
def check_function_is_saved_by_name(maker: StoreMaker) -> None:
    """A save does not contain a function: updates are refused until it is set again, and then work."""

    def first(kv: KVStore) -> None:
        kv.set_updater(add_twice)
        kv.init("w", full(1))
        kv.push("w", full(1))
        kv.save(folder)

    def later(kv: KVStore) -> None:
        kv.load(folder)
        raises(UpdaterError, lambda: kv.pushpull("w", full(1)), "'w'", "add_twice", "set_updater")
        same(kv.pull("w"), 3.0, "after the refused update")
        kv.set_updater(add_twice)
        same(kv.pushpull("w", full(1)), 5.0, "after set_updater")

    def earlier(kv: KVStore) -> None:
        kv.set_updater(add_twice)
        kv.load(folder)
        same(kv.pushpull("w", full(1)), 5.0, "with the function set before the load")

    with _folder() as folder:
        in_one(maker, first)
        in_one(maker, later)
        in_one(maker, earlier)


@check()
def check_load_into_a_store_in_use(maker: StoreMaker) -> None:
    """Existing keys are replaced, and start at round 0; others stay; the next init only checks."""

    def work(kv: KVStore) -> None:
        kv.init({"w": full(1), "x": full(2, 4)})
        kv.push("w", full(5))
        kv.save(folder)
        kv.delete("x")
        kv.init("y", full(9))
        kv.push("w", full(6))
        kv.load(folder)
        assert sorted(kv.keys()) == ["w", "x", "y"]
        same(kv.pull("w"), 5.0, "w")
        same(kv.pull("x"), full(2, 4), "x")
        same(kv.pull("y"), 9.0, "y")
        info = kv.info("w")
        assert (info.round, info.version) == (0, 1), info
        raises(SettingMismatch, lambda: kv.init("x", full(1, 5)), "'x'")
        kv.init({"w": full(0), "z": full(7)})
        same(kv.pull("w"), 5.0, "w, after init")
        same(kv.pull("z"), 7.0, "z")
        raises(KeyAlreadyInitialized, lambda: kv.init("w", full(0)), "'w'")
        kv.delete("x")
        kv.init("x", full(1, 5))
        before = snapshot(kv)
        raises(ShapeMismatch, lambda: kv.load(folder), "'x'", "(5,)", "(4,)")
        assert_unchanged(kv, before)
        kv.push("w", full(8))
        same(kv.pull("w"), 8.0, "w, after a push")

    with _folder() as folder:
        in_one(maker, work)


SAVED_DTYPES = {
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.uint8, torch.int8, torch.int16, torch.int32,
    torch.int64, torch.bool, torch.complex64, torch.complex128,
}  # fmt: skip
"""Dtypes that every version of torch can at least store."""


@check()
def check_values_of_all_kinds_are_saved(maker: StoreMaker) -> None:
    """Each dtype that `init` accepts, no elements, no dimensions, NaN: all come back bitwise equal."""
    dtypes = sorted({each for each in vars(torch).values() if isinstance(each, torch.dtype)}, key=str)
    noises = {number: noise(number, 60).view(torch.uint8) for number, _ in enumerate(dtypes)}
    noises = {
        number: (data % 2 if dtypes[number] is torch.bool else data)[: 15 * dtypes[number].itemsize]
        for number, data in noises.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns once that complex32 is experimental
        torch.empty(0, dtype=torch.complex32)
        values = {number: data.view(dtypes[number]).view(3, 5) for number, data in noises.items()}
    values |= {-1: torch.tensor(2.5), 100: torch.empty(0, 3), 101: torch.tensor([math.nan, math.inf, -0.0])}

    def first(kv: KVStore) -> Any:
        for key in list(values):
            try:
                kv.init(key, values[key])
            except InvalidValue:
                assert dtypes[key] not in SAVED_DTYPES, dtypes[key]
                del values[key]
        kv.save(folder)
        return kv.state_dict()

    def second(kv: KVStore) -> None:
        calls: list[Callable[[], None]] = [lambda: kv.load(folder), lambda: kv.load_state_dict(state)]
        for again in calls:
            again()
            assert sorted(kv.keys()) == sorted(values)
            for key, value in values.items():
                found = kv.pull(key)
                assert found.dtype == value.dtype and found.shape == value.shape, key
                assert found.reshape(-1).view(torch.uint8).tolist() == (
                    value.reshape(-1).view(torch.uint8).tolist()
                ), f"the bits of {key}, {value.dtype}"

    with _folder() as folder:
        state = in_one(maker, first)
        in_one(maker, second)


@check()
def check_bad_saves(maker: StoreMaker) -> None:
    """A save that is missing, truncated, foreign or points elsewhere is refused, and changes nothing."""

    def spoil(text: str, replacement: str) -> Callable[[str], None]:
        def change(folder: str) -> None:
            path = Path(folder, INDEX_NAME)
            before = path.read_text()
            assert text in before, text
            path.write_text(before.replace(text, replacement))

        return change

    def of_file(change: Callable[[Path], object]) -> Callable[[str], None]:
        def change_all(folder: str) -> None:
            for path in Path(folder).glob("*.safetensors"):
                change(path)

        return change_all

    def link(path: Path) -> None:
        moved = path.rename(f"{path}.moved")
        path.symlink_to(moved)

    spoilers: dict[str, Callable[[str], None]] = {
        "no folder": shutil.rmtree,
        "no index": lambda folder: os.remove(os.path.join(folder, INDEX_NAME)),
        "half an index": lambda folder: os.truncate(os.path.join(folder, INDEX_NAME), 100),
        "no JSON": lambda folder: os.truncate(os.path.join(folder, INDEX_NAME), 0),
        "another format": spoil("tensorkv-save", "another-save"),
        "another version": spoil('"version": 2,\n "reduction"', '"version": 1,\n "reduction"'),
        "no checksum": spoil(',\n "checksum"', ',\n "chacksum"'),
        "another history": spoil('"version": 1,', '"version": 9,'),
        "another reduction": spoil('"sum"', '"mean"'),
        "unknown dtype": spoil('"float32"', '"float33"'),
        "wrong dtype": spoil('"float32"', '"int32"'),
        "wrong shape": spoil('"stop": 6', '"stop": 7'),
        "unknown updater": spoil('"assign"', '"no such updater"'),
        "another folder": spoil('"tensorkv-', '"../tensorkv-'),
        "any file": spoil('.safetensors"', '.txt"'),
        "files gone": of_file(os.remove),
        "files cut off": of_file(lambda path: os.truncate(path, 40)),
        "files longer": of_file(lambda path: path.write_bytes(path.read_bytes() + b"\0")),
        "files of nothing": of_file(lambda path: path.write_bytes(bytes(path.stat().st_size))),
        "links": of_file(link),
        "files renamed inside": of_file(
            lambda path: path.write_bytes(path.read_bytes().replace(b"/value/", b"/walue/"))
        ),
    }

    def work(kv: KVStore) -> None:
        prepare(kv)
        kv.set_updater(None)
        kv.save(good)
        kv.push("w", full(3))
        kv.set_updater("add")
        before = snapshot(kv)
        for name, change in spoilers.items():
            shutil.copytree(good, bad)
            change(bad)
            try:
                raises(LoadError, lambda: kv.load(bad))
            except AssertionError as exc:
                raise AssertionError(f"{name}: {exc}") from exc
            assert_unchanged(kv, before)
            shutil.rmtree(bad, ignore_errors=True)
        for wrong in ({}, {"format": 3}, None, {**kv.state_dict(), "values": {"w": 1}}):
            raises(LoadError, lambda wrong=wrong: kv.load_state_dict(wrong))  # type: ignore[misc]
            assert_unchanged(kv, before)
        kv.push("w", full(1))
        same(kv.pull("w"), 4.0, "w, after a good push")

    with _folder() as good:
        bad = f"{good}-bad"
        in_one(maker, work)


@check()
def check_where_a_save_goes(maker: StoreMaker) -> None:
    """An invalid folder is refused; a second save removes the files of the first, and no others."""

    def work(kv: KVStore) -> None:
        kv.init("w", full(1))
        kv.save(folder)
        first = set(os.listdir(folder))
        Path(folder, "mine.safetensors").write_text("keep")
        Path(folder, "tensorkv-0123456789abcdef-0-0.safetensors.tmp").write_text("of a save that crashed")
        kv.push("w", full(2))
        kv.save(Path(folder))
        second = set(os.listdir(folder))
        assert first & second == {INDEX_NAME} and "mine.safetensors" in second, second
        assert not [name for name in second if name.endswith(".tmp")], second
        inside = os.path.join(folder, "mine.safetensors", "save")
        raises(SaveError, lambda: kv.save(inside), inside)
        raises(InvalidArgument, lambda: kv.save(3))  # type: ignore[arg-type]
        kv.push("w", full(3))
        kv.load(folder)
        same(kv.pull("w"), 2.0, "w")

    with _folder() as folder:
        in_one(maker, work)


@check(workers=(2, 3))
def check_saving_is_a_call_of_all(maker: StoreMaker, workers: int) -> None:
    """Rank 0 gets the dict; all get an error; calls that differ are refused on every rank."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init("w", full(1))
        state = kv.state_dict()
        assert bool(state) == (kv.rank == 0)
        raises(SettingMismatch, lambda: kv.save(f"{folder}-{kv.rank}"), "rank 1 calls save", "save-1")
        call: Callable[[], object] = kv.state_dict if kv.rank == 0 else lambda: kv.save(folder)
        raises(SettingMismatch, call, "state_dict()")
        raises(LoadError, lambda: kv.load(folder), "save")
        kv.save(folder)
        kv.barrier()
        kv.put("w", full(7))
        kv.barrier()
        kv.load(folder)
        same(kv.pull("w"), 1.0, "after the load")
        kv.load_state_dict(state)
        same(kv.pull("w"), 1.0, "after load_state_dict")
        if kv.rank == 1:
            raises(SettingMismatch, lambda: kv.init("w", full(1, 4)), "'w'")
        kv.init("w", full(3))
        same(kv.pull("w"), 1.0, "after init")

    with _folder() as folder:
        in_workers(maker, workers, work)


@check(workers=(2,), only="sync")
def check_open_rounds_are_not_saved(maker: StoreMaker, workers: int) -> None:
    """A save excludes rounds that wait for a worker or a commit, and does not wait for ranks that left."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init({"a": full(1), "b": full(1)})
        kv.set_updater("add")
        meeting.everybody()
        kv.push("b", full(1), apply=False)
        if kv.rank == 1:
            kv.push("a", full(1))
        kv.save(folder)
        if kv.rank == 0:
            kv.push("a", full(1))
        kv.commit()
        same(kv.pull("a"), 3.0, "a")
        same(kv.pull("b"), 3.0, "b")
        kv.load(folder)
        same(kv.pull("a"), 1.0, "a, as saved")
        same(kv.pull("b"), 1.0, "b, as saved")
        meeting.everybody()
        if kv.rank == 0:
            kv.close()
        else:
            kv.save(folder)
            assert kv.state_dict()["versions"] == {"a": 0, "b": 0}

    with _folder() as folder:
        in_workers(maker, workers, work)


@check(workers=(2,), only="sync")
def check_put_waits_for_own_round(maker: StoreMaker, workers: int) -> None:
    """A put behind a push whose round is open has the usual deadline."""

    def work(kv: KVStore, meeting: Meeting) -> None:
        kv.init("w", full(1))
        meeting.everybody()
        if kv.rank == 0:
            kv.push("w", full(2))
            raises(WaitTimeout, lambda: kv.put("w", full(50)), "put")
        meeting.everybody()
        if kv.rank == 1:
            kv.push("w", full(3))

    in_workers(maker, workers, work, timeout_s=3.0)  # long enough to join and `init`, too
