"""What stands at the board of a store, and how hosts are counted. Whole rounds are in test_torchrun."""

from __future__ import annotations

import itertools

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from tensorkv.errors import PeerLostError
from tensorkv.launch.attempts import MAX_ENLISTED, Board, Enlisted, hosts
from tensorkv.launch.sidecar import JobRecord


@pytest.fixture
def board() -> Board:
    return Board(HashStore(), "tensorkv/run")


def test_a_round_is_announced_and_then_another(board: Board) -> None:
    assert board.current() == ""
    first = board.announce("")
    assert board.current() == first
    second = board.announce(first)
    assert board.current() == second != first


def test_of_two_that_announce_at_once_one_is_told(board: Board) -> None:
    first = board.announce("")
    assert board.announce("") == ""
    assert board.current() == first


def test_what_a_round_tells_is_its_own(board: Board) -> None:
    first, second = "a" * 32, "b" * 32
    record = JobRecord(host="::1", port=4321, num_workers=3, num_servers=2, sidecars=(0, 2))
    board.tell(first, record)
    assert board.read(first) == record
    assert board.read(second) is None
    worker = Enlisted(rank=1, num_workers=3, local_rank=0, local_workers=2)
    board.enlist(first, worker)
    known: dict[int, Enlisted] = {}
    board.enlisted(second, known)
    assert known == {}
    for _ in range(2):
        board.enlisted(first, known)
        assert list(known.values()) == [worker]


def test_one_that_is_about_to_enlist_is_read_later(board: Board) -> None:
    name, known = "a" * 32, dict[int, Enlisted]()
    board.store.add(f"tensorkv/run/{name}/enlisted", 1)
    board.enlisted(name, known)
    assert known == {}
    board.enlist(name, Enlisted(rank=2, num_workers=3, local_rank=0, local_workers=1))
    board.enlisted(name, known)
    assert list(known) == [2]


@pytest.mark.parametrize("value", ["", "x", "A" * 32, "0" * 33, '{"error": ""}', "ü" * 16])
def test_a_name_that_is_none(board: Board, value: str) -> None:
    board.store.set("tensorkv/run/round", value)
    with pytest.raises(PeerLostError, match="under 'tensorkv/run/round' is not of TensorKV"):
        board.current()


@pytest.mark.parametrize("count", [-2, MAX_ENLISTED + 1, 1 << 60])
def test_what_is_not_the_number_of_any_workers_is_not_read(board: Board, count: int) -> None:
    name = "0" * 32
    board.store.add(f"tensorkv/run/{name}/enlisted", count)
    with pytest.raises(PeerLostError, match="enlisted' is not of TensorKV"):
        board.enlisted(name, {})


@pytest.mark.parametrize("value", ["", "x", "[]", '{"rank": 1}', '{"port": "x"}'])
def test_a_record_that_is_none(board: Board, value: str) -> None:
    name = "0" * 32
    board.enlist(name, Enlisted(rank=0, num_workers=3, local_rank=0, local_workers=1))
    board.store.set(f"tensorkv/run/{name}/enlisted/1", value)
    with pytest.raises(PeerLostError, match="enlisted/1' is not of TensorKV"):
        board.enlisted(name, {})
    if value != '{"rank": 1}':  # fields that a later version may have are not ours to refuse
        board.store.set(f"tensorkv/run/{name}/job", value)
        with pytest.raises(PeerLostError, match="/job' is not of TensorKV"):
            board.read(name)


def layout(*sizes: int) -> list[Enlisted]:
    """The workers of hosts with these numbers of them, ranks in the order of hosts."""
    ranks = itertools.count()
    return [
        Enlisted(rank=next(ranks), num_workers=sum(sizes), local_rank=local_rank, local_workers=size)
        for size in sizes
        for local_rank in range(size)
    ]


@pytest.mark.parametrize(
    ("sizes", "first"),
    [
        ((1,), [0]),
        ((4,), [0]),
        ((1, 1), [0, 1]),
        ((2, 1), [0, 2]),
        ((1, 2), [0, 1]),
        ((4, 4), [0, 4]),
        ((3, 1, 2), [0, 3, 4]),
        ((1, 7, 1, 1), [0, 1, 8, 9]),
    ],
)
def test_hosts_are_counted_in_whatever_order_their_workers_come(
    sizes: tuple[int, ...], first: list[int]
) -> None:
    workers, total = layout(*sizes), sum(sizes)
    for order in (workers, workers[::-1], workers[1:] + workers[:1]):
        seen: list[Enlisted] = []
        for worker in order:
            if set(first) <= {each.rank for each in seen}:
                break
            assert hosts(seen, total) is None
            seen.append(worker)
        assert hosts(seen, total) == first
        assert hosts(order, total) == first
        assert hosts(order + order, total) == first, "once more does no harm"


def test_ranks_that_are_dealt_out_in_turn() -> None:
    """Rank 0 on the first host, rank 1 on the second, and so on: mpirun's --map-by node."""
    workers = [Enlisted(rank=rank, num_workers=4, local_rank=rank // 2, local_workers=2) for rank in range(4)]
    assert hosts(workers[:2], 4) == [0, 1]


def test_a_launcher_that_counts_local_ranks_from_elsewhere() -> None:
    """When all are there, there is nobody to wait for."""
    workers = [Enlisted(rank=rank, num_workers=3, local_rank=rank + 1, local_workers=9) for rank in range(3)]
    assert hosts(workers[:2], 3) is None
    assert hosts(workers, 3) == [0]
