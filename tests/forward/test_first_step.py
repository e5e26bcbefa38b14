"""The length of the first step: right for problems of known scales, and bounded where nothing is known."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from torchdiffeq_lmm.forward.error_norm import ErrorNorm
from torchdiffeq_lmm.forward.first_step import first_step

RTOL, ATOL = 1e-6, 1e-8
ERRORS = ErrorNorm(RTOL, ATOL, lambda y: y.abs().square().mean().sqrt())


def chosen(
    f: Callable[[float, Tensor], Tensor], x: Tensor, interval: float = 100.0, errors: ErrorNorm = ERRORS
) -> tuple[float, list[float]]:
    """The length, and those at which f was tried."""
    trials: list[float] = []
    slope = f(0.0, x)

    def later(h: float) -> Tensor:
        trials.append(h)
        return f(h, x + h * slope)

    return first_step(later, x, slope, errors, interval), trials


def start(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("rate", [1.0, 1e6])
def test_the_local_error_of_eulers_method_is_below_the_tolerance(rate: float) -> None:
    """x' = -rate x, whose Euler step misses the flow by about (rate h)² / 2."""
    h, _ = chosen(lambda t, x: -rate * x, start(1.0, 2.0), interval=math.inf)
    error = abs(math.exp(-rate * h) - (1 - rate * h)) / RTOL
    assert 1e-4 < error <= 1.0


def test_it_scales_with_the_unit_of_time() -> None:
    steps = [chosen(lambda t, x, rate=rate: -rate * x, start(1.0), math.inf)[0] for rate in (1.0, 1e4)]
    assert steps[0] == pytest.approx(1e4 * steps[1], rel=1e-6)


def test_f_is_evaluated_once() -> None:
    _, trials = chosen(lambda t, x: -x, start(1.0))
    assert len(trials) == 1
    assert 0 < trials[0] < 1


def test_a_fast_change_in_time_makes_it_short() -> None:
    slow, fast = (
        chosen(lambda t, x, rate=rate: torch.cos(torch.tensor(rate * t)) + 0 * x, start(1.0))[0] for rate in (1.0, 1e3)
    )
    assert fast < 0.1 * slow


@pytest.mark.parametrize("x", [0.0, 1.0])
def test_no_slope(x: float) -> None:
    """Nothing is known: a step that is short in itself, yet no equilibrium takes many of them."""
    h, trials = chosen(lambda t, x: 0 * x, start(x))
    assert 0 < h <= 1e-4
    assert trials[0] > 0


def test_no_state() -> None:
    h, _ = chosen(lambda t, x: 1 + 0 * x, start(0.0))
    assert 0 < h <= 1e-3


@pytest.mark.parametrize("interval", [1e-9, 1e-3])
def test_it_is_no_longer_than_the_interval(interval: float) -> None:
    for f in (lambda t, x: -1e-6 * x, lambda t, x: 0 * x, lambda t, x: 1e-30 + 0 * x):
        h, trials = chosen(f, start(1.0), interval)
        assert 0 < h <= interval
        assert trials[0] <= interval


def test_tighter_tolerances_make_it_shorter() -> None:
    steps = [
        chosen(lambda t, x: -x, start(1.0), errors=ErrorNorm(rtol, 0.0, ERRORS.norm))[0] for rtol in (1e-4, 1e-6, 1e-8)
    ]
    # By the root, as the method is of order 1.
    assert steps[0] / steps[1] == pytest.approx(10, rel=1e-2)
    assert steps[1] / steps[2] == pytest.approx(10, rel=1e-2)


@pytest.mark.parametrize("later", [math.nan, math.inf])
def test_where_f_is_not_finite_later_it_is_shorter(later: float) -> None:
    h, trials = chosen(lambda t, x: -x if t == 0 else torch.full_like(x, later), start(1.0))
    assert 0 < h <= 1e-2 * trials[0]


@pytest.mark.parametrize("slope", [math.nan, math.inf])
def test_where_f_is_not_finite_it_is_short_and_f_is_not_tried(slope: float) -> None:
    h, trials = chosen(lambda t, x: torch.full_like(x, slope), start(1.0))
    assert 0 < h <= 1e-4
    assert trials == []


def test_the_norm_decides() -> None:
    """Of two entries one changes fast."""
    rates = start(1.0, 1e4)
    by_both = chosen(lambda t, x: -rates * x, start(1.0, 1.0))[0]
    by_first = chosen(lambda t, x: -rates * x, start(1.0, 1.0), errors=ErrorNorm(RTOL, ATOL, lambda y: y[0].abs()))[0]
    assert by_first > 1e3 * by_both
