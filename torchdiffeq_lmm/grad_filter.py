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
own order as soon as the layer before an observation is over, and that is better than second order. Within the layer,
the first two terms of the difference are known: those of the method for x' = J_m x, expanded in J_m. With w and v the
cotangents μ_m / h in response to a unit observation at node j, by the method's rows for J = 0 and to first order in J,

    p_m = μ_m / h + Σ_{j≥m} ((1 - w_j) g_j + J_mᵀ (t_j - t_m - v_j) g_j) + O(h²),      g_j = ∂E/∂x_j.

The sums over j are themselves adjoint recursions, without any Jacobian. They vanish as the layer ends.

Both use Jᵀ as if h J were small. With an implicit method it need not be, and (1 - h Jᵀ / 4)⁻¹ Jᵀ takes its place: the
same as h goes to 0, and bounded for stiff problems, as their costate is.

Where E observes node m, p jumps there by g_m; the filtered costate is the mean of both limits.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import ClassVar, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .adjoint import AdjointState, combine, discrete_adjoint, plus
from .combination import linear_combination
from .methods import MultistepMethod
from .recurrence import Recurrence
from .stability import coefficients, layer_of

CellWeights = Literal["step", "trapezoid"]


class JacobianProduct(Protocol):
    """The product of the transposed Jacobian at a state with a vector."""

    def __call__(self, state: int, vector: Tensor, step: float) -> Tensor | None:
        """Return (1 - h Jᵀ)⁻¹ Jᵀ v for a step h, or Jᵀ v where that is 0; None is 0."""


@dataclass(frozen=True)
class CostateFilter:
    """The gradient filter, for every method and grid.

    With E the loss, p(t) its costate (the adjoint state, dE/dx at time t) and h_m the step from node m to the next, the
    parameters of the evaluation of f at node m receive the cotangent ``ω_m p̃_m``, where p̃_m is second-order accurate
    for p(t_m), if the method is of second order or more. Away from observations and changes of the step, with Adams and
    BDF methods, it is accurate to the method's own order. The states keep the cotangents of auto-differentiation, so
    gradients with respect to y0 and t do not change.

    Where E observes a node, p jumps there, and p̃_m is the mean of its one-sided limits, weighted by the steps on either
    side. An observation between two nodes is spread over both. What E sees of y0 itself is no matter of the parameters.
    Where a method evaluates f more than once at a node (predictors, the start), one of them receives it all.

    Args:
        weights: ω_m, what one parameter owns.
            ``"step"``: ω_m = h_m. Every step has its own parameter, as in a network with its own layer per step;
            its gradient divided by h_m converges at second order, at every node, to the density of the gradient in
            function space, where the parameters sample a smooth function of t. Where f is evaluated at the last node,
            as implicit methods do, its parameter counts for a step of the length of the one before.
            ``"trapezoid"``: ω_m = (h_{m-1} + h_m) / 2, half a step at the ends. For models in which some parameters
            are shared by all steps (a hypernetwork, a basis in t): their gradient, a sum over m, converges at second
            order, where step weights would make it first order only. Where all parameters are shared no filter is
            needed: there the gradient of auto-differentiation converges by itself, at the order of the method.

    Raises:
        ValueError: `weights` is neither.

    Source: Xu, Chen, Li, Wright, *Correcting auto-differentiation in neural-ODE training* (arXiv 2306.02192) for
    leapfrog, step weights and uniform grids; the derivation for all else heads grad_filter.py.
    """

    weights: CellWeights = "step"
    method: ClassVar[str | None] = None
    """The one method that the filter is for; None for all."""

    def __post_init__(self) -> None:
        if self.weights not in get_args(CellWeights):
            raise ValueError(f"weights must be one of {get_args(CellWeights)}, got {self.weights!r}")


@dataclass(frozen=True)
class LeapfrogFilter(CostateFilter):
    """`CostateFilter` for leapfrog alone, where it costs no product with Jacobians but the parameters'.

    It is second order where leapfrog is; on grids where leapfrog itself is less, so is it: see `Leapfrog`.
    """

    method: ClassVar[str | None] = "leapfrog"


GRAD_FILTERS = {"auto": CostateFilter(), "leapfrog": LeapfrogFilter()}


