"""Gradients of solves with jump_t, against closed forms, differences and torchdiffeq."""

import itertools
from functools import cache

import numpy as np
import pytest
import torch
import torchdiffeq
from jumping import SOME, TIGHT, WAYS, f64
from methods import ORDER, in_turn, slow_but
from torch import Tensor

import torchdiffeq_lmm


@pytest.mark.parametrize(("name", "direction"), in_turn([1, -1], few=1))
def test_gradient_with_respect_to_the_jump(name: str, direction: int) -> None:
    """y' = a y until J and b y from there: dy(T)/dJ = (a - b) y(T)."""
    jump = f64(0.5 * direction, requires_grad=True)
    a, b = -0.7, 0.4
    y = torchdiffeq.odeint(
        lambda t, y: direction * torch.where(direction * t < 0.5, a, b) * y,
        f64(1.0),
        direction * f64(0.0, 1.0),
        method=name,
        options={"step_size": 0.02, "jump_t": jump},
        **TIGHT,
    )
    (gradient,) = torch.autograd.grad(y[-1].sum(), jump)
    truth = direction * (a - b) * np.exp(0.5 * (a + b))
    # With respect to the length of a step that is cut short leapfrog's gradient is of first order.
    tolerance = 0.05 if name == "leapfrog" else {1: 0.02, 2: 5e-3}.get(ORDER[name], 1e-4)
    assert float(gradient) == pytest.approx(truth, rel=tolerance)


@pytest.mark.parametrize(
    ("name", "way"),
    slow_but(
        [("ab3", WAYS[1]), ("ab3", WAYS[2])],
        [
            *itertools.product(["leapfrog", "ab3"], WAYS[:3]),
            # Two ways each, which take turns.
            *(("ab4", WAYS[0]), ("ab4", WAYS[2]), ("abm3", WAYS[1]), ("abm3", WAYS[2])),
            *(("am3", WAYS[0]), ("am3", WAYS[1]), ("bdf2", WAYS[1]), ("bdf2", WAYS[2])),
        ],
    ),
    ids=str,
)
def test_gradients_are_those_of_the_discrete_solution(name: str, way: dict) -> None:
    """By finite differences of y0 and the times; the jumps stay. Filters leave these as they are."""

    def func(t: Tensor, y: Tensor) -> Tensor:
        slope = torch.stack([y[1] * torch.cos(t), -torch.sin(y[0])])
        return slope if t < 0.3 else slope * y[0] + 1 if t < 0.6 else -slope * t

    def last(inputs: Tensor) -> Tensor:
        y0, t = inputs.split((2, 3))
        given = {"adjoint_params": ()} if "backward" in way else {}
        options = {"step_size": 0.13, "jump_t": [0.3, 0.6]}
        return torchdiffeq_lmm.odeint(func, y0, t, method=name, options=options, **given, **way, **TIGHT)

    inputs = f64(1.0, 0.5, 0.0, 0.42, 0.9, requires_grad=True)
    # In a random direction for all but one method, of which all entries are checked.
    torch.autograd.gradcheck(last, inputs, eps=1e-6, atol=1e-5, fast_mode=name != "abm3")


@pytest.mark.parametrize("name", slow_but(["abm3"], SOME))
def test_gradients_with_respect_to_jumps_that_f_knows(name: str) -> None:
    """f takes its side from the jump itself, so that finite differences of the whole are possible."""

    def last(jumps: Tensor) -> Tensor:
        def func(t: Tensor, y: Tensor) -> Tensor:
            slope = torch.stack([y[1] * torch.cos(t), -torch.sin(y[0])])
            return slope if t < jumps[0] else slope * y[0] + 1 if t < jumps[1] else -slope * t

        options = {"step_size": 0.13, "jump_t": jumps}
        return torchdiffeq.odeint(func, f64(1.0, 0.5), f64(0.0, 0.42, 0.9), method=name, options=options, **TIGHT)

    torch.autograd.gradcheck(last, (f64(0.33, 0.67, requires_grad=True),), eps=1e-6, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "is_given"), [("ab4", False), ("ab4", True), ("abm4", False), ("am4", True), ("bdf4", False)]
)
def test_gradients_are_torchdiffeqs(name: str, is_given: bool) -> None:
    """With respect to y0, a parameter, outputs (one of them at a jump) and jumps, beside dopri5's."""
    torch.testing.assert_close(gradients_by(name, is_given), gradients_by("dopri5", False), rtol=1e-4, atol=2e-3)


@cache
def gradients_by(method: str, is_given: bool) -> tuple[Tensor, ...]:
    y0, k = f64(1.0, 0.5, requires_grad=True), f64(0.8, requires_grad=True)
    jump = f64(0.5, requires_grad=True)
    marks = f64(0.0, 0.25, 0.5, 0.875, 1.25, requires_grad=True)
    rows = (marks.detach() * 96).round().long()
    # Of all nodes the marks alone are differentiated.
    t = torch.linspace(0, 1.25, 121, dtype=torch.float64).index_copy(0, rows, marks) if is_given else marks

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t < jump, -k * y + torch.sin(t), 2 * torch.cos(3 * t) - 0.5 * y * k)

    options = {"jump_t": jump} | ({} if method == "dopri5" or is_given else {"step_size": 1 / 96})
    y = torchdiffeq.odeint(func, y0, t, method=method, options=options, **TIGHT)
    loss = ((y[rows] if is_given else y) * torch.arange(1, 6)[:, None]).square().sum()
    return torch.autograd.grad(loss, (y0, k, marks, jump))


@pytest.mark.parametrize("name", ["ab2", "ab3", "abm3"])
def test_second_derivatives(name: str) -> None:
    """y' = a y, then b y: the second derivative with respect to the jump is (a - b)² y(T)."""
    jump = f64(0.5, requires_grad=True)
    y = torchdiffeq.odeint(
        lambda t, y: torch.where(t < 0.5, -0.7, 0.4) * y,
        f64(1.0),
        f64(0.0, 1.0),
        method=name,
        options={"step_size": 0.0101, "jump_t": jump},
    )
    (first,) = torch.autograd.grad(y[-1].sum(), jump, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), jump)
    assert float(second) == pytest.approx(1.21 * np.exp(-0.15), rel=0.02)
