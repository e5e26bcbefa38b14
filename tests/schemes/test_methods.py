"""The formulas, against textbook coefficients and the conditions that define them."""

from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from numpy.polynomial import Polynomial
from textbook import TEXTBOOK, nodes_of, random_steps

from torchdiffeq_lmm.schemes.methods import (
    LEAPFROG,
    METHODS,
    Formula,
    MultistepMethod,
    adams_bashforth_formula,
    adams_moulton_formula,
    bdf_formula,
    constant_formula,
)

by_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


def states_and_slopes(formula: Formula, steps: int) -> tuple[list[Fraction], list[Fraction]]:
    """α and β of Σ α_j x_{n+j} = h Σ β_j f_{n+j}, by letting the formula act on unit vectors."""
    alpha, beta = [Fraction(0)] * (steps + 1), [Fraction(0)] * (steps + 1)
    alpha[steps] += 1
    alpha[steps - 1] -= 1
    for i, e in enumerate(formula.increments):
        alpha[steps - 1 - i] -= e
        alpha[steps - 2 - i] += e
    beta[steps] += formula.implicit
    for i, b in enumerate(formula.slopes):
        beta[steps - 1 - i] += b
    return alpha, beta


def random_nodes(seed: int, steps: int) -> list[float]:
    """t_{n+1} = 1, t_n = 0, t_{n-1}, ..., newest first."""
    t = nodes_of(random_steps(seed, steps, mean=1.0, spread=0.7))[::-1]
    return ((t - t[1]) / (t[0] - t[1])).tolist()


def defect(formula: Formula, nodes: list[float], x: Polynomial) -> float:
    """By how much the formula misses x(t_{n+1}) - x(t_n)."""
    values = [x(t) for t in nodes]
    slopes = [x.deriv()(t) for t in nodes]
    predicted = sum(e * (values[i + 1] - values[i + 2]) for i, e in enumerate(formula.increments))
    predicted += sum(b * slopes[i + 1] for i, b in enumerate(formula.slopes)) + formula.implicit * slopes[0]
    return float(values[0] - values[1] - predicted)


def test_the_methods_are_those_of_the_textbook() -> None:
    assert [method.name for method in METHODS] == list(TEXTBOOK)
    assert METHODS[0] is LEAPFROG


@by_method
def test_coefficients_on_equal_steps(method: MultistepMethod) -> None:
    book = TEXTBOOK[method.name]
    alpha, beta = states_and_slopes(method.on_equal_steps, method.steps)
    assert all(isinstance(weight, int | Fraction) for weight in (*alpha, *beta))
    assert (tuple(alpha), tuple(beta)) == (book.alpha, book.beta)
    assert (method.order, method.steps) == (book.order, len(book.alpha) - 1)


@pytest.mark.parametrize("k", range(2, 6))
def test_predictors_on_equal_steps(k: int) -> None:
    (method,) = (method for method in METHODS if method.name == f"abm{k}")
    assert method.predictor is not None
    formula = method.predictor([Fraction(1 - i) for i in range(k + 1)])
    assert tuple(states_and_slopes(formula, k)[1]) == TEXTBOOK[f"ab{k}"].beta


@pytest.mark.parametrize("seed", range(4))
@by_method
def test_formulas_are_exact_up_to_their_order_on_any_nodes(method: MultistepMethod, seed: int) -> None:
    nodes = random_nodes(seed, method.steps)
    for formula in (method.formula, method.predictor):
        if formula is not None:
            x = Polynomial(np.random.default_rng(seed).normal(size=method.order + 1))
            weights = formula(nodes)
            size = sum(abs(w) for w in (*weights.increments, *weights.slopes, weights.implicit))
            largest = max(abs(x(t)) + abs(x.deriv()(t)) for t in nodes)
            assert abs(defect(weights, nodes, x)) <= 1e-13 * (1 + size) * largest
            # The coefficient of the error, in units of the step, is of order 1 / 10.
            assert abs(defect(weights, nodes, Polynomial([0.0] * (method.order + 1) + [1.0]))) > 1e-2


