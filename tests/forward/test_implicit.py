"""The equation of an implicit step, by every way there is to its solution, against SciPy's."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchdiffeq
from methods import slow_but
from scipy.optimize import brentq, fsolve
from torch import Tensor

from torchdiffeq_lmm.forward import implicit
from torchdiffeq_lmm.forward.implicit_equation import Equation, Equations, Tolerances, is_rounding
from torchdiffeq_lmm.forward.newton_options import Newton

Slope = Callable[[Tensor], Tensor]

EPS = torch.finfo(torch.float64).eps

LIMIT = 32
"""So that systems of moderate size are already solved in Krylov spaces."""

NEWTON = Newton(matrix_limit=LIMIT)


class ImplicitSolver(implicit.ImplicitSolver):
    def __init__(
        self, rtol: float, atol: float | Tensor, precision: float, entry: Callable[[int], str], *flags: bool
    ) -> None:
        super().__init__(rtol, atol, precision, entry, *flags, newton=NEWTON)


def name(entry: int) -> str:
    return f"y[{entry}]"


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Counted:
    """f, and how often it was called for iterates and, with a graph, for Jacobians."""

    def __init__(self, f: Slope) -> None:
        self._f = f
        self.slopes = self.iterates = 0

    def slope(self, x: Tensor) -> Tensor:
        self.slopes += x.requires_grad
        return self._f(x)

    def iterate(self, x: Tensor) -> Tensor:
        self.iterates += 1
        return self._f(x)


def solved(
    solver: ImplicitSolver,
    f: Counted | Slope,
    x: Tensor,
    weight: float,
    known: Tensor | None = None,
    guess: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    counted = f if isinstance(f, Counted) else Counted(f)
    c = torch.zeros_like(x) if known is None else known
    equation = Equation(x, c, weight, counted.slope, counted.iterate)
    return solver.solve(equation, guess, lambda: "of method 'm' at t = 3")


def tight() -> ImplicitSolver:
    return ImplicitSolver(1e-9, 1e-9, EPS, name)


def reaction(stiffness: float, size: int) -> Slope:
    """Neighbours in a ring diffuse and react."""

    def f(x: Tensor) -> Tensor:
        return stiffness * (torch.roll(x, 1) - 2 * x + torch.roll(x, -1)) - x**3 + torch.cos(x)

    assert size > 2
    return f


def reference(f: Slope, x: Tensor, weight: float, known: Tensor) -> Tensor:
    def residual(d: np.ndarray) -> np.ndarray:
        d_ = torch.tensor(d)
        return (d_ - known - weight * f(x + d_)).numpy()

    found, _, status, _ = fsolve(residual, known.numpy(), xtol=1e-13, full_output=True)
    assert status == 1 or np.abs(residual(found)).max() < 1e-10
    return torch.tensor(found)


# ------------------------------------------------------------------------------------------------ ways to the solution


@pytest.mark.parametrize("size", [4, LIMIT, LIMIT + 1, 70])
@pytest.mark.parametrize("stiffness", [0.1, 5.0, 200.0])
@pytest.mark.one_in(5)
def test_the_solution_is_scipys(stiffness: float, size: int) -> None:
    f, x, known = reaction(stiffness, size), randn(size), 0.1 * randn(size, seed=1)
    d, slope = solved(tight(), f, x, 0.3, known)
    torch.testing.assert_close(d, reference(f, x, 0.3, known), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(d, known + 0.3 * slope, rtol=1e-13, atol=1e-13)


def test_substitution_newton_and_krylov_agree() -> None:
    """The same equation four times over: alone by substitution, then with stiff company that forces Newton's method."""
    x, known = randn(4), 0.1 * randn(4, seed=1)

    def mild(x: Tensor) -> Tensor:
        return -0.3 * x - x**3 / 20 + torch.sin(x)

    expected = reference(mild, x, 0.003, known)
    by_substitution = Counted(mild)
    torch.testing.assert_close(solved(tight(), by_substitution, x, 0.003, known)[0], expected, rtol=1e-9, atol=1e-10)
    assert by_substitution.slopes == 0
    for company in (4, LIMIT):

        def f(x: Tensor) -> Tensor:
            return torch.cat([mild(x[:4]), -1e4 * x[4:]])

        wide, beside = torch.cat([x, torch.ones(company)]), torch.cat([known, torch.zeros(company)])
        by_newton = Counted(f)
        d, _ = solved(tight(), by_newton, wide, 0.003, beside)
        torch.testing.assert_close(d[:4], expected, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(d[4:], torch.full((company,), 1 / 31 - 1, dtype=torch.float64), rtol=1e-9, atol=0)
        # One evaluation makes a dense Jacobian, one each product in a Krylov space.
        assert (by_newton.slopes == 1) == (company == 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex64, torch.complex128])
