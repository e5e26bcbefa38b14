"""The boundary layer before an observation: how far auto-differentiation's cotangents are from the costate there.

The same recurrence is run for x' = J x with J frozen, expanded in J, so that the difference is known without any
Jacobian but for one product at the end: see `costate`.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from torchdiffeq_lmm.schemes.discrete_adjoint import AdjointState, Contributions, combine, discrete_adjoint

from .filter_plan import FilterPlan


class BoundaryLayerTerms(NamedTuple):
    """At one node, Σ_j (1 - w_j) g_j and Σ_j (t_j - t_m - v_j) g_j; None where the method is not of second order."""

    value: Tensor
    slope: Tensor | None


def boundary_layer_terms(
    plan: FilterPlan, active: Sequence[int], cotangents: Sequence[Tensor | None], zero: Tensor
) -> dict[int, BoundaryLayerTerms]:
    """The terms of the boundary layer at the active nodes, which are in increasing order."""
    if not active:
        return {}
    rows = plan.recurrence.rows
    jacobians = _FirstOrder(discrete_adjoint(rows, cotangents, _NoJacobian(), zero))
    terms: dict[int, BoundaryLayerTerms] = {}
    # Σ g_j and Σ (t_j - t_m) g_j over the nodes from m on.
    total = moment = zero
    node = len(plan.steps)
    for point in discrete_adjoint(rows, [None] * len(cotangents), jacobians, zero):
        if point.node is not None:
            node = point.node
            if node < active[0]:
                break
            if node < len(plan.steps):
                moment = moment + plan.steps[node] * total
            g = cotangents[node]
            total = total if g is None else total + g
            terms[node] = BoundaryLayerTerms(total, moment if plan.corrects_slope else None)
        elif plan.recurrence.positions[point.state] != node:
            continue
        # All slopes at the node, of predictors too.
        h = plan.equal_step(node)
        value, slope = terms[node]
        terms[node] = BoundaryLayerTerms(
            _minus(value, jacobians.point.mu, h), None if slope is None else _minus(slope, point.mu, h)
        )
    return {node: terms[node] for node in active}


def _minus(total: Tensor, mu: Contributions, h: float) -> Tensor:
    return total - combine(mu) / h if mu else total


class _NoJacobian:
    """The Jacobians of x' = 0."""

    def vjp(self, state: int, cotangent: Contributions) -> Contributions:  # noqa: ARG002
        return []

    def solve(self, state: int, weight: float, rhs: Tensor) -> Tensor:  # noqa: ARG002
        return rhs


class _FirstOrder:
    """The Jacobians of x' = ε x, the part of first order in ε.

    Args:
        backwards: the adjoint for ε = 0; it goes along state by state, and `point` is where it is.
    """

    def __init__(self, backwards: Iterator[AdjointState]) -> None:
        self._backwards = backwards
        self.point: AdjointState

    def vjp(self, state: int, cotangent: Contributions) -> Contributions:  # noqa: ARG002
        self.point = next(self._backwards)
        return self.point.later

    def solve(self, state: int, weight: float, rhs: Tensor) -> Tensor:  # noqa: ARG002
        increment = self.point.increment
        return rhs if increment is None else rhs + weight * increment
