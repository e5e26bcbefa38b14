"""What the gradient filter does where: known from the grid and the method, before there are any cotangents."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import isclose

from torchdiffeq_lmm.schemes.methods import MultistepMethod
from torchdiffeq_lmm.schemes.recurrence import Recurrence
from torchdiffeq_lmm.schemes.stability import boundary_layer_of, coefficients, layer_length
from torchdiffeq_lmm.schemes.variable_order import VariableOrderFamily

from .cell_weights import CellWeights, cell_widths, interpolatory_shares


@dataclass(frozen=True)
class FilterPlan:
    """What the filter knows of a solve before there are any cotangents.

    Attributes:
        recurrence: the rows.
        steps: h, of length N.
        widths: ω by state, for the states whose slopes receive a costate.
        raw: of the nodes, which are between equal steps far enough for μ_m / h to be p_m but for the boundary layer.
        boundary_layer: how many nodes before an observation its boundary layer is over for sure.
        near: how many of them are so near that the formula for any node is the more accurate one.
        corrects_slope: whether the method is of second order, so that the term of first order in J is known there.
        is_damped: whether products with Jacobians are damped, for the method is one for stiff problems.
        order: of the costates, at any node.
        quadrature: the times of the states that receive a costate, where their weights are those of a quadrature of
            that order; None where they are `widths`.
    """

    recurrence: Recurrence
    steps: list[float]
    widths: dict[int, float]
    raw: list[bool]
    boundary_layer: int
    near: int
    corrects_slope: bool
    is_damped: bool
    order: int
    quadrature: dict[int, float] | None

    @property
    def reach(self) -> int:
        """At how many nodes before a node the filter needs Jacobians for it."""
        return max(0, self.order - 2)

    @cached_property
    def times(self) -> list[float]:
        """Of the nodes, from the first one."""
        return list(accumulate(self.steps, initial=0.0))

    @cached_property
    def with_jacobians(self) -> list[int]:
        """The nodes at whose states f is evaluated."""
        return [n for n, state in enumerate(self.recurrence.nodes) if self.recurrence.evaluated[state]]

    def time(self, state: int) -> float:
        """Of a state, from the first node."""
        return _time_at(self.recurrence.positions[state], self.times)

    def owned(self, observed: Sequence[bool]) -> tuple[dict[int, float], dict[int, float]]:
        """ω by state, and how much of it is after the state's node, where the costate jumps if it is observed."""
        if self.quadrature is None:
            return self.widths, {node: self._share_after(node) for node, flag in enumerate(observed) if flag}
        breaks = [self.times[node] for node in range(1, len(self.steps)) if observed[node]]
        shares = interpolatory_shares(list(self.quadrature.values()), breaks, self.times[-1], self.order)
        of_state = dict(zip(self.quadrature, shares, strict=True))
        widths = {state: before + after for state, (before, after) in of_state.items()}
        at_node = {node: of_state.get(self.recurrence.nodes[node]) for node, flag in enumerate(observed) if flag}
        return widths, {node: s.after / sum(s) for node, s in at_node.items() if s is not None and sum(s) != 0.0}

    def _share_after(self, node: int) -> float:
        before = self.steps[node - 1] if node > 0 else 0.0
        after = self.steps[node] if node < len(self.steps) else 0.0
        state = self.recurrence.nodes[node]
        if node > 0 and state - 1 in self.widths and self.recurrence.positions[state - 1] == node:
            # A stage at the same time takes the limit from the left.
            return 1.0
        return after / (before + after)

    def equal_step(self, node: int) -> float:
        """The length of the steps around a node between equal ones."""
        return self.steps[max(0, node - 1)] if node < len(self.steps) else self.steps[max(0, node - 2)]

    def damping(self, node: int) -> float:
        """τ at a node: the step by which the formulas are damped; 0 where they are not."""
        return self.steps[max(0, node - 1)] / 4 if self.is_damped else 0.0


