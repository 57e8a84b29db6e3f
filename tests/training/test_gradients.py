"""What is pushed of a parameter, and how changes of gradients are noticed."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

from tensorkv.keys import ABSENT
from tensorkv.training.gradients import (
    ClippingWatch,
    Marks,
    digest,
    pushed_gradient,
    tell_scaler,
    unscale,
    warn_if_alike,
)


def parameter(*numbers: float) -> nn.Parameter:
    made = nn.Parameter(torch.tensor(numbers))
    made.sum().backward()
    return made


def test_a_gradient_is_pushed_dense_and_without_a_graph() -> None:
    one = parameter(1.0, 2.0)
    assert pushed_gradient(one) is one.grad
    one.grad = (one * 2).sum() * torch.ones(2)
    assert not pushed_gradient(one).requires_grad
    one.grad = torch.sparse_coo_tensor([[0, 0]], [1.0, 2.0], (2,), check_invariants=True)
    assert pushed_gradient(one).tolist() == [3.0, 0.0]
    one.grad = None
    assert pushed_gradient(one) is ABSENT


def test_marks_hold_until_a_gradient_is_changed_or_replaced() -> None:
    one, other = parameter(1.0), nn.Parameter(torch.zeros(1))
    marks = Marks([one, other])
    assert marks.hold()
    assert one.grad is not None
    one.grad.add_(1)
    assert not marks.hold()
    marks = Marks([one, other])
    for _ in range(3):  # a new gradient may lie where the old one lay
        one.grad = None
        one.sum().backward()
        assert not marks.hold()
    marks = Marks([one, other])
    other.grad = torch.zeros(1)
    assert not marks.hold()


def test_a_change_after_backward_is_said_once() -> None:
    one = nn.Parameter(torch.ones(2))
    watch = ClippingWatch([one])
    one.sum().backward()
    one.sum().backward()
    nn.utils.clip_grad_norm_([one], 1e9)  # as Trainer does to learn the norm
    watch.check()
    one.sum().backward()
    nn.utils.clip_grad_norm_([one], 0.1)
    with pytest.warns(UserWarning, match="max_norm="):
        watch.check()
    nn.utils.clip_grad_norm_([one], 0.01)
    watch.check()
    assert not one._post_accumulate_grad_hooks


def test_the_watch_ends_after_some_steps() -> None:
    one = nn.Parameter(torch.ones(2))
    watch = ClippingWatch([one])
    for _ in range(3):
        one.sum().backward()
        watch.check()
    assert not one._post_accumulate_grad_hooks
    assert one.grad is not None
    one.grad.mul_(2)
    with warnings.catch_warnings(action="error"):
        watch.check()


def test_a_gradient_that_replaces_another_is_not_clipping() -> None:
    one = nn.Parameter(torch.ones(2))
    watch = ClippingWatch([one])
    one.grad = torch.ones(2)  # by hand, or by a framework of its own
    watch.check()


def test_zeros_of_a_parameter_that_a_step_does_not_use_are_not_clipping() -> None:
    one = nn.Parameter(torch.ones(2))
    watch = ClippingWatch([one])
    one.sum().backward()
    watch.check()
    assert one.grad is not None
    one.grad.zero_()  # zero_grad(set_to_none=False)
    watch.check()


def test_unscale_divides_in_place() -> None:
    one, other = parameter(1.0, 2.0), nn.Parameter(torch.zeros(1))
    before = one.grad
    unscale([one, other], torch.tensor(4.0))
    assert before is one.grad
    assert before is not None
    assert before.tolist() == [0.25, 0.25]


def test_the_very_same_gradients_are_said() -> None:
    one, other = digest([torch.ones(2), torch.zeros(1)]), digest([torch.ones(2), torch.full((1,), 0.1)])
    assert one == digest([torch.ones(2), ABSENT])
    assert one != other
    with pytest.warns(UserWarning, match="workers 0, 2 have pushed the very same gradients.*shard"):
        warn_if_alike([one, other, one])
    with warnings.catch_warnings(action="error"):
        warn_if_alike([one, other, 0.0, 0.0, math.nan, math.nan, math.inf, math.inf])


def test_without_a_scaler_nobody_is_told() -> None:
    tell_scaler()
