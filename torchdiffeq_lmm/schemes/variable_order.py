"""Families of methods whose order may change from step to step: the rows of a step, and what it misses the flow by.

At order k a BDF step makes x_{n+1} by the polynomial through it and the k latest states; an Adams step predicts it by
the integral of the polynomial through the k latest slopes, evaluates f there, and corrects it by that of the polynomial
through one slope more (PECE, with local extrapolation). All by the formulas for the nodes as they are.

**Local errors.** With x[...] the divided difference of the solution at nodes t_{n+1}, ..., a BDF step of order k misses
it by no more than

    E_k = h (t_{n+1} - t_n) ... (t_{n+1} - t_{n+1-k}) x[t_{n+1}, ..., t_{n-k}],

which is the distance between x_{n+1} and the polynomial through the k + 1 states before, times h / (t_{n+1} - t_{n-k}).
For an Adams step E_k is the difference of the correctors through k + 1 and through k slopes. Both are known for the
neighbouring orders as well, as far as the past reaches.

Source: Brayton, Gustavson, Hachtel, *A new efficient algorithm for solving differential-algebraic systems using
implicit backward differentiation formulas* (1972); Byrne, Hindmarsh, *A polyalgorithm for the numerical solution of
ordinary differential equations* (1975); Shampine, Gordon, *Computer Solution of Ordinary Differential Equations*
(1975).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate
from math import prod
from typing import NamedTuple

from .methods import Formula, Nodes, adams_bashforth_formula, adams_moulton_formula, bdf_formula
from .polynomials import divided_difference_weights, extrapolation_weights
from .recurrence import Keeps, Row, Terms
from .unrolling import scaled_nodes
from .variable_step_stability import amplification

_PATTERNS = 4096
"""Of so many patterns of steps the weights are remembered, from solve to solve."""

ADAMS_GROWTH = 2.0
"""As in Shampine and Gordon's program: beyond it the weights of slopes, which alternate, grow fast with the order."""

MAX_AMPLIFICATION = 10.0
"""By no more than this a longer BDF step, and those as long after it, may amplify errors of the past."""


class Estimate(NamedTuple):
    """A local error as a weighted sum of what is known after a step.

    Attributes:
        increments: weights of the increments d between nodes, by lag; that of the step has lag 0.
        slopes: weights of the slopes, by lag, in the unit of time.
    """

    increments: Terms
    slopes: Terms


@dataclass(frozen=True)
class VariableOrderFamily:
    """The methods of a family, of orders 1 to `max_order`.

    Attributes:
        name: the name under which torchdiffeq knows it.
        is_implicit: whether every step has an equation to solve, as one of BDF has; else it is one of Adams.
        max_order: of the highest.
    """

    name: str
    is_implicit: bool
    max_order: int

    @property
    def order(self) -> int:
        """The highest order."""
        return self.max_order

    @property
    def remembers_slopes(self) -> bool:
        """Whether it uses other slopes than the latest."""
        return not self.is_implicit

    @property
    def uses_first_slope(self) -> bool:
        """Whether f at t_0 takes part."""
        return not self.is_implicit

    def rows(self, order: int, lengths: Sequence[float]) -> tuple[Row, ...]:
        """The rows of a step.

        Args:
            order: k, at most the number of steps, this one counted.
            lengths: of this step and of those before it, the latest first.
        """
        if self.is_implicit:
            return _bdf_rows(order, tuple(lengths[: order + 1]), self.max_order)
        return _adams_rows(order, tuple(lengths[:order]), self.max_order)

    def error(self, order: int, lengths: Sequence[float]) -> Estimate | None:
        """What a step of an order would have missed the flow by, after a step of this or a neighbouring order.

        Args:
            order: k.
            lengths: as in `rows`.

        Returns:
            None where the order is none of the family, or the past does not reach so far.
        """
        needed = order + 1 if self.is_implicit and len(lengths) > 1 else order
        if not 1 <= order <= self.max_order or needed > len(lengths):
            return None
        return _bdf_error(tuple(lengths[:needed])) if self.is_implicit else _adams_error(tuple(lengths[:needed]))

    def largest_growth(self, order: int) -> float:
        """By how much a step may be longer than those before it."""
        return _largest_bdf_growth(order) if self.is_implicit else ADAMS_GROWTH

    def reach(self, order: int) -> int:
        """Through how many states before the new one goes the polynomial between the nodes, if there are so many."""
        return order if self.is_implicit else order + 1


