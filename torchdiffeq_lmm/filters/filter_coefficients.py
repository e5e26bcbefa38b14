"""The filtered cotangents as linear forms: numbers that are known before there are any cotangents.

`filtered_cotangents` is run once for a grid, with symbols in place of cotangents. What comes of it are the weights with
which each filtered cotangent is made of cotangents around it, V + Jᵀ S: what a compiled block needs.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from torchdiffeq_lmm.schemes.discrete_adjoint import AdjointState, Contributions, pass_on
from torchdiffeq_lmm.schemes.recurrence import Layout, Row

from .costate import filtered_cotangents
from .filter_plan import FilterPlan

Kind = Literal["increment", "window", "seen"]
"""D of a state, P of a node, g of a node: see `AdjointState`."""

Symbol = tuple[Kind, int]
Terms = dict[Symbol, float]


class FilteredCotangent(NamedTuple):
    """ω p̃ = V + Jᵀ S at one state.

    Attributes:
        value, slope: V and S, as weights of symbols.
        observed_value, observed_slope: what V and S have besides, as weights of g at the observed nodes, of shape (n,);
            None for nothing.
    """

    value: Terms
    slope: Terms
    observed_value: Tensor | None
    observed_slope: Tensor | None


def filter_coefficients(plan: FilterPlan, observed: Sequence[int]) -> dict[int, FilteredCotangent]:
    """The filtered cotangents of all states that receive one.

    Args:
        plan: of an explicit method.
        observed: the nodes that E sees the states of.
    """
    count = len(plan.steps) + 1
    units = torch.eye(len(observed), dtype=torch.float64, device="cpu").unbind()
    seen: list[Any] = [None] * count
    cotangents: list[Tensor | None] = [None] * count
    for node, unit in zip(observed, units, strict=True):
        seen[node], cotangents[node] = _Form({("seen", node): 1.0}), unit
    zero = torch.zeros(len(observed), dtype=torch.float64, device="cpu")
    jacobians: Any = _Symbolic()
    found = filtered_cotangents(plan, _symbols(plan.recurrence.rows), seen, cotangents, jacobians, zero)
    return {state: (weight * _as_form(costate)).coefficients for state, weight, costate in found}


@dataclass
class _Form:
    """A linear form V + Jᵀ S that takes the place of a cotangent.

    Attributes:
        value, slope: see `FilteredCotangent`.
        dense: what V and S have of the observed nodes.
    """

    value: Mapping[Symbol, float]
    slope: Mapping[Symbol, float] = field(default_factory=dict)
    dense: tuple[Tensor | None, Tensor | None] = (None, None)

    @property
    def coefficients(self) -> FilteredCotangent:
        return FilteredCotangent(dict(self.value), dict(self.slope), *self.dense)

    def __add__(self, other: "_Form | Tensor") -> "_Form":
        return _plus(self, _as_form(other), 1.0)

    def __radd__(self, other: Tensor) -> "_Form":
        return _plus(_as_form(other), self, 1.0)

    def __sub__(self, other: "_Form | Tensor") -> "_Form":
        return _plus(self, _as_form(other), -1.0)

    def __mul__(self, weight: float) -> "_Form":
        scaled = [None if part is None else weight * part for part in self.dense]
        return _Form(
            {symbol: weight * own for symbol, own in self.value.items()},
            {symbol: weight * own for symbol, own in self.slope.items()},
            (scaled[0], scaled[1]),
        )

    __rmul__ = __mul__

    def clone(self) -> "_Form":
        return self

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.add:
            return _plus(_as_form(args[0]), _as_form(args[1]), (kwargs or {}).get("alpha", 1.0))
        if func is torch.Tensor.add:
            return _plus(_as_form(args[0]), _as_form(args[1]), 1.0)
        return NotImplemented


def _as_form(value: "_Form | Tensor") -> _Form:
    return _Form({}, {}, (value, None)) if isinstance(value, Tensor) else value


def _plus(a: _Form, b: _Form, weight: float) -> _Form:
    dense = [_added(x, y, weight) for x, y in zip(a.dense, b.dense, strict=True)]
    return _Form(_sum(a.value, b.value, weight), _sum(a.slope, b.slope, weight), (dense[0], dense[1]))


def _sum(a: Mapping[Symbol, float], b: Mapping[Symbol, float], weight: float) -> Mapping[Symbol, float]:
    if not b:
        return a
    total = defaultdict(float, a)
    for symbol, own in b.items():
        total[symbol] += weight * own
    return total


def _added(a: Tensor | None, b: Tensor | None, weight: float) -> Tensor | None:
    if b is None:
        return a
    return weight * b if a is None else a + weight * b


class _Symbolic:
    """See `costate.Jacobians`; up to second order, and without damping, which explicit methods have none of."""

    def expand(self, state: int, value: Any, slope: Any, step: float) -> _Form:  # noqa: ARG002
        """See `costate.Jacobians`."""
        form = _Form({}) if value is None else _as_form(value)
        if slope is None:
            return form
        pulled = _as_form(slope)
        return _plus(form, _Form({}, pulled.value, (None, pulled.dense[0])), 1.0)


def _symbols(rows: Sequence[Row]) -> Iterator[AdjointState]:
    """As `discrete_adjoint`, for explicit rows, with symbols."""
    layout = Layout(rows)
    slopes: dict[int, Contributions] = {}
    increments: dict[int, Contributions] = {}
    for state in range(len(rows), -1, -1):
        row = rows[state - 1] if state else None
        is_node = row is None or row.is_node
        node = layout.node_before[state]
        later = slopes.pop(state, [])
        window: Any = _Form({("window", node): 1.0} if is_node else {})
        increment: Any = None if row is None else _Form({("increment", state): 1.0})
        pulled: Any = [(1.0, _pulled(rows, state, node, later))] if later else []
        yield AdjointState(
            state, node if is_node else None, later, later, pulled, window, window, increment, slopes, increments
        )
        if is_node:
            increments.pop(node, None)
        if row is not None:
            pass_on(row, state, increment, layout, slopes, increments)


def _pulled(rows: Sequence[Row], state: int, node: int, later: Any) -> _Form:
    """Jᵀ times a sum of cotangents."""
    if (state == 0 or rows[state - 1].is_node) and state < len(rows) and rows[state].is_node:
        # By P_n = P_{n+1} + g_n + Jᵀ μ_n, for nothing else is made of the state.
        return _Form({("window", node): 1.0, ("window", node + 1): -1.0, ("seen", node): -1.0})
    total = _Form({})
    for weight, form in later:
        total = _plus(total, form, weight)
    return _Form({}, total.value)
