"""The costate at a node as the response to a shift of the whole past along the flow, to a given order.

Shift the discrete past at node m to that of a neighbouring solution: x_m by δ, and what the rows after it use of the
nodes before by what the flow makes of δ there. The rows carry it on with their own error, so that the response of E is
p_mᵀ δ up to the order of the method. With x the solution of x' = J x, x(t_m) = δ, and with the cotangents c_l of x_l
and S_l of the slopes by the rows after node m alone,

    p_mᵀ δ = Σ_l c_lᵀ x(t_l) + Σ_l S_lᵀ x'(t_l) = Σ_k M_kᵀ x⁽ᵏ⁾(t_m),
    M_k = Σ_l (s_lᵏ c_l / k! + s_lᵏ⁻¹ S_l / (k-1)!),      s_l = t_l - t_m,

by Taylor's series, and M_k = O(hᵏ). The derivatives come from slopes F ≈ x' at a few nodes around m: at first
F = J_m δ at node m alone; then the polynomial through the slopes that there are is integrated, up to one node more, and
the slopes are worked out anew. Every turn gains one order. An error of O(h^q) takes q - 1 turns and 1, 2, 4, 7 products
with a Jacobian for q = 2, 3, 4, 5. All of it is linear in δ; what is done here is the transpose.

For stiff problems each slope comes from R = (1 - τ J)⁻¹ instead, as J R (x - τ F), with F that of the turn before, and
δ itself as R (δ - τ F): the same to the order, and bounded however large J is.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import factorial
from typing import NamedTuple

from torch import Tensor

from torchdiffeq_lmm.schemes.discrete_adjoint import Contributions, combine
from torchdiffeq_lmm.schemes.polynomials import evaluate, integral, lagrange_basis

_PATTERNS = 4096
"""Of so many patterns of nodes the weights are remembered."""

_DIGITS = 12
"""Nodes that differ by rounding have the same pattern."""

Moments = list[Tensor | None]
"""M_0, M_1, ...; None is 0."""


class PastTerm(NamedTuple):
    """What the rows after a node use of one time before it, or of the increment between two.

    Attributes:
        offset: s, the time from the node; negative before it.
        since: None for a slope; for an increment from one node to another, the s of the first.
        cotangents: of it.
    """

    offset: float
    since: float | None
    cotangents: Contributions


def moments(first: Tensor | None, past: Sequence[PastTerm], order: int) -> Moments:
    """M_0, ..., M_{q-1}.

    Args:
        first: M_0, the cotangent of all states at once.
        past: all else.
        order: q.
    """
    tensors: dict[int, Tensor] = {}
    weights: list[dict[int, float]] = [{} for _ in range(1, order)]
    for term in past:
        factors = [_factor(term, k) for k in range(1, order)]
        for weight, cotangent in term.cotangents:
            tensors[id(cotangent)] = cotangent
            for of_k, factor in zip(weights, factors, strict=True):
                of_k[id(cotangent)] = of_k.get(id(cotangent), 0.0) + weight * factor
    sums = [[(weight, tensors[key]) for key, weight in of_k.items() if weight != 0.0] for of_k in weights]
    return [first, *(combine(terms) if terms else None for terms in sums)]


def _factor(term: PastTerm, k: int) -> float:
    if term.since is None:
        return term.offset ** (k - 1) / factorial(k - 1)
    return (term.offset**k - term.since**k) / factorial(k)


def shifted_past(
    given: Moments,
    offsets: Sequence[float],
    product: Callable[[int, Tensor], Tensor | None],
    damp: Callable[[int, Tensor], Tensor] | None,
    damping: float,
) -> Tensor | None:
    """Σ_k (x⁽ᵏ⁾)ᵀ M_k, up to M_{q-1} and to the same order.

    Args:
        given: M_0, ..., M_{q-1}, q ≥ 2.
        offsets: t - t_m of the nodes at which there are Jacobians, the first of them 0; where there are fewer than
            q - 1, the order is lower.
        product: from the place of a node among them and a vector to Jᵀ times it; None is 0.
        damp: the same for Rᵀ; None where nothing is damped.
        damping: τ; 0 where nothing is damped.

    Returns:
        p_m; None is 0.
    """
    count = min(len(offsets), len(given) - 1)
    first = given[0]
    if first is not None and damp is not None:
        first = damp(0, first)
    total: Contributions = [] if first is None else [(1.0, first)]
    if count == 0:
        return combine(total) if total else None
    scale = max(map(abs, offsets[:count])) or 1.0
    weights = _weights(tuple(round(offset / scale, _DIGITS) for offset in offsets[:count]))
    slopes: list[Contributions] = [[] for _ in range(count)]
    for k, moment in enumerate(given[1 : count + 1]):
        if moment is not None:
            _spread(slopes, weights.derivatives[k], scale**-k, moment)
    if first is not None and damping > 0.0:
        slopes[0].append((-damping, first))
    for turn in range(count, 0, -1):
        before: list[Contributions] = [[] for _ in range(turn - 1)]
        for place in range(turn):
            if not slopes[place]:
                continue
            if place == 0 and damp is None and turn > 1:
                # The slope at node m is the same in every turn.
                before[0] += slopes[0]
                continue
            vector = combine(slopes[place])
            # J R = (R - 1) / τ.
            pulled = product(place, vector) if damp is None else (damp(place, vector) - vector) / damping
            if pulled is None:
                continue
            total.append((1.0, pulled))
            if turn > 1:
                _spread(before, weights.integrals[turn - 2][place], scale, pulled)
                if damping > 0.0:
                    _spread(before, weights.values[turn - 2][place], -damping, pulled)
        slopes = before
    return combine(total) if total else None


def nearest_nodes(candidates: Sequence[int], node: int, count: int) -> list[int]:
    """So many of the nodes, itself first, which the rows after it know of; those nearer first.

    Args:
        candidates: the nodes at which f is evaluated, in their order.
        node: the node.
        count: so many; fewer where there are no more.
    """
    end = bisect_left(candidates, node) + 1
    first = max(0, end - count)
    return sorted(candidates[first : first + count], key=lambda other: abs(other - node))


def product_places(order: int) -> list[int]:
    """Of each product with a Jacobian, in the order of `shifted_past`, the place in `nearest_nodes`; none for order 1.

    Args:
        order: q.
    """
    return [place for turn in range(order - 1, 0, -1) for place in (range(1, turn) if turn > 1 else (0,))]


def _spread(slopes: list[Contributions], weights: Sequence[float], factor: float, tensor: Tensor) -> None:
    for contributions, weight in zip(slopes, weights, strict=True):
        if weight != 0.0:
            contributions.append((factor * weight, tensor))


class _Weights(NamedTuple):
    """What interpolation of slopes at nodes s_0 = 0, s_1, ... gives, as weights of the slopes.

    Attributes:
        derivatives: at 0, of the polynomial through all: the value, the first derivative, ...
        integrals: by number of slopes less one, and node up to one more: from 0 to the node.
        values: the same, at the node.
    """

    derivatives: list[list[float]]
    integrals: list[list[list[float]]]
    values: list[list[list[float]]]


@lru_cache(_PATTERNS)
def _weights(nodes: tuple[float, ...]) -> _Weights:
    through_all = lagrange_basis(nodes)
    derivatives = [[factorial(k) * float(polynomial[k]) for polynomial in through_all] for k in range(len(nodes))]
    integrals, values = [], []
    for known in range(1, len(nodes)):
        basis = lagrange_basis(nodes[:known])
        integrals.append([[float(integral(p, 0.0, node)) for p in basis] for node in nodes[: known + 1]])
        values.append([[float(evaluate(p, node)) for p in basis] for node in nodes[: known + 1]])
    return _Weights(derivatives, integrals, values)