def resolve_grad_filter(grad_filter: object, method: str) -> CostateFilter | None:
    """The filter that the user asks for, checked against the method that it is to work on.

    Args:
        grad_filter: None, the name of a filter, or a filter.
        method: the name of the method.

    Raises:
        ValueError: there is no filter of that name, or it is for another method.
        TypeError: `grad_filter` is something else.
    """
    if grad_filter is None:
        return None
    known = f"grad_filter must be None, {', '.join(map(repr, GRAD_FILTERS))} or a CostateFilter, got {grad_filter!r}"
    if isinstance(grad_filter, str):
        if grad_filter not in GRAD_FILTERS:
            raise ValueError(known)
        grad_filter = GRAD_FILTERS[grad_filter]
    if not isinstance(grad_filter, CostateFilter):
        raise TypeError(known)
    if grad_filter.method not in (None, method):
        raise ValueError(
            f"grad_filter {grad_filter!r} is for method {grad_filter.method!r}, got method {method!r}; use "
            f"method={grad_filter.method!r}, grad_filter='auto' or no grad_filter"
        )
    return grad_filter


@dataclass(frozen=True)
class FilterPlan:
    """What the filter knows of a solve before there are any cotangents.

    Attributes:
        recurrence: the rows.
        steps: h, of length N.
        widths: ω by state, for the states whose slopes receive a costate.
        raw: of the nodes, which are between equal steps far enough for μ_m / h to be p_m but for the layer.
        layer: how many nodes before an observation its layer is over for sure.
        near: how many of them are so near that the formula for any node is the more accurate one.
        corrects_slope: whether the method is of second order, so that the term of first order in J is known there.
        is_implicit: whether the method is, and the problem may be stiff.
    """

    recurrence: Recurrence
    steps: list[float]
    widths: dict[int, float]
    raw: list[bool]
    layer: int
    near: int
    corrects_slope: bool
    is_implicit: bool

    def damping(self, node: int) -> float:
        """The step by which products with the Jacobian at a node are damped; 0 for explicit methods."""
        return self.steps[max(0, node - 1)] / 4 if self.is_implicit else 0.0


def plan_filter(
    grad_filter: CostateFilter, recurrence: Recurrence, steps: Tensor, method: MultistepMethod | None
) -> FilterPlan:
    """Work out what the filter does where.

    Args:
        grad_filter: whose weights to use.
        recurrence: the rows.
        steps: h, of shape (N,).
        method: the method; None for one-step methods, whose evaluations between the nodes have parameters of their own.
    """
    lengths = steps.tolist()
    nodes = list(accumulate(lengths, initial=0.0))
    evaluated, at_node = recurrence.evaluated, set(recurrence.nodes)
    states = [state for state, flag in enumerate(evaluated) if flag and (method is None or state in at_node)]
    last = recurrence.nodes[-1]
    if method is not None and len(lengths) > recurrence.start and evaluated[last - 1] and last - 1 not in at_node:
        # Only a predictor evaluates f at the last node.
        states.append(last - 1)
    times = [_time_at(recurrence.positions[state], nodes) for state in states]
    widths = dict(zip(states, cell_widths(times, nodes[-1], grad_filter.weights), strict=True))

    implicit = method is not None and method.is_implicit
    layer = None if method is None else layer_of(*coefficients(method.on_equal_steps, method.steps))
    is_uniform = len(set(lengths[:-1])) <= 1
    # At second order μ_m / h is no better than the formula for any node, and two formulas are worse than one.
    if method is None or layer is None or (method.order <= 2 and not is_uniform):
        return FilterPlan(recurrence, lengths, widths, [False] * (len(lengths) + 1), 0, 0, False, implicit)
    # A slope takes part in k steps, and the effects of first order of a change of the step reach as far again.
    reach = method.steps
    raw = raw_nodes(lengths, recurrence.start, reach, max(layer.length, layer.near) + 2 * reach)
    return FilterPlan(recurrence, lengths, widths, raw, layer.length + reach, layer.near, method.order > 1, implicit)


def _time_at(position: float, nodes: Sequence[float]) -> float:
    before = int(position)
    rest = position - before
    return nodes[before] if rest == 0 else (1 - rest) * nodes[before] + rest * nodes[before + 1]


