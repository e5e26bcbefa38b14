"""The theory of a linear multistep method Σ_j α_j x_{n+j} = h Σ_j β_j f_{n+j}, from its exact coefficients.

With ρ(z) = Σ α_j zʲ and σ(z) = Σ β_j zʲ. Source for order, error constant, consistency and the root condition: Hairer,
Nørsett, Wanner, *Solving Ordinary Differential Equations I*, III.2 and III.3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import accumulate
from math import factorial

import numpy as np

from .methods import Formula

Coefficients = tuple[Fraction, ...]

ON_UNIT_CIRCLE = 1e-7
"""Roots that differ from the unit circle by less are on it."""

DOUBLE_ROOT = 1e-4
"""Roots that differ from each other by less are one: rounding parts a multiple root so far."""


def coefficients(formula: Formula, steps: int) -> tuple[tuple[Fraction, ...], tuple[Fraction, ...]]:
    """α_0, ..., α_k and β_0, ..., β_k, with α_k = 1, of a formula in increments on equal steps.

    Args:
        formula: with Fractions for weights.
        steps: k.
    """
    e = [Fraction(weight) for weight in formula.increments]
    e += [Fraction(0)] * (steps - 1 - len(e))
    b = [Fraction(formula.implicit), *(Fraction(weight) for weight in formula.slopes)]
    b += [Fraction(0)] * (steps + 1 - len(b))
    # x_{n+1} - x_n - Σ e_i (x_{n-i} - x_{n-i-1})
    sums = [Fraction(1), *(-weight for weight in e)]
    alpha = [after - before for after, before in zip([*sums, Fraction(0)], [Fraction(0), *sums], strict=True)]
    return tuple(alpha[::-1]), tuple(b[::-1])


def defect(alpha: Coefficients, beta: Coefficients, power: int) -> Fraction:
    """C_q = (Σ_j α_j j^q - q Σ_j β_j j^{q-1}) / q!: by how much the formula misses t^q."""
    total = sum((a * Fraction(j) ** power for j, a in enumerate(alpha)), Fraction(0))
    if power > 0:
        total -= power * sum((b * Fraction(j) ** (power - 1) for j, b in enumerate(beta)), Fraction(0))
    return total / factorial(power)


def order(alpha: Coefficients, beta: Coefficients) -> int:
    """The largest p with C_0 = ... = C_p = 0; -1 if there is none."""
    power = 0
    # Coefficients that were floats satisfy the conditions up to rounding.
    while abs(defect(alpha, beta, power)) < 1e-13 and power <= 2 * len(alpha):
        power += 1
    return power - 1


def error_constant(alpha: Coefficients, beta: Coefficients) -> Fraction:
    """C = C_{p+1} / σ(1): the local error, in the scale in which methods can be compared."""
    return defect(alpha, beta, order(alpha, beta) + 1) / sum(beta, Fraction(0))


def roots(alpha: Coefficients) -> list[complex]:
    """The roots of ρ, the largest first; 1 first among those on the unit circle."""
    found = [complex(root) for root in np.roots([float(a) for a in alpha[::-1]])]
    return sorted(found, key=lambda root: (-round(abs(root), 6), abs(root - 1)))


def unstable_root(alpha: Coefficients) -> tuple[complex, int] | None:
    """A root of ρ, and its multiplicity, that violates the root condition: outside the unit circle, or double on it."""
    found = roots(alpha)
    for root in found:
        near = [other for other in found if abs(other - root) < DOUBLE_ROOT]
        if abs(root) > (1 + ON_UNIT_CIRCLE if len(near) == 1 else 1 - DOUBLE_ROOT):
            return sum(near) / len(near), len(near)
    return None


@cache
def is_strongly_stable(alpha: Coefficients) -> bool:
    """Whether all roots of ρ but 1 are inside the unit circle, so that what oscillates dies out."""
    return sum(abs(root) > 1 - ON_UNIT_CIRCLE for root in roots(alpha)) == 1


def parasitic_rate(alpha: Coefficients, beta: Coefficients) -> float | None:
    """r, so that the fastest parasitic solution of y' = -y goes as exp(r t) for small steps; None if all die out.

    A root ζ of ρ on the unit circle is ζ (1 + μ h λ) in y' = λ y, to first order in h, with the growth parameter
    μ = σ(ζ) / (ζ ρ'(ζ)), and r = -Re μ for λ = -1. Source: Hairer, Nørsett, Wanner, III.9, after Dahlquist.

    Args:
        alpha, beta: of a zero-stable method. Not of one that predicts, whose own μ depends on the predictor.
    """
    on_circle = [root for root in roots(alpha)[1:] if abs(root) > 1 - ON_UNIT_CIRCLE]
    rho = np.polynomial.Polynomial([float(a) for a in alpha])
    sigma = np.polynomial.Polynomial([float(b) for b in beta])
    # Plus 0, for the sign of a zero.
    return max((-(sigma(root) / (root * rho.deriv()(root))).real + 0.0 for root in on_circle), default=None)


def effective_weights(alpha: Coefficients, beta: Coefficients, count: int) -> list[Fraction]:
    """w_0, w_1, ... in x_N ≈ x_0 + h Σ_j w_j f_{N-j}: how the method integrates. The series of σ/ρ in 1/z."""
    newest_a, newest_b = alpha[::-1], beta[::-1]
    weights: list[Fraction] = []
    for i in range(count):
        weight = newest_b[i] if i < len(newest_b) else Fraction(0)
        weight -= sum((newest_a[j] * weights[i - j] for j in range(1, min(i, len(alpha) - 1) + 1)), Fraction(0))
        weights.append(weight / newest_a[0])
    return weights


_LEFT_OVER = 1e-3
"""What may be left of a boundary layer, in terms of the errors after it."""

_SLOWEST = 0.99
"""A boundary layer in which the largest root does not decay faster is taken for one without an end."""


@dataclass(frozen=True)
class BoundaryLayer:
    """Where, before an observation, a strongly stable method's cotangents differ from the costate.

    Attributes:
        length: over how many nodes they differ by more than rounding, up to first order in the step.
        near: over how many of them they differ by more than the scale of the problem at second order.
    """

    length: int
    near: int


@cache
def boundary_layer_of(alpha: Coefficients, beta: Coefficients, tolerance: float = 1e-13) -> BoundaryLayer | None:
    """The boundary layer of a method before an observation; None if it does not end, or not within thousands of nodes.

    For x' = λ x the cotangents i nodes before a unit observation are h (w_i + h λ v_i + h² λ² u_i + ...), with
    v = w * w, u = w * w * w, and the costate is 1 + h λ i + h² λ² i² / 2 + ... up to constants.
    """
    modulus = max((abs(root) for root in roots(alpha)[1:]), default=0.0)
    if modulus > _SLOWEST:
        return None
    count = 4 * len(alpha) + (int(2 * np.log(tolerance) / np.log(modulus)) if modulus > ON_UNIT_CIRCLE else 0)
    # w - 1, by cancelling the root 1: as a difference it would drown in rounding where it decays slowly.
    deflated = _without_root_one(alpha[::-1])
    excess = _without_root_one([b - a for b, a in zip(beta[::-1], [*deflated, Fraction(0)], strict=True)])
    r = _series(excess, deflated, count)
    off = np.abs(r) > tolerance
    if order(alpha, beta) == 1:
        return BoundaryLayer(_last(off), 0)
    # v_i - i: with r = w - 1 it is 1 + 2 Σ r + r * r, which at order 2 vanishes after the layer.
    off |= np.abs(1 + 2 * r.cumsum() + np.convolve(r, r)[:count]) > tolerance * count
    w = 1 + r
    # u_i - i² / 2, up to the constant that it tends to.
    rest = np.convolve(np.convolve(w, w)[:count], w)[:count] - np.arange(count) ** 2 / 2
    return BoundaryLayer(_last(off), _last(np.abs(rest - rest[-1]) > 0.5))


@cache
def layer_length(alpha: Coefficients, beta: Coefficients, order: int, steps: int) -> int | None:
    """Over how many nodes before an observation a method's cotangents, by h, are the costate to less than its order.

    In x' = λ x the part of order j in h λ of the cotangents is the (j+1)-fold convolution of w, and after the layer a
    polynomial of degree j, as that of the costate. Differences of order j + 1 leave what decays.

    Args:
        alpha, beta: of the method.
        order: that which matters.
        steps: N, as the step is 1 / N in the time of the problem.

    Returns:
        None where the layer does not end.
    """
    layer = boundary_layer_of(alpha, beta)
    if layer is None:
        return None
    tolerance = _LEFT_OVER * float(steps) ** -order
    count = max((order + 1) * layer.length, len(alpha)) + 1
    decaying = _series(beta[::-1], _without_root_one(alpha[::-1]), count)
    power, length = decaying, 0
    for j in range(order + 1):
        length = max(length, _last(np.abs(power) > tolerance * float(steps) ** j))
        power = np.convolve(power, decaying)[:count]
    return length


def _last(flags: "np.ndarray") -> int:
    return int(np.flatnonzero(flags).max(initial=-1)) + 1


def _without_root_one(polynomial: Sequence[Fraction]) -> list[Fraction]:
    """A polynomial in 1/z that vanishes at 1, divided by 1 - 1/z."""
    return list(accumulate(polynomial))[:-1]


def _series(numerator: Sequence[Fraction], denominator: Sequence[Fraction], count: int) -> "np.ndarray":
    """The first coefficients of the power series of a quotient."""
    series = np.zeros(count)
    for i in range(count):
        series[i] = float(numerator[i]) if i < len(numerator) else 0.0
        for j in range(1, min(i, len(denominator) - 1) + 1):
            series[i] -= float(denominator[j]) * series[i - j]
        series[i] /= float(denominator[0])
    return series
