"""Start values by deferred corrections, run here by a few lines that know nothing of rows."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
import torchdiffeq
from numpy.polynomial import Polynomial
from problems import orders
from textbook import fixed_point, naive_start, nodes_of, random_steps

import torchdiffeq_lmm  # noqa: F401
from torchdiffeq_lmm.start import SweptState, deferred_corrections

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
