"""Segments are sealed and checked; an arena hands out places that never overlap, and takes them back."""

from __future__ import annotations

import fcntl
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensorkv.errors import ProtocolError, TransportUnavailable
from tensorkv.transport import segments
from tensorkv.transport.segments import (
    ALIGN_BYTES,
    PURGE_BYTES,
    SEGMENT_BYTES,
    SWEEP_S,
    SWEEP_TIMES,
    Arena,
    FreeRanges,
    Segment,
    open_path,
)

PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("writable", [False, True])
def test_two_mappings_show_the_same_memory(writable: bool) -> None:
    segment, descriptor = Segment.create(7, PAGE + 1, others_may_write=writable)
    assert segment.size_bytes == 2 * PAGE
    other = Segment.attach(7, segment.size_bytes, descriptor, writable=writable)
    segment.bytes[5:8] = 42
    assert other.bytes[4:9].tolist() == [0, 42, 42, 42, 0]
    if writable:
        other.bytes[0] = 1
        assert segment.bytes[0] == 1


def test_who_may_not_write_cannot() -> None:
    """Neither by a mapping of his own, nor through the view that he has: his process dies of that."""
    segment, descriptor = Segment.create(1, PAGE, others_may_write=False)
    again = os.dup(descriptor)
    with pytest.raises(ProtocolError, match="cannot be mapped"):
        Segment.attach(1, PAGE, again, writable=True)
    script = (
        "import sys; from tensorkv.transport.segments import Segment\n"
        "segment = Segment.attach(1, int(sys.argv[2]), int(sys.argv[1]), writable=False)\n"
        "print(segment.bytes[0], flush=True); segment.bytes[0] = 2\n"
    )
    segment.bytes[0] = 9
    done = subprocess.run(
        [sys.executable, "-c", script, str(descriptor), str(PAGE)],
        pass_fds=[descriptor],
        capture_output=True,
        text=True,
        check=False,
    )
    os.close(descriptor)
    assert (done.stdout, done.returncode) == ("9\n", -11)
    assert segment.bytes[0] == 9


def test_its_size_cannot_be_changed() -> None:
    _, descriptor = Segment.create(1, PAGE, others_may_write=True)
    for size_bytes in (0, 2 * PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size_bytes)
    with pytest.raises(PermissionError):
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    os.close(descriptor)


@pytest.mark.parametrize("seals", [0, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW])
def test_memory_that_could_be_cut_off_is_refused(seals: int, count_descriptors: Callable[[], int]) -> None:
    """A peer that shrinks it would end us by SIGBUS."""
    descriptor = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, PAGE)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    before = count_descriptors()
    with pytest.raises(ProtocolError, match="could be cut off"):
        Segment.attach(1, PAGE, descriptor, writable=False)
    assert count_descriptors() == before - 1


def test_what_is_no_memory_is_refused(tmp_path: Path, count_descriptors: Callable[[], int]) -> None:
    before = count_descriptors()
    (tmp_path / "file").write_bytes(bytes(PAGE))
    for descriptor in (os.open(tmp_path / "file", os.O_RDWR), os.open(tmp_path, os.O_RDONLY)):
        with pytest.raises(ProtocolError, match="segment 1 cannot be mapped"):
            Segment.attach(1, PAGE, descriptor, writable=False)
    assert count_descriptors() == before


@pytest.mark.parametrize("announced", [0, 1, PAGE - 1, PAGE + 1, 2 * PAGE, -PAGE])
def test_another_size_than_was_announced_is_refused(announced: int) -> None:
    _, descriptor = Segment.create(1, PAGE, others_may_write=False)
    with pytest.raises(ProtocolError, match=f"has {PAGE} bytes, not {announced}"):
        Segment.attach(1, announced, descriptor, writable=False)


def test_a_segment_is_found_by_its_path() -> None:
    segment, descriptor = Segment.create(0, PAGE, others_may_write=True)
    other = Segment.open(f"/proc/{os.getpid()}/fd/{descriptor}", PAGE)
    other.bytes[5] = 42
    assert segment.bytes[5] == 42
    readable = open_path(f"/proc/{os.getpid()}/fd/{descriptor}", os.O_RDONLY)
    with pytest.raises(OSError):
        os.write(readable, b"x")
    os.close(readable)
    os.close(descriptor)


