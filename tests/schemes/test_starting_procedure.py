"""Start values by deferred corrections, run here by a few lines that know nothing of rows."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
import torchdiffeq
from methods import slow_but
from numpy.polynomial import Polynomial
from problems import orders
from scipy.integrate import solve_ivp
from textbook import fixed_point, naive_start, nodes_of, random_steps

import torchdiffeq_lmm
from torchdiffeq_lmm.schemes.methods import METHODS
from torchdiffeq_lmm.schemes.starting_procedure import SweptState, deferred_corrections

KINDS = {"explicit": (False, True), "implicit": (True, True), "implicit without f at t_0": (True, False)}
by_kind = pytest.mark.parametrize(("implicit", "first"), KINDS.values(), ids=KINDS)


def rational(t: float, x: np.ndarray) -> np.ndarray:
    """x' = -(1 + t) x², with the solution 2 / (2 + 2 t + t²)."""
    return -(1 + t) * x**2


def pendulum(t: float, x: np.ndarray) -> np.ndarray:
    return np.array([x[1] * (1 + 0.5 * np.sin(3 * t)), -np.sin(x[0]) * (1.5 + t)])


def start_values(
    t: np.ndarray, f: Callable[[float, np.ndarray], np.ndarray], x0: np.ndarray, swept: list[SweptState]
) -> np.ndarray:
    """The states of the last sweep at all nodes; each state needs only what was made before it."""
    states, slopes = {(0, 0): x0}, {(0, 0): f(t[0], x0)}
    sweeps = swept[-1].sweep
    for sweep, node, base, weights, implicit in swept:
        known = states[(0, 0) if base == 0 else (sweeps, base)]
        known = known + sum((weight * slopes[key] for key, weight in weights.items()), np.zeros_like(x0))
        x = fixed_point(lambda y, known=known, at=t[node], b=implicit: known + b * f(at, y), known)
        states[sweep, node], slopes[sweep, node] = x, f(t[node], x)
    return np.array([x0, *(states[sweeps, node] for node in range(1, len(t)))])


@by_kind
@pytest.mark.parametrize("sweeps", range(1, 6))
def test_every_sweep_raises_the_order_by_one(sweeps: int, implicit: bool, first: bool) -> None:
    """The states at a fixed number of nodes have errors of order h^{L+1}."""
    last = max(1, sweeps - first)
    shape = nodes_of(random_steps(2, last, mean=0.4, spread=0.3))
    errors = []
    for halvings in (5, 6):
        t = shape / 2**halvings
        swept = list(deferred_corrections(t.tolist(), sweeps, implicit, first))
        x = start_values(t, rational, np.ones(1), swept)
        errors.append(float(np.abs(x[-1] - 2 / (2 + 2 * t[-1] + t[-1] ** 2)).max()))
    assert orders(errors) == pytest.approx([sweeps + 1], abs=0.3), errors


@by_kind
@pytest.mark.parametrize("sweeps", [1, 2, 4])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_states_are_those_of_sweeps_written_as_loops(count: int, sweeps: int, implicit: bool, first: bool) -> None:
    t = nodes_of(random_steps(count, count))
    swept = list(deferred_corrections(t.tolist(), sweeps, implicit, first))
    x = start_values(t, pendulum, np.array([1.0, 0.5]), swept)
    np.testing.assert_allclose(x, naive_start(t, pendulum, np.array([1.0, 0.5]), sweeps, implicit, first), rtol=1e-12)


@by_kind
def test_two_sweeps_integrate_polynomials_exactly(implicit: bool, first: bool) -> None:
    t = nodes_of(random_steps(4, 4))
    swept = list(deferred_corrections(t.tolist(), 2, implicit, first))
    x = Polynomial([1.0, -2.0, 3.0, 0.5, -1.5, 2.0][: 5 + first])
    found = start_values(t, lambda time, _: np.array([x.deriv()(time)]), np.ones(1), swept)
    np.testing.assert_allclose(found[:, 0], x(t), rtol=1e-13)


@by_kind
def test_a_single_sweep_is_eulers_method(implicit: bool, first: bool) -> None:
    times = [Fraction(0), Fraction(1, 3), Fraction(1, 2), Fraction(3, 2)]
    steps = [Fraction(1, 3), Fraction(1, 6), Fraction(1)]
    for n, state in enumerate(deferred_corrections(times, 1, implicit, first)):
        own = {} if implicit else {(1 if n else 0, n): steps[n]}
        assert state == SweptState(1, n + 1, n, own, steps[n] if implicit else 0)


