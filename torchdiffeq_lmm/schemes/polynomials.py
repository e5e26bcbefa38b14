"""Weights of interpolatory formulas, from their definitions: integrals and derivatives of Lagrange's polynomials.

Everything here is plain arithmetic on the nodes. With `fractions.Fraction` the weights come out exact, with numbers to
rounding, and with tensors elementwise, for many sets of nodes at once and differentiably.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

Number: TypeAlias = Any
"""A Fraction, a number, or a tensor of numbers: what is closed under +, -, * and /."""

Polynomial: TypeAlias = list[Number]
"""The coefficients of 1, s, s², ..."""


def nodal_polynomial(nodes: Sequence[Number]) -> Polynomial:
    """Π_j (s - s_j)."""
    product: Polynomial = [1]
    for node in nodes:
        product = [shifted - node * kept for shifted, kept in zip([0, *product], [*product, 0], strict=True)]
    return product


def lagrange_basis(nodes: Sequence[Number]) -> list[Polynomial]:
    """The polynomials l_i of degree less than the number of nodes, with l_i(s_j) = 1 for i = j, else 0.

    Args:
        nodes: s_0, s_1, ..., at least one, all different.
    """
    basis = []
    for i, node in enumerate(nodes):
        others = [*nodes[:i], *nodes[i + 1 :]]
        polynomial = nodal_polynomial(others)
        for other in others:
            polynomial = [coefficient / (node - other) for coefficient in polynomial]
        basis.append(polynomial)
    return basis


def integral(polynomial: Polynomial, start: Number, end: Number) -> Number:
    """∫ from `start` to `end`."""
    total: Number = 0
    upper: Number = end
    lower: Number = start
    for power, coefficient in enumerate(polynomial, 1):
        total = total + coefficient * (upper - lower) / power
        upper, lower = upper * end, lower * start
    return total


def derivative(polynomial: Polynomial, at: Number) -> Number:
    """The first derivative."""
    return evaluate([power * coefficient for power, coefficient in enumerate(polynomial)][1:], at)


def evaluate(polynomial: Polynomial, at: Number) -> Number:
    """The value, by Horner's rule."""
    total: Number = 0
    for coefficient in reversed(polynomial):
        total = total * at + coefficient
    return total


def integration_weights(nodes: Sequence[Number], start: Number, end: Number) -> list[Number]:
    """w_i with ∫ q = Σ w_i q(s_i), from `start` to `end`, for polynomials q of lower degree than there are nodes."""
    return [integral(polynomial, start, end) for polynomial in lagrange_basis(nodes)]


def differentiation_weights(nodes: Sequence[Number], at: Number) -> list[Number]:
    """w_i with q'(at) = Σ w_i q(s_i), for polynomials q of lower degree than there are nodes."""
    return [derivative(polynomial, at) for polynomial in lagrange_basis(nodes)]


def extrapolation_weights(nodes: Sequence[Number], at: Number) -> list[Number]:
    """w_i with q(at) = Σ w_i q(s_i), for polynomials q of lower degree than there are nodes."""
    return [evaluate(polynomial, at) for polynomial in lagrange_basis(nodes)]


def divided_difference_weights(nodes: Sequence[Number]) -> list[Number]:
    """w_i with q[s_0, s_1, ...] = Σ w_i q(s_i), the leading coefficient of the polynomial through all nodes."""
    return [polynomial[-1] for polynomial in lagrange_basis(nodes)]