def test_only_segments_are_opened(tmp_path: Path, count_descriptors: Callable[[], int]) -> None:
    before = count_descriptors()
    with open(tmp_path / "file", "wb") as file:
        for path in (str(tmp_path / "file"), "/proc/self/mem", f"/proc/{os.getpid()}/fd/{file.fileno()}"):
            with pytest.raises(ProtocolError, match="segment"):
                open_path(path, os.O_RDONLY)
    other = os.memfd_create("other")
    with pytest.raises(ProtocolError, match="no segment of a process of this user"):
        open_path(f"/proc/{os.getpid()}/fd/{other}", os.O_RDONLY)
    os.close(other)
    with pytest.raises(TransportUnavailable, match="cannot be reached"):
        open_path("/proc/99999999/fd/3", os.O_RDONLY)
    assert count_descriptors() == before


@pytest.mark.parametrize(("offset", "size"), [(-1, 1), (0, PAGE + 1), (PAGE, 1), (1, -1), (PAGE + 1, 0)])
def test_a_place_outside_is_refused(offset: int, size: int) -> None:
    segment, descriptor = Segment.create(1, PAGE, others_may_write=False)
    os.close(descriptor)
    assert len(segment.place(PAGE - 1, 1)) == 1
    with pytest.raises(ProtocolError, match="of segment 1"):
        segment.place(offset, size)


def test_a_segment_lives_as_long_as_a_tensor_over_it() -> None:
    segment, descriptor = Segment.create(1, PAGE, others_may_write=False)
    other = Segment.attach(1, PAGE, descriptor, writable=False)
    tensor = torch.from_numpy(other.place(0, 8)).view(torch.int64)
    segment.bytes[0] = 3
    del segment, other
    gc.collect()
    assert tensor.item() == 3


@given(st.lists(st.tuples(st.integers(-1, 7), st.integers(1, 5)), max_size=60))
def test_ranges_never_overlap_and_join_again(steps: list[tuple[int, int]]) -> None:
    """Against a list of bytes as the model. A step takes a size, gives back what one took, or sweeps."""
    ranges, model = FreeRanges(16), [False] * 16
    idle = [True] * 16  # since the last sweep
    taken: list[tuple[int, int]] = []
    for which, size in steps:
        if which < 0:
            swept = [False] * 16
            for start, stop in ranges.sweep():
                assert 0 <= start < stop
                swept[start:stop] = [True] * (stop - start)
            assert swept == idle
            idle = [not byte for byte in model]
        elif which and taken:
            start, length = taken.pop(which % len(taken))
            ranges.give(start, length)
            model[start : start + length] = [False] * length
        else:
            start = ranges.take(size)
            fits = [at for at in range(17 - size) if not any(model[at : at + size])]
            assert start == (fits[0] if fits else -1)
            if start >= 0:
                model[start : start + size] = [True] * size
                idle[start : start + size] = [False] * size
                taken.append((start, size))
        assert ranges.all_free == (not any(model))


class Log:
    """What an arena tells."""

    def __init__(self, *, for_long: bool = False) -> None:
        self.new: list[Segment] = []
        self.dropped: list[int] = []
        self.arena = Arena(
            others_may_write=False, for_long=for_long, on_segment=self._new, on_drop=self.dropped.append
        )

    def _new(self, segment: Segment, descriptor: int) -> None:
        self.new.append(segment)
        os.close(descriptor)


def test_places_are_aligned_apart_and_found_again() -> None:
    log = Log()
    places = [log.arena.take(size) for size in (1, 64, 5, 65, 1000)]
    assert [segment.size_bytes for segment in log.new] == [SEGMENT_BYTES]
    for number, place in enumerate(places):
        place[:] = number
    assert [set(place.tolist()) for place in places] == [{0}, {1}, {2}, {3}, {4}]
    found = [log.arena.where(place.ctypes.data, len(place)) for place in places]
    assert found == [(1, 0), (1, 64), (1, 128), (1, 192), (1, 320)]
    assert all(place.ctypes.data % ALIGN_BYTES == 0 for place in places)
    assert log.arena.where(np.zeros(1, np.uint8).ctypes.data, 1) is None


def test_a_place_is_free_when_its_last_view_is_gone() -> None:
    log = Log()
    first = log.arena.take(1000)
    tensor = torch.from_numpy(first)[3:7].view(torch.uint8)
    address = first.ctypes.data
    del first
    gc.collect()
    second = log.arena.take(1000)
    assert second.ctypes.data != address  # the tensor still shows it
    del tensor
    gc.collect()
    assert log.arena.take(1000).ctypes.data == address


@pytest.fixture
def kept() -> Iterator[tuple[Arena, list[int]]]:
    """An arena, and descriptors of its segments."""
    descriptors: list[int] = []
    arena = Arena(
        others_may_write=False,
        for_long=False,
        on_segment=lambda segment, descriptor: descriptors.append(descriptor),
        on_drop=lambda number: None,
    )
    yield arena, descriptors
    for descriptor in descriptors:
        os.close(descriptor)


def _resident_bytes(descriptor: int) -> int:
    return os.fstat(descriptor).st_blocks * 512