def cell_widths(times: Sequence[float], end: float, weights: CellWeights) -> list[float]:
    """What each evaluation owns of the time from 0 to `end`.

    Args:
        times: of the evaluations, not decreasing. Where two are equal, the first belongs to the step before and the
            second to the step after; they share in proportion to these.
        end: of the solve.
        weights: "step": up to the next time; the last one up to the end, or if it is there, as much as the one before.
            "trapezoid": half-way to the times on either side, and all up to the ends.
    """
    distinct = sorted(set(times))
    gaps = [after - before for before, after in pairwise(distinct)]
    if weights == "step":
        rest = end - distinct[-1]
        widths = [*gaps, rest if rest > 0 else gaps[-1] if gaps else end]
    else:
        bounds = [0.0, *((before + after) / 2 for before, after in pairwise(distinct)), end]
        widths = [after - before for before, after in pairwise(bounds)]
    shared, repeated = [], Counter(times)
    for i, width in enumerate(widths):
        if repeated[distinct[i]] == 2:
            left = gaps[i - 1] / (gaps[i - 1] + gaps[i])
            shared += [left * width, (1 - left) * width]
        else:
            shared.append(width)
    return shared


def raw_nodes(lengths: Sequence[float], start: int, reach: int, layer: int) -> list[bool]:
    """At which nodes μ_m / h is the costate but for the layer before an observation.

    All rows that use the slope there must be of equal steps, and so must those of a layer of nodes after it; the last
    step may be another.
    """
    count = len(lengths)
    # How many steps, the last one aside, are equal from each on.
    run = [1] * count
    for n in range(count - 3, -1, -1):
        run[n] = run[n + 1] + 1 if lengths[n] == lengths[n + 1] else 1
    raw = [False] * (count + 1)
    for m in range(start + 1, count + 1):
        first = max(0, m - reach)
        needed = min(m + layer, count - 1) - first
        raw[m] = run[first] >= needed
    return raw


def filtered_cotangents(
    plan: FilterPlan,
    backwards: Iterable[AdjointState],
    seen: Sequence[Tensor | None],
    seen_by_slopes: Sequence[Tensor | None],
    product: JacobianProduct,
    zero: Tensor,
) -> dict[int, Tensor]:
    """The cotangents ω p̃ of the slopes, by state; 0 where a state is missing.

    Args:
        plan: what to do where.
        backwards: the states of `discrete_adjoint`, as they come.
        seen: g_0, ..., g_N, None for a node that E does not see.
        seen_by_slopes: of each node, Jᵀ times what E sees of slopes there.
        product: the product with the transposed Jacobian at a state.
        zero: a state of zeros.
    """
    positions = plan.recurrence.positions
    cotangents = [plus(node, slope) for node, slope in zip(seen, seen_by_slopes, strict=True)]
    distances = _distances(cotangents)
    raw = [flag and (d is None or d >= plan.near) for flag, d in zip(plan.raw, distances, strict=True)]
    in_layer = [m for m, d in enumerate(distances) if raw[m] and d is not None and d <= plan.layer]
    layer = _layer_terms(plan, in_layer, cotangents, zero)
    filtered: dict[int, Tensor] = {}
    stages: list[int] = []
    next_window = zero
    for point in backwards:
        state, node = point.state, point.node
        if node is None:
            at = int(positions[state])
            # A start may reach beyond an event.
            if at == positions[state] and at < len(raw) and raw[at]:
                # What a predictor evaluates at a node has its share of the node's cotangent, or all of it.
                owner = plan.recurrence.nodes[at]
                width = plan.widths[owner if owner in plan.widths else state]
                terms: list[tuple[float, Tensor | None]] = [(1 / _equal_step(plan, at), point.mu)]
                if state in plan.widths and at in layer:
                    terms += _corrections(layer[at], state, plan.damping(at), product)
                _add_up(filtered, state, width, terms)
            elif state in plan.widths:
                stages.append(state)
            continue
        g = seen[node]
        after = point.window if g is None else point.window - g
        for stage in stages:
            width, fraction = plan.widths[stage], positions[stage] - node
            filtered[stage] = linear_combination((width * (1 - fraction), width * fraction), (after, next_window))
        stages, next_window = [], point.window
        if state not in plan.widths:
            continue
        if raw[node]:
            terms = [(1 / _equal_step(plan, node), point.mu)]
            if node in layer:
                terms += _corrections(layer[node], state, plan.damping(node), product)
        else:
            terms = [(1.0, point.rest), (1.0, point.pulled), (1.0, _pulled_history(plan, point, product))]
        terms.append((-_right_share(plan, node), g))
        _add_up(filtered, state, plan.widths[state], terms)
    return filtered