@by_method
def test_formulas_do_not_depend_on_how_their_nodes_are_written(method: MultistepMethod) -> None:
    exact = method.on_equal_steps
    for nodes in ([float(1 - i) for i in range(method.steps + 1)], torch.arange(1.0, -method.steps, -1).double()):
        formula = method.formula(list(nodes))
        assert [float(e) for e in formula.increments] == pytest.approx([float(e) for e in exact.increments], abs=1e-13)
        assert [float(b) for b in formula.slopes] == pytest.approx([float(b) for b in exact.slopes], abs=1e-13)
        assert float(formula.implicit) == pytest.approx(float(exact.implicit), abs=1e-13)


@pytest.mark.parametrize("ratio", [0.25, 1.0, 3.0])
def test_leapfrog_for_unequal_steps(ratio: float) -> None:
    formula = LEAPFROG.formula([1.0, 0.0, -1 / ratio])
    assert formula.increments == pytest.approx((-(ratio**2),), rel=1e-14)
    assert formula.slopes == pytest.approx((1 + ratio,), rel=1e-14)
    assert formula.implicit == 0


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
def test_two_step_adams_and_bdf_formulas_for_unequal_steps(ratio: float) -> None:
    """As Hairer, Nørsett, Wanner, III.5, print them for ω = h_n / h_{n-1}."""
    nodes = [1.0, 0.0, -1 / ratio]
    assert adams_bashforth_formula(2, nodes).slopes == pytest.approx((1 + ratio / 2, -ratio / 2), rel=1e-14)
    moulton = adams_moulton_formula(3, nodes)
    expected = ((3 + 2 * ratio) / (6 * (1 + ratio)), (3 + ratio) / 6)
    assert (moulton.implicit, moulton.slopes[0]) == pytest.approx(expected, rel=1e-14)
    bdf = bdf_formula(2, nodes)
    assert bdf.increments == pytest.approx((ratio**2 / (1 + 2 * ratio),), rel=1e-14)
    assert bdf.implicit == pytest.approx((1 + ratio) / (1 + 2 * ratio), rel=1e-14)
    assert bdf.slopes == ()


@pytest.mark.parametrize("name", TEXTBOOK)
def test_constant_formulas_say_what_their_coefficients_say(name: str) -> None:
    book = TEXTBOOK[name]
    formula = constant_formula(book.alpha, book.beta, [1.0, 0.0, -17.0])
    alpha, beta = states_and_slopes(formula, len(book.alpha) - 1)
    assert (tuple(alpha), tuple(beta)) == (book.alpha, book.beta)
    assert not formula.increments or formula.increments[-1] != 0
    assert not formula.slopes or formula.slopes[-1] != 0


IMPLICIT = {"am2", "am3", "am4", "am5", "milne_simpson", *(f"bdf{k}" for k in range(1, 7))}


@by_method
def test_methods_describe_themselves(method: MultistepMethod) -> None:
    assert method.is_implicit == (method.name in IMPLICIT)
    assert method.uses_first_slope == (not method.name.startswith("bdf"))
    evaluations = 2 if method.name.startswith("abm") else 1
    assert method.evaluations == (None if method.is_implicit else evaluations)
    assert (method.predictor is not None) == method.name.startswith("abm")
    assert method.closing is None


def test_the_formula_on_equal_steps_is_worked_out_once() -> None:
    calls: list[int] = []

    def formula(nodes: list[Fraction]) -> Formula:
        calls.append(len(nodes))
        return adams_bashforth_formula(2, nodes)

    method = MultistepMethod("counted", 2, 2, formula)
    assert method.on_equal_steps is method.on_equal_steps
    assert not method.is_implicit
    assert calls == [3]


def test_formulas_are_differentiable_with_respect_to_the_nodes() -> None:
    def weights(k: int, earlier: torch.Tensor) -> torch.Tensor:
        nodes = [torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64), *earlier.unbind()]
        formula = bdf_formula(k, nodes)
        return torch.stack([*formula.increments, formula.implicit])

    for k in (2, 4):
        earlier = torch.tensor(random_nodes(k, k)[2:], requires_grad=True, dtype=torch.float64)
        assert torch.autograd.gradcheck(partial(weights, k), (earlier,))
