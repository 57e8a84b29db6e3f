"""Flags and numbers that a user passes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tensorkv.arguments import MAX_TIMEOUT_S, flag, not_negative, number, positive, seconds
from tensorkv.errors import InvalidArgument


def test_a_flag_is_a_bool() -> None:
    assert flag("whole", np.True_) is True
    assert flag("whole", False) is False
    for value in (1, 0, None, "no", torch.tensor(True)):
        with pytest.raises(InvalidArgument, match="whole=.* is neither True nor False"):
            flag("whole", value)


def test_anything_that_is_no_number_is_nan() -> None:
    assert number(2) == number(np.float32(2)) == number(torch.tensor(2)) == 2.0
    for value in ("2", None, 10**400, torch.ones(2), [2]):
        assert math.isnan(number(value))


@pytest.mark.parametrize("value", [-1, math.nan, "1", None])
def test_the_bounds_of_numbers(value: Any) -> None:
    with pytest.raises(InvalidArgument, match="lr=.* is not a positive number"):
        positive("lr", value)
    with pytest.raises(InvalidArgument, match="lr=.* is not a finite number, 0 or more"):
        not_negative("lr", value)
    assert (positive("lr", 0.5), not_negative("lr", 0)) == (0.5, 0.0)
    for call, other in ((positive, 0), (not_negative, math.inf)):
        with pytest.raises(InvalidArgument):
            call("lr", other)


def test_a_timeout_is_clipped_to_what_the_system_takes() -> None:
    assert seconds("timeout_s", 3) == 3.0
    assert seconds("timeout_s", math.inf) == MAX_TIMEOUT_S
