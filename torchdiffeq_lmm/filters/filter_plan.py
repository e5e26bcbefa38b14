"""What the gradient filter does where: known from the grid and the method, before there are any cotangents."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

from torchdiffeq_lmm.schemes.methods import MultistepMethod
from torchdiffeq_lmm.schemes.recurrence import Recurrence
from torchdiffeq_lmm.schemes.stability import boundary_layer_of, coefficients
from torchdiffeq_lmm.schemes.variable_order import VariableOrderFamily

CellWeights = Literal["step", "trapezoid"]


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
    """

    recurrence: Recurrence
    steps: list[float]
    widths: dict[int, float]
    raw: list[bool]
    boundary_layer: int
    near: int
    corrects_slope: bool
    is_damped: bool

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
    """
    nodes = list(accumulate(lengths, initial=0.0))
    states = _owners(recurrence, method)
    times = [_time_at(recurrence.positions[state], nodes) for state in states]
    end = nodes[-1]
    lead = [-before, 0.0] if weights == "step" and before is not None else []
    trail = [end, end + after] if weights == "step" and after is not None else []
    shares = cell_widths([*lead, *times, *trail], trail[-1] if trail else end, weights)
    widths = dict(zip(states, shares[len(lead) : len(lead) + len(states)], strict=True))

    # A formula with no slope but the new one is a BDF, or its like.
    is_damped = method is not None and not method.uses_first_slope
    layer = None
    if isinstance(method, MultistepMethod):
        layer = boundary_layer_of(*coefficients(method.on_equal_steps, method.steps))
    is_uniform = all(_are_equal(length, lengths[0]) for length in lengths[:-1])
    # At second order μ_m / h is no better than the formula for any node, and two formulas are worse than one.
    if not isinstance(method, MultistepMethod) or layer is None or (method.order <= 2 and not is_uniform):
        return FilterPlan(recurrence, lengths, widths, [False] * (len(lengths) + 1), 0, 0, False, is_damped)
    # A slope takes part in k steps, and the effects of first order of a change of the step reach as far again.
    reach = method.steps
    raw = raw_nodes(lengths, recurrence.start, reach, max(layer.length, layer.near) + 2 * reach)
    return FilterPlan(recurrence, lengths, widths, raw, layer.length + reach, layer.near, method.order > 1, is_damped)


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


def _are_equal(length: float, other: float) -> bool:
    # Nodes that were added up have been rounded.
    return math.isclose(length, other, rel_tol=1e-9)


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
