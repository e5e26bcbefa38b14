"""The stepping loop, with the weights of textbook methods: it knows none of them."""

import math

import numpy as np
import pytest
import torch
from problems import orders
from torch import Tensor

from torchdiffeq_lmm.stepping import march

# (e, b / h) on a uniform grid.
LEAPFROG = ((-1.0,), (2.0,))
LEAPFROG_IN_GENERAL_FORM = ((-1.0, 0.0), (2.0,))
ADAMS_BASHFORTH_2 = ((), (1.5, -0.5))
# x_{n+1} = x_{n-2} + 3 h (3 f_n + f_{n-2}) / 4, in increments
OPEN_NEWTON_COTES = ((-1.0, -1.0), (9 / 4, 0.0, 3 / 4))


def decay_error(method: tuple[tuple[float, ...], tuple[float, ...]], steps: int) -> float:
    """The error at t = 1 for x' = -x cos t, from three exact values."""
    increments, slopes = method
    h = 1 / steps
    start = [math.exp(-math.sin(k * h)) for k in range(3)]
    xs = [torch.tensor(x, dtype=torch.float64) for x in start]

    def slope(n: int, x: Tensor) -> Tensor:
        return -x * math.cos(n * h)

    # The first rows put the exact start values in place of steps.
    def row(n: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        if n < 2:
            exact = float((xs[n + 1] - xs[n]) / slope(n, xs[n]))
            return (0.0,) * len(increments), (exact, *(0.0,) * (len(slopes) - 1))
        return increments, tuple(h * b for b in slopes)

    *_, (_, _, last) = march(xs[0], [row(n) for n in range(steps)], slope)
    return abs(float(last) - math.exp(-math.sin(1)))


@pytest.mark.parametrize(
    ("method", "order"),
    [(LEAPFROG, 2), (LEAPFROG_IN_GENERAL_FORM, 2), (ADAMS_BASHFORTH_2, 2), (OPEN_NEWTON_COTES, 3)],
    ids=["leapfrog", "leapfrog, general form", "Adams-Bashforth 2", "open Newton-Cotes"],
)
def test_orders_of_textbook_methods(method: tuple[tuple[float, ...], tuple[float, ...]], order: int) -> None:
    measured = orders([decay_error(method, steps) for steps in (160, 320, 640, 1280)])
    assert np.mean(measured) == pytest.approx(order, abs=0.15), measured


def test_the_short_form_of_leapfrog_is_the_general_one() -> None:
    assert decay_error(LEAPFROG, 50) == pytest.approx(decay_error(LEAPFROG_IN_GENERAL_FORM, 50), rel=1e-9)


def test_a_gradient_to_the_weights_forbids_the_short_form() -> None:
    weight = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    one = torch.ones((), dtype=torch.float64)
    rows = [((0.0 * weight,), (0.5 * one,)), ((weight,), (one,))]
    *_, (_, _, last) = march(one, rows, lambda n, x: 2 * x)
    last.backward()
    # x_2 = x_1 + weight (x_1 - x_0) + 2 x_1, with x_1 = 2
    assert (float(last.detach()), float(weight.grad)) == (5.0, 1.0)
