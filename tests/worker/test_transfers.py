"""Gather and spread: what is pushed, cut into chunks and put together again, is what was pushed."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from tensorkv.arrays import dtype_name
from tensorkv.errors import KeyDeleted, ProtocolError, TensorKVError, to_wire
from tensorkv.wire import messages as m
from tensorkv.worker.plans import COALESCE_BYTES, KeyState, Piece, Plan, build_plan
from tensorkv.worker.transfers import Destinations, PullExchange, _share_memory, gather, gather_into

LARGE = COALESCE_BYTES // 4 + 8  # elements of float32 that are not small


def states(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32, num_servers: int = 1, cut: int = 0
) -> list[KeyState]:
    """Return keys of these shapes, cut into slices of `cut` elements over the servers, 0 for whole."""
    made: list[KeyState] = []
    number = 1
    for index, shape in enumerate(shapes):
        size = math.prod(shape)
        step = cut or max(size, 1)
        slices = []
        for low in range(0, max(size, 1), step):
            slices.append(m.SliceEntry(number, number % num_servers, low, min(low + step, size)))
            number += 1
        made.append(
            KeyState.of(m.KeyEntry(f"k{index}", index + 1, shape, dtype_name(dtype), m.EPOCH, slices))
        )
    return made


def plan_of(keys: list[KeyState], dtype: torch.dtype | None = None, num_servers: int = 1) -> Plan:
    return build_plan(1, keys, [dtype or key.dtype for key in keys], [1] * len(keys), num_servers)


def carry(plan: Plan, values: list[torch.Tensor], outs: list[list[torch.Tensor]]) -> None:
    """Push and pull through thin air: what a server would keep is what was sent, cast to its dtype."""
    destinations = Destinations.per_device(plan.states, outs)
    ends: list[Exception | None] = []
    for part in plan.parts:
        exchange = PullExchange(part, destinations, ends.append)
        for number in reversed(range(len(part.chunks))):
            chunk = part.chunks[number]
            sent = b"".join(bytes(view) for view in gather(chunk, values))
            assert len(sent) == chunk.num_elems * chunk.dtype.itemsize
            stored = torch.frombuffer(bytearray(sent or b"\0" * 8), dtype=chunk.dtype)[: chunk.num_elems]
            payload = stored.to(chunk.stored_dtype).numpy().tobytes()
            place(exchange, number, payload)
            assert exchange.take(m.Data(1, number)) == (number == 0)
    assert ends == [None] * len(plan.parts)
    destinations.finish()


def carry_in_place(plan: Plan, values: list[torch.Tensor], outs: list[list[torch.Tensor]]) -> None:
    """As `carry`, through memory that both sides see: in one part, and in one part per piece."""
    destinations = Destinations.per_device(plan.states, outs)
    ends: list[Exception | None] = []
    for part in plan.parts:
        exchange = PullExchange(part, destinations, ends.append)
        for number, chunk in enumerate(part.chunks):
            pushed = torch.empty(chunk.num_elems, dtype=chunk.dtype)
            gather_into(pushed, chunk, values)
            assert b"".join(bytes(view) for view in gather(chunk, values)) == pushed.numpy().tobytes()
            stored = pushed.to(chunk.stored_dtype).view(torch.uint8)
            lengths = [chunk.num_elems]
            if number % 2:
                lengths = [piece.stop - piece.start for piece in chunk.pieces]
            parts = list(stored.split([length * chunk.stored_dtype.itemsize for length in lengths]))
            data = m.Data(1, number, m.Placed(1, [(1, number, len(lengths))]))
            exchange.copy(data, parts)
            assert exchange.take(data) == (number == len(part.chunks) - 1)
    assert ends == [None] * len(plan.parts)
    destinations.finish()


def place(exchange: PullExchange, number: int, payload: bytes) -> None:
    low = 0
    for view in exchange.place(m.Data(1, number), len(payload)):
        view[:] = payload[low : low + len(view)]
        low += len(view)
    assert low == len(payload)


def numbers(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


MIXES = {
    "one small": [(3,)],
    "one scalar": [()],
    "nothing in it": [(0,), (2, 0)],
    "all small": [(3,), (2, 2), (), (7,)],
    "all small, one dimension": [(3,), (2,), (7,)],
    "one large": [(LARGE,)],
    "between": [(3,), (LARGE, 2), (2, 2), (4,), (LARGE,), ()],
    "large at the ends": [(LARGE,), (5,), (2, LARGE)],
}


@pytest.mark.parametrize("cut", [0, 16, LARGE + 16])
@pytest.mark.parametrize("mix", MIXES)
def test_values_arrive_as_they_were(mix: str, cut: int) -> None:
    shapes = MIXES[mix]
    plan = plan_of(states(shapes, num_servers=2, cut=cut), num_servers=2)
    values = [numbers(shape, seed) for seed, shape in enumerate(shapes)]
    for _ in range(2):  # a plan is used again and again
        outs = [torch.full(shape, math.nan) for shape in shapes]
        carry(plan, values, [[out] for out in outs])
        assert all(map(torch.equal, outs, values))
        outs = [torch.full(shape, math.nan) for shape in shapes]
        carry_in_place(plan, values, [[out] for out in outs])
        assert all(map(torch.equal, outs, values))


def strided(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.full((*shape, 2), math.nan, dtype=dtype)[..., 0]


KINDS_OF_OUT: dict[str, Callable[[tuple[int, ...]], torch.Tensor]] = {
    "plain": lambda shape: torch.full(shape, math.nan),
    "not contiguous": lambda shape: strided(shape, torch.float32),
    "float64": lambda shape: torch.full(shape, math.nan, dtype=torch.float64),
    "float64, not contiguous": lambda shape: strided(shape, torch.float64),
    "a parameter": lambda shape: torch.nn.Parameter(torch.full(shape, math.nan)).detach(),
}


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=60)
def test_any_mix_of_shapes_cuts_dtypes_and_outs(data: st.DataObject) -> None:
    shape = st.sampled_from([(), (0,), (1,), (5,), (3, 4), (LARGE,), (2, LARGE)])
    shapes = data.draw(st.lists(shape, min_size=1, max_size=5))
    num_servers = data.draw(st.integers(1, 3))
    cut = data.draw(st.sampled_from([0, 16, 4096, LARGE]))
    pushed = data.draw(st.sampled_from([torch.float32, torch.float64, torch.float16]))
    keys = states(shapes, num_servers=num_servers, cut=cut)
    plan = plan_of(keys, pushed, num_servers)
    values = [numbers(each, seed, pushed) for seed, each in enumerate(shapes)]
    kinds = st.lists(st.sampled_from(sorted(KINDS_OF_OUT)), min_size=1, max_size=2)
    outs = [[KINDS_OF_OUT[kind](each) for kind in data.draw(kinds)] for each in shapes]
    carry(plan, values, outs)
    for value, each in zip(values, outs, strict=True):
        for out in each:
            assert torch.equal(out, value.to(torch.float32).to(out.dtype))


def test_values_that_are_not_contiguous_are_sent_as_they_are_seen() -> None:
    keys = states([(3, 4), (LARGE, 2)])
    values = [numbers((4, 3), 1).t(), numbers((2, LARGE), 2).t()]
    outs = [torch.empty(3, 4), torch.empty(LARGE, 2)]
    carry(plan_of(keys), values, [[out] for out in outs])
    assert all(map(torch.equal, outs, values))


@pytest.mark.parametrize("size", [4, LARGE])
def test_the_last_of_outs_that_share_memory_wins(size: int) -> None:
    for num_servers, cut in ((1, 0), (2, 16)):
        keys = states([(size,)] * 3, num_servers=num_servers, cut=cut)
        values = [torch.full((size,), float(i)) for i in range(3)]
        shared = torch.empty(size)
        other = torch.empty(size)
        carry(plan_of(keys, num_servers=num_servers), values, [[shared], [shared, other], [shared]])
        assert torch.equal(shared, values[2])
        assert torch.equal(other, values[1])


@pytest.mark.parametrize("size", [4, LARGE])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_last_of_outs_that_overlap_in_part_wins(size: int, reverse: bool) -> None:
    keys = states([(size,)] * 2)
    values = [torch.full((size,), float(i)) for i in range(2)]
    memory = torch.empty(2 * size)
    outs = [memory[:size], memory[size // 2 : size // 2 + size]]
    if reverse:
        outs.reverse()
    expected = torch.empty(2 * size)
    for out, value in zip(outs, values, strict=True):
        expected[out.storage_offset() :][:size] = value
    carry(plan_of(keys), values, [[out] for out in outs])
    assert torch.equal(memory[: size // 2 + size], expected[: size // 2 + size])


def test_what_may_share_memory() -> None:
    memory = torch.empty(4, 6)
    assert not _share_memory([memory[0], memory[3], memory[1], torch.empty(0), torch.empty(0)])
    assert _share_memory([memory[0], memory.view(-1)[5:8]])
    assert _share_memory([memory[1], memory[0], memory[1]])
    assert _share_memory([memory[:, 0], memory[:, 1]])  # they do not, but lie between each other
    assert not _share_memory([memory[:2, 0], memory[2:, 0]])


def test_autograd_is_told_of_what_was_received_in_place() -> None:
    for size in (4, LARGE):
        leaf = torch.nn.Parameter(torch.ones(size))
        product = (leaf * leaf).sum()
        before = leaf._version
        carry(plan_of(states([(size,)])), [torch.zeros(size)], [[leaf.detach()]])
        assert leaf._version > before
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()  # type: ignore[no-untyped-call]


def test_absent_values_have_no_payload() -> None:
    plan = build_plan(1, states([(4,), (2,)]), [torch.float32] * 2, [0, 1], 1)
    chunks = plan.parts[0].chunks
    assert [chunk.absent for chunk in chunks] == [True, False]
    assert gather(chunks[0], [torch.empty(0), torch.ones(2)]) == []
    assert len(gather(chunks[1], [torch.empty(0), torch.ones(2)])[0]) == 8


def pull(plan: Plan, on_end: Callable[[Any], None] = lambda error: None) -> PullExchange:
    return PullExchange(plan.parts[0], Destinations.per_device(plan.states, [[torch.empty(4)]]), on_end)


@pytest.mark.parametrize(
    ("chunk", "size", "text"), [(0, 15, "came with 15 bytes"), (1, 16, "no reply"), (-1, 16, "no reply")]
)
def test_replies_that_do_not_fit(chunk: int, size: int, text: str) -> None:
    with pytest.raises(ProtocolError, match=text):
        pull(plan_of(states([(4,)]))).place(m.Data(1, chunk), size)


def test_a_chunk_that_comes_twice() -> None:
    """Else it would count for one that has not come, and the caller would get what was in its memory."""
    plan = build_plan(1, states([(4,), (4,)]), [torch.float32, torch.float64], [1, 1], 1)
    outs = [torch.zeros(4), torch.zeros(4)]
    exchange = PullExchange(
        plan.parts[0], Destinations.per_device(plan.states, [[each] for each in outs]), print
    )
    exchange.place(m.Data(1, 0), 16)
    assert not exchange.take(m.Data(1, 0))
    with pytest.raises(ProtocolError, match="or twice"):
        exchange.place(m.Data(1, 0), 16)
    with pytest.raises(ProtocolError, match="or twice"):
        exchange.take(m.Data(1, 0))


def test_a_reply_of_another_kind() -> None:
    with pytest.raises(ProtocolError, match="is no reply to a pull of 1 chunks"):
        pull(plan_of(states([(4,)]))).take(m.Done(1))


def test_a_reply_without_its_elements() -> None:
    with pytest.raises(ProtocolError, match="a chunk of 4 elements came without them"):
        pull(plan_of(states([(4,)]))).take(m.Data(1, 0))


def test_a_value_of_no_elements_comes_without_payload() -> None:
    plan = plan_of(states([(0,)]))
    ends: list[Any] = []
    destinations = Destinations.per_device(plan.states, [[torch.empty(0)]])
    assert PullExchange(plan.parts[0], destinations, ends.append).take(m.Data(1, 0))
    assert ends == [None]


@pytest.mark.parametrize("message", [KeyDeleted("gone"), m.Failed(1, *to_wire(KeyDeleted("gone")))])
def test_the_end_by_an_error(message: TensorKVError | m.Failed) -> None:
    ends: list[Exception] = []
    assert pull(plan_of(states([(4,)])), ends.append).take(message)
    assert isinstance(ends[0], KeyDeleted)


def test_two_links_that_receive_parts_of_one_value_at_once() -> None:
    """Whichever asks first makes the memory; the other writes into the same."""
    keys = states([(LARGE * 2,)], num_servers=2, cut=LARGE)
    piece = Piece(0, 0, LARGE * 2, 0, True, False)
    for _ in range(200):
        out = torch.empty(LARGE * 2, dtype=torch.float64)
        destinations = Destinations.per_device(keys, [[out]])
        start = threading.Barrier(2)
        found: list[torch.Tensor] = []

        def ask(
            destinations: Destinations = destinations,
            start: threading.Barrier = start,
            found: list[torch.Tensor] = found,
        ) -> None:
            start.wait(20)
            found.append(destinations.memory_for(piece))

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert found[0].data_ptr() == found[1].data_ptr() == destinations.memory_for(piece).data_ptr()


@pytest.mark.parametrize(
    ("lengths", "text"),
    [
        ([6, 14], "cut its slices"),
        ([40], "more came"),
        ([20, 1], "more came"),
        ([12], "cut its"),
        ([], "cut its"),
    ],
)
def test_parts_that_are_no_whole_slices_are_refused(lengths: list[int], text: str) -> None:
    """A chunk of 3 and 2 floats."""
    plan = plan_of(states([(3,), (2,)]))
    outs = [[torch.zeros(3)], [torch.zeros(2)]]
    exchange = PullExchange(plan.parts[0], Destinations.per_device(plan.states, outs), lambda error: None)
    parts = [torch.ones(length, dtype=torch.uint8) for length in lengths]
    with pytest.raises(ProtocolError, match=text):
        exchange.copy(m.Data(1, 0, m.Placed(1, [(1, 0, sum(lengths))])), parts)
    assert [out[0].sum().item() for out in outs] == [0.0, 0.0]


def test_what_lies_in_place_is_looked_up_again_when_it_has_moved() -> None:
    plan = plan_of(states([(3,), (2,)]))
    for number, spans in enumerate([[(1, 0, 20)], [(1, 0, 20)], [(1, 64, 20)]]):
        outs = [torch.zeros(3), torch.zeros(2)]
        destinations = Destinations(plan.states, outs)
        exchange = PullExchange(plan.parts[0], destinations, lambda error: None)
        memory = torch.full((5,), float(number)).view(torch.uint8)
        exchange.copy(m.Data(1, 0, m.Placed(1, spans)), [memory])
        expected = 0.0 if number == 1 else float(number)  # what the first span showed
        assert torch.cat(outs).tolist() == [expected] * 5