def _add_up(filtered: dict[int, Tensor], state: int, width: float, terms: list[tuple[float, Tensor | None]]) -> None:
    total = combine([(width * weight, tensor) for weight, tensor in terms if tensor is not None])
    if total is not None:
        filtered[state] = total


def _right_share(plan: FilterPlan, node: int) -> float:
    """How much of the filtered costate at a node is the limit from the right."""
    steps = plan.steps
    before = steps[node - 1] if node > 0 else 0.0
    after = steps[node] if node < len(steps) else 0.0
    state = plan.recurrence.nodes[node]
    if node > 0 and state - 1 in plan.widths and plan.recurrence.positions[state - 1] == node:
        # A stage at the same time takes the limit from the left.
        return 1.0
    return after / (before + after)


def _equal_step(plan: FilterPlan, node: int) -> float:
    return plan.steps[max(0, node - 1)] if node < len(plan.steps) else plan.steps[max(0, node - 2)]


def _pulled_history(plan: FilterPlan, point: AdjointState, product: JacobianProduct) -> Tensor | None:
    """Jᵀ H: what a shift of the slopes and increments before a node along the flow would do."""
    weights: dict[int, float] = {}
    cotangents: dict[int, Tensor] = {}
    shares = [(1.0, contributions) for contributions in point.slopes_before.values()]
    shares += [(plan.steps[node - 1], contributions) for node, contributions in point.increments_before.items()]
    for share, contributions in shares:
        for weight, cotangent in contributions:
            weights[id(cotangent)] = weights.get(id(cotangent), 0.0) + share * weight
            cotangents[id(cotangent)] = cotangent
    if len(weights) == len(point.later) == 1 and point.pulled is not None:
        ((own, cotangent),) = point.later
        if id(cotangent) in weights:
            # H is a multiple of what has been pulled back already, as leapfrog's always is.
            return point.pulled * (weights[id(cotangent)] / own)
    history = combine([(weights[key], cotangent) for key, cotangent in cotangents.items()])
    assert point.node is not None
    return None if history is None else product(point.state, history, plan.damping(point.node))


class _LayerTerms(NamedTuple):
    """At one node, Σ_j (1 - w_j) g_j and Σ_j (t_j - t_m - v_j) g_j; None where the method is not of second order."""

    value: Tensor
    slope: Tensor | None


def _corrections(
    terms: _LayerTerms, state: int, step: float, product: JacobianProduct
) -> list[tuple[float, Tensor | None]]:
    return [(1.0, terms.value), (1.0, None if terms.slope is None else product(state, terms.slope, step))]


def _layer_terms(
    plan: FilterPlan, active: Sequence[int], cotangents: Sequence[Tensor | None], zero: Tensor
) -> dict[int, _LayerTerms]:
    """The terms of the layer at the active nodes, which are in increasing order."""
    if not active:
        return {}
    rows = plan.recurrence.rows
    linearisation = _FirstOrder(discrete_adjoint(rows, cotangents, _NoJacobian(), zero))
    terms: dict[int, _LayerTerms] = {}
    # Σ g_j and Σ (t_j - t_m) g_j over the nodes from m on.
    total = moment = zero
    node = len(plan.steps)
    for point in discrete_adjoint(rows, [None] * len(cotangents), linearisation, zero):
        if point.node is not None:
            node = point.node
            if node < active[0]:
                break
            if node < len(plan.steps):
                moment = moment + plan.steps[node] * total
            g = cotangents[node]
            total = total if g is None else total + g
            terms[node] = _LayerTerms(total, moment if plan.corrects_slope else None)
        elif plan.recurrence.positions[point.state] != node:
            continue
        # All slopes at the node, of predictors too.
        h = _equal_step(plan, node)
        value, slope = terms[node]
        terms[node] = _LayerTerms(
            _minus(value, linearisation.point.mu, h), None if slope is None else _minus(slope, point.mu, h)
        )
    return {node: terms[node] for node in active}


def _distances(cotangents: Sequence[Tensor | None]) -> list[int | None]:
    """From each node, how many nodes it is to the next observation; None if there is none."""
    distances: list[int | None] = []
    distance: int | None = None
    for cotangent in reversed(cotangents):
        distance = 0 if cotangent is not None else None if distance is None else distance + 1
        distances.append(distance)
    return distances[::-1]


def _minus(total: Tensor, mu: Tensor | None, h: float) -> Tensor:
    return total if mu is None else total - mu / h


