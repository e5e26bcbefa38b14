"""Compiled solves of objects that are made anew for every solve, and of several of one class."""

import gc
import weakref
from typing import Any

import pytest
import torch
from compiled_solves import INSIDE, NEEDS_TORCH, REGULAR, TRACED, assert_same, compiling, solved, start
from torch import Tensor, nn

from torchdiffeq_lmm import odeint

pytestmark = [NEEDS_TORCH, pytest.mark.slow]


class Wrapped(nn.Module):
    """A func and what it is given beside the state, as by `torchcde.cdeint`."""

    def __init__(self, net: nn.Module, condition: Tensor) -> None:
        super().__init__()
        self.net = net
        self.condition = condition

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return (self.net(y) + self.condition).tanh() * t


def check(net: nn.Module, condition: Tensor) -> None:
    keywords: dict[str, Any] = {"options": REGULAR}
    expected = solved(Wrapped(net, condition), start(), INSIDE, "ab1", **keywords)
    assert_same(solved(Wrapped(net, condition), start(), INSIDE, "ab1", compile=TRACED, **keywords), expected)


def test_a_wrapper_made_anew_for_every_solve_is_compiled_once() -> None:
    net = nn.Linear(2, 2, dtype=torch.float64)
    with compiling(2):
        check(net, start().square())
    with compiling(0):
        check(net, start().cos())
        check(nn.Linear(2, 2, dtype=torch.float64), start().cos())
    # What is not alike is noticed.
    with compiling(2):
        check(nn.Tanh(), start().cos())
    with compiling(0):
        check(net, start().sin())


def test_objects_of_a_class_that_are_not_alike() -> None:
    def made(width: int) -> Wrapped:
        func = Wrapped(nn.Identity(), torch.ones(width, dtype=torch.float64))
        with torch.no_grad():
            odeint(func, start(1, width), INSIDE, method="ab1", options=REGULAR, compile=TRACED)
        return func

    # Each has what is its own, be they there at once or one after the other: together they are too many for one.
    with torch._dynamo.config.patch(recompile_limit=5):
        kept = [made(width) for width in range(1, 7)]
        kept.clear()
        for width in range(1, 7):
            made(width)


def test_no_tensor_is_kept_for_the_next_one() -> None:
    net, condition = nn.Linear(2, 2, dtype=torch.float64), start()
    check(net, condition)
    gone = [weakref.ref(tensor) for tensor in (net.weight, condition)]
    del net, condition
    gc.collect()
    assert [tensor() for tensor in gone] == [None, None]