def plan_filter(
    weights: CellWeights,
    recurrence: Recurrence,
    lengths: list[float],
    method: MultistepMethod | VariableOrderFamily | None,
    before: float | None = None,
    after: float | None = None,
    order: int = 2,
) -> FilterPlan:
    """Work out what the filter does where.

    Args:
        weights: ω.
        recurrence: the rows.
        lengths: h, of length N.
        method: the method, or its family, where orders change; None for one-step methods, whose evaluations between the
            nodes have parameters of their own.
        before: where f jumps at the first node, the step that ends there, if f is evaluated at its end too: see
            `step_to_end`. With step weights both share the cell of the node, as two evaluations at one time do; with
            trapezoid weights each has a half cell of its own anyway.
        after: where f jumps at the last node, the step that begins there.
        order: of the costates that is wanted; that of the method, if it is lower, is what they have.
    """
    order = 2 if method is None else max(2, min(order, method.order))
    nodes = list(accumulate(lengths, initial=0.0))
    states = _owners(recurrence, method)
    times = [_time_at(recurrence.positions[state], nodes) for state in states]
    end = nodes[-1]
    lead = [-before, 0.0] if weights == "step" and before is not None else []
    trail = [end, end + after] if weights == "step" and after is not None else []
    shares = cell_widths([*lead, *times, *trail], trail[-1] if trail else end, weights)
    widths = dict(zip(states, shares[len(lead) : len(lead) + len(states)], strict=True))

    quadrature = dict(zip(states, times, strict=True)) if weights == "trapezoid" and order > 2 else None

    # A formula with no slope but the new one is a BDF, or its like.
    is_damped = method is not None and not method.uses_first_slope
    layer = None
    if isinstance(method, MultistepMethod):
        layer = boundary_layer_of(*coefficients(method.on_equal_steps, method.steps))
    is_uniform = all(_are_equal(length, lengths[0]) for length in lengths[:-1])
    # At second order μ_m / h is no better than the formula for any node, and two formulas are worse than one.
    if not isinstance(method, MultistepMethod) or layer is None or (method.order <= 2 and not is_uniform):
        raw, length, near, corrects_slope = [False] * (len(lengths) + 1), 0, 0, False
        return FilterPlan(recurrence, lengths, widths, raw, length, near, corrects_slope, is_damped, order, quadrature)
    # A slope takes part in k steps, and the effects of first order of a change of the step reach as far again.
    reach = method.steps
    raw = raw_nodes(lengths, recurrence.start, reach, max(layer.length, layer.near) + 2 * reach)
    near = layer.near
    if order > 2:
        beyond = layer_length(*coefficients(method.on_equal_steps, method.steps), order, len(lengths))
        near = reach + (layer.length if beyond is None else beyond)
    return FilterPlan(
        recurrence,
        lengths,
        widths,
        raw,
        layer.length + reach,
        near,
        method.order > 1,
        is_damped,
        order,
        quadrature,
    )


def step_to_end(
    recurrence: Recurrence, lengths: list[float], method: MultistepMethod | VariableOrderFamily | None
) -> float | None:
    """The last step, where f is evaluated at its end for a parameter there; else None."""
    is_at_end = recurrence.positions[_owners(recurrence, method)[-1]] == len(lengths)
    return lengths[-1] if is_at_end else None


def _owners(recurrence: Recurrence, method: MultistepMethod | VariableOrderFamily | None) -> list[int]:
    """The states whose slopes receive a costate, which own a part of the time; see `plan_filter`."""
    evaluated, at_node = recurrence.evaluated, set(recurrence.nodes)
    states = [state for state, flag in enumerate(evaluated) if flag and (method is None or state in at_node)]
    return states if method is None else states + _beside_the_last_node(recurrence)


def _beside_the_last_node(recurrence: Recurrence) -> list[int]:
    """The state whose slope is the last one at the time of the last node, where it is not the node's own.

    It is a predictor's or, where the start makes all steps, that of the last sweep but one.
    """
    last, steps, evaluated = recurrence.nodes[-1], len(recurrence.nodes) - 1, recurrence.evaluated
    if evaluated[last]:
        return []
    first = 0 if steps <= recurrence.start else last - 1
    return [state for state in range(first, last) if evaluated[state] and recurrence.positions[state] == steps][-1:]


def _time_at(position: float, nodes: Sequence[float]) -> float:
    before = int(position)
    rest = position - before
    return nodes[before] if rest == 0 else (1 - rest) * nodes[before] + rest * nodes[before + 1]


def _are_equal(length: float, other: float) -> bool:
    # Nodes that were added up have been rounded.
    return isclose(length, other, rel_tol=1e-9)


def raw_nodes(lengths: Sequence[float], start: int, reach: int, layer: int) -> list[bool]:
    """At which nodes μ_m / h is the costate but for the boundary layer before an observation.

    All rows that use the slope there must be of equal steps, and so must those of so many nodes after it; the last
    step may be another.
    """
    count = len(lengths)
    # How many steps, the last one aside, are equal from each on.
    run = [1] * count
    for n in range(count - 3, -1, -1):
        run[n] = run[n + 1] + 1 if _are_equal(lengths[n], lengths[n + 1]) else 1
    raw = [False] * (count + 1)
    for m in range(start + 1, count + 1):
        first = max(0, m - reach)
        needed = min(m + layer, count - 1) - first
        raw[m] = run[first] >= needed
    return raw