def test_memory_that_nobody_needs_any_more_goes_back_to_the_system(kept: tuple[Arena, list[int]]) -> None:
    arena, descriptors = kept
    stays, large = arena.take(PURGE_BYTES), arena.take(32 << 20)
    stays[:], large[:] = 1, 2
    peer = Segment.attach(1, SEGMENT_BYTES, os.dup(descriptors[0]), writable=False)
    assert _resident_bytes(descriptors[0]) >= 32 << 20
    del large
    for _ in range(2 * SWEEP_TIMES * SEGMENT_BYTES // PURGE_BYTES + 2):  # from one sweep to the next, and it
        arena.take(PURGE_BYTES)
    assert _resident_bytes(descriptors[0]) < 4 << 20  # a page may have 2 MB
    assert stays.tolist() == [1] * PURGE_BYTES
    assert peer.bytes[0] == 1
    again = arena.take(32 << 20)
    again[:] = 3
    assert peer.bytes[PURGE_BYTES] == 3


def test_memory_that_is_used_again_and_again_stays(
    kept: tuple[Arena, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a step takes so much in so many places that the first is long ago when the last is taken."""
    arena, descriptors = kept
    purged: list[tuple[int, int]] = []
    monkeypatch.setattr(Segment, "purge", lambda segment, start, stop: purged.append((start, stop)))
    needed_bytes = 200 * PURGE_BYTES
    for _ in range(10 * SWEEP_TIMES):
        places = [arena.take(PURGE_BYTES) for _ in range(200)]
        del places
    assert len(descriptors) == 1
    assert set(purged) == {(needed_bytes, SEGMENT_BYTES)}  # what no step needs


def test_without_proc_memory_is_sealed_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_proc(path: str, flags: int) -> int:
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "open", no_proc)
    segment, descriptor = Segment.create(1, PAGE, others_may_write=False)
    monkeypatch.undo()
    with pytest.raises(ProtocolError, match="cannot be mapped"):
        Segment.attach(1, PAGE, os.dup(descriptor), writable=True)
    segment.bytes[0] = 7
    segment.purge(0, PAGE)
    other = Segment.attach(1, PAGE, descriptor, writable=False)
    assert other.bytes[0] == 7


def test_large_places_get_segments_of_their_own_which_go_with_what_was_kept_there(
    count_descriptors: Callable[[], int],
) -> None:
    log = Log(for_long=True)
    small = log.arena.take(10)
    large = [log.arena.take(SEGMENT_BYTES + 1) for _ in range(3)]
    assert [segment.number for segment in log.new] == [1, 2, 3, 4]
    log.new.clear()
    before = count_descriptors()
    del large
    gc.collect()
    log.arena.take(10)
    assert len(log.dropped) == 2  # one that is not in use is kept
    assert count_descriptors() == before - 2
    again = log.arena.take(SEGMENT_BYTES + 1)
    assert log.new == []
    assert len(small) + len(again) == SEGMENT_BYTES + 11


def test_what_is_unused_is_dropped_on_demand() -> None:
    log = Log(for_long=True)
    small = log.arena.take(10)
    large = [log.arena.take(SEGMENT_BYTES) for _ in range(3)]
    log.new.clear()
    first = large.pop(0)
    del large
    log.arena.drop_unused()
    assert sorted(log.dropped) == [3, 4]
    log.arena.drop_unused()
    assert len(log.dropped) == 2
    assert len(small) + len(first) == SEGMENT_BYTES + 10


def test_segments_that_every_step_needs_stay_and_go_when_none_does() -> None:
    log = Log()
    for _ in range(3 * SWEEP_TIMES):
        large = [log.arena.take(SEGMENT_BYTES) for _ in range(3)]
        del large
    assert (len(log.new), log.dropped) == (3, [])
    for _ in range(2 * SWEEP_TIMES * 3 + 1):
        log.arena.take(SEGMENT_BYTES)
    assert log.dropped == [3]  # one that is not in use is kept


def test_what_is_too_small_makes_room_for_what_is_needed() -> None:
    log = Log()
    for number in range(20):
        log.arena.take(SEGMENT_BYTES + (number << 20))
    assert len(log.dropped) == 19
    assert len(log.arena._segments) == 1


def test_what_was_needed_long_ago_goes_however_little_is_taken_now(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(segments.time, "monotonic", lambda: now)
    log = Log()
    large = [log.arena.take(SEGMENT_BYTES) for _ in range(4)]
    del large
    for passed_s, dropped in ((SWEEP_S - 1, []), (2, []), (SWEEP_S - 1, []), (2, [3, 4])):
        now += passed_s
        log.arena.take(10)
        assert log.dropped == dropped
