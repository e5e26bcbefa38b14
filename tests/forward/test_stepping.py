"""The stepping loop, with the weights of textbook methods: it knows none of them."""

import math

import numpy as np
import pytest
import torch
from problems import orders
from torch import Tensor

from torchdiffeq_lmm.forward.stepping import History, march
from torchdiffeq_lmm.schemes.recurrence import Keeps, Row
from torchdiffeq_lmm.schemes.weighted_sum import Weight

Method = tuple[tuple[float, ...], tuple[float, ...]]

# (e, b / h) on a uniform grid.
LEAPFROG: Method = ((-1.0,), (2.0,))
LEAPFROG_IN_GENERAL_FORM: Method = ((-1.0, 0.0), (2.0,))
ADAMS_BASHFORTH_2: Method = ((), (1.5, -0.5))
# x_{n+1} = x_{n-2} + 3 h (3 f_n + f_{n-2}) / 4, in increments
OPEN_NEWTON_COTES: Method = ((-1.0, -1.0), (9 / 4, 0.0, 3 / 4))


def row(
    increments: tuple[Weight, ...] = (),
    slopes: tuple[Weight, ...] = (),
    implicit: Weight | None = None,
    guess: tuple[Weight, ...] = (),
    evaluates: bool = True,
    is_node: bool = True,
    keeps: Keeps | None = None,
) -> Row:
    lags = (tuple(enumerate(weights)) for weights in (increments, slopes, guess))
    e, b, g = lags
    return Row(evaluates, e, b, implicit, g, is_node, keeps)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def no_equation(*args: object) -> tuple[Tensor, Tensor]:
    raise AssertionError


def decay_error(method: Method, steps: int) -> float:
    """The error at t = 1 for x' = -x cos t, from three exact values."""
    increments, slopes = method
    h = 1 / steps
    exact = [math.exp(-math.sin(k * h)) for k in range(3)]

    def slope(n: int, x: Tensor) -> Tensor:
        return -x * math.cos(n * h)

    # The first rows put the exact start values in place of steps.
    rows = [row(slopes=(-(exact[n + 1] - exact[n]) / (exact[n] * math.cos(n * h)),)) for n in range(2)]
    rows += [row(increments, tuple(h * b for b in slopes), keeps=Keeps(2, 2))] * (steps - 2)
    *_, (state, last) = march(History(number(exact[0])), rows, slope, no_equation)
    assert state == steps
    return abs(float(last) - math.exp(-math.sin(1)))


@pytest.mark.parametrize(
    ("method", "order"),
    [(LEAPFROG, 2), (LEAPFROG_IN_GENERAL_FORM, 2), (ADAMS_BASHFORTH_2, 2), (OPEN_NEWTON_COTES, 3)],
    ids=["leapfrog", "leapfrog, general form", "Adams-Bashforth 2", "open Newton-Cotes"],
)
def test_orders_of_textbook_methods(method: Method, order: int) -> None:
    measured = orders([decay_error(method, steps) for steps in (80, 160, 320, 640)])
    assert np.mean(measured) == pytest.approx(order, abs=0.15), measured


def test_states_come_in_order_with_their_numbers_and_are_evaluated_once() -> None:
    calls: list[tuple[int, float]] = []

    def slope(state: int, x: Tensor) -> Tensor:
        calls.append((state, float(x)))
        return x

    states = list(march(History(number(1.0)), [row(slopes=(1.0,))] * 3, slope, no_equation))
    assert [(state, float(x)) for state, x in states] == [(1, 2.0), (2, 4.0), (3, 8.0)]
    assert calls == [(0, 1.0), (1, 2.0), (2, 4.0)]


def test_states_are_made_one_at_a_time() -> None:
    calls: list[int] = []

    def slope(state: int, x: Tensor) -> Tensor:
        calls.append(state)
        return x

    made = march(History(number(1.0)), (row(slopes=(1.0,)) for _ in iter(int, 1)), slope, no_equation)
    for state in range(1, 4):
        assert next(made)[0] == state
        assert calls == list(range(state))


def test_stages_are_added_to_the_last_node() -> None:
    """Two steps of the classical Runge–Kutta method for x' = x."""
    h = 0.5
    rows = [
        row(slopes=(h / 2,), is_node=False),
        row(slopes=(h / 2,), is_node=False),
        row(slopes=(h,), is_node=False),
        row(slopes=(h / 6, h / 3, h / 3, h / 6), keeps=Keeps(0, 0)),
    ]
    states = dict(march(History(number(1.0)), rows * 2, lambda _, x: x, no_equation))
    growth = 1 + h + h**2 / 2 + h**3 / 6 + h**4 / 24
    assert [float(states[4]), float(states[8])] == pytest.approx([growth, growth**2], rel=1e-15)


