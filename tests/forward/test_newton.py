"""Newton's options: what each of them does to implicit equations, against SciPy and closed forms."""

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

from torchdiffeq_lmm.forward.implicit import ImplicitSolver
from torchdiffeq_lmm.forward.implicit_equation import Equation
from torchdiffeq_lmm.forward.linear import LinearSolver
from torchdiffeq_lmm.forward.newton_options import Newton

EPS = torch.finfo(torch.float64).eps

MATRIX_FREE = {"matrix_limit": 0, "fallback_limit": 0}


class Counted:
    """f, and how often it was called for iterates and, with a graph, for Jacobians."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        self._f = f
        self.iterates = self.graphs = 0

    def slope(self, x: Tensor) -> Tensor:
        self.graphs += x.requires_grad
        return self._f(x)

    def iterate(self, x: Tensor) -> Tensor:
        self.iterates += 1
        return self._f(x)


def solved(f: Counted, x: Tensor, newton: Newton, tolerance: float = 1e-6) -> Tensor:
    """y = x + f(y), to so much absolutely."""
    solver = ImplicitSolver(0.0, tolerance, EPS, lambda entry: f"y[{entry}]", newton=newton)
    equation = Equation(x, torch.zeros_like(x), 1.0, f.slope, f.iterate)
    d, _ = solver.solve(equation, None, lambda: "of method 'm' at t = 3")
    return x + d


def bent() -> Counted:
    """Stiff, and far from linear."""
    return Counted(lambda y: -10 * torch.atan(y))


def decays(rates: Tensor) -> Counted:
    return Counted(lambda y: -rates * y)


X = torch.tensor([5.0, -3.0, 0.4], dtype=torch.float64)
BENT = [brentq(lambda y, x=x: y - x + 10 * np.arctan(y), -10, 10, xtol=1e-15) for x in X.tolist()]


# ------------------------------------------------------------------------------------------------------ what they do


@pytest.mark.parametrize(("f", "exact"), [(bent, BENT), (lambda: decays(X**0 * 0.03), (X / 1.03).tolist())])
def test_a_looser_tolerance_costs_less_and_leaves_more(f: Callable[[], Counted], exact: list[float]) -> None:
    errors, iterates = [], []
    for tolerance in (1e-6, 1e-3, 1.0):
        counted = f()
        y = solved(counted, X, Newton(tolerance=tolerance), tolerance=1e-2)
        errors.append(float((y - torch.tensor(exact, dtype=torch.float64)).abs().max()))
        iterates.append(counted.iterates)
        assert errors[-1] <= 1e-2 * tolerance
    assert errors[0] < errors[2]
    assert iterates[0] > iterates[2]


def test_the_iterations_are_as_many_as_are_allowed() -> None:
    assert solved(bent(), X, Newton()).tolist() == pytest.approx(BENT, abs=1e-9)
    f = bent()
    with pytest.raises(RuntimeError, match="ended after 1 iterations, its max_iterations"):
        solved(f, X, Newton(max_iterations=1))
    few = f.iterates
    with pytest.raises(RuntimeError, match="ended after 2 iterations, its max_iterations"):
        solved(f, X, Newton(max_iterations=2))
    # One more of substitution, and one more of each of Newton's attempts.
    assert few < f.iterates - few


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_up_to_the_matrix_limit_there_is_a_matrix(dtype: torch.dtype) -> None:
    """A kept matrix needs one graph of func, a Krylov space one for every correction; complex entries count twice."""
    x = torch.linspace(1, 2, 10, dtype=torch.float64).to(dtype)
    rates = torch.logspace(0, 3, 10, dtype=torch.float64)
    unknowns = 20 if dtype.is_complex else 10
    for limit in (unknowns, unknowns - 1, 0):
        f = decays(rates)
        y = solved(f, x, Newton(matrix_limit=limit, fallback_limit=0))
        torch.testing.assert_close(y, x / (1 + rates), rtol=0, atol=1e-9)
        assert (f.graphs == 1) == (limit == unknowns)


@pytest.mark.parametrize("limits", [{"fallback_limit": 100}, {"matrix_limit": 100}])
def test_what_a_krylov_space_does_not_solve_a_matrix_does_up_to_a_limit(limits: dict[str, int]) -> None:
    rates = torch.logspace(-2, 8, 100, dtype=torch.float64)
    x, few = torch.ones(100, dtype=torch.float64), {"krylov_dimension": 10, "max_iterations": 9, **MATRIX_FREE}
    y = solved(decays(rates), x, Newton(**{**few, **limits}))
    torch.testing.assert_close(y, x / (1 + rates), rtol=0, atol=1e-9)
    with pytest.raises(RuntimeError, match=r"more than 99 are too many .* a larger fallback_limit"):
        solved(decays(rates), x, Newton(**{**few, "fallback_limit": 99}))


def test_the_same_limits_hold_for_the_linear_equations_of_the_gradient() -> None:
    rates = torch.logspace(-2, 8, 100, dtype=torch.float64)
    rhs, few = torch.ones(100, dtype=torch.float64), {"krylov_dimension": 10, **MATRIX_FREE}
    for limits in ({"fallback_limit": 100}, {"matrix_limit": 100}):
        z = LinearSolver(Newton(**{**few, **limits})).solve(lambda v: -rates * v, rhs, EPS)
        torch.testing.assert_close(z, 1 / (1 + rates), rtol=1e-12, atol=0)
    with pytest.raises(RuntimeError, match=r"more than 99, too many .* a larger fallback_limit"):
        LinearSolver(Newton(**{**few, "fallback_limit": 99})).solve(lambda v: -rates * v, rhs, EPS)


def test_small_linear_equations_need_no_matrix_either() -> None:
    """A matrix would take a product with every unit vector."""
    seen: list[Tensor] = []

    def product(v: Tensor) -> Tensor:
        seen.append(v)
        return 0.5 * v

    rhs = torch.linspace(1, 2, 20, dtype=torch.float64)
    z = LinearSolver(Newton(**MATRIX_FREE)).solve(product, rhs, EPS)
    torch.testing.assert_close(z, 2 * rhs, rtol=1e-14, atol=0)
    assert len(seen) < 20


@pytest.mark.parametrize(("dimension", "restarts", "suffices"), [(40, 0, True), (5, 0, False), (5, 60, True)])
def test_a_krylov_space_is_as_large_and_is_restarted_as_often_as_is_allowed(
    dimension: int, restarts: int, suffices: bool
) -> None:
    x, rates = torch.ones(40, dtype=torch.float64), torch.logspace(0, 2, 40, dtype=torch.float64)
    newton = Newton(krylov_dimension=dimension, max_restarts=restarts, **MATRIX_FREE)
    if suffices:
        torch.testing.assert_close(solved(decays(rates), x, newton), x / (1 + rates), rtol=0, atol=1e-9)
    else:
        with pytest.raises(RuntimeError, match="was not solved"):
            solved(decays(rates), x, newton)


def test_messages_tell_the_tolerance_in_force() -> None:
    with pytest.raises(RuntimeError, match=r"times the tolerance, 0\.03 \(atol"):
        solved(Counted(lambda y: 10 + y**2), X, Newton(tolerance=0.03))


# ------------------------------------------------------------------------------------------------------- what they are


def test_options_are_values() -> None:
    assert Newton(tolerance=1e-4) == Newton()
    with pytest.raises(FrozenInstanceError):
        Newton().tolerance = 1e-5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tolerance": "tight"}, TypeError, "tolerance must be a real number, got 'tight'"),
        ({"tolerance": True}, TypeError, "tolerance must be a real number, got True"),
        ({"tolerance": 0}, ValueError, "tolerance must be positive and at most 1, got 0"),
        ({"tolerance": 1.5}, ValueError, "tolerance must be positive and at most 1, got 1.5"),
        ({"tolerance": np.nan}, ValueError, "tolerance must be positive and at most 1, got nan"),
        ({"max_iterations": 0}, ValueError, "max_iterations must be at least 1, got 0"),
        ({"max_iterations": 3.0}, TypeError, "max_iterations must be an int, got 3.0"),
        ({"matrix_limit": -1}, ValueError, "matrix_limit must be at least 0, got -1"),
        ({"matrix_limit": None}, TypeError, "matrix_limit must be an int, got None"),
        ({"fallback_limit": -1}, ValueError, "fallback_limit must be at least 0, got -1"),
        ({"fallback_limit": True}, TypeError, "fallback_limit must be an int, got True"),
        ({"krylov_dimension": 0}, ValueError, "krylov_dimension must be at least 1, got 0"),
        ({"krylov_dimension": "all"}, TypeError, "krylov_dimension must be an int, got 'all'"),
        ({"max_restarts": -1}, ValueError, "max_restarts must be at least 0, got -1"),
        ({"max_restarts": 1e3}, TypeError, "max_restarts must be an int, got 1000.0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        Newton(**options)
    assert str(raised.value) == message