@by_kind
def test_states_come_sweep_by_sweep_and_need_no_later_one(implicit: bool, first: bool) -> None:
    swept = list(deferred_corrections([0.0, 0.3, 0.4, 0.9], 3, implicit, first))
    assert [(state.sweep, state.node) for state in swept] == [(s, n) for s in (1, 2, 3) for n in (1, 2, 3)]
    assert [state.base for state in swept] == [0] * 6 + [0, 1, 2]
    made = {(0, 0)}
    for state in swept:
        assert state.slopes.keys() <= made
        made.add((state.sweep, state.node))
    assert any((0, 0) in state.slopes for state in swept) == first


def test_weights_sum_to_the_length_of_the_way() -> None:
    times = [Fraction(0), Fraction(1, 7), Fraction(1, 2), Fraction(1), Fraction(9, 8)]
    for implicit, first in KINDS.values():
        for state in deferred_corrections(times, 4, implicit, first):
            assert sum(state.slopes.values()) + state.implicit == times[state.node] - times[state.base]


@pytest.mark.parametrize("method", ["ab5", "abm4", "nystrom3", "leapfrog", "am5", "milne_simpson", "bdf6"])
def test_a_solve_evaluates_at_its_nodes_only(method: str) -> None:
    t = torch.tensor(nodes_of(random_steps(6, 9)))
    evaluated: set[float] = set()

    def func(time: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        evaluated.add(float(time))
        return -y

    torchdiffeq.odeint(func, torch.ones(2, dtype=torch.float64), t, method=method)
    assert evaluated | {float(t[-1])} == set(t.tolist())


# ------------------------------------------------------------------------------------------------------- short solves

EXPLICIT = [method for method in METHODS if not method.is_implicit and method.name != "ab1"]


class Field(torch.nn.Module):
    """The pendulum with a parameter that all steps share."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.evaluations = 0

    def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        self.evaluations += 1
        return torch.stack([x[1] * (1 + self.theta * torch.sin(3 * t)), -torch.sin(x[0]) * (1.5 + t)])


def solution(end: float) -> np.ndarray:
    return solve_ivp(pendulum, (0, end), [1.0, 0.5], method="DOP853", rtol=1e-13, atol=1e-14).y[:, -1]


X0 = torch.tensor([1.0, 0.5], dtype=torch.float64)


@pytest.mark.parametrize("method", EXPLICIT, ids=lambda method: method.name)
def test_two_evaluations_make_a_single_step_of_second_order(
    method: torchdiffeq_lmm.schemes.methods.MultistepMethod,
) -> None:
    errors = []
    for h in (0.1, 0.05, 0.025):
        field = Field()
        t = torch.tensor([0.0, h], dtype=torch.float64)
        end = torchdiffeq.odeint(field, X0, t, method=method.name)[-1]
        assert field.evaluations == 2
        errors.append(float(np.abs(end.detach().numpy() - solution(h)).max()))
    # The error of a step is of one order more.
    assert orders(errors) == pytest.approx([3, 3], abs=0.2)


@pytest.mark.parametrize(
    ("name", "steps"), [("ab3", 2), ("ab4", 3), ("ab5", 2), ("ab5", 4), ("abm4", 3), ("nystrom3", 2)]
)
def test_a_solve_within_the_start_is_as_accurate_as_its_nodes_allow(name: str, steps: int) -> None:
    """N steps have N + 1 slopes, and their polynomial is integrated with an error of order h^{N+2}."""
    errors = []
    for h in (0.08, 0.04, 0.02):
        t = h * torch.arange(steps + 1, dtype=torch.float64)
        end = torchdiffeq.odeint(Field(), X0, t, method=name)[-1]
        errors.append(float(np.abs(end.detach().numpy() - solution(steps * h)).max()))
    assert orders(errors)[-1] > steps + 2 - 0.4, errors


@pytest.mark.parametrize(
    ("name", "steps"),
    slow_but([("leapfrog", 1), ("abm2", 2)], [("leapfrog", 1), ("ab2", 1), ("abm2", 1), ("abm2", 2)]),
)
def test_gradients_between_dense_observations_are_of_second_order(name: str, steps: int) -> None:
    """Under odeint_adjoint every interval between two observations is a backward solve of its own."""
    errors = []
    for count in (4, 8, 16):
        t = torch.linspace(0, 1, count + 1, dtype=torch.float64)
        gradients = []
        for options in ({"method": name, "options": {"step_size": 1 / (count * steps)}}, {"method": "rk4"}):
            field = Field()
            x = torchdiffeq.odeint_adjoint(
                field, X0, t, method="rk4", adjoint_method=options["method"], adjoint_options=options.get("options", {})
            )
            x.square().sum(1).mean().backward()
            gradients.append(float(field.theta.grad))
        errors.append(abs(gradients[0] - gradients[1]))
    assert np.mean(orders(errors)) > 1.7, errors


@pytest.mark.parametrize(("name", "steps"), [("leapfrog", 1), ("abm2", 1), ("ab3", 2)])
def test_the_filter_owns_the_last_node_of_a_short_solve(name: str, steps: int) -> None:
    """Where the start makes all steps f is evaluated at the last node too: totals stay of second order."""
    exact = []
    for method, filtered, counts in (("rk4", None, (30,)), (name, "trapezoid", (4, 8, 16))):
        for count in counts:
            field, x = Field(), X0
            for n in range(count):
                t = torch.linspace(n / count, (n + 1) / count, steps + 1, dtype=torch.float64)
                kwargs = {} if filtered is None else {"grad_filter": torchdiffeq_lmm.CostateFilter(filtered)}
                x = torchdiffeq_lmm.odeint(field, x, t, method=method, **kwargs)[-1]
            x.square().sum().backward()
            exact.append(float(field.theta.grad))
    errors = [abs(found - exact[0]) for found in exact[1:]]
    assert np.mean(orders(errors)) > 1.5, errors


@pytest.mark.parametrize("grad_filter", [None, "auto", "smooth"])
def test_a_single_step_of_leapfrog_has_one_gradient_in_all_modes(grad_filter: str | None) -> None:
    found, drifts = [], []
    for backward in ("autograd", "checkpoint", torchdiffeq_lmm.Reversible(report=drifts.append)):
        field, x0 = Field(), X0.clone().requires_grad_()
        t = torch.tensor([0.0, 0.3], dtype=torch.float64)
        x = torchdiffeq_lmm.odeint(field, x0, t, method="leapfrog", grad_filter=grad_filter, backward=backward)
        x[-1].square().sum().backward()
        found.append(torch.cat([x0.grad, field.theta.grad[None]]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found[2], found[0], rtol=1e-13, atol=1e-13)
    assert drifts == [0.0]


@pytest.mark.parametrize("name", ["leapfrog", "ab2"])
def test_func_may_return_the_same_memory_in_a_single_step(name: str) -> None:
    field, buffer = Field(), torch.empty(2, dtype=torch.float64)
    t = torch.tensor([0.0, 0.3], dtype=torch.float64)
    with torch.no_grad():
        found = torchdiffeq.odeint(lambda t, x: buffer.copy_(field(t, x)), X0, t, method=name)
        assert torch.equal(found, torchdiffeq.odeint(field, X0, t, method=name))


@pytest.mark.parametrize("method", ["leapfrog", "nystrom3", "ab1", "ab2", "ab3", "ab4", "ab5"])
def test_beyond_the_start_the_last_node_is_not_evaluated(method: str) -> None:
    """N steps need N rows of parameters, as soon as there are more steps than the start makes."""
    shortest = {"leapfrog": 2, "nystrom3": 3, "ab1": 1, "ab2": 2, "ab3": 3, "ab4": 4, "ab5": 5}[method]
    for steps in (shortest, shortest + 3):
        evaluated: set[float] = set()

        def func(time: torch.Tensor, y: torch.Tensor, evaluated: set[float] = evaluated) -> torch.Tensor:
            evaluated.add(float(time))
            return -y

        t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        torchdiffeq.odeint(func, torch.ones(1, dtype=torch.float64), t, method=method)
        assert evaluated == set(t[:-1].tolist())


@pytest.mark.parametrize(
    ("name", "before"), [("abm2", 5.3e-5), ("abm3", 7.7e-7), ("abm4", 8.8e-9), ("abm5", 8.9e-11), ("nystrom3", 2.6e-6)]
)
def test_the_start_adds_little_to_the_error(name: str, before: float) -> None:
    """y' = -y up to t = 1 in 64 steps; a start with one sweep less, which the order would allow, had these errors."""
    t = torch.linspace(0, 1, 65, dtype=torch.float64)
    y = torchdiffeq.odeint(lambda t, y: -y, torch.ones(1, dtype=torch.float64), t, method=name)
    assert abs(float(y[-1]) - np.exp(-1)) < before / 5
