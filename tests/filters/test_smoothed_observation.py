"""Observations that do not make leapfrog's gradient oscillate."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchdiffeq
from methods import slow_but
from problems import GRIDS, PENDULUM, PROBLEMS, Problem, Reference, orders
from torch import Tensor

import torchdiffeq_lmm
from torchdiffeq_lmm import SmoothFilter

STEPS = (20, 40, 80, 160)
OBSERVED = {"end": (1.0,), "quarters": (0.25, 0.5, 0.75, 1.0), "off the grid": (0.237, 0.611, 1.0)}


def lookup(theta: Tensor, problem: Problem, steps: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, x: problem.torch_f(x, theta[round(float(t) / problem.horizon * steps)])


def solve(
    problem: Problem, steps: int, observed: tuple[float, ...], **keywords: object
) -> tuple[Tensor, Tensor, Tensor]:
    nodes = GRIDS["uniform"](steps, problem.horizon)
    theta = torch.tensor(problem.theta(nodes.numpy()).T).requires_grad_()
    x0 = torch.tensor(problem.x0, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.0, *observed], dtype=torch.float64) * problem.horizon
    options = {"step_size": problem.horizon / steps, "interp": "cubic"}
    func = lookup(theta, problem, steps)
    states = torchdiffeq_lmm.odeint(
        func, x0, t, method="leapfrog", options=options, **{"grad_filter": "smooth", **keywords}
    )
    return states, theta, x0


def error_of(states: Tensor, problem: Problem) -> Tensor:
    return 0.5 * (states[1:] - torch.tensor(problem.target, dtype=torch.float64)).square().sum()


@pytest.mark.parametrize("observed", slow_but(["off the grid"], OBSERVED))
@pytest.mark.parametrize("problem", slow_but([PENDULUM], PROBLEMS), ids=lambda problem: problem.name)
def test_gradients_are_second_order_at_every_node(problem: Problem, observed: str) -> None:
    reference = Reference(problem, [c * problem.horizon for c in OBSERVED[observed]])
    fine = GRIDS["uniform"](2560, problem.horizon)
    exact = torch.trapezoid(reference.density(fine, last=True), fine, dim=0)
    densities, totals, starts = [], [], []
    for steps in STEPS:
        states, theta, x0 = solve(problem, steps, OBSERVED[observed])
        error_of(states, problem).backward()
        nodes = GRIDS["uniform"](steps, problem.horizon)
        weights = torch.full((steps + 1, 1), problem.horizon / steps, dtype=torch.float64)
        weights[0] /= 2
        weights[-1] /= 2
        wrong = theta.grad / weights - reference.density(nodes, last=True)
        if observed == "off the grid":
            # An observation between two nodes is spread over both.
            times = torch.tensor(OBSERVED[observed], dtype=torch.float64)[:-1, None] * problem.horizon
            wrong = wrong[((nodes - times).abs() > 1.01 * weights[1]).all(0)]
        densities.append(float(wrong.abs().max()))
        totals.append(float((theta.grad.sum(0) - exact).abs().max()))
        starts.append(float(np.abs(x0.grad.numpy() - reference.x0_gradient).max()))
    assert orders(densities)[-1] > 1.9
    assert min(orders(densities)) > 1.6
    assert densities[-1] < 5e-3
    assert np.mean(orders(totals)) > 1.8
    assert np.mean(orders(starts)) > 1.8


def test_without_it_the_gradient_oscillates() -> None:
    states, theta, _ = solve(PENDULUM, 160, (1.0,), grad_filter=None)
    error_of(states, PENDULUM).backward()
    nodes = GRIDS["uniform"](160, PENDULUM.horizon)
    density = theta.grad[:-1] * 160 / PENDULUM.horizon
    assert float((density - Reference(PENDULUM, [PENDULUM.horizon]).density(nodes)).abs().max()) > 1


@pytest.mark.parametrize("observed", OBSERVED)
def test_the_solution_is_the_same_to_the_bit(observed: str) -> None:
    smooth, _, _ = solve(PENDULUM, 20, OBSERVED[observed])
    plain, _, _ = solve(PENDULUM, 20, OBSERVED[observed], grad_filter=None)
    assert torch.equal(smooth, plain)


@pytest.mark.parametrize("backward", ["checkpoint", "reversible"])
@pytest.mark.parametrize("observed", OBSERVED)
def test_goes_with_every_backward(observed: str, backward: str) -> None:
    found = []
    for keywords in ({}, {"backward": backward}):
        nodes = torch.linspace(0, PENDULUM.horizon, 21, dtype=torch.float64)
        theta = torch.tensor(PENDULUM.theta(nodes.numpy()).T).requires_grad_()
        x0 = torch.tensor(PENDULUM.x0, dtype=torch.float64, requires_grad=True)
        if keywords:
            keywords["adjoint_params"] = [theta]
        states = torchdiffeq_lmm.odeint(
            lookup(theta, PENDULUM, 20),
            x0,
            torch.tensor([0.0, *OBSERVED[observed]], dtype=torch.float64) * PENDULUM.horizon,
            method="leapfrog",
            options={"step_size": PENDULUM.horizon / 20},
            grad_filter=SmoothFilter(),
            **keywords,
        )
        error_of(states, PENDULUM).backward()
        found.append((theta.grad, x0.grad))
    torch.testing.assert_close(found[0], found[1])


def test_first_and_second_derivatives_are_those_of_the_smoothed_values() -> None:
    rate = torch.tensor([0.7, -0.3], dtype=torch.float64)
    h, steps = 0.1, 6

    def by_hand(y0: Tensor, rate: Tensor) -> Tensor:
        states = [y0, y0 + h * torch.sin(rate * y0)]
        for _ in range(steps - 1):
            states.append(states[-2] + 2 * h * torch.sin(rate * states[-1]))
        smoothed = [0.5 * (states[j] + states[j - 1] + h * torch.sin(rate * states[j])) for j in (3, 6)]
        return sum(s.square().sum() - 2 * s @ (s - states[j]).detach() for s, j in zip(smoothed, (3, 6), strict=True))

    def by_us(y0: Tensor, rate: Tensor) -> Tensor:
        t = torch.tensor([0.0, 0.3, 0.6], dtype=torch.float64)
        options = {"step_size": h, "grad_filter": "smooth"}
        states = torchdiffeq.odeint(lambda t, y: torch.sin(rate * y), y0, t, method="leapfrog", options=options)
        return states[1:].square().sum()

    y0 = torch.tensor([0.5, -1.2], dtype=torch.float64, requires_grad=True)
    rate.requires_grad_()
    derivatives = []
    for function in (by_hand, by_us):
        first = torch.autograd.grad(function(y0, rate), (y0, rate), create_graph=True)
        derivatives.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), (y0, rate))])
    for ours, expected in zip(derivatives[1], derivatives[0], strict=True):
        torch.testing.assert_close(ours, expected)


def test_costs_one_evaluation_more() -> None:
    counts = []
    for grad_filter in (None, "smooth"):
        calls = []

        def func(t: Tensor, y: Tensor) -> Tensor:
            calls.append(float(t))
            return -y

        t = torch.tensor([0.0, 0.5, 1.0])
        options = {"step_size": 0.1, "grad_filter": grad_filter}
        torchdiffeq.odeint(func, torch.ones(2), t, method="leapfrog", options=options)
        counts.append(len(calls))
    assert counts == [10, 11]
    assert calls[-1] == 1.0


@pytest.mark.parametrize(
    "options", [{"step_size": 0.3}, {"grid_constructor": lambda f, y, t: torch.tensor([0, 0.4, 1])}]
)
def test_unequal_steps_are_refused_before_any_work(options: dict[str, object]) -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        raise AssertionError

    with pytest.raises(ValueError, match=r"equal steps, got steps from 0\.\d+ to 0\.\d+; use grad_filter='leapfrog'"):
        torchdiffeq_lmm.odeint(
            func, torch.ones(2), torch.tensor([0.0, 1.0]), method="leapfrog", options=options, grad_filter="smooth"
        )


@pytest.mark.parametrize("method", ["ab2", "midpoint", "dopri5", None])
def test_other_methods_are_refused(method: str | None) -> None:
    with pytest.raises(ValueError, match="is for method 'leapfrog'"):
        torchdiffeq_lmm.odeint(
            lambda t, y: -y, torch.ones(2), torch.tensor([0.0, 1.0]), method=method, grad_filter="smooth"
        )


@pytest.mark.parametrize("interp", ["linear", "cubic"])
@pytest.mark.parametrize("threshold", [0.97, 0.55])
def test_events_see_smoothed_states(interp: str, threshold: float) -> None:
    errors = []
    for h in (0.05, 0.025, 0.0125):
        rate = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
        time, states = torchdiffeq_lmm.odeint(
            lambda t, y: -rate * torch.stack([y[0], y[0] * 0 - 1]),
            torch.tensor([1.0, 0.0], dtype=torch.float64),
            torch.tensor([0.0, 1.0], dtype=torch.float64),
            method="leapfrog",
            options={"step_size": h, "interp": interp},
            event_fn=lambda t, y: y[0] - threshold,
            grad_filter="smooth",
        )
        (grad,) = torch.autograd.grad(states[1][0], rate)
        # With the time of the event held fixed, y = exp(-rate t).
        errors.append(abs(float(grad + time * torch.exp(-rate.detach() * time))))
    assert errors[-1] < 2e-4
    assert errors[-1] < 0.5 * errors[0]


def test_tuples_and_decreasing_times() -> None:
    rate = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    y0 = (torch.ones(2, 3, dtype=torch.float64), torch.zeros(4, dtype=torch.float64))
    t = torch.tensor([2.0, 1.5, 1.0], dtype=torch.float64)
    errors = []
    for steps in (20, 40, 80):
        states, _ = torchdiffeq_lmm.odeint(
            lambda t, y: (-rate * y[0], y[1] + t),
            y0,
            t,
            method="leapfrog",
            options={"step_size": 1 / steps},
            grad_filter="smooth",
        )
        (grad,) = torch.autograd.grad(states[-1].sum(), rate)
        errors.append(abs(float(grad - 6 * torch.exp(rate.detach()))))
    assert min(orders(errors)) > 1.9
