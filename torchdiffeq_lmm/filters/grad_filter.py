"""The gradient filters that users can ask for. What they do is derived in `filters.costate`."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from .cell_weights import CellWeights

FilterOrder = Literal[2, 3, "method"]

HIGHEST_ORDER = 5
"""Of costates: order q takes 1 + (q - 1) (q - 2) / 2 products with Jacobians at a node."""


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
    So where E sums up a running cost over all nodes, Σ w_j ℓ(x_j), p̃_m is second order for its integral's costate at
    all nodes but the first, and the last where f is evaluated there: of those only one limit is in time, and it is off
    by about w_m ∂ℓ/∂x, which is first order. A running cost that is part of the state has no such ends.
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
        order: of p̃_m. 2, 3, or ``"method"`` for the method's own, at most 5; by a method of a lower order, that. So are
            the totals of shared parameters with trapezoid weights, but of second order where every node is observed.
            An observation between nodes counts to the order of its interpolation. SDEs take 2, whatever is given.

    Raises:
        ValueError: `weights` or `order` is none of these.

    Source: Xu, Chen, Li, Wright, *Correcting auto-differentiation in neural-ODE training* (arXiv 2306.02192) for
    leapfrog, step weights and uniform grids; the derivation for all else heads `filters.costate`, for higher orders
    `filters.shifted_past`.
    """

    weights: CellWeights = "step"
    order: FilterOrder = 2
    method: ClassVar[str | None] = None
    """The one method that the filter is for; None for all."""

    def __post_init__(self) -> None:
        if self.weights not in get_args(CellWeights):
            raise ValueError(f"weights must be one of {get_args(CellWeights)}, got {self.weights!r}")
        if isinstance(self.order, bool) or self.order not in get_args(FilterOrder):
            raise ValueError(f"order must be one of {get_args(FilterOrder)}, got {self.order!r}")

    @property
    def highest_order(self) -> int:
        """Of the costates, by a method of any order."""
        return HIGHEST_ORDER if self.order == "method" else self.order


@dataclass(frozen=True)
class LeapfrogFilter(CostateFilter):
    """`CostateFilter`, refused for any method but leapfrog.

    It is second order where leapfrog is; on grids where leapfrog itself is less, so is it: see `Leapfrog`.
    """

    method: ClassVar[str | None] = "leapfrog"


@dataclass(frozen=True)
class SmoothFilter:
    """No filter for gradients, but observations that do not make them oscillate: leapfrog on equal steps.

    The solution is the same. For gradients, an observed state counts as Gragg's smoothed value, which differs by O(h²).
    What auto-differentiation then gives the parameters of the evaluation of f at node m is ``ω_m p̃_m``, with p̃_m
    second-order accurate for the costate p(t_m) and trapezoid weights ω_m: h between the ends, h / 2 at the first node
    and at the last one, where f is evaluated too. So both parameters per node, of which there are N + 1, and shared
    ones get second-order accurate gradients. The gradient with respect to y0 changes by O(h²) and stays second order;
    so does the one with respect to t.

    It costs one evaluation of f more per solve, no other product with a Jacobian, and leaves all that
    auto-differentiation can do: second derivatives, hooks, side effects of func.

    Source: `filters.smoothed_observation`.
    """

    method: ClassVar[str | None] = "leapfrog"


AnyGradFilter = CostateFilter | SmoothFilter

GRAD_FILTERS: dict[str, AnyGradFilter] = {
    "auto": CostateFilter(),
    "leapfrog": LeapfrogFilter(),
    "smooth": SmoothFilter(),
}


def resolve_grad_filter(grad_filter: object, method: str, smooth: bool = True) -> AnyGradFilter | None:
    """The filter that the user asks for, checked against the method that it is to work on.

    Args:
        grad_filter: None, the name of a filter, or a filter.
        method: the name of the method.
        smooth: whether a `SmoothFilter` is one of those that there are.

    Raises:
        ValueError: there is no filter of that name, or it is for another method.
        TypeError: `grad_filter` is something else.
    """
    if grad_filter is None:
        return None
    kinds = (CostateFilter, SmoothFilter) if smooth else (CostateFilter,)
    named = {name: known for name, known in GRAD_FILTERS.items() if isinstance(known, kinds)}
    choices = [*map(repr, named), *(f"a {kind.__name__}" for kind in kinds)]
    expected = f"grad_filter must be None, {', '.join(choices[:-1])} or {choices[-1]}, got {grad_filter!r}"
    if isinstance(grad_filter, str):
        if grad_filter not in named:
            raise ValueError(expected)
        grad_filter = named[grad_filter]
    if not isinstance(grad_filter, kinds):
        raise TypeError(expected)
    if grad_filter.method not in (None, method):
        raise ValueError(
            f"grad_filter {grad_filter!r} is for method {grad_filter.method!r}, got method {method!r}; use "
            f"method={grad_filter.method!r}, grad_filter='auto' or no grad_filter"
        )
    return grad_filter
