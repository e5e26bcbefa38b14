"""From the cotangents of auto-differentiation to those of the underlying flow: the gradient filter.

For x' = f(t, x, θ(t)) and a loss E, the gradient in function space is the density (∂f/∂θ)ᵀ p, with the costate
p' = -Jᵀ p, J = ∂f/∂x. Auto-differentiation hands the parameter of the m-th evaluation (∂f_m/∂θ)ᵀ μ_m, μ_m = ∂E/∂f_m.
Through a multistep method, μ_m / h does not converge to p: everywhere where ρ has a root on the unit circle besides 1,
as leapfrog's has; before every observation, for as long as the other roots need to die out, where it has none.

**At any node, on any grid.** Shift the whole discrete solution up to node m along the flow: x_m by δ, a slope f_l
before by J_l δ, an increment d_l by h_{l-1} J_l δ, up to terms of second order in h. The response of E is pᵀ δ up to
the order of the method, because the shifted past is the past of a solution. By the adjoint recursion it is the sum of
what each part of the past contributes, so that

    p_m = P_m + J_mᵀ H_m + O(h²),      H_m = Σ_{l<m} ∂E/∂f_l + Σ_{l≤m} h_{l-1} ∂E/∂d_l,

both derivatives by the rows after node m alone, and P_m = ∂E/∂x_m with the past held fixed. For leapfrog, H_m is a
multiple of μ_m, J_mᵀ of which is known: p_m is a mean of P_m and P_{m+1}, on a uniform grid the average ¼, ½, ¼ of
neighbouring cotangents in Xu, Chen, Li, Wright, *Correcting auto-differentiation in neural-ODE training* (arXiv
2306.02192). For other methods it costs one more product with J_mᵀ.

**Between equal steps, for methods whose other roots are inside the unit circle.** There μ_m / h is p_m to the method's
own order as soon as the boundary layer before an observation is over, and that is better than second order. Within the
layer, the first two terms of the difference are known: those of the method for x' = J_m x, expanded in J_m. With w and
v the cotangents μ_m / h in response to a unit observation at node j, by the method's rows for J = 0 and to first order
in J,

    p_m = μ_m / h + Σ_{j≥m} ((1 - w_j) g_j + J_mᵀ (t_j - t_m - v_j) g_j) + O(h²),      g_j = ∂E/∂x_j.

The sums over j are themselves adjoint recursions, without any Jacobian. They vanish as the layer ends.

Both are of the form V + Jᵀ S, as if h J were small. With a BDF method it need not be, and R (V + R Jᵀ (S - τ V)) takes
its place, R = (1 - τ Jᵀ)⁻¹, τ = h / 4: the same as h goes to 0, and 0 for stiff components, as their costate is.

To higher order the first of these formulas goes on as in `shifted_past`. It then serves in the layers as well, where
terms of first order in J are no longer enough, and μ_m / h is taken only beyond them.

Where E observes node m, p jumps there by g_m; the filtered costate is the mean of both limits.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from torchdiffeq_lmm.schemes.discrete_adjoint import AdjointState, Contributions, combine
from torchdiffeq_lmm.schemes.weighted_sum import weighted_sum

from .boundary_layer import boundary_layer_terms
from .filter_plan import FilterPlan
from .shifted_past import Moments, PastTerm, moments, nearest_nodes, shifted_past


class Jacobians(Protocol):
    """What the filter asks of the Jacobians J of f at the states."""

    def expand(self, state: int, value: Tensor | None, slope: Tensor | None, step: float) -> Tensor | None:
        """Return V + Jᵀ S, damped by a step τ if it is not 0; None is 0."""

    def product(self, state: int, vector: Tensor) -> Tensor | None:
        """Return Jᵀ times a vector; None is 0."""

    def damp(self, state: int, step: float, vector: Tensor) -> Tensor:
        """Return (1 - τ Jᵀ)⁻¹ times a vector."""


def filtered_cotangents(
    plan: FilterPlan,
    backwards: Iterable[AdjointState],
    seen: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
    jacobians: Jacobians,
    zero: Tensor,
) -> Iterator[tuple[int, float, Tensor]]:
    """The filtered costates p̃, and the weights ω that make them the cotangents ω p̃ of the slopes.

    Args:
        plan: what to do where.
        backwards: the states of `discrete_adjoint`, as they come.
        seen: g_0, ..., g_N, None for a node that E does not see.
        cotangents: the same with Jᵀ times what E sees of the slope there.
        jacobians: of f at the states; at nodes, up to `plan.reach` nodes later than that of the latest adjoint state.
        zero: a state of zeros.

    Yields:
        The number of a state, ω and p̃; where a state is missing the cotangent is 0.
    """
    positions, nodes = plan.recurrence.positions, plan.recurrence.nodes
    distances = _distances(cotangents)
    raw = [flag and (d is None or d >= plan.near) for flag, d in zip(plan.raw, distances, strict=True)]
    in_layer = [m for m, d in enumerate(distances) if raw[m] and d is not None and d <= plan.boundary_layer]
    layer = boundary_layer_terms(plan, in_layer, cotangents, zero)
    widths, shares_after = plan.owned([g is not None for g in seen])
    pending: deque[_Pending] = deque()
    stages: list[int] = []
    next_window = last_window = zero
    value: Tensor | None
    for point in backwards:
        state, node = point.state, point.node
        if node is None:
            at = int(positions[state])
            # A start may reach beyond an event.
            if at == positions[state] and at < len(raw) and raw[at]:
                # What a predictor evaluates at a node has its share of the node's cotangent, or all of it.
                owner = nodes[at]
                width = widths[owner if owner in widths else state]
                terms = _scaled(1 / plan.equal_step(at), point.mu)
                if state in widths and at in layer:
                    value = jacobians.expand(state, *layer[at], plan.damping(at))
                    terms += [] if value is None else [(1.0, value)]
                if terms and width != 0.0:
                    yield state, width, combine(terms)
            elif state in widths:
                stages.append(state)
            continue
        g = seen[node]
        if node == len(seen) - 1:
            last_window = point.window
        after = point.window if g is None else point.window - g
        for stage in stages:
            fraction = positions[stage] - node
            if positions[stage] == len(seen) - 1:
                # Of a predictor, or of a sweep.
                yield stage, widths[stage], last_window
            else:
                yield stage, widths[stage], weighted_sum((1 - fraction, fraction), (after, next_window))
        stages, next_window = [], point.window
        width = widths.get(state, 0.0)
        if width != 0.0:
            # What E sees of the node comes after a part of its cell.
            jump = None if g is None else -shares_after[node] * g
            if plan.order > 2 and not raw[node]:
                value = point.shift if jump is None else point.shift + jump
                around = nearest_nodes(plan.with_jacobians, node, plan.order - 1)
                pending.append(_Pending(node, width, moments(value, _past(plan, point), plan.order), around))
            else:
                if raw[node]:
                    terms = _scaled(1 / plan.equal_step(node), point.mu)
                    value, slope = layer.get(node, (None, None))
                else:
                    terms, slope = _history(plan, point)
                    value = point.shift
                value = jump if value is None else value if jump is None else value + jump
                damping = plan.damping(node)
                if slope is not None or damping > 0.0:
                    value = jacobians.expand(state, value, slope, damping)
                if value is not None:
                    terms.insert(0, (1.0, value))
                if terms:
                    yield state, width, combine(terms)
        while pending and min(pending[0].around) >= node:
            of = pending.popleft()
            costate = _shifted(plan, of, jacobians)
            if costate is not None:
                yield nodes[of.node], of.width, costate


class _Pending(NamedTuple):
    """A node that waits for the Jacobians at the nodes before it.

    Attributes:
        node: its number.
        width: ω.
        moments: see `shifted_past`.
        around: the nodes whose Jacobians are used, itself first.
    """

    node: int
    width: float
    moments: Moments
    around: list[int]


def _past(plan: FilterPlan, point: AdjointState) -> list[PastTerm]:
    """What the rows after a node use of the time before it."""
    assert point.node is not None
    times, now = plan.times, plan.times[point.node]
    slopes = [PastTerm(plan.time(state) - now, None, of) for state, of in point.slopes_before.items()]
    return slopes + [
        PastTerm(times[node] - now, times[node - 1] - now, of) for node, of in point.increments_before.items()
    ]


def _shifted(plan: FilterPlan, of: _Pending, jacobians: Jacobians) -> Tensor | None:
    nodes, damping = plan.recurrence.nodes, plan.damping(of.node)

    def product(place: int, vector: Tensor) -> Tensor | None:
        return jacobians.product(nodes[of.around[place]], vector)

    def damp(place: int, vector: Tensor) -> Tensor:
        return jacobians.damp(nodes[of.around[place]], damping, vector)

    offsets = [plan.times[node] - plan.times[of.node] for node in of.around]
    return shifted_past(of.moments, offsets, product, damp if damping > 0.0 else None, damping)


def _scaled(weight: float, contributions: Contributions) -> Contributions:
    return [(weight * own, cotangent) for own, cotangent in contributions]


def _history(plan: FilterPlan, point: AdjointState) -> tuple[Contributions, Tensor | None]:
    """H: what a shift of the slopes and increments before a node along the flow would do.

    Returned are Jᵀ H where it is a multiple of what is known, and else H.
    """
    weights: dict[int, float] = {}
    cotangents: dict[int, Tensor] = {}
    for contributions in point.slopes_before.values():
        for weight, cotangent in contributions:
            weights[id(cotangent)] = weights.get(id(cotangent), 0.0) + weight
            cotangents[id(cotangent)] = cotangent
    for node, contributions in point.increments_before.items():
        for weight, cotangent in contributions:
            weights[id(cotangent)] = weights.get(id(cotangent), 0.0) + plan.steps[node - 1] * weight
            cotangents[id(cotangent)] = cotangent
    if len(weights) == len(point.later) == len(point.pulled) == 1:
        ((own, cotangent),) = point.later
        if id(cotangent) in weights:
            # As leapfrog's always is.
            return _scaled(weights[id(cotangent)] / own, point.pulled), None
    terms = [(weights[key], cotangent) for key, cotangent in cotangents.items() if weights[key] != 0.0]
    return [], combine(terms) if terms else None


def _distances(cotangents: Sequence[Tensor | None]) -> list[int | None]:
    """From each node, how many nodes it is to the next observation; None if there is none."""
    distances: list[int | None] = []
    distance: int | None = None
    for cotangent in reversed(cotangents):
        distance = 0 if cotangent is not None else None if distance is None else distance + 1
        distances.append(distance)
    return distances[::-1]
