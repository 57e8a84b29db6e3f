"""Which reply belongs to which request, and which to none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tensorkv.errors import InvalidOut, KeyDeleted, PeerLostError, ProtocolError, to_wire
from tensorkv.wire import messages as m
from tensorkv.worker.requests import Exchange, RequestTable, SingleReply, replies_of


class Counted(Exchange):
    """Takes so many replies; keeps them."""

    def __init__(self, number: int, error: Exception | None = None) -> None:
        self.left = number
        self.error = error
        self.taken: list[Any] = []
        self.memory = bytearray(4)

    def place(self, message: m.Data, payload_bytes: int) -> list[memoryview]:
        return [memoryview(self.memory)[:1], memoryview(self.memory)[1:]]

    def take(self, message: Any) -> bool:
        if self.error is not None and isinstance(message, m.Message):
            raise self.error
        self.taken.append(message)
        self.left -= 1
        return self.left == 0 or not isinstance(message, m.Message)


def test_numbers_are_handed_out_once() -> None:
    table = RequestTable()
    numbers = [table.open(Counted(1)), table.number(), table.open(Counted(1))]
    table.drop(numbers[0])
    assert sorted({*numbers, table.open(Counted(1))}) == [1, 2, 3, 4]


def test_an_exchange_is_found_until_its_last_reply() -> None:
    table, exchange = RequestTable(), Counted(2)
    number = table.open(exchange)
    assert table.find(number) is exchange
    assert not table.take(exchange, number, m.Done(number))
    assert table.take(exchange, number, m.Done(number))
    assert table.find(number) is None
    assert len(exchange.taken) == 2


def test_a_reply_to_one_who_has_given_up_is_nobodys_and_one_to_no_request_is_a_mistake() -> None:
    table = RequestTable()
    number = table.open(Counted(1))
    table.drop(number)
    assert table.find(number) is None
    for wrong in (0, -1, number + 5, 2**63 - 1):
        with pytest.raises(ProtocolError, match=f"request {wrong}, which was never made"):
            table.find(wrong)


def test_an_exchange_that_cannot_take_its_reply_fails_alone() -> None:
    table, exchange = RequestTable(), Counted(2, InvalidOut("unwritable"))
    number = table.open(exchange)
    assert table.take(exchange, number, m.Done(number))
    (error,) = exchange.taken
    assert isinstance(error, InvalidOut)
    assert error.__cause__ is exchange.error
    broken = Counted(2, ProtocolError("not so"))
    number = table.open(broken)
    with pytest.raises(ProtocolError, match="not so"):
        table.take(broken, number, m.Done(number))


def test_all_end_with_the_connection() -> None:
    table, exchanges = RequestTable(), [Counted(3), SingleReply()]
    for each in exchanges:
        table.open(each)
    table.end_all(PeerLostError("gone"))
    assert table.exchanges == {}
    assert [str(each) for each in exchanges[0].taken] == ["gone"]  # type: ignore[attr-defined]
    with pytest.raises(PeerLostError, match="gone"):
        exchanges[1].check()  # type: ignore[attr-defined]


def test_a_single_reply_has_the_class_that_its_request_asks_for() -> None:
    table, exchange = RequestTable(), SingleReply()
    number, message = table.request(lambda n: m.Lookup(n, 1, None), exchange)
    assert message == m.Lookup(number, 1, None)
    with pytest.raises(ProtocolError, match="Done where Entries belongs"):
        table.take(exchange, number, m.Done(number))
    with pytest.raises(ProtocolError, match="a payload where none belongs"):
        exchange.place(m.Data(1, 0), 4)
    assert table.take(exchange, number, m.Entries(number, []))
    assert replies_of([(0, number, exchange)]) == [m.Entries(number, [])]


def test_the_first_refusal_is_raised() -> None:
    asked = [(rank, 1, SingleReply()) for rank in range(3)]
    for rank, _, exchange in asked[1:]:
        exchange.take(m.Failed(1, *to_wire(KeyDeleted(f"at server {rank}"))))
    asked[0][2].take(m.Done(1))
    with pytest.raises(KeyDeleted, match="at server 1"):
        replies_of(asked)


def test_a_copied_payload_goes_where_the_exchange_says() -> None:
    exchange = Counted(1)
    parts = [torch.tensor([1, 2], dtype=torch.uint8), torch.tensor([3, 4], dtype=torch.uint8)]
    exchange.copy(m.Data(1, 0), parts)
    assert bytes(exchange.memory) == bytes([1, 2, 3, 4])