@pytest.mark.parametrize("rate", [-0.3, -50.0])
@pytest.mark.parametrize("shape", [(), (2, 3), (5, 9)])
def test_linear_equations_of_any_shape_and_dtype(shape: tuple[int, ...], rate: float, dtype: torch.dtype) -> None:
    x = randn(*shape, dtype=dtype)
    factor = rate * (1 + 2j) if dtype.is_complex else rate
    d, slope = solved(ImplicitSolver(1e-5, 1e-6, EPS, name), lambda x: factor * x, x, 0.5)
    assert d.dtype is slope.dtype is dtype
    torch.testing.assert_close(d, x * (0.5 * factor / (1 - 0.5 * factor)), rtol=1e-5, atol=1e-6)


def test_newtons_method_is_damped_where_it_would_overshoot() -> None:
    """Newton's method alone diverges from where an arcus tangens is flat."""
    x = torch.tensor([5.0, -3.0], dtype=torch.float64)
    d, _ = solved(tight(), lambda x: -200 * torch.atan(x), x, 0.05)
    for start, found in zip(x.tolist(), (x + d).tolist(), strict=True):
        assert found == pytest.approx(brentq(lambda y: y - start + 10 * np.arctan(y), -10, 10), abs=1e-9)


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_empty_states(shape: tuple[int, ...]) -> None:
    d, slope = solved(tight(), lambda x: -x, torch.zeros(*shape), 0.5)
    assert d.shape == slope.shape == shape


