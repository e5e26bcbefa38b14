"""Weights of interpolatory formulas against polynomials that are integrated and differentiated otherwise."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from numpy.polynomial import Polynomial
from textbook import nodes_of, random_steps

from torchdiffeq_lmm.schemes.polynomials import (
    derivative,
    differentiation_weights,
    evaluate,
    extrapolation_weights,
    integral,
    integration_weights,
    lagrange_basis,
    nodal_polynomial,
)

NODE_SETS = [
    [Fraction(3, 7)],
    [Fraction(1), Fraction(0)],
    [Fraction(1), Fraction(0), Fraction(-1), Fraction(-2)],
    [Fraction(1), Fraction(0), Fraction(-3, 5), Fraction(-7, 3), Fraction(-5, 2)],
]
EXACT = pytest.mark.parametrize("nodes", NODE_SETS, ids=len)


def powers(nodes: list[Fraction], degree: int) -> list[Fraction]:
    return [node**degree for node in nodes]


def weighted(weights: list[Fraction], values: list[Fraction]) -> Fraction:
    return sum((w * v for w, v in zip(weights, values, strict=True)), Fraction(0))


@pytest.mark.parametrize("nodes", [[], [2.0], [1.0, -0.5, 3.0, 3.0]])
def test_the_nodal_polynomial_has_the_nodes_for_roots(nodes: list[float]) -> None:
    np.testing.assert_allclose(nodal_polynomial(nodes), np.polynomial.polynomial.polyfromroots(nodes))


@EXACT
def test_the_basis_is_one_at_its_own_node_and_zero_at_the_others(nodes: list[Fraction]) -> None:
    for i, polynomial in enumerate(lagrange_basis(nodes)):
        assert len(polynomial) == len(nodes)
        assert [sum(c * s**j for j, c in enumerate(polynomial)) for s in nodes] == [i == j for j in range(len(nodes))]


@pytest.mark.parametrize("degree", range(6))
def test_calculus_of_a_polynomial(degree: int) -> None:
    polynomial = Polynomial(np.random.default_rng(degree).normal(size=degree + 1))
    coefficients = polynomial.coef.tolist()
    assert evaluate(coefficients, -1.3) == pytest.approx(polynomial(-1.3), rel=1e-13)
    assert derivative(coefficients, 0.7) == pytest.approx(polynomial.deriv()(0.7), rel=1e-13)
    primitive = polynomial.integ()
    assert integral(coefficients, -0.4, 1.9) == pytest.approx(primitive(1.9) - primitive(-0.4), rel=1e-13)


@EXACT
def test_weights_are_exact_up_to_the_degree_and_no_further(nodes: list[Fraction]) -> None:
    start, end, at = Fraction(-1, 3), Fraction(2), Fraction(5, 4)
    for degree in range(len(nodes) + 1):
        values = powers(nodes, degree)
        defects = [
            weighted(integration_weights(nodes, start, end), values)
            - (end ** (degree + 1) - start ** (degree + 1)) / (degree + 1),
            weighted(differentiation_weights(nodes, at), values) - (degree * at ** (degree - 1) if degree else 0),
            weighted(extrapolation_weights(nodes, at), values) - at**degree,
        ]
        assert [defect == 0 for defect in defects] == [degree < len(nodes)] * 3


def test_weights_of_famous_rules() -> None:
    third = Fraction(1, 3)
    assert integration_weights([Fraction(n) for n in (-1, 0, 1)], -1, 1) == [third, 4 * third, third]
    assert differentiation_weights([Fraction(n) for n in (-1, 0, 1)], 0) == [Fraction(-1, 2), 0, Fraction(1, 2)]
    assert extrapolation_weights([Fraction(n) for n in (0, -1, -2)], 1) == [3, -3, 1]


@pytest.mark.parametrize("seed", range(3))
def test_numbers_and_tensors_give_what_fractions_give(seed: int) -> None:
    sets = np.stack([nodes_of(random_steps(seed + i, 4, mean=1.0)) for i in range(5)])
    columns = [torch.tensor(column) for column in sets.T]
    for weights_of in (
        lambda nodes: integration_weights(nodes, nodes[1], nodes[0]),
        lambda nodes: differentiation_weights(nodes, nodes[0]),
        lambda nodes: extrapolation_weights(nodes, nodes[0] - (nodes[1] - nodes[0])),
    ):
        at_once = torch.stack(weights_of(columns), 1)
        for row, nodes in zip(at_once, sets.tolist(), strict=True):
            exact = [float(weight) for weight in weights_of([Fraction(node) for node in nodes])]
            assert row.tolist() == pytest.approx(exact, rel=1e-9, abs=1e-12)
            assert [float(w) for w in weights_of(nodes)] == pytest.approx(exact, rel=1e-9, abs=1e-12)


def test_weights_of_tensors_are_differentiable() -> None:
    nodes = torch.tensor([1.0, 0.0, -0.7, -1.9], dtype=torch.float64, requires_grad=True)

    def weights(nodes: torch.Tensor) -> torch.Tensor:
        s = nodes.unbind()
        return torch.stack([*integration_weights(s, s[1], s[0]), *differentiation_weights(s, s[0])])

    assert torch.autograd.gradcheck(weights, (nodes,))