@lru_cache(_PATTERNS)
def _bdf_rows(order: int, lengths: tuple[float, ...], max_order: int) -> tuple[Row, ...]:
    is_first = len(lengths) == 1
    formula = _formula(bdf_formula, order, _ratios(lengths[:order]))
    row = Row(
        evaluates=is_first,
        increments=_terms(formula.increments),
        slopes=(),
        implicit=lengths[0] * formula.implicit,
        # Euler's method is the polynomial through the first state with its slope.
        guess=((0, 1.0),) if is_first else (),
        is_node=True,
        keeps=None if is_first else Keeps(0, max_order + 1),
        predictor=() if is_first else _terms(_bdf_predictor(_ratios(lengths))),
    )
    return (row,)


@lru_cache(_PATTERNS)
def _bdf_predictor(ratios: tuple[float, ...]) -> tuple[float, ...]:
    nodes = scaled_nodes(ratios)
    # In increments: the sum of the weights of the states is 1.
    sums = list(accumulate(extrapolation_weights(nodes[1:], nodes[0])))[:-1]
    return tuple(float(s - 1) for s in sums)


@lru_cache(_PATTERNS)
def _bdf_error(lengths: tuple[float, ...]) -> Estimate:
    if len(lengths) == 1:
        # As if there were a state before the first one, by its slope.
        return Estimate(((0, 0.5),), ((1, -0.5 * lengths[0]),))
    return Estimate(_terms(_bdf_error_weights(_ratios(lengths))), ())


@lru_cache(_PATTERNS)
def _bdf_error_weights(ratios: tuple[float, ...]) -> tuple[float, ...]:
    nodes = scaled_nodes(ratios)
    scale = prod((nodes[0] - node for node in nodes[1:-1]), start=nodes[0] * 0 + 1)
    sums = list(accumulate(divided_difference_weights(nodes)))[:-1]
    return tuple(float(scale * s) for s in sums)


@lru_cache(_PATTERNS)
def _adams_rows(order: int, lengths: tuple[float, ...], max_order: int) -> tuple[Row, ...]:
    h, ratios = lengths[0], _ratios(lengths)
    predictor = _formula(adams_bashforth_formula, order, ratios)
    corrector = _formula(adams_moulton_formula, order + 1, ratios)
    # Of every step there are two slopes, one at what was predicted.
    predicted = Row(
        evaluates=True,
        increments=(),
        slopes=tuple((2 * i, h * weight) for i, weight in enumerate(predictor.slopes)),
        implicit=None,
        guess=(),
        is_node=False,
        keeps=None,
    )
    corrected = predicted._replace(
        slopes=_adams_terms(h, corrector.implicit, corrector.slopes), is_node=True, keeps=Keeps(2 * max_order, 0)
    )
    return predicted, corrected


@lru_cache(_PATTERNS)
def _adams_error(lengths: tuple[float, ...]) -> Estimate:
    order, ratios = len(lengths), _ratios(lengths)
    higher = _formula(adams_moulton_formula, order + 1, ratios)
    lower = _formula(adams_moulton_formula, order, ratios[: order - 1] or ratios)
    slopes = [a - b for a, b in zip(higher.slopes, (*lower.slopes, 0.0), strict=True)]
    return Estimate((), _adams_terms(lengths[0], higher.implicit - lower.implicit, slopes))


@lru_cache(_PATTERNS)
def _formula(formula: Callable[[int, Nodes], Formula], k: int, ratios: tuple[float, ...]) -> Formula:
    """A formula as numbers, in units of the latest step; the same for all steps of equal lengths."""
    exact = formula(k, scaled_nodes(ratios))
    return Formula(tuple(map(float, exact.increments)), tuple(map(float, exact.slopes)), float(exact.implicit))


def _ratios(lengths: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(length / lengths[0] for length in lengths)


def _adams_terms(h: float, new: float, slopes: Sequence[float]) -> Terms:
    return ((0, h * new), *((2 * i + 1, h * weight) for i, weight in enumerate(slopes)))


def _terms(weights: Sequence[float]) -> Terms:
    return tuple(enumerate(weights))


@cache
def _largest_bdf_growth(order: int) -> float:
    """The largest ratio, up to 10, of one step to those before it, and after it to itself, that is tolerable."""
    steps = 4 * order

    def amplifies(ratio: float) -> bool:
        lengths = [1.0] * steps
        weights = []
        for _ in range(steps):
            lengths.insert(0, ratio)
            weights.append([float(e) for e in bdf_formula(order, scaled_nodes(lengths[:order])).increments])
        return amplification(weights) > MAX_AMPLIFICATION

    low, high = 1.0, 10.0
    if order == 1 or not amplifies(high):
        return high
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if amplifies(middle) else (middle, high)
    return low


FAMILIES = (VariableOrderFamily("bdf", True, 5), VariableOrderFamily("adams", False, 12))