def test_complex_states_need_no_analytic_func() -> None:
    """f(z) = -40 Re z + 3i Im z is linear over the real numbers only."""
    x = randn(3, dtype=torch.complex128)
    d, _ = solved(tight(), lambda z: torch.complex(-40 * z.real, 3 * z.imag), x, 0.1)
    torch.testing.assert_close(x + d, torch.complex(x.real / 5, x.imag / 0.7), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("size", [4, 50])
def test_func_without_a_graph(size: int) -> None:
    f, x = reaction(50.0, size), randn(size)

    def hidden(x: Tensor) -> Tensor:
        return torch.tensor(f(x).detach().numpy())

    d, _ = solved(tight(), hidden, x, 0.3)
    torch.testing.assert_close(d, reference(f, x, 0.3, torch.zeros(size).double()), rtol=1e-8, atol=1e-9)


def test_func_that_ignores_its_state() -> None:
    parameter = torch.tensor([2.0, -1.0], requires_grad=True)
    solver = tight()
    solved(solver, lambda x: -1e5 * x, torch.ones(2), 1.0)
    d, slope = solved(solver, lambda x: 3 * parameter, torch.ones(2), 0.5)
    assert d.tolist() == pytest.approx([3.0, -1.5])
    assert slope.tolist() == pytest.approx([6.0, -3.0])
    assert not d.requires_grad


def test_nothing_to_solve() -> None:
    d, slope = solved(ImplicitSolver(0.0, 0.0, EPS, name), lambda x: 0 * x, torch.zeros(3), 0.5)
    assert d.tolist() == slope.tolist() == [0.0] * 3


@pytest.mark.parametrize("rtol", [1e-3, 1e-6, 1e-9])
def test_the_tolerance_is_relative_to_the_state(rtol: float) -> None:
    x = torch.tensor([1e-3, 1.0, 1e4], dtype=torch.float64)
    f = Counted(lambda x: -0.02 * x)
    d, _ = solved(ImplicitSolver(rtol, 0.0, EPS, name), f, x, 0.3)
    error = ((d + x * 0.006 / 1.006) / x).abs()
    assert float(error.max()) <= 1e-4 * rtol
    looser = Counted(lambda x: -0.02 * x)
    solved(ImplicitSolver(100 * rtol, 0.0, EPS, name), looser, x, 0.3)
    assert looser.iterates < f.iterates


def test_tolerances_of_each_component() -> None:
    x = torch.ones(2, dtype=torch.float64)
    only_first = ImplicitSolver(0.0, torch.tensor([1e-8, 1e8], dtype=torch.float64), EPS, name)
    f = Counted(lambda x: torch.stack([0 * x[0], -2 * x[1]]))
    solved(only_first, f, x, 0.3)
    # Another one shows that the first correction was none by accident.
    assert f.iterates == 2


# ----------------------------------------------------------------------------------------------------- what it costs


def test_a_good_guess_is_one_iterate_once_the_rate_is_known() -> None:
    x, solver = torch.ones(2, dtype=torch.float64), tight()
    without = Counted(lambda x: -x)
    solved(solver, without, x, 0.2)
    assert without.iterates > 1
    f = Counted(lambda x: -x)
    d, _ = solved(solver, f, x, 0.2, guess=-5 / 6 * x)
    assert d.tolist() == pytest.approx([-1 / 6] * 2, rel=1e-12)
    assert (f.iterates, f.slopes) == (1, 0)


@pytest.mark.parametrize("size", [2, LIMIT + 1])
def test_a_rate_is_trusted_for_a_few_steps_though_corrections_are_small(size: int) -> None:
    """f grows stiff while good guesses leave next to nothing to correct: that is noticed before it matters."""
    x, solver = torch.ones(size, dtype=torch.float64), ImplicitSolver(1e-2, 0.0, EPS, name)
    iterates = []
    for step in range(36):
        rate = -1.0 if step < 18 else -1e6
        f = Counted(lambda x, rate=rate: rate * x)  # type: ignore[misc]
        exact = 0.1 * rate * x / (1 - 0.1 * rate)
        # By less than the tolerance, but by much more than rounding.
        d, _ = solved(solver, f, x, 0.1, guess=10 * exact * (1 + 1e-8))
        iterates.append(f.iterates)
        torch.testing.assert_close(d, exact, rtol=3e-2 * 1e-4, atol=0)
    assert sum(iterates[:18]) <= 21
    assert max(iterates[18:]) > 1


@pytest.mark.parametrize(("rate", "expected"), [(-1e6, True), (-1e5, False)])
@pytest.mark.parametrize("places", [4, 400])
def test_two_iterates_near_by_tell_what_rounding_makes_of_func(places: int, rate: float, expected: bool) -> None:
    """If the last place of the state changes f by as much as the residual, no evaluation is needed to tell."""
    x = torch.ones(1, 2, dtype=torch.float64)

    def never(y: Tensor) -> Tensor:
        raise AssertionError(f"evaluated at {y}")

    equations = Equations(x, torch.zeros_like(x), 1.0, never, never)
    tolerances, all_of_them = Tolerances(1e-7, 0.0, 1e-4, EPS), np.ones(1, bool)
    here, there = torch.zeros_like(x), torch.full_like(x, places * EPS)
    residual = torch.full_like(x, 4e6 * EPS)
    points = (here, rate * (x + here)), (there, rate * (x + there))
    found, _ = is_rounding(equations, tolerances, all_of_them, *points, residual, None, ~all_of_them, None)
    assert found.tolist() == [expected]


def test_the_jacobian_is_kept_as_long_as_it_serves() -> None:
    solver, f = tight(), Counted(lambda x: -1e3 * x + torch.sin(x))
    x = torch.ones(12, dtype=torch.float64)
    for step in range(10):
        before = f.iterates
        d, _ = solved(solver, f, x, 0.1)
        x = x + d
        # Newton's method from the start, once substitution has failed.
        assert step == 0 or f.iterates - before <= 3
    assert f.slopes == 1


def test_a_small_jacobian_is_made_anew_where_that_saves_iterations() -> None:
    """In one step of four, by the evaluation that gives f at the first iterate, so that it costs none."""
    solver, f = tight(), Counted(lambda x: -1e3 * x + torch.sin(x))
    x = torch.ones(2, dtype=torch.float64)
    for step in range(10):
        before = f.iterates + f.slopes
        d, _ = solved(solver, f, x, 0.1)
        x = x + d
        assert f.iterates + f.slopes - before <= (6 if step == 0 else 3 if step < 3 else 2)


def test_a_jacobian_that_serves_no_longer_is_replaced() -> None:
    solver = tight()
    x = torch.ones(2, dtype=torch.float64)
    # A Jacobian of what is stiffer makes small corrections, which another iterate has to show.
    for rate, most in ((-100.0, 4), (-1.0, 5), (-1e4, 4)):
        f = Counted(lambda x, rate=rate: rate * x)  # type: ignore[misc]
        d, _ = solved(solver, f, x, 0.1)
        torch.testing.assert_close(x + d, x / (1 - 0.1 * rate), rtol=1e-8, atol=0)
        assert f.iterates + f.slopes <= most


def test_every_solver_has_its_own_jacobian() -> None:
    for _ in range(2):
        f = Counted(lambda x: -1e3 * x)
        solved(tight(), f, torch.ones(2, dtype=torch.float64), 0.1)
        assert f.slopes == 1


def test_iterates_see_the_solution_last() -> None:
    seen: list[Tensor] = []

    def iterate(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return -1e3 * x

    x = torch.ones(2, dtype=torch.float64)
    for solver in (tight(), ImplicitSolver(1e-3, 1e-6, EPS, name)):
        d, _ = solver.solve(Equation(x, torch.zeros_like(x), 0.1, lambda x: -1e3 * x, iterate), None, str)
        torch.testing.assert_close(seen[-1], x + d, rtol=1e-7, atol=1e-7)


# ------------------------------------------------------------------------------------- every entry to its own tolerance


@pytest.mark.parametrize("differentiable", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rate", [-0.5, -200.0])
@pytest.mark.parametrize("others", [1, LIMIT])
def test_a_large_entry_changes_nothing_of_a_small_one(
    others: int, rate: float, dtype: torch.dtype, differentiable: bool
) -> None:
    def f(x: Tensor) -> Tensor:
        return rate * torch.tanh(x)

    (root,) = {brentq(lambda y: y - 1 - 0.2 * rate * np.tanh(y), -10, 10, xtol=1e-15)}
    solver = ImplicitSolver(1e-7, 1e-9, torch.finfo(dtype).eps, name, differentiable)
    x = torch.cat([torch.ones(1, dtype=dtype), torch.full((others,), 1e9, dtype=dtype)])
    d, _ = solved(solver, f, x, 0.2)
    assert float(x[0] + d[0]) == pytest.approx(root, abs=1e-11 + 20 * torch.finfo(dtype).eps)


def test_a_jacobian_of_what_is_no_longer_stiff_proves_nothing() -> None:
    """It makes a correction within the tolerance of a residual of 0.01."""
    solver, x = ImplicitSolver(1e-3, 1e-6, EPS, name), torch.ones(1, dtype=torch.float64)
    solved(solver, lambda x: -1e10 * (x - 1), x, 0.01, known=torch.full_like(x, 1e-3))
    d, _ = solved(solver, lambda x: torch.ones_like(x), x, 0.01)
    assert float(d) == pytest.approx(0.01, rel=1e-6)


def test_an_entry_that_converges_hides_none_that_does_not() -> None:
    """Two samples, and the Jacobian that is kept fits one of them alone."""
    solver, x = ImplicitSolver(1e-3, 1e-6, EPS, name), torch.ones(2, dtype=torch.float64)
    solved(solver, lambda x: -1e10 * (x - 1), x, 0.01, known=torch.full_like(x, 1e-3))
    first = torch.tensor([True, False])
    d, _ = solved(solver, lambda x: torch.where(first, -1e10 * (x - 2), 1.0), x, 0.01)
    assert d.tolist() == pytest.approx([1, 0.01], rel=1e-6)


@pytest.mark.parametrize("size", [1, LIMIT + 8])
def test_what_differentiation_does_not_see_differences_do(size: int) -> None:
    x = torch.linspace(0.5, 1, size, dtype=torch.float64)
    d, _ = solved(tight(), lambda x: 1e-3 * x - 50 * x.detach(), x, 1.0)
    torch.testing.assert_close(x + d, x / (1 + 50 - 1e-3), rtol=1e-8, atol=0)


@pytest.mark.parametrize("size", [3, LIMIT + 8])
def test_differences_have_an_increment_for_every_entry(size: int) -> None:
    """Entries from 1e-12 to 1, all of them stiff, and nothing to differentiate."""
    x = torch.logspace(-12, 0, size, dtype=torch.float64)
    d, _ = solved(ImplicitSolver(1e-7, 0.0, EPS, name, False), lambda y: -1e3 * y * (1 + y / x), x, 1.0)
    # y / x = q for all of them, q = 1 - 1000 q (1 + q).
    q = (-1001 + np.sqrt(1001**2 + 4000)) / 2000
    torch.testing.assert_close(x + d, q * x, rtol=1e-7, atol=0)


def test_func_is_given_no_state_with_a_graph_where_it_must_not_be() -> None:
    seen: list[bool] = []

    def f(x: Tensor) -> Tensor:
        seen.append(x.requires_grad)
        return -1e3 * x

    solved(ImplicitSolver(1e-7, 1e-9, EPS, name, False), f, torch.ones(LIMIT + 1, dtype=torch.float64), 1.0)
    solved(ImplicitSolver(1e-7, 1e-9, EPS, name, False), f, torch.ones(2, dtype=torch.float64), 1.0)
    assert not any(seen)


def test_the_rounding_of_func_is_no_failure() -> None:
    """In single precision, 1000 (a - b) has an error of 1e-4 for a and b near 1: more than any tolerance."""
    matrix = torch.tensor([[-1e3, 1e3 - 1], [1e3 - 1, -1e3]])
    x = torch.tensor([1.0, 0.9])
    d, _ = solved(ImplicitSolver(1e-7, 1e-9, torch.finfo(torch.float32).eps, name), lambda x: x @ matrix, x, 1.0)
    exact = torch.linalg.solve(torch.eye(2).double() - matrix.double(), x.double())
    torch.testing.assert_close((x + d).double(), exact, rtol=1e-3, atol=0)


# --------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("size", [2, LIMIT + 1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite(value: float, size: int) -> None:
    with pytest.raises(RuntimeError, match="implicit equation of method 'm' at t = 3 was not solved"):
        solved(tight(), lambda x: x + value, torch.ones(size, dtype=torch.float64), 0.5)


def test_an_equation_without_a_solution() -> None:
    """d = 10 + d²: the parabola lies above the line."""
    f = Counted(lambda x: 10 + x**2)
    with pytest.raises(RuntimeError, match="of method 'm' at t = 3 was not solved") as error:
        solved(ImplicitSolver(1e-6, 1e-8, EPS, name), f, torch.zeros(2, dtype=torch.float64), 1.0)
    for part in (
        "the worst entry of the state is y[",
        "its residual is",
        "times the tolerance, 0.0001 (atol + rtol |y|)",
        "Use smaller steps",
        "larger rtol and atol",
    ):
        assert part in str(error.value)
    assert f.iterates <= 5 * NEWTON.max_iterations


@pytest.mark.parametrize("name", slow_but(["bdf1"], ["bdf1", "bdf2", "am3"]))
def test_a_step_so_long_that_its_only_solution_is_not_the_flows_is_an_error(name: str) -> None:
    """y' = σ(y) from -3 to t = 9, where y - e⁻ʸ = t - 3 - e³: one step of implicit Euler is solved by 5.98 alone.

    The mode grows by up to h λ = 9/4 > 1, so the residual has a turning point before, at which Newton's method ends.
    """
    y0 = torch.tensor([-3.0], dtype=torch.float64)
    exact = brentq(lambda y: y - math.exp(-y) + 3 + math.exp(3) - 9, -3, 3)
    assert brentq(lambda y: y + 3 - 9 / (1 + math.exp(-y)), -3, 9) == pytest.approx(5.977, abs=1e-3)
    with pytest.raises(implicit.NotSolvedError, match="Use smaller steps"):
        torchdiffeq.odeint(lambda t, y: torch.sigmoid(y), y0, torch.tensor([0.0, 9.0]), method=name)
    y = torchdiffeq.odeint(
        lambda t, y: torch.sigmoid(y), y0, torch.tensor([0.0, 9.0]), method=name, options={"step_size": 3.0}
    )
    assert y[-1].item() == pytest.approx(exact, abs=0.1)


def test_where_substitution_diverges_the_solution_near_by_is_found() -> None:
    """Of very many; in terms of a tolerance that grows with the iterates, the divergence looks like convergence."""
    x = torch.tensor([0.1], dtype=torch.float64)
    d, _ = solved(ImplicitSolver(1e-7, 1e-9, EPS, name), lambda y: -1000 * torch.sin(y), x, 1.0)
    # y = 0.1 - 1000 sin y
    assert float(x + d) == pytest.approx(0.1 / 1001, rel=1e-6)