class _NoJacobian:
    """The linearisation of x' = 0."""

    def pull_back(self, state: int, cotangent: Tensor | None) -> None:  # noqa: ARG002
        return None

    def solve(self, state: int, weight: float, rhs: Tensor) -> Tensor:  # noqa: ARG002
        return rhs


class _FirstOrder:
    """The linearisation of x' = ε x, the part of first order in ε.

    Args:
        backwards: the adjoint for ε = 0; it goes along state by state, and `point` is where it is.
    """

    def __init__(self, backwards: Iterator[AdjointState]) -> None:
        self._backwards = backwards
        self.point: AdjointState

    def pull_back(self, state: int, cotangent: Tensor | None) -> Tensor | None:  # noqa: ARG002
        self.point = next(self._backwards)
        return combine(self.point.later)

    def solve(self, state: int, weight: float, rhs: Tensor) -> Tensor:  # noqa: ARG002
        increment = self.point.increment
        return rhs if increment is None else rhs + weight * increment


def filter_gradient(grad: Tensor, dim: int = 0) -> Tensor:
    """Filter a finished auto-differentiation gradient of leapfrog's per-step parameters.

    For N steps of equal size h, the first an Euler step, with step m the only one to use entry m:

        G̃_m = ¼ G_{m-1} + ½ G_m + ¼ G_{m+1}   (m ≥ 1),      G̃_0 = 2 G̃_1 - G̃_2,

    where G_0 counts twice on the right-hand sides and G_N = 0. ``G̃_m / h`` is second-order accurate for the density
    of the functional gradient, where the parameters sample a smooth function of t: the average mixes the ∂f/∂θ of three
    steps. Where they do not (freshly drawn weights), where an entry is used in more than one step, and on other grids
    use ``grad_filter="leapfrog"``, which mixes costates alone.

    Args:
        grad: the stack of gradients, of any shape; floating or complex.
        dim: the dimension that counts the steps; its size N must be at least 3.

    Returns:
        A new tensor of the shape, dtype and device of `grad`.

    Raises:
        TypeError: `grad` is not a floating or complex tensor, or `dim` not an int.
        ValueError: `dim` is no dimension of `grad`, or has fewer than 3 entries.

    Source: Xu, Chen, Li, Wright (arXiv 2306.02192).
    """
    _check_stack("grad", grad, dim)
    stack = grad.movedim(dim, 0)
    # The Euler step that starts leapfrog has half the weight of the others.
    left = torch.cat([2 * stack[:1], stack[1:-1]])
    right = torch.cat([stack[2:], torch.zeros_like(stack[:1])])
    inner = left / 4 + stack[1:] / 2 + right / 4
    return torch.cat([2 * inner[:1] - inner[1:2], inner]).movedim(0, dim)


def register_grad_filter(parameter: Tensor) -> RemovableHandle:
    """Have `filter_gradient` applied to every gradient that arrives at `parameter`.

    Args:
        parameter: a tensor whose leading dimension counts the leapfrog steps, at least 3, all of equal size; entry m is
            used in step m only.

    Returns:
        A handle; its ``remove()`` takes the filter off again. Registered twice, it filters twice; so it does beside
        ``grad_filter="leapfrog"``, with which it agrees to second order but not exactly.

    Raises:
        TypeError: `parameter` is not a floating or complex tensor.
        ValueError: it does not require a gradient, or has fewer than 3 steps.
    """
    _check_stack("parameter", parameter, 0)
    if not parameter.requires_grad:
        raise ValueError("parameter must require a gradient, got one with requires_grad=False")
    handle: RemovableHandle = parameter.register_hook(filter_gradient)
    return handle


def _check_stack(name: str, stack: Tensor, dim: int) -> None:
    if not isinstance(stack, Tensor) or not (stack.is_floating_point() or stack.is_complex()):
        got = f"dtype {stack.dtype}" if isinstance(stack, Tensor) else type(stack).__name__
        raise TypeError(f"{name} must be a floating or complex tensor, got {got}")
    if not isinstance(dim, int):
        raise TypeError(f"dim must be an int, got {dim!r}")
    if not -stack.ndim <= dim < stack.ndim:
        raise ValueError(f"{name} must have a dimension {dim} that counts the steps, got shape {tuple(stack.shape)}")
    if stack.shape[dim] < 3:
        raise ValueError(
            f"{name} must have at least 3 steps along dimension {dim}, got shape {tuple(stack.shape)}; the filter's "
            f"first entry is extrapolated from the next two"
        )