def test_a_row_may_leave_the_state_before_unevaluated() -> None:
    """The lags count what was evaluated, not the states."""
    calls: list[int] = []

    def slope(state: int, x: Tensor) -> Tensor:
        calls.append(state)
        return number(10.0**state)

    rows = [row(slopes=(1.0,)), row(slopes=(1.0,), evaluates=False), row(slopes=(1.0, 2.0))]
    states = list(march(History(number(0.0)), rows, slope, no_equation))
    assert calls == [0, 2]
    assert [float(x) for _, x in states] == [1.0, 2.0, 2.0 + 100.0 + 2.0]


def test_increments_between_nodes_skip_the_stages() -> None:
    rows = [row(slopes=(1.0,)), row(slopes=(5.0,), is_node=False), row((2.0,), (1.0,)), row((1.0, 3.0), (0.0,))]
    states = list(march(History(number(0.0)), rows, lambda _, x: number(1.0), no_equation))
    # Increments 1, 2 · 1 + 1 = 3 and 3 + 3 · 1 = 6.
    assert [float(x) for _, x in states] == [1.0, 6.0, 4.0, 10.0]


def test_what_is_kept_is_dropped_behind_the_rows_that_need_it() -> None:
    rows = [row(slopes=(1.0,)), row((1.0,), (1.0,), keeps=Keeps(1, 1)), row((1.0, 1.0), (1.0,))]
    with pytest.raises(IndexError):
        list(march(History(number(1.0)), rows, lambda _, x: x, no_equation))


def test_an_implicit_row_is_handed_its_equation() -> None:
    asked: list[tuple[int, list[float | None]]] = []

    def solve(
        state: int, x: Tensor, known: Tensor | None, weight: Weight, guess: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        asked.append((state, [None if v is None else float(v) for v in (x, known, number(float(weight)), guess)]))
        return number(0.5), number(7.0 + state)

    rows = [
        row(implicit=0.25, evaluates=False),
        row((3.0,), implicit=0.5, guess=(2.0,), evaluates=False),
        row((), (1.0, -1.0), implicit=0.125, guess=(1.0, 1.0), evaluates=False, is_node=False),
        row(slopes=(1.0,), evaluates=False),
    ]
    states = list(march(History(number(1.0)), rows, lambda _, x: x, solve))
    assert asked == [(1, [1.0, None, 0.25, None]), (2, [1.5, 1.5, 0.5, 16.0]), (3, [2.0, 1.0, 0.125, 17.0])]
    assert [float(x) for _, x in states] == [1.5, 2.0, 2.5, 2.0 + 10.0]


def test_the_slope_of_an_implicit_row_is_not_evaluated_again() -> None:
    """The trapezoidal rule for x' = -x."""
    h, calls = 0.5, []

    def slope(state: int, x: Tensor) -> Tensor:
        calls.append(state)
        return -x

    def solve(
        state: int, x: Tensor, known: Tensor | None, weight: Weight, guess: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert known is not None
        new = (x + known) / (1 + weight)
        return new - x, -new

    rows = [row(slopes=(h / 2,), implicit=h / 2, evaluates=n == 0) for n in range(4)]
    *_, (_, last) = march(History(number(1.0)), rows, slope, solve)
    assert float(last) == pytest.approx((0.75 / 1.25) ** 4, rel=1e-14)
    assert calls == [0]


def test_the_short_form_of_leapfrog_is_the_general_one() -> None:
    assert decay_error(LEAPFROG, 50) == pytest.approx(decay_error(LEAPFROG_IN_GENERAL_FORM, 50), rel=1e-9)


def test_the_short_form_keeps_the_increments_for_later_rows() -> None:
    rows = [row(slopes=(1.0,)), row((-1.0,), (2.0,)), row((0.5,), (1.0,))]
    states = [float(x) for _, x in march(History(number(1.0)), rows, lambda _, x: x, no_equation)]
    assert states == [2.0, 5.0, 5.0 + 1.5 + 5.0]


def test_a_gradient_to_the_weights_forbids_the_short_form() -> None:
    weight = number(-1.0).requires_grad_()
    rows = [row(slopes=(number(0.5),)), row((weight,), (number(1.0),))]
    *_, (_, last) = march(History(number(1.0)), rows, lambda _, x: 2 * x, no_equation)
    last.backward()
    # x_2 = x_1 + weight (x_1 - x_0) + 2 x_1, with x_1 = 2
    assert (float(last.detach()), float(weight.grad)) == (5.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.bfloat16])
def test_states_keep_their_dtype_and_shape(dtype: torch.dtype) -> None:
    x0 = torch.ones(2, 3, dtype=dtype)
    rows = [row(slopes=(0.5,)), row((-1.0,), (2.0,)), row((number(-0.5),), (number(1.5), number(0.25)))]
    for _, x in march(History(x0), rows, lambda _, x: -x, no_equation):
        assert (x.dtype, x.shape) == (dtype, (2, 3))
    assert torch.equal(x0, torch.ones(2, 3, dtype=dtype))
