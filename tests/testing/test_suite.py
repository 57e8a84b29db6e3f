"""The helpers of the checks: they must be able to fail."""

from __future__ import annotations

import threading

import pytest
import torch

from tensorkv.testing.suite import Meeting, close, full, noise, raises, same


def test_same_is_bitwise() -> None:
    same(full(1), 1.0)
    same(full(1), full(1))
    for other in (full(1, 3, 2), full(1, dtype=torch.float64), full(1) + 1e-7):
        with pytest.raises(AssertionError):
            same(full(1), other)
    with pytest.raises(AssertionError, match="not a tensor"):
        same(None, 1.0)
    with pytest.raises(AssertionError, match="the sum is"):
        same(full(2), 1.0, "the sum")


def test_close_allows_rounding_only() -> None:
    close(full(1) + 1e-7, full(1))
    with pytest.raises(AssertionError):
        close(full(1) + 1e-3, full(1))
    with pytest.raises(AssertionError, match="dtype"):
        close(full(1), full(1, dtype=torch.float64))


def test_raises_wants_the_error_and_its_text() -> None:
    def fail() -> None:
        raise KeyError("the key 'w'")

    assert isinstance(raises(KeyError, fail, "'w'"), KeyError)
    with pytest.raises(AssertionError, match="missing in the text"):
        raises(KeyError, fail, "'x'")
    with pytest.raises(KeyError):
        raises(ValueError, fail)
    with pytest.raises(AssertionError, match="was not raised"):
        raises(KeyError, lambda: 3)


def test_the_order_of_noise_matters() -> None:
    a, b, c = (noise(seed, 1000) for seed in range(3))
    assert not torch.equal((a + b) + c, a + (b + c))
    assert torch.equal(noise(1, 5), noise(1, 5))


def test_a_meeting_ends_when_a_worker_fails() -> None:
    meeting = Meeting(2)
    told: list[str] = []

    def wait() -> None:
        try:
            meeting.wait_for("never")
        except AssertionError as exc:
            told.append(str(exc))
        try:
            meeting.everybody()
        except threading.BrokenBarrierError:
            told.append("broken")

    waiter = threading.Thread(target=wait)
    waiter.start()
    meeting.signal("another")
    meeting.fail()
    waiter.join(20)
    assert told == ["nobody signalled 'never'", "broken"]
